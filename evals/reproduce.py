"""`lvlm-decode reproduce configs/FILE...`: published rows run again within a budget, and a verdict on each.

Rows and their controls are asked in rounds of more and more questions, so that whenever the time is spent all rows have
about as many answers; the same command goes on from there. After the first round it says how long the whole will take.

On the model of the paper a verdict is about the value: *reproduced* if the printed value lies in our interval and that
interval is narrow enough to tell, *not reproduced* if it lies outside. Values of other models cannot be compared, least of
all those of the small models, which know emoji scenes alone; there it is about the sign of the gain over the table's
baseline, and the verdict says so. Where nobody knows how a value was measured the verdict is *protocol unknown*, and what
was not asked, or not often enough, is *not run*.

No time is spent on rows whose verdict no answer can change, and a table that cannot be asked, for want of files or because a
method refuses the model, costs the others nothing.
"""

from __future__ import annotations

import csv
import html
import io
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lvlm_decode.errors import (
    DependencyError,
    EvalError,
    FileFormatError,
    LockedError,
    LvlmDecodeError,
    MissingFileError,
    ParameterError,
    SettingsError,
    UnsupportedError,
)
from lvlm_decode.reading import read_records

from .answers import write_whole
from .base import Column, Question
from .commands import FINISHED_WITH_FAILURES, one_sentence
from .configs import (
    MEAN,
    TINY_SEEDS,
    PaperRow,
    PaperTable,
    dtype_of,
    is_tiny,
    measured_by,
    on_scenes,
    other_images,
    our_gain,
    our_values,
    published_mark,
    read_config,
    run_of,
    source_of,
    table_path,
    with_truth,
)
from .loaders import Source
from .metrics import REPLICATES, Interval
from .plan import TIMES, Result, found_cells, is_control, read_cell, slug, spoken
from .tables import FEW_IMAGES, Block, Value, gather, render

REPRODUCED, NOT_REPRODUCED, UNKNOWN, NOT_RUN = "reproduced", "not reproduced", "protocol unknown", "not run"
NOT_ASKED, LACKING = "not asked yet", "it could not be asked; the sentence below the table says why"
# An interval wider than this to either side, of the whole scale, decides nothing in a value's favour.
WIDEST = 0.05
# Questions of the first round, by which the time of the whole is measured, and how much longer every round is.
FIRST_ROUND = 32
GROWTH = 4
# Images that are tried before a table is taken for one whose images are here.
FEW_OPENED = 8
# What the small model asks of each split unless told otherwise.
TINY_SAMPLES = 128


@dataclass(frozen=True)
class Verdict:
    """One printed value. ours: what decides it: our value, or in miniature our gain over the baseline."""

    table: str
    row: PaperRow
    split: str
    column: Column
    published: Value
    ours: Interval | None
    word: str
    why: str = ""
    # What our interval is held against: the printed value, or zero where ours is a gain.
    target: float = 0.0
    # The printed gain over the baseline, whose sign is judged where ours is a gain.
    gain: Value | None = None

    def sentence(self, where: str) -> str:
        """The verdict as a table says it: with `where` it holds, if that is not the paper's model, and why it is none."""
        decided = self.word in (REPRODUCED, NOT_REPRODUCED)
        word = f"{self.word} {where}" if where and decided else self.word
        return word + (f": {self.why}" if self.why else "")


def half_unit(values: Iterable[float]) -> float:
    """Half of the last digit that a metric was printed with in a table, in its own unit.

    By the value with the most digits: papers print all with as many, but 45.00 is read from a file as 45.0.
    """
    digits = max(len(repr(float(value)).partition(".")[2].rstrip("0")) for value in values)
    return 0.5 * 10.0**-digits


