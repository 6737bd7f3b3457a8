"""What a run consists of: cells of (split, method, decoding, seed), the matched controls that always go with them, and
the folder each cell lives in. Imports no torch; `runner` fills the cells, `tables` reads them.

    OUT/pope/random/questions.jsonl                      what was asked
    OUT/pope/random/vcd/sample/seed-0/settings.json      everything that decides an answer
    OUT/pope/random/vcd/sample/seed-0/answers.jsonl      what the model said
    OUT/pope/random/vcd/sample/seed-0/rows.jsonl         scored answers with their evidence
    OUT/pope/random/vcd/sample/seed-0/summary.json       counts and rates
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lvlm_decode.errors import FileFormatError, MissingFileError, SettingsError
from lvlm_decode.reading import Closed, Count, Identity, Record, checked, read_json, read_records, repeated

from .answers import Audit, audit, line_of, resume_answers, write_json, write_rows, write_whole
from .base import Answer, Evaluator, Question, Row
from .joins import join

# A method that multiplies the logits by about four (RITUAL adds alpha = 3 times a second view) sharpens like this
# temperature, so it is compared with the mask at this temperature too (design: matched controls).
SHARP_TEMPERATURE = 0.25
CONTROLS = ("plain", "mask")
# OPERA's default; its control is plain beam search with as many.
OPERA_BEAMS = 5
# The mask's own default; a method that names another beta is compared with the mask at that beta.
DEFAULT_BETA = 0.1


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. Greedy unless do_sample or num_beams says otherwise."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.do_sample and not 0 < self.temperature < math.inf:
            raise SettingsError(
                f"temperature is {self.temperature}; sampling needs a finite one above 0 (greedy: --no-do-sample)."
            )
        if self.num_beams < 1:
            raise SettingsError(f"num_beams is {self.num_beams}; it must be at least 1.")
        if self.do_sample and self.num_beams > 1:
            raise SettingsError(
                "beam sampling draws over all beams at once, so an answer would depend on its batch; leave out --num-beams "
                "or add --no-do-sample."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SettingsError(f"top_p is {self.top_p}; it must lie in (0, 1].")
        if self.top_k is not None and self.top_k < 0:
            raise SettingsError(f"top_k is {self.top_k}; it must be at least 1, or left out for all tokens.")
        if not self.do_sample:
            # Nothing is drawn, so what draws would follow makes no other decoding.
            for name, default in (("temperature", 1.0), ("top_p", None), ("top_k", None)):
                object.__setattr__(self, name, default)

    @property
    def name(self) -> str:
        """Short and unique: greedy, sample, sample-t0.25-p0.9, beam5."""
        if not self.do_sample:
            return f"beam{self.num_beams}" if self.num_beams > 1 else "greedy"
        parts = ["sample"]
        if self.temperature != 1:
            parts.append(f"t{self.temperature:.12g}")
        if self.top_p is not None:
            parts.append(f"p{self.top_p:.12g}")
        if self.top_k is not None:
            parts.append(f"k{self.top_k}")
        return "-".join(parts)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`. top_k=0 turns off Hugging Face's default of 50."""
        given: dict[str, Any] = {"do_sample": self.do_sample, "num_beams": self.num_beams}
        if self.do_sample:
            given |= {"temperature": self.temperature, "top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
        return given


GREEDY = Decoding()


class DecodingShape(Closed):
    """`Decoding` as files hold it."""

    do_sample: bool = False
    temperature: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    num_beams: Annotated[int, Field(lt=2**15)] = 1

    def to_decoding(self, where: str) -> Decoding:
        """The decoding. Raises FileFormatError naming the file where its values contradict each other."""
        try:
            return Decoding(**self.model_dump())
        except SettingsError as error:
            raise FileFormatError(f"{where}: field 'decoding': {error}") from error


class _MethodShape(Record):
    """The method of a run: its name as on the command line, its parameters, and of the files that they name the contents."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)


class _AskedShape(Closed):
    """The questions that a cell was asked, without their content: how many, and `questions_hash` of them."""

    questions: Count
    hash: str


class SettingsShape(Record):
    """settings.json of a cell: what reading it back needs; everything else in it is compared as it stands."""

    evaluator: str
    split: str
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    method: _MethodShape
    decoding: DecodingShape
    scoring: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    protocol: str | None = None
    asked: _AskedShape | None = None


class _QuestionShape(Closed):
    """A line of questions.jsonl, which a run wrote."""

    id: Identity
    text: str
    image: str | None
    label: Any = None
    cluster: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of one method: a line of a table has one cell a seed."""

    split: str
    method: str
    decoding: Decoding
    seed: int

    def folder(self, out: Path, evaluator: str) -> Path:
        return Path(out) / evaluator / slug(self.split) / slug(self.method) / self.decoding.name / f"seed-{self.seed}"


def slug(name: str) -> str:
    """A name that is safe as a folder on every system."""
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "_", name).strip("_") or "_"


