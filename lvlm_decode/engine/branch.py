"""Views of partial depth: they share the forward of view 0 up to one layer and end it by themselves.

Such a view has no rows in the stacked forward and no keys and values. What it puts out for a position is a function of what
view 0's forward computes at that position, so batches, beams, drafts and static caches need no bookkeeping for it, and its
cost is what :meth:`Branch.states` computes for the positions that are scored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .attention import Edit, rows_of, visible
from .hf import decoder
from .hooks import hooked
from .running import running_lane

if TYPE_CHECKING:
    from .run import Run


class Branch(Edit, ABC):
    """What a view of partial depth computes, from what the layers of view 0 attend with and from what the last one is given.

    An :class:`Edit` that looks and changes nothing: :meth:`output` is where a branch leaves. It keeps the newest forward's
    alone.

    Args:
        layer: where it leaves view 0, 0 for the first decoder layer.
    """

    def __init__(self, run: Run, layer: int):
        self.run, self.layer = run, layer
        #: (B, q, D) what the last layer was given, at the scored positions.
        self.given: Tensor | None = None

    @abstractmethod
    def leaves(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float, lane: Any) -> None:
        """Keep what the branch takes with it from ``layer``.

        Args:
            query: (B, H, q, width) of the scored positions.
            key: (B, G, S, width).
            value: (B, G, S, width).
            seen: (B or 1, 1, q, S) bool.
            scaling: factor on the scores.
            lane: that is running.
        """

    @abstractmethod
    def states(self) -> Tensor:
        """(B, q, D) what the branch puts out at the scored positions of the newest forward, before the final norm."""

    def output(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor
    ) -> Tensor:
        lane = running_lane(self.run)
        rows = lane.rows_of(0)
        if rows is not None and layer == self.layer:
            queries = slice(-lane.keep, None)
            seen = rows_of(visible(query.shape[2], key.shape[2], mask, key.device), rows, queries)
            self.leaves(query[rows][:, :, queries], key[rows], value[rows], seen, scaling, lane)
        return out

    @contextmanager
    def followed(self) -> Iterator[None]:
        """The forwards of the run are followed for the length of the block."""

        def given(module: Any, args: Any, kwargs: Any) -> None:
            lane = running_lane(self.run)
            rows = None if lane is None else lane.rows_of(0)
            if rows is not None:
                states: Tensor = args[0] if args else kwargs["hidden_states"]
                self.given = states[rows, -lane.keep :]

        with self.run.editing(self), hooked(before={decoder.layers(self.run.module)[-1]: given}):
            yield
