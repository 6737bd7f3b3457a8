"""Learned parts of methods: safetensors files that say what they hold and for which model; low-rank additions to a decoder.

Those of the small LLaVA ship with the package and are found by the fingerprint of the model.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, ParameterError
from ..weights import read_safetensors
from .hf import decoder
from .hooks import replaced

if TYPE_CHECKING:
    from ..families.base import Family

#: The name of the description in a file's metadata.
ABOUT = "lvlm_decode"


def save(path: Path, kind: str, state: Mapping[str, Tensor], module: torch.nn.Module, about: Mapping[str, Any]) -> None:
    """Write the part ``kind`` of a method for the model ``module``; a kill leaves no half of a file.

    Args:
        about: how it was made, for people.
    """
    from safetensors.torch import save_file

    text = json.dumps({"kind": kind, "fingerprint": decoder.fingerprint(module), **about})
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    # A copy of its own each: safetensors stores no memory that two names share.
    save_file({name: value.detach().cpu().clone() for name, value in state.items()}, partial, metadata={ABOUT: text})
    os.replace(partial, path)


def about(path: Path) -> dict[str, Any]:
    """What a file says of itself; empty for one that was not written by :func:`save`.

    Raises:
        InputError: a description that is no JSON object, or without the part's kind and the model's fingerprint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(ABOUT)
    except (OSError, SafetensorError):
        # Who reads the tensors says what is wrong with the file.
        return {}
    return {} if text is None else said_in(text, path)


def said_in(text: str, path: str | Path) -> dict[str, Any]:
    """The description that :func:`save` wrote into the metadata of the file ``path``.

    Raises:
        InputError: no JSON object, or one without the part's kind and the model's fingerprint.
    """
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict) or not all(isinstance(said.get(name), str) for name in ("kind", "fingerprint")):
        raise InputError(
            f"{path} does not say what it holds and for which model (its description is damaged); make it again."
        )
    return said


@functools.cache
def _shipped() -> dict[tuple[str, str], Path]:
    """(kind, fingerprint) -> file."""
    import lvlm_decode_data

    found = {path: about(path) for path in sorted((lvlm_decode_data.HERE / "learned").glob("*/*.safetensors"))}
    return {(said["kind"], said["fingerprint"]): path for path, said in found.items()}


def shipped(family: Family, kind: str) -> Path | None:
    """The part that ships for the family's model, if one does."""
    module = family.decoding_module(family.model)
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if head is None or head.weight.is_meta:
        return None
    return _shipped().get((kind, decoder.fingerprint(module)))


def read(given: Mapping[str, Tensor] | str | Path, method: str, kind: str, family: Family) -> dict[str, Tensor]:
    """The tensors of a part, as they are given or from their file.

    Raises:
        InputError: a file that cannot be read.
        ParameterError: a file that holds another part, or one for another model. A file that says neither is taken.
    """
    if not isinstance(given, str | Path):
        return dict(given)
    said = about(Path(given))
    if said.get("kind", kind) != kind:
        raise ParameterError(f"{method}: {given} holds the part {said['kind']!r}; give the one named {kind!r}.")
    if "fingerprint" in said and said["fingerprint"] != decoder.fingerprint(family.decoding_module(family.model)):
        raise ParameterError(
            f"{method}: {given} was made for another model ({said.get('model', 'unknown')}); make one for this one with: "
            "lvlm-decode train negatives."
        )
    return read_safetensors(Path(given))


class LowRank:
    """A patch: linear layers of a decoder put out ``W x + up (down x)``, in calls made inside the block.

    Args:
        weights: ``{layer}.down`` (r, in) and ``{layer}.up`` (out, r), layers by their path in the decoder.
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str):
        self.weights, self.name = weights, name
        # Moved once to where a layer is.
        self._there: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @contextmanager
    def __call__(self, module: torch.nn.Module) -> Iterator[None]:
        layers = dict(decoder.decoder_of(module).named_modules())
        forwards: dict[torch.nn.Module, Callable[..., Any]] = {}
        for path in sorted({key.rpartition(".")[0] for key in self.weights}):
            layer, down, up = layers.get(path), self.weights.get(f"{path}.down"), self.weights.get(f"{path}.up")
            if (
                not isinstance(layer, torch.nn.Linear)
                or down is None
                or up is None
                or (down.shape[1:], up.shape[:1]) != ((layer.in_features,), (layer.out_features,))
            ):
                raise ParameterError(
                    f"{self.name}: the low-rank weights of {path!r} do not fit this model's decoder; give some that were "
                    "trained for it."
                )
            forwards[layer] = functools.partial(self._forward, layer, path)
        with replaced(forwards):
            yield

    def _forward(self, layer: torch.nn.Linear, path: str, x: Tensor) -> Tensor:
        down, up = (self._moved(f"{path}.{end}", layer.weight) for end in ("down", "up"))
        # The layer's own forward: `layer.forward` is what replaces it.
        return type(layer).forward(layer, x) + (x @ down.T) @ up.T

    def _moved(self, key: str, like: Tensor) -> Tensor:
        weight = self.weights[key]
        if weight.device == like.device and weight.dtype == like.dtype:
            return weight
        place = key, like.device, like.dtype
        if place not in self._there:
            self._there[place] = weight.to(like)
        return self._there[place]
