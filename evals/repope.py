"""RePOPE: POPE's questions on COCO with labels looked at again. (Neuhaus and Hein, 2025; arXiv 2504.15707)

Of POPE's 1,500 "yes" labels 139 are wrong and 207 cannot be decided, so the corrected files keep 2,774, 2,727 and 2,684
of the 3,000 questions (random, popular, adversarial). A run that answered POPE is scored under both labels without
asking anything again. The files are fetched from their authors (`lvlm-decode data get repope`), never shipped.

There is no RePOPE for A-OKVQA, GQA, or the random file with 2,910 questions; that one has the ids and the name of the
other, so a file belongs to a run only if every question they share by id is about the same image and asks the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lvlm_decode.errors import EvalError
from lvlm_decode.reading import read_records

from .base import Answer
from .joins import same_image, same_text

SPLITS = ("random", "popular", "adversarial")
DROPPED = "dropped"
_IMAGES = "COCO_val2014_"


@dataclass(frozen=True)
class Kept:
    """A question that RePOPE keeps, with its label there."""

    image: str
    text: str
    label: str


@dataclass(frozen=True)
class Labels:
    """One file of corrected labels. kept: id -> question. pinned: whether it is the file its authors published."""

    split: str
    kept: Mapping[str, Kept]
    pinned: bool


def at_hand() -> list[Labels]:
    """The corrected files that are in the data folder, in the order of `SPLITS`."""
    from .download import check, data_folder
    from .upstream import sources

    found = []
    for source in sources("repope"):
        place = Path(data_folder()) / source.dataset / source.name
        packed = place.with_name(f"{place.name}.gz")
        there = place if place.is_file() else packed if packed.is_file() else None
        if there is not None:
            stamp = there.stat().st_mtime_ns
            pinned = check(source, data_folder()).state == "ok"
            found.append(_read(str(there), stamp, source.name.removesuffix(".json").rsplit("_", 1)[-1], pinned))
    return found


@functools.lru_cache(maxsize=8)
def _read(path: str, stamp: int, split: str, pinned: bool) -> Labels:
    from .pope import questions_of

    questions = questions_of(read_records(Path(path)))
    return Labels(split, {str(q.id): Kept(str(q.image), q.text, str(q.label)) for q in questions}, pinned)


def belongs(labels: Labels, answers: Sequence[Answer]) -> bool:
    """Whether the answers are to the questions of this file: all that share an id agree in image and text."""
    shared = [(answer, labels.kept[name]) for answer in answers if (name := str(answer.question_id)) in labels.kept]
    return bool(shared) and all(
        answer.text and same_image(answer.image, kept.image) and same_text(answer.text, kept.text)
        for answer, kept in shared
    )


def corrected_labels(answers: Sequence[Answer]) -> list[str | None]:
    """Each answer's corrected label, `DROPPED` for questions that RePOPE leaves out, None where no file at hand belongs.

    Answers to several splits (see `split_of`) are taken split by split. Raises EvalError as `relabel` does.
    """
    labels: list[str | None] = [None] * len(answers)
    parts: dict[str | None, list[int]] = {}
    for place, answer in enumerate(answers):
        parts.setdefault(split_of(answer.question_id)[0], []).append(place)
    for split, places in parts.items():
        part = [replace(answers[i], question_id=split_of(answers[i].question_id)[1]) for i in places]
        for place, label in zip(places, relabel(part, split) or ()):
            labels[place] = label
    return labels


def split_of(identity: str | int) -> tuple[str | None, str]:
    """(split, id) of the "split/id" of a file with several splits; the split is None elsewhere."""
    split, slash, name = str(identity).partition("/")
    return (split, name) if slash and split in SPLITS else (None, str(identity))


def relabel(answers: Sequence[Answer], split: str | None = None) -> list[str] | None:
    """The corrected labels of answers to one split, which is tried alone where it is known.

    None where no file at hand belongs to them, or where they were asked with RePOPE's own file and carry its labels.
    Raises EvalError for answers to exactly RePOPE's questions that carry POPE's labels: that is no POPE score.
    """
    tried = [found for found in at_hand() if split in (None, found.split)]
    labels = next((found for found in tried if belongs(found, answers)), None)
    if labels is None:
        return None
    corrected = [
        labels.kept[name].label if (name := str(answer.question_id)) in labels.kept else DROPPED for answer in answers
    ]
    if {str(answer.question_id) for answer in answers} == labels.kept.keys():
        if any(str(answer.label).strip().lower() != label for answer, label in zip(answers, corrected)):
            raise EvalError(
                f"The {len(answers)} answers are to the questions that RePOPE keeps and to no other, so they have no POPE "
                f"score; give --questions coco_repope_{labels.split}.json."
            )
        return None
    return corrected


def remark(clusters: Sequence[str], asked: int, relabelled: int | None, changed: int) -> list[str]:
    """What a table says about the second labels. relabelled: answers that have one; None where there are none."""
    if relabelled is not None:
        note = (
            f"RePOPE: the same answers under its corrected labels; it keeps {relabelled} of these {asked} questions and "
            f"changes {changed} labels, and its difference is RePOPE minus POPE."
        )
        unpinned = [labels.split for labels in at_hand() if not labels.pinned]
        return [note] + ([f"RePOPE's {', '.join(unpinned)} file is not as published."] if unpinned else [])
    if not any(str(cluster).rsplit("/", 1)[-1].startswith(_IMAGES) for cluster in clusters):
        return []
    if not at_hand():
        return [
            "RePOPE's corrected labels are not here; lvlm-decode data get repope fetches them or says where to put."
        ]
    return ["RePOPE has no corrected labels for these questions."]
