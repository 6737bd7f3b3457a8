"""The stacked forward: the rows of all views on the batch axis, one forward, one cache.

Stacked rows are view-major: row ``v * B + b``. ``B`` here counts the rows that the caller sees: samples times beams or
return sequences.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..method import Method, Probes, Step
from . import hf
from .attention import Edit
from .hf import KV, Prepared
from .recorder import Recorder
from .running import running

if TYPE_CHECKING:
    from .branch import Branch

EXECUTIONS = ("stacked", "sequential")
#: For how many tokens at once positions and masks are made; each token would otherwise launch operators for them.
AHEAD = 64


class Counting:
    """Numbers that grow by 1 with every token."""

    def __init__(self) -> None:
        self._made = self._newest = torch.empty(0)
        self._used = 0

    def after(self, numbers: Tensor) -> Tensor:
        """``numbers`` + 1; a slice of what is made already where ``numbers`` is what was returned last."""
        if numbers is not self._newest or self._used == AHEAD:
            self._made, self._used = numbers[..., None] + torch.arange(1, AHEAD + 1, device=numbers.device), 0
        self._newest = self._made[..., self._used]
        self._used += 1
        return self._newest


class Widening:
    """The mask of padded rows (R, S) bool, which grows by what every row sees."""

    def __init__(self) -> None:
        self._made = self._newest = torch.empty(0)
        self._additive: Tensor | None = None

    def after(self, mask: Tensor, q: int) -> Tensor:
        """``mask`` with ``q`` further slots; a slice of what is made already where ``mask`` is what was returned last."""
        width = mask.shape[1] + q
        if mask is not self._newest or width > self._made.shape[1]:
            self._made, self._additive = torch.nn.functional.pad(mask, (0, max(q, AHEAD)), value=True), None
        self._newest = self._made[:, :width]
        return self._newest

    def additive(self, dtype: torch.dtype) -> Tensor:
        """(R, 1, 1, S) the mask that was returned last, as one to add to the scores."""
        if self._additive is None:
            self._additive = additive(self._made[:, None], dtype)
        return self._additive[..., : self._newest.shape[1]]


class Lane:
    """The rows of some views, run in one forward with one cache.

    Args:
        prepared: per view the prepared rows, B each.
        views: the number of each view, for instance (0, 1).
        kv: the caller's keys and values, or ``None`` for growing ones of its own.
        patch: changes the module around every forward of this lane.
        forward: runs in place of the module.
        steps: the same, compiled, for single further tokens on keys and values of fixed size.
        pad_token_id: what left padding is filled with.
        owner: the run this lane belongs to; see :func:`running_lane`.
        edits: what is done to the decoder's attention in forwards of this lane.
    """

    def __init__(
        self,
        prepared: Sequence[Prepared],
        views: Sequence[int],
        *,
        kv: KV | None = None,
        patch: Callable[[torch.nn.Module], AbstractContextManager[Any]] | None = None,
        forward: Callable[..., Any] | None = None,
        steps: Callable[..., Any] | None = None,
        pad_token_id: int = 0,
        owner: object = None,
        edits: Sequence[Edit] = (),
    ):
        self.prepared, self.views = list(prepared), tuple(views)
        self.module: Any = prepared[0].module
        self.kv = KV.growing(self.module) if kv is None else kv
        self.rows = len(prepared[0].input_ids)
        # Weak, because the owner holds its lanes: together they would outlive the call until a collection.
        self._owner, self.edits = None if owner is None else weakref.ref(owner), edits
        self._patch = patch or (lambda module: nullcontext())
        # Called as a module and not by its forward, so that what shards it or watches it (FSDP, hooks) is called too.
        self._forward = self.module if forward is None else forward
        self._steps = None if self.kv.capacity is None else steps
        self._additive = hf.decoder.takes_additive(self.module)
        self._first = hf.first_forward(self.prepared, pad_token_id)
        seen = self._first["attention_mask"].bool()
        #: (V*B, S) bool over the cache's slots; ``None`` while every slot of every row is visible.
        self.mask: Tensor | None = None if bool(seen.all()) else seen
        #: (..., V*B, 1) position id of the newest token of each row.
        self.position: Tensor = self._first["position_ids"][..., -1:]
        # Of the last prompt token, and of the queries of the newest forward that choose a token.
        self._start = self._positions = self.position
        self._counting, self._widening = Counting(), Widening()
        #: Slots of the cache in use: prompt width and everything after.
        self.length = self.width
        self.forwards = 0
        #: Of how many positions, the newest, the running forward's logits are wanted.
        self.keep = 1

    @property
    def owner(self) -> object:
        return None if self._owner is None else self._owner()

    @property
    def width(self) -> int:
        """Prompt width of the stacked rows."""
        return max(p.input_ids.shape[1] for p in self.prepared)

    def resume(self, new: int, images: Mapping[str, Any]) -> None:
        """The prompts' first ``width - new`` slots are in the cache already; :meth:`prefill` runs the others.

        Args:
            images: those among the other slots, packed by kind.
        """
        self._first = hf.last_of_first(self._first, new, images)

    def prefill(self, keep: int, **call: Any) -> Any:
        """Run the prompts of all views.

        Args:
            keep: logits of the last ``keep`` positions are wanted.
            call: further arguments of the forward.

        Returns:
            the module's output, its logits (V*B, keep, N).
        """
        first, self._first = self._first, {}
        first["attention_mask"] = None if self.mask is None else self.mask.long()
        out = self._run(first, keep, call)
        self.kv.check_length(self.length)
        return out

    def extend(
        self,
        tokens: Tensor,
        keep: int,
        ancestors: Tensor | None = None,
        depth: Tensor | None = None,
        **call: Any,
    ) -> Any:
        """Run further tokens of all rows.

        Args:
            tokens: (B, q).
            keep: logits of the last ``keep`` of them are wanted.
            ancestors: (q, q) or (B, q, q) bool for a tree: token i sees token j. ``None`` is a chain.
            depth: (q,) or (B, q) of each tree node, 0 for the root; positions are the row's next position plus depth.
        """
        views, q = len(self.views), tokens.shape[1]
        if depth is not None:
            steps = depth.to(tokens.device)
            positions = self.position + 1 + (steps if steps.dim() == 1 else steps.repeat(views, 1))
        elif q == 1 and self._steps is None:
            # The common case, and every operator counts there.
            positions = self._counting.after(self.position)
        else:
            positions = self.position + torch.arange(1, q + 1, device=tokens.device)
        mask: Tensor | None = None
        if ancestors is not None:
            mask = self._tree_mask(ancestors.to(tokens.device))
        if self.mask is not None:
            # Which of a tree's slots stay visible is known once a path is accepted; see accept_paths.
            self.mask = self._widening.after(self.mask, q)
            mask = self._row_mask(q) if mask is None else mask
        if ancestors is None:
            self.position = positions if q == 1 else positions[..., -1:]
        self._positions = positions
        self.length += q
        rows = tokens if views == 1 else tokens.repeat(views, 1)
        further = hf.further_forward(rows, positions, mask)
        if self._steps is None or q > 1 or call:
            return self._run(further, keep, call)
        out = self._run(further, keep, call, self._steps)
        # A replayed graph writes over what it put out before.
        out.logits = out.logits.clone()
        return out

    def _row_mask(self, q: int) -> Tensor:
        """The mask of further tokens in padded rows, (V*B, S) or, where the decoder takes it, additive (V*B, 1, 1, S).

        Of an additive mask transformers does not ask whether it hides anything, which the host would have to wait for.
        """
        assert self.mask is not None
        if q == 1 and self._additive and self.kv.capacity is None:
            return self._widening.additive(self.module.dtype)
        return self.mask.long()

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
        if self.kv.capacity is not None:
            seen = torch.nn.functional.pad(seen, (0, self.kv.capacity - seen.shape[-1]))
        return additive(seen, self.module.dtype)

    def _run(
        self, kwargs: dict[str, Any], keep: int, call: dict[str, Any], forward: Callable[..., Any] | None = None
    ) -> Any:
        self.forwards += 1
        self.keep = keep
        with running(self), self._patch(self.module):
            return hf.run(forward or self._forward, kwargs, self.kv.cache, keep, **call)

    def rows_of(self, view: int) -> slice | None:
        """Where the rows of view ``view`` stand among this lane's, or ``None`` if it runs elsewhere."""
        if view not in self.views:
            return None
        at = self.views.index(view) * self.rows
        return slice(at, at + self.rows)

    @property
    def ages(self) -> Tensor:
        """(V*B, q) how many tokens were generated before the one that each query of the running forward chooses."""
        since = self._positions - self._start
        return since[0] if since.dim() == 3 else since

    @property
    def prefilling(self) -> bool:
        """The forward that is running is the prompts'."""
        return self.forwards == 1

    def drop(self, n: int) -> None:
        """Forget the newest ``n`` tokens of every row; 0 lets a sliding window shrink back to its size."""
        self.kv.drop(n)
        self.length -= n
        self.position = self.position - n
        if self.mask is not None:
            self.mask = self.mask[:, : self.mask.shape[1] - n]

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row ``index[b]`` was, in every view."""
        index = index.to(self.position.device)
        whole = torch.cat([index + v * self.rows for v in range(len(self.views))])
        self.kv.reorder(whole)
        if self.mask is not None:
            self.mask = self.mask[whole]
        self.position = self.position.index_select(-2, whole)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, 1, q, S) attention mask to add to the scores, from (R, q, S) bool."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


class Lanes:
    """All views of a run: lane 0 holds view 0, and with ``"stacked"`` execution every view that can ride along.

    Args:
        method: whose scores are wanted.
        lanes: in running order; the first one holds view 0.
        weights: signed weight of each extra view; see :class:`Step`.
        probes: hidden layers to hand to ``combine``.
        project: see :class:`Step`.
        recorder: receives every step.
        branches: views of partial depth, by number; no lane runs them.
    """

    def __init__(
        self,
        method: Method,
        lanes: Sequence[Lane],
        weights: Sequence[float | Tensor],
        probes: Probes,
        project: Callable[..., Tensor],
        recorder: Recorder | None = None,
        branches: Mapping[int, Branch] | None = None,
    ):
        self.branches = {} if branches is None else branches
        self.method, self.lanes, self.weights = method, list(lanes), tuple(weights)
        self.probes, self._project, self.recorder = probes, project, recorder
        #: (B,) tokens generated so far that the cache holds.
        self.generated: Tensor = torch.zeros(self.main.rows, dtype=torch.long, device=self.main.position.device)
        self.last_step: Step | None = None
        self._counting = Counting()

    @property
    def main(self) -> Lane:
        return self.lanes[0]

    @property
    def lead(self) -> int:
        """Slots that the prompts of the lane of view 0 have before the caller's: longer views run in it, or do not."""
        return self.main.width - self.main.prepared[0].input_ids.shape[1]

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
        positions = self.generated[:, None] - torch.arange(first - 1, -1, -1, device=self.generated.device)
        scores, out = self._score(outputs, positions.clamp(min=0)), outputs[0]
        if q:
            assert tail is not None
            more, further = self.extend(tail, min(q, keep), **call)
            out = hf.joined(out, further)
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
        if self.recorder is not None:
            self.recorder.extended(tokens)
        q = tokens.shape[1]
        keep = q if not keep else keep
        if q == 1:
            counted = self._counting.after(self.generated)
            positions = counted[:, None]
        else:
            steps = torch.arange(q, device=tokens.device) if depth is None else depth.to(tokens.device)
            positions = self.generated[:, None] + 1 + steps
            counted = positions[:, -1]
        tree = {} if ancestors is None else {"ancestors": ancestors, "depth": depth}
        first = self.main.extend(tokens, keep, **tree, **self._call(self.main, call))
        if ancestors is None:
            self.generated = counted
        positions = positions[:, -keep:]
        outputs = [first, *(lane.extend(tokens, keep, **tree, **self._call(lane, call)) for lane in self.lanes[1:])]
        return self._score(outputs, positions), first

    def _call(self, lane: Lane, call: dict[str, Any]) -> dict[str, Any]:
        if not self.probes.hidden:
            return call
        asked = call.get("output_hidden_states")
        return {**call, "output_hidden_states": True if asked is True else list(self.probes.hidden)}

    def _score(self, outputs: Sequence[Any], positions: Tensor) -> Tensor:
        rows = self.main.rows
        views = 1 + len(self.weights)
        if len(outputs) == 1 and not self.branches:
            logits = outputs[0].logits.float().view(views, rows, *outputs[0].logits.shape[1:])
        else:
            parts: list[Tensor] = [outputs[0].logits] * views
            for lane, output in zip(self.lanes, outputs):
                for view, own in zip(lane.views, output.logits.float().split(rows)):
                    parts[view] = own.to(outputs[0].logits.device)
            for view, branch in self.branches.items():
                parts[view] = self._project(branch.states()).to(outputs[0].logits.device)
            logits = torch.stack(parts)
        hidden = {}
        for layer in self.probes.hidden:
            # A branch has no states of its own between the layer that it leaves and its end.
            states: list[Tensor] = [outputs[0].hidden_states[layer][:rows, -logits.shape[2] :]] * views
            for lane, output in zip(self.lanes, outputs):
                kept = output.hidden_states[layer][:, -logits.shape[2] :]
                for view, own in zip(lane.views, kept.split(rows)):
                    states[view] = own.to(logits.device)
            hidden[layer] = torch.stack(states)
        self.last_step = Step(logits, positions.to(logits.device), self.weights, hidden, self._project)
        scores = self.method.scores(self.last_step)
        if self.recorder is not None:
            self.recorder.step(self.method, self.last_step, scores)
        return scores

    def drop(self, n: int) -> None:
        """Forget the newest ``n`` tokens of every row."""
        for lane in self.lanes:
            lane.drop(n)
        self.generated = self.generated - n

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row ``index[b]`` was."""
        for lane in self.lanes:
            lane.reorder(index)
        self.generated = self.generated[index.to(self.generated.device)]


def check_execution(execution: str) -> None:
    """Raise unless ``execution`` is known."""
    if execution not in EXECUTIONS:
        raise UnsupportedError(f"execution = {execution!r} is not known; it is one of {', '.join(EXECUTIONS)}.")
