"""Rows of a language model that live in one cache and may each have a length of their own.

Searches need what ``generate()``'s loops do not: rows that branch, roll back or end at different times. All prompts share
the slots ``0..P-1`` of the cache (left-padded); slot ``P + j`` holds the row's own token ``j``, so rows of different length
differ only in which slots are masked.
"""

from __future__ import annotations

import copy
import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine import hf, sampling
from ..engine.attention import Edit
from ..engine.hf import KV, Prepared, decoder
from ..engine.hooks import hooked
from ..engine.running import running
from ..engine.stack import Lane, additive
from ..errors import UnsupportedError


@dataclass(frozen=True)
class _Looked:
    """Alternatives that were looked at and of which none is appended yet.

    Args:
        count: C, of each row.
        states: (R, C, D) what the head reads of them, or (R, C, N) their logits where no head is left to run.
        head: the head, which runs for the alternatives that are taken.
    """

    count: int
    states: Tensor
    head: Callable[[Tensor], Tensor] | None


class Rows:
    """A batch of prompts after their prefill.

    Args:
        prepared: (R, P) prompt rows as ``generate()`` prepared them.
        pad_token_id: fills the places of tokens that a row does not have.
        edits: what is done to the decoder's attention in every forward; the decoder must be routed.

    Raises:
        UnsupportedError: a decoder whose layers keep something else than keys and values.
    """

    def __init__(self, prepared: Prepared, pad_token_id: int = 0, edits: Sequence[Edit] = ()):
        self.module: Any = prepared.module
        self.edits: Sequence[Edit] = edits
        self._window, self._kinds = _attention_of(self.module)
        self._pad = pad_token_id
        lane = Lane([prepared], (0,), kv=KV.branching(), pad_token_id=pad_token_id, edits=edits)
        with torch.no_grad():
            hidden, out = _with_hidden(self.module, lambda: lane.prefill(1))
        #: (R, N) float32 for the first token of every row.
        self.first: Tensor = sampling.numbers(out.logits[:, -1].float())
        sampling.check_left(self.first, "at the prompt")
        self.kv = lane.kv
        self.kv.check_branches(type(self.module).__name__)
        self.prompt = lane.length
        self._prompt_mask, self._position = lane.mask, lane.position
        #: Which prompt each row has.
        self._prompts = list(range(len(self.first)))
        #: Tokens that each row holds after its prompt.
        self.lengths = [0] * len(self.first)
        # A number for every token when it is run; rows that branched off each other have those before in common.
        self._numbers = itertools.count()
        self._tokens: list[list[int]] = [[] for _ in self.lengths]
        self.forwards = 1
        self._looked: _Looked | None = None
        head = decoder.head(self.module)
        # Some families scale or cap what their head says; the head alone then does not give the logits.
        plain = head is not None and torch.allclose(
            head(hidden[:, -1]).float().to(self.first.device), self.first, atol=1e-4, rtol=1e-3
        )
        self._head = head if plain else None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def owner(self) -> object:
        return self

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def extend(self, tokens: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Append tokens to every row in one forward.

        Args:
            tokens: (R, q).
            counts: how many of its q tokens each row takes, from the left; all of them when ``None``.

        Returns:
            (R, N) float32 logits after each row's last token; of a row that took none, unspecified.
        """
        q = tokens.shape[1]
        counts = [q] * len(self) if counts is None else list(counts)
        even = all(count == q for count in counts)
        ragged = len(set(self.lengths)) > 1
        mask = None
        if ragged or self._prompt_mask is not None or self._window is not None:
            own = torch.ones(q, q, dtype=torch.bool, device=self.device).tril()
            mask = self._mask(own, torch.arange(q, device=self.device))
        # The head is the widest matrix there is: only the positions after which some row ends go through it.
        ends = sorted({max(count - 1, 0) for count in counts})
        # Indices of the host go into states of any device.
        keep = 1 if even else torch.tensor(ends)
        out = self._forward(tokens, torch.arange(q, device=self.device), mask, keep)
        last = torch.tensor([ends.index(max(count - 1, 0)) for count in counts], device=self.device)
        logits = out.logits[torch.arange(len(self), device=self.device), last].float()
        logits = sampling.numbers(logits)
        self._settle(counts, q)
        return logits

    def look(self, tokens: Tensor) -> None:
        """Run C alternatives for the next token of every row, each blind to the others; nothing is appended yet.

        Args:
            tokens: (R, C).
        """
        c = tokens.shape[1]
        depth = torch.zeros(c, dtype=torch.long, device=self.device)
        mask = self._mask(torch.eye(c, dtype=torch.bool, device=self.device), depth)
        if self._head is None:
            out = self._forward(tokens, depth, mask, c)
            self._looked = _Looked(c, out.logits, None)
            return
        # The head runs later, for the alternatives that are chosen.
        none = torch.empty(0, dtype=torch.long)
        hidden, _ = _with_hidden(self.module, lambda: self._forward(tokens, depth, mask, none))
        # The last layer may live on another device than the prompts.
        self._looked = _Looked(c, hidden.to(self.device), self._head)

    def take(self, parents: Sequence[int], columns: Sequence[int]) -> Tensor | None:
        """Row i becomes what row ``parents[i]`` was plus its alternative ``columns[i]``; -1 appends nothing.

        Returns:
            (R, N) float32 logits after the alternative; of a row that took none, unspecified. ``None`` if none did.
        """
        looked = self._looked
        start = self.prompt + self._slots() - (0 if looked is None else looked.count)
        had, same = self.prompt + self.width, list(parents) == list(range(len(self)))
        lengths = [self.lengths[p] + (column >= 0) for p, column in zip(parents, columns)]
        end = self.prompt + max(lengths)
        taken = [i for i, column in enumerate(columns) if column >= 0]
        places = [taken, [parents[i] for i in taken], [columns[i] for i in taken], [lengths[i] for i in taken]]
        rows, source, column, length = torch.tensor(places, dtype=torch.long, device=self.device)
        index = torch.tensor(parents, device=self.device)
        logits = None
        if taken:
            # Only an alternative that was looked at can be taken.
            assert looked is not None
            chosen = looked.states[source, column]
            logits = sampling.numbers((chosen if looked.head is None else looked.head(chosen)).float().to(self.device))
            if len(taken) < len(parents):
                logits = logits.new_empty(len(parents), logits.shape[-1]).index_copy_(0, rows, logits)
        # Rows that stay among those of their prompt need not move its slots, nor those of tokens that they had in common.
        first = self.prompt + min(
            common(self._tokens[row], self._tokens[p]) for row, p in enumerate(parents[: len(self)])
        )
        home = [self._prompts[p] for p in parents] == self._prompts
        # Layers may live on devices of their own.
        moves: dict[torch.device, tuple[Tensor, ...]] = {}

        def move(states: Tensor) -> Tensor:
            if states.device not in moves:
                every = (index, rows, source, start + column, self.prompt + length - 1)
                moves[states.device] = tuple(places.to(states.device) for places in every)
            index_here, rows_here, source_here, slots, to = moves[states.device]
            chosen = states[source_here, :, slots] if taken else None
            if not home:
                states = states[:, :, :end].index_select(0, index_here)
            elif not same:
                own = states[:, :, first:had]
                own.copy_(own.index_select(0, index_here))
            if chosen is not None:
                states[rows_here, :, to] = chosen
            return states[:, :, :end]

        self.kv.edit(move)
        self._reorder_prompts(index, home)
        self._prompts = [self._prompts[p] for p in parents]
        self._tokens = [self._tokens[p] + [next(self._numbers)] * (column >= 0) for p, column in zip(parents, columns)]
        self.lengths, self._looked = lengths, None
        return logits

    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes what row ``parents[i]`` was; rows may be left out or repeated."""
        self.take(parents, [-1] * len(parents))

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget the newest tokens, so that each row holds ``lengths`` (no more than it had); alternatives go too."""
        self.lengths, self._looked = list(lengths), None
        self._tokens = [tokens[:length] for tokens, length in zip(self._tokens, lengths)]
        end = self.prompt + max(lengths)
        self.kv.edit(lambda states: states[:, :, :end])

    def prompts(self, rows: Sequence[int]) -> Rows:
        """The prompts of these rows, as rows of their own; no forward."""
        rows = list(rows)
        out = copy.copy(self)
        out.kv = self.kv.select(rows, self.prompt)
        out._reorder_prompts(torch.tensor(rows, device=self.device), False)
        out._prompts = [self._prompts[row] for row in rows]
        out.lengths, out._looked, out.forwards = [0] * len(rows), None, 0
        out._tokens = [[] for _ in rows]
        return out

    def put(self, rows: Sequence[int], others: Rows) -> None:
        """Replace the tokens of these rows by those of ``others``: rows of the same prompts, none longer than these are.

        Alternatives that other rows look at stay.
        """
        rows = list(rows)
        for row, length, tokens in zip(rows, others.lengths, others._tokens):
            self.lengths[row], self._tokens[row] = length, tokens

        def write_over(states: Tensor, other: Tensor) -> Tensor:
            new = other[:, :, self.prompt :]
            states[rows, :, self.prompt : self.prompt + new.shape[2]] = new
            return states

        self.kv.edit(write_over, others.kv)
        self.forwards += others.forwards

    def _slots(self) -> int:
        """Slots after the prompt that the cache holds at present."""
        return self.kv.stored - self.prompt

    def _reorder_prompts(self, index: Tensor, home: bool) -> None:
        if home:
            return
        self.first = self.first[index]
        self._position = self._position.index_select(-2, index)
        if self._prompt_mask is not None:
            self._prompt_mask = self._prompt_mask[index]

    def _settle(self, counts: Sequence[int], q: int) -> None:
        """Move the tokens just run next to those each row had."""
        before, self.lengths = self.lengths, [length + count for length, count in zip(self.lengths, counts)]
        self._tokens = [own + list(itertools.islice(self._numbers, count)) for own, count in zip(self._tokens, counts)]
        start = self.prompt + max(before)
        end = self.prompt + self.width
        if len(set(before)) == 1:
            if all(count == q for count in counts):
                return
            index = None
        else:
            column = torch.arange(end, device=self.device)[None]
            had = self.prompt + torch.tensor(before, device=self.device)[:, None]
            # Slots past a row's end hold anything; clamping keeps the index inside the cache.
            index = torch.where(column < had, column, (start + column - had).clamp(max=start + q - 1))

        def settle(states: Tensor) -> Tensor:
            if index is not None:
                shape = (-1, states.shape[1], -1, states.shape[3])
                states = states.gather(2, index.to(states.device)[:, None, :, None].expand(shape))
            return states[:, :, :end]

        self.kv.edit(settle)

    def _mask(self, own: Tensor, depth: Tensor) -> Tensor | dict[str, Tensor]:
        """(R, 1, q, S + q) additive: the slots each row has, and of the new tokens those that ``own`` (q, q) shows."""
        slots, q = self._slots(), len(own)
        lengths = torch.tensor(self.lengths, device=self.device)
        past = torch.arange(slots, device=self.device) < lengths[:, None]
        prompt = self._prompt_mask
        prompt = past.new_ones(len(self), self.prompt) if prompt is None else prompt
        past = torch.cat([prompt, past], 1)[:, None].expand(-1, q, -1)
        seen = torch.cat([past, own.expand(len(self), -1, -1)], -1)
        if self._window is None:
            return self._additive(seen)
        at = torch.arange(self.prompt + slots, device=self.device).expand(len(self), -1)
        new = self.prompt + lengths[:, None] + depth
        at = torch.cat([at, new], 1)
        near = new[:, :, None] - at[:, None, :] < self._window
        if not self._kinds:
            return self._additive(seen & near)
        return {"full_attention": self._additive(seen), "sliding_attention": self._additive(seen & near)}

    def _additive(self, seen: Tensor) -> Tensor:
        return additive(seen, self.module.dtype)

    def _forward(self, tokens: Tensor, depth: Tensor, mask: Any, keep: int | Tensor) -> Any:
        self.forwards += 1
        lengths = torch.tensor(self.lengths, device=self.device)
        positions = self._position + 1 + lengths[:, None] + depth
        with torch.no_grad(), running(self):
            return hf.run(self.module, hf.further_forward(tokens, positions, mask), self.kv.cache, keep)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows have in common, by their numbers: those before a branch, and none after it."""
    shorter = min(len(one), len(other))
    return bisect_left(range(shorter), True, key=lambda place: one[place] != other[place])


def _attention_of(module: torch.nn.Module) -> tuple[int | None, set[str]]:
    """How far the sliding layers of a decoder see, ``None`` if it has none, and the kinds of layers it tells apart.

    Raises:
        UnsupportedError: layers that are neither full nor sliding attention.
    """
    kinds, window = decoder.kinds_of(module)
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        raise UnsupportedError(
            f"{type(module).__name__} has layers of kind {', '.join(sorted(other))}, whose state cannot be branched or "
            "rolled back token by token; use a model with attention layers only."
        )
    return window, kinds


def write(
    rows: Rows, most: int, ends: Sequence[int], choose: Callable[[Tensor, list[int], int], list[int]]
) -> list[list[int]]:
    """Let every row write up to ``most`` tokens; one that says an end token is dropped.

    Args:
        choose: logits (n, N), the numbers of the n rows that still write, and the position -> their next tokens.

    Returns:
        per row its tokens, without the end token.
    """
    texts: list[list[int]] = [[] for _ in range(len(rows))]
    live, logits = list(range(len(rows))), rows.first
    for position in range(most):
        tokens = choose(logits, live, position)
        going = [i for i, token in enumerate(tokens) if token not in ends]
        for i in going:
            texts[live[i]].append(tokens[i])
        if not going or position == most - 1:
            break
        if len(going) < len(live):
            rows.select(going)
        live = [live[i] for i in going]
        logits = rows.extend(torch.tensor([[tokens[i]] for i in going], device=logits.device))
    return texts


def _with_hidden(module: torch.nn.Module, run: Any) -> tuple[Tensor, Any]:
    """What the decoder handed to the head in the forward that ``run`` does, and what ``run`` returned."""
    box: list[Tensor] = []

    def keep(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        box.append(decoder.states_of(output))

    with hooked(after={decoder.decoder_of(module): keep}):
        out = run()
    return box[-1], out
