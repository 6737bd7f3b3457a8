"""Self-speculation: the target's own first layers draft, reading the target's own cache.

No weights of its own and no prompt pass: keys and values of the first ``e`` layers are those the target wrote. After
Kangaroo (arXiv 2404.18911), without its trained adapter, and DEL (arXiv 2504.05598): after every verification each
candidate exit's own choices are compared with what the target chose, and the exit layer and the draft length that
promise most tokens per unit of work are used next. On models that were not trained to be left early the exits are poor;
the benchmarks say how poor.

The verification runs all layers on all rows again; what the draft computed in the first layers is not reused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...engine import hf
from ...errors import ParameterError, UnsupportedError
from ..cost import tau_of
from ..tree import Tree
from .base import Context, Drafter, Session, Verified


@dataclass
class EarlyExit(Drafter):
    """Drafts a chain with the first layers of the target, on view 0's rows.

    Args:
        tokens: longest draft.
        exits: candidate exit layers, counted from 1; up to eight evenly spaced ones when ``None``.
        head_cost: what one pass through the language head and the loop around it costs, in layers.
    """

    name: ClassVar[str] = "early-exit"
    features: ClassVar[bool] = True

    tokens: int = 5
    exits: tuple[int, ...] | None = None
    head_cost: float = 0.5

    def layers(self, module: nn.Module) -> tuple[int, ...]:
        decoder = module.get_decoder()
        count = len(decoder.layers)
        if not hasattr(decoder, "rotary_emb"):
            raise UnsupportedError(
                f"{type(decoder).__name__} has no rotary embedding of its own, and early exit runs its layers by hand; "
                "use another drafter."
            )
        if self.exits is not None:
            if not self.exits or not all(1 <= layer < count for layer in self.exits):
                raise ParameterError(
                    f"early-exit: exits = {self.exits} are not valid; the model has layers 1 to {count - 1}."
                )
            return tuple(sorted(self.exits))
        step = max(1, math.ceil((count - 1) / 8))
        return tuple(range(step, count, step))

    def begin(self, context: Context) -> Session:
        return _ExitSession(self, context)


class _ExitSession(Session):
    drafter: EarlyExit

    def __init__(self, drafter: EarlyExit, context: Context):
        super().__init__(drafter, context)
        self.decoder, self.head = context.module.get_decoder(), context.module.get_output_embeddings()
        self.exits = drafter.layers(context.module)
        self.rows = len(context.tokens)
        #: Per exit: how often it chose as the target did, and how often it was asked; old cycles fade.
        self.right = dict.fromkeys(self.exits, self.PRIOR)
        self.asked = dict.fromkeys(self.exits, 1.0)

    def plan(self, most: int) -> tuple[int, int]:
        """The exit layer and draft length of the largest expected tokens per unit of work."""
        depth = len(self.decoder.layers)
        best, choice = 0.0, (self.exits[0], 1)
        for layer in self.exits:
            chance = self.right[layer] / self.asked[layer]
            for length in range(1, most + 1):
                work = depth + self.drafter.head_cost + length * (layer + self.drafter.head_cost)
                value = (1 + tau_of([chance] * length)) / work
                if value > best:
                    best, choice = value, (layer, length)
        return choice

    def propose(self, room: int) -> Tree:
        roots = torch.tensor([text[-1:] for text in self.context.tokens], device=self.context.device)
        most = min(self.drafter.tokens, room)
        if most < 1:
            return Tree.chain(roots)
        layer, length = self.plan(most)
        lane = self.context.lanes.main
        cache = self._first_layers(lane, layer)
        tokens, token, chance = [roots], roots, 0.0
        for level in range(length):
            logits = self._run(token, layer, level, lane, cache)
            coupled = logits
            if self.context.couple is not None:
                logits, coupled = self.context.couple(logits, level, None)
            token = coupled.argmax(-1)
            tokens.append(token)
            if self.drafter.stop > 0:
                chance = chance + logits.log_softmax(-1).gather(-1, token[..., None])
                if bool((chance < math.log(self.drafter.stop)).all()):
                    break
        return Tree.chain(torch.cat(tokens, 1))

    def _first_layers(self, lane, layer: int) -> DynamicCache:
        cache = DynamicCache()
        for number in range(layer):
            own = lane.cache.layers[number]
            keys, values = (states[: self.rows, :, : lane.length] for states in (own.keys, own.values))
            cache.update(keys, values, number)
        return cache

    def _run(self, token: Tensor, layer: int, level: int, lane, cache: DynamicCache) -> Tensor:
        """(B, 1, N) logits of the exit after ``layer``."""
        hidden = self.decoder.get_input_embeddings()(token)
        position = lane.position[..., : self.rows, :] + 1 + level
        spatial = position
        if position.dim() == 3 and len(position) == 4:
            # Qwen's M-RoPE: text positions first, then time, height and width.
            position, spatial = position[0], position[1:]
        turned = self.decoder.rotary_emb(hidden, position_ids=spatial)
        mask = None
        if lane.mask is not None:
            seen = torch.nn.functional.pad(lane.mask[: self.rows], (0, level + 1), value=True)
            mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
            mask = mask.masked_fill_(~seen, torch.finfo(hidden.dtype).min)[:, None, None]
        for number in range(layer):
            out = self.decoder.layers[number](
                hidden,
                attention_mask=mask,
                position_ids=position,
                **hf.with_cache(cache),
                use_cache=True,
                position_embeddings=turned,
            )
            hidden = out[0] if isinstance(out, tuple) else out
        return self.head(self.decoder.norm(hidden)).float()

    def observe(self, verified: Verified) -> None:
        self.count(verified)
        for layer in self.exits:
            states = verified.features.layers[layer]
            right = asked = 0
            for b, (path, committed) in enumerate(zip(verified.paths, verified.committed)):
                if committed:
                    rows = path[: len(committed)]
                    chosen = self.head(self.decoder.norm(states[b, rows])).argmax(-1).tolist()
                    right += sum(x == y for x, y in zip(chosen, committed))
                    asked += len(rows)
            self.right[layer] = 0.9 * self.right[layer] + right
            self.asked[layer] = 0.9 * self.asked[layer] + asked
