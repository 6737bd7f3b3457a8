"""Views whose later layers see only some slots of the cache, chosen anew for every token by what it attends to in one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import Edit, choosing, image_slots, probabilities, rows_of, to_layer, visible
from .hf import left_pad
from .running import running_lane

if TYPE_CHECKING:
    from .run import Run


class Thinned(Edit, ABC):
    """Hides slots from the rows of one view in the layers after ``layer``, whose attention decides which.

    Args:
        view: number of the view.
        title: what is done, in a clause, for :func:`lvlm_decode.explain`.
    """

    def __init__(self, run: Run, view: int, layer: int, title: str):
        self.run, self.view, self.layer, self.title = run, view, layer, title
        self.hidden = torch.empty(0)
        #: (B, 1, q, 1) bool of the layer that is running: queries that were left nothing to see.
        self.blind = torch.empty(0)

    @abstractmethod
    def hides(self, attention: Tensor, seen: Tensor, images: Tensor, lane: Any) -> Tensor:
        """(B, q, S) bool: the slots that are hidden.

        Args:
            attention: (B, q, S) of the queries that choose a token, mean over heads.
            seen: (B, q, S) bool, the slots that each of them sees.
            images: (B, 1, S) bool, the slots that hold image tokens.
        """

    def mask(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
        lane = running_lane(self.run)
        rows = lane.rows_of(self.view)
        if rows is None or layer < self.layer:
            return mask
        seen = visible(query.shape[2], key.shape[2], mask, key.device)
        if layer == self.layer:
            queries = choosing(lane)
            own = rows_of(seen, rows, queries)
            attention = probabilities(query[rows][:, :, queries], key[rows], own, scaling).mean(1)
            images = image_slots(lane, self.run.family, key.device)[rows]
            in_use = own[:, 0].expand_as(attention)[..., : lane.length]
            attention = left_pad(attention[..., : lane.length], lane.length, 0.0)
            self.hidden = self.hides(attention, left_pad(in_use, lane.length, False), images[:, None], lane)
            if self.run.recorder is not None:
                title = f"attention in layer {layer} of {self.title}; later layers see only the marked tokens"
                self.run.recorder.attended(title, layer, attention, images, images[:, None] & ~self.hidden)
            return mask
        seen = seen.expand(len(query), -1, -1, -1).clone()
        thinned = seen[rows] & ~to_layer(self.hidden, lane, key)[:, None]
        # The queries before the first slot that is left have nothing to see, and keep what they saw.
        self.blind = seen[rows].any(-1, keepdim=True) & ~thinned.any(-1, keepdim=True)
        seen[rows] = torch.where(self.blind, seen[rows], thinned)
        return seen


def least(attention: Tensor, among: Tensor, keep: Tensor) -> Tensor:
    """(B, q, S) bool: of the slots ``among`` (B or 1, q or 1, S) all but the ``keep`` (B, q or 1, 1) least attended."""
    ranks = attention.masked_fill(~among, float("inf")).argsort(dim=-1, stable=True).argsort(dim=-1)
    return among & (ranks >= keep.to(ranks.device))
