"""AMBER: what a description invents, and yes/no questions about existence, attributes, relations. (arXiv 2311.07397)

Generative half, over the nouns of each description that are in AMBER's vocabulary:

    CHAIR = invented nouns / nouns             Cover = true words mentioned / true words
    Hal   = descriptions with an invented noun / descriptions
    Cog   = typical inventions mentioned / typical inventions annotated       (the authors' code; the paper divides by
                                                                              the nouns of the description)
Discriminative half: accuracy, and precision, recall and F1 of the answer No. AMBER score = (100 - CHAIR + F1) / 2.

Follows the scorer of the authors' repository. Two of its habits are not followed: counters start at 0 (there at 0.001),
and F1 is computed from exact precision and recall (there from rounded ones). Both differ after the printed digits.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, model_validator
from pydantic_core import PydanticCustomError

from lvlm_decode.errors import DependencyError, EvalError, FileFormatError, MissingFileError, UnknownNameError
from lvlm_decode.reading import Identity, Record, checked, read_json, read_records, read_text, repeated, shown

from . import chair, parsers
from .base import Answer, Column, Evaluator, Question, Row, ratio
from .forms import ANSWER_FORMS, Form, read_forms
from .joins import contradicts
from .words import singular, tokenize

PROMPT = "Describe this image."
# AMBER's names of its question types -> (category, subcategory). Relations with gold no carry a shorter name.
TYPES = {
    "discriminative-hallucination": ("existence", None),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation", None),
    "relation": ("relation", None),
}
CATEGORIES = ("all", "existence", "attribute", "state", "number", "action", "relation")
SIMILAR = 0.8
# In AMBER's vocabulary, and hardly ever a noun in a description. Without a tagger they would be two thirds of the false
# finds on recorded descriptions.
_SELDOM_NOUNS = frozenset({"can", "hot"})


# Nouns of a description --------------------------------------------------------------------------------------------


def pattern_nouns(text: str, vocabulary: frozenset[str]) -> list[str]:
    """Words of the vocabulary in a description, singular, without a tagger: verbs and adjectives count too.

    On 502 recorded LLaVA-1.5 descriptions 83 % of the noun lists equal the official ones; CHAIR is 0.12, Cover 0.21,
    Hal 0.80 and Cog 0.08 points higher.
    """
    nouns = []
    for token in tokenize(text.lower()):
        word = token if token in vocabulary else singular(token)
        if word in vocabulary and word not in _SELDOM_NOUNS:
            nouns.append(word)
    return nouns


def nltk_nouns(text: str, vocabulary: frozenset[str]) -> list[str]:
    """The official way: tokens tagged NN*, lemmatised as nouns, in the vocabulary. Case is kept, so "Dog" is none.

    Raises DependencyError without NLTK and its data.
    """
    nltk = chair.load_nltk()
    tagged = nltk.pos_tag(nltk.word_tokenize(text))
    lemmas = [chair.PARSERS["wordnet-pos"].lemma(word) for word, tag in tagged if tag.startswith("NN")]
    return [lemma for lemma in lemmas if lemma in vocabulary]


NOUNS: dict[str, Callable[[str, frozenset[str]], list[str]]] = {"pattern": pattern_nouns, "nltk-pos": nltk_nouns}


@functools.cache
def _spacy_similar() -> Callable[[str, str], bool]:
    """Whether two words are close in the vectors of spaCy's en_core_web_lg, as the official scorer asks."""
    try:
        import spacy

        model = spacy.load("en_core_web_lg")
    except (ImportError, OSError) as error:
        raise DependencyError(
            "AMBER's similarity needs spaCy and its English vectors; run `pip install lvlm-decode[amber]` and "
            "`python -m spacy download en_core_web_lg`, or leave similarity at 'none' (exact match)."
        ) from error
    if not model.vocab.vectors_length:
        raise DependencyError("The installed en_core_web_lg has no word vectors; download it again.")
    token = functools.cache(model)
    return functools.cache(lambda word, other: bool(token(word).similarity(token(other)) > SIMILAR))


def _never_similar(word: str, other: str) -> bool:
    return False


SIMILARITY: dict[str, Callable[[], Callable[[str, str], bool]]] = {
    "none": lambda: _never_similar,
    "spacy": _spacy_similar,
}


