"""Mixture of Decoding (Findings of ACL 2025; arXiv 2505.17061).

    attended = the ``share`` of the image tokens that the last prompt token attends to most, summed over all layers
    D = JS(softmax l(image) || softmax l(attended tokens alone))            the others' features are zero
    D < threshold:   scores = l(image) + positive * l(attended)             what is attended speaks for the answer
    otherwise:       scores = (1 + negative) * l(image) - negative * l(attended)

Follows the authors' code. It decides by the first token and keeps the choice for the whole answer, where their figure reads
as a choice at every token (``gate="token"``). Its numbers are the same for all models and benchmarks: 4 and 1, a mask at 0.5,
a share of 0.2, a threshold of 0.05 nats. It runs without a cache, so that the attended tokens are chosen anew for every token;
here those of the prompt are kept. (The released sampler reads a name before it is assigned and stops there.) Rows without an
image are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..engine.batch import Batch, attention_to_prompt
from ..engine.samples import Sample
from ..engine.stack import Lane
from ..method import Contrast, Places, Step, View


@dataclass(frozen=True)
class MoD(Contrast):
    """Adds a branch that sees only the most attended image tokens where the two agree, else subtracts it.

    Args:
        positive: Weight of the branch where it agrees, at least 0.
        negative: Contrast strength where it does not, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        share: Share of the image tokens that the branch keeps, in (0, 1].
        threshold: Jensen-Shannon divergence in nats from which the two do not agree, at least 0.
        gate: ``first`` decides by the first token for the whole answer, ``token`` for every token.
    """

    name: ClassVar[str] = "mod"
    paper: ClassVar[str] = "Mixture of Decoding (Findings of ACL 2025)"
    arxiv: ClassVar[str] = "2505.17061"
    aliases: ClassVar[dict[str, str]] = {"cd_beta": "beta"}
    costs: ClassVar[tuple[str, ...]] = ("feature", "attention", "prompt")
    off: ClassVar[dict[str, Any] | None] = {"positive": 0.0, "negative": 0.0, "beta": None}

    positive: float = 4.0
    negative: float = 1.0
    beta: float | None = 0.5
    share: float = 0.2
    threshold: float = 0.05
    gate: Literal["first", "token"] = "first"

    def __post_init__(self) -> None:
        self.check(self.positive >= 0, "positive", "at least 0")
        self.check(self.negative >= 0, "negative", "at least 0")
        self.check(0 < self.share <= 1, "share", "in (0, 1]")
        self.check(self.threshold >= 0, "threshold", "at least 0")
        self.check(self.gate in ("first", "token"), "gate", "'first' or 'token'")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def attended(self, attention: Tensor) -> Tensor:
        """(n,) bool: the most attended of n image tokens, from (L, n) attention of the last prompt row, mean over heads."""
        total = attention.sum(0)
        hidden = int(len(total) * (1 - self.share))
        ranks = total.argsort(stable=True).argsort(stable=True)
        return ranks >= hidden

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if not sample.has_image:
            return [sample.as_view()]
        if self.gate == "token":
            # Only says that there is a branch; what it weighs is decided for every token.
            return [self._branch(sample, 1.0)]
        agree = sample.batch.once(("mod", self.share, self.threshold), self._agree)[sample.index]
        return [self._branch(sample, self.positive if agree else -self.negative)]

    def _branch(self, sample: Sample, weight: float) -> View:
        """The sample with the most attended image tokens alone."""
        pieces = self._attended(sample)
        return sample.with_features(lambda x, n: x * pieces[n][:, None].to(x), weight=weight, deep=True)

    def _attended(self, sample: Sample) -> tuple[Tensor, ...]:
        """Per image (n,) bool, the tokens that the branch sees."""
        attention, images, _ = sample.batch.once("attention to the prompt", attention_to_prompt)
        chosen = self.attended(attention[:, sample.index][:, images[sample.index]])
        return chosen.split([len(image.features) for image in sample.images])

    def _agree(self, batch: Batch) -> list[bool]:
        """Per sample of the batch whether the branch agrees at the first token; one forward of the branches' prompts."""
        _, _, main = batch.once("attention to the prompt", attention_to_prompt)
        rows = [sample.index for sample in batch.samples if sample.has_image]
        branches = batch.resolve([self._branch(batch.samples[row], 0.0).sample for row in rows])
        lane = Lane([batch.prepare(branches)], (0,), pad_token_id=batch.family.pad_token_id)
        with torch.no_grad():
            other = lane.prefill(1).logits[:, -1].float()
        agree = [False] * len(batch.samples)
        for row, value in zip(rows, divergence(main[rows], other).tolist()):
            agree[row] = value < self.threshold
        return agree

    def combine(self, step: Step) -> Tensor:
        if self.gate == "first":
            return super().combine(step)
        main, branch = step.logits
        agree = (divergence(main, branch) < self.threshold)[..., None]
        mixed = torch.where(agree, main + self.positive * branch, (1 + self.negative) * main - self.negative * branch)
        (weight,) = step.weights
        there = weight.to(main)[:, None, None] if isinstance(weight, Tensor) else weight
        return main + there * (mixed - main)

    def choices(self, step: Step) -> dict[str, Tensor]:
        return {"divergence of the attended tokens' branch": divergence(step.logits[0], step.logits[1])}

    def places(self, sample: Sample) -> list[Places]:
        if not sample.has_image:
            return []
        attention, images, _ = sample.batch.once("attention to the prompt", attention_to_prompt)
        lengths = [len(image.features) for image in sample.images]
        weights = attention[:, sample.index][:, images[sample.index]].sum(0).split(lengths)
        title = "attended tokens: what the last prompt token attends to most, summed over the layers"
        return [Places(title, *pair, number) for number, pair in enumerate(zip(self._attended(sample), weights))]


def divergence(main: Tensor, other: Tensor) -> Tensor:
    """(...,) Jensen-Shannon divergence in nats of logits (..., N), probabilities clipped as in the authors' code."""
    p, q = (logits.softmax(-1).clamp(5e-8, 1 - 5e-8) for logits in (main, other))
    middle = ((p + q) / 2).log()
    return 0.5 * ((p * (p.log() - middle)).sum(-1) + (q * (q.log() - middle)).sum(-1))
