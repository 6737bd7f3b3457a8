"""Drafters by name.

>>> drafter = drafters.parse("recycling(rows=8,depth=4)", model=model)
>>> model = lvlm_decode.attach(model, VCD(), drafter=drafter)
"""

from __future__ import annotations

import ast
import importlib
from typing import Any

from ...errors import ParameterError, UnknownNameError, suggestion
from ...plugins import Plugin, plugins
from .base import Context, Drafter, Features, Session, Verified

#: name -> "module:Class", relative to this package.
DRAFTERS: dict[str, str] = {
    "lookup": ".lookup:PromptLookup",
    "copyspec": ".lookup:CopySpec",
    "recycling": ".recycling:Recycling",
    "automaton": ".automaton:SuffixAutomaton",
    "eagle": ".head:EagleDrafter",
    "msd": ".head:MsdDrafter",
    "vispec": ".head:ViSpecDrafter",
    "eagle3": ".head:Eagle3Drafter",
    "auto": ".auto:Auto",
}

__all__ = ["DRAFTERS", "Context", "Drafter", "Features", "Session", "Verified", "get", "parse"]


def get(name: str) -> type[Drafter]:
    """The drafter class of this name.

    Raises:
        UnknownNameError: lists the names there are.
    """
    if name not in DRAFTERS and name in (others := foreign()):
        return others[name].load("Drafter")
    if name not in DRAFTERS:
        raise UnknownNameError(
            f"unknown drafter {name!r}; choose one of {', '.join(names())}, or none{suggestion(name, names())}."
        )
    module, _, attribute = DRAFTERS[name].partition(":")
    return getattr(importlib.import_module(module, __name__), attribute)


def foreign() -> dict[str, Plugin]:
    """The drafters that other packages bring, by name."""
    return plugins("lvlm_decode.drafters", frozenset(DRAFTERS))


def names() -> list[str]:
    """All drafters that can be had, this library's own first."""
    return [*DRAFTERS, *foreign()]


def _parts(text: str) -> list[str]:
    """``text`` cut at its commas, those inside of brackets left out."""
    parts, open_ = [""], 0
    for letter in text:
        open_ += (letter in "([") - (letter in ")]")
        if letter == "," and open_ == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def parse(text: str | Drafter | None, model: Any | None = None) -> Drafter | None:
    """The drafter that ``text`` names: ``"recycling"``, ``"recycling(rows=8,depth=4)"``, ``"vispec(path=FOLDER)"``.

    Args:
        text: a name with parameters, ``"none"`` or ``None`` for no drafter, or a drafter, which is returned as it is.
        model: the model it will draft for; draft heads are looked up by it.

    Raises:
        UnknownNameError: an unknown drafter or parameter.
        ParameterError: a parameter without a value.
    """
    if text is None or isinstance(text, Drafter):
        return text
    name, bracket, rest = text.strip().partition("(")
    if name == "none":
        return None
    if bracket and not rest.endswith(")"):
        raise ParameterError(
            f"drafter {text!r}: the bracket is not closed; write name(parameter=value,parameter=value)."
        )
    parameters: dict[str, Any] = {}
    for part in filter(None, _parts(rest[:-1])):
        key, equals, value = part.partition("=")
        if not equals:
            raise ParameterError(
                f"drafter {text!r}: {part!r} has no value; write name(parameter=value,parameter=value)."
            )
        try:
            parameters[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            parameters[key.strip()] = value.strip()
    return get(name).create(model=model, **parameters)
