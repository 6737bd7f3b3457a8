"""Image-guided head suppression (Sarkar et al., EMNLP 2025; arXiv 2505.16411).

    g_h = sum over image tokens j of w[h, j]        scores before the softmax, of the row that chooses a token
    out_h <- out_h * (1 if h is among the int(share * H) heads of largest g, else damp)

Anew for every token and layer, on each head's output before it is mixed with the others'. Follows the authors' code, which
ranks by raw scores where the abstract speaks of attention: ``rank="attention"``. Their runs differ by task: captions on
LLaVA-1.5 keep 0.95 at damp 0.08, yes/no questions 0.8 at 0.1, both in layers 0 to 30 of 32; Qwen-VL keeps 0.7 in layers 0
to 18. Rows without an image are left alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..engine.attention import Edit, choosing, image_slots, probabilities, rows_of, to_layer, visible
from ..engine.hf import decoder
from ..engine.run import Run
from ..engine.running import running_lane
from ..method import Method


@dataclass(frozen=True)
class SPIN(Method):
    """Damps the attention heads that look least at the image, anew for every token.

    Args:
        share: Share of the heads that stay as they are, in (0, 1]; at least one head does.
        damp: Factor on the output of the other heads, from 0 to 1.
        layers: First and last layer; ``None`` takes the share of the model that 0 to 30 is of the authors' 32 layers.
        rank: ``scores`` ranks heads by their scores before the softmax, as the code does, ``attention`` by what they attend.
    """

    name: ClassVar[str] = "spin"
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "Image-Guided Head Suppression (Sarkar et al., EMNLP 2025)"
    arxiv: ClassVar[str] = "2505.16411"
    aliases: ClassVar[dict[str, str]] = {"small_num_mask": "damp"}
    costs: ClassVar[tuple[str, ...]] = ("attention",)
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes what layers attend to, which a processor cannot."}
    off: ClassVar[dict[str, Any] | None] = {"share": 1.0}
    owns: ClassVar[str | None] = "the attention of view 0"

    share: float = 0.95
    damp: float = 0.08
    layers: tuple[int, int] | None = None
    rank: Literal["scores", "attention"] = "scores"

    def __post_init__(self) -> None:
        self.check(0 < self.share <= 1, "share", "in (0, 1]")
        self.check(0 <= self.damp <= 1, "damp", "from 0 to 1")
        self.check(self.rank in ("scores", "attention"), "rank", "'scores' or 'attention'")
        self.check_layers("layers")

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        return run.editing(_Damp(self, run))


class _Damp(Edit):
    def __init__(self, method: SPIN, run: Run):
        self.method, self.run = method, run
        self.layers = decoder.layers_given(run.module, method.name, method.layers, 0, 30)

    def output(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor
    ) -> Tensor:
        lane = running_lane(self.run)
        rows = lane.rows_of(0)
        if rows is None or layer not in self.layers:
            return out
        queries = choosing(lane)
        images = to_layer(image_slots(lane, self.run.family)[rows], lane, key)
        own, keys = query[rows][:, :, queries], key[rows]
        seen = rows_of(visible(query.shape[2], key.shape[2], mask, key.device), rows, queries)
        # A sliding layer may have left the image behind: then no head is told from another by it.
        shown = images[:, None] & seen[:, 0]
        if self.method.rank == "scores":
            looks = _summed(own, keys, shown)
        else:
            looks = (probabilities(own, keys, seen, scaling) * images[:, None, None]).sum(-1)
        heads = looks.shape[1]
        keep = max(int(self.method.share * heads), 1)
        order = looks.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        damped = (order >= keep) & shown.any(-1)[:, None]
        out = out.clone()
        factor = torch.where(damped, self.method.damp, 1.0).transpose(1, 2)[..., None]
        out[rows, queries] *= factor.to(out.dtype)
        return out


def _summed(query: Tensor, key: Tensor, slots: Tensor) -> Tensor:
    """(B, H, q) sums of query * key over the slots (B, q, S) of each query; grouped keys are not repeated."""
    rows, heads, count, width = query.shape
    groups = key.shape[1]
    sums = torch.einsum("bqs,bgsw->bgqw", slots.float(), key.float())
    folded = query.float().reshape(rows, groups, heads // groups, count, width)
    return torch.einsum("bghqw,bgqw->bghq", folded, sums).reshape(rows, heads, count)
