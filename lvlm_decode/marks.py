"""What a description of an emoji scene gets wrong, piece by piece: for terminals and pages. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

#: Kinds of a piece: nothing is wrong, it names an absent object, or its number, place or relation is false.
RIGHT, ABSENT, FALSE = "", "absent", "false"
#: Kind -> what stands before and after a piece where there is no colour.
BRACKETS = {RIGHT: ("", ""), ABSENT: ("[", "]"), FALSE: ("{", "}")}
#: Kind -> its style on a terminal.
STYLES = {RIGHT: "", ABSENT: "bold red", FALSE: "bold magenta"}


def pieces(text: str, scene: Any, absent: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``text`` in pieces, each with its kind.

    Args:
        scene: a scene of ``lvlm_decode_data``.
        absent: categories that the text names and the scene does not show.
    """
    import lvlm_decode_data
    from lvlm_decode_data.claims import false_claims

    words = lvlm_decode_data.synonyms()
    spans = [(claim.start, claim.end, FALSE) for claim in false_claims(text, scene, words)]
    forms = sorted({form for name in absent for form in words.get(name, [name])}, key=len, reverse=True)
    if forms:
        pattern = rf"\b(?:{'|'.join(map(re.escape, forms))})\b"
        spans += [(*match.span(), ABSENT) for match in re.finditer(pattern, text, re.IGNORECASE)]
    found, at = [], 0
    for start, end, kind in sorted(spans):
        found += [(text[at:start], RIGHT), (text[start:end], kind)]
        at = end
    return tuple((piece, kind) for piece, kind in [*found, (text[at:], RIGHT)] if piece)


def changed(text: str, other: str) -> tuple[bool, ...]:
    """For each character of ``text`` whether it lies in a run of words that ``other`` does not have in this place."""
    words, others = list(re.finditer(r"\S+", text)), other.split()
    out = [False] * len(text)
    for kind, start, end, _, _ in SequenceMatcher(
        None, [w.group() for w in words], others, autojunk=False
    ).get_opcodes():
        if kind in ("replace", "delete"):
            first, last = words[start].start(), words[end - 1].end()
            out[first:last] = [True] * (last - first)
    return tuple(out)


def bracketed(marked: Sequence[tuple[str, str]]) -> str:
    """The text of ``pieces`` with brackets around what is wrong."""
    return "".join(BRACKETS[kind][0] + piece + BRACKETS[kind][1] for piece, kind in marked)
