"""One picture per table: where a method lies between its controls, and what its gain costs. matplotlib is an extra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvlm_decode.errors import DependencyError

from .base import Column
from .metrics import REPLICATES, Interval, intervals
from .plan import Result, is_control, slug
from .price import Line, lines
from .tables import Entry, Value, gather, rate_values


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise DependencyError("Pictures need matplotlib; install it with: pip install 'lvlm-decode[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def scatter(methods: Sequence[Entry], title: str, replicates: int = REPLICATES):
    """A matplotlib figure of one split: a panel for each pair of axes of the evaluator, a point and its intervals for each
    method.

    Controls are hollow; a method that only moved along the yes-ratio, or gave up recall or length, is seen to have done so.
    """
    pyplot = _pyplot()
    evaluator = methods[0].results[0].evaluator
    bounds = [intervals(evaluator, method.runs, replicates) for method in methods]
    pairs = [*([] if evaluator.axes is None else [evaluator.axes]), *evaluator.more_axes]
    pairs = [pair for pair in pairs if all(key in bound for key in pair for bound in bounds)] or pairs[:1]
    columns = {column.key: column for column in evaluator.columns}
    size = (0.6 + 5.8 * len(pairs), 5.2)
    figure, panels = pyplot.subplots(1, len(pairs), figsize=size, squeeze=False, layout="constrained")
    for panel, (across, up) in zip(panels[0], pairs):
        for i, (method, bound) in enumerate(zip(methods, bounds)):
            if across in bound and up in bound:
                hollow = is_control(method.name)
                _point(panel, bound[across], bound[up], (columns[across], columns[up]), i, method.label, hollow)
        _finish(panel, columns[across], columns[up])
    figure.suptitle(f"{evaluator.name}, {title}")
    _legend(figure, panels[0][0])
    return figure


def _point(panel: Any, x: Any, y: Any, columns: tuple[Column, Column], number: int, label: str, hollow: bool) -> None:
    """One method: a point with the intervals of both its rates."""
    colour = _pyplot().get_cmap("tab10")(number % 10)
    across, up = (100 if column.kind == "percent" else 1 for column in columns)
    panel.errorbar(
        across * x.value,
        up * y.value,
        xerr=_reach(x, across),
        yerr=_reach(y, up),
        fmt="o" if hollow else "D",
        markerfacecolor="white" if hollow else colour,
        color=colour,
        elinewidth=0.7,
        alpha=0.85,
        label=label,
    )


def _reach(bound: Any, scale: float) -> list[list[float]]:
    """How far an interval reaches below and above its value. Wilson's interval can end on this side of a rate of 0 or 1."""
    return [[scale * max(0.0, bound.value - bound.low)], [scale * max(0.0, bound.high - bound.value)]]


def _finish(panel: Any, across: Column, up: Column, prefix: str = "") -> None:
    panel.set_xlabel(f"{prefix}{across.title}{' (%)' if across.kind == 'percent' else ''}")
    panel.set_ylabel(f"{prefix}{up.title}{' (%)' if up.kind == 'percent' else ''}")
    panel.grid(alpha=0.25)


def _legend(figure: Any, panel: Any) -> None:
    """One legend for all panels, which show the same methods."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2, frameon=False)


def trades(found: Sequence[Line]):
    """A matplotlib figure of gain against ability: a panel for each figure of hallucination and of ability, a point with
    both paired intervals for each method; None where no method has both.

    Differences from the plain model under the same decoding. Up and right is better: what falls when it improves (CHAIR)
    is turned round.
    """
    kinds = {kind: list(dict.fromkeys(f for line in found for f in line.differences if f.kind == kind))
             for kind in ("hallucination", "ability")}  # fmt: skip
    pairs = [
        (ability, gain)
        for gain in kinds["hallucination"]
        for ability in kinds["ability"]
        if any(ability in line.differences and gain in line.differences for line in found)
    ]
    if not pairs:
        return None
    pyplot = _pyplot()
    wide = min(len(pairs), 3)
    tall = -(-len(pairs) // wide)
    figure, panels = pyplot.subplots(tall, wide, figsize=(5.2 * wide, 4.6 * tall), squeeze=False, layout="constrained")
    for panel, (ability, gain) in zip(panels.flat, pairs):
        for i, line in enumerate(found):
            if ability in line.differences and gain in line.differences:
                x, y = (_turned(line.differences[figure], figure.column) for figure in (ability, gain))
                _point(panel, x, y, (ability.column, gain.column), i, line.label, False)
        # Below the intervals, which would lie under them where a figure did not move.
        panel.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        panel.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        panel.set_xlim(*_spread(*panel.get_xlim()))
        panel.set_ylim(*_spread(*panel.get_ylim()))
        _finish(panel, replace(ability.column, title=ability.title), replace(gain.column, title=gain.title), "gain in ")
    for panel in list(panels.flat)[len(pairs) :]:
        panel.set_visible(False)
    figure.suptitle("Gain against ability: differences from the plain model")
    _legend(figure, panels[0][0])
    return figure


def _spread(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis, at least two points apart: what did not move must not look as if it were looked at closely."""
    missing = max(0.0, 2.0 - (high - low)) / 2
    return low - missing, high + missing


def _turned(value: Value, column: Column) -> Interval:
    """A difference as a gain: with the sign that makes better positive."""
    low, high = (value.value if bound is None else bound for bound in (value.low, value.high))
    return Interval(value.value, low, high) if column.better >= 0 else Interval(-value.value, -high, -low)


def dots(methods: Sequence[Entry], title: str, replicates: int = REPLICATES):
    """A matplotlib figure of one split for evaluators without two axes: a panel for each compared column."""
    pyplot = _pyplot()
    evaluator = methods[0].results[0].evaluator
    values = [rate_values(evaluator, method, replicates) for method in methods]
    columns = [c for c in evaluator.columns if c.paired and all(c.key in row for row in values)]
    size = (2.2 + 2.4 * len(columns), 1.2 + 0.35 * len(methods))
    figure, panels = pyplot.subplots(1, len(columns), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for column, axes in zip(columns, panels[0]):
        scale = 100 if column.kind == "percent" else 1
        for i, (method, row) in enumerate(zip(methods, values)):
            shown = row[column.key]
            bars = _reach(shown, scale)
            fill = "white" if is_control(method.name) else "C0"
            axes.errorbar(scale * shown.value, i, xerr=bars, fmt="o", color="C0", markerfacecolor=fill, elinewidth=0.8)
        axes.set_xlabel(f"{column.title}{' (%)' if column.kind == 'percent' else ''}")
        axes.grid(alpha=0.25, axis="x")
    panels[0][0].set_yticks(range(len(methods)), [method.label for method in methods])
    panels[0][0].invert_yaxis()
    figure.suptitle(f"{evaluator.name}, {title}")
    return figure


def write_pictures(results: Sequence[Result], folder: Path, replicates: int = REPLICATES) -> list[Path]:
    """A PNG for each split of each evaluator, and one of gain against ability where both were run; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (name, title), methods in gather(results).items():
        drawn = [method for method in methods if any(method.runs)]
        if not drawn:
            continue
        draw = dots if drawn[0].results[0].evaluator.axes is None else scatter
        written.append(_save(draw(drawn, title, replicates), folder / f"{name}-{slug(title)}.png"))
    figure = trades(lines([result for result in results if result.rows], replicates))
    return written if figure is None else [*written, _save(figure, folder / "gain-against-ability.png")]


def _save(figure: Any, path: Path) -> Path:
    # Without the software's version in it, equal pictures are equal files.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    _pyplot().close(figure)
    return path
