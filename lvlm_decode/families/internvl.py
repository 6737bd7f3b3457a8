"""InternVL: two by two patches are merged into one image token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Family

#: What its processor normalises by: ImageNet's statistics.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InternVL(Family):
    """Its encoder has a CLS token, but no token of the prompt is one patch, so none can be picked by CLS attention.

    The processor puts a begin and an end marker around every image, which go with an image that is taken out. Frames of a video
    are images here, and the words before each ("Frame1: ") stay.
    """

    has_cls = False
    has_grid = False

    def drop_image(self, input_ids: Tensor) -> Tensor:
        keep, runs = super().drop_image(input_ids), self.runs(input_ids)
        # No id of the configuration says what the markers are; they are the same around every image.
        around = {
            (*input_ids[start - 1 : start].tolist(), *input_ids[stop : stop + 1].tolist()) for start, stop in runs
        }
        if len(around) == 1 and len(set(*around)) == 2:
            for start, stop in runs:
                keep[start - 1], keep[stop] = False, False
        return keep

    def vision_layers(self) -> list[torch.nn.Module]:
        return list(self.model.get_encoder(modality="image").encoder.layer)

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return MEAN, STD
