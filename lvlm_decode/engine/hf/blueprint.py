"""A model of which only the configuration is known, or the vision side and the embeddings besides: views need no more."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from ...errors import InputError
from . import decoder


def blueprint(path: str, encoder: bool = False, revision: str | None = None) -> Any:
    """The model at ``path`` with all its modules and no weights: they are on the device "meta".

    Args:
        path: folder or hub id.
        encoder: load, in float32, the weights of everything but the decoder's layers and the head; those stay in the file.
        revision: of the hub's repository.

    Raises:
        InputError: no configuration of a vision-language model is there.
    """
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
        if encoder:
            model = AutoModelForImageTextToText.from_pretrained(
                path, dtype=torch.float32, device_map=_apart(model), revision=revision
            )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} holds no vision-language model that transformers knows ({str(error)[:200]}); give a folder or hub id."
        ) from error
    # What it is called, for messages and for its processor.
    model.name_or_path = path
    try:
        model.generation_config = GenerationConfig.from_pretrained(path, revision=revision or "main")
    except OSError:
        # Older repositories have none; what was made from the configuration stands.
        pass
    return model.eval()


def _apart(model: nn.Module) -> dict[str, str]:
    """Where each part goes: the decoder's layers and the head stay on the disk."""
    names = {module: name for name, module in model.named_modules()}
    # The list that holds the layers.
    layers = names[decoder.layers(model)[0]].rpartition(".")[0]
    far = {layers, names[decoder.head(model)]}
    found: dict[str, str] = {}

    def place(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in far:
                found[full] = "disk"
            elif any(other.startswith(f"{full}.") for other in far):
                place(child, f"{full}.")
            else:
                found[full] = "cpu"
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            found[f"{prefix}{name}"] = "cpu"

    place(model, "")
    return found


def is_blueprint(model: Any) -> bool:
    """Whether no weight of ``model`` is there, nor where to fetch it from."""
    if not all(parameter.device.type == "meta" for parameter in model.parameters()):
        return False
    # A model that accelerate has offloaded whole looks the same; its hooks fetch the weights.
    fetched = any(hasattr(module, "_hf_hook") for module in model.modules())
    return not fetched and not hasattr(model, "hf_device_map")
