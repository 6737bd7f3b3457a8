"""Evaluations from Python, for notebooks and scripts; the command line is a thin layer over this.

    from lvlm_decode_evals import evaluate, score

    found = evaluate(model, processor, "pope", methods=["vcd", "ritual"], limit=60)
    found                       # a notebook shows the tables: rates, intervals, differences from the matched controls
    found.rates["vcd, sample, random"]["accuracy"]
    found.to_pandas()           # one line for each method, with the bounds of the intervals
    found.rows                  # every scored answer with its evidence

    score("pope", "answers.jsonl", "coco_pope_random.json").rates["f1"]

Scoring imports no torch.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lvlm_decode.errors import DependencyError, EvalError, InputError, OutputError, SettingsError
from lvlm_decode.reading import shown

from . import evaluator
from .answers import Audit, audit, write_rows
from .base import Answer, Evaluator, Question, Row
from .joins import join
from .loaders import HUB_PREFIX, Source, check_ids, file_source, folder_images, hub_source, scene_source
from .metrics import REPLICATES, Interval, intervals
from .plan import Decoding, Result, check_without, found_cells, read_cell, score_cell
from .price import price_blocks
from .tables import Block, Entry, Value, blocks, gather, html, markdown

# What `questions` may be: none (the emoji scenes), a file or folder or hub:NAME, or the questions themselves.
Questions = None | str | os.PathLike | Sequence[Question] | Mapping[str, Sequence[Question]]


@dataclass(frozen=True)
class Evaluation:
    """The scored cells of a run, read as tables are: one line for each method, decoding and split."""

    results: Sequence[Result] = field(repr=False)
    replicates: int = REPLICATES

    @cached_property
    def _lines(self) -> dict[str, tuple[str, Entry]]:
        groups = gather([result for result in self.results if result.rows])
        several = len({name for name, _ in groups}) > 1
        return {
            ", ".join([method.label, *([name] if several else []), title]): (title, method)
            for (name, title), methods in groups.items()
            for method in methods
        }

    @property
    def rates(self) -> dict[str, dict[str, float]]:
        """Line ("vcd, sample, random") -> key of a rate or count -> its value, the mean over seeds."""
        return {label: {key: bound.value for key, bound in found.items()} for label, found in self.intervals.items()}

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """As `rates`, with the interval over images of each."""
        return {
            label: intervals(method.results[0].evaluator, method.runs, self.replicates)
            for label, (_, method) in self._lines.items()
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every scored answer with its evidence, and the split, method, decoding and seed it belongs to."""
        return [
            {"split": r.split, "method": r.method, "decoding": r.decoding.name, "seed": r.seed, **row.record()}
            for r in self.results
            for row in r.rows
        ]

    @property
    def problems(self) -> list[str]:
        """What a person must know before trusting the numbers, one sentence each."""
        return [f"{result.name}: {sentence}" for result in self.results for sentence in result.audit.sentences()]

    def blocks(self) -> list[Block]:
        """Results, differences from the matched controls, and the price of each method, as tables."""
        shown = [result for result in self.results if result.rows]
        return [*blocks(shown, self.replicates), *price_blocks(shown, self.replicates)]

    def to_pandas(self) -> Any:
        """A DataFrame with a line for each method, decoding and split: rates, and `_low` and `_high` of each interval."""
        lines = []
        for label, (title, method) in self._lines.items():
            line = {"split": title, "method": method.name, "decoding": method.decoding.name, "seeds": len(method.runs)}
            if method.model or method.variant:
                line |= {"model": method.model, "settings": method.variant}
            lines.append(line | _flat(self.intervals[label]))
        return _pandas().DataFrame(lines)

    def _repr_html_(self) -> str:
        return html(self.blocks())

    def __str__(self) -> str:
        return markdown(self.blocks())


