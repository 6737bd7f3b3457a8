"""The page of ``lvlm-decode demo``: one file, pictures included, nothing fetched."""

from __future__ import annotations

import base64
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from .marks import ABSENT, FALSE, RIGHT, changed
from .pages import page as framed

if TYPE_CHECKING:
    from .demo import Caption, Line, Picture, Shown

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
    axes = "".join(f'<th>{split}<span class="axis"><i>50</i><i>100 %</i></span></th>' for split in SPLITS)
    slowest = max(shown.times.values())
    bars = "".join(
        f'<div class="bar{" plain" if name == "plain" else ""}"><div>{escape(name)}</div>'
        f'<span style="width:{100 * ratio / slowest:.1f}%"></span><b>{ratio:.2f}×</b></div>'
        for name, ratio in shown.times.items()
    )
    body = f"""<h1>What the model says, and what is there</h1>
<p class="dim">Model <code>{escape(shown.model)}</code>, {shown.images} held-out scenes, seed {shown.seed}, measured in
{shown.seconds:.0f} s on this machine by <code>lvlm-decode demo</code>.</p>
<h2>Captions</h2>
<p class="verdict">{_verdict(shown)}</p>
<p>Greedy captions of {shown.captioned} scenes, and an example of each thing that happened. Objects that are
<mark>not in the picture</mark> are marked, and so is a number, place or relation that is <mark class="false">false</mark>;
words that the plain caption does not have there are <ins>underlined</ins>.</p>
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
{axes}</tr></thead><tbody>{_rows(shown.table)}</tbody></table></div>
<p>Each method minus its matched controls on the same questions, points of accuracy; * where the interval excludes zero.</p>
<div class="scroll"><table><thead><tr><th>method</th><th>control</th>{splits}</tr></thead>
<tbody>{differences}</tbody></table></div>
<h2>Time per token</h2>
<p>All views of a method run in one stacked forward. Relative to plain decoding, which takes {shown.milliseconds:.1f} ms a
token here; the methods take turns, the figure is the median of paired ratios.</p>
{bars}"""
    return framed("lvlm-decode demo", body, styles=("demo.css",))


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    kind = "png" if picture.path.suffix == ".png" else "jpeg"
    plain = picture.captions[0]
    said = "".join(f"<dt>{escape(c.method)}</dt><dd>{_marked(c, plain)}</dd>" for c in picture.captions)
    truth = escape(", ".join(picture.truth))
    return (
        f"<h3>{escape(picture.title)}</h3>"
        f'<figure><div><img src="data:image/{kind};base64,{data}" alt="Scene with {truth}">'
        f"<figcaption>In the picture: {truth}</figcaption></div><dl>{said}</dl></figure>"
    )


def _marked(caption: Caption, plain: Caption) -> str:
    """What is wrong is marked; words that the plain caption does not have there are underlined."""
    tags = {RIGHT: ("", ""), ABSENT: ("<mark>", "</mark>"), FALSE: ('<mark class="false">', "</mark>")}
    other = changed(caption.text, plain.text)
    out, at = "", 0
    for piece, kind in caption.pieces:
        flags = other[at : at + len(piece)]
        runs = groupby(zip(piece, flags), key=lambda pair: pair[1])
        inner = ""
        for differs, letters in runs:
            said = escape("".join(letter for letter, _ in letters))
            inner += f"<ins>{said}</ins>" if differs else said
        out += tags[kind][0] + inner + tags[kind][1]
        at += len(piece)
    return out


def _verdict(shown: Shown) -> str:
    """What the first method does to captions, in one sentence."""
    (_, plain), (name, rates), *_ = shown.caption_rates.items()
    return (
        f"With <b>{escape(name)}</b> {100 * rates['chair_s']:.0f} % of the captions name something absent, with plain decoding "
        f"{100 * plain['chair_s']:.0f} %. It names {100 * rates['recall']:.0f} % of the objects that are there instead of "
        f"{100 * plain['recall']:.0f} %, in {rates['length']:.0f} words instead of {plain['length']:.0f}."
    )


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
