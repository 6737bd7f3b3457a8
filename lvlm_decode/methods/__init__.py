"""METHODS: name -> "module:Class". A method is one file and one line here."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from ..errors import UnknownNameError, suggestion
from ..method import Method, Sum
from ..parameters import as_written, takes_several
from ..plugins import Plugin, plugins

METHODS: dict[str, str] = {
    "plain": ".plain:Plain",
    "mask": ".plain:Mask",
    "vcd": ".vcd:VCD",
    "ritual": ".ritual:RITUAL",
    "icd": ".icd:ICD",
    "m3id": ".m3id:M3ID",
    "lqcd": ".lqcd:LQCD",
    "cad": ".cad:CAD",
    "vdd": ".vdd:VDD",
    "cicd": ".cicd:CICD",
    "code": ".code:CODE",
    "pai": ".pai:PAI",
    "spin": ".spin:SPIN",
    "vaf": ".vaf:VAF",
    "hgai": ".hgai:HGAI",
    "cai": ".cai:CAI",
    "ilvad": ".ilvad:ILVAD",
    "sid": ".sid:SID",
    "crops": ".crops:CRoPS",
    "avisc": ".avisc:AvisC",
    "mod": ".mod:MoD",
    "only": ".only:ONLY",
    "causalmm": ".causalmm:CausalMM",
    "damro": ".damro:DAMRO",
    "layercd": ".layercd:LayerCD",
    "dcd": ".dcd:DCD",
    "dola": ".dola:DoLa",
    "deco": ".deco:DeCo",
    "lol": ".lol:LOL",
    "uscd": ".uscd:USCD",
    "scmoe": ".scmoe:SCMoE",
    "vista": ".vista:VISTA",
    "vti": ".vti:VTI",
    "nullu": ".nullu:Nullu",
    "revis": ".revis:Revis",
    "memvr": ".memvr:MemVR",
    "opera": "lvlm_decode.controllers.opera:OPERA",
    "cntp": "lvlm_decode.controllers.cntp:CNTP",
    "vdgd": "lvlm_decode.controllers.vdgd:VDGD",
    "mvp": "lvlm_decode.controllers.mvp:MVP",
}


def load(name: str) -> type[Method]:
    """The class registered under ``name``.

    Raises:
        UnknownNameError: lists the names there are.
    """
    entry, name = METHODS.get(name.lower()), name.lower()
    if entry is None and name in (others := foreign()):
        return others[name].load("Method")
    if entry is None:
        hint = "; methods are added up with +" if "," in name else suggestion(name, names())
        raise UnknownNameError(f"unknown method {name!r}; known methods: {', '.join(names())}{hint}.")
    module, attribute = entry.split(":")
    return getattr(importlib.import_module(module, __name__), attribute)


def foreign() -> dict[str, Plugin]:
    """The methods that other packages bring, by name."""
    return plugins("lvlm_decode.methods", frozenset(METHODS))


def names() -> list[str]:
    """All methods that can be loaded, this library's own first."""
    return [*METHODS, *foreign()]


def parse(text: str, **parameters: Any) -> Method:
    """A method, or a sum of methods, from its command-line form.

    ``"vcd"``, ``"vcd+ritual"``, ``"vcd(alpha=0.5,beta=0.2)+icd"``, ``"hgai(layers=1,3)"``; ``parameters`` go to every part
    that has them. Values are YAML; ``None`` is null, and several may stand in parentheses.

    Raises:
        UnknownNameError: an unknown method, or a parameter that no part has.
        ParameterError: a value outside its range.
    """
    parts, unused = [], set(parameters)
    for piece in _split(text, "+"):
        cls, own = _call(piece, text)
        known = {f.name for f in dataclasses.fields(cls)} | set(cls.aliases)
        shared = {
            key: value for key, value in parameters.items() if key in known and cls.aliases.get(key, key) in known
        }
        unused -= set(shared)
        parts.append(cls(**{key: as_written(cls, key, value) for key, value in {**shared, **own}.items()}))
    if unused:
        known = {field.name for part in parts for field in dataclasses.fields(part)}
        hints = "".join(suggestion(name, known) for name in sorted(unused))
        raise UnknownNameError(f"{text} has no parameter {', '.join(sorted(unused))}{hints}.")
    return parts[0] if len(parts) == 1 else Sum.of(*parts)


def classes(text: str) -> list[type[Method]]:
    """The classes of the parts of a method in its command-line form, whatever parameters they still need.

    Raises:
        UnknownNameError: an unknown method, or text that is not such a form.
    """
    return [_call(piece, text)[0] for piece in _split(text, "+")]


def _split(text: str, separator: str) -> list[str]:
    """Split at ``separator`` outside parentheses and brackets."""
    pieces, depth, at = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == separator and depth == 0:
            pieces.append(text[at:i])
            at = i + 1
    return [piece.strip() for piece in [*pieces, text[at:]]]


def _call(piece: str, text: str) -> tuple[type[Method], dict[str, Any]]:
    """(VCD, {"alpha": 0.5}) from ``vcd(alpha=0.5)``."""
    import yaml

    name, bracket, rest = piece.partition("(")
    cls = load(name)
    if not bracket:
        return cls, {}
    if not rest.endswith(")"):
        raise UnknownNameError(
            f"cannot read method {text!r}: a closing parenthesis is missing; write 'vcd(alpha=0.5)'."
        )
    written: dict[str, list[str]] = {}
    for item in filter(None, _split(rest[:-1], ",")):
        key, equals, value = item.partition("=")
        if equals:
            written[key.strip()] = [value]
        elif written and takes_several(cls, last := list(written)[-1]):
            # What stands without a name goes on with the parameter before it.
            written[last].append(item)
        else:
            raise UnknownNameError(f"cannot read {item!r} in method {text!r}; write parameter=value.")
    own = {}
    for key, values in written.items():
        value = values[0] if len(values) == 1 else f"[{','.join(values)}]"
        try:
            own[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
            item = f"{key}={value}"
            raise UnknownNameError(f"cannot read {item!r} in method {text!r}; write parameter=value.") from error
    return cls, own
