"""CHAIR: which objects of a caption are not in the image? (Rohrbach et al., EMNLP 2018; arXiv 1809.02156)

    CHAIRs = captions that mention an absent object / captions
    CHAIRi = mentions of absent objects / mentions of objects        (repetitions count; micro, not a mean of ratios)

Papers print CHAIR from two different word parsers, so the parser is an option and its name goes with every score:
`pattern` (the original and the POPE paper; here without a language library) and `wordnet-pos` (OPERA and its followers;
NLTK, an extra). On 26,000 recorded captions they differ by up to 3 points of CHAIRs.

What an image contains is the union of its annotated instances and of the objects that the same parser finds in its
reference captions: `build_objects` makes that table from COCO's own files. The synonym table decides what counts as a
mention. The official one belongs to its authors and is read from a user's file; for the emoji scenes the project has
its own.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from lvlm_decode.errors import DependencyError, EvalError, FileFormatError, UnknownNameError
from lvlm_decode.reading import (
    Count,
    Identity,
    Record,
    checked,
    nearest,
    parse_json,
    read_json,
    read_records,
    read_text,
    repeated,
    shown,
)

from .base import Answer, Column, Evaluator, Question, Row, ratio
from .forms import Form, Own, answers_of
from .words import singular, tokenize

PROMPT = "Please describe this image in detail."
# Tokens that captions are cut to, besides being counted whole.
CUTS = (32, 64, 128)
_CUT_COUNTS = ("hallucinated_captions", "hallucinated_words", "object_words", "recalled")

# Word pairs that the published scorer reads as one word before it looks for objects, besides the ages of animals.
# "home plate" and "train track" are no objects: merging them keeps "plate" and "train" from counting. "wine glas" is
# what the pattern parser makes of "wine glass". Kept as they are, because every CHAIR number depends on them.
_NAMES = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, "
    "stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, "
    "hot dog, cell phone, mobile phone, teddy bear, hair drier, potted plant, laptop computer, stove top oven, "
    "home plate, train track"
)
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
DOUBLE_WORDS: dict[str, str] = {
    **{name: name for name in _NAMES.split(", ")},
    **{f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}


# Parsers: caption -> reduced words ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parser:
    """How a caption becomes words. reduce: the words of a caption, lower-cased, reduced; lemma: one noun alone."""

    name: str
    reduce: Callable[[str], list[str]]
    lemma: Callable[[str], str]


def _pattern_words(caption: str) -> list[str]:
    return [singular(token) for token in tokenize(caption.lower())]


# Package -> where it may lie. The final slash matters: NLTK looks into zip files for folders only. The downloader leaves
# wordnet.zip packed.
_NLTK_DATA = {
    "punkt_tab": ("tokenizers/punkt_tab/english/",),
    "averaged_perceptron_tagger_eng": ("taggers/averaged_perceptron_tagger_eng/",),
    "wordnet": ("corpora/wordnet.zip/wordnet/", "corpora/wordnet/"),
}


@functools.cache
def load_nltk() -> Any:
    """NLTK with the data that tagging and lemmatising need.

    Raises DependencyError when NLTK or its data is not installed; the message names what is missing and where to
    put it.
    """
    try:
        import nltk
    except ImportError as error:
        raise DependencyError(
            "This parser needs NLTK, which is not installed; run `pip install lvlm-decode[chair]`, or use the parser "
            "'pattern', which needs nothing."
        ) from error
    missing = [name for name, places in _NLTK_DATA.items() if not any(_nltk_has(nltk, place) for place in places)]
    if missing:
        raise DependencyError(
            f"NLTK is installed but its data is not: {', '.join(missing)} missing. Run `python -m nltk.downloader "
            f"{' '.join(missing)}`; without a network, unzip them from github.com/nltk/nltk_data into "
            f"{nltk.data.path[0] if nltk.data.path else '~/nltk_data'} (tokenizers/, taggers/, corpora/). The parser "
            "'pattern' needs no data."
        )
    return nltk


def _nltk_has(nltk: Any, place: str) -> bool:
    try:
        nltk.data.find(place)
    except LookupError:
        return False
    return True


# First letter of a Penn tag -> WordNet part of speech; everything else is lemmatised as a noun. This is why "seated" is
# a chair and "skiing" a pair of skis for this parser.
_WORDNET_POS = {"J": "a", "V": "v", "N": "n", "R": "r"}


def _wordnet_words(caption: str) -> list[str]:
    nltk = load_nltk()
    lemmatize = _lemmatizer()
    tagged = nltk.pos_tag(nltk.word_tokenize(caption.lower()))
    return [lemmatize(word, _WORDNET_POS.get(tag[:1], "n")) for word, tag in tagged]


@functools.cache
def _lemmatizer() -> Callable[[str, str], str]:
    load_nltk()
    from nltk.stem import WordNetLemmatizer

    return functools.lru_cache(maxsize=65536)(WordNetLemmatizer().lemmatize)


PARSERS: dict[str, Parser] = {
    "pattern": Parser("pattern", _pattern_words, singular),
    "wordnet-pos": Parser("wordnet-pos", _wordnet_words, lambda word: _lemmatizer()(word, "n")),
}


def parser_named(name: str) -> Parser:
    """A parser by name."""
    if name not in PARSERS:
        raise UnknownNameError.of("CHAIR parser", name, PARSERS)
    return PARSERS[name]


# Vocabulary: reduced words -> objects ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """category: reduced word (or merged pair) -> object name. pairs: two reduced words -> the one word they become."""

    category: Mapping[str, str]
    pairs: Mapping[str, str]

    @classmethod
    def of(cls, synonyms: Mapping[str, Sequence[str]], pairs: Mapping[str, str] | None = None) -> Vocabulary:
        """From object name -> words, taken as they stand: words that no reduced caption contains never match.

        The official table has such words (" motor bike" with a leading blank, "iPhone"), and published numbers depend
        on them. `pairs` defaults to the published scorer's.
        """
        category: dict[str, str] = {}
        for name, words in synonyms.items():
            for word in words:
                if category.setdefault(word, name) != name:
                    raise EvalError(f"Synonym {word!r} of {name!r} also means {category[word]!r}; give each word once.")
        return cls(category, DOUBLE_WORDS if pairs is None else dict(pairs))

    @classmethod
    def reduced(cls, synonyms: Mapping[str, Sequence[str]], parser: Parser) -> Vocabulary:
        """From object name -> words, every one reduced as `parser` will reduce a caption, so that none is unreachable.

        For tables of one's own. Two words in a row become a pair.
        """
        category: dict[str, str] = {}
        pairs = {pair: single for pair, single in DOUBLE_WORDS.items() if pair.split()[0] in ("baby", "adult")}
        for name, words in synonyms.items():
            for word in words:
                parts = word.lower().split()
                if len(parts) > 2:
                    raise EvalError(f"Synonym {word!r} of {name!r} has {len(parts)} words; at most two can be matched.")
                key = " ".join(map(parser.lemma, parts))
                if category.setdefault(key, name) != name:
                    raise EvalError(f"Synonym {word!r} of {name!r} also means {category[key]!r}; give each word once.")
                if len(parts) == 2:
                    pairs[key] = key
        return cls(category, pairs)

    def objects(self, words: Sequence[str]) -> tuple[list[str], list[str], int]:
        """Objects mentioned by reduced words: (words, object names, both in order with repetitions; tokens).

        `tokens` counts words and punctuation after pairs are merged, before the toilet rule: the length that OPERA
        prints.
        """
        merged = self._merge(words)
        tokens = len(merged)
        # "The seat of the toilet" is no chair.
        if "toilet" in merged and "seat" in merged:
            merged = [word for word in merged if word != "seat"]
        found = [word for word in merged if word in self.category]
        return found, [self.category[word] for word in found], tokens

    @functools.cached_property
    def _first_words(self) -> frozenset[str]:
        """Words that begin a pair: few words do, so few pairs need to be looked up."""
        return frozenset(pair.partition(" ")[0] for pair in self.pairs)

    def _merge(self, words: Sequence[str]) -> list[str]:
        """Left to right, pairs of the table become one word."""
        first_words = self._first_words
        if first_words.isdisjoint(words):
            return list(words)
        merged: list[str] = []
        position = 0
        while position < len(words):
            word = words[position]
            pair = None
            if word in first_words and position + 1 < len(words):
                pair = self.pairs.get(f"{word} {words[position + 1]}")
            merged.append(word if pair is None else pair)
            position += 1 if pair is None else 2
        return merged


def vocabulary_file(path: Path) -> Vocabulary:
    """A synonym table from a file, gzip or not.

    JSON: {"synonyms": {object: [words]}, "double_words": {pair: word}}; `double_words` may be left out. Text (the
    authors' data/synonyms.txt): a line per object, words separated by ", ", the first one its name.
    """
    path = Path(path)
    text = read_text(path)
    if not text.lstrip().startswith("{"):
        # A file saved on Windows: a word that ends with a carriage return would stand in no caption.
        text = text.replace("\r\n", "\n")
        lines = [line.split(", ") for line in text.split("\n") if line.strip()]
        if not lines or max(map(len, lines)) == 1:
            raise FileFormatError(f"{path}: expected JSON with 'synonyms', or lines of words separated by a comma.")
        if twice := repeated(words[0] for words in lines):
            raise FileFormatError(f"{path}: two lines are about {twice[0]!r}; give each object one line.")
        synonyms, pairs = {words[0]: words for words in lines}, None
    else:
        table = checked(_Synonyms, parse_json(text, str(path)), str(path))
        synonyms, pairs = table.synonyms, table.double_words
    for name, words in synonyms.items():
        if words and all(word != word.lower() for word in words):
            raise FileFormatError(
                f"{path}: object {name!r} has no word in lower case, and captions are read in lower case; write "
                f"{words[0].lower()!r}."
            )
    try:
        return Vocabulary.of(synonyms, pairs)
    except EvalError as error:
        raise FileFormatError(f"{path}: {error}") from error


class _Synonyms(Record):
    """A synonym table as JSON."""

    synonyms: dict[str, list[str]]
    double_words: dict[str, str] | None = None


@functools.lru_cache(maxsize=8)
def _vocabulary(path: str | None, parser: str) -> Vocabulary:
    if path is not None:
        return vocabulary_file(Path(path))
    import lvlm_decode_data

    return Vocabulary.reduced(lvlm_decode_data.synonyms(), parser_named(parser))


def finished(caption: str) -> str:
    """The caption up to the end of its last whole sentence; all of it where no sentence ends."""
    ends = list(re.finditer(r"[.!?][\"'”’)]*(?=\s|$)", caption))
    return caption[: ends[-1].end()] if ends else caption


# What the images contain -------------------------------------------------------------------------------------------


def image_key(image: Any) -> str:
    """One spelling of an image id: 42, "42", "000000000042.jpg" and "COCO_val2014_000000000042.jpg" are "42".

    Other names stay as they are: "a/42.jpg" and "b/42.jpg" need not be the same image.
    """
    found = re.fullmatch(r"(?:(?:.*/)?COCO_[a-z]+\d{4}_)?([0-9]+)(?:\.\w+)?", str(image))
    return (found[1].lstrip("0") or "0") if found else str(image)


@functools.lru_cache(maxsize=4)
def _objects(path: str, vocabulary: Vocabulary) -> dict[str, tuple[str, ...]]:
    """image id -> objects of an OBJECTS file. Raises FileFormatError for names that the vocabulary does not know."""
    table = checked(_Objects, read_json(Path(path)), path)
    names = set(vocabulary.category.values())
    objects: dict[str, tuple[str, ...]] = {}
    for image, found in table.items():
        if (key := image_key(image)) in objects:
            raise FileFormatError(f"{path}: image {key} is there twice (as {image}); keep one.")
        objects[key] = _known_objects(found, names, f"{path}: image {image}")
    return objects


_Objects = TypeAdapter(dict[str, list[str]])
_Names = TypeAdapter(list[str])


def _known_objects(found: Sequence[str], names: Collection[str], where: str) -> tuple[str, ...]:
    """Each object once. Raises FileFormatError for a name that the synonym table does not know."""
    for name in found:
        if name not in names:
            raise FileFormatError(
                f"{where} has object {shown(name)}, which the synonym table does not contain{nearest(name, names)}. Give the "
                "table that belongs to these objects (--vocabulary)."
            )
    return tuple(dict.fromkeys(found))


@functools.cache
def _scene_objects() -> dict[str, tuple[str, ...]]:
    import lvlm_decode_data

    return {str(scene.image_id): tuple(sorted(scene.categories)) for scene in lvlm_decode_data.load_scenes()}


def build_objects(
    instances: Sequence[Path], captions: Sequence[Path], vocabulary: Vocabulary, parser: str = "pattern"
) -> dict[str, list[str]]:
    """What each image contains, from COCO annotation files: image id -> sorted object names.

    The union of the categories of all its instance annotations, crowds included, and of the objects that `parser` finds
    in each of its reference captions. Published scores use train and val 2014 together. With `pattern` this is the
    table behind the printed numbers of POPE and OPERA; with `wordnet-pos` the one that RITUAL rebuilt. Without captions
    (segmentation only) CHAIRs rises by 3 to 9 points.

    Raises FileFormatError for a file that is not COCO's, or a category that is not in the vocabulary.
    """
    reduce = parser_named(parser).reduce
    found: dict[Identity, set[str]] = {}
    for path in instances:
        coco = _coco(path, "categories")
        names = {key: category["name"] for key, category in coco.cats.items()}
        unknown = sorted(name for name in names.values() if name not in vocabulary.category)
        if unknown:
            raise FileFormatError(f"{path}: category {unknown[0]!r} is not in the synonym table.")
        for image in coco.getImgIds():
            used = [annotation["category_id"] for annotation in coco.imgToAnns[image]]
            if strange := [key for key in used if key not in names]:
                raise FileFormatError(f"{path}: image {image} has category {strange[0]}, which the file does not name.")
            annotated = {vocabulary.category[names[key]] for key in used}
            found.setdefault(image, set()).update(annotated)
    for path in captions:
        coco = _coco(path, "images")
        for image in coco.getImgIds():
            said = found.setdefault(image, set())
            for annotation in coco.imgToAnns[image]:
                said.update(vocabulary.objects(reduce(annotation["caption"]))[1])
    return {str(image): sorted(objects) for image, objects in sorted(found.items())}


class _CocoImage(TypedDict):
    id: int


class _CocoCategory(TypedDict):
    id: int
    name: str


class _CocoInstance(TypedDict):
    image_id: int
    category_id: int
    id: int


class _CocoCaption(TypedDict):
    image_id: int
    caption: str
    id: int


class _Instances(TypedDict):
    images: list[_CocoImage]
    categories: list[_CocoCategory]
    annotations: list[_CocoInstance]


class _Captions(TypedDict):
    images: list[_CocoImage]
    annotations: list[_CocoCaption]


_COCO: dict[str, TypeAdapter[Any]] = {"categories": TypeAdapter(_Instances), "images": TypeAdapter(_Captions)}


def _coco(path: Path, section: str) -> Any:
    """A COCO annotation file in pycocotools' index."""
    import contextlib
    import io

    from pycocotools.coco import COCO

    content = read_json(path)
    for name in ("annotations", "images", section):
        if not isinstance(content, dict) or name not in content:
            raise FileFormatError(f"{path}: no {name!r} section; expected COCO's instances_*.json or captions_*.json.")
    # Outlines and other fields that are not needed here are left out.
    content = checked(_COCO[section], content, str(path))
    # The index would keep the last of two, and leave out what belongs to no image.
    if twice := repeated(str(category["id"]) for category in content.get("categories", ())):
        raise FileFormatError(f"{path}: category {twice[0]} is there twice; keep one.")
    listed = {image["id"] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in listed:
            raise FileFormatError(
                f"{path}: annotation {annotation['id']} is about image {annotation['image_id']}, which the file does not list."
            )
    coco = COCO()
    coco.dataset = content
    # createIndex prints its progress, which would end up in the JSON of a command.
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


# Forms of caption files --------------------------------------------------------------------------------------------


class _Pictured(Record):
    """A line of a list of images."""

    image_id: Identity
    image: Identity | None = None


class _Caption(Form):
    """What most repositories write."""

    by = "OPERA, SID, PAI, VISTA, HALC, SHIELD"
    example = '{"image_id": 42, "caption": "A dog on a sofa."}'

    image_id: Identity
    caption: str | None
    image: Identity | None = None
    text: str | None = None
    label: list[str] | None = None
    tokens: Count | None = None
    error: str | None = None

    def to_answer(self, number: int) -> Answer:
        image = None if self.image is None else str(self.image)
        said = self.caption or ""
        return Answer(self.image_id, said, self.text or "", image, self.label, tokens=self.tokens, error=self.error)


class _OwnCaption(Own):
    """A line of this project about a caption: the label is what the image contains."""

    label: list[str] | None = None


class _Marine(Form):
    """`question_id` is a number of the question; `image_id` names the picture."""

    by = "MARINE"
    example = '{"question_id": 0, "image_id": "COCO_val2014_000000000042.jpg", "prompt": "...", "text": "A dog."}'

    question_id: Identity
    image_id: Identity
    text: str | None
    prompt: str = ""

    def to_answer(self, number: int) -> Answer:
        return Answer(self.image_id, self.text or "", self.prompt, str(self.image_id))


class _LlavaCaption(Form):
    """`question_id` is the place in a list of images; `image` names the picture."""

    by = "LLaVA's scripts on a list of images (ICD, MoD, AssessHalVLM)"
    example = '{"question_id": 0, "image": "COCO_val2014_000000000042.jpg", "prompt": "...", "text": "A dog."}'

    question_id: Identity
    image: Identity
    prompt: str
    text: str | None

    def to_answer(self, number: int) -> Answer:
        return Answer(self.image, self.text or "", self.prompt, str(self.image))


class _Deco(Form):
    """`id` is the image."""

    by = "DeCo"
    example = '{"id": 42, "response": "A dog on a sofa."}'

    id: Identity
    response: str | None

    def to_answer(self, number: int) -> Answer:
        return Answer(self.id, self.response or "")


_CAPTION_FORMS = (_Caption, _OwnCaption, _Marine, _LlavaCaption, _Deco)
_Mapping = TypeAdapter(dict[str, str])


class _Scored(Record):
    """One caption of a `_chair.json`."""

    image_id: Identity
    caption: str


class _ChairFile(Record):
    """The original scorer's result file; its scores are not read."""

    imgToEval: dict[str, _Scored]


def _captions(
    path: Path, image_key_name: str | None, caption_name: str | None, known: Collection[str] = ()
) -> list[Answer]:
    """The captions of a file; the image as the file names it is the id. known: keys of images whose objects are known."""
    records = read_records(path)
    where, first = records[0]
    if image_key_name or caption_name:
        names = {"image_id": image_key_name or "image_id", "caption": caption_name or "caption"}
        for where, record in records:
            for ours, theirs in names.items():
                if theirs not in record:
                    found = ", ".join(map(str, record)) or "no field"
                    raise FileFormatError(f"{where}: field {theirs!r}, given as {ours}_key, is missing; found {found}.")
        renamed = [(where, {ours: record[theirs] for ours, theirs in names.items()}) for where, record in records]
        return answers_of(renamed, (_Caption,), "captions")
    if len(records) == 1 and "imgToEval" in first:
        scored = checked(_ChairFile, first, where).imgToEval
        for name, line in scored.items():
            if image_key(name) != image_key(line.image_id):
                raise FileFormatError(
                    f"{where}: field 'imgToEval', field {shown(name)} is about image {shown(line.image_id)}; the two must be the "
                    "same image."
                )
        return [Answer(line.image_id, line.caption) for line in scored.values()]
    images = first and (
        all(re.search(r"\d", name) for name in first) or any(image_key(name) in known for name in first)
    )
    if len(records) == 1 and images:
        return [Answer(image, caption) for image, caption in checked(_Mapping, first, where).items()]
    lengths = [name for name in first if re.fullmatch(r"caption_\w+", name)]
    if "image_id" in first and "caption" not in first and lengths:
        raise FileFormatError(
            f"{where}: {len(lengths)} captions of an image ({', '.join(lengths)}); say which with -o caption_key={lengths[0]}."
        )
    accepted = (
        'captions; also one object {"42": "A dog on a sofa."}, whose names have digits or are in --objects, or a _chair.json '
        "with imgToEval"
    )
    return answers_of(records, _CAPTION_FORMS, accepted)


# The evaluator -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chair(Evaluator):
    """CHAIR scores.

    A method that stops early names fewer objects, so CHAIR is also counted at equal length. Captions are cut to their
    first 32, 64 and 128 tokens (`chair_s_64`; tokens before pairs are merged, so a cut is the same whatever was merged),
    and two runs are compared with both captions of an image cut to the shorter one (`equal_length`).

    recall is micro: distinct true objects mentioned / true objects. distinct_objects is the mean number of different objects a
    caption names: CHAIRi is diluted by naming the same true objects again. length is the mean number of words and punctuation
    marks after pairs are merged (OPERA); length_split that of `text.split(" ")` (POPE's table).

    Args:
        parser: How words are found: "pattern" or "wordnet-pos".
        vocabulary: File of the synonym table; None for the emoji scenes' own.
        objects: JSON file, image id -> objects; None for the emoji scenes' truth or the labels of the answers.
        prompt: What the emoji scenes are asked.
        unfinished: "keep" the end of a caption that the token limit cut, or "drop" it, as OPERA's 64-token table does.
        image_id_key: Field of a caption file that names the image, where it is not called as in a known form.
        caption_key: Field of a caption file that holds the caption, where it is not called as in a known form.
    """

    parser: str = "pattern"
    vocabulary: str | None = None
    objects: str | None = None
    prompt: str = PROMPT
    unfinished: str = "keep"
    image_id_key: str | None = None
    caption_key: str | None = None

    name: ClassVar[str] = "chair"
    paper: ClassVar[str] = "CHAIR (arXiv 1809.02156)"
    max_new_tokens: ClassVar[int] = 512
    axes: ClassVar[tuple[str, str]] = ("recall", "chair_i")
    more_axes: ClassVar[tuple[tuple[str, str], ...]] = (("recall", "chair_s"), ("length", "chair_s"))
    verdict: ClassVar[str] = "caption names no absent object"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("chair_s", "CHAIRs", better=-1, paired=True),
        Column("chair_i", "CHAIRi", better=-1, paired=True, of=("object_words",)),
        Column("recall", "Recall", better=+1, paired=True, of=("gt_objects",)),
        Column("length", "Length", "number", paired=True),
        Column("distinct_objects", "Objects", "number"),
        Column("chair_s_64", "CHAIRs@64", better=-1, paired=True),
        Column("empty", "Empty", "count", better=-1),
        Column("captions", "n", "count"),
    )

    equal_columns: ClassVar[tuple[Column, ...]] = (
        Column("chair_s", "CHAIRs@min", better=-1, paired=True),
        Column("chair_i", "CHAIRi@min", better=-1, paired=True, of=("object_words",)),
        Column("recall", "Recall@min", better=+1, paired=True, of=("gt_objects",)),
    )

    def __post_init__(self) -> None:
        parser_named(self.parser)
        if self.unfinished not in ("keep", "drop"):
            raise UnknownNameError.of("treatment of unfinished sentences", self.unfinished, ("keep", "drop"))

    def table(self) -> Vocabulary:
        """The synonym table in use."""
        return _vocabulary(None if self.vocabulary is None else str(self.vocabulary), self.parser)

    def scene_questions(self, scenes: Sequence, seed: int = 0) -> dict[str, list[Question]]:
        """One caption for each scene; the label is what is in it."""
        return {
            "captions": [
                Question(scene.image_id, self.prompt, str(scene.image_id), sorted(scene.categories)) for scene in scenes
            ]
        }

    def file_questions(self, path: Path) -> dict[str, list[Question]]:
        """A caption for each image of a list: JSON lines with `image_id` and `image`, the file's name.

        Without `image` a number is an image of COCO's val2014.
        """
        questions = []
        for where, record in read_records(path):
            line = checked(_Pictured, record, where)
            identity = image_key(line.image_id)
            name = f"COCO_val2014_{identity:0>12}.jpg" if identity.isdecimal() else identity
            questions.append(Question(identity, self.prompt, str(line.image or name)))
        return {"captions": questions}

    def read_answers(self, path: Path) -> list[Answer]:
        """Captions in any form of `_CAPTION_FORMS`, one JSON object of image id to caption, or a `_chair.json`."""
        known = () if self.objects is None else _objects(str(self.objects), self.table())
        answers = [
            replace(
                answer,
                question_id=image_key(answer.question_id),
                text=answer.text or self.prompt,
                image=answer.image or str(answer.question_id),
            )
            for answer in _captions(path, self.image_id_key, self.caption_key, known)
        ]
        truths = [self._truth(answer, f"{path}, ") for answer in answers]
        if answers and all(truth is None for truth in truths):
            raise EvalError(
                f"{path}: no caption has a known image (the first is {answers[0].question_id}); give --objects FILE, a "
                "JSON object of image id to list of objects."
            )
        return [
            answer if truth is not None else replace(answer, error=answer.error or "no known objects for this image")
            for answer, truth in zip(answers, truths)
        ]

    def contradicted(self, answers: Sequence[Answer]) -> tuple[str, ...]:
        """Captions whose label names other objects than --objects, or the scene, has for their image."""
        labelled = [
            (answer, known) for answer in answers if answer.label is not None and (known := self._known(answer))
        ]
        return tuple(str(answer.question_id) for answer, known in labelled if set(map(str, answer.label)) != set(known))

    def _truth(self, answer: Answer, file: str = "") -> Sequence[str] | None:
        """What the image of an answer contains; None when nobody knows. file: begins messages."""
        known = self._known(answer)
        if known is not None or self.objects is not None or answer.label is None:
            return known
        where = f"{file}image {answer.question_id}, field 'label'"
        named = checked(_Names, answer.label, where)
        return _known_objects(named, set(self.table().category.values()), where)

    def contents(self, image: object) -> Sequence[str] | None:
        """What --objects says that an image contains, without that option what is in the scene; None where it is not there."""
        known = _scene_objects() if self.objects is None else _objects(str(self.objects), self.table())
        return known.get(image_key(image))

    def _known(self, answer: Answer) -> Sequence[str] | None:
        """What --objects says about the image of an answer; without that option, what is in the scene."""
        if self.objects is None:
            return self.contents(answer.question_id)
        by_id, by_image = (self.contents(name) for name in (answer.question_id, answer.image))
        if by_id is not None and by_image is not None and by_id != by_image:
            raise EvalError(
                f"caption {answer.question_id} is about image {answer.image}, and --objects has both with other objects; name "
                "the image in `image_id` alone."
            )
        return by_image if by_id is None else by_id

    def ready(self, questions: Sequence[Question]) -> None:
        """Raise EvalError for images of which nobody says what they contain."""
        unknown = [question for question in questions if self._truth(Answer.to(question, "")) is None]
        if unknown:
            raise EvalError(
                f"chair must know what each image contains, and {len(unknown)} of {len(questions)} images are unknown (the "
                f"first is {unknown[0].image or unknown[0].id}); give --objects FILE, a JSON object of image id to list of "
                "object names, and --vocabulary FILE if the names are not COCO's."
            )
        super().ready(questions)

    def row(self, answer: Answer) -> Row:
        truth = self._truth(answer)
        if truth is None:
            raise EvalError(f"Image {answer.question_id} has no known objects; give --objects FILE that contains it.")
        caption = answer.answer if self.unfinished == "keep" else finished(answer.answer)
        reduced = parser_named(self.parser).reduce(caption)
        present = set(truth)
        found = self._found(reduced, present)
        # A caption that ends before a cut is its own.
        cuts = {
            str(length): found if len(reduced) <= length else self._found(reduced[:length], present) for length in CUTS
        }
        return Row.of(
            answer,
            parsed=sorted(set(found["objects"])),
            correct=not found["hallucinated"],
            rule=self.parser,
            clear=bool(answer.answer.strip()),
            **found,
            truth=sorted(present),
            split=len(caption.split(" ")),
            reduced=reduced,
            cuts={
                length: [bool(cut["hallucinated"]), len(cut["hallucinated"]), len(cut["objects"]), len(cut["recalled"])]
                for length, cut in cuts.items()
            },
        )

    def _found(self, reduced: Sequence[str], present: set[str]) -> dict[str, Any]:
        """What a list of reduced words mentions, and what of it is there."""
        words, objects, tokens = self.table().objects(reduced)
        return {
            "words": words,
            "objects": objects,
            "hallucinated": [name for name in objects if name not in present],
            "recalled": sorted(present.intersection(objects)),
            "tokens": tokens,
        }

    def equal_length(self, runs: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """The rows of several runs with the captions of each image cut to the shortest of them.

        Cut are tokens before pairs are merged, so all runs end with as many tokens in total; pairs, the toilet rule and
        objects are looked for again in what is left. Images that not all runs have are left out.
        """
        by_id = [{row.id: row for row in rows} for rows in runs]
        shared = [row.id for row in runs[0] if all(row.id in rows for rows in by_id)] if runs else []
        shortest = {name: min(len(rows[name].evidence["reduced"]) for rows in by_id) for name in shared}
        return [[self._cut(rows[name], shortest[name]) for name in shared] for rows in by_id]

    def _cut(self, row: Row, length: int) -> Row:
        reduced = row.evidence["reduced"][:length]
        found = self._found(reduced, set(row.evidence["truth"]))
        return replace(
            row,
            parsed=sorted(set(found["objects"])),
            correct=not found["hallucinated"],
            evidence={**row.evidence, **found, "reduced": reduced},
        )

    def tally(self, rows: Sequence[Row]) -> dict[str, int]:
        total: Counter[str] = Counter()
        for row in rows:
            total["hallucinated_captions"] += bool(row.evidence["hallucinated"])
            total["hallucinated_words"] += len(row.evidence["hallucinated"])
            total["object_words"] += len(row.evidence["objects"])
            total["recalled"] += len(row.evidence["recalled"])
            total["gt_objects"] += len(row.evidence["truth"])
            total["tokens"] += row.evidence["tokens"]
            total["split"] += row.evidence["split"]
            total["empty"] += not row.clear
            total["distinct"] += len(set(row.evidence["objects"]))
            total["reduced"] += len(row.evidence["reduced"])
            for length in CUTS:
                counted = zip(_CUT_COUNTS, row.evidence["cuts"][str(length)])
                total.update({f"{name}_{length}": int(count) for name, count in counted})
                total[f"shorter_{length}"] += len(row.evidence["reduced"]) < length
        return {"captions": len(rows), **{name: int(total[name]) for name in _COUNTS}}

    def rates(self, totals: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "chair_s": ratio(totals["hallucinated_captions"], totals["captions"]),
            "chair_i": ratio(totals["hallucinated_words"], totals["object_words"]),
            "recall": ratio(totals["recalled"], totals["gt_objects"]),
            "length": ratio(totals["tokens"], totals["captions"]),
            "length_split": ratio(totals["split"], totals["captions"]),
            "distinct_objects": ratio(totals["distinct"], totals["captions"]),
            **{
                f"{rate}_{length}": ratio(totals[f"{part}_{length}"], whole)
                for length in CUTS
                for rate, part, whole in (
                    ("chair_s", "hallucinated_captions", totals["captions"]),
                    ("chair_i", "hallucinated_words", totals[f"object_words_{length}"]),
                    ("recall", "recalled", totals["gt_objects"]),
                )
            },
        }


_COUNTS = (
    "hallucinated_captions",
    "hallucinated_words",
    "object_words",
    "recalled",
    "gt_objects",
    "tokens",
    "split",
    "empty",
    "distinct",
    "reduced",
    *(f"{name}_{length}" for length in CUTS for name in (*_CUT_COUNTS, "shorter")),
)
