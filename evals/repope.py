"""RePOPE: POPE's questions on COCO with labels looked at again. (Neuhaus and Hein, 2025; arXiv 2504.15707)

Of POPE's 1,500 "yes" labels 139 are wrong and 207 cannot be decided, so the corrected files keep 2,774, 2,727 and 2,684
of the 3,000 questions (random, popular, adversarial). A run that answered POPE is scored under both labels without
asking anything again. The files are fetched from their authors (`lvlm-decode data get repope`), never shipped.

A run that asked only RePOPE's own questions has no POPE score: its labels are RePOPE's, or it is refused.

There is no RePOPE for A-OKVQA, GQA, or the random file with 2,910 questions; that one has the ids and the name of the
other, so a file belongs to a run only if every question they share by id is about the same image and asks the same.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lvlm_decode.errors import EvalError, FileFormatError
from lvlm_decode.reading import read_records

from .base import Answer, Row
from .joins import same_image, same_text

SPLITS = ("random", "popular", "adversarial")
DROPPED = "dropped"
# What the questions of RePOPE's published files say in `meta["labels"]`.
REPOPE = "RePOPE"
# Answers that leave out what RePOPE drops by a smaller chance than this are answers to its own file.
_BY_CHANCE = 1e-3
_IMAGES = "COCO_val2014_"


@dataclass(frozen=True)
class Kept:
    """A question that RePOPE keeps, with its label there."""

    image: str
    text: str
    label: str


@dataclass(frozen=True)
class Labels:
    """One file of corrected labels. kept: id -> question. problem: why it is not the file its authors published, as the end
    of a sentence about it; "" where it is.
    """

    split: str
    kept: Mapping[str, Kept]
    problem: str = ""


@dataclass(frozen=True)
class Second:
    """The corrected label of one answer. own: it was asked with RePOPE's file, so it has no other label. problem: a sentence
    where the file is not as published.
    """

    label: str
    own: bool = False
    problem: str = ""


def at_hand() -> list[Labels]:
    """The corrected files that are in the data folder, in the order of `SPLITS`; one that cannot be read keeps nothing."""
    from .download import check, data_folder
    from .upstream import sources

    found = []
    for source in sources("repope"):
        place = Path(data_folder()) / source.dataset / source.name
        packed = place.with_name(f"{place.name}.gz")
        there = place if place.is_file() else packed if packed.is_file() else None
        if there is not None:
            split = source.name.removesuffix(".json").rsplit("_", 1)[-1]
            try:
                problem = "" if check(source, data_folder()).state == "ok" else "is not as published"
                found.append(_read(str(there), there.stat().st_mtime_ns, split, problem))
            except FileFormatError as error:
                found.append(Labels(split, {}, f"cannot be used ({str(error).rstrip('.')})"))
    return found


@functools.lru_cache(maxsize=8)
def _read(path: str, stamp: int, split: str, problem: str) -> Labels:
    from .pope import questions_of

    questions = questions_of(read_records(Path(path)))
    return Labels(split, {str(q.id): Kept(str(q.image), q.text, str(q.label)) for q in questions}, problem)


def belongs(labels: Labels, answers: Sequence[Answer]) -> bool:
    """Whether the answers are to the questions of this file: all that share an id agree in image and text."""
    shared = [(answer, labels.kept[name]) for answer in answers if (name := str(answer.question_id)) in labels.kept]
    return bool(shared) and all(
        answer.text and same_image(answer.image, kept.image) and same_text(answer.text, kept.text)
        for answer, kept in shared
    )


def corrected_labels(answers: Sequence[Answer]) -> list[Second | None]:
    """Each answer's corrected label, `DROPPED` for questions that RePOPE leaves out; None where no file at hand belongs.

    Answers to several splits (see `split_of`) are taken split by split. Raises EvalError as `relabel` does.
    """
    labels: list[Second | None] = [None] * len(answers)
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


def relabel(answers: Sequence[Answer], split: str | None = None) -> list[Second] | None:
    """The corrected labels of answers to one split, which is tried alone where it is known.

    None where no file at hand belongs to them. Raises EvalError for answers to RePOPE's questions that carry POPE's labels:
    that is no POPE score.
    """
    if answers and all(answer.meta.get("labels") == REPOPE for answer in answers):
        return [Second(_plain(answer.label), own=True) for answer in answers]
    tried = [found for found in at_hand() if split in (None, found.split)]
    labels = next((found for found in tried if belongs(found, answers)), None)
    if labels is None:
        return None
    names = [str(answer.question_id) for answer in answers]
    said = dict(zip(names, (_plain(answer.label) for answer in answers)))
    problem = f"RePOPE's {labels.split} file {labels.problem}." if labels.problem else ""
    own = said.keys() <= labels.kept.keys() and _is_own(said, labels)
    return [Second(labels.kept[n].label if n in labels.kept else DROPPED, own, problem) for n in names]


def _is_own(said: Mapping[str, str], labels: Labels) -> bool:
    """Whether answers to questions that RePOPE keeps were asked with its own file. said: id -> the answer's label.

    The labels tell where one of them is changed. Without such a question both files say the same, and it is RePOPE's if
    what that drops is missing among answers to nearly everything else. Raises EvalError as `relabel` does.
    """
    changed = [name for name in said if labels.kept[name].label != _popes_label(name)]
    if changed and all(said[name] == labels.kept[name].label for name in changed):
        return True
    if not _leaves_out(said, labels):
        return False
    if any(label != labels.kept[name].label for name, label in said.items()):
        raise EvalError(
            f"The {len(said)} answers are to questions that RePOPE keeps and to none that it drops, and carry other labels "
            f"than its own, so they have no POPE score; give --questions coco_repope_{labels.split}.json."
        )
    return True


def _popes_label(name: str) -> str:
    """POPE's own label of a question of its COCO files, which ask about what is there and what is not by turns."""
    return "yes" if name.isdecimal() and int(name) % 2 else "no"


