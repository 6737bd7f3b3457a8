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
does each of several images and frames. Rows without an image are left alone. ``cd_alpha`` of their command line is no name of
alpha, because their loop does not read it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ..engine.samples import Sample
from ..errors import InputError, MissingFileError
from ..method import Contrast, Step, View

#: Names of pictures in a folder end so.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
#: Pictures are compared at so many pixels a side; those that differ by less than this share of the range, on average, are one.
FEW, SAME = 8, 0.005


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
    aliases: ClassVar[dict[str, str]] = {"cd_beta": "beta", "cross_jsd_th": "threshold"}
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
    """The pictures of a pool, those of a folder by name; hidden files of a folder are none.

    Raises:
        MissingFileError: no such file or folder.
        InputError: a folder without pictures.
    """
    found: list[Path] = []
    for path in map(Path, given if isinstance(given, tuple) else (given,)):
        if not path.exists():
            raise MissingFileError(
                f"cicd: images {path} is missing; give a folder of pictures, or several paths as [a.png, b.png]."
            )
        own = [path]
        if path.is_dir():
            # macOS writes "._a.jpg" beside "a.jpg", which is no picture.
            shown = (one for one in path.iterdir() if not one.name.startswith("."))
            own = sorted(one for one in shown if one.suffix.lower() in SUFFIXES)
        if not own:
            raise InputError(f"cicd: the folder {path} holds no picture ({', '.join(SUFFIXES)}); give one that does.")
        found += own
    return tuple(found)


def another(pool: list[Path]) -> Callable[[Tensor], Tensor]:
    """An edit that puts the first picture of a pool that is not among them in the place of pictures (..., 3, H, W).

    Files that cannot be read are passed over with a warning.
    """

    def edit(pictures: Tensor) -> Tensor:
        unread: list[InputError] = []
        for path in pool:
            try:
                turned, stored = read(path)
            except InputError as error:
                unread.append(error)
                continue
            if not shows(pictures, turned) and (stored is turned or not shows(pictures, stored)):
                for one in unread:
                    warnings.warn(f"{one} Another picture takes its place.", stacklevel=2)
                return filling(turned, pictures.shape[-2], pictures.shape[-1]).to(pictures).expand_as(pictures)
        if unread:
            rest = f" So it is for {len(unread)} of {len(pool)} pictures, and the rest are the sample's own."
            raise InputError(str(unread[0]) + rest) from unread[0]
        raise InputError(
            f"cicd: none of the {len(pool)} pictures of the pool is another than the sample's own; give more in images."
        )

    return edit


def read(path: Path) -> tuple[Tensor, Tensor]:
    """(3, h, w) a picture the way up that its camera noted, and as the file holds it; values are in [0, 1].

    Raises:
        InputError: a file that is no picture.
    """
    try:
        with Image.open(path) as opened:
            stored = opened.convert("RGB")
            turned = ImageOps.exif_transpose(stored)
    # What a reader of pictures raises is not only OSError: SyntaxError, ValueError, DecompressionBombError.
    except Exception as error:
        raise InputError(f"cicd: {path} cannot be read as a picture ({error}); take it out of images.") from error

    def values(picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255

    upright = values(turned)
    return upright, values(stored) if stored.getexif().get(ExifTags.Base.Orientation, 1) != 1 else upright


def shows(pictures: Tensor, picture: Tensor) -> bool:
    """Whether one of (..., 3, H, W) is ``picture`` (3, h, w): squashed, cut at its edges, or with a margin around it.

    These are the ways in which processors bring a picture to a size; what they cut it into has the whole one beside it.
    Both are compared in a few pixels, which their ways of resizing leave alike.
    """

    def few(values: Tensor) -> Tensor:
        return F.interpolate(values.reshape(-1, *values.shape[-3:]), (FEW, FEW), mode="bilinear", antialias=True)

    cut, framed = middle(picture, *pictures.shape[-2:]), middle(pictures, *picture.shape[-2:])
    pairs = [(pictures, picture), (pictures, cut), (framed, picture)]
    return any(bool(((few(ours) - few(theirs).to(ours)).abs().mean((1, 2, 3)) < SAME).any()) for ours, theirs in pairs)


def middle(picture: Tensor, height: int, width: int) -> Tensor:
    """The largest middle part of pictures (..., h, w) whose sides are as ``height`` to ``width``."""
    own = picture.shape[-2:]
    scale = min(own[0] / height, own[1] / width)
    size = max(1, round(scale * height)), max(1, round(scale * width))
    top, left = (own[0] - size[0]) // 2, (own[1] - size[1]) // 2
    return picture[..., top : top + size[0], left : left + size[1]]


def filling(picture: Tensor, height: int, width: int) -> Tensor:
    """(3, height, width) the middle of a picture (3, h, w), resized so that it fills them."""
    scale = max(height / picture.shape[-2], width / picture.shape[-1])
    size = [max(want, int(scale * have + 1e-6)) for want, have in zip((height, width), picture.shape[-2:])]
    picture = F.interpolate(picture[None], size, mode="bicubic", antialias=True).clamp(0, 1)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return picture[:, top : top + height, left : left + width]
