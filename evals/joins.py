"""Answers meet their questions: by id, and only where they are about the same image and text.

Ids alone do not say that an answer belongs to a question: every POPE file counts from 1 to 3000. So what an answer says
it was asked about is compared with the question. Labels and all other facts to score by come from the question; an answer that
carries another label is named, never believed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from lvlm_decode.errors import EvalError, FileFormatError

from .base import Answer, Question

# How many culprits a message describes before it only counts.
DESCRIBED = 3


def join(answers: Sequence[Answer], questions: Sequence[Question], where: str) -> tuple[list[Answer], tuple[str, ...]]:
    """The answers with label, image, cluster and meta of their questions, and the ids of those that contradict them.

    where: the file or folder of the answers, for messages. Answers to questions that are not there stay as they are.
    Raises EvalError naming the first few answers that are about another image or text than the question of their id.
    """
    asked = {str(question.id): question for question in questions}
    if len(asked) < len(questions):
        raise FileFormatError("The question files share ids, so answers cannot be told apart; give one file.")
    # A text that all questions share ("Please describe this image") tells none of them apart.
    telling = len(questions) == 1 or len({question.text for question in questions}) > 1
    joined, differing, contradicted = [], [], []
    for answer in answers:
        question = asked.get(str(answer.question_id))
        if question is None:
            joined.append(answer)
            continue
        if not same_image(answer.image, question.image):
            differing.append(f"{question.id}: image {answer.image!r} was answered, {question.image!r} is asked")
        elif telling and not same_text(answer.text, question.text):
            differing.append(f"{question.id}: {answer.text!r} was answered, {question.text!r} is asked")
        if contradicts(answer, question):
            contradicted.append(str(question.id))
        joined.append(
            replace(
                answer,
                text=answer.text or question.text,
                label=answer.label if question.label is None else question.label,
                image=answer.image if question.image is None else question.image,
                cluster=answer.cluster if question.cluster is None else question.cluster,
                meta={**answer.meta, **question.meta},
            )
        )
    if differing:
        more = "; ..." if len(differing) > DESCRIBED else ""
        raise EvalError(
            f"{where}: {len(differing)} of {len(answers)} answers are about something else than the question of the same "
            f"id ({'; '.join(differing[:DESCRIBED])}{more}); give the questions that were asked."
        )
    return joined, tuple(contradicted)


def same_image(one: str | None, other: str | None) -> bool:
    """Whether two names can mean one image; None says nothing.

    A path may be cut short from the left ("val2014/a.jpg" and "a.jpg"), a suffix left out, and a COCO image called by
    its number.
    """
    if one is None or other is None:
        return True
    first, second = (_parts(name) for name in (one, other))
    shared = min(len(first), len(second))
    return first[-shared:] == second[-shared:] or (min(len(first), len(second)) == 1 and _same_number(first, second))


def _parts(name: str) -> tuple[str, ...]:
    path = PurePosixPath(str(name).replace("\\", "/"))
    stem = re.sub(r"\.(jpe?g|png|webp|bmp|gif|tiff?)$", "", path.name, flags=re.IGNORECASE)
    return (*(part for part in path.parts[:-1] if part not in (".", "/")), stem)


def _same_number(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    """Whether one is called by the bare number that ends the other's name."""
    one, other = (re.search(r"\d+$", parts[-1]) for parts in (first, second))
    bare = any(len(parts) == 1 and parts[0].isdecimal() for parts in (first, second))
    # As text: a number of thousands of digits is no integer that Python reads.
    return bare and one is not None and other is not None and one[0].lstrip("0") == other[0].lstrip("0")


def same_text(one: str, other: str) -> bool:
    """Whether two prompts ask the same; an empty one says nothing. One may stand inside a longer one, as questions do
    in the prompts of scripts that add "Answer with one word". Copies of POPE that write "imange" before a vowel ask what
    the others ask.
    """
    first, second = (" ".join(text.split()).casefold().replace("imange", "image") for text in (one, other))
    return first in second or second in first


def contradicts(answer: Answer, question: Question) -> bool:
    """Whether an answer carries another label, or other facts to score by, than its question."""
    pairs = [(answer.label, question.label)]
    pairs += [(answer.meta[name], value) for name, value in question.meta.items() if name in answer.meta]
    return any(said is not None and asked is not None and _plain(said) != _plain(asked) for said, asked in pairs)


def _plain(value: Any) -> Any:
    """A label without what does not matter: case, blanks around a word, the order of a list of names."""
    if isinstance(value, list | tuple):
        return sorted(map(str, map(_plain, value)))
    return value.strip().casefold() if isinstance(value, str) else value
