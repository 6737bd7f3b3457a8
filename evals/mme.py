"""MME: two yes/no questions about each image, one true, one false. (Fu et al., 2023; arXiv 2306.13394)

    score of a task = 100 * right answers / questions + 100 * images with both right / images          (0 to 200)

Perception is the plain sum over ten tasks, cognition over four. The "hallucination subset" of VCD and its followers is
existence and count (object level) with position and color (attribute level). An answer is read by MME's own script:
whole answer yes or no, else the first four characters; what is neither is wrong and counted as `other`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lvlm_decode.errors import EvalError, FileFormatError, MissingFileError
from lvlm_decode.reading import Identity, Record, checked, read_records, read_text, shown

from . import parsers
from .base import Answer, Column, Evaluator, Question, Row, ratio
from .forms import Damro, Llava, Own, TextOnly, answers_of

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION
TOTALS = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination": HALLUCINATION}
_COUNTS = ("questions", "images", "correct", "pairs_correct", "other", "yes", "no")


@dataclass(frozen=True)
class MME(Evaluator):
    """MME scores.

    Questions are paired by image within their task. A file in which an image does not have exactly two lines is
    refused; in a run, an image with only one answer counts among the questions but not among the images.

    Args:
        rule: Rule that reads yes or no, a name of `parsers.RULES`; "mme" is the official one.
        first_line: Ask the first line of a question alone, without "Answer the question using a single word or phrase.", as
            AvisC's script does.
    """

    rule: str = "mme"
    first_line: bool = False

    name: ClassVar[str] = "mme"
    paper: ClassVar[str] = "MME (arXiv 2306.13394)"
    max_new_tokens: ClassVar[int] = 16
    # How many, where and which colour: seeing, where existence is what a model makes up.
    ability: ClassVar[tuple[str, ...]] = ("count", "position", "color")
    columns: ClassVar[tuple[Column, ...]] = (
        *(Column(task, task.capitalize(), "number", better=+1, top=200) for task in HALLUCINATION),
        Column("hallucination", "Subset", "number", better=+1, paired=True, top=800),
        Column("perception", "Perception", "number", better=+1, paired=True, top=2000),
        Column("cognition", "Cognition", "number", better=+1, paired=True, top=800),
        Column("other", "Other", better=-1),
        Column("questions", "n", "count"),
    )

    def __post_init__(self) -> None:
        parsers.rule(self.rule)

    @property
    def hallucination(self) -> tuple[str, ...]:
        return ("existence",)

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        """A pair for each of the four hallucination tasks that a scene allows, scene after scene.

        The false existence question is about an object that usually stands beside what is there.
        """
        from lvlm_decode_data.texts import YES_OR_NO, CoOccurrence, yes_no_pairs

        rng = random.Random(f"mme {seed}")
        prior = CoOccurrence(scenes)
        questions: list[Question] = []
        for scene in scenes:
            image = str(scene.image_id)
            for task, texts in yes_no_pairs(rng, scene, prior).items():
                for text, label in zip(texts, ("yes", "no")):
                    identity = f"{task}/{image}/{label}"
                    questions.append(Question(identity, text + YES_OR_NO, image, label, meta={"task": task}))
        return {"all": questions}

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """Questions of a folder of task files (image, question, gold answer; tabs), or of JSON lines.

        JSON lines (`question_id` or `image` as task/file, `text`, `category`, optional `label`) follow RITUAL's file
        of the hallucination subset, which leaves the gold answers out: then the first question of an image is the true
        one, as it is for all 2374 official questions.
        """
        if Path(path).is_dir():
            return {"all": [self._cut(_question_of(line, i)) for i, line in enumerate(_task_lines(path, (3, 4)))]}
        asked: Counter[str] = Counter()
        questions = []
        for where, record in read_records(path):
            line = checked(_Asked, record, where)
            image = str(line.image if line.image is not None else _image_of(line, record, where))
            task = _task(line.category or image.split("/")[0], where)
            order = asked[f"{task} {image}"]
            asked[f"{task} {image}"] += 1
            label = _label(("yes", "no")[order % 2] if line.label is None else line.label, where)
            identity = f"{image if image.startswith(task) else f'{task}/{image}'}/{order + 1}"
            cluster = f"{task}/{image.rsplit('/', 1)[-1]}"
            questions.append(self._cut(Question(identity, line.text, image, label, cluster, meta={"task": task})))
        return {"all": questions}

    def _cut(self, question: Question) -> Question:
        return replace(question, text=question.text.split("\n")[0]) if self.first_line else question

    def read_answers(self, path: Path) -> list[Answer]:
        """Answers of a folder of official result files (image, question, gold, answer), or JSON lines: of this project, or
        as LLaVA, VCD, RITUAL, DeCo and DAMRO write them, with one id for both questions about an image.
        """
        if not Path(path).is_dir():
            return _numbered(answers_of(read_records(path), _FORMS, "MME answers"))
        lines = _task_lines(path, (4,))
        pairs = Counter((line.task, line.image) for line in lines)
        for (task, image), count in pairs.items():
            if count != 2:
                raise FileFormatError(
                    f"{Path(path) / f'{task}.txt'}: image {image} has {count} lines; MME asks two questions of each."
                )
        return [Answer.to(_question_of(line, i), line.fields[3]) for i, line in enumerate(lines)]

    def matched(self, answers: Sequence[Answer], questions: Sequence[Question], where: str) -> list[Answer]:
        """Answers with one id for both questions about an image meet them by task, image and text; where a file says
        nothing about what was asked, the first is the answer to the first question.
        """
        places: dict[tuple[str, str], list[Question]] = {}
        for question in questions:
            places.setdefault(_place(question.meta.get("task"), question.image), []).append(question)
        return [
            _with_question(answer, places, f"{where}, answer {number}") if _SHARED in answer.meta else answer
            for number, answer in enumerate(answers, 1)
        ]

    def row(self, answer: Answer) -> Row:
        where = f"question {answer.question_id}"
        label = _label(answer.label, where)
        verdict, clear = parsers.rule(self.rule)(answer.answer, label)
        known = answer.meta.get("task") or answer.meta.get("category")
        task = _task(known or str(answer.question_id).split("/")[0], where)
        return Row.of(
            answer,
            parsed=verdict,
            correct=verdict == label,
            rule=self.rule,
            clear=clear,
            task=task,
            image=str(answer.image),
            text=answer.text,
        )

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        pairs: dict[tuple[str, str], list[bool]] = {}
        total: Counter[str] = Counter()
        for row in rows:
            task = row.evidence["task"]
            pairs.setdefault((task, row.evidence["image"]), []).append(bool(row.correct))
            total[f"{task}.questions"] += 1
            total[f"{task}.correct"] += bool(row.correct)
            total[f"{task}.{row.parsed}"] += 1
        for (task, _), correct in pairs.items():
            if len(correct) == 2:
                total[f"{task}.images"] += 1
                total[f"{task}.pairs_correct"] += all(correct)
        tasks = {task for task, _ in pairs}
        return {f"{task}.{name}": total[f"{task}.{name}"] for task in TASKS if task in tasks for name in _COUNTS}

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        tasks = [task for task in TASKS if f"{task}.questions" in totals]
        rates: dict[str, Any] = {}
        for task in tasks:
            acc = _percent(totals[f"{task}.correct"], totals[f"{task}.questions"])
            rates[task] = acc + _percent(totals[f"{task}.pairs_correct"], totals[f"{task}.images"])
        # A total of the four subset tasks alone would be mistaken for the published perception score.
        for name, members in TOTALS.items():
            present = [task for task in members if task in rates]
            if present and not (name == "perception" and set(tasks) <= set(HALLUCINATION)):
                rates[name] = sum(rates[task] for task in present)
        if tasks:
            questions = sum(totals[f"{task}.questions"] for task in tasks)
            rates["other"] = ratio(sum(totals[f"{task}.other"] for task in tasks), questions)
            rates["questions"] = questions
        return rates

    def report(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Per task its counts, acc and acc+ (percent) and score; totals over the tasks that are there; what is not."""
        summary = self.summary(rows)
        tasks = {}
        for task in TASKS:
            if task in summary:
                counts = {name: summary[f"{task}.{name}"] for name in _COUNTS}
                acc = _percent(counts["correct"], counts["questions"])
                acc_plus = _percent(counts["pairs_correct"], counts["images"])
                tasks[task] = {**counts, "acc": acc, "acc_plus": acc_plus, "score": summary[task]}
        totals = {name: sum(tasks[t]["score"] for t in members if t in tasks) for name, members in TOTALS.items()}
        counts = {name: sum(task[name] for task in tasks.values()) for name in ("questions", "correct", "other")}
        return {"tasks": tasks, **totals, **counts, "missing_tasks": [task for task in TASKS if task not in tasks]}


