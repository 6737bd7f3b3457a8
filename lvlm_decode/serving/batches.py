"""The engine that works wherever transformers does: one queue, and batches of what waits in it.

One thread runs the model. It takes the oldest request and those that may share a batch with it, and decodes them by
``generate()`` to their end. Rows end by themselves: at their own ``max_tokens``, or when their client is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attachment import Attached
from ..engine.modes import check_modes, check_needs
from ..errors import LvlmDecodeError
from ..families import family_of
from ..method import Method
from .conversations import prompt_of
from .engines import Job, Part
from .refusals import Refused

#: Seconds in which requests that arrive together find each other while the model is idle.
GATHER = 0.005
log = logging.getLogger(__name__)


class Batches:
    """Answers jobs on a transformers model.

    Args:
        model, processor: of one checkpoint.
        settings: see :class:`.engines.Engine`.
        batch_size: the most requests in one batch.
        queue: the most requests that wait; further ones are refused.
        noted: told the size of every batch.
    """

    kind = "transformers"

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        settings: Mapping[str, Any],
        batch_size: int = 16,
        queue: int = 64,
        noted: Callable[[int], None] = lambda size: None,
    ):
        self._model, self._processor, self.settings = model, processor, settings
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.tokenizer.padding_side = "left"
        self._family = family_of(model)
        self._size, self._queue, self.noted = batch_size, queue, noted
        self._ends = _ends(self._family.decoding_module(model).generation_config.eos_token_id)
        text = getattr(model.config, "text_config", model.config)
        self._context: int | None = getattr(text, "max_position_embeddings", None)
        self.broken: str | None = None
        self._waiting: list[_Place] = []
        self._running: list[_Place] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="lvlm-decode serve", daemon=True)
        self._thread.start()

    def check(self, method: Method) -> None:
        check_needs(method, self._family)

    def load(self) -> tuple[int, int]:
        with self._changed:
            return len(self._waiting), sum(not place.gone for place in self._running)

    async def answer(self, job: Job) -> AsyncIterator[Part]:
        place = _Place(job, asyncio.get_running_loop())
        with self._changed:
            if self.broken or self._closing:
                raise Refused(503, self.broken or "the server is ending; ask another one.")
            if len(self._waiting) >= self._queue:
                raise Refused(429, f"{self._queue} requests are waiting already; come again later.")
            self._waiting.append(place)
            self._changed.notify()
        try:
            while True:
                part = await place.parts.get()
                if isinstance(part, Refused):
                    raise part
                yield part
                if part.finish is not None:
                    return
        finally:
            place.gone = True
            with self._changed, contextlib.suppress(ValueError):
                self._waiting.remove(place)

    async def close(self) -> None:
        with self._changed:
            self._closing = True
            for place in (*self._waiting, *self._running):
                place.give(Refused(503, "the server is ending; ask another one."))
                place.gone = True
            self._waiting.clear()
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, 30)

    # What runs in the thread of the model ------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
            time.sleep(GATHER)
            with self._changed:
                batch = self._running = self._next()
            if batch:
                self.noted(len(batch))
                self._decode(batch)
            with self._changed:
                self._running = []

    def _next(self) -> list[_Place]:
        """The oldest request and those that may share a batch with it, taken out of the queue."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        most = 1 if _alone(first.job.choice.method) else self._size
        batch = [place for place in self._waiting if place.kind == first.kind][:most]
        self._waiting = [place for place in self._waiting if place not in batch]
        return batch

    def _decode(self, batch: Sequence[_Place]) -> None:
        """Answer a batch; where that fails, each of its requests alone. Whatever happens, each is given an end."""
        try:
            self._generate(batch)
            return
        except Exception as error:
            if self._lost(error):
                return
            failed: Exception = error
        if len(batch) == 1:
            batch[0].give(_told(failed))
            return
        for place in batch:
            if place.ended or place.gone:
                continue
            if place.sent and place.job.samples and place.job.seed is None:
                # Another draw would not go on with the words that were sent.
                place.give(_told(failed))
                continue
            self._decode([place])
            if self.broken:
                return

    def _lost(self, error: Exception) -> bool:
        """Whether the accelerator answers nothing more in this process; then nobody waits any longer."""
        if not (isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)):
            return False
        log.error("the device is lost: %s", error)
        with self._changed:
            self.broken = "the device of the model cannot be used any more; the server must be started again."
            for place in (*self._waiting, *self._running):
                place.give(Refused(503, self.broken))
            self._waiting.clear()
        return True

    def _generate(self, batch: Sequence[_Place]) -> None:
        inputs = self._inputs(batch)
        lengths = inputs["attention_mask"].sum(1).tolist()
        fits = [self._fits(place, length) for place, length in zip(batch, lengths)]
        if not all(fits):
            if rest := [place for place, fit in zip(batch, fits) if fit]:
                self._generate(rest)
            return
        job = batch[0].job
        method = job.choice.method
        check_modes(method, ["sample" if job.samples else "greedy"])
        for place, length in zip(batch, lengths):
            place.prompt_tokens = length
        arguments = job.arguments()
        if job.seed is not None:
            arguments["seed"] = job.seed
        if job.sample_id is not None:
            arguments["sample_ids"] = [place.job.sample_id for place in batch]
        searches = hasattr(method, "decode")
        follow = _Gone(batch) if searches else _Follow(batch, self._ends)
        inputs = inputs.to(self._model.device)
        # Nothing is put on the model, which other threads may use.
        generate = Attached(self._model, method, processor=self._processor)
        with torch.inference_mode():
            out = generate(
                **inputs,
                max_new_tokens=max(place.job.max_tokens for place in batch),
                stopping_criteria=[follow],
                **arguments,
            )
        prompt = inputs["input_ids"]
        # Some models return what was generated alone.
        whole = out.shape[1] >= prompt.shape[1] and torch.equal(out[:, : prompt.shape[1]], prompt)
        rows = (out[:, prompt.shape[1] :] if whole else out).tolist()
        for place, row in zip(batch, rows):
            if not place.ended:
                place.end(row, self._ends)

    def _inputs(self, batch: Sequence[_Place]) -> Any:
        """The processor's tensors of a batch, left-padded."""
        given: dict[str, Any] = {}
        if batch[0].job.pictures:
            nested = [list(place.job.pictures) for place in batch]
            given["images"] = nested if any(len(own) > 1 for own in nested) else [own[0] for own in nested]
        try:
            prompts = [prompt_of(self._processor, place.job) for place in batch]
            return self._processor(text=prompts, padding=True, return_tensors="pt", **given)
        except Refused:
            raise
        except Exception as error:
            # Processors raise whatever they like about a conversation they do not take.
            raise Refused(
                400, f"the model's processor does not take this conversation ({_first_line(error)})."
            ) from error

    def _fits(self, place: _Place, length: int) -> bool:
        """Whether prompt and answer fit in the model's context; the client is told where they do not."""
        if self._context is None or length + place.job.max_tokens <= self._context:
            return True
        place.give(
            Refused(
                400,
                f"the prompt has {length} tokens and max_tokens is {place.job.max_tokens}; together the model takes "
                f"{self._context}.",
                "max_tokens",
                "context_length_exceeded",
            )
        )
        return False


