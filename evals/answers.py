"""Answers and rows as JSON lines: read with the line named that is broken, appended so that a kill loses at most one
line.

Two kinds of reader: `read_answers` for scoring (any broken line is an error) and `resume_answers` for a run that was
killed (a torn last line is cut off, any other broken line is an error).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lvlm_decode.errors import OutputError
from lvlm_decode.reading import checked, decoded, is_stream, parse_lines, read_bytes, write_stream

from .base import Answer, Question, Row
from .forms import ANSWER_FORMS, Own, read_forms

# How many culprits a message names before it only counts.
NAMED = 5


def read_answers(path: Path) -> list[Answer]:
    """All answers of a file; any broken line is an error that names it."""
    return read_forms(path, ANSWER_FORMS, "answers")


def line_of(record: dict[str, Any]) -> bytes:
    """One JSON line. Keys keep their order, so equal records are equal bytes."""
    return (json.dumps(record, ensure_ascii=False, separators=(", ", ": ")) + "\n").encode()


def resume_answers(path: Path, repair: bool = False) -> list[Answer]:
    """Answers of a run that may be unfinished. A torn last line, left by a kill while writing, is left out.

    repair: also cut it off the file, so that appending goes on with a whole line. Only the process that owns the file
    may do that.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = read_bytes(path)
    whole = content[: content.rfind(b"\n") + 1]
    if repair and len(whole) != len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
            file.flush()
            os.fsync(file.fileno())
    lines = parse_lines(decoded(whole, path), path)
    return [checked(Own, record, where).to_answer(number) for number, (where, record) in enumerate(lines, 1)]


def append_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Append and flush to disk: after this returns, a kill does not lose these answers. Raises OutputError."""
    append_lines(path, (answer.record() for answer in answers))


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """As `append_answers`, for any records."""
    try:
        with open(path, "ab") as file:
            file.write(b"".join(map(line_of, records)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError.of(path, error) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves the old file or the new one, never a part. Unchanged content is not
    rewritten; a link stays one; a stream (a pipe, /dev/stdout) is written into. Raises OutputError.
    """
    path = Path(path)
    if is_stream(path):
        try:
            write_stream(path, content)
        except OSError as error:
            raise OutputError.of(path, error) from error
        return
    path = Path(os.path.realpath(path))
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        if path.exists() and path.read_bytes() == content:
            return
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError.of(path, error) from error


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left of files they were writing below a folder. Only its holder may do that."""
    for path in Path(folder).rglob("*.partial"):
        pid = path.name.split(".")[-2]
        if not (pid.isdecimal() and int(pid) != os.getpid() and _started_before(int(pid), path)):
            path.unlink(missing_ok=True)


def _started_before(pid: int, path: Path) -> bool:
    """Whether a process of this number runs that is older than the file, so that it may be writing it."""
    try:
        return psutil.Process(pid).create_time() <= path.stat().st_mtime
    except (psutil.Error, FileNotFoundError):
        return False


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write a finished answers file in one piece."""
    write_whole(path, b"".join(line_of(answer.record()) for answer in answers))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write scored rows with their evidence as JSON lines."""
    write_whole(path, b"".join(line_of(row.record()) for row in rows))


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, indented."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


# What can be wrong with answers, and how a sentence says it.
KINDS = {
    "duplicate": "ids that occur more than once (only the first answer is scored)",
    "disagreeing": "ids whose answers differ, so that their order decides the score",
    "unknown": "answers to questions that were not asked (not scored)",
    "missing": "questions without an answer (not scored)",
    "failed": "questions that could not be asked or scored (left out)",
    "empty": "empty answers (scored as the rule says)",
    "contradicted": "answers that carry another label than their question or image has (scored by what that has)",
    "edited": "answers that are not as the run wrote them (scored as they stand; eval asks them again)",
    "unsealed": "answers without the checksum that a run writes (scored as they stand; eval asks them again)",
    "unasked": "answers without the run's questions.jsonl, so that nobody can tell which are missing",
    "altered": "files of questions that are not as the run wrote them (eval writes them again)",
}
_INCOMPLETE = ("disagreeing", "missing", "failed", "contradicted", "edited", "unsealed", "unasked", "altered")


@dataclass(frozen=True)
class Audit:
    """What is wrong with a set of answers, by id. Each list is what a person must know before trusting a score."""

    duplicate: tuple[str, ...] = ()
    disagreeing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    # Known from elsewhere than the answers' own ids: see `joins.join` and `plan.read_cell`.
    contradicted: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()
    unsealed: tuple[str, ...] = ()
    unasked: tuple[str, ...] = ()
    # A file and what is wrong with it.
    altered: tuple[str, ...] = ()
    # Why the first few of the failed ones are left out.
    reasons: tuple[str, ...] = ()
    # Why the figures are not the benchmark's: see `Evaluator.doubts`.
    doubts: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(getattr(self, kind) for kind in (*KINDS, "doubts"))

    @property
    def incomplete(self) -> bool:
        """Whether the score is not that of all questions as they were asked and answered; commands then exit with 3."""
        return any(getattr(self, kind) for kind in (*_INCOMPLETE, "doubts"))

    def counts(self) -> dict[str, dict[str, Any]]:
        """kind -> {"count", "ids"}, for JSON output; kinds without culprits are left out. Of doubts there are sentences."""
        found = {
            kind: {"count": len(getattr(self, kind)), "ids": list(getattr(self, kind))}
            for kind in KINDS
            if getattr(self, kind)
        }
        return found | ({"doubts": {"count": len(self.doubts), "sentences": list(self.doubts)}} if self.doubts else {})

    def sentences(self) -> list[str]:
        """One sentence for each kind of trouble, naming the first few ids."""
        found = [
            f"{len(ids)} {text}: {', '.join(ids[:NAMED])}{', ...' if len(ids) > NAMED else ''}."
            for kind, text in KINDS.items()
            if (ids := getattr(self, kind))
        ]
        return [*found, *(f"Left out, {reason}" for reason in self.reasons), *self.doubts]


def audit(answers: Sequence[Answer], questions: Sequence[Question] | None = None) -> tuple[list[Answer], Audit]:
    """Answers that may be scored, aligned by id and in the questions' order, and what was wrong with the others.

    Without `questions` unknown and missing ids cannot be told. Failed answers are dropped here; empty ones are kept,
    because the rules differ about them, but they are named.
    """
    said: dict[str, list[str]] = {}
    first: dict[str, Answer] = {}
    for answer in answers:
        name = str(answer.question_id)
        # A sample that failed and was asked again has a line of each kind.
        if name not in first or (first[name].error is not None and answer.error is None):
            first[name] = answer
        if answer.error is None:
            said.setdefault(name, []).append(answer.answer.strip())
    unknown: list[str] = []
    missing: list[str] = []
    if questions is not None:
        asked = [str(question.id) for question in questions]
        known = set(asked)
        unknown = [name for name in first if name not in known]
        missing = [name for name in asked if name not in first]
        first = {name: first[name] for name in asked if name in first}
    failed = [name for name, answer in first.items() if answer.error is not None]
    reasons = tuple(f"{name}: {first[name].error}" for name in failed[:NAMED])
    usable = [answer for answer in first.values() if answer.error is None]
    empty = [str(answer.question_id) for answer in usable if not answer.answer.strip()]
    repeated = [name for name, texts in said.items() if len(texts) > 1]
    differing = [name for name in repeated if len(set(said[name])) > 1]
    return usable, Audit(
        tuple(repeated), tuple(differing), tuple(unknown), tuple(missing), tuple(failed), tuple(empty), reasons=reasons
    )
