"""The rest of a call in which nothing more is drafted: Hugging Face's own loop, as without a drafter.

Its rows are of one length, and those of a batch that was drafted for are not: a sample whose drafts were good is ahead. All
start again where the slowest one is. What the others have said beyond that is said again, and not chosen again, so an answer
stays what it was. That takes no more forwards than the slowest sample needs, and it is this sample that ends the call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..engine import hf, sampling
from ..engine.hf import Call
from ..engine.run import Run
from ..engine.stack import Lanes
from .cache_ops import rewind
from .choose import Chooser


def decode_on(
    run: Run,
    lanes: Lanes,
    call: Call,
    chooser: Chooser,
    said: Sequence[Sequence[int]],
    ended: Sequence[int | None],
    start: int,
    fills: bool,
    pad: Any,
) -> Any:
    """Decode the rest of a call without a draft.

    Processors and stopping criteria are called as in any loop of Hugging Face, with all rows, and so once more for what samples
    that are ahead have said already. With one sample none is, and each is called once for every token.

    Args:
        lanes: whose caches hold what each sample has said but its newest token, at least.
        said: for each sample its generated tokens.
        ended: for each sample the number of tokens with which it ended, or ``None``.
        start: how many tokens the slowest sample has said that goes on.
        fills: whether samples that ended are filled up with ``pad``, or decoded on.

    Returns:
        What the loop returned: (B, P + T) ids, or an output object; its scores and logits begin after ``start`` tokens.
    """
    over = [end is not None for end in ended]
    # One token beyond the start, which the loop chooses before it asks who ended.
    filled = [(start + 1 - len(own)) * (end and fills) for own, end in zip(said, over)]
    known = [[*own, *[pad] * count] for own, count in zip(said, filled)]
    prompt = call.input_ids
    rewind(lanes, start - 1)
    ends = call.config.eos_token_id
    guard = sampling.SomethingLeft(
        call.prompt_length,
        [ends] if isinstance(ends, int) else ends or [],
        call.streamer is not None,
        bool(call.config.do_sample),
        before=start,
    )
    drawn = [] if chooser.noise is None else [chooser.noise]
    processors = sampling.guarded(LogitsProcessorList([*chooser.processors, *drawn]), guard)
    if max(map(len, known)) > start:
        processors.append(_Known(known, call.prompt_length))
    criteria = StoppingCriteriaList(call.criteria)
    if any(over):
        criteria.append(_Ended(ended, call.prompt_length))
    streamer = call.streamer
    if streamer is not None and len(known) > 1:
        streamer = _Unsaid(streamer, [None if end else len(own) for own, end in zip(known, over)], start)
    text = torch.cat([prompt, prompt.new_tensor([own[:start] for own in known])], 1)
    # The forward knows its cache, and needs nothing else that the first forward of a call is given.
    rest = dataclasses.replace(
        call,
        input_ids=text,
        cache=None,
        inputs={"use_cache": True},
        processors=processors,
        criteria=criteria,
        streamer=streamer,
    )
    kv = lanes.main.kv
    with kv.led(lanes.reorder, lanes.drop):
        out = hf.run_loop(run.module, rest, _resumed(run, lanes, text[:, -1:]))
    guard.check(out if isinstance(out, Tensor) else out.sequences)
    return out


def _resumed(run: Run, lanes: Lanes, roots: Tensor) -> Any:
    """The forward of a loop that is given the whole text first and of which ``roots`` (B, 1) alone are not in the cache."""
    started = False

    @functools.wraps(run.module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal started
        tokens = (args[0] if args else kwargs["input_ids"]) if started else roots
        started = True
        scores, out = lanes.extend(tokens, 1)
        # An item: an attribute of an output is looked for among all its fields.
        out["logits"] = scores
        return out

    return forward


class _Known(LogitsProcessor):
    """Leaves of each sample's scores the token that it has said there already.

    Args:
        said: for each sample its generated tokens.
        prompt_length: width of ``input_ids`` before the first generated token.
    """

    def __init__(self, said: Sequence[Sequence[int]], prompt_length: int):
        self.said, self.prompt_length = said, prompt_length
        self.longest = max(map(len, said))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = input_ids.shape[1] - self.prompt_length
        if at >= self.longest:
            return scores
        rows = [row for row, own in enumerate(self.said) if at < len(own)]
        tokens = [self.said[row][at] for row in rows]
        scores[rows] = float("-inf")
        scores[rows, tokens] = 0.0
        return scores


class _Ended(StoppingCriteria):
    """Holds for samples that have as many tokens as they ended with.

    Args:
        ended: for each sample the number of tokens with which it ended, or ``None``.
        prompt_length: width of ``input_ids`` before the first generated token.
    """

    def __init__(self, ended: Sequence[int | None], prompt_length: int):
        self.lengths = [None if end is None else prompt_length + end for end in ended]
        self._over: list[bool] = []
        self._held = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        width = input_ids.shape[1]
        over = [length is not None and width >= length for length in self.lengths]
        if over != self._over:
            self._over, self._held = over, torch.tensor(over, device=input_ids.device)
        return self._held


class _Unsaid(BaseStreamer):
    """Hands on the tokens of a batch that were not handed on before.

    Args:
        have: for each sample how many of its tokens were; ``None`` for one that ended.
        start: how many tokens each sample has when the first ones come.
    """

    def __init__(self, streamer: BaseStreamer, have: Sequence[int | None], start: int):
        self.streamer, self.have, self.at = streamer, have, start

    def put(self, value: Tensor) -> None:
        unsaid = [row for row, have in enumerate(self.have) if have is not None and self.at >= have]
        self.at += 1
        if unsaid:
            self.streamer.put(value[unsaid])

    def end(self) -> None:
        self.streamer.end()
