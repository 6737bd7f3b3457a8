"""One picture per table: where a method lies between its controls. matplotlib is an extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lvlm_decode.errors import DependencyError

from .metrics import REPLICATES, intervals
from .plan import Result, is_control, slug
from .tables import Method, gather, rate_values


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise DependencyError("Pictures need matplotlib; install it with: pip install 'lvlm-decode[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def scatter(methods: Sequence[Method], title: str, replicates: int = REPLICATES):
    """A matplotlib figure of one split: the evaluator's two axes, a point and its intervals for each method.

    Controls are hollow; a method that only moved along the yes-ratio, or gave up recall, is seen to have done so.
    """
    pyplot = _pyplot()
    evaluator = methods[0].results[0].evaluator
    across, up = evaluator.axes
    titles = {column.key: column.title for column in evaluator.columns}
    figure, axes = pyplot.subplots(figsize=(6.4, 5.2), layout="constrained")
    colours = pyplot.get_cmap("tab10")
    for i, method in enumerate(methods):
        bounds = intervals(evaluator, method.runs, replicates)
        if across not in bounds or up not in bounds:
            continue
        x, y = (bounds[key] for key in (across, up))
        colour = colours(i % 10)
        axes.errorbar(
            100 * x.value,
            100 * y.value,
            xerr=[[100 * (x.value - x.low)], [100 * (x.high - x.value)]],
            yerr=[[100 * (y.value - y.low)], [100 * (y.high - y.value)]],
            fmt="o" if is_control(method.name) else "D",
            markerfacecolor="white" if is_control(method.name) else colour,
            color=colour,
            elinewidth=0.7,
            alpha=0.85,
            label=method.label,
        )
    axes.set_xlabel(f"{titles.get(across, across)} (%)")
    axes.set_ylabel(f"{titles.get(up, up)} (%)")
    axes.set_title(f"{evaluator.name}, {title}")
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    return figure


def dots(methods: Sequence[Method], title: str, replicates: int = REPLICATES):
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
            bars = [[scale * (shown.value - shown.low)], [scale * (shown.high - shown.value)]]
            fill = "white" if is_control(method.name) else "C0"
            axes.errorbar(scale * shown.value, i, xerr=bars, fmt="o", color="C0", markerfacecolor=fill, elinewidth=0.8)
        axes.set_xlabel(f"{column.title}{' (%)' if column.kind == 'percent' else ''}")
        axes.grid(alpha=0.25, axis="x")
    panels[0][0].set_yticks(range(len(methods)), [method.label for method in methods])
    panels[0][0].invert_yaxis()
    figure.suptitle(f"{evaluator.name}, {title}")
    return figure


def write_pictures(results: Sequence[Result], folder: Path, replicates: int = REPLICATES) -> list[Path]:
    """A PNG for each split of each evaluator; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (name, title), methods in gather(results).items():
        drawn = [method for method in methods if any(method.runs)]
        if not drawn:
            continue
        draw = dots if drawn[0].results[0].evaluator.axes is None else scatter
        figure = draw(drawn, title, replicates)
        path = folder / f"{name}-{slug(title)}.png"
        # Without the software's version in it, equal pictures are equal files.
        figure.savefig(path, dpi=130, metadata={"Software": None})
        _pyplot().close(figure)
        written.append(path)
    return written
