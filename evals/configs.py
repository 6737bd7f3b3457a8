"""Tables of papers as files: what was run, what was printed, and our run of the same rows beside it.

A file of `configs/` holds one block of rows of a paper's table: model, prompt, decoding, seeds, images, the published
values in the paper's own units and where they come from, and what is known about rows that others could not reproduce.
`lvlm-decode table configs/FILE` runs the rows or uses answers that are there. Reading a file imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lvlm_decode.errors import (
    EvalError,
    FileFormatError,
    LvlmDecodeError,
    MissingFileError,
    SettingsError,
    UnknownNameError,
    suggestion,
)
from lvlm_decode.reading import Closed, nearest, read_yaml

from . import evaluator
from .base import Column, Evaluator
from .loaders import Source, data_source, protocol_source, scene_source
from .metrics import REPLICATES, Interval, compare, intervals
from .plan import Decoding, DecodingShape, Result, found_cells, read_cell, slug
from .pope import STRATEGIES
from .protocols import UNKNOWN, Protocol, protocol, read_protocol
from .tables import Block, Entry, Value, difference_value, gather

# Mean of a metric over the splits of a table; some papers print nothing else.
MEAN = "mean"
# What a run on the small model asks unless told otherwise: enough to see the table work, in minutes.
TINY_LIMIT = 120
TINY_SEEDS = 1


@dataclass(frozen=True)
class Published:
    """split -> metric -> value in the unit the paper prints. unverified: nobody here has seen them in the paper."""

    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unverified: bool = False


@dataclass(frozen=True)
class PaperRow:
    """One row. method: as on the command line; None for a row this project cannot run, with `why`."""

    name: str
    method: str | None
    decoding: Decoding
    published: Published
    why: str | None = None
    # Where the printed value was measured in another way than the table's other rows.
    protocol: str | None = None


@dataclass(frozen=True)
class PaperTable:
    """One file of `configs/`; the fields are the file's."""

    path: Path
    title: str
    paper: str
    source: str
    benchmark: str
    options: Mapping[str, Any]
    model: str | None
    template: str | None
    suffix: str
    max_new_tokens: int | None
    seeds: tuple[int, ...]
    splits: tuple[str, ...]
    images: str
    baseline: str | None
    rows: tuple[PaperRow, ...]
    notes: tuple[str, ...]
    # How the printed values were measured; None where nobody knows.
    protocol: Protocol | None = None

    @property
    def evaluator(self) -> Evaluator:
        return evaluator(self.benchmark, **self.options)


_Number = Annotated[float, Field(allow_inf_nan=False)]


class _RowShape(Closed):
    """A row of a file."""

    name: str
    method: str | None
    decoding: DecodingShape | None = None
    published: dict[str, dict[str, _Number]] | None = None
    unverified: bool | None = None
    why: str | None = None
    protocol: str | None = None


class _TableShape(Closed):
    """A file of `configs/`."""

    title: str
    paper: str
    source: str
    benchmark: str
    model: str | None
    splits: list[str]
    images: str
    rows: list[_RowShape]
    options: dict[str, Any] | None = None
    template: str | None = None
    suffix: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    decoding: DecodingShape | None = None
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] | None = None
    baseline: str | None = None
    notes: list[str] | None = None
    protocol: str = UNKNOWN


def folder() -> Path:
    """Where the papers' tables lie: `configs/` of this checkout, or where the installed package keeps them."""
    checkout = Path(__file__).resolve().parents[1] / "configs"
    return checkout if checkout.is_dir() else Path(__file__).resolve().parent / "papers"


def table_path(target: Path) -> Path:
    """`target`, or the file of the paper's table that has this name.

    Raises:
        UnknownNameError: neither is there.
    """
    if target.exists() or len(target.parts) > 1:
        return target
    known = {path.stem: path for path in sorted(folder().glob("*.yaml"))}
    if (name := target.name.removesuffix(".yaml")) not in known:
        raise UnknownNameError(
            f"{target} is neither a folder nor a paper's table{suggestion(name, known)}; lvlm-decode table --list shows "
            "the tables."
        )
    return known[name]


def table_titles() -> dict[str, str]:
    """Name -> title of every paper's table."""
    return {path.stem: read_yaml(path, _TableShape).title for path in sorted(folder().glob("*.yaml"))}


