"""Paying more Attention to Image (Liu et al., ECCV 2024; arXiv 2407.21771).

    w_j <- w_j + alpha * |w_j|                 scores of the newest token towards image tokens j, before the softmax
    scores = gamma * (lsm l(image) - lsm l(no image)) + lsm l(no image)     the second branch attends as usual

Follows the authors' code: alpha 0.2, decoder layers from the third on, gamma 1.1 of their README (their CHAIR script
passes 2), a mask at 0.1 together with the second branch, and no boost on the prompt when there is one, so that the
first token is unboosted; ``first_token="boosted"`` boosts it as the paper's equation reads. At gamma 1 with a branch their code
boosts nothing at all; here it boosts from the second token on. Only rows that choose a
token are boosted, and only those are computed beside sdpa.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..engine.attention import Rescored
from ..engine.hf import decoder
from ..engine.run import Run
from ..engine.samples import Sample
from ..method import Contrast, View


@dataclass(frozen=True)
class PAI(Contrast):
    """Raises the attention to the image and subtracts the predictions without it.

    Args:
        alpha: Boost of the attention scores of image tokens, at least 0.
        gamma: Guidance against the branch without the image, at least 1; ``None`` leaves out the branch and the mask.
        beta: Plausibility threshold of the branch in (0, 1]; ``None`` applies no mask.
        first_layer: First decoder layer that is boosted, counted from 0.
        first_token: ``code`` leaves the first token unboosted beside a branch, as the authors' code does; ``boosted``
            treats it like the others.
    """

    name: ClassVar[str] = "pai"
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "Paying More Attention to Image (Liu et al., ECCV 2024)"
    arxiv: ClassVar[str] = "2407.21771"
    costs: ClassVar[tuple[str, ...]] = ("text", "attention")
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes what layers attend to, which a processor cannot."}
    off: ClassVar[dict[str, Any] | None] = {"alpha": 0.0, "gamma": 1.0, "beta": None}
    owns: ClassVar[str | None] = "the attention of view 0"

    alpha: float = 0.2
    gamma: float | None = 1.1
    beta: float | None = 0.1
    first_layer: int = 2
    first_token: Literal["code", "boosted"] = "code"

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(self.gamma is None or self.gamma >= 1, "gamma", "at least 1, or None")
        self.check(self.first_layer >= 0, "first_layer", "at least 0")
        self.check(self.first_token in ("code", "boosted"), "first_token", "'code' or 'boosted'")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return None if self.gamma is None else self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        # At 1 the branch has no weight.
        return [] if self.gamma in (None, 1) else [sample.without_image(weight=1 - self.gamma)]

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        if not self.alpha:
            return nullcontext()
        layers = range(self.first_layer, decoder.layer_count(run.module))

        def boost(scores: Tensor, images: Tensor) -> Tensor:
            return torch.where(images, scores + self.alpha * scores.abs(), scores)

        late = self.gamma is not None and self.first_token == "code"
        return run.editing(Rescored(run, layers, boost, first=not late))
