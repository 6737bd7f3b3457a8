"""Accepting the path of a verified draft and dropping the rest: caches, masks, positions.

A verification writes ``q`` slots after those in use, in row order, at the same place for every sample. Afterwards each
sample's path is moved to the end of its own slots, so that no holes pile up; a sample that is behind has free slots at
the end, which its mask hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sending import sent

if TYPE_CHECKING:
    from ..engine.stack import Lane, Lanes


def accept_paths(lanes: Lanes, paths: Sequence[Sequence[int]], q: int, chain: bool) -> None:
    """Leave in every lane what sample b would hold had it decoded its path one token at a time.

    Args:
        lanes: just extended by ``q`` tokens.
        paths: for each sample the accepted rows, the root (0) first; empty for a sample that is finished.
        q: rows of the verified draft.
        chain: whether the draft was a chain, run with the causal mask; the lanes counted all its tokens then.
    """
    if q == 1 and all(lane.kv.capacity is None for lane in lanes.lanes):
        # Nothing was drafted, so every row's token is where it belongs: a row that is behind keeps its hole, which its mask
        # hides. A cache of fixed size has no room for holes.
        return
    device = lanes.generated.device
    counted = q if chain else 0
    if len(paths) == 1:
        length = len(paths[0])
        in_order = list(paths[0]) == list(range(length))
        rows = None if in_order else sent(paths[0], device)
        for lane in lanes.lanes:
            base = lane.length - q
            lane.kv.keep(base, length, rows)
            lane.length = base + length
            lane.position = lane.position + (length - counted)
            if lane.mask is not None:
                lane.mask = lane.mask[:, : base + length]
        lanes.generated = lanes.generated + (length - counted)
        return
    longest = max(map(len, paths))
    rows = sent([[*path, *[0] * (longest - len(path))] for path in paths], device)
    taken = sent([len(path) for path in paths], device)
    for lane in lanes.lanes:
        _accept_rows(lane, rows, taken, q, counted)
    lanes.generated = lanes.generated + taken - counted


def rewind(lanes: Lanes, count: int) -> None:
    """Leave in every lane each row's prompt and its first ``count`` tokens after it, side by side.

    Rows that hold fewer, those of samples that ended, are filled up with what nobody reads.
    """
    ahead = lanes.generated - count
    for lane in lanes.lanes:
        width, length = lane.width, lane.width + count
        if lane.mask is None:
            lane.kv.keep(length, 0)
        else:
            # The slots that a row sees, in order; then those it does not.
            seen = lane.mask[:, width : lane.length]
            slots = seen.long().argsort(dim=1, descending=True, stable=True)[:, :count]
            target = torch.arange(count, device=slots.device).expand_as(slots)
            lane.kv.move(width + slots, width + target, length)
            mask = lane.mask[:, :width]
            lane.mask = None if bool(mask.all()) else torch.nn.functional.pad(mask, (0, count), value=True)
        lane.length = length
        lane.position = lane.position - ahead.repeat(len(lane.views))[:, None]
    lanes.generated = torch.full_like(lanes.generated, count)


def _accept_rows(lane: Lane, rows: Tensor, taken: Tensor, q: int, counted: int) -> None:
    """Move each row's path to the end of what that row has in use.

    Args:
        rows: (B, m) slots to keep, relative to where the draft starts, filled up to the longest path.
        taken: (B,) how many of them.
    """
    views, base = len(lane.views), lane.length - q
    rows, taken = rows.repeat(views, 1), taken.repeat(views)
    mask = torch.ones(len(rows), base, dtype=torch.bool, device=rows.device)
    if lane.mask is not None:
        mask = lane.mask[:, :base]
    # Slots in use by each row: up to the last one it sees. Every row sees its own prompt.
    used = base - mask.flip(1).long().argmax(1)
    # The longest unfinished row decides the length; what finished samples had beyond it is cut off.
    length = int((used + taken)[taken > 0].max())
    # Beyond a row's own path the copy writes slots that no mask shows.
    target = used[:, None] + torch.arange(rows.shape[1], device=rows.device)
    lane.kv.move(base + rows, target, length)
    slots = torch.arange(length, device=rows.device)
    new = (slots >= used[:, None]) & (slots < (used + taken)[:, None])
    mask = torch.nn.functional.pad(mask, (0, max(length - base, 0)))[:, :length] | new
    lane.mask = None if bool(mask.all()) else mask
    lane.length = length
    lane.position = lane.position + (taken - counted)[:, None]
