"""What drafting costs and brings on the running machine, and what follows from it: which drafter, how deep, or none.

A :class:`Ledger` is kept for every shape of work (samples, views). It holds what a forward without a draft takes, from calls and
parts of calls that run as if no drafter were attached; for each drafter what a cycle costs by depth, in such forwards, the share
of cycles that accepted a token at each level, and the seconds that starting and ending it takes. From these follows the time per
token of every drafter at every depth (:func:`~lvlm_decode.speculative.cost.time_per_token`), and the best is taken if it beats no
draft.

Trying costs time. What has been lost against no draft so far is counted in seconds, gains taken off. Nothing is begun, neither a
drafter in a call nor a further cycle, unless the most that it can lose fits into :data:`SHARE` of all the time spent, beside what
is lost already: a cycle gives at least the token that a forward without a draft would have given. So whatever drafters do, the
whole stays within that share of the time without a draft, but for what the first cycle or start of a drafter takes beyond what is
assumed of it. What forwards without a draft would have given by now is what no unfinished sample of a batch is short of, because
the slowest sample ends the call, and because the loop that decodes the rest begins there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: Share of the time spent that may be lost to trying.
SHARE = 0.025
#: Tokens without a draft that are timed before anything is tried.
FIRST = 4
#: Depth that a drafter is tried at, and the deepest it is taken to.
TRIED, DEEPEST = 4, 10
#: What is assumed of a drafter before it was tried: forwards that starting and ending it take, and each level of a draft.
START, LEVEL = 2.0, 1.0
#: Weight that an observation keeps when the next one comes: answers change, and so does what is accepted in them.
KEPT = 0.98
#: The same for the time of each forward without a draft, which changes with the machine alone.
KEPT_FORWARD = 0.999
#: A drafter that loses is tried again after this many calls without it, once it had this many cycles to show what it brings.
AGAIN, ENOUGH = 16, 8


@dataclass
class Mean:
    """A mean whose older values fade."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, times: int = 1) -> None:
        kept = KEPT**times
        new = (1 - kept) / (1 - KEPT)
        self.total, self.weight = kept * self.total + new * value, kept * self.weight + new

    @property
    def value(self) -> float:
        return self.total / self.weight


@dataclass
class Line:
    """Seconds of a forward by how many tokens precede it: the line of least squares, whose older points fade.

    Attention reads all that precedes, so a forward takes longer late in a long answer than early in it.
    """

    #: Added to the variance of the positions: those of short answers say nothing about a slope.
    NOISE = 10.0

    weight: float = 0.0
    at: float = 0.0
    square: float = 0.0
    total: float = 0.0
    product: float = 0.0

    def add(self, at: float, seconds: float, times: int = 1) -> None:
        """``times`` forwards around position ``at`` took ``seconds`` each."""
        kept = KEPT_FORWARD**times
        new = (1 - kept) / (1 - KEPT_FORWARD)
        values = (1.0, at, at * at, seconds, at * seconds)
        sums = (self.weight, self.at, self.square, self.total, self.product)
        self.weight, self.at, self.square, self.total, self.product = (
            kept * old + new * value for old, value in zip(sums, values)
        )

    def value(self, at: float) -> float:
        """Seconds of a forward that ``at`` tokens precede."""
        middle, mean = self.at / self.weight, self.total / self.weight
        variance = self.square / self.weight - middle * middle
        slope = (self.product / self.weight - middle * mean) / (variance + self.NOISE)
        # A longer text is no faster, and a forward takes time at the beginning too.
        slope = min(max(slope, 0.0), 0.9 * mean / max(middle, 1.0))
        return mean + slope * (at - middle)


