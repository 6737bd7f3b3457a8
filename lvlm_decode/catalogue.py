"""What every method is, costs and supports, read off the classes: the command line, the README and the tests use it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from typing import Any

from .engine.modes import MODES
from .errors import DependencyError
from .method import Method
from .methods import METHODS, foreign, load, names

#: What a view of each kind adds to plain decoding.
COSTS = {
    "image": "a vision pass and a row in every forward",
    "text": "a row in every forward",
    "feature": "a row in every forward",
    "layers": "language-head projections of some hidden layers",
    "attention": "attention rows of some layers",
    "forward": "a forward of its own per step",
    "search": "a search of its own",
    "captions": "captions written beforehand",
}


def parameter_notes(cls: type[Method]) -> dict[str, str]:
    """Field -> what its line's comment, or the ``Args`` of a docstring, says about it."""
    notes: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base) or base is Method:
            continue
        source = textwrap.dedent(inspect.getsource(base))
        comments = {
            token.start[0]: token.string.lstrip("# ").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for node in next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef)).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.lineno in comments:
                notes[node.target.id] = comments[node.lineno]
        for name, text in re.findall(r"^ +(\w+): (.+?)(?=^ +\w+: |\n\s*\n|\Z)", base.__doc__ or "", re.M | re.S):
            if name in base.__dataclass_fields__:
                notes.setdefault(name, " ".join(text.split()))
    return notes


def describe(name: str) -> dict[str, Any]:
    """One method: ``name``, ``paper``, ``arxiv``, ``parameters``, ``costs``, ``refuses``, ``needs``, ``summary``, ``package``.

    Raises:
        UnknownNameError: no such method.
    """
    cls = load(name)
    notes = parameter_notes(cls)
    parameters = [
        {
            "name": field.name,
            "type": field.type if isinstance(field.type, str) else str(field.type),
            "default": None if field.default is dataclasses.MISSING else field.default,
            "description": notes.get(field.name, ""),
        }
        for field in dataclasses.fields(cls)
    ]
    aliases = {alias: target for alias, target in cls.aliases.items() if target in {p["name"] for p in parameters}}
    return {
        "name": name,
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


def markdown() -> str:
    """The table of methods in the README."""
    lines = [
        "| method | paper | parameters (default) | costs beside plain decoding | cannot do |",
        "|---|---|---|---|---|",
    ]
    for method in map(describe, METHODS):
        paper = f"[{method['paper']}](https://arxiv.org/abs/{method['arxiv']})" if method["arxiv"] else method["paper"]
        values = ", ".join(f"`{p['name']}`{_short(p['default'])}" for p in method["parameters"])
        cannot = ", ".join(method["refuses"]) or "–"
        lines.append(f"| `{method['name']}` | {paper} | {values or '–'} | {method['cost']} | {cannot} |")
    return "\n".join(lines)


def _short(value: Any) -> str:
    """The default in brackets where it fits a table: numbers and single words."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f" ({text})" if re.fullmatch(r"[\w.-]{1,12}", text) and value is not None else ""
