"""What a method's gain costs: hallucination beside ability, recall, length and time, and a sentence where they part.

A method is compared with the plain model under the same decoding. Benchmarks of one output folder are read together, so
a gain on POPE stands beside what the same method does to NaturalBench. The figures of a benchmark are those its table
compares; which of them say what a model can do is `Evaluator.ability`.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lvlm_decode.errors import LvlmDecodeError
from lvlm_decode.reading import Count, Record, checked, read_records

from .base import Column, Evaluator
from .metrics import REPLICATES, compare
from .plan import TIMES, Result, is_control
from .tables import (
    NO_PROTOCOL,
    Block,
    Entry,
    Value,
    difference_value,
    equal_length_values,
    gather,
    matched,
    protocol_of,
)

# The first batch of a process also pays for warming up.
_FEWEST_BATCHES = 2


@dataclass(frozen=True)
class Figure:
    """A rate of one benchmark and split. kind: "hallucination", "ability", "caption" (recall, length) or "equal" (at equal
    length). of: the benchmark and split it is of, as titles name them. protocol: the published way that was followed.
    """

    kind: str
    title: str
    column: Column
    of: str
    protocol: str


@dataclass
class Line:
    """A method beside its control: the difference of every figure, and the time of a token for both."""

    label: str
    control: str
    differences: dict[Figure, Value] = field(default_factory=dict)
    # The other rates of the benchmarks: weighed where the method is better in a figure, and not shown.
    others: dict[Figure, Value] = field(default_factory=dict)
    # Of the benchmark whose answers are the longest: on one word the time is that of the prompt. Milliseconds a token.
    times: tuple[float, float] | None = None
    # What that benchmark is called, and how it was measured.
    timed: str = ""
    timed_by: str = ""
    _longest: float = 0.0

    def time(self, method: Entry, control: Entry, name: str) -> None:
        """Take the times of the benchmark `name` if its answers are longer than those of the benchmarks before."""
        ours, theirs = pace(method), pace(control)
        if ours and theirs and theirs[0] > self._longest:
            self._longest, self.times = theirs[0], (ours[1], theirs[1])
            self.timed, self.timed_by = name, protocol_of(method.results[0])


def figures(evaluator: Evaluator, split: str, protocol: str, there: Collection[str]) -> list[Figure]:
    """What a benchmark contributes: its ability figures, or its first compared one and a caption's recall and length.

    there: keys of the columns that this split has.
    """

    def figure(kind: str, key: str) -> Figure:
        return Figure(kind, f"{name}: {columns[key].title}", columns[key], name, protocol)

    columns = {column.key: column for column in evaluator.columns if column.key in there}
    name = _name(evaluator, split)
    found = [figure("ability", key) for key in evaluator.ability if key in there]
    # A split of its own kind of question (AMBER's yes-no questions) has others than the benchmark's first.
    hallucination = [key for key in evaluator.hallucination if key in there]
    if not hallucination and not evaluator.ability:
        hallucination = [key for key, column in columns.items() if column.paired and column.better][:1]
    found += [figure("hallucination", key) for key in hallucination]
    captions = ("recall", "length") if evaluator.equal_columns else ()
    return found + [
        _of_captions("caption", columns[key], evaluator, name, protocol) for key in captions if key in columns
    ]


def _name(evaluator: Evaluator, split: str) -> str:
    return evaluator.name if split in ("all", "captions") else f"{evaluator.name} {split}"


def _of_captions(kind: str, column: Column, evaluator: Evaluator, name: str, protocol: str) -> Figure:
    """A figure of captions. Where they were made in several ways (two protocols, say) its title says in which."""
    return Figure(kind, column.title if name == evaluator.name else f"{name}: {column.title}", column, name, protocol)


class _Batch(Record):
    """A line of times.jsonl."""

    answers: Annotated[int, Field(ge=1, lt=2**31)]
    tokens: Count
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def pace(method: Entry) -> tuple[float, float] | None:
    """(tokens an answer, milliseconds a token) of a method, both medians over batches; None without recorded times.

    Over all its seeds, without the first batch of each.
    """
    batches: list[_Batch] = []
    for result in method.results:
        path = Path(result.folder) / TIMES
        if path.is_file():
            batches += [checked(_Batch, record, where) for where, record in read_records(path)][1:]
    batches = [batch for batch in batches if batch.tokens]
    if len(batches) < _FEWEST_BATCHES:
        return None
    return (
        statistics.median(batch.tokens / batch.answers for batch in batches),
        statistics.median(1000 * batch.seconds / batch.tokens for batch in batches),
    )


def reference(method: Entry, methods: Sequence[Entry]) -> Entry | None:
    """What the price is counted against: the plain model, under the same decoding where it was run that way."""
    plain = [other for other in matched(method, methods) if other.name == "plain"]
    same = [other for other in plain if other.decoding == method.decoding]
    return next(iter(same or plain), None)


def lines(results: Sequence[Result], replicates: int = REPLICATES) -> list[Line]:
    """One line for each method of a folder, over all its benchmarks."""
    found: dict[tuple, Line] = {}
    for (_, split), methods in gather(results).items():
        for method in methods:
            control = None if is_control(method.name) else reference(method, methods)
            if control is None:
                continue
            evaluator = method.results[0].evaluator
            try:
                pair = compare(evaluator, method.runs, control.runs, replicates=replicates)
            except LvlmDecodeError:
                continue  # the table of this split says why
            line = found.setdefault((method.label, control.label), Line(method.label, control.label))
            name, protocol = _name(evaluator, split), protocol_of(method.results[0])
            shown = figures(evaluator, split, protocol, pair.differences)
            for figure in shown:
                interval = pair.differences[figure.column.key]
                line.differences[figure] = difference_value(interval, figure.column, pair.clusters)
            for column in evaluator.columns:
                if column.kind == "count" or not column.better or column in [figure.column for figure in shown]:
                    continue
                if column.key in pair.differences:
                    other = Figure("other", f"{name}: {column.title}", column, name, protocol)
                    line.others[other] = difference_value(pair.differences[column.key], column, pair.clusters)
            if evaluator.equal_columns:
                equal = equal_length_values(evaluator, method, control, replicates)
                column = evaluator.equal_columns[0]
                if isinstance(equal[0], Value):
                    line.differences[_of_captions("equal", column, evaluator, name, protocol)] = equal[0]
            line.time(method, control, name)
    return list(found.values())


def trade(line: Line) -> str | None:
    """One sentence where a method is better in one figure and worse in another rate, both beyond their intervals, or where
    captions name fewer absent objects and no difference is left at equal length.
    """
    better, worse, kept = [], [], []
    # Benchmarks whose own figure says that the method is worse; their other rates need not repeat it.
    said_of = set()
    for figure, value in [*line.differences.items(), *line.others.items()]:
        if not value.starred or figure.kind == "equal" or (figure.kind == "other" and figure.of in said_of):
            continue
        said = f"{figure.title} {value.text().partition(' [')[0]}"
        if figure.column.better * value.value < 0:
            worse.append(said)
            said_of |= {figure.of} if figure.kind in ("hallucination", "ability") else set()
        elif figure.column.better and figure.kind != "other":
            better.append(said)
            kept += _at_equal_length(line, figure)
    costs = [*([f"worse in {', '.join(worse)}"] if worse else []), *kept]
    if not (better and costs):
        return None
    return f"{line.label} against {line.control}: better in {', '.join(better)}; {'; '.join(costs)}."


def _at_equal_length(line: Line, gain: Figure) -> list[str]:
    """What is left of a gain in CHAIRs at equal length, where that is nothing that can be told from chance."""
    if gain.column.key != "chair_s":
        return []
    of_these = {f.kind: (f, value) for f, value in line.differences.items() if f.of == gain.of and f.kind == "equal"}
    lengths = [(f, value) for f, value in line.differences.items() if f.of == gain.of and f.column.key == "length"]
    if "equal" not in of_these or (of_these["equal"][1].starred and of_these["equal"][1].value < 0):
        return []
    where = next((f.title.removesuffix(f.column.title) for f, _ in lengths), "")
    shorter = [f"captions are {-value.value:.1f} tokens shorter, and " for _, value in lengths
               if value.starred and value.value < 0]  # fmt: skip
    return [f"{where}{''.join(shorter)}at equal length CHAIRs is {of_these['equal'][1].text()}"]


def price_blocks(results: Sequence[Result], replicates: int = REPLICATES) -> list[Block]:
    """A block with a line for each method: what it gains beside what it costs. Empty without a method."""
    found = lines([result for result in results if result.rows], replicates)
    if not found:
        return []
    shown = list(dict.fromkeys(figure for line in found for figure in line.differences))
    order = {"hallucination": 0, "equal": 1, "caption": 2, "ability": 3}
    shown.sort(key=lambda figure: order[figure.kind])
    timed = any(line.times for line in found)
    made = []
    for line in found:
        cells: list[str | Value] = [
            replace(line.differences[figure], protocol=figure.protocol) if figure in line.differences else "–"
            for figure in shown
        ]
        if timed:
            if line.times is None:
                cells += ["–"] * 3
            else:
                ours, theirs = line.times
                ratio = Value(ours / theirs, digits=2, protocol=line.timed_by)
                cells += [Value(ours, protocol=line.timed_by), Value(theirs, protocol=line.timed_by), ratio]
        made.append((line.label, line.control, *cells))
    titles = ["Method", "Control", *(f"Δ {figure.title}{_arrow(figure.column)}" for figure in shown)]
    titles += ["ms a token", "ms a token, control", "Ratio"] if timed else []
    said = [sentence for line in found if (sentence := trade(line))]
    # Where two of a benchmark meet, the titles say which.
    followed = {f.of: f.protocol for f in shown if f.protocol != NO_PROTOCOL and f"protocol {f.protocol}" not in f.of}
    if followed:
        said.append(f"Protocol: {'; '.join(f'{name} by {protocol}' for name, protocol in followed.items())}.")
    if timed:
        said.append(f"Times are of the benchmark with the longest answers: {_timed(found)}.")
    kinds = {figure.kind for figure in shown}
    if "ability" not in kinds:
        said.append("No benchmark of ability was run with these methods: lvlm-decode eval naturalbench, same --out.")
    if not timed and any((Path(result.folder) / TIMES).is_file() for result in results):
        said.append("Too few batches are timed, the first not counted: ask more questions, or fewer at once.")
    elif not timed:
        said.append("No times are recorded: lvlm-decode eval --times.")
    return [Block("What it costs: method minus the plain model", tuple(titles), tuple(made), tuple(said))]


def _timed(found: Sequence[Line]) -> str:
    """Of which benchmark the times are: one name, or one for each line where they differ."""
    names = {line.timed for line in found if line.times}
    if len(names) == 1:
        return names.pop()
    return "; ".join(f"{line.label}: {line.timed}" for line in found if line.times)


def _arrow(column: Column) -> str:
    return {1: " ↑", -1: " ↓", 0: ""}[column.better]
