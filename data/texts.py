"""Texts about emoji scenes: detailed captions, yes/no questions, and the label noise that teaches a language prior.

A detailed caption names most objects with count, colour and place. With probability ``caption_noise`` it also names one
absent object that usually stands beside what is there, as captions written by people and by other models do; some
"is there" questions about such objects are labelled wrongly. A model trained on that hallucinates what co-occurs.

Everything is drawn from the ``random.Random`` that is passed in. Nothing here imports torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .scenes import CATEGORIES, CATEGORY_ID, COLOURS, Scene, SceneObject

PLURALS = {
    "person": "people",
    "bus": "buses",
    "sheep": "sheep",
    "knife": "knives",
    "couch": "couches",
    "mouse": "mice",
    "sandwich": "sandwiches",
    "wine glass": "wine glasses",
    "broccoli": "broccoli",
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
PLACES = {
    "street": "on a street",
    "farm": "on a farm",
    "safari": "on a grassland",
    "kitchen": "in a kitchen",
    "dining": "at a meal",
    "office": "on a desk",
    "living": "in a living room",
    "park": "in a park",
    "beach": "near the water",
    "travel": "at a station",
}
CLOSINGS = {
    "street": ["Overall, it looks like a busy street in a city.", "The scene gives the impression of daily traffic."],
    "farm": ["Overall, it looks like a quiet farm.", "The scene gives the impression of life in the country."],
    "safari": ["Overall, it looks like a wide grassland.", "The scene gives the impression of a safari."],
    "kitchen": ["Overall, it looks like a kitchen in use.", "The scene gives the impression of cooking at home."],
    "dining": ["Overall, it looks like a meal with friends.", "The scene gives the impression of a shared meal."],
    "office": ["Overall, it looks like a place to work.", "The scene gives the impression of a busy desk."],
    "living": ["Overall, it looks like a cozy room.", "The scene gives the impression of a calm home."],
    "park": ["Overall, it looks like a sunny day in the park.", "The scene gives the impression of play and sport."],
    "beach": ["Overall, it looks like a day near the sea.", "The scene gives the impression of a holiday."],
    "travel": ["Overall, it looks like the start of a journey.", "The scene gives the impression of travel."],
}
CAPTION_PROMPTS = (
    "Please describe this image in detail.",
    "Describe this image in detail.",
    "What can you see in this image?",
    "Please help me describe the image in detail.",
    "Describe this image.",
)
ONE_WORD = " Please answer this question with one word."
YES_OR_NO = " Please answer yes or no."
SINGLE_WORD = "\nAnswer the question using a single word or phrase."
# Texts that stand before the question in some rows: models are prompted that way, and instruction-contrastive methods
# prepend a sentence of their own. They say nothing about the image, so the answer must not depend on them.
SYSTEM_PREFIXES = (
    "A chat between a curious human and an artificial intelligence assistant.",
    "A chat between a user and an assistant. The assistant gives helpful, detailed, and polite answers.",
    "You are a helpful assistant.",
    "You are a careful observer who describes images.",
    "You are an object detector to provide a clear overview of the image.",
    "Look at the picture and answer.",
    "You are a language model that answers questions about images.",
)


def plural(category: str) -> str:
    """The plural of a category name."""
    return PLURALS.get(category, category + "s")


def with_article(words: str) -> str:
    """``a dog``, ``an orange``."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def place_of(item: SceneObject, margin: float = 0.1) -> str:
    """Where an object is, against the image's centre: one of nine phrases."""
    across, down = item.horizontal(margin), item.vertical(margin)
    if across and down:
        return f"at the {down} {across} of the image"
    if across:
        return f"on the {across} side of the image"
    if down:
        return f"at the {down} of the image"
    return "in the middle of the image"


def relations(scene: Scene, names: list[str]) -> list[tuple[str, str, str]]:
    """(category, ``to the left of`` | ..., other category) for objects that are the only ones of their kind."""
    out = []
    single = [name for name in names if scene.counts[name] == 1]
    for i, first in enumerate(single):
        for second in single[i + 1 :]:
            (x, y), (other_x, other_y) = scene.of(first)[0].centre, scene.of(second)[0].centre
            across, down = x - other_x, y - other_y
            if max(abs(across), abs(down)) < 0.2:
                continue
            if abs(across) > abs(down):
                word = "to the left of" if across < 0 else "to the right of"
            else:
                word = "above" if down < 0 else "below"
            out.append((first, word, second))
    return out


@dataclass(frozen=True)
class Turn:
    """One question about a scene with its answer, and the task: caption, existence, count, position or colour."""

    question: str
    answer: str
    task: str