def judge_value(published: float, ours: Interval, column: Column, half: float) -> tuple[str, str]:
    """(verdict, reason) of a printed value against our interval. published, half: the value and what rounding may have
    taken from it (`half_unit`), in the unit that the paper prints.
    """
    unit = 100 if column.kind == "percent" else 1
    low, high = (published - half) / unit, (published + half) / unit
    if high < ours.low or low > ours.high:
        return NOT_REPRODUCED, ""
    wide = max(ours.high - ours.value, ours.value - ours.low)
    if column.scale is not None and wide > WIDEST * column.scale:
        return NOT_RUN, f"undecided: the interval reaches {unit * wide:.1f} to one side; ask more questions"
    return REPRODUCED, ""


def judge_gain(published: float, ours: Interval) -> tuple[str, str]:
    """(verdict, reason) of the sign of a printed gain, which is not zero, against our interval of the gain."""
    sign = 1 if published > 0 else -1
    if sign * (ours.low if sign > 0 else ours.high) > 0:
        return REPRODUCED, ""
    if sign * (ours.high if sign > 0 else ours.low) < 0:
        return NOT_REPRODUCED, ""
    return NOT_RUN, "undecided: the interval does not exclude zero; ask more questions"


def where_of(config: PaperTable, model: str) -> str:
    """Where verdicts hold that are not about values: "in miniature", or "on another model"; empty on the paper's model.

    A folder counts as the paper's model by its name.
    """
    if is_tiny(model):
        return "in miniature"
    return "" if config.model and Path(model).name == Path(config.model).name else "on another model"


def verdicts(config: PaperTable, results: Sequence[Result], model: str, replicates: int = REPLICATES) -> list[Verdict]:
    """A verdict on every printed value of a table, by the answers of `model`."""
    gains = bool(where_of(config, model))
    chosen = config.evaluator
    columns = {column.key: column for column in chosen.columns}
    groups = gather(results)
    found = {s: {m.pair: m for m in groups.get((config.benchmark, s), [])} for s in config.splits}
    base = next((row for row in config.rows if row.name == config.baseline), None)
    other = _other_data(config, results)
    made = []
    for row in config.rows:
        for split, values in row.published.values.items():
            ours: dict[str, Any] = {}
            if row.method is not None:
                ours = our_gain(chosen, row, base, split, found, replicates) if gains else {}
                ours = ours if gains else our_values(chosen, row, split, found, replicates)
            for key, printed in values.items():
                column = columns[key]
                unit = 100 if column.kind == "percent" else 1
                shown = Value(printed / unit, column.kind, digits=2, mark=published_mark(config, row))
                interval = ours.get(key)
                gain = None if base is None else _printed_gain(row, base, split, key)
                word, why = _word(config, row, base, interval, printed, gain, column, gains)
                images = min((len({r.cluster for r in rows}) for rows in _rows_of(found, row, split)), default=0)
                if word in (REPRODUCED, NOT_REPRODUCED) and images < FEW_IMAGES:
                    word, why = NOT_RUN, f"undecided: only {images} images; ask more questions"
                elif word in (REPRODUCED, NOT_REPRODUCED) and other and not gains:
                    word, why = NOT_RUN, other
                target = 0.0 if gains else printed / unit
                told = None
                if gains and gain is not None and row is not base:
                    told = Value(round(gain, 4) / unit, column.kind, signed=True, digits=2)
                made.append(Verdict(config.title, row, split, column, shown, interval, word, why, target, told))
    return made


def _other_data(config: PaperTable, results: Sequence[Result]) -> str:
    """What is other in the answers than the table's protocol has it, "" for nothing: the images, as --questions allows, or
    what CHAIR takes to be in them.
    """
    if config.protocol is None or config.protocol.list_key is None:
        return ""
    if other_images(config, results):
        return "other images were asked about than the protocol's list"
    truth = config.protocol.other_truth(config.evaluator)
    return f"the captions are held against {truth}, the protocol's is {config.protocol.ground_truth}" if truth else ""


def _rows_of(found: Any, row: PaperRow, split: str) -> list:
    """The rows of a line of a table, by seed and, for the mean, by split."""
    methods = [found[name].get((row.method, row.decoding)) for name in (found if split == MEAN else (split,))]
    return [rows for method in methods if method is not None for rows in method.runs if rows]


