"""attach and detach: a Hugging Face model becomes the mitigated model for the length of each ``generate()`` call.

Only the instance is touched: ``attach`` sets ``generate`` on it, and each call replaces ``forward`` of the decoding module
by one that runs all views stacked. Both are put back, also after an exception and under accelerate's hooks.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StaticCache

from ..errors import InputError, UnsupportedError
from ..families import family_of
from ..families.base import Encoded, Family
from ..method import Method, Probes, View
from . import hf, sampling
from .hf import instance_attribute
from .prepare import Batch, Sample, views_of
from .stack import Lane, Lanes, check_execution

_ATTACHED = "_lvlm_decode_attached"
_MISSING = object()


class Run:
    """One call of ``generate()``: the samples, their views, and the lanes that run them.

    Args:
        model: the LVLM the method is attached to.
        inputs: tensors by name, as the processor gave them.
        rows_per_sample: beams or return sequences; the loop's rows are sample-major.
        seed: keys the views, and the draws of a sampling run when it is given.
        sample_ids: one randomness key per sample; content hashes by default.
        execution: "stacked" (one forward), "sequential" (one per view), "skip" (views are put off while the mask leaves
            one token).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        method: Method,
        inputs: dict[str, Any],
        *,
        processor: Any = None,
        seed: int | None = None,
        sample_ids: Sequence[Hashable] | None = None,
        rows_per_sample: int = 1,
        execution: str = "stacked",
        family: Family | None = None,
        features: Sequence[Encoded] | None = None,
    ):
        hf.require()
        self.model, self.family = model, family or family_of(model)
        check_needs(method, self.family)
        self.seed, self.execution, self.rows_per_sample = seed, execution, rows_per_sample
        view_seed = torch.initial_seed() if seed is None else seed
        # Only a method that watches the encoder makes the images be encoded before its views are known.
        watching = [part for part in method.parts() if type(part).observe is not Method.observe]
        observe = functools.partial(observing, watching) if watching else None
        self.batch = Batch(self.family, inputs, sample_ids, processor, observe, features)
        self.method, columns = views_of(method, self.batch, view_seed)
        check_execution(execution, self.method, 1 + len(columns))
        samples = self.batch.resolve(self.batch.samples + [view.sample for column in columns for view in column])
        count = len(self.batch.samples)
        #: The samples of every view, view 0 first.
        self.samples: list[list[Sample]] = [samples[i : i + count] for i in range(0, len(samples), count)]
        self.views: list[View] = [column[0] for column in columns]
        self.probes: Probes = self.method.probes(model)
        self._captured: list[Any] | None = None
        self.lanes: Lanes | None = None

    @property
    def processor(self) -> Any:
        """The processor that was given, or the one at the model's own path."""
        return self.batch.processor

    @property
    def sample_ids(self) -> list[Hashable]:
        return [sample.id for sample in self.batch.samples]

    @property
    def row_ids(self) -> list[Hashable]:
        """A randomness key per row of the loop."""
        if self.rows_per_sample == 1:
            return self.sample_ids
        return [(i, row) for i in self.sample_ids for row in range(self.rows_per_sample)]

    def captured(self) -> list[Any]:
        """Per view the prepared rows, expanded sample-major to the rows of the loop."""
        if self._captured is None:
            self._captured = [
                self.batch.capture([sample for sample in column for _ in range(self.rows_per_sample)])
                for column in self.samples
            ]
        return self._captured

    @property
    def module(self) -> torch.nn.Module:
        """The module whose loop decodes."""
        return self.captured()[0].module

    def view_number(self, mark: str) -> int:
        """The number of the view that was made with this mark; 0 is the sample itself."""
        return next(number for number, view in enumerate(self.views, 1) if view.mark == mark)

    @property
    def extra_width(self) -> int:
        """By how much the longest view's prompt exceeds the samples' own."""
        widths = [c.input_ids.shape[1] for c in self.captured()]
        return max(widths) - widths[0]

    def open(self, cache: Any = None, record: bool = False) -> Lanes:
        """The lanes of this run; view 0's uses ``cache``.

        Args:
            cache: the loop's cache, or ``None`` for a dynamic one.
            record: caches of the other lanes must be able to take tokens back (drafts are verified).
        """
        captured = self.captured()
        groups: dict[Any, list[int]] = {}
        for number in range(len(captured)):
            view = self.views[number - 1] if number else None
            key: Any = (
                id(view.patch) if view and view.patch else None,
                id(view.module) if view and view.module else None,
            )
            if self.execution == "sequential" or (self.execution == "skip" and number == 0):
                key = (*key, number)
            groups.setdefault(key, []).append(number)
        lanes = []
        for numbers in groups.values():
            view = self.views[numbers[0] - 1] if numbers[0] else None
            own = [captured[n] for n in numbers]
            forward = view.module.forward if view is not None and view.module is not None else None
            lane = Lane(
                own,
                numbers,
                cache=cache if numbers[0] == 0 else None,
                patch=view.patch if view is not None else None,
                forward=forward,
                pad_token_id=self.family.pad_token_id,
            )
            if record and numbers[0] != 0:
                lane.cache.activate_past_recording()
            lanes.append(lane)
        weights = [view.weight for view in self.views]
        others = {number: view.module for number, view in enumerate(self.views, 1) if view.module is not None}
        project = project_of(self.module, others)
        self.lanes = Lanes(self.method, lanes, weights, self.probes, project, skip=self.execution == "skip")
        return self.lanes


