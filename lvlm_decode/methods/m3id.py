"""Multi-Modal Mutual-Information Decoding (Favero et al., CVPR 2024; arXiv 2403.14003).

    scores_t = lc + 1[max p_c < threshold] * (exp(decay * t) - 1) * (lc - lu)

``lc`` and ``lu`` are the log-probabilities with and without the image, ``t`` the number of the token. The authors
released no code; the defaults are those of the re-implementation in AvisC's repository: decay 0.02, t = 1 at the
first token, no indicator, and a plausibility mask that the formula does not have. RITUAL's repository counts from 0
(``first=0``), so that its first token is plain. (The usual writing is (1 - g) / g with g = exp(-decay * t), which is
the factor above.)

The factor grows without bound: 0.02 at the first token, 1.7 at the 50th, 53 at the 200th. ``cap`` bounds it. On
answers of one word the method is little more than its mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.samples import Sample
from ..method import Method, Step, View


@dataclass(frozen=True)
class M3ID(Method):
    """Amplifies what the image adds, more strongly as the answer grows.

    Args:
        decay: How fast the language prior takes over per token, at least 0; 0 is the plain model.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        threshold: The method corrects only where the most probable token is less probable than this; ``None``
            corrects always.
        cap: Largest contrast factor, at least 0; ``None`` leaves it unbounded.
        first: Number (``t``) of the first generated token.
    """

    name: ClassVar[str] = "m3id"
    paper: ClassVar[str] = "Multi-Modal Mutual-Information Decoding (Favero et al., CVPR 2024)"
    arxiv: ClassVar[str] = "2403.14003"
    costs: ClassVar[tuple[str, ...]] = ("text",)
    off: ClassVar[dict[str, Any] | None] = {"decay": 0.0, "beta": None}

    decay: float = 0.02
    beta: float | None = 0.1
    threshold: float | None = None
    cap: float | None = None
    first: int = 1

    def __post_init__(self) -> None:
        self.check(self.decay >= 0, "decay", "at least 0")
        self.check(self.threshold is None or 0 < self.threshold <= 1, "threshold", "in (0, 1], or None")
        self.check(self.cap is None or self.cap >= 0, "cap", "at least 0, or None")
        self.check(self.first in (0, 1), "first", "0 or 1")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        return [sample.without_image()]

    def combine(self, step: Step) -> Tensor:
        seen, blind = step.logits.log_softmax(-1)
        t = (step.positions + self.first).to(seen.dtype)[..., None]
        # Past e^80 float32 overflows, and inf * 0 would be nan.
        factor = torch.expm1((self.decay * t).clamp(max=80.0))
        if self.cap is not None:
            factor = factor.clamp(max=self.cap)
        if self.threshold is not None:
            unsure = seen.amax(-1, keepdim=True) < math.log(self.threshold)
            factor = factor * unsure
        return seen + factor * (seen - blind)
