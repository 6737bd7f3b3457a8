"""NaturalBench: two questions about two images, each answered differently by each. (Li et al., NeurIPS 2024; arXiv
2410.14669)

    qAcc = questions right on both images / questions
    iAcc = images with both questions right / images
    gAcc = groups with all four right / groups

Always the same answer gives 50 % accuracy and 0 in the three others, and so does an answer that ignores the image. By
construction the first question is yes (or A) of the first image and no (or B) of the second, and the second question
the other way round; the authors' scorer relies on that and reads no answer column, and so does this one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lvlm_decode.errors import EvalError, FileFormatError
from lvlm_decode.reading import read_json, read_text, shown

from .base import PAIRS_OF_IMAGES, Answer, Column, Evaluator, Question, Row, ratio, share
from .choices import TASKS, read_sheet, scene_contrasts, text_field, whole_number, yes_no_questions
from .forms import BY_PLACE, in_order
from .joins import same_text

# Words that mean 1 and 0, by type of question.
_WORDS = {"yes_no": ("yes", "no"), "multiple_choice": ("A", "B")}
# The authors' code joins question and sentence without a blank; lmms-eval and VLMEvalKit put one, as here.
SUFFIXES = {
    "yes_no": " Please answer Yes or No.",
    "multiple_choice": " Please output the letter corresponding to the correct option.",
}
# Right answers of the four calls of a group: (q0, i0), (q0, i1), (q1, i0), (q1, i1).
_GOLD = (1, 0, 0, 1)


def verdict(text: str, kind: str) -> int:
    """1 for yes or A, 0 for no or B, -1 for neither: whole words in any case, the earlier one where both occur."""
    first, second = _WORDS[kind]
    found = re.search(rf"\b({first}|{second})\b", text, re.IGNORECASE)
    return -1 if found is None else int(found[1].lower() == first.lower())


@dataclass(frozen=True)
class NaturalBench(Evaluator):
    """NaturalBench scores; a group counts in the three grouped figures once all four of its answers are there."""

    name: ClassVar[str] = "naturalbench"
    paper: ClassVar[str] = "NaturalBench (arXiv 2410.14669)"
    max_new_tokens: ClassVar[int] = 16
    # Skill by skill where the questions name skills, as those about scenes do.
    ability: ClassVar[tuple[str, ...]] = ("g_acc", *(f"{task}_acc" for task in TASKS))
    columns: ClassVar[tuple[Column, ...]] = (
        Column("g_acc", "gAcc", better=+1, paired=True, of=("groups",)),
        Column("q_acc", "qAcc", better=+1, paired=True, of=("groups",)),
        Column("i_acc", "iAcc", better=+1, paired=True, of=("groups",)),
        Column("accuracy", "Accuracy", better=+1, paired=True),
        *(Column(f"{task}_acc", f"gAcc {task}", better=+1, paired=True, of=(f"{task}_groups",)) for task in TASKS),
        Column("yes_ratio", "Yes-ratio"),
        Column("unparsed", "Unparsed", better=-1),
        Column("groups", "Groups", "count"),
        Column("n", "n", "count"),
    )

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        """Colour, count and position of something that two scenes of one theme share and that differs between them."""
        questions: list[Question] = []
        for group, contrast in enumerate(scene_contrasts(scenes, seed, self.name)):
            for place in range(4):
                text = yes_no_questions(contrast)[place // 2] + SUFFIXES["yes_no"]
                image = str(contrast.scenes[place % 2].image_id)
                questions.append(_question(group, place, text, image, "yes_no", contrast.pair, contrast.task))
        return {"all": questions}

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """Groups (`Question_0`, `Question_1`, `Question_Type`), or one line for each call in order (`Question`).

        CSV, TSV, JSON lines or one array. Images are called `GROUP_0.jpg` and `GROUP_1.jpg` unless the fields
        `Image_0` and `Image_1`, or `image`, name them. Raises EvalError where the questions of a group or the sheet's own
        answers contradict the order of calls, as in a sheet that counts from 1.
        """
        sheet = read_sheet(path)
        questions: list[Question] = []
        grouped = "question_0" in {str(name).lower() for name in sheet[0][1]}
        if not grouped and len(sheet) % 4:
            raise FileFormatError(f"{path}: {len(sheet)} lines; a group has four, so one is missing or too many.")
        for number, (where, record) in enumerate(sheet):
            kind = _kind(text_field(record, where, "Question_Type", "type"), where)
            names = {str(name).lower(): value for name, value in record.items()}
            if grouped:
                group = whole_number(names.get("index", number), where, "Index")
                for place in range(4):
                    text = text_field(record, where, f"Question_{place // 2}")
                    image = _file_name(names.get(f"image_{place % 2}"), f"{group}_{place % 2}.jpg")
                    gold = names.get(f"image_{place % 2}_question_{place // 2}")
                    _check_gold(gold, kind, place, f"{where}, question {place // 2} about image {place % 2}")
                    questions.append(_question(group, place, f"{text}{SUFFIXES[kind]}", image, kind))
            else:
                index = whole_number(names.get("index", number), where, "Index")
                group, place = divmod(index, 4)
                image = _file_name(names.get("image"), f"{group}_{place % 2}.jpg")
                _check_gold(names.get("answer"), kind, place, f"{where}, index {index}")
                text = f"{text_field(record, where, 'Question')}{SUFFIXES[kind]}"
                questions.append(_question(group, place, text, image, kind))
        _check_groups(((q.meta["group"], q.meta["place"], q.text) for q in questions), str(path))
        return {"all": questions}

    def read_answers(self, path: Path) -> list[Answer]:
        """JSON lines of answers, or the authors' form: one array of texts in the order of the calls."""
        if read_text(path).lstrip().startswith("["):
            listed = read_json(path)
            # A list of objects is the other form; it is of that which most of its entries are.
            if sum(isinstance(entry, str) for entry in listed) > sum(isinstance(entry, dict) for entry in listed):
                return [
                    Answer(question_id=index, answer=_said(path, index, text), meta={BY_PLACE: True})
                    for index, text in enumerate(listed)
                ]
        return super().read_answers(path)

    def matched(self, answers: Sequence[Answer], questions: Sequence[Question], where: str) -> list[Answer]:
        """A list in the order of the calls takes the ids of the questions in their order; lengths must agree."""
        return in_order(answers, questions, where)

    def row(self, answer: Answer) -> Row:
        where = f"question {answer.question_id}"
        kind = _kind(text_field(answer.meta, f"{where} (give --questions FILE)", "type", "Question_Type"), where)
        group, place = answer.meta.get("group"), answer.meta.get("place")
        if group is None or place is None:
            group, place = divmod(whole_number(answer.question_id, where, "question_id"), 4)
        said, gold = verdict(answer.answer, kind), _GOLD[place]
        words = (*_WORDS[kind], None)
        row = Row.of(
            answer,
            parsed={1: words[0], 0: words[1], -1: "other"}[said],
            correct=said == gold,
            rule=self.name,
            clear=said != -1,
            group=group,
            place=place,
            positive=said == 1,
            task=answer.meta.get("task"),
            text=answer.text,
        )
        # The four calls of a group are counted together, whatever images their files name.
        return row if answer.cluster is not None else replace(row, cluster=str(group))

    def rows(self, answers: Iterable[Answer]) -> list[Row]:
        """Scored answers. Raises EvalError where the calls of a group do not ask what their places say."""
        rows = super().rows(answers)
        asked = ((row.evidence["group"], row.evidence["place"], row.evidence["text"]) for row in rows)
        _check_groups(asked, "the answers")
        return rows

    def clustered(self, rows: Sequence[Row]) -> tuple[str, str]:
        return PAIRS_OF_IMAGES

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        groups: dict[Any, dict[int, bool]] = {}
        for row in rows:
            groups.setdefault(row.evidence["group"], {})[row.evidence["place"]] = bool(row.correct)
        complete = {group: [calls[place] for place in range(4)] for group, calls in groups.items() if len(calls) == 4}
        whole = list(complete.values())
        task_of = {row.evidence["group"]: row.evidence["task"] for row in rows if row.evidence["task"]}
        by_task: Counter[str] = Counter()
        for group, calls in complete.items():
            if group in task_of:
                by_task[f"{task_of[group]}_groups"] += 1
                by_task[f"{task_of[group]}_correct"] += all(calls)
        return {
            **by_task,
            "n": len(rows),
            "correct": sum(bool(row.correct) for row in rows),
            "positive": sum(bool(row.evidence["positive"]) for row in rows),
            "unclear": sum(not row.clear for row in rows),
            "groups": len(whole),
            "questions_correct": sum((c[0] and c[1]) + (c[2] and c[3]) for c in whole),
            "images_correct": sum((c[0] and c[2]) + (c[1] and c[3]) for c in whole),
            "groups_correct": sum(all(calls) for calls in whole),
        }

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        tasks = [task for task in TASKS if f"{task}_groups" in totals]
        return {
            **{f"{task}_acc": ratio(totals[f"{task}_correct"], totals[f"{task}_groups"]) for task in tasks},
            **share("g_acc", totals["groups_correct"], totals["groups"]),
            **share("q_acc", totals["questions_correct"], 2 * totals["groups"]),
            **share("i_acc", totals["images_correct"], 2 * totals["groups"]),
            "accuracy": ratio(totals["correct"], totals["n"]),
            "yes_ratio": ratio(totals["positive"], totals["n"]),
            "unparsed": ratio(totals["unclear"], totals["n"]),
        }


