"""Figures of the documentation, drawn from records: what a method does to the captions of the small LLaVA."""

from __future__ import annotations

import functools
import json
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "effect" / "results.json"
#: Key, title, factor of what is shown, unit of the difference, and +1 where more is better, -1 where less is, 0 where neither.
LINES = (
    ("chair_s", "Captions that name something absent", 100, "points", -1),
    ("recall", "Objects of the picture that are named", 100, "points", 1),
    ("length", "Words of a caption", 1, "words", 0),
)
#: Colours that are legible on light and dark pages: better, worse, undecided.
GOOD, BAD, OPEN = "#2e9e6b", "#d9534a", "#8a94a6"
#: Of the whole figure, of one line, and of what is above the first: small enough for a telephone.
WIDTH, ROW, TOP, EDGE = 380, 62, 22, 8


@functools.cache
def effects() -> dict[str, Any]:
    """The record of ``benchmarks/effect``."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def reach(key: str) -> float:
    """The largest bound of any method's difference: all pages have the same axis."""
    bounds = [abs(bound) for cell in effects()["methods"].values() for bound in cell["minus_plain"][key]]
    return max(bounds)


def effect(name: str) -> str:
    """The figure of a method as HTML, or why there is none."""
    record = effects()
    if name == "plain":
        return "The other methods are compared with it."
    if name not in record["methods"]:
        why = record["left_out"].get(name, "it is not in the record")
        return f"There is no figure of its effect: {why.removeprefix(name + ': ')}"
    cell, plain = record["methods"][name], record["methods"]["plain"]["rates"]
    middle, height = WIDTH / 2, TOP + ROW * len(LINES) + 6
    parts, spoken = [], []
    for i, (key, title, factor, unit, better) in enumerate(LINES):
        value, low, high = (factor * bound for bound in cell["minus_plain"][key])
        per_unit = (WIDTH / 2 - EDGE) / (factor * reach(key))
        y = TOP + ROW * i + 44
        open_ = low <= 0 <= high or not better
        colour = OPEN if open_ else GOOD if value * better > 0 else BAD
        a, b, dot = (middle + per_unit * bound for bound in (low, high, value))
        sign = " %" if factor == 100 else ""
        now, before = f"{factor * cell['rates'][key]:.0f}", f"{factor * plain[key]:.0f}"
        parts.append(
            f'<text x="0" y="{y - 20}">{escape(title)}</text>'
            f'<text x="{WIDTH}" y="{y - 20}" text-anchor="end" font-weight="600">{now}{sign}</text>'
            f'<line x1="0" x2="{WIDTH}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".12"/>'
            f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="5" stroke-linecap="round" '
            f'opacity=".6"/><circle cx="{dot:.1f}" cy="{y}" r="6" fill="{colour}"/>'
            f'<text x="{min(max(dot, 75), WIDTH - 75):.1f}" y="{y + 18}" text-anchor="middle" font-size="12" opacity=".75">'
            f"{value:+.0f} {unit} "
            f"(plain {before}{sign})</text>"
        )
        spoken.append(f"{title}: {now}{sign} (plain {before}{sign})")
    label = escape("; ".join(spoken))
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {height}" '
        'style="max-width:480px;width:100%;height:auto" font-size="13" fill="currentColor" font-family="inherit">'
        f'<text x="{middle - 6}" y="12" text-anchor="end" font-size="12" opacity=".7">less than plain</text>'
        f'<text x="{middle + 6}" y="12" font-size="12" opacity=".7">more than plain</text>'
        + "".join(
            f'<line x1="{middle}" x2="{middle}" y1="{TOP + ROW * i + 34}" y2="{TOP + ROW * i + 54}" stroke="currentColor" '
            f'opacity=".5"/>'
            for i in range(len(LINES))
        )
        + "".join(parts)
        + "</svg>"
        f"\n\nGreedy captions of {record['scenes']} emoji scenes, minus plain greedy decoding on the same scenes. A bar is the "
        f"95 % interval over scenes; green is better, red is worse, and grey is undecided or no matter of better and worse. "
        f"{cell['changed']} captions differ from plain decoding's."
        + (f" Settings: `{record['parameters_of_methods'][name]}`." if name in record["parameters_of_methods"] else "")
    )