class _Place:
    """A request in the queue or in a batch."""

    def __init__(self, job: Job, loop: asyncio.AbstractEventLoop):
        self.job, self._loop = job, loop
        self.parts: asyncio.Queue[Part | Refused] = asyncio.Queue()
        #: Its client does not want the answer any more.
        self.gone = False
        #: The client was given a last part.
        self.ended = False
        self.sent = 0
        self.prompt_tokens = 0
        searches = hasattr(job.choice.method, "decode")
        #: Requests of one kind may share a batch.
        self.kind: Hashable = (
            job.choice.spec,
            tuple(sorted(job.arguments().items())),
            # Without draws, no seed is the seed of the views.
            job.seed if job.samples else job.seed or 0,
            job.sample_id is None,
            bool(job.pictures),
            # A search ends all its rows together.
            job.max_tokens if searches else None,
        )

    def give(self, part: Part | Refused) -> None:
        if self.ended:
            return
        self.ended = isinstance(part, Refused) or part.finish is not None
        self.sent += 0 if isinstance(part, Refused) else len(part.tokens)
        # The loop is closed where the server ends without waiting for answers.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.parts.put_nowait, part)

    def end(self, row: Sequence[int], ends: Sequence[int]) -> None:
        """The whole answer, from a row of what was generated."""
        length = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        own = list(row[: min(length, self.job.max_tokens)])
        ended = bool(own) and own[-1] in ends
        self.give(Part(tuple(own[self.sent :]), self.prompt_tokens, "stop" if ended else "length"))


class _Follow:
    """Hands every token on as it is chosen, and ends rows; called by ``generate()`` as a stopping criterion."""

    def __init__(self, batch: Sequence[_Place], ends: Sequence[int]):
        self._batch, self._ends = batch, ends
        self._steps = 0
        self._done = [False] * len(batch)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._steps += 1
        for row, (place, token) in enumerate(zip(self._batch, input_ids[:, -1].tolist())):
            if self._done[row]:
                continue
            stop, full = token in self._ends, self._steps >= place.job.max_tokens
            self._done[row] = stop or full or place.gone
            # What a batch that failed had sent already is not sent again.
            if self._steps > place.sent and not place.gone:
                place.give(Part((token,), place.prompt_tokens, "stop" if stop else "length" if full else None))
        return torch.tensor(self._done, device=input_ids.device)


class _Gone:
    """Ends a search whose clients are all gone; its rows are candidates, so nothing is handed on."""

    def __init__(self, batch: Sequence[_Place]):
        self._batch = batch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        gone = all(place.gone for place in self._batch)
        return torch.full((len(input_ids),), gone, device=input_ids.device)


def _alone(method: Method) -> bool:
    return any("batch" in part.refuses for part in method.parts())


def _ends(eos: int | Sequence[int] | None) -> list[int]:
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _told(error: Exception) -> Refused:
    """What a client is told of an error; of one that nobody foresaw the details are in the log alone."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, LvlmDecodeError):
        return Refused(400, str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return Refused(503, "the request does not fit in the server's memory; make pictures or max_tokens smaller.")
    log.error("a request failed", exc_info=error)
    return Refused(
        500, f"the model could not answer this request ({type(error).__name__}); the server's log says more."
    )
