"""Looking at speculation: the drafts of a call with what was accepted, acceptance per level, time per token.

Drawing needs matplotlib (``pip install lvlm-decode[plot]``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .drafters import Context, Drafter, Session, Verified
from .stats import Stats
from .tree import Shape

ACCEPTED, REFUSED, ROOT = "#2a9d8f", "#c9c9c9", "#e9c46a"


@dataclass(frozen=True)
class Draft:
    """One verified draft of one sample: its tokens and shape, the accepted rows, the tokens it committed."""

    tokens: list[int]
    shape: Shape
    path: list[int]
    committed: list[int]


def traced(drafter: Drafter) -> tuple[Drafter, list[Draft]]:
    """A drafter that works as ``drafter`` does, and the list to which it adds the drafts of sample 0.

    The last verification of a call, after which nobody asks, is left out.
    """
    twin, seen = copy.copy(drafter), []

    def begin(context: Context) -> Session:
        session = drafter.begin(context)
        observe = session.observe

        def note(verified: Verified) -> None:
            if verified.paths[0]:
                tree = verified.tree
                seen.append(Draft(tree.lists[0], tree.shape(0), list(verified.paths[0]), list(verified.committed[0])))
            observe(verified)

        # Of this one session.
        session.observe = note  # type: ignore[method-assign]
        return session

    # Of this one drafter.
    twin.begin = begin  # type: ignore[method-assign]
    return twin, seen


def layout(shape: Shape) -> list[tuple[float, float]]:
    """(x, y) of every row: depth downwards, leaves side by side, parents over the middle of their children."""
    places: dict[int, float] = {}
    leaves = [row for row in _preorder(shape) if not shape.children[row]]
    for x, row in enumerate(leaves):
        places[row] = float(x)
    for row in reversed(range(len(shape))):
        children = shape.children[row]
        if children:
            places[row] = sum(places[child] for child in children) / len(children)
    return [(places[row], -float(shape.depth[row])) for row in range(len(shape))]


def _preorder(shape: Shape) -> list[int]:
    order, stack = [], [0]
    while stack:
        row = stack.pop()
        order.append(row)
        stack += reversed(shape.children[row])
    return order


def draw_tree(draft: Draft, word: Callable[[int], str], ax: Any = None) -> Any:
    """Draw a draft: the root yellow, accepted tokens green, refused ones grey, the bonus below in a dashed frame.

    Args:
        word: token -> text.
        ax: matplotlib axes; new ones when ``None``.
    """
    import matplotlib.pyplot as plt

    places = layout(draft.shape)
    if ax is None:
        width = max(x for x, _ in places) + 1
        _, ax = plt.subplots(figsize=(max(3.0, 0.9 * width), 0.8 * (max(draft.shape.depth) + 2)))
    accepted = set(draft.path)
    for row, parent in enumerate(draft.shape.parents):
        if parent >= 0:
            colour = ACCEPTED if row in accepted else REFUSED
            ax.plot(*zip(places[parent], places[row]), color=colour, lw=2 if row in accepted else 1, zorder=1)
    for row, (x, y) in enumerate(places):
        colour = ROOT if row == 0 else ACCEPTED if row in accepted else REFUSED
        box = {"boxstyle": "round", "fc": colour, "ec": "none"}
        ax.text(x, y, word(draft.tokens[row]), ha="center", va="center", bbox=box, zorder=2)
    x, y = places[draft.path[-1]]
    box = {"boxstyle": "round", "fc": "white", "ec": ACCEPTED, "ls": "--"}
    shift = 0.0 if not draft.shape.children[draft.path[-1]] else 0.8
    ax.text(x + shift, y - 0.6, word(draft.committed[-1]), ha="center", va="center", bbox=box, zorder=3)
    ax.set_xlim(-0.8, max(x for x, _ in places) + 1.2)
    ax.set_ylim(min(y for _, y in places) - 1.2, 0.6)
    ax.axis("off")
    return ax


def draw_acceptance(stats: Mapping[str, Stats], ax: Any = None) -> Any:
    """Acceptance per level of several calls: the share accepted among the drafts that got so far."""
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(6, 3))[1] if ax is None else ax
    for name, one in stats.items():
        levels = [level for level, reached in enumerate(one.reached, start=1) if reached]
        ax.plot(levels, [one.acceptance[level - 1] for level in levels], marker="o", label=f"{name}, tau {one.tau:.2f}")
    ax.set_xlabel("level of the draft")
    ax.set_ylabel("accepted, of those that got there")
    ax.set_ylim(0, 1.05)
    ax.legend()
    return ax


def draw_times(report: Mapping[str, Any], ax: Any = None) -> Any:
    """Milliseconds per token after the prompt, of every arm of :func:`~lvlm_decode.bench.speculative.summary`."""
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(6, 0.5 * len(report) + 1))[1] if ax is None else ax
    names = list(report)
    ax.barh(names, [report[name]["ms_per_token_decode"] for name in names], color=ACCEPTED)
    ax.invert_yaxis()
    ax.set_xlabel("ms per token, without the prompt")
    return ax