@dataclass
class Entry:
    """What is known of one drafter.

    Args:
        cycles: depth -> what a cycle takes, drafting and learning included, in forwards without a draft.
        accepted: per level, the share of cycles at least as deep that accepted a token there.
        pace: of what its cycles gave the samples on average, the share by which the slowest one came forward.
        tried: how many cycles had a draft of it.
        start: seconds until the first draft of a call.
        end: seconds that it takes when a call is over.
        calls: how many calls it was used in.
        passed: how many calls have passed since.
    """

    cycles: dict[int, Mean] = field(default_factory=dict)
    accepted: list[Mean] = field(default_factory=list)
    pace: Mean = field(default_factory=Mean)
    tried: int = 0
    start: Mean = field(default_factory=Mean)
    end: Mean = field(default_factory=Mean)
    calls: int = 0
    passed: int = 0

    def shares(self, depth: int) -> list[float]:
        """Per level down to ``depth`` the accepted tokens per cycle; levels never tried fall as the last two that were."""
        shares = [mean.value for mean in self.accepted[:depth] if mean.weight]
        falling = shares[-1] / shares[-2] if len(shares) > 1 and shares[-2] > 0 else 0.5
        while len(shares) < depth:
            shares.append(shares[-1] * min(falling, 1.0) if shares else 0.0)
        return shares

    def forwards(self, depth: int) -> float:
        """How many forwards without a draft a cycle at ``depth`` stands for."""
        return self.stands_for(1 + sum(self.shares(depth)))

    def stands_for(self, tokens: float) -> float:
        """How many forwards without a draft stand for so many tokens of the samples on average."""
        return tokens * (self.pace.value if self.pace.weight else 1.0)

    def cost(self, depth: int) -> float:
        """What a cycle at ``depth`` takes in forwards without a draft, on the line through the two nearest known depths."""
        if depth in self.cycles:
            return self.cycles[depth].value
        known = {0: 1.0} | {d: mean.value for d, mean in self.cycles.items()}
        if depth == 0:
            return 1.0
        below = max(d for d in known if d < depth)
        above = min((d for d in known if d > depth), default=None)
        if above is None:
            # Beyond what is known: as steep as from no draft to here, never cheaper than here.
            slope = max(known[below] - 1.0, 0.0) / below if below else LEVEL
            return known[below] + slope * (depth - below)
        return known[below] + (known[above] - known[below]) * (depth - below) / (above - below)

    def around(self, plain: float) -> float:
        """Seconds that starting it in a call and ending it there take, where a forward takes ``plain``."""
        if not self.start.weight:
            return START * plain
        return self.start.value + self.ending()

    def ending(self) -> float:
        """Seconds that ending it takes."""
        return self.end.value if self.end.weight else 0.0


