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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lvlm_decode.errors import EvalError, FileFormatError

from . import parsers
from .base import Answer, Column, Evaluator, Question, Row, need, ratio
from .reading import read_records

_KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input")
_GOLD = {"0": "no", "1": "yes"}


@dataclass(frozen=True)
class HallusionBench(Evaluator):
    """HallusionBench scores. rule: how yes or no is read, a name of `parsers.RULES`; the default is VLMEvalKit's."""

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
        return {"all": [_question_of(record, where) for where, record in read_records(path)]}

    def read_answers(self, path: Path) -> list[Answer]:
        """The question file with the answer in `model_prediction`, as its authors want it, or JSON lines of answers."""
        records = read_records(path)
        if "model_prediction" not in records[0][1]:
            return super().read_answers(path)
        return [
            Answer.to(_question_of(record, where), str(need(record, "model_prediction", where) or ""))
            for where, record in records
        ]

    def row(self, answer: Answer) -> Row:
        label = str(answer.label).lower()
        if label not in ("yes", "no"):
            raise EvalError(
                f"Question {answer.question_id}: the gold answer must be yes or no, found {answer.label!r}."
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
            "f_acc": ratio(totals["figures_correct"], totals["figures"]),
            "q_acc": ratio(totals["pairs_correct"], totals["pairs"]),
            "yes_ratio": ratio(totals["said_yes"], totals["questions"]),
            "unparsed": ratio(totals["unclear"], totals["questions"]),
        }


def _without_figure(keys: Mapping[str, str]) -> bool:
    """Whether a question that a figure supplements (VS) was asked without one."""
    return keys["category"] == "VS" and keys["visual_input"] == "0"


def _question(keys: Sequence[str], text: str, image: str | None, label: str) -> Question:
    """A question; its cluster is the set, within which figures and questions are counted together."""
    meta = dict(zip(_KEYS, keys))
    return Question("/".join(keys[:5]), text, image, label, cluster="/".join(keys[:3]), meta=meta)


def _question_of(record: Mapping[str, Any], where: str) -> Question:
    keys = [str(need(record, name, where)) for name in _KEYS]
    gold = str(need(record, "gt_answer", where))
    if gold not in _GOLD:
        raise FileFormatError(f"{where}: field 'gt_answer' must be 0 or 1, found {gold!r}.")
    image = record.get("filename")
    return _question(keys, need(record, "question", where), image.removeprefix("./") if image else None, _GOLD[gold])
