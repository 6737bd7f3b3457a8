"""InternVL: two by two patches are merged into one image token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Family

#: What its processor normalises by: ImageNet's statistics.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InternVL(Family):
    """Its encoder has a CLS token, but no token of the prompt is one patch, so none can be picked by CLS attention.

    The words around an image are no ids of the configuration; they stay in a prompt whose image is taken out.
    """

    has_cls = False

    def vision_layers(self) -> list[torch.nn.Module]:
        return list(self.model.get_encoder(modality="image").encoder.layer)

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return MEAN, STD
