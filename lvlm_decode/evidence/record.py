"""A recorder that keeps the evidence of one sample, reduced to small values as soon as they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.recorder import Recorder
from ..method import Method, Step

if TYPE_CHECKING:
    from ..engine.run import Run


@dataclass(frozen=True)
class Evidence:
    """What is known about one token before it has a text; ids, and probabilities as floats.

    Args:
        probabilities: id -> (plain, those of the extra views, method or ``None``, kept).
        barred: the token that would have come without the mask.
    """

    plain: int
    shift: float | None
    distance: float | None
    probabilities: dict[int, tuple[float, tuple[float, ...], float | None, bool]]
    kept: int | None = None
    removed_mass: float = 0.0
    barred: int | None = None
    choices: dict[str, float] = field(default_factory=dict)
    attention: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """One position of a step, of sample 0.

    Args:
        logits: (V, N), view 0 first.
        scores: (N,) the method's, or ``None`` where a search decides.
        keep: (N,) bool, what the mask kept; ``None`` without a mask.
        unmasked: (N,) scores before the mask.
    """

    logits: Tensor
    scores: Tensor | None = None
    keep: Tensor | None = None
    unmasked: Tensor | None = None
    choices: dict[str, float] = field(default_factory=dict)
    attention: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)


def reduced(column: Column, token: int, top: int, plain: Tensor | None = None) -> Evidence:
    """The evidence of a position at which ``token`` came.

    Args:
        top: candidates of the method and of plain decoding, each.
        plain: (N,) logits of plain decoding, where view 0's are not.
    """
    views = column.logits.log_softmax(-1)
    base = views[0] if plain is None else plain.to(views).log_softmax(-1)
    scores, keep = column.scores, column.keep
    own = None if scores is None else scores.log_softmax(-1)
    count = min(top, base.shape[-1])
    listed = [token, *base.topk(count).indices.tolist(), *views[1:].argmax(-1).tolist()]
    if own is not None:
        best = own.topk(count).indices.tolist()
        listed += [i for i in best if keep is None or bool(keep[i])]
    barred = None
    if keep is not None and column.unmasked is not None:
        wanted = int(column.unmasked.argmax())
        barred = None if bool(keep[wanted]) else wanted
        listed += [wanted]
    ids = torch.tensor(list(dict.fromkeys(listed)), device=base.device)
    plain_p, view_p = base[ids].exp().tolist(), views[1:, ids].exp().T.tolist()
    own_p = [None] * len(ids) if own is None else own[ids].exp().tolist()
    kept = [True] * len(ids) if keep is None else keep[ids].tolist()
    rows = zip(ids.tolist(), plain_p, map(tuple, view_p), own_p, kept)
    found = {i: (p, v, m, k) for i, p, v, m, k in rows}
    return Evidence(
        plain=int(base.argmax()),
        shift=None if own is None else float(own[token] - base[token]),
        distance=None if own is None else float((own.exp() - base.exp()).abs().sum() / 2),
        probabilities=dict(sorted(found.items(), key=lambda item: (-(item[1][2] or 0.0), -item[1][0]))),
        kept=None if keep is None else int(keep.sum()),
        removed_mass=0.0 if keep is None else float(views[0].exp()[~keep].sum()),
        barred=barred,
        choices=column.choices,
        attention=column.attention,
    )


class Record(Recorder):
    """Keeps the evidence of sample 0.

    Args:
        top: see :func:`reduced`.
        later: plain decoding's logits come afterwards, so whole columns are kept until :meth:`settle`.
    """

    def __init__(self, top: int, later: bool):
        self.top, self.later = top, later
        self.found: dict[int, Evidence] = {}
        self.columns: dict[int, tuple[Column, int]] = {}
        #: (position, tokens drafted, path, tokens committed) of every verified draft.
        self.drafts: list[tuple[int, int, int, int]] = []
        self.drafted: set[int] = set()
        self.searches: Sequence[Any] = ()
        self.run: Run | None = None
        self._held: tuple[Method, Step, Tensor, dict[str, list[Any]]] | None = None
        self._attended: dict[str, list[Any]] = {}

    def began(self, run: Run) -> None:
        self.run = run

    def step(self, method: Method, step: Step, scores: Tensor) -> None:
        self._held, self._attended = (method, step, scores, self._attended), {}

    def attended(self, title: str, layer: int, weights: Tensor, images: Tensor, chosen: Tensor | None = None) -> None:
        weights, chosen = weights[0][:, images[0]], None if chosen is None else chosen[0][:, images[0]]
        before = self._attended.get(title)
        if before is None:
            self._attended[title] = [weights, 1, chosen]
        else:
            self._attended[title] = [before[0] + weights, before[1] + 1, chosen]

    def extended(self, tokens: Tensor) -> None:
        if self._held is not None:
            self._note([-1], [int(tokens[0, 0])])

    def verified(self, drafted: Sequence[int], path: Sequence[int], committed: Sequence[int]) -> None:
        assert self._held is not None
        first = int(self._held[1].positions[0, path[0]])
        count = sum(token >= 0 for token in drafted) - 1
        self.drafts.append((first, count, len(path) - 1, len(committed)))
        # The bonus is the target's own.
        self.drafted.update(range(first, first + len(path) - 1))
        self._note(path, committed)

    def searched(self, found: Sequence[Any]) -> None:
        self.searches = found

    def finish(self, answer: Sequence[int]) -> None:
        """The last token was chosen; ``answer`` holds all of them."""
        if self._held is not None:
            position = int(self._held[1].positions[0, -1])
            if position < len(answer):
                self._note([-1], [answer[position]])

    def _note(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        assert self._held is not None
        (method, step, scores, attended), self._held = self._held, None
        keep, choices = method.kept_tokens(step), method.choices(step)
        unmasked = None if keep is None else method.combine(step)
        for row, token in zip(rows, tokens):
            column = Column(
                step.logits[:, 0, row],
                scores[0, row],
                None if keep is None else keep[0, row],
                None if unmasked is None else unmasked[0, row],
                {name: value[0, row].item() for name, value in choices.items()},
                {
                    title: ((weights[row] / layers).cpu(), None if chosen is None else chosen[row].cpu())
                    for title, (weights, layers, chosen) in attended.items()
                },
            )
            position = int(step.positions[0, row])
            if self.later:
                self.columns[position] = (column, token)
            else:
                self.found[position] = reduced(column, token, self.top)

    def settle(self, plain: Tensor, answer: Sequence[int]) -> None:
        """Plain decoding's logits (T, N) after each prefix of ``answer`` are known.

        A search left no columns of its own: plain decoding's are then all there is.
        """
        for position, token in enumerate(answer):
            column = Column(plain[position][None])
            if position in self.columns:
                column, token = self.columns.pop(position)
            self.found[position] = reduced(column, token, self.top, plain[position])
