"""One reading layer: bytes, text, JSON, YAML and tables of files from elsewhere or from a former run, and the shapes that
are expected of them. What does not fit ends in one sentence that names file, line and field, and is never guessed at.

Shapes are declared as pydantic models (`Record`); a reader says `checked(Shape, value, where)` and gets typed fields. Imports
no torch.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import reprlib
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

import pydantic_core
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from .errors import FileFormatError, MissingFileError, OutputError, nearest

# What one file may unpack to, in bytes. COCO's largest annotation file has half of it.
LARGEST = 1 << 30
# One cell of a table may hold a whole image in base64.
_CELL = 1 << 28
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60
_SHOWN.maxlevel = 2


class Record(BaseModel):
    """A JSON object of a known shape; fields that nobody declared are allowed and kept. Types are taken as they are:
    "1" is no number and 1 no text.
    """

    model_config = ConfigDict(
        strict=True, extra="allow", frozen=True, protected_namespaces=(), hide_input_in_errors=True
    )


class Closed(Record):
    """A mapping whose fields are all known: an unknown one is a mistake, and the nearest known one is named."""

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, value: Any) -> Any:
        for name in value if isinstance(value, Mapping) else ():
            if name not in cls.model_fields:
                meant = nearest(str(name), cls.model_fields)
                raise PydanticCustomError("unknown_field", "is unknown", {"name": name, "meant": meant})
        return value


# Ids stay within 64 bits: longer digits are damage, and no tool writes them.
Identity = Annotated[int, Field(ge=-(2**63), lt=2**63)] | str
Count = Annotated[int, Field(ge=0, lt=2**63)]
T = TypeVar("T")
R = TypeVar("R", bound=Record)


# From disk ---------------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed if it is gzip (by content, not by name).

    Raises MissingFileError where there is no such file, FileFormatError where it cannot be read or unpacked.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise MissingFileError(f"{path} is not a file; give the path of an existing file.")
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if isinstance(error, MissingFileError):
            raise
        raise MissingFileError(f"{path} is not a file; give the path of an existing file.") from error
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read ({error.strerror or error}).") from error
    if content[:2] != b"\x1f\x8b":
        if path.suffix == ".gz" and not _is_text(content):
            raise FileFormatError(f"{path} is a damaged gzip file (it does not begin as one does); fetch it again.")
        return content
    try:
        with gzip.open(io.BytesIO(content)) as packed:
            unpacked = packed.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FileFormatError(f"{path} is a damaged gzip file ({error}); fetch it again.") from error
    if len(unpacked) > LARGEST:
        raise FileFormatError(f"{path} unpacks to more than {LARGEST} bytes; no file that is read here is so large.")
    return unpacked


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True


def read_text(path: Path) -> str:
    """The text of a file, decompressed if it is gzip, without a byte order mark."""
    return decoded(read_bytes(path), path)


def decoded(content: bytes, path: Path) -> str:
    """UTF-8 content as text. Raises FileFormatError naming file and line of what is not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        other = "; it looks like UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise FileFormatError(
            f"{path} is not UTF-8 text (line {line}: {error.reason} at byte {error.start}{other}); save it as UTF-8."
        ) from error


def parse_json(text: str, where: str, expected: str = "") -> Any:
    """One JSON value.

    Refused in one sentence, although Python's own parser takes them: NaN and numbers beyond a double, halves of
    surrogate pairs, numbers of thousands of digits, nesting deeper than 200, a field that an object has twice.
    """
    try:
        pydantic_core.from_json(text, allow_inf_nan=False)
        return json.loads(text, parse_float=_finite, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        found = reason.rpartition(" at line 1 column ")
        if found[1] and found[2].isdecimal():
            reason = f"{found[0]}, column {found[2]}"
        raise FileFormatError(f"{where}: broken JSON ({reason}){f'; {expected}' if expected else ''}.") from error


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"number {shown(digits)} is out of range")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"field {shown(repeated(name for name, _ in pairs)[0])} is there twice")
    return made


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, by where they occur again."""
    seen: set[str] = set()
    again: dict[str, None] = {}
    for name in names:
        if name in seen:
            again[name] = None
        seen.add(name)
    return list(again)


def read_json(path: Path) -> Any:
    """One JSON value from a file, gzip or not."""
    return parse_json(read_text(path), str(path))


def read_values(path: Path) -> list[tuple[str, Any]]:
    """(where, JSON value) of a file, gzip or not: the entries of one array, the lines of JSON lines, or one value that
    spreads over several lines.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        entries = parse_json(text, str(path))
        found = [(f"{path}, entry {number}", entry) for number, entry in enumerate(entries, 1)]
    else:
        found = list(parse_lines(text, path))
    if not found:
        raise FileFormatError(f"{path} is empty; expected one JSON object a line.")
    return found


