"""Calibrated vectors of steering methods: a safetensors file that knows for which model and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, ParameterError
from . import learned
from .hf import decoder

if TYPE_CHECKING:
    from ..families.base import Family
    from .run import Run

#: A file of vectors, or the tensor itself.
Given = Tensor | str | Path

#: The tensors' names in a file: of the decoder's layers, and of the vision encoder's.
TENSOR, VISUAL = "vectors", "visual"


def save(
    path: Path,
    kind: str,
    vectors: Tensor,
    module: torch.nn.Module,
    about: Mapping[str, Any],
    visual: Tensor | None = None,
) -> None:
    """Write vectors (L, D, ...) of the method ``kind`` for the model ``module``.

    Args:
        about: how they were made, for people.
        visual: (l, n, D) of the vision encoder's layers and tokens, of methods that steer it too.
    """
    tensors = {TENSOR: vectors} if visual is None else {TENSOR: vectors, VISUAL: visual}
    learned.save(path, kind, {name: tensor.contiguous() for name, tensor in tensors.items()}, module, about)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of vectors by name, and what is written about them.

    Raises:
        InputError: no such file, one that holds something else, or whose description is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = (file.metadata() or {}).get(learned.ABOUT)
            if about is None or TENSOR not in file.keys():
                raise InputError(f"{path} holds no vectors of lvlm-decode; make them with: lvlm-decode train vector.")
            return {name: file.get_tensor(name) for name in file.keys()}, learned.said_in(about, path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as a file of vectors: {error}; make it with: lvlm-decode train vector."
        ) from error


def layers_of(family: Family) -> dict[str, str | None]:
    """What a file of vectors says of the layers that it was made of: name -> fingerprint, of decoder and vision encoder."""
    module = family.decoding_module(family.model)
    found = {"layers": decoder.layers(module), "encoder": family.vision_layers()}
    return {name: decoder.layers_fingerprint(layers) for name, layers in found.items()}


def tensors_of(given: Given, kind: str, family: Family) -> dict[str, Tensor]:
    """The tensors that are given for a method, by name; one that is no file is the decoder's.

    Raises:
        InputError: a file that cannot be read.
        ParameterError: vectors of another method or model, or of one with the same head and other layers. A file that says
            nothing of the layers is taken, and so is any where they are quantized.
    """
    if isinstance(given, Tensor):
        return {TENSOR: given}
    tensors, about = load(given)
    if about["kind"] != kind:
        raise ParameterError(f"{kind}: {given} holds vectors of {about['kind']}; give those of {kind}.")
    module = family.decoding_module(family.model)
    own = {"fingerprint": decoder.fingerprint(module), **layers_of(family)}
    if any(None not in (about.get(name), value) and about[name] != value for name, value in own.items()):
        raise ParameterError(
            f"{kind}: {given} was made for another model ({about.get('model', 'unknown')}); make vectors for this one "
            f"with: lvlm-decode train vector --kind {kind}."
        )
    return tensors


def visual_for(family: Family, kind: str, given: Given) -> Tensor:
    """(l, n, D) the visual direction of a method for the vision encoder of a family's model.

    Raises:
        InputError: a file that cannot be read.
        ParameterError: vectors of another method or model, or without a visual direction.
    """
    tensors = tensors_of(given, kind, family)
    if VISUAL not in tensors:
        raise ParameterError(
            f"{kind}: the vectors have no visual direction; make a file with: lvlm-decode train vector --kind {kind}, or leave "
            "image at 0."
        )
    return tensors[VISUAL].to(family.model.device)


def vectors_for(run: Run, kind: str, given: Given, dimensions: int) -> Tensor:
    """(L, D, ...) the vectors of a method for the model of ``run``.

    Raises:
        InputError: a file that cannot be read.
        ParameterError: vectors of another method or model, or of another shape.
    """
    vectors = tensors_of(given, kind, run.family)[TENSOR]
    shape = (decoder.layer_count(run.module), decoder.width(run.module))
    if vectors.dim() != dimensions or tuple(vectors.shape[:2]) != shape:
        raise ParameterError(
            f"{kind}: the vectors are {tuple(vectors.shape)}, and this model needs {shape} (layers, width)"
            f"{' and a number of directions' if dimensions == 3 else ''}; give vectors that were made for it."
        )
    return vectors.to(run.device)
