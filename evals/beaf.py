"""BEAF: the same questions about an image and about the image with an object taken out. (Ye-Bin et al., ECCV 2024; arXiv
2407.13442)

Over the pairs whose object was taken out (gold answer of the edited image: no), by the answers before and after:

    TU   true understanding: both right              IG   ignorance: both wrong
    SB+  stubborn: yes both times                    SB-  stubborn: no both times
    ID   indecision: pairs about other objects whose answer turned from right to wrong or back, of all such pairs
    F1   harmonic mean of TU and 100 - ID

and accuracy, precision, recall and F1 over all questions, yes being positive. An answer with neither yes nor no is
unparsed: wrong, and in none of the four groups. (The authors' script would score the answer before it a second time.)
"""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lvlm_decode.errors import EvalError
from lvlm_decode.reading import Identity, Record, checked, read_records

from . import parsers
from .base import Answer, Column, Evaluator, Question, Row, confusion, need, ratio, share

# Correctness and verdict before and after -> group.
_GROUPS = {("tp", "tn"): "tu", ("fn", "fp"): "ig", ("tp", "fp"): "sb_plus", ("fn", "tn"): "sb_minus"}
_PAIRS = ("removals", "others", "turned", *(f"{name}_pairs" for name in _GROUPS.values()))
# The quality of the shipped scenes: an edited one must not be told by its compression.
_QUALITY = 70
_WITHOUT = "-without-"
# Edits a scene gets, of objects that are there, and how many scenes: every edit is rendered to know what it shows.
_EDITS = 2
_SCENES = 150


@dataclass(frozen=True)
class BEAF(Evaluator):
    """BEAF scores.

    Args:
        rule: Rule that reads yes or no, a name of `parsers.RULES`; "repope" is the authors'.
    """

    rule: str = "repope"

    name: ClassVar[str] = "beaf"
    paper: ClassVar[str] = "BEAF (arXiv 2407.13442)"
    max_new_tokens: ClassVar[int] = 16
    axes: ClassVar[tuple[str, str]] = ("id", "tu")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("tu", "TU", better=+1, paired=True, of=("removals",)),
        Column("ig", "IG", better=-1, paired=True, of=("removals",)),
        Column("sb_plus", "SB+", better=-1, paired=True, of=("removals",)),
        Column("sb_minus", "SB-", better=-1, paired=True, of=("removals",)),
        Column("id", "ID", better=-1, paired=True, of=("others",)),
        Column("f1_tu_id", "F1 of TU, ID", better=+1, paired=True),
        Column("accuracy", "Accuracy", better=+1, paired=True),
        Column("precision", "Precision", better=+1),
        Column("recall", "Recall", better=+1),
        Column("f1", "F1", better=+1, paired=True),
        Column("unparsed", "Unparsed", better=-1),
        Column("removals", "Removals", "count"),
        Column("n", "n", "count"),
    )

    def __post_init__(self) -> None:
        parsers.rule(self.rule)

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        """Each scene, and again without one of its categories: what is there, and an expected object that is not."""
        from lvlm_decode_data import render
        from lvlm_decode_data.texts import CoOccurrence, with_article

        prior = CoOccurrence(scenes)
        questions: list[Question] = []
        for scene in scenes[:_SCENES]:
            asked = [*sorted(scene.categories), prior.expected(scene)[0]]
            removed = sorted(scene.categories)[:_EDITS]
            versions = [(str(scene.image_id), True, scene.categories, removed)]
            for name in removed:
                edited = render(scene.image_id, without=(name,))[1]
                versions.append((f"{scene.image_id}{_WITHOUT}{name}", False, edited.categories, removed))
            for image, original, present, gone in versions:
                for name in asked:
                    identity = f"{image}/{name}"
                    meta = {"orig_img": original, "removed_q": name in gone}
                    label = "yes" if name in present else "no"
                    text = f"Is there {with_article(name)} in the image?"
                    questions.append(Question(identity, text, image, label, str(scene.image_id), meta))
        return {"all": questions}

    def scene_images(self, scenes: Sequence) -> Any:
        return EditedScenes(super().scene_images(scenes))

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """The authors' beaf_qna.json: an array of id, image, question, orig_img, removed_q, gt; either version."""
        return {"all": [_question_of(record, where) for where, record in read_records(path)]}

    def read_answers(self, path: Path) -> list[Answer]:
        """JSON lines of answers, or the authors' array of `id` and `answer` (give --questions FILE)."""
        records = read_records(path)
        if "id" not in records[0][1]:
            return super().read_answers(path)
        said = [checked(_Said, record, where) for where, record in records]
        return [Answer(line.id, line.answer, line.question, line.image, line.gt) for line in said]

    def row(self, answer: Answer) -> Row:
        label = str(answer.label).lower()
        where = f"question {answer.question_id}"
        if label not in ("yes", "no"):
            raise EvalError(
                f"{where}: the gold answer must be yes or no, found {answer.label!r}; give --questions FILE."
            )
        original, removed = (bool(need(answer.meta, name, where)) for name in ("orig_img", "removed_q"))
        return parsers.row_of(answer, label, self.rule, original=original, removed=removed)

    def clustered(self, rows: Sequence[Row]) -> tuple[str, str]:
        return "original image", "original images"

    def doubts(self, rows: Sequence[Row]) -> list[str]:
        """Answers about edited images that belong to no pair, and figures that no pair is there for."""
        before = {(row.cluster, row.evidence["text"]) for row in rows if row.evidence["original"]}
        edited = [row for row in rows if not row.evidence["original"]]
        alone = sum((row.cluster, row.evidence["text"]) not in before for row in edited)
        found = []
        if alone:
            found.append(
                f"{alone} of {len(edited)} answers about edited images are in no pair: the same question about the original "
                "image has no answer here."
            )
        summary = self.summary(rows)
        if lacking := [column.title for column in self.columns if column.key not in summary]:
            found.append(f"{', '.join(lacking)} cannot be told: they are of pairs that are not here.")
        return found

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        before = {row.evidence["text"]: row for row in rows if row.evidence["original"]}
        total: Counter[str] = Counter(dict.fromkeys(_PAIRS, 0))
        for row in rows:
            first = before.get(row.evidence["text"])
            if row.evidence["original"] or first is None:
                continue
            if not row.evidence["removed"]:
                total["others"] += 1
                total["turned"] += first.correct != row.correct
            # The object of the question may be gone in another edit of this image only; such pairs are in no group.
            elif row.label == "no" and first.label == "yes":
                total["removals"] += 1
                if group := _GROUPS.get((_kind(first), _kind(row))):
                    total[f"{group}_pairs"] += 1
        return {
            "n": len(rows),
            "correct": sum(bool(row.correct) for row in rows),
            "unclear": sum(not row.clear for row in rows),
            **confusion(rows),
            **total,
        }

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        tp, fp, fn = totals["tp"], totals["fp"], totals["fn"]
        pairs: dict[str, Any] = {}
        for name in _GROUPS.values():
            pairs |= share(name, totals[f"{name}_pairs"], totals["removals"])
        pairs |= share("id", totals["turned"], totals["others"])
        if "tu" in pairs and "id" in pairs:
            steady = 1 - pairs["id"]
            pairs["f1_tu_id"] = ratio(2 * pairs["tu"] * steady, pairs["tu"] + steady)
        return {
            **pairs,
            "accuracy": ratio(totals["correct"], totals["n"]),
            "precision": ratio(tp, tp + fp),
            "recall": ratio(tp, tp + fn),
            "f1": ratio(2 * tp, 2 * tp + fp + fn),
            "unparsed": ratio(totals["unclear"], totals["n"]),
        }


