"""The forms in which answers are written, by this project and by the authors' own scripts, and how answers that carry no
ids meet their questions.

A form is a shape of one line. A file is of the first form whose required fields its first record has, and every further
record must fit that form. What fits none is refused with the accepted forms and an example line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from lvlm_decode.errors import EvalError, FileFormatError
from lvlm_decode.reading import Count, Identity, Record, checked, read_records, shown

from .base import Answer, Question
from .joins import same_text

# Other repositories' names of the fields of an answer, which count where this project's own is not there.
_ALIASES = {"answer": ("prediction",), "text": ("question", "query", "prompt"), "image": ("image_source", "image_id")}
# What other scripts call a model's words. Beside `answer`, which some of them call the gold answer, nobody can tell.
_SAID = (
    "prediction",
    "response",
    "output",
    "model_answer",
    "model_prediction",
    "model_output",
    "pred",
    "generated_text",
)
# The key in `meta` of answers whose id is only their place in the file.
BY_PLACE = "by_place"


class Line(Record):
    """A line of a file whose forms are told apart by the fields that must be there."""

    @classmethod
    def fits(cls, record: dict[str, Any]) -> bool:
        """Whether a record has the fields that tell this form."""
        return not cls.lacking(record)

    @classmethod
    def lacking(cls, record: dict[str, Any]) -> list[str]:
        """The required fields that a record does not have."""
        return [name for name, field in cls.model_fields.items() if field.is_required() and name not in record]

    @classmethod
    def size(cls) -> int:
        """How many fields are required."""
        return len(cls.lacking({}))

    def other(self, *names: str) -> dict[str, Any]:
        """The fields that nobody declared, without some."""
        return {name: value for name, value in (self.model_extra or {}).items() if name not in names}


class Form(Line, ABC):
    """One form of an answer: a subclass declares the fields of a line and makes the answer of it. by: who writes it."""

    by: ClassVar[str]
    example: ClassVar[str]

    @abstractmethod
    def to_answer(self, number: int) -> Answer:
        """The answer. number: of the record in its file, from 1."""


def _one_of(said: str, others: Sequence[str], fields: dict[str, Any]) -> None:
    """Refuse a line that has the model's words by two names: one of them may well be the gold answer."""
    if said in fields and (both := [name for name in others if name != said and fields.get(name) is not None]):
        raise PydanticCustomError(
            "ambiguous",
            f"field {said!r} and field {both[0]!r} are both there, and nobody can tell which the model said; keep the model's "
            f"as {said!r} and the gold answer as 'label'",
        )


class _Answered(Form):
    """A form whose `answer` must be the model's: a file that also has the model's words by another name is refused."""

    @model_validator(mode="after")
    def _one_answer(self) -> _Answered:
        fields = {**self.__dict__, **(self.model_extra or {})}
        if "answer" in self.model_fields_set:
            _one_of("answer", _SAID, fields)
        texts = [fields[name] for name in ("text", "question", "query", "prompt") if isinstance(fields.get(name), str)]
        if other := [text for text in texts[1:] if not same_text(text, texts[0])]:
            raise PydanticCustomError(
                "ambiguous",
                f"two fields say different things about what was asked ({shown(texts[0])}, {shown(other[0])}); keep the "
                "question as 'text' and what the model said as 'answer'",
            )
        return self


class Own(_Answered):
    """A line of this project: `question_id` and `answer` (or `prediction`); a sentence in `error` instead of an answer."""

    by = "this project"
    example = '{"question_id": 1, "answer": "Yes"}'

    question_id: Identity
    answer: str | None = None
    prediction: str | None = None
    text: str | None = None
    question: str | None = None
    query: str | None = None
    prompt: str | None = None
    image: Identity | None = None
    image_source: Identity | None = None
    image_id: Identity | None = None
    label: Any = None
    cluster: str | None = None
    tokens: Count | None = None
    error: str | None = None
    meta: dict[str, Any] | None = None
    checksum: str | None = None

    @classmethod
    def lacking(cls, record: dict[str, Any]) -> list[str]:
        answered = "answer" in record or "prediction" in record or record.get("error")
        return super().lacking(record) + ([] if answered else ["answer"])

    @model_validator(mode="after")
    def _answered(self) -> Own:
        if not {"answer", "prediction"} & self.model_fields_set and not self.error:
            found = ", ".join(sorted(self.model_fields_set))
            raise PydanticCustomError("lacking", f"field 'answer' is missing; found {found}")
        return self

    def to_answer(self, number: int) -> Answer:
        used, meta = {}, self.other()
        for name, others in _ALIASES.items():
            there = [other for other in (name, *others) if other in self.model_fields_set]
            used[name] = getattr(self, there[0]) if there else None
            meta |= {other: getattr(self, other) for other in there[1:]}
        image = used["image"]
        return Answer(
            question_id=self.question_id,
            answer=used["answer"] or "",
            text=used["text"] or "",
            image=None if image is None else str(image),
            label=self.label,
            cluster=self.cluster,
            meta={**meta, **(self.meta or {})},
            tokens=self.tokens,
            error=self.error,
            checksum=self.checksum,
        )


