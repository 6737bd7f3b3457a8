"""Which methods clients may name, and the method that a request means."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LvlmDecodeError, ParameterError, UnknownNameError, suggestion
from ..method import Method
from ..methods import METHODS, load, names, parse
from .body import FIELDS
from .refusals import Refused

#: Views of several methods are held at once, so a sum of a client has at most so many parts.
MOST_PARTS = 4
#: Parameters that say how much work a request is -> the most that a client may ask for.
MOST = {
    "num_beams": 16,
    "num_attn_candidates": 16,
    "paths": 16,
    "max_trials": 64,
    "path_tokens": 512,
    "caption_tokens": 1024,
    "description_tokens": 1024,
    "max_description": 1024,
}
#: Parameters that only the operator gives, beside those that take the path of a file.
OPERATORS = frozenset({"model", "suggestion"})


@dataclass(frozen=True)
class Choice:
    """A method and how it is written; equal writings are equal methods."""

    method: Method
    spec: str


class Menu:
    """The methods of a server.

    Args:
        served: the name of the model.
        specs: methods of the operator, as on the command line; the first is that of a request which names none. A client that
            says the bare name of one gets it as it is written here.
        runs: raises a :class:`~lvlm_decode.errors.LvlmDecodeError` for a method that the model cannot run.

    Raises:
        LvlmDecodeError: an operator's method that is unknown, wrong, or not for this model.
    """

    def __init__(self, served: str, specs: Sequence[str], runs: Callable[[Method], None]):
        self.served, self._runs = served, runs
        self.own: dict[str, Choice] = {}
        for spec in specs or ("plain",):
            method = parse(spec)
            runs(method)
            self.own.setdefault(method.name, Choice(method, spec))
        self.default = next(iter(self.own.values()))

    def methods(self) -> list[str]:
        """What a client may name without more, the default first."""
        found = [*self.own]
        for name in names():
            try:
                self._runs(parse(name))
            except LvlmDecodeError:
                # Not for this model, or not without a file that only the operator names.
                continue
            found.append(name)
        return list(dict.fromkeys(found))

    def choose(self, model: str, method: str | None, parameters: Mapping[str, Any]) -> Choice:
        """The method of a request.

        Args:
            model: as the request names it: the served name, alone or with ``:method`` behind it.
            method: the request's field of that name.
            parameters: fields of the request that are none of the chat API.

        Raises:
            Refused: 404 for another model; 400 for an unknown method, field or value, with the nearest known one.
        """
        named, colon, behind = model, "", ""
        if model.startswith(f"{self.served}:"):
            named, colon, behind = self.served, ":", model[len(self.served) + 1 :]
        if named != self.served:
            raise Refused(
                404,
                f"the model {model!r} is not served here; it is {self.served!r}, alone or with a method behind a colon, for "
                f"instance {self.served}:vcd{suggestion(model, [self.served])}.",
                "model",
                "model_not_found",
            )
        if colon and method is not None and method != behind:
            raise Refused(400, f"model names the method {behind!r} and method {method!r}; name one.", "method")
        wanted = behind if colon else method
        field = "model" if colon else "method"
        if wanted is None:
            spec, trusted = self.default.spec, True
        elif wanted in self.own:
            spec, trusted = self.own[wanted].spec, True
        else:
            spec, trusted = wanted, False
        if not parameters and trusted:
            return next(choice for choice in self.own.values() if choice.spec == spec)
        return self._parsed(spec, parameters, field, trusted)

    def _parsed(self, spec: str, parameters: Mapping[str, Any], field: str, trusted: bool) -> Choice:
        if parameters and "(" in spec:
            raise Refused(
                400,
                f"parameters of the method are given twice: in {spec!r} and as {', '.join(sorted(parameters))}; write all of "
                "them into the method.",
                sorted(parameters)[0],
            )
        for name in parameters.keys() & _operators():
            raise Refused(400, _OPERATORS_ONLY.format(name), name)
        try:
            known = {
                name
                for part in parse(spec).parts()
                for name in (*part.aliases, *(f.name for f in dataclasses.fields(part)))
            }
            for name in parameters.keys() - known:
                near = suggestion(name, [*FIELDS, *known])
                raise Refused(
                    400,
                    f"{name!r} is neither a field of a chat request nor a parameter of {spec}{near}.",
                    name,
                    "unknown_parameter",
                )
            method = parse(spec, **parameters)
            self._bounded(method, parameters if trusted else None)
            self._runs(method)
        except UnknownNameError as error:
            raise Refused(400, str(error), field, "unknown_method") from error
        except ParameterError as error:
            raise Refused(400, str(error), error.parameter if error.parameter in parameters else field) from error
        except LvlmDecodeError as error:
            raise Refused(400, str(error), field) from error
        return Choice(method, spec if not parameters else f"{spec} {json.dumps(dict(parameters), sort_keys=True)}")

    def _bounded(self, method: Method, only: Mapping[str, Any] | None = None) -> None:
        """Raise for what a client may not ask for."""
        if len(method.parts()) > MOST_PARTS:
            raise Refused(400, f"a sum of {len(method.parts())} methods is asked for; at most {MOST_PARTS}.", "method")
        for part in method.parts():
            for parameter in dataclasses.fields(part):
                name, value = parameter.name, getattr(part, parameter.name)
                if only is not None and name not in only:
                    continue
                if (name in OPERATORS or name in part.file_parameters()) and value != parameter.default:
                    raise Refused(400, _OPERATORS_ONLY.format(name), name)
                if name in MOST and isinstance(value, int) and value > MOST[name]:
                    raise Refused(
                        400, f"{part.name}: {name} = {value} is too much for one request; at most {MOST[name]}.", name
                    )


@functools.cache
def _operators() -> frozenset[str]:
    """Parameters that only the operator gives, of all methods of this library."""
    return OPERATORS.union(*(load(name).file_parameters() for name in METHODS))


_OPERATORS_ONLY = "{} names a file or a pattern, which only the server's own --method may; leave it out."