def read_config(path: Path) -> PaperTable:
    """A table from its file. Raises FileFormatError naming file, line and field of what is missing, unknown or wrong."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} is not a file; lvlm-decode table --list shows the papers' tables.")
    raw = read_yaml(path, _TableShape)
    measured = _protocol(raw.protocol, path)
    options = raw.options or {}
    columns = {column.key for column in _evaluator(raw.benchmark, options, path).columns}
    splits = tuple(raw.splits)
    default = raw.decoding or DecodingShape()
    rows = tuple(
        _row(entry, default, splits, columns, f"{path}, row {number}") for number, entry in enumerate(raw.rows, 1)
    )
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise FileFormatError(f"{path}: two rows have the same name; every row needs its own.")
    baseline = raw.baseline
    if baseline is not None and baseline not in names:
        raise FileFormatError(f"{path}: baseline {baseline!r} is no row; rows: {', '.join(names)}.")
    template = measured.templates.get(raw.model) if measured and raw.model else None
    given = raw.model_fields_set
    return PaperTable(
        path=path,
        title=raw.title,
        paper=raw.paper,
        source=raw.source,
        benchmark=raw.benchmark,
        options=options,
        model=raw.model,
        template=raw.template if "template" in given else template,
        suffix=(raw.suffix if "suffix" in given else measured.suffix if measured else "") or "",
        max_new_tokens=raw.max_new_tokens if "max_new_tokens" in given or not measured else measured.max_new_tokens,
        seeds=tuple(raw.seeds or (measured.seeds if measured else ()) or (0,)),
        splits=splits,
        images=raw.images,
        baseline=baseline,
        rows=rows,
        notes=tuple(raw.notes or ()),
        protocol=measured,
    )


def _evaluator(benchmark: str, options: Mapping[str, Any], path: Path) -> Evaluator:
    """The evaluator of a table. Raises FileFormatError naming the file where there is none of that name or option."""
    try:
        return evaluator(benchmark, **options)
    except LvlmDecodeError as error:
        raise FileFormatError(f"{path}: {error}") from error


def _protocol(name: str, path: Path) -> Protocol | None:
    """The protocol a table names, from the folder beside the table or from this checkout; None for "unknown"."""
    if name == UNKNOWN:
        return None
    beside = path.parent / "protocols" / f"{name}.yaml"
    return read_protocol(beside) if beside.is_file() else protocol(name)


def _row(raw: _RowShape, default: DecodingShape, splits: Sequence[str], columns: set[str], where: str) -> PaperRow:
    published = raw.published or {}
    for split, values in published.items():
        if split not in (*splits, MEAN):
            raise FileFormatError(f"{where}: split {split!r} is not among the table's splits {', '.join(splits)}.")
        for metric in values:
            if metric not in columns:
                raise FileFormatError(f"{where}: metric {metric!r} is unknown{nearest(metric, columns)}.")
    if raw.method is None and not raw.why:
        raise FileFormatError(f"{where}: a row without a method needs `why`.")
    decoding = (raw.decoding or default).to_decoding(where)
    return PaperRow(raw.name, raw.method, decoding, Published(published, bool(raw.unverified)), raw.why, raw.protocol)


def scene_split(benchmark: str, split: str) -> str:
    """The split of the emoji scenes that stands for a split of the real benchmark."""
    if benchmark == "pope":
        return next((strategy for strategy in STRATEGIES if strategy in split), split)
    return split


def is_tiny(model: str) -> bool:
    """Whether a model is one of the project's small ones, by name or folder: they know the emoji scenes alone."""
    import lvlm_decode_data

    return lvlm_decode_data.is_tiny(model)


def on_scenes(config: PaperTable) -> PaperTable:
    """The table with its splits named as on the emoji scenes, with the small model's own prompt. Values stay."""
    rename = {split: scene_split(config.benchmark, split) for split in config.splits} | {MEAN: MEAN}
    rows = tuple(
        replace(
            row,
            published=replace(
                row.published, values={rename[split]: values for split, values in row.published.values.items()}
            ),
        )
        for row in config.rows
    )
    splits = tuple(dict.fromkeys(rename[split] for split in config.splits))
    # Options that point at files of the real benchmark say nothing about scenes, and the small models know one prompt.
    options = {name: value for name, value in config.options.items() if name in ("rule", "parser", "unfinished")}
    if options.get("parser") == "wordnet-pos":
        options["parser"] = "pattern"
    return replace(config, rows=rows, splits=splits, template=None, suffix="", options=options)