class _Asked(Record):
    """A question of LLaVA's or RITUAL's file."""

    image: Identity | None = None
    question_id: Identity | None = None
    text: str
    category: str | None = None
    label: str | None = None


def _image_of(line: _Asked, record: Mapping[str, Any], where: str) -> Identity:
    if line.question_id is None:
        raise FileFormatError(f"{where}: field 'image' is missing; found {', '.join(map(str, record)) or 'no field'}.")
    return line.question_id


# In `meta` of an answer: the id that both questions about its image share, and which of the two it is, from 0.
_SHARED, _ORDER = "shared_id", "order"
_FORMS = (Own, Llava, Damro, TextOnly)
# What scripts append to MME's questions or leave out of them.
_INSTRUCTIONS = ("Answer the question using a single word or phrase.", "Please answer yes or no.")


def _numbered(answers: Sequence[Answer]) -> list[Answer]:
    """Answers whose id names an image ("existence/000001.jpg") with an id each, in the order of the file."""
    seen: Counter[str] = Counter()
    found = []
    for answer in answers:
        shared = str(answer.question_id)
        task, *parts = shared.split("/")
        # This project's own ids name the question of an image at their end.
        own = len(parts) > 1 and (parts[-1].isdecimal() or parts[-1] in ("yes", "no"))
        if task not in TASKS or not parts or own:
            found.append(answer)
            continue
        seen[shared] += 1
        meta = {"task": task, **answer.meta, _SHARED: shared, _ORDER: seen[shared] - 1}
        found.append(replace(answer, question_id=f"{shared}/{seen[shared]}", image=answer.image or shared, meta=meta))
    return found


