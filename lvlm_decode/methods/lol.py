"""Lower Layer Matters (LOL; arXiv 2408.08769).

    F  = log p(x) - strength * log p*(x)                     final layer: the model against an amateur
    F' = log p(x; layer) - lower_strength * log p*(x; layer) the same after an early layer of both
    scores = F + fusion * F' + refocus * (log p(x | guide) - log p(x))      truthfulness-refocused term, then the mask

The amateur is inclined to hallucinate: the attached model with low-rank weights that ``lvlm-decode train negatives`` makes
(``amateur``; those of the small LLaVA ship) or with a LoRA adapter of peft (``adapter``; other adapters that are active stay so
for the model and not for the amateur), another model of the same architecture (``model``), or the model itself under an
instruction (``instruction``; the default where no amateur ships for the model). No code was released and the tables were not at
hand: the weighted fusion, the form of the last term, the layer and every strength are this library's reading, not the paper's
values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine import hf
from ..engine.hf import decoder
from ..engine.hooks import replaced
from ..engine.learned import LowRank, read, shipped
from ..engine.run import Run
from ..engine.samples import Sample
from ..errors import DependencyError, UnsupportedError
from ..families.base import Family
from ..method import Method, Probes, Step, View

INSTRUCTION = "You are a careless assistant that describes things which are not in the image. "
GUIDE = "You are a truthful assistant. Say only what is certainly in the image. "


@dataclass(frozen=True)
class LOL(Method):
    """Contrasts a final and a lower layer with those of a model that hallucinates more.

    Args:
        strength: Weight of the amateur's final layer, at least 0.
        lower_strength: Weight of the amateur's early layer, at least 0.
        fusion: Weight of the contrast at the early layer, at least 0.
        refocus: Weight of the guided term, at least 0; 0 leaves its view out.
        layer: Number of the early layer, 1 being the output of the first; ``None`` takes the middle.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        amateur: Low-rank weights made by ``lvlm-decode train negatives``, or the path of their file; ``None`` takes those
            that ship for the model, where some do and nothing else makes the amateur.
        adapter: Name, in peft, of the amateur's LoRA adapter.
        model: Another model of the same architecture as the amateur.
        instruction: Instruction that makes the model its own amateur; ``None`` takes this library's words where it needs one.
        guide: Truth-guiding instruction of the refocused term.
    """

    name: ClassVar[str] = "lol"
    kind: ClassVar[str] = "layers"
    paper: ClassVar[str] = "Lower Layer Matters (2024)"
    arxiv: ClassVar[str] = "2408.08769"
    costs: ClassVar[tuple[str, ...]] = ("text", "layers")
    refuses: ClassVar[dict[str, str]] = {
        "processor": "one of its views has other weights, which a processor cannot give it."
    }
    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0, "fusion": 0.0, "refocus": 0.0, "beta": None}
    owns: ClassVar[str | None] = "the choice of an early layer"

    strength: float = 0.5
    lower_strength: float = 0.5
    fusion: float = 0.5
    refocus: float = 0.5
    layer: int | None = None
    beta: float | None = 0.1
    amateur: Mapping[str, Tensor] | str | Path | None = field(default=None, compare=False, repr=False)
    adapter: str | None = None
    model: torch.nn.Module | None = field(default=None, compare=False, repr=False)
    instruction: str | None = None
    guide: str = GUIDE

    def __post_init__(self) -> None:
        for name in ("strength", "lower_strength", "fusion", "refocus"):
            self.check(getattr(self, name) >= 0, name, "at least 0")
        self.check(self.layer is None or self.layer >= 1, "layer", "at least 1, or None")
        given = [name for name in ("amateur", "adapter", "model", "instruction") if getattr(self, name) is not None]
        self.check(len(given) < 2, given[0] if given else "amateur", f"None when {given[-1] if given else ''} is given")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if self.adapter is not None:
            amateur = sample.as_view(patch=self._with_adapter)
        elif self.model is not None:
            amateur = sample.as_view(module=sample.family.decoding_module(self.model))
        elif (patch := self._low_rank(sample.family)) is not None:
            amateur = sample.as_view(patch=patch)
        else:
            amateur = sample.with_prefix(INSTRUCTION if self.instruction is None else self.instruction)
        return [amateur, sample.with_prefix(self.guide)] if self.refocus else [amateur]

    def probes(self, model: torch.nn.Module) -> Probes:
        count = decoder.layer_count(model)
        layer = max(1, count // 2) if self.layer is None else self.layer
        if layer >= count:
            raise UnsupportedError(
                f"lol: layer = {layer} is not an early layer of this model, which are 1 to {count - 1}."
            )
        return Probes(hidden=(layer,))

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        return nullcontext() if self.adapter is None else without_adapter(run.model, self.adapter)

    def observe(self, family: Family) -> AbstractContextManager[Any]:
        # The images are those of the model, encoded once; the amateur differs in what it makes of them.
        return nullcontext() if self.adapter is None else without_adapter(family.model, self.adapter)

    def _low_rank(self, family: Family) -> LowRank | None:
        """The model with the amateur's weights, if there are any."""
        source = self.amateur
        if source is None and self.instruction is None:
            source = shipped(family, "amateur")
        if source is None:
            return None
        key = str(source) if isinstance(source, str | Path) else ""
        if key not in self._patches:
            self._patches[key] = LowRank(read(source, self.name, "amateur", family), self.name)
        return self._patches[key]

    @cached_property
    def _patches(self) -> dict[str, LowRank]:
        # One object a file for all samples: views that share a patch run in one forward.
        return {}

    @cached_property
    def _with_adapter(self) -> Callable[[torch.nn.Module], AbstractContextManager[Any]]:
        # One object for all samples: views that share a patch run in one forward.
        return functools.partial(only_adapter, name=str(self.adapter))

    def combine(self, step: Step) -> Tensor:
        model, amateur = step.logits[:2].log_softmax(-1)
        (states,) = step.hidden.values()
        lower = step.project(states[0]).log_softmax(-1)
        lower_amateur = step.project(states[1], view=1).log_softmax(-1)
        scores = model - self.strength * amateur + self.fusion * (lower - self.lower_strength * lower_amateur)
        if self.refocus:
            scores = scores + self.refocus * (step.logits[2].log_softmax(-1) - model)
        return scores


def only_adapter(module: torch.nn.Module, name: str) -> AbstractContextManager[None]:
    """The peft adapter ``name`` alone is active in ``module``; see :func:`adapters`."""
    return adapters(module, name, lambda active: [name])


def without_adapter(module: torch.nn.Module, name: str) -> AbstractContextManager[None]:
    """The adapters that were active in ``module``, without the peft adapter ``name``; see :func:`adapters`."""
    return adapters(module, name, lambda active: [other for other in active if other != name])


@contextmanager
def adapters(module: torch.nn.Module, name: str, choose: Callable[[list[str]], list[str]]) -> Iterator[None]:
    """Layers of ``module`` use the peft adapters that ``choose`` makes of the active ones, in calls made inside the block.

    Raises:
        DependencyError: peft is not installed.
        UnsupportedError: the module has no adapter ``name``.
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise DependencyError("an amateur adapter needs peft; run: pip install peft") from error
    layers = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
    if not any(name in _names(layer) for layer in layers):
        hf.require_adapters()
        known = sorted({known for layer in layers for known in _names(layer)})
        raise UnsupportedError(
            f"the model has no adapter {name!r} ({', '.join(known) or 'none is loaded'}); load it first with "
            "model.load_adapter(path, adapter_name=...)."
        )
    forwards: dict[torch.nn.Module, Callable[..., Any]] = {}
    for layer in layers:
        active = [] if layer.disable_adapters else list(layer.active_adapters)
        chosen = [own for own in choose(active) if own in _names(layer)]
        # The layer's own forward, on a stand-in that has other adapters active: the layer stays as it is for other calls.
        stand_in = hf.Proxy(layer, active_adapters=chosen, disable_adapters=not chosen)
        forwards[layer] = functools.partial(type(layer).forward, stand_in)
    with replaced(forwards):
        yield


def _names(layer: Any) -> set[str]:
    return {key for names in layer.adapter_layer_names for key in getattr(layer, names)}
