"""Revis: sparse latent steering (2026; arXiv 2602.11824).

    h <- h + strength * v           where -cos(h, v) > threshold: states that point away from what was seen; every position

``h`` is what one decoder layer puts out, ``v`` the direction in which the states of right captions with and without the
image differ most, made orthogonal to what the words alone would say (``lvlm-decode train vector --kind revis``). Follows the
authors' code, whose numbers are those of Qwen2.5-VL: the last layer, strength 2.5, threshold 0.2; their vectors for the last
layer are measured after the final norm and added before it. Their values for LLaVA are not known. The authors' files of
vectors (``.pt``) are read as they are; the sign of their principal components is a rule of the library they used, and that of
vectors made here is the sign of the mean difference.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.hf import decoder
from ..engine.run import Run
from ..engine.steer import Add, steering
from ..engine.vectors import Given, vectors_for
from ..errors import InputError
from ..method import Method


@dataclass(frozen=True)
class Revis(Method):
    """Adds what the image gives to the states of one layer where they point away from it.

    Args:
        vectors: Directions made by ``lvlm-decode train vector --kind revis``, or the authors' ``.pt`` file: its path, or the
            tensor (L, D).
        strength: How much of the direction is added, at least 0.
        threshold: How far a state must point away, as a cosine from -1 to 1; at 1 none does.
        layer: Decoder layer that is steered, counted from 0; ``None`` takes the last.
    """

    name: ClassVar[str] = "revis"
    kind: ClassVar[str] = "steering"
    paper: ClassVar[str] = "Revis (2026)"
    arxiv: ClassVar[str] = "2602.11824"
    aliases: ClassVar[dict[str, str]] = {"alpha_visual": "strength", "tau_low": "threshold", "vis_layers": "layer"}
    costs: ClassVar[tuple[str, ...]] = ("states",)
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes hidden states, which a processor cannot."}
    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    owns: ClassVar[str | None] = "the hidden states of view 0"

    vectors: Given | None = field(default=None, compare=False, repr=False)
    strength: float = 2.5
    threshold: float = 0.2
    layer: int | None = None

    def __post_init__(self) -> None:
        self.check(
            self.vectors is not None,
            "vectors",
            "the directions or the path of their file, which is made with: lvlm-decode train vector --kind revis",
        )
        self.check(self.strength >= 0, "strength", "at least 0")
        self.check(-1 <= self.threshold <= 1, "threshold", "from -1 to 1")
        self.check(self.layer is None or self.layer >= 0, "layer", "at least 0, or None")

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        layer = decoder.layer_count(run.module) - 1 if self.layer is None else self.layer
        (layer,) = decoder.layers_given(run.module, self.name, (layer, layer), layer, layer)
        assert self.vectors is not None
        given = self.vectors
        if isinstance(given, str | Path) and Path(given).suffix == ".pt":
            given = published(Path(given))
        directions = vectors_for(run, self.name, given, 2)
        if not self.strength:
            return nullcontext()
        return steering(run, Add({layer: directions[layer]}, self.strength, -self.threshold), [layer], at="layer")


def published(path: Path) -> Tensor:
    """(L, D) the visual directions of the authors' file: number of the layer's output, from 0 for the embeddings -> vectors.

    Raises:
        InputError: a file that cannot be read, or that holds something else.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        return torch.stack([held[number]["visual"] for number in range(1, len(held))]).float()
    except Exception as error:
        # What torch raises of a file that is none of its own has many types.
        raise InputError(
            f"{path} cannot be read as the authors' vectors, layer -> name -> vector, of which 'visual' is taken: "
            f"{type(error).__name__}: {error}"
        ) from error
