"""Pages that a person looks at: one file each, pictures included, nothing fetched. Imports no torch."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from importlib.resources import files
from typing import Any

#: No page may fetch anything; its own style, script and pictures stand in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"


def part(name: str) -> str:
    """The text of a style sheet or script that ships with this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def page(title: str, body: str, data: Any = None, styles: tuple[str, ...] = (), scripts: tuple[str, ...] = ()) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML.
        data: JSON values, which scripts read from the element ``data``; ``None`` for none.
        styles: names of style sheets beside ``base.css``.
        scripts: names of scripts, run after the body and ``base.js``, which needs ``data``.
    """
    style = "\n".join(part(name) for name in ("base.css", *styles))
    script = "\n".join(f"<script>{part(name)}</script>" for name in (("base.js", *scripts) if scripts else ()))
    # A closing tag inside a string would end the element.
    held = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    element = "" if data is None else f'<script type="application/json" id="data">{held}</script>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{style}</style></head>
<body><main>{body}</main>
{element}
{script}</body></html>
"""


def data_uri(image: Any, longest: int, quality: int = 85) -> str:
    """A PIL image as a JPEG in a data URI, no side longer than ``longest`` pixels."""
    small = image.convert("RGB")
    small.thumbnail((longest, longest))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
