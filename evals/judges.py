"""Benchmarks that a language model grades: MMHal-Bench and VaLLu. Prompts out, ratings in.

The judge is never required to be at hand: `write_prompts` writes what to ask, any OpenAI-compatible endpoint or a
person answers, and a file of recorded replies is scored. Given the address of an endpoint instead, the replies are
fetched, recorded and not asked for again. Scores depend on the judge, so its name belongs to every number.

The prompts here are this project's wording of what the authors ask for; `template` takes the authors' own.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lvlm_decode.errors import EvalError, FileFormatError, MissingFileError
from lvlm_decode.reading import Identity, Record, checked, read_bytes, read_records, read_text, shown

from .answers import line_of, write_whole
from .base import Answer, Column, Evaluator, Question, Row, need, ratio
from .forms import ANSWER_FORMS, Form, Line, Own, read_forms

RETRIES = 3
# Where the key of an endpoint is looked for; it is sent to the endpoint and nowhere else.
KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Prompt:
    """What the judge is asked about one answer; image: file to show, None for a judge that only reads."""

    id: str
    text: str
    image: Path | None = None

    def record(self) -> dict[str, Any]:
        known = {"id": self.id, "prompt": self.text}
        return known if self.image is None else known | {"image": str(self.image)}


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Prompts as JSON lines with `id`, `prompt` and, where there is one, `image`."""
    write_whole(path, b"".join(line_of(prompt.record()) for prompt in prompts))


def read_replies(path: Path) -> dict[str, str]:
    """Recorded replies: JSON lines with `id` and `reply`. Raises FileFormatError for an id that occurs twice."""
    replies: dict[str, str] = {}
    for where, record in read_records(path):
        line = checked(_Reply, record, where)
        if str(line.id) in replies:
            raise FileFormatError(f"{where}: a second reply for id {line.id}; keep one.")
        replies[str(line.id)] = line.reply or ""
    return replies


class _Reply(Record):
    """What a judge said about one answer."""

    id: Identity
    reply: str | None


