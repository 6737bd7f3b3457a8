"""Dynamic Correction Decoding with preceding layers (Wang et al., ICLR 2025; arXiv 2410.11779).

    C = the most probable tokens of p = softmax(l_N): at most ``top_k``, cut at cumulative probability ``top_p``
    (j*, k*) = argmax over layers j and tokens k in C of p_j(k),    p_j = softmax(head(norm(h_j)))
    scores = l_N + alpha * p_j*(k*) * l_j*      inside C

An early layer is added, not subtracted, and the final norm is applied to it. Follows the authors' code, whose alpha
is 0.6 (its table says 0.5 for some rows); it reads the candidates of the first row of a batch, here every row has its
own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.hf import decoder
from ..errors import UnsupportedError
from ..method import Method, Probes, Step


@dataclass(frozen=True)
class DeCo(Method):
    """Adds the predictions of the earlier layer that is most confident of a candidate token.

    Args:
        alpha: Weight of the early layer, at least 0.
        layers: Numbers of the preceding layers, 1 being the output of the first; ``None`` takes the share of the
            model that 20 to 28 is of the authors' 32 layers. (Their code takes 15 to 24 for InstructBLIP.)
        top_k: Maximum number of candidates.
        top_p: Cumulative probability of the candidates, in (0, 1].
    """

    name: ClassVar[str] = "deco"
    kind: ClassVar[str] = "layers"
    paper: ClassVar[str] = "Dynamic Correction Decoding (Wang et al., ICLR 2025)"
    arxiv: ClassVar[str] = "2410.11779"
    aliases: ClassVar[dict[str, str]] = {"threshold_top_p": "top_p", "threshold_top_k": "top_k"}
    costs: ClassVar[tuple[str, ...]] = ("layers",)
    owns: ClassVar[str | None] = "the choice of an early layer"

    alpha: float = 0.6
    layers: tuple[int, ...] | None = None
    top_k: int = 20
    top_p: float = 0.9

    def __post_init__(self) -> None:
        self.check(self.layers is None or len(self.layers) > 0, "layers", "at least one layer's number, or None")
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(self.top_k >= 1, "top_k", "at least 1")
        self.check(0 < self.top_p <= 1, "top_p", "in (0, 1]")

    def probes(self, model: torch.nn.Module) -> Probes:
        count = decoder.layer_count(model)
        if self.layers is None:
            first, last = round(20 / 32 * count), round(28 / 32 * count)
            return Probes(hidden=tuple(range(max(first, 1), min(last, count - 1) + 1)))
        if not all(1 <= layer < count for layer in self.layers):
            raise UnsupportedError(
                f"deco: layers = {self.layers} are not all preceding layers of this model, which are 1 to {count - 1}."
            )
        return Probes(hidden=self.layers)

    @property
    def mask_view(self) -> int:
        return 0

    def kept_tokens(self, step: Step) -> Tensor:
        probability, token = step.logits[0].softmax(-1).topk(min(self.top_k, step.logits.shape[-1]))
        before = probability.cumsum(-1) - probability
        return torch.zeros_like(step.logits[0], dtype=torch.bool).scatter(-1, token, before < self.top_p)

    def combine(self, step: Step) -> Tensor:
        early, probability, chosen = self._surest(step)
        layer = early.gather(0, chosen[None, ..., None].expand(1, *early.shape[1:]))[0]
        return step.logits[0] + self.alpha * probability[..., None] * layer

    def choices(self, step: Step) -> dict[str, Tensor]:
        _, probability, chosen = self._surest(step)
        layers = torch.tensor(list(step.hidden), device=chosen.device)
        return {"layer": layers[chosen], "probability in that layer": probability}

    def _surest(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the early layers (L, B, T, N); of the surest one its probability and its place, (B, T) each."""
        # Together, so that the head's weights are read once.
        early = step.project(torch.stack([states[0] for states in step.hidden.values()]))
        surest = early.softmax(-1).masked_fill(~self.kept_tokens(step), 0.0).amax(-1)
        probability, chosen = surest.max(0)
        return early, probability, chosen
