"""Watching the target's features while it runs, for drafters that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Watcher:
    """What the decoder put out in its newest forward; the first one since :meth:`reset` counts.

    With views in several forwards the first is that of view 0.
    """

    def __init__(self, layers: Sequence[int]):
        self.wanted = tuple(layers)
        self.hidden: Tensor | None = None
        self.embeds: Tensor | None = None
        self.layers: dict[int, Tensor] = {}

    def reset(self) -> None:
        self.hidden, self.embeds, self.layers = None, None, {}


@contextmanager
def watched(module: torch.nn.Module, layers: Sequence[int] = ()) -> Iterator[Watcher]:
    """Hooks on the decoder of ``module`` for the length of the block.

    Args:
        module: the module that decodes.
        layers: ``i`` asks for the state after layer ``i`` (1 is the first).
    """
    decoder, watcher = module.get_decoder(), Watcher(layers)

    def before(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if watcher.hidden is None and watcher.embeds is None:
            embeds = kwargs.get("inputs_embeds")
            watcher.embeds = decoder.get_input_embeddings()(kwargs["input_ids"]) if embeds is None else embeds

    def after(_: Any, args: tuple, output: Any) -> None:
        if watcher.hidden is None:
            watcher.hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state

    def note(number: int):
        def hook(_: Any, args: tuple, output: Any) -> None:
            if watcher.hidden is None:
                watcher.layers[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after),
        *(decoder.layers[number - 1].register_forward_hook(note(number)) for number in watcher.wanted),
    ]
    try:
        yield watcher
    finally:
        for handle in handles:
            handle.remove()