def parse_lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(where, JSON value) of each line that is not blank; one value where the first line alone is none but all are."""
    # Not splitlines(): an answer may contain U+2028, which is no line break in JSON.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            value = parse_json(line, where, "expected one JSON object a line")
        except FileFormatError:
            if number != lines[0][0] or len(lines) == 1 or not line.strip().startswith("{"):
                raise
            try:
                whole = parse_json(text, str(path))
            except FileFormatError:
                whole = None
            if whole is None:
                raise
            yield str(path), whole
            return
        yield where, value


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, JSON object) of a file of JSON lines or of one JSON array of objects, gzip or not.

    Raises FileFormatError naming file and line (or array entry) of what is not a JSON object.
    """
    found = read_values(path)
    for where, entry in found:
        if not isinstance(entry, dict):
            raise FileFormatError(f"{where}: expected a JSON object, found {type(entry).__name__}.")
    return found


def read_table(path: Path, delimiter: str) -> list[tuple[str, dict[str, str]]]:
    """(where, cells by title) of a CSV or TSV file with a header line.

    Raises FileFormatError for one without lines, or with a line that has more or fewer cells than the header.
    """
    before = csv.field_size_limit(_CELL)
    try:
        reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
        lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise FileFormatError(f"{path}: broken table ({error}); export the sheet again.") from error
    finally:
        csv.field_size_limit(before)
    if len(lines) < 2:
        raise FileFormatError(f"{path} holds no line below its header; expected one line for each question.")
    header = [cell.strip() for cell in lines[0][1]]
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise FileFormatError(
                f"{path}, line {number}: {len(cells)} cells, the header has {len(header)} ({', '.join(header)})."
            )
    return [(f"{path}, line {number}", dict(zip(header, cells))) for number, cells in lines[1:]]


# YAML --------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, which a few lines can make grow without end, and no field twice in a mapping."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias (*name) is not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        made = super().construct_mapping(node, deep)
        if isinstance(node, yaml.MappingNode) and len(made) < len(node.value):
            seen: list[Any] = []
            for key, _ in node.value:
                name = key.value
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"field {name!r} is there twice", key.start_mark
                    )
                seen.append(name)
        return made


def parse_yaml(text: str, where: str) -> tuple[Any, Any]:
    """(value, root node) of one YAML document; the node knows lines, see `line_of`."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        place = f"line {mark.line + 1}: " if mark else ""
        raise FileFormatError(f"{where}: broken YAML ({place}{reason}).") from error
    except (RecursionError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        # What PyYAML's constructors raise for dates, numbers and tags that are none.
        reason = "nested too deeply" if isinstance(error, RecursionError) else shown(str(error))
        raise FileFormatError(f"{where}: broken YAML ({reason}).") from error
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml(path: Path, schema: Any) -> Any:
    """A YAML file of a declared shape. Raises FileFormatError naming file, line and field of what does not fit."""
    value, node = parse_yaml(read_text(path), str(path))
    return checked(schema, value, str(path), lambda place: line_of(node, place))


def line_of(node: Any, place: Sequence[str | int]) -> int | None:
    """The line, from 1, of a field of a YAML document; of the nearest part of it that is there."""
    if node is None:
        return None
    line = node.start_mark.line + 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


# Shapes ------------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as a sentence shows it: cut short."""
    try:
        return _SHOWN.repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


_WORDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "mapping_type": "an object",
    "none_required": "null",
    "finite_number": "a finite number",
}


# The line of a field within its file, by the field's place; None where nobody knows.
_LineOf = Callable[[Sequence[str | int]], int | None]


