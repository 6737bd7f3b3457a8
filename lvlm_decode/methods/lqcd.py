"""Leading Query Contrastive Decoding (arXiv 2408.11261).

    scores = (1 + alpha) * l(image, neutral query) - alpha * l(image, leading query),   mask on the neutral query

``form="plain"``: the prompt holds the neutral query, and ``hint`` makes it leading, as the benchmarks of the paper's
first version do. ``form="neutral"``: the prompt holds the user's leading query; what ``suggestion`` matches is taken
out of it for the neutral one, and a query without a suggestion is its own neutral form. The paper's second version
rewrites with a language model and scales alpha by the query's sentiment; neither is here. No code was released; alpha
and beta are not the paper's.

InstructBLIP's Q-Former reads the query too, so by default both of its prompts lead (``slots``).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..engine.prompts import cue_of
from ..engine.samples import Sample
from ..method import Method, Step, View, plausible_tokens

SUGGESTION = r"\s*\b(It seems|It looks|I think|I believe|I guess|I am sure|I'm sure)\b[^.!?]*[.!?]?"


@dataclass(frozen=True)
class LQCD(Method):
    """Subtracts the predictions for a question that suggests a wrong answer.

    Args:
        alpha: Contrast strength, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        form: ``plain`` when the prompt holds the neutral question, ``neutral`` when it holds the user's leading one.
        hint: Text that makes a neutral question leading.
        suggestion: Regular expression of the part that makes the user's question leading.
        slots: Which prompts of InstructBLIP are made leading.
    """

    name: ClassVar[str] = "lqcd"
    paper: ClassVar[str] = "Leading Query Contrastive Decoding (2024)"
    arxiv: ClassVar[str] = "2408.11261"
    costs: ClassVar[tuple[str, ...]] = ("text",)
    off: ClassVar[dict[str, Any] | None] = {"alpha": 0.0, "form": "plain", "beta": None}

    alpha: float = 1.0
    beta: float | None = 0.1
    form: Literal["plain", "neutral"] = "plain"
    hint: str = "It seems like there isn't."
    suggestion: str = SUGGESTION
    slots: Literal["both", "language", "qformer"] = "both"

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(self.form in ("plain", "neutral"), "form", "'plain' or 'neutral'")
        self.check(self.slots in ("both", "language", "qformer"), "slots", "'both', 'language' or 'qformer'")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        # The neutral form's mask is relative to its other view; see kept_tokens().
        return self.beta if self.form == "plain" else None

    @property
    def mask_view(self) -> int | None:
        return None if self.beta is None else int(self.form == "neutral")

    def lead(self, query: str, cue: str = "") -> str:
        """The query with the hint, which goes before the words that ask the assistant to speak."""
        question = query.removesuffix(cue).rstrip()
        return f"{question} {self.hint}{query[len(question) :]}"

    def neutralise(self, query: str) -> str:
        """The query without its suggestions."""
        return re.sub(self.suggestion, "", query, flags=re.IGNORECASE)

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        def edit(text: str) -> str:
            plain = self.form == "plain"
            return self.lead(text, cue_of(sample.batch.processor, text)) if plain else self.neutralise(text)

        view = sample.as_view()
        if self.slots != "qformer" or not sample.family.has_qformer:
            view = sample.with_text(edit)
        if self.slots != "language" and sample.family.has_qformer:
            view = view.sample.with_query(edit)
        return [dataclasses.replace(view, weight=-self.alpha)]

    def _branches(self, step: Step) -> tuple[Tensor, Tensor]:
        """Neutral and leading logits."""
        own, other = step.logits
        return (own, other) if self.form == "plain" else (other, own)

    def kept_tokens(self, step: Step) -> Tensor | None:
        return None if self.beta is None else plausible_tokens(step.logits[int(self.form == "neutral")], self.beta)

    def combine(self, step: Step) -> Tensor:
        neutral, leading = self._branches(step)
        return neutral + self.alpha * (neutral - leading)
