"""What must hold of an evaluator: questions that can be told apart, a row for every answer, numbers that are sums over clusters.

from lvlm_decode.testing import check_evaluator

def test_my_benchmark():
    check_evaluator(MyBenchmark())
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvlm_decode_data import load_scenes
from lvlm_decode_evals import evaluator as named
from lvlm_decode_evals.base import Answer, Evaluator, Question, Row, tallies
from lvlm_decode_evals.loaders import check_ids

from .contract import Check, raises, run_all

#: What the questions are answered with, in turn.
SAID = ("Yes.", "No, there is none.", "A dog and a cat on a table.", "", "A")


@dataclasses.dataclass(frozen=True, eq=False)
class Scoring:
    """An evaluator with questions and answers to them, by split."""

    evaluator: Evaluator
    questions: Mapping[str, Sequence[Question]]
    given: Mapping[str, Sequence[Answer]] | None = None

    def __str__(self) -> str:
        return self.evaluator.name

    @functools.cached_property
    def answers(self) -> dict[str, list[Answer]]:
        if self.given is not None:
            return {split: list(answers) for split, answers in self.given.items()}
        return {
            split: [Answer.to(question, SAID[i % len(SAID)], tokens=3) for i, question in enumerate(questions)]
            for split, questions in self.questions.items()
        }

    @functools.cached_property
    def rows(self) -> dict[str, list[Row]]:
        return {split: self.evaluator.rows(answers) for split, answers in self.answers.items()}


def options_are_plain_and_fixed(case: Scoring) -> None:
    """A frozen dataclass with a name, whose options can be written beside the scores."""
    kind = type(case.evaluator)
    assert case.evaluator.name and case.evaluator.columns, f"{kind.__name__} has no name or no columns"
    assert dataclasses.is_dataclass(kind), f"{kind.__name__} is no dataclass"
    option = next(iter(case.evaluator.options()), "an_option")
    with raises(dataclasses.FrozenInstanceError):
        setattr(case.evaluator, option, None)
    json.dumps(case.evaluator.options())


def scoring_imports_no_torch(case: Scoring) -> None:
    """Answers can be scored where no model can run: the evaluator's module imports neither torch nor transformers."""
    code = (
        f"import sys; import {type(case.evaluator).__module__}; "
        "print(*sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert not done.stdout.strip(), f"{type(case.evaluator).__module__} imports {done.stdout.strip()}"


def questions_can_be_told_apart(case: Scoring) -> None:
    """Unique ids within a split, and nothing that JSON cannot hold; answers to them could be scored."""
    assert case.questions, "there are no questions"
    for split, questions in case.questions.items():
        assert questions, f"split {split!r} has no questions"
        check_ids(questions, split)
        for question in questions:
            assert question.text, f"question {question.id} has no text"
            json.dumps([question.id, question.label, dict(question.meta)])
        case.evaluator.ready(questions)


def every_answer_has_its_row(case: Scoring) -> None:
    """The same one each time; an answer that could not be asked has none."""
    for split, answers in case.answers.items():
        rows = case.rows[split]
        got, want = sorted(row.id for row in rows), sorted(str(answer.question_id) for answer in answers)
        assert got == want, f"split {split!r}: rows of {len(got)} ids for {len(want)} answers"
        assert case.evaluator.rows(answers) == rows, "the same answers are scored otherwise the second time"
        for row in rows:
            json.dumps(row.record())
    failed = dataclasses.replace(answers[0], answer="", error="The image is missing.")
    assert case.evaluator.rows([failed]) == [], "an answer with an error is scored"


def numbers_are_sums_over_clusters(case: Scoring) -> None:
    """Whole counts, in any order of the rows; rates of arrays are the rates of numbers, as the bootstrap needs it."""
    for rows in case.rows.values():
        keys, (_, counts) = tallies(case.evaluator, rows)
        totals = counts.sum(0)
        for group in {row.cluster for row in rows}:
            tally = case.evaluator.tally([row for row in rows if row.cluster == group])
            wrong = {key: value for key, value in tally.items() if int(value) != value}
            assert not wrong, f"counts of cluster {group} that are no whole numbers: {wrong}"
        mixed = list(rows)
        random.Random(0).shuffle(mixed)
        same_numbers(case.evaluator.summary(mixed), case.evaluator.summary(rows), "rows in another order")
        once = {key: int(total) for key, total in zip(keys, totals)}
        alone = {key: float(value) for key, value in case.evaluator.rates(once).items()}
        twice = case.evaluator.rates({key: np.array([total, total]) for key, total in once.items()})
        for key, value in twice.items():
            both = np.broadcast_to(np.asarray(value, dtype=np.float64), (2,))
            same_numbers({key: float(both[1])}, {key: alone[key]}, "rates of arrays")


def same_numbers(got: Mapping[str, Any], want: Mapping[str, Any], what: str) -> None:
    wrong = {
        key: (got.get(key), value)
        for key, value in want.items()
        if not math.isclose(got.get(key, math.nan), value, abs_tol=1e-12)
    }
    assert got.keys() == want.keys() and not wrong, f"{what}: {wrong or set(got) ^ set(want)}"


def columns_find_their_numbers(case: Scoring) -> None:
    """Some column has its number in every split (columns may belong to one of them), and every number is finite."""
    columns = {column.key for column in case.evaluator.columns}
    for split, rows in case.rows.items():
        summary = case.evaluator.summary(rows)
        assert columns & summary.keys(), f"split {split!r}: no column of {sorted(columns)} is in {sorted(summary)}"
        endless = sorted(key for key, value in summary.items() if not math.isfinite(value))
        assert not endless, f"split {split!r}: {endless} are no finite numbers"


RULES = (
    options_are_plain_and_fixed,
    scoring_imports_no_torch,
    questions_can_be_told_apart,
    every_answer_has_its_row,
    numbers_are_sums_over_clusters,
    columns_find_their_numbers,
)


def evaluator_checks(
    evaluator: Evaluator | str,
    questions: Mapping[str, Sequence[Question]] | None = None,
    answers: Mapping[str, Sequence[Answer]] | None = None,
) -> list[Check]:
    """The rules of an evaluator as checks to be called.

    Args:
        evaluator: an instance, or the name of a registered one.
        questions: split -> questions; by default those about forty of the scenes that ship.
        answers: split -> answers to them; by default a few short texts in turn.

    Raises:
        EvalError: the evaluator has no questions about scenes, and none are given.
    """
    made: Evaluator = named(evaluator) if isinstance(evaluator, str) else evaluator
    asked = made.scene_questions(load_scenes("heldout")[:40]) if questions is None else questions
    case = Scoring(made, asked, answers)
    return [Check(rule, case) for rule in RULES]


def check_evaluator(
    evaluator: Evaluator | str,
    questions: Mapping[str, Sequence[Question]] | None = None,
    answers: Mapping[str, Sequence[Answer]] | None = None,
) -> None:
    """Hold an evaluator to its rules; takes what :func:`evaluator_checks` takes.

    Raises:
        AssertionError: names the rules that are broken, with what was expected.
        EvalError: the evaluator has no questions about scenes, and none are given.
    """
    run_all(evaluator_checks(evaluator, questions, answers))
