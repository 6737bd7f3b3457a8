"""Decoding that keeps vision-language models from inventing what is not in the image.

    model = lvlm_decode.attach(model, lvlm_decode.VCD(alpha=1.0))
    model.generate(**inputs)

Importing this package imports neither torch nor transformers; its names do, when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # What :data:`_NAMES` says, for type checkers.
    from .attachment import attach as attach
    from .attachment import attached as attached
    from .attachment import detach as detach
    from .attachment import last_run as last_run
    from .errors import LvlmDecodeError as LvlmDecodeError
    from .evidence import Explanation as Explanation
    from .evidence.explain import explain as explain
    from .families import FAMILIES as FAMILIES
    from .families.base import Family as Family
    from .method import Contrast as Contrast
    from .method import Method as Method
    from .method import Step as Step
    from .method import View as View
    from .methods import METHODS as METHODS
    from .methods import parse as parse

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
