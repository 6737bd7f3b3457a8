"""The engine on vLLM: every view of a request is a request of its own, and the front owns them as one group.

View 0 is the answer; the others are read to their end beside it. Whatever ends the answer (a stop string, a client that hangs
up, an error, a server that ends) aborts all of them, for a view without its partners would wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

from ..errors import LvlmDecodeError
from ..method import Method
from .conversations import prompt_of
from .engines import Job, Part
from .refusals import Refused


class Groups:
    """Answers jobs on an asynchronous engine of vLLM.

    Args:
        engine: an ``AsyncLLM`` made with :func:`lvlm_decode.vllm.engine_args`.
        views: makes the requests of a sample, see :class:`lvlm_decode.vllm.Views`.
        params: vLLM's ``SamplingParams``.
        settings: see :class:`.engines.Engine`.
        most_views: the most requests that the engine runs at once.
        max_model_len: of the engine.
        queue: the most requests that may be in the engine at a time; further ones are refused.
    """

    kind = "vllm"

    def __init__(
        self,
        engine: Any,
        views: Any,
        params: Callable[..., Any],
        settings: Mapping[str, Any],
        most_views: int,
        max_model_len: int,
        queue: int = 64,
    ):
        self._engine, self._views, self._params, self.settings = engine, views, params, settings
        self._most_views, self._length, self._queue = most_views, max_model_len, queue
        self.tokenizer = getattr(views.processor, "tokenizer", views.processor)
        self._running = 0
        self._closing = False

    @property
    def broken(self) -> str | None:
        return "vLLM has ended with an error; the server must be started again." if self._engine.errored else None

    def check(self, method: Method) -> None:
        from ..vllm.served import check_served

        check_served(method)

    def load(self) -> tuple[int, int]:
        return 0, self._running

    async def answer(self, job: Job) -> AsyncIterator[Part]:
        if self.broken or self._closing:
            raise Refused(503, self.broken or "the server is ending; ask another one.")
        if self._running >= self._queue:
            raise Refused(429, f"{self._queue} requests are being answered already; come again later.")
        self._running += 1
        try:
            group = await asyncio.to_thread(self._group, job)
            async with contextlib.aclosing(self._parts(group)) as parts:
                async for part in parts:
                    yield part
        finally:
            self._running -= 1

    async def _parts(self, group: Any) -> AsyncGenerator[Part, None]:
        engine = self._engine
        streams = [engine.generate(*one) for one in zip(group.prompts, group.params, group.ids)]
        # A group enters the scheduler whole, so all of its requests must be sent before one is waited for.
        others = [asyncio.ensure_future(_read(stream)) for stream in streams[1:]]
        sent = 0
        try:
            async for output in streams[0]:
                own = output.outputs[0]
                tokens = tuple(own.token_ids[sent:])
                sent = len(own.token_ids)
                finish = None if own.finish_reason is None else "length" if own.finish_reason == "length" else "stop"
                if own.finish_reason == "abort":
                    raise Refused(503, "the request was given up by the engine; ask again.")
                yield Part(tokens, group.lengths[0], finish)  # type: ignore[arg-type]
        except Refused:
            raise
        except Exception as error:
            raise Refused(503, f"vLLM could not answer ({type(error).__name__}); ask again.") from error
        finally:
            for task in others:
                task.cancel()
            # Shielded: a client that hangs up cancels this very task.
            await asyncio.shield(engine.abort(list(group.ids)))
            await asyncio.gather(*others, return_exceptions=True)
            await streams[0].aclose()

    def _group(self, job: Job) -> Any:
        """The requests of a job; in a thread, for it makes pixels."""
        sample: dict[str, Any] = {"prompt": prompt_of(self._views.processor, job)}
        if job.pictures:
            sample["multi_modal_data"] = {"image": list(job.pictures)}
        if job.sample_id is not None:
            sample["id"] = job.sample_id
        params = self._params(
            temperature=job.temperature,
            top_p=job.top_p,
            top_k=job.top_k,
            # Without draws, no seed is the seed of the views.
            seed=job.seed if job.samples or job.seed is not None else 0,
            max_tokens=job.max_tokens,
        )
        try:
            group = self._views.group(job.choice.method, sample, params, max_model_len=self._length)
        except LvlmDecodeError as error:
            raise Refused(400, str(error)) from error
        if len(group.ids) > self._most_views:
            raise Refused(
                400, f"{job.choice.spec} has {len(group.ids)} views; this server runs {self._most_views} at once."
            )
        return group

    async def close(self) -> None:
        self._closing = True
        self._engine.shutdown()


async def _read(stream: Any) -> None:
    async for _ in stream:
        pass


def started(model: str, queue: int, dtype: str | None) -> Groups:
    """vLLM's asynchronous engine of a checkpoint, ready to answer.

    Args:
        model: folder or hub id.
        queue: see :class:`Groups`.
        dtype: as vLLM takes it.

    Raises:
        DependencyError: vLLM is missing, or a release that is not known.
    """
    from ..vllm import Views, engine_args

    args = engine_args()
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from lvlm_decode_evals.runner import identity_of

    from ..vllm.installed import port

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, dtype=dtype or "auto", **args))
    facts, config = port().facts(engine), engine.vllm_config.model_config
    commit = getattr(config.hf_config, "_commit_hash", None)
    settings = identity_of(model, str(config.dtype).removeprefix("torch."), commit)
    return Groups(engine, Views(model), SamplingParams, settings, facts.max_num_seqs, facts.max_model_len, queue)
