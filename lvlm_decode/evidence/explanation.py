"""What an explanation holds: Python values alone, so that it can be kept, compared and written down."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ..errors import DependencyError


@dataclass(frozen=True)
class Candidate:
    """A token that could have come.

    Args:
        plain: its probability under plain decoding, given the same prefix.
        views: its probability under each extra view; empty where the method shows none.
        method: its probability under the method, after the mask; ``None`` where a search decides instead.
        kept: it survived the mask.
    """

    id: int
    text: str
    plain: float
    views: tuple[float, ...]
    method: float | None
    kept: bool = True


@dataclass(frozen=True)
class Mask:
    """What the plausibility mask did at one token.

    Args:
        kept, removed: numbers of tokens.
        removed_mass: probability of the removed ones under view 0.
        barred: id and text of the token that would have come without the mask; ``None`` where it is the same.
    """

    kept: int
    removed: int
    removed_mass: float
    barred: tuple[int, str] | None


@dataclass(frozen=True)
class Row:
    """Attention of one token to the image tokens, mean over heads and the named layers; ``chosen`` where it chose some."""

    title: str
    weights: tuple[float, ...]
    chosen: tuple[bool, ...] | None


@dataclass(frozen=True)
class Token:
    """One token of the answer.

    Args:
        text: what it adds to the answer; the name of a special token.
        plain_id, plain_text: what plain decoding takes, given the same prefix.
        changed: the token is not that one.
        shift: log-probability of the token under the method minus that under plain decoding, in nats; ``None`` where a
            search decides instead.
        distance: total variation distance between the two distributions, in [0, 1]; ``None`` as above.
        candidates: the likeliest tokens of the method, of plain decoding and of every view, the likeliest first.
        mask: ``None`` for a method without one.
        choices: what the method decided at this token, for instance the chosen layer.
        attention: rows that the method read or edited.
        drafted: a drafter proposed it; ``None`` without a drafter.
        leans_on: of OPERA, number of the token that the candidates leant on most.
    """

    index: int
    id: int
    text: str
    special: bool
    plain_id: int
    plain_text: str
    changed: bool
    shift: float | None
    distance: float | None
    candidates: tuple[Candidate, ...]
    mask: Mask | None = None
    choices: dict[str, float] = field(default_factory=dict)
    attention: tuple[Row, ...] = ()
    drafted: bool | None = None
    leans_on: int | None = None


@dataclass(frozen=True)
class Shown:
    """One view: what was changed about the sample, its weight, and its picture where its pixels were edited."""

    title: str
    weight: float
    picture: str | None = None


@dataclass(frozen=True)
class Overlay:
    """Places of the picture that a method chose.

    Args:
        weights: (P,) what they were chosen by, or ``None``.
        chosen: numbers of the chosen places.
        grid: rows and columns that the places make, row by row; ``None`` where they are not on a grid.
    """

    title: str
    places: int
    chosen: tuple[int, ...]
    weights: tuple[float, ...] | None
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class Returned:
    """One rollback of OPERA: with ``length`` tokens it went back to ``kept``, because token ``summary`` was leant on."""

    length: int
    summary: int
    summary_text: str
    kept: int
    taken_back: str


@dataclass(frozen=True)
class Draft:
    """One verified draft: the tokens along its first path, how many were accepted, and where it began."""

    position: int
    drafted: int
    accepted: int
    committed: int


@dataclass(frozen=True)
class Explanation:
    """The evidence of one answer; :func:`lvlm_decode.explain` makes it.

    ``explanation.to_dict()`` and ``to_pandas()`` give it as data, ``save("page.html")`` as one file that needs nothing else,
    and a notebook shows that page.

    Args:
        picture: the image as the model sees it, a data URI; the user's own where the model cuts it in pieces.
        grid: rows and columns of the image tokens on the picture; ``None`` where they make no grid.
        views: the extra views, in the order of :attr:`Candidate.views`.
        facts: what else the call noted: captions of MVP, the description of VDGD, trials of CNTP.
    """

    model: str
    method: str
    parameters: dict[str, Any]
    prompt: str
    answer: str
    seed: int
    tokens: tuple[Token, ...]
    views: tuple[Shown, ...]
    overlays: tuple[Overlay, ...]
    grid: tuple[int, int] | None
    returns: tuple[Returned, ...]
    drafts: tuple[Draft, ...]
    drafter: str | None
    facts: dict[str, Any]
    picture: str

    @property
    def changed(self) -> tuple[Token, ...]:
        """The tokens that plain decoding would not have taken, given the same prefix."""
        return tuple(token for token in self.tokens if token.changed)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON knows it; pictures are data URIs."""
        return dataclasses.asdict(self)

    def to_pandas(self) -> Any:
        """A data frame with one line per token and candidate.

        Raises:
            DependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise DependencyError("to_pandas needs pandas; install it with: pip install pandas.") from error
        lines = [
            {
                "index": token.index,
                "token": token.text,
                "plain": token.plain_text,
                "changed": token.changed,
                "shift": token.shift,
                "distance": token.distance,
                "candidate": candidate.text,
                "candidate_id": candidate.id,
                "p_plain": candidate.plain,
                **{f"p_view{number}": p for number, p in enumerate(candidate.views, 1)},
                "p_method": candidate.method,
                "kept": candidate.kept,
                **token.choices,
            }
            for token in self.tokens
            for candidate in token.candidates
        ]
        return pandas.DataFrame(lines)

    def html(self) -> str:
        """The page as text: one file, nothing fetched."""
        from .page import html

        return html(self)

    def save(self, path: str | Path) -> Path:
        """Write the page; its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        # A frame of its own: neither its style nor its script meets those of the notebook.
        style = "width:100%;height:720px;border:0"
        return f'<iframe title="Explanation" style="{style}" srcdoc="{escape(self.html())}"></iframe>'
