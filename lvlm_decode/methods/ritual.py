"""RITUAL: random image transformations as a universal anti-hallucination lever (Woo et al., arXiv 2405.17821).

    scores = l(image) + alpha * l(transformed image)

One of six transformations is drawn per sample and kept for the answer. The weights sum to 1 + alpha = 4: with an identity
transformation this is plain decoding at temperature 0.25 under the mask, so compare it with that control, not with
sampling at temperature 1.

The authors transform the picture before the processor; ``generate()`` sees pixels after it, so here the normalisation is
undone, the picture is transformed at the model's resolution and normalised again. Blur and crop therefore act on the
resized picture, and the blur's sigma is scaled by the picture's height over 336, the size the authors crop to. Families
that cut a picture into tiles (LLaVA-NeXT, LLaVA-OneVision, Idefics3, SmolVLM) get each tile transformed where it is. The
authors have no videos; here all frames of a video get the same transformation, with the same draw.

A row of a batch without an image has nothing to transform: both views are the same and it scores (1 + alpha) * l.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.samples import Sample
from ..method import Contrast, View

#: Height the authors' blur and crop are stated for.
REFERENCE_HEIGHT = 336


def _uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def _choice(rng: torch.Generator, n: int) -> int:
    return int(torch.randint(n, (), generator=rng))


def horizontal_flip(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Mirrored left to right."""
    return pixels.flip(-1)


def vertical_flip(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Mirrored top to bottom."""
    return pixels.flip(-2)


def rotation(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Rotated about the centre by U(-180, 180) degrees, nearest pixel, corners black."""
    from torchvision.transforms.v2 import functional as F

    return F.rotate(pixels, _uniform(rng, -180, 180), fill=0.0)


def _adjusted(adjust: Callable[[Tensor, float], Tensor], factor: float, pixels: Tensor) -> Tensor:
    return adjust(pixels, factor)


def color_jitter(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation by U(0, 2) and hue by U(-0.5, 0.5), in random order."""
    from torchvision.transforms.v2 import functional as F

    steps: list[Callable[[Tensor], Tensor]] = []
    for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
        steps.append(functools.partial(_adjusted, adjust, _uniform(rng, 0, 2)))
    steps.append(functools.partial(_adjusted, F.adjust_hue, _uniform(rng, -0.5, 0.5)))
    for i in torch.randperm(len(steps), generator=rng).tolist():
        pixels = steps[i](pixels)
    return pixels


def gaussian_blur(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Blurred with a 13 x 13 kernel, sigma U(1.5, 2.0) at a height of 336 pixels."""
    from torchvision.transforms.v2 import functional as F

    scale = pixels.shape[-2] / REFERENCE_HEIGHT
    reach = max(1, round(6 * scale))
    # Reflection at the border cannot reach further than the picture.
    reach = min(reach, pixels.shape[-2] - 1, pixels.shape[-1] - 1)
    return F.gaussian_blur(pixels, [2 * reach + 1] * 2, [_uniform(rng, 1.5, 2.0) * scale] * 2)


def crop(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """A random part, area U(0.08, 1), aspect log-uniform in (3/4, 4/3), resized to the whole."""
    from torchvision.transforms.v2 import functional as F

    height, width = pixels.shape[-2:]
    for _ in range(10):
        area = height * width * _uniform(rng, 0.08, 1.0)
        aspect = math.exp(_uniform(rng, math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = _choice(rng, height - h + 1), _choice(rng, width - w + 1)
            return F.resized_crop(pixels, top, left, h, w, [height, width], antialias=True)
    side = min(height, width)
    return F.resize(F.center_crop(pixels, [side, side]), [height, width], antialias=True)


TRANSFORMS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "horizontal_flip": horizontal_flip,
    "vertical_flip": vertical_flip,
    "rotation": rotation,
    "color_jitter": color_jitter,
    "gaussian_blur": gaussian_blur,
    "crop": crop,
}


@dataclass(frozen=True)
class RITUAL(Contrast):
    """Adds the predictions for a randomly transformed copy of the image.

    Args:
        alpha: Weight of the transformed view, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        transform: Name of one of ``TRANSFORMS``, or ``random`` for one drawn per sample.
    """

    name: ClassVar[str] = "ritual"
    paper: ClassVar[str] = "RITUAL (Woo et al., 2024)"
    arxiv: ClassVar[str] = "2405.17821"
    costs: ClassVar[tuple[str, ...]] = ("image",)

    alpha: float = 3.0
    beta: float | None = 0.1
    transform: str = "random"

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(
            self.transform == "random" or self.transform in TRANSFORMS,
            "transform",
            f"'random' or one of {', '.join(TRANSFORMS)}",
        )
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        names = list(TRANSFORMS)
        drawn = names[_choice(rng, len(names))] if self.transform == "random" else self.transform

        def transformed(pictures: Tensor) -> Tensor:
            return TRANSFORMS[drawn](pictures, rng).clamp(0, 1)

        return [sample.with_pictures(transformed, weight=self.alpha)]
