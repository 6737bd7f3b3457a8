"""Answers meet their questions: by id, and only where they are about the same image and text.

Ids alone do not say that an answer belongs to a question: every POPE file counts from 1 to 3000. So what an answer says
it was asked about is compared with the question. Labels and all other facts to score by come from the question; an answer that
carries another label is named, never believed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
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
    # A prompt that all share ("Please describe this image") asks the same in other words; a question does not.
    texts = {_plain_text(question.text) for question in questions}
    telling = len(questions) == 1 or len(texts) > 1 or any(mark in text for text in texts for mark in "?？")
    joined, differing, contradicted = [], [], []
    for answer in answers:
        question = asked.get(str(answer.question_id))
        if question is None:
            joined.append(answer)
            continue
        if not same_image(answer.image, question.image):
            differing.append(f"{question.id}: image {answer.image!r} was answered, {question.image!r} is asked")
        elif telling and (not same_text(answer.text, question.text) or _of_another(answer.text, question.text, texts)):
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


# A word, a letter of a script that writes words without blanks, or a mark.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def same_text(one: str, other: str) -> bool:
    """Whether two prompts ask the same; an empty one says nothing.

    One may stand inside a longer one, as questions do in the prompts of scripts that add "Answer with one word": word for
    word, and up to the end of a sentence or line there, because "Is there a dog" is not "Is there a dog house". A single
    word stands for no other text.
    """
    first, second = (_tokens(text) for text in (one, other))
    if not first or not second or first == second:
        return True
    short, long = sorted((first, second), key=len)
    if sum(map(_is_word, short)) < 2:
        return False
    wanted = [text for text, _ in short]
    for start in range(len(long) - len(short) + 1):
        if [text for text, _ in long[start : start + len(short)]] == wanted:
            after = long[start + len(short) :][:1]
            if not _is_word(short[-1]) or not after or not _is_word(after[0]) or after[0][1]:
                return True
    return False


def _tokens(text: str) -> list[tuple[str, bool]]:
    """(word or mark, whether it begins a line) of a text, without case. Copies of POPE write "imange" before a vowel."""
    found = []
    for line in text.casefold().split("\n"):
        words = _TOKEN.findall(line)
        found += [("image" if word == "imange" else word, not i) for i, word in enumerate(words)]
    return found


def _is_word(token: tuple[str, bool]) -> bool:
    return token[0][0].isalnum() or token[0][0] == "_"


def _of_another(said: str, asked: str, texts: Collection[str]) -> bool:
    """Whether a text is another question of the file to the letter, which may well hold the one of the same id."""
    plain = _plain_text(said)
    return plain != "" and plain != _plain_text(asked) and plain in texts


def _plain_text(text: str) -> str:
    return " ".join(word for word, _ in _tokens(text))


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