# Ground truth ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Knowledge:
    """AMBER's tables. association: word -> words that may stand for it; safe: words never held against a description;
    annotations: item id -> its record (empty for the emoji scenes, whose truth comes with the question).
    """

    association: Mapping[str, tuple[str, ...]]
    safe: frozenset[str]
    annotations: Mapping[str, Mapping[str, Any]]

    @functools.cached_property
    def vocabulary(self) -> frozenset[str]:
        """Words that count at all: every word of the association table."""
        return frozenset(self.association).union(*self.association.values())

    def targets(self, words: Sequence[str]) -> dict[str, int]:
        """word -> position in `words` it stands for. Associated words come first and the first position wins, so a
        word that is annotated twice can be found only once.
        """
        found: dict[str, int] = {}
        for position, word in enumerate(words):
            for associated in self.association.get(word, ()):
                found.setdefault(associated, position)
        for position, word in enumerate(words):
            found.setdefault(word, position)
        return found


@functools.lru_cache(maxsize=4)
def knowledge(folder: str) -> Knowledge:
    """AMBER's `data` folder: annotations.json, relation.json and safe_words.txt, each gzip or not."""
    place = _find(folder, "annotations.json")
    annotations = checked(_Annotations, read_json(place), str(place))
    if twice := repeated(str(item.id) for item in annotations):
        raise FileFormatError(f"{place}: id {twice[0]} is there twice; keep one.")
    place = _find(folder, "relation.json")
    relation = checked(_Relation, read_json(place), str(place))
    safe = read_text(_find(folder, "safe_words.txt")).split()
    items = {str(item.id): item.model_dump() for item in annotations}
    return Knowledge({word: tuple(others) for word, others in relation.items()}, frozenset(safe), items)


class Item(Record):
    """One annotation. truth: the words of a description's image, or the answer yes or no."""

    id: Identity
    # A checker takes literals that are written out, and the table of types is written once.
    type: Literal[("generative", *TYPES)]  # type: ignore[valid-type]
    truth: list[str] | Literal["yes", "no"]
    hallu: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _of_its_type(self) -> Item:
        if (self.type == "generative") != isinstance(self.truth, list):
            raise PydanticCustomError(
                "lacking", "field 'truth' must be a list of words where 'type' is generative, else yes or no"
            )
        return self


_Annotations = TypeAdapter(list[Item])
_Relation = TypeAdapter(dict[str, list[str]])
_Words = TypeAdapter(list[str])


class _Query(Record):
    """A line of a query file."""

    id: Identity
    image: Identity
    query: str


class _Response(Form):
    """`id` is AMBER's; the text in `response`."""

    by = "AMBER, AvisC, DeCo, VDGD"
    example = '{"id": 1, "response": "A dog on a sofa."}'

    id: Identity
    response: str | None
    query: str | None = None
    image: Identity | None = None
    truth: list[str] | str | None = None

    def to_answer(self, number: int) -> Answer:
        image = None if self.image is None else str(self.image)
        return Answer(self.id, self.response or "", self.query or "", image, self.truth)


def _find(folder: str, name: str) -> Path:
    for path in (Path(folder) / name, Path(folder) / f"{name}.gz"):
        if path.is_file():
            return path
    raise MissingFileError(
        f"{folder} has no {name}; put AMBER's data files there, or run `lvlm-decode data get amber`."
    )


def score_nouns(
    nouns: Sequence[str],
    truth: Sequence[str],
    hallu: Sequence[str],
    tables: Knowledge,
    similar: Callable[[str, str], bool] = _never_similar,
) -> dict[str, Any]:
    """What the nouns of one description are worth: {"hallucinated": nouns, "covered": positions in `truth`, "typical":
    positions in `hallu`}.

    A safe word is skipped but stays a noun. A true word, or one associated with it, covers that word. Any other noun
    may hit a typical invention, is then forgiven if similar to a true word, and else is invented.
    """
    true_words, typical_words = tables.targets(truth), tables.targets(hallu)
    covered: set[int] = set()
    typical: set[int] = set()
    hallucinated: list[str] = []
    for noun in nouns:
        if noun in tables.safe:
            continue
        if noun in true_words:
            covered.add(true_words[noun])
            continue
        if noun in typical_words:
            typical.add(typical_words[noun])
        like_typical = next((word for word in typical_words if similar(noun, word)), None)
        if like_typical is not None:
            typical.add(typical_words[like_typical])
        like_true = next((word for word in true_words if similar(noun, word)), None)
        if like_true is None:
            hallucinated.append(noun)
        else:
            covered.add(true_words[like_true])
    return {"hallucinated": hallucinated, "covered": sorted(covered), "typical": sorted(typical)}


