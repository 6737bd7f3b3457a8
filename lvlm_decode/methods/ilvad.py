"""Inter-Layer Visual Attention Discrepancy (Xie et al., ICML 2026; arXiv 2605.20965): the image half.

    A_lj = attention of the first tokens of a plain answer to image token j in layer l, mean over tokens and the half of the
           heads that look at the image most
    G_j  = how often A_lj comes to exceed tau * mean_j A_l from one layer to the next, where mean_l A_lj is above average
    E_j  = exp(alpha * G_j)             G limited to mean +- 3 std and brought to [0, 1]
    p_hj <- p_hj * E_j, each row made to sum to 1            for the half of the heads whose attention to the image lies most on
                                                             tokens of large E, in the row that chooses a token

Follows the authors' code: 10 tokens, tau 5, alpha 5 (4 for open questions), layers 0 to 30 of 32 for yes/no questions and 5 to 25
for captions. Where no token stands out, for an answer without tokens too, their map is not a number; here nothing is edited. The
other half of the method weighs words by what they looked at, which every step passes on to the next, and is not here. Of several
images all tokens are judged together. Rows without an image are left alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..engine.attention import Edit, choosing, image_slots, probabilities, routed, rows_of, to_layer, visible, weighted
from ..engine.batch import Batch
from ..engine.hf import decoder
from ..engine.run import Run
from ..engine.running import running_lane
from ..engine.stack import Lane
from ..method import Method


@dataclass(frozen=True)
class ILVAD(Method):
    """Raises the attention to image tokens that early words of a plain answer came back to.

    Args:
        alpha: Logarithm of the largest factor on attention, at least 0.
        tau: How far above the mean of a layer attention to a token counts, at least 0.
        tokens: Number of tokens of the plain answer, at least 2.
        layers: First and last layer that is edited; ``None`` takes the share of the model that 0 to 30 is of the authors' 32
            layers.
    """

    name: ClassVar[str] = "ilvad"
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "Inter-Layer Visual Attention Discrepancy (Xie et al., ICML 2026)"
    arxiv: ClassVar[str] = "2605.20965"
    costs: ClassVar[tuple[str, ...]] = ("beginning", "attention")
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes what layers attend to, which a processor cannot."}
    owns: ClassVar[str | None] = "the attention of view 0"

    alpha: float = 5.0
    tau: float = 5.0
    tokens: int = 10
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(self.tau >= 0, "tau", "at least 0")
        self.check(self.tokens >= 2, "tokens", "at least 2")
        self.check_layers("layers")

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        layers = decoder.layers_given(run.module, self.name, self.layers, 0, 30)
        attention, images = run.batch.once(("ilvad", self.tokens), lambda batch: looked_at(batch, self.tokens))
        factors = torch.zeros(images.shape, device=images.device)
        for row, own in enumerate(images):
            if bool(own.any()):
                factors[row, own] = log_factors(attention[:, row, own], self.alpha, self.tau)
        return run.editing(_Weighed(run, layers, factors))


class _Words(Edit):
    """Records what answers look at: per layer the attention of each of their tokens to the image."""

    def __init__(self, lane: Lane, batch: Batch):
        self.lane, self.batch = lane, batch
        self.layers: dict[int, Tensor] = {}

    def output(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor
    ) -> Tensor:
        seen = visible(query.shape[2], key.shape[2], mask, key.device)
        attention = probabilities(query, key, seen, scaling)
        images = to_layer(image_slots(self.lane, self.batch.family), self.lane, key)
        found = most_looking(attention * images[:, None, None])[..., : self.lane.length]
        found = pad(found, (self.lane.length - found.shape[-1], 0))
        # Layers may live on devices of their own; what they say is read together.
        self.layers[layer] = found[..., : self.lane.width].to(self.lane.position.device)
        return out


def most_looking(attention: Tensor) -> Tensor:
    """(B, q, S) mean attention of the half of the heads that attend most, of attention to the image (B, H, q, S)."""
    heads = attention.shape[1]
    looks = attention.sum(-1)
    ranks = looks.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    keep = (ranks < max(heads // 2, 1)).to(attention.dtype)
    return (attention * keep[..., None]).sum(1) / max(heads // 2, 1)


def looked_at(batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """What the first ``count`` tokens of a plain answer look at.

    Returns:
        (L, B, T) attention to the T slots of the prompt, the mean over the answer's tokens that another one follows, 0 for an
        answer without such; and (B, T) bool, the slots that hold image tokens.
    """
    answers = [answer[: count - 1] for answer in batch.answers(batch.samples, count)]
    edits: list[Edit] = []
    pad_id = batch.family.pad_token_id
    lane = Lane([batch.prepare(batch.samples)], (0,), pad_token_id=pad_id, edits=edits)
    recorder = _Words(lane, batch)
    width = max(max(map(len, answers)), 1)
    tokens = torch.stack([pad(answer, (0, width - len(answer)), value=pad_id) for answer in answers])
    there = torch.stack([torch.arange(width) < len(answer) for answer in answers]).to(tokens.device)
    with torch.no_grad(), routed(lane.module):
        lane.prefill(1)
        images = image_slots(lane, batch.family)
        edits.append(recorder)
        lane.extend(tokens, 1)
        # The lane and what it records into would otherwise hold each other.
        edits.clear()
    layers = torch.stack([recorder.layers[layer] for layer in sorted(recorder.layers)])
    told = there.to(layers)[..., None]
    return (layers * told).sum(2) / told.sum(1).clamp(min=1), images


def log_factors(attention: Tensor, alpha: float, tau: float) -> Tensor:
    """(n,) from 0 to ``alpha``: logarithms of the factors of n image tokens, from attention (L, n) to them."""
    high = (attention > tau * attention.mean(-1, keepdim=True)).float()
    comes = (high[1:] - high[:-1]).clamp(min=0).sum(0)
    overall = attention.mean(0)
    found = comes * (overall > overall.mean())
    if len(found) > 1:
        found = torch.clamp(found, found.mean() - 3 * found.std(), found.mean() + 3 * found.std())
    span = found.max() - found.min()
    return torch.where(span > 0, alpha * (found - found.min()) / span, 0.0)


class _Weighed(Edit):
    """Multiplies attention of view 0 to image tokens in the heads that look at what matters; just these rows are computed."""

    def __init__(self, run: Run, layers: range, factors: Tensor):
        self.run, self.layers, self.factors = run, layers, factors

    def output(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor
    ) -> Tensor:
        lane = running_lane(self.run)
        rows = lane.rows_of(0)
        if rows is None or layer not in self.layers:
            return out
        queries = choosing(lane)
        own = self.factors.repeat_interleave(lane.rows // len(self.factors), 0)
        # A lane's prompts are padded on the left to the longest of its views.
        own = pad(own, (lane.width - own.shape[1], lane.length - lane.width)).to(key.device)
        images = to_layer(image_slots(lane, self.run.family)[rows], lane, key)
        own = to_layer(own, lane, key)
        seen = rows_of(visible(query.shape[2], key.shape[2], mask, key.device), rows, queries)
        attention = raised(probabilities(query[rows][:, :, queries], key[rows], seen, scaling), own, images)
        out = out.clone()
        out[rows, queries] = weighted(attention, value[rows]).to(out.dtype)
        return out


def raised(attention: Tensor, factors: Tensor, images: Tensor) -> Tensor:
    """(B, H, q, S) attention (B, H, q, S) whose heads that look at what matters are raised there, rows summing to 1.

    Args:
        factors: (B, S) logarithms of the factors; 0 for tokens that are no image's.
        images: (B, S) bool.
    """
    to_image, logs = attention * images[:, None, None], factors[:, None, None]
    grounded = (to_image * logs).sum(-1) / (to_image.sum(-1) + 1e-8)
    # Where all image tokens that are visible have one factor, heads differ by rounding alone, which must not choose among them.
    ranks = grounded.round(decimals=5).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = (ranks < max(attention.shape[1] // 2, 1))[..., None]
    changed = torch.where(chosen, attention * logs.exp(), attention)
    return changed / changed.sum(-1, keepdim=True)
