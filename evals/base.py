"""The contract of an evaluator: questions in, answers in, rows out, numbers from rows.

Generating and scoring are two verbs. A *question* is asked by the runner; its *answer* is one JSON line; a *row* is one
scored answer with its evidence; a *table* is numbers over rows. An evaluator is a frozen dataclass whose fields are its
options (a parsing rule, a vocabulary), in one file, with one line in `lvlm_decode_evals.EVALUATORS`. It imports no torch.

A whole evaluator:

    @dataclass(frozen=True)
    class Existence(Evaluator):
        '''Is the object there? (A paper, arXiv id.)'''

        name = "existence"
        columns = (Column("accuracy", "Accuracy", "percent", better=+1, paired=True),)

        def scene_questions(self, scenes, seed=0):
            return {"all": [Question(id=s.image_id, text="Is there a dog in the image?", image=str(s.image_id),
                                     label="yes" if "dog" in s.categories else "no") for s in scenes]}

        def row(self, answer):
            said = "yes" if answer.answer.lower().startswith("yes") else "no"
            return Row.of(answer, parsed=said, correct=said == answer.label, rule="prefix")

        def tally(self, rows):                        # the rows of ONE cluster
            return {"n": len(rows), "right": sum(row.correct for row in rows)}

        def rates(self, totals):                      # tallies added over clusters; numbers or numpy arrays
            return {"accuracy": ratio(totals["right"], totals["n"])}

Why `tally` and `rates` are apart: every published number here is a function of sums over clusters. A cluster is what is
drawn again in the bootstrap, normally an image; everything that must be counted jointly (the two questions of an MME
image, the set of figures of a HallusionBench question) lies inside one cluster. So the bootstrap adds integer tallies
and calls `rates` once on arrays, and point estimate and interval come from the same code.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lvlm_decode.errors import EvalError, FileFormatError


@dataclass(frozen=True)
class Question:
    """One thing to ask about one image.

    id: unique within its split, string or integer as in the source file. text: what the user says, without image
    placeholder and chat template. image: file name relative to the image folder, or `str(scene.image_id)`; None asks
    without one. label: gold answer, any JSON value (yes/no, list of object names). meta: JSON values the scorer needs.
    cluster: what is resampled together; None means the image.
    """

    id: str | int
    text: str
    image: str | None
    label: Any = None
    cluster: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a model said to a question: one line of answers.jsonl. It carries the question, so scoring needs nothing
    else.

    tokens: number of generated tokens, None when unknown. error: a sentence instead of an answer when the sample could
    not be asked (image missing or corrupt); such answers are counted and named, never scored. checksum: of this line
    and the settings it was made with; None for answers that no run of this project wrote.
    """

    question_id: str | int
    answer: str
    text: str = ""
    image: str | None = None
    label: Any = None
    cluster: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    error: str | None = None
    checksum: str | None = None

    @classmethod
    def to(cls, question: Question, answer: str, tokens: int | None = None, error: str | None = None) -> Answer:
        return cls(
            question_id=question.id,
            answer=answer,
            text=question.text,
            image=question.image,
            label=question.label,
            cluster=question.cluster,
            meta=question.meta,
            tokens=tokens,
            error=error,
        )

    def record(self) -> dict[str, Any]:
        """The JSON object of this answer; fields at their default are left out."""
        known = {"question_id": self.question_id, "image": self.image, "text": self.text, "label": self.label}
        known |= {"answer": self.answer, "tokens": self.tokens}
        optional = {"cluster": self.cluster, "meta": dict(self.meta), "error": self.error, "checksum": self.checksum}
        return known | {name: value for name, value in optional.items() if value}

    def sealed(self, key: str) -> Answer:
        """This answer with its checksum. key: what identifies the settings it was made with."""
        return replace(self, checksum=self._digest(key))

    def intact(self, key: str) -> bool:
        """Whether the line is as a run with these settings wrote it; without a checksum nobody can tell, so it is not."""
        return self.checksum == self._digest(key)

    def _digest(self, key: str) -> str:
        record = {name: value for name, value in self.record().items() if name != "checksum"}
        return hashlib.sha256(f"{key}\n{json.dumps(record, sort_keys=True)}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """One scored answer and its evidence, so that any cell of a table can be traced to text.

    parsed: what the rule read in the answer (JSON value). clear: False when the rule found nothing to read and fell
    back to its default. correct: the yes/no verdict McNemar's test compares; None where there is none. rule: the name
    of the rule. evidence: JSON values that `tally` needs or a reader wants (object lists, counts).
    """

    id: str
    cluster: str
    answer: str
    parsed: Any
    correct: bool | None
    rule: str
    label: Any = None
    clear: bool = True
    tokens: int | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: Answer, *, parsed: Any, correct: bool | None, rule: str, clear: bool = True, **evidence) -> Row:
        """A row about `answer`; the cluster is the answer's own, else its image, else the question itself."""
        cluster = answer.cluster if answer.cluster is not None else answer.image
        return cls(
            id=str(answer.question_id),
            cluster=str(cluster if cluster is not None else answer.question_id),
            answer=answer.answer,
            parsed=parsed,
            correct=correct,
            rule=rule,
            label=answer.label,
            clear=clear,
            tokens=answer.tokens,
            evidence=evidence,
        )

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Column:
    """A column of a table: `key` of the summary, its title, how it prints, which way is better, whether it is compared.

    kind: "percent" (a rate in 0..1, printed times 100), "number" (one decimal), "count" (integer).
    better: +1 higher, -1 lower, 0 neither (yes-ratio, length). paired: differences between methods get an interval.
    of: the counts of a tally whose sum the rate is a share of, where clusters may lack them; by default every cluster
    counts. top: the largest possible value of a "number"; None where there is none.
    """

    key: str
    title: str
    kind: str = "percent"
    better: int = 0
    paired: bool = False
    of: tuple[str, ...] = ()
    top: float | None = None

    @property
    def scale(self) -> float | None:
        """The largest possible value of the rate; None where there is none."""
        return 1.0 if self.kind == "percent" else self.top


# One and several of what is drawn again where questions are about two images together.
PAIRS_OF_IMAGES = ("pair of images", "pairs of images")


@dataclass(frozen=True)
class Evaluator(ABC):
    """Base of all evaluators. Subclasses are frozen dataclasses; see the module's docstring for a whole one."""

    name: ClassVar[str]
    # The paper and its id, shown by the command line.
    paper: ClassVar[str] = ""
    # How many new tokens an answer may take unless the caller says otherwise.
    max_new_tokens: ClassVar[int] = 64
    # Columns whose key a summary lacks are left out of its table (AMBER's two halves have different ones).
    columns: ClassVar[tuple[Column, ...]] = ()
    # Keys of the horizontal and vertical axis of the picture; None draws the compared columns side by side.
    axes: ClassVar[tuple[str, str] | None] = None
    # Further pairs of axes, each a panel beside the first; those whose keys a run lacks are left out.
    more_axes: ClassVar[tuple[tuple[str, str], ...]] = ()
    # Keys of the columns that say what a model can do rather than what it makes up; empty for most.
    ability: ClassVar[tuple[str, ...]] = ()
    # Rates that are compared once more on rows cut to equal length (`equal_length`); empty where length plays no part.
    equal_columns: ClassVar[tuple[Column, ...]] = ()
    # What McNemar's test compares, as a table's footnote says it.
    verdict: ClassVar[str] = "answer correct"

    @property
    def hallucination(self) -> tuple[str, ...]:
        """Key of the column that is this benchmark's figure of hallucination: the first compared one, none for ability."""
        return () if self.ability else tuple(c.key for c in self.columns if c.paired and c.better)[:1]

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        """Split name -> questions about emoji scenes, by the code that builds the real benchmark."""
        raise EvalError(f"{self.name} has no questions about emoji scenes; give --questions FILE and --images FOLDER.")

    def scene_images(self, scenes: Sequence) -> Any:
        """The images that `scene_questions` name: those of the scenes, unless a benchmark makes others of them."""
        from .loaders import scene_images

        return scene_images(scenes)

    def shown(self, question: Question, image: Any) -> Any:
        """The picture that the model sees with a question: `image` itself, unless a benchmark draws on it."""
        return image

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """Split name -> questions of the benchmark's own files."""
        raise EvalError(f"{self.name} has no question files; leave --questions out.")

    def read_answers(self, path: Path) -> list[Answer]:
        """Answers made elsewhere. The default reads JSON lines with `question_id`, `answer` and optional other
        fields.
        """
        from .answers import read_answers

        return read_answers(path)

    def listed(self, splits: Mapping[str, Sequence[Question]], answers: Sequence[Answer]) -> list[Question]:
        """The questions of all splits, as a file with `answers` to them is joined with them."""
        return [question for part in splits.values() for question in part]

    def splits(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """Split -> rows, where one file holds answers to several that are scored apart; empty where it does not."""
        return {}

    def matched(self, answers: Sequence[Answer], questions: Sequence[Question], where: str) -> list[Answer]:
        """The answers with the ids of their questions, where a file has them under other ids or none; by default all have.

        where: the file of the answers, for messages. Raises EvalError for answers that belong to no question.
        """
        return list(answers)

    def contradicted(self, answers: Sequence[Answer]) -> tuple[str, ...]:
        """Ids of answers whose own label differs from what this evaluator's files say, which it scores by."""
        return ()

    def ready(self, questions: Sequence[Question]) -> None:
        """Raise EvalError where answers to these questions could not be scored, before a model is asked anything."""
        self.rows(Answer.to(question, "Yes.") for question in questions)

    @abstractmethod
    def row(self, answer: Answer) -> Row:
        """Score one answer; pure."""

    def rows(self, answers: Iterable[Answer]) -> list[Row]:
        """Score all answers that are answers; those with `error` are left to `answers.audit`."""
        return [self.row(answer) for answer in answers if answer.error is None]

    @abstractmethod
    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        """Counts over the rows of one cluster. Same keys for every cluster; added over clusters."""

    @abstractmethod
    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        """Rates from added tallies; values are integers or numpy arrays (one entry per bootstrap replicate)."""

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Counts and rates over all rows: flat, JSON-able; what tables read."""
        keys, counts = tallies(self, rows)
        totals = {key: int(total) for key, total in zip(keys, counts[1].sum(axis=0))}
        return totals | {name: float(value) for name, value in self.rates(totals).items()}

    def report(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What `lvlm-decode score --json` prints: the summary, or more where a benchmark has nested results."""
        return self.summary(rows)

    def equal_length(self, runs: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """The rows of several runs, those of one question cut to the same length; only with `equal_columns`."""
        raise EvalError(f"{self.name} compares nothing at equal length.")

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        """Sentences that belong below a table of these rows, besides what every table says."""
        return []

    def clustered(self, rows: Sequence[Row]) -> tuple[str, str]:
        """What the clusters of these rows are, one and several, as the notes of a table call them."""
        return "image", "images"

    def doubts(self, rows: Sequence[Row]) -> list[str]:
        """Sentences that say why the figures of these rows are not the benchmark's (a part is missing, labels are altered).
        Whatever scores tells them beside what is wrong with the answers.
        """
        return []

    def options(self) -> dict[str, Any]:
        """The options of this evaluator, for settings beside the scores."""
        return {option.name: getattr(self, option.name) for option in fields(self)}


def tallies(evaluator: Evaluator, rows: Sequence[Row]) -> tuple[list[str], tuple[list[str], np.ndarray]]:
    """Count names and (cluster names, integer counts of shape (clusters, names)), clusters in first-seen order."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.cluster, []).append(row)
    counted = [evaluator.tally(group) for group in grouped.values()]
    keys = list(dict.fromkeys(key for tally in counted for key in tally)) or list(evaluator.tally([]))
    counts = np.array([[tally.get(key, 0) for key in keys] for tally in counted], dtype=np.int64)
    return keys, (list(grouped), counts.reshape(len(counted), len(keys)))


def ratio(part: Any, whole: Any) -> Any:
    """part / whole, 0 where whole is 0; integers or numpy arrays. 0 follows lmms-eval, not the scripts that crash."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    quotient = np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole != 0)
    return quotient if quotient.ndim else float(quotient)


def share(name: str, part: Any, whole: Any) -> dict[str, Any]:
    """{name: part / whole}, or nothing where there is nothing to be a share of: a figure that nothing was asked for is
    missing, because 0 would read as the best or the worst.
    """
    return {name: ratio(part, whole)} if np.any(whole) else {}


def confusion(rows: Iterable[Row]) -> dict[str, int]:
    """tp, fp, tn and fn of yes/no rows, positive = yes; a verdict that is neither counts in none of them."""
    kinds = {("yes", "yes"): "tp", ("yes", "no"): "fp", ("no", "no"): "tn", ("no", "yes"): "fn"}
    counts = dict.fromkeys(kinds.values(), 0)
    for row in rows:
        if kind := kinds.get((row.parsed, row.label)):
            counts[kind] += 1
    return counts


def need(record: Mapping[str, Any], name: str, where: str) -> Any:
    """A field of a JSON object, or a sentence that names file, line and field."""
    if name not in record:
        raise FileFormatError(f"{where}: field {name!r} is missing; found {', '.join(map(str, record)) or 'no field'}.")
    return record[name]
