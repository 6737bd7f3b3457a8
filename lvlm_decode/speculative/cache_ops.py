"""Keeping the accepted path of a verified draft, dropping the rest: caches, masks, positions.

A verification writes ``q`` slots after the ``base`` slots in use, in row order. Afterwards sample ``b`` keeps the slots of
its own path. All samples of a batch share the cache's length, so a sample that accepted less than another has a hole at
the end, which its mask hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from ..engine.stack import Lane, Lanes


def check_cache(cache: Any) -> None:
    """Raise unless rejected rows can be taken out of this cache again.

    Raises:
        UnsupportedError: a layer with a sliding window, which forgets slots that a rejection would need back, or a
            layer without keys and values by position (linear attention).
    """
    for number, layer in enumerate(cache.layers):
        if getattr(layer, "is_sliding", False):
            raise UnsupportedError(
                f"cache layer {number} has a sliding window, and rejected draft tokens cannot be taken back from it; "
                "decode without a drafter."
            )
        if not hasattr(layer, "keys"):
            raise UnsupportedError(
                f"cache layer {number} ({type(layer).__name__}) has no keys by position, so rejected draft tokens "
                "cannot be taken back from it; decode without a drafter."
            )


def keep_path(cache: Any, base: int, length: int, rows: Tensor | None = None) -> None:
    """Keep ``length`` of the slots from ``base`` on, in every layer; the others are free again.

    Args:
        cache: a dynamic or static cache; a static one keeps its buffers and its capacity.
        base: slots in use before the verification.
        length: how many slots stay.
        rows: which slots, relative to ``base``: (length,) for all rows of the cache, or (R, length) for each of its R
            rows; ``None`` for the first ones as they lie.
    """
    for layer in cache.layers:
        if rows is not None:
            for states in (layer.keys, layer.values):
                tail = states[:, :, base:]
                if rows.dim() == 1:
                    kept = tail.index_select(2, rows)
                else:
                    index = rows[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                    kept = tail.gather(2, index)
                # ``kept`` is a copy, so reading and writing the same slots is safe.
                states[:, :, base : base + length] = kept
        if getattr(layer, "is_compileable", False):
            layer.cumulative_length.fill_(base + length)
        else:
            layer.keys = layer.keys[:, :, : base + length]
            layer.values = layer.values[:, :, : base + length]


def keep(lanes: Lanes, paths: Sequence[Sequence[int]], q: int, chain: bool) -> None:
    """Leave in every lane what sample b would hold had it decoded its path one token at a time.

    Args:
        lanes: just extended by ``q`` tokens.
        paths: for each sample the accepted rows, the root (0) first.
        q: rows of the verified draft.
        chain: whether the draft was a chain, run with the causal mask.
    """
    longest = max(len(path) for path in paths)
    if chain and all(len(path) == longest for path in paths):
        for lane in lanes.lanes:
            base = lane.length - q
            keep_path(lane.cache, base, longest)
            lane.length = base + longest
            lane.position = lane.position - (q - longest)
            if lane.mask is not None:
                lane.mask = lane.mask[:, : base + longest]
        lanes.generated = lanes.generated - (q - longest)
        return
    device = lanes.generated.device
    taken = torch.tensor([len(path) for path in paths], device=device)
    in_order = all(list(path) == list(range(len(path))) for path in paths)
    rows = None
    if not in_order:
        filled = [[*path, *[path[-1]] * (longest - len(path))] for path in paths]
        rows = torch.tensor(filled if len(paths) > 1 else filled[0], device=device)
    for lane in lanes.lanes:
        _keep_lane(lane, rows, taken, longest, q, chain)
    lanes.generated = lanes.generated + (taken - q if chain else taken)


def _keep_lane(lane: Lane, rows: Tensor | None, taken: Tensor, longest: int, q: int, chain: bool) -> None:
    views = len(lane.views)
    base = lane.length - q
    keep_path(lane.cache, base, longest, rows if rows is None or rows.dim() == 1 else rows.repeat(views, 1))
    lane.length = base + longest
    step = taken.repeat(views)[:, None]
    lane.position = lane.position + (step - q if chain else step)
    uneven = bool((taken < longest).any())
    if lane.mask is None and uneven:
        lane.mask = torch.ones(len(step), base, dtype=torch.bool, device=taken.device)
    if lane.mask is not None:
        seen = torch.arange(longest, device=taken.device) < step
        lane.mask = torch.cat([lane.mask[:, :base], seen], 1)
