"""What a request says of its group: one JSON text in ``SamplingParams.extra_args``, which every transport of vLLM carries.

A server that is exposed beside this library's own front can be sent any text here, so it is read within bounds and nothing in
it is trusted: a text that cannot be read is refused by the frontend, before the engine sees the request.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError, LvlmDecodeError
from ..hub import of_settings, settings_of
from ..method import Method, Step, Sum
from .served import check_served

#: The key in ``extra_args``.
KEY = "lvlm_decode"
#: Of the text, in characters, and of a group, in views.
LONGEST, MOST_VIEWS = 20_000, 16


class Printed(str):
    """Stands for an id of which the printed form is known: its draws are keyed by that form."""

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Member:
    """One view of a group.

    Args:
        group: name of the group, drawn by who makes it; a guess must not meet another's.
        view: number of the view, 0 is the sample itself.
        views: how many the group has.
        method: as ``lvlm_decode.hub.settings_of`` describes it, without what only views are made with.
        weights: signed weight of each view but the first.
        counts: of a sum, how many views each part has.
        seed, id: key the draws; see :func:`lvlm_decode.engine.sampling.gumbel`. ``id`` is the printed form of the sample's.
        temperature: 0 takes the best token.
        top_k, top_p, min_p: as transformers reads them; 0, 1.0 and 0.0 leave all tokens.
    """

    group: str
    view: int
    views: int
    method: str
    weights: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    seed: int = 0
    id: str = "None"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        numbers = (*self.weights, self.temperature, self.top_p, self.min_p)
        right = (
            isinstance(self.group, str)
            and bool(self.group)
            and isinstance(self.method, str)
            and isinstance(self.id, str)
            and all(
                isinstance(n, int) and not isinstance(n, bool) for n in (self.view, self.views, self.seed, self.top_k)
            )
            and 0 <= self.view < self.views <= MOST_VIEWS
            and all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
            and all(isinstance(n, int) and 0 <= n <= MOST_VIEWS for n in self.counts)
            and len(self.weights) == self.views - 1
            and self.temperature >= 0
            and self.top_k >= 0
            and 0 < self.top_p <= 1
            and 0 <= self.min_p <= 1
            and abs(self.seed) < 2**63
        )
        if not right:
            raise InputError(f"{KEY}: these are no settings of a view: {str(dataclasses.asdict(self))[:300]}.")

    @property
    def recipe(self) -> tuple[str, tuple[float, ...], tuple[int, ...]]:
        """What groups whose rows are combined together must share."""
        return self.method, self.weights, self.counts

    @property
    def draw(self) -> tuple[float, int, float, float]:
        """The warpers of the draw."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    def text(self) -> str:
        """The form that travels."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def common(self) -> tuple[Any, ...]:
        """What all views of a group say alike."""
        return tuple(value for name, value in dataclasses.asdict(self).items() if name != "view")


def as_request(params: Any, member: Member, view: int, max_tokens: int) -> Any:
    """The caller's sampling parameters as those of one view: the group draws, so that the view itself is greedy.

    Args:
        max_tokens: the same for all views.
    """
    own = copy.deepcopy(params)
    own.temperature, own.top_k, own.top_p, own.min_p, own.seed = 0.0, 0, 1.0, 0.0, None
    own.max_tokens = max_tokens
    own.extra_args = {**(params.extra_args or {}), KEY: dataclasses.replace(member, view=view).text()}
    if view and not params.stop:
        # Its tokens are those of view 0, whose text is the answer. Strings that stop must stop all views.
        own.detokenize, own.output_kind = False, type(params.output_kind).FINAL_ONLY
    return own


def printed(id: Hashable) -> str:
    """The form of an id that keys draws."""
    return repr(id)


def described(method: Method) -> str:
    """The settings of ``method`` as text.

    Raises:
        UnsupportedError: a parameter that no text can hold.
    """
    return json.dumps(settings_of(method))


def of_params(params: Any) -> Member | None:
    """The view that sampling parameters belong to; ``None`` for an ordinary request.

    Raises:
        InputError: a text that no view is described by.
    """
    text = (getattr(params, "extra_args", None) or {}).get(KEY)
    return None if text is None else member(text)


@functools.lru_cache(65536)
def member(text: str) -> Member:
    """Read the form that travels.

    Raises:
        InputError: not such a text.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise InputError(f"{KEY} in extra_args must be a text of at most {LONGEST} characters.")
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise TypeError("no object")
        for name in ("weights", "counts"):
            given[name] = tuple(given.get(name, ()))
        found = Member(**given)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, LvlmDecodeError):
            raise
        raise InputError(f"{KEY} in extra_args cannot be read: {str(error)[:200]}.") from error
    # Made here, so that a method that cannot score these views is refused before the engine sees the request.
    made(*found.recipe)
    return found


@functools.lru_cache(1024)
def made(settings: str, weights: tuple[float, ...], counts: tuple[int, ...]) -> Method:
    """The method that ``settings`` describe, tried on views of that number.

    Raises:
        LvlmDecodeError: unknown, with parameters outside their ranges, not served, or made for another number of views.
    """
    try:
        parsed = json.loads(settings)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{KEY}: the method cannot be read as JSON.") from error
    try:
        method = of_settings(parsed, KEY)
    except (AttributeError, RecursionError) as error:
        raise InputError(f"{KEY}: these settings are those of no method: {settings[:100]}") from error
    check_served(method)
    method = method.needed()
    if isinstance(method, Sum):
        method = method.with_counts(counts)
    views = 1 + len(weights)
    if sum(counts) != (len(weights) if isinstance(method, Sum) else 0) or len(counts) != _parts(method):
        raise InputError(f"{KEY}: the counts of views {counts} are not those of {method.name} with {views} views.")
    # The engine must not be the first to find out that a method expects another number of views.
    trial = Step(torch.zeros(views, 1, 1, 64), torch.zeros(1, 1, dtype=torch.long), weights)
    try:
        method.scores(trial)
    except (ValueError, IndexError, RuntimeError, TypeError) as error:
        raise InputError(f"{KEY}: {method.name} cannot score {views} views ({str(error)[:100]}).") from error
    return method


def _parts(method: Method) -> int:
    return len(method.methods) if isinstance(method, Sum) else 0