@dataclass
class Ledger:
    """Measurements of one shape of work, and the decisions that follow.

    Args:
        plain: seconds of a forward without a draft.
        plain_tokens: how many such forwards were timed.
        entries: by name of the drafter.
        spent: seconds of all forwards, cycles, starts and ends.
        behind: of these, how many were lost against no draft; negative where drafting won.
        length: tokens of a call.
    """

    plain: Line = field(default_factory=Line)
    plain_tokens: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    spent: float = 0.0
    behind: float = 0.0
    length: Mean = field(default_factory=Mean)

    def allowance(self) -> float:
        """Seconds that may still be lost."""
        return SHARE * self.spent - self.behind

    def best(self, name: str, most: int = DEEPEST) -> tuple[int, float]:
        """The depth at which ``name`` takes the least time per token, and that time in forwards without a draft."""
        # Asked before every cycle, so it adds levels up instead of beginning anew at each depth.
        entry, tokens = self.entries[name], 1.0
        depth, least = 0, float("inf")
        for level, share in enumerate(entry.shares(max(most, 1)), 1):
            tokens += share
            time = entry.cost(level) / entry.stands_for(tokens)
            if time < least:
                depth, least = level, time
        return depth, least

    def plan(self, names: Sequence[str]) -> str | None:
        """The drafter that the next call is given, or ``None`` for none.

        The best of those that are known, if it saves more over a call than starting and ending it take; now and then one that
        is not known, or has not been tried for long.
        """
        for name in names:
            self.entries.setdefault(name, Entry())
        if self.plain_tokens < FIRST:
            return None
        length = self.length.value
        plain, early = self.plain.value(length / 2), self.plain.value(1)
        known = [name for name in names if self.entries[name].cycles]
        saved = {name: length * plain * (1 - self.best(name)[1]) - self.entries[name].around(plain) for name in known}
        winner = max(known, key=lambda name: saved[name], default=None)
        used = winner if winner is not None and saved[winner] > 0 else None
        new = sorted((name for name in names if self.entries[name].tried < ENOUGH), key=lambda n: self.entries[n].tried)
        old = [name for name in known if self.entries[name].passed >= AGAIN and name != used]
        tried = next(iter(new or sorted(old, key=lambda name: -saved[name])), None)
        for one in (tried, used):
            # The least that may be lost by it: a draft of one level that is wrong.
            if one is not None and self.allowance() >= self.entries[one].around(early) + self._risk(one, 1, early):
                return one
        return None

    def _risk(self, name: str, depth: int, plain: float) -> float:
        """Seconds that a cycle of ``name`` loses if nothing of it is accepted."""
        return max(self.entries[name].cost(depth) - 1.0, 0.0) * plain

    def depth(self, name: str, room: int, at: int) -> int:
        """How deep ``name`` drafts in the next cycle of a call that has it; 0 for no draft.

        Args:
            room: levels for which there is room.
            at: tokens that precede.
        """
        entry, plain, allowance = self.entries[name], self.plain.value(at), self.allowance()
        most = min(DEEPEST, room)
        while most and self._risk(name, most, plain) + entry.ending() > allowance:
            most -= 1
        if most < 1:
            return 0
        if entry.tried < ENOUGH:
            # At one depth, so that the deeper levels are known too before the best is taken.
            return min(TRIED, most)
        depth, time = self.best(name, most)
        if time < 1:
            return depth
        # It loses by what is known: it is tried for what may still be lost.
        loss = (entry.cost(depth) - entry.forwards(depth)) * plain
        return depth if allowance >= 4 * loss else 0

    def undrafted(self, times: Sequence[float]) -> None:
        """A call without a draft is over; the forwards after the prompt's took so long, each of them."""
        for at, seconds in enumerate(times, 1):
            self.plain.add(at, seconds)
        self.plain_tokens += len(times)
        self.spent += sum(times)
        self.ended(len(times) + 1, False)

    def rest(self, at: int, steps: int, seconds: float) -> None:
        """A draft was given up after ``at`` tokens; the ``steps`` forwards that followed took ``seconds`` together."""
        if steps:
            self.plain.add(at + (steps - 1) / 2, seconds / steps, steps)
            self.plain_tokens += steps
        self.spent += seconds

    def started(self, name: str, seconds: float) -> None:
        """``name`` was given a call; its start took so long."""
        for other, entry in self.entries.items():
            entry.passed = 0 if other == name else entry.passed + 1
        self.entries[name].calls += 1
        self.entries[name].start.add(seconds)
        self._lost(seconds)

    def finished(self, name: str, seconds: float) -> None:
        """A call of ``name`` is over, and what it did then took so long."""
        self.entries[name].end.add(seconds)
        self._lost(seconds)

    def _lost(self, seconds: float) -> None:
        self.spent += seconds
        self.behind += seconds

    def cycle(self, name: str, depth: int, at: int, accepted: Sequence[int], seconds: float) -> None:
        """One verification of a draft of ``name``.

        Args:
            depth: how deep it was asked to draft.
            at: tokens that preceded.
            accepted: for each unfinished sample the tokens accepted.
            seconds: from the draft's beginning to the end of what the drafter learned.
        """
        entry = self.entries[name]
        entry.tried += 1
        entry.cycles.setdefault(depth, Mean()).add(seconds / self.plain.value(at))
        for level in range(depth):
            if len(entry.accepted) <= level:
                entry.accepted.append(Mean())
            entry.accepted[level].add(sum(count > level for count in accepted) / max(len(accepted), 1))

    def passed(self, at: int, forwards: int, seconds: float) -> None:
        """In a call that has a drafter, ``seconds`` gave what so many forwards without a draft would have given.

        Args:
            at: tokens that preceded the first of them.
        """
        self.spent += seconds
        self.behind += seconds - forwards * self.plain.value(at + (forwards - 1) / 2)

    def paced(self, name: str, share: float) -> None:
        """In a call of ``name`` its slowest sample came forward by ``share`` of what the samples did on average."""
        self.entries[name].pace.add(share)

    def ended(self, tokens: float, drafted: bool) -> None:
        """A call of so many tokens per sample is over."""
        self.length.add(tokens)
        if not drafted:
            for entry in self.entries.values():
                entry.passed += 1
