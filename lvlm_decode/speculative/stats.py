"""What a speculative call did: counters and times, returned beside its output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stats:
    """Counters of one call; ``+`` adds calls up.

    ``tau`` counts accepted draft tokens per verification and leaves the bonus out, as ViSpec's tables do; EAGLE's and
    MSD's "mean accepted tokens" is ``tau + 1``.

    Args:
        cycles: verifications, counted once per unfinished sample.
        rows: rows verified over all cycles and samples, roots included, views not.
        accepted: draft tokens accepted and committed.
        tokens: tokens committed, first tokens included.
        reached: per level, cycles whose draft had that level and had accepted everything above it.
        accepted_per_level: per level, cycles that accepted a token there.
        handed_over: calls whose rest was decoded as without a drafter, because the drafter gave up.
        prefill_s, target_s, draft_s, other_s: seconds; ``target_s`` is verification with its mitigation, without the
            prefill; ``draft_s`` is proposing and learning; ``rest_s`` is what was decoded after a drafter gave up; ``other_s``
            is choosing, walking, cache and bookkeeping.
    """

    cycles: int = 0
    rows: int = 0
    accepted: int = 0
    tokens: int = 0
    reached: list[int] = field(default_factory=list)
    accepted_per_level: list[int] = field(default_factory=list)
    handed_over: int = 0
    prefill_s: float = 0.0
    target_s: float = 0.0
    draft_s: float = 0.0
    rest_s: float = 0.0
    other_s: float = 0.0

    @property
    def tau(self) -> float:
        """Accepted draft tokens per verification, bonus excluded."""
        return self.accepted / self.cycles if self.cycles else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Per level, the share of drafts accepted there among those that got so far."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted_per_level, self.reached)]

    @property
    def decode_s(self) -> float:
        """Seconds after the prefill."""
        return self.target_s + self.draft_s + self.rest_s + self.other_s

    def add_seconds(self, spent: dict[str, float]) -> None:
        """Add seconds by phase: "prefill", "target", "draft", "rest", "other"."""
        for phase, seconds in spent.items():
            setattr(self, f"{phase}_s", getattr(self, f"{phase}_s") + seconds)

    def level(self, depth: int, accepted: int) -> None:
        """Count one cycle: its draft was ``depth`` levels deep and ``accepted`` of them were right."""
        while len(self.reached) < depth:
            self.reached.append(0)
            self.accepted_per_level.append(0)
        for level in range(min(depth, accepted + 1)):
            self.reached[level] += 1
            if level < accepted:
                self.accepted_per_level[level] += 1

    def __add__(self, other: Stats) -> Stats:
        both = Stats()
        seconds = ("prefill_s", "target_s", "draft_s", "rest_s", "other_s")
        for name in ("cycles", "rows", "accepted", "tokens", "handed_over", *seconds):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        for name in ("reached", "accepted_per_level"):
            a, b = getattr(self, name), getattr(other, name)
            size = max(len(a), len(b))
            padded = ([*x, *[0] * (size - len(x))] for x in (a, b))
            setattr(both, name, [x + y for x, y in zip(*padded)])
        return both

    def to_json(self) -> dict[str, Any]:
        """The counters and what follows from them, rounded for reading."""
        return {
            "cycles": self.cycles,
            "rows": self.rows,
            "tokens": self.tokens,
            "accepted": self.accepted,
            "tau": round(self.tau, 4),
            "acceptance_per_level": [round(a, 4) for a in self.acceptance],
            "reached_per_level": self.reached,
            "handed_over": self.handed_over,
            "seconds": {
                "prefill": round(self.prefill_s, 5),
                "target": round(self.target_s, 5),
                "draft": round(self.draft_s, 5),
                "rest": round(self.rest_s, 5),
                "other": round(self.other_s, 5),
            },
        }
