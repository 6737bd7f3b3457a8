"""Every private or easily moved ``transformers`` name this library leans on, in one place.

``self_check()`` names what moved; a test calls it, and so does :func:`require` when a model is first attached.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import GenerationMixin, LogitsProcessorList, cache_utils
from transformers.integrations.peft import MIN_PEFT_VERSION

from ..errors import DependencyError, UnsupportedError

MINIMUM_TRANSFORMERS = "5.23.0"
BELOW_TRANSFORMERS = "5.25"
MINIMUM_TORCH = "2.11"

#: Layers of a cache. Looked up gently: versions without them are refused by :func:`require`, in words.
DynamicLayer: type = getattr(cache_utils, "DynamicLayer", object)
StaticLayer: type = getattr(cache_utils, "StaticLayer", object)

_PREPARED = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
#: What forwards, loops and outputs call the cache: "cache" from transformers 5.24 on, "past_key_values" before. Read from
#: a signature and not from the version, so that a source checkout between two releases is read correctly as well.
_CACHE = "cache" if "cache" in _PREPARED else "past_key_values"

#: Loops of ``GenerationMixin`` by generation mode.
_LOOPS = {
    "greedy_search": "_sample",
    "sample": "_sample",
    "beam_search": "_beam_search",
    "beam_sample": "_beam_search",
    "assisted_generation": "_assisted_decoding",
}

#: What the loops must accept: name -> parameters.
_SIGNATURES = {
    "_sample": {"input_ids", "logits_processor", "stopping_criteria", "generation_config", "streamer"},
    "_beam_search": {"input_ids", "logits_processor", "stopping_criteria", "generation_config"},
    "_assisted_decoding": {
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "inputs_tensor",
        "assistant_model",
        "assistant_tokenizer",
        "tokenizer",
        "streamer",
    },
}


@functools.cache
def require(transformers_version: str | None = None, torch_version: str | None = None) -> None:
    """Refuse libraries older than this engine was written for.

    Raises:
        DependencyError: names the installed version, the oldest accepted one and the command that mends it.
    """
    have = transformers_version or transformers.__version__
    if Version(have) < Version(MINIMUM_TRANSFORMERS) or Version(have).major > 5:
        raise DependencyError(
            f"transformers {have} is installed, and lvlm_decode needs {MINIMUM_TRANSFORMERS} or a newer 5.x; run: "
            f"pip install 'transformers>={MINIMUM_TRANSFORMERS},<{BELOW_TRANSFORMERS}'"
        )
    have = torch_version or torch.__version__
    if Version(have.split("+")[0]) < Version(MINIMUM_TORCH):
        raise DependencyError(
            f"torch {have} is installed, and lvlm_decode needs {MINIMUM_TORCH} or newer; run: "
            f"pip install 'torch>={MINIMUM_TORCH}'"
        )
    moved = self_check()
    if moved:
        raise DependencyError(
            f"transformers {transformers.__version__} moved names this library uses ({'; '.join(moved)}); install a "
            f"version it was tested with: pip install 'transformers>={MINIMUM_TRANSFORMERS},<{BELOW_TRANSFORMERS}'"
        )


def self_check() -> list[str]:
    """What of the private names is missing or changed; empty when all is as expected."""
    moved = []
    for name, expected in _SIGNATURES.items():
        loop = getattr(GenerationMixin, name, None)
        if loop is None:
            moved.append(f"GenerationMixin.{name} is gone")
            continue
        missing = expected - set(inspect.signature(loop).parameters)
        if missing:
            moved.append(f"GenerationMixin.{name} lost {', '.join(sorted(missing))}")
    for name in ("is_first_iteration", _CACHE):
        if name not in _PREPARED:
            moved.append(f"prepare_inputs_for_generation lost {name}")
    criteria = getattr(GenerationMixin, "_get_stopping_criteria", None)
    if criteria is None or "tokenizer" not in inspect.signature(criteria).parameters:
        moved.append("GenerationMixin._get_stopping_criteria lost tokenizer")
    for cache in (transformers.DynamicCache, transformers.StaticCache):
        for name in ("reorder_cache", "crop", "get_seq_length"):
            if not hasattr(cache, name):
                moved.append(f"{cache.__name__}.{name} is gone")
    for name in ("lazy_initialization", "update", "crop"):
        if not hasattr(DynamicLayer, name):
            moved.append(f"DynamicLayer.{name} is gone")
    if "layer_class_to_replicate" not in inspect.signature(transformers.Cache.__init__).parameters:
        moved.append("Cache lost layer_class_to_replicate")
    return moved


def require_adapters() -> None:
    """Refuse a peft that the installed transformers does not load adapters with.

    Raises:
        DependencyError: peft is missing or too old; names both versions and the remedy.
    """
    try:
        have = version("peft")
    except PackageNotFoundError as error:
        raise DependencyError("adapters need peft, which is not installed; run: pip install peft") from error
    if Version(have) < Version(MIN_PEFT_VERSION):
        raise DependencyError(
            f"transformers {transformers.__version__} loads adapters with peft {MIN_PEFT_VERSION} or newer, and peft {have} "
            "is installed; run: pip install -U peft, or, where no such peft is published yet: "
            "pip install 'transformers<5.24'"
        )


def cache_of(layer: type) -> transformers.Cache:
    """An empty cache whose layers are made of the class ``layer`` as they are needed."""
    return transformers.Cache(layer_class_to_replicate=layer)


def with_cache(cache: Any) -> dict[str, Any]:
    """``cache`` as the argument that forwards, loops and ``generate()`` take it by."""
    return {_CACHE: cache}


def take_cache(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments ``kwargs``, taken out of them; ``None`` if there is none.

    Raises:
        DependencyError: another argument holds a cache too. Lanes that then wrote into that one would answer wrong tokens.
    """
    cache = kwargs.pop(_CACHE, None)
    for name, value in kwargs.items():
        if isinstance(value, transformers.Cache):
            raise DependencyError(
                f"transformers {transformers.__version__} hands over a cache as {name!r}, which this lvlm_decode does not "
                f"know; install a version it was tested with: pip install 'transformers>={MINIMUM_TRANSFORMERS},"
                f"<{BELOW_TRANSFORMERS}'"
            )
    return cache