def _kind(row: Row) -> str:
    """tp, fp, tn, fn, or nothing for an unparsed answer."""
    return next((name for name, count in confusion([row]).items() if count), "")


class _Asked(Record):
    """A question of beaf_qna.json."""

    id: Identity
    image: str
    question: str
    orig_img: bool
    removed_q: bool
    gt: Literal["yes", "no"]


class _Said(Record):
    """An answer as the authors' files have it."""

    id: Identity
    answer: str
    question: str = ""
    image: str | None = None
    gt: str | None = None


def _question_of(record: Mapping[str, Any], where: str) -> Question:
    found = checked(_Asked, record, where)
    flags = {"orig_img": found.orig_img, "removed_q": found.removed_q}
    # COCO_val2014_000000000042_01.png is an edit of COCO_val2014_000000000042.jpg.
    original = found.image if found.orig_img else f"{found.image[:-7]}.jpg"
    return Question(found.id, found.question, found.image, found.gt, original, flags)


@dataclass(frozen=True)
class EditedScenes:
    """The scenes' own images, and scenes rendered again without a category."""

    scenes: Any
    describe: str = "emoji scenes, also without an object"

    def open(self, name: str) -> Any:
        seed, edited, category = name.partition(_WITHOUT)
        return _render(int(seed), category) if edited else self.scenes.open(name)


@functools.lru_cache(maxsize=64)
def _render(seed: int, category: str) -> Any:
    from PIL import Image

    from lvlm_decode_data import render

    file = io.BytesIO()
    render(seed, without=(category,))[0].save(file, "JPEG", quality=_QUALITY, optimize=True)
    file.seek(0)
    return Image.open(file).convert("RGB")
