"""LLaVA-NeXT and LLaVA-OneVision: an image is a small whole and several tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.hf import vision as encoded
from .base import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, Family


class LlavaNext(Family):
    """``pixel_values`` (images, tiles, 3, H, W), the whole image first; tiles beyond an image's own are zeros."""

    encoder_inputs = (*Family.encoder_inputs, "image_sizes")

    def cat_vision(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        most = max(part["pixel_values"].shape[1] for part in parts)

        def fill(tiles: Tensor) -> Tensor:
            return torch.nn.functional.pad(tiles, (0, 0, 0, 0, 0, 0, 0, most - tiles.shape[1]))

        return super().cat_vision([dict(part, pixel_values=fill(part["pixel_values"])) for part in parts])

    def encoder_rows(self, vision: dict[str, Tensor]) -> list[int]:
        rows, at = [], 0
        for size in vision["image_sizes"]:
            rows.append(at)
            at += encoded.tiles_of(size, self.config.image_grid_pinpoints, self.config.vision_config.image_size)
        return rows

    def only_patches(self, sample: Any, number: int, index: Tensor, states: Tensor, fix_offset: bool) -> Tensor:
        # The small whole image comes first; the newline token closes it.
        patches = super().only_patches(sample, number, index, states, fix_offset)
        return torch.cat([patches, self.model.model.image_newline[None].to(patches)])


class LlavaOnevision(LlavaNext):
    """A prompt with several images takes each of them whole, without tiles: ``batch_num_images`` counts them."""

    has_cls = False
    encoder_inputs = (*LlavaNext.encoder_inputs, "vision_aspect_ratio", "batch_num_images")
    count_keys = ("batch_num_images",)

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        # Its vision tower is SigLIP's, its processor CLIP's.
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
