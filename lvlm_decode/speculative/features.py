"""Watching the target's features while it runs, for drafters that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..engine.hf import decoder
from ..engine.hooks import hooked
from ..engine.running import running_lane


class Watcher:
    """What the decoder put out in its newest forward; the first one since :meth:`reset` counts.

    With views in several forwards the first is that of view 0.
    """

    def __init__(self, layers: Sequence[int]):
        self.wanted = tuple(layers)
        self.hidden: Tensor | None = None
        self.embeds: Tensor | None = None
        #: (..., R, T) positions that the decoder was given; ``None`` where it counts itself.
        self.positions: Tensor | None = None
        self.layers: dict[int, Tensor] = {}

    @property
    def axes(self) -> Tensor | None:
        """(3, R, T) the positions of a decoder with three axes of them, ``None`` of any other."""
        given = self.positions
        return None if given is None or given.dim() < 3 else given[-3:]

    def seen(self) -> tuple[Tensor, Tensor]:
        """(R, T, D) twice: the last hidden states and the input embeddings of the forward that was watched."""
        if self.hidden is None or self.embeds is None:
            raise RuntimeError("no forward of this run was watched")
        return self.hidden, self.embeds

    def reset(self) -> None:
        self.hidden, self.embeds, self.positions, self.layers = None, None, None, {}


@contextmanager
def watched(module: nn.Module, layers: Sequence[int] = (), owner: object = None) -> Iterator[Watcher]:
    """Watches the decoder of ``module`` in the calls made inside the block.

    Args:
        layers: ``i`` asks for the state after layer ``i`` (1 is the first).
        owner: the run whose forwards alone count; every forward does when ``None``.
    """
    watcher = Watcher(layers)
    embed, stack = decoder.embeddings(module), decoder.layers(module)

    def unseen() -> bool:
        return watcher.hidden is None and (owner is None or running_lane(owner) is not None)

    def before(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if unseen() and watcher.embeds is None:
            embeds = kwargs.get("inputs_embeds")
            watcher.embeds = embed(kwargs["input_ids"]) if embeds is None else embeds
            watcher.positions = kwargs.get("position_ids")

    def after(_: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if unseen():
            watcher.hidden = decoder.states_of(output)

    def note(number: int) -> Callable[..., None]:
        def hook(_: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if unseen():
                watcher.layers[number] = decoder.states_of(output)

        return hook

    noted = {stack[number - 1]: note(number) for number in watcher.wanted}
    whole = decoder.decoder_of(module)
    with hooked(after={whole: after, **noted}, before={whole: before}):
        yield watcher