class _Recorded(_Reply):
    """A reply that an endpoint gave to a prompt."""

    prompt_sha256: str


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint. url: up to and without `/chat/completions`. timeout and pause in seconds."""

    url: str
    model: str
    temperature: float = 0.0
    timeout: float = 120.0
    pause: float = 2.0

    def __call__(self, prompt: Prompt) -> str:
        """The judge's reply. Refused and failing requests are tried again; then EvalError says what the server said."""
        content: Any = prompt.text
        if prompt.image is not None:
            content = [
                {"type": "text", "text": prompt.text},
                {"type": "image_url", "image_url": {"url": _data_url(prompt.image)}},
            ]
        body = {
            "model": self.model,
            "temperature": self.temperature,
            "messages": [{"role": "user", "content": content}],
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for attempt in range(RETRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return _content(response.read(), address)
            except urllib.error.HTTPError as error:
                said = error.read(300).decode("utf-8", "replace")
                trouble = f"{error.code} {error.reason}: {said}"
                if error.code < 500 and error.code != 429:
                    break
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                trouble = str(getattr(error, "reason", error))
            if attempt + 1 < RETRIES:
                time.sleep(self.pause * 2**attempt)
        raise EvalError(f"The judge at {address} did not answer prompt {prompt.id} ({trouble}).")


def _content(body: bytes, address: str) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise EvalError(f"{address} answered in no form of chat completion ({body[:200]!r}).") from error
    return content or ""


def _data_url(image: Path) -> str:
    kind = "png" if image.suffix.lower() == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(read_bytes(image)).decode()}"


def ask(prompts: Sequence[Prompt], judge: Callable[[Prompt], str], record: Path) -> dict[str, str]:
    """Replies to all prompts, by id. New ones are added to `record` at once; what is there is not asked again.

    A recorded reply counts only for the very prompt it answered, so another method's answers are judged anew.
    """
    known: dict[tuple[str, str], str] = {}
    if record.exists() and record.stat().st_size:
        for where, found in read_records(record):
            recorded = checked(_Recorded, found, where)
            known[str(recorded.id), recorded.prompt_sha256] = recorded.reply or ""
    replies: dict[str, str] = {}
    for prompt in prompts:
        digest = hashlib.sha256(prompt.text.encode()).hexdigest()
        if (prompt.id, digest) not in known:
            known[prompt.id, digest] = judge(prompt)
            with open(record, "ab") as file:
                line = {"id": prompt.id, "prompt_sha256": digest, "reply": known[prompt.id, digest]}
                file.write(line_of(line))
        replies[prompt.id] = known[prompt.id, digest]
    return replies


# Reading ratings ---------------------------------------------------------------------------------------------------


def mmhal_rating(reply: str) -> int | None:
    """The rating 0 to 6 in "Rating: k", any case; None unless exactly one value is named."""
    found = {value for value in range(7) if f"rating: {value}" in reply.lower()}
    return found.pop() if len(found) == 1 else None


ASPECTS = ("helpfulness", "clarity", "correctness", "depth", "engagement")


def vallu_ratings(reply: str) -> dict[str, int] | None:
    """Aspect -> rating 1 to 5 from a reply in JSON, bare or fenced, scores bare or as {"reason", "score"}.

    The authors' format is written with single quotes, and judges follow it, so that is read as well. None unless every
    aspect has a rating from 1 to 5.
    """
    start, end = reply.find("{"), reply.rfind("}")
    if start < 0 or end < start:
        return None
    ratings = _object(reply[start : end + 1])
    if ratings is None:
        return None
    lowered = {name.lower(): value for name, value in ratings.items() if isinstance(name, str)}
    found: dict[str, int] = {}
    for aspect in ASPECTS:
        value = lowered.get(aspect)
        if isinstance(value, Mapping):
            value = value.get("score")
        # Python writes no integer of thousands of digits.
        written = str(value) if isinstance(value, str | float) or value in range(1, 6) else ""
        number = re.fullmatch(r"\s*([1-5])(?:\.0)?(?:\s*/\s*5)?\s*", written)
        if number is None:
            return None
        found[aspect] = int(number[1])
    return found


def _object(text: str) -> dict[Any, Any] | None:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None


# Evaluators --------------------------------------------------------------------------------------------------------


def _reply_to(answer: Answer) -> str:
    reply = need(answer.meta, "reply", f"answer {answer.question_id}")
    if not isinstance(reply, str):
        raise FileFormatError(f"answer {answer.question_id}: field 'reply' must be text, found {shown(reply)}.")
    return reply


@dataclass(frozen=True)
class Judged(Evaluator):
    """Base of the two.

    Args:
        judge: File of recorded replies, or the http address of an endpoint.
        judge_model: Name of the model that an endpoint is asked for.
        temperature: Sampling temperature of an endpoint.
        replies: File in which the replies of an endpoint are kept.
        template: File with the prompt to use instead of ours.
    """

    judge: str | None = None
    judge_model: str = "gpt-4"
    temperature: float = 0.0
    replies: str | None = None
    template: str | None = None

    @abstractmethod
    def prompt(self, answer: Answer) -> Prompt:
        """What the judge is asked about an answer."""

    def ready(self, questions: Sequence[Question]) -> None:
        """Judged answers need nothing but a prompt for the judge; the judge comes when there are answers."""
        self.prompts(Answer.to(question, "Yes.") for question in questions)

    def prompts(self, answers: Iterable[Answer]) -> list[Prompt]:
        """What the judge is asked about all answers that are answers."""
        return [self.prompt(answer) for answer in answers if answer.error is None]

    def rows(self, answers: Iterable[Answer]) -> list[Row]:
        """Rows with the judge's replies. Raises EvalError without a judge, or when a recorded file lacks a reply."""
        answers = [answer for answer in answers if answer.error is None]
        if all("reply" in answer.meta for answer in answers):
            return [self.row(answer) for answer in answers]
        replies = self._replies(self.prompts(answers))
        lacking = [str(answer.question_id) for answer in answers if str(answer.question_id) not in replies]
        if lacking:
            raise EvalError(
                f"{self.judge} has no reply for {len(lacking)} answers (the first is {lacking[0]}); ask the judge "
                "about them too."
            )
        judged = (
            replace(answer, meta={**answer.meta, "reply": replies[str(answer.question_id)]}) for answer in answers
        )
        return [self.row(answer) for answer in judged]

    def _replies(self, prompts: Sequence[Prompt]) -> dict[str, str]:
        if self.judge is None:
            raise EvalError(
                f"{self.name} is graded by a judge: `lvlm-decode data prompts {self.name} ANSWERS OUT` writes what to ask; "
                f"then `lvlm-decode score {self.name} ANSWERS -o judge=REPLIES` (lines of id and reply), or judge=URL of "
                "an OpenAI-compatible endpoint."
            )
        if not self.judge.startswith(("http://", "https://")):
            return read_replies(Path(self.judge))
        if self.replies is None:
            raise EvalError("An endpoint's replies must be kept; name a file for them (option replies).")
        return ask(prompts, Endpoint(self.judge, self.judge_model, self.temperature), Path(self.replies))

    def _fill(self, default: str, values: Mapping[str, str]) -> str:
        """The template with its fields filled, by name or, as in the authors' own, by order."""
        if self.template is None:
            return default.format(**values)
        text = read_text(Path(self.template))
        try:
            return text.format(*values.values(), **values)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"{self.template}: fields must be {', '.join(f'{{{name}}}' for name in values)} or {{}} in that order; "
                f"double all other braces ({error!r})."
            ) from error