def _check_groups(calls: Iterable[tuple[Any, int, str]], where: str) -> None:
    """Raise EvalError where the two calls with one question, told by group and place, ask different ones."""
    asked = {(group, place): text for group, place, text in calls if text}
    for (group, place), text in asked.items():
        other = asked.get((group, place + 1), text)
        if place % 2 == 0 and not same_text(text, other):
            raise EvalError(
                f"{where}: calls {place} and {place + 1} of group {group} must ask one question about two images, and ask "
                f"{text!r} and {other!r}; indices must count from 0, four calls a group in the order (q0, i0), (q0, i1), "
                "(q1, i0), (q1, i1)."
            )


def _check_gold(value: Any, kind: str, place: int, where: str) -> None:
    """Raise EvalError where a sheet's answer is another than the construction of the benchmark gives this call."""
    said = -1 if value is None else verdict(str(value), kind)
    if said not in (-1, _GOLD[place]):
        right, wrong = (_WORDS[kind][1 - gold] for gold in (_GOLD[place], said))
        raise EvalError(
            f"{where}: the sheet's answer is {wrong}, and by the order of calls it is {right}; indices must count from 0, four "
            "calls a group in the order (q0, i0), (q0, i1), (q1, i0), (q1, i1)."
        )


def _kind(value: Any, where: str) -> str:
    if value not in _WORDS:
        raise FileFormatError(f"{where}: Question_Type must be {' or '.join(_WORDS)}, found {value!r}.")
    return value


def _said(path: Path, index: int, text: Any) -> str:
    """An entry of the authors' list. Raises FileFormatError naming the entry that is no text."""
    if not isinstance(text, str):
        raise FileFormatError(f"{path}, entry {index + 1}: expected the text of an answer, found {shown(text)}.")
    return text


def _file_name(value: Any, default: str) -> str:
    """An image's file name; sheets that carry the picture itself, or none, get the default."""
    return value if isinstance(value, str) and 0 < len(value) < 256 else default


def _question(
    group: int, place: int, text: str, image: str, kind: str, cluster: str | None = None, task: str | None = None
) -> Question:
    first, second = _WORDS[kind]
    meta = {"group": group, "place": place, "type": kind} | ({"task": task} if task else {})
    label = first if _GOLD[place] else second
    return Question(4 * group + place, text, image, label, cluster=cluster or str(group), meta=meta)