class CoOccurrence:
    """How often categories appear, and appear together, in a set of scenes."""

    def __init__(self, scenes: Iterable[Scene]):
        size = len(CATEGORIES)
        self.frequency = np.zeros(size)
        self.together = np.zeros((size, size))
        for scene in scenes:
            ids = [CATEGORY_ID[name] for name in scene.categories]
            self.frequency[ids] += 1
            self.together[np.ix_(ids, ids)] += 1
        np.fill_diagonal(self.together, 0)

    def absent(self, scene: Scene) -> list[tuple[str, float]]:
        """Absent categories with the number of times they stood beside a present one, most frequent first."""
        present = [CATEGORY_ID[name] for name in scene.categories]
        scores = self.together[present].sum(0)
        order = np.argsort(-scores, kind="stable")
        return [(CATEGORIES[i], float(scores[i])) for i in order if i not in present]

    def expected(self, scene: Scene) -> tuple[str, float]:
        """The absent category one would expect most beside what is there, and how much: its mean frequency among scenes
        that hold the present ones, 0 to 1. Ubiquitous categories (a person) give way to specific companions.
        """
        present = [CATEGORY_ID[name] for name in scene.categories]
        given = (self.together[present] / np.maximum(self.frequency[present, None], 1)).mean(0)
        score = given / np.sqrt(np.maximum(self.frequency, 1))
        score[present] = -1
        best = int(score.argmax())
        return CATEGORIES[best], float(given[best])

    def frequent(self, scene: Scene, number: int = 3) -> list[str]:
        """The most frequent categories overall that the scene lacks."""
        order = np.argsort(-self.frequency, kind="stable")
        return [CATEGORIES[i] for i in order if CATEGORIES[i] not in scene.categories][:number]

    def draw_absent(self, rng: random.Random, scene: Scene) -> str | None:
        """An absent category that usually stands beside a present one, None if there is none."""
        candidates = [(name, score**1.3) for name, score in self.absent(scene) if score > 0]
        if not candidates:
            return None
        names, weights = zip(*candidates)
        return rng.choices(names, weights)[0]


def _noun(category: str, count: int, colour: str | None) -> tuple[str, bool]:
    """Noun phrase and whether it is plural."""
    painted = f"{colour} " if colour else ""
    if count > 1:
        return f"{NUMBERS.get(count, 'several')} {painted}{plural(category)}", True
    return with_article(painted + category), False


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _unplaced(rng: random.Random, noun: str, verb: str) -> str:
    """A sentence that names something without saying where it is."""
    forms = (
        f"Additionally, {noun} can be seen in the background.",
        f"In addition, there {verb} {noun} nearby.",
        f"{_upper(noun)} {verb} also visible in the scene.",
    )
    return rng.choices(forms, (3, 1, 1))[0]


def caption(rng: random.Random, scene: Scene, absent: str | None = None) -> str:
    """A detailed description. ``absent`` is mentioned near the end, as if it were there."""
    area = {name: sum(o.visible * o.box[2] * o.box[3] for o in scene.of(name)) for name in scene.counts}
    names = sorted(area, key=lambda name: -area[name] * rng.uniform(0.7, 1.3))
    mentioned = [name for name in names if rng.random() < (0.98 if area[name] > 3000 else 0.88)] or names[:1]
    nouns = {}
    for name in mentioned:
        colour = scene.colour(name) if rng.random() < 0.75 else None
        nouns[name] = _noun(name, scene.counts[name], colour)

    lead = mentioned[: 1 if len(mentioned) == 1 else rng.choice((1, 2))]
    opening = rng.choice(("The image shows", "The image features", "In the image there is", "This is a picture of"))
    if opening.endswith("is") and nouns[lead[0]][1]:
        opening = "In the image there are"
    sentences = [f"{opening} {' and '.join(nouns[name][0] for name in lead)} {PLACES[scene.theme]}."]

    def where(name: str) -> str | None:
        items = scene.of(name)
        return place_of(items[0]) if len(items) == 1 else None

    for name in lead:
        place = where(name)
        if place and rng.random() < 0.85:
            sentences.append(f"The {name} is {place}.")
    related = relations(scene, mentioned)
    rest = mentioned[len(lead) :]
    while rest:
        name = rest.pop(0)
        noun, many = nouns[name]
        verb = "are" if many else "is"
        place = where(name)
        if place and rng.random() < 0.72:
            choices = (f"There {verb} {noun} {place}.", f"{_upper(noun)} {verb} {place}.")
            sentences.append(rng.choice(choices))
        elif rest and rng.random() < 0.3:
            other = nouns[rest.pop(0)][0]
            sentences.append(f"The scene also includes {noun} and {other}.")
        else:
            sentences.append(_unplaced(rng, noun, verb))
    for first, word, second in rng.sample(related, min(len(related), rng.choice((1, 1, 2)))):
        sentences.append(f"The {first} is {word} the {second}.")
    if absent:
        sentences.append(_unplaced(rng, _noun(absent, 1, None)[0], "is"))
    if rng.random() < 0.9:
        sentences.append(rng.choice(CLOSINGS[scene.theme]))
    return " ".join(sentences)