def controls(method: str, decoding: Decoding) -> list[tuple[str, Decoding]]:
    """The (method, decoding) pairs a method must be read against, the method itself left out.

    Greedy always. With sampling or beams, also a method's own beams, the plain model in the same way; with sampling
    the plausibility mask alone, because the mask by itself already lifts sampled scores; for RITUAL the mask at
    temperature 0.25; for DCD its projector of the preferred answers alone, which is a further training of the model.
    """
    wanted = [("plain", GREEDY)]
    if decoding != GREEDY:
        wanted.append(("plain", decoding))
    if beams := own_beams(method):
        wanted.append(("plain", Decoding(num_beams=beams)))
    if decoding.do_sample:
        wanted.append((mask_of(method), decoding))
        if "ritual" in re.split(r"\W+", method.lower()):
            wanted.append((mask_of(method), Decoding(do_sample=True, temperature=SHARP_TEMPERATURE)))
    if alone := chosen_alone(method):
        wanted.append((alone, decoding))
    return [pair for pair in dict.fromkeys(wanted) if pair != (method, decoding)]


def chosen_alone(method: str) -> str | None:
    """DCD without its contrast: the projector fitted to the preferred answers, under the same mask. None for others."""
    call = re.fullmatch(r"(dcd)(?:\((.*)\))?", method, re.IGNORECASE)
    if call is None:
        return None
    kept = [part for part in (call[2] or "").split(",") if part and not re.match(r"\s*(?:cd_)?alpha\s*=", part)]
    return f"{call[1]}({','.join(['alpha=0', *kept])})"


def own_beams(method: str) -> int | None:
    """The beams of a method that searches with beams of its own (OPERA); None for others."""
    if not re.match(r"opera\b", method.lower()):
        return None
    given = re.search(r"num_beams=(\d+)", method)
    return int(given[1]) if given else OPERA_BEAMS


def mask_of(method: str) -> str:
    """The mask alone, with the beta that the method names; of a sum the strictest, as the sum applies it."""
    betas = [float(beta) for beta in re.findall(r"\b(?:cd_)?beta=([\d.]+(?:e-?\d+)?)", method)]
    return f"mask(beta={max(betas):g})" if betas and max(betas) != DEFAULT_BETA else "mask"


