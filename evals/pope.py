"""POPE: is there a ... in the image? (Li et al., EMNLP 2023; arXiv 2305.10355)

Three ways to choose the absent objects: at random, the most frequent ones (popular), the ones that co-occur most with
what is there (adversarial). The builder follows the authors' code; see `build_questions`. Counts and rates depend on
the rule that reads yes or no out of an answer (`parsers.RULES`), so the rule is an option and printed with every score.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import TypeAdapter

from lvlm_decode.errors import EvalError, FileFormatError, UnknownNameError
from lvlm_decode.reading import Identity, Record, checked, read_records, shown

from . import parsers
from .base import Answer, Column, Evaluator, Question, Row, confusion, ratio
from .forms import Damro, Llava, Own, Pai, PopesOwn, answers_of, in_order
from .repope import DROPPED, corrected_labels, doubts, remarks, split_of

STRATEGIES = ("random", "popular", "adversarial")
TEMPLATE = "Is there a {} in the image?"


def object_frequency(images: Sequence[tuple[Any, Sequence[str]]]) -> dict[str, int]:
    """object -> number of images it is in, in first-seen order (which decides ties later)."""
    frequency: dict[str, int] = {}
    for _, objects in images:
        for name in dict.fromkeys(objects):
            frequency[name] = frequency.get(name, 0) + 1
    return frequency


def object_cooccurrence(images: Sequence[tuple[Any, Sequence[str]]]) -> dict[str, list[str]]:
    """object -> the objects it shares images with, most often first; ties in first-seen order."""
    together: dict[str, dict[str, int]] = {}
    for _, objects in images:
        for name in dict.fromkeys(objects):
            others = together.setdefault(name, {})
            for other in dict.fromkeys(objects):
                if other != name:
                    others[other] = others.get(other, 0) + 1
    return {name: _most_first(others) for name, others in together.items()}


def _most_first(counts: Mapping[str, int]) -> list[str]:
    return sorted(counts, key=counts.__getitem__, reverse=True)


def question_text(name: str, template: str = TEMPLATE, imange: bool = False) -> str:
    """The question about one object. `imange=True` keeps a slip of the released files: before a vowel every letter "a"
    of the template becomes "an", so the image is an "imange" (57 questions of VCD's adversarial file, for one).
    """
    if name[0] not in "aeiou":
        return template.format(name)
    return (template.replace("a", "an") if imange else template.replace(" a {}", " an {}")).format(name)


def build_questions(
    images: Sequence[tuple[Any, Sequence[str]]],
    strategy: str,
    *,
    number: int = 3,
    sample: int | None = None,
    seed: int = 0,
    template: str = TEMPLATE,
    imange: bool = False,
) -> list[Question]:
    """POPE questions from (image, objects in annotation order) pairs, by the authors' algorithm.

    Images with fewer than `number` distinct objects are left out; `sample` draws that many of the others. Frequencies
    and co-occurrences are counted over the images used, once per image. Each image gives `number` rounds: first the
    next object of its list (yes), then an object it does not have and was not asked about yet (no): a uniform draw
    (random), the most frequent (popular), or the one most often seen with the object of this round (adversarial; a
    uniform draw where none is left). Ties are decided by first appearance. Ids count from 1.

    Raises UnknownNameError for an unknown strategy, EvalError when no image has enough objects or an image has them
    all.
    """
    if strategy not in STRATEGIES:
        raise UnknownNameError.of("POPE strategy", strategy, STRATEGIES)
    rng = random.Random(f"pope {strategy} {seed}")
    usable = [(image, list(dict.fromkeys(objects))) for image, objects in images]
    usable = [(image, objects) for image, objects in usable if len(objects) >= number]
    if sample is not None and sample < len(usable):
        usable = random.Random(f"pope images {seed}").sample(usable, sample)
    if not usable:
        raise EvalError(f"No image has {number} different objects; POPE needs at least one that does.")
    frequency = object_frequency(usable)
    popular = _most_first(frequency)
    together = object_cooccurrence(usable)

    questions: list[Question] = []
    for image, objects in usable:
        used = set(objects)
        for positive in objects[:number]:
            absent = [name for name in frequency if name not in used]
            if not absent:
                raise EvalError(f"Image {image} leaves no absent object to ask about; give more varied images.")
            ordered = {"random": [], "popular": popular, "adversarial": together[positive]}[strategy]
            negative = next((name for name in ordered if name not in used), None)
            if negative is None:
                negative = rng.choice(absent)
            used.add(negative)
            for name, label in ((positive, "yes"), (negative, "no")):
                text = question_text(name, template, imange)
                questions.append(
                    Question(len(questions) + 1, text, str(image), label, meta={"object": name, "strategy": strategy})
                )
    return questions


class _Asked(Record):
    """A line of a question file; see `questions_of` for the forms."""

    question_id: Identity | None = None
    image: Identity | None = None
    image_source: Identity | None = None
    text: str | list[str] | None = None
    question: str | None = None
    label: str | int | list[str | int] | None = None
    answer: str | None = None
    category: str | None = None


def questions_of(records: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Question]:
    """POPE questions from (where, JSON object) pairs, in any of the released forms.

    POPE and VCD: `question_id, image, text, label`. Hub (lmms-lab/POPE): `question_id, question, answer, image_source`,
    where `answer` is the label. Chat form (PAI): lists `text` and `label` of one image; ids are counted from 1.
    """
    questions: list[Question] = []
    for where, record in records:
        line = checked(_Asked, record, where)
        image = str(line.image_source or _given(line.image, "image", record, where))
        if "image_source" in record and "." not in image:
            image += ".jpg"
        texts = line.text if line.text is not None else _given(line.question, "text", record, where)
        labels = line.label if line.label is not None else _given(line.answer, "label", record, where)
        meta = {} if line.category is None else {"category": line.category}
        if isinstance(texts, list):
            if not isinstance(labels, list) or len(labels) != len(texts):
                raise FileFormatError(f"{where}: 'text' has {len(texts)} entries and 'label' must have as many.")
            asked = [(len(questions) + 1 + i, text, label) for i, (text, label) in enumerate(zip(texts, labels))]
        else:
            asked = [(_given(line.question_id, "question_id", record, where), texts, labels)]
        for identity, text, label in asked:
            questions.append(Question(identity, text, image, _label(label, where), meta=meta))
    return questions


def _given(value: Any, name: str, record: Mapping[str, Any], where: str) -> Any:
    if value is None:
        raise FileFormatError(f"{where}: field {name!r} is missing; found {', '.join(map(str, record)) or 'no field'}.")
    return value


def _label(label: Any, where: str) -> str:
    word = label.strip().lower() if isinstance(label, str) else label
    if word not in ("yes", "no"):
        raise FileFormatError(f"{where}: label must be yes or no, found {shown(label)}.")
    return word


class _RepopeAnswer(Record):
    """An answer in RePOPE's own file, {split: {id: this}}."""

    question_id: Identity | None = None
    label: str
    response: str | None
    text: str = ""


_Repope = TypeAdapter(dict[str, dict[str, _RepopeAnswer]])
_FORMS = (Own, Llava, Damro, PopesOwn, Pai)


def _is_repope(record: Mapping[str, Any]) -> bool:
    first = next(iter(record.values()), None)
    answer = next(iter(first.values()), None) if isinstance(first, Mapping) else None
    return isinstance(answer, Mapping) and "response" in answer


@dataclass(frozen=True)
class Pope(Evaluator):
    """POPE scores.

    accuracy counts an unparsed answer as wrong; precision and recall leave it out, as lmms-eval does (with the rules
    that always give a verdict there is none). Under `icd` unparsed answers leave the accuracy too but stay in the
    yes-ratio, as in that script; under `repope` they leave every rate. unparsed is the share whose verdict is a default
    or missing. All rates are 0 where undefined.

    Where RePOPE's files are in the data folder and belong to the questions, the same answers are also scored by its
    labels (`repope.py`): columns of that name. Answers to RePOPE's own questions have these columns alone.

    Args:
        rule: Rule that reads yes or no, a name of `parsers.RULES`.
    """

    rule: str = "pope-official"

    name: ClassVar[str] = "pope"
    paper: ClassVar[str] = "POPE (arXiv 2305.10355)"
    max_new_tokens: ClassVar[int] = 16
    axes: ClassVar[tuple[str, str]] = ("yes_ratio", "accuracy")
    more_axes: ClassVar[tuple[tuple[str, str], ...]] = (("repope_yes_ratio", "repope_accuracy"),)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("accuracy", "Accuracy", better=+1, paired=True),
        Column("precision", "Precision", better=+1),
        Column("recall", "Recall", better=+1),
        Column("f1", "F1", better=+1, paired=True, of=("tp", "fp", "fn")),
        Column("yes_ratio", "Yes-ratio"),
        Column("unparsed", "Unparsed", better=-1),
        Column("n", "n", "count"),
        Column("repope_accuracy", "RePOPE accuracy", better=+1, paired=True, of=("repope_n",)),
        Column("repope_precision", "RePOPE precision", better=+1),
        Column("repope_recall", "RePOPE recall", better=+1),
        Column("repope_f1", "RePOPE F1", better=+1, paired=True, of=("repope_tp", "repope_fp", "repope_fn")),
        Column("repope_f1_change", "RePOPE F1 - F1"),
        Column("repope_yes_ratio", "RePOPE yes-ratio"),
        Column("repope_labels_yes", "RePOPE labels yes"),
        Column("repope_n", "RePOPE n", "count"),
    )

    def __post_init__(self) -> None:
        parsers.rule(self.rule)

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        images = [(scene.image_id, [item.category for item in scene.objects]) for scene in scenes]
        return {strategy: build_questions(images, strategy, seed=seed) for strategy in STRATEGIES}

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        from .loaders import pope_files

        return pope_files(path)

    def read_answers(self, path: Path) -> list[Answer]:
        """Answers as this project, LLaVA, VCD, RITUAL, DeCo, DAMRO, PAI, VISTA or RePOPE write them; POPE's own and PAI's
        carry no ids (`matched`). RePOPE's ids are "split/id" where a file holds several splits, which are scored apart.
        """
        records = read_records(path)
        where, first = records[0]
        if len(records) > 1 or not _is_repope(first):
            return answers_of(records, _FORMS, "POPE answers")
        splits = checked(_Repope, first, where)
        for split, answers in splits.items():
            for identity, said in answers.items():
                if said.question_id is not None and str(said.question_id) != identity:
                    raise FileFormatError(
                        f"{where}: field {split!r}, field {identity!r} is about question {said.question_id}; the two must be the "
                        "same."
                    )
        return [
            Answer(
                question_id=identity if len(splits) == 1 else f"{split}/{identity}",
                answer=said.response or "",
                text=said.text,
                label=said.label,
                meta={"category": split},
            )
            for split, answers in splits.items()
            for identity, said in answers.items()
        ]

    def listed(self, splits: Mapping[str, Sequence[Question]], answers: Sequence[Answer]) -> list[Question]:
        """Where the answers are to several splits, the ids of the questions say which as well."""
        if not any(split_of(answer.question_id)[0] for answer in answers):
            return super().listed(splits, answers)
        named = {name: next((s for s in STRATEGIES if s in name), name) for name in splits}
        return [replace(q, id=f"{named[name]}/{q.id}") for name, questions in splits.items() for q in questions]

    def matched(self, answers: Sequence[Answer], questions: Sequence[Question], where: str) -> list[Answer]:
        """Answers without ids take the id of the question in the same place; lengths and texts must agree."""
        return in_order(answers, questions, where)

    def row(self, answer: Answer) -> Row:
        if answer.label is None:
            raise FileFormatError(
                f"question {answer.question_id} has no label; put `label` into the answers, or give --questions FILE."
            )
        label = _label(answer.label, f"question {answer.question_id}")
        verdict, clear = parsers.rule(self.rule)(answer.answer, label)
        found = replace(answer, label=label)
        return Row.of(found, parsed=verdict, correct=verdict == label, rule=self.rule, clear=clear, text=answer.text)

    def rows(self, answers: Iterable[Answer]) -> list[Row]:
        """Scored answers; with RePOPE's label as evidence where its file belongs to the questions."""
        asked = [answer for answer in answers if answer.error is None]
        rows = super().rows(asked)
        found = []
        for row, second in zip(rows, corrected_labels(asked)):
            if second is not None:
                more = {"repope": second.label} | ({"repope_own": True} if second.own else {})
                more |= {"repope_problem": second.problem} if second.problem else {}
                row = replace(row, evidence={**row.evidence, **more})
            found.append(row)
        return found

    def splits(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """RePOPE's answer files hold several."""
        parts: dict[str, list[Row]] = {}
        for row in rows:
            split, _ = split_of(row.id)
            if split is None:
                return {}
            parts.setdefault(split, []).append(row)
        return {split: parts[split] for split in STRATEGIES if split in parts}

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        total = {"n": len(rows), "unclear": sum(not row.clear for row in rows)}
        if any("repope_own" in row.evidence for row in rows):
            total["repope_own"] = len(rows)
        else:
            total |= confusion(rows)
        if all("repope" in row.evidence for row in rows) and rows:
            kept = [replace(row, label=row.evidence["repope"]) for row in rows if row.evidence["repope"] != DROPPED]
            second = {"n": len(kept), "dropped": len(rows) - len(kept), **confusion(kept)}
            second["labels"] = sum(row.label == "yes" for row in kept)
            total |= {f"repope_{name}": count for name, count in second.items()}
        return total

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        # Labels of RePOPE's own questions make no POPE figure, not even of a part.
        own = "repope_own" in totals
        rates = {} if own else self._rates(totals, "")
        rates["unparsed"] = ratio(totals["unclear"], totals["n"])
        # Of a file with several splits one may have no second labels; then there is no second figure of all together.
        if "repope_n" not in totals or np.any(totals["repope_n"] + totals["repope_dropped"] != totals["n"]):
            return rates
        second = self._rates(totals, "repope_")
        return rates | {
            **{f"repope_{name}": value for name, value in second.items()},
            **({} if own else {"repope_f1_change": second["f1"] - rates["f1"]}),
            "repope_labels_yes": ratio(totals["repope_labels"], totals["repope_n"]),
        }

    def _rates(self, totals: Mapping[str, Any], labels: str) -> dict[str, Any]:
        n, tp, fp, tn, fn = (totals[f"{labels}{name}"] for name in ("n", "tp", "fp", "tn", "fn"))
        read = tp + fp + tn + fn
        return {
            "accuracy": ratio(tp + tn, read if self.rule in ("icd", "repope") else n),
            "precision": ratio(tp, tp + fp),
            "recall": ratio(tp, tp + fn),
            "f1": ratio(2 * tp, 2 * tp + fp + fn),
            "yes_ratio": ratio(tp + fp, read if self.rule == "repope" else n),
        }

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        return remarks(rows)

    def doubts(self, rows: Sequence[Row]) -> list[str]:
        """Second labels that are not as published: their figures are not RePOPE's."""
        return doubts(rows)
