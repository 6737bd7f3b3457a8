"""ONLY: one-layer intervention (Wan et al., ICCV 2025; arXiv 2507.00898).

    p   = attention of one layer; in the words and in the image, what is above mean + std of its segment becomes 0
    p_h = 0 for heads whose ratio of entropies, words to image, is below the mean over heads
    o   = what the layer's attention puts out under p;   z = 0.2 * x + norm(o), x what the last layer is given
    b   = 0.5 * a + head(norm(z + MLP(norm(z))))         MLP and norms of the last layer, a = l(image)
    scores = a + positive * b            where sum |softmax a - softmax b| < gamma
             (1 + negative) * a - negative * b            elsewhere

A branch of partial depth: it leaves the forward in one layer, passes the layers between by, and shares all else with it; it has
no row, no keys and no values. Follows the authors' code: layer 0, 3 and 1, a mask at 0.1; gamma 0.2 is their POPE script's, 0.25
their CHAIR script's, and their parsers have 0.1 to 0.6. Their distance is the sum of absolute differences, from 0 to 2, where the
text speaks of total variation. The words are all that is no image, without the begin token where that stands first. Their
InstructBLIP leaves the norm around ``o`` out. Rows without an image are left alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.attention import image_slots, probabilities, to_layer, weighted
from ..engine.branch import Branch
from ..engine.hf import decoder
from ..engine.run import Run
from ..engine.samples import Sample
from ..errors import UnsupportedError
from ..method import Method, Step, View

#: How much of the stream before the last layer the branch has in it, and how much of the model's own last state its logits have.
STREAM, OWN = 0.2, 0.5


@dataclass(frozen=True)
class ONLY(Method):
    """Adds or subtracts a branch of one layer whose attention heads read the words more than the image.

    Args:
        positive: Weight of the branch where it is close to the model, at least 0.
        negative: Contrast strength where it is not, at least 0.
        gamma: Distance of the two distributions, from 0 to 2, from which the branch is subtracted; at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        layer: Decoder layer in which the branch begins, counted from 0.
        normed: Whether the branch passes the last layer's first norm; ``None`` takes the authors' choice for the model family.
    """

    name: ClassVar[str] = "only"
    paper: ClassVar[str] = "ONLY (Wan et al., ICCV 2025)"
    arxiv: ClassVar[str] = "2507.00898"
    aliases: ClassVar[dict[str, str]] = {"enhance_layer_index": "layer", "cd_beta": "beta"}
    costs: ClassVar[tuple[str, ...]] = ("branch",)
    needs: ClassVar[tuple[str, ...]] = ("plain_layers",)
    refuses: ClassVar[dict[str, str]] = {
        "processor": "it reads attention inside the forward, which a processor cannot."
    }
    off: ClassVar[dict[str, Any] | None] = {"positive": 0.0, "negative": 0.0, "beta": None}

    positive: float = 3.0
    negative: float = 1.0
    gamma: float = 0.2
    beta: float | None = 0.1
    layer: int = 0
    normed: bool | None = None

    def __post_init__(self) -> None:
        self.check(self.positive >= 0, "positive", "at least 0")
        self.check(self.negative >= 0, "negative", "at least 0")
        self.check(self.gamma >= 0, "gamma", "at least 0")
        self.check(self.layer >= 0, "layer", "at least 0")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        # The weight only says whether there is an image to be told from the words.
        return [sample.as_view(float(sample.has_image), mark=self.name, rows=False)]

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        count = decoder.layer_count(run.module)
        if self.layer >= count - 1:
            raise UnsupportedError(
                f"only: layer = {self.layer} is not before the last layer, where the branch ends; it can begin in layers 0 to "
                f"{count - 2} of this model."
            )
        normed = run.family.config.model_type != "instructblip" if self.normed is None else self.normed
        return run.branching(self.name, _Words(run, self.layer, normed))

    def combine(self, step: Step) -> Tensor:
        main, branch = self._sides(step)
        near = (self.distance(main, branch) < self.gamma)[..., None]
        mixed = torch.where(near, main + self.positive * branch, (1 + self.negative) * main - self.negative * branch)
        (there,) = step.weights
        return (
            torch.where(there.bool()[:, None, None], mixed, main)
            if isinstance(there, Tensor)
            else mixed
            if there
            else main
        )

    def choices(self, step: Step) -> dict[str, Tensor]:
        return {"distance of the branch": self.distance(*self._sides(step))}

    @staticmethod
    def _sides(step: Step) -> tuple[Tensor, Tensor]:
        """The model's logits and the branch's, (B, T, N) each."""
        return step.logits[0], OWN * step.logits[0] + step.logits[1]

    @staticmethod
    def distance(main: Tensor, branch: Tensor) -> Tensor:
        """(B, T) sum of absolute differences of the probabilities of two logits (B, T, N)."""
        return (main.softmax(-1) - branch.softmax(-1)).abs().sum(-1)


class _Words(Branch):
    def __init__(self, run: Run, layer: int, normed: bool):
        super().__init__(run, layer)
        self.normed = normed
        self.heads = torch.empty(0)

    def leaves(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float, lane: Any) -> None:
        attention = probabilities(query, key, seen, scaling)
        images = image_slots(lane, self.run.family)[lane.rows_of(0)]
        images = to_layer(images, lane, key)[:, None, None]
        first = seen & (seen.cumsum(-1) == 1)
        self.heads = weighted(textual(attention, seen & ~images & ~first, seen & images), value)

    def states(self) -> Tensor:
        layers = decoder.layers(self.run.module)
        assert self.given is not None
        with torch.no_grad():
            out = decoder.mixed(layers[self.layer], self.heads).to(self.given)
            out = decoder.attention_norm(layers[-1])(out) if self.normed else out
            return decoder.with_mlp(layers[-1], STREAM * self.given + out)


def textual(attention: Tensor, words: Tensor, image: Tensor) -> Tensor:
    """(B, H, q, S) attention (B, H, q, S) without outliers, and without heads that read the image more than the words.

    Args:
        words: (B, 1, q, S) bool.
        image: (B, 1, q, S) bool.
    """
    outside = [attention > _high(attention, segment) for segment in (words, image)]
    attention = attention.masked_fill((words & outside[0]) | (image & outside[1]), 0.0)
    ratio = _entropy(attention * words).nan_to_num(0.0) / _entropy(attention * image).nan_to_num(float("inf"))
    return attention.masked_fill((ratio < ratio.mean(1, keepdim=True))[..., None], 0.0)


def _high(attention: Tensor, segment: Tensor) -> Tensor:
    """(B, H, q, 1) mean plus standard deviation over the slots of a segment."""
    count = segment.sum(-1, keepdim=True)
    mean = (attention * segment).sum(-1, keepdim=True) / count
    return mean + (((attention - mean) ** 2 * segment).sum(-1, keepdim=True) / (count - 1)).sqrt()


def _entropy(attention: Tensor) -> Tensor:
    """(B, H, q) entropy in nats of attention (B, H, q, S), normalised."""
    share = attention / attention.sum(-1, keepdim=True)
    return -(share * (share + 1e-6).log()).sum(-1)
