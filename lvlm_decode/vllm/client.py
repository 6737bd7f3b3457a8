"""The offline client: what ``vllm.LLM`` is made with, and ``generate``."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..method import Method
from ..methods import parse
from .served import check_served
from .views import Group, Views

#: Of each engine, what makes its views.
_VIEWS: weakref.WeakKeyDictionary[Any, Views] = weakref.WeakKeyDictionary()


def engine_args(*, features: bool = False, overlap: bool = False) -> dict[str, Any]:
    """What ``vllm.LLM(model, **engine_args())`` and ``AsyncEngineArgs(model=model, **engine_args())`` need.

    Args:
        features: let views of image features in (DAMRO, DCD), which travel as embeddings of the whole prompt. vLLM trusts
            embeddings; leave it out where clients other than this library can reach the engine.
        overlap: overlap scheduling with forwards, vLLM's own default on GPUs.

    Raises:
        DependencyError: vLLM is missing, or a release that is not known.
    """
    from .installed import port

    port().check(port().probe())
    name = "AsyncGangScheduler" if overlap else "GangScheduler"
    args: dict[str, Any] = {
        "scheduler_cls": f"lvlm_decode.vllm.scheduler.{name}",
        "logits_processors": ["lvlm_decode.vllm.processor:Grouped"],
        "async_scheduling": overlap,
        # Views bring pixels that are normalised; a device that normalises would do it again.
        "mm_device_do_normalize": False,
    }
    if features:
        args["enable_prompt_embeds"] = True
    return args


def generate(
    llm: Any,
    method: Method | str,
    samples: Sequence[Mapping[str, Any]],
    params: Any,
    *,
    views: Views | None = None,
    progress: bool = False,
) -> list[Any]:
    """The answers to ``samples``, in their order: vLLM's ``RequestOutput`` of each sample's view 0.

    Args:
        llm: a ``vllm.LLM`` made with :func:`engine_args`.
        method: for instance ``VCD(alpha=1.0)``, ``"vcd+icd"``; ``"plain"`` is the model itself with draws keyed by sample.
        samples: see :meth:`Views.group`.
        params: the caller's ``vllm.SamplingParams``.
        views: what makes the requests; made from the engine's model when left out.
        progress: show vLLM's progress bar.

    Raises:
        UnsupportedError: a method, a family or a setting that cannot be served.
        InputError: a sample that cannot be read or is too long, or an engine without this library's scheduler.
    """
    from .installed import port

    method = parse(method) if isinstance(method, str) else method
    check_served(method)
    facts = port().facts(llm)
    if not facts.gangs or facts.normalizes:
        raise InputError(
            "this vllm.LLM is not made for the views of a sample; make it with vllm.LLM(model, **lvlm_decode.vllm.engine_args())."
        )
    if views is None:
        views = _VIEWS.get(llm)
    if views is None:
        views = _VIEWS[llm] = Views(
            facts.model, ask=lambda prompts, n: port().greedy(llm, prompts, n), revision=facts.revision
        )
    groups: list[Group] = []
    for sample in samples:
        group = views.group(method, sample, params, max_model_len=facts.max_model_len)
        if len(group.ids) > facts.max_num_seqs:
            raise InputError(
                f"{method.name} has {len(group.ids)} views and the engine runs max_num_seqs={facts.max_num_seqs} requests at "
                "once; make it with more."
            )
        if any("prompt_embeds" in prompt for prompt in group.prompts) and not facts.embeds:
            raise InputError(f"{method.name} shows image features; make the engine with engine_args(features=True).")
        groups.append(group)
    prompts = [prompt for group in groups for prompt in group.prompts]
    outputs = port().run(llm, prompts, [own for group in groups for own in group.params], progress)
    answers, at = [], 0
    for group, sample in zip(groups, samples):
        own = outputs[at : at + len(group.ids)]
        at += len(group.ids)
        said = [list(output.outputs[0].token_ids) for output in own]
        if any(tokens != said[0] for tokens in said[1:]):
            raise RuntimeError(
                f"the views of sample {sample.get('id')!r} did not stay together in vLLM; please report it with the engine's "
                "settings."
            )
        answers.append(own[0])
    return answers
