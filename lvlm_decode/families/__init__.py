"""FAMILIES: ``config.model_type`` -> "module:Class"; what is peculiar to a model family, most need nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import UnsupportedError

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


def family_of(model: torch.nn.Module) -> Family:
    """The adapter of ``model``'s family.

    Raises:
        UnsupportedError: ``config.model_type`` is not in ``FAMILIES``.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    entry = FAMILIES.get(model_type)
    if entry is None:
        raise UnsupportedError(
            f"model family {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}. If this is "
            "the language model inside an LVLM, attach to the LVLM itself; a new family is one line in "
            "lvlm_decode.families.FAMILIES."
        )
    module, name = entry.split(":")
    return getattr(importlib.import_module(module, __name__), name)(model)