def cache_in(output: Any) -> Any:
    """The cache that a forward or ``generate()`` returned, or ``None``."""
    return getattr(output, _CACHE, None)


def drop_cache(output: Any) -> None:
    """Take the cache out of what a loop returned."""
    if not isinstance(output, torch.Tensor):
        setattr(output, _CACHE, None)


def generation_mode(generation_config: transformers.GenerationConfig, assistant_model: Any = None) -> str:
    """The name of the loop ``generate()`` would run, as ``transformers`` spells it."""
    return generation_config.get_generation_mode(assistant_model).value


def run_loop(
    module: torch.nn.Module,
    mode: str,
    input_ids: torch.Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: transformers.GenerationConfig,
    cache: Any,
    streamer: Any = None,
    assistant: dict[str, Any] | None = None,
    **model_kwargs: Any,
) -> Any:
    """Run Hugging Face's own decoding loop on ``module``, as its ``generate()`` would.

    Args:
        input_ids: (B, T) prompt rows, already expanded for beams and return sequences.
        cache: the cache that ``generate()`` made for the loop.
        assistant: ``assistant_model``, ``assistant_tokenizer``, ``tokenizer`` for assisted decoding.

    Raises:
        UnsupportedError: a mode that no loop of ``transformers`` serves.
    """
    if mode not in _LOOPS:
        raise UnsupportedError(
            f"generation mode {mode!r} has no loop in transformers that can be mitigated; "
            "use greedy search, sampling, beams or assisted decoding."
        )
    name = _LOOPS[mode]
    extra: dict[str, Any] = {}
    if name == "_assisted_decoding":
        extra.update(assistant or {}, inputs_tensor=input_ids)
    if name != "_beam_search" and streamer is not None:
        extra["streamer"] = streamer
    return getattr(type(module), name)(
        module,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **extra,
        **model_kwargs,
        **with_cache(cache),
    )


def sdpa(*args: Any, **kwargs: Any) -> Any:
    """The stock sdpa attention function."""
    return transformers.AttentionInterface()["sdpa"](*args, **kwargs)


def register_attention(name: str, function: Any) -> None:
    """Register an attention function that wraps :func:`sdpa`; it gets sdpa's masks. Doing it again changes nothing."""
    transformers.AttentionInterface.register(name, function)
    transformers.AttentionMaskInterface.register(name, transformers.AttentionMaskInterface()["sdpa"])


def attention_of(config: transformers.PreTrainedConfig) -> str | None:
    """The attention implementation a configuration asks for."""
    return config._attn_implementation_internal


def set_attention(config: transformers.PreTrainedConfig, name: str | None) -> None:
    """Ask for another implementation, in this configuration alone and without the checks of loading."""
    config._attn_implementation_internal = name


_MISSING = object()


@contextmanager
def instance_attribute(obj: Any, name: str, value: Any) -> Iterator[None]:
    """``obj.name = value`` for the length of the block; what stood on the instance before, or nothing, comes back."""
    before = obj.__dict__.get(name, _MISSING)
    object.__setattr__(obj, name, value) if isinstance(obj, torch.nn.Module) else setattr(obj, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            del obj.__dict__[name]
        else:
            obj.__dict__[name] = before


@contextmanager
def stopping_with(module: torch.nn.Module, tokenizer: Any) -> Iterator[None]:
    """``generate()`` of ``module`` finds ``tokenizer`` for its stop strings: beside ``custom_generate`` it drops its own."""
    if tokenizer is None:
        yield
        return
    own = module._get_stopping_criteria

    def criteria(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "tokenizer": tokenizer})

    with instance_attribute(module, "_get_stopping_criteria", criteria):
        yield
