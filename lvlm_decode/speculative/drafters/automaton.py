"""Suffix automaton (SAM decoding, arXiv 2411.10666): propose what followed the longest suffix seen before.

An automaton over the text accepts every substring in time linear in its length; following it token by token gives the
longest suffix of the answer that occurred earlier, however long, at a few dictionary accesses a token. Two automata are
kept: one of this sample's prompt and answer, one of the answers of earlier calls (the paper's static automaton; here it
grows). The longer match proposes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

from ..tree import Tree, chain_shape
from .base import Context, Drafter, Session, Verified

#: Tokens of earlier answers that are kept at most.
REMEMBERED = 100_000


class Automaton:
    """Online suffix automaton of a token sequence; -1 separates texts and matches nothing."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.end = [-1]  # where the state's strings last ended: index of their last token
        self.last = 0

    def extend(self, token: int) -> None:
        """Append ``token``."""
        at = len(self.text)
        self.text.append(token)
        if token < 0:
            # Nothing may match across a border: go on from the empty string.
            self.last = 0
            return
        state, previous = self._target(self.last, token), self.last
        if state is None:
            state = self._new(self.length[previous] + 1, {}, 0)
            while previous >= 0 and token not in self.next[previous]:
                self.next[previous][token] = state
                previous = self.link[previous]
            if previous >= 0:
                self.link[state] = self._split(previous, token)
        self.last = state
        while state > 0:
            self.end[state] = at
            state = self.link[state]

    def _target(self, state: int, token: int) -> int | None:
        """The state of ``state``'s longest string plus ``token`` if that string was seen before (as in a new text)."""
        if token not in self.next[state]:
            return None
        return self._split(state, token)

    def _split(self, state: int, token: int) -> int:
        target = self.next[state][token]
        if self.length[target] == self.length[state] + 1:
            return target
        clone = self._new(self.length[state] + 1, dict(self.next[target]), self.link[target])
        self.end[clone] = self.end[target]
        self.link[target] = clone
        while state >= 0 and self.next[state].get(token) == target:
            self.next[state][token] = clone
            state = self.link[state]
        return clone

    def _new(self, length: int, edges: dict[int, int], link: int) -> int:
        self.length.append(length)
        self.next.append(edges)
        self.link.append(link)
        self.end.append(-1)
        return len(self.length) - 1

    def follow(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """The state and length of the longest seen suffix after ``token``, from those before it."""
        if token < 0:
            return 0, 0
        while state > 0 and token not in self.next[state]:
            state = self.link[state]
            matched = self.length[state]
        if token in self.next[state]:
            return self.next[state][token], matched + 1
        return 0, 0

    def after(self, at: int, tokens: int) -> list[int]:
        """Up to ``tokens`` tokens that follow index ``at``, within its text."""
        found = self.text[at + 1 : at + 1 + tokens]
        return found[: found.index(-1)] if -1 in found else found


@dataclass
class SuffixAutomaton(Drafter):
    """Copies from the prompt, the answer so far and the answers of earlier calls.

    Args:
        tokens: how many tokens to propose at most.
        shortest: shortest match that proposes.
        memory: keep the answers of earlier calls, :data:`REMEMBERED` tokens at most; ``forget()`` drops them.
    """

    name: ClassVar[str] = "automaton"

    tokens: int = 8
    shortest: int = 2
    memory: bool = True
    seen: Automaton = field(default_factory=Automaton, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.tokens >= 1, "tokens", "at least 1")
        self.check(self.shortest >= 1, "shortest", "at least 1")

    def begin(self, context: Context) -> Session:
        return _AutomatonSession(self, context)

    def learn(self, tokens: list[int]) -> None:
        """Add one text to what is remembered between calls."""
        if len(self.seen.text) + len(tokens) > REMEMBERED:
            # States cannot be taken out one by one, so the newest half is read again.
            newest, self.seen = self.seen.text[-(REMEMBERED // 2) :], Automaton()
            for token in newest:
                self.seen.extend(token)
        for token in [*tokens, -1]:
            self.seen.extend(token)

    def fork(self) -> Drafter:
        return copy.deepcopy(self)

    def forget(self) -> None:
        self.seen = Automaton()


class _AutomatonSession(Session):
    drafter: SuffixAutomaton

    def __init__(self, drafter: SuffixAutomaton, context: Context):
        super().__init__(drafter, context)
        self.own = [Automaton() for _ in context.tokens]
        self.matches = [(0, 0)] * len(self.own)  # in the automaton of the sample itself: state and length
        self.ends = [-1] * len(self.own)  # where that match ended before
        # Another call that ends meanwhile may give the drafter a new one.
        self.seen = drafter.seen
        self.past = [(0, 0)] * len(self.own)  # in that of earlier calls
        self.done = [0] * len(self.own)

    def _follow(self) -> None:
        for b, text in enumerate(self.context.tokens):
            for token in text[self.done[b] :]:
                # Matched before it is added: a text always matches itself.
                self.matches[b] = self.own[b].follow(*self.matches[b], token)
                self.ends[b] = self.own[b].end[self.matches[b][0]]
                self.own[b].extend(token)
                self.past[b] = self.seen.follow(*self.past[b], token)
            self.done[b] = len(text)

    def propose(self, room: int) -> Tree:
        self._follow()
        most = min(self.levels(self.drafter.tokens), room)
        rows = []
        for b, text in enumerate(self.context.tokens):
            found: list[int] = []
            own_length, (past, past_length) = self.matches[b][1], self.past[b]
            if max(own_length, past_length) >= self.drafter.shortest:
                if past_length > own_length:
                    found = self.seen.after(self.seen.end[past], most)
                else:
                    found = self.own[b].after(self.ends[b], most)
            tokens = [text[-1], *found]
            rows.append((tokens, chain_shape(len(tokens))))
        return Tree.of(rows, self.context.device)

    def observe(self, verified: Verified) -> None:
        self.count(verified)

    def finish(self) -> None:
        if self.drafter.memory:
            for text, start in zip(self.context.tokens, self.context.prompt_lengths):
                self.drafter.learn(text[start:])
