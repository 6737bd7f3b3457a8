"""Where a model lives: what it is wrapped in, and on which device it takes its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from . import decoder


def unwrapped(model: Any) -> torch.nn.Module:
    """The model inside what ``torch.compile`` or peft wrap it in, whose ``generate()`` the wrapper's calls.

    Raises:
        UnsupportedError: a wrapper that has no such ``generate()``, or adapters that change more than layers.
    """
    while True:
        if (inner := getattr(model, "_orig_mod", None)) is not None:
            model = inner
        elif hasattr(model, "get_base_model"):
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise UnsupportedError(
                    "this adapter puts virtual tokens before every prompt, and views are made from the real ones; merge it, or "
                    "use an adapter of layers such as LoRA."
                )
            model = model.get_base_model()
        elif not hasattr(model, "config") and isinstance(getattr(model, "module", None), torch.nn.Module):
            name = type(model).__name__
            raise UnsupportedError(
                f"{name} wraps the model and has no generate(); attach to the model inside, for instance "
                "attach(model.module, method), and call model.module.generate()."
            )
        else:
            return model


def check_gathered(model: torch.nn.Module, name: str) -> None:
    """Raise if method ``name`` of ``model`` would run on weights that are spread over processes.

    Raises:
        UnsupportedError: FSDP gathers the weights for the forward alone.
    """
    sharded = any(base.__name__ == "FSDPModule" for base in type(model).__mro__)
    if sharded and name not in model.__dict__:
        raise UnsupportedError(
            f"FSDP gathers the weights of this model for its forward, and images are encoded before it; call "
            f"torch.distributed.fsdp.register_fsdp_forward_method(model, {name!r}) once."
        )


def device_for(model: torch.nn.Module, inputs: Tensor) -> torch.device:
    """Where ``model`` takes token ids: where its embeddings run, which may be elsewhere than where they are kept.

    Args:
        inputs: ids (B, T); theirs is the device where embeddings are offloaded and no hook says where they run.
    """
    embeddings = decoder.embeddings(model)
    hook = getattr(embeddings, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if (device := getattr(one, "execution_device", None)) is not None:
            return torch.device(device) if not isinstance(device, int) else torch.device("cuda", device)
    weight = getattr(embeddings, "weight", None)
    return inputs.device if weight is None or weight.is_meta else weight.device