def run_config(
    config: PaperTable,
    *,
    rerun: bool = True,
    model: str | None = None,
    out: Path | None = None,
    limit: int | None = None,
    images: Path | None = None,
    questions: Path | None = None,
    seeds: int | None = None,
) -> tuple[PaperTable, list[Result]]:
    """Run the rows that are not there yet (`rerun`), read all of them; the table comes back with the splits it has.

    With the small models the questions are about the emoji scenes. Otherwise `questions` and `images` default to where
    `lvlm-decode data get` puts them.
    """
    name = model or config.model
    if name is None:
        raise EvalError(f"{config.path}: {config.images} The table has no model that runs here; give one with --model.")
    tiny = is_tiny(name)
    if tiny:
        config = on_scenes(config)
        limit, seeds = limit or TINY_LIMIT, seeds or TINY_SEEDS
    elif config.benchmark == "chair":
        config = with_truth(config)
    out = Path(out) if out is not None else Path("runs") / f"{config.path.stem}-{slug(Path(name).name)}"
    if rerun:
        _run(config, name, tiny, out, limit, images, questions, config.seeds[:seeds])
    results = [read_cell(folder, **config.options) for folder in found_cells(out)]
    return config, [result for result in results if result.evaluator.name == config.benchmark]


def _run(
    config: PaperTable,
    model: str,
    tiny: bool,
    out: Path,
    limit: int | None,
    images: Path | None,
    questions: Path | None,
    seeds: Sequence[int],
) -> None:
    from .runner import load

    source = source_of(config, tiny, images, questions)
    loaded = load(model, dtype=None if tiny else dtype_of([config]))
    run_of(config, loaded, source, out, seeds, limit, tiny).execute()


def run_of(
    config: PaperTable,
    loaded: Any,
    source: Source,
    out: Path,
    seeds: Sequence[int],
    limit: int | None,
    tiny: bool,
    **how: Any,
) -> Any:
    """The run of a table's rows with their matched controls; `how` as fields of `runner.EvaluationRun`."""
    from .runner import EvaluationRun, Options, decoding_for

    methods = dict.fromkeys((row.method, row.decoding) for row in config.rows if row.method is not None)
    for method, decoding in methods:
        decoding_for(method, decoding)
    tokens = None if tiny else config.max_new_tokens
    options = Options(max_new_tokens=tokens, suffix=config.suffix, template=config.template, times=bool(how))
    followed = label_of(config, tiny) if config.protocol else None
    return EvaluationRun(
        config.evaluator, source, loaded, out, list(methods), seeds, limit, options, protocol=followed, **how
    )


def dtype_of(tables: Sequence[PaperTable]) -> str | None:
    """The type that the protocols of some tables run in; None where they leave it to the checkpoint.

    Raises SettingsError where they differ: one model is loaded for all of them.
    """
    wanted = {table.path.stem: table.protocol.dtype if table.protocol else None for table in tables}
    if len(set(wanted.values())) > 1:
        said = ", ".join(f"{name}: {dtype or 'as the checkpoint'}" for name, dtype in wanted.items())
        raise SettingsError(f"the tables' protocols run in different types ({said}); reproduce those of one at a time.")
    return next(iter(wanted.values()), None)


def with_truth(config: PaperTable) -> PaperTable:
    """A CHAIR table about photographs with the files its scores need: synonyms, and what each image contains.

    Those that the table names, else `synonyms.txt` and `objects.json` of the data folder. Raises MissingFileError.
    """
    from .download import data_folder

    options = dict(config.options)
    remedies = {
        "vocabulary": ("synonyms.txt", "run lvlm-decode data get chair"),
        "objects": ("objects.json", "make it with lvlm-decode data objects"),
    }
    for name, (file, remedy) in remedies.items():
        path = Path(options.get(name) or data_folder() / "chair" / file)
        if not path.is_file():
            raise MissingFileError(f"{path} is not there; {remedy}, or name another under options: {name}.")
        options[name] = str(path)
    return replace(config, options=options)


def source_of(config: PaperTable, tiny: bool, images: Path | None, questions: Path | None) -> Source:
    """What a table asks about: emoji scenes, its protocol's list of images, or question files.

    Raises MissingFileError saying what to fetch.
    """
    if tiny:
        return scene_source(config.evaluator).only(config.splits)
    measured = config.protocol
    if questions is None and config.benchmark == "chair" and measured is not None and measured.list_key:
        return protocol_source(measured, config.evaluator, images)
    if questions is None and config.benchmark == "chair":
        raise MissingFileError(f"which images the table is about is not known; give --questions. {config.images}")
    return data_source(config.evaluator, config.splits, questions, images)


