"""The page of ``lvlm-decode demo``: one file, pictures included, nothing fetched."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .demo import Caption, Line, Picture, Shown

STYLE = """
:root { --ink:#1d2430; --dim:#667085; --paper:#ffffff; --card:#f6f7f9; --line:#e2e6ec; --bad:#b42318; --badbg:#fde7e4;
  --accent:#2f5fd0; --soft:#c9d6f6; }
@media (prefers-color-scheme: dark) { :root { --ink:#e7eaf0; --dim:#98a2b3; --paper:#14171d; --card:#1d222b;
  --line:#303744; --bad:#ff9d92; --badbg:#4a1d19; --accent:#8fb0ff; --soft:#2b3a63; } }
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif }
main { max-width:1020px; margin:0 auto; padding:40px 20px 64px }
h1 { font-size:30px; line-height:1.2; margin:0 0 6px; letter-spacing:-.02em }
h2 { font-size:20px; margin:44px 0 4px }
p { max-width:72ch } .dim { color:var(--dim) } small, .dim { font-size:14px }
.scroll { overflow-x:auto } table { border-collapse:collapse; width:100%; margin-top:12px; font-variant-numeric:tabular-nums }
th { text-align:left; font-weight:600; font-size:14px; color:var(--dim); padding:6px 14px 6px 0;
  border-bottom:1px solid var(--line) }
td { padding:9px 14px 9px 0; border-bottom:1px solid var(--line); vertical-align:middle; white-space:nowrap }
tr.control td:first-child { color:var(--dim) } tr.first td { border-top:2px solid var(--line) }
td .n { font-weight:600 } td .i { color:var(--dim); font-size:13px; margin-left:6px }
.range { position:relative; display:block; height:6px; width:150px; margin-top:4px; border-radius:3px; background:var(--card) }
.range i { position:absolute; top:0; bottom:0; background:var(--soft); border-radius:3px }
.range b { position:absolute; top:-2px; width:3px; height:10px; background:var(--accent); border-radius:2px }
figure { margin:20px 0 0; display:grid; grid-template-columns:240px 1fr; gap:24px; background:var(--card);
  border-radius:14px; padding:18px } figure img { width:100%; border-radius:10px; display:block }
figcaption { font-size:13px; color:var(--dim); margin-top:8px } dl { margin:0 } dt { font-size:13px; color:var(--dim) }
dd { margin:0 0 12px } mark { background:var(--badbg); color:var(--bad); font-weight:600; border-radius:4px; padding:0 4px }
.bar { display:grid; grid-template-columns:110px 1fr 64px; gap:12px; align-items:center; margin:8px 0; max-width:640px }
.bar span { height:14px; border-radius:4px; background:var(--accent); display:block }
.bar.plain span { background:var(--dim); opacity:.55 } .bar b { text-align:right; font-variant-numeric:tabular-nums }
code { background:var(--card); padding:1px 6px; border-radius:5px; font-size:14px }
@media (max-width:640px) { figure { grid-template-columns:1fr } main { padding-top:24px } }
"""

SPLITS = ("random", "popular", "adversarial")


def write(shown: Shown, page: Path) -> None:
    """Write the page."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html(shown), encoding="utf-8")


def html(shown: Shown) -> str:
    """The page as text."""
    captions = "".join(_picture(picture) for picture in shown.pictures)
    rates = "".join(
        f"<tr><td>{escape(name)}</td><td>{100 * r['chair_s']:.0f}</td><td>{100 * r['chair_i']:.0f}</td>"
        f"<td>{100 * r['recall']:.0f}</td><td>{r['length']:.0f}</td></tr>"
        for name, r in shown.caption_rates.items()
    )
    asked = ", ".join(f"{count} {split}" for split, count in shown.questions.items())
    differences = "".join(
        f"<tr><td>{escape(line.method)}</td><td>{escape(line.control)}</td>"
        + "".join(f"<td>{escape(line.accuracy[split].text())}</td>" for split in SPLITS)
        + "</tr>"
        for line in shown.differences
    )
    splits = "".join(f"<th>{split}</th>" for split in SPLITS)
    slowest = max(shown.times.values())
    bars = "".join(
        f'<div class="bar{" plain" if name == "plain" else ""}"><div>{escape(name)}</div>'
        f'<span style="width:{100 * ratio / slowest:.1f}%"></span><b>{ratio:.2f}×</b></div>'
        for name, ratio in shown.times.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>lvlm-decode demo</title><style>{STYLE}</style></head><body><main>
<h1>What the model says, and what is there</h1>
<p class="dim">Model <code>{escape(shown.model)}</code>, {shown.images} held-out scenes, seed {shown.seed}, measured in
{shown.seconds:.0f} s on this machine by <code>lvlm-decode demo</code>.</p>
<h2>Captions</h2>
<p>The first {len(shown.pictures)} scenes on which plain greedy decoding names something that is not in the picture.
Marked words are hallucinated.</p>
{captions}
<p>Over the first {shown.captioned} scenes, which is too few to rank methods by:</p>
<div class="scroll"><table><thead><tr><th>method</th><th>captions with a hallucination %</th>
<th>hallucinated among object words %</th><th>objects recalled %</th><th>words</th></tr></thead>
<tbody>{rates}</tbody></table></div>
<h2>POPE</h2>
<p>“Is there a … in the image?”, half of the questions ({asked}) about things that are not there: drawn at
random, the most frequent, or those that usually come along. Accuracy with its 95 % interval over images, and how often
the model says yes. The grey rows are the controls each method must be read against.</p>
<div class="scroll"><table><thead><tr><th>method</th><th>decoding</th>
{splits}</tr></thead><tbody>{_rows(shown.table)}</tbody></table></div>
<p>Each method minus its matched controls on the same questions, points of accuracy; * where the interval excludes zero.</p>
<div class="scroll"><table><thead><tr><th>method</th><th>control</th>{splits}</tr></thead>
<tbody>{differences}</tbody></table></div>
<h2>Time per token</h2>
<p>All views of a method run in one stacked forward. Relative to plain decoding, which takes {shown.milliseconds:.1f} ms a
token here; the methods take turns, the figure is the median of paired ratios.</p>
{bars}
</main></body></html>
"""


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    kind = "png" if picture.path.suffix == ".png" else "jpeg"
    said = "".join(f"<dt>{escape(c.method)}</dt><dd>{_marked(c)}</dd>" for c in picture.captions)
    truth = escape(", ".join(picture.truth))
    return (
        f'<figure><div><img src="data:image/{kind};base64,{data}" alt="Scene with {truth}">'
        f"<figcaption>In the picture: {truth}</figcaption></div><dl>{said}</dl></figure>"
    )


def _marked(caption: Caption) -> str:
    return "".join(f"<mark>{escape(p)}</mark>" if wrong else escape(p) for p, wrong in caption.pieces)


def _rows(table: list[Line]) -> str:
    rows, seen_method = [], False
    for line in table:
        control = line.method in ("plain", "mask")
        classes = ["control"] if control else []
        if not control and not seen_method:
            classes.append("first")
            seen_method = True
        cells = "".join(f"<td>{_cell(line, split)}</td>" for split in SPLITS)
        rows.append(
            f'<tr class="{" ".join(classes)}"><td>{escape(line.method)}</td><td>{escape(line.decoding)}</td>{cells}</tr>'
        )
    return "".join(rows)


def _cell(line: Line, split: str) -> str:
    """The number, its interval as a bar from 50 to 100 %, the share of yes."""
    value, yes = line.accuracy[split], line.yes[split]

    def place(share: float) -> float:
        return max(0.0, min(100.0, (share - 0.5) * 200))

    low, high = place(value.low), place(value.high)
    return (
        f'<span class="n">{100 * value.value:.1f}</span><span class="i">[{100 * value.low:.1f}, {100 * value.high:.1f}] '
        f'yes {100 * yes.value:.0f} %</span><span class="range"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
        f'<b style="left:{place(value.value):.1f}%"></b></span>'
    )
