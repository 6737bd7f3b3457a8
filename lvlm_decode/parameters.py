"""Parameters of methods and drafters: the authors' names, types, and one sentence about a value that is not valid.

A class of parameters is a dataclass. Its annotations say of what type each one is, its ``__post_init__`` checks their ranges
with :meth:`Checked.check`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import sys
import types
import typing
from abc import ABCMeta
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from .errors import ParameterError, UnknownNameError, suggestion

T = TypeVar("T")
#: What a number must be, in words.
_KINDS = {float: "a finite number", int: "a whole number", bool: "True or False", str: "a text"}


class _Parameters(ABCMeta):
    """Makes the instances of :class:`Checked`: reads the parameters given before the dataclass does."""

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        own: Any = cls
        given = own._named(args, kwargs)
        hints = own._hints()
        for name, value in given.items():
            if isinstance(value, list | range) and _fits(value, hints[name]) and _holds(hints[name], tuple):
                given[name] = value = tuple(value)
            if not _fits(value, hints[name]):
                raise own._wrong(name, value, hints[name], given)
        return super().__call__(**given)  # type: ignore[misc]

    @property
    def __signature__(cls) -> inspect.Signature:
        # Without it, documentation would show the arguments of __call__ above.
        _, *rest = inspect.signature(typing.cast(Any, cls).__init__).parameters.values()
        return inspect.Signature(rest)

    def _fields(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(typing.cast(Any, cls)) if f.init]

    def _hints(cls) -> dict[str, Any]:
        """The types of the parameters; ``Any`` for one that names what is imported for type checkers alone."""
        out = {}
        for owner in reversed(cls.__mro__):
            scope = vars(sys.modules[owner.__module__])
            for name, hint in inspect.get_annotations(owner).items():
                try:
                    out[name] = eval(hint, dict(scope)) if isinstance(hint, str) else hint
                except NameError:
                    out[name] = Any
        return out

    def _named(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The parameters given, by their own names."""
        own: Any = cls
        known = own._fields()
        keyword = {f.name for f in dataclasses.fields(own) if f.kw_only}
        places = [name for name in known if name not in keyword]
        if len(args) > len(places):
            raise ParameterError(
                f"{own.name} was given {len(args)} parameters without a name and has {len(places)}: "
                f"{', '.join(places) or 'none'}."
            )
        given = dict(zip(places, args))
        for key, value in kwargs.items():
            target = own.aliases.get(key, key)
            if target not in known:
                listed = ", ".join(sorted(known)) or "none"
                raise UnknownNameError(
                    f"{own.name} has no parameter {key!r}; its parameters are: {listed}{suggestion(key, known)}."
                )
            if target in given:
                raise ParameterError(f"{own.name} was given {target} twice, once as {key!r}; give it once.")
            given[target] = value
        return given

    def _wrong(cls, name: str, value: Any, hint: Any, given: dict[str, Any]) -> ParameterError:
        """The error that says of what type and in what range parameter ``name`` must be."""
        own: Any = cls
        options = typing.get_args(hint) if _is_union(hint) else (hint,)
        kind = next((_KINDS[option] for option in options if option in _KINDS), None)
        expected = own._range_of(name, given)
        if expected is None:
            expected = _words(hint)
        elif kind is not None and kind != _KINDS[str]:
            expected = f"{kind}, {expected}"
        return ParameterError.of(own.name, name, value, expected)

    def _range_of(cls, name: str, given: dict[str, Any]) -> str | None:
        """What the class's own check of ``name`` expects, or ``None`` if it has no such check."""
        own: Any = cls
        fields = [f for f in dataclasses.fields(own) if f.init]
        values = {f.name: given.get(f.name, f.default) for f in fields} | {name: _Refused()}
        probe = object.__new__(own)
        for key, value in values.items():
            object.__setattr__(probe, key, value)
        try:
            probe.__post_init__()
        except ParameterError as error:
            return error.expected if error.parameter == name else None
        except (AttributeError, TypeError):
            # A check of another parameter met a value that is wrong too.
            return None
        return None


class _Refused:
    """Stands for a value of the wrong type where ranges are checked: it is in none."""

    def _no(self, other: Any) -> bool:
        return False

    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _no

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 0

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Checked(metaclass=_Parameters):
    """Base of methods and drafters.

    Raises:
        UnknownNameError: a parameter that the class does not have.
        ParameterError: a value of another type, or outside its range.
    """

    name: ClassVar[str] = ""
    #: Other spellings of a parameter that users know from the authors' scripts.
    aliases: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        """Checks the ranges."""

    @classmethod
    def file_parameters(cls) -> tuple[str, ...]:
        """The parameters that name files or folders: those that take a path."""
        hints = cls._hints()
        return tuple(name for name in cls._fields() if _takes_path(hints[name]))

    def files(self) -> dict[str, tuple[Path, ...]]:
        """The paths that parameters hold, by parameter; one that was given as a tensor or a module has none."""
        found = {}
        for name in self.file_parameters():
            value = getattr(self, name)
            given = value if isinstance(value, tuple) else (value,)
            found[name] = tuple(Path(one) for one in given if isinstance(one, str | Path))
        return {name: paths for name, paths in found.items() if paths}

    def check(self, condition: bool, parameter: str, expected: str) -> None:
        """Raise :class:`ParameterError` unless ``condition``; used by ``__post_init__``."""
        if not condition:
            raise ParameterError.of(self.name, parameter, getattr(self, parameter), expected)


def takes_several(cls: type[Checked], key: str) -> bool:
    """Whether a parameter, by its own name or an alias, can have several values."""
    own: Any = cls
    return _holds(own._hints().get(own.aliases.get(key, key)), tuple)


def as_written(cls: type[Checked], key: str, value: Any) -> Any:
    """A value of a command line as the parameter takes it: ``None`` for null, ``(1,3)`` and ``1,3`` for several."""
    import yaml

    own: Any = cls
    hint = own._hints().get(own.aliases.get(key, key))
    if hint is None or not isinstance(value, str):
        return value
    if _fits(None, hint) and (value == "None" or (value == "none" and not _fits(value, hint))):
        return None
    bare = value.strip()
    enclosed = bare.startswith("(") and bare.endswith(")")
    # A text with commas is one text where one is taken.
    if not takes_several(cls, key) or "," not in bare or (_fits(value, hint) and not enclosed):
        return value
    try:
        return yaml.safe_load(f"[{bare[1:-1] if enclosed else bare}]")
    except yaml.YAMLError:
        return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _holds(hint: Any, kind: type) -> bool:
    """Whether ``hint`` is a ``kind``, or has one among its options."""
    return any(typing.get_origin(option) is kind for option in (typing.get_args(hint) if _is_union(hint) else [hint]))


def _takes_path(hint: Any) -> bool:
    """Whether ``hint`` is a path, or has one, or several, among its options."""
    options = typing.get_args(hint) if _is_union(hint) or typing.get_origin(hint) is tuple else ()
    return hint is Path or any(map(_takes_path, options))


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type that ``hint`` names."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is None:
        return value is None
    if _is_union(hint):
        return any(_fits(value, option) for option in args)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in args)
    if origin is tuple:
        if not isinstance(value, tuple | list | range):
            return False
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _words(hint: Any) -> str:
    if hint in _KINDS:
        return _KINDS[hint]
    if hint is None or hint is type(None):
        return "None"
    if _is_union(hint):
        return " or ".join(map(_words, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"[{', '.join('...' if kind is Ellipsis else _words(kind) for kind in typing.get_args(hint))}]"
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return f"a {getattr(hint, '__name__', hint)}"