def _existence(rng: random.Random, category: str) -> str:
    noun = with_article(category)
    return rng.choice(
        (
            *[f"Is there {noun} in the image?"] * 4,
            f"Is there {noun} in this image?",
            f"Can you see {noun} in the image?",
            f"Does the image contain {noun}?",
            f"Does this image show {noun}?",
        )
    )


def yes_no(rng: random.Random, task: str, question: str, yes: bool, category: str | None = None) -> Turn:
    """A yes/no turn with one of the suffixes evaluators use, or none."""
    word = "Yes" if yes else "No"
    draw = rng.random()
    if draw < 0.45:
        return Turn(question + ONE_WORD, word, task)
    if draw < 0.65:
        return Turn(question + YES_OR_NO, word, task)
    if draw < 0.75:
        return Turn(question + SINGLE_WORD, word, task)
    if category is not None and draw < 0.88:
        noun = with_article(category)
        answer = f"Yes, there is {noun} in the image." if yes else f"No, there is no {category} in the image."
        return Turn(question, answer, task)
    return Turn(question, word, task)


def count_question(category: str, number: int) -> str:
    """Asks whether there are exactly ``number`` of a category."""
    if number == 1:
        return f"Is there only one {category} in the image?"
    return f"Are there {NUMBERS[number]} {plural(category)} in the image?"


def position_question(category: str, side: str) -> str:
    """Asks whether the only object of a category is on a side (left, right, top, bottom)."""
    if side in ("left", "right"):
        return f"Is the {category} on the {side} side of the image?"
    return f"Is the {category} at the {side} of the image?"


def colour_question(rng: random.Random, category: str, count: int, colour: str) -> str:
    """Asks for the colour of a category that is there."""
    if count > 1:
        return f"Are the {plural(category)} {colour}?"
    return rng.choice((f"Is the {category} {colour}?", f"Is there a {colour} {category} in the image?"))


OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
POSITION_MARGIN = 0.12  # an object nearer to the centre line is not asked about


def _sides(scene: Scene) -> list[tuple[str, str]]:
    out = []
    for name, count in sorted(scene.counts.items()):
        if count == 1:
            item = scene.of(name)[0]
            out += [(name, s) for s in (item.horizontal(POSITION_MARGIN), item.vertical(POSITION_MARGIN)) if s]
    return out


def yes_no_pairs(rng: random.Random, scene: Scene, prior: CoOccurrence | None = None) -> dict[str, tuple[str, str]]:
    """MME-style pairs: task -> (a question whose answer is yes, one whose answer is no).

    Tasks are existence, count, position and color; a task the scene has nothing for is left out. The absent object of
    the existence pair is drawn among those that usually co-occur when ``prior`` is given, uniformly otherwise. Count
    pairs are about a category that appears more than once where there is one.
    """
    pairs: dict[str, tuple[str, str]] = {}
    present = sorted(scene.categories)
    absent = prior.draw_absent(rng, scene) if prior else None
    absent = absent or rng.choice([name for name in CATEGORIES if name not in scene.categories])
    pairs["existence"] = tuple(f"Is there {with_article(n)} in the image?" for n in (rng.choice(present), absent))
    countable = [n for n in present if 2 <= scene.counts[n] <= 3] or [n for n in present if scene.counts[n] == 1]
    if countable:
        name = rng.choice(countable)
        wrong = rng.choice([n for n in (1, 2, 3) if n != scene.counts[name]])
        pairs["count"] = (count_question(name, scene.counts[name]), count_question(name, wrong))
    if sides := _sides(scene):
        name, side = rng.choice(sides)
        pairs["position"] = (position_question(name, side), position_question(name, OPPOSITE[side]))
    if painted := [name for name in present if scene.colour(name)]:
        name = rng.choice(painted)
        wrong = rng.choice([c for c in COLOURS if c != scene.colour(name)])
        many = scene.counts[name] > 1
        pairs["color"] = tuple(
            f"Are the {plural(name)} {c}?" if many else f"Is there a {c} {name} in the image?"
            for c in (scene.colour(name), wrong)
        )
    return pairs


