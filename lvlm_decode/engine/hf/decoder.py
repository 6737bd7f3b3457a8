"""The parts of a decoder: layers, final norm, head, experts, attention. Edited attention is registered here.

Models are ``Any`` here and in the families: torch types every attribute of a module as tensor or module, and what a model of
transformers has beside that is known to it alone.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
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


#: What a decoder layer calls the parts that methods steer.
_PARTS = {"mlp": "mlp", "attention": "self_attn"}


def parts(module: Any, name: str) -> list[nn.Module]:
    """The part ``name`` of every decoder layer: "layer" for the layer itself, "mlp" or "attention".

    Raises:
        UnsupportedError: a decoder whose layers have no such part.
    """
    whole = layers(module)
    if name == "layer":
        return whole
    if not all(hasattr(layer, _PARTS[name]) for layer in whole):
        raise UnsupportedError(
            f"the layers of {type(decoder_of(module)).__name__} have no part '{_PARTS[name]}', whose output this method "
            "changes; choose another method or model."
        )
    return [getattr(layer, _PARTS[name]) for layer in whole]


#: The parts of a layer that adds what its attention, and then its MLP, makes of the normed stream.
_PLAIN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def plain_layers(module: Any) -> bool:
    """Whether every decoder layer is two norms, attention and an MLP, and nothing else."""
    return all({name for name, _ in layer.named_children()} == _PLAIN for layer in layers(module))


def attention_norm(layer: Any) -> nn.Module:
    """The norm before the attention of a plain layer."""
    norm: nn.Module = layer.input_layernorm
    return norm


def with_mlp(layer: Any, stream: Tensor) -> Tensor:
    """The stream (..., D) and what the MLP of a plain layer adds to it."""
    return stream + states_of(layer.mlp(layer.post_attention_layernorm(stream)))


def mixed(layer: Any, heads: Tensor) -> Tensor:
    """(..., D) what a layer's attention puts out, of its heads (..., H, width)."""
    out: Tensor = layer.self_attn.o_proj(heads.flatten(-2))
    return out


def layers_like(module: Any, first: int, last: int) -> range:
    """The layers of ``module`` that ``first`` to ``last``, both included, are of 32 layers; at least one."""
    count = layer_count(module)
    start = min(round(first / 32 * count), count - 1)
    return range(start, max(start + 1, round((last + 1) / 32 * count)))


def layers_given(module: Any, name: str, given: tuple[int, int] | None, first: int, last: int) -> range:
    """The layers a method works in: ``given``, first and last included, or what ``first`` to ``last`` are of 32 layers.

    Args:
        name: of the method, for the message.

    Raises:
        UnsupportedError: layers that the model does not have.
    """
    if given is None:
        return layers_like(module, first, last)
    if given[1] >= layer_count(module):
        raise UnsupportedError(
            f"{name}: layers = {given} are not all layers of this model, which are 0 to {layer_count(module) - 1}."
        )
    return range(given[0], given[1] + 1)


def layer_number(attention: Any) -> int:
    """Which decoder layer an attention module belongs to, 0 for the first."""
    return attention.layer_idx


def layer_count(module: Any) -> int:
    return text_config(module).num_hidden_layers


def width(module: Any) -> int:
    """D, the width of the decoder's hidden states."""
    return text_config(module).hidden_size


def embeddings(module: Any) -> nn.Module:
    """Token ids -> embeddings (..., D)."""
    return module.get_decoder().get_input_embeddings()


def head(module: Any) -> nn.Module:
    """The language head: hidden states (..., D) -> logits (..., N)."""
    return module.get_output_embeddings()


def logits_of(module: Any, hidden: Tensor, normed: bool = True) -> Tensor:
    """(..., N) float32 logits of hidden states (..., D) of an intermediate layer, through final norm and head, where they are.

    Args:
        normed: ``False`` leaves the final norm out.
    """
    softcap = getattr(module.config.get_text_config(), "final_logit_softcapping", None)
    with torch.no_grad():
        out = head(module)(module.get_decoder().norm(hidden) if normed else hidden).float()
        # The head may live on another device, as in a model that is split over several.
        return (out if softcap is None else torch.tanh(out / softcap) * softcap).to(hidden.device)


def fingerprint(module: Any) -> str:
    """A short name of a model's language head, the same for a checkpoint loaded as float32, float16 or bfloat16.

    Weights are rounded to bfloat16, and those that float16 holds with fewer bits (below 2 ** -14) taken for 0, before
    they are hashed. That is exact for checkpoints stored in float16 or bfloat16; one stored in float32 may get another
    name when it is loaded as float16, because two roundings are not one.
    """
    return _name_of([module.get_output_embeddings().weight], 64)


def layers_fingerprint(layers: Sequence[nn.Module]) -> str | None:
    """A short name, as :func:`fingerprint` makes it, of the matrices of the first and the last of some layers.

    It tells a model from one that was fine-tuned below the same head, adapters merged; adapters that lie beside the weights
    are left out. ``None`` where the matrices are quantized or not in memory.
    """
    found = [
        weight
        for layer in (layers[0], layers[-1])
        for name, weight in layer.named_parameters()
        if weight.dim() > 1 and "lora_" not in name
    ]
    known = (torch.float32, torch.float16, torch.bfloat16)
    if any(weight.is_meta or weight.dtype not in known or type(weight.data) is not Tensor for weight in found):
        return None
    return _name_of([weight.flatten(0, -2) for weight in found], 8)


def _name_of(weights: Sequence[Tensor], rows: int) -> str:
    """A hash of about so many rows of each of some matrices."""
    found = hashlib.blake2b(digest_size=8)
    for weight in weights:
        sample = weight.detach()[:: max(1, weight.shape[0] // rows)].to("cpu", torch.bfloat16)
        sample = sample.masked_fill(sample.abs() < 2.0**-14, 0.0).contiguous()
        found.update(sample.view(torch.int16).numpy().tobytes())
    return found.hexdigest()


def states_of(output: Any) -> Tensor:
    """The hidden states that a decoder or one of its layers put out."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def with_states(output: Any, states: Tensor) -> Any:
    """What a decoder layer or a part of one put out, with other hidden states."""
    return states if isinstance(output, Tensor) else (states, *output[1:])


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


def takes_additive(module: Any) -> bool:
    """Whether all layers of a decoder take one additive mask (R, 1, q, S) as it is given."""
    config = text_config(module)
    known = attention_of(config) in ("sdpa", "eager") or str(attention_of(config)).startswith("lvlm_decode")
    return known and not kinds_of(module)[0] and kinds_of(module)[1] is None


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