class Llava(Form):
    """`prompt` is what was asked and `text` is the answer."""

    by = "LLaVA, VCD, RITUAL, DeCo"
    example = '{"question_id": 1, "prompt": "Is there a dog in the image?", "text": "Yes"}'

    question_id: Identity
    prompt: str
    text: str | None
    image: Identity | None = None
    label: Any = None

    @model_validator(mode="after")
    def _one_answer(self) -> Llava:
        _one_of("text", _SAID, {**self.__dict__, **(self.model_extra or {})})
        return self

    def to_answer(self, number: int) -> Answer:
        image = None if self.image is None else str(self.image)
        return Answer(self.question_id, self.text or "", self.prompt, image, self.label, meta=self.other())


class Damro(Form):
    """`output` is the answer; MME's lines carry the gold answer and the task."""

    by = "DAMRO"
    example = '{"question_id": 1, "prompt": "Is there a dog in the image?", "output": "Yes"}'

    question_id: Identity
    prompt: str
    output: str | None
    image: Identity | None = None
    gt_answer: str | None = None

    def to_answer(self, number: int) -> Answer:
        image = None if self.image is None else str(self.image)
        return Answer(self.question_id, self.output or "", self.prompt, image, self.gt_answer, meta=self.other())


class TextOnly(Form):
    """`text` is the answer; what was asked is in the question file alone."""

    by = "scripts that keep the id alone"
    example = '{"question_id": 1, "text": "Yes"}'

    question_id: Identity
    text: str | None

    @classmethod
    def fits(cls, record: dict[str, Any]) -> bool:
        return super().fits(record) and "label" not in record

    def to_answer(self, number: int) -> Answer:
        return Answer(self.question_id, self.text or "", meta=self.other())


class PopesOwn(_Answered):
    """No id: the line's place in the file says which question it answers."""

    by = "POPE"
    example = '{"question": "Is there a dog in the image?", "answer": "Yes"}'

    question: str
    answer: str | None

    @classmethod
    def fits(cls, record: dict[str, Any]) -> bool:
        return super().fits(record) and not {"question_id", "id"} & set(record)

    def to_answer(self, number: int) -> Answer:
        return Answer(number, self.answer or "", self.question, meta={**self.other(), BY_PLACE: True})


class Pai(Form):
    """No id; the gold answer is in the line, as text or as 1 and 0."""

    by = "PAI, VISTA"
    example = '{"query": "Is there a dog in the image?", "label": 1, "ans": "Yes"}'

    query: str
    label: int | str
    ans: str | None

    def to_answer(self, number: int) -> Answer:
        gold = {1: "yes", 0: "no"}.get(self.label, self.label) if isinstance(self.label, int) else self.label
        other = self.other("question", "file_path")
        return Answer(number, self.ans or "", self.query, label=gold, meta={**other, BY_PLACE: True})


ANSWER_FORMS: tuple[type[Form], ...] = (Own, Llava, Damro)


def form_of(record: dict[str, Any], where: str, forms: Sequence[type[Form]], what: str) -> type[Form]:
    """The first form that a record fits. Raises FileFormatError listing the accepted ones and an example line."""
    for form in forms:
        if form.fits(record):
            return form
    known = "; ".join(f"{form.by}: {form.example}" for form in forms)
    lacking = [(form.lacking(record), form) for form in forms]
    lacking = [(names, form) for names, form in lacking if names]
    missing = min(lacking, key=lambda pair: len(pair[0]) / pair[1].size())[0][0] if lacking else "question_id"
    found = ", ".join(map(str, list(record)[:12])) or "no field"
    raise FileFormatError(
        f"{where}: field {missing!r} is missing; found {found}. That is no accepted form of {what}. Accepted, each with an "
        f"example line: {known}"
    )


def read_forms(path: Path, forms: Sequence[type[Form]], what: str) -> list[Answer]:
    """The answers of a file that is of one of some forms."""
    return answers_of(read_records(path), forms, what)


def answers_of(records: Sequence[tuple[str, dict[str, Any]]], forms: Sequence[type[Form]], what: str) -> list[Answer]:
    """The answers of (where, record) pairs, all of the form of the first."""
    where, first = records[0]
    form = form_of(first, where, forms, what)
    return [checked(form, record, where).to_answer(number) for number, (where, record) in enumerate(records, 1)]


def in_order(answers: Sequence[Answer], questions: Sequence[Question], where: str) -> list[Answer]:
    """Answers that carry no ids with the ids of the questions of the same place.

    Raises EvalError when there are more or fewer, or when one says that something else was asked.
    """
    if not any(answer.meta.get(BY_PLACE) for answer in answers):
        return list(answers)
    if len(answers) != len(questions):
        raise EvalError(
            f"{where}: {len(answers)} answers without ids and {len(questions)} questions; they can only be matched by order, "
            "so give the file of exactly the questions that were asked."
        )
    named = []
    for number, (answer, question) in enumerate(zip(answers, questions), 1):
        if not same_text(answer.text, question.text):
            raise EvalError(
                f"{where}, answer {number}: {shown(answer.text)} was answered, and question {question.id} in the same place "
                f"asks {shown(question.text)}; give the questions that were asked, in their order."
            )
        meta = {name: value for name, value in answer.meta.items() if name != BY_PLACE}
        named.append(replace(answer, question_id=question.id, meta=meta))
    return named
