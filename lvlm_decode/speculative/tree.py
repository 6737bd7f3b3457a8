"""Drafts as trees: which tokens are proposed, what each of them follows, and which rows may see each other.

A draft for one sample is a tree of ``n`` rows. Row 0 is the *root*: the token already chosen but not yet in the cache.
Every other row is a proposed token; its parent stands before it. One forward verifies all rows: row ``i`` attends to the
cache, to its ancestors and to itself, at position ``cache length + depth(i)``. A chain is the tree in which every row
follows the one before; it needs no mask beyond the causal one.

Letters: ``B`` samples, ``n`` rows of a tree, root included.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..errors import ParameterError
from ..method import BELOW
from .sending import sent

#: Stands in a tree for a row that fills up a batch: fed as token 0, equal to no token, hence never accepted.
PAD = -1


@dataclass(frozen=True)
class Shape:
    """What follows what in a draft, without the tokens.

    Args:
        parents: (n,) row of each row's parent; -1 for the root, which is row 0, and ``parents[i] < i`` elsewhere.

    Raises:
        ParameterError: the first row is not the root, or a row stands before its parent.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1:
            raise ParameterError(f"a draft tree starts with the root, parent -1; got parents {self.parents[:8]}.")
        for row, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < row:
                raise ParameterError(
                    f"row {row} of a draft tree has parent {parent}; parents stand before their children."
                )

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """(n,) distance from the root."""
        depth = [0] * len(self.parents)
        for row, parent in enumerate(self.parents[1:], start=1):
            depth[row] = depth[parent] + 1
        return tuple(depth)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each row, the rows that follow it, in draft order."""
        out: list[list[int]] = [[] for _ in self.parents]
        for row, parent in enumerate(self.parents[1:], start=1):
            out[parent].append(row)
        return tuple(tuple(rows) for rows in out)

    @cached_property
    def is_chain(self) -> bool:
        return all(parent == row - 1 for row, parent in enumerate(self.parents))

    @cached_property
    def depths(self) -> Tensor:
        """(n,) long, :attr:`depth` as a tensor."""
        return torch.tensor(self.depth, dtype=torch.long)

    @cached_property
    def ancestors(self) -> Tensor:
        """(n, n) bool; entry (i, j) says whether row i may see row j: j is i or one of its ancestors."""
        seen = torch.eye(len(self.parents), dtype=torch.bool)
        for row, parent in enumerate(self.parents[1:], start=1):
            seen[row] |= seen[parent]
        return seen

    def path(self, row: int) -> list[int]:
        """Rows from the root to ``row``, both included."""
        out = [row]
        while self.parents[out[-1]] != -1:
            out.append(self.parents[out[-1]])
        return out[::-1]


@lru_cache(maxsize=512)
def shape_of(parents: tuple[int, ...]) -> Shape:
    """The :class:`Shape` of these parents, made once: its masks and depths are reused from cycle to cycle."""
    return Shape(parents)


def chain_shape(n: int) -> Shape:
    """The chain of ``n`` rows, root included."""
    return shape_of(tuple(range(-1, n - 1)))


@lru_cache(maxsize=64)
def ranked_shape(rows: int, chances: tuple[float, ...], depth: int) -> tuple[Shape, tuple[int, ...]]:
    """The static tree of ``rows`` rows that accepts most, if the child of rank r is right with probability chances[r].

    Grown best first: each row's value is the product of the chances on its path, so rank 0 runs deeper than the others.

    Args:
        rows: number of rows, root included.
        chances: falling with the rank; as many as a row may have children.
        depth: the deepest row allowed.

    Returns:
        The shape, and for each row the rank it has among its parent's children (0 for the root).
    """
    parents, ranks, depths, values = [-1], [0], [0], [1.0]
    heap: list[tuple[float, int, int, int]] = []  # (-value, tie-breaker, parent, rank)
    ticket = 0

    def offer(parent: int, rank: int) -> None:
        nonlocal ticket
        if rank < len(chances) and depths[parent] < depth:
            heapq.heappush(heap, (-values[parent] * chances[rank], ticket, parent, rank))
            ticket += 1

    offer(0, 0)
    while len(parents) < rows and heap:
        value, _, parent, rank = heapq.heappop(heap)
        parents.append(parent)
        ranks.append(rank)
        depths.append(depths[parent] + 1)
        values.append(-value)
        offer(parent, rank + 1)
        offer(len(parents) - 1, 0)
    return shape_of(tuple(parents)), tuple(ranks)


def rerank(values: Sequence[float], rows: int) -> list[int]:
    """EAGLE-2's reranking (arXiv 2406.16858): the ``rows`` pool entries of largest path log-probability.

    A path's log-probability never rises with depth, and ties go to the earlier entry, so the choice holds every
    ancestor of what it holds.

    Args:
        values: for each pool entry the log-probability of its path; parents stand before their children. Entries without
            a chance (masked, -inf, or NaN where a whole vocabulary has none) are left out.
        rows: how many to keep at most.

    Returns:
        The chosen entries, in pool order.
    """
    able = [entry for entry, value in enumerate(values) if value > -BELOW / 2]
    best = sorted(able, key=lambda entry: (-values[entry], entry))[:rows]
    return sorted(best)


@dataclass(frozen=True)
class Tree:
    """A draft for every sample of a batch; all have the same number of rows.

    Args:
        tokens: (B, n) long, the root first; :data:`PAD` fills up.
        shapes: one shape for all samples, or one for each.
        logprobs: (B, n) float, the drafter's log-probability of each row's path, root 0; ``None`` if it has none.
    """

    tokens: Tensor
    shapes: tuple[Shape, ...]
    logprobs: Tensor | None = None

    @staticmethod
    def chain(tokens: Tensor, logprobs: Tensor | None = None) -> Tree:
        """A chain per sample. ``tokens`` (B, n): the root, then the proposals, :data:`PAD` after the last one."""
        return Tree(tokens, (chain_shape(tokens.shape[1]),), logprobs)

    @staticmethod
    def of(rows: Sequence[tuple[Sequence[int], Shape]], device: torch.device | str = "cpu") -> Tree:
        """The batch of these (tokens, shape) drafts, the shorter ones filled up with rows that follow the root."""
        n = max(len(shape) for _, shape in rows)
        if all(shape.is_chain for _, shape in rows):
            filled = [[*tokens, *[PAD] * (n - len(tokens))] for tokens, _ in rows]
            return Tree.chain(sent(filled, device, torch.long))._with_lists(filled)
        tokens, shapes = [], []
        for own, shape in rows:
            missing = n - len(shape)
            tokens.append([*own, *[PAD] * missing])
            shapes.append(shape_of((*shape.parents, *[0] * missing)) if missing else shape)
        return Tree(sent(tokens, device, torch.long), tuple(shapes))._with_lists(tokens)

    def _with_lists(self, lists: list[list[int]]) -> Tree:
        """This tree, whose tokens the host knows already and need not read from the device."""
        self.__dict__["lists"] = lists
        return self

    @cached_property
    def lists(self) -> list[list[int]]:
        """:attr:`tokens` as Python lists; read from the device once."""
        return self.tokens.tolist()

    @property
    def rows(self) -> int:
        return self.tokens.shape[1]

    def shape(self, sample: int) -> Shape:
        return self.shapes[0] if len(self.shapes) == 1 else self.shapes[sample]

    @property
    def is_chain(self) -> bool:
        return all(shape.is_chain for shape in self.shapes)

    def ancestors(self) -> Tensor | None:
        """(n, n) or (B, n, n) bool; ``None`` for chains, which the causal mask serves."""
        if self.is_chain:
            return None
        device = self.tokens.device
        if len(self.shapes) == 1:
            return sent(self.shapes[0].ancestors, device)
        return sent(torch.stack([shape.ancestors for shape in self.shapes]), device)

    def depths(self) -> Tensor | None:
        """(n,) or (B, n) long; ``None`` for chains."""
        if self.is_chain:
            return None
        device = self.tokens.device
        if len(self.shapes) == 1:
            return sent(self.shapes[0].depths, device)
        return sent(torch.stack([shape.depths for shape in self.shapes]), device)

    def limited(self, depth: int) -> Tree:
        """The tree without rows deeper than ``depth``; what cannot be committed need not be verified."""
        if len(self.shapes) == 1:
            keep = [row for row, d in enumerate(self.shapes[0].depth) if d <= depth]
            if len(keep) == self.rows:
                return self
            return self.select(keep)
        if max(max(shape.depth) for shape in self.shapes) <= depth:
            return self
        rows = []
        for sample, shape in enumerate(self.shapes):
            kept = [row for row, d in enumerate(shape.depth) if d <= depth]
            place = {row: at for at, row in enumerate(kept)}
            parents = tuple(-1 if row == 0 else place[shape.parents[row]] for row in kept)
            rows.append(([self.lists[sample][row] for row in kept], shape_of(parents)))
        return Tree.of(rows, self.tokens.device)

    def select(self, rows: list[int]) -> Tree:
        """The tree of these rows alone, in order; with every row its ancestors. One shape for all samples only."""
        shape = self.shapes[0]
        place = {row: at for at, row in enumerate(rows)}
        parents = tuple(-1 if row == 0 else place[shape.parents[row]] for row in rows)
        index = sent(rows, self.tokens.device)
        logprobs = None if self.logprobs is None else self.logprobs[:, index]
        out = Tree(self.tokens[:, index], (shape_of(parents),), logprobs)
        if "lists" in self.__dict__:
            # Read from the device already.
            out._with_lists([[tokens[row] for row in rows] for tokens in self.lists])
        return out

    def pruned(self) -> Tree:
        """The tree without rows that are :data:`PAD` in every sample; one shape for all samples only."""
        keep = [row for row in range(self.rows) if any(tokens[row] != PAD for tokens in self.lists)]
        return self if len(keep) == self.rows else self.select(keep)