@dataclass(frozen=True)
class Scores:
    """Scored answers of one file or list.

    Where a file holds several splits that are scored apart, `splits` has the scores of each; rates and intervals of the
    whole are over all answers together.
    """

    evaluator: Evaluator
    scored: Sequence[Row] = field(repr=False)
    audit: Audit
    replicates: int = REPLICATES

    @cached_property
    def splits(self) -> dict[str, Scores]:
        """Split -> its scores; empty where there is one. What was wrong with the file is told by the whole."""
        parts = self.evaluator.splits(self.scored)
        return {name: Scores(self.evaluator, rows, Audit(), self.replicates) for name, rows in parts.items()}

    @property
    def rates(self) -> dict[str, Any]:
        """Key -> rate or count."""
        return self.evaluator.summary(self.scored)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """As `rates`, with the interval over images of each."""
        return intervals(self.evaluator, [self.scored], self.replicates)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every scored answer with its evidence."""
        return [row.record() for row in self.scored]

    @property
    def problems(self) -> list[str]:
        """What a person must know before trusting the numbers, one sentence each."""
        return self.audit.sentences()

    @property
    def report(self) -> dict[str, Any]:
        """What `lvlm-decode score --json` prints."""
        problems = {"problems": self.audit.counts()} if self.audit else {}
        parts = {name: self.evaluator.report(found.scored) for name, found in self.splits.items()}
        return {
            "benchmark": self.evaluator.name,
            **self.evaluator.options(),
            **({"splits": parts} if parts else self.evaluator.report(self.scored)),
            **problems,
        }

    def blocks(self) -> list[Block]:
        """The rates as a table of one line, or of one for each split."""
        parts = self.splits or {"": self}
        shown = [c for c in self.evaluator.columns if any(c.key in found.intervals for found in parts.values())]

        def line(found: Scores) -> list[str | Value]:
            bounds = [(column, found.intervals.get(column.key)) for column in shown]
            return [
                "–"
                if bound is None
                else Value(bound.value, column.kind, *((bound.low, bound.high) if column.paired else ()))
                for column, bound in bounds
            ]

        lines = tuple((*([name] if name else []), *line(found)) for name, found in parts.items())
        titles = (*(["Split"] if self.splits else []), *(column.title for column in shown))
        return [Block(self.evaluator.name, titles, lines, tuple(self.problems))]

    def write(self, path: str | os.PathLike) -> None:
        """The rows as JSON lines."""
        write_rows(Path(path), self.scored)

    def to_pandas(self) -> Any:
        """A DataFrame of one line, or of one for each split: rates, and `_low` and `_high` of each interval."""
        lines = [{"split": name} | _flat(found.intervals) for name, found in self.splits.items()]
        return _pandas().DataFrame(lines or [_flat(self.intervals)])

    def _repr_html_(self) -> str:
        return html(self.blocks())

    def __str__(self) -> str:
        return markdown(self.blocks())


def _flat(found: Mapping[str, Interval]) -> dict[str, Any]:
    return {
        f"{key}{end}": value
        for key, bound in found.items()
        for end, value in (("", bound.value), ("_low", bound.low), ("_high", bound.high))
    }


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise DependencyError("Data frames need pandas; install it with: pip install 'lvlm-decode[eval]'.") from error
    return pandas


# Asking ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """An evaluation that has been checked as far as that is possible without a model."""

    evaluator: Evaluator
    source: Source
    methods: tuple[tuple[str, Decoding], ...]
    limit: int | None
    without: tuple[str, ...]

    def run(self, loaded: Any, out: Path, **how: Any) -> Any:
        """The `runner.EvaluationRun` of it; `how` as its other fields. loaded: a model, or an engine of `engines`."""
        from .engines import EngineRun
        from .runner import EvaluationRun, Loaded

        kind = EvaluationRun if isinstance(loaded, Loaded) else EngineRun
        return kind(
            self.evaluator, self.source, loaded, Path(out), self.methods, limit=self.limit, without=self.without, **how
        )


def prepare(
    benchmark: str | Evaluator,
    *,
    methods: Sequence[str] = ("plain",),
    decoding: Decoding | None = None,
    parameters: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    source: Source | None = None,
    questions: Questions = None,
    images: str | os.PathLike | None = None,
    allow_outside: bool = False,
    splits: Sequence[str] | None = None,
    limit: int | None = None,
    out: str | os.PathLike | None = None,
    **scoring: Any,
) -> Prepared:
    """Check an evaluation before a model is loaded: methods, questions, what scoring needs, where answers go.

    Arguments as for `evaluate`. source: questions and images together, instead of those two. Raises EvalError in one
    sentence that says what is lacking and which option gives it.
    """
    from .runner import check_parameters, decoding_for

    chosen = benchmark if isinstance(benchmark, Evaluator) else evaluator(benchmark, **scoring)
    names = list(dict.fromkeys(methods))
    check_parameters(names, parameters or {})
    wanted = tuple((name, decoding_for(name, decoding, parameters)) for name in names)
    check_without(without, wanted)
    source = source or source_of(chosen, questions, images, allow_outside)
    if splits:
        source = source.only(splits)
    asked = source.first(limit)
    chosen.ready([question for part in asked.splits.values() for question in part])
    if out is not None:
        check_folder(Path(out))
    return Prepared(chosen, source, wanted, limit, tuple(without))


def evaluate(
    model: Any,
    processor: Any,
    benchmark: str | Evaluator,
    *,
    methods: Sequence[str] = ("plain",),
    questions: Questions = None,
    images: str | os.PathLike | None = None,
    splits: Sequence[str] | None = None,
    limit: int | None = None,
    seeds: Sequence[int] = (0,),
    decoding: Decoding | None = None,
    without: Sequence[str] = (),
    out: str | os.PathLike | None = None,
    batch_size: int | str = 16,
    max_new_tokens: int | None = None,
    suffix: str = "",
    template: str | None = None,
    drafter: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    allow_outside: bool = False,
    quiet: bool = False,
    **scoring: Any,
) -> Evaluation:
    """Ask a model the questions of a benchmark with one or several methods and their matched controls, and score them.

    Args:
        model: a Hugging Face model. processor: its processor.
        benchmark: a name of `EVALUATORS`, with its options as further arguments (`rule="vcd"`, `objects=FILE`).
        methods: as on the command line: "vcd", "vcd(alpha=0.5)", "vcd+ritual".
        questions: None asks about the emoji scenes that ship; else a question file, a folder of them, "hub:NAME", or
            `Question` objects. images: the folder of the images that the questions name.
        splits, limit: only these splits, only the first questions of each.
        seeds: of draws and views. decoding: None samples at temperature 1 where a method can, else greedy.
        without: controls to leave out, "mask" or "plain greedy".
        out: folder of the answers; the same folder continues a run. None keeps nothing on disk.
        allow_outside: also read images that names or links lead to outside `images`.
        batch_size, max_new_tokens, suffix, template, drafter, parameters: as `runner.Options`.

    Raises EvalError before the model is asked anything when something is lacking. A sample that cannot be asked ends
    nothing: see `Evaluation.problems`.
    """
    from .runner import Options, loaded_of

    options = Options(max_new_tokens, suffix, template, drafter, batch_size, dict(parameters or {}))
    prepared = prepare(
        benchmark, methods=methods, decoding=decoding, parameters=parameters, without=without, questions=questions,
        images=images, allow_outside=allow_outside, splits=splits, limit=limit, out=out, **scoring,
    )  # fmt: skip
    loaded = loaded_of(model, processor)

    def run(folder: Path) -> Evaluation:
        return Evaluation(prepared.run(loaded, folder, seeds=list(seeds), options=options, quiet=quiet).execute())

    if out is not None:
        return run(Path(out))
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder))


def source_of(chosen: Evaluator, questions: Questions, images: str | os.PathLike | None, allow_outside: bool) -> Source:
    """Where questions and images come from, as `evaluate` takes them."""
    if questions is None:
        if images is not None:
            raise SettingsError("--images needs --questions: the emoji scenes bring their own images.")
        return scene_source(chosen)
    if isinstance(questions, str) and questions.startswith(HUB_PREFIX):
        return hub_source(chosen, questions.removeprefix(HUB_PREFIX))
    if isinstance(questions, str | os.PathLike):
        return file_source(chosen, Path(questions), None if images is None else Path(images), allow_outside)
    splits = dict(questions) if isinstance(questions, Mapping) else {"questions": list(questions)}
    for name, asked in splits.items():
        check_ids(asked, f"split {name}")
    if images is None:
        raise SettingsError("The questions are about images; give the folder that holds them as images=FOLDER.")
    return Source(splits, folder_images(Path(images), allow_outside), {"questions": "given in Python"})


def check_folder(path: Path) -> None:
    """Raise SettingsError or OutputError if a folder cannot be made or written, before work that would be lost."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise SettingsError(f"{there} is a file, so nothing can be written below it; give another folder.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OutputError.of(there, error) from error


