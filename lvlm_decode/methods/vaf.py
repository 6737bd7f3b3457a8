"""Visual Amplification Fusion, ClearSight (Yin et al., CVPR 2025; arXiv 2503.13107).

    w[r, j] <- enhance * w[r, j]      j an image token
    w[r, j] <- suppress * w[r, j]     j before the first image of the row: begin token, system prompt, cue
    for every row r after the image, of the prompt as well as the answer, before the softmax

Follows the authors' code: layers 9 to 14 whatever the depth of the model, of which the share is taken here, and a factor on
the raw scores, so that a negative score to an image token is lowered. The defaults are their script's; their parser's are 1
and 1, which is off. Of several images all are enhanced, and rows after the last one act; the authors have one image.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.attention import Edit, image_slots, rows_of, to_layer, visible
from ..engine.hf import decoder
from ..engine.run import Run
from ..engine.running import running_lane
from ..method import Method


@dataclass(frozen=True)
class VAF(Method):
    """Scales what the words attend to in the middle layers: the image up, the system prompt down.

    Args:
        enhance: Factor on scores of image tokens, at least 0.
        suppress: Factor on scores of what stands before the image, at least 0.
        layers: First and last layer; ``None`` takes the share of the model that 9 to 14 is of the authors' 32 layers.
    """

    name: ClassVar[str] = "vaf"
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "ClearSight (Yin et al., CVPR 2025)"
    arxiv: ClassVar[str] = "2503.13107"
    aliases: ClassVar[dict[str, str]] = {"enh_para": "enhance", "sup_para": "suppress"}
    costs: ClassVar[tuple[str, ...]] = ("attention",)
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes what layers attend to, which a processor cannot."}
    off: ClassVar[dict[str, Any] | None] = {"enhance": 1.0, "suppress": 1.0}
    owns: ClassVar[str | None] = "the attention of view 0"

    enhance: float = 1.15
    suppress: float = 0.95
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.check(self.enhance >= 0, "enhance", "at least 0")
        self.check(self.suppress >= 0, "suppress", "at least 0")
        self.check_layers("layers")

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        return run.editing(_Scale(self, run))


class _Scale(Edit):
    def __init__(self, method: VAF, run: Run):
        self.method, self.run = method, run
        self.layers = decoder.layers_given(run.module, method.name, method.layers, 9, 14)

    def output(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor
    ) -> Tensor:
        lane = running_lane(self.run)
        rows = lane.rows_of(0)
        if rows is None or layer not in self.layers:
            return out
        images = image_slots(lane, self.run.family, key.device)[rows]
        # 1 before the first image, then 0; rows without one have nothing before it.
        before = (images.cumsum(-1) == 0) & images.any(-1, keepdim=True)
        factor = torch.where(images, self.method.enhance, torch.where(before, self.method.suppress, 1.0))
        # A factor on a score is a factor on its key, so that sdpa does the rest and no scores are computed here.
        scaled = key[rows] * to_layer(factor, lane, key)[:, None, :, None].to(key.dtype)
        seen = rows_of(visible(query.shape[2], key.shape[2], mask, key.device), rows, slice(None))
        own = torch.nn.functional.scaled_dot_product_attention(
            query[rows], scaled, value[rows], attn_mask=seen, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        ).transpose(1, 2)
        out = out.clone()
        if not lane.prefilling:
            out[rows] = own
            return out
        last = images.flip(-1).cumsum(-1).flip(-1)
        after = ((last == 0) & images.any(-1, keepdim=True))[..., None, None]
        out[rows] = torch.where(after, own, out[rows])
        return out
