"""The stacked forward: the rows of all views on the batch axis, one forward, one cache.

Stacked rows are view-major: row ``v * B + b``. ``B`` here counts the rows that the caller sees: samples times beams or
return sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import UnsupportedError
from ..families.base import Captured
from ..method import Method, Probes, Step, masked, plausible
from . import hf
from .prepare import left_pad

EXECUTIONS = ("stacked", "sequential", "skip")

_running: ContextVar[Lane] = ContextVar("lvlm_decode_lane")


def running_lane() -> Lane:
    """The lane whose forward is running: what hooks inside the model know their rows by."""
    return _running.get()


class Lane:
    """The rows of some views, run in one forward with one cache.

    Args:
        captured: per view the prepared rows, B each.
        views: the number of each view, for instance (0, 1).
        cache: the caller's cache, or ``None`` for a dynamic one of its own.
        patch: changes the module around every forward of this lane.
        forward: the module's own forward.
        pad_token_id: what left padding is filled with.
    """

    def __init__(
        self,
        captured: Sequence[Captured],
        views: Sequence[int],
        *,
        cache: Any = None,
        patch: Callable[[torch.nn.Module], AbstractContextManager] | None = None,
        forward: Callable[..., Any] | None = None,
        pad_token_id: int = 0,
    ):
        self.captured, self.views = list(captured), tuple(views)
        self.module = captured[0].module
        self.cache = DynamicCache(config=self.module.config.get_text_config(decoder=True)) if cache is None else cache
        # The cache's own, before the loop's calls on it are led through this lane.
        self._crop_cache, self._reorder_cache = self.cache.crop, self.cache.reorder_cache
        self.rows = len(captured[0].input_ids)
        self._patch = patch or (lambda module: nullcontext())
        self._forward = forward or self.module.forward
        self._pad = pad_token_id
        #: (V*B, S) bool over the cache's slots; ``None`` while every slot of every row is visible.
        self.mask: Tensor | None = None
        #: (..., V*B, 1) position id of the newest token of each row.
        self.position: Tensor | None = None
        #: Slots of the cache in use: prompt width and everything after.
        self.length = 0
        self._pending: list[Tensor] = []
        self.forwards = 0

    @property
    def width(self) -> int:
        """Prompt width of the stacked rows."""
        return max(c.input_ids.shape[1] for c in self.captured)

    def prefill(self, keep: int, **call: Any) -> Any:
        """Run the prompts of all views.

        Args:
            keep: logits of the last ``keep`` positions are wanted.
            call: further arguments of the forward.

        Returns:
            the module's output, its logits (V*B, keep, N).
        """
        rows = [_complete(c) for c in self.captured]
        width = max(r["attention_mask"].shape[1] for r in rows)
        kwargs: dict[str, Any] = {}
        for key in rows[0]:
            values = [row.get(key) for row in rows]
            if key == "position_ids":
                axes = max(v.dim() for v in values)
                values = [v if v.dim() == axes else v.expand(axes_of(values), *v.shape) for v in values]
                kwargs[key] = torch.cat([left_pad(v, width, 0) for v in values], dim=-2)
            elif key in ("input_ids", "attention_mask"):
                if values[0] is not None:
                    fill = self._pad if key == "input_ids" else 0
                    kwargs[key] = torch.cat([left_pad(v, width, fill) for v in values])
            elif key == "inputs_embeds":
                kwargs[key] = torch.cat([left_pad(v, width, 0.0, dim=1) for v in values])
            elif key == "mm_encoder_outputs":
                continue
            elif isinstance(values[0], Tensor) and values[0].dim() == 2 and values[0].shape[0] == self.rows:
                kwargs[key] = torch.cat([left_pad(v, width, 0) for v in values])
            else:
                kwargs[key] = values[0]
        merged = merge_images([row.get("mm_encoder_outputs") for row in rows])
        if merged:
            kwargs["mm_encoder_outputs"] = merged
        kwargs.update(call)
        kwargs["logits_to_keep"] = keep
        mask = kwargs["attention_mask"].bool()
        self.position = kwargs["position_ids"][..., -1:]
        self.mask = None if bool(mask.all()) else mask
        self.length = width
        kwargs["attention_mask"] = None if self.mask is None else self.mask.long()
        return self._run(kwargs)

    def extend(
        self,
        tokens: Tensor,
        keep: int,
        ancestors: Tensor | None = None,
        depth: Tensor | None = None,
        **call: Any,
    ) -> Any:
        """Run further tokens of all rows, after those that were put off.

        Args:
            tokens: (B, q).
            keep: logits of the last ``keep`` of them are wanted.
            ancestors: (q, q) or (B, q, q) bool for a tree: token i sees token j. ``None`` is a chain.
            depth: (q,) or (B, q) of each tree node, 0 for the root; positions are the row's next position plus depth.
        """
        if self._pending:
            tokens = torch.cat([*self._pending, tokens], 1)
            self._pending = []
        views, q = len(self.views), tokens.shape[1]
        kwargs: dict[str, Any] = {"input_ids": tokens.repeat(views, 1), **call, "logits_to_keep": keep}
        steps = torch.arange(q, device=tokens.device) if depth is None else depth.to(tokens.device)
        kwargs["position_ids"] = self.position + 1 + (steps if steps.dim() == 1 else steps.repeat(views, 1))
        if ancestors is not None:
            kwargs["attention_mask"] = self._tree_mask(ancestors.to(tokens.device))
        elif self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), q)], 1)
            kwargs["attention_mask"] = self.mask.long()
        else:
            kwargs["attention_mask"] = None
        if ancestors is None:
            self.position = self.position + q
        elif self.mask is not None:
            # Which of a tree's slots stay visible is known once a path is accepted; see keep_path.
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), q)], 1)
        self.length += q
        return self._run(kwargs)

    def put_off(self, tokens: Tensor) -> None:
        """Note tokens (B, q) that this lane will run together with its next ones."""
        self._pending.append(tokens)

    def _tree_mask(self, ancestors: Tensor) -> Tensor:
        """(V*B or 1, 1, q, S + q) additive mask: every visible slot of the past, and a node's ancestors."""
        views, q = len(self.views), ancestors.shape[-1]
        own = ancestors[None] if ancestors.dim() == 2 else ancestors.repeat(views, 1, 1)
        if self.mask is None:
            past = own.new_ones(len(own), q, self.length)
        else:
            past = self.mask[:, None].expand(-1, q, -1)
            own = own.expand(len(past), -1, -1)
        seen = torch.cat([past, own], -1)
        if getattr(self.cache, "is_compileable", False):
            capacity = self.cache.layers[0].max_cache_len
            seen = torch.nn.functional.pad(seen, (0, capacity - seen.shape[-1]))
        return additive(seen, self.module.dtype)

    def _run(self, kwargs: dict[str, Any]) -> Any:
        self.forwards += 1
        kwargs.update(hf.with_cache(self.cache), use_cache=True, return_dict=True)
        token = _running.set(self)
        try:
            with self._patch(self.module):
                return self._forward(**kwargs)
        finally:
            _running.reset(token)

    def rows_of(self, view: int) -> slice | None:
        """Where the rows of view ``view`` stand among this lane's, or ``None`` if it runs elsewhere."""
        if view not in self.views:
            return None
        at = self.views.index(view) * self.rows
        return slice(at, at + self.rows)

    @property
    def prefilling(self) -> bool:
        """The forward that is running is the prompts'."""
        return self.forwards == 1

    def crop(self, n: int) -> None:
        """Forget the newest ``n`` tokens of every row; those put off first."""
        while n and self._pending:
            last = self._pending.pop()
            if last.shape[1] > n:
                self._pending.append(last[:, : last.shape[1] - n])
                return
            n -= last.shape[1]
        if self._pending:
            return
        # Also for n = 0: a sliding window shrinks back to its size only when it is told that nothing is taken back.
        self._crop_cache(-n)
        self.length -= n
        self.position = self.position - n
        if self.mask is not None:
            self.mask = self.mask[:, : self.mask.shape[1] - n]

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row ``index[b]`` was, in every view."""
        index = index.to(self.position.device)
        whole = torch.cat([index + v * self.rows for v in range(len(self.views))])
        self._reorder_cache(whole)
        if self.mask is not None:
            self.mask = self.mask[whole]
        self.position = self.position.index_select(-2, whole)
        self._pending = [tokens[index] for tokens in self._pending]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, 1, q, S) attention mask to add to the scores, from (R, q, S) bool."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def axes_of(values: Sequence[Tensor]) -> int:
    """Number of position axes (M-RoPE) among position ids of which some have none."""
    return next(v.shape[0] for v in values if v.dim() == 3)


def _complete(captured: Captured) -> dict[str, Any]:
    """The prepared rows with their ids and positions spelled out, one set per row."""
    kwargs = dict(captured.kwargs)
    kwargs.setdefault("input_ids", captured.input_ids)
    mask = kwargs["attention_mask"]
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    position = kwargs["position_ids"]
    if position.shape[-2] != len(mask):
        kwargs["position_ids"] = position.expand(*position.shape[:-2], len(mask), position.shape[-1])
    return kwargs


def merge_images(outputs: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """The encoded images of several views in row order, as one ``mm_encoder_outputs``."""
    merged: dict[str, Any] = {}
    for name in ("image", "video"):
        parts = [o[name] for o in outputs if o and o.get(name) is not None]
        if not parts:
            continue
        out = copy.copy(parts[0])
        features = [part.pooler_output for part in parts]
        if all(isinstance(f, Tensor) for f in features) and len({f.shape[1:] for f in features}) == 1:
            out.pooler_output = torch.cat(features)
        else:
            out.pooler_output = [image for f in features for image in f]
        layers = [getattr(part, "deepstack_features", None) for part in parts]
        if layers[0] is not None:
            out.deepstack_features = [
                torch.cat(layer) if isinstance(layer[0], Tensor) else [image for own in layer for image in own]
                for layer in zip(*layers)
            ]
        merged[name] = out
    return merged


class Lanes:
    """All views of a run: lane 0 holds view 0, and with ``"stacked"`` execution every view that can ride along.

    Args:
        method: whose scores are wanted.
        lanes: in running order; the first one holds view 0.
        weights: signed weight of each extra view.
        probes: hidden layers to hand to ``combine``.
        project: see :class:`Step`.
        skip: put the other lanes off while the plausibility mask of view 0 leaves a single token.
    """

    def __init__(
        self,
        method: Method,
        lanes: Sequence[Lane],
        weights: Sequence[float],
        probes: Probes,
        project: Callable[..., Tensor],
        skip: bool = False,
    ):
        self.method, self.lanes, self.weights = method, list(lanes), tuple(weights)
        self.probes, self._project, self.skip = probes, project, skip
        #: (B,) tokens generated so far that the cache holds.
        self.generated: Tensor | None = None
        self.skipped = 0
        self.last_step: Step | None = None

    @property
    def main(self) -> Lane:
        return self.lanes[0]

    @property
    def forwards(self) -> int:
        """Forwards run so far, over all lanes."""
        return sum(lane.forwards for lane in self.lanes)

    def prefill(self, tail: Tensor | None = None, keep: int = 1, **call: Any) -> tuple[Tensor, Any]:
        """Run all prompts; (B, keep, N) scores and the output of the lane that holds view 0.

        Args:
            tail: (B, q) drafted tokens after the prompt. They run in a forward of their own: a draft may hold the image
                token, which has no image to be replaced by.
            keep: scores of the last ``keep`` positions are wanted.
        """
        q = 0 if tail is None else tail.shape[1]
        first = max(1, keep - q)
        outputs = [lane.prefill(first, **self._call(lane, call)) for lane in self.lanes]
        rows, device = self.main.rows, outputs[0].logits.device
        self.generated = torch.zeros(rows, dtype=torch.long, device=device)
        positions = self.generated[:, None] - torch.arange(first - 1, -1, -1, device=device)
        scores, out = self._score(outputs, positions.clamp(min=0)), outputs[0]
        if q:
            more, out = self.extend(tail, min(q, keep), **call)
            scores = torch.cat([scores, more], 1)[:, -keep:]
        return scores, out

    def extend(
        self,
        tokens: Tensor,
        keep: int | None = None,
        ancestors: Tensor | None = None,
        depth: Tensor | None = None,
        **call: Any,
    ) -> tuple[Tensor, Any]:
        """Run further tokens (B, q); (B, keep, N) scores and the output of the lane that holds view 0."""
        q = tokens.shape[1]
        keep = q if not keep else keep
        steps = torch.arange(q, device=tokens.device) if depth is None else depth.to(tokens.device)
        positions = (self.generated[:, None] + 1 + steps)[:, -keep:]
        tree = {} if ancestors is None else {"ancestors": ancestors, "depth": depth}
        first = self.main.extend(tokens, keep, **tree, **self._call(self.main, call))
        if ancestors is None:
            self.generated = self.generated + q
        others = self.lanes[1:]
        if self.skip and others and ancestors is None:
            logits = first.logits.float()
            alone = plausible(logits, self.method.plausible)
            if bool((alone.sum(-1) == 1).all()):
                for lane in others:
                    lane.put_off(tokens)
                self.skipped += 1
                self.last_step = None
                return masked(logits, alone, logits), first
        outputs = [first, *(lane.extend(tokens, keep, **tree, **self._call(lane, call)) for lane in others)]
        return self._score(outputs, positions), first

    def _call(self, lane: Lane, call: dict[str, Any]) -> dict[str, Any]:
        if not self.probes.hidden:
            return call
        asked = call.get("output_hidden_states")
        return {**call, "output_hidden_states": True if asked is True else list(self.probes.hidden)}

    def _score(self, outputs: Sequence[Any], positions: Tensor) -> Tensor:
        rows = self.main.rows
        views = 1 + len(self.weights)
        if len(outputs) == 1:
            logits = outputs[0].logits.float().view(views, rows, *outputs[0].logits.shape[1:])
        else:
            parts: list[Tensor | None] = [None] * views
            for lane, output in zip(self.lanes, outputs):
                for view, own in zip(lane.views, output.logits.float().split(rows)):
                    parts[view] = own.to(outputs[0].logits.device)
            logits = torch.stack(parts)
        hidden = {}
        for layer in self.probes.hidden:
            states: list[Tensor | None] = [None] * views
            for lane, output in zip(self.lanes, outputs):
                kept = output.hidden_states[layer][:, -logits.shape[2] :]
                for view, own in zip(lane.views, kept.split(rows)):
                    states[view] = own.to(logits.device)
            hidden[layer] = torch.stack(states)
        self.last_step = Step(logits, positions, self.weights, hidden, self._project)
        return self.method.scores(self.last_step)

    def crop(self, n: int) -> None:
        """Forget the newest ``n`` tokens of every row."""
        for lane in self.lanes:
            lane.crop(n)
        self.generated = self.generated - n

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row ``index[b]`` was."""
        for lane in self.lanes:
            lane.reorder(index)
        self.generated = self.generated[index.to(self.generated.device)]


def check_execution(execution: str, method: Method, parts: int) -> None:
    """Raise unless ``execution`` is known and honours ``method``."""
    if execution not in EXECUTIONS:
        raise UnsupportedError(f"execution = {execution!r} is not known; it is one of {', '.join(EXECUTIONS)}.")
    if execution == "skip" and parts > 1 and method.plausible is None:
        raise UnsupportedError(
            f"{method.name} has no plausibility mask on view 0 as it is that could decide a step alone, so every step "
            "needs all views; use execution='stacked'."
        )
