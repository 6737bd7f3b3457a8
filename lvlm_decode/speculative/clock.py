"""Where the time of a call goes, without making the host wait for a GPU."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch


class Clock:
    """Time per phase of one call.

    On a GPU it records events, which cost a launch each; the host waits once, in :meth:`seconds`, after the last token.

    Args:
        device: where the call runs.
    """

    def __init__(self, device: torch.device):
        self._events = device.type == "cuda" and torch.cuda.is_available()
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def mark(self, phase: str) -> None:
        """What ran since the last mark belonged to ``phase``."""
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds."""
        if self._events:
            self._marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:]):
            spent = before.elapsed_time(after) / 1000 if self._events else after - before
            found[phase] = found.get(phase, 0.0) + spent
        return found

    def _now(self) -> Any:
        if not self._events:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
