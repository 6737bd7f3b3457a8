"""Attentional Vision Calibration (Woo et al., Findings of ACL 2025; arXiv 2405.17820).

    layers: the smallest set whose share of the attention on the image, last prompt row, reaches gamma
    blind tokens: image tokens whose mean attention over those layers exceeds mu + lambda * sigma
    scores = (1 + alpha) * l(image) - alpha * l(image with all other tokens' features set to zero)

Follows the authors' code: gamma 0.5, lambda 1, the "zeros" scheme. alpha is 1 there, and their scripts pass 3 for POPE
and 2.5 for AMBER on LLaVA. The attention is read in one prefill of the batch before decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.batch import attention_to_prompt
from ..engine.samples import Sample
from ..method import Contrast, Places, View


@dataclass(frozen=True)
class AvisC(Contrast):
    """Subtracts a branch that sees only the image tokens with excessive ("blind") attention.

    Args:
        alpha: Contrast strength, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        gamma: Share of the attention to the image that the chosen layers hold, in (0, 1].
        deviations: Standard deviations above the mean (lambda) from which a token counts as blind.
    """

    name: ClassVar[str] = "avisc"
    paper: ClassVar[str] = "Attentional Vision Calibration (Woo et al., Findings of ACL 2025)"
    arxiv: ClassVar[str] = "2405.17820"
    aliases: ClassVar[dict[str, str]] = {**Contrast.aliases, "layer_gamma": "gamma", "lamb": "deviations"}
    costs: ClassVar[tuple[str, ...]] = ("feature", "attention")

    alpha: float = 1.0
    beta: float | None = 0.1
    gamma: float = 0.5
    deviations: float = 1.0

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(0 < self.gamma <= 1, "gamma", "in (0, 1]")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def layers(self, attention: Tensor) -> Tensor:
        """The fewest layers that hold ``gamma`` of the attention on the image, from (L, n) attention, the strongest first."""
        share, order = (attention.sum(-1) / attention.sum()).sort(descending=True)
        return order[share.cumsum(0) - share < self.gamma]

    def blind(self, attention: Tensor) -> Tensor:
        """(n,) bool: the blind ones of n image tokens, from (L, n) attention of the last prompt row, mean over heads."""
        mean = attention[self.layers(attention)].mean(0)
        if len(mean) == 1:
            # A single token has no deviation: it stays, so that the view is view 0, which the authors' code falls back on.
            return torch.ones_like(mean, dtype=torch.bool)
        return mean > mean.mean() + self.deviations * mean.std()

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if not sample.has_image:
            return [sample.as_view(weight=-self.alpha)]
        pieces = self.blind(self._attention(sample)).split([len(image.features) for image in sample.images])
        return [sample.with_features(lambda x, n: x * pieces[n][:, None].to(x), weight=-self.alpha, deep=True)]

    def places(self, sample: Sample) -> list[Places]:
        if not sample.has_image:
            return []
        attention = self._attention(sample)
        layers, lengths = self.layers(attention), [len(image.features) for image in sample.images]
        weights, blind = attention[layers].mean(0).split(lengths), self.blind(attention).split(lengths)
        named = ", ".join(map(str, layers.tolist()))
        title = (
            f"blind tokens: what the last prompt token attends to far above the mean (layers {named}, 0 is the first)"
        )
        return [Places(title, *pair, number) for number, pair in enumerate(zip(blind, weights))]

    def _attention(self, sample: Sample) -> Tensor:
        """(L, n) attention of the last prompt token to the n image tokens, mean over heads."""
        attention, images, _ = sample.batch.once("attention to the prompt", attention_to_prompt)
        return attention[:, sample.index][:, images[sample.index]]
