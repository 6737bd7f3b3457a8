"""Token Recycling (arXiv 2408.08696): propose the candidates that earlier forwards computed and threw away.

For every token an adjacency row holds the ``width`` best next tokens when it was last verified. Every verified row
updates it, accepted or not; a static tree, deeper for better ranks, is filled from it. The rows are fed with the
*mitigated* scores, so what is recycled is what the mitigated model would say.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...method import BELOW
from ..sending import sent
from ..tree import PAD, Tree, ranked_shape
from .base import Context, Drafter, Session, Verified


@dataclass
class Recycling(Drafter):
    """Token Recycling. The adjacency is kept from call to call; ``forget()`` drops it.

    Args:
        rows: rows of the static tree, root included. The paper uses about 80, sized for a GPU.
        depth: its deepest level.
        width: candidates kept for every token.
        chances: assumed probability that the candidate of each rank is right; shapes the static tree.
    """

    name: ClassVar[str] = "recycling"

    rows: int = 16
    depth: int = 6
    width: int = 4
    chances: tuple[float, ...] = (0.75, 0.12, 0.06, 0.03)
    adjacency: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rows >= 2, "rows", "at least 2")
        self.check(self.depth >= 1, "depth", "at least 1")
        self.check(self.width >= 1, "width", "at least 1")
        self.check(
            all(0 < chance < 1 for chance in self.chances) and len(self.chances) > 0, "chances", "in (0, 1) each"
        )

    def begin(self, context: Context) -> Session:
        size = context.scores.shape[-1]
        if self.adjacency is None or self.adjacency.shape[0] != size or self.adjacency.device != context.device:
            # It outlives the call: made inside inference mode, no later call outside could write to it.
            with torch.inference_mode(False):
                self.adjacency = torch.full((size, self.width), PAD, dtype=torch.long, device=context.device)
        return _RecyclingSession(self, context, self.adjacency)

    def fork(self) -> Drafter:
        return copy.deepcopy(self)

    def forget(self) -> None:
        self.adjacency = None


class _RecyclingSession(Session):
    drafter: Recycling

    def __init__(self, drafter: Recycling, context: Context, adjacency: Tensor):
        super().__init__(drafter, context)
        #: The drafter's own table, into which this session writes.
        self.adjacency = adjacency
        lasts = [text[-2] if len(text) > 1 else PAD for text in context.tokens]
        self._update(lasts, context.scores)

    def propose(self, room: int) -> Tree:
        drafter, device = self.drafter, self.context.device
        depth = min(self.levels(drafter.depth), room)
        roots = sent([text[-1] for text in self.context.tokens], device, torch.long)
        if depth < 1:
            return Tree.chain(roots[:, None])
        shape, ranks = ranked_shape(drafter.rows, drafter.chances[: drafter.width], depth)
        filled = [roots] + [roots] * (len(shape) - 1)
        found: dict[int, Tensor] = {}
        for row in range(len(shape)):
            if row:
                filled[row] = found[shape.parents[row]][:, ranks[row]]
            if shape.children[row]:
                token = filled[row]
                found[row] = self.adjacency[token.clamp(min=0)].masked_fill((token < 0)[:, None], PAD)
        return Tree(torch.stack(filled, 1), (shape,)).pruned()

    def observe(self, verified: Verified) -> None:
        self.count(verified)
        for sample, (tokens, path) in enumerate(zip(verified.tree.lists, verified.paths)):
            if not path:
                continue
            accepted = set(path)
            # The last writer wins: rejected rows first, then the accepted ones, the deepest last.
            order = [row for row in range(len(tokens)) if row not in accepted] + path
            latest = {tokens[row]: row for row in order if tokens[row] >= 0}
            rows = sent(list(latest.values()), self.context.device)
            self._update(list(latest), verified.scores[sample, rows])

    def _update(self, tokens: list[int], scores: Tensor) -> None:
        known = [at for at, token in enumerate(tokens) if token >= 0]
        if not known:
            return
        if len(known) < len(tokens):
            tokens, scores = [tokens[at] for at in known], scores[known]
        values, best = scores.topk(self.drafter.width, dim=-1)
        # What the plausibility mask removed is no candidate.
        best = best.masked_fill(values < -BELOW / 2, PAD)
        self.adjacency[sent(tokens, best.device)] = best
