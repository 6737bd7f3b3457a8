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
LEFT, WIDTH, RIGHT, ROW, TOP = 250, 260, 130, 44, 30


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
    middle, height = LEFT + WIDTH / 2, TOP + ROW * len(LINES)
    parts, spoken = [], []
    for i, (key, title, factor, unit, better) in enumerate(LINES):
        value, low, high = (factor * bound for bound in cell["minus_plain"][key])
        per_unit = WIDTH / 2 / (factor * reach(key))
        y = TOP + ROW * i + ROW / 2
        open_ = low <= 0 <= high or not better
        colour = OPEN if open_ else GOOD if value * better > 0 else BAD
        a, b, dot = (middle + per_unit * bound for bound in (low, high, value))
        sign = "%" if factor == 100 else ""
        now, before = f"{factor * cell['rates'][key]:.0f}", f"{factor * plain[key]:.0f}"
        parts.append(
            f'<text x="0" y="{y - 3:.0f}">{escape(title)}</text>'
            f'<text x="0" y="{y + 13:.0f}" opacity=".7">{now} {sign} (plain {before} {sign})</text>'
            f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y:.0f}" y2="{y:.0f}" stroke="{colour}" stroke-width="4" '
            f'stroke-linecap="round" opacity=".55"/><circle cx="{dot:.1f}" cy="{y:.0f}" r="6" fill="{colour}"/>'
            f'<text x="{LEFT + WIDTH + 16}" y="{y + 5:.0f}">{value:+.0f} {unit}</text>'
        )
        spoken.append(f"{title}: {now} {sign}, plain {before} {sign}")
    label = escape("; ".join(spoken))
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" '
        'style="max-width:640px;width:100%;height:auto" font-size="13" fill="currentColor" font-family="inherit">'
        f'<text x="{middle - 6}" y="14" text-anchor="end" opacity=".7">less</text>'
        f'<text x="{middle + 6}" y="14" opacity=".7">more than plain</text>'
        f'<line x1="{middle}" x2="{middle}" y1="20" y2="{height}" stroke="currentColor" opacity=".35"/>{"".join(parts)}</svg>'
        f"\n\nGreedy captions of {record['scenes']} emoji scenes, minus plain greedy decoding on the same scenes. A bar is the "
        f"95 % interval over scenes; green is better, red is worse, and grey is undecided or no matter of better and worse. "
        f"{cell['changed']} captions differ from plain decoding's."
        + (f" Settings: `{record['parameters_of_methods'][name]}`." if name in record["parameters_of_methods"] else "")
    )
