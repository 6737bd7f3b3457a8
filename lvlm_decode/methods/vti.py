"""Visual and Textual Intervention (Liu et al., ICLR 2025; arXiv 2410.15778): the textual half.

    d = mean over pairs (h(right caption) - h(hallucinated caption)) + first principal component of the differences
    y <- |y| * unit(unit(y) + 0.1 * text * unit(d_l))           every position, ``y`` the output of layer l's MLP

The direction is calibrated on pairs of captions of the same picture (``lvlm-decode train vector --kind vti``). Follows the
authors' code, which steers the MLP's output where the paper speaks of the stream, has a factor 0.1 in front of the strength,
and takes the last layer's direction after the final norm. Their parser's strength is 0.8, their example's 0.9. The visual half,
which steers the vision tower by a vector per patch of a 336-pixel grid, is not here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..engine.hf import decoder
from ..engine.run import Run
from ..engine.steer import Turn, steering
from ..engine.vectors import Given, vectors_for
from ..method import Method


@dataclass(frozen=True)
class VTI(Method):
    """Steers every layer along a direction from hallucinated to right captions.

    Args:
        vectors: Directions made by ``lvlm-decode train vector --kind vti``: the file's path, or the tensor (L, D).
        text: How far outputs turn along the direction, at least 0, in tenths.
        layers: First and last layer that is steered; ``None`` steers all.
    """

    name: ClassVar[str] = "vti"
    kind: ClassVar[str] = "steering"
    paper: ClassVar[str] = "Latent Space Steering (Liu et al., ICLR 2025)"
    arxiv: ClassVar[str] = "2410.15778"
    aliases: ClassVar[dict[str, str]] = {"alpha_text": "text"}
    costs: ClassVar[tuple[str, ...]] = ("states",)
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes hidden states, which a processor cannot."}
    off: ClassVar[dict[str, Any] | None] = {"text": 0.0}
    owns: ClassVar[str | None] = "the hidden states of view 0"

    vectors: Given | None = field(default=None, compare=False, repr=False)
    text: float = 0.8
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.check(self.vectors is not None, "vectors", "the directions, for instance the path of their file")
        self.check(self.text >= 0, "text", "at least 0")
        self.check_layers("layers")

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        layers = decoder.layers_given(run.module, self.name, self.layers, 0, 31)
        assert self.vectors is not None
        directions = vectors_for(run, self.name, self.vectors, 2)
        if not self.text:
            return nullcontext()
        return steering(run, Turn(dict(enumerate(directions)), 0.1 * self.text), layers)