def _printed_gain(row: PaperRow, base: PaperRow, split: str, key: str) -> float | None:
    before = base.published.values.get(split, {}).get(key)
    return None if before is None else row.published.values[split][key] - before


def deciding(config: PaperTable, model: str) -> tuple[PaperRow, ...]:
    """The rows to ask: those with a printed value whose verdict answers can change, and the baseline of their gains."""
    gains = bool(where_of(config, model))
    base = next((row for row in config.rows if row.name == config.baseline), None)

    def is_open(row: PaperRow) -> bool:
        return any(
            _settled(config, row, base, None if base is None else _printed_gain(row, base, split, key), gains) is None
            for split, values in row.published.values.items()
            for key in values
        )

    chosen = [row for row in config.rows if is_open(row)]
    return tuple(row for row in config.rows if row in chosen or (gains and chosen and row is base))


def _settled(
    config: PaperTable, row: PaperRow, base: PaperRow | None, gain: float | None, gains: bool
) -> tuple[str, str] | None:
    """(verdict, reason) of a printed value where no answer can change it."""
    if row.method is None:
        return NOT_RUN, row.why or ""
    if config.protocol is None:
        return UNKNOWN, "nobody here knows how it was measured"
    if row.protocol not in (None, config.protocol.name):
        return NOT_RUN, f"it was measured by protocol {row.protocol}, these rows by {config.protocol.name}"
    if config.protocol.unknown_images:
        return UNKNOWN, "its list of images is not known"
    if gains and row is base:
        return NOT_RUN, "the baseline; another model's value cannot be compared"
    if gains and gain is None:
        return NOT_RUN, "no gain over the baseline is printed"
    if gains and abs(gain or 0.0) < 1e-9:
        return NOT_RUN, "the printed gain is zero and has no sign"
    return None


def _word(
    config: PaperTable,
    row: PaperRow,
    base: PaperRow | None,
    ours: Interval | None,
    printed: float,
    gain: float | None,
    column: Column,
    gains: bool,
) -> tuple[str, str]:
    if settled := _settled(config, row, base, gain, gains):
        return settled
    if ours is None:
        return NOT_RUN, NOT_ASKED
    if gains:
        word, why = judge_gain(gain or 0.0, ours)
        mixed = config.protocol and base and base.protocol not in (None, config.protocol.name)
        copied = [f"the printed gain is over a value measured by protocol {base.protocol}"] if mixed and base else []
        return word, "; ".join([*([why] if why else []), *copied])
    column_of = [
        values[column.key]
        for other in config.rows
        for values in other.published.values.values()
        if column.key in values
    ]
    return judge_value(printed, ours, column, half_unit(column_of))


# --- running


class OutOfTime(Exception):
    """The budget is spent; everything answered so far is on disk."""


@dataclass(frozen=True)
class Table:
    """One table of the command line. job: what it is run on; None where it is not, and `why` says so in a sentence.
    lacking: whether somebody can mend that: files that are not here, a method that refuses the model.
    """

    config: PaperTable
    out: Path
    job: Job | None
    why: str = ""
    lacking: bool = False


@dataclass(frozen=True)
class Job:
    """A table with what it is run on."""

    config: PaperTable
    source: Source
    out: Path
    seeds: tuple[int, ...]
    samples: int | None

    @property
    def longest(self) -> int:
        """Questions of the largest split, at most the wanted number of samples."""
        number = max(len(questions) for questions in self.source.splits.values())
        return number if self.samples is None else min(number, self.samples)


def rounds(longest: int) -> list[int]:
    """Numbers of questions of the rounds: the first, then GROWTH times as many until all are asked."""
    numbers = []
    number = FIRST_ROUND
    while number < longest:
        numbers.append(number)
        number *= GROWTH
    return [*numbers, longest]