# --- ours beside the published


def label_of(config: PaperTable, tiny: bool) -> str:
    """What settings and tables call answers to a table's rows: its protocol, and where they are not quite of it."""
    if tiny:
        return f"{config.protocol.name if config.protocol else UNKNOWN} on emoji scenes"
    return config.protocol.label(config.evaluator) if config.protocol else UNKNOWN


def other_images(config: PaperTable, results: Sequence[Result]) -> bool:
    """Whether answers are about other images than the list of the table's protocol, as --questions allows."""
    key = config.protocol and config.protocol.list_key
    return key is not None and any((r.settings.get("data") or {}).get("questions_sha256") != key for r in results)


def paper_blocks(
    config: PaperTable, results: Sequence[Result], model: str, replicates: int = REPLICATES
) -> list[Block]:
    """Ours, the published value, the difference and its interval, row by row; then the gains over the table's
    baseline.
    """
    chosen = config.evaluator
    columns = {column.key: column for column in chosen.columns}
    groups = gather(results)
    found = {split: _of_split(config, groups.get((config.benchmark, split), [])) for split in config.splits}
    if unlike := [title for _, title in groups for split in config.splits if title.startswith(f"{split}, ")]:
        raise EvalError(
            f"{config.path}: the answers are of several data sets ({', '.join(unlike)}); give one --out each."
        )
    lines = []
    for row in config.rows:
        for split in (*config.splits, MEAN):
            published = row.published.values.get(split, {})
            if split == MEAN and not published:
                continue
            values = our_values(chosen, row, split, found, replicates)
            ours: Mapping[str, Interval | float] = values
            if split == MEAN:
                ours = {key: interval.value for key, interval in values.items()}
            keys = list(published) or [c.key for c in chosen.columns if c.paired]
            for key in keys:
                lines.append(_line(config, row, split, columns[key], published.get(key), ours.get(key)))
    titles = ("Row", "Method", "Decoding", "Split", "Metric", "Ours", "Published", "Ours - published")
    measured = label_of(config, is_tiny(model))
    if not is_tiny(model) and other_images(config, results):
        measured += " with other images"
    notes = tuple(_notes(config, model))
    gains = _gains(config, chosen, columns, found, replicates)
    return [
        Block(config.title, titles, tuple(lines), notes, measured),
        *(replace(block, protocol=measured, elsewhere=notes) for block in gains),
    ]


def _of_split(config: PaperTable, methods: Sequence[Entry]) -> dict[tuple[str, Decoding], Entry]:
    """The methods of a split by name and decoding. Raises EvalError where two differ in model or settings."""
    found: dict[tuple[str, Decoding], Entry] = {}
    for method in methods:
        if method.pair in found:
            other = found[method.pair]
            raise EvalError(
                f"{config.path}: {other.label} and {method.label} are two runs; a paper's table takes one, so give one --out."
            )
        found[method.pair] = method
    return found


def our_values(chosen: Evaluator, row: PaperRow, split: str, found: Mapping, replicates: int) -> dict[str, Interval]:
    """Metric -> our value of a row with its interval.

    found: split -> (method, decoding) -> what was run. For the mean over splits the bounds are averaged as well, which is
    wide enough whatever the splits share.
    """
    pair = (row.method, row.decoding)
    methods = [found[name].get(pair) for name in (found if split == MEAN else (split,))]
    if not methods or None in methods:
        return {}
    return _mean([intervals(chosen, _runs(method), replicates) for method in methods])


def our_gain(
    chosen: Evaluator, row: PaperRow, base: PaperRow | None, split: str, found: Mapping, replicates: int
) -> dict[str, Interval]:
    """Metric -> our gain of a row over the baseline row, with its paired interval; empty where one was not run."""
    if base is None or row is base:
        return {}
    differences = []
    for name in found if split == MEAN else (split,):
        ours, control = (found[name].get((r.method, r.decoding)) for r in (row, base))
        if ours is None or control is None:
            return {}
        differences.append(compare(chosen, _runs(ours), _runs(control), replicates=replicates).differences)
    return _mean(differences)


def _mean(found: Sequence[Mapping[str, Interval]]) -> dict[str, Interval]:
    def mean(key: str, bound: str) -> float:
        return sum(getattr(each[key], bound) for each in found) / len(found)

    return {key: Interval(mean(key, "value"), mean(key, "low"), mean(key, "high")) for key in found[0]}


