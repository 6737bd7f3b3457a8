"""The drafter that chooses a drafter: the fastest on this machine, for this model and these texts, or none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, ClassVar

from torch import nn

from ...errors import InputError
from ..heads import shipped
from ..ledger import Ledger
from ..sending import sent
from ..tree import Tree
from .base import Context, Drafter, Session, Verified, Watch

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
    views by itself, and kept from call to call. The first call has no draft; then drafters are tried for a few cycles each.
    Nothing is begun that may lose more than 2.5 % of all the time spent, together with what is lost already. A call without a
    draft runs as if no drafter were attached, and so does the rest of a call in which drafting was given up; that is what drafts
    are measured against.

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
        return _AutoSession(self, context)

    def ledger(self, samples: int, views: int) -> Ledger:
        """The measurements of one shape of work."""
        return self.ledgers.setdefault((samples, views), Ledger())

    def watch(self, module: nn.Module, samples: int, views: int) -> Watch | None:
        if not self.candidates:
            self._take(self._usual(module), module)
        ledger = self.ledger(samples, views)
        return _Undrafted(ledger) if ledger.plan(list(self.candidates)) is None else None

    def fork(self) -> Drafter:
        other = copy.copy(self)
        other.candidates = {name: drafter.fork() for name, drafter in self.candidates.items()}
        other.ledgers = copy.deepcopy(self.ledgers)
        return other

    def forget(self) -> None:
        """Drop what was measured."""
        self.ledgers = {}


class _Undrafted(Watch):
    """Times what follows the prompt in a call without a draft."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.stamps: list[float] = []

    def ran(self) -> None:
        self.stamps.append(clock())

    def ended(self) -> None:
        self.ledger.undrafted([after - before for before, after in zip(self.stamps, self.stamps[1:])])


class _AutoSession(Session):
    drafter: Auto

    def __init__(self, drafter: Auto, context: Context):
        super().__init__(drafter, context)
        self.ledger = drafter.ledger(len(context.tokens), 1 + len(context.lanes.weights))
        chosen = self.ledger.plan(list(drafter.candidates))
        assert chosen is not None, "a call in which nothing is drafted has no session"
        self.chosen = chosen
        before = clock()
        self.inner = drafter.candidates[chosen].begin(context)
        self.ledger.started(chosen, clock() - before)
        self.depth, self.given_up = 0, False
        self.since = clock()
        #: Tokens that no unfinished sample is short of: what so many forwards without a draft would have given.
        self.first = self.reached = min(self._lengths())
        #: Tokens that cycles gave their unfinished samples on average, added up.
        self.given = 0.0

    def _lengths(self) -> list[int]:
        return [len(text) - start for text, start in zip(self.context.tokens, self.context.prompt_lengths)]

    def goes_on(self, room: int) -> bool:
        self.since = clock()
        self.depth = self.ledger.depth(self.chosen, room, self.reached)
        # The last token needs no draft.
        self.given_up = self.depth == 0 and room > 0
        return not self.given_up

    def propose(self, room: int) -> Tree:
        if self.depth:
            return self.inner.propose(self.depth)
        roots = sent([text[-1:] for text in self.context.tokens], self.context.device)
        return Tree.chain(roots)

    def observe(self, verified: Verified) -> None:
        self.inner.observe(verified)
        accepted = [len(path) - 1 for path in verified.paths if path]
        reached = min(length for length, path in zip(self._lengths(), verified.paths) if path)
        self.ledger.cycle(self.chosen, self.depth, self.reached, accepted, clock() - self.since)
        self._passed(reached)
        self.given += 1 + sum(accepted) / len(accepted)

    def _passed(self, reached: int) -> None:
        self.ledger.passed(self.reached, reached - self.reached, clock() - self.since)
        self.reached = reached

    def finish(self) -> None:
        lengths, observed = self._lengths(), self.reached
        if self.given_up:
            self.ledger.rest(observed, max(lengths) - observed, clock() - self.since)
        else:
            # The newest verification ended the call, and nobody was told to observe it.
            self._passed(max(lengths))
        if self.given:
            self.ledger.paced(self.chosen, (observed - self.first) / self.given)
        before = clock()
        self.inner.finish()
        self.ledger.finished(self.chosen, clock() - before)
        self.ledger.ended(sum(lengths) / len(lengths), True)
