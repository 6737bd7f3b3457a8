"""Draft heads: the module, its loaders, and the heads that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError
from .module import CONFIG, KINDS, DraftHead, HeadConfig, Slots, fingerprint
from .published import from_state_dict, load

__all__ = ["KINDS", "DraftHead", "HeadConfig", "Slots", "fingerprint", "from_state_dict", "load", "shipped"]


def shipped(model: Any, kind: str) -> Path:
    """The folder of the head of ``kind`` that ships for ``model``, told by its language head.

    Raises:
        InputError: none ships for this model; says how to train one.
    """
    import lvlm_decode_data

    wanted = fingerprint(model)
    folders = sorted((lvlm_decode_data.HERE / "heads").glob(f"*/{CONFIG}"))
    for path in folders:
        config = HeadConfig.read(path)
        if config.kind == kind and config.fingerprint == wanted:
            return path.parent
    raise InputError(
        f"no {kind} head ships for this model ({getattr(model, 'name_or_path', '') or type(model).__name__}); train one "
        f"with: lvlm-decode train draft-head --kind {kind} --target MODEL, and pass it as drafter='{kind}(path=FOLDER)'."
    )
