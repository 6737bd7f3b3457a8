"""Hugging Face's decoding loops and ``generate()`` itself, run on a stand-in of the module.

A stand-in (:class:`Proxy`) is the module in everything but what it is given of its own, such as another ``forward``. The
loop runs on the stand-in, so that nothing is put on the module: calls nest, run side by side, and leave nothing behind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ...errors import InputError, UnsupportedError
from . import kwargs as names
from .kwargs import Prepared

#: Loops of ``GenerationMixin`` by generation mode.
_LOOPS = {
    "greedy_search": "_sample",
    "sample": "_sample",
    "beam_search": "_beam_search",
    "beam_sample": "_beam_search",
    "assisted_generation": "_assisted_decoding",
}


class Proxy:
    """Stands for a module: everything is the module's, except the attributes given here.

    Methods of ``GenerationMixin`` run on the stand-in, so that what they call, ``forward`` first of all, is looked up here.
    What a loop assigns stays on the stand-in.
    """

    def __init__(self, module: Any, **own: Any):
        self.__dict__.update(own, _module=module)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        # By its type alone: a loop asks a dozen times per token, and a configuration answers isinstance() slowly.
        if type(value) is MethodType and value.__self__ is self._module:
            if value.__func__ is getattr(GenerationMixin, name, None):
                return MethodType(value.__func__, self)
        return value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.__dict__.get("forward", self._module)
        return forward(*args, **kwargs)


@dataclass(frozen=True)
class Call:
    """What ``generate()`` prepared for a decoding loop.

    Args:
        input_ids: (R, P) prompt rows, already expanded for beams and return sequences.
        cache: the cache that ``generate()`` made or was given.
        processors: logits processors and warpers, in their order.
        criteria: stopping criteria.
        config: the generation configuration of the call.
        inputs: further arguments of the forward.
        streamer: as given to ``generate()``; the prompt has been put already.
        assistant: ``assistant_model``, ``assistant_tokenizer``, ``tokenizer`` of assisted decoding.
        synced: whether several processes must run the same number of forwards (``synced_gpus``).
    """

    input_ids: Tensor
    cache: Any
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    inputs: dict[str, Any] = field(default_factory=dict)
    streamer: BaseStreamer | None = None
    assistant: Mapping[str, Any] = field(default_factory=dict)
    synced: bool = False

    @property
    def mode(self) -> str:
        """The loop that ``generate()`` would run, as transformers spells it."""
        return self.config.get_generation_mode(self.assistant.get("assistant_model")).value

    @property
    def prompt_length(self) -> int:
        return self.input_ids.shape[1]


#: The code of ``generate()`` itself, without its decorators.
_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


def asked() -> dict[str, Any]:
    """The arguments of the ``generate()`` call that is running, by name; empty where none is on the stack.

    ``generate()`` hands neither a streamer nor an assistant to a ``custom_generate`` callable, and no cache to a processor, so
    they are read where it holds them.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back
    return {} if frame is None else {**frame.f_locals.get("kwargs", {}), **frame.f_locals}


