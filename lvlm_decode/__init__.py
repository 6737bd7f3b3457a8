"""Decoding that keeps vision-language models from inventing what is not in the image.

    model = lvlm_decode.attach(model, lvlm_decode.VCD(alpha=1.0))
    model.generate(**inputs)

Importing this package imports neither torch nor transformers; its names do, when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "attach": ".attachment",
    "detach": ".attachment",
    "attached": ".attachment",
    "last_run": ".attachment",
    "explain": ".evidence.explain",
    "Explanation": ".evidence",
    "Method": ".method",
    "Contrast": ".method",
    "View": ".method",
    "Step": ".method",
    "METHODS": ".methods",
    "parse": ".methods",
    "FAMILIES": ".families",
    "Family": ".families.base",
    "LvlmDecodeError": ".errors",
}

__all__ = sorted([*_NAMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name], __name__), name)
    if not name.startswith("_"):
        from .methods import METHODS, load

        classes = {entry.split(":")[1]: key for key, entry in METHODS.items()}
        if name in classes:
            return load(classes[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from .methods import METHODS

    return sorted([*__all__, *(entry.split(":")[1] for entry in METHODS.values())])
