"""Uncertainty-aware Selective Contrastive Decoding (arXiv 2409.05923), applied to images.

    scores = l(image) - alpha * l(no image)     where the next token is uncertain,    l(image) elsewhere

The paper is about code generation, and its "lame prompt" is the prompt without its examples. Here it is the prompt without
its image. What carries over to an LVLM is the gate: contrast only where the model is uncertain. A token counts as uncertain
when the standard deviation of its distribution over the vocabulary is below ``threshold`` times that of a
certain one. A row without an image is its own lame prompt, and scores (1 - alpha) * l where it is uncertain. No code was
released; alpha, beta and threshold are not the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.samples import Sample
from ..method import Method, Step, View


@dataclass(frozen=True)
class USCD(Method):
    """Subtracts the predictions without the image where the next token is uncertain.

    Args:
        alpha: Weight of the branch without the image, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        threshold: Share, in [0, 1], of a certain token's standard deviation below which a token counts as uncertain.
    """

    name: ClassVar[str] = "uscd"
    paper: ClassVar[str] = "Uncertainty-aware Selective Contrastive Decoding (2024)"
    arxiv: ClassVar[str] = "2409.05923"
    costs: ClassVar[tuple[str, ...]] = ("text",)

    alpha: float = 0.5
    beta: float | None = 0.1
    threshold: float = 0.9

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(0 <= self.threshold <= 1, "threshold", "in [0, 1]")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        return [sample.without_image()]

    def combine(self, step: Step) -> Tensor:
        main, blind = step.logits
        certain = torch.zeros(main.shape[-1], device=main.device)
        certain[0] = 1.0
        unsure = main.softmax(-1).std(-1, keepdim=True) < self.threshold * certain.std()
        return torch.where(unsure, main - self.alpha * blind, main)