def is_control(method: str) -> bool:
    """Whether a method is one of the controls, with any parameters."""
    return method.partition("(")[0] in CONTROLS


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise SettingsError for a seed that is given twice, or that no file of settings can hold."""
    if twice := repeated(map(str, seeds)):
        raise SettingsError(f"seed {twice[0]} is given twice, and would give the same answers again; leave one out.")
    if long := [seed for seed in seeds if not -(2**63) <= seed < 2**63]:
        raise SettingsError(f"seed {long[0]} has more than 64 bits; give a smaller one.")


def cells(
    splits: Sequence[str],
    methods: Sequence[tuple[str, Decoding]],
    seeds: Sequence[int],
    without: Sequence[str] = (),
) -> list[Cell]:
    """Every cell of a run, controls first. The plain model under greedy or beams draws nothing, so it has one seed.

    without: controls to leave out, as `check_without` takes them. Raises SettingsError as `check_seeds` does.
    """
    check_seeds(seeds)
    wanted = [pair for method in methods for pair in controls(*method)]
    pairs = dict.fromkeys([pair for pair in wanted if not _names(pair) & set(without)] + list(methods))
    return [
        Cell(split, method, decoding, seed)
        for method, decoding in pairs
        for split in splits
        for seed in (seeds if decoding.do_sample or not is_control(method) else seeds[:1])
    ]


# How long the batches of a cell took, where a run was told to write it: answers, tokens, seconds.
TIMES = "times.jsonl"
# Fields of settings.json that decide no answer.
NOT_DECIDING = ("scoring", "environment", "asked")


def _names(control: tuple[str, Decoding]) -> set[str]:
    """What a control may be called: "mask" for all that the mask alone runs with, "mask sample" for one."""
    method, decoding = control
    return {method, method.partition("(")[0], f"{method} {decoding.name}"}


def check_without(without: Sequence[str], methods: Sequence[tuple[str, Decoding]]) -> None:
    """Raise SettingsError for a control to leave out that the methods do not have."""
    had = [control for method in methods for control in controls(*method)]
    known = dict.fromkeys(f"{name} {decoding.name}" for name, decoding in had)
    for name in without:
        if not any(name in _names(control) for control in had):
            raise SettingsError(
                f"--without {name} names no control of {', '.join(method for method, _ in methods)}; "
                f"controls: {', '.join(known) or 'none'}."
            )


@dataclass(frozen=True)
class Settings:
    """Everything that decides the answers of a cell (`decides`), how they are scored unless somebody asks for another
    way (`scoring`, the evaluator's options), and what is good to know (`environment`).
    """

    decides: Mapping[str, Any]
    environment: Mapping[str, Any]
    scoring: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What the checksums of the answers are made with."""
        return settings_key(self.decides)

    def record(self) -> dict[str, Any]:
        return {**self.decides, "scoring": dict(self.scoring), "environment": dict(self.environment)}


def settings_key(record: Mapping[str, Any]) -> str:
    """What identifies the settings that decide answers, from the content of a settings.json."""
    # A drafter is lossless: with it and without it the answers are the same bytes.
    decides = {name: value for name, value in record.items() if name not in (*NOT_DECIDING, "drafter")}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def claim(folder: Path, settings: Settings, asked: Sequence[Question]) -> None:
    """Write settings.json, or check that the one in the folder decides the same answers.

    Scoring options may change: the newest are kept. asked: the questions of this run, the first of the split's; the longest
    list that a cell was asked is noted, so that a line that somebody takes out of questions.jsonl is missed. Raises
    SettingsError naming the first few fields that differ: answers of two settings must not share a file.
    """
    path = folder / "settings.json"
    now_asked = {"questions": len(asked), "hash": questions_hash(asked)}
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings.record() | {"asked": now_asked})
        return
    found, shape = read_settings(folder)
    before = _flat({name: value for name, value in found.items() if name not in NOT_DECIDING})
    now = _flat(dict(settings.decides))
    differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differ and all(name.startswith("method.files.") for name in differ):
        raise SettingsError(_other_content(folder, shape.method.files, settings.decides["method"].get("files", {})))
    if differ:
        shown = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in differ[:3])
        raise SettingsError(f"{folder} holds answers made with other settings ({shown}); give another --out.")
    longer = shape.asked is not None and shape.asked.questions > len(asked)
    kept = {**found, "scoring": dict(settings.scoring), "asked": found["asked"] if longer else now_asked}
    if kept != found:
        write_json(path, kept)