@contextmanager
def observing(methods: Sequence[Method], model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """What each of ``methods`` watches, by its name."""
    with ExitStack() as stack:
        yield {method.name: stack.enter_context(method.observe(model)) for method in methods}


def project_of(module: torch.nn.Module, others: Mapping[int, torch.nn.Module] | None = None):
    """Hidden states of an intermediate layer -> logits, through the final norm and the language head of ``module``.

    Args:
        others: view number -> the module that runs it, for views that are another model's.
    """
    others = others or {}

    def project(hidden: Tensor, normed: bool = True, view: int = 0) -> Tensor:
        own = others.get(view, module)
        softcap = getattr(own.config.get_text_config(), "final_logit_softcapping", None)
        with torch.no_grad():
            logits = own.get_output_embeddings()(own.get_decoder().norm(hidden) if normed else hidden).float()
            return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    return project


def check_needs(method: Method, family: Family) -> None:
    """Raise unless the family has what every part of ``method`` needs."""
    for part in method.parts():
        for need in part.needs:
            if not getattr(family, f"has_{need}"):
                raise UnsupportedError(
                    f"{part.name} needs {NEEDS[need]}, which {family.config.model_type} does not have; choose another "
                    "method or model."
                )


#: What ``Method.needs`` may name: key -> in words.
NEEDS = {
    "cls": "a vision encoder with a CLS token",
    "qformer": "a Q-Former",
    "experts": "a decoder with a mixture of experts",
}


def check_modes(method: Method, modes: Sequence[str]) -> None:
    """Raise if a part of ``method`` refuses one of ``modes``, with its reason."""
    for part in method.parts():
        for mode in modes:
            if mode in part.refuses:
                raise UnsupportedError(f"{part.name} cannot run with {MODES[mode]}: {part.refuses[mode]}")


#: What ``Method.refuses`` may name: key -> in words.
MODES = {
    "greedy": "greedy search",
    "sample": "sampling",
    "beam": "beam search",
    "stream": "a streamer",
    "static": "a static cache",
    "speculation": "a drafter or assistant model",
    "batch": "several samples in one batch",
    "returns": "num_return_sequences above 1",
    "sum": "other methods",
    "processor": "the LogitsProcessor form",
}


class _Mitigated:
    """The forward that a loop of Hugging Face calls instead of the module's own."""

    def __init__(self, run: Run, lanes: Lanes, prompt_length: int):
        self.run, self.lanes, self.prompt_length = run, lanes, prompt_length
        self.started = False

    def __call__(self, **kwargs: Any) -> Any:
        keep = kwargs.get("logits_to_keep") or 0
        tokens = kwargs["input_ids"]
        asked = kwargs.get("output_hidden_states")
        call = {
            key: kwargs[key] for key in ("output_attentions", "output_hidden_states") if kwargs.get(key) is not None
        }
        if not self.started:
            self.started = True
            tail = tokens[:, self.prompt_length :] if tokens is not None else None
            scores, out = self.lanes.prefill(tail, keep or 1, **call)
        else:
            scores, out = self.lanes.extend(tokens, keep, **call)
        out.logits = scores
        for name, wanted in (("hidden_states", asked), ("attentions", kwargs.get("output_attentions"))):
            states = getattr(out, name, None)
            if not wanted:
                setattr(out, name, None)
            elif states is not None:
                setattr(out, name, tuple(s[: self.lanes.main.rows] if isinstance(s, Tensor) else s for s in states))
        return out


@contextmanager
def mitigated(run: Run, cache: Any, prompt_length: int, record: bool) -> Iterator[Lanes]:
    """The decoding module answers with combined scores for the length of the block."""
    module = run.module
    with ExitStack() as stack:
        stack.enter_context(run.method.patch(run))
        lanes = run.open(cache, record)
        forward = _Mitigated(run, lanes, prompt_length)

        @functools.wraps(module.forward)
        def stacked(*args: Any, **kwargs: Any) -> Any:
            if args:
                kwargs["input_ids"] = args[0]
            return forward(**kwargs)

        stack.enter_context(instance_attribute(module, "forward", stacked))
        stack.enter_context(instance_attribute(cache, "reorder_cache", lanes.reorder))
        stack.enter_context(instance_attribute(cache, "crop", lambda n: lanes.crop(-n)))
        yield lanes


def decode(
    run: Run,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    cache: Any,
    model_kwargs: dict[str, Any],
    streamer: Any = None,
    assistant: dict[str, Any] | None = None,
    drafter: Any = None,
) -> Any:
    """Decode the mitigated model with the loop that ``generation_config`` asks for; returns what ``generate()`` would."""
    assistant = assistant or {}
    module, method = run.module, run.method
    mode = hf.generation_mode(generation_config, assistant.get("assistant_model"))
    beams = mode.startswith("beam")
    modes = ["beam" if beams else "sample" if generation_config.do_sample else "greedy"]
    if generation_config.do_sample and beams:
        modes.append("sample")
    modes += ["stream"] if streamer is not None else []
    modes += ["static"] if isinstance(cache, StaticCache) else []
    if drafter is not None and mode == "assisted_generation":
        raise UnsupportedError(
            f"drafter {drafter.name} is attached, and assistant_model, prompt_lookup_num_tokens and assistant_early_exit "
            "draft too; leave those out of generate(), or attach without a drafter."
        )
    modes += ["speculation"] if drafter is not None or mode == "assisted_generation" else []
    modes += ["batch"] if len(run.batch.samples) > 1 else []
    check_modes(method, modes)
    if generation_config.prefill_chunk_size is not None:
        raise UnsupportedError(
            "prefill_chunk_size splits the prompt over several forwards, and the views of a sample are prepared in one; "
            "leave it out."
        )
    if not generation_config.use_cache:
        raise UnsupportedError("use_cache=False is not supported: the views keep their keys and values; leave it out.")
    if run.seed is not None and generation_config.do_sample:
        if beams:
            raise UnsupportedError(
                "seed= keys the draw of each row, and beam sampling draws over all beams at once; call torch.manual_seed "
                "instead of passing seed=, or leave out num_beams."
            )
        logits_processor = LogitsProcessorList(
            [*logits_processor, sampling.KeyedDraw(run.seed, run.row_ids, input_ids.shape[1])]
        )
    if isinstance(cache, StaticCache):
        if run.execution != "stacked":
            raise UnsupportedError(f"execution={run.execution!r} needs a dynamic cache; leave out the static one.")
        # The loop sized it for view 0's prompt, and it holds the rows of all views.
        cache = StaticCache(
            config=module.config.get_text_config(decoder=True),
            max_cache_len=generation_config.max_length + run.extra_width,
        )
    # A compiled forward would outlive the views it was traced with.
    generation_config.disable_compile = True
    common = {
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "generation_config": generation_config,
    }
    if hasattr(method, "decode"):
        return method.decode(run, input_ids, cache=cache, streamer=streamer, **common)
    if drafter is not None:
        from ..speculative.generate import decode as speculate

        return speculate(run, drafter, input_ids, cache=cache, streamer=streamer, **common)
    if mode == "assisted_generation" and assistant.get("assistant_model") is not None:
        # The draft model is prepared from these, and deserves to see the image.
        images = [image for sample in run.samples[0] for image in sample.images]
        if images:
            model_kwargs = {**model_kwargs, "mm_encoder_outputs": {"image": run.family.pack(images)}}
    with mitigated(run, cache, input_ids.shape[1], record=mode == "assisted_generation"):
        out = hf.run_loop(
            module,
            mode,
            input_ids,
            streamer=streamer,
            assistant=assistant,
            cache=cache,
            **common,
            **model_kwargs,
        )
    if len(run.samples) > 1:
        # Its rows are those of every view; a caller who continues from it would continue all of them.
        hf.drop_cache(out)
    return out


class _Attachment:
    """What ``attach`` put on a model instance."""

    def __init__(self, model: torch.nn.Module, method: Method, processor: Any, execution: str, drafter: Any):
        self.model, self.method, self.processor = model, method, processor
        self.execution, self.drafter = execution, drafter
        self.family = family_of(model)
        check_needs(method, self.family)
        self.lock = threading.Lock()
        self.last_run: Run | None = None

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """``generate()`` of the mitigated model.

        Takes what the model's own takes, and:

        Args:
            seed: keys the views and, when sampling, the draws by (seed, sample id, position): then neither batch nor
                drafter nor a resumed run changes an answer. Without it draws are Hugging Face's own.
            sample_ids: one key per row of the batch; by default a hash of the row's prompt and pixels.

        Raises:
            UnsupportedError: a mode the method cannot honour.
            InputError: images and prompts that do not belong together.
        """
        if not self.lock.acquire(blocking=False):
            raise UnsupportedError(
                "generate() of this model is already running; one attached instance serves one call at a time."
            )
        try:
            return self._generate(inputs, **kwargs)
        finally:
            self.lock.release()

    def _generate(
        self,
        inputs: Tensor | None,
        *,
        seed: int | None = None,
        sample_ids: Sequence[Hashable] | None = None,
        custom_generate: Any = None,
        streamer: Any = None,
        assistant_model: Any = None,
        **kwargs: Any,
    ) -> Any:
        if custom_generate is not None:
            raise UnsupportedError(
                f"{self.method.name} is attached to this model; detach it first, or leave out custom_generate."
            )
        if kwargs.get("inputs_embeds") is not None:
            raise UnsupportedError(
                "inputs_embeds hide the image placeholders; pass input_ids and pixel_values instead."
            )
        if inputs is not None:
            kwargs["input_ids"] = inputs
        family = self.family
        text = {
            key: kwargs.pop(key)
            for key in ("input_ids", "attention_mask", *family.token_keys)
            if kwargs.get(key) is not None
        }
        vision = {key: kwargs.pop(key) for key in family.vision_keys if kwargs.get(key) is not None}
        features = None
        if (given := kwargs.pop("mm_encoder_outputs", None)) is not None:
            features = family.unpack(given["image"])
        family.check_text(text)
        assistant = {"assistant_model": assistant_model}
        assistant.update({key: kwargs[key] for key in ("tokenizer", "assistant_tokenizer") if key in kwargs})
        expand = self._rows_per_sample(kwargs)
        run = Run(
            self.model,
            self.method,
            {**text, **vision},
            processor=self.processor,
            seed=seed,
            sample_ids=sample_ids,
            rows_per_sample=expand,
            execution=self.execution,
            family=family,
            features=features,
        )
        self.last_run = run
        module = run.module

        def loop(module, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            return decode(
                run,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                cache=hf.take_cache(model_kwargs),
                model_kwargs=model_kwargs,
                streamer=streamer,
                assistant=assistant,
                drafter=self.drafter,
            )

        with hf.stopping_with(module, kwargs.get("tokenizer")):
            return type(module).generate(
                module, **text, custom_generate=loop, streamer=streamer, assistant_model=assistant_model, **kwargs
            )

    def _rows_per_sample(self, kwargs: dict[str, Any]) -> int:
        """How many rows of the loop each sample takes, from the call and the configurations it falls back on."""

        # A language model inside the LVLM whose loop decodes falls back on its own configuration.
        own = self.family.decoding_module(self.model).generation_config

        def setting(name: str) -> int:
            config = kwargs.get("generation_config")
            values = [kwargs.get(name), getattr(config, name, None), getattr(own, name, None)]
            return next((int(v) for v in values if v is not None), 1)

        returns = setting("num_return_sequences")
        # Here, because transformers would refuse it before the method is asked, and advise beams.
        check_modes(self.method, ["returns"] if returns > 1 else [])
        return max(setting("num_beams"), returns)


def attach(
    model: torch.nn.Module,
    method: Method | str,
    *,
    processor: Any = None,
    drafter: Any = None,
    execution: str = "stacked",
) -> torch.nn.Module:
    """Make ``model.generate(...)`` decode with ``method``; returns the same instance.

    Pipelines and evaluation harnesses that call ``model.generate`` then use the method without knowing it.

    Args:
        model: an LVLM of a supported family.
        method: for instance ``VCD(alpha=1.0)``, ``VCD() + RITUAL()``, or a name such as ``"vcd+ritual"``.
        processor: the model's processor, for methods that tokenize text; loaded from the model's path when left out.
        drafter: proposes tokens that the stacked forward verifies; a name or a drafter.
        execution: "stacked", "sequential" or "skip"; see :class:`Run`.

    Raises:
        UnsupportedError: the model's family or a combination that cannot be honoured, or a model attached already.
    """
    from ..methods import parse

    hf.require()
    if _ATTACHED in model.__dict__:
        raise UnsupportedError(
            f"{model.__dict__[_ATTACHED].method.name} is already attached to this model; detach(model) first, or attach "
            "their sum."
        )
    method = parse(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        raise InputError(f"method is {type(method).__name__}; expected a Method such as VCD() or a name such as 'vcd'.")
    if drafter is not None:
        from ..speculative.drafters import parse as parse_drafter

        check_modes(method, ["speculation"])
        drafter = parse_drafter(drafter, model) if isinstance(drafter, str) else drafter
    attachment = _Attachment(model, method, processor, execution, drafter)

    @functools.wraps(type(model).generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        return attachment.generate(*args, **kwargs)

    model.__dict__[_ATTACHED] = attachment
    model.__dict__["_lvlm_decode_before"] = model.__dict__.get("generate", _MISSING)
    model.__dict__["generate"] = generate
    return model


def detach(model: torch.nn.Module) -> torch.nn.Module:
    """Take the method off again; the instance is as it was before :func:`attach`. No error if none is attached."""
    if model.__dict__.pop(_ATTACHED, None) is None:
        return model
    before = model.__dict__.pop("_lvlm_decode_before")
    if before is _MISSING:
        del model.__dict__["generate"]
    else:
        model.__dict__["generate"] = before
    return model


def attached(model: torch.nn.Module) -> Method | None:
    """The method attached to ``model``, if any."""
    attachment = model.__dict__.get(_ATTACHED)
    return None if attachment is None else attachment.method


def last_run(model: torch.nn.Module) -> Run | None:
    """The newest run of the attached model: its lanes count forwards and hold the newest :class:`Step`."""
    attachment = model.__dict__.get(_ATTACHED)
    return None if attachment is None else attachment.last_run
