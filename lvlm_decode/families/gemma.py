"""Gemma 3 and PaliGemma: attention is bidirectional inside an image, or over the whole prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Family


class Gemma3(Family):
    """Image tokens stand between begin and end markers and see each other both ways."""

    encoder_inputs = ("pixel_values",)
    has_cls = False

    def drop_image(self, input_ids: Tensor) -> Tensor:
        marks = (self.image_token_id, self.config.boi_token_index, self.config.eoi_token_index)
        return ~torch.isin(input_ids, input_ids.new_tensor(marks))


class PaliGemma(Family):
    """The prompt is a bidirectional prefix (token type 0); what is generated is causal (type 1)."""

    encoder_inputs = ("pixel_values",)
    has_cls = False