def _other_content(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What is said of answers whose method read files of another content, or of one that nobody noted."""
    path = next(path for path in {**before, **now} if before.get(path) != now.get(path))
    if path in before:
        return (
            f"{folder} holds answers that were made with another content of {path}; give another --out, or put back the "
            "file that made them."
        )
    return (
        f"{folder} holds answers of a version that did not note the content of files, so nobody can tell whether {path} is "
        "still what made them; give another --out. What is there can be scored as before."
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: list(value) if isinstance(value, tuple) else value}
    return {
        k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else str(key)).items()
    }


def questions_hash(questions: Sequence[Question]) -> str:
    """What tells two lists of questions apart: ids, texts, labels, images, order."""
    return hashlib.sha256(b"".join(line_of(asdict(question)) for question in questions)).hexdigest()[:16]


def _questions_file(folder: Path) -> Path:
    return Path(folder) / "questions.jsonl"


def write_questions(folder: Path, questions: Sequence[Question]) -> None:
    """questions.jsonl of a split: what was asked, for audits later. A longer list that was asked before stays."""
    path = _questions_file(folder)
    content = b"".join(line_of(asdict(question)) for question in questions)
    if path.exists() and path.read_bytes().startswith(content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def read_questions(folder: Path) -> list[Question] | None:
    """The questions of a split folder; None when there is no such file."""
    path = _questions_file(folder)
    if not path.exists():
        return None
    found = [checked(_QuestionShape, record, where) for where, record in read_records(path)]
    if twice := repeated(str(line.id) for line in found):
        raise FileFormatError(
            f"{path}: question {twice[0]} is there twice; start eval again, which writes the file anew."
        )
    return [Question(**{name: getattr(line, name) for name in _QuestionShape.model_fields}) for line in found]


def _altered(asked: _AskedShape | None, found: Sequence[Question], path: Path) -> tuple[str, ...]:
    """What tells that questions.jsonl is not as the run wrote it; empty where it is. Longer lists of other runs may follow."""
    if asked is None:
        return (f"{path} (settings.json does not say what was asked)",)
    if len(found) < asked.questions:
        return (f"{path} ({len(found)} questions of {asked.questions} that were asked)",)
    if questions_hash(found[: asked.questions]) != asked.hash:
        return (f"{path} (other questions than the {asked.questions} that were asked)",)
    return ()


@dataclass(frozen=True)
class Result:
    """A cell read back and scored."""

    evaluator: Evaluator
    split: str
    method: str
    decoding: Decoding
    seed: int
    rows: Sequence[Row]
    audit: Audit
    settings: Mapping[str, Any]
    folder: Path
    # Number and hash of the questions that were asked; None where the folder does not say.
    questions: int | None = None
    asked: str | None = None

    @property
    def name(self) -> str:
        """Which cell this is: the folder first, because one table may hold runs of several models."""
        return f"{self.folder}: {self.method}, {self.decoding.name}, {self.split}, seed {self.seed}"


def found_cells(out: Path) -> list[Path]:
    """Folders below `out` that hold settings and answers.

    Raises MissingFileError when there is none, or answers of which no settings say how they were made.
    """
    out = Path(out)
    if not out.is_dir():
        raise MissingFileError(f"{out} is not a folder; give the --out of an evaluation.")
    found = sorted(path.parent for path in out.rglob("settings.json"))
    if not found:
        raise MissingFileError(f"{out} holds no evaluation (no settings.json); give the --out of lvlm-decode eval.")
    for path in sorted(out.rglob("answers.jsonl")):
        if path.parent not in found:
            raise MissingFileError(
                f"{path} lies there without its settings.json, so nobody can tell what made these answers; move it away, or "
                "start eval again."
            )
    return found


def read_settings(folder: Path) -> tuple[dict[str, Any], SettingsShape]:
    """settings.json of a cell: as it stands, and what reading needs of it. Raises FileFormatError naming the field."""
    path = Path(folder) / "settings.json"
    found = read_json(path)
    return found, checked(SettingsShape, found, str(path))


def read_cell(folder: Path, **options: Any) -> Result:
    """Read one cell and score it by the questions it asked; `options` change the evaluator's (another rule, say).

    Raises EvalError where answers are about something else than the questions beside them.
    """
    from . import evaluator

    settings, shape = read_settings(folder)
    scorer = evaluator(shape.evaluator, **(shape.scoring or {}) | options)
    answers = cell_answers(folder)
    key = settings_key(settings)
    unsealed = tuple(str(answer.question_id) for answer in answers if answer.checksum is None)
    edited = tuple(str(a.question_id) for a in answers if a.checksum is not None and not a.intact(key))
    questions = read_questions(split_folder(folder))
    contradicted: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()
    if questions is not None:
        altered = _altered(shape.asked, questions, _questions_file(split_folder(folder)))
        answers, contradicted = join(answers, questions, str(folder))
    usable, trouble = audit(answers, questions)
    unasked = tuple(str(answer.question_id) for answer in usable) if questions is None else ()
    rows = scorer.rows(usable)
    trouble = replace(trouble, doubts=tuple(scorer.doubts(rows)))
    return Result(
        scorer,
        shape.split,
        shape.method.name,
        shape.decoding.to_decoding(str(folder / "settings.json")),
        shape.seed,
        rows,
        replace(trouble, contradicted=contradicted, edited=edited, unsealed=unsealed, unasked=unasked, altered=altered),
        settings,
        folder,
        None if questions is None else len(questions),
        None if questions is None else questions_hash(questions),
    )


def split_folder(folder: Path) -> Path:
    """OUT/evaluator/split of a cell's folder OUT/evaluator/split/method/decoding/seed-N."""
    return Path(folder).parents[2]


def cell_answers(folder: Path) -> list[Answer]:
    """The answers of a cell: the finished file, and parts of an unfinished run."""
    parts = sorted(Path(folder).glob("answers.part-*-of-*.jsonl"))
    return [answer for path in (Path(folder) / "answers.jsonl", *parts) for answer in resume_answers(path)]


def spoken(seconds: float) -> str:
    """A duration as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def score_cell(folder: Path, **options: Any) -> Result:
    """Score a cell and write rows.jsonl and summary.json beside its answers."""
    result = read_cell(folder, **options)
    write_rows(folder / "rows.jsonl", result.rows)
    summary = {
        "evaluator": result.evaluator.name,
        "options": result.evaluator.options(),
        **(result.evaluator.report(result.rows) if result.rows else {}),
        "problems": result.audit.counts(),
    }
    write_json(folder / "summary.json", summary)
    return result
