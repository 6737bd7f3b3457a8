"""MMVP: pairs of images that CLIP takes for the same, one question with opposite answers. (Tong et al., CVPR 2024; arXiv
2401.06209)

    pair accuracy = pairs with both right / pairs        (chance 25 %, always the same letter 0)

The authors let a language model judge each answer. Here a letter is read by the rule of lmms-eval, so that the score is
deterministic and needs no judge. Four labels are disputed: 279 and 280 are exchanged by two independent reports, 99 and
100 by one report that another contradicts. `labels` says which are used; the difference is at most two pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lvlm_decode.errors import EvalError, FileFormatError, UnknownNameError
from lvlm_decode.reading import read_records

from .base import PAIRS_OF_IMAGES, Answer, Column, Evaluator, Question, Row, need, ratio, share
from .choices import field, letter, named_choice, open_question, read_sheet, scene_contrasts, text_field, whole_number
from .joins import same_text

# Index (from 1) -> the authors' label; the corrected one is the other letter.
OFFICIAL = {99: "A", 100: "B", 279: "A", 280: "B"}
SUFFIX = "\nAnswer with the option's letter from the given choices directly."

# In this order, any case. The article in "A dog ..." is read as the letter, as in lmms-eval.
_FORMS = (
    r"^\s*\(?([AB])\)?\.?\s*$",
    r"^\s*\(?([AB])\)?[.\s]",
    r"answer\s+is\s+\(?([AB])\)?",
    r"option\s+\(?([AB])\)?",
    r"\(?([AB])\)?(?:\s|$)",
)


def answer_letter(text: str) -> str | None:
    """A or B as lmms-eval reads it: five forms in order, then the first character; None where nothing is found."""
    text = text.strip()
    for form in _FORMS:
        if found := re.search(form, text, re.IGNORECASE):
            return found[1].upper()
    return text[0].upper() if text[:1].upper() in ("A", "B") else None


@dataclass(frozen=True)
class MMVP(Evaluator):
    """MMVP scores.

    Args:
        labels: Labels of the questions: "corrected" or "official".
    """

    labels: str = "corrected"

    name: ClassVar[str] = "mmvp"
    paper: ClassVar[str] = "MMVP (arXiv 2401.06209)"
    max_new_tokens: ClassVar[int] = 16
    ability: ClassVar[tuple[str, ...]] = ("pair_accuracy",)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("pair_accuracy", "Pair accuracy", better=+1, paired=True, of=("pairs",)),
        Column("accuracy", "Accuracy", better=+1, paired=True),
        Column("first_ratio", "Share of A"),
        Column("unparsed", "Unparsed", better=-1),
        Column("pairs", "Pairs", "count"),
        Column("n", "n", "count"),
    )

    def __post_init__(self) -> None:
        if self.labels not in ("corrected", "official"):
            raise UnknownNameError.of("labels of mmvp", self.labels, ("corrected", "official"))

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        """One question about two scenes of one theme, with a different answer about each; answered with a word."""
        questions: list[Question] = []
        for contrast in scene_contrasts(scenes, seed, self.name):
            text, choices = open_question(contrast)
            pair = f"{contrast.task}/{contrast.pair}"
            for i, scene in enumerate(contrast.scenes):
                meta = {"pair": pair, "choices": list(choices), "task": contrast.task}
                identity = f"{pair}/{i + 1}"
                questions.append(Question(identity, text, str(scene.image_id), "AB"[i], contrast.pair, meta))
        return {"all": questions}

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """The authors' Questions.csv (Index, Question, Options, Correct Answer), or the same fields as JSON.

        Options are lettered anew and asked for as lmms-eval does. Images are called `INDEX.jpg`. Raises EvalError where the
        two of a pair ask different things, as in a sheet that counts from 0.
        """
        questions = []
        for where, record in read_sheet(path):
            index = whole_number(field(record, where, "Index", "idx"), where, "Index")
            options = _options(field(record, where, "Options"), where)
            lettered = "\n".join(f"{'AB'[i]}. {option}" for i, option in enumerate(options))
            text = f"{text_field(record, where, 'Question')}\n{lettered}{SUFFIX}"
            label = letter(field(record, where, "Correct Answer", "answer", "label"), where, "AB")
            questions.append(Question(index, text, f"{index}.jpg", label, cluster=f"pair {_pair(index)}"))
        _check_pairs({int(question.id): question.text for question in questions}, str(path))
        return {"all": questions}

    def read_answers(self, path: Path) -> list[Answer]:
        """JSON lines of answers. In the authors' form `answer` is the gold letter and `response` what the model said.

        Raises FileFormatError where only some lines have a `response`: in the others the gold letter would be scored.
        """
        records = read_records(path)
        if not any("response" in record for _, record in records):
            return super().read_answers(path)
        return [
            Answer(
                question_id=field(record, where, "question_id"),
                answer=str(need(record, "response", where) or ""),
                text=str(record.get("prompt", "")),
                label=letter(need(record, "answer", where), where, "AB"),
            )
            for where, record in records
        ]

    def matched(self, answers: Sequence[Answer], questions: Sequence[Question], where: str) -> list[Answer]:
        """The authors ask "Question (a) x (b) y": the question and options that are lettered anew here."""
        asked = {str(question.id): question.text for question in questions}
        found = []
        for answer in answers:
            text = asked.get(str(answer.question_id), "")
            same = answer.text and text and same_text(_unlettered(answer.text), _unlettered(text.removesuffix(SUFFIX)))
            found.append(replace(answer, text=text) if same else answer)
        return found

    def label(self, answer: Answer) -> str:
        """The gold letter in use; the four disputed ones by `labels`, whichever of the two the file has."""
        where = f"question {answer.question_id}"
        if answer.label is None:
            raise FileFormatError(f"{where} has no label; put `label` into the answers, or give --questions FILE.")
        given = letter(answer.label, where, "AB")
        disputed = (
            None if "pair" in answer.meta else OFFICIAL.get(whole_number(answer.question_id, where, "question_id"))
        )
        if disputed is None:
            return given
        return disputed if self.labels == "official" else "AB"[disputed == "A"]

    def row(self, answer: Answer) -> Row:
        if "pair" in answer.meta:
            pair = answer.meta["pair"]
        else:
            pair = _pair(whole_number(answer.question_id, f"question {answer.question_id}", "question_id"))
        label = self.label(answer)
        choices = answer.meta.get("choices")
        said = named_choice(answer.answer, choices) if choices else answer_letter(answer.answer)
        row = Row.of(
            replace(answer, label=label),
            parsed=said or "other",
            correct=said == label,
            rule="choice named" if choices else "lmms-eval",
            clear=said is not None,
            pair=str(pair),
            text=answer.text,
        )
        return row if answer.cluster is not None else replace(row, cluster=f"pair {pair}")

    def rows(self, answers: Iterable[Answer]) -> list[Row]:
        """Scored answers. Raises EvalError where the two of a pair were asked different things: then ids count from 0."""
        rows = super().rows(answers)
        asked = {int(row.id): row.evidence["text"] for row in rows if row.id.isdecimal() and row.evidence["text"]}
        _check_pairs(asked, "the answers")
        return rows

    def clustered(self, rows: Sequence[Row]) -> tuple[str, str]:
        return PAIRS_OF_IMAGES

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        pairs: dict[str, list[bool]] = {}
        for row in rows:
            pairs.setdefault(row.evidence["pair"], []).append(bool(row.correct))
        whole = [both for both in pairs.values() if len(both) == 2]
        return {
            "n": len(rows),
            "correct": sum(bool(row.correct) for row in rows),
            "first": sum(row.parsed == "A" for row in rows),
            "unclear": sum(not row.clear for row in rows),
            "pairs": len(whole),
            "pairs_correct": sum(map(all, whole)),
        }

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **share("pair_accuracy", totals["pairs_correct"], totals["pairs"]),
            "accuracy": ratio(totals["correct"], totals["n"]),
            "first_ratio": ratio(totals["first"], totals["n"]),
            "unparsed": ratio(totals["unclear"], totals["n"]),
        }


def _pair(index: int) -> int:
    """Number of the pair, from 1; indices count from 1."""
    return (index + 1) // 2


def _check_pairs(asked: Mapping[int, str], where: str) -> None:
    """Raise EvalError where the two of a pair, told by their index, ask different questions. asked: index -> text."""
    for index, text in asked.items():
        partner = asked.get(index + 1)
        if index % 2 and partner is not None and not _same_question(text, partner):
            raise EvalError(
                f"{where}: {index} and {index + 1} are no pair, because they ask {_question(text)!r} and "
                f"{_question(partner)!r}; indices must count from 1, as in the authors' Questions.csv."
            )


def _question(text: str) -> str:
    """A text up to its options, or to the end of its first question."""
    return re.split(r"\n|\s*\(a\)|(?<=\?)\s", text.strip(), maxsplit=1, flags=re.IGNORECASE)[0]


def _same_question(one: str, other: str) -> bool:
    return same_text(_question(one), _question(other))


def _unlettered(text: str) -> str:
    """A question with its options one a line, whatever letters stand before them."""
    return re.sub(r"\s*(?:\(([ab])\)|^([AB])\.)\s*", "\n", text, flags=re.MULTILINE)


def _options(value: Any, where: str) -> list[str]:
    """Two options from "(a) x (b) y" or from a list."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*\(a\)\s*(.*?)\s*\(b\)\s*(.*?)\s*", value, re.IGNORECASE | re.DOTALL)
        value = list(found.groups()) if found else [value]
    if not isinstance(value, list) or len(value) != 2:
        raise FileFormatError(f"{where}: options must read '(a) ... (b) ...', found {value!r}.")
    return [str(option) for option in value]