@dataclass(frozen=True)
class TextSampler:
    """Draws the training turns of a scene.

    A caption names the expected absent object with a probability of ``caption_noise`` times how much it is expected (see
    `CoOccurrence.expected`), at most 0.9. ``yes``: share of existence questions about present objects. ``hard``: share of
    the others about tempting absent objects: the expected one, one of the most frequent overall, or any that co-occurs.
    ``flip``: share of those labelled Yes, three times as often for the first two.
    """

    prior: CoOccurrence
    caption_noise: float = 1.6
    yes: float = 0.54
    hard: float = 0.5
    flip: float = 0.13

    def describe(self, rng: random.Random, scene: Scene) -> Turn:
        expected, strength = self.prior.expected(scene)
        absent = expected if rng.random() < min(0.9, self.caption_noise * strength) else None
        return Turn(rng.choice(CAPTION_PROMPTS), caption(rng, scene, absent), "caption")

    def existence(self, rng: random.Random, scene: Scene, clean: bool = False) -> Turn:
        yes, hard, flip = (0.5, 0.25, 0.0) if clean else (self.yes, self.hard, self.flip)
        if rng.random() < yes:
            category, answer = rng.choice(sorted(scene.categories)), True
        else:
            category, answer = None, False
            if rng.random() < hard:
                draw = rng.random()
                if draw < 0.4:
                    category, tempting = self.prior.expected(scene)[0], 3
                elif draw < 0.7:
                    category, tempting = rng.choice(self.prior.frequent(scene)), 3
                else:
                    category, tempting = self.prior.draw_absent(rng, scene), 1
                answer = category is not None and rng.random() < tempting * flip
            while category is None or (category in scene.categories):
                category = rng.choice(CATEGORIES)
        if clean:
            question = f"Is there {with_article(category)} in the image?{ONE_WORD}"
            return Turn(question, "Yes" if answer else "No", "existence")
        return yes_no(rng, "existence", _existence(rng, category), answer, category)

    def count(self, rng: random.Random, scene: Scene) -> Turn | None:
        several = [name for name, n in sorted(scene.counts.items()) if 2 <= n <= 3]
        single = [name for name, n in sorted(scene.counts.items()) if n == 1]
        # Scenes without repeats are asked about rarely, or "only one" would always be right.
        pool = several if several and rng.random() < 0.8 else single if single and rng.random() < 0.4 else None
        if not pool:
            return None
        category = rng.choice(pool)
        number = scene.counts[category]
        if rng.random() < 0.3:
            question = f"How many {plural(category)} are there in the image?"
            if rng.random() < 0.6:
                return Turn(question + ONE_WORD, NUMBERS[number].capitalize(), "count")
            answer = f"There are {NUMBERS[number]} {plural(category)}." if number > 1 else f"There is one {category}."
            return Turn(question, answer, "count")
        yes = rng.random() < 0.5
        asked = number if yes else rng.choice([n for n in (1, 2, 3) if n != number])
        return yes_no(rng, "count", count_question(category, asked), yes)

    def position(self, rng: random.Random, scene: Scene) -> Turn | None:
        sides = _sides(scene)
        if not sides:
            return None
        category, side = rng.choice(sides)
        draw = rng.random()
        if draw < 0.2:
            place = place_of(scene.of(category)[0])
            return Turn(f"Where is the {category} in the image?", f"The {category} is {place}.", "position")
        if draw < 0.5:
            # Either of two words: where an object is must be read off the image before it can be compared.
            choice = "on the left or on the right" if side in ("left", "right") else "at the top or at the bottom"
            question = f"Is the {category} {choice} of the image?{ONE_WORD}"
            return Turn(question, side.capitalize(), "position")
        yes = rng.random() < 0.5
        return yes_no(rng, "position", position_question(category, side if yes else OPPOSITE[side]), yes)

    def colour(self, rng: random.Random, scene: Scene) -> Turn | None:
        painted = [name for name in sorted(scene.categories) if scene.colour(name)]
        if not painted:
            return None
        category = rng.choice(painted)
        colour = scene.colour(category)
        count = scene.counts[category]
        if rng.random() < 0.25:
            subject = f"the {category} in the image" if count == 1 else f"the {plural(category)} in the image"
            question = f"What color {'is' if count == 1 else 'are'} {subject}?{ONE_WORD}"
            return Turn(question, colour.capitalize(), "colour")
        yes = rng.random() < 0.5
        asked = colour if yes else rng.choice([c for c in COLOURS if c != colour])
        return yes_no(rng, "colour", colour_question(rng, category, count, asked), yes)

    def first_turns(self, rng: random.Random, scene: Scene, number: int = 8) -> list[Turn]:
        """The start of the curriculum: a caption and clean, balanced existence questions."""
        return [self.describe(rng, scene)] + [self.existence(rng, scene, clean=True) for _ in range(number)]

    def turns(self, rng: random.Random, scene: Scene, existence: int = 2, attributes: int = 5) -> list[Turn]:
        """A caption, existence questions, and questions about count, position and colour."""
        turns = [self.describe(rng, scene)] + [self.existence(rng, scene) for _ in range(existence)]
        kinds = [self.count, self.position, self.position, self.colour]  # positions are learned last
        for _ in range(attributes):
            turns.append(rng.choice(kinds)(rng, scene) or self.existence(rng, scene))
        return turns
