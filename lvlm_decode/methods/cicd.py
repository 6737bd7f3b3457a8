"""Cross-Image Contrastive Decoding (Zhao et al., 2025; arXiv 2505.10634).

    D = 1/2 KL(M || softmax l(image)) + 1/2 KL(M || softmax l(another image)),  M their mean, at most 1 nat
    D > threshold:   scores = (1 + a) * l(image) - a * l(another image),   a = min(alpha, 1 - log10 D)
    otherwise:       scores = l(image)          where the two images agree, the language prior is needed

Follows the authors' code (github.com/ZhQingan/CICD, 2effda0), in its form of D too: of the Jensen-Shannon divergence the two
arguments are exchanged. Alpha 3 and threshold 0.0001 are its numbers (0.1 in its parser for Qwen2.5-VL); beta is 0.1 for captions
and 0.25 for questions in its script. The other image is drawn at random from a folder, as in their preprocessing, or is the
least similar one by CLIP, which is not here: give it as the only one. Their draw may meet the sample's own image, which here is
passed over. They process the other image on its own; here it fills the sample's picture, cut at its edges: what a processor with
one square does, and on models with tiles or a resolution of their own the sample's grid stays. Each tile shows it whole, and so
does each of several images and frames. Rows without an image are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..engine.samples import Sample
from ..errors import InputError, MissingFileError
from ..method import Contrast, Step, View

#: Names of pictures in a folder end so.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
#: Pictures that differ by less than this share of the range, on average, are one picture.
SAME = 0.01


@dataclass(frozen=True)
class CICD(Contrast):
    """Subtracts the predictions for an unrelated image.

    Args:
        images: The pool that the unrelated image is drawn from: a folder of pictures, a picture's path, or several paths.
        alpha: Most that is subtracted, at least 0; it is less the more the predictions differ.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        threshold: Divergence in nats above which the two predictions are contrasted, at least 0.
    """

    name: ClassVar[str] = "cicd"
    paper: ClassVar[str] = "Cross-Image Contrastive Decoding (Zhao et al., 2025)"
    arxiv: ClassVar[str] = "2505.10634"
    aliases: ClassVar[dict[str, str]] = {**Contrast.aliases, "cross_jsd_th": "threshold"}
    costs: ClassVar[tuple[str, ...]] = ("image",)

    images: str | Path | tuple[str | Path, ...] | None = None
    alpha: float = 3.0
    beta: float | None = 0.1
    threshold: float = 1e-4

    def __post_init__(self) -> None:
        self.check(
            bool(self.images), "images", "a folder of pictures, or the paths of some, to draw an unrelated one from"
        )
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(self.threshold >= 0, "threshold", "at least 0")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if not sample.has_image:
            return [sample.as_view()]
        assert self.images is not None
        pool = pictures_of(self.images)
        order = torch.randperm(len(pool), generator=rng).tolist()
        # The weight says that there is another image; what it weighs is decided for every token.
        return [sample.with_pictures(another([pool[number] for number in order]), weight=1.0)]

    def combine(self, step: Step) -> Tensor:
        main, other = step.logits
        differ = divergence(main, other)
        strength = (1 - differ.log10()).clamp(max=self.alpha)
        strength = torch.where(differ > self.threshold, strength, 0.0)[..., None]
        (weight,) = step.weights
        there = weight.to(main)[:, None, None] if isinstance(weight, Tensor) else weight
        return main + there * strength * (main - other)

    def choices(self, step: Step) -> dict[str, Tensor]:
        return {"divergence of the unrelated image's prediction": divergence(*step.logits)}


def divergence(main: Tensor, other: Tensor) -> Tensor:
    """(...) how the mean of two predictions differs from each, in nats, at most 1, of logits (..., N)."""
    mean = (main.softmax(-1) + other.softmax(-1)) / 2
    parts = [F.kl_div(logits.log_softmax(-1), mean, reduction="none").sum(-1) for logits in (main, other)]
    return ((parts[0] + parts[1]) / 2).clamp(max=1.0)


def pictures_of(given: str | Path | tuple[str | Path, ...]) -> tuple[Path, ...]:
    """The pictures of a pool, those of a folder by name.

    Raises:
        MissingFileError: no such file or folder.
        InputError: a folder without pictures.
    """
    found: list[Path] = []
    for path in map(Path, given if isinstance(given, tuple) else (given,)):
        if not path.exists():
            raise MissingFileError(f"cicd: images {path} is missing; give a folder of pictures, or the paths of some.")
        own = [path]
        if path.is_dir():
            own = sorted(one for one in path.iterdir() if one.suffix.lower() in SUFFIXES)
        if not own:
            raise InputError(f"cicd: the folder {path} holds no picture ({', '.join(SUFFIXES)}); give one that does.")
        found += own
    return tuple(found)


def another(pool: list[Path]) -> Callable[[Tensor], Tensor]:
    """An edit that puts the first picture of a pool that is not among them in the place of pictures (..., 3, H, W)."""

    def edit(pictures: Tensor) -> Tensor:
        for path in pool:
            picture = filling(path, pictures.shape[-2], pictures.shape[-1]).to(pictures)
            if bool(((pictures - picture).abs().mean((-3, -2, -1)) >= SAME).all()):
                return picture.expand_as(pictures)
        raise InputError(
            f"cicd: none of the {len(pool)} pictures of the pool is another than the sample's own; give more in images."
        )

    return edit


def filling(path: Path, height: int, width: int) -> Tensor:
    """(3, height, width) the middle of a picture, with values in [0, 1], resized so that it fills them.

    Raises:
        InputError: a file that is no picture.
    """
    try:
        with Image.open(path) as opened:
            values = np.array(opened.convert("RGB"))
    # What a reader of pictures raises is not only OSError: SyntaxError, ValueError, DecompressionBombError.
    except Exception as error:
        raise InputError(f"cicd: {path} cannot be read as a picture ({error}); take it out of images.") from error
    picture = torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255
    scale = max(height / picture.shape[-2], width / picture.shape[-1])
    size = [max(want, int(scale * have + 1e-6)) for want, have in zip((height, width), picture.shape[-2:])]
    picture = F.interpolate(picture, size, mode="bicubic", antialias=True).clamp(0, 1)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return picture[:, top : top + height, left : left + width]
