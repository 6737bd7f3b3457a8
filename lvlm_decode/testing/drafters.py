"""What must hold of a drafter: it never changes an answer, and proposes no deeper than it is told.

from lvlm_decode.testing import check_drafter

def test_my_drafter():
    check_drafter(MyDrafter(tokens=4))
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..attachment import attach, detach, last_run
from ..errors import InputError
from ..method import Method
from ..methods import load
from ..speculative.drafters import Context, Drafter, Session, parse
from ..speculative.tree import Tree
from .contract import Check, run_all, same_tokens
from .models import Tiny, tiny

#: Tokens that every call generates.
NEW = 16
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}


def drafted(
    zoo: Tiny,
    model: Any,
    method: Method,
    inputs: Mapping[str, Any],
    drafter: Drafter | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """(what ``generate()`` returns, its speculation's statistics) of a seeded call, greedy unless ``options`` say otherwise."""
    attach(model, method, processor=zoo.tokenizer, drafter=drafter)
    try:
        how = {"max_new_tokens": NEW, "do_sample": False, "seed": 3, **options}
        out = getattr(model, "generate")(**inputs, **how)  # noqa: B009  (torch's type of a module knows no generate)
        run = last_run(model)
        return out, None if run is None else run.trace.speculation
    finally:
        detach(model)


@dataclasses.dataclass(frozen=True, eq=False)
class Drafting:
    """A drafter under a method, on a tiny model.

    Args:
        options: of ``generate()``.
    """

    drafter: Drafter
    zoo: Tiny
    method: Method
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        how = "sampled" if self.options else "greedy"
        return f"{type(self.drafter).name} under {self.method.name}, {how}, on {self.zoo.family}"

    def answers(self, seed: int, drafter: Drafter | None) -> Tensor:
        """(B, prompt + answer) tokens of a batch of two, without and with a drafter."""
        inputs = self.zoo.inputs(["what is in it", "is it"], seed=seed)
        return drafted(self.zoo, self.zoo.model, self.method, inputs, drafter, **self.options)[0]


def drafting_changes_no_answer(case: Drafting) -> None:
    """Not in the first call, and not in a later one with what the drafter has learned."""
    for seed in (4, 4, 5):
        same_tokens(case.answers(seed, case.drafter), case.answers(seed, None), "with the drafter")


def proposals_fit_the_call(case: Drafting) -> None:
    """A tree's roots are the newest tokens, it goes no deeper than there is room, and it proposes tokens of the vocabulary."""
    watched, begin = copy.copy(case.drafter), case.drafter.begin
    asked = []

    def started(context: Context) -> Session:
        session = begin(context)
        propose = session.propose

        def proposed(room: int) -> Tree:
            tree = propose(room)
            asked.append(room)
            for sample, tokens in enumerate(context.tokens):
                rows, shape = tree.lists[sample], tree.shape(sample)
                assert rows[0] == tokens[-1], f"the root is {rows[0]}, the newest token is {tokens[-1]}"
                deepest = max(depth for row, depth in enumerate(shape.depth) if rows[row] >= 0)
                assert deepest <= room, f"a tree of {deepest} levels where there is room for {room}"
                assert max(rows) < context.scores.shape[-1], f"{max(rows)} is no token of the vocabulary"
            return tree

        session.__dict__["propose"] = proposed
        return session

    watched.__dict__["begin"] = started
    case.answers(4, watched)
    assert asked, "the drafter was never asked"


def drafter_checks(drafter: Drafter | str, model: Tiny | str = "llava") -> list[Check]:
    """The rules of a drafter under the plain model and under VCD, greedy and sampled, as checks to be called.

    Args:
        drafter: an instance, or the name of one that needs nothing.
        model: a family's name (see ``models.BUILDERS``), or a tiny model that the drafter was made for.

    Raises:
        InputError: ``drafter`` is no drafter.
    """
    zoo = tiny(model) if isinstance(model, str) else model
    made = parse(drafter, zoo.model) if isinstance(drafter, str) else drafter
    if not isinstance(made, Drafter):
        raise InputError(f"{drafter!r} is no drafter; pass an instance of a class that derives from Drafter.")
    cases = [Drafting(made, zoo, load(name)(), options) for name in ("plain", "vcd") for options in ({}, dict(SAMPLED))]
    return [Check(rule, case) for rule in (drafting_changes_no_answer, proposals_fit_the_call) for case in cases]


def check_drafter(drafter: Drafter | str, model: Tiny | str = "llava") -> None:
    """Hold a drafter to its rules; takes what :func:`drafter_checks` takes.

    Raises:
        AssertionError: names the rules that are broken, with what was expected.
        InputError: ``drafter`` is no drafter.
    """
    run_all(drafter_checks(drafter, model))
