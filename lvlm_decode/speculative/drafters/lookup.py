"""Prompt lookup and CopySpec: propose what followed the last tokens when they stood in the text before.

Prompt lookup tries the longest n-gram first; CopySpec (arXiv 2502.08923) is the case of one fixed length with a hash of
it, which is also how lookups work here: one dictionary access for every length, whatever the length of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..tree import Tree, chain_shape
from .base import Context, Drafter, Session, Verified


@dataclass
class PromptLookup(Drafter):
    """Copies from the prompt and the answer so far. Image placeholders and padding neither match nor are copied.

    Args:
        tokens: how many tokens to propose.
        longest: longest n-gram that is looked up.
        shortest: shortest one.
    """

    name: ClassVar[str] = "lookup"

    tokens: int = 8
    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.tokens >= 1, "tokens", "at least 1")
        self.check(self.longest >= 1, "longest", "at least 1")
        self.check(1 <= self.shortest <= self.longest, "shortest", "at least 1, and no more than longest")

    def begin(self, context: Context) -> Session:
        return _LookupSession(self, context)


@dataclass
class CopySpec(PromptLookup):
    """CopySpec: one n-gram length, long enough that a match means a copy."""

    name: ClassVar[str] = "copyspec"

    tokens: int = 10
    longest: int = 5
    shortest: int = 5


class _Index:
    """Where each n-gram of one text last ended, the text's own end excepted."""

    def __init__(self, shortest: int, longest: int):
        self.lengths = range(shortest, longest + 1)
        self.ends: dict[tuple[int, ...], int] = {}
        self.done = 0

    def add(self, text: list[int]) -> None:
        """Index n-grams that end before the last token of ``text``: only those have a continuation."""
        for end in range(self.done + 1, len(text)):
            for n in self.lengths:
                if n > end:
                    break
                gram = tuple(text[end - n : end])
                if -1 not in gram:
                    self.ends[gram] = end
        self.done = max(self.done, len(text) - 1)

    def continuation(self, text: list[int], tokens: int) -> list[int]:
        self.add(text)
        for n in reversed(self.lengths):
            if n > len(text):
                continue
            at = self.ends.get(tuple(text[-n:]))
            if at is not None:
                found = text[at : at + tokens]
                return found[: found.index(-1)] if -1 in found else found
        return []


class _LookupSession(Session):
    drafter: PromptLookup

    def __init__(self, drafter: PromptLookup, context: Context):
        super().__init__(drafter, context)
        self.indices = [_Index(drafter.shortest, drafter.longest) for _ in context.tokens]

    def propose(self, room: int) -> Tree:
        most = min(self.levels(self.drafter.tokens), room)
        rows = []
        for index, text in zip(self.indices, self.context.tokens):
            tokens = [text[-1], *index.continuation(text, most)]
            rows.append((tokens, chain_shape(len(tokens))))
        return Tree.of(rows, self.context.device)

    def observe(self, verified: Verified) -> None:
        self.count(verified)
