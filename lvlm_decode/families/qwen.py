"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of any size as flattened patches, positions in three axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Family


class QwenVL(Family):
    """Patches of all images in one matrix; ``image_grid_thw`` says whose they are.

    A row of ``pixel_values`` is one patch (channels, frames, P, P) flattened, patches ordered by the 2 x 2 group that
    is merged into one token. A still image fills both frames, so whatever edits pixels must treat the copies alike. In a
    video every patch holds two frames that follow each other.

    Qwen3-VL writes the time before every pair of frames, all between one begin and one end marker; whoever takes the video
    away takes these words away too.
    """

    encoder_inputs = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    position_keys = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    clock_keys = ("second_per_grid_ts",)
    has_cls = False
    has_grid = False

    @property
    def _merge(self) -> int:
        return self.config.vision_config.spatial_merge_size

    def tokens_per_image(self, vision: dict[str, Tensor]) -> list[int] | None:
        return (vision["image_grid_thw"].prod(-1) // self._merge**2).tolist()

    def pixel_rows(self, vision: dict[str, Tensor]) -> list[int] | None:
        if "image_grid_thw" not in vision:
            return None
        return vision["image_grid_thw"].prod(-1).tolist()

    def tokens_per_video(self, vision: dict[str, Tensor]) -> list[int]:
        return (vision["video_grid_thw"].prod(-1) // self._merge**2).tolist()

    def video_rows(self, vision: dict[str, Tensor]) -> list[int] | None:
        return vision["video_grid_thw"].prod(-1).tolist()

    def drop_image(self, input_ids: Tensor) -> Tensor:
        start, end = self.config.vision_start_token_id, self.config.vision_end_token_id
        marks = (*self.placeholder_ids.values(), start, end)
        keep = ~torch.isin(input_ids, input_ids.new_tensor(marks))
        # Markers may stand inside each other: between the outer ones of a video stand the times of its frames.
        opened: list[int] = []
        for at in ((input_ids == start) | (input_ids == end)).nonzero().flatten().tolist():
            if int(input_ids[at]) == start:
                opened.append(at)
            elif opened:
                first = opened.pop()
                if bool(self.is_placeholder(input_ids[first:at]).any()):
                    keep[first:at] = False
        return keep

    def projector(self) -> torch.nn.Module:
        return self.model.get_encoder(modality="image").merger

    def vision_layers(self) -> list[torch.nn.Module]:
        return list(self.model.get_encoder(modality="image").blocks)

    def before_projector(self) -> list[torch.nn.Module]:
        # The merger is the encoder's last part.
        return self.vision_layers()

    def tie_noise(self, noise: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        # Independent noise on the copies of a still image would average out in the temporal convolution.
        shape = (len(pixels), 3, self.config.vision_config.temporal_patch_size, -1)
        frames = pixels.view(shape)
        return noise(frames[:, :, :1]).expand(shape[0], 3, shape[2], -1).reshape(pixels.shape)

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        if self.config.model_type.startswith("qwen3"):
            return (0.5,) * 3, (0.5,) * 3
        return super().pixel_statistics

    def edit_pictures(self, edit: Callable[[Tensor], Tensor], pixels: Tensor, vision: dict[str, Tensor]) -> Tensor:
        out, at = [], 0
        for frames, height, width in vision["image_grid_thw"].tolist():
            own = pixels[at : at + frames * height * width]
            at += len(own)
            picture = self.picture(own, height, width)
            out.append(self._to_patches(self.edit_normalised(edit, picture), len(own), height, width))
        return torch.cat(out)

    def frames_of(self, vision: dict[str, Tensor]) -> list[Tensor]:
        pairs, size, merge = self._sizes()
        out, at = [], 0
        for steps, height, width in vision["video_grid_thw"].tolist():
            own = vision["pixel_values_videos"][at : at + steps * height * width]
            at += len(own)
            grid = own.view(steps, height // merge, width // merge, merge, merge, 3, pairs, size, size)
            out.append(grid.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(steps * pairs, 3, height * size, width * size))
        return out

    def with_frames(self, vision: dict[str, Tensor], frames: Sequence[Tensor]) -> dict[str, Tensor]:
        pairs, size, merge = self._sizes()
        patches, grids = [], []
        for own in frames:
            # As the processor does, the last frame is repeated where a pair is not full.
            own = torch.cat([own, own[-1:].expand(-len(own) % pairs, -1, -1, -1)])
            steps, height, width = len(own) // pairs, own.shape[-2] // size, own.shape[-1] // size
            grid = own.view(steps, pairs, 3, height // merge, merge, size, width // merge, merge, size)
            patches.append(grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * height * width, -1))
            grids.append([steps, height, width])
        grid_thw = vision["video_grid_thw"].new_tensor(grids)
        return {**vision, "pixel_values_videos": torch.cat(patches), "video_grid_thw": grid_thw}

    def _sizes(self) -> tuple[int, int, int]:
        vision = self.config.vision_config
        return vision.temporal_patch_size, vision.patch_size, self._merge

    def picture(self, patches: Tensor, height: int, width: int) -> Tensor:
        """(3, H, W) of the first frame of one still image."""
        frames, size, merge = self._sizes()
        grid = patches.view(height // merge, width // merge, merge, merge, 3, frames, size, size)[:, :, :, :, :, 0]
        return grid.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * size, width * size)

    def _to_patches(self, picture: Tensor, rows: int, height: int, width: int) -> Tensor:
        frames, size, merge = self._sizes()
        grid = picture.view(3, height // merge, merge, size, width // merge, merge, size).permute(1, 4, 2, 5, 0, 3, 6)
        return grid[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, frames, -1, -1).reshape(rows, -1)
