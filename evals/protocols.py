"""Who measured how: image list, prompt, template, length, decoding, parser, seeds of published evaluations, by name.

A file of `configs/protocols/` is one protocol; its name is the file's. `lvlm-decode eval chair --protocol opera-64` asks
exactly so. Image lists are known by a hash of their ids in order, because two lists of 500 images move CHAIR by several
points; the files that hold them belong to others and are fetched (`lvlm-decode data get`), never shipped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lvlm_decode.errors import FileFormatError, LvlmDecodeError, MissingFileError, SettingsError, UnknownNameError
from lvlm_decode.reading import Closed, Identity, Record, checked, read_records, read_text, read_yaml

from . import evaluator
from .base import Evaluator, Question
from .chair import Chair, image_key
from .plan import Decoding, DecodingShape

# The values a config may name where nobody knows how a row was measured.
UNKNOWN = "unknown"
FOLDER = Path("configs") / "protocols"


class ProtocolFile(Closed):
    """A file of `configs/protocols/`; the fields are those of `Protocol`."""

    paper: str
    benchmark: str
    images: str
    images_status: Literal["shipped", "candidate", "unknown"]
    source: str
    options: dict[str, Any] = Field(default_factory=dict)
    ground_truth: Literal["A", "B"] | None = None
    prompt: str | None = None
    templates: dict[str, str] = Field(default_factory=dict)
    suffix: str = ""
    max_new_tokens: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    decoding: DecodingShape | None = None
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(default_factory=list)
    checkpoints: list[str] = Field(default_factory=list)
    dtype: str | None = None
    splits: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class ImageList:
    """A public list of COCO val2014 images.

    key: see `key_of`. truth_a, truth_b: `truth_key` of its images in the two published ground truths of CHAIR; both are
    annotated instances and objects of captions, which A found with pattern and B with WordNet. file: data set and name of a
    pinned file that holds the list.
    """

    name: str
    number: int
    key: str
    truth_a: str
    truth_b: str
    file: tuple[str, str]

    def ids(self) -> list[int]:
        """The image ids in the list's order, from the fetched file.

        Raises MissingFileError saying how to get it, FileFormatError where the file holds another list.
        """
        from .download import data_folder

        dataset, name = self.file
        path = data_folder() / dataset / name
        packed = path.with_name(f"{path.name}.gz")
        there = path if path.is_file() else packed if packed.is_file() else None
        if there is None:
            raise MissingFileError(f"image list {self.name} is not here; run lvlm-decode data get {dataset} ({path}).")
        found = read_ids(there)
        if key_of(found) != self.key:
            raise FileFormatError(
                f"{there} holds the list {key_of(found)} of {len(found)} images; {self.name} is {self.key} of {self.number}."
            )
        return found


def key_of(ids: Sequence[int]) -> str:
    """16 hex digits of the ids in order: the first of sha256 of the ids joined by commas."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def truth_key(objects: Mapping[int, Sequence[str]]) -> str:
    """16 hex digits of what images contain: the first of sha256 of a line for each image, its id and its sorted objects."""
    lines = [f"{image}:{','.join(sorted(set(objects[image])))}" for image in sorted(objects)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class _Listed(Record):
    """A line of a list of images."""

    image_id: Identity | None = None
    image: Identity | None = None


def read_ids(path: Path) -> list[int]:
    """Image ids of a list file, in order, each once: a number a line, or JSON with `image_id` or `image`."""
    text = read_text(path)
    if re.fullmatch(r"\s*([0-9]{1,12}\s+)*[0-9]{1,12}\s*", text):
        return list(dict.fromkeys(int(line) for line in text.split()))
    found = []
    for where, record in read_records(path):
        line = checked(_Listed, record, where)
        name = image_key(line.image_id if "image_id" in record else line.image)
        if not name.isdecimal() or len(name) > 12:
            raise FileFormatError(f"{where}: expected `image_id` or `image` of COCO, found {', '.join(record)}.")
        found.append(int(name))
    return list(dict.fromkeys(found))


LISTS: dict[str, ImageList] = {
    entry.name: entry
    for entry in (
        ImageList(
            "opera-a",
            500,
            "8e6d37b0baa8afa6",
            "8d5c67a58a4ce728",
            "00236cb2ec4f2bb2",
            ("opera-captions", "llava-1.5/greedy.jsonl"),
        ),
        ImageList(
            "opera-b",
            500,
            "8f166d1370fec88c",
            "44631448ed2082b9",
            "9f4a00f642e28e19",
            ("opera-captions", "instructblip/greedy.jsonl"),
        ),
        ImageList(
            "icd-mod", 500, "1846a1436949bc68", "6519016cf86060cd", "9beabf50df222298", ("chair-lists", "mod.jsonl")
        ),
        ImageList(
            "agla", 100, "7979931517b6d441", "bd176d0dcf017604", "f2a08c603b74b4d5", ("chair-lists", "agla.jsonl")
        ),
        ImageList(
            "assesshal",
            500,
            "0a5b1fbd1786d7d0",
            "e6eb8759770c86bf",
            "2152b07166d0a824",
            ("chair-lists", "assesshal.jsonl"),
        ),
        ImageList(
            "seed-927",
            500,
            "77f15b7407431f3b",
            "bb9a1f183264859e",
            "d0795b4957d7fdd7",
            ("chair-lists", "middle-layers.jsonl"),
        ),
        ImageList(
            "pope-500", 500, "432c1d116f1fa419", "e20271d90e1785e6", "91f1743c30c61ca8", ("chair-lists", "damro.jsonl")
        ),
        ImageList(
            "marine", 500, "7c5e558db85b3fe7", "85354909f4703545", "885d534a1dba6b4f", ("chair-lists", "marine.json")
        ),
        ImageList(
            "human", 500, "b8b83f301cde87ec", "06203dcf26256ae5", "6421a2e58a549416", ("chair-lists", "human.txt")
        ),
    )
}


@dataclass(frozen=True)
class Protocol:
    """One way of measuring; the fields are the file's.

    images: name of an `ImageList`, the question files', or "unknown". images_status: "shipped" (its authors released the
    list), "candidate" (rebuilt, unconfirmed) or "unknown". templates: hub id -> whole prompt around {question}; other
    models take their own. decoding: None where it is a row's own. ground_truth: CHAIR's, A or B.
    """

    name: str
    paper: str
    benchmark: str
    images: str
    images_status: str
    source: str
    options: Mapping[str, Any]
    ground_truth: str | None
    prompt: str | None
    templates: Mapping[str, str]
    suffix: str
    max_new_tokens: int | None
    decoding: Decoding | None
    seeds: tuple[int, ...]
    checkpoints: tuple[str, ...]
    dtype: str | None
    splits: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def evaluator_options(self) -> dict[str, Any]:
        """Options of the evaluator: the parser or rule, and the prompt where a benchmark takes one."""
        return dict(self.options) | ({"prompt": self.prompt} if self.prompt else {})

    def on_scenes(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The same options for the emoji scenes, whose truth and words need no other parser. The small models know one
        prompt; to another ("Generate a short caption of this image.") they answer yes or no.
        """
        parser = {"parser": "pattern"} if options.get("parser") == "wordnet-pos" else {}
        return {name: value for name, value in options.items() if name != "prompt"} | parser

    def questions(self, chosen: Evaluator) -> dict[str, list[Question]]:
        """The questions about exactly the images of this protocol. Raises SettingsError where nobody knows them."""
        if self.images not in LISTS:
            raise SettingsError(
                f"protocol {self.name} does not say which images it used ({' '.join(self.notes) or 'no list is released'}); "
                "give --questions FILE and leave out --protocol."
            )
        prompt = chosen.options()["prompt"]
        return {
            "captions": [
                Question(str(number), prompt, f"COCO_val2014_{number:0>12}.jpg") for number in LISTS[self.images].ids()
            ]
        }

    def other_truth(self, chosen: Evaluator) -> str:
        """What CHAIR's captions are held against where it is not the protocol's ground truth: "ground truth B" or "other
        objects"; "" where it is, and where nobody can tell, as without --objects or without the list of images.
        """
        if self.ground_truth is None or self.images not in LISTS:
            return ""
        if not isinstance(chosen, Chair) or chosen.objects is None:
            return ""
        listed = LISTS[self.images]
        try:
            ids = listed.ids()
        except MissingFileError:
            return ""
        found = truth_key({number: chosen.contents(number) or () for number in ids})
        known = {listed.truth_a: "A", listed.truth_b: "B"}.get(found)
        if known == self.ground_truth:
            return ""
        return "other objects" if known is None else f"ground truth {known}"

    def label(self, chosen: Evaluator) -> str:
        """What settings and tables call a run of this protocol: its name, and other ground truth where there is some."""
        other = self.other_truth(chosen)
        return f"{self.name} with {other}" if other else self.name

    def checkpoint(self, model: str) -> str | None:
        """Which of its checkpoints a model is, by its hub id or its folder's name; None where it is another one."""
        return next((known for known in self.checkpoints if Path(known).name == Path(model).name), None)

    @property
    def list_key(self) -> str | None:
        """What tells the list of images from others; None where it is none of `LISTS`."""
        return LISTS[self.images].key if self.images in LISTS else None

    @property
    def unknown_images(self) -> bool:
        return self.images_status == UNKNOWN


def folder() -> Path:
    """Where the protocols lie: `configs/protocols` of the folder one is in, else of this checkout or the installed package."""
    here = Path(__file__).resolve().parent
    return next(path for path in (FOLDER, here.parent / FOLDER, here / "papers" / "protocols") if path.is_dir())


def names() -> list[str]:
    """The protocols there are."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def protocol(name: str) -> Protocol:
    """A protocol by name, or by the path of a file of one's own. Raises UnknownNameError listing those there are."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise MissingFileError(f"{path} is not a file; the protocols are in configs/protocols/.")
        return read_protocol(path)
    if not names():
        raise MissingFileError(
            f"{folder()} holds no protocol; run in a checkout of the repository, or give the path of a protocol's file."
        )
    if name not in names():
        raise UnknownNameError.of("protocol", name, names())
    return read_protocol(folder() / f"{name}.yaml")


def read_protocol(path: Path) -> Protocol:
    """A protocol from its file. Raises FileFormatError naming the file, line and field that is missing or wrong."""
    found = read_yaml(path, ProtocolFile)
    try:
        evaluator(found.benchmark, **found.options)
    except LvlmDecodeError as error:
        raise FileFormatError(f"{path}: {error}") from error
    decoding = None if found.decoding is None else found.decoding.to_decoding(str(path))
    lists = {name: tuple(getattr(found, name)) for name in ("seeds", "checkpoints", "splits", "notes")}
    return Protocol(**{**dict(found), "decoding": decoding, **lists}, name=path.stem)


@dataclass(frozen=True)
class Setup:
    """What a protocol decides for one run."""

    options: Mapping[str, Any]
    max_new_tokens: int | None
    suffix: str
    template: str | None
    decoding: Decoding | None
    seeds: tuple[int, ...]
    dtype: str | None


def setup(found: Protocol, benchmark: str, model: str, on_scenes: bool, given: Mapping[str, Any]) -> Setup:
    """What to run for a protocol, on its own images or on emoji scenes.

    given: command-line name -> value, None where it was not given. A run with another prompt or length is not of that
    protocol, so what the protocol decides cannot be given beside it: SettingsError. On the emoji scenes the small models
    take their own prompt.
    """
    if found.benchmark != benchmark:
        raise SettingsError(f"protocol {found.name} is of {found.benchmark}, not of {benchmark}.")
    decided: dict[str, Any] = {name: True for name in found.evaluator_options}
    decided |= {"--max-new-tokens": found.max_new_tokens, "--seed": found.seeds or None, "--dtype": found.dtype}
    decided |= {"--suffix": True, "--template": True, "--questions": True}
    decided |= dict.fromkeys(("--do-sample", "--temperature", "--top-p", "--top-k", "--num-beams"), found.decoding)
    for name, value in given.items():
        if value is not None and decided.get(name) is not None:
            raise SettingsError(f"protocol {found.name} decides {name}; leave it out, or leave out --protocol.")
    options = found.evaluator_options
    return Setup(
        options=found.on_scenes(options) if on_scenes else options,
        max_new_tokens=found.max_new_tokens,
        suffix="" if on_scenes else found.suffix,
        template=None if on_scenes else found.templates.get(found.checkpoint(model) or model),
        decoding=found.decoding,
        seeds=found.seeds,
        dtype=None if on_scenes else found.dtype,
    )