# The evaluator -----------------------------------------------------------------------------------------------------


def amber_exact(text: str, label: str) -> parsers.Verdict:
    """The official rule: the answer must be exactly Yes or No, capital first, no full stop."""
    return (text.lower(), True) if text in ("Yes", "No") else ("other", False)


@dataclass(frozen=True)
class Amber(Evaluator):
    """AMBER scores.

    Args:
        data: AMBER's data folder; None for the emoji scenes, whose objects are found by CHAIR's pattern parser.
        parser: How nouns are found: "pattern", which needs no language library, or "nltk-pos", the official one.
        similarity: "none" for exact matches, or "spacy", the official one, which needs en_core_web_lg.
        rule: Rule that reads yes or no: "amber-exact", the official one, or a name of `parsers.RULES`.
    """

    data: str | None = None
    parser: str = "pattern"
    similarity: str = "none"
    rule: str = "amber-exact"

    name: ClassVar[str] = "amber"
    paper: ClassVar[str] = "AMBER (arXiv 2311.07397)"
    max_new_tokens: ClassVar[int] = 512
    columns: ClassVar[tuple[Column, ...]] = (
        Column("chair", "CHAIR", better=-1, paired=True, of=("nouns",)),
        Column("cover", "Cover", better=+1, paired=True, of=("truth_words",)),
        Column("hal", "Hal", better=-1, paired=True, of=("responses",)),
        Column("cog", "Cog", better=-1, paired=True, of=("hallu_words",)),
        Column("responses", "n", "count"),
        Column("accuracy", "Accuracy", better=+1, paired=True, of=("all.n",)),
        Column("precision", "Precision", better=+1),
        Column("recall", "Recall", better=+1),
        Column("f1", "F1", better=+1, paired=True, of=("all.said_no", "all.gold_no")),
        *(Column(f"{name}_f1", f"F1 {name}", better=+1) for name in ("existence", "attribute", "relation")),
        Column("unparsed", "Unparsed", better=-1),
        Column("questions", "n", "count"),
    )

    def __post_init__(self) -> None:
        if self.rule != "amber-exact":
            parsers.rule(self.rule)
        if self.parser not in NOUNS:
            raise UnknownNameError.of("AMBER parser", self.parser, NOUNS)
        if self.similarity not in SIMILARITY:
            raise UnknownNameError.of("similarity", self.similarity, SIMILARITY)

    def tables(self) -> Knowledge:
        """AMBER's tables; for the emoji scenes every object stands for itself only."""
        return knowledge(str(self.data)) if self.data is not None else Knowledge({}, frozenset(), {})

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        """The same two halves about emoji scenes: a description each; existence (all gold no), colour, number and
        relation questions. What usually stands beside the scene's objects are its typical inventions.
        """
        from lvlm_decode_data.texts import YES_OR_NO, CoOccurrence

        rng = random.Random(f"amber {seed}")
        prior = CoOccurrence(scenes)
        described, asked = [], []
        for scene in scenes:
            image = str(scene.image_id)
            typical = [name for name, _ in prior.absent(scene)[:5]]
            meta = {"type": "generative", "hallu": typical}
            described.append(Question(f"{image}/describe", PROMPT, image, sorted(scene.categories), meta=meta))
            for number, (kind, text, label) in enumerate(_scene_asks(scene, typical[:3], rng)):
                asked.append(Question(f"{image}/{number}", text + YES_OR_NO, image, label, meta={"type": kind}))
        return {"generative": described, "discriminative": asked}

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """Questions of AMBER's query files: one file, or the folder data/query."""
        path = Path(path)
        files = [path] if path.is_file() else sorted(path.glob("query_*.json"))
        files = [file for file in files if file.name != "query_all.json"] or files
        if not files:
            raise MissingFileError(f"{path} has no query_*.json; give AMBER's data/query folder or one of its files.")
        found: dict[str, list[Question]] = {"generative": [], "discriminative": []}
        for file in files:
            for where, record in read_records(file):
                line = checked(_Query, record, where)
                label, meta = self._annotation(line.id, where)
                half = "generative" if meta["type"] == "generative" else "discriminative"
                found[half].append(Question(line.id, line.query, str(line.image), label, meta=meta))
        return {half: questions for half, questions in found.items() if questions}

    def read_answers(self, path: Path) -> list[Answer]:
        """Answers as AMBER wants them (`id`, `response`), or JSON lines with `question_id` and `answer`."""
        found = read_forms(path, (_Response, *ANSWER_FORMS), "AMBER answers")
        answers = []
        for answer in found:
            identity = answer.question_id
            # Answers about the emoji scenes carry their type and truth; what else carries some is compared with the annotations.
            if "type" in answer.meta and (self.data is None or str(identity) in self._annotations()):
                answers.append(answer)
            elif str(identity) in self._annotations():
                answers.append(answer if answer.label is not None else self._annotated(answer))
            else:
                answers.append(replace(answer, error=answer.error or "AMBER has no annotation for this id"))
        return answers

    def contradicted(self, answers: Sequence[Answer]) -> tuple[str, ...]:
        """Answers whose label, type or typical words are not those of the annotations."""
        if self.data is None:
            return ()
        found = []
        for answer in answers:
            if str(answer.question_id) in self._annotations():
                label, meta = self._annotation(answer.question_id, f"id {answer.question_id}")
                if contradicts(answer, Question(answer.question_id, "", None, label, meta=meta)):
                    found.append(str(answer.question_id))
        return tuple(found)

    def _annotated(self, answer: Answer) -> Answer:
        """The answer with what the annotations say of its item, whatever it says itself."""
        label, meta = self._annotation(answer.question_id, f"id {answer.question_id}")
        # The first 1,004 items are one description an image; which image the others ask about is in the queries.
        image = f"AMBER_{answer.question_id}.jpg" if meta["type"] == "generative" else None
        return replace(answer, label=label, meta=meta, image=answer.image or image)

    def _annotations(self) -> Mapping[str, Mapping[str, Any]]:
        if self.data is None:
            raise EvalError("AMBER's answers need its annotations; give -o data=FOLDER (lvlm-decode data get amber).")
        return self.tables().annotations

    def _annotation(self, identity: Any, where: str) -> tuple[Any, dict[str, Any]]:
        """(label, meta) of an item."""
        if str(identity) not in self._annotations():
            raise FileFormatError(f"{where}: AMBER has no annotation for id {identity}.")
        item = self._annotations()[str(identity)]
        kind = item["type"]
        return item["truth"], {"type": kind} | ({"hallu": item["hallu"]} if kind == "generative" else {})

    def row(self, answer: Answer) -> Row:
        if self.data is not None and str(answer.question_id) in self._annotations():
            answer = self._annotated(answer)
        kind = answer.meta.get("type")
        if kind == "generative":
            return self._description(answer)
        if not isinstance(kind, str) or kind not in TYPES:
            raise EvalError(f"Question {answer.question_id}: field 'type' must be one of AMBER's, found {shown(kind)}.")
        read = amber_exact if self.rule == "amber-exact" else parsers.rule(self.rule)
        label = answer.label.lower() if isinstance(answer.label, str) else answer.label
        if label not in ("yes", "no"):
            raise EvalError(f"Question {answer.question_id}: the gold answer must be yes or no, found {shown(label)}.")
        verdict, clear = read(answer.answer, label)
        return Row.of(
            answer, parsed=verdict, correct=verdict == label, rule=self.rule, clear=clear, type=kind, text=answer.text
        )

    def _description(self, answer: Answer) -> Row:
        tables = self.tables()
        if self.data is None:
            # Objects of the emoji scenes may be two words; CHAIR's synonym table for them knows which.
            nouns = chair.Chair().table().objects(chair.PARSERS["pattern"].reduce(answer.answer))[1]
        else:
            nouns = NOUNS[self.parser](answer.answer, tables.vocabulary)
        where = f"question {answer.question_id}"
        truth = checked(_Words, answer.label, f"{where}, label")
        hallu = checked(_Words, answer.meta.get("hallu", []), f"{where}, hallu")
        scored = score_nouns(nouns, truth, hallu, tables, SIMILARITY[self.similarity]())
        return Row.of(
            answer,
            parsed=sorted(set(nouns)),
            correct=not scored["hallucinated"],
            rule=f"{self.parser}, similarity {self.similarity}",
            clear=bool(answer.answer.strip()),
            type="generative",
            nouns=nouns,
            hallucinated=scored["hallucinated"],
            covered=[truth[position] for position in scored["covered"]],
            typical=[hallu[position] for position in scored["typical"]],
            truth=truth,
            hallu=hallu,
        )

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        total: Counter[str] = Counter()
        for row in rows:
            if row.evidence["type"] == "generative":
                evidence = row.evidence
                total["responses"] += 1
                total["nouns"] += len(evidence["nouns"])
                total["hallucinated_nouns"] += len(evidence["hallucinated"])
                total["hal_responses"] += bool(evidence["hallucinated"])
                total["covered"] += len(evidence["covered"])
                total["truth_words"] += len(evidence["truth"])
                total["typical"] += len(evidence["typical"])
                total["hallu_words"] += len(evidence["hallu"])
                total["empty"] += not row.clear
                continue
            category, sub = TYPES[row.evidence["type"]]
            total["unclear"] += not row.clear
            for name in ("all", category, sub):
                if name is not None:
                    total[f"{name}.n"] += 1
                    total[f"{name}.correct"] += bool(row.correct)
                    total[f"{name}.gold_no"] += row.label == "no"
                    total[f"{name}.said_no"] += row.parsed == "no"
                    total[f"{name}.right_no"] += row.parsed == "no" == row.label
        return {name: int(count) for name, count in total.items()}

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        rates: dict[str, Any] = {}
        if "responses" in totals:
            rates["chair"] = ratio(totals["hallucinated_nouns"], totals["nouns"])
            rates["cover"] = ratio(totals["covered"], totals["truth_words"])
            rates["hal"] = ratio(totals["hal_responses"], totals["responses"])
            rates["cog"] = ratio(totals["typical"], totals["hallu_words"])
        for name in CATEGORIES:
            if f"{name}.n" in totals:
                prefix = "" if name == "all" else f"{name}_"
                right_no, said_no, gold_no = (totals[f"{name}.{key}"] for key in ("right_no", "said_no", "gold_no"))
                rates[f"{prefix}accuracy"] = ratio(totals[f"{name}.correct"], totals[f"{name}.n"])
                rates[f"{prefix}precision"] = ratio(right_no, said_no)
                rates[f"{prefix}recall"] = ratio(right_no, gold_no)
                rates[f"{prefix}f1"] = ratio(2 * right_no, said_no + gold_no)
        if "all.n" in totals:
            rates["questions"] = totals["all.n"]
            rates["unparsed"] = ratio(totals["unclear"], totals["all.n"])
        if "responses" in totals and "all.n" in totals:
            rates["amber"] = (100 * (1 - rates["chair"]) + 100 * rates["f1"]) / 2
        return rates


