"""SmolVLM and Idefics3: ``pixel_values`` (rows, images, 3, H, W), filled up with empty images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.hf import Encoded, vision
from .base import Family


class Idefics(Family):
    """One entry of ``pixel_values`` per row; all-zero images and the mask's zeros are padding.

    The processor writes every tile as a mark, the name of its place and its placeholders, breaks lines between rows of tiles,
    and closes an image by the mark once more. All of this goes with an image that is taken out.
    """

    encoder_inputs = ("pixel_values", "pixel_attention_mask")
    pixels_per_row = True
    has_cls = False
    has_grid = False

    def cat_vision(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        most = [max(part["pixel_values"].shape[axis] for part in parts) for axis in (1, 3, 4)]

        def fill(values: Tensor) -> Tensor:
            images, height, width = (want - have for want, have in zip(most, (values.shape[1], *values.shape[-2:])))
            middle = (0, 0) if values.dim() == 5 else ()
            return torch.nn.functional.pad(values, (0, width, 0, height, *middle, 0, images))

        keys = [key for key in parts[0] if key in ("pixel_values", "pixel_attention_mask")]
        return {key: torch.cat([fill(part[key]) for part in parts]) for key in keys}

    def drop_image(self, input_ids: Tensor) -> Tensor:
        keep, runs = super().drop_image(input_ids), self.runs(input_ids)
        # No id of the configuration says what the mark is; it is what stands two tokens before every run.
        ids = input_ids.tolist()
        mark = ids[runs[0][0] - 2] if runs and runs[0][0] >= 2 else None
        written = mark is not None and ids[runs[-1][1] : runs[-1][1] + 1] == [mark]
        if not written or any(ids[start - 2] != mark for start, _ in runs):
            # Not as the processor writes it.
            return keep
        for (start, stop), after in zip(runs, [*(start - 2 for start, _ in runs[1:]), None]):
            keep[start - 2 : start] = False
            if after is None or (ids[stop] == mark and stop != after):
                keep[stop] = False
            else:
                keep[stop:after] = False
        return keep

    def projector(self) -> torch.nn.Module:
        return self.model.model.connector

    def _split(self, out: Any) -> list[Encoded]:
        # The model joins the images of a row; each has as many tokens as the connector leaves.
        sizes = self.config.vision_config
        length = (sizes.image_size // sizes.patch_size // self.config.scale_factor) ** 2
        return [Encoded(image) for row in vision.features_of(out) for image in row.split(length) if len(image)]

    def tie_noise(self, noise: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        return self._real(noise, pixels)

    def edit_pictures(self, edit: Callable[[Tensor], Tensor], pixels: Tensor, vision: dict[str, Tensor]) -> Tensor:
        return self._real(lambda real: super(Idefics, self).edit_pictures(edit, real, vision), pixels)

    @staticmethod
    def _real(edit: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """``edit`` the images that are not padding: an edited empty image would count as one more picture."""
        real = pixels.flatten(2).any(-1)
        out = pixels.clone()
        out[real] = edit(pixels[real])
        return out

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return (0.5,) * 3, (0.5,) * 3
