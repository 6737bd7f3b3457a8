"""Decoding by Contrasting Layers (Chuang et al., ICLR 2024; arXiv 2309.03883).

    j* = argmax over candidate layers j of JSD(q_N, q_j),    q_j = softmax(head(h_j)),  q_N = softmax(l_N)
    scores = log q_N - log q_j*      where q_N >= beta * max q_N

Follows the authors' code: no final norm on the early layers (``norm_early``), and Jensen-Shannon with both divergences
reversed, KL(M || q) instead of KL(q || M) (``divergence="jsd"`` gives the paper's). Unlike it, every row and position
chooses its own layer; the code averages over the batch, so that one row's choice depends on the others. For open answers
the authors run it with ``repetition_penalty=1.2``, which is an argument of ``generate()``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..engine.hf import decoder
from ..errors import UnsupportedError
from ..method import Method, Probes, Step


@dataclass(frozen=True)
class DoLa(Method):
    """Contrasts the last layer with the early layer that differs from it most.

    Args:
        layers: Candidate early layers: ``low`` or ``high`` half of the even layers as Hugging Face's DoLa counted
            them (the authors' buckets at 32 and 40 layers), or layer numbers, 0 being the embeddings.
        beta: Plausibility threshold in (0, 1], the authors' ``relative_top``; ``None`` applies no mask.
        divergence: Divergence that chooses the layer: ``code`` as in the authors' code, ``jsd`` as in the paper.
        norm_early: Whether the final norm is applied to early layers before the language head.
    """

    name: ClassVar[str] = "dola"
    kind: ClassVar[str] = "layers"
    paper: ClassVar[str] = "Decoding by Contrasting Layers (Chuang et al., ICLR 2024)"
    arxiv: ClassVar[str] = "2309.03883"
    aliases: ClassVar[dict[str, str]] = {"dola_layers": "layers", "relative_top": "beta", **Method.aliases}
    costs: ClassVar[tuple[str, ...]] = ("layers",)
    off: ClassVar[dict[str, Any] | None] = None
    owns: ClassVar[str | None] = "the choice of an early layer"

    layers: Literal["low", "high"] | tuple[int, ...] = "high"
    beta: float | None = 0.1
    divergence: Literal["code", "jsd"] = "code"
    norm_early: bool = False

    def __post_init__(self) -> None:
        self.check(len(self.layers) > 0, "layers", "'low', 'high' or at least one layer's number")
        self.check(self.divergence in ("code", "jsd"), "divergence", "'code' or 'jsd'")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def probes(self, model: torch.nn.Module) -> Probes:
        config = decoder.text_config(model)
        count = config.num_hidden_layers
        if isinstance(self.layers, tuple):
            if not all(0 <= layer < count for layer in self.layers):
                raise UnsupportedError(
                    f"dola: layers = {self.layers} are not all early layers of this model, which are 0 to {count - 1}."
                )
            return Probes(hidden=self.layers)
        if count > 40:
            low, high = range(0, 20, 2), range(count - 20, count, 2)
        else:
            low, high = range(0, count // 2, 2), range(count // 2, count, 2)
        chosen = low if self.layers == "low" else high
        # A tied head applied to the embeddings only repeats the input token.
        tied = getattr(config, "tie_word_embeddings", False)
        return Probes(hidden=tuple(layer for layer in chosen if layer or not tied))

    def combine(self, step: Step) -> Tensor:
        mature, early, chosen = self._contrasted(step)
        premature = early.gather(0, chosen[None, ..., None].expand(1, *early.shape[1:]))[0]
        return mature - premature

    def choices(self, step: Step) -> dict[str, Tensor]:
        chosen = self._contrasted(step)[2]
        return {"layer": torch.tensor(list(step.hidden), device=chosen.device)[chosen]}

    def _contrasted(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the last layer (B, T, N) and the early ones (L, B, T, N), and which of these diverges most."""
        mature = step.logits[0].log_softmax(-1)
        # Together, so that the head's weights are read once.
        states = torch.stack([states[0] for states in step.hidden.values()])
        early = step.project(states, normed=self.norm_early).log_softmax(-1)
        p, q = mature.exp(), early.exp()
        middle = 0.5 * (p + q)
        log_middle = middle.clamp_min(torch.finfo(middle.dtype).tiny).log()
        if self.divergence == "jsd":
            gaps = p * (mature - log_middle) + q * (early - log_middle)
        else:
            gaps = middle * (2 * log_middle - mature - early)
        return mature, early, gaps.sum(-1).argmax(0)
