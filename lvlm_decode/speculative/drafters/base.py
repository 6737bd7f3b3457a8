"""What a drafter is: hyper-parameters, and for each call a session that proposes and learns.

A drafter never changes an answer, whatever it proposes; it only changes how many tokens one forward commits. That is why
a session may keep what it learned from earlier calls.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from ...parameters import Checked
from ..tree import Tree

if TYPE_CHECKING:
    from ...engine.stack import Lanes


@dataclass
class Context:
    """What the loop tells a session, kept up to date by the loop.

    Args:
        module: the module that decodes (the language model, for families whose ``generate`` hands over to it).
        lanes: the engine's stacked rows (:class:`lvlm_decode.engine.stack.Lanes`), for drafters that read its cache.
        tokens: for each sample its prompt and everything generated so far, the root last. Padding and image
            placeholders are -1 there, so that no drafter copies them.
        prompt_lengths: how many entries of each list are prompt.
        scores: (B, N) mitigated scores of the first token, before processors.
        prompt: the prompt as the language model saw it, for drafters with ``features``; else ``None``.
        couple: (scores (B, t, N'), level, ids) -> the scores as the target will process them ``level`` levels below the
            root, and the same under the noise it will draw with; ``None`` where drafts are not coupled.
        device: where proposals are wanted.
    """

    module: Any
    lanes: Lanes
    tokens: list[list[int]]
    prompt_lengths: list[int]
    scores: Tensor
    prompt: PromptFeatures | None = None
    couple: Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class Features:
    """The target's view of a span of rows. ``V`` views, view-major rows ``v * B + b``.

    Args:
        hidden: (V * B, T, D) last hidden states after the final norm: what the language head reads.
        views: V.
        layers: layer -> (V * B, T, D), hidden states after that layer, for drafters that ask for layers.
    """

    hidden: Tensor
    views: int = 1
    layers: Mapping[int, Tensor] = field(default_factory=dict)

    def rows(self, count: int) -> Self:
        """The first ``count`` rows alone."""
        layers = {layer: states[:count] for layer, states in self.layers.items()}
        return replace(self, hidden=self.hidden[:count], layers=layers)


@dataclass(kw_only=True)
class PromptFeatures(Features):
    """The target's view of the whole prompts: also what it read.

    Args:
        embeds: (V * B, T, D) input embeddings, image positions holding the projected image features.
        image: (V * B, T) bool, image positions.
        mask: (V * B, T) bool, False at padding.
        ids: (V * B, T) token ids, image positions holding the placeholder.
        positions: (axes, V * B, T) positions of a target that has several axes of them, ``None`` of any other.
    """

    embeds: Tensor
    image: Tensor
    mask: Tensor
    ids: Tensor
    positions: Tensor | None

    def rows(self, count: int) -> Self:
        return replace(
            super().rows(count),
            embeds=self.embeds[:count],
            image=self.image[:count],
            mask=self.mask[:count],
            ids=self.ids[:count],
            positions=None if self.positions is None else self.positions[..., :count, :],
        )


@dataclass
class Verified:
    """What one verification showed.

    Args:
        tree: what was verified.
        scores: (B, n, N) float32 mitigated scores of every row, before processors.
        paths: for each sample the accepted rows, the root first; empty if it was finished before.
        committed: for each sample the tokens it gained: the accepted proposals and the bonus.
        features: of the verified rows, for drafters with ``features``; else ``None``.
    """

    tree: Tree
    scores: Tensor
    paths: list[list[int]]
    committed: list[list[int]]
    features: Features | None = None


class Session(ABC):
    """One call of a drafter. Subclasses propose a tree of at most ``room`` levels below the root, and may observe."""

    #: Acceptance that a session assumes of a level before it has seen any.
    PRIOR = 0.7

    def __init__(self, drafter: Drafter, context: Context):
        self.drafter, self.context = drafter, context
        self._tried, self._accepted = 1.0, self.PRIOR

    @abstractmethod
    def propose(self, room: int) -> Tree:
        """A tree whose roots are the last of ``context.tokens``, no deeper than ``room``."""

    def goes_on(self, room: int) -> bool:
        """Whether something may still be drafted in this call; asked before every proposal.

        Once it is not, the rest of the call is decoded as if no drafter were attached, and then it is over.
        """
        return True

    def observe(self, verified: Verified) -> None:
        """Told after every verification; ``context.tokens`` already holds what was committed."""
        return None

    def finish(self) -> None:
        """Told once, when the call is over."""
        return None

    def count(self, verified: Verified) -> None:
        """Keep the running acceptance that :meth:`levels` needs; old cycles fade."""
        for sample, path in enumerate(verified.paths):
            if not path:
                continue
            deepest = max(
                (d for row, d in enumerate(verified.tree.shape(sample).depth) if verified.tree.lists[sample][row] >= 0),
                default=0,
            )
            accepted = len(path) - 1
            tried = min(accepted + 1, deepest)
            self._tried = 0.9 * self._tried + tried
            self._accepted = 0.9 * self._accepted + accepted

    def levels(self, most: int) -> int:
        """How many levels are worth drafting: until the chance that all are accepted falls below ``drafter.stop``."""
        stop = self.drafter.stop
        if stop <= 0:
            return most
        chance = min(max(self._accepted / self._tried, 1e-3), 0.999)
        return max(1, min(most, int(math.log(stop) / math.log(chance))))


class Watch:
    """Looks on at a call in which nothing is drafted."""

    def ran(self) -> None:
        """A forward is done, that of the prompts first."""

    def ended(self) -> None:
        """The call is over."""


@dataclass
class Drafter(Checked):
    """Base of every drafter: hyper-parameters, and whatever it keeps between calls.

    Args:
        stop: confidence stop, after SpecDec++ (arXiv 2405.19715): drafting goes no deeper once the estimated
            probability that the whole path is accepted falls below it. The paper trains a head for the estimate; here
            it is the draft's own cumulative probability where there is one (under sampling after temperature and
            warpers, before the noise), else the running acceptance. 0 never stops.
    """

    #: Whether sessions read the target's features (``Context.prompt``, ``Verified.features``).
    features: ClassVar[bool] = False

    stop: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        self.check(0 <= self.stop < 1, "stop", "in [0, 1), 0 for never")

    @classmethod
    def create(cls, model: Any | None = None, **parameters: Any) -> Drafter:
        """The drafter with these parameters, for ``model``.

        Raises:
            UnknownNameError: a parameter the drafter does not have.
        """
        return cls(**parameters)

    def layers(self, module: Any) -> tuple[int, ...]:
        """Decoder layers whose outputs its sessions read: ``i`` is the state after layer ``i``."""
        return ()

    @abstractmethod
    def begin(self, context: Context) -> Session:
        """The session of one call."""

    def watch(self, module: Any, samples: int, views: int) -> Watch | None:
        """What watches the next call, one of this shape, if nothing is drafted in it; ``None`` if it has a session.

        A call that is watched runs as if no drafter were attached.

        Args:
            module: that decodes.
        """
        return None

    def fork(self) -> Drafter:
        """A drafter that knows what this one knows and keeps what it learns to itself; itself if it learns nothing."""
        return self
