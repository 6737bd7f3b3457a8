"""Reports what happens while a run decodes; :func:`lvlm_decode.explain` records it.

A run without a recorder, the usual case, tests for ``None`` and does nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..method import Method, Step

if TYPE_CHECKING:
    from .run import Run


class Recorder:
    """Receives what happens while a run decodes; every method here does nothing, and a subclass overrides what it needs."""

    def began(self, run: Run) -> None:
        """A call begins. Its run holds images, views and keys, gigabytes on a large model: who keeps it keeps them too."""

    def step(self, method: Method, step: Step, scores: Tensor) -> None:
        """A forward ended: its step, and the scores (B, T, N) that the method made of it."""

    def extended(self, tokens: Tensor) -> None:
        """The next forward runs ``tokens`` (B, q): the first one was chosen by the last step, the others are drafted."""

    def verified(self, drafted: Sequence[int], path: Sequence[int], committed: Sequence[int]) -> None:
        """A draft of sample 0 was verified.

        Args:
            drafted: (n,) its tokens, the root first.
            path: the accepted rows, the root first; row ``path[i]`` of the last step chose ``committed[i]``.
            committed: the accepted tokens and the bonus.
        """

    def attended(self, title: str, layer: int, weights: Tensor, images: Tensor, chosen: Tensor | None = None) -> None:
        """A method read or edited attention rows in the forward that is running.

        Args:
            title: what the rows are, in a clause.
            layer: of the decoder, 0 is the first.
            weights: (B, q, S) attention of the newest tokens, mean over heads.
            images: (B, S) bool, the slots that hold image tokens.
            chosen: (B, q, S) bool, the slots that the method chose by it; ``None`` when it chose none.
        """

    def searched(self, found: Sequence[Any]) -> None:
        """A search ended; ``found`` holds per sample what it can say about itself."""
