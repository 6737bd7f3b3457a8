"""COuntering DEscription Contrastive Decoding (Kim et al., NeurIPS 2024; arXiv 2406.01920).

    D = 1/2 * sum_k log2(|p_v - p_d|_k ** eta + 1) * (p_v + p_d)_k         in [0, 1]
    scores = (2 - D) * l(image) - (1 - D) * l(description in place of the image),   kept: p_v >= D * max p_v

The model describes the sample's image itself, greedily, once for all samples of a call that show it; the next call writes
the description again. Where the two branches agree (D near 0) they are contrasted strongly under a loose mask; where they
differ (D near 1) hardly at all, and the mask leaves little more than the greedy token. eta 0.7 is the default of
the authors' command line (their function's is 0.2); their ``cd_beta`` is unused there and does not exist here. eta = 0
makes D = 1: greedy decoding of the plain model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.batch import Batch
from ..engine.prompts import asking
from ..engine.samples import Sample
from ..method import Method, Step, View, plausible_tokens

PROMPT = (
    "Provide a detailed description of the image, covering all visible elements and their interactions, so as to "
    "thoroughly answer any potential questions about the image."
)


@dataclass(frozen=True)
class CODE(Method):
    """Contrasts the image with the model's own description of it, most where the two agree.

    Args:
        eta: Exponent of the divergence, at least 0.
        prompt: Request that the description answers.
        max_description: Maximum length of the description in tokens.
    """

    name: ClassVar[str] = "code"
    paper: ClassVar[str] = "COuntering DEscription Contrastive Decoding (Kim et al., NeurIPS 2024)"
    arxiv: ClassVar[str] = "2406.01920"
    aliases: ClassVar[dict[str, str]] = {"cd_alpha": "eta"}
    costs: ClassVar[tuple[str, ...]] = ("text", "captions")
    off: ClassVar[dict[str, Any] | None] = {"eta": 0.0}

    eta: float = 0.7
    prompt: str = PROMPT
    max_description: int = 512

    def __post_init__(self) -> None:
        self.check(self.eta >= 0, "eta", "at least 0")
        self.check(self.max_description >= 1, "max_description", "at least 1")

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if not sample.has_image:
            return [sample.as_view()]
        key = ("description", self.prompt, self.max_description)
        return [sample.without_image(instead=sample.batch.once(key, self._describe)[sample.index])]

    def _describe(self, batch: Batch) -> list[Tensor | None]:
        """Of every sample with an image the ids of its description."""
        asked = [asking(sample, self.prompt) if sample.has_image else None for sample in batch.samples]
        # Questions about one image ask for one description, unless more than the question differs.
        keys = [None if own is None else (own.image_key, tuple(own.input_ids.tolist())) for own in asked]
        new = {key: own for key, own in zip(keys, asked) if key is not None and own is not None}
        written = dict(zip(new, batch.answers(list(new.values()), self.max_description)))
        return [None if key is None else written[key] for key in keys]

    def _divergence(self, step: Step) -> Tensor:
        """(B, T, 1) D."""
        seen, described = step.logits.softmax(-1)
        gap = ((seen - described).abs() ** self.eta + 1).log2()
        return 0.5 * (gap * (seen + described)).sum(-1, keepdim=True)

    @property
    def mask_view(self) -> int:
        return 0

    def kept_tokens(self, step: Step) -> Tensor:
        # At eta = 0 the divergence is 1, whatever the description says.
        beta = self._divergence(step).clamp(max=1.0) if self.eta else 1.0
        return plausible_tokens(step.logits[0], beta)

    def combine(self, step: Step) -> Tensor:
        seen, described = step.logits
        return seen + (1 - self._divergence(step)) * (seen - described)
