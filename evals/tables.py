"""Tables over results: every method beside its matched controls, differences with intervals; Markdown, CSV, LaTeX.

A table has one block of results (rates with bootstrap intervals) and one of paired differences (method minus control,
interval, exact McNemar) per split. Numbers are kept as numbers until they are printed, so CSV gets all digits.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lvlm_decode.errors import LvlmDecodeError, UnknownNameError

from .base import Column, Evaluator
from .metrics import LEVEL, REPLICATES, Comparison, Interval, compare, intervals
from .plan import Decoding, Result, controls, is_control

# A percentile bootstrap over fewer clusters than this covers clearly less than it says.
FEW_IMAGES = 30


@dataclass(frozen=True)
class Value:
    """A number of a table. kind: as `Column.kind`, or "p". spread: standard deviation over seeds, None for one seed."""

    value: float
    kind: str = "number"
    low: float | None = None
    high: float | None = None
    signed: bool = False
    spread: float | None = None
    # False where the interval rests on too few images to mark anything by it.
    trusted: bool = True
    # Digits after the point where the default of the kind will not do, and a sign after the number.
    digits: int | None = None
    mark: str = ""

    @property
    def starred(self) -> bool:
        """A difference whose interval excludes zero and may be trusted to."""
        return self.signed and self.trusted and self.low is not None and (self.low > 0 or self.high < 0)

    def text(self) -> str:
        if self.kind == "count":
            return f"{self.value:.0f}"
        if self.kind == "p":
            return "<0.001" if self.value < 0.001 else f"{self.value:.3f}"
        scale, digits = (100, 1) if self.kind == "percent" else (1, 2 if self.signed else 1)
        digits = digits if self.digits is None else self.digits
        sign = "+" if self.signed else ""
        shown = f"{self.value * scale:{sign}.{digits}f}"
        if self.spread is not None:
            shown += f" ± {self.spread * scale:.{digits}f}"
        if self.low is not None:
            shown += f" [{self.low * scale:{sign}.{digits}f}, {self.high * scale:{sign}.{digits}f}]"
        return shown + ("*" if self.starred else "") + self.mark


@dataclass(frozen=True)
class Block:
    """One rectangle of a table: column titles, lines of text and numbers, sentences below it."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str | Value, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """All seeds of one (method, decoding) on one split."""

    name: str
    decoding: Decoding
    results: tuple[Result, ...] = field(repr=False)

    @property
    def pair(self) -> tuple[str, Decoding]:
        return self.name, self.decoding

    @property
    def runs(self) -> list:
        return [result.rows for result in self.results]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.decoding.name}"


def gather(results: Sequence[Result]) -> dict[tuple[str, str], list[Method]]:
    """(evaluator, split) -> its methods, controls first, each with its seeds in order."""
    groups: dict[tuple[str, str], dict[tuple[str, Decoding], list[Result]]] = {}
    for result in sorted(results, key=lambda r: r.seed):
        split = groups.setdefault((result.evaluator.name, result.split), {})
        split.setdefault((result.method, result.decoding), []).append(result)
    order = {"plain": 0, "mask": 1}

    def place(method: Method) -> tuple:
        return (
            order.get(method.name.partition("(")[0], 2),
            method.name,
            method.decoding.do_sample,
            method.decoding.num_beams,
            method.decoding.name,
        )

    return {
        key: sorted((Method(name, decoding, tuple(found)) for (name, decoding), found in split.items()), key=place)
        for key, split in groups.items()
    }


def rate_values(evaluator: Evaluator, method: Method, replicates: int = REPLICATES) -> dict[str, Value]:
    """Column key -> value of a method: the mean over seeds, interval over images, spread over seeds."""
    runs = [rows for rows in method.runs if rows]
    if not runs:
        return {}
    summaries = [evaluator.summary(rows) for rows in runs]
    bounds = intervals(evaluator, runs, replicates)
    values = {}
    for column in evaluator.columns:
        if column.key not in summaries[0]:
            continue
        numbers = [summary[column.key] for summary in summaries if column.key in summary]
        bound = bounds.get(column.key)
        spread = float(np.std(numbers, ddof=1)) if len(numbers) > 1 and column.kind != "count" else None
        low, high = (bound.low, bound.high) if bound and column.paired else (None, None)
        values[column.key] = Value(float(np.mean(numbers)), column.kind, low, high, spread=spread)
    return values


def results_block(evaluator: Evaluator, split: str, methods: Sequence[Method], replicates: int = REPLICATES) -> Block:
    """Rates of every method of a split."""
    values = [rate_values(evaluator, method, replicates) for method in methods]
    shown = [column for column in evaluator.columns if any(column.key in row for row in values)]
    lines = tuple(
        (method.name, method.decoding.name, str(len(method.runs)), *(row.get(c.key, "–") for c in shown))
        for method, row in zip(methods, values)
    )
    return Block(f"{evaluator.name}, {split}", ("Method", "Decoding", "Seeds", *map(_title, shown)), lines)


def _title(column: Column) -> str:
    arrow = {1: " ↑", -1: " ↓", 0: ""}[column.better]
    return f"{column.title}{' %' if column.kind == 'percent' else ''}{arrow}"


def wanted_controls(method: Method) -> list[tuple[str, Decoding]]:
    """What a line is compared with. A control is compared with the plain model alone."""
    pairs = controls(method.name, method.decoding)
    return [pair for pair in pairs if pair[0] == "plain"] if is_control(method.name) else pairs


def matched(method: Method, methods: Sequence[Method]) -> list[Method]:
    """The controls of a method that were run, in the order of `plan.controls`."""
    there = {other.pair: other for other in methods}
    return [there[pair] for pair in wanted_controls(method) if pair in there]


def differences_block(
    evaluator: Evaluator, split: str, methods: Sequence[Method], replicates: int = REPLICATES
) -> Block | None:
    """Paired differences of every method against each of its matched controls; None when there is nothing to pair."""
    columns = [column for column in evaluator.columns if column.paired]
    lines, missing = [], []
    for method in methods:
        for control in matched(method, methods):
            try:
                found = compare(evaluator, method.runs, control.runs, replicates=replicates)
            except LvlmDecodeError as error:
                missing.append(f"{method.label} against {control.label}: {error}")
                continue
            lines.append((method.label, control.label, *_difference_values(found, columns)))
        there = {other.pair for other in methods}
        absent = [f"{name}, {d.name}" for name, d in wanted_controls(method) if (name, d) not in there]
        if absent and not is_control(method.name):
            missing.append(
                f"{method.label} lacks its matched controls {'; '.join(absent)}: run lvlm-decode eval again."
            )
    if not lines:
        return None
    titles = ("Method", "Control", *(f"Δ {c.title}" for c in columns), "Gained/lost", "p", "p by image")
    keep = [i for i in range(len(titles)) if any(line[i] != "–" for line in lines)]
    return Block(
        f"{evaluator.name}, {split}: method minus control",
        tuple(titles[i] for i in keep),
        tuple(tuple(line[i] for i in keep) for line in lines),
        tuple(missing),
    )


def _difference_values(found: Comparison, columns: Sequence[Column]) -> list[str | Value]:
    values: list[str | Value] = []
    for column in columns:
        interval = found.differences.get(column.key)
        values.append("–" if interval is None else difference_value(interval, column, found.clusters))
    test = found.mcnemar
    if test is None:
        return [*values, "–", "–", "–"]
    exact = "–" if test.p is None else Value(test.p, "p")
    return [*values, f"{test.gained}/{test.lost}", exact, Value(test.p_clustered, "p")]


def difference_value(interval: Interval, column: Column, images: int) -> Value:
    """A difference as a table shows it."""
    trusted = images >= FEW_IMAGES
    return Value(interval.value, column.kind, interval.low, interval.high, signed=True, trusted=trusted)


def notes(evaluator: Evaluator, methods: Sequence[Method], comparisons: int, replicates: int = REPLICATES) -> list[str]:
    """What a reader must know to read the numbers of one split."""
    results = [result for method in methods for result in method.results]
    images = len({row.cluster for result in results for row in result.rows})
    options = ", ".join(f"{name} {value}" for name, value in evaluator.options().items() if value is not None)
    models = sorted({str((result.settings.get("model") or {}).get("name", "unknown model")) for result in results})
    found = [f"Model: {', '.join(models)}. Scored with {options or 'no options'}; {images} images."]
    found.append(
        f"Brackets: {LEVEL:.0%} bootstrap over images ({replicates} replicates); ±: standard deviation over seeds. "
        f"* marks a difference whose interval excludes zero; p: exact McNemar over questions ({evaluator.verdict}), "
        f"p by image: exact sign-flip test of the net gain per image. {comparisons} comparisons, not corrected for "
        "multiplicity."
    )
    if images < FEW_IMAGES:
        found.append(
            f"Only {images} images: such intervals are too short, so nothing is marked; take them for a sketch."
        )
    for result in results:
        where = f"{result.method}, {result.decoding.name}, seed {result.seed}"
        found += [f"{where}: {sentence}" for sentence in result.audit.sentences()]
    return found


def blocks(results: Sequence[Result], replicates: int = REPLICATES) -> list[Block]:
    """All blocks of a run, two for each split."""
    made: list[Block] = []
    for (_, split), methods in gather(results).items():
        evaluator = methods[0].results[0].evaluator
        differences = differences_block(evaluator, split, methods, replicates)
        below = notes(evaluator, methods, len(differences.lines) if differences else 0, replicates)
        made.append(results_block(evaluator, split, methods, replicates))
        if differences:
            made.append(differences)
        made[-1] = replace(made[-1], notes=(*made[-1].notes, *below))
    return made


# --- printing


def markdown(made: Sequence[Block]) -> str:
    """Markdown tables, aligned so that they can be read as they are."""
    parts = []
    for block in made:
        cells = [block.columns, *([_text(value) for value in line] for line in block.lines)]
        cells = [[text.replace("|", "\\|") for text in line] for line in cells]
        width = [max(len(line[i]) for line in cells) for i in range(len(block.columns))]
        rows = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, width)) + " |" for line in cells]
        rows.insert(1, "|" + "|".join("-" * (w + 2) for w in width) + "|")
        parts.append("\n".join([f"**{block.title}**", "", *rows, *([""] if block.notes else []), *block.notes]))
    return "\n\n".join(parts) + "\n"


def _text(value: str | Value) -> str:
    return value.text() if isinstance(value, Value) else value


def tidy_csv(made: Sequence[Block]) -> str:
    """One number a line, unrounded: table, the line's text fields, column, value, low, high, spread."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "line", "column", "value", "low", "high", "spread"])
    for block in made:
        for line in block.lines:
            label = "; ".join(value for value in line if isinstance(value, str) and value != "–")
            for title, value in zip(block.columns, line):
                if isinstance(value, Value):
                    numbers = (value.value, value.low, value.high, value.spread)
                    writer.writerow(
                        [block.title, label, title, *("" if x is None else repr(float(x)) for x in numbers)]
                    )
    return out.getvalue()


