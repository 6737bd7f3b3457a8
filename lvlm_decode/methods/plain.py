"""The controls: plain decoding, and plain decoding under the plausibility mask alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..method import Method, Step, own_scores


@dataclass(frozen=True)
class Plain(Method):
    """Leaves the model's own predictions as they are; the control of every method."""

    name: ClassVar[str] = "plain"
    kind: ClassVar[str] = "reference"
    paper: ClassVar[str] = "none: the model's own decoding"

    def scores(self, step: Step) -> Tensor:
        return own_scores(step)


@dataclass(frozen=True)
class Mask(Method):
    """Keeps only plausible tokens and contrasts nothing; the control of the contrastive methods.

    scores = l0 where p >= beta * max p, else far below. Sampling under the mask is nearly greedy decoding, which explains
    much of the published gains (Yin et al., arXiv 2504.10020).

    Args:
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
    """

    name: ClassVar[str] = "mask"
    kind: ClassVar[str] = "reference"
    paper: ClassVar[str] = "Contrastive Decoding (Li et al., ACL 2023), its plausibility constraint alone"
    arxiv: ClassVar[str] = "2210.15097"

    beta: float | None = 0.1

    def __post_init__(self) -> None:
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta
