"""Reading and changing the decoder's attention for a call, under sdpa, without ``output_attentions``.

One attention function is registered once. It calls the stock sdpa; while :func:`editing` is open it also asks the
edits, which compute just the rows they need. The language model's other layers and the vision encoder are untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import UnsupportedError
from . import hf
from .prepare import Batch, left_pad
from .stack import Lane, running_lane

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


_edits: WeakKeyDictionary[torch.nn.Module, tuple[Edit, ...]] = WeakKeyDictionary()


def _attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    edits = _edits.get(module, ())
    mask = attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    for edit in edits:
        mask = edit.mask(module.layer_idx, query, key, mask, scale)
    out, weights = hf.sdpa(module, query, key, value, mask, scaling=scaling, **kwargs)
    for edit in edits:
        out = edit.output(module.layer_idx, query, key, value, mask, scale, out)
    return out, weights


@contextmanager
def editing(module: torch.nn.Module, *edits: Edit) -> Iterator[None]:
    """Let the decoder of ``module`` attend under ``edits``, after those that are already in force; restored on exit.

    Raises:
        UnsupportedError: the decoder cannot run under sdpa.
    """
    hf.register_attention(NAME, _attend)
    decoder = module.get_decoder()
    if not getattr(decoder, "_supports_sdpa", False):
        raise UnsupportedError(
            f"{type(decoder).__name__} does not run under sdpa attention, where this method reads or changes its "
            "attention; use a model whose decoder supports attn_implementation='sdpa'."
        )
    layers = [part for layer in decoder.layers for part in layer.modules() if hasattr(part, "layer_idx")]
    configs = list({id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}.values())
    before = [(config, hf.attention_of(config)) for config in configs]
    known = [(layer, _edits.get(layer, ())) for layer in layers]
    try:
        for config in configs:
            hf.set_attention(config, NAME)
        for layer, own in known:
            _edits[layer] = (*own, *edits)
        yield
    finally:
        for layer, own in known:
            if own:
                _edits[layer] = own
            else:
                _edits.pop(layer, None)
        for config, name in before:
            hf.set_attention(config, name)


def visible(queries: int, slots: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """(R or 1, 1, q, S) bool: which slots each query sees, from the mask sdpa gets."""
    if mask is None:
        seen = torch.ones(queries, slots, dtype=torch.bool, device=device)
        return (seen.tril(slots - queries) if queries > 1 else seen)[None, None]
    return mask[..., :slots] if mask.dtype == torch.bool else mask[..., :slots] > torch.finfo(mask.dtype).min / 2


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
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def weighted(attention: Tensor, value: Tensor) -> Tensor:
    """(R, q, H, width) of attention (R, H, q, S) and grouped values (R, G, S, width)."""
    rows, heads, count, slots = attention.shape
    groups = value.shape[1]
    folded = attention.to(value.dtype).reshape(rows, groups, heads // groups * count, slots)
    return (folded @ value).reshape(rows, heads, count, -1).transpose(1, 2)


def image_slots(lane: Lane, image_token_id: int) -> Tensor:
    """(V*B, length) bool: slots of the cache that hold image tokens, in all rows of a lane."""
    prompts = torch.cat([left_pad(c.input_ids == image_token_id, lane.width, False) for c in lane.captured])
    return torch.nn.functional.pad(prompts, (0, lane.length - lane.width))


def to_layer(slots: Tensor, lane: Lane, size: int) -> Tensor:
    """Values per slot of the cache (..., length) as a layer with ``size`` key slots sees them.

    A sliding layer has dropped the oldest slots, a static one has empty ones at its end.
    """
    if size < lane.length:
        return slots[..., lane.length - size :]
    return torch.nn.functional.pad(slots, (0, size - lane.length))


class _LastRow(Edit):
    """Records how the last token of every row attends, mean over heads."""

    def __init__(self) -> None:
        self.layers: dict[int, Tensor] = {}

    def output(self, layer, query, key, value, mask, scaling, out):
        seen = rows_of(visible(query.shape[2], key.shape[2], mask, key.device), slice(None), slice(-1, None))
        attention = probabilities(query[:, :, -1:], key, seen, scaling).mean(1)[:, 0]
        length = running_lane().length
        self.layers[layer] = left_pad(attention[:, :length], length, 0.0)
        return out


def attention_to_prompt(batch: Batch) -> tuple[Tensor, Tensor]:
    """How the last prompt token of every sample attends, from one prefill of the batch.

    Returns:
        (L, B, T) attention, mean over heads, and (B, T) bool, which of the T slots hold image tokens.
    """
    captured = batch.capture(batch.samples)
    lane = Lane([captured], (0,), pad_token_id=batch.family.pad_token_id)
    recorder = _LastRow()
    with torch.no_grad(), editing(captured.module, recorder):
        lane.prefill(1)
    rows = torch.stack([recorder.layers[layer] for layer in sorted(recorder.layers)])
    return rows, image_slots(lane, batch.family.image_token_id)
