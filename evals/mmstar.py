"""MMStar: 1,500 questions that need the image, four options each. (Chen et al., NeurIPS 2024; arXiv 2403.20330)

An answer is right if the gold letter is its first character, or follows "(", "option " or "the answer is " at its start.
Two averages of the same answers are in use and differ: `accuracy` is right / asked, as the authors print it; `by_skill`
is the plain mean over sub-categories, as lmms-eval prints it. The first character is not checked for the end of a word,
so "because" is read as B, as in the authors' script. Always B gives 29.8 %.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lvlm_decode.errors import FileFormatError, UnknownNameError

from .base import PAIRS_OF_IMAGES, Answer, Column, Evaluator, Question, Row, need, ratio
from .choices import (
    TASKS,
    field,
    letter,
    named_choice,
    open_question,
    read_sheet,
    scene_contrasts,
    text_field,
    whole_number,
)

CATEGORIES = (
    "coarse perception",
    "fine-grained perception",
    "instance reasoning",
    "logical reasoning",
    "science & technology",
    "math",
)
LETTERS = "ABCD"
_STARTS = ("", "(", "option ", "the answer is ")


def answer_letters(text: str) -> set[str]:
    """The letters that the authors' script would take this answer for; normally one or none."""
    said = text.lower().strip().replace("\n", " ")
    return {said[len(start)].upper() for start in _STARTS if said.startswith(start) and len(said) > len(start)} & {
        *LETTERS
    }


@dataclass(frozen=True)
class MMStar(Evaluator):
    """MMStar scores."""

    name: ClassVar[str] = "mmstar"
    paper: ClassVar[str] = "MMStar (arXiv 2403.20330)"
    max_new_tokens: ClassVar[int] = 16
    ability: ClassVar[tuple[str, ...]] = ("accuracy",)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("accuracy", "Accuracy", better=+1, paired=True),
        Column("by_skill", "Mean of skills", better=+1, paired=True),
        *(Column(name, name.capitalize(), better=+1) for name in (*CATEGORIES, *TASKS)),
        Column("unparsed", "Unparsed", better=-1),
        Column("n", "n", "count"),
    )

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        """Colour, count and position of something in a scene, answered with a word; the choices are all such words."""
        from lvlm_decode_data import COLOURS
        from lvlm_decode_data.texts import NUMBERS

        choices = {"color": [*COLOURS], "count": [NUMBERS[n] for n in (1, 2, 3)], "position": ["left", "right"]}
        questions = []
        for contrast in scene_contrasts(scenes, seed, self.name):
            text, words = open_question(contrast)
            offered = choices[contrast.task]
            for scene, word in zip(contrast.scenes, words):
                meta = {"category": contrast.task, "l2_category": contrast.category, "choices": offered}
                label = chr(ord("A") + offered.index(word))
                identity = f"{contrast.task}/{scene.image_id}"
                questions.append(Question(identity, text, str(scene.image_id), label, contrast.pair, meta))
        return {"all": questions}

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """A sheet of index, question (options inside), answer, category and l2_category: CSV, TSV or JSON.

        Images are called `INDEX.jpg`. Spreadsheets (.xlsx) are saved as CSV first.
        """
        questions = []
        for where, record in read_sheet(path):
            index = whole_number(field(record, where, "index"), where, "index")
            meta = {name: text_field(record, where, name) for name in ("category", "l2_category")}
            label = letter(field(record, where, "answer", "label"), where, LETTERS)
            questions.append(Question(index, text_field(record, where, "question"), f"{index}.jpg", label, meta=meta))
        return {"all": questions}

    def read_answers(self, path: Path) -> list[Answer]:
        """Answers as JSON lines, or the authors' sheet: `answer` is the gold letter, `prediction` what was said.

        Raises FileFormatError where only some records have a `prediction`: in the others the gold letter would be scored.
        """
        sheet = read_sheet(path)
        if not any("prediction" in record for _, record in sheet):
            return super().read_answers(path)
        return [
            Answer(
                question_id=whole_number(field(record, where, "index", "question_id"), where, "index"),
                answer=str(need(record, "prediction", where) or ""),
                text=str(record.get("question") or ""),
                label=letter(need(record, "answer", where), where, LETTERS),
                meta={name: str(record[name]) for name in ("category", "l2_category") if record.get(name)},
            )
            for where, record in sheet
        ]

    def row(self, answer: Answer) -> Row:
        where = f"question {answer.question_id}"
        choices = answer.meta.get("choices")
        if answer.label is None:
            raise FileFormatError(f"{where} has no label; put `label` into the answers, or give --questions FILE.")
        label = str(answer.label) if choices else letter(answer.label, where, LETTERS)
        named = named_choice(answer.answer, choices) if choices else None
        found = ({named} if named else set()) if choices else answer_letters(answer.answer)
        category = str(field(answer.meta, f"{where} (give --questions FILE)", "category"))
        if not choices and category not in CATEGORIES:
            raise UnknownNameError.of(f"{where}: category of MMStar", category, CATEGORIES)
        return Row.of(
            replace(answer, label=label),
            parsed="".join(sorted(found)) or "other",
            correct=label in found,
            rule="choice named" if choices else "mmstar",
            clear=bool(found),
            category=category,
            skill=str(answer.meta.get("l2_category") or category) if not choices else category,
            text=answer.text,
        )

    def clustered(self, rows: Sequence[Row]) -> tuple[str, str]:
        # Scenes are asked about two by two, and the two are drawn again together.
        on_scenes = any(row.rule == "choice named" for row in rows)
        return PAIRS_OF_IMAGES if on_scenes else super().clustered(rows)

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        total: Counter[str] = Counter(n=0, correct=0, unclear=0)
        for row in rows:
            # The separator may not occur in a name, or two skills would share a count.
            name = f"{row.evidence['category']}|{row.evidence['skill']}"
            total["n"] += 1
            total["correct"] += bool(row.correct)
            total["unclear"] += not row.clear
            total[f"{name}|n"] += 1
            total[f"{name}|correct"] += bool(row.correct)
        return dict(total)

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        skills = [name.removesuffix("|n") for name in totals if name.endswith("|n")]
        by_skill = [ratio(totals[f"{skill}|correct"], totals[f"{skill}|n"]) for skill in skills]
        rates: dict[str, Any] = {
            "accuracy": ratio(totals["correct"], totals["n"]),
            "by_skill": sum(by_skill) / len(by_skill) if by_skill else 0.0,
            "unparsed": ratio(totals["unclear"], totals["n"]),
        }
        for category in dict.fromkeys(skill.split("|")[0] for skill in skills):
            own = [skill for skill in skills if skill.startswith(f"{category}|")]
            rates[category] = ratio(
                sum(totals[f"{skill}|correct"] for skill in own), sum(totals[f"{skill}|n"] for skill in own)
            )
        return rates
