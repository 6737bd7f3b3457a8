"""CRoPS: two thinned branches in one contrast (TMLR 2026; arXiv 2601.00659).

    b1 = l(prompt without image, later layers see only the k_t slots that the newest token attends to least)
    b2 = l(image, later layers see only the least attended image tokens)
    scores = a + (1 + alpha) * (exp(decay * t) - 1) * (a - b1) + alpha * (a - b2)      a = l(image), t = 1 at the first token
    k_t = floor(10 + 30 * (1 - exp(-0.001 * t)));  where max p of the plausible tokens > gate: scores = a

Follows the authors' code: decay 0.01, alpha 1, a mask at 0.1, a gate at 0.95, a quarter of the image tokens; the second layer
ranks, anew for every token, and the layers after it are thinned. The weight of ``a - b1`` grows without bound: 0.02 at the first
token, 1.3 at the 50th, 12.8 at the 200th; ``cap`` bounds it. As there, a prompt row that is left nothing to see in a thinned
layer puts out the mean of all its slots' values. Rows without an image are left alone.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.attention import to_layer
from ..engine.hf import decoder
from ..engine.run import Run
from ..engine.running import running_lane
from ..engine.samples import Sample
from ..engine.thinning import Thinned, least
from ..errors import UnsupportedError
from ..method import Method, Step, View, plausible_tokens

TEXT, IMAGE = "crops-text", "crops-image"


@dataclass(frozen=True)
class CRoPS(Method):
    """Subtracts a branch without image and key words, and one with the least attended image tokens alone.

    Args:
        decay: How fast the branch without the image gains weight per token, at least 0.
        alpha: Contrast strength of the branch with few image tokens, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        gate: Nothing is contrasted where the most probable of the plausible tokens is more probable than this; ``None``
            contrasts always.
        cap: Largest value of exp(decay * t) - 1, at least 0; ``None`` leaves it unbounded.
        rank_layer: Decoder layer whose attention ranks the tokens, counted from 0.
        share: Share of the image tokens that the second branch keeps, in (0, 1].
        text_tokens: How many tokens the first branch keeps, at the beginning of an answer and in the long run.
        text_rate: How fast it comes to keep more of them, per token, at least 0.
    """

    name: ClassVar[str] = "crops"
    paper: ClassVar[str] = "CRoPS (TMLR 2026)"
    arxiv: ClassVar[str] = "2601.00659"
    aliases: ClassVar[dict[str, str]] = {"lambda": "decay", "cd_alpha": "alpha", "cd_beta": "beta"}
    costs: ClassVar[tuple[str, ...]] = ("text", "feature", "attention")
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes what layers attend to, which a processor cannot."}
    off: ClassVar[dict[str, Any] | None] = {"decay": 0.0, "alpha": 0.0, "beta": None}

    decay: float = 0.01
    alpha: float = 1.0
    beta: float | None = 0.1
    gate: float | None = 0.95
    cap: float | None = None
    rank_layer: int = 1
    share: float = 0.25
    text_tokens: tuple[int, int] = (10, 40)
    text_rate: float = 0.001

    def __post_init__(self) -> None:
        self.check(self.decay >= 0, "decay", "at least 0")
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(self.gate is None or 0 < self.gate <= 1, "gate", "in (0, 1], or None")
        self.check(self.cap is None or self.cap >= 0, "cap", "at least 0, or None")
        self.check(self.rank_layer >= 0, "rank_layer", "at least 0")
        self.check(0 < self.share <= 1, "share", "in (0, 1]")
        self.check(
            1 <= self.text_tokens[0] <= self.text_tokens[1], "text_tokens", "two numbers from 1, the second no smaller"
        )
        self.check(self.text_rate >= 0, "text_rate", "at least 0")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        # The weight of a view only says whether there is an image whose share can be told from the words'.
        there = float(sample.has_image)
        return [
            dataclasses.replace(sample.without_image(weight=there), mark=TEXT),
            sample.as_view(weight=there, mark=IMAGE),
        ]

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        count = decoder.layer_count(run.module)
        if self.rank_layer >= count - 1:
            raise UnsupportedError(
                f"crops: rank_layer = {self.rank_layer} leaves no later layer to thin; the model's layers are 0 to "
                f"{count - 1}."
            )
        return run.editing(_Words(self, run), _Images(self, run))

    def combine(self, step: Step) -> Tensor:
        main, text, image = step.logits
        t = (step.positions + 1).to(main.dtype)[..., None]
        # Past e^80 float32 overflows, and inf * 0 would be nan.
        factor = torch.expm1((self.decay * t).clamp(max=80.0))
        if self.cap is not None:
            factor = factor.clamp(max=self.cap)
        there = step.weights[0]
        if isinstance(there, Tensor):
            there = there.to(main)[:, None, None]
        contrast = there * ((1 + self.alpha) * factor * (main - text) + self.alpha * (main - image))
        if self.gate is None:
            return main + contrast
        return main + torch.where(self.surest(main) > self.gate, 0.0, contrast)

    def surest(self, main: Tensor) -> Tensor:
        """(B, T, 1) probability of the most probable token among the plausible ones, from logits (B, T, N)."""
        if self.beta is not None:
            main = main.masked_fill(~plausible_tokens(main, self.beta), float("-inf"))
        return main.softmax(-1).amax(-1, keepdim=True)

    def words_kept(self, t: Tensor) -> Tensor:
        """How many tokens the branch without the image keeps for token number ``t``, from 1."""
        first, last = self.text_tokens
        return (first + (last - first) * -torch.expm1(-self.text_rate * t)).floor()


class _Branch(Thinned):
    """A branch whose prompt rows that are left nothing to see put out the mean of all their slots' values, later ones too."""

    def __init__(self, method: CRoPS, run: Run, mark: str, title: str):
        super().__init__(run, run.view_number(mark), method.rank_layer, title)
        self.method = method

    def output(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor
    ) -> Tensor:
        lane = running_lane(self.run)
        rows = lane.rows_of(self.view)
        if rows is None or layer <= self.layer or not lane.prefilling:
            return out
        real = lane.mask[rows] if lane.mask is not None else self.blind.new_ones(lane.rows, lane.length)
        real = to_layer(real, lane, value).to(value.dtype)[:, None, :, None]
        means = (value[rows] * real).sum(2) / real.sum(2)
        heads = means.repeat_interleave(out.shape[2] // means.shape[1], 1)
        out = out.clone()
        out[rows] = torch.where(self.blind.transpose(1, 2), heads[:, None].to(out.dtype), out[rows])
        return out


class _Words(_Branch):
    """Of the branch without the image: the words that the newest token attends to least are all that is left."""

    def __init__(self, method: CRoPS, run: Run):
        super().__init__(method, run, TEXT, "the branch without the image")

    def hides(self, attention: Tensor, seen: Tensor, images: Tensor, lane: Any) -> Tensor:
        t = lane.ages[lane.rows_of(self.view)] + 1
        return least(attention, seen, self.method.words_kept(t)[..., None])


class _Images(_Branch):
    """Of the branch with the image: a share of its tokens is left, the least attended ones."""

    def __init__(self, method: CRoPS, run: Run):
        super().__init__(method, run, IMAGE, "the branch with few image tokens")

    def hides(self, attention: Tensor, seen: Tensor, images: Tensor, lane: Any) -> Tensor:
        return least(attention, images, (images.sum(-1, keepdim=True) * self.method.share).round().clamp(min=1))
