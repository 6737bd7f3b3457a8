"""Attention rows of the last decoder layer under sdpa, without ``output_attentions`` and without eager anywhere.

An attention function that calls the stock sdpa is registered once, next to sdpa's own mask function (a function without
one would get no mask at all). While :func:`last_layer` is open, the decoder runs through it, and its last layer also
computes the rows of the tokens it was just given; the other layers, the vision encoder and the outputs are untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..engine import hf
from ..errors import UnsupportedError

NAME = "lvlm_decode_last_layer"


class Recorder:
    """What the last layer attended to in the newest forward, while ``on``."""

    def __init__(self) -> None:
        self.on = False
        self._rows: Tensor | None = None

    def take(self) -> Tensor:
        """(R, q, S) float32: per new token the largest probability over heads for every slot of the cache, itself
        included. Not normalised again.

        Raises:
            UnsupportedError: the decoder's last layer did not call the attention interface.
        """
        if self._rows is None:
            raise UnsupportedError(
                "the last decoder layer of this model has no attention that transformers' attention interface runs, so "
                "its attention rows cannot be read; OPERA needs a model whose last layer is ordinary attention."
            )
        rows, self._rows = self._rows, None
        return rows


_recorders: WeakKeyDictionary[torch.nn.Module, Recorder] = WeakKeyDictionary()


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """(R, H, q, S) float32 softmax of the new tokens' rows; grouped keys are not repeated."""
    rows, heads, q, width = query.shape
    groups, slots = key.shape[1], key.shape[2]
    scaling = width**-0.5 if scaling is None else scaling
    folded = query.reshape(rows, groups, heads // groups * q, width)
    scores = (folded @ key.transpose(-1, -2)).float().reshape(rows, heads, q, slots) * scaling
    if mask is None:
        if q > 1:
            hidden = torch.ones(q, slots, dtype=torch.bool, device=key.device).triu(slots - q + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[..., :slots], float("-inf"))
    else:
        scores = scores + mask[..., :slots].float()
    return scores.softmax(-1)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs,
):
    recorder = _recorders.get(module)
    if recorder is not None and recorder.on:
        recorder._rows = _probabilities(query, key, attention_mask, scaling).amax(1)
    return hf.sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@contextmanager
def last_layer(module: torch.nn.Module) -> Iterator[Recorder]:
    """Let the decoder of ``module`` run under sdpa with a recorder on its last layer; restored on exit.

    Raises:
        UnsupportedError: the decoder cannot run under sdpa.
    """
    hf.register_attention(NAME, _attend)
    decoder = module.get_decoder()
    if not getattr(decoder, "_supports_sdpa", False):
        raise UnsupportedError(
            f"{type(decoder).__name__} does not run under sdpa attention, and OPERA reads its attention rows there; "
            "use a model whose decoder supports attn_implementation='sdpa'."
        )
    recorder = Recorder()
    last = list(decoder.layers[-1].modules())
    configs = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}
    before = {key: hf.attention_of(config) for key, config in configs.items()}
    try:
        for config in configs.values():
            hf.set_attention(config, NAME)
        for part in last:
            _recorders[part] = recorder
        yield recorder
    finally:
        for part in last:
            _recorders.pop(part, None)
        for key, config in configs.items():
            hf.set_attention(config, before[key])
