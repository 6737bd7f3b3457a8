"""The plug-in for lmms-eval: its entry point ``lmms_eval.models`` finds :func:`manifests`.

    lmms-eval --model lvlm_decode --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=vcd,alpha=1.0 --tasks pope

lmms-eval calls :func:`manifests` whenever it starts, for any model, so this module imports neither torch nor the model class.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval must know of the model ``lvlm_decode``: its name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("lvlm_decode", chat_class_path="lvlm_decode.lmms_eval.model.LvlmDecode")]
