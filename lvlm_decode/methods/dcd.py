"""Decoupling Contrastive Decoding at inference (NeurIPS 2025; arXiv 2504.08809).

    scores = (1 + alpha) * l(image through P_pos) - alpha * l(image through P_neg)

P_pos and P_neg are copies of the vision-language projector, trained apart on the preferred and the rejected answers of
preference triples (``lvlm-decode train negatives``). Without ``positive`` the model's own projector is the positive one, the
paper's negative-only variant; without either both are those that ship for the model, which the small LLaVA has. ``alpha=0`` is
what DCD must beat: the projector of the preferred answers alone, under the same mask. Of Qwen3-VL the merger of the last layer
is the projector; the deepstack mergers that feed its early decoder layers stay the model's own. The vision encoder runs once
for both. alpha and beta are not the paper's values.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine import learned
from ..engine.hooks import hooked, replaced
from ..engine.samples import Sample
from ..errors import InputError, ParameterError, UnsupportedError
from ..families.base import Family
from ..method import Contrast, View

Weights = torch.nn.Module | Mapping[str, Tensor] | str | Path


@dataclass(frozen=True)
class DCD(Contrast):
    """Contrasts two trained image projectors, one for preferred and one for rejected answers.

    A projector is a module, its ``state_dict()``, or the path of one in safetensors format.

    Args:
        negative: Projector trained on the rejected answers; ``None`` takes the one that ships for the model.
        positive: Projector trained on the preferred answers; ``None`` takes the model's own, or beside a shipped negative
            one the shipped one.
        alpha: Contrast strength, at least 0; at 0 the positive projector answers alone.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
    """

    name: ClassVar[str] = "dcd"
    paper: ClassVar[str] = "Decoupling Contrastive Decoding (NeurIPS 2025)"
    arxiv: ClassVar[str] = "2504.08809"
    costs: ClassVar[tuple[str, ...]] = ("feature",)

    negative: Weights | None = field(default=None, compare=False, repr=False)
    positive: Weights | None = field(default=None, compare=False, repr=False)
    alpha: float = 1.0
    beta: float | None = 0.1

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    @property
    def is_off(self) -> bool:
        # At strength 0 a positive projector still answers in the place of the model's own.
        return super().is_off and self.positive is None and self.negative is not None

    def check_model(self, family: Family) -> None:
        if self.negative is None and learned.shipped(family, "negative") is None:
            raise UnsupportedError(
                f"{self.name} needs projectors that were trained for this model, and none ship for it; make them with: "
                "lvlm-decode train negatives, and give negative= and positive=, their paths."
            )

    def _projectors(self, family: Family) -> tuple[Weights | None, Weights]:
        """The positive projector, ``None`` for the model's own, and the negative one."""
        if self.negative is not None:
            return self.positive, self.negative
        self.check_model(family)
        positive = self.positive if self.positive is not None else learned.shipped(family, "positive")
        negative = learned.shipped(family, "negative")
        assert negative is not None
        return positive, negative

    @contextmanager
    def observe(self, family: Family) -> Iterator[dict[torch.nn.Module, Any]]:
        #: Per module one entry per pass of the encoder.
        outputs: dict[torch.nn.Module, Any] = defaultdict(list)

        def keep(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs[module].append(output)

        positive, _ = self._projectors(family)
        own = nullcontext() if positive is None else projecting(family, positive, "positive")
        with hooked(after=dict.fromkeys(family.before_projector(), keep)), own:
            yield outputs

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if not self.alpha:
            return []
        if not sample.has_image:
            return [sample.as_view(weight=-self.alpha)]
        if not {"pixel_values", "pixel_values_videos"} & set(sample.vision):
            raise InputError("dcd projects the image anew, and the images were given as features; pass pixel_values.")
        own = sample.batch.once(("dcd", id(self.negative)), lambda batch: self._project(batch, sample))[sample.index]
        return [sample.with_features(lambda _, number: own[number].features, weight=-self.alpha)]

    def _project(self, batch: Any, sample: Any) -> list[tuple[Any, ...]]:
        """Per row its images through the negative projector, on what the encoder said the first time."""
        _, negative = self._projectors(batch.family)
        outputs = sample.observed_by(self.name)

        def recorded(number: int) -> Any:
            return replaced({module: lambda *a, said=said[number], **k: said for module, said in outputs.items()})

        with projecting(batch.family, negative, "negative"):
            return batch.encode_again(recorded)


@contextmanager
def projecting(family: Family, weights: Weights, kind: str) -> Iterator[None]:
    """The model's projector computes with other weights in calls made inside the block; other calls have its own.

    Args:
        kind: "positive" or "negative", what a file of weights must hold.

    Raises:
        ParameterError: weights of another projector.
    """
    projector = family.projector()
    given = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    state, own = learned.read(given, DCD.name, kind, family), projector.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        raise ParameterError(
            f"dcd: the given projector has {len(state)} tensors that are not those of {type(projector).__name__}; give "
            "one that was trained from this model's projector."
        )
    other = copy.deepcopy(projector)
    other.load_state_dict(state)
    with replaced({projector: other.forward}):
        yield
