"""What the arguments of forwards and of ``generate()`` are called, and what each of them is, by name."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin

from ...errors import DependencyError, UnsupportedError
from . import vision

#: What forwards, loops and outputs call the cache: "cache" from transformers 5.24 on, "past_key_values" before. Read from
#: a signature and not from the version, so that a source checkout between two releases is read correctly as well.
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
#: Where ``generate()`` and forwards take images and videos that are encoded already, by kind.
ENCODED = "mm_encoder_outputs"
#: Settings of a forward that the lanes give anew.
_SETTINGS = {"logits_to_keep", "use_cache", "return_dict", "output_attentions", "output_hidden_states"}


def with_cache(cache: Any) -> dict[str, Any]:
    """``cache`` as the argument that forwards, loops and ``generate()`` take it by."""
    return {CACHE: cache}


def take_cache(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments ``kwargs``, taken out of them; ``None`` if there is none.

    Raises:
        DependencyError: another argument holds a cache too. Lanes that then wrote into that one would answer wrong tokens.
    """
    cache = kwargs.pop(CACHE, None)
    for name, value in kwargs.items():
        if isinstance(value, transformers.Cache):
            raise DependencyError(
                f"transformers {transformers.__version__} hands over a cache as {name!r}, a name that this lvlm_decode does "
                "not know; run: lvlm-decode doctor"
            )
    return cache


def cache_in(output: Any) -> Any:
    """The cache that a forward or ``generate()`` returned, or ``None``."""
    return getattr(output, CACHE, None)


def give_cache(output: Any, cache: Any) -> None:
    """Let what a loop returned hold ``cache`` where it holds one; ``None`` takes it out, also of its keys and its tuple."""
    if isinstance(output, Tensor) or getattr(output, CACHE, None) is None:
        return
    setattr(output, CACHE, cache)
    if cache is None:
        OrderedDict.pop(output, CACHE, None)


def joined(first: Any, second: Any) -> Any:
    """The output of two forwards, one after the other, with the states that one forward over both would have put out.

    Returns:
        ``second``; its hidden states are (R, T1 + T2, D) and its attentions (R, H, T1 + T2, S), where both have them.
    """
    for name in ("hidden_states", "attentions"):
        before, after = getattr(first, name, None), getattr(second, name, None)
        if before is None or after is None:
            continue
        whole = []
        for a, b in zip(before, after):
            if a is not None and name == "attentions":
                a = torch.nn.functional.pad(a, (0, b.shape[-1] - a.shape[-1]))
            whole.append(a if a is None else torch.cat([a, b], -2))
        setattr(second, name, tuple(whole))
    return second


def with_images(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Encoded images and videos (see :func:`vision.pack`) by kind as an argument of ``generate()``; nothing for none."""
    return {ENCODED: dict(packed)} if packed else {}


def take_images(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Encoded images and videos that were passed instead of pixels, by kind, taken out of ``kwargs``.

    Raises:
        UnsupportedError: something else that is encoded already, such as sound.
    """
    packed = {name: value for name, value in (kwargs.pop(ENCODED, None) or {}).items() if value is not None}
    if other := [name for name in packed if name not in vision.KINDS]:
        raise UnsupportedError(
            f"an encoded {other[0]} cannot be honoured: a view of a sample is made of its images and videos; leave out the "
            f"{other[0]}."
        )
    return packed


@dataclass(frozen=True)
class Prepared:
    """A batch of rows as ``generate()`` prepared it for its first forward.

    Args:
        module: the module whose loop decodes (the language model itself inside InstructBLIP).
        input_ids: (B, T) prompt rows, left-padded.
        mask: (B, T) long, 0 where a row is padded.
        positions: (B, T), or (axes, B, T) where positions have several axes (M-RoPE).
        embeds: (B, T, D) where the module decodes from embeddings, else ``None``.
        tokens: further inputs per token, (B, T) each, by name (token types).
        images: the encoded images and videos, as the forward takes them, by kind.
    """

    module: torch.nn.Module
    input_ids: Tensor
    mask: Tensor
    positions: Tensor
    embeds: Tensor | None = None
    tokens: dict[str, Tensor] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        module: torch.nn.Module,
        input_ids: Tensor,
        mask: Tensor,
        kwargs: dict[str, Any],
        token_keys: Collection[str],
        vision_keys: Collection[str],
    ) -> Prepared:
        """The arguments of a first forward, each taken for what its name says.

        Args:
            kwargs: what ``prepare_inputs_for_generation`` returned.
            token_keys: names of the inputs that hold one value per token.
            vision_keys: names of the encoder's inputs, which encoded images and videos replace.

        Raises:
            DependencyError: an argument that nobody here knows, or a cache.
        """
        kwargs = dict(kwargs)
        take_cache(kwargs)
        images = take_images(kwargs)
        embeds = kwargs.pop("inputs_embeds", None)
        positions = kwargs.pop("position_ids", None)
        tokens = {
            name: kwargs.pop(name).to(input_ids.device) for name in token_keys if isinstance(kwargs.get(name), Tensor)
        }
        known = {"input_ids", "attention_mask", *token_keys, *vision_keys, *_SETTINGS}
        unknown = sorted(name for name, value in kwargs.items() if name not in known and value is not None)
        if unknown:
            raise DependencyError(
                f"transformers {transformers.__version__} gives the first forward of {type(module).__name__} the argument "
                f"{unknown[0]!r}, which this lvlm_decode does not know; run: lvlm-decode doctor"
            )
        if positions is None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        # Whoever made them may have asked the model where it lives, whose parts may live elsewhere than its prompt.
        positions = positions.to(input_ids.device)
        if positions.shape[-2] != len(mask):
            positions = positions.expand(*positions.shape[:-2], len(mask), positions.shape[-1])
        return cls(module, input_ids, mask, positions, embeds, tokens, images)


