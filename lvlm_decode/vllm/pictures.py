"""How a sample of each family travels to vLLM: its prompt with one placeholder per image, and its pictures.

vLLM expands a placeholder itself and runs the vision tower. A picture that no view edits is sent as it came, so that vLLM
processes and encodes it once for all views that show it; edited pixels are sent as an array that the image processor is told to
leave alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.samples import Sample
from ..errors import UnsupportedError
from ..families.base import Family
from ..families.qwen import QwenVL

#: What an image processor is told about pixels that are normalised already.
UNTOUCHED = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_convert_rgb": False}


class Pictures:
    """LLaVA: every image takes the same number of placeholders, and features may take any number.

    Args:
        family: the model's adapter.
    """

    #: What else its image processor is told about processed pixels.
    untouched: ClassVar[dict[str, Any]] = {**UNTOUCHED, "do_center_crop": False}
    #: The embeddings of a whole prompt say all that the language model needs.
    embeds = True

    def __init__(self, family: Family):
        self.family = family

    def counts(self, sample: Sample) -> list[int]:
        """Placeholders of each image."""
        images = len(sample.vision["pixel_values"])
        return [int((sample.input_ids == self.family.image_token_id).sum()) // images] * images

    def ids(self, sample: Sample) -> list[int]:
        """The prompt of a view, with one placeholder for each of its images."""
        ids = sample.input_ids
        if not sample.has_image:
            return ids.tolist()
        places = (ids == self.family.image_token_id).nonzero().flatten()
        keep = torch.ones_like(ids, dtype=torch.bool)
        keep[places] = False
        starts = torch.tensor([0, *self.counts(sample)[:-1]]).cumsum(0)
        keep[places[starts]] = True
        return ids[keep].tolist()

    def pixels(self, sample: Sample) -> list[Any]:
        """The processed pictures of a view as vLLM takes them: numpy, because tensors would be read as features."""
        return [picture.numpy() for picture in self.pictures(sample.vision)]

    def pictures(self, vision: dict[str, Tensor]) -> Sequence[Tensor]:
        """(3, H, W) of each image."""
        return list(vision["pixel_values"])


class QwenPictures(Pictures):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches are put together to pictures, which the processor takes apart again."""

    untouched: ClassVar[dict[str, Any]] = UNTOUCHED
    # Positions of image rows and, in Qwen3-VL, deeper layers depend on more than the embeddings.
    embeds = False

    def counts(self, sample: Sample) -> list[int]:
        counts = self.family.tokens_per_image(sample.vision)
        assert counts is not None
        return counts

    def pictures(self, vision: dict[str, Tensor]) -> Sequence[Tensor]:
        found, at = [], 0
        assert isinstance(self.family, QwenVL)
        for frames, height, width in vision["image_grid_thw"].tolist():
            own = vision["pixel_values"][at : at + frames * height * width]
            at += len(own)
            found.append(self.family.picture(own, height, width))
        return found


#: ``config.model_type`` -> how its samples travel: the families whose tokens in vLLM were compared with transformers.
PICTURES: dict[str, type[Pictures]] = {
    "llava": Pictures,
    "qwen2_vl": QwenPictures,
    "qwen2_5_vl": QwenPictures,
    "qwen3_vl": QwenPictures,
}


def pictures_of(family: Family) -> Pictures:
    """How the samples of a family travel.

    Raises:
        UnsupportedError: a family whose tokens in vLLM were not compared.
    """
    kind = family.config.model_type
    if kind not in PICTURES:
        raise UnsupportedError(
            f"model family {kind!r} is not served by lvlm_decode.vllm; served are {', '.join(PICTURES)}. Use "
            "lvlm_decode.attach on the model in transformers."
        )
    return PICTURES[kind](family)
