"""Drafting with a trained head: EAGLE, MSD, ViSpec and EAGLE-3, as a chain or as EAGLE-2's dynamic tree."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError, UnsupportedError
from ...families import family_of
from ...method import Step
from ..heads import DraftHead, fingerprint, load, shipped
from ..heads.module import CONFIG
from ..heads.published import checked_states, folder_of
from ..heads.runner import HeadRunner
from ..sending import sent
from ..tree import Tree, rerank, shape_of
from .base import Context, Drafter, PromptFeatures, Session, Verified


@dataclass
class HeadDrafter(Drafter):
    """Drafts with a :class:`~lvlm_decode.speculative.heads.DraftHead`.

    Every cycle runs the head on the true features of what was committed, then on its own guesses, level by level. With
    ``top_k`` 1 it drafts a chain; else EAGLE-2's tree (arXiv 2406.16858): each level runs the ``top_k`` most probable
    rows, each of them offers ``top_k`` continuations, and the most probable ``rows`` of all are verified.

    Args:
        head: the head; loaded from ``path`` or from what ships for the model when ``None``.
        path: folder of a head that this library saved, or of one that its authors published, or the hub id of such a
            folder, with ``@revision`` where another one than the newest is wanted.
        rows, depth, top_k: of the draft; the head's own values when ``None``.
        contrast: contrast-aware drafting: the head runs on the features of all views and drafts from the method's
            scores of its guesses, not from view 0's.
    """

    features: ClassVar[bool] = True
    kind: ClassVar[str] = ""

    head: DraftHead | None = field(default=None, repr=False)
    path: str | Path | None = None
    rows: int | None = None
    depth: int | None = None
    top_k: int | None = None
    contrast: bool = False
    runner: HeadRunner | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "depth", "top_k"):
            value = getattr(self, name)
            self.check(value is None or value >= 1, name, "at least 1, or None for the head's own")
        # Of a published head the target says what its files do not, so it is read once the target is known.
        if self.head is None and self.path is not None and (folder_of(self.path) / CONFIG).is_file():
            self.head = DraftHead.from_pretrained(folder_of(self.path))
        if self.head is not None and self.kind and self.head.config.kind != self.kind:
            raise InputError(
                f"the head given to drafter {self.name} is of kind {self.head.config.kind!r}; use that drafter instead."
            )

    @classmethod
    def create(cls, model: Any | None = None, **parameters: Any) -> Drafter:
        if model is not None and parameters.get("head") is None and parameters.get("path") is None:
            parameters["path"] = shipped(model, cls.kind)
        drafter = cls(**parameters)
        if model is not None and drafter.head is None:
            drafter.loaded(family_of(model).decoding_module(model))
        return drafter

    def loaded(self, target: Any) -> DraftHead:
        """The head, read from where it is if that has not been done."""
        if self.head is None:
            self.head = load(self.path or shipped(target, self.kind), target, self.kind, **self.settings(target))
        return self.head

    def settings(self, target: Any) -> dict[str, Any]:
        """What this drafter says of a published head that its files do not."""
        return {}

    def layers(self, module: Any) -> tuple[int, ...]:
        return self.loaded(module).config.states

    def begin(self, context: Context) -> Session:
        target = context.module
        config = self.loaded(target).config
        text = target.config.get_text_config(decoder=True)
        vocabulary = target.get_output_embeddings().weight.shape[0]
        if (config.hidden_size, config.vocab_size) != (text.hidden_size, vocabulary):
            raise InputError(
                f"the {config.kind} head is for width {config.hidden_size} and {config.vocab_size} tokens, and the model has "
                f"{text.hidden_size} and {vocabulary}; use a head trained for it."
            )
        weight, runner = target.get_output_embeddings().weight, self.runner
        if runner is None or runner.target_weight is not weight:
            if config.fingerprint and config.fingerprint != fingerprint(target):
                warnings.warn(
                    f"the {config.kind} head was trained for {config.target or 'another model'}, whose language head is not "
                    "this model's: it will draft, no answer changes, and little of it may be accepted.",
                    stacklevel=2,
                )
            runner = self.runner = HeadRunner(self.loaded(target), target)
        # A drafter with features is given those of the prompt.
        assert context.prompt is not None
        return _HeadSession(self, context, runner, context.prompt)


@dataclass
class EagleDrafter(HeadDrafter):
    """An EAGLE head: image slots as text slots."""

    name: ClassVar[str] = "eagle"
    kind: ClassVar[str] = "eagle"


@dataclass
class MsdDrafter(HeadDrafter):
    """An MSD head: image slots hold the projected image features."""

    name: ClassVar[str] = "msd"
    kind: ClassVar[str] = "msd"


@dataclass
class ViSpecDrafter(HeadDrafter):
    """A ViSpec head: images compressed, a global vector in every text slot."""

    name: ClassVar[str] = "vispec"
    kind: ClassVar[str] = "vispec"


@dataclass
class Eagle3Drafter(HeadDrafter):
    """An EAGLE-3 head: states of three layers mixed, a language head of its own over the tokens it may draft.

    Args:
        states: the decoder layers whose states a published head reads, 1 for the first; what its files say, or the
            authors' default, when ``None``.
    """

    name: ClassVar[str] = "eagle3"
    kind: ClassVar[str] = "eagle3"

    states: tuple[int, ...] | None = None

    def settings(self, target: Any) -> dict[str, Any]:
        return {} if self.states is None else {"states": checked_states(self.states, target)}


class _HeadSession(Session):
    drafter: HeadDrafter

    def __init__(self, drafter: HeadDrafter, context: Context, runner: HeadRunner, prompt: PromptFeatures):
        super().__init__(drafter, context)
        self.runner, config = runner, runner.config
        self.rows = drafter.rows or config.rows
        self.depth = drafter.depth or config.depth
        self.top_k = min(drafter.top_k or config.top_k, self.runner.out_weight.shape[0])
        self.samples = len(context.tokens)
        self.views = 1
        if drafter.contrast:
            lanes = context.lanes
            if lanes.probes.hidden or len(lanes.lanes) > 1:
                raise UnsupportedError(
                    f"{lanes.method.name} needs more than the last features of one forward, so the head cannot draft from "
                    "its scores; leave out contrast."
                )
            self.views = len(lanes.main.views)
        self._log_stop = math.log(drafter.stop) if drafter.stop > 0 else None
        self._read(prompt)

    def _read(self, prompt: PromptFeatures) -> None:
        """Run the head over the prompt, whose last slot is followed by the root."""
        runner, head = self.runner, self.runner.head
        roots = sent([text[-1] for text in self.context.tokens], runner.device).repeat(self.views)
        prompt = prompt.rows(self.views * self.samples)
        image = F.pad(prompt.image[:, 1:], (0, 1))
        features = head.lift(prompt.hidden, prompt.layers)
        slots = head.slots(runner.following(prompt, roots), features, image, prompt.mask, prompt.positions)
        self.constant = runner.constant(slots)
        # Slots that were left out are taken out, the others moved to the right end.
        width = int(slots.seen.sum(1).max())
        order = slots.seen.long().argsort(dim=1, stable=True)[:, -width:]
        z = slots.z.gather(1, order[..., None].expand(-1, -1, slots.z.shape[2]))
        seen = slots.seen.gather(1, order)
        positions = slots.positions.gather(-1, order.expand(*slots.positions.shape[:-2], *order.shape))
        out, k, v = head.run_layer(z, positions, seen)
        capacity = width + 256
        shape = (*k.shape[:2], capacity, k.shape[3])
        self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        self.keys[:, :, :width], self.values[:, :, :width] = k, v
        self.length = width
        self.seen = None if bool(seen.all()) else seen
        #: (R,) position of the next slot.
        self.next = prompt.mask.sum(1) if positions.dim() == 2 else positions[0, :, -1] + 1
        #: The largest of them, which the host knows without asking the device again.
        self.furthest = int(self.next.max())
        self.guess = out[:, -1:]
        self.fresh: tuple[list[list[int]], Tensor] | None = None

    def _reserve(self, more: int) -> None:
        missing = self.length + more - self.keys.shape[2]
        if missing > 0:
            self.keys, self.values = (F.pad(x, (0, 0, 0, missing + 256)) for x in (self.keys, self.values))

    def observe(self, verified: Verified) -> None:
        self.count(verified)
        assert verified.features is not None
        fresh = verified.features.rows(self.views * self.samples)
        hidden = self.runner.head.lift(fresh.hidden, fresh.layers)
        if self.samples == 1:
            path = verified.paths[0]
            if not verified.tree.is_chain:
                features = hidden.index_select(1, sent(path, hidden.device))
            else:
                features = hidden[:, : len(path)]
            self._extend(sent([verified.committed[0][: len(path)]], hidden.device), features, None)
            return
        # Rows that committed less are padded on the left; finished ones get one unseen slot.
        longest = max(len(tokens) for tokens in verified.committed)
        # Filled on the host, and sent as a whole.
        tokens = torch.zeros(self.samples, longest, dtype=torch.long)
        index, seen = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        for b, (path, own) in enumerate(zip(verified.paths, verified.committed)):
            if own:
                count = len(own)
                tokens[b, -count:] = torch.tensor(own)
                index[b, -count:] = torch.tensor(path[:count])
                seen[b, -count:] = True
        tokens, index, seen = (sent(table, hidden.device) for table in (tokens, index, seen))
        index = index.repeat(self.views, 1)
        features = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
        self._extend(tokens, features, seen.repeat(self.views, 1))

    def _extend(self, tokens: Tensor, features: Tensor, seen: Tensor | None) -> None:
        """Slots of committed tokens, with true features: these stay."""
        t = tokens.shape[1]
        self._reserve(t + self.top_k * self.depth)
        z = self.runner.inputs(tokens.repeat(self.views, 1) if self.views > 1 else tokens, features, self.constant)
        start, stop = self.length, self.length + t
        if seen is None:
            cos, sin = self._turn_next(0, t)
            mask = None if t == 1 and self.seen is None else self.runner.causal(start, stop)
            if self.seen is not None and mask is not None:
                self.seen = F.pad(self.seen, (0, t), value=True)
                mask = self.seen[:, None, None] & mask
            moved: Tensor | int = t
        else:
            count = seen.sum(1)
            offset = (torch.arange(t, device=seen.device) - (t - count)[:, None]).clamp(min=0)
            cos, sin = self._turn(self.next[:, None] + offset, self.furthest + t)
            before = self.seen if self.seen is not None else seen.new_ones(len(seen), start)
            self.seen = torch.cat([before, seen], 1)
            causal = self.runner.causal(start, stop)
            own = F.pad(torch.eye(t, dtype=torch.bool, device=seen.device), (start, 0))
            mask = (self.seen[:, None] & causal | own)[:, None]
            moved = count
        self.guess = self.runner.step(z, cos, sin, self.keys, self.values, start, mask)[:, -1:]
        self.length, self.next = stop, self.next + moved
        # A row that committed less than others stands before this; what is told is how large tables must be.
        self.furthest += t

    def _turn_next(self, level: int, t: int) -> tuple[Tensor, Tensor]:
        """cos, sin of ``t`` slots from ``level`` slots after the next one of each row."""
        if len(self.next) == 1:
            first = self.furthest + level
            cos, sin = self.runner.rotary(first + t)
            return cos[first : first + t], sin[first : first + t]
        # Views of one sample have prompts of their own, so their rows stand at positions of their own.
        ahead = level + torch.arange(t, device=self.next.device)
        return self._turn(self.next[:, None] + ahead, self.furthest + level + t)

    def _turn(self, positions: Tensor, upto: int) -> tuple[Tensor, Tensor]:
        """cos, sin (R, 1, t, head_dim) at ``positions`` (R, t), all below ``upto``."""
        cos, sin = self.runner.rotary(upto)
        return cos[positions][:, None], sin[positions][:, None]

    def _scores(self, guess: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Twice (B, t, N'): draft scores of guessed features (R, t, D), ``level`` levels below the root; under the noise."""
        logits = self.runner.logits(guess)
        if self.views > 1:
            logits = self._mitigated(logits, level)
        if self.context.couple is None:
            return logits, logits
        return self.context.couple(logits, level, self.runner.trim)

    def _mitigated(self, logits: Tensor, level: int) -> Tensor:
        """(B, t, N') the method's scores of the logits of all views (R, t, N')."""
        lanes = self.context.lanes
        stacked = logits.view(self.views, self.samples, *logits.shape[1:])
        positions = (lanes.generated + 1 + level)[:, None].expand(-1, logits.shape[1])
        return lanes.method.scores(Step(stacked, positions, lanes.weights))

    def propose(self, room: int) -> Tree:
        depth = min(self.depth, room)
        roots = sent([text[-1:] for text in self.context.tokens], self.runner.device)
        if depth < 1:
            return Tree.chain(roots)
        if self.top_k == 1:
            return self._chain(roots, min(depth, max(self.rows - 1, 1)))
        return self._tree(depth)

    def _chain(self, roots: Tensor, depth: int) -> Tree:
        runner, guess, tokens = self.runner, self.guess, [roots]
        self._reserve(depth)
        cumulative: Tensor | None = None
        for level in range(depth):
            scores, coupled = (x[:, -1] for x in self._scores(guess, level))
            chosen = coupled.argmax(-1, keepdim=True)
            token = runner.token_ids(chosen)
            tokens.append(token)
            if self._log_stop is not None:
                own = F.log_softmax(scores, -1).gather(-1, chosen)
                cumulative = own if cumulative is None else cumulative + own
                # `not any(>=)` rather than `all(<)`: it is also true for NaN, where processors leave no token.
                if not bool((cumulative >= self._log_stop).any()):
                    # This token is drafted already and costs one row; what would follow it is not drafted.
                    break
            if level + 1 < depth:
                guess = self._level(token, guess, level)
        return Tree.chain(torch.cat(tokens, 1))

    def _level(self, token: Tensor, guess: Tensor, level: int) -> Tensor:
        z = self.runner.inputs(token.repeat(self.views, 1) if self.views > 1 else token, guess, self.constant)
        cos, sin = self._turn_next(level, 1)
        mask = None
        if self.seen is not None:
            mask = F.pad(self.seen, (0, level + 1), value=True)[:, None, None]
        return self.runner.step(z, cos, sin, self.keys, self.values, self.length + level, mask)

    def _tree(self, depth: int) -> Tree:
        """EAGLE-2: expand the ``top_k`` best rows of every level, then rerank all of them."""
        runner, k, samples = self.runner, self.top_k, self.samples
        self._reserve(depth * k)
        scores, coupled = (x[:, -1] for x in self._scores(self.guess, 0))
        values, chosen = F.log_softmax(coupled, -1).topk(k, -1)  # (B, k)
        # Log-probabilities of the frontier's paths, before the noise; only the confidence stop reads them.
        stop = self._log_stop
        sure = None if stop is None else F.log_softmax(scores, -1).gather(-1, chosen)
        tokens = runner.token_ids(chosen)
        pool_tokens, pool_values = [tokens], [values]
        pool_parents = [torch.full_like(tokens, -1)]
        # For each row of the frontier: its place in the pool, and the drafted slots it sees, its own last.
        place = torch.arange(k, device=tokens.device).expand(samples, k)
        guess = self.guess.expand(-1, k, -1)
        seen = torch.eye(k, dtype=torch.bool, device=tokens.device).expand(samples, k, k)
        size = k
        for level in range(depth - 1):
            if sure is not None and stop is not None and not bool((sure[:, 0] >= stop).any()):
                break
            z = runner.inputs(tokens.repeat(self.views, 1), guess, self.constant)
            cos, sin = self._turn((self.next + level)[:, None].expand(-1, k), self.furthest + level + 1)
            past = seen.new_ones(samples * self.views, k, self.length)
            if self.seen is not None:
                past = past & self.seen[:, None]
            mask = torch.cat([past, seen.repeat(self.views, 1, 1)], -1)[:, None]
            out = runner.step(z, cos, sin, self.keys, self.values, self.length + level * k, mask)
            scores, coupled = self._scores(out, level + 1)
            best, chosen = (values[..., None] + F.log_softmax(coupled, -1)).topk(k, -1)  # (B, k, k)
            pool_tokens.append(runner.token_ids(chosen).flatten(1))
            pool_values.append(best.flatten(1))
            pool_parents.append(place.repeat_interleave(k, 1))
            values, kept = best.flatten(1).topk(k, -1)  # (B, k) of the k * k
            parent = kept // k
            if sure is not None:
                own = sure[..., None] + F.log_softmax(scores, -1).gather(-1, chosen)
                sure = own.flatten(1).gather(1, kept)
            tokens = pool_tokens[-1].gather(1, kept)
            place = size + kept
            size += k * k
            rows = parent.repeat(self.views, 1)
            guess = out.gather(1, rows[..., None].expand(-1, -1, out.shape[2]))
            seen = torch.cat(
                [
                    seen.gather(1, parent[..., None].expand(-1, -1, seen.shape[2])),
                    torch.eye(k, dtype=torch.bool, device=seen.device).expand(samples, k, k),
                ],
                -1,
            )
        # In one tensor, so that the host waits once; a token's number is exact in float64.
        pools = [torch.cat(pool, 1).double() for pool in (pool_tokens, pool_parents, pool_values)]
        return self._rerank(*torch.stack(pools).tolist())

    def _rerank(self, tokens: list[list[float]], parents: list[list[float]], values: list[list[float]]) -> Tree:
        drafts = []
        for b, text in enumerate(self.context.tokens):
            entries = rerank(values[b], self.rows - 1)
            row_of = {entry: row for row, entry in enumerate(entries, start=1)} | {-1: 0}
            shape = shape_of((-1, *(row_of[int(parents[b][entry])] for entry in entries)))
            drafts.append(([text[-1], *(int(tokens[b][entry]) for entry in entries)], shape))
        return Tree.of(drafts, self.runner.device)
