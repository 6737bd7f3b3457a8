"""What benchmarks with lettered options share: question sheets, answers that name a letter or a word, scene pairs."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_decode.errors import FileFormatError
from lvlm_decode.reading import read_records, read_table


def read_sheet(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, record) of a sheet: CSV or TSV with a header line, JSON lines, or one JSON array of objects.

    Raises FileFormatError for a sheet without lines, or with a line that has more or fewer cells than the header.
    """
    name = Path(path).name.removesuffix(".gz")
    delimiter = {"csv": ",", "tsv": "\t"}.get(name.rpartition(".")[2])
    return read_records(path) if delimiter is None else [*read_table(path, delimiter)]


def field(record: Mapping[str, Any], where: str, *names: str) -> Any:
    """The first of `names` that a record has, upper and lower case alike. Raises FileFormatError where it has none."""
    known = {str(name).lower(): value for name, value in record.items()}
    for name in names:
        if known.get(name.lower()) is not None:
            return known[name.lower()]
    raise FileFormatError(f"{where}: field {names[0]!r} is missing; found {', '.join(map(str, record)) or 'no field'}.")


def text_field(record: Mapping[str, Any], where: str, *names: str) -> str:
    """As `field`, for one that must be text."""
    value = field(record, where, *names)
    if not isinstance(value, str):
        raise FileFormatError(f"{where}: field {names[0]!r} must be text, found {value!r}.")
    return value


def whole_number(value: Any, where: str, name: str) -> int:
    """An integer field, also as text ("12") or as a spreadsheet writes it (12.0)."""
    try:
        number = float(value)
        if number != int(number) or isinstance(value, bool):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise FileFormatError(f"{where}: field {name!r} must be a whole number, found {value!r}.") from None
    return int(number)


def letter(value: Any, where: str, letters: str) -> str:
    """A gold letter, "(a)", "a" or "A", as an upper-case letter of `letters`."""
    found = re.fullmatch(r"\s*\(?([A-Za-z])\)?\.?\s*", str(value))
    if found is None or found[1].upper() not in letters:
        raise FileFormatError(f"{where}: the gold answer must be one of {', '.join(letters)}, found {value!r}.")
    return found[1].upper()


def named_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the only choice whose words occur in an answer; None where none or several occur.

    For questions that name their choices in words, as the emoji scenes' do.
    """
    said = text.lower()
    found = [i for i, choice in enumerate(choices) if re.search(rf"\b{re.escape(choice.lower())}\b", said)]
    return chr(ord("A") + found[0]) if len(found) == 1 else None


@dataclass(frozen=True)
class Contrast:
    """The same thing in two scenes, where it differs. task: color, count or position; values: a word for each scene."""

    task: str
    category: str
    scenes: tuple[Any, Any]
    values: tuple[Any, Any]

    @property
    def pair(self) -> str:
        """Both images: what is drawn again together in a bootstrap."""
        return "-".join(str(scene.image_id) for scene in self.scenes)


TASKS = ("color", "count", "position")


def _facts(scene: Any) -> dict[tuple[str, str], Any]:
    """(task, category) -> what is true of the only object, or the objects, of a category."""
    from lvlm_decode_data.texts import POSITION_MARGIN

    found: dict[tuple[str, str], Any] = {}
    for name, count in sorted(scene.counts.items()):
        if count <= 3:
            found["count", name] = count
        if count == 1:
            item = scene.of(name)[0]
            if scene.colour(name):
                found["color", name] = scene.colour(name)
            if side := item.horizontal(POSITION_MARGIN):
                found["position", name] = side
    return found


def scene_contrasts(scenes: Sequence, seed: int, name: str) -> list[Contrast]:
    """Pairs of scenes of one theme with what differs between them, at most one contrast for each task.

    Every scene is in at most one pair, so pairs are independent. A scene is paired with the next one of its theme that
    gives the most tasks.
    """
    rng = random.Random(f"{name} {seed}")
    themes: dict[str, list[Any]] = {}
    for scene in scenes:
        themes.setdefault(scene.theme, []).append(scene)
    found: list[Contrast] = []
    for members in themes.values():
        left = list(members)
        while len(left) > 1:
            first = left.pop(0)
            facts = _facts(first)

            def differing(second: Any, facts: Mapping = facts) -> dict[str, list[tuple[str, Any, Any]]]:
                others = _facts(second)
                by_task: dict[str, list[tuple[str, Any, Any]]] = {}
                for (task, category), value in facts.items():
                    if others.get((task, category), value) != value:
                        by_task.setdefault(task, []).append((category, value, others[task, category]))
                return by_task

            best = max(left, key=lambda second: len(differing(second)))
            options = differing(best)
            if not options:
                continue
            left.remove(best)
            for task in TASKS:
                if task in options:
                    category, *values = rng.choice(options[task])
                    found.append(Contrast(task, category, (first, best), (values[0], values[1])))
    return sorted(found, key=lambda contrast: contrast.scenes[0].image_id)


def open_question(contrast: Contrast) -> tuple[str, tuple[str, ...]]:
    """A question about either scene of a contrast that is answered with a word, and the words it may be."""
    from lvlm_decode_data.texts import NUMBERS, ONE_WORD, plural

    name = contrast.category
    if contrast.task == "color":
        return f"What color is the {name} in the image?{ONE_WORD}", tuple(map(str, contrast.values))
    if contrast.task == "count":
        words = tuple(NUMBERS[number] for number in contrast.values)
        return f"How many {plural(name)} are there in the image?{ONE_WORD}", words
    text = f"Is the {name} on the left or on the right of the image?{ONE_WORD}"
    return text, tuple(map(str, contrast.values))


def yes_no_questions(contrast: Contrast) -> tuple[str, str]:
    """Two yes/no questions: the first is true of the first scene only, the second of the second only."""
    from lvlm_decode_data.texts import count_question, position_question

    name = contrast.category
    first, second = contrast.values
    if contrast.task == "color":
        return f"Is there a {first} {name} in the image?", f"Is there a {second} {name} in the image?"
    if contrast.task == "count":
        return count_question(name, first), count_question(name, second)
    return position_question(name, first), position_question(name, second)
