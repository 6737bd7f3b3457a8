"""The controls: plain decoding, and plain decoding under the plausibility mask alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Method


@dataclass(frozen=True)
class Plain(Method):
    """The model as it is: scores = l0. The control of every method."""

    name: ClassVar[str] = "plain"
    paper: ClassVar[str] = "none: the model's own decoding"


@dataclass(frozen=True)
class Mask(Method):
    """The plausibility mask and no contrast: scores = l0 where p >= beta * max p, else far below.

    The control of every method that samples under the mask: it turns sampling into near-greedy decoding, which explains
    much of the published gains (Yin et al., arXiv 2504.10020).
    """

    name: ClassVar[str] = "mask"
    paper: ClassVar[str] = "Contrastive Decoding (Li et al., ACL 2023), its plausibility constraint alone"
    arxiv: ClassVar[str] = "2210.15097"

    beta: float | None = 0.1  # (0, 1]

    def __post_init__(self) -> None:
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta
