"""Steering: what parts of the decoder's layers put out is changed for chosen rows, layers and positions of one run.

The hooks act in forwards of that run's own lanes alone, find the rows of a view by the lane, and leave other views, other
calls, caches and weights as they are. Every edit is a function of one row and one position, so that batches, beams, drafts
and static caches give what single steps give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import InputError
from .hf import decoder
from .hooks import hooked
from .running import running_lane
from .stack import Lane

if TYPE_CHECKING:
    from ..families.base import Family
    from .run import Run
    from .samples import Sample


#: What `normalize` divides by at least.
_SMALLEST = 1e-12


class Steer(ABC):
    """What is done to the states (B, q, D), float32, that one part of a decoder layer puts out."""

    @abstractmethod
    def edit(self, layer: int, states: Tensor) -> Tensor:
        """The states (B, q, D) of layer ``layer``, 0 for the first, as they should be."""


class Turn(Steer):
    """Turns states towards a vector and keeps their length: |y| * unit(unit(y) + s * unit(v)).

    Args:
        vectors: layer -> (D,), (B, D) with one per sample, or (1, q, D) with one per position; where a vector is zero
            nothing changes.
        strength: s, at least 0.
        boost: s grows by the factor 1 + max(0, cos(y, -v)), so that states which point away are turned most.
    """

    def __init__(self, vectors: Mapping[int, Tensor], strength: float, boost: bool = False):
        self.vectors, self.strength, self.boost = vectors, strength, boost
        self._units: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def edit(self, layer: int, states: Tensor) -> Tensor:
        unit, there = self._unit(layer, states)
        length = states.norm(dim=-1, keepdim=True)
        own = states / length.clamp(min=_SMALLEST)
        strength: Tensor | float = self.strength
        if self.boost:
            strength = self.strength * (1 + (-(own * unit).sum(-1, keepdim=True)).clamp(min=0))
        turned = length * normalize(own + strength * unit, dim=-1)
        # To take a length off and put it back rounds, and a row without a vector is to stay as it is.
        return torch.where(there, turned, states)

    def _unit(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's vectors of length 1, and where there is one; made once for the rows of a call, not for every token."""
        key = layer, len(states), states.device
        if key not in self._units:
            unit = normalize(per_row(self.vectors[layer], states), dim=-1)
            self._units[key] = unit, unit.any(-1, keepdim=True)
        return self._units[key]


class Add(Steer):
    """Adds a vector, everywhere or where a gate is open: h + s * v where cos(h, v) < gate.

    Args:
        vectors: layer -> (D,), or (B, D) with one per sample.
        strength: s.
        gate: the cosine below which the vector is added; ``None`` adds it everywhere.
    """

    def __init__(self, vectors: Mapping[int, Tensor], strength: float, gate: float | None = None):
        self.vectors, self.strength, self.gate = vectors, strength, gate

    def edit(self, layer: int, states: Tensor) -> Tensor:
        vector = per_row(self.vectors[layer], states)
        added = states + self.strength * vector
        if self.gate is None:
            return added
        cosine = (normalize(states, dim=-1) * normalize(vector, dim=-1)).sum(-1, keepdim=True)
        return torch.where(cosine < self.gate, added, states)


class Project(Steer):
    """Takes a subspace out of the states: y - V V^T y.

    Args:
        bases: layer -> (D, k) with orthonormal columns.
    """

    def __init__(self, bases: Mapping[int, Tensor]):
        self.bases = bases

    def edit(self, layer: int, states: Tensor) -> Tensor:
        basis = self.bases[layer].to(states)
        return states - (states @ basis) @ basis.T


def per_row(vector: Tensor, states: Tensor) -> Tensor:
    """(1, 1, D), (B, 1, D) or (1, q, D) of a vector (D,), of one per sample, whose beams stand side by side, or per position."""
    vector = vector.to(states)
    if vector.dim() == 1:
        return vector[None, None]
    if vector.dim() == 3:
        return vector
    return vector.repeat_interleave(len(states) // len(vector), 0)[:, None]


@contextmanager
def steering(
    run: Run, steer: Steer, layers: Sequence[int], at: str = "mlp", view: int = 0, positions: str = "all"
) -> Iterator[None]:
    """The forwards of ``run`` compute under ``steer`` for the length of the block.

    Args:
        layers: decoder layers to steer, 0 for the first.
        at: whose output is edited: "mlp", "attention" (each before it is added to the stream) or "layer".
        view: whose rows are edited; 0 is the sample itself.
        positions: "all", or "choosing" for those that choose a token: the last of the prompt and all later ones.

    Raises:
        UnsupportedError: layers of the model without such a part.
    """
    parts = decoder.parts(run.module, at)

    def hook(layer: int) -> Any:
        def edited(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            lane = running_lane(run)
            rows = None if lane is None else lane.rows_of(view)
            if rows is None:
                return None
            states = decoder.states_of(output).clone()
            queries = slice(-1, None) if positions == "choosing" and lane.prefilling else slice(None)
            own = states[rows, queries]
            states[rows, queries] = steer.edit(layer, own.float()).to(own.dtype)
            return decoder.with_states(output, states)

        return edited

    with hooked(after={parts[layer]: hook(layer) for layer in layers}):
        yield


@contextmanager
def steering_encoder(family: Family, name: str, directions: Tensor, strength: float) -> Iterator[None]:
    """The vision encoder's MLPs put out states turned towards ``directions`` in the block, every image alike.

    Args:
        name: of the method, for messages.
        directions: (l, n, D), for each of the l layers of the encoder and n tokens of its grid.
        strength: as of :class:`Turn`.

    Raises:
        InputError: directions for another encoder, or for a grid of another size than that of the images.
    """
    layers: list[Any] = family.vision_layers()
    steer = Turn({number: own[None] for number, own in enumerate(directions)}, strength)

    def hook(layer: int) -> Any:
        def edited(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            states = decoder.states_of(output)
            has, wants = tuple(directions.shape), (len(layers), *states.shape[1:])
            if has != wants:
                raise InputError(
                    f"{name}: the visual direction is {has}, and the vision encoder has {wants} (layers, tokens, width); "
                    "give a direction that was made for this model, and images of the size that its processor makes."
                )
            return decoder.with_states(output, steer.edit(layer, states.float()).to(states.dtype))

        return edited

    with hooked(after={layer.mlp: hook(number) for number, layer in enumerate(layers[: len(directions)])}):
        yield


def last_states(run: Run, columns: Sequence[Sequence[Sample]]) -> Tensor:
    """(L, C, B, D) float32: what each decoder layer puts out at the last prompt token, before the final norm.

    Args:
        columns: C lists of B samples, which run in one forward of the unsteered model.
    """
    resolved = run.batch.resolve([sample for column in columns for sample in column])
    count = len(columns[0])
    prepared = [run.batch.prepare(resolved[i : i + count]) for i in range(0, len(resolved), count)]
    lane = Lane(prepared, range(len(columns)), pad_token_id=run.family.pad_token_id)
    found: dict[Any, Tensor] = {}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        found[module] = decoder.states_of(output)[:, -1].float()

    layers = decoder.parts(lane.module, "layer")
    with torch.no_grad(), hooked(after=dict.fromkeys(layers, keep)):
        lane.prefill(1)
    return torch.stack([found[layer].to(run.device) for layer in layers]).unflatten(1, (len(columns), count))
