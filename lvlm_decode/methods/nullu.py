"""Nullu: hallucinated features projected out (Yang et al., CVPR 2025; arXiv 2412.13817).

    M_l = (mean state of right captions - mean state of hallucinated ones) / 2, one row a pair, not centred
    V_l = the first ``rank`` right singular vectors of M_l
    y  <- y - V_l V_l^T y           ``y`` the output of layer l's MLP

The authors edit the weights, W <- (I - V V^T) W of the MLP's last product, and save a new checkpoint; that is the same as
projecting its output, which is done here and undone after the call. Subspaces come from pairs of captions of the same
picture (``lvlm-decode train vector --kind nullu``). The code works in layers 16 to 31 of 32; its example takes rank 4, its
parser 8.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..engine.hf import decoder
from ..engine.run import Run
from ..engine.steer import Project, steering
from ..engine.vectors import Given, vectors_for
from ..errors import UnsupportedError
from ..method import Method


@dataclass(frozen=True)
class Nullu(Method):
    """Projects the directions in which hallucinated captions differ out of the later layers.

    Args:
        vectors: Subspaces made by ``lvlm-decode train vector --kind nullu``: the file's path, or the tensor (L, D, k).
        rank: How many of the directions are projected out, at least 0.
        layers: First and last layer; ``None`` takes the share of the model that 16 to 31 is of the authors' 32 layers.
    """

    name: ClassVar[str] = "nullu"
    kind: ClassVar[str] = "steering"
    paper: ClassVar[str] = "Nullu (Yang et al., CVPR 2025)"
    arxiv: ClassVar[str] = "2412.13817"
    aliases: ClassVar[dict[str, str]] = {"top_k_ranks": "rank"}
    costs: ClassVar[tuple[str, ...]] = ("states",)
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes hidden states, which a processor cannot."}
    off: ClassVar[dict[str, Any] | None] = {"rank": 0}
    owns: ClassVar[str | None] = "the hidden states of view 0"

    vectors: Given | None = field(default=None, compare=False, repr=False)
    rank: int = 4
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.check(
            self.vectors is not None,
            "vectors",
            "the subspaces or the path of their file, which is made with: lvlm-decode train vector --kind nullu",
        )
        self.check(self.rank >= 0, "rank", "at least 0")
        self.check_layers("layers")

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        layers = decoder.layers_given(run.module, self.name, self.layers, 16, 31)
        assert self.vectors is not None
        bases = vectors_for(run, self.name, self.vectors, 3)
        if self.rank > bases.shape[2]:
            raise UnsupportedError(
                f"nullu: rank = {self.rank}, and the given subspaces have {bases.shape[2]} directions; take a smaller rank, "
                "or make them anew with a larger --rank."
            )
        if not self.rank:
            return nullcontext()
        return steering(run, Project(dict(enumerate(bases[..., : self.rank]))), layers)
