"""The drafter that chooses a drafter: the fastest on this machine, for this model and these texts, or none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import InputError
from ..heads import shipped
from ..ledger import Ledger
from ..tree import Tree
from .base import Context, Drafter, Session, Verified

#: Seconds; another clock in tests, and where a benchmark counts what the processor computed.
clock: Callable[[], float] = perf_counter

#: Drafters that need no training, which every model has.
FREE = ("automaton(shortest=1)", "recycling(rows=12,depth=5)")
#: Kinds of heads, the one that is taken first where several ship for a model.
HEADS = ("vispec", "eagle3", "msd", "eagle")


@dataclass
class Auto(Drafter):
    """Drafts with the fastest of several drafters at the depth that pays, and not at all where none pays.

    What each brings is measured while it decodes (see :mod:`lvlm_decode.speculative.ledger`), for every number of samples and
    views by itself, and kept from call to call. The first call has no draft; then drafters are tried for a few cycles each,
    for at most 2 % of the time.

    Args:
        drafters: names with parameters, such as ``"recycling(rows=8)"``. When left out: a head that ships for the model, if
            one does, and two drafters that need no training.
    """

    name: ClassVar[str] = "auto"

    drafters: tuple[str, ...] | None = None
    candidates: dict[str, Drafter] = field(default_factory=dict, init=False, repr=False, compare=False)
    ledgers: dict[tuple[int, int], Ledger] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.drafters is None or len(self.drafters) > 0, "drafters", "names of drafters")
        if self.drafters is not None:
            self._take(self.drafters, None)

    @classmethod
    def create(cls, model: nn.Module | None = None, **parameters: Any) -> Drafter:
        drafter = cls(**parameters)
        drafter._take(drafter.drafters or cls._usual(model), model)
        return drafter

    @staticmethod
    def _usual(model: nn.Module | None) -> tuple[str, ...]:
        for kind in HEADS if model is not None else ():
            try:
                shipped(model, kind)
            except InputError:
                continue
            return (kind, *FREE)
        return FREE

    def _take(self, names: tuple[str, ...], model: nn.Module | None) -> None:
        from . import parse

        found: dict[str, Drafter] = {}
        for name in names:
            drafter = parse(name, model=model)
            usable = drafter is not None and not isinstance(drafter, Auto)
            self.check(usable, "drafters", f"names of drafters other than auto and none, not {name!r}")
            if drafter is not None:
                found[name] = drafter
        self.candidates = found

    @property
    def features(self) -> bool:  # type: ignore[override]
        return any(drafter.features for drafter in self.candidates.values())

    def layers(self, module: nn.Module) -> tuple[int, ...]:
        return tuple({layer for drafter in self.candidates.values() for layer in drafter.layers(module)})

    def begin(self, context: Context) -> Session:
        if not self.candidates:
            self._take(self._usual(context.module), context.module)
        return _AutoSession(self, context)

    def fork(self) -> Drafter:
        other = copy.copy(self)
        other.candidates = {name: drafter.fork() for name, drafter in self.candidates.items()}
        other.ledgers = copy.deepcopy(self.ledgers)
        return other

    def forget(self) -> None:
        """Drop what was measured."""
        self.ledgers = {}


class _AutoSession(Session):
    drafter: Auto

    def __init__(self, drafter: Auto, context: Context):
        super().__init__(drafter, context)
        key = len(context.tokens), 1 + len(context.lanes.weights)
        self.ledger = drafter.ledgers.setdefault(key, Ledger())
        self.chosen = self.ledger.plan(list(drafter.candidates))
        self.inner: Session | None = None
        self.depth = 0
        before = clock()
        if self.chosen is not None:
            self.inner = drafter.candidates[self.chosen].begin(context)
            self.ledger.started(self.chosen, clock() - before)
        self.since = clock()

    def propose(self, room: int) -> Tree:
        self.since = clock()
        self.depth = 0 if self.chosen is None else self.ledger.depth(self.chosen, room)
        if self.inner is not None and self.depth:
            return self.inner.propose(self.depth)
        roots = torch.tensor([text[-1:] for text in self.context.tokens], device=self.context.device)
        return Tree.chain(roots)

    def observe(self, verified: Verified) -> None:
        if self.inner is not None:
            self.inner.observe(verified)
        accepted = [len(path) - 1 for path in verified.paths if path]
        self.ledger.cycle(self.chosen, self.depth, accepted, clock() - self.since)

    def finish(self) -> None:
        if self.inner is not None:
            self.inner.finish()
        lengths = [len(text) - start for text, start in zip(self.context.tokens, self.context.prompt_lengths)]
        self.ledger.ended(sum(lengths) / len(lengths), self.chosen is not None)
