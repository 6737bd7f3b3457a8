"""Which arguments of ``generate()`` are inputs of the model, and which inputs the views of a sample cannot be given."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from ...errors import UnsupportedError
from . import kwargs as names

_VIDEO = "this family's model takes no videos; pass frames as images"
_ENCODER = "it belongs to encoder-decoders, and views run in one decoder"
#: Inputs of forwards that no view can be given: name -> why, and what to do.
REFUSED = {
    "pixel_values_videos": _VIDEO,
    "video_grid_thw": _VIDEO,
    "image_sizes_videos": "no encoder of videos reads it; leave it out",
    "second_per_grid_ts": "this family's positions do not follow the time between frames; leave it out",
    "inputs_embeds": "they hide the image placeholders; pass input_ids and pixel_values instead",
    "image_sizes": "this family's encoder takes images of one size; leave it out",
    "output_router_logits": "the views run in one forward, whose routers are not told apart; leave it out",
    "num_crops": "it is the image processor's own and not among what the whole processor puts out; leave it out",
    "decoder_input_ids": _ENCODER,
    "decoder_attention_mask": _ENCODER,
}
#: Inputs that every family honours beside those of its own. PaliGemma's processor always puts out labels, which ``generate()``
#: keeps from every forward.
HONOURED = ("input_ids", "attention_mask", "position_ids", "labels", names.ENCODED)


@functools.cache
def options() -> frozenset[str]:
    """Arguments of ``generate()`` that are no inputs of the model: settings, processors, streamers, caches."""
    settings = set(GenerationConfig().to_dict()) | set(vars(GenerationConfig()))
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
    caches = {names.CACHE, "past_key_values", "cache_params"}
    return frozenset(
        settings | arguments | caches | {"tokenizer", "assistant_tokenizer", "trust_remote_code", "logits_to_keep"}
    )


def model_inputs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are inputs of the model and were given."""
    return {name: value for name, value in kwargs.items() if name not in options() and value is not None}


def check_inputs(given: Mapping[str, Any], honoured: Collection[str], model_type: str) -> None:
    """Raise for an input that would be ignored.

    Args:
        given: inputs by name; those that are ``None`` do not count.
        honoured: names that this family reads, beside :data:`HONOURED`.

    Raises:
        UnsupportedError: names the input, the reason and the remedy.
    """
    known = {*honoured, *HONOURED}
    for name in model_inputs(given):
        if name in known:
            continue
        if name in REFUSED:
            raise UnsupportedError(f"{name} cannot be honoured: {REFUSED[name]}.")
        near = difflib.get_close_matches(name, [*known, *options()], 1)
        hint = f"; did you mean {near[0]}?" if near else "; leave it out."
        raise UnsupportedError(f"{name} is no input that the views of a {model_type} sample are given{hint}")


def positions_of(module: torch.nn.Module, input_ids: Tensor, mask: Tensor, given: Mapping[str, Any]) -> Tensor:
    """(B, T), or (axes, B, T), the positions that ``generate()`` of ``module`` makes.

    Args:
        input_ids, mask: (B, T).
        given: what else positions are made from.
    """
    positions: Tensor = _prepared(module, input_ids=input_ids, attention_mask=mask, **given)["position_ids"]
    return positions


def mask_of(module: torch.nn.Module, input_ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """(B, T) the mask that ``generate()`` infers where none is given.

    Args:
        kwargs: of ``generate()``, for what they say of padding and end tokens.
    """
    wanted = ("generation_config", "pad_token_id", "eos_token_id", "bos_token_id")
    given = {name: kwargs[name] for name in wanted if kwargs.get(name) is not None}
    mask = _prepared(module, input_ids=input_ids, **given).get("attention_mask")
    return torch.ones_like(input_ids) if mask is None else mask


def _prepared(module: torch.nn.Module, **kwargs: Any) -> dict[str, Any]:
    """What ``generate()`` makes of ``kwargs`` before its first forward, which it does not get to."""
    box: dict[str, Any] = {}

    def stop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **more: Any,
    ) -> Tensor:
        box.update(more)
        return input_ids

    how = {"num_beams": 1, "num_return_sequences": 1, "do_sample": False, "max_new_tokens": 1}
    own: Any = type(module)
    own.generate(module, custom_generate=stop, **how, **kwargs)
    return box
