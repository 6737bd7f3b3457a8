"""The data that ships with lvlm_decode: emoji scenes with ground truth, two small trained models, synonyms.

>>> import lvlm_decode_data
>>> scenes = lvlm_decode_data.load_scenes()            # 500 held-out scenes; scene.path, scene.categories, scene.counts
>>> model_dir = lvlm_decode_data.tiny_path("tiny-llava")

Nothing here imports torch, so evaluators may use it.
"""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

from .scenes import CATEGORIES, COLOURS, SIZE, Scene, SceneObject, render, scene_seed

__all__ = [
    "CATEGORIES",
    "COLOURS",
    "SIZE",
    "Scene",
    "SceneObject",
    "is_tiny",
    "load_scenes",
    "render",
    "scene_seed",
    "synonyms",
    "tiny_path",
]

HERE = Path(__file__).resolve().parent
TINY_MODELS = ("tiny-llava", "tiny-instructblip")


@functools.cache
def _shipped(split: str) -> tuple[Scene, ...]:
    folder = HERE / split
    truth = folder / "scenes.json.gz"
    if not truth.is_file():
        raise ValueError(
            f"no scenes of split {split!r} ship with the package; 'heldout' does, others render() on demand"
        )
    records = json.loads(gzip.decompress(truth.read_bytes()))["scenes"]
    return tuple(Scene.from_json(record, folder) for record in records)


def load_scenes(split: str = "heldout") -> list[Scene]:
    """The scenes that ship as files, in order of image id.

    Each has ``path`` (a JPEG of SIZE x SIZE pixels), ``image_id``, ``theme``, ``objects``, ``categories``, ``counts``.
    Raises ValueError for a split that does not ship; training and validation scenes are rendered from their seeds.
    """
    return list(_shipped(split))


@functools.cache
def _synonyms() -> dict[str, tuple[str, ...]]:
    table = json.loads((HERE / "synonyms.json").read_text(encoding="utf-8"))
    return {name: tuple(words) for name, words in table.items()}


def synonyms() -> dict[str, list[str]]:
    """Category name -> words that mean it (the name itself first, plurals included), for CHAIR on emoji scenes."""
    return {name: list(words) for name, words in _synonyms().items()}


def is_tiny(model: str) -> bool:
    """Whether a model is one of the small ones that ship, by name ("tiny" is "tiny-llava") or by its folder.

    Others of like names (a hub id such as bczhou/tiny-llava-v1-hf) are not.
    """
    if model in ("tiny", *TINY_MODELS):
        return True
    return Path(model).is_dir() and Path(model).resolve() in [HERE / name for name in TINY_MODELS]


def tiny_path(name: str) -> Path:
    """Folder of a small model that ships with the package, ready for ``from_pretrained``.

    Raises ValueError for an unknown name and FileNotFoundError when the weights are not there.
    """
    if name not in TINY_MODELS:
        raise ValueError(f"unknown small model {name!r}; choose one of {', '.join(TINY_MODELS)}")
    folder = HERE / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model; run, from the root of a checkout: python -m tools.small_models {name}"
        )
    return folder
