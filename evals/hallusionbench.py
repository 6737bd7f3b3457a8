"""HallusionBench: the same yes/no question about a figure and its twin. (Guan et al., CVPR 2024; arXiv 2310.14566)

    aAcc = right answers / questions
    fAcc = figures with every question right / figures              (questions asked without a figure are left out)
    qAcc = questions right on all their figures / questions that differ in text

The authors ask a language model whether an answer agrees with the gold explanation. Here a parsing rule reads yes or
no, so the score is deterministic and needs no judge; what it cannot read is `other`. As in the authors' scoring, an
undecided answer is right where a question about a figure was asked without it, and wrong everywhere else.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lvlm_decode.errors import EvalError, FileFormatError
from lvlm_decode.reading import Identity, checked, read_records, shown

from . import parsers
from .base import Answer, Column, Evaluator, Question, Row, need, ratio, share
from .forms import ANSWER_FORMS, Form, Line, answers_of

_KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input")
_GOLD = {"0": "no", "1": "yes"}
# What the authors' own script may write as an answer.
_DIGITS = {"0": "No", "1": "Yes", "2": "Uncertain"}


@dataclass(frozen=True)
class HallusionBench(Evaluator):
    """HallusionBench scores.

    Args:
        rule: Rule that reads yes or no, a name of `parsers.RULES`; the default is VLMEvalKit's.
    """

    rule: str = "vlmevalkit"

    name: ClassVar[str] = "hallusionbench"
    paper: ClassVar[str] = "HallusionBench (arXiv 2310.14566)"
    max_new_tokens: ClassVar[int] = 64
    columns: ClassVar[tuple[Column, ...]] = (
        Column("a_acc", "aAcc", better=+1, paired=True),
        Column("f_acc", "fAcc", better=+1, paired=True, of=("figures",)),
        Column("q_acc", "qAcc", better=+1, paired=True),
        Column("yes_ratio", "Yes-ratio"),
        Column("unparsed", "Unparsed", better=-1),
        Column("questions", "n", "count"),
    )

    def __post_init__(self) -> None:
        parsers.rule(self.rule)

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        """Two scenes of one theme are a figure and its twin: both are asked about objects that only one of them has, so
        every question has the opposite answer on the other figure.
        """
        from lvlm_decode_data.texts import YES_OR_NO, with_article

        rng = random.Random(f"hallusionbench {seed}")
        themes: dict[str, list] = {}
        for scene in scenes:
            themes.setdefault(scene.theme, []).append(scene)
        questions: list[Question] = []
        for theme, members in themes.items():
            for number, twins in enumerate(zip(members[::2], members[1::2])):
                differing = [
                    rng.choice(only)
                    for first, second in (twins, twins[::-1])
                    if (only := sorted(first.categories - second.categories))
                ]
                for figure, scene in enumerate(twins, 1):
                    for index, name in enumerate(differing):
                        keys = ("VD", theme, str(number), str(figure), str(index), "1")
                        text = f"Is there {with_article(name)} in the image?{YES_OR_NO}"
                        label = "yes" if name in scene.categories else "no"
                        questions.append(_question(keys, text, str(scene.image_id), label))
        return {"all": questions}

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """Questions of HallusionBench.json; those without a figure have no image."""
        return {"all": [checked(_Asked, record, where).to_question() for where, record in read_records(path)]}

    def read_answers(self, path: Path) -> list[Answer]:
        """The question file with the answer in `model_prediction`, as its authors want it, or JSON lines of answers.

        The authors' form may say "0", "1" or "2" for no, yes and undecided, and may leave out `gt_answer`; then the
        question file is needed. Where all are numbers, others than these three are refused: a judge's verdict is none.
        """
        records = read_records(path)
        coded = all(re.fullmatch(r"[+-]?\d+", str(record.get("model_prediction", "")).strip()) for _, record in records)
        for where, record in records:
            said = record.get("model_prediction")
            if (coded or type(said) is int) and str(said).strip() not in _DIGITS:
                raise FileFormatError(
                    f"{where}: field 'model_prediction' is {shown(said)}; expected 0 (no), 1 (yes), 2 (undecided), or the "
                    "answer's text."
                )
        return answers_of(records, (*ANSWER_FORMS, _Predicted), "HallusionBench answers")

    def row(self, answer: Answer) -> Row:
        label = answer.label.lower() if isinstance(answer.label, str) else answer.label
        if label not in ("yes", "no"):
            remedy = "; give --questions FILE" if label is None else ""
            raise EvalError(
                f"Question {answer.question_id}: the gold answer must be yes or no, found {shown(answer.label)}{remedy}."
            )
        verdict, clear = parsers.rule(self.rule)(answer.answer, label)
        keys = {name: str(need(answer.meta, name, f"question {answer.question_id}")) for name in _KEYS}
        undecided_is_right = _without_figure(keys) and verdict == "other"
        return Row.of(
            answer,
            parsed=verdict,
            correct=verdict == label or undecided_is_right,
            rule=self.rule,
            clear=clear,
            text=answer.text,
            **keys,
        )

    def clustered(self, rows: Sequence[Row]) -> tuple[str, str]:
        return "set of figures", "sets of figures"

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        figures: dict[tuple[str, ...], list[bool]] = {}
        pairs: dict[tuple[str, ...], list[bool]] = {}
        for row in rows:
            keys = row.evidence
            place = (keys["category"], keys["subcategory"], keys["set_id"])
            if not _without_figure(keys):
                figures.setdefault((*place, keys["figure_id"]), []).append(bool(row.correct))
            pairs.setdefault((*place, keys["question_id"]), []).append(bool(row.correct))
        return {
            "questions": len(rows),
            "correct": sum(bool(row.correct) for row in rows),
            "figures": len(figures),
            "figures_correct": sum(map(all, figures.values())),
            "pairs": len(pairs),
            "pairs_correct": sum(map(all, pairs.values())),
            "said_yes": sum(row.parsed == "yes" for row in rows),
            "unclear": sum(not row.clear for row in rows),
        }

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "a_acc": ratio(totals["correct"], totals["questions"]),
            **share("f_acc", totals["figures_correct"], totals["figures"]),
            "q_acc": ratio(totals["pairs_correct"], totals["pairs"]),
            "yes_ratio": ratio(totals["said_yes"], totals["questions"]),
            "unparsed": ratio(totals["unclear"], totals["questions"]),
        }


def _without_figure(keys: Mapping[str, str]) -> bool:
    """Whether a question that a figure supplements (VS) was asked without one."""
    return keys["category"] == "VS" and keys["visual_input"] == "0"


def _question(keys: Sequence[str], text: str, image: str | None, label: str | None) -> Question:
    """A question; its cluster is the set, within which figures and questions are counted together."""
    meta = dict(zip(_KEYS, keys))
    return Question("/".join(keys[:5]), text, image, label, cluster="/".join(keys[:3]), meta=meta)


class _Placed(Line):
    """Where a question stands in the benchmark."""

    category: Literal["VD", "VS"]
    subcategory: str
    set_id: Identity
    figure_id: Identity
    question_id: Identity
    visual_input: Literal["0", "1", "2", 0, 1, 2]
    filename: str | None = None

    @property
    def keys(self) -> list[str]:
        return [str(getattr(self, name)) for name in _KEYS]

    @property
    def picture(self) -> str | None:
        return self.filename.removeprefix("./") if self.filename else None


class _Asked(_Placed):
    """A record of HallusionBench.json."""

    question: str
    gt_answer: Literal["0", "1", 0, 1]

    def to_question(self) -> Question:
        return _question(self.keys, self.question, self.picture, _GOLD[str(self.gt_answer)])


class _Predicted(_Placed, Form):
    """A record of HallusionBench_result.json."""

    by = "HallusionBench"
    example = (
        '{"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": "1", "question_id": "0", '
        '"visual_input": "1", "question": "Is it?", "gt_answer": "1", "model_prediction": "Yes"}'
    )

    question: str = ""
    gt_answer: Literal["0", "1", 0, 1] | None = None
    model_prediction: str | int | None

    def to_answer(self, number: int) -> Answer:
        gold = None if self.gt_answer is None else _GOLD[str(self.gt_answer)]
        question = _question(self.keys, self.question, self.picture, gold)
        said = "" if self.model_prediction is None else str(self.model_prediction)
        return Answer.to(question, _DIGITS.get(said.strip(), said))
