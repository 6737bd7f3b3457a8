"""What goes wrong while loading, scoring or tabulating, in one sentence each: what was given, what was expected, what
to do.

Kept apart from `lvlm_decode.errors`, because scorers must import without torch.
"""


class EvalError(ValueError):
    """Base of every error this package raises on purpose."""


class UnknownNameError(EvalError):
    """An evaluator, parsing rule, split, column or format that no registry knows."""

    @classmethod
    def of(cls, kind: str, name: object, known) -> "UnknownNameError":
        return cls(f"{kind} {name!r} is unknown; known: {', '.join(sorted(map(str, known)))}.")


class FileFormatError(EvalError):
    """A file that cannot be read as what it was given as; the message names file, line and field."""


class MissingFileError(EvalError):
    """A file or folder that is not there; the message says which one to put where."""


class SettingsError(EvalError):
    """Settings that contradict each other, or the settings an earlier run left in the same folder."""


class MissingDependencyError(EvalError):
    """An optional library that a command needs; the message says which extra installs it."""
