"""What goes wrong, in one sentence each: what was given, what was expected, what to do.

One module for models and evaluators; it imports no torch, because scorers must not.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[object]) -> str:
    """How a sentence about an unknown name ends: the known ones, and the nearest of them."""
    names = sorted(map(str, known))
    return (f"; known: {', '.join(names)}" if names else "") + suggestion(name, names)


def suggestion(name: object, known: Iterable[object]) -> str:
    """``; the nearest is 'vcd'`` where a known name resembles ``name``, else nothing."""
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=3, cutoff=0.5)
    # Letters that changed places are the commonest slip.
    close.sort(key=lambda found: sorted(found) != sorted(str(name)))
    return f"; the nearest is {close[0]!r}" if close else ""


class LvlmDecodeError(ValueError):
    """Base of every error this library raises on purpose."""


class UnknownNameError(LvlmDecodeError):
    """A method, family, drafter, parameter, evaluator, rule or format that no registry knows."""

    @classmethod
    def of(cls, kind: str, name: object, known: Iterable[object]) -> UnknownNameError:
        return cls(f"{kind} {name!r} is unknown{nearest(name, known)}.")


class ParameterError(LvlmDecodeError):
    """A hyper-parameter of another type or outside its range.

    Attributes:
        parameter, expected: which one, and what it must be, where the error is about one.
    """

    parameter: str | None = None
    expected: str | None = None

    @classmethod
    def of(cls, owner: str, parameter: str, value: object, expected: str) -> ParameterError:
        error = cls(f"{owner}: {parameter} = {value!r} is not valid; it must be {expected}.")
        error.parameter, error.expected = parameter, expected
        return error


class UnsupportedError(LvlmDecodeError):
    """A setting, model family or combination that a method cannot honour."""


class InputError(LvlmDecodeError):
    """Inputs that contradict each other or the model: images and placeholders, batch sizes, missing prompts."""


class DependencyError(LvlmDecodeError):
    """A library that is missing, too old or too new; the message says how to get a right one."""


class EvalError(LvlmDecodeError):
    """Questions, answers or scores that contradict each other."""


class FileFormatError(EvalError):
    """A file that cannot be read as what it was given as; the message names file, line and field."""


class MissingFileError(EvalError):
    """A file or folder that is not there; the message says which one to put where."""


class SettingsError(EvalError):
    """Settings that contradict each other, or the settings an earlier run left in the same folder."""


class LockedError(EvalError):
    """A folder that another run is writing into; the message says which process, on which machine, since when."""


class UnreachableError(EvalError):
    """A server that does not answer; what was answered before is kept."""


class OutputError(EvalError):
    """A file or folder that cannot be written: read-only, on a full disk, or in the way."""

    @classmethod
    def of(cls, path: object, error: OSError) -> OutputError:
        reason = error.strerror or str(error)
        return cls(
            f"{path} cannot be written ({reason}); what is there stays, so mend that and start again, or write elsewhere."
        )


class OutsideError(EvalError):
    """A name in a file that leads out of the folder it belongs to."""