def first_forward(parts: Sequence[Prepared], pad_token_id: int) -> dict[str, Any]:
    """The arguments of one forward over the rows of several prepared batches, left-padded to the longest.

    Returns:
        ids or embeddings, ``attention_mask`` (R, T), ``position_ids`` (..., R, T), token types, encoded images and videos.
    """
    width = max(part.input_ids.shape[1] for part in parts)

    def rows(values: Sequence[Tensor], fill: float, dim: int = -1) -> Tensor:
        return torch.cat([left_pad(value, width, fill, dim) for value in values])

    axes = max((part.positions.shape[0] for part in parts if part.positions.dim() == 3), default=0)
    positions = [
        part.positions if not axes or part.positions.dim() == 3 else part.positions.expand(axes, -1, -1)
        for part in parts
    ]
    kwargs: dict[str, Any] = {
        "attention_mask": rows([part.mask for part in parts], 0),
        "position_ids": torch.cat([left_pad(value, width, 0) for value in positions], -2),
    }
    embeds = [part.embeds for part in parts if part.embeds is not None]
    if embeds:
        kwargs["inputs_embeds"] = rows(embeds, 0.0, dim=1)
    else:
        kwargs["input_ids"] = rows([part.input_ids for part in parts], pad_token_id)
    for name in parts[0].tokens:
        kwargs[name] = rows([part.tokens[name] for part in parts], 0)
    own = {kind: [part.images[kind] for part in parts if kind in part.images] for kind in vision.KINDS}
    return {**kwargs, **with_images({kind: vision.merge(packed, kind) for kind, packed in own.items() if packed})}


def last_of_first(first: dict[str, Any], count: int, images: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments ``first`` of a first forward for its last ``count`` slots, the others being in the cache.

    Args:
        images: the encoded images and videos among these slots, by kind.
    """
    out = {}
    for name, value in first.items():
        if name == ENCODED:
            continue
        if name == "inputs_embeds":
            value = value[:, -count:]
        elif name != "attention_mask":
            value = value[..., -count:]
        out[name] = value
    # The positions were made with the images; where the model reads embeddings, they are among them.
    return {**out, **({} if "inputs_embeds" in out else with_images(images))}


def further_forward(tokens: Tensor, positions: Tensor, mask: Any) -> dict[str, Any]:
    """The arguments of a forward after the first.

    Args:
        tokens: (R, q).
        positions: (..., R, q).
        mask: (R, S) over the slots of the cache, an additive mask (R or 1, 1, q, S), a dict of those per kind of layer, or
            ``None`` where everything is visible.
    """
    return {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}


def run(forward: Callable[..., Any], kwargs: dict[str, Any], cache: Any, keep: int | Tensor, **call: Any) -> Any:
    """Call ``forward`` on ``kwargs`` with a cache.

    Args:
        keep: logits of the last ``keep`` positions are wanted, or of the positions (n,) given.
        call: further settings of the forward.
    """
    return forward(
        **{**kwargs, **call, **with_cache(cache), "use_cache": True, "return_dict": True, "logits_to_keep": keep}
    )


def run_whole(forward: Callable[..., Any], kwargs: dict[str, Any], keep: int) -> Any:
    """Call ``forward`` on whole sequences, without a cache; logits of the last ``keep`` positions are wanted."""
    return forward(**{**kwargs, "use_cache": False, "logits_to_keep": keep})


def kept_of(kwargs: dict[str, Any]) -> int:
    """The number of last positions that a loop needs logits of; 0 is all of them."""
    return kwargs.get("logits_to_keep") or 0


def left_pad(rows: Tensor, width: int, value: float, dim: int = -1) -> Tensor:
    """``rows`` with ``value`` put before them along ``dim`` until it is ``width`` long."""
    missing = width - rows.shape[dim]
    if missing == 0:
        return rows
    shape = list(rows.shape)
    shape[dim] = missing
    return torch.cat([rows.new_full(shape, value), rows], dim=dim)