def check_file(path: Path) -> None:
    """As `check_folder`, for a file that will be written."""
    if path.is_dir():
        raise SettingsError(f"{path} is a folder; give the name of a file.")
    if not path.parent.is_dir():
        raise SettingsError(f"{path.parent} is not a folder; make it first, or write elsewhere.")


# Scoring -----------------------------------------------------------------------------------------------------------


def score(
    benchmark: str | Evaluator,
    answers: str | os.PathLike | Sequence[Answer] | Sequence[Mapping[str, Any]],
    questions: str | os.PathLike | Sequence[Question] | None = None,
    **scoring: Any,
) -> Scores:
    """Score answers made anywhere, without a model.

    answers: a file in any form the benchmark reads, `Answer` objects, or the records of such a file. questions: what was
    asked; labels come from it, and missing and unknown ids are told. Raises EvalError where no answer can be scored.
    """
    chosen = benchmark if isinstance(benchmark, Evaluator) else evaluator(benchmark, **scoring)
    where = str(answers) if isinstance(answers, str | os.PathLike) else "the list of answers"
    found = _answers(chosen, answers)
    asked = None
    contradicted = chosen.contradicted(found)
    if questions is not None:
        asked = _questions(chosen, questions, found)
        found, by_question = join(chosen.matched(found, asked, where), asked, where)
        contradicted += by_question
    usable, trouble = audit(found, asked)
    trouble = replace(trouble, contradicted=tuple(dict.fromkeys(contradicted)))
    if not usable:
        raise EvalError(f"{where} has no answer that can be scored. {' '.join(trouble.sentences())}")
    rows = chosen.rows(usable)
    return Scores(chosen, rows, replace(trouble, doubts=tuple(chosen.doubts(rows))))


