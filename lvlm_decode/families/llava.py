"""LLaVA-NeXT and LLaVA-OneVision: an image is a small whole and several tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.hf import Encoded
from ..engine.hf import vision as encoded
from ..errors import UnsupportedError
from .base import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, Family


class LlavaNext(Family):
    """``pixel_values`` (images, tiles, 3, H, W), the whole image first; tiles beyond an image's own are zeros."""

    encoder_inputs = (*Family.encoder_inputs, "image_sizes")
    has_grid = False

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
    """A prompt with several images takes each of them whole, without tiles: ``batch_num_images`` counts them.

    ``pixel_values_videos`` (videos, frames, 3, H, W); a video's frames are halved in both directions, and one newline token
    closes it.
    """

    has_cls = False
    encoder_inputs = (*LlavaNext.encoder_inputs, "vision_aspect_ratio", "batch_num_images", "pixel_values_videos")
    count_keys = ("batch_num_images",)

    def tokens_per_video(self, vision: dict[str, Tensor]) -> list[int]:
        sizes = self.config.vision_config
        side = math.ceil(sizes.image_size // sizes.patch_size / 2)
        videos, frames = vision["pixel_values_videos"].shape[:2]
        return [frames * side**2 + 1] * videos

    def frames_of(self, vision: dict[str, Tensor]) -> list[Tensor]:
        return list(vision["pixel_values_videos"])

    def with_frames(self, vision: dict[str, Tensor], frames: Sequence[Tensor]) -> dict[str, Tensor]:
        if len({len(own) for own in frames}) > 1:
            raise UnsupportedError(
                f"{self.config.model_type} takes videos of one length in a prompt, and this view leaves "
                f"{', '.join(str(len(own)) for own in frames)} frames; drop as many of each."
            )
        return {**vision, "pixel_values_videos": torch.stack(list(frames))}

    def encode_videos(self, parts: Sequence[dict[str, Tensor]]) -> list[Encoded]:
        # One pass per length: a view may have fewer frames.
        def length(part: dict[str, Tensor]) -> int:
            return part["pixel_values_videos"].shape[1]

        lengths = dict.fromkeys(length(part) for part in parts)
        encode = super().encode_videos
        found = {n: iter(encode([part for part in parts if length(part) == n])) for n in lengths}
        return [next(found[length(part)]) for part in parts for _ in part["pixel_values_videos"]]

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        # Its vision tower is SigLIP's, its processor CLIP's.
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