@overload
def checked(schema: type[R], value: Any, where: str, line: _LineOf | None = None) -> R: ...


@overload
def checked(schema: TypeAdapter[T], value: Any, where: str, line: _LineOf | None = None) -> T: ...


def checked(schema: Any, value: Any, where: str, line: _LineOf | None = None) -> Any:
    """`value` as the declared shape.

    schema: a `Record`, or a TypeAdapter of any type. line: finds the line of a field within the file, where `where` does not
    name one. Raises FileFormatError with one sentence about the first thing that does not fit.
    """
    try:
        if isinstance(schema, TypeAdapter):
            return schema.validate_python(value, strict=True)
        return schema.model_validate(value)
    except ValidationError as error:
        place, reason = _first(error.errors(include_url=False), value)
        number = line(place) if line is not None and place else None
        named = _named(place)
        raise FileFormatError(
            f"{where}{f', line {number}' if number else ''}: {f'{named} ' if named else ''}{reason}."
        ) from error
    except RecursionError as error:
        raise FileFormatError(f"{where}: nested too deeply.") from error


def _named(place: Sequence[str | int]) -> str:
    """("rows", 2, "name") as "field 'rows', entry 3, field 'name'"."""
    return ", ".join(f"entry {part + 1}" if isinstance(part, int) else f"field {shown(part)}" for part in place)


def _first(errors: Sequence[Mapping[str, Any]], value: Any) -> tuple[list[str | int], str]:
    """(place, what is wrong there) of the error that lies deepest in the value among those at its first place."""
    walked = [(_walk(error["loc"], value), error) for error in errors]
    place, first = max(walked, key=lambda pair: len(pair[0]))
    kind = first["type"]
    if kind == "missing":
        there = _at(value, place)
        found = ", ".join(map(str, list(there)[:12])) if isinstance(there, Mapping) else ""
        lacking = shown(first["loc"][-1])
        said = f"has no field {lacking}" if place else f"field {lacking} is missing"
        return place, f"{said}; found {found or 'no field'}"
    if kind == "unknown_field":
        return [*place, first["ctx"]["name"]], f"is unknown{first['ctx']['meant']}"
    if kind in ("lacking", "ambiguous"):
        return place, first["msg"]
    same = [error for where, error in walked if where == place]
    words = list(dict.fromkeys(_expected(error) for error in same))
    verb = "must be" if place else "expected"
    return place, f"{verb} {' or '.join(words)}, found {shown(_at(value, place))}"


def _expected(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    if kind in _WORDS:
        return _WORDS[kind]
    if kind == "literal_error":
        return f"one of {context['expected']}"
    if kind == "string_unicode":
        return "whole characters"
    return error["msg"].removeprefix("Value error, ").removeprefix("Input should be ").rstrip(".")


def _walk(loc: Iterable[str | int], value: Any) -> list[str | int]:
    """The part of an error's place that is a path into the value; the rest are names of alternatives."""
    place: list[str | int] = []
    for part in loc:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        place.append(part)
    return place


def _at(value: Any, place: Sequence[str | int]) -> Any:
    for part in place:
        value = value[part]
    return value


# To disk -----------------------------------------------------------------------------------------------------------


def is_stream(path: Path) -> bool:
    """Whether a path is written into as a stream: a pipe, a terminal or /dev/stdout, wherever that leads.

    Raises OutputError for what is neither a stream nor a regular file: a folder, a disk, a socket.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return True
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise OutputError(f"{path} is {kind}; give the path of a file to write.")
    # `> file` makes /dev/stdout a regular file that others write into as well.
    return Path(os.path.abspath(path)).parts[:2] in (("/", "dev"), ("/", "proc"))


def write_stream(path: Path, content: bytes) -> None:
    """Write into a stream. This process's own (/dev/stdout, /dev/fd/3) go on where they are: opened again, a redirected one
    would be written from its beginning.
    """
    own = re.fullmatch(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/([0-9]+)", os.path.abspath(path))
    if own is None:
        with open(path, "ab") as file:
            file.write(content)
        return
    sys.stdout.flush()
    number = int(own[2]) if own[2] else {"stdout": 1, "stderr": 2}[own[1]]
    with os.fdopen(os.dup(number), "wb") as file:
        file.write(content)
