"""Weights from files: safetensors alone, or this project's own training checkpoints; never code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .errors import InputError


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name.

    Raises:
        InputError: no such file, or none that is whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; give a file of weights in safetensors form.") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{path} is no whole safetensors file ({_first_line(error)}); fetch or train it again."
        ) from error


def read_checkpoint(path: Path, device: Any = "cpu", needs: tuple[str, ...] = ()) -> dict[str, Any]:
    """A training checkpoint of this project: tensors, numbers and lists, read without running code.

    Raises:
        InputError: a file that is missing, damaged, holds code, or lacks one of the fields ``needs``.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {path} is missing; start the training that writes it.") from error
    # torch raises what its unpickler and its zip reader raise: RuntimeError, EOFError, UnpicklingError, AttributeError.
    except Exception as error:
        raise InputError(
            f"checkpoint {path} cannot be read ({_first_line(error)}); move it away, and the training starts anew."
        ) from error
    lacking = [name for name in needs if not isinstance(state, dict) or name not in state]
    if lacking:
        raise InputError(f"checkpoint {path} has no field {lacking[0]!r}; move it away, and the training starts anew.")
    return state


def load_into(module: torch.nn.Module, state: dict[str, Any], where: str) -> None:
    """``module.load_state_dict(state)``.

    Raises:
        InputError: names or shapes that are not the module's.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where} does not fit {type(module).__name__}: {reason[:300]}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