def _runs(method: Entry) -> list:
    return [rows for rows in method.runs if rows]


def _line(
    config: PaperTable,
    row: PaperRow,
    split: str,
    column: Column,
    published: float | None,
    ours: Interval | float | None,
) -> tuple[str | Value, ...]:
    scale = 100 if column.kind == "percent" else 1
    theirs: str | Value = "–"
    if published is not None:
        theirs = Value(
            published / scale,
            column.kind,
            digits=2,
            mark=published_mark(config, row),
            protocol=measured_by(config, row),
        )
    head = (row.name, row.method or "not run", row.decoding.name, split, column.title)
    if ours is None:
        return (*head, "–", theirs, "–")
    bound = ours if isinstance(ours, Interval) else None
    value = ours.value if isinstance(ours, Interval) else ours
    shown = Value(value, column.kind, *((bound.low, bound.high) if bound else (None, None)))
    if published is None:
        return (*head, shown, theirs, "–")
    target = published / scale
    low, high = (bound.low - target, bound.high - target) if bound else (None, None)
    return (*head, shown, theirs, Value(value - target, column.kind, low, high, signed=True, trusted=False))


def measured_by(config: PaperTable, row: PaperRow) -> str:
    """The protocol of a row's printed values, "unknown" where nobody knows."""
    return row.protocol or (config.protocol.name if config.protocol else UNKNOWN)


def published_mark(config: PaperTable, row: PaperRow) -> str:
    """What stands beside a published value: whether it was verified, and how it was measured if not as the others."""
    measured = config.protocol if row.protocol in (None, UNKNOWN) else _protocol(row.protocol, config.path)
    said = [f"protocol {row.protocol}"] if row.protocol else []
    said += ["images unknown"] if measured is not None and measured.unknown_images else []
    return ("†" if row.published.unverified else "") + (f" ({', '.join(said)})" if said else "")


def _gains(
    config: PaperTable, chosen: Evaluator, columns: Mapping[str, Column], found: Mapping, replicates: int
) -> list[Block]:
    """What each row gains over the baseline row: published, and ours with the paired interval."""
    base = next((row for row in config.rows if row.name == config.baseline), None)
    if base is None:
        return []
    lines = []
    for row in config.rows:
        if row is base or row.method is None:
            continue
        own, other = (measured_by(config, r) for r in (row, base))
        mixed = own if own == other else f"{own} minus {other}"
        mark = "" if own == other else f" (protocol {mixed})"
        for split in config.splits:
            methods = found[split]
            ours, control = methods.get((row.method, row.decoding)), methods.get((base.method, base.decoding))
            pair = compare(chosen, _runs(ours), _runs(control), replicates=replicates) if ours and control else None
            theirs, before = (r.published.values.get(split, {}) for r in (row, base))
            for key in [key for key in columns if key in theirs and key in before]:
                column = columns[key]
                gain = Value(
                    round(theirs[key] - before[key], 4) / (100 if column.kind == "percent" else 1), column.kind
                )
                shown: str | Value = "–"
                if pair is not None and key in pair.differences:
                    shown = difference_value(pair.differences[key], column, pair.clusters)
                printed = replace(gain, signed=True, mark=mark, protocol=mixed)
                lines.append((row.name, split, column.title, shown, printed))
    if not lines:
        return []
    titles = ("Row", "Split", "Metric", "Our gain", "Published gain")
    return [Block(f"Gain over {base.name}", titles, tuple(lines))]


def _notes(config: PaperTable, model: str) -> list[str]:
    notes = [f"{config.paper}. Values: {config.source}"]
    if is_tiny(model):
        notes.append(
            f"This run is a miniature: {Path(model).name} on emoji scenes. The published values are for "
            f"{config.model or 'another model'} on photographs, so only directions can be compared, not values."
        )
    elif model != config.model:
        notes.append(f"This run used {model}; the published values are for {config.model or 'another model'}.")
    measured = config.protocol
    notes.append(
        f"Protocol of the published values: {f'{measured.name} ({measured.source})' if measured else 'unknown'}."
    )
    notes.append(f"Images of the paper: {config.images}")
    if any(row.published.unverified for row in config.rows):
        notes.append("† not verified against the paper itself.")
    notes += [f"{row.name}: {row.why}" for row in config.rows if row.why]
    notes.append(
        "The interval of a difference covers our choice of images only; the published value is taken as a fixed number."
    )
    return notes + list(config.notes)