def remaining(jobs: Sequence[Job], runs: Callable[[Job], Any]) -> float | None:
    """Seconds that the questions not asked yet will take, by the times of those that were; None without times."""
    total, timed = 0.0, False
    for job in jobs:
        run = runs(job)
        per_answer: dict[tuple, float] = {}
        owed: dict[tuple, int] = {}
        for cell in run.cells():
            folder = cell.folder(job.out, job.config.benchmark)
            pair = (cell.method, cell.decoding)
            asked = min(job.longest, len(job.source.splits[cell.split]))
            done = sum(path.read_bytes().count(b"\n") for path in folder.glob("answers*.jsonl"))
            owed[pair] = owed.get(pair, 0) + max(0, asked - done)
            if (folder / TIMES).is_file():
                batches = [record for _, record in read_records(folder / TIMES)]
                batches = batches[1:] or batches
                per_answer[pair] = sum(b["seconds"] for b in batches) / sum(b["answers"] for b in batches)
        timed = timed or bool(per_answer)
        # A row that was not asked yet is taken for an average one.
        average = sum(per_answer.values()) / len(per_answer) if per_answer else 0.0
        total += sum(number * per_answer.get(pair, average) for pair, number in owed.items())
    return total if timed else None


# What ends one table and none of the others: a method that refuses the model, answers of other settings in the folder,
# a library or file that is not there. A lost device or a full disk ends them all.
_OF_A_TABLE = (UnsupportedError, ParameterError, DependencyError, SettingsError, LockedError, MissingFileError,
               FileFormatError)  # fmt: skip


def execute(
    jobs: Sequence[Job], model: str, tiny: bool, hours: float | None, tell: Callable[[str], None], quiet: bool = False
) -> dict[Path, str]:
    """Ask rows and controls of all tables in rounds; returns the folders of tables that could not be asked, with the reason.

    hours: the budget; None for none, 0 to ask the first questions alone and say how long the rest will take.
    """
    from .runner import load

    loaded = load(model, dtype=None if tiny else dtype_of([job.config for job in jobs]))
    until = None if hours is None else time.monotonic() + 3600 * hours
    asked = {job.out: replace(job.config, rows=deciding(job.config, model)) for job in jobs}
    broken: dict[Path, str] = {}

    def stop() -> None:
        if until is not None and time.monotonic() >= until:
            raise OutOfTime

    def run(job: Job, limit: int | None = None, seeds: int | None = None) -> Any:
        # Without a budget of its own the first round is asked whole: it tells the time.
        cut = None if seeds and not hours else stop
        chosen = job.seeds[:seeds]
        return run_of(asked[job.out], loaded, job.source, job.out, chosen, limit, tiny, stop=cut, quiet=quiet)

    def ask_all(number: int, seeds: int | None = None) -> None:
        for job in jobs:
            if job.out not in broken:
                try:
                    run(job, min(number, job.longest), seeds).execute()
                except _OF_A_TABLE as error:
                    broken[job.out] = str(error)

    def say(number: int) -> None:
        if left := remaining([job for job in jobs if job.out not in broken], run):
            tell(
                f"The rest will take about {spoken(left)}, by the first {number} questions of every row; stopped at any "
                "moment, the same command goes on."
            )

    numbers = rounds(max(job.longest for job in jobs))
    try:
        try:
            ask_all(numbers[0], seeds=1)
        finally:
            # Also where the budget ends the first round.
            say(numbers[0])
        stop()
        # The first round asked the first seed only; where it was the only round, the others are owed.
        for number in numbers[1:] or numbers:
            ask_all(number)
    except OutOfTime:
        # A budget that ends with the last question leaves nothing to go on with.
        if remaining(jobs, run) != 0:
            tell("The time is spent; the same command goes on from here.")
    return broken


# --- what comes out


