"""Visual Contrastive Decoding (Leng et al., CVPR 2024; arXiv 2311.16922).

    scores = (1 + alpha) * l(image) - alpha * l(noised image)

Follows the authors' code where it differs from the paper. The code diffuses the normalised pixels on a sigmoid schedule
(step betas from 1e-5 to 5e-3), in which step 500 leaves the image visible (0.863 of it); the paper states a constant
gamma = 0.1 per step, which leaves nothing of it: ``schedule="paper"``. One noise draw per sample, kept for the answer; in
a video one per frame, as the code's function gives where it is handed the frames of a video.
The paper's POPE runs use step 999, the released scripts 500; the released POPE script sets beta = 0.2, the paper 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..engine.samples import Sample
from ..method import Contrast, View

STEPS = 1000


@cache
def kept_share(schedule: str) -> Tensor:
    """(1000,) how much of the image's variance each diffusion step keeps (alpha-bar)."""
    if schedule == "code":
        betas = torch.sigmoid(torch.linspace(-6, 6, STEPS)) * (5e-3 - 1e-5) + 1e-5
    else:
        betas = torch.full((STEPS,), 0.1)
    return torch.cumprod(1 - betas, 0)


def diffuse(pixels: Tensor, step: int, schedule: str, rng: torch.Generator) -> Tensor:
    """``pixels`` after ``step`` steps of forward diffusion, in one shot: sqrt(a) * x + sqrt(1 - a) * noise."""
    kept = kept_share(schedule)[step]
    noise = torch.randn(pixels.shape, generator=rng).to(pixels)
    return kept.sqrt() * pixels + (1 - kept).sqrt() * noise


@dataclass(frozen=True)
class VCD(Contrast):
    """Subtracts the predictions for a noised copy of the image.

    Args:
        alpha: Contrast strength, at least 0; 0 leaves only the mask.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        noise_step: Diffusion step of the noise, from 0 to 999; a later step is noisier.
        schedule: ``code`` is the sigmoid noise schedule of the authors' code, ``paper`` the constant 0.1 per step of
            the paper.
    """

    name: ClassVar[str] = "vcd"
    paper: ClassVar[str] = "Visual Contrastive Decoding (Leng et al., CVPR 2024)"
    arxiv: ClassVar[str] = "2311.16922"
    costs: ClassVar[tuple[str, ...]] = ("image",)

    alpha: float = 1.0
    beta: float | None = 0.1
    noise_step: int = 500
    schedule: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(0 <= self.noise_step < STEPS, "noise_step", f"from 0 to {STEPS - 1}")
        self.check(self.schedule in ("code", "paper"), "schedule", "'code' or 'paper'")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        def noised(pixels: Tensor) -> Tensor:
            return diffuse(pixels, self.noise_step, self.schedule, rng)

        return [sample.with_noise(noised, weight=-self.alpha)]