def _scene_asks(scene, absent: Sequence[str], rng: random.Random) -> list[tuple[str, str, str]]:
    """(AMBER's type, question, gold) about one emoji scene; every kind but existence asks once truly, once falsely."""
    from lvlm_decode_data import COLOURS
    from lvlm_decode_data.texts import count_question, relations, with_article

    asks = [("discriminative-hallucination", f"Is there {with_article(name)} in the image?", "no") for name in absent]
    painted = [(name, colour) for name in sorted(scene.categories) if (colour := scene.colour(name))]
    if painted:
        name, colour = rng.choice(painted)
        wrong = rng.choice([other for other in COLOURS if other != colour])
        for shown, label in ((colour, "yes"), (wrong, "no")):
            asks.append(("discriminative-attribute-state", f"Is there a {shown} {name} in the image?", label))
    counted = sorted((name, number) for name, number in scene.counts.items() if number <= 3)
    if counted:
        name, number = rng.choice(counted)
        wrong = rng.choice([other for other in (1, 2, 3) if other != number])
        for shown, label in ((number, "yes"), (wrong, "no")):
            asks.append(("discriminative-attribute-number", count_question(name, shown), label))
    related = relations(scene, sorted(scene.categories))
    if related:
        first, word, second = rng.choice(related)
        asks.append(("discriminative-relation", f"Is the {first} {word} the {second}?", "yes"))
        asks.append(("relation", f"Is the {second} {word} the {first}?", "no"))
    return asks
