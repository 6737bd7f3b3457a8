"""Context-Aware Decoding (Shi et al., NAACL 2024; arXiv 2305.14739), with the image as the context.

    scores = (1 + alpha) * l(image, prompt) - alpha * l(prompt)

As in the authors' code there is no plausibility mask; they use alpha 0.5 for summaries and 1 for conflicts of
knowledge. Long answers at alpha >= 1 want ``beta`` set: without the mask improbable tokens can win.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.samples import Sample
from ..method import Contrast, View


@dataclass(frozen=True)
class CAD(Contrast):
    """Amplifies what the image adds to the predictions for the prompt alone.

    Args:
        alpha: Contrast strength, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
    """

    name: ClassVar[str] = "cad"
    paper: ClassVar[str] = "Context-Aware Decoding (Shi et al., NAACL 2024)"
    arxiv: ClassVar[str] = "2305.14739"
    costs: ClassVar[tuple[str, ...]] = ("text",)

    alpha: float = 0.5
    beta: float | None = None

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        return [sample.without_image(weight=-self.alpha)]
