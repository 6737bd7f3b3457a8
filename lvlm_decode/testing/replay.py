"""Drafts of set quality, for tests and for cost measurements: an oracle, a liar, and everything between.

Not a way to decode faster: the right answer must be known beforehand. It answers "what would a drafter of this
acceptance and this price bring on this model?", and it lets tests check that a draft never changes an answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import ClassVar

from ..speculative.drafters.base import Context, Drafter, Session, Verified
from ..speculative.tree import Tree, shape_of


@dataclass
class Replay(Drafter):
    """Proposes the known answer, each token of it spoilt with probability ``1 - acceptance``.

    Args:
        answers: for each sample the tokens that will be generated; past their end, and without answers, proposals are
            random.
        acceptance: probability that a proposed token is the right one: 1 an oracle, 0 a liar.
        tokens: depth of the draft.
        width: proposals at every level of a tree, the right one at a random rank; 1 gives a chain.
        seed: of the spoiling.
    """

    name: ClassVar[str] = "replay"

    answers: list[list[int]] = field(default_factory=list)
    acceptance: float = 1.0
    tokens: int = 5
    width: int = 1
    seed: int = 0

    def begin(self, context: Context) -> Session:
        return _ReplaySession(self, context)


class _ReplaySession(Session):
    drafter: Replay

    def __init__(self, drafter: Replay, context: Context):
        super().__init__(drafter, context)
        self.rng = random.Random(drafter.seed)
        self.size = context.scores.shape[-1]

    def propose(self, room: int) -> Tree:
        drafter, rows = self.drafter, []
        for b, text in enumerate(self.context.tokens):
            at = len(text) - self.context.prompt_lengths[b]
            answer = drafter.answers[b] if b < len(drafter.answers) else []
            tokens, parents, last = [text[-1]], [-1], 0
            for level in range(min(drafter.tokens, room)):
                known = answer[at + level] if at + level < len(answer) else None
                level_tokens = self._level(known)
                parents += [last] * len(level_tokens)
                last = len(tokens) + (level_tokens.index(known) if known in level_tokens else 0)
                tokens += level_tokens
            rows.append((tokens, shape_of(tuple(parents))))
        return Tree.of(rows, self.context.device)

    def _level(self, known: int | None) -> list[int]:
        others = self.rng.sample(range(self.size), self.drafter.width + 1)
        if known is None:
            return others[: self.drafter.width]
        level = [token for token in others if token != known][: self.drafter.width]
        if self.rng.random() < self.drafter.acceptance:
            level[self.rng.randrange(len(level))] = known
        return level

    def observe(self, verified: Verified) -> None:
        self.count(verified)