def named(args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments of ``generate()`` by the names that its signature gives them.

    Raises:
        InputError: more than it takes.
    """
    known = [
        parameter.name
        for parameter in inspect.signature(GenerationMixin.generate).parameters.values()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and parameter.name != "self"
    ]
    if len(args) > len(known):
        raise InputError(f"generate() takes {len(known)} arguments without a name, and {len(args)} were given.")
    return dict(zip(known, args))


def synced(module: Any, asked_for: bool | None) -> bool:
    """Whether all processes of a group must run the same number of forwards.

    Args:
        asked_for: ``synced_gpus`` of the call; where it is ``None``, transformers decides (FSDP and DeepSpeed's ZeRO-3).
    """
    decided = GenerationMixin._extract_generation_mode_kwargs(module, None, {}, asked_for, None, None)
    return bool(decided.get("synced_gpus"))


def check_training(module: Any) -> None:
    """Raise for a model whose forwards keep no keys and values.

    Raises:
        UnsupportedError: gradient checkpointing while training.
    """
    if module.training and getattr(module, "is_gradient_checkpointing", False):
        raise UnsupportedError(
            "gradient checkpointing in training mode keeps no keys and values, which views need; call model.eval(), or "
            "model.gradient_checkpointing_disable()."
        )


def given(
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    **more: Any,
) -> Call:
    """The arguments that ``generate()`` hands to a ``custom_generate`` callable, as a :class:`Call`."""
    inputs = dict(model_kwargs)
    return Call(
        input_ids,
        names.take_cache(inputs),
        LogitsProcessorList(logits_processor or []),
        stopping_criteria,
        generation_config,
        inputs,
        **more,
    )


def generate(
    module: Any,
    loop: Callable[[Call], Any] | None,
    *,
    own: dict[str, Any] | None = None,
    streamer: BaseStreamer | None = None,
    assistant: Mapping[str, Any] | None = None,
    synced: bool = False,
    **kwargs: Any,
) -> Any:
    """``generate()`` of the module's own class, which calls ``loop`` where it would have started a loop of its own.

    Args:
        module: the model; nothing is put on it.
        loop: gets what ``generate()`` prepared; ``None`` runs transformers' own loop.
        own: attributes that ``generate()`` finds in place of the module's.
        streamer, assistant, synced: see :class:`Call`; beside custom_generate, transformers would not pass them on.
        kwargs: of ``generate()``.
    """
    own, assistant = dict(own or {}), dict(assistant or {})
    kwargs |= {"streamer": streamer, "assistant_model": assistant.get("assistant_model")}
    tokenizer = kwargs.get("tokenizer")
    if loop is not None and tokenizer is not None:
        # Beside custom_generate, transformers drops the tokenizer that stop strings need.
        criteria = module._get_stopping_criteria
        own["_get_stopping_criteria"] = lambda *a, **k: criteria(*a, **{**k, "tokenizer": tokenizer})

    def called(
        _: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        assert loop is not None
        beside = {"streamer": streamer, "assistant": assistant, "synced": synced}
        return loop(given(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, **beside))

    if loop is not None:
        kwargs["custom_generate"] = called
    # Without anything of its own a stand-in is not needed, and transformers' own loops look at the type of what they run on.
    return type(module).generate(Proxy(module, **own) if own else module, **kwargs)


def prepare(
    generate_rows: Callable[..., Any],
    mask: Tensor,
    token_keys: tuple[str, ...],
    vision_keys: tuple[str, ...],
) -> Prepared:
    """Let a model's own ``generate()`` prepare a batch, and stop before its first forward.

    Args:
        generate_rows: calls ``generate()`` on the batch with further arguments.
        mask: (B, T) which tokens of the batch are no padding.
        token_keys, vision_keys: see :meth:`Prepared.of`.
    """
    box: dict[str, Any] = {}

    def stop(
        module: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        box.update(module=module, input_ids=input_ids, kwargs=model_kwargs)
        return input_ids

    generate_rows(
        custom_generate=stop,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=1,
        use_cache=True,
        cache_implementation="dynamic",
        return_dict_in_generate=False,
    )
    module = box["module"]
    module = module.__dict__["_module"] if type(module) is Proxy else module
    kwargs = dict(box["kwargs"])
    names.take_cache(kwargs)
    first = module.prepare_inputs_for_generation(
        box["input_ids"], is_first_iteration=True, **names.with_cache(None), **kwargs
    )
    device = box["input_ids"].device
    return Prepared.of(module, box["input_ids"], mask.to(device), first, token_keys, vision_keys)


def compiled(module: Any, call: Call) -> Callable[..., Any] | None:
    """The module's forward, compiled, where transformers itself would run the steps after the prompt through it; else ``None``.

    It does so with a static cache on an accelerator, and anywhere with a ``compile_config`` that is meant for all devices.
    """
    criteria = getattr(module, "_valid_auto_compile_criteria", None)
    if criteria is None or not criteria(names.with_cache(call.cache), call.config):
        return None
    return module.get_compiled_call(call.config.compile_config)


def check_mode(call: Call) -> None:
    """Raise for a generation mode that no loop of transformers serves on another forward.

    Raises:
        UnsupportedError: names the mode.
    """
    if call.mode not in _LOOPS:
        raise UnsupportedError(
            f"generation mode {call.mode!r} has no loop in transformers that can be mitigated; "
            "use greedy search, sampling, beams or assisted decoding."
        )


def run_loop(module: torch.nn.Module, call: Call, forward: Callable[..., Any] | None = None) -> Any:
    """Run Hugging Face's own decoding loop, as ``generate()`` would.

    Args:
        module: the module whose loop decodes.
        call: what the loop is given.
        forward: runs in place of the module's own.

    Raises:
        UnsupportedError: a mode that no loop of transformers serves.
    """
    check_mode(call)
    name = _LOOPS[call.mode]
    extra: dict[str, Any] = {}
    if name == "_assisted_decoding":
        extra.update(call.assistant, inputs_tensor=call.input_ids)
    if name != "_beam_search" and call.streamer is not None:
        extra["streamer"] = call.streamer
    proxy = Proxy(module) if forward is None else Proxy(module, forward=forward)
    return getattr(type(module), name)(
        proxy,
        call.input_ids,
        logits_processor=call.processors,
        stopping_criteria=call.criteria,
        generation_config=call.config,
        synced_gpus=call.synced,
        **extra,
        **call.inputs,
        **names.with_cache(call.cache),
    )
