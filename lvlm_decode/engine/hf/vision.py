"""Encoded images and videos as transformers hands them from the vision encoder to the language model."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: What transformers calls the kinds of what a vision encoder puts out.
IMAGE, VIDEO = "image", "video"
KINDS = (IMAGE, VIDEO)
#: Kind -> the input that holds its pixels.
PIXELS = {IMAGE: "pixel_values", VIDEO: "pixel_values_videos"}


@dataclass(frozen=True)
class Encoded:
    """One image or one video as the language model receives it.

    Args:
        features: (n, D) projected features, one per placeholder.
        deep: per extra layer (n, D), for families that also feed features into deeper layers (Qwen3-VL).
        kind: ``IMAGE`` or ``VIDEO``.
    """

    features: Tensor
    deep: tuple[Tensor, ...] = ()
    kind: str = IMAGE


def features_of(output: Any) -> Any:
    """What the encoder put out for the language model: a tensor, or a list with one per image."""
    return output.pooler_output


def unpack(output: Any, kind: str = IMAGE) -> list[Encoded]:
    """The images or videos in what ``get_image_features`` or ``get_video_features`` returned, in order."""
    features = list(output.pooler_output)
    layers = getattr(output, "deepstack_features", None)
    if layers is None:
        return [Encoded(f, kind=kind) for f in features]
    sizes = [len(f) for f in features]
    split = [torch.split(layer, sizes) if isinstance(layer, Tensor) else layer for layer in layers]
    return [Encoded(f, tuple(layer[i] for layer in split), kind) for i, f in enumerate(features)]


def pack(images: Sequence[Encoded], template: Any) -> Any:
    """Images, or videos, as an output of ``get_image_features``; a fresh object, for ``generate()`` mutates it.

    Args:
        images: all of one kind.
        template: an output of the same model and kind, whose other fields and types are followed.
    """
    out = copy.copy(template)
    features = [image.features for image in images]
    if images[0].kind == VIDEO and isinstance(template.pooler_output, Tensor):
        out.pooler_output = _in_a_row(features)
    elif isinstance(template.pooler_output, Tensor) and len({f.shape for f in features}) == 1:
        out.pooler_output = torch.stack(features)
    else:
        out.pooler_output = features
    if getattr(template, "deepstack_features", None) is not None:
        layers = list(zip(*[image.deep for image in images]))
        whole = isinstance(template.deepstack_features[0], Tensor)
        out.deepstack_features = [torch.cat(layer) if whole else list(layer) for layer in layers]
    return out


def repeated(output: Any, index: Tensor) -> Any:
    """The encoder's output for images ``index`` (n,) of those it ran on."""
    output.last_hidden_state = output.last_hidden_state[index]
    if output.pooler_output is not None:
        output.pooler_output = output.pooler_output[index]
    return output


def no_images(width: int, device: torch.device) -> Any:
    """What stands for the encoder's output where there is no image: features (0, width)."""
    return type("NoImages", (), {"pooler_output": torch.empty(0, width, device=device)})


def _in_a_row(features: Sequence[Tensor]) -> Tensor:
    """(1, n, D) features of several videos (n_i, D): their tensor is flattened where it is used, and lengths may differ."""
    return torch.cat(list(features))[None]


def merge(outputs: Sequence[Any], kind: str = IMAGE) -> Any:
    """The encoded images, or videos, of several batches in row order, as one output."""
    out = copy.copy(outputs[0])
    features = [output.pooler_output for output in outputs]
    if kind == VIDEO and all(isinstance(f, Tensor) for f in features):
        out.pooler_output = _in_a_row([f.flatten(0, 1) for f in features])
    elif all(isinstance(f, Tensor) for f in features) and len({f.shape[1:] for f in features}) == 1:
        out.pooler_output = torch.cat(features)
    else:
        out.pooler_output = [image for f in features for image in f]
    layers = [getattr(output, "deepstack_features", None) for output in outputs]
    if layers[0] is not None:
        out.deepstack_features = [
            torch.cat(layer) if isinstance(layer[0], Tensor) else [image for own in layer for image in own]
            for layer in zip(*layers)
        ]
    return out


def tiles_of(size: Sequence[int], pinpoints: Sequence[Sequence[int]], tile: int) -> int:
    """How many crops LLaVA-NeXT makes of an image of ``size`` (height, width), the small whole image included.

    Args:
        pinpoints: the resolutions its processor chooses from.
        tile: side of a crop in pixels.
    """
    module = importlib.import_module("transformers.models.llava_next.modeling_llava_next")
    return module.image_size_to_num_patches(image_size=size, grid_pinpoints=pinpoints, patch_size=tile)
