"""Layer Contrastive Decoding (Tong et al., 2025; arXiv 2509.25177).

    scores = (1 + alpha) * l(image) - alpha * l(image as the encoder's first layers see it)

The negative view reads the states of layer ``layer`` of the vision encoder, 1 being the output of the first one, where the model
reads those of a late one; what follows the encoder is its own. Follows the authors' code in its numbers: layer 1, alpha 1,
beta 0.1. They ran LLaVA, Molmo and Cambrian, whose encoders they read early or cut off after the first block. Here every
encoder is cut off so, and what stands after its last layer (a last norm, a Q-Former, a merger) reads the early states.
Features that a model takes from the encoder's middle (deepstack) stay its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..engine.batch import Batch
from ..engine.hf import Encoded
from ..engine.hooks import hooked
from ..engine.samples import Sample
from ..errors import UnsupportedError
from ..families.base import Family
from ..method import Contrast, View


@dataclass(frozen=True)
class LayerCD(Contrast):
    """Subtracts a branch that sees the image as the first layers of the vision encoder do.

    Args:
        alpha: Contrast strength, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        layer: Layer of the vision encoder that the branch reads, 1 being the output of the first.
    """

    name: ClassVar[str] = "layercd"
    paper: ClassVar[str] = "Layer Contrastive Decoding (Tong et al., 2025)"
    arxiv: ClassVar[str] = "2509.25177"
    costs: ClassVar[tuple[str, ...]] = ("feature",)

    alpha: float = 1.0
    beta: float | None = 0.1
    layer: int = 1

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(self.layer >= 1, "layer", "at least 1")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    @contextmanager
    def observe(self, family: Family) -> Iterator[dict[str, Any]]:
        layers = family.vision_layers()
        if self.layer > len(layers):
            raise UnsupportedError(f"layercd: layer = {self.layer}, and the vision encoder has {len(layers)} layers.")
        #: One entry per pass of the encoder.
        seen: dict[str, Any] = {"states": []}

        def keep(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen["states"].append(output)

        with hooked(after={layers[self.layer - 1]: keep}):
            yield seen

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if not sample.has_image:
            return [sample.as_view(weight=-self.alpha)]
        own = sample.batch.once(("layercd", self.layer), lambda batch: self._early(batch, sample))[sample.index]
        return [sample.with_features(lambda _, number: own[number].features, weight=-self.alpha)]

    def _early(self, batch: Batch, sample: Sample) -> list[tuple[Encoded, ...]]:
        """Per row its images as the model receives them from an encoder that ends after ``layer``."""
        states = sample.observed_by(self.name)["states"]
        return batch.encode_again(lambda number: batch.family.putting_out(states[number]))
