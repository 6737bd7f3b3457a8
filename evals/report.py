"""`lvlm-decode table DIR --html`: a run as one page: tables with intervals drawn, a picture of each split, and a browser through
the answers of all methods.

Pictures stand in the page as thumbnails, so that the page can be sent alone; of large runs only the first `MOST_THUMBNAILS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lvlm_decode.errors import LvlmDecodeError
from lvlm_decode.pages import data_uri, page

from .base import Column, Row
from .loaders import ImageFiles, folder_images
from .metrics import REPLICATES
from .plan import Result, is_control, read_questions, split_folder
from .tables import Block, Entry, Value, gather, rate_values

THUMBNAIL = 160
# About 5 kB each: ten megabytes of pictures at most.
MOST_THUMBNAILS = 2000


def write(path: Path, results: Sequence[Result], made: Sequence[Block], title: str, **options: Any) -> list[str]:
    """Write the page, and return what its reader misses, a sentence each; `options` are those of `html`."""
    text, missing = html(results, made, title, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return missing


def html(
    results: Sequence[Result],
    made: Sequence[Block],
    title: str,
    images: Path | None = None,
    replicates: int = REPLICATES,
) -> tuple[str, list[str]]:
    """The page, and what is missing on it.

    results: scored cells that have rows. made: the tables. images: folder of the images that the questions name; runs on
    emoji scenes need none.
    """
    pictures = Thumbnails(images)
    groups = gather(results)
    splits = [_split(f"{name}, {part}", methods, pictures) for (name, part), methods in groups.items()]
    missing = pictures.sentences()
    plots = "".join(_plot(f"{name}, {part}", methods, replicates) for (name, part), methods in groups.items())
    body = f"""<h1>{escape(title)}</h1>
