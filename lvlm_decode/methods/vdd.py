"""Visual Debias Decoding (Zhang et al.; arXiv 2403.05262).

    scores = (1 + alpha) * l(image) - alpha * mean over the image-less prompts of l(prompt)

The image-less prompt has its image token removed (``absent="none"``), replaced by one unknown token (``"unknown"``), or
both are run and their logits averaged (``"both"``), as in the authors' code. alpha 1 and beta 0.1 are the code's; its
scripts pass beta 0.2. The paper's second part, a calibration of closed answers, is no decoding method and is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..engine.samples import Sample
from ..method import Contrast, View


@dataclass(frozen=True)
class VDD(Contrast):
    """Subtracts the predictions for a missing or unknown image.

    Args:
        alpha: Contrast strength, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        absent: What stands in place of the image: ``none``, ``unknown``, or ``both`` averaged.
        unknown_id: Token id of ``unknown``; the authors' code writes 0, LLaMA's ``<unk>``.
    """

    name: ClassVar[str] = "vdd"
    paper: ClassVar[str] = "Visual Debias Decoding (Zhang et al., 2024)"
    arxiv: ClassVar[str] = "2403.05262"
    costs: ClassVar[tuple[str, ...]] = ("text",)

    alpha: float = 1.0
    beta: float | None = 0.1
    absent: Literal["none", "unknown", "both"] = "none"
    unknown_id: int = 0

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(self.absent in ("none", "unknown", "both"), "absent", "'none', 'unknown' or 'both'")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if self.absent == "both":
            return [
                sample.without_image(weight=-self.alpha / 2),
                sample.without_image(weight=-self.alpha / 2, instead=self.unknown_id),
            ]
        return [sample.without_image(weight=-self.alpha, instead=self.unknown_id if self.absent == "unknown" else None)]
