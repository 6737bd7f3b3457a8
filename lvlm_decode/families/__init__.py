"""FAMILIES: ``config.model_type`` -> "module:Class"; what is peculiar to a model family, most need nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..engine.hf import require_model
from ..errors import UnsupportedError
from ..plugins import Plugin, plugins

if TYPE_CHECKING:
    import torch

    from .base import Family

FAMILIES: dict[str, str] = {
    "llava": ".base:Family",
    "llava_next": ".llava:LlavaNext",
    "llava_onevision": ".llava:LlavaOnevision",
    "instructblip": ".instructblip:InstructBlip",
    "qwen2_vl": ".qwen:QwenVL",
    "qwen2_5_vl": ".qwen:QwenVL",
    "qwen3_vl": ".qwen:QwenVL",
    "qwen3_vl_moe": ".qwen:QwenVL",
    "smolvlm": ".idefics:Idefics",
    "idefics3": ".idefics:Idefics",
    "internvl": ".internvl:InternVL",
    "gemma3": ".gemma:Gemma3",
    "paligemma": ".gemma:PaliGemma",
}


def foreign() -> dict[str, Plugin]:
    """The families that other packages bring, by model type."""
    return plugins("lvlm_decode.families", frozenset(FAMILIES))


def names() -> list[str]:
    """The model types of all families, this library's own first."""
    return [*FAMILIES, *foreign()]


def families() -> list[type[Family]]:
    """The adapters of all families that are known."""
    return [adapter(name) for name in names()]


def adapter(model_type: str) -> type[Family]:
    """The adapter class of a registered family, or of one that another package brings."""
    if model_type not in FAMILIES:
        return foreign()[model_type].load("Family")
    module, name = FAMILIES[model_type].split(":")
    return getattr(importlib.import_module(module, __name__), name)


def family_of(model: torch.nn.Module) -> Family:
    """The adapter of ``model``'s family.

    Raises:
        UnsupportedError: ``config.model_type`` is not in ``FAMILIES``.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in names():
        raise UnsupportedError(
            f"model family {model_type!r} is not supported; supported are {', '.join(sorted(names()))}. If this is "
            "the language model inside an LVLM, attach to the LVLM itself; of a new family, pass its adapter: "
            "attach(model, method, family=MyFamily)."
        )
    require_model(model_type)
    return adapter(model_type)(model)
