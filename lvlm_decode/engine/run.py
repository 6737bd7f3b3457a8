"""One call of ``generate()``: its samples, their views, the lanes that run them, and what is noted on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..families import family_of
from ..families.base import Family
from ..method import Method, Probes, Sum, View
from . import conversation, hf, sampling
from .attention import Edit, routed
from .batch import Batch, views_of
from .branch import Branch
from .conversation import Carried
from .hf import KV, Encoded, Prepared, decoder
from .modes import check_needs
from .recorder import Recorder
from .samples import Sample
from .stack import Lane, Lanes, check_execution

if TYPE_CHECKING:
    from ..speculative.stats import Stats


@dataclass
class Trace:
    """What a call did, noted by whoever decodes it; ``None`` and empty where that does not apply.

    Args:
        forwards: forwards of the language model that a controller ran by itself.
        rollbacks: of OPERA, per sample.
        trials: of CNTP, per sample the number of trials of each uncertain step.
        descriptions: of VDGD, per sample.
        captions: of MVP, per sample one per view.
        certainties: of MVP, per sample the certainty of every answer.
        speculation: what drafts were accepted.
    """

    forwards: int = 0
    rollbacks: list[int] = field(default_factory=list)
    trials: list[list[int]] = field(default_factory=list)
    descriptions: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    certainties: list[dict[str, float]] = field(default_factory=list)
    speculation: Stats | None = None


@dataclass(frozen=True)
class Summary:
    """What is known of a call that is over: settings, counts and what was said on the way, and no tensor.

    Args:
        method: that decoded.
        seed: as given to ``generate()``.
        sample_ids: the randomness key of each sample.
        rows_per_sample: beams or return sequences.
        views: of each sample, itself included.
        lanes: the numbers of the views that ran in one forward, for each such forward; empty for a search of its own.
        forwards: of all lanes.
        trace: what the decoding noted.
    """

    method: Method
    seed: int | None
    sample_ids: tuple[Hashable, ...]
    rows_per_sample: int
    views: int
    lanes: tuple[tuple[int, ...], ...]
    forwards: int
    trace: Trace


class Run:
    """One call of ``generate()``: the samples, their views, and the lanes that run them.

    Args:
        model: the LVLM the method is attached to.
        inputs: tensors by name, as the processor gave them.
        rows_per_sample: beams or return sequences; the loop's rows are sample-major.
        seed: keys the views (0 when it is not given), and the draws of a sampling run when it is given.
        sample_ids: one randomness key per sample; by default a hash of its prompt and images.
        execution: "stacked" (one forward) or "sequential" (one per view).
        family: the model's adapter, where it is known already.
        features: the images, where the caller encoded them.
        memory: what methods may keep between the calls of one attached model.
        recorder: receives what happens while the run decodes.
        kept: what the rows hold already, where a conversation goes on.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        method: Method,
        inputs: dict[str, Any],
        *,
        processor: Any = None,
        seed: int | None = None,
        sample_ids: Sequence[Hashable] | None = None,
        rows_per_sample: int = 1,
        execution: str = "stacked",
        family: Family | None = None,
        features: Sequence[Encoded] | None = None,
        memory: dict[Any, Any] | None = None,
        recorder: Recorder | None = None,
        kept: Carried | None = None,
    ):
        hf.require()
        check_execution(execution)
        hf.check_training(model)
        self.model, self.family = model, family or family_of(model)
        check_needs(method, self.family)
        seed = sampling.checked_seed(seed)
        self.seed, self.execution, self.rows_per_sample = seed, execution, rows_per_sample
        self.memory = {} if memory is None else memory
        self.recorder, self.kept = recorder, kept
        #: As it was attached; ``method`` is what of it has to run, and knows this run's views.
        self.given_method = method
        method = method.needed()
        self.trace = Trace()
        view_seed = sampling.DEFAULT_SEED if seed is None else seed
        # Only a method that watches the encoder makes the images be encoded before its views are known.
        watching = [part for part in method.parts() if type(part).observe is not Method.observe]
        observe = functools.partial(observing, watching) if watching else None
        self.batch = Batch(self.family, inputs, sample_ids, processor, observe, features)
        self.method, columns = views_of(method, self.batch, view_seed)
        samples = self.batch.resolve(self.batch.samples + [view.sample for column in columns for view in column])
        count = len(self.batch.samples)
        #: The samples of every view, view 0 first.
        self.samples: list[list[Sample]] = [samples[i : i + count] for i in range(0, len(samples), count)]
        self.views: list[View] = [column[0] for column in columns]
        self._weights = [[view.weight for view in column] for column in columns]
        if isinstance(self.method, Sum):
            self.method = self.method.reading(model)
        self.probes: Probes = self.method.probes(model)
        #: What is done to the decoder's attention in forwards of this run; see :meth:`editing`.
        self.edits: list[Edit] = []
        #: Views of partial depth, by number; see :meth:`branching`.
        self.branches: dict[int, Branch] = {}
        #: What single tokens after the prompt run through, where transformers would compile them.
        self.steps: Callable[..., Any] | None = None
        self.lanes: Lanes | None = None
        if recorder is not None:
            recorder.began(self)

    @property
    def processor(self) -> Any:
        """The processor that was given, or the one at the model's own path."""
        return self.batch.processor

    @property
    def sample_ids(self) -> list[Hashable]:
        return [sample.id for sample in self.batch.samples]

    @property
    def row_ids(self) -> list[Hashable]:
        """A randomness key per row of the loop."""
        if self.rows_per_sample == 1:
            return self.sample_ids
        return [(i, row) for i in self.sample_ids for row in range(self.rows_per_sample)]

    @functools.cached_property
    def prepared(self) -> list[Prepared]:
        """Per view the prepared rows, expanded sample-major to the rows of the loop."""
        return self.prepare(self.rows_per_sample)

    def prepare(self, rows_per_sample: int) -> list[Prepared]:
        """Per view the prepared rows, each sample ``rows_per_sample`` times."""

        def rows(number: int, width: int) -> Prepared:
            return self.batch.prepare(
                [sample for sample in self.samples[number] for _ in range(rows_per_sample)], width
            )

        # The samples themselves keep the caller's padding, so that states have the caller's shape.
        main = rows(0, self.batch.width)
        return [main, *(rows(number, 0) if view.rows else main for number, view in enumerate(self.views, 1))]

    @property
    def module(self) -> torch.nn.Module:
        """The module whose loop decodes."""
        return self.prepared[0].module

    @property
    def device(self) -> torch.device:
        """Where the prompts are, and with them what the lanes put out."""
        return self.prepared[0].input_ids.device

    def view_number(self, mark: str) -> int:
        """The number of the view that was made with this mark; 0 is the sample itself."""
        return next(number for number, view in enumerate(self.views, 1) if view.mark == mark)

    @property
    def extra_width(self) -> int:
        """By how much the longest view's prompt exceeds the samples' own."""
        widths = [p.input_ids.shape[1] for p in self.prepared]
        return max(widths) - widths[0]

    @contextmanager
    def branching(self, mark: str, branch: Branch) -> Iterator[None]:
        """The view that was made with ``mark``, one without rows, is what ``branch`` computes.

        Raises:
            UnsupportedError: a decoder that does not run under sdpa.
        """
        number = self.view_number(mark)
        self.branches[number] = branch
        try:
            with branch.followed():
                yield
        finally:
            del self.branches[number]

    @contextmanager
    def editing(self, *edits: Edit) -> Iterator[None]:
        """The forwards of this run attend under ``edits``, after those that are in force already.

        Raises:
            UnsupportedError: a decoder that does not run under sdpa.
        """
        with routed(self.module):
            self.edits.extend(edits)
            try:
                yield
            finally:
                del self.edits[-len(edits) :]

    def lane(self, numbers: Sequence[int], prepared: Sequence[Prepared], kv: KV | None = None) -> Lane:
        """The lane of some views that run in one forward.

        Args:
            numbers: of the views; 0 is the sample itself.
            prepared: the rows of each.
            kv: keys and values to use; growing ones of its own when ``None``.
        """
        view = self.views[numbers[0] - 1] if numbers[0] else None
        module = None if view is None else view.module
        return Lane(
            prepared,
            numbers,
            kv=kv,
            patch=None if view is None else view.patch,
            forward=module,
            steps=self.steps if module is None else None,
            pad_token_id=self.family.pad_token_id,
            owner=self,
            # Another model is not edited: methods read and change the attention of the one they are attached to.
            edits=self.edits if module is None else (),
        )

    def keys_for(self, cache: Any) -> KV:
        """Keys and values of the lane of view 0, where a loop was given ``cache``: that one, unless its size is fixed."""
        kv = KV(cache)
        # The loop's has the size of view 0's prompt and answer, and maybe its rows.
        return kv if kv.capacity is None else KV.fixed(self.module, kv.capacity + self.extra_width)

    def open(self, kv: KV | None = None, record: bool = False) -> Lanes:
        """The lanes of this run; view 0's uses ``kv``.

        Args:
            kv: the loop's keys and values, or ``None`` for growing ones.
            record: caches of the other lanes must be able to take tokens back (drafts are verified).
        """
        groups: dict[Any, list[int]] = {}
        for number in range(len(self.prepared)):
            view = self.views[number - 1] if number else None
            if view is not None and not view.rows:
                continue
            key: Any = (
                id(view.patch) if view and view.patch else None,
                id(view.module) if view and view.module else None,
            )
            if self.execution == "sequential":
                key = (*key, number)
            groups.setdefault(key, []).append(number)
        lanes = []
        for numbers in groups.values():
            lane = self.lane(numbers, [self.prepared[n] for n in numbers], kv if numbers[0] == 0 else None)
            if record and numbers[0] != 0:
                lane.kv.record()
            lanes.append(lane)
        if self.kept is not None:
            # Taken off the run, so that its memory is free as soon as the lanes have what they need of it.
            kept, self.kept = self.kept, None
            for lane in lanes:
                conversation.resume(self, kept, lane)
        weights, project = self.weights(lanes[0].rows), self._projection()
        self.lanes = Lanes(self.method, lanes, weights, self.probes, project, self.recorder, self.branches)
        return self.lanes

    def weights(self, rows: int) -> tuple[float | Tensor, ...]:
        """Signed weight of each extra view: one number where all samples agree, else (rows,), sample-major."""
        device = self.device
        return tuple(
            own[0] if len(set(own)) == 1 else torch.tensor(own, device=device).repeat_interleave(rows // len(own))
            for own in self._weights
        )

    def project(self, hidden: Tensor, normed: bool = True, view: int = 0) -> Tensor:
        """Hidden states (..., D) of an intermediate layer -> logits (..., N), through final norm and head; see ``Step``.

        Args:
            view: the view they come from; another model may run it.
        """
        return self._projection()(hidden, normed, view)

    def _projection(self) -> Callable[..., Tensor]:
        """:meth:`project` without the run: what holds a step then holds no more than the models."""
        modules = [self.module, *(view.module or self.module for view in self.views)]

        def project(hidden: Tensor, normed: bool = True, view: int = 0) -> Tensor:
            return decoder.logits_of(modules[view], hidden, normed)

        return project

    def summary(self) -> Summary:
        lanes = self.lanes
        return Summary(
            self.given_method,
            self.seed,
            tuple(self.sample_ids),
            self.rows_per_sample,
            len(self.samples),
            () if lanes is None else tuple(lane.views for lane in lanes.lanes),
            0 if lanes is None else lanes.forwards,
            self.trace,
        )


@contextmanager
def observing(methods: Sequence[Method], family: Family) -> Iterator[dict[str, Any]]:
    """What each of ``methods`` watches, by its name."""
    with ExitStack() as stack:
        yield {method.name: stack.enter_context(method.observe(family)) for method in methods}
