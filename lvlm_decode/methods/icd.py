"""Instruction Contrastive Decoding (Wang et al., Findings of ACL 2024; arXiv 2403.18715).

    scores = (1 + alpha) * l(image, prompt) - alpha * l(image, disturbance + prompt)

The disturbance is a role that confuses. In the authors' code it replaces LLaVA's system prompt (``system``: give it
as it stands in your prompt and it is taken out of the second branch) and goes to InstructBLIP's Q-Former only, alone
or before the question (``qformer``). They release five disturbances and do not say which gave their table; the
default is one of them. For InstructBLIP their processor also lower-cases the disturbance, drops its punctuation, and leaves
out the question's request for the form of the answer; here the words stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..engine.samples import Sample
from ..method import Contrast, View

DISTURBANCE = "You are a confused objects detector to provide a fuzzy overview or impression of the image."


@dataclass(frozen=True)
class ICD(Contrast):
    """Subtracts the predictions under an instruction that disturbs the model.

    Args:
        alpha: Contrast strength, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        disturbance: Instruction that disturbs.
        system: Text at the start of the prompt that the disturbance replaces; empty puts it in front.
        qformer: What InstructBLIP's Q-Former reads: ``question`` puts the disturbance before the question, ``normal``
            is the disturbance alone.
    """

    name: ClassVar[str] = "icd"
    paper: ClassVar[str] = "Instruction Contrastive Decoding (Wang et al., Findings of ACL 2024)"
    arxiv: ClassVar[str] = "2403.18715"
    costs: ClassVar[tuple[str, ...]] = ("text",)

    alpha: float = 1.0
    beta: float | None = 0.1
    disturbance: str = DISTURBANCE
    system: str = ""
    qformer: Literal["question", "normal"] = "question"

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(self.qformer in ("question", "normal"), "qformer", "'question' or 'normal'")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if sample.family.has_qformer:
            alone = self.qformer == "normal"
            edit = (lambda query: self.disturbance) if alone else (lambda query: f"{self.disturbance} {query}")
            return [sample.with_query(edit, weight=-self.alpha)]
        return [sample.with_prefix(self.disturbance + " ", weight=-self.alpha, instead_of=self.system)]
