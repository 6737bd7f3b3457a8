"""LLaVA-NeXT and LLaVA-OneVision: an image is a small whole and several tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, Family


class LlavaNext(Family):
    """``pixel_values`` (images, tiles, 3, H, W), the whole image first; tiles beyond an image's own are zeros."""

    def cat_vision(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        most = max(part["pixel_values"].shape[1] for part in parts)

        def fill(tiles: Tensor) -> Tensor:
            return torch.nn.functional.pad(tiles, (0, 0, 0, 0, 0, 0, 0, most - tiles.shape[1]))

        return super().cat_vision([dict(part, pixel_values=fill(part["pixel_values"])) for part in parts])


class LlavaOnevision(LlavaNext):
    """A prompt with several images takes each of them whole, without tiles: ``batch_num_images`` counts them."""

    has_cls = False
    count_keys = ("batch_num_images",)

    @property
    def pixel_statistics(self):
        # Its vision tower is SigLIP's, its processor CLIP's.
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
