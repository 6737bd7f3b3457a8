"""What every method is, costs and supports, read off the classes: the command line, the README and the tests use it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from .engine.modes import MODES
from .errors import DependencyError, ParameterError
from .method import Method
from .methods import METHODS, foreign, load, names

#: The kinds of methods, in the order in which they are shown: ``Method.kind`` -> in words.
KINDS = {
    "reference": "what the others are compared with",
    "contrast": "another view of the sample is added or subtracted",
    "layers": "predictions of earlier layers are added or subtracted",
    "attention": "the decoder attends otherwise",
    "steering": "hidden states are moved",
    "search": "a search of its own",
}

#: What a view of each kind adds to plain decoding.
COSTS = {
    "image": "a vision pass and a row in every forward",
    "text": "a row in every forward",
    "beginning": "the first tokens of a plain answer, written and read again before decoding",
    "prompt": "a forward of the prompt as the view sees it, before decoding",
    "prompts": "a forward of the prompt with the image and without, before decoding",
    "feature": "a row in every forward",
    "branch": "an attention row of one layer, an MLP and a language-head projection per token",
    "layers": "language-head projections of some hidden layers",
    "states": "a change of the hidden states of some layers",
    "attention": "attention rows of some layers",
    "forward": "a forward of its own per step",
    "search": "a search of its own",
    "captions": "captions written beforehand",
}


def parameter_notes(cls: type[Method]) -> dict[str, str]:
    """Field -> what ``metadata["help"]`` of the field, or else the ``Args`` of its class's docstring, says about it."""
    notes: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base) and base is not Method:
            notes |= documented(inspect.cleandoc(base.__doc__ or ""))
    fields = dataclasses.fields(cls)
    notes |= {field.name: field.metadata["help"] for field in fields if "help" in field.metadata}
    return {field.name: notes[field.name] for field in fields if field.name in notes}


def required(cls: type[Method]) -> set[str]:
    """The parameters without which the method cannot be made: those without a default, or whose default is refused."""
    missing = dataclasses.MISSING
    needed = {f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}
    if not needed:
        try:
            cls()
        except ParameterError as error:
            needed = {error.parameter} if error.parameter else set()
    return needed


def documented(docstring: str) -> dict[str, str]:
    """Name -> text from the ``Args`` section of a docstring in Google style."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.M | re.S)
    found = re.findall(r"^ {4}(\w+): (.+?)(?=^ {4}\w+: |\Z)", section[1] if section else "", re.M | re.S)
    return {name: " ".join(text.split()) for name, text in found}


def describe(name: str) -> dict[str, Any]:
    """One method: ``name``, ``kind``, ``paper``, ``arxiv``, ``parameters``, ``costs``, ``refuses``, ``needs``, ``summary``
    and ``package``.

    Raises:
        UnknownNameError: no such method.
    """
    cls = load(name)
    notes, needed = parameter_notes(cls), required(cls)
    parameters = [
        {
            "name": field.name,
            "type": field.type if isinstance(field.type, str) else str(field.type),
            "default": None if field.default is dataclasses.MISSING else field.default,
            "required": field.name in needed,
            "description": notes.get(field.name, ""),
        }
        for field in dataclasses.fields(cls)
    ]
    aliases = {alias: target for alias, target in cls.aliases.items() if target in {p["name"] for p in parameters}}
    return {
        "name": name,
        "kind": cls.kind,
        "paper": cls.paper,
        "arxiv": cls.arxiv,
        "summary": (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "),
        "parameters": parameters,
        "aliases": aliases,
        "costs": list(cls.costs),
        "cost": "; ".join(COSTS[kind] for kind in cls.costs) or "nothing",
        "refuses": {MODES[mode]: why for mode, why in cls.refuses.items()},
        "supports": [words for mode, words in MODES.items() if mode not in cls.refuses],
        "needs": list(cls.needs),
        "package": None if name in METHODS else foreign()[name].package,
    }


def methods() -> list[dict[str, Any]]:
    """Every method that can be loaded, this library's own first, in the registry's order."""
    bad = broken()
    return [describe(name) for name in names() if name not in bad]


def broken() -> dict[str, str]:
    """The methods of other packages that cannot be loaded, and why not."""
    found = {}
    for name in foreign():
        try:
            load(name)
        except DependencyError as error:
            found[name] = str(error)
    return found


def by_kind(described: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Methods in groups, in the order of :data:`KINDS`; kinds that other packages bring come last."""
    groups: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for method in described:
        groups.setdefault(method["kind"], []).append(method)
    return {kind: group for kind, group in groups.items() if group}


def markdown() -> str:
    """The table of methods in the README: kind by kind, and what each does."""
    lines = ["| method | what it does |", "|---|---|"]
    for group in by_kind([describe(name) for name in METHODS]).values():
        for method in group:
            lines.append(f"| `{method['name']}` | {method['summary'].removesuffix('.')} |")
    return "\n".join(lines)
