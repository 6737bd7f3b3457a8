"""Where questions and images come from: local files in every released form, the emoji scenes, the hub.

The released POPE files are known by the sha256 of their content, because the random file exists with 2,910 and with
3,000 questions and published numbers belong to one or the other. Files nobody knows keep their own name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from lvlm_decode.errors import DependencyError, EvalError, FileFormatError, MissingFileError, OutsideError
from lvlm_decode.reading import read_bytes, read_records, repeated, shown

from .base import Evaluator, Question
from .pictures import open_picture, rgb
from .pope import questions_of
from .repope import REPOPE

# sha256 of the uncompressed file -> split name. The first four are AoiDragon/POPE (the 2,910 one at commit e3e3926),
# the others DAMO-NLP-SG/VCD.
POPE_FILES = {
    "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994": "coco-random",
    "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753": "coco-popular",
    "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8": "coco-adversarial",
    "c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35": "coco-random-2910",
    # YanNeu/RePOPE, where a run asks only the questions that it keeps.
    "f464fcaf60b24ce2f280cf33f122e000dbdd35c8e88f77c4141c9c2cba864611": "repope-random",
    "57832b055bae5fd6176278a4f104c98ddd84811f7d26dfcb93d481f6c9da09a5": "repope-popular",
    "8c346dbb060bf422ff92e769fa68e5ab3e8a777cb28a26e973387441e05c9ccf": "repope-adversarial",
    "900c244605e8d43626b9579a110e3631e534cddc2aff27fe91e3f080e15d4446": "aokvqa-random",
    "792d586a875c197362256b25e9252cc97df6fa1dca5aca72a53eba560414d6b7": "aokvqa-popular",
    "87f9acb460fcb690f9120c6d69eb05cfedadab5af5eb385b5201fd48bfc6670c": "aokvqa-adversarial",
    "1c1117ce33df2eae0d7b04827896caff1f79dac7b99b9e1b0c87a415066cff98": "gqa-random",
    "e48e138bd61dd3bc4ec35cc8d4357b4dbfc68f0e704283a92217325585a17653": "gqa-popular",
    "64a3bdeb8d24c02d175eafa5e1b24bc7fd611efa95bb87a031c880e548aef094": "gqa-adversarial",
}
_REPOPE_SPLITS = {name for name in POPE_FILES.values() if name.startswith("repope-")}
HUB_PREFIX = "hub:"


def fingerprint(path: Path) -> str:
    """sha256 of a file's uncompressed content, or of the names and contents of a folder's files."""
    path = Path(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for part in sorted(entry for entry in path.rglob("*") if entry.is_file()):
            digest.update(f"{part.relative_to(path)}\n{fingerprint(part)}\n".encode())
        return digest.hexdigest()
    return hashlib.sha256(read_bytes(path)).hexdigest()


def bare_name(path: Path) -> str:
    """A file's name without `.gz` and the format's suffix."""
    name = path.name.removesuffix(".gz")
    return name.rsplit(".", 1)[0] if "." in name else name


def files_of(path: Path) -> list[Path]:
    """The file itself, or the question files of a folder by name."""
    path = Path(path)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name.removesuffix(".gz").endswith((".json", ".jsonl")))
        if not found:
            raise MissingFileError(f"{path} holds no .json or .jsonl file; give a question file or a folder of them.")
        return found
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; give a question file or a folder of them.")
    return [path]


def pope_files(path: Path) -> dict[str, list[Question]]:
    """Split name -> POPE questions of a file or of all files in a folder.

    A split is named by its known hash, else by the file. A file in the hub's form is split by its `category`.
    Duplicate ids within a split raise FileFormatError.
    """
    splits: dict[str, list[Question]] = {}
    for file in files_of(path):
        name = POPE_FILES.get(fingerprint(file), bare_name(file))
        # Whatever is asked of them later, the first few alone too, is RePOPE's and not POPE's.
        labels = {"labels": REPOPE} if name in _REPOPE_SPLITS else {}
        for question in questions_of(read_records(file)):
            question = replace(question, meta={**question.meta, **labels}) if labels else question
            category = question.meta.get("category")
            splits.setdefault(str(category) if category else name, []).append(question)
    for split, questions in splits.items():
        check_ids(questions, f"{path}, split {split}")
    return splits


def check_ids(questions: Sequence[Question], where: str) -> None:
    """Raise FileFormatError naming the ids that occur twice: answers could not be told apart."""
    twice = repeated(str(question.id) for question in questions)
    if twice:
        raise FileFormatError(f"{where}: question ids must be unique, but {', '.join(twice[:5])} occur more than once.")


class Images(Protocol):
    """Opens images by the name a question gives them. `describe` goes into the settings of a run."""

    @property
    def describe(self) -> str: ...

    def open(self, name: str) -> Any:
        """The RGB PIL image. Raises EvalError naming the image when it is missing or corrupt."""


@dataclass(frozen=True)
class ImageFiles:
    """Images as files: in one folder (COCO's, say), or by a map from name to path (the emoji scenes)."""

    find: Callable[[str], Path]
    describe: str
    # Whether pictures are turned as their camera noted.
    turn: bool = False

    def open(self, name: str) -> Any:
        return open_picture(self.find(name), self.turn)


def folder_images(folder: Path, allow_outside: bool = False, turn: bool = False) -> ImageFiles:
    """Images of a folder. allow_outside: also those that a name (`..`, an absolute path) or a link leads to elsewhere.
    turn: follow the orientation that cameras note, for a user's own pictures; published evaluations did not.

    Raises MissingFileError when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder; give the folder that holds the images the questions name.")
    inside = folder.resolve()

    def find(name: str) -> Path:
        path = folder / name
        try:
            leads_out = not path.resolve().is_relative_to(inside)
        except (ValueError, OSError, RuntimeError) as error:
            raise MissingFileError(f"image {shown(name)} is no name of a file ({error})") from error
        if not allow_outside and leads_out:
            raise OutsideError(
                f"image {name!r} leads out of {folder}; if you trust the questions, --allow-outside lets it be read."
            )
        return path

    return ImageFiles(find, str(folder), turn)


def scene_images(scenes: Sequence) -> ImageFiles:
    """Images of emoji scenes, by image id."""
    paths = {str(scene.image_id): scene.path for scene in scenes}
    return ImageFiles(lambda name: paths.get(name, Path(name)), "emoji scenes")


@dataclass(frozen=True)
class HubImages:
    """Images of a hub data set, decoded when asked for."""

    dataset: Any
    column: str
    place: Mapping[str, int]
    describe: str

    def open(self, name: str) -> Any:
        row = self.place.get(name, self.place.get(name.removesuffix(".jpg")))
        if row is None:
            raise MissingFileError(f"image {name} is not in {self.describe}")
        return rgb(self.dataset[row][self.column], f"image {name}")


def check_limit(limit: int | None) -> None:
    """Raise EvalError for a limit that leaves no question."""
    if limit is not None and limit < 1:
        raise EvalError(f"--limit is {limit}; give a positive number of questions a split.")


@dataclass(frozen=True)
class Source:
    """What an evaluation asks and looks at: split -> questions, the images, and what the settings must say about it."""

    splits: Mapping[str, Sequence[Question]]
    images: Images
    settings: Mapping[str, Any]

    def only(self, names: Sequence[str]) -> Source:
        """The named splits. Raises EvalError listing the splits there are."""
        for name in names:
            if name not in self.splits:
                raise EvalError(
                    f"split {name!r} is unknown here; there are: {', '.join(self.splits)}.{_known_by(name)}"
                )
        return replace(self, splits={name: self.splits[name] for name in names})

    def first(self, limit: int | None) -> Source:
        """The first `limit` questions of each split, all of them for None."""
        check_limit(limit)
        if limit is None:
            return self
        return replace(self, splits={name: questions[:limit] for name, questions in self.splits.items()})


def _known_by(split: str) -> str:
    """What to say about a split that is missing though its file may lie there under any name."""
    if split not in POPE_FILES.values():
        return ""
    return (
        f" The file of {split} is known by its checksum, so a file here is another or altered; lvlm-decode data verify FILE "
        "says which it is."
    )


def scene_source(evaluator: Evaluator, scenes: Sequence | None = None, seed: int = 0) -> Source:
    """The emoji-scene version of a benchmark; by default on the held-out scenes that ship with the repository."""
    if scenes is None:
        import lvlm_decode_data

        scenes = lvlm_decode_data.load_scenes("heldout")
    splits = evaluator.scene_questions(scenes, seed=seed)
    return Source(
        splits,
        evaluator.scene_images(scenes),
        {"questions": "emoji scenes", "scenes": len(scenes), "question_seed": seed},
    )


def file_source(evaluator: Evaluator, questions: Path, images: Path | None, allow_outside: bool = False) -> Source:
    """The real benchmark: its question files and a folder of images (`allow_outside` as in `folder_images`)."""
    splits = evaluator.file_questions(Path(questions))
    for name, asked in splits.items():
        check_ids(asked, f"{questions}, split {name}")
    if images is None and any(question.image is not None for asked in splits.values() for question in asked):
        raise EvalError("The questions are about images; give the folder that holds them with --images FOLDER.")
    found = folder_images(images, allow_outside) if images is not None else ImageFiles(Path, "no images")
    # The path is not a setting: the same file elsewhere gives the same answers.
    return Source(splits, found, {"questions": bare_name(Path(questions)), "questions_sha256": fingerprint(questions)})


def data_source(evaluator: Evaluator, splits: Sequence[str], questions: Path | None, images: Path | None) -> Source:
    """Some splits of a benchmark, its files by default where `lvlm-decode data get` and its notes say to put them.

    Raises MissingFileError saying what to fetch, or which folder to put where.
    """
    from .download import data_folder

    name = evaluator.name
    folder = data_folder() / name
    asked, seen = folder, data_folder() / "coco" / "val2014"
    fetch = "run lvlm-decode data get coco --images"
    if name == "mme":
        # All tasks as its authors give them out, or the subset that can be fetched.
        asked = folder if any(folder.glob("*.txt")) else folder / "mme_hallucination.jsonl"
        seen, fetch = folder, "put a folder of images per task there (lvlm-decode data get mme says where they are)"
    elif any(split.startswith("gqa") for split in splits):
        seen, fetch = data_folder() / "gqa" / "images", "put GQA's images there"
    asked, seen = questions or asked, images or seen
    for path, remedy, option in (
        (asked, f"run lvlm-decode data get {name}", "--questions"),
        (seen, fetch, "--images"),
    ):
        if not path.exists():
            raise MissingFileError(f"{path} is not there; {remedy}, or give {option}.")
    _check_published(name, splits, asked)
    return file_source(evaluator, asked, seen).only(splits)


def _check_published(benchmark: str, splits: Sequence[str], asked: Path) -> None:
    """Raise EvalError where questions whose checksum is known are not the published ones: a published evaluation asked those.

    POPE's splits are each a file of a folder; a benchmark whose questions are one pinned file is known by the file's name.
    """
    from .upstream import sources

    if benchmark == "pope":
        there = {POPE_FILES.get(fingerprint(file)) for file in files_of(asked)}
        other = [split for split in splits if split in POPE_FILES.values() and split not in there]
    else:
        other = [s.name for s in sources(benchmark) if s.name == asked.name and s.sha256 != fingerprint(asked)]
    if other:
        raise EvalError(
            f"{asked} does not hold the published questions of {', '.join(other)}: no file there has the checksum. "
            f"lvlm-decode data verify {benchmark} names what is altered, and lvlm-decode data get {benchmark} fetches what is "
            "missing."
        )


def protocol_source(protocol: Any, evaluator: Evaluator, images: Path | None) -> Source:
    """The questions of a published evaluation: its list of images, or its question files in the data folder.

    images: None takes COCO's val2014 in the data folder. Raises MissingFileError saying what to fetch.
    """
    from .download import data_folder

    if protocol.benchmark != "chair":
        return data_source(evaluator, protocol.splits, None, images)
    seen = images or data_folder() / "coco" / "val2014"
    splits = protocol.questions(evaluator)
    if not seen.is_dir():
        raise MissingFileError(f"{seen} is not there; run lvlm-decode data get coco --images, or give --images FOLDER.")
    settings = {"questions": f"image list {protocol.images}", "questions_sha256": protocol.list_key}
    return Source(splits, folder_images(seen), settings)


def hub_source(evaluator: Evaluator, name: str, split: str = "test") -> Source:
    """A benchmark from the hub (`lmms-lab/POPE`, `lmms-lab/MME`, `lmms-lab/HallusionBench`), images included.

    Needs the `datasets` library. Rows take the path of question files, so their fields must be of a form the evaluator
    reads; `question` and `answer` stand for `text` and `label`, and an image is called by `image_source`, `filename` or
    `question_id`, whichever comes first.
    """
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            "Reading hub data sets needs the datasets library; install it with: pip install 'lvlm-decode[eval]'."
        ) from error
    loaded = datasets.load_dataset(name, split=split)
    pictures = [c for c in loaded.column_names if c.lower().startswith("image") and c != "image_source"]
    records: list[dict[str, Any]] = []
    place: dict[str, int] = {}
    for i, row in enumerate(loaded.remove_columns(pictures)):
        record = dict(row)
        image = next(
            (str(record[key]) for key in ("image_source", "filename", "question_id") if record.get(key)), str(i)
        )
        for ours, theirs in (("text", "question"), ("label", "answer")):
            if ours not in record and theirs in record:
                record[ours] = record[theirs]
        record["image"] = image
        records.append(record)
        place.setdefault(image, i)
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{name.rsplit('/', 1)[-1]}.jsonl"
        file.write_text("".join(json.dumps(record, default=str) + "\n" for record in records), encoding="utf-8")
        splits = evaluator.file_questions(file)
    for part, questions in splits.items():
        check_ids(questions, f"{name}, {part}")
    images = HubImages(loaded, pictures[0] if pictures else "image", place, name)
    return Source(splits, images, {"questions": f"{HUB_PREFIX}{name}", "split": split})
