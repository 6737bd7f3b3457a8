"""R-Bench: yes/no questions about relations between objects. (Wu et al., ICML 2024; arXiv 2406.16449)

Image-level questions ("Is there a person riding a horse?"), scored like POPE on five balanced subsets; the printed
figure is the mean of the five. The subsets come as lists of ids beside the question file; without them all questions
are one set, which the authors call Image(All) and do not compare with the mean. Precision, recall and F1 have 0.00001
in their denominators, as in the authors' script.

Instance-level questions are about two objects in boxes ("the person in red bounding box"): the boxes are drawn on the
image, the subject's red and the object's green, 4 pixels wide, and the question names them, as in the authors' code. Their
other form, coloured masks instead of boxes, is not drawn here. Answers are scored as at image level.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from lvlm_decode.errors import EvalError, FileFormatError, MissingFileError
from lvlm_decode.reading import Identity, Record, checked, read_json, read_records

from . import parsers
from .base import Answer, Column, Evaluator, Question, Row, confusion, ratio
from .joins import same_text

_TINY = 1e-5
SUBSETS = (1, 2, 3, 4, 5)
# Instance level: of the subject's and the object's box, its width in pixels, how the question calls it, and the fields that
# tell such a record.
_COLOURS = ("red", "green")
_WIDTH = 4
_IN_BOX = "bounding box"
_MARKS = {"subject", "object", "sub_box", "obj_box"}
_COUNTS = ("tp", "fp", "tn", "fn", "n", "yes")
_OPPOSITE = {"to the left of": "to the right of", "above": "below"}
_OPPOSITE |= {other: word for word, other in _OPPOSITE.items()}


@dataclass(frozen=True)
class RBench(Evaluator):
    """R-Bench scores.

    Args:
        rule: Rule that reads yes or no, a name of `parsers.RULES`; the authors' is POPE's.
    """

    rule: str = "pope-official"

    name: ClassVar[str] = "r-bench"
    paper: ClassVar[str] = "R-Bench (arXiv 2406.16449)"
    max_new_tokens: ClassVar[int] = 16
    axes: ClassVar[tuple[str, str]] = ("yes_ratio", "accuracy")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("accuracy", "Accuracy", better=+1, paired=True),
        Column("precision", "Precision", better=+1),
        Column("recall", "Recall", better=+1),
        Column("f1", "F1", better=+1, paired=True),
        Column("yes_ratio", "Yes-ratio"),
        Column("unparsed", "Unparsed", better=-1),
        Column("subsets", "Subsets", "count"),
        Column("n", "n", "count"),
    )

    def __post_init__(self) -> None:
        parsers.rule(self.rule)

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        """A relation between two objects that are each the only one of their kind, and its opposite; split "box" asks the
        same about the two in boxes.
        """
        from lvlm_decode_data.scenes import SIZE
        from lvlm_decode_data.texts import relations

        splits: dict[str, list[Question]] = {"all": [], "box": []}
        for scene in scenes:
            for first, word, second in relations(scene, sorted(scene.categories))[:1]:
                corners = [[n / SIZE for n in (x, y, x + w, y + h)] for x, y, w, h in _boxes(scene, first, second)]
                for asked, label in ((word, "yes"), (_OPPOSITE[word], "no")):
                    text = f"Is the {first} {asked} the {second} in the image?"
                    question = Question(f"{scene.image_id}/{label}", text, str(scene.image_id), label)
                    splits["all"].append(question)
                    splits["box"].append(_marked(question, first, second, *corners))
        return splits

    def shown(self, question: Question, image: Any) -> Any:
        """The image with the boxes of an instance-level question."""
        if "boxes" not in question.meta:
            return image
        from PIL import ImageDraw

        image = image.convert("RGB")
        drawing = ImageDraw.Draw(image)
        for colour, box in question.meta["boxes"].items():
            drawing.rectangle([share * side for share, side in zip(box, image.size * 2)], outline=colour, width=_WIDTH)
        return image

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """A question file (question_id, image, text, label, perhaps type); `*_ids_1.json` to `_5` lie beside it.

        With a `type` (the web data's counterfactual and illusion) every type is a split. Instance-level records have
        subject, object, sub_box and obj_box (left, top, right, bottom as shares of the image's sides) besides.
        """
        path = Path(path)
        if path.is_dir():
            found = [file for file in sorted(path.glob("*.json*")) if not re.search(r"_ids_\d", file.name)]
            if len(found) != 1:
                raise MissingFileError(f"{path} holds {len(found)} question files; give one of them.")
            path = found[0]
        records = read_records(path)
        member, unasked = _members(path, {str(record.get("question_id")) for _, record in records})
        splits: dict[str, list[Question]] = {}
        for where, record in records:
            asked = checked(_Instance if record.keys() & _MARKS else _Asked, record, where)
            meta: dict[str, Any] = {}
            if str(asked.question_id) in member:
                meta = {"subsets": member[str(asked.question_id)]} | ({"unasked": unasked} if unasked else {})
            label = "no" if "no" in asked.label.lower() else "yes"
            question = Question(asked.question_id, asked.text, asked.image, label, meta=meta)
            if isinstance(asked, _Instance):
                question = _marked(question, asked.subject, asked.object, asked.sub_box, asked.obj_box)
                if question.text.count(_IN_BOX) < len(_COLOURS):
                    raise FileFormatError(
                        f"{where}: text {asked.text!r} must name subject {asked.subject!r} and object {asked.object!r}."
                    )
            splits.setdefault(asked.type, []).append(question)
        if member and not any("subsets" in question.meta for questions in splits.values() for question in questions):
            raise FileFormatError(f"{path}: none of its ids is in the lists of ids beside it; they belong together.")
        return splits

    def read_answers(self, path: Path) -> list[Answer]:
        """JSON lines of answers, or the authors' lines of `question_id` and `text`, which is the answer (give --questions
        FILE).
        """
        records = read_records(path)
        if not all("text" in record and not record.keys() & {"answer", "prompt", "output"} for _, record in records):
            return super().read_answers(path)
        said = [checked(_Said, record, where) for where, record in records]
        return [Answer(answer.question_id, answer.text or "") for answer in said]

    def matched(self, answers: Sequence[Answer], questions: Sequence[Question], where: str) -> list[Answer]:
        """The authors' answer files repeat instance-level questions without what names the boxes."""
        marked = {str(q.id): q for q in questions if "boxes" in q.meta}
        found = []
        for answer in answers:
            question = marked.get(str(answer.question_id))
            if question is not None and same_text(answer.text, question.meta["text"]):
                answer = replace(answer, text=question.text)
            found.append(answer)
        return found

    def row(self, answer: Answer) -> Row:
        if answer.label is None:
            raise EvalError(f"question {answer.question_id} has no label; give --questions FILE.")
        label = "no" if "no" in str(answer.label).lower() else "yes"
        more = {"unasked": answer.meta["unasked"]} if "unasked" in answer.meta else {}
        return parsers.row_of(answer, label, self.rule, subsets=list(answer.meta.get("subsets") or ()), **more)

    def rows(self, answers: Any) -> list[Row]:
        """With lists of ids, answers that are in none of them are left out, as by the authors."""
        rows = super().rows(answers)
        return [row for row in rows if row.evidence["subsets"]] or rows

    def doubts(self, rows: Sequence[Row]) -> list[str]:
        """Questions that the subsets list and the question file lacks: the figures are not of the whole subsets."""
        counts: Mapping[str, Sequence[int]] = next((r.evidence["unasked"] for r in rows if "unasked" in r.evidence), {})
        said = [f"{lacking} of {listed} of subset {subset}" for subset, (lacking, listed) in counts.items()]
        return [f"The question file lacks questions that the lists of ids name: {', '.join(said)}."] if said else []

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        total: Counter[str] = Counter(answers=len(rows), unclear=sum(not row.clear for row in rows))
        for row in rows:
            # An id may stand twice in a list, and counts twice there.
            for subset in row.evidence["subsets"] or ["all"]:
                counts = confusion([row])
                total.update({f"{subset}.{name}": count for name, count in counts.items()})
                total[f"{subset}.n"] += 1
                total[f"{subset}.yes"] += row.parsed == "yes"
        return dict(total)

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        found: list[dict[str, Any]] = []
        for subset in (*SUBSETS, "all"):
            if f"{subset}.n" not in totals:
                continue
            tp, fp, tn, fn, n, yes = (totals[f"{subset}.{name}"] for name in _COUNTS)
            precision, recall = tp / (tp + fp + _TINY), tp / (tp + fn + _TINY)
            found.append(
                {
                    "accuracy": ratio(tp + tn, n),
                    "precision": precision,
                    "recall": recall,
                    "f1": 2 * precision * recall / (precision + recall + _TINY),
                    "yes_ratio": ratio(yes, n),
                }
            )
        means = {name: sum(rates[name] for rates in found) / len(found) for name in found[0]} if found else {}
        return means | {"unparsed": ratio(totals["unclear"], totals["answers"])}

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The five subsets' mean, on how many answers, and of how many subsets (0: all questions are one set)."""
        named = {subset for row in rows for subset in row.evidence["subsets"]}
        return super().summary(rows) | {"subsets": len(named), "n": len(rows)}


class _Asked(Record):
    """A question; the web data's have a type."""

    question_id: Identity
    image: str
    text: str
    label: str
    type: str = "all"


class _Said(Record):
    """An answer as the authors' files have it."""

    question_id: Identity
    text: str | None


# Left, top, right, bottom as shares of the image's sides.
_Box = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=4, max_length=4)]