def _answers(chosen: Evaluator, answers: Any) -> list[Answer]:
    if isinstance(answers, str | os.PathLike):
        return chosen.read_answers(Path(answers))
    wrong = f"answers is {shown(answers)}; give a file's path, or a list of Answer objects or of records (dicts) of one form"
    if isinstance(answers, Mapping) or not isinstance(answers, Iterable):
        raise InputError(f"{wrong}.")
    given = list(answers)
    if all(isinstance(answer, Answer) for answer in given):
        for answer in given:
            if not isinstance(answer.answer, str):
                raise InputError(f"answer {answer.question_id} is {shown(answer.answer)}; expected text.")
        return given
    if not all(isinstance(record, Mapping) for record in given):
        raise InputError(f"{wrong}; a data frame has them as .to_dict('records').")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        try:
            path.write_text("".join(json.dumps(dict(record)) + "\n" for record in given), encoding="utf-8")
        except (TypeError, ValueError) as error:
            raise InputError(f"the records of the answers are no JSON ({error}).") from error
        try:
            return chosen.read_answers(path)
        except EvalError as error:
            raise type(error)(str(error).replace(str(path), "the answers")) from error


def _questions(chosen: Evaluator, questions: Any, answers: Sequence[Answer]) -> list[Question]:
    if not isinstance(questions, str | os.PathLike):
        given = list(questions) if isinstance(questions, Iterable) else [questions]
        if not all(isinstance(question, Question) for question in given):
            raise InputError(f"questions is {shown(questions)}; give a file's path or a list of Question objects.")
        return given
    return chosen.listed(chosen.file_questions(Path(questions)), answers)


def read_run(folder: str | os.PathLike, *, write: bool = False, **scoring: Any) -> Evaluation:
    """The cells of a run's folder, scored by other options where they are given. write: keep the scores beside them."""
    read: Callable[..., Result] = score_cell if write else read_cell
    return Evaluation([read(cell, **scoring) for cell in found_cells(Path(folder))])
