"""Whether the installed libraries are ones this library works with."""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

from ...errors import DependencyError, UnsupportedError
from . import versions
from .probe import probe

#: How the range that was tested is said in messages.
RANGE = f"{versions.FLOOR} to {versions.TESTED[-1]}"


@functools.cache
def require(transformers_version: str | None = None, torch_version: str | None = None) -> None:
    """Refuse libraries that this engine does not work with; once per process.

    A version of transformers that was not tested runs through :func:`probe`: it is refused where that fails, and warned
    about where it passes.

    Raises:
        DependencyError: names the installed version, the tested ones, what moved, and the command that mends it.
    """
    have = torch_version or torch.__version__
    if Version(have.split("+")[0]) < Version(versions.TORCH_FLOOR):
        raise DependencyError(
            f"torch {have} is installed, and lvlm_decode needs {versions.TORCH_FLOOR} or newer; run: "
            f"pip install 'torch>={versions.TORCH_FLOOR}'"
        )
    have = transformers_version or transformers.__version__
    if Version(have) < Version(versions.FLOOR):
        raise DependencyError(
            f"transformers {have} is installed, and lvlm_decode needs {versions.FLOOR} or newer; run: "
            f"pip install '{versions.RANGE}'"
        )
    if versions.tested(have):
        return
    moved = probe()
    if moved:
        raise DependencyError(
            f"transformers {have} was not tested with this lvlm_decode ({RANGE} were), and its self-check failed: "
            f"{'; '.join(moved)}. Run: pip install '{versions.RANGE}', or update lvlm-decode."
        )
    warnings.warn(
        f"transformers {have} was not tested with this lvlm_decode ({RANGE} were); its self-check passed. "
        "`lvlm-decode doctor` runs it again.",
        stacklevel=2,
    )


def require_model(model_type: str, transformers_version: str | None = None) -> None:
    """Refuse a model type that the installed transformers itself breaks.

    Raises:
        UnsupportedError: names what happens and the versions without it.
    """
    have = transformers_version or transformers.__version__
    reason = versions.BROKEN.get(versions.minor_of(have), {}).get(model_type)
    if reason is not None:
        raise UnsupportedError(
            f"{model_type} does not work in transformers {have}: {reason}; run: "
            f"pip install 'transformers=={versions.TESTED[-1]}'"
        )


def require_adapters() -> None:
    """Refuse a peft that the installed transformers does not load adapters with.

    Raises:
        DependencyError: peft is missing or too old; names both versions and the remedy.
    """
    try:
        have = version("peft")
    except PackageNotFoundError as error:
        raise DependencyError("adapters need peft, which is not installed; run: pip install peft") from error
    if Version(have) < Version(MIN_PEFT_VERSION):
        raise DependencyError(
            f"transformers {transformers.__version__} loads adapters with peft {MIN_PEFT_VERSION} or newer, and peft {have} "
            "is installed; run: pip install -U peft, or, where no such peft is published yet: "
            "pip install 'transformers<5.24'"
        )