def _place(task: Any, image: str | None) -> tuple[str, str]:
    """Task and bare name of an image, whatever folder and suffix a file gives it."""
    name = str(image).replace("\\", "/").rsplit("/", 1)[-1]
    return str(task), name.rsplit(".", 1)[0]


def _bare(text: str) -> str:
    """A question without instructions and with single blanks."""
    for instruction in _INSTRUCTIONS:
        text = text.replace(instruction, " ")
    return " ".join(text.split()).casefold()


def _with_question(answer: Answer, places: Mapping[tuple[str, str], list[Question]], where: str) -> Answer:
    """The answer with the id of its question. Raises EvalError where its image or its text is not asked about."""
    shared = answer.meta[_SHARED]
    asked = places.get(_place(shared.split("/", 1)[0], shared), [])
    if answer.text:
        found = [question for question in asked if _bare(question.text) == _bare(answer.text)]
    else:
        found = asked[answer.meta[_ORDER] : answer.meta[_ORDER] + 1]
    if not found:
        known = " or ".join(shown(question.text) for question in asked) or "nothing"
        raise EvalError(
            f"{where}: {shared} was asked {shown(answer.text)}, and the questions ask {known} about it; give the questions "
            "that were asked."
        )
    meta = {name: value for name, value in answer.meta.items() if name not in (_SHARED, _ORDER)}
    return replace(answer, question_id=found[0].id, image=found[0].image, meta=meta)


def _percent(part: Any, whole: Any) -> Any:
    return ratio(100 * part, whole)


@dataclass(frozen=True)
class _Line:
    task: str
    where: str
    fields: tuple[str, ...]

    @property
    def image(self) -> str:
        return self.fields[0]


def _task_lines(folder: Path, widths: tuple[int, ...]) -> list[_Line]:
    """The lines of the task files in a folder, in the order of the tasks. Files that name no task are left alone."""
    files = [(task, Path(folder) / f"{task}.txt") for task in TASKS]
    files = [(task, path) for task, path in files if path.is_file()]
    if not files:
        raise MissingFileError(f"{folder} has no task file; expected some of {', '.join(f'{t}.txt' for t in TASKS)}.")
    lines = []
    for task, path in files:
        for number, text in enumerate(read_text(path).split("\n"), 1):
            text = text.removesuffix("\r")
            if not text.strip():
                continue
            fields = tuple(text.split("\t"))
            where = f"{path}, line {number}"
            if len(fields) not in widths:
                names = ("image", "question", "gold", "answer")[: max(widths)]
                raise FileFormatError(
                    f"{where}: {len(fields)} fields; expected {' or '.join(map(str, widths))} separated by tabs "
                    f"({', '.join(names)}; no tab or line break inside an answer)."
                )
            lines.append(_Line(task, where, fields))
    return lines


def _question_of(line: _Line, position: int) -> Question:
    """The question of a line. The answer keeps its blanks: the official rule reads the first four characters as they
    are.
    """
    image, text, gold = line.fields[:3]
    identity = f"{line.task}/{image}/{position}"
    return Question(
        identity, text, f"{line.task}/{image}", _label(gold, line.where), f"{line.task}/{image}", {"task": line.task}
    )


def _task(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in TASKS:
        raise FileFormatError(f"{where}: MME has no task {shown(name)}; expected one of {', '.join(TASKS)}.")
    return name


def _label(label: Any, where: str) -> str:
    word = label.strip().lower() if isinstance(label, str) else label
    if word not in ("yes", "no"):
        remedy = "; give --questions FILE" if label is None else ""
        raise EvalError(f"{where}: the gold answer must be Yes or No, found {shown(label)}{remedy}.")
    return word
