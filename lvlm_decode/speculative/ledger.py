"""What drafting costs and brings on the running machine, and what follows from it: which drafter, how deep, or none.

A :class:`Ledger` is kept for every shape of work (samples, views). It holds the seconds of a verification without a draft;
for each drafter the seconds of a cycle by depth, the share of cycles that accepted a token at each level, and the seconds
that starting it takes. From these follows the time per token of every drafter at every depth
(:func:`~lvlm_decode.speculative.cost.time_per_token`), and the best is taken if it beats no draft.

Trying costs time. What has been lost against no draft so far is counted in seconds, gains taken off, and a draft that may
lose is tried only while that stays under :data:`SHARE` of all the time spent. So whatever drafters do, the whole stays within
that share, and one cycle, of the time without a draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .cost import time_per_token

#: Share of the time spent that may be lost to trying.
SHARE = 0.02
#: Verifications without a draft that are timed before anything is tried.
FIRST = 4
#: Depth at which a drafter is tried first, and the deepest it is taken to.
TRIED, DEEPEST = 4, 10
#: Weight that an observation keeps when the next one comes: answers change, and so does what is accepted in them.
KEPT = 0.98
#: A drafter that loses is tried again after this many calls without it.
AGAIN = 16


@dataclass
class Mean:
    """A mean whose older values fade."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> None:
        self.total, self.weight = KEPT * self.total + value, KEPT * self.weight + 1

    @property
    def value(self) -> float:
        return self.total / self.weight


@dataclass
class Entry:
    """What is known of one drafter.

    Args:
        cycles: depth -> seconds of a cycle, drafting and learning included.
        accepted: per level, the share of cycles at least as deep that accepted a token there.
        start: seconds until the first draft of a call.
        calls: how many calls it was used in, and how many have passed since.
    """

    cycles: dict[int, Mean] = field(default_factory=dict)
    accepted: list[Mean] = field(default_factory=list)
    start: Mean = field(default_factory=Mean)
    calls: int = 0
    passed: int = 0

    def tau(self, depth: int) -> float:
        """Accepted tokens per cycle at ``depth``; levels never tried are taken to fall as the last two that were."""
        shares = [mean.value for mean in self.accepted[:depth] if mean.weight]
        falling = shares[-1] / shares[-2] if len(shares) > 1 and shares[-2] > 0 else 0.5
        while len(shares) < depth:
            shares.append(shares[-1] * min(falling, 1.0) if shares else 0.0)
        return sum(shares)

    def seconds(self, depth: int, plain: float) -> float:
        """Seconds of a cycle at ``depth``, on the line through the two nearest depths that are known; 0 is ``plain``."""
        known = {0: plain} | {d: mean.value for d, mean in self.cycles.items()}
        if depth in known:
            return known[depth]
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
        plain: seconds of a verification without a draft, while no drafter listens.
        entries: by name of the drafter.
        spent: seconds of all cycles and starts.
        behind: of these, how many were lost against no draft; negative where drafting won.
        length: tokens of a call.
    """

    plain: Mean = field(default_factory=Mean)
    plain_cycles: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    spent: float = 0.0
    behind: float = 0.0
    length: Mean = field(default_factory=Mean)

    def allowance(self) -> float:
        """Seconds that may still be lost."""
        return SHARE * self.spent - self.behind

    def best(self, name: str, most: int = DEEPEST) -> tuple[int, float]:
        """The depth at which ``name`` takes the least time per token, and that time."""
        entry, plain = self.entries[name], self.plain.value
        times = {
            depth: time_per_token(entry.tau(depth), entry.seconds(depth, plain)) for depth in range(1, max(most, 1) + 1)
        }
        depth = min(times, key=lambda d: (times[d], d))
        return depth, times[depth]

    def plan(self, names: Sequence[str]) -> str | None:
        """The drafter that the next call is given, or ``None`` for none.

        The best of those that are known, if it saves more over a call than it takes to start; now and then one that is not
        known, or has not been tried for long, while there is allowance for it.
        """
        for name in names:
            self.entries.setdefault(name, Entry())
        if self.plain_cycles < FIRST:
            return None
        plain, length = self.plain.value, self.length.value if self.length.weight else 1.0
        known = [name for name in names if self.entries[name].cycles]
        saved = {
            name: length * (plain - self.best(name)[1])
            - (self.entries[name].start.value if self.entries[name].start.weight else 0.0)
            for name in known
        }
        winner = max(known, key=lambda name: saved[name], default=None)
        new = [name for name in names if not self.entries[name].cycles]
        used = winner if winner is not None and saved[winner] > 0 else None
        old = [name for name in known if self.entries[name].passed >= AGAIN and name != used]
        price = plain + max(
            (self.entries[name].start.value for name in known if self.entries[name].start.weight), default=0.0
        )
        if (new or old) and self.allowance() >= price:
            return (new or sorted(old, key=lambda name: -saved[name]))[0]
        return used

    def depth(self, name: str, room: int) -> int:
        """How deep ``name`` drafts in the next cycle of a call that has it; 0 for no draft."""
        entry, plain = self.entries[name], self.plain.value
        most = min(DEEPEST, room)
        if most < 1:
            return 0
        if not entry.cycles:
            return min(TRIED, most) if self.allowance() >= plain else 0
        depth, seconds = self.best(name, most)
        if seconds < plain:
            return depth
        # It loses by what is known: it is tried for what may still be lost.
        loss = entry.seconds(depth, plain) - (1 + entry.tau(depth)) * plain
        return depth if self.allowance() >= 4 * loss + plain * SHARE else 0

    def started(self, name: str, seconds: float) -> None:
        """``name`` was given a call; its start took so long."""
        for other, entry in self.entries.items():
            entry.passed = 0 if other == name else entry.passed + 1
        self.entries[name].calls += 1
        self.entries[name].start.add(seconds)
        self.spent += seconds
        self.behind += seconds

    def cycle(self, name: str | None, depth: int, accepted: Sequence[int], seconds: float) -> None:
        """One verification.

        Args:
            name: the drafter of the call; ``None`` if it has none.
            depth: how deep it was asked to draft, 0 for no draft.
            accepted: for each unfinished sample the tokens accepted.
            seconds: from the draft's beginning to the end of what the drafter learned.
        """
        self.spent += seconds
        if name is None:
            self.plain.add(seconds)
            self.plain_cycles += 1
            return
        mean = sum(accepted) / max(len(accepted), 1)
        self.behind += seconds - (1 + mean) * self.plain.value
        if depth == 0:
            return
        entry = self.entries[name]
        entry.cycles.setdefault(depth, Mean()).add(seconds)
        for level in range(depth):
            if len(entry.accepted) <= level:
                entry.accepted.append(Mean())
            entry.accepted[level].add(sum(count > level for count in accepted) / max(len(accepted), 1))

    def ended(self, tokens: float, drafted: bool) -> None:
        """A call of so many tokens per sample is over."""
        self.length.add(tokens)
        if not drafted:
            for entry in self.entries.values():
                entry.passed += 1
