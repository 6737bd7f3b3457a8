"""The page of an explanation: words coloured by the contrast, candidates under each, places on the picture."""

from __future__ import annotations

from html import escape
from typing import Any

from ..pages import page
from .explanation import Candidate, Explanation, Row, Token


def html(told: Explanation) -> str:
    """The page as text."""
    parameters = ", ".join(f"{name}={value!r}" for name, value in told.parameters.items())
    layers = '<div id="layers" hidden><label for="layer">Shown on the picture</label><select id="layer"></select></div>'
    drafted = "<li><u>proposed by the drafter and accepted</u></li>" if told.drafts else ""
    moved = any(token.distance is not None for token in told.tokens)
    colour = "<li><i></i>how far the method moved the probabilities</li>" if moved else ""
    body = f"""<h1>Why this answer</h1>
<p class="dim">Method <code>{escape(told.method)}</code>{f" with {escape(parameters)}" if parameters else ""}. Model
<code>{escape(told.model)}</code>, seed {told.seed}{f", drafter <code>{escape(told.drafter)}</code>" if told.drafter else ""}.</p>
<p>{escape(told.prompt)}</p>
<div class="split"><div class="look"><div class="frame"><img src="{told.picture}" alt="The image that was asked about">
<canvas id="overlay" aria-hidden="true"></canvas></div>{layers}<p id="look-note"></p></div>
<div><div id="answer" role="group" aria-label="The answer, token by token; arrow keys move"></div>
<noscript><p>{escape(told.answer)}</p></noscript>
<ul class="legend">{colour}<li><b>another token than plain decoding</b></li>{drafted}</ul>
<section id="token" aria-live="polite"></section></div></div>
{_changed(told)}{_views(told)}{_returns(told)}{_drafts(told)}{_facts(told)}"""
    return page(f"Why this answer: {told.method}", body, _data(told), ("explain.css",), ("explain.js",))


def _data(told: Explanation) -> dict[str, Any]:
    """What the script reads; probabilities and weights with as many digits as are seen."""
    return {
        "views": [{"title": view.title} for view in told.views],
        "overlays": [
            {
                "title": overlay.title,
                "grid": overlay.grid,
                "chosen": overlay.chosen,
                "weights": None if overlay.weights is None else _shares(overlay.weights),
            }
            for overlay in told.overlays
        ],
        "grid": told.grid,
        "tokens": [_token(token) for token in told.tokens],
    }


def _token(token: Token) -> dict[str, Any]:
    mask = None
    if token.mask is not None:
        mask = vars(token.mask) | {"removed_mass": round(token.mask.removed_mass, 5)}
    return {
        "id": token.id,
        "text": token.text,
        "special": token.special,
        "plain_text": token.plain_text,
        "changed": token.changed,
        "shift": None if token.shift is None else round(token.shift, 3),
        "distance": None if token.distance is None else round(token.distance, 4),
        "candidates": [_candidate(candidate) for candidate in token.candidates],
        "mask": mask,
        "choices": token.choices,
        "attention": [_row(row) for row in token.attention],
        "drafted": token.drafted,
        "leans_on": token.leans_on,
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "id": candidate.id,
        "text": candidate.text,
        "plain": round(candidate.plain, 5),
        "views": [round(p, 5) for p in candidate.views],
        "method": None if candidate.method is None else round(candidate.method, 5),
        "kept": candidate.kept,
    }


def _row(row: Row) -> dict[str, Any]:
    chosen = None if row.chosen is None else [int(c) for c in row.chosen]
    return {"title": row.title, "weights": _shares(row.weights), "chosen": chosen}


def _shares(weights: tuple[float, ...]) -> list[float]:
    """Weights relative to the largest: what a colour shows."""
    most = max(weights, default=0.0)
    return [round(w / most, 3) if most > 0 else 0 for w in weights]


def _changed(told: Explanation) -> str:
    if not told.changed:
        return "<h2>What the method changed</h2><p>No token differs from what plain decoding takes after the same words.</p>"

    # A search has no distribution that could be compared.
    compared = all(token.distance is not None for token in told.changed)
    titles = "<th>Change of log-probability, nats</th><th>Probability moved</th>" if compared else ""

    def line(token: Token) -> str:
        moved = f"<td>{token.shift:+.2f}</td><td>{100 * (token.distance or 0):.1f} %</td>" if compared else ""
        return (
            f'<tr data-token="{token.index}"><td>{token.index + 1}</td><td>{escape(token.plain_text.strip())}</td>'
            f"<td><b>{escape(token.text.strip())}</b></td>{moved}</tr>"
        )

    return (
        "<h2>What the method changed</h2><p>Tokens that plain decoding would not have taken after the same words.</p>"
        '<div class="scroll"><table id="changed"><thead><tr><th>Token</th><th>Plain</th><th>Method</th>'
        f"{titles}</tr></thead><tbody>" + "".join(map(line, told.changed)) + "</tbody></table></div>"
    )


def _views(told: Explanation) -> str:
    if not told.views:
        return ""
    cards = []
    for number, view in enumerate(told.views, 1):
        picture = f'<img src="{view.picture}" alt="View {number}">' if view.picture else ""
        cards.append(
            f"<figure>{picture}<figcaption>View {number}: {escape(view.title)}, weight {view.weight:+g}</figcaption></figure>"
        )
    return f'<h2>The extra views</h2><div class="views">{"".join(cards)}</div>'


def _returns(told: Explanation) -> str:
    if not told.returns:
        return ""
    items = "".join(
        f"<li>With {r.length} tokens the beams leant on token {r.summary + 1} (“{escape(r.summary_text)}”) too often; they went "
        f"back to {r.kept} tokens and took back “{escape(r.taken_back.strip())}” of the best beam.</li>"
        for r in told.returns
    )
    return f"<h2>Rollbacks</h2><ol>{items}</ol>"


def _drafts(told: Explanation) -> str:
    if not told.drafts:
        return ""
    lines = "".join(
        f"<tr><td>{d.position + 1}</td><td>{d.drafted}</td><td>{d.accepted}</td><td>{d.committed}</td></tr>"
        for d in told.drafts
    )
    accepted = sum(d.accepted for d in told.drafts)
    return (
        f"<h2>Drafts</h2><p>{len(told.drafts)} drafts were verified, and {accepted} drafted tokens were accepted.</p>"
        '<div class="scroll"><table><thead><tr><th>From token</th><th>Drafted</th><th>Accepted</th><th>Tokens gained</th>'
        f"</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _facts(told: Explanation) -> str:
    if not told.facts:
        return ""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in told.facts.items())
    return f"<h2>What the call noted</h2><dl>{rows}</dl>"
