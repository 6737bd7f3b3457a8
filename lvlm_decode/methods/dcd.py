"""Decoupling Contrastive Decoding at inference (NeurIPS 2025; arXiv 2504.08809).

    scores = (1 + alpha) * l(image through P_pos) - alpha * l(image through P_neg)

P_pos and P_neg are copies of the vision-language projector, trained apart on the preferred and the rejected answers of
preference triples (``lvlm-decode train negatives``). Without ``positive`` the model's own projector is the positive
one, the paper's negative-only variant. Of Qwen3-VL the merger of the last layer is the projector; the deepstack mergers
that feed its early decoder layers stay the model's own. The vision encoder runs once for both. alpha and beta are not
the paper's values.
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

from ..engine.hooks import hooked, replaced
from ..engine.samples import Sample
from ..errors import InputError, ParameterError
from ..families.base import Family
from ..method import Contrast, View
from ..weights import read_safetensors

Weights = torch.nn.Module | Mapping[str, Tensor] | str | Path


@dataclass(frozen=True)
class DCD(Contrast):
    """Contrasts two trained image projectors, one for preferred and one for rejected answers.

    A projector is a module, its ``state_dict()``, or the path of one in safetensors format.

    Args:
        negative: Projector trained on the rejected answers.
        positive: Projector trained on the preferred answers; ``None`` takes the model's own.
        alpha: Contrast strength, at least 0.
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
        self.check(self.negative is not None, "negative", "the negative projector, for instance its path")
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    @contextmanager
    def observe(self, family: Family) -> Iterator[dict[torch.nn.Module, Any]]:
        #: Per module one entry per pass of the encoder.
        outputs: dict[torch.nn.Module, Any] = defaultdict(list)

        def keep(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs[module].append(output)

        own = nullcontext() if self.positive is None else projecting(family.projector(), self.positive)
        with hooked(after=dict.fromkeys(family.before_projector(), keep)), own:
            yield outputs

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if not sample.has_image:
            return [sample.as_view(weight=-self.alpha)]
        if not {"pixel_values", "pixel_values_videos"} & set(sample.vision):
            raise InputError("dcd projects the image anew, and the images were given as features; pass pixel_values.")
        own = sample.batch.once(("dcd", id(self.negative)), lambda batch: self._project(batch, sample))[sample.index]
        return [sample.with_features(lambda _, number: own[number].features, weight=-self.alpha)]

    def _project(self, batch: Any, sample: Any) -> list[tuple[Any, ...]]:
        """Per row its images through the negative projector, on what the encoder said the first time."""
        assert self.negative is not None
        outputs = sample.observed_by(self.name)

        def recorded(number: int) -> Any:
            return replaced({module: lambda *a, said=said[number], **k: said for module, said in outputs.items()})

        with projecting(batch.family.projector(), self.negative):
            return batch.encode_again(recorded)


@contextmanager
def projecting(projector: torch.nn.Module, weights: Weights) -> Iterator[None]:
    """``projector`` computes with other weights in calls made inside the block; other calls have its own.

    Raises:
        ParameterError: weights of another projector.
    """
    if isinstance(weights, (str, Path)):
        weights = read_safetensors(Path(weights))
    state = weights.state_dict() if isinstance(weights, torch.nn.Module) else dict(weights)
    own = projector.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        raise ParameterError(
            f"dcd: the given projector has {len(state)} tensors that are not those of {type(projector).__name__}; give "
            "one that was trained from this model's projector."
        )
    other = copy.deepcopy(projector)
    other.load_state_dict(state)
    with replaced({projector: other.forward}):
        yield
