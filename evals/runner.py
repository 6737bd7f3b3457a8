"""The one bridge between evaluators and models: asks the questions of every cell, resumes, spreads over processes.

Answers do not depend on how a run was cut up. Draws and views are keyed by (seed, sample id, position), and batches are
cut from the whole list of questions, so a run that was killed, sharded or spread over processes asks the same batches
and ends with the same files.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import lvlm_decode
from lvlm_decode.errors import (
    DependencyError,
    EvalError,
    FileFormatError,
    InputError,
    LockedError,
    LvlmDecodeError,
    MissingFileError,
    OutputError,
    ParameterError,
    SettingsError,
    UnreachableError,
    UnsupportedError,
)
from lvlm_decode.methods import classes
from lvlm_decode.reading import read_json

from .answers import append_answers, append_lines, remove_partials, resume_answers, write_answers
from .base import Answer, Evaluator, Question
from .loaders import Source, fingerprint
from .locks import Hold, writing
from .plan import (
    TIMES,
    Cell,
    Decoding,
    Result,
    Settings,
    cell_answers,
    cells,
    claim,
    questions_hash,
    score_cell,
    split_folder,
    spoken,
    write_questions,
)

TINY = {"tiny": "tiny-llava", "tiny-llava": "tiny-llava", "tiny-instructblip": "tiny-instructblip"}
# Weights up to this size are hashed, so that answers of retrained small models cannot mix.
HASHED_BYTES = 200_000_000
# Of larger files so many blocks are, which is enough to tell a model from one trained further.
SAMPLED_BLOCKS = 1024
START_BATCH = 64


@dataclass(frozen=True)
class Loaded:
    """A model with its processor, and what the settings of a run say about it."""

    model: Any
    processor: Any
    settings: Mapping[str, Any]


def load(
    name: str,
    *,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    device_map: str | None = None,
) -> Loaded:
    """A model and its processor by `tiny`, `tiny-instructblip`, folder or hub id.

    dtype: a torch name; by default float32 on a CPU, and on a GPU what the checkpoint was saved in. device_map: "auto"
    spreads a model over several cards. Weights are read from safetensors alone, and no code of a checkpoint is run.
    Raises MissingFileError when a folder or the small weights are not there, FileFormatError for a broken checkpoint.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = checkpoint(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        chosen: Any = torch.float32 if device.type == "cpu" and device_map is None else "auto"
    else:
        chosen = getattr(torch, dtype, None)
        if not isinstance(chosen, torch.dtype):
            raise SettingsError(f"dtype {dtype!r} is not a torch type; use float32, bfloat16 or float16.")
    # Nobody's code is run and nothing is unpickled, whatever a checkpoint asks for.
    safely = {"trust_remote_code": False}
    if not Path(path).is_dir() and not hub_answers():
        # Otherwise transformers tries again for minutes before it says so.
        safely["local_files_only"] = True
    try:
        with _bars_on_terminals():
            processor = AutoProcessor.from_pretrained(path, **safely)
            model = AutoModelForImageTextToText.from_pretrained(
                path, dtype=chosen, device_map=device_map, use_safetensors=True, **safely
            )
    except OSError as error:
        alone = "it is no folder and was not downloaded before, and the hub cannot be reached"
        why = alone if safely.get("local_files_only") else _first_line(error)
        raise MissingFileError(f"model {name!r} cannot be loaded ({why}); give tiny, a folder or a hub id.") from error
    except torch.OutOfMemoryError as error:
        raise EvalError(
            f"model {name!r} does not fit in memory ({_first_line(error)}); try --device-map auto."
        ) from error
    except Exception as error:
        raise FileFormatError(
            f"model {name!r} cannot be loaded ({type(error).__name__}: {_first_line(error)}); its files do not fit each "
            "other or this version of transformers."
        ) from error
    return loaded_of(model.eval() if device_map else model.eval().to(device), processor, path)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """transformers draws its progress bars only where somebody can see them move."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def hub_answers() -> bool:
    """Whether the hub's host takes a connection, tried once; behind a proxy it is not tried and taken for granted."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    place = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((place.hostname or "", place.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def checkpoint(name: str) -> str:
    """The folder or hub id of a model's name, `tiny` among them; a folder is checked as `check_checkpoint` does."""
    place = Path(name)
    if name in TINY:
        import lvlm_decode_data

        place = lvlm_decode_data.tiny_path(TINY[name])
    if not place.is_dir():
        return name
    check_checkpoint(place)
    return str(place)


def loaded_of(model: Any, processor: Any, name: str | None = None) -> Loaded:
    """A model and its processor as a run takes them. name: where they come from; None takes what the model says itself.

    Sets the tokenizer to pad on the left, as generation in batches needs.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    commit = getattr(model.config, "_commit_hash", None)
    return Loaded(model, processor, identity_of(name, str(model.dtype).removeprefix("torch."), commit))


def identity_of(name: str, dtype: str, commit: str | None) -> dict[str, Any]:
    """What the settings of a run say about a model: its name, its dtype, and what tells two versions of it apart."""
    place = Path(name)
    return {"name": place.name if place.is_dir() else name, "dtype": dtype, "weights": _weights(place, commit)}


def check_checkpoint(folder: Path) -> None:
    """Read what a checkpoint's folder says of itself, before anything is built from it.

    Raises MissingFileError without a config or without weights in safetensors, FileFormatError naming the file that is
    broken or wants its own code to be run.
    """
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"model {str(folder)!r} cannot be loaded (no config.json); give a checkpoint's folder.")
    for path in sorted(folder.glob("*.json")):
        said = read_json(path)
        wanted = said.get("auto_map") if isinstance(said, dict) else None
        if wanted and path.name == "config.json":
            raise FileFormatError(
                f"{path} wants code of the checkpoint to be run (auto_map {wanted!r}); this project runs none, so use a "
                "checkpoint of a model that transformers knows."
            )
        if not isinstance(said, dict):
            raise FileFormatError(f"{path}: expected a JSON object, found {type(said).__name__}.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        other = next((path.name for path in sorted(folder.glob("*")) if path.suffix in (".bin", ".pt", ".pth")), None)
        found = f"; {folder / other} is a pickle, which can run code: convert it to safetensors" if other else ""
        raise MissingFileError(f"{folder} holds no weights in safetensors{found}.")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise FileFormatError(f"{path} is no readable safetensors file ({_first_line(error)}).") from error


def _weights(place: Path, commit: str | None) -> str | None:
    """What tells two versions of a model apart: a hash of local weights, else the hub's commit."""
    if not place.is_dir():
        return commit
    files = sorted(place.glob("*.safetensors"))
    if not files:
        return None
    small = sum(file.stat().st_size for file in files) <= HASHED_BYTES
    digest = hashlib.sha256()
    for file in files:
        digest.update((fingerprint(file) if small else _sample(file)).encode())
    return digest.hexdigest()[:16]


def _sample(file: Path) -> str:
    """What tells two large files apart without reading all of them: the size and blocks from everywhere."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as opened:
        for block in range(SAMPLED_BLOCKS):
            opened.seek(size * block // SAMPLED_BLOCKS)
            digest.update(opened.read(4096))
    return digest.hexdigest()


@dataclass(frozen=True)
class Options:
    """How questions are put: the same for all cells of a run.

    max_new_tokens: None takes the evaluator's. suffix: appended to every question (" Please answer this question with
    one word."). template: the whole prompt around "{question}", image placeholder included; None takes the model's chat
    template, or the bare question for models without one. drafter: as `attach(drafter=)`. parameters: method
    parameters for every method that has them. times: also write how long every batch took.
    """

    max_new_tokens: int | None = None
    suffix: str = ""
    template: str | None = None
    drafter: str | None = None
    batch_size: int | str = 16
    parameters: Mapping[str, Any] = field(default_factory=dict)
    times: bool = False

    def __post_init__(self) -> None:
        if self.template is not None and "{question}" not in self.template:
            raise SettingsError(f"template {self.template!r} has no {{question}}; put it where the question belongs.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise SettingsError(f"max_new_tokens is {self.max_new_tokens}; give at least 1, or leave it out.")
        if self.batch_size != "auto" and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise SettingsError(f"batch size is {self.batch_size!r}; give a positive number or auto.")


@dataclass(frozen=True)
class Share:
    """Which part of the batches this process asks: number `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """From "2/4": the second of four."""
        first, _, last = text.partition("/")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise SettingsError(f"--shard is {text!r}; give i/n with 1 <= i <= n, for instance 1/4.")
        return cls(int(first) - 1, int(last))

    @property
    def file(self) -> str:
        return "answers.jsonl" if self.count == 1 else f"answers.part-{self.index + 1}-of-{self.count}.jsonl"


def processes() -> tuple[Share, Any]:
    """This process's share under `accelerate launch` or torchrun, and accelerate's state (None for a single
    process).
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world < 2:
        return Share(), None
    from accelerate import PartialState

    # Without cpu=True accelerate takes processes on a machine without cards for so many separate runs.
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != world:
        raise SettingsError(
            f"accelerate sees {state.num_processes} processes and WORLD_SIZE says {world}; use one launcher."
        )
    return Share(state.process_index, state.num_processes), state


def decoding_for(method: str, wanted: Decoding | None, parameters: Mapping[str, Any] | None = None) -> Decoding:
    """The decoding a method runs with: the wanted one, or sampling at temperature 1 as the papers do where the method
    can, else greedy. Raises EvalError with the method's own reason when it refuses what was wanted.
    """
    parsed = lvlm_decode.parse(method, **_own(method, parameters or {}))
    refused = {mode: reason for part in parsed.parts() for mode, reason in part.refuses.items()}
    if wanted is not None:
        mode = "beam" if wanted.num_beams > 1 else "sample" if wanted.do_sample else "greedy"
        if mode in refused:
            raise EvalError(f"{method} cannot run with {wanted.name}: {refused[mode]}")
        return wanted
    return Decoding(do_sample="sample" not in refused)


def check_parameters(methods: Sequence[str], parameters: Mapping[str, Any]) -> None:
    """Raise SettingsError for a shared parameter that no method of a run has."""
    used = {name for method in methods for name in _own(method, parameters)}
    for name in parameters:
        if name not in used:
            raise SettingsError(f"--param {name} belongs to none of {', '.join(methods)}; see lvlm-decode methods.")


def _own(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the shared parameters that some part of a method has."""
    from dataclasses import fields

    known: set[str] = set()
    for part in classes(method):
        known |= {option.name for option in fields(part)} | set(part.aliases)
    return {name: value for name, value in parameters.items() if name in known}


def _parameters(method: Any) -> dict[str, Any]:
    """A method's parameters as JSON values, by part."""
    from dataclasses import fields

    def plain(value: Any) -> Any:
        return value if isinstance(value, str | int | float | bool | None) else repr(value)

    parts = method.parts()
    own = [{f.name: plain(getattr(part, f.name)) for f in fields(part)} for part in parts]
    return own[0] if len(parts) == 1 else {part.name: values for part, values in zip(parts, own)}


def _content(path: Path) -> str:
    """What tells contents apart: of a file, or of the files that lie in a folder, with their names."""
    files = [path]
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.is_file() and not one.name.startswith("."))
    states = [(file, file.stat()) for file in files]
    return _hashed(path, tuple((file, s.st_size, s.st_mtime_ns, s.st_ino) for file, s in states))


@functools.lru_cache(maxsize=64)
def _hashed(path: Path, files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """`_content`, once for a state of the files: the settings of a run are asked for again and again."""
    digest = hashlib.sha256()
    for file, *_ in files:
        with open(file, "rb") as opened:
            name = "" if file == path else file.name
            digest.update(f"{name}\n{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def prompt_of(processor: Any, question: Question, options: Options) -> str:
    """The text a question becomes, image placeholder included."""
    text = question.text + options.suffix
    if options.template is not None:
        return options.template.replace("{question}", text)
    if getattr(processor, "chat_template", None) is None:
        return text
    content = [{"type": "text", "text": text}]
    if question.image is not None:
        content.insert(0, {"type": "image"})
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def batches_of(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Consecutive questions in batches; questions with and without an image never share one."""
    made: list[list[Question]] = []
    for question in questions:
        if made and len(made[-1]) < size and (made[-1][0].image is None) == (question.image is None):
            made[-1].append(question)
        else:
            made.append([question])
    return made


@dataclass
class EvaluationRun:
    """One evaluation: which cells, on which model, into which folder. `execute` fills them; call it again to
    continue.
    """

    evaluator: Evaluator
    source: Source
    loaded: Loaded
    out: Path
    methods: Sequence[tuple[str, Decoding]]
    seeds: Sequence[int] = (0,)
    limit: int | None = None
    options: Options = Options()
    share: Share = Share()
    # accelerate's state when several processes run this together; they wait for one another before parts are merged.
    state: Any = None
    quiet: bool = False
    # Called before every batch; what it raises ends the run, with everything answered on disk.
    stop: Callable[[], None] | None = None
    # The published way of measuring that this run follows; None for one of its own.
    protocol: str | None = None
    # Controls to leave out, by name.
    without: Sequence[str] = ()
    # Told what the run will cost: at once how many answers, after the first batch how long.
    tell: Callable[[str], None] | None = None
    # Whether a sample of the cell at hand was answered, and what ended the device.
    _works: bool = field(default=False, init=False, repr=False)
    _lost: Exception | None = field(default=None, init=False, repr=False)
    # Forwards still owed when the run began, until the first batch has told its speed.
    _owed: float = field(default=0.0, init=False, repr=False)

    @property
    def main(self) -> bool:
        return self.state is None or self.state.is_main_process

    def cells(self) -> list[Cell]:
        """All cells, matched controls included and first."""
        return cells(list(self.source.splits), self.methods, self.seeds, self.without)

    def settings(self, cell: Cell) -> Settings:
        """What decides the answers of a cell, and the machine they were made on."""
        method = lvlm_decode.parse(cell.method, **_own(cell.method, self.options.parameters))
        # Only where there are some, so that runs of the other methods made before can be continued.
        files = self._files(method)
        decides = {
            "evaluator": self.evaluator.name,
            "split": cell.split,
            "method": {"name": cell.method, "parameters": _parameters(method)} | ({"files": files} if files else {}),
            "decoding": {"do_sample": cell.decoding.do_sample, "temperature": cell.decoding.temperature}
            | {"top_p": cell.decoding.top_p, "top_k": cell.decoding.top_k, "num_beams": cell.decoding.num_beams},
            "seed": cell.seed,
            "max_new_tokens": self.options.max_new_tokens or self.evaluator.max_new_tokens,
            "suffix": self.options.suffix,
            "template": self.options.template,
            "drafter": self.options.drafter,
            "model": dict(self.loaded.settings),
            "data": {**self.source.settings, "split_hash": questions_hash(self.source.splits[cell.split])},
        }
        # Only where there is one, so that runs made before there were protocols can be continued.
        decides |= {"protocol": self.protocol} if self.protocol else {}
        scoring = {name: value for name, value in self.evaluator.options().items() if value is not None}
        return Settings(decides, self._environment(), scoring)

    def _files(self, method: Any) -> dict[str, str]:
        """Path -> what tells its content from others, of the files and folders that a method's parameters name.

        Raises MissingFileError for one that is not there.
        """
        found = {}
        for part in method.parts():
            for name, paths in part.files().items():
                for path in paths:
                    if not path.exists():
                        raise MissingFileError(
                            f"{part.name}: {name} {path} is missing; give the path of one that is there."
                        )
                    found[str(path)] = _content(path)
        return found

    def _environment(self) -> dict[str, Any]:
        return environment(self.loaded.model, self.options)

    def execute(self) -> list[Result]:
        """Ask what is not answered yet, merge, score. Returns the scored cells; empty in other than the main process,
        and for cells of which other shards still owe a part.

        Raises LockedError when another run writes into the folder.
        """
        asked = self.source.first(self.limit)
        self._check_template(asked)
        plan = self.cells()
        folders = {cell: cell.folder(self.out, self.evaluator.name) for cell in plan}
        splits = [split_folder(folder) for folder in folders.values()]
        with writing(splits, self.share.index, self.share.count) as hold:
            if self.share.count == 1:
                for folder in dict.fromkeys(splits):
                    remove_partials(folder)
            # The others check what the main process wrote: two writers of one file would be a race.
            if not self.main:
                self.state.wait_for_everyone()
            for cell in plan:
                claim(folders[cell], self.settings(cell), asked.splits[cell.split])
                if self.main:
                    write_questions(split_folder(folders[cell]), asked.splits[cell.split])
            if self.main and self.state is not None:
                self.state.wait_for_everyone()
            if self.tell is not None and self.main:
                self._cost(plan, folders, asked, self.tell)
            self._ask_all(plan, folders, asked, hold)
            if self.share.count == 1:
                return _scored(plan, folders)
        if self.state is not None:
            self.state.wait_for_everyone()
            if not self.main:
                return []
        return self._gather_shares(plan, folders, asked)

    def _gather_shares(self, plan: Sequence[Cell], folders: Mapping[Cell, Path], asked: Source) -> list[Result]:
        """Merge what the shards wrote and score it; nothing while another shard is at work: the last one does it."""
        splits = dict.fromkeys(split_folder(folder) for folder in folders.values())
        alone = replace(self, share=Share(), state=None)
        try:
            with writing(list(splits), passing=True) as hold:
                for folder in splits:
                    remove_partials(folder)
                owed = [cell for cell in plan if not alone._merge(cell, folders[cell], asked.splits[cell.split])]
                if self.state is not None:
                    # Processes that found other batch sizes to fit cut other batches: a question may have fallen between.
                    alone._ask_all(owed, folders, asked, hold)
                return _scored(plan, folders)
        except LockedError:
            if self.state is not None:
                raise
            return []

    def _cost(
        self, plan: Sequence[Cell], folders: Mapping[Cell, Path], asked: Source, tell: Callable[[str], None]
    ) -> None:
        """Say how many answers are owed, and prepare what the first batch needs to say how long that takes."""
        owed = {}
        for cell in plan:
            key = self.settings(cell).key
            known = {str(a.question_id) for a in cell_answers(folders[cell]) if a.error is None and a.intact(key)}
            owed[cell] = sum(str(question.id) not in known for question in asked.splits[cell.split])
        self._owed = sum(_weight(cell.method) * number for cell, number in owed.items()) / self.share.count
        arms = dict.fromkeys(f"{cell.method} {cell.decoding.name}" for cell in plan)
        total = sum(len(asked.splits[cell.split]) for cell in plan)
        there = total - sum(owed.values())
        seeds = f", {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        done = f"; {there} are there already" if there else ""
        controls = "" if len(arms) == len(set(self.methods)) else "; controls are left out by --without NAME"
        tell(f"{total} answers in {len(arms)} arms ({', '.join(arms)}){seeds}{done}{controls}.")

    def _told(self, method: str, answers: int, seconds: float) -> None:
        """After the first batch: how long the rest takes at its speed."""
        left = self._owed - _weight(method) * answers
        self._owed = 0.0
        if left > 0 and self.tell is not None:
            about = seconds / (_weight(method) * answers) * left
            self.tell(f"About {spoken(about)} more at the speed of the first batch; stopped at any moment, it goes on.")

    def _ask_all(self, plan: Sequence[Cell], folders: Mapping[Cell, Path], asked: Source, hold: Hold) -> None:
        """Answer this process's share of the cells, method by method; merge what is complete if nobody else writes."""
        bar = tqdm(
            total=sum(len(asked.splits[cell.split]) for cell in plan) // self.share.count,
            unit="answer",
            # None: drawn on a terminal only; in a file every step would leave characters behind.
            disable=True if self.quiet or not self.main or not plan else None,
            smoothing=0.05,
            mininterval=1.0,
        )
        size = self.options.batch_size
        with bar:
            for method, group in itertools.groupby(plan, key=lambda cell: cell.method):
                with self._attached(method):
                    for cell in group:
                        bar.set_description(f"{method} {cell.decoding.name} {cell.split} seed {cell.seed}")
                        questions = asked.splits[cell.split]
                        if self._alone(method):
                            self._ask(cell, folders[cell], questions, 1, bar, hold)
                        elif size == "auto":
                            size = self._ask_auto(cell, folders[cell], questions, bar, hold)
                        else:
                            self._ask(cell, folders[cell], questions, int(size), bar, hold)
                        if self.share.count == 1:
                            self._merge(cell, folders[cell], questions)

    def _check_template(self, asked: Source) -> None:
        """Raise SettingsError for a template that leaves the image out of questions about images."""
        token = getattr(self.loaded.processor, "image_token", None)
        # Models without a chat template (InstructBLIP) put the image in themselves.
        if (
            self.options.template is None
            or token is None
            or getattr(self.loaded.processor, "chat_template", None) is None
        ):
            return
        pictured = any(question.image is not None for questions in asked.splits.values() for question in questions)
        if pictured and token not in self.options.template:
            raise SettingsError(
                f"the template has no {token}, and the questions are about images; put {token} where the image belongs."
            )

    def _alone(self, method: str) -> bool:
        """Whether a method refuses several samples in one batch."""
        return any("batch" in part.refuses for part in classes(method))

    @contextmanager
    def _attached(self, method: str) -> Iterator[None]:
        parsed = lvlm_decode.parse(method, **_own(method, self.options.parameters))
        lvlm_decode.attach(self.loaded.model, parsed, processor=self.loaded.processor, drafter=self.options.drafter)
        try:
            yield
        finally:
            lvlm_decode.detach(self.loaded.model)

    def _ask(self, cell: Cell, folder: Path, questions: Sequence[Question], size: int, bar: Any, hold: Hold) -> None:
        """Answer this process's share of a cell, appending after every batch."""
        own = folder / self.share.file
        resume_answers(own, repair=True)
        key = self.settings(cell).key
        # A line that somebody changed is no answer of this run.
        before = [a for a in cell_answers(folder) if a.intact(key)]
        known = {str(a.question_id) for a in before if a.error is None}
        tried = {str(a.question_id) for a in before}
        self._works = bool(known)
        batches = batches_of(questions, size)[self.share.index :: self.share.count]
        # What failed before is tried again last, so that a sample that ends the process costs the others nothing.
        batches.sort(key=lambda batch: all(str(question.id) in tried for question in batch))
        for batch in batches:
            # The whole batch again even if a part of it is known: the same batch gives the same answers.
            if any(str(question.id) not in known for question in batch):
                if self.stop is not None:
                    self.stop()
                start = time.perf_counter()
                answers = self._answer(cell, batch)
                hold.check()
                seconds = time.perf_counter() - start
                if self._owed:
                    self._told(cell.method, len(answers), seconds)
                if self.options.times:
                    self._note_time(folder, answers, seconds)
                append_answers(own, (a.sealed(key) for a in answers if str(a.question_id) not in known))
                if self._lost is not None:
                    raise EvalError(
                        f"The device cannot be used any more after question {batch[0].id} and those beside it "
                        f"({_first_line(self._lost)}); start again: the run goes on, and asks them last."
                    ) from self._lost
            bar.update(len(batch))

    def _note_time(self, folder: Path, answers: Sequence[Answer], seconds: float) -> None:
        """One line about a batch: how many answers, their tokens, and how long it took, images and views included."""
        tokens = sum(answer.tokens or 0 for answer in answers)
        append_lines(folder / TIMES, [{"answers": len(answers), "tokens": tokens, "seconds": seconds}])

    def _ask_auto(self, cell: Cell, folder: Path, questions: Sequence[Question], bar: Any, hold: Hold) -> int:
        """As `_ask`, with the batch size that accelerate's utility finds to fit in memory; returns it."""
        from accelerate.utils import find_executable_batch_size

        done = bar.n

        @find_executable_batch_size(starting_batch_size=START_BATCH)
        def attempt(batch_size: int) -> int:
            bar.update(done - bar.n)
            self._ask(cell, folder, questions, batch_size, bar, hold)
            return batch_size

        return attempt()

    def _answer(self, cell: Cell, batch: Sequence[Question]) -> list[Answer]:
        """The answers of one batch; a question that cannot be asked gets an error instead of an answer, whatever it is."""
        failed: dict[int, Answer] = {}
        images: list[Any] = []
        asked: list[Question] = []
        for i, question in enumerate(batch):
            try:
                if question.image is not None:
                    images.append(self.evaluator.shown(question, self.source.images.open(question.image)))
                asked.append(question)
            except Exception as error:
                told = str(error) if isinstance(error, LvlmDecodeError) else _opening(question.image, error)
                failed[i] = Answer.to(question, "", error=told)
        answered = iter(self._robustly(cell, asked, images)) if asked else iter(())
        return [failed[i] if i in failed else next(answered) for i in range(len(batch))]

    def _robustly(self, cell: Cell, questions: Sequence[Question], images: Sequence[Any]) -> list[Answer]:
        """As `_generate`; where that fails each sample is asked alone, so that a bad one costs the others nothing.

        What no sample of this cell can be asked with (a method that refuses the model, a missing library) is raised.
        """
        try:
            answers = self._generate(cell, questions, images)
        except torch.OutOfMemoryError:
            if self.options.batch_size == "auto" and len(questions) > 1:
                raise
        except UnreachableError:
            raise
        except Exception as error:
            self._lost = error if _device_lost(error) else None
        else:
            self._works = True
            return answers
        answers, errors = [], []
        for i, question in enumerate(questions):
            try:
                if self._lost is not None:
                    raise self._lost
                answers += self._generate(cell, [question], images[i : i + 1])
            except UnreachableError:
                raise
            except Exception as error:
                errors.append(error)
                self._lost = error if _device_lost(error) else None
                answers.append(Answer.to(question, "", error=_reason(error)))
        if len(errors) == len(questions) and not self._works and all(isinstance(e, _OF_THE_RUN) for e in errors):
            raise errors[0]
        self._works |= len(errors) < len(questions)
        return answers

    def _generate(self, cell: Cell, questions: Sequence[Question], images: Sequence[Any]) -> list[Answer]:
        processor, model = self.loaded.processor, self.loaded.model
        try:
            inputs = self._inputs(questions, images)
        except (ValueError, TypeError, OSError) as error:
            raise InputError(f"the processor cannot take this sample ({error})") from error
        inputs = inputs.to(model.device)
        with torch.inference_mode():
            generated = model.generate(
                **inputs,
                seed=cell.seed,
                sample_ids=[f"{self.evaluator.name}/{cell.split}/{question.id}" for question in questions],
                max_new_tokens=self.options.max_new_tokens or self.evaluator.max_new_tokens,
                **cell.decoding.arguments(),
            )
        new = new_tokens(generated, inputs["input_ids"])
        texts = processor.batch_decode(new, skip_special_tokens=True)
        lengths = token_counts(new, model.generation_config.eos_token_id)
        return [Answer.to(q, text.strip(), tokens=n) for q, text, n in zip(questions, texts, lengths)]

    def _inputs(self, questions: Sequence[Question], images: Sequence[Any]) -> Any:
        """The processor's tensors of a batch, left-padded."""
        prompts = [prompt_of(self.loaded.processor, question, self.options) for question in questions]
        given = {"images": list(images)} if images else {}
        return self.loaded.processor(text=prompts, padding=True, return_tensors="pt", **given)

    def _merge(self, cell: Cell, folder: Path, questions: Sequence[Question]) -> bool:
        """One answers file in the order of the questions, once all are answered; the parts are removed. False: not
        yet.
        """
        best: dict[str, Answer] = {}
        key = self.settings(cell).key
        for answer in cell_answers(folder):
            name = str(answer.question_id)
            if answer.intact(key) and (name not in best or best[name].error is not None):
                best[name] = answer
        if any(str(question.id) not in best for question in questions):
            return False
        # Answers beyond --limit from an earlier, longer run stay.
        order = {str(question.id): i for i, question in enumerate(self.source.splits[cell.split])}
        write_answers(
            folder / "answers.jsonl", sorted(best.values(), key=lambda a: order.get(str(a.question_id), len(order)))
        )
        for part in folder.glob("answers.part-*.jsonl"):
            part.unlink(missing_ok=True)
        return True


def _scored(plan: Sequence[Cell], folders: Mapping[Cell, Path]) -> list[Result]:
    done = [folders[cell] for cell in plan if (folders[cell] / "answers.jsonl").exists()]
    try:
        return [score_cell(folder) for folder in done]
    except OutputError:
        raise
    except EvalError as error:
        raise type(error)(
            f"The answers are all in {done[0].parents[3]}, but they cannot be scored yet: {error}"
        ) from error


def _weight(method: str) -> int:
    """Forwards a token of a method, roughly: one, and one for each view."""
    return 1 + sum(len(part.costs) for part in classes(method))


# Errors about the method, the model and the settings; any other error is about the sample.
_OF_THE_RUN = (UnsupportedError, ParameterError, DependencyError, SettingsError)


def _device_lost(error: Exception) -> bool:
    """Whether the accelerator answers nothing more in this process (a device-side assertion, a lost card)."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _opening(image: str | None, error: Exception) -> str:
    return f"image {image} cannot be opened ({type(error).__name__}: {_first_line(error)})"


def _reason(error: Exception) -> str:
    if isinstance(error, LvlmDecodeError):
        return str(error)
    return f"the model cannot answer this sample ({type(error).__name__}: {_first_line(error)})"


def new_tokens(generated: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """(B, T) what was generated, without the prompt where `generate` returned it in front."""
    width = prompt.shape[1]
    if generated.shape[1] >= width and torch.equal(generated[:, :width], prompt):
        return generated[:, width:]
    return generated


def token_counts(tokens: torch.Tensor, eos: int | Sequence[int] | None) -> list[int]:
    """How many tokens each row of (B, T) has up to and including its first end-of-sequence token."""
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    hits = torch.isin(tokens, torch.tensor(ends, device=tokens.device, dtype=tokens.dtype))
    first = torch.where(hits.any(1), hits.int().argmax(1) + 1, tokens.shape[1])
    return first.tolist()


def environment(model: Any, options: Options) -> dict[str, Any]:
    """Where answers were made: good to know, not compared when a run is continued."""
    versions = {}
    for name in ("lvlm-decode", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    device = model.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"versions": versions, "device": machine, "batch_size": options.batch_size}


def failures(results: Sequence[Result]) -> int:
    """How many questions could not be asked or were left without an answer, over all cells."""
    return sum(len(result.audit.failed) + len(result.audit.missing) for result in results)