class _Instance(_Asked):
    """A question about two objects in boxes."""

    subject: str = Field(min_length=1)
    object: str = Field(min_length=1)
    sub_box: _Box
    obj_box: _Box


def _marked(question: Question, first: str, second: str, *boxes: Sequence[float]) -> Question:
    """The question about `first` in the red box and `second` in the green one. The words are put in as by the authors: after
    every place where the text has the name, the second's after the first's.
    """
    text = question.text
    for name, colour in zip((first, second), _COLOURS):
        text = text.replace(name.lower(), f"{name.lower()} in {colour} {_IN_BOX}")
    meta = {**question.meta, "boxes": dict(zip(_COLOURS, map(list, boxes))), "text": question.text}
    return replace(question, text=text, meta=meta)


def _boxes(scene: Any, *names: str) -> list[tuple[int, int, int, int]]:
    return [scene.of(name)[0].box for name in names]


def _members(path: Path, asked: Collection[str]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """id -> the subsets it is in, from the lists beside a question file; empty where there is none. And subset -> (number of
    its ids that are no question of the file, number of its ids), for subsets that lack some.

    A list belongs to the question file by the first word of its name ("image-level_ids_1.json"). asked: ids of the
    questions. Raises MissingFileError where a subset has no list or no question: the mean is over five.
    """
    kind = re.split(r"[_.]", path.name)[0]
    member: dict[str, list[int]] = {}
    unasked: dict[str, list[int]] = {}
    empty = []
    for number in SUBSETS:
        files = sorted(path.parent.glob(f"{kind}_ids_{number}.json*"))
        if not files:
            continue
        listed = read_json(files[0])
        if not isinstance(listed, list):
            raise FileFormatError(f"{files[0]}: expected one array of question ids.")
        for identity in listed:
            member.setdefault(str(identity), []).append(number)
        ids = set(map(str, listed))
        lacking = len(ids - set(asked))
        if lacking == len(ids):
            empty.append(files[0].name)
        elif lacking:
            unasked[str(number)] = [lacking, len(ids)]
    numbers = {number for found in member.values() for number in found}
    if member and numbers != set(SUBSETS):
        raise MissingFileError(
            f"{path.parent} lacks {', '.join(f'{kind}_ids_{n}.json' for n in SUBSETS if n not in numbers)}; the mean is "
            "over five subsets."
        )
    # Where none is there the lists belong to another file, which is said elsewhere.
    if 0 < len(empty) < len(SUBSETS):
        raise MissingFileError(
            f"{path} has no question of {', '.join(empty)}; the mean is over five subsets, so give the whole question file, or "
            "take the lists away."
        )
    return member, unasked
