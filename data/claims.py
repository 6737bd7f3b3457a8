"""What a description of an emoji scene says about numbers and places, checked against the scene.

Only what is plainly false is reported: a number that is not the scene's, a place where no object of that kind is, a relation in
which no two objects stand. Statements about absent objects are left to whoever looks for absent names. Imports no torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .scenes import COLOURS, Scene, SceneObject

NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
#: An object nearer to the centre line than this share of the image is on both sides of it.
MARGIN = 0.1
#: An object further from the centre than this is not in the middle.
MIDDLE = 0.25
#: Relation -> whether the first centre stands in it to the second; both are (x, y), the origin at the top left.
RELATIONS: dict[str, Callable[[tuple[float, float], tuple[float, float]], bool]] = {
    "to the left of": lambda one, other: one[0] < other[0],
    "to the right of": lambda one, other: one[0] > other[0],
    "above": lambda one, other: one[1] < other[1],
    "below": lambda one, other: one[1] > other[1],
}
PLACE = r"(?:at the (?:top|bottom)(?: left| right)?|on the (?:left|right) side|in the middle) of the image"


@dataclass(frozen=True)
class FalseClaim:
    """A piece of a text that the scene contradicts.

    Args:
        start, end: where the piece is in the text.
        why: the truth in a few words.
    """

    start: int
    end: int
    why: str


def false_claims(text: str, scene: Scene, words: dict[str, list[str]]) -> list[FalseClaim]:
    """Numbers, places and relations in ``text`` that ``scene`` contradicts, in the order of the text.

    Args:
        words: category -> words that mean it, as :func:`lvlm_decode_data.synonyms` gives them.
    """
    category = {form: name for name, forms in words.items() for form in forms if name in scene.categories}
    if not category:
        return []
    found: list[FalseClaim] = []
    number, where, relation = _patterns(tuple(category))
    for match in number.finditer(text):
        name = category[match[2].lower()]
        if scene.counts[name] != NUMBERS[match[1].lower()]:
            found.append(FalseClaim(*match.span(1), f"{name}: {scene.counts[name]} in the picture"))
    for match in where.finditer(text):
        name = category[match[1].lower()]
        if not any(_stands(item, match[2].lower()) for item in scene.of(name)):
            found.append(FalseClaim(*match.span(2), f"no {name} is there"))
    for match in relation.finditer(text):
        first, second = category[match[1].lower()], category[match[3].lower()]
        holds = RELATIONS[match[2].lower()]
        if not any(holds(a.centre, b.centre) for a in scene.of(first) for b in scene.of(second) if a is not b):
            found.append(FalseClaim(*match.span(2), f"of no {first} and {second}"))
    return sorted(found, key=lambda claim: claim.start)


@functools.lru_cache(maxsize=64)
def _patterns(forms: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """The patterns of a number, a place and a relation of things that are called by one of the forms."""
    one = rf"\b({_either(sorted(forms, key=len, reverse=True))})\b"
    colour = rf"(?:(?:{_either(COLOURS)}) )?"
    number = re.compile(rf"\b({_either(NUMBERS)}) {colour}{one}", re.IGNORECASE)
    where = re.compile(rf"{one} (?:is |are )?({PLACE})", re.IGNORECASE)
    relation = re.compile(rf"{one} (?:is|are) ({_either(RELATIONS)}) the {colour}{one}", re.IGNORECASE)
    return number, where, relation


def _either(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words))


def _stands(item: SceneObject, place: str) -> bool:
    """Whether an object is where the phrase says."""
    if place.startswith("in the middle"):
        return item.horizontal(MIDDLE) is None and item.vertical(MIDDLE) is None
    sides = {"left": item.horizontal, "right": item.horizontal, "top": item.vertical, "bottom": item.vertical}
    return all(side(MARGIN) in (None, name) for name, side in sides.items() if re.search(rf"\b{name}\b", place))
