"""The parts of a decoder: layers, final norm, head, experts, attention. Edited attention is registered here.

Models are ``Any`` here and in the families: torch types every attribute of a module as tensor or module, and what a model of
transformers has beside that is known to it alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ...errors import UnsupportedError

#: Guards the count of those who route a configuration's attention; held for the count alone.
_LOCK = threading.Lock()
#: Per routed configuration: how many route it, and the implementation that comes back.
_ROUTED: dict[int, tuple[int, str | None]] = {}


def text_config(module: Any) -> Any:
    """The configuration of the language model that decodes."""
    return module.config.get_text_config(decoder=True)


def decoder_of(module: Any) -> nn.Module:
    """The decoder alone, without the language head."""
    return module.get_decoder()


def layers(module: Any) -> list[nn.Module]:
    """The decoder layers of ``module``, the first one first."""
    return list(module.get_decoder().layers)


def layer_number(attention: Any) -> int:
    """Which decoder layer an attention module belongs to, 0 for the first."""
    return attention.layer_idx


def layer_count(module: Any) -> int:
    return text_config(module).num_hidden_layers


def embeddings(module: Any) -> nn.Module:
    """Token ids -> embeddings (..., D)."""
    return module.get_decoder().get_input_embeddings()


def head(module: Any) -> nn.Module:
    """The language head: hidden states (..., D) -> logits (..., N)."""
    return module.get_output_embeddings()


def logits_of(module: Any, hidden: Tensor, normed: bool = True) -> Tensor:
    """(..., N) float32 logits of hidden states (..., D) of an intermediate layer, through final norm and head.

    Args:
        normed: ``False`` leaves the final norm out.
    """
    softcap = getattr(module.config.get_text_config(), "final_logit_softcapping", None)
    with torch.no_grad():
        out = head(module)(module.get_decoder().norm(hidden) if normed else hidden).float()
        return out if softcap is None else torch.tanh(out / softcap) * softcap


def states_of(output: Any) -> Tensor:
    """The hidden states that a decoder or one of its layers put out."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def kinds_of(module: Any) -> tuple[set[str], int | None]:
    """The kinds of layers a decoder tells apart (none, where all are alike), and how far its sliding layers see.

    Decoders that tell none apart (Mistral) have one mask for all layers, and their window, where they have one, is all
    layers'.
    """
    config = text_config(module)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds or "sliding_attention" in kinds:
        return kinds, getattr(config, "sliding_window", None)
    return kinds, None


def routers(module: Any) -> list[nn.Module]:
    """The decoder's top-k routers, each of which puts out (logits, weights, experts) per token."""
    return [part for part in module.get_decoder().modules() if type(part).__name__.endswith("TopKRouter")]


def stock_attention(*args: Any, **kwargs: Any) -> Any:
    """The stock sdpa attention function."""
    return transformers.AttentionInterface()["sdpa"](*args, **kwargs)


def attention_of(config: Any) -> str | None:
    """The attention implementation a configuration asks for."""
    return config._attn_implementation_internal


@contextmanager
def routed(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let the decoder of ``module`` attend through ``function``, which gets sdpa's masks, for the length of the block.

    Several blocks may be open at once, also in several threads; the last one to leave puts back what was before. Other
    calls of the module attend through ``function`` meanwhile, so it must do as sdpa does for them.

    Args:
        name: ``function`` is registered under it; the same function each time.

    Raises:
        UnsupportedError: the decoder cannot run under sdpa.
    """
    decoder = module.get_decoder()
    if not getattr(decoder, "_supports_sdpa", False):
        raise UnsupportedError(
            f"{type(decoder).__name__} does not run under sdpa attention, where this method reads or changes its "
            "attention; use a model whose decoder supports attn_implementation='sdpa'."
        )
    transformers.AttentionInterface.register(name, function)
    transformers.AttentionMaskInterface.register(name, transformers.AttentionMaskInterface()["sdpa"])
    configs = list({id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}.values())
    with _LOCK:
        for config in configs:
            count, before = _ROUTED.get(id(config), (0, attention_of(config)))
            _ROUTED[id(config)] = count + 1, before
            config._attn_implementation_internal = name
    try:
        yield
    finally:
        with _LOCK:
            for config in configs:
                count, before = _ROUTED.pop(id(config))
                if count > 1:
                    _ROUTED[id(config)] = count - 1, before
                else:
                    config._attn_implementation_internal = before