<p class="dim">{escape(_about(results))}</p>
<nav><a href="#plots">Pictures</a> <a href="#answers">Answers</a> <a href="#tables">Tables</a></nav>
<h2 id="plots">Pictures</h2><div class="plots">{plots}</div>
<h2 id="answers">Answers</h2>
<form class="filters" aria-label="Which answers">
<label>Questions <select id="split"></select></label>
<label>Method <select id="first"></select></label>
<label>Beside it <select id="second"></select></label>
<label>Shown <select id="which">
<option value="all">all answers</option><option value="right">method right</option><option value="wrong">method wrong</option>
<option value="differ">the two answers differ</option><option value="gained">method right, the other wrong</option>
<option value="lost">method wrong, the other right</option><option value="any">any two methods disagree</option></select></label>
<label>Containing <input type="search" id="text" placeholder="words of question or answer"></label></form>
<p id="count" class="dim" role="status"></p>
<div id="list" tabindex="0" role="listbox" aria-label="Answers; arrow keys move, Enter opens"><div id="space"></div></div>
<dialog id="one" aria-labelledby="one-title"></dialog>
{"".join(f'<p class="dim">{escape(sentence)}</p>' for sentence in missing)}
<div id="tables">{"".join(map(_table, made))}</div>"""
    data = {"splits": splits, "images": pictures.uris}
    return page(title, body, data, ("report.css",), ("report.js",)), missing


def _about(results: Sequence[Result]) -> str:
    models = sorted({str((result.settings.get("model") or {}).get("name", "unknown model")) for result in results})
    answers = sum(len(result.rows) for result in results)
    return f"Model {', '.join(models)}. {answers:,} scored answers in {len(results)} runs."


# --- pictures of the questions


class Thumbnails:
    """Small pictures by number, each once.

    folder: of the images that questions name; None where there is none.
    """

    def __init__(self, folder: Path | None):
        self.folder = None if folder is None else folder_images(folder)
        self.uris: list[str] = []
        self._known: dict[tuple[str, str], int | None] = {}
        self._scenes: dict[str, ImageFiles] = {}
        self.unknown = self.broken = self.left_out = 0

    def number(self, result: Result, name: str | None) -> int | None:
        """The number of the picture that a question of `result` names; None where there is none."""
        if name is None:
            return None
        source = self._source(result)
        key = ("" if source is self.folder else result.evaluator.name, name)
        if key not in self._known:
            self._known[key] = self._made(source, name)
        return self._known[key]

    def _source(self, result: Result) -> ImageFiles | None:
        if (result.settings.get("data") or {}).get("questions") != "emoji scenes":
            return self.folder
        kind = result.evaluator.name
        if kind not in self._scenes:
            import lvlm_decode_data

            self._scenes[kind] = result.evaluator.scene_images(lvlm_decode_data.load_scenes("heldout"))
        return self._scenes[kind]

    def _made(self, source: ImageFiles | None, name: str) -> int | None:
        if source is None:
            self.unknown += 1
            return None
        if len(self.uris) == MOST_THUMBNAILS:
            self.left_out += 1
            return None
        try:
            self.uris.append(data_uri(source.open(name), THUMBNAIL, quality=70))
        except LvlmDecodeError:
            self.broken += 1
            return None
        return len(self.uris) - 1

    def sentences(self) -> list[str]:
        """What a reader misses."""
        found = []
        if self.unknown:
            found.append(f"{self.unknown} images are not shown: give the folder that holds them with --images FOLDER.")
        if self.broken:
            found.append(f"{self.broken} images are not shown: they are missing or cannot be read.")
        if self.left_out:
            found.append(f"{self.left_out} images are not shown: a page holds at most {MOST_THUMBNAILS}.")
        return found


# --- answers


def _split(title: str, methods: Sequence[Entry], pictures: Thumbnails) -> dict[str, Any]:
    """What the browser reads about one split: questions, and per method one answer to each, of its first seed."""
    asked: dict[str, dict[str, Any]] = {}
    lines = []
    for method in methods:
        result = method.results[0]
        if not asked:
            known = {str(question.id): question for question in read_questions(split_folder(result.folder)) or ()}
            asked = {
                name: {
                    "id": name,
                    "text": question.text,
                    "label": question.label,
                    "image": pictures.number(result, question.image),
                }
                for name, question in known.items()
            }
        rows = {row.id: row for row in result.rows}
        for row in rows.values():
            asked.setdefault(row.id, {"id": row.id, "text": "", "label": row.label, "image": None})
        lines.append((method.label, rows))
    return {
        "title": title,
        "methods": [label for label, _ in lines],
        "questions": [
            [q["id"], q["text"], q["image"], "" if q["label"] is None else _said(q["label"])] for q in asked.values()
        ],
        "answers": [[_answer(rows.get(name)) for name in asked] for _, rows in lines],
    }


def _answer(row: Row | None) -> list[Any] | None:
    """Text, right (1), wrong (0) or neither (null), what was read in it, and words that are not in the picture."""
    if row is None:
        return None
    named = zip(row.evidence.get("words") or (), row.evidence.get("objects") or ())
    absent = set(row.evidence.get("hallucinated") or ())
    wrong = list(dict.fromkeys(str(word) for word, name in named if name in absent))
    return [row.answer, None if row.correct is None else int(row.correct), _said(row.parsed), wrong]


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


# --- tables and plots


def _table(block: Block) -> str:
    """A block with the interval of every number drawn below it, on one scale for each column."""
    scales = [_scale([line[i] for line in block.lines]) for i in range(len(block.columns))]
    head = "".join(f"<th>{escape(title)}</th>" for title in block.columns)
    rows = []
    for line in block.lines:
        named = str(line[block.columns.index("Method")]) if "Method" in block.columns else ""
        kind = ' class="control"' if "Control" not in block.columns and is_control(named) else ""
        rows.append(f"<tr{kind}>{''.join(f'<td>{_cell(v, s)}</td>' for v, s in zip(line, scales))}</tr>")
    notes = "".join(f"<p><small>{escape(note)}</small></p>" for note in block.notes)
    return (
        f'<h2>{escape(block.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _scale(values: Sequence[str | Value]) -> tuple[float, float] | None:
    """The range of a column's intervals; zero is inside for differences."""
    bounds = [b for v in values if isinstance(v, Value) and v.low is not None for b in (v.low, v.high or 0.0)]
    if not bounds:
        return None
    if any(isinstance(v, Value) and v.signed for v in values):
        bounds.append(0.0)
    low, high = min(bounds), max(bounds)
    return (low, high) if high > low else None


def _cell(value: str | Value, scale: tuple[float, float] | None) -> str:
    if not isinstance(value, Value):
        return escape(value)
    text = escape(value.text())
    if scale is None or value.low is None or value.high is None:
        return text
    low, high = scale

    def place(x: float) -> float:
        return 100 * (x - low) / (high - low)

    zero = f'<u style="left:{place(0):.1f}%"></u>' if value.signed else ""
    kind = " starred" if value.starred else ""
    return (
        f'{text}<span class="range{kind}">{zero}<i style="left:{place(value.low):.1f}%;'
        f'width:{place(value.high) - place(value.low):.1f}%"></i><b style="left:{place(value.value):.1f}%"></b></span>'
    )