def _leaves_out(names: Collection[str], labels: Labels) -> bool:
    """Whether answers to POPE would hardly have left out all that RePOPE drops between their first and their last id."""
    if not all(name.isdecimal() for name in names):
        return False
    numbers = [int(name) for name in names]
    first, last = min(numbers), max(numbers)
    kept = sum(name.isdecimal() and first <= int(name) <= last for name in labels.kept)
    dropped = last - first + 1 - kept
    return dropped > 0 and (1 - len(numbers) / kept) ** dropped < _BY_CHANCE


def _plain(label: Any) -> str:
    return str(label).strip().lower()


def remarks(rows: Sequence[Row]) -> list[str]:
    """What a table says about the second labels, or about why there are none."""
    second = [row for row in rows if "repope" in row.evidence]
    if any("repope_own" in row.evidence for row in second):
        return ["The questions and labels are RePOPE's own, so there is no POPE score."]
    if second:
        kept = [row for row in second if row.evidence["repope"] != DROPPED]
        changed = sum(row.evidence["repope"] != row.label for row in kept)
        return [
            f"RePOPE: the same answers under its corrected labels; it keeps {len(kept)} of these {len(rows)} questions and "
            f"changes {changed} labels, and its difference is RePOPE minus POPE."
        ]
    if not any(row.cluster.rsplit("/", 1)[-1].startswith(_IMAGES) for row in rows):
        return []
    found = at_hand()
    if not found:
        return [
            "RePOPE's corrected labels are not here; lvlm-decode data get repope fetches them or says where to put."
        ]
    return [
        "RePOPE has no corrected labels for these questions.",
        *(f"RePOPE's {labels.split} file {labels.problem}." for labels in found if labels.problem),
    ]


def doubts(rows: Sequence[Row]) -> list[str]:
    """What makes the figures under second labels others than RePOPE's."""
    return list(dict.fromkeys(row.evidence["repope_problem"] for row in rows if "repope_problem" in row.evidence))