def block_of(made: Sequence[Verdict], title: str, notes: Sequence[str], where: str) -> Block:
    """The verdicts of one table as a block that all formats render."""
    lines = []
    for verdict in made:
        ours: str | Value = "–"
        if verdict.ours is not None:
            bound = verdict.ours
            ours = Value(bound.value, verdict.column.kind, bound.low, bound.high, signed=bool(where), trusted=False)
        said = verdict.sentence(where)
        printed = (verdict.published, verdict.gain or "–") if where else (verdict.published,)
        lines.append((verdict.row.name, verdict.split, verdict.column.title, *printed, ours, said))
    titles = ("Published", "Published gain", "Our gain") if where else ("Published", "Ours")
    return Block(title, ("Row", "Split", "Metric", *titles, "Verdict"), tuple(lines), tuple(notes))


def notes_of(table: Table, made: Sequence[Verdict], results: Sequence[Result], model: str) -> list[str]:
    """What a reader must know about the verdicts on one table."""
    config = table.config
    counted = Counter(verdict.word for verdict in made)
    said = [", ".join(f"{counted[word]} {word}" for word in (REPRODUCED, NOT_REPRODUCED, UNKNOWN, NOT_RUN)) + "."]
    if table.why:
        said.append(f"Not run: {table.why}" if table.lacking else table.why)
    measured = config.protocol
    said.append(f"Protocol: {measured.name if measured else 'unknown'}. {config.paper}. Values: {config.source}")
    answers = [len(result.rows) for result in results if not is_control(result.method)] or [0]
    number = f"{min(answers)}" if len(set(answers)) == 1 else f"{min(answers)} to {max(answers)}"
    said.append(f"Model: {model}; {number} answers a row and split.")
    if failures := {(result.split, name) for result in results for name in result.audit.failed}:
        reason = next(reason for result in results for reason in result.audit.reasons)
        said.append(f"{len(failures)} questions could not be asked and are in no number here; the first, {reason}")
    where = where_of(config, model)
    if where:
        seen = f"{Path(model).name} on emoji scenes" if is_tiny(model) else f"{Path(model).name}, not {config.model}"
        said.append(
            f"{where.capitalize()}: {seen}. Ours is the gain over {config.baseline or 'no baseline'}, and a verdict "
            f"{where} is about the sign of the printed gain alone: it says nothing about the printed value."
        )
    else:
        said.append(
            f"Ours has its 95% bootstrap interval over images; an interval that reaches more than {WIDEST:.0%} of the "
            "scale to one side reproduces nothing."
        )
    if any(verdict.row.published.unverified for verdict in made):
        said.append("† not verified against the paper itself.")
    return said


def verdicts_csv(tables: Sequence[tuple[PaperTable, Block, Sequence[Verdict]]], model: str) -> str:
    """A line for each verdict, whole by itself: how the value was measured, what decides the verdict, and the notes.

    Rates are shares of 1. ours, low and high are a gain over the baseline where `judged` says so.
    """
    lines = []
    for config, block, found in tables:
        where = where_of(config, model)
        for verdict in found:
            row, bound, gain = verdict.row, verdict.ours, verdict.gain
            lines.append(
                {
                    "table": config.title,
                    "row": row.name,
                    "method": row.method,
                    "decoding": row.decoding.name,
                    "split": verdict.split,
                    "metric": verdict.column.title,
                    "protocol": measured_by(config, row),
                    "mark": verdict.published.mark.strip(),
                    # 83.29 % is 0.8329, and not the float nearest to 83.29 divided by 100.
                    "published": round(verdict.published.value, 12),
                    "published_gain": None if gain is None else round(gain.value, 12),
                    "judged": f"gain over {config.baseline}" if where else "value",
                    "ours": None if bound is None else bound.value,
                    "low": None if bound is None else bound.low,
                    "high": None if bound is None else bound.high,
                    "verdict": verdict.word,
                    "where": where,
                    "reason": verdict.why,
                    "model": model,
                    "notes": " ".join(block.notes),
                }
            )
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


COLOURS = {REPRODUCED: "#d7f0da", NOT_REPRODUCED: "#f7d6d3", UNKNOWN: "#f3ecd0", NOT_RUN: "#e6e6e6"}


