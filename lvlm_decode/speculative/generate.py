"""The speculative loop: draft, verify all views of all rows in one stacked forward, keep what the target agrees with.

Called by the engine inside ``generate()``, so prompts, processors, stopping criteria and configuration are Hugging
Face's own. What comes out is what the engine's undrafted run gives; see ``verify`` for why.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from ..engine import hf
from ..engine.hf import Call
from ..engine.run import Run
from ..engine.strategy import Stacked
from ..errors import UnsupportedError
from .cache_ops import accept_paths
from .choose import Chooser, Stopper
from .clock import Clock
from .drafters.base import Context, Drafter, Features, PromptFeatures, Session, Verified, Watch
from .features import Watcher, watched
from .handover import decode_on
from .stats import Stats
from .tree import Tree, shape_of
from .verify import walk


@dataclass(frozen=True)
class Speculative:
    """The strategy that verifies drafts.

    Args:
        drafter: proposes.
    """

    drafter: Drafter

    @property
    def name(self) -> str:
        return self.drafter.name

    def decode(self, run: Run, call: Call) -> Any:
        """Decode ``run`` with drafts.

        Returns:
            (B, S + generated) ids, or a ``GenerateDecoderOnlyOutput`` if the configuration asks for one; its
            ``speculation``, and the run's trace, hold the :class:`~lvlm_decode.speculative.stats.Stats`. Scores and logits of
            a sample that ended before the others repeat its last ones; without a draft they are those of the padding, which
            mean nothing.

        Raises:
            UnsupportedError: beams, recorded attentions or hidden states, or a cache that drafts cannot be taken back from.
        """
        check(call.config)
        hf.check_own(call.cache, self.name)
        watch = self.drafter.watch(run.module, len(call.input_ids), 1 + len(run.views))
        if watch is not None:
            return _undrafted(run, call, watch)
        with run.method.patch(run), torch.no_grad():
            loop = _Loop(run, self.drafter, call)
            # What follows the drafts is not watched: nobody reads it.
            with ExitStack() as stack:
                watcher = None
                if self.drafter.features:
                    watcher = stack.enter_context(watched(run.module, self.drafter.layers(run.module), run))
                session = loop.draft(watcher)
            return loop.finish(session)


def check(config: GenerationConfig) -> None:
    """Raise for what this loop cannot honour.

    Raises:
        UnsupportedError: beams, recorded attentions or hidden states.
    """
    if (config.num_beams or 1) > 1:
        raise UnsupportedError("a drafter and num_beams > 1 exclude each other: drafts follow one path; leave out one.")
    if config.return_dict_in_generate:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name):
                raise UnsupportedError(f"{name}=True is not supported with a drafter; leave it out, or the drafter.")


def _undrafted(run: Run, call: Call, watch: Watch) -> Any:
    """Decode as without a drafter, while ``watch`` looks on."""
    if call.cache is not None:
        # Other calls may have a draft, so what refuses one is said in the first.
        hf.KV(call.cache).check_rollback()
    run.trace.speculation = stats = Stats()

    first = True

    def ran() -> None:
        nonlocal first
        if first and call.input_ids.is_cuda and torch.cuda.is_available():
            # Of the others the host has read the tokens before it launches the next.
            torch.cuda.synchronize(call.input_ids.device)
        first = False
        watch.ran()

    out = Stacked().decode(run, call, ran)
    said = (out if isinstance(out, Tensor) else out.sequences)[:, call.prompt_length :].tolist()
    watch.ended()
    ends = Stopper(call.criteria, call.input_ids).ends
    stats.tokens = sum(len(_until_end(row, ends)) for row in said)
    if not isinstance(out, Tensor):
        out.speculation = stats
    return out


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    """Generated tokens up to the first end token; what follows it fills up a batch."""
    return row[: next((at for at, token in enumerate(row, 1) if token in ends), len(row))]


class _Loop:
    """The state of one call."""

    def __init__(self, run: Run, drafter: Drafter, call: Call):
        self.run, self.drafter, self.call, self.config, self.streamer = run, drafter, call, call.config, call.streamer
        self.input_ids = input_ids = call.input_ids
        self.lanes = run.open(None if call.cache is None else run.keys_for(call.cache))
        config = call.config
        record = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
        self.chooser = Chooser(call.processors, input_ids, bool(config.do_sample), record)
        self.stopper = Stopper(call.criteria, input_ids)
        self.stats = Stats()
        run.trace.speculation = self.stats
        rows = len(input_ids)
        self.generated: list[list[int]] = [[] for _ in range(rows)]
        self.done = [False] * rows
        #: How many tokens each sample had when its stopping criteria first held.
        self.ended: list[int | None] = [None] * rows
        self.clock = Clock(input_ids.device)

    def draft(self, watcher: Watcher | None) -> Session | None:
        """Run the prompts, and verify drafts while the drafter makes some.

        Returns:
            the drafter's session, or ``None`` where the first token ended the call.
        """
        scores, _ = self.lanes.prefill(keep=1)
        for lane in self.lanes.lanes:
            lane.kv.check_rollback()
        first = Tree.chain(self.input_ids.new_zeros(len(self.generated), 1))
        choose = self.chooser.at(scores, first, [0] * len(self.generated))
        prompts = self._prompts()
        self.texts = prompts
        lengths = [len(text) for text in prompts]
        for b in range(len(self.generated)):
            token = choose(b, 0)
            self.done[b] = self._emit(b, token)
            self.chooser.commit(b, token)
        self._settle()
        self.clock.mark("prefill")
        if all(self.done):
            return None
        prompt = None if watcher is None else self._prompt_features(watcher)
        context = Context(
            self.run.module,
            self.lanes,
            self.texts,
            lengths,
            scores[:, -1],
            prompt,
            self._couple,
            self.input_ids.device,
        )
        session = self.drafter.begin(context)
        self.clock.mark("draft")
        while not all(self.done):
            room = max(self.stopper.room(len(own)) for own, done in zip(self.generated, self.done) if not done)
            if not session.goes_on(room):
                break
            self._cycle(session, watcher, room)
        return session

    def finish(self, session: Session | None) -> Any:
        """Decode what is left without a draft; what ``generate()`` returns."""
        rest = None if all(self.done) else self._hand_over()
        if session is not None:
            session.finish()
        if not self.stopper.fills:
            last = self._last_end()
            self.generated = [own[:last] for own in self.generated]
        self.stats.tokens = sum(map(len, self.generated))
        self.stats.add_seconds(self.clock.seconds())
        if self.streamer is not None and rest is None:
            self.streamer.end()
        return self._output(rest)

    def _hand_over(self) -> Any:
        """Let Hugging Face's loop say the rest; what it returned."""
        start = min(len(own) for own, done in zip(self.generated, self.done) if not done)
        said, fills = (self.generated, self.ended), self.stopper.fills
        rest = decode_on(self.run, self.lanes, self.call, self.chooser, *said, start, fills, self._pad())
        sequences = rest if isinstance(rest, Tensor) else rest.sequences
        for b, row in enumerate(sequences[:, self.call.prompt_length :].tolist()):
            if self.done[b]:
                continue
            have, whole = len(self.generated[b]), _until_end(row, self.stopper.ends) if fills else row
            if self.chooser.record:
                # What is not recorded is not asked for either; the other stands for it.
                logits, scores = rest.logits or rest.scores, rest.scores or rest.logits
                new = range(have - start, len(whole) - start)
                self.chooser.recorded[b] += [(logits[step][b], scores[step][b]) for step in new]
            self.generated[b] += whole[have:]
            self.texts[b] += whole[have:]
            self.ended[b] = len(whole)
        self.stats.handed_over += 1
        self.clock.mark("rest")
        return rest

    def _cycle(self, session: Session, watcher: Watcher | None, room: int) -> None:
        stats, lanes, clock = self.stats, self.lanes, self.clock
        tree = self._fit(session.propose(room), room)
        clock.mark("draft")
        if watcher is not None:
            watcher.reset()
        scores, _ = lanes.extend(tree.tokens.clamp(min=0), ancestors=tree.ancestors(), depth=tree.depths())
        clock.mark("target")
        choose = self.chooser.at(scores, tree, [len(own) for own in self.generated])
        paths: list[list[int]] = []
        committed: list[list[int]] = []
        for b, own in enumerate(self.generated):
            if self.done[b]:
                paths.append([])
                committed.append([])
                continue
            before, tokens, shape = len(own), tree.lists[b], tree.shape(b)
            path, self.done[b] = walk(shape, tokens, partial(choose, b), partial(self._emit, b))
            self.chooser.commit(b, own[-1])
            paths.append(path)
            committed.append(own[before:])
            stats.cycles += 1
            stats.rows += sum(token >= 0 for token in tokens)
            stats.accepted += len(path) - 1
            stats.level(max(d for row, d in enumerate(shape.depth) if tokens[row] >= 0), len(path) - 1)
        if self.run.recorder is not None and paths[0]:
            self.run.recorder.verified(tree.lists[0], paths[0], committed[0])
        self._settle()
        if not all(self.done):
            accept_paths(
                lanes, [[] if over else path for path, over in zip(paths, self.done)], tree.rows, tree.is_chain
            )
        clock.mark("other")
        if not all(self.done):
            features = None if watcher is None else self._features(watcher)
            session.observe(Verified(tree, scores, paths, committed, features))
        clock.mark("draft")

    def _fit(self, tree: Tree, room: int) -> Tree:
        """The tree without what the length limit or a static cache has no room for."""
        tree = tree.limited(max(room, 0))
        free = min(
            (lane.kv.capacity - lane.length for lane in self.lanes.lanes if lane.kv.capacity is not None),
            default=tree.rows,
        )
        if tree.rows <= free:
            return tree
        # Parents stand before their children, so any first rows are a tree.
        shapes = tuple(shape_of(shape.parents[:free]) for shape in tree.shapes)
        return Tree(tree.tokens[:, :free], shapes)

    def _emit(self, sample: int, token: int) -> bool:
        own = self.generated[sample]
        own.append(token)
        self.texts[sample].append(token)
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        if self.stopper.stops(sample, own) and self.ended[sample] is None:
            self.ended[sample] = len(own)
        if self.stopper.fills or self.stopper.full(own):
            return self.ended[sample] is not None
        last = self._last_end()
        return last is not None and len(own) >= last

    def _last_end(self) -> int | None:
        """How many tokens the sample that ended last had by then; ``None`` while one goes on."""
        ends = [end for end in self.ended if end is not None]
        return max(ends) if len(ends) == len(self.ended) else None

    def _settle(self) -> None:
        """Samples that ended are decoded on, as without a draft, until all have: what is done is known afterwards."""
        last = self._last_end()
        if not self.stopper.fills and last is not None:
            self.done = [len(own) >= last for own in self.generated]

    def _couple(self, scores: Tensor, level: int, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.chooser.couple(scores, [len(own) + level for own in self.generated], ids)

    def _prompts(self) -> list[list[int]]:
        """Each sample's prompt without padding, image placeholders as -1."""
        prepared = self.lanes.main.prepared[0]
        ids, mask = prepared.input_ids, prepared.mask.bool()
        text = ids.masked_fill(self.run.family.is_placeholder(ids), -1).tolist()
        return [[token for token, seen in zip(row, keep) if seen] for row, keep in zip(text, mask.tolist())]

    def _prompt_features(self, watcher: Watcher) -> PromptFeatures:
        lane, family = self.lanes.main, self.run.family
        hidden, embeds = watcher.seen()
        width = hidden.shape[1]
        ids, masks = [], []
        for prepared in lane.prepared:
            missing = width - prepared.input_ids.shape[1]
            ids.append(torch.nn.functional.pad(prepared.input_ids, (missing, 0)))
            masks.append(torch.nn.functional.pad(prepared.mask.bool(), (missing, 0)))
        text, mask = torch.cat(ids), torch.cat(masks)
        return PromptFeatures(
            hidden=hidden,
            embeds=embeds,
            image=mask & family.is_placeholder(text),
            mask=mask,
            views=len(lane.views),
            ids=text,
            positions=watcher.axes,
            layers=dict(watcher.layers),
        )

    def _features(self, watcher: Watcher) -> Features:
        return Features(watcher.seen()[0], views=len(self.lanes.main.views), layers=dict(watcher.layers))

    def _pad(self) -> Any:
        """What fills up samples that ended."""
        ends = self.config.eos_token_id
        first = ends[0] if isinstance(ends, list) else ends
        return self.config.pad_token_id if self.config.pad_token_id is not None else first

    def _output(self, rest: Any) -> Any:
        """What ``generate()`` returns.

        Args:
            rest: what the loop returned that decoded the rest, if one did.
        """
        config, ids = self.config, self.input_ids
        longest = max(map(len, self.generated))
        if rest is None:
            filled = [[*own, *[self._pad()] * (longest - len(own))] for own in self.generated]
            sequences = torch.cat([ids, ids.new_tensor(filled)], 1)
        else:
            sequences = rest if isinstance(rest, Tensor) else rest.sequences
        if not config.return_dict_in_generate:
            return sequences
        # Hugging Face's annotations ask for a LongTensor and for a tuple of one, which a checker takes at their word.
        fields: dict[str, Any] = {"sequences": sequences}
        recorded = self.chooser.recorded
        steps = [[row[min(t, len(row) - 1)] for row in recorded] for t in range(longest)] if self.chooser.record else []
        if config.output_scores:
            fields["scores"] = tuple(torch.stack([own[1] for own in step]) for step in steps)
        if config.output_logits:
            fields["logits"] = tuple(torch.stack([own[0] for own in step]) for step in steps)
        out = GenerateDecoderOnlyOutput(**fields)
        out.speculation = self.stats
        return out
