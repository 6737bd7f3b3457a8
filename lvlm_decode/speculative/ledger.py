"""What drafting costs and brings on the running machine, and what follows from it: which drafter, how deep, or none.

A :class:`Ledger` is kept for every shape of work (samples, views). It holds the seconds of a token in calls without a draft,
which run as if no drafter were attached; for each drafter the seconds of a cycle by depth, the share of cycles that accepted a
token at each level, and the seconds that starting it takes. From these follows the time per token of every drafter at every depth
(:func:`~lvlm_decode.speculative.cost.time_per_token`), and the best is taken if it beats no draft.

Trying costs time. What has been lost against no draft so far is counted in seconds, gains taken off, and a draft that may
lose is tried only while that stays under :data:`SHARE` of all the time spent. So whatever drafters do, the whole stays within
that share, and one cycle, of the time without a draft. What forwards without a draft would have given by now is what no
unfinished sample of a batch is short of, because the slowest sample ends the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: Share of the time spent that may be lost to trying.
SHARE = 0.02
#: Tokens without a draft that are timed before anything is tried.
FIRST = 4
#: Depth at which a drafter is tried first, and the deepest it is taken to.
TRIED, DEEPEST = 4, 10
#: Weight that an observation keeps when the next one comes: answers change, and so does what is accepted in them.
KEPT = 0.98
#: A drafter that loses is tried again after this many calls without it, once it had this many cycles to show what it brings.
AGAIN, ENOUGH = 16, 8
#: Forwards by which the slowest sample of a batch may be behind in a draft that pays; beyond them drafting is given up.
LAG = 8


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
class Entry:
    """What is known of one drafter.

    Args:
        cycles: depth -> seconds of a cycle, drafting and learning included.
        accepted: per level, the share of cycles at least as deep that accepted a token there.
        pace: of what its cycles gave the samples on average, the share by which the slowest one came forward.
        tried: how many cycles had a draft of it.
        start: seconds until the first draft of a call.
        calls: how many calls it was used in, and how many have passed since.
    """

    cycles: dict[int, Mean] = field(default_factory=dict)
    accepted: list[Mean] = field(default_factory=list)
    pace: Mean = field(default_factory=Mean)
    tried: int = 0
    start: Mean = field(default_factory=Mean)
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

    def seconds(self, depth: int, plain: float) -> float:
        """Seconds of a cycle at ``depth``, on the line through the two nearest depths that are known; 0 is ``plain``."""
        if depth in self.cycles:
            return self.cycles[depth].value
        known = {0: plain} | {d: mean.value for d, mean in self.cycles.items()}
        if depth == 0:
            return plain
        below = max(d for d in known if d < depth)
        above = min((d for d in known if d > depth), default=None)
        if above is None:
            # Beyond what is known: as steep as from no draft to here, never cheaper than here.
            slope = max(known[below] - plain, 0.0) / below if below else 0.0
            return known[below] + slope * (depth - below)
        return known[below] + (known[above] - known[below]) * (depth - below) / (above - below)


@dataclass
class Ledger:
    """Measurements of one shape of work, and the decisions that follow.

    Args:
        plain: seconds of a token in calls without a draft.
        idle: seconds of a verification without a draft, in calls in which drafting was given up.
        entries: by name of the drafter.
        spent: seconds of all cycles and starts.
        behind: of these, how many were lost against no draft; negative where drafting won.
        length: tokens of a call.
    """

    plain: Mean = field(default_factory=Mean)
    plain_tokens: int = 0
    idle: Mean = field(default_factory=Mean)
    entries: dict[str, Entry] = field(default_factory=dict)
    spent: float = 0.0
    behind: float = 0.0
    length: Mean = field(default_factory=Mean)

    def allowance(self) -> float:
        """Seconds that may still be lost."""
        return SHARE * self.spent - self.behind

    def best(self, name: str, most: int = DEEPEST) -> tuple[int, float]:
        """The depth at which ``name`` takes the least time per token, and that time."""
        # Asked before every cycle, so it adds levels up instead of beginning anew at each depth.
        entry, plain, tokens = self.entries[name], self.plain.value, 1.0
        depth, least = 0, float("inf")
        for level, share in enumerate(entry.shares(max(most, 1)), 1):
            tokens += share
            time = entry.seconds(level, plain) / entry.stands_for(tokens)
            if time < least:
                depth, least = level, time
        return depth, least

    def plan(self, names: Sequence[str]) -> str | None:
        """The drafter that the next call is given, or ``None`` for none.

        The best of those that are known, if it saves more over a call than it takes to start; now and then one that is not
        known, or has not been tried for long, while there is allowance for it.
        """
        for name in names:
            self.entries.setdefault(name, Entry())
        if self.plain_tokens < FIRST:
            return None
        plain, length = self.plain.value, self.length.value
        known = [name for name in names if self.entries[name].cycles]
        saved = {
            name: length * (plain - self.best(name)[1])
            - (self.entries[name].start.value if self.entries[name].start.weight else 0.0)
            for name in known
        }
        winner = max(known, key=lambda name: saved[name], default=None)
        used = winner if winner is not None and saved[winner] > 0 else None
        new = sorted((name for name in names if self.entries[name].tried < ENOUGH), key=lambda n: self.entries[n].tried)
        old = [name for name in known if self.entries[name].passed >= AGAIN and name != used]
        # One cycle for nothing, a start, and the rest of the call in a loop that verifies what nobody drafted.
        price = plain + max(
            (self.entries[name].start.value for name in known if self.entries[name].start.weight), default=0.0
        )
        price += length * max(self.idle.value - plain, 0.0) if self.idle.weight else 0.0
        if (new or old) and self.allowance() >= price:
            return (new or sorted(old, key=lambda name: -saved[name]))[0]
        return used

    def depth(self, name: str, room: int) -> int:
        """How deep ``name`` drafts in the next cycle of a call that has it; 0 for no draft."""
        entry, plain = self.entries[name], self.plain.value
        most = min(DEEPEST, room)
        if most < 1 or self.allowance() < -LAG * plain:
            return 0
        if entry.cycles:
            depth, seconds = self.best(name, most)
            if seconds < plain:
                return depth
        if entry.tried < ENOUGH:
            depth = min(TRIED, most)
            return depth if self.allowance() >= (entry.seconds(depth, plain) - plain if entry.cycles else plain) else 0
        # It loses by what is known: it is tried for what may still be lost.
        loss = entry.seconds(depth, plain) - entry.forwards(depth) * plain
        return depth if self.allowance() >= 4 * loss + plain * SHARE else 0

    def undrafted(self, steps: int, seconds: float) -> None:
        """A call without a draft is over; it took so long for so many forwards after the prompt's."""
        if steps:
            self.plain.add(seconds / steps, steps)
            self.plain_tokens += steps
        self.spent += seconds
        self.ended(steps + 1, False)

    def started(self, name: str, seconds: float) -> None:
        """``name`` was given a call; its start took so long."""
        for other, entry in self.entries.items():
            entry.passed = 0 if other == name else entry.passed + 1
        self.entries[name].calls += 1
        self.entries[name].start.add(seconds)
        self.spent += seconds
        self.behind += seconds

    def cycle(self, name: str, depth: int, accepted: Sequence[int], seconds: float) -> None:
        """One verification in a call that has ``name``.

        Args:
            depth: how deep it was asked to draft, 0 for no draft.
            accepted: for each unfinished sample the tokens accepted.
            seconds: from the draft's beginning to the end of what the drafter learned.
        """
        if depth == 0:
            self.idle.add(seconds)
            return
        entry = self.entries[name]
        entry.tried += 1
        entry.cycles.setdefault(depth, Mean()).add(seconds)
        for level in range(depth):
            if len(entry.accepted) <= level:
                entry.accepted.append(Mean())
            entry.accepted[level].add(sum(count > level for count in accepted) / max(len(accepted), 1))

    def passed(self, forwards: int, seconds: float) -> None:
        """In a call that has a drafter, ``seconds`` gave what so many forwards without a draft would have given."""
        self.spent += seconds
        self.behind += seconds - forwards * self.plain.value

    def paced(self, name: str, share: float) -> None:
        """In a call of ``name`` its slowest sample came forward by ``share`` of what the samples did on average."""
        self.entries[name].pace.add(share)

    def ended(self, tokens: float, drafted: bool) -> None:
        """A call of so many tokens per sample is over."""
        self.length.add(tokens)
        if not drafted:
            for entry in self.entries.values():
                entry.passed += 1
