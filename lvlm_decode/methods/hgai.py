"""Heads Guided Attention Intervention (Jiang et al., CVPR 2025; arXiv 2411.16724).

    w[h, j] <- w[h, j] + alpha * mean over heads |w[., j]|        j an image token, before the softmax

PAI's boost with the mean over heads, in the middle layers alone and for the first token too; no branch and no mask. Acts in
the row that chooses a token. Follows the authors' command line, whose layers 5 to 18 of 32 include the last; the call in
their README leaves layer 18 out: ``layers=(5, 17)``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.attention import Rescored
from ..engine.hf import decoder
from ..engine.run import Run
from ..method import Method


@dataclass(frozen=True)
class HGAI(Method):
    """Raises the attention to the image in the middle layers by what all heads together pay it.

    Args:
        alpha: Share of the heads' mean absolute score that is added, at least 0.
        layers: First and last layer; ``None`` takes the share of the model that 5 to 18 is of the authors' 32 layers.
    """

    name: ClassVar[str] = "hgai"
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "Devils in Middle Layers (Jiang et al., CVPR 2025)"
    arxiv: ClassVar[str] = "2411.16724"
    costs: ClassVar[tuple[str, ...]] = ("attention",)
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes what layers attend to, which a processor cannot."}
    owns: ClassVar[str | None] = "the attention of view 0"

    alpha: float = 0.5
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check_layers("layers")

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        def boost(scores: Tensor, images: Tensor) -> Tensor:
            return torch.where(images, scores + self.alpha * scores.abs().mean(1, keepdim=True), scores)

        return run.editing(Rescored(run, decoder.layers_given(run.module, self.name, self.layers, 5, 18), boost))