MMHAL_TYPES = (
    "attribute",
    "adversarial",
    "comparison",
    "counting",
    "relation",
    "environment",
    "holistic",
    "other",
)
MMHAL_PROMPT = """You grade what an assistant said about an image that you cannot see. Judge two things: does the answer
say anything that contradicts the image or the reference (a hallucination), and how informative is it?

The image contains: {contents}
Question: {question}
Reference answer by a person: {gold}
Answer to grade: {answer}

Scale. Without hallucination: 6 very informative, with analysis; 5 very informative; 4 somewhat informative; 3 not
informative. With hallucination: 2 very informative; 1 somewhat informative; 0 not informative.
An answer may be right beyond what is listed, as long as nothing listed contradicts it.

Explain briefly, then end with one line: Rating: N"""


@dataclass(frozen=True)
class MMHal(Judged):
    """MMHal-Bench: 96 questions of eight types, graded 0 to 6 (Sun et al., 2023; arXiv 2309.14525).

    score is the mean rating, hallucination the share of ratings below 3. A reply that does not name exactly one rating
    counts as 0, as in the authors' script; such replies are the `unrated`.
    """

    name: ClassVar[str] = "mmhal"
    paper: ClassVar[str] = "MMHal-Bench (arXiv 2309.14525)"
    max_new_tokens: ClassVar[int] = 512
    verdict: ClassVar[str] = "rated 3 or more"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("score", "Score", "number", better=+1, paired=True, top=6),
        Column("hallucination", "Hallucination", better=-1, paired=True),
        Column("unrated", "Unrated", "count", better=-1),
        Column("n", "n", "count"),
    )

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """The 96 questions of MMHal's response file."""
        lines = enumerate(read_records(path))
        return {"all": [checked(_MMHalLine, record, where).question_of(n) for n, (where, record) in lines]}

    def read_answers(self, path: Path) -> list[Answer]:
        """Answers in MMHal's response file, its questions with `model_answer` filled in; or JSON lines of a run."""
        return read_forms(path, (_MMHalAnswer, *ANSWER_FORMS), "MMHal answers")

    def prompt(self, answer: Answer) -> Prompt:
        values = {
            "contents": str(answer.meta.get("contents", "")),
            "question": answer.text,
            "gold": str(answer.label),
            "answer": answer.answer,
        }
        return Prompt(str(answer.question_id), self._fill(MMHAL_PROMPT, values))

    def row(self, answer: Answer) -> Row:
        reply = _reply_to(answer)
        rating = mmhal_rating(reply)
        return Row.of(
            answer,
            parsed=rating or 0,
            correct=(rating or 0) >= 3,
            rule="rating",
            clear=rating is not None,
            type=str(answer.meta.get("type", "other")),
            reply=reply,
        )

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        total: Counter[str] = Counter({"n": len(rows)})
        for row in rows:
            total["rating"] += row.parsed
            total["hallucinated"] += not row.correct
            total["unrated"] += not row.clear
            total[f"{row.evidence['type']}.n"] += 1
            total[f"{row.evidence['type']}.rating"] += row.parsed
        return {name: int(count) for name, count in total.items()}

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        kinds = [name.removesuffix(".rating") for name in totals if name.endswith(".rating")]
        means = {kind: ratio(totals[f"{kind}.rating"], totals[f"{kind}.n"]) for kind in kinds}
        score = ratio(totals.get("rating", 0), totals["n"])
        return {"score": score, "hallucination": ratio(totals.get("hallucinated", 0), totals["n"]), **means}


