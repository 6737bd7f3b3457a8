"""Reading and changing the decoder's attention for a call, under sdpa, without ``output_attentions``.

One attention function is registered once. It calls the stock sdpa; in the forwards of a lane that has edits it also asks
these, which compute just the rows they need. The language model's other layers, the vision encoder, and every other call of
the same model are untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .hf import decoder
from .hf.kwargs import left_pad
from .running import current, running_lane

if TYPE_CHECKING:
    from ..families.base import Family
    from .run import Run
    from .stack import Lane

NAME = "lvlm_decode_edited"

#: Attention rows computed beside sdpa since the process started, (rows x queries) per call; tests count with it.
materialised: list[tuple[int, int]] = []


class Edit:
    """What may be done to one layer's attention. R rows, H heads, q queries of this forward, S slots of keys."""

    def mask(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
        """The mask (R or 1, 1, q, S) the layer attends under."""
        return mask

    def output(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor
    ) -> Tensor:
        """The layer's output (R, q, H, width)."""
        return out


# Edits ask the host how far a lane is, which a graph would hold on to: a compiled model leaves its graph here.
@torch.compiler.disable
def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    runner = current()
    edits = () if runner is None else runner.edits
    if not edits:
        return decoder.stock_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    mask, layer = attention_mask, decoder.layer_number(module)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    for edit in edits:
        mask = edit.mask(layer, query, key, mask, scale)
    out, weights = decoder.stock_attention(module, query, key, value, mask, scaling=scaling, **kwargs)
    for edit in edits:
        out = edit.output(layer, query, key, value, mask, scale, out)
    return out, weights


@contextmanager
def routed(module: torch.nn.Module) -> Iterator[None]:
    """The decoder of ``module`` attends through the function that asks for edits, for the length of the block.

    Raises:
        UnsupportedError: the decoder cannot run under sdpa.
    """
    with decoder.routed(module, NAME, _attend):
        yield


def visible(queries: int, slots: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """(R or 1, 1, q, S) bool: which slots each query sees, from the mask sdpa gets."""
    if mask is None:
        seen = torch.ones(queries, slots, dtype=torch.bool, device=device)
        return (seen.tril(slots - queries) if queries > 1 else seen)[None, None]
    return mask[..., :slots] if mask.dtype == torch.bool else mask[..., :slots] > torch.finfo(mask.dtype).min / 2


@overload
def rows_of(mask: Tensor, rows: slice, queries: slice) -> Tensor: ...
@overload
def rows_of(mask: None, rows: slice, queries: slice) -> None: ...
def rows_of(mask: Tensor | None, rows: slice, queries: slice) -> Tensor | None:
    """The part of an attention mask that belongs to some rows and queries."""
    if mask is None:
        return None
    return (mask if len(mask) == 1 else mask[rows])[:, :, queries]


def probabilities(
    query: Tensor, key: Tensor, seen: Tensor, scaling: float, edit: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """(R, H, q, S) float32 attention of some queries; grouped keys are not repeated.

    Args:
        query: (R, H, q, width).
        key: (R, G, S, width), H a multiple of G.
        seen: (R or 1, 1, q, S) bool.
        edit: changes the scores (R, H, q, S) before the softmax.
    """
    rows, heads, count, width = query.shape
    groups, slots = key.shape[1], key.shape[2]
    materialised.append((rows, count))
    folded = query.reshape(rows, groups, heads // groups * count, width)
    scores = (folded @ key.transpose(-1, -2)).float().reshape(rows, heads, count, slots) * scaling
    if edit is not None:
        scores = edit(scores)
    return torch.where(seen, scores, float("-inf")).softmax(-1)


def weighted(attention: Tensor, value: Tensor) -> Tensor:
    """(R, q, H, width) of attention (R, H, q, S) and grouped values (R, G, S, width)."""
    rows, heads, count, slots = attention.shape
    groups = value.shape[1]
    folded = attention.to(value.dtype).reshape(rows, groups, heads // groups * count, slots)
    return (folded @ value).reshape(rows, heads, count, -1).transpose(1, 2)


def image_slots(lane: Lane, family: Family, device: torch.device | None = None) -> Tensor:
    """(V*B, length) bool: slots of the cache that hold tokens of images and videos, in all rows of a lane.

    Args:
        device: of the layer that asks, where that is not the prompt's: layers may live on devices of their own.
    """
    prompts = torch.cat([left_pad(family.is_placeholder(p.input_ids), lane.width, False) for p in lane.prepared])
    return torch.nn.functional.pad(prompts.to(device), (0, lane.length - lane.width))


def to_layer(slots: Tensor, lane: Lane, states: Tensor) -> Tensor:
    """Values per slot of the cache (..., length) as the layer with keys or values ``states`` (R, G, S, width) sees them.

    A sliding layer has dropped the oldest slots, a static one has empty ones at its end, and each may have its device.
    """
    size, slots = states.shape[2], slots.to(states.device)
    if size < lane.length:
        return slots[..., lane.length - size :]
    return torch.nn.functional.pad(slots, (0, size - lane.length))


def choosing(lane: Lane) -> slice:
    """The queries of the forward that is running that choose a token: the last of the prompt, later all."""
    return slice(-1, None) if lane.prefilling else slice(None)


class Rescored(Edit):
    """Changes the attention scores of view 0 in the rows that choose a token; just these are computed by hand.

    Args:
        run: whose view 0 is meant.
        layers: decoder layers whose scores change.
        change: (scores (B, H, q, S) before the softmax, (B, 1, 1, S) bool which slots hold image tokens) -> scores.
        first: also the row that chooses the first token.
    """

    def __init__(self, run: Run, layers: range, change: Callable[[Tensor, Tensor], Tensor], first: bool = True):
        self.run, self.layers, self.change, self.first = run, layers, change, first
        self._of: tuple[Any, ...] = ()
        self._slots: tuple[Tensor, Tensor] | None = None

    def output(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor
    ) -> Tensor:
        lane = running_lane(self.run)
        rows = lane.rows_of(0)
        if rows is None or layer not in self.layers or (lane.prefilling and not self.first):
            return out
        queries = choosing(lane)
        images, seen = self._slots_of(lane, rows, queries, query, key, mask)
        own = query[rows][:, :, queries]
        attention = probabilities(own, key[rows], seen, scaling, lambda scores: self.change(scores, images))
        if self.run.recorder is not None:
            self._tell(lane, layer, "as the model attends", probabilities(own, key[rows], seen, scaling))
            self._tell(lane, layer, "boosted", attention)
        out = out.clone()
        out[rows, queries] = weighted(attention, value[rows]).to(out.dtype)
        return out

    def _slots_of(
        self, lane: Lane, rows: slice, queries: slice, query: Tensor, key: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Which slots hold images, and which each query sees; made once a forward, for all layers that see the same."""
        of = (lane.length, query.shape[2], key.shape[2], key.device)
        if self._slots is None or self._of[:2] != (lane, id(mask)) or self._of[3:] != of:
            images = to_layer(image_slots(lane, self.run.family)[rows], lane, key)[:, None, None]
            seen = rows_of(visible(query.shape[2], key.shape[2], mask, key.device), rows, queries)
            # With the mask itself, so that no other one can have its id.
            self._of, self._slots = (lane, id(mask), mask, *of), (images, seen)
        return self._slots

    def _tell(self, lane: Any, layer: int, title: str, attention: Tensor) -> None:
        """Tell the recorder of attention (B, H, q, S)."""
        weights = left_pad(attention.mean(1)[..., : lane.length], lane.length, 0.0)
        images = image_slots(lane, self.run.family)[lane.rows_of(0)]
        assert self.run.recorder is not None
        self.run.recorder.attended(
            f"attention to the image, {title}, mean over the edited layers", layer, weights, images
        )
