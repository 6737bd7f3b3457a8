"""What is learned from: pictures with a question and two answers, of which the first is right; from a file or the scenes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from PIL import Image
from pydantic import Field

from ..errors import InputError
from ..reading import Record, checked, read_records


@dataclass(frozen=True)
class Triple:
    """A picture, a question about it, and two answers, of which the first is preferred."""

    image: Image.Image | Path
    question: str
    chosen: str
    rejected: str

    @property
    def picture(self) -> Image.Image:
        """The picture; from its file where it has one, so that a data set needs no memory."""
        return self.image if isinstance(self.image, Image.Image) else Image.open(self.image).convert("RGB")


def scene_triples(count: int, seed: int = 0, questions: str = "existence") -> Iterator[Triple]:
    """``count`` triples over rendered training scenes: captions that name an absent object, and wrong yes/no answers.

    The absent objects are ones that usually stand beside what is there, as in the training of the small models.

    Args:
        questions: what the yes/no questions are about: "existence" of objects alone, or "all" for existence, count, position
            and colour.
    """
    from lvlm_decode_data.scenes import render, scene_seed
    from lvlm_decode_data.texts import CAPTION_PROMPTS, ONE_WORD, CoOccurrence, caption, with_article, yes_no_pairs

    rng = random.Random(seed)
    drawn = [render(scene_seed("train", index))[:2] for index in rng.sample(range(20_000), max(count // 3, 1))]
    prior = CoOccurrence(scene for _, scene in drawn)
    for number in range(count):
        image, scene = drawn[number % len(drawn)]
        absent = prior.draw_absent(rng, scene) or prior.absent(scene)[0][0]
        if number % 3 == 0:
            words = rng.getrandbits(32)
            chosen = caption(random.Random(words), scene)
            yield Triple(image, rng.choice(CAPTION_PROMPTS), chosen, caption(random.Random(words), scene, absent))
            continue
        there = rng.random() < 0.5
        answers = ("Yes", "No") if there else ("No", "Yes")
        if questions == "all":
            right, wrong = rng.choice(list(yes_no_pairs(rng, scene, prior).values()))
            yield Triple(image, (right if there else wrong) + ONE_WORD, *answers)
            continue
        name = rng.choice(sorted(scene.categories)) if there else absent
        yield Triple(image, f"Is there {with_article(name)} in the image?{ONE_WORD}", *answers)


def scene_pairs(count: int, seed: int = 0) -> list[Triple]:
    """``count`` pairs of captions of rendered scenes, of which the second names an absent object."""
    return list(scene_triples(3 * count, seed))[::3]


class _Pair(Record):
    """A line of a file of pairs."""

    image: Annotated[str, Field(min_length=1)]
    question: Annotated[str, Field(min_length=1)]
    truthful: Annotated[str, Field(min_length=1)]
    hallucinated: Annotated[str, Field(min_length=1)]


def file_pairs(path: Path) -> list[Triple]:
    """The pairs of a JSON lines file with the fields image, question, truthful and hallucinated.

    Args:
        path: images are looked up from the folder it is in.

    Raises:
        FileFormatError: names the line and the field that is not as it must be.
        InputError: names the line whose picture cannot be read, or that has one answer twice; fewer than two pairs.
    """
    pairs = []
    for where, record in read_records(path):
        line = checked(_Pair, record, where)
        place = path.parent / line.image
        try:
            # Whole, once: a picture that is cut off must not end a training hours later.
            with Image.open(place) as opened:
                opened.load()
        # What a reader of pictures raises is not only OSError: SyntaxError, ValueError, DecompressionBombError.
        except Exception as error:
            raise InputError(f"{where}: field 'image': {line.image} cannot be read ({error}).") from error
        if line.truthful == line.hallucinated:
            raise InputError(f"{where}: 'truthful' and 'hallucinated' are the same; give two answers that differ.")
        pairs.append(Triple(place, line.question, line.truthful, line.hallucinated))
    if len(pairs) < 2:
        raise InputError(f"{path} has {len(pairs)} pairs; training needs at least 2.")
    return pairs


def digest(triples: Sequence[Triple]) -> str:
    """What tells two lists of triples apart, by their words and pictures; those in files by the files' bytes."""
    found = hashlib.sha256()
    for triple in triples:
        image = triple.image
        pixels = (
            image.read_bytes() if isinstance(image, Path) else f"{image.mode} {image.size} ".encode() + image.tobytes()
        )
        found.update(json.dumps([triple.question, triple.chosen, triple.rejected]).encode())
        found.update(hashlib.sha256(pixels).digest())
    return found.hexdigest()[:16]
