"""Calibrated vectors of steering methods: a safetensors file that knows for which model and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, ParameterError
from . import learned
from .hf import decoder

if TYPE_CHECKING:
    from .run import Run

#: A file of vectors, or the tensor itself.
Given = Tensor | str | Path

#: The tensor's name in a file.
TENSOR = "vectors"


def save(path: Path, kind: str, vectors: Tensor, module: torch.nn.Module, about: Mapping[str, Any]) -> None:
    """Write vectors (L, D, ...) of the method ``kind`` for the model ``module``.

    Args:
        about: how they were made, for people.
    """
    learned.save(path, kind, {TENSOR: vectors.contiguous()}, module, about)


def load(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """The vectors of a file and what is written about them.

    Raises:
        InputError: no such file, or one that holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = (file.metadata() or {}).get(learned.ABOUT)
            if about is None or TENSOR not in file.keys():
                raise InputError(f"{path} holds no vectors of lvlm-decode; make them with: lvlm-decode train vector.")
            return file.get_tensor(TENSOR), json.loads(about)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as a file of vectors: {error}; make it with: lvlm-decode train vector."
        ) from error


def vectors_for(run: Run, kind: str, given: Given, dimensions: int) -> Tensor:
    """(L, D, ...) the vectors of a method for the model of ``run``.

    Raises:
        InputError: a file that cannot be read.
        ParameterError: vectors of another method or model, or of another shape.
    """
    if isinstance(given, Tensor):
        vectors = given
    else:
        vectors, about = load(given)
        if about["kind"] != kind:
            raise ParameterError(f"{kind}: {given} holds vectors of {about['kind']}; give those of {kind}.")
        if about["fingerprint"] != decoder.fingerprint(run.module):
            raise ParameterError(
                f"{kind}: {given} was made for another model ({about.get('model', 'unknown')}); make vectors for this one "
                f"with: lvlm-decode train vector --kind {kind}."
            )
    shape = (decoder.layer_count(run.module), decoder.width(run.module))
    if vectors.dim() != dimensions or tuple(vectors.shape[:2]) != shape:
        raise ParameterError(
            f"{kind}: the vectors are {tuple(vectors.shape)}, and this model needs {shape} (layers, width)"
            f"{' and a number of directions' if dimensions == 3 else ''}; give vectors that were made for it."
        )
    return vectors.to(run.device)
