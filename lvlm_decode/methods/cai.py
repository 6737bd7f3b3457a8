"""Context-aware Attention Intervention (ECCV 2026; arXiv 2606.29847).

    t   = the newest token's embedding; in a prompt the mean of those after the image
    s_j = sigmoid(100 * (cos(v_j, t) - min over j cos(v_j, t)))         v_j the features of image token j
    after layer i, where entropy(softmax(head(norm(h_i)))) / ln 10 > threshold:
        w[h, j] <- w[h, j] + |w[h, j]| * s_j         in layer i + 1, before the softmax, in the row that chooses a token
    with ``gamma``:  scores = gamma * lsm l(image) - (gamma - 1) * lsm l(no image), and a mask, as PAI has them

Follows the authors' code. Their parser's values are threshold 0.15, from layer 25 of 32 on, and no guidance; their scripts tune
them for every model, data set and split of POPE: on LLaVA 0.10, layer 27 to 30, gamma 3 or 5. Of several images the words after
the last one count. Rows without an image are left alone. The second branch attends as usual.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..engine.attention import Rescored, choosing, image_slots, to_layer
from ..engine.hf import decoder
from ..engine.hooks import hooked
from ..engine.run import Run
from ..engine.running import running_lane
from ..engine.samples import Sample
from ..errors import UnsupportedError
from ..method import Contrast, View


@dataclass(frozen=True)
class CAI(Contrast):
    """Raises the attention to image tokens that are like the newest word, in late layers that are unsure.

    Args:
        threshold: Entropy in units of ln 10 above which the next layer is edited, at least 0; ``None`` edits none.
        first_layer: First decoder layer whose entropy counts; ``None`` takes the share of the model that 25 is of the
            authors' 32 layers.
        gamma: Guidance against the branch without the image, at least 1; ``None`` leaves out the branch and the mask.
        beta: Plausibility threshold of the branch in (0, 1]; ``None`` applies no mask.
    """

    name: ClassVar[str] = "cai"
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "Context-Aware Attention Intervention (ECCV 2026)"
    arxiv: ClassVar[str] = "2606.29847"
    aliases: ClassVar[dict[str, str]] = {"start_layer": "first_layer"}
    costs: ClassVar[tuple[str, ...]] = ("attention", "layers")
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes what layers attend to, which a processor cannot."}
    off: ClassVar[dict[str, Any] | None] = {"threshold": None, "gamma": None}
    owns: ClassVar[str | None] = "the attention of view 0"

    threshold: float | None = 0.15
    first_layer: int | None = None
    gamma: float | None = None
    beta: float | None = 0.1

    def __post_init__(self) -> None:
        self.check(self.threshold is None or self.threshold >= 0, "threshold", "at least 0, or None")
        self.check(self.first_layer is None or self.first_layer >= 0, "first_layer", "at least 0, or None")
        self.check(self.gamma is None or self.gamma >= 1, "gamma", "at least 1, or None")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return None if self.gamma is None else self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        # At 1 the branch has no weight.
        return [] if self.gamma in (None, 1) else [sample.without_image(weight=1 - self.gamma)]

    @contextmanager
    def patch(self, run: Run) -> Iterator[None]:
        count = decoder.layer_count(run.module)
        first = decoder.layers_like(run.module, 25, 31)[0] if self.first_layer is None else self.first_layer
        if self.first_layer is None:
            first = min(first, count - 2)
        if first > count - 2:
            raise UnsupportedError(
                f"cai: first_layer = {first} leaves no later layer to edit; the model's layers are 0 to {count - 1}."
            )
        if self.threshold is None:
            yield
            return
        tilt = _Tilt(run, range(first + 1, count), self.threshold)
        blocks = decoder.parts(run.module, "layer")
        with (
            run.editing(tilt),
            hooked(
                before={blocks[0]: tilt.read},
                after={blocks[layer]: tilt.unsure(layer) for layer in range(first, count - 1)},
            ),
        ):
            yield


class _Here:
    """What a layer is told: (B, q) bool, rows that are unsure, and (B, q, S) how much image tokens are like the newest words."""

    unsure: Tensor
    like: Tensor

    def raised(self, scores: Tensor, images: Tensor) -> Tensor:
        change = self.like[:, None] * scores.abs()
        return torch.where(images & self.unsure[:, None, :, None], scores + change, scores)


class _Tilt(Rescored):
    """Raises the scores of image tokens by how much they are like the newest word, in rows that the layer before left unsure."""

    def __init__(self, run: Run, layers: range, threshold: float):
        # Apart from this object, which would otherwise hold itself.
        self._here = _Here()
        super().__init__(run, layers, self._here.raised)
        self.threshold = threshold
        #: (B, T, D) unit embeddings of the prompt, and (B, q, T) the likeness of image tokens to the newest words.
        self.prompt = self.likeness = torch.empty(0)
        #: Layer -> (B, q) bool, rows that the layer before left unsure.
        self.flags: dict[int, Tensor] = {}

    def read(self, module: Any, args: Any, kwargs: Any) -> None:
        """Take the embeddings that the first layer is given."""
        lane = running_lane(self.run)
        rows = None if lane is None else lane.rows_of(0)
        if rows is None:
            return
        states = (args[0] if args else kwargs["hidden_states"])[rows].float()
        images = image_slots(lane, self.run.family, states.device)[rows][:, : lane.width]
        if lane.prefilling:
            self.prompt = normalize(states, dim=-1)
            # What stands after the last image of a row; padding comes first, so it is none of it.
            after = (images.flip(-1).cumsum(-1).flip(-1) == 0).to(states.dtype)[..., None]
            states = ((states * after).sum(1) / after.sum(1))[:, None]
        self.likeness = likeness(self.prompt, normalize(states, dim=-1), images)

    def unsure(self, layer: int) -> Any:
        def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            lane = running_lane(self.run)
            rows = None if lane is None else lane.rows_of(0)
            if rows is not None:
                logits = self.run.project(decoder.states_of(output)[rows, choosing(lane)])
                log_p = logits.log_softmax(-1)
                self.flags[layer + 1] = -(log_p.exp() * log_p).sum(-1) / math.log(10) > self.threshold

        return look

    def output(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor
    ) -> Tensor:
        lane = running_lane(self.run)
        if lane.rows_of(0) is None or layer not in self.layers:
            return out
        whole = pad(self.likeness.to(key.device), (0, lane.length - self.likeness.shape[-1]))
        self._here.unsure = self.flags[layer].to(key.device)
        self._here.like = to_layer(whole, lane, key)
        return super().output(layer, query, key, value, mask, scaling, out)


def likeness(prompt: Tensor, words: Tensor, images: Tensor) -> Tensor:
    """(B, q, T) from 0.5 to 1, how much image tokens are like words; 0 for tokens that are no image's.

    Args:
        prompt: (B, T, D) embeddings of the prompt, of unit length.
        words: (B, q, D), of unit length.
        images: (B, T) bool, the slots that hold image tokens.
    """
    cosine, images = words @ prompt.transpose(1, 2), images[:, None]
    lowest = cosine.masked_fill(~images, math.inf).amin(-1, keepdim=True)
    return torch.where(images, torch.sigmoid(100 * (cosine - lowest)), 0.0)