def page(made: Sequence[tuple[Block, Sequence[Verdict]]]) -> str:
    """One HTML page without scripts: every table with its verdicts coloured and its intervals drawn."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Published rows, run again</title><style>",
        "body{font:15px/1.45 system-ui,sans-serif;max-width:74rem;margin:2rem auto;padding:0 1rem}",
        "table{border-collapse:collapse}td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:left}",
        "p{color:#444;max-width:60rem}</style></head><body><h1>Published rows, run again</h1>",
    ]
    for block, found in made:
        parts.append(f"<h2>{html.escape(block.title)}</h2><table><tr>")
        parts += [f"<th>{html.escape(title)}</th>" for title in (*block.columns, "Interval")]
        parts.append("</tr>")
        for line, verdict in zip(block.lines, found):
            cells = [html.escape(cell.text() if isinstance(cell, Value) else cell) for cell in line]
            parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells[:-1]))
            parts.append(
                f"<td style='background:{COLOURS[verdict.word]}'>{cells[-1]}</td><td>{_drawn(verdict)}</td></tr>"
            )
        parts.append("</table>" + "".join(f"<p>{html.escape(note)}</p>" for note in block.notes))
    return "".join([*parts, "</body></html>\n"])


def _drawn(verdict: Verdict) -> str:
    """Our interval as a bar, and a tick at zero (a gain) or at the printed value, on a scale of its own."""
    ours = verdict.ours
    if ours is None:
        return ""
    target = verdict.target
    low, high = min(ours.low, target), max(ours.high, target)
    room = (high - low) or 1.0

    def place(value: float) -> float:
        return 8 + 124 * (value - low) / room

    return (
        f"<svg width='140' height='16' role='img' aria-label='from {ours.low:.4g} to {ours.high:.4g}'>"
        f"<line x1='{place(ours.low):.1f}' x2='{place(ours.high):.1f}' y1='8' y2='8' stroke='#357' stroke-width='3'/>"
        f"<circle cx='{place(ours.value):.1f}' cy='8' r='3.5' fill='#357'/>"
        f"<line x1='{place(target):.1f}' x2='{place(target):.1f}' y1='1' y2='15' stroke='#b33' stroke-width='2'/></svg>"
    )


@one_sentence
def reproduce_command(
    configs: Annotated[
        list[Path], typer.Argument(help="Names or files of papers' tables; lvlm-decode table --list shows them.")
    ],
    model: Annotated[str | None, typer.Option(help="Instead of the paper's; tiny works offline, in miniature.")] = None,
    hours: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long; 0 only measures and says how long.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Only the first N questions of each split.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Only the first N seeds of each table.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images.")] = None,
    questions: Annotated[Path | None, typer.Option(help="Question file or folder.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of answers and verdicts; the same folder continues.")] = Path(
        "reproduce"
    ),
    replicates: Annotated[int, typer.Option(min=100, help="Bootstrap replicates.")] = REPLICATES,
) -> None:
    """Run the rows of papers' tables again, within a budget, and mark every published value: reproduced, not reproduced,
    protocol unknown or not run, with the interval that decides it.

    Stopped at any moment, by --hours or by hand, the same command continues. Writes verdicts.md, .tex, .csv and .html. Rows
    whose verdict no answer can change are not asked; `lvlm-decode table` runs them all the same. Exit status 3: finished, but
    a table or some questions could not be asked (files that are missing, say); the output says which.
    """
    tables = [read_config(path) for path in dict.fromkeys(table_path(path) for path in configs)]
    models = {model or str(table.model) for table in tables if model or table.model}
    if len(models) > 1:
        raise SettingsError(
            f"the tables are of several models ({', '.join(sorted(models))}); reproduce those of one at a time."
        )
    if not models:
        raise EvalError("the tables' model has no class that runs here; give one with --model.")
    (name,) = models
    tiny = is_tiny(name)
    if tiny:
        tables = [on_scenes(table) for table in tables]
        samples, seeds = samples or TINY_SAMPLES, seeds or TINY_SEEDS
    planned = [plan(table, name, out, images, questions, seeds, samples) for table in tables]
    jobs = [table.job for table in planned if table.job is not None]
    broken = execute(jobs, name, tiny, hours, lambda said: typer.echo(said, err=True)) if jobs else {}
    planned = [
        replace(table, why=broken[table.out], lacking=True) if table.out in broken else table for table in planned
    ]
    for table in planned:
        if table.lacking:
            typer.echo(f"warning: {table.config.title} is not run: {table.why}", err=True)
    if report(planned, name, out, replicates) or any(table.lacking for table in planned):
        raise typer.Exit(FINISHED_WITH_FAILURES)


def plan(
    config: PaperTable,
    model: str,
    out: Path,
    images: Path | None,
    questions: Path | None,
    seeds: int | None,
    samples: int | None,
) -> Table:
    """What a table is run on, or why it is not run."""
    tiny = is_tiny(model)
    place = out / f"{config.path.stem}-{slug(Path(model).name)}"
    if not deciding(config, model):
        return Table(config, place, None, "Not asked: no answer could change these verdicts. lvlm-decode table "
                     f"{config.path.stem} runs its rows all the same.")  # fmt: skip
    try:
        if config.benchmark == "chair" and not tiny:
            config = with_truth(config)
        source = source_of(config, tiny, images, questions)
        asked = [question for part in source.first(samples).splits.values() for question in part]
        config.evaluator.ready(asked)
        _look(source, asked)
    except LvlmDecodeError as error:
        return Table(config, place, None, str(error), lacking=True)
    return Table(config, place, Job(config, source, place, config.seeds[:seeds], samples))


def _look(source: Source, asked: Sequence[Question]) -> None:
    """Raise what opening an image raises where none of the first few can be: another folder, or an empty one."""
    names = list(dict.fromkeys(question.image for question in asked if question.image is not None))[:FEW_OPENED]
    for place, name in enumerate(names, 1):
        try:
            source.images.open(name)
            return
        except LvlmDecodeError as error:
            if place == len(names):
                raise EvalError(f"none of the first {place} images can be opened; the last, {error}") from error


def report(tables: Sequence[Table], model: str, out: Path, replicates: int = REPLICATES) -> bool:
    """Write the verdicts in every format and print them as Markdown; whether some questions could not be asked."""
    made: list[tuple[PaperTable, Block, list[Verdict]]] = []
    failed = False
    for table in tables:
        results = _answered(table)
        failed = failed or any(result.audit.failed for result in results)
        found = verdicts(table.config, [result for result in results if result.rows], model, replicates)
        if table.lacking:
            found = [replace(verdict, why=LACKING) if verdict.why == NOT_ASKED else verdict for verdict in found]
        notes = notes_of(table, found, results, model)
        block = block_of(found, table.config.title, notes, where_of(table.config, model))
        made.append((table.config, block, found))
    blocks = [block for _, block, _ in made]
    out.mkdir(parents=True, exist_ok=True)
    for suffix, format in ((".md", "markdown"), (".tex", "latex")):
        write_whole(out / f"verdicts{suffix}", render(blocks, format).encode())
    write_whole(out / "verdicts.csv", verdicts_csv(made, model).encode())
    write_whole(out / "verdicts.html", page([(block, found) for _, block, found in made]).encode())
    typer.echo(render(blocks), nl=False)
    typer.echo(f"wrote {out / 'verdicts'}.md, .tex, .csv and .html", err=True)
    return failed


def _answered(table: Table) -> list[Result]:
    """The scored answers of a table, those of earlier runs included; none where they change nothing."""
    if not table.out.is_dir() or not (table.job or table.lacking):
        return []
    try:
        results = [read_cell(folder, **table.config.options) for folder in found_cells(table.out)]
    except LvlmDecodeError:
        if not table.lacking:
            raise
        # What they are scored with may be what is lacking, or they are what is broken.
        return []
    return [result for result in results if result.evaluator.name == table.config.benchmark]