class _MMHalLine(Line):
    """A question of MMHal's response file; its type goes by place (eight in turn) where the file does not say."""

    question: str
    gt_answer: str
    image_src: str | None = None
    image_id: Identity | None = None
    question_type: str | None = None
    image_content: str | list[str] | None = None

    def question_of(self, number: int) -> Question:
        image = self.image_src or self.image_id
        contents = self.image_content or []
        meta = {
            "type": self.question_type or MMHAL_TYPES[number % 8],
            "contents": contents if isinstance(contents, str) else ", ".join(contents),
        }
        name = str(number if image is None else image).rsplit("/", 1)[-1]
        return Question(number, self.question, name, self.gt_answer, meta=meta)


class _MMHalAnswer(_MMHalLine, Form):
    """The same with the answer filled in."""

    by = "MMHal-Bench"
    example = '{"question": "Is it?", "gt_answer": "Yes.", "image_src": "a.jpg", "model_answer": "Yes, it is."}'

    model_answer: str | None

    def to_answer(self, number: int) -> Answer:
        return Answer.to(self.question_of(number - 1), self.model_answer or "")


VALLU_PROMPT = """You are an impartial judge of what an assistant said about the image.

Question: {question}
Answer to grade: {answer}

Rate each aspect from 1 (worst) to 5 (best): helpfulness (does it serve the person who asked?), clarity (is it well
ordered and easy to follow?), correctness (does everything agree with the image and the question?), depth (is it
detailed and thorough?), engagement (does it read naturally?). Also list the phrases that are not true of the image.

Reply with JSON only: for each aspect an object with "reason" and "score", and "hallucinated_phrases" as a list."""


@dataclass(frozen=True)
class VaLLu(Judged):
    """VaLLu: answers graded by a judge that sees the image, 1 to 5 in five aspects (VDGD; arXiv 2405.15683).

    The authors sample from gpt-4-turbo at temperature 0.7, so their numbers cannot be repeated exactly. A reply without all
    five ratings is `unrated` and left out of the means.

    Args:
        images: Folder of the images that the judge is shown; None for a judge that has them.
    """

    images: str | None = None

    name: ClassVar[str] = "vallu"
    paper: ClassVar[str] = "VaLLu (arXiv 2405.15683)"
    max_new_tokens: ClassVar[int] = 512
    verdict: ClassVar[str] = "correctness rated 4 or more"
    columns: ClassVar[tuple[Column, ...]] = (
        *(Column(aspect, aspect.capitalize(), "number", better=+1, paired=True, top=5) for aspect in ASPECTS),
        Column("unrated", "Unrated", "count", better=-1),
        Column("n", "n", "count"),
    )

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """Questions as JSON lines with `question_id`, `prompt`, `image`."""
        return {"all": [checked(_VaLLuLine, record, where).to_question() for where, record in read_records(path)]}

    def read_answers(self, path: Path) -> list[Answer]:
        """Answers as the authors' scripts write them: the questions with the answer in `text`; or JSON lines of a run."""
        return read_forms(path, (Own, _VaLLuAnswer), "VaLLu answers")

    def prompt(self, answer: Answer) -> Prompt:
        image = None
        if self.images is not None:
            image = Path(self.images) / str(answer.image)
            if not image.is_file():
                raise MissingFileError(f"Image {image} of answer {answer.question_id} is not there; put it there.")
        text = self._fill(VALLU_PROMPT, {"question": answer.text, "answer": answer.answer})
        return Prompt(str(answer.question_id), text, image)

    def row(self, answer: Answer) -> Row:
        reply = _reply_to(answer)
        ratings = vallu_ratings(reply)
        return Row.of(
            answer,
            parsed=ratings,
            correct=None if ratings is None else ratings["correctness"] >= 4,
            rule="ratings",
            clear=ratings is not None,
            reply=reply,
        )

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        rated = [row.parsed for row in rows if row.clear]
        sums = {f"{aspect}.sum": sum(ratings[aspect] for ratings in rated) for aspect in ASPECTS}
        return {"n": len(rows), "rated": len(rated), "unrated": len(rows) - len(rated), **sums}

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        return {aspect: ratio(totals[f"{aspect}.sum"], totals["rated"]) for aspect in ASPECTS}


class _VaLLuLine(Line):
    """A question."""

    question_id: Identity
    prompt: str
    image: Identity

    def to_question(self) -> Question:
        return Question(self.question_id, self.prompt.replace("<image>", "").strip(), str(self.image))


class _VaLLuAnswer(_VaLLuLine, Form):
    """The same with the answer."""

    by = "VDGD"
    example = '{"question_id": 1, "prompt": "<image> What is it?", "image": "a.jpg", "text": "A dog."}'

    text: str | None

    def to_answer(self, number: int) -> Answer:
        return Answer.to(self.to_question(), self.text or "")