def _plot(title: str, methods: Sequence[Entry], replicates: int) -> str:
    """Methods between the two axes of their evaluator, a cross of intervals each; nothing where it has no axes."""
    evaluator = methods[0].results[0].evaluator
    if evaluator.axes is None:
        return ""
    columns = {column.key: column for column in evaluator.columns}
    across, up = (columns[key] for key in evaluator.axes)
    values = [rate_values(evaluator, method, replicates) for method in methods]
    shown = [(m, v[across.key], v[up.key]) for m, v in zip(methods, values) if across.key in v and up.key in v]
    if not shown:
        return ""
    x, y = _axis([v for _, v, _ in shown], 60, 460), _axis([v for _, _, v in shown], 250, 20)
    parts = [_ticks(x, across, vertical=False), _ticks(y, up, vertical=True)]
    names = []
    # Points that cover each other become one that names them all.
    places: list[tuple[float, float, list[int]]] = []
    for number, (method, one, two) in enumerate(shown, 1):
        kind = "control" if is_control(method.name) else "method"
        cross = "".join(
            f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>'
            for a, b, c, d in (
                (x.at(_low(one)), y.at(two.value), x.at(_high(one)), y.at(two.value)),
                (x.at(one.value), y.at(_low(two)), x.at(one.value), y.at(_high(two))),
            )
        )
        said = f"{method.label}: {across.title} {one.text()}, {up.title} {two.text()}"
        parts.append(f'<g class="{kind}"><title>{escape(said)}</title>{cross}</g>')
        names.append(f'<li title="{escape(said)}">{escape(method.label)}</li>')
        a, b = x.at(one.value), y.at(two.value)
        there = next((place for place in places if math.hypot(place[0] - a, place[1] - b) < 14), None)
        if there is None:
            places.append((a, b, [number]))
        else:
            there[2].append(number)
    for a, b, numbers in places:
        kind = "control" if all(is_control(shown[n - 1][0].name) for n in numbers) else "method"
        half = 9 + 6 * (len(numbers) - 1)
        parts.append(
            f'<g class="{kind}"><rect x="{a - half:.1f}" y="{b - 9:.1f}" width="{2 * half}" height="18" rx="9"/>'
            f'<text x="{a:.1f}" y="{b:.1f}" dy="4" text-anchor="middle">{",".join(map(str, numbers))}</text></g>'
        )
    said = f"{title}: {up.title} against {across.title}"
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 480 300" role="img" aria-label="{escape(said)}">'
        f'{"".join(parts)}<text x="260" y="296" text-anchor="middle">{escape(_named(across))}</text>'
        f'<text transform="translate(12 135) rotate(-90)" text-anchor="middle">{escape(_named(up))}</text></svg>'
        f"<ol>{''.join(names)}</ol></figure>"
    )


def _named(column: Column) -> str:
    return f"{column.title}{' %' if column.kind == 'percent' else ''}"


def _low(value: Value) -> float:
    return value.value if value.low is None else value.low


def _high(value: Value) -> float:
    return value.value if value.high is None else value.high


class Axis:
    """A linear scale from [low, high] to pixels [start, stop]."""

    def __init__(self, low: float, high: float, start: float, stop: float):
        self.low, self.high, self.start, self.stop = low, high, start, stop

    def at(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """About five round numbers."""
        raw = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(raw))
        step = next(power * f for f in (1, 2, 5, 10) if power * f >= raw)
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, int(self.high / step) + 1)]


def _axis(values: Sequence[Value], start: float, stop: float) -> Axis:
    low, high = min(map(_low, values)), max(map(_high, values))
    room = (high - low) * 0.08 or 0.05
    return Axis(low - room, high + room, start, stop)


def _ticks(axis: Axis, column: Column, vertical: bool) -> str:
    scale: Callable[[float], str] = (lambda v: f"{100 * v:.4g}") if column.kind == "percent" else (lambda v: f"{v:.4g}")
    parts = []
    for value in axis.ticks():
        at = axis.at(value)
        if vertical:
            parts.append(f'<line class="grid" x1="60" x2="460" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="tick" x="54" y="{at + 4:.1f}" text-anchor="end">{scale(value)}</text>')
        else:
            parts.append(f'<line class="grid" y1="20" y2="250" x1="{at:.1f}" x2="{at:.1f}"/>')
            parts.append(f'<text class="tick" x="{at:.1f}" y="268" text-anchor="middle">{scale(value)}</text>')
    return "".join(parts)


__all__ = ["html", "write"]
