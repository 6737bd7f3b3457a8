"""Whose forward is running: what hooks and attention edits inside the model find their rows by.

A context variable, so that calls in other threads and calls nested in this one do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .attention import Edit


class Runner(Protocol):
    """What may run a forward: a lane, or the rows of a search."""

    @property
    def owner(self) -> object: ...

    @property
    def edits(self) -> Sequence[Edit]:
        """What is done to the decoder's attention in its forwards."""
        ...


_running: ContextVar[Runner | None] = ContextVar("lvlm_decode_running", default=None)


class running:
    """Forwards in the block are those of ``runner``."""

    def __init__(self, runner: Runner):
        self._runner = runner

    def __enter__(self) -> None:
        self._token = _running.set(self._runner)

    def __exit__(self, *error: object) -> None:
        _running.reset(self._token)


def current() -> Runner | None:
    """Whose forward is running in this thread; ``None`` for a forward that is nobody's here."""
    return _running.get()


def running_lane(owner: object) -> Any:
    """The lane of ``owner`` whose forward is running; ``None`` while the model runs for anybody else."""
    runner = _running.get()
    return runner if runner is not None and runner.owner is owner else None
