"""Tables over results: every method beside its matched controls, differences with intervals; Markdown, CSV, LaTeX.

A table has one block of results (rates with bootstrap intervals) and one of paired differences (method minus control,
interval, exact McNemar) per split. Numbers are kept as numbers until they are printed, so CSV gets all digits.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import numpy as np

from lvlm_decode.errors import EvalError, LvlmDecodeError, UnknownNameError

from .base import Column, Evaluator
from .metrics import LEVEL, REPLICATES, Comparison, Interval, compare, intervals
from .plan import NOT_DECIDING, Decoding, Result, controls, is_control

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
    # How it was measured, where that is not the block's protocol.
    protocol: str = ""

    @property
    def starred(self) -> bool:
        """A difference whose interval excludes zero and may be trusted to."""
        if self.low is None or self.high is None:
            return False
        return self.signed and self.trusted and (self.low > 0 or self.high < 0)

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
        if self.low is not None and self.high is not None:
            shown += f" [{self.low * scale:{sign}.{digits}f}, {self.high * scale:{sign}.{digits}f}]"
        return shown + ("*" if self.starred else "") + self.mark


@dataclass(frozen=True)
class Block:
    """One rectangle of a table: column titles, lines of text and numbers, sentences below it.

    protocol: the published way of measuring that its numbers follow, "none" for a way of one's own, empty where nobody
    says. elsewhere: sentences about its numbers that are printed below the next block.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str | Value, ...], ...]
    notes: tuple[str, ...] = ()
    protocol: str = ""
    elsewhere: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """All seeds of one line of a table: one method with one decoding on one split, everything but the seed equal.

    model, variant: what tells this line from others of the table that share its method and decoding: the model's name
    where there are several, and settings that differ (suffix='...', alpha=0.5). settings, parameters: all of them.
    """

    name: str
    decoding: Decoding
    results: tuple[Result, ...] = field(repr=False)
    model: str = ""
    variant: str = ""
    settings: str = field(default="", repr=False)
    parameters: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def pair(self) -> tuple[str, Decoding]:
        return self.name, self.decoding

    @property
    def runs(self) -> list:
        return [result.rows for result in self.results]

    @property
    def label(self) -> str:
        return ", ".join(part for part in (self.model, self.name, self.decoding.name, self.variant) if part)


# What a cell's own line says, and what its block says; every other setting must agree for a comparison.
_OF_THE_LINE = ("method", "decoding", "seed")
_OF_THE_BLOCK = ("evaluator", "split", "data", "protocol")


# What a run that follows no published way of measuring says in the place of its name.
NO_PROTOCOL = "none"