_LATEX = {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "±": r"$\pm$", "Δ": r"$\Delta$", "↑": r"$\uparrow$"}
_LATEX |= {"↓": r"$\downarrow$", "–": "--", "<": "$<$", "*": r"$^{*}$", "+": "$+$", "~": r"\textasciitilde{}"}


def _latex(value: str | Value) -> str:
    text = "".join(_LATEX.get(letter, letter) for letter in _text(value))
    # A minus sign, where a hyphen in a name stays one.
    return text.replace("-", "$-$") if isinstance(value, Value) else text


def latex(made: Sequence[Block]) -> str:
    """LaTeX tables (booktabs), notes below each."""
    parts = []
    for block in made:
        body = [" & ".join(_latex(value) for value in line) + r" \\" for line in block.lines]
        lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{'l' * len(block.columns)}}}", r"\toprule"]
        lines += [" & ".join(map(_latex, block.columns)) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
        caption = " ".join([f"{block.title}.", *block.notes])
        parts.append("\n".join([*lines, rf"\caption{{{_latex(caption)}}}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


FORMATS = {"markdown": markdown, "csv": tidy_csv, "latex": latex}


def render(made: Sequence[Block], format: str = "markdown") -> str:
    """The blocks as text. Raises UnknownNameError for an unknown format."""
    if format not in FORMATS:
        raise UnknownNameError.of("table format", format, FORMATS)
    return FORMATS[format](made)
