"""Self-Introspective Decoding (Huo et al., ICLR 2025; arXiv 2408.02032).

    scores = (1 + alpha) * l(image) - alpha * l(image, only the least attended image tokens visible in later layers)

In the second branch the newest token's attention in one early layer, mean over heads, ranks the image tokens; all
layers after it see the lowest ``share`` of them only. The ranking is made anew for every token. Follows the authors'
code: the second layer ranks (their ``fast_v_agg_layer=2`` names the first pruned layer and is ``rank_layer=1`` here), 100
of 576 tokens stay (50 for captions); the paper says the third layer and 10 %: ``rank_layer=2, share=0.1``. Image tokens
are masked, not dropped. On InstructBLIP the authors' span of the image begins one token late, so that its first query is never
hidden; here all queries are ranked. The authors' greedy path leaves the mask out: ``beta=None``; their sampler runs at
alpha 0.5, the value of the paper and of their parser is 1.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.run import Run
from ..engine.samples import Sample
from ..engine.thinning import Thinned, least
from ..errors import UnsupportedError
from ..method import Contrast, View


@dataclass(frozen=True)
class SID(Contrast):
    """Subtracts a branch that sees only the image tokens with the least attention.

    Args:
        alpha: Contrast strength, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        rank_layer: Decoder layer whose attention ranks the image tokens, counted from 0.
        share: Share of the image tokens that the branch keeps, in (0, 1].
    """

    name: ClassVar[str] = "sid"
    paper: ClassVar[str] = "Self-Introspective Decoding (Huo et al., ICLR 2025)"
    arxiv: ClassVar[str] = "2408.02032"
    costs: ClassVar[tuple[str, ...]] = ("feature", "attention")
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes what layers attend to, which a processor cannot."}

    alpha: float = 1.0
    beta: float | None = 0.1
    rank_layer: int = 1
    share: float = 100 / 576

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(self.rank_layer >= 0, "rank_layer", "at least 0")
        self.check(0 < self.share <= 1, "share", "in (0, 1]")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        return [sample.as_view(weight=-self.alpha, mark=self.name)]

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        count = run.family.config.get_text_config().num_hidden_layers
        if self.rank_layer >= count - 1:
            raise UnsupportedError(
                f"sid: rank_layer = {self.rank_layer} leaves no later layer to prune; the model's layers are 0 to "
                f"{count - 1}."
            )
        return run.editing(Least(run, run.view_number(self.name), self.rank_layer, "the second branch", self.share))


class Least(Thinned):
    """Hides all image tokens but the share that is attended to least."""

    def __init__(self, run: Run, view: int, layer: int, title: str, share: float):
        super().__init__(run, view, layer, title)
        self.share = share

    def hides(self, attention: Tensor, seen: Tensor, images: Tensor, lane: Any) -> Tensor:
        return least(attention, images, (images.sum(-1, keepdim=True) * self.share).round().clamp(min=1))
