"""Whose forward is running: what hooks and attention edits inside the model find their rows by.

A context variable, so that calls in other threads and calls nested in this one do not see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def running(runner: Runner) -> Iterator[None]:
    """Forwards in the block are those of ``runner``."""
    token = _running.set(runner)
    try:
        yield
    finally:
        _running.reset(token)


def current() -> Runner | None:
    """Whose forward is running in this thread; ``None`` for a forward that is nobody's here."""
    return _running.get()


def running_lane(owner: object) -> Any:
    """The lane of ``owner`` whose forward is running; ``None`` while the model runs for anybody else."""
    runner = _running.get()
    return runner if runner is not None and runner.owner is owner else None