def _canonical(value: Any) -> str:
    """What tells two values apart, and nothing that no table could show: null is as good as absent, and 1 is 1.0."""
    return json.dumps(_plain(value), sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        made = {name: _plain(inner) for name, inner in value.items()}
        return {name: inner for name, inner in made.items() if inner is not None and inner != {}}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _common(result: Result) -> dict[str, Any]:
    """The settings that lines of one comparison must share: model, prompt, length, drafter."""
    left_out = (*NOT_DECIDING, *_OF_THE_LINE, *_OF_THE_BLOCK)
    return {name: value for name, value in result.settings.items() if name not in left_out}


# Options that say where a file lies, which is another place on another machine.
_FILES = ("objects", "vocabulary")


def protocol_of(result: Result) -> str:
    """The published way of measuring that a run followed by name, or "none"; and with what other options it was scored."""
    name = str(result.settings.get("protocol") or NO_PROTOCOL)
    scored = result.evaluator.options()
    asked = scored | (result.settings.get("scoring") or {})
    other = [f"{key} {value}" for key, value in scored.items() if value != asked[key] and key not in _FILES]
    return f"{name}, scored with {', '.join(other)}" if other and name != NO_PROTOCOL else name


def _parameters(result: Result) -> Mapping[str, Any]:
    """The parameters of a result's method, and the files that they name, each with what tells its content from others."""
    method = result.settings.get("method") or {}
    return {**(method.get("parameters") or {}), **(method.get("files") or {})}


def gather(results: Sequence[Result]) -> dict[tuple[str, str], list[Entry]]:
    """(evaluator, title) -> its methods, controls first, each with its seeds in order.

    The title is the split; where the same split was asked in several versions (by another protocol, another file, another
    number of questions, other scoring options) it says which. Cells make one line only if nothing but the seed differs. Raises
    EvalError for two cells of one line and one seed: a copied folder would make a spread of nothing.
    """
    lines: dict[tuple[str, ...], dict[tuple, list[Result]]] = {}
    for result in sorted(results, key=lambda r: r.seed):
        group = lines.setdefault(_block_key(result), {})
        line = (result.method, result.decoding, _canonical(_parameters(result)), _canonical(_common(result)))
        group.setdefault(line, []).append(result)
    titles = _titles({key: next(iter(group.values()))[0] for key, group in lines.items()})
    models = {_canonical(result.settings.get("model")): result.settings.get("model") or {} for result in results}
    # Of all blocks: lines of several benchmarks are read together, in `price` for one.
    used: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        used.setdefault(result.method, []).append(_apart(result))
    return {(key[0], titles[key]): _methods(group, models, used) for key, group in lines.items()}


def _block_key(result: Result) -> tuple[str, ...]:
    return (
        result.evaluator.name,
        result.split,
        protocol_of(result),
        _canonical(result.evaluator.options()),
        _canonical(result.settings.get("data")),
        str(result.asked),
    )


# What can tell versions of one split apart, the plainest first. Two protocols are always told apart by name.
_FACTS: tuple[Callable[[Result], str], ...] = (
    lambda result: "no protocol" if protocol_of(result) == NO_PROTOCOL else f"protocol {protocol_of(result)}",
    lambda result: f"{result.questions} questions",
    lambda result: str((result.settings.get("data") or {}).get("questions", "questions unknown")),
    lambda result: ", ".join(f"{k} {v}" for k, v in result.evaluator.options().items() if v is not None),
    lambda result: f"questions {(result.asked or 'unknown')[:8]}",
    lambda result: f"data {_canonical(result.settings.get('data'))}",
)


def _titles(found: Mapping[tuple[str, ...], Result]) -> dict[tuple[str, ...], str]:
    """A title for each block; blocks of one split are told apart by the first facts that do it."""
    titles: dict[tuple[str, ...], tuple[str, ...]] = {key: (result.split,) for key, result in found.items()}
    for evaluator_and_split in {key[:2] for key in found}:
        family = [key for key in found if key[:2] == evaluator_and_split]
        for fact in _FACTS:
            said = {key: fact(found[key]) for key in family}
            if len({titles[key] for key in family}) < len(family) and len(set(said.values())) > 1:
                titles |= {key: (*titles[key], said[key]) for key in family}
    return {key: ", ".join(title) for key, title in titles.items()}


def _apart(result: Result) -> dict[str, Any]:
    """What tells runs of one method apart on every benchmark: its parameters, and the drafter."""
    return _flat(_parameters(result)) | {"drafter": result.settings.get("drafter")}


def _methods(
    group: Mapping[tuple, Sequence[Result]],
    models: Mapping[str, Mapping[str, Any]],
    used: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Entry]:
    """The lines of one block, each named by what tells it from the others, and its method's from those of other blocks."""
    settings = {
        line: _flat({k: v for k, v in _common(found[0]).items() if k != "model"}) for line, found in group.items()
    }
    made = []
    for line, found in group.items():
        name, decoding, _, common = line
        differing = _differing(settings[line], settings.values())
        differing |= _differing(_apart(found[0]), used[name])
        made.append(
            Entry(
                name,
                decoding,
                _seeds(name, decoding, found),
                _model_label(found[0].settings.get("model") or {}, models.values()) if len(models) > 1 else "",
                ", ".join(f"{key}={value!r}" for key, value in differing.items()),
                common,
                _parameters(found[0]),
            )
        )
    order = {"plain": 0, "mask": 1}

    def place(method: Entry) -> tuple:
        return (
            method.model,
            order.get(method.name.partition("(")[0], 2),
            method.name,
            method.decoding.do_sample,
            method.decoding.num_beams,
            method.decoding.name,
            method.variant,
        )

    return sorted(made, key=place)


def _seeds(name: str, decoding: Decoding, found: Sequence[Result]) -> tuple[Result, ...]:
    """One result a seed. The plain model under greedy or beams draws nothing: all its seeds are one."""
    for first, second in itertools.pairwise(found):
        if first.seed == second.seed:
            raise EvalError(
                f"{first.folder} and {second.folder} both hold seed {first.seed} of {name}, {decoding.name}, with the same "
                "settings; a table takes each seed once, so move one of the two away."
            )
    return tuple(found if decoding.do_sample or not is_control(name) else found[:1])


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{above}{key}.") if isinstance(inner, Mapping) else {f"{above}{key}": inner}
    return flat


def _differing(own: Mapping[str, Any], all_of_them: Any) -> dict[str, Any]:
    """Those of one's own values that not all have."""
    said = {key: _canonical(value) for key, value in own.items()}
    return {
        key: value
        for key, value in own.items()
        if any(_canonical(other.get(key)) != said[key] for other in all_of_them)
    }


def _model_label(own: Mapping[str, Any], all_of_them: Any) -> str:
    """A model's name; with dtype or weights where models of one name differ in them."""
    name = str(own.get("name", "unknown model"))
    namesakes = [model for model in all_of_them if model.get("name") == own.get("name")]
    told = [str(value) for key, value in _differing(own, namesakes).items() if key != "name"]
    return f"{name} ({', '.join(told)})" if told else name


def rate_values(evaluator: Evaluator, method: Entry, replicates: int = REPLICATES) -> dict[str, Value]:
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


def results_block(evaluator: Evaluator, split: str, methods: Sequence[Entry], replicates: int = REPLICATES) -> Block:
    """Rates of every method of a split."""
    values = [rate_values(evaluator, method, replicates) for method in methods]
    shown = [column for column in evaluator.columns if any(column.key in row for row in values)]
    # Columns that appear only where lines differ in them.
    extra = [title for title in ("Model", "Settings") if any(_told(method)[title] for method in methods)]
    lines = tuple(
        (
            *(_told(method)[title] for title in extra),
            method.name,
            method.decoding.name,
            str(len(method.runs)),
            *(row.get(c.key, "–") for c in shown),
        )
        for method, row in zip(methods, values)
    )
    titles = (*extra, "Method", "Decoding", "Seeds", *map(_title, shown))
    return Block(f"{evaluator.name}, {split}", titles, lines, protocol=_protocol(methods))


def _protocol(methods: Sequence[Entry]) -> str:
    """The one protocol of a block's lines; see `_block_key`."""
    return protocol_of(methods[0].results[0]) if methods else ""


def _told(method: Entry) -> dict[str, str]:
    return {"Model": method.model, "Settings": method.variant}


def _title(column: Column) -> str:
    arrow = {1: " ↑", -1: " ↓", 0: ""}[column.better]
    return f"{column.title}{' %' if column.kind == 'percent' else ''}{arrow}"


def wanted_controls(method: Entry) -> list[tuple[str, Decoding]]:
    """What a line is compared with. A control is compared with the plain model alone."""
    pairs = controls(method.name, method.decoding)
    return [pair for pair in pairs if pair[0] == "plain"] if is_control(method.name) else pairs


def matched(method: Entry, methods: Sequence[Entry]) -> list[Entry]:
    """The controls of a method that were run with its model and settings, in the order of `plan.controls`.

    A parameter that both have (the mask's beta) must be the same, but for one that the control's name sets on purpose.
    """

    def agrees(other: Entry) -> bool:
        shared = (other.parameters.keys() & method.parameters.keys()) - set(re.findall(r"(\w+)=", other.name))
        return all(other.parameters[name] == method.parameters[name] for name in shared)

    return [
        other
        for pair in wanted_controls(method)
        for other in methods
        if other.pair == pair and other.settings == method.settings and agrees(other)
    ]


def differences_block(
    evaluator: Evaluator, split: str, methods: Sequence[Entry], replicates: int = REPLICATES
) -> Block | None:
    """Paired differences of every method against each of its matched controls, and below them what could not be paired.

    None when there is nothing to pair and nothing to say about it; a block without lines where there is a sentence alone.
    """
    columns = [column for column in evaluator.columns if column.paired]
    lines, missing = [], []
    for method in methods:
        for control in matched(method, methods):
            try:
                found = compare(evaluator, method.runs, control.runs, replicates=replicates)
            except LvlmDecodeError as error:
                missing.append(f"{method.label} against {control.label}: {error}")
                continue
            equal = equal_length_values(evaluator, method, control, replicates)
            lines.append((method.label, control.label, *equal, *_difference_values(found, columns)))
        there = {other.pair for other in matched(method, methods)}
        absent = [f"{name}, {d.name}" for name, d in wanted_controls(method) if (name, d) not in there]
        if absent and not is_control(method.name):
            missing.append(
                f"{method.label} lacks its matched controls {'; '.join(absent)}: run lvlm-decode eval again."
            )
    if not lines and not missing:
        return None
    shown = [*evaluator.equal_columns, *columns]
    drawn_again, _ = evaluator.clustered([row for method in methods for rows in method.runs for row in rows])
    titles = ("Method", "Control", *(f"Δ {c.title}" for c in shown), "Gained/lost", "p", f"p by {drawn_again}")
    keep = [i for i in range(len(titles)) if any(line[i] != "–" for line in lines)]
    return Block(
        f"{evaluator.name}, {split}: method minus control",
        tuple(titles[i] for i in keep),
        tuple(tuple(line[i] for i in keep) for line in lines),
        tuple(missing),
        _protocol(methods),
    )


def equal_length_values(
    evaluator: Evaluator, method: Entry, control: Entry, replicates: int = REPLICATES
) -> list[str | Value]:
    """Differences of the rates that length decides, with both answers to a question cut to the shorter one, seed by seed.

    Where only one of the two has several seeds, each of them is cut together with the other's one run.
    """
    if not evaluator.equal_columns:
        return []
    ours, theirs = _scored(method), _scored(control)
    pairs = [(ours[i % len(ours)], theirs[i % len(theirs)]) for i in range(max(len(ours), len(theirs)))]
    cut = [evaluator.equal_length(pair) for pair in pairs]
    found = compare(evaluator, [mine for mine, _ in cut], [other for _, other in cut], replicates=replicates)
    return [difference_value(found.differences[c.key], c, found.clusters) for c in evaluator.equal_columns]


def _scored(method: Entry) -> list[Sequence]:
    return [rows for rows in method.runs if rows]


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


def notes(evaluator: Evaluator, methods: Sequence[Entry], comparisons: int, replicates: int = REPLICATES) -> list[str]:
    """What a reader must know to read the numbers of one split."""
    results = [result for method in methods for result in method.results]
    rows = [row for result in results for row in result.rows]
    images, (one, several) = len({row.cluster for row in rows}), evaluator.clustered(rows)
    counted = f"{images} {one if images == 1 else several}"
    options = ", ".join(f"{name} {value}" for name, value in evaluator.options().items() if value is not None)
    models = sorted({str((result.settings.get("model") or {}).get("name", "unknown model")) for result in results})
    found = [f"Model: {', '.join(models)}. Scored with {options or 'no options'}; {counted}."]
    if (protocol := _protocol(methods)) != NO_PROTOCOL:
        found.append(f"Protocol: {protocol}.")
    found.append(
        f"Brackets: {LEVEL:.0%} bootstrap over {several} ({replicates} replicates), of a rate Wilson's interval where all "
        "replicates are equal; ±: standard deviation over seeds. "
        f"* marks a difference whose interval excludes zero; p: exact McNemar over questions ({evaluator.verdict}), "
        f"p by {one}: exact sign-flip test of the net gain per {one}. {_counted(comparisons)}"
    )
    if evaluator.equal_columns and comparisons:
        found.append("@min: the two captions of an image are cut to the shorter one, seed by seed.")
    if images < FEW_IMAGES:
        found.append(f"Only {counted}: such intervals are too short, so nothing is marked; take them for a sketch.")
    found += list(dict.fromkeys(remark for result in results for remark in evaluator.remarks(result.rows)))
    found += list(dict.fromkeys(doubt for result in results for doubt in result.audit.doubts))
    for method in methods:
        for result in method.results:
            known = result.audit.sentences()
            found += [f"{method.label}, seed {result.seed}: {s}" for s in known if s not in result.audit.doubts]
    return found


def _counted(comparisons: int) -> str:
    return f"{comparisons} comparisons, not corrected for multiplicity." if comparisons != 1 else "1 comparison."


def blocks(results: Sequence[Result], replicates: int = REPLICATES) -> list[Block]:
    """All blocks of a run, two for each split."""
    made: list[Block] = []
    for (_, split), methods in gather(results).items():
        evaluator = methods[0].results[0].evaluator
        differences = differences_block(evaluator, split, methods, replicates)
        below = notes(evaluator, methods, len(differences.lines) if differences else 0, replicates)
        made.append(results_block(evaluator, split, methods, replicates))
        if differences and not differences.lines:
            below = [*differences.notes, *below]
        elif differences:
            made.append(differences)
            made[-2] = replace(made[-2], elsewhere=tuple(below))
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
    """One number a line, unrounded: table, the line's text fields, column, value, low, high, spread; protocol, what marks
    the number, and the sentences of the table, on every line, so that no line is read without them.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "line", "column", "value", "low", "high", "spread", "protocol", "mark", "notes"])
    for block in made:
        notes = " ".join((*block.notes, *block.elsewhere))
        for line in block.lines:
            label = "; ".join(value for value in line if isinstance(value, str) and value != "–")
            for title, value in zip(block.columns, line):
                if isinstance(value, Value):
                    numbers = (value.value, value.low, value.high, value.spread)
                    shown = ["" if x is None else repr(float(x)) for x in numbers]
                    protocol = value.protocol or block.protocol
                    writer.writerow([block.title, label, title, *shown, protocol, value.mark.strip(), notes])
    return out.getvalue()


_LATEX = {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "±": r"$\pm$", "Δ": r"$\Delta$", "↑": r"$\uparrow$"}
_LATEX |= {"{": r"\{", "}": r"\}", "$": r"\$", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
_LATEX |= {
    "†": r"$\dagger$",
    "↓": r"$\downarrow$",
    "–": "--",
    "<": "$<$",
    "*": r"$^{*}$",
    "+": "$+$",
    "~": r"\textasciitilde{}",
}


def _latex(value: str | Value) -> str:
    def escaped(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in text)

    if not isinstance(value, Value):
        return escaped(value)
    # A minus sign in the number, where a hyphen in a name stays one.
    number = value.text().removesuffix(value.mark)
    return escaped(number).replace("-", "$-$") + escaped(value.mark)


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


def html(made: Sequence[Block]) -> str:
    """HTML tables for notebooks, notes below each."""
    parts = []
    for block in made:
        head = "".join(f"<th>{escape(title)}</th>" for title in block.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(_text(value))}</td>' for value in line)}</tr>" for line in block.lines
        )
        notes = "".join(f"<p><small>{escape(note)}</small></p>" for note in block.notes)
        title = f"<caption><b>{escape(block.title)}</b></caption>"
        parts.append(f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}")
    return "\n".join(parts)


FORMATS = {"markdown": markdown, "csv": tidy_csv, "latex": latex}


def render(made: Sequence[Block], format: str = "markdown") -> str:
    """The blocks as text. Raises UnknownNameError for an unknown format."""
    if format not in FORMATS:
        raise UnknownNameError.of("table format", format, FORMATS)
    return FORMATS[format](made)
