"""The front: OpenAI's chat API, model list, health and metrics over an engine."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..engine.modes import check_modes
from ..errors import UnsupportedError
from .body import Body, read_body
from .engines import Engine, Job, Part
from .menu import Choice, Menu
from .pictures import Pictures
from .refusals import Refused
from .text import Text

#: Bytes of a request's body, and pictures in it.
MOST_BYTES, MOST_PICTURES = 32_000_000, 16


@dataclass(frozen=True)
class Rules:
    """What the operator decides.

    Args:
        key: what clients must send as ``Authorization: Bearer``; ``None`` lets everybody in.
        hosts: values of the Host header that are answered; ``None`` for all. On a loopback address this keeps web pages out
            that a browser on this machine shows.
        pictures: where pictures may come from.
        max_tokens: the most tokens of an answer, and how many a request gets that says nothing.
        timeout: seconds after which a request that is not answered is given up.
    """

    key: str | None = None
    hosts: tuple[str, ...] | None = None
    pictures: Pictures = field(default_factory=Pictures)
    max_tokens: int = 512
    timeout: float = 300.0


@dataclass(frozen=True)
class Asked:
    """A request that was read, before its pictures are opened."""

    body: Body
    choice: Choice
    temperature: float
    max_tokens: int
    deadline: float


class Front:
    """Answers HTTP requests by jobs of an engine.

    Args:
        engine: answers them.
        menu: the methods there are.
        rules: of the operator.
    """

    def __init__(self, engine: Engine, menu: Menu, rules: Rules | None = None):
        self.engine, self.menu, self.rules = engine, menu, rules or Rules()
        self.metrics = Metrics(engine)
        self._created = int(time.time())
        self._names = menu.methods()

    def app(self) -> Starlette:
        """The ASGI application; its end is the engine's."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            await self.engine.close()

        hosts = self.rules.hosts
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._guarded(self.completions), methods=["POST"]),
                Route("/v1/models", self._guarded(self.models), methods=["GET"]),
                Route("/metrics", self._guarded(self.measures), methods=["GET"]),
                Route("/health", self.health, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _no_such},
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))] if hosts else [],
            lifespan=lifespan,
        )

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """``endpoint`` for those who have the key; what is refused is told in OpenAI's shape."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await endpoint(request)
            except Refused as refused:
                self.metrics.refused.labels(str(refused.status)).inc()
                return JSONResponse(refused.body(), refused.status, refused.headers)
            except ClientDisconnect:
                self.metrics.hung_up.inc()
                return Response(status_code=499)

        return guarded

    def _check_key(self, request: Request) -> None:
        if self.rules.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.rules.key.encode()):
            raise Refused(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY.", None, "invalid_api_key"
            )

    async def health(self, request: Request) -> Response:
        """200 while requests are answered, 503 once the engine is broken."""
        broken = self.engine.broken
        return JSONResponse({"status": "broken" if broken else "ok"}, 503 if broken else 200)

    async def measures(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The model under its name, and under a name for each method; beside OpenAI's fields what an evaluation records."""
        known = {"object": "model", "created": self._created, "owned_by": "lvlm-decode"}
        own = {"version": version("lvlm-decode"), "engine": self.engine.kind, "model": dict(self.engine.settings)}
        served, default = self.menu.served, self.menu.default
        listed = [(served, default.spec), *((f"{served}:{name}", self._spec(name)) for name in self._names)]
        data = [{"id": name, **known, "lvlm_decode": {**own, "method": spec}} for name, spec in listed]
        return JSONResponse({"object": "list", "data": data})

    def _spec(self, name: str) -> str:
        return self.menu.own[name].spec if name in self.menu.own else name

    # Chat completions --------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """A chat completion, whole or as events; a client that hangs up frees its place."""
        start = time.monotonic()
        deadline = asyncio.get_running_loop().time() + self.rules.timeout
        asked = self._read(await _body_of(request), deadline)
        answer = _Answer(self, asked, start)
        try:
            # Until the first token nothing was sent, so that what goes wrong by then has a status.
            await _while_there(answer.begin(), request.receive)
            if asked.body.stream:
                return _Events(answer)
            return JSONResponse(await _while_there(answer.whole(), request.receive))
        except BaseException:
            await answer.close()
            raise

    def _read(self, raw: bytes, deadline: float) -> Asked:
        body = read_body(raw)
        choice = self.menu.choose(body.model, body.method, body.parameters)
        if body.stream_options is not None and not body.stream:
            raise Refused(400, "stream_options is for streamed answers; send stream too.", "stream_options")
        length, most = body.length, self.rules.max_tokens
        if length is not None and length > most:
            raise Refused(400, f"max_tokens is {length}; this server gives at most {most}.", "max_tokens")
        refused = {mode for part in choice.method.parts() for mode in part.refuses}
        temperature = body.temperature
        if temperature is None:
            temperature = 0.0 if "sample" in refused else 1.0
        if not temperature and (body.top_p not in (None, 1.0) or body.top_k):
            field = "top_k" if body.top_k else "top_p"
            raise Refused(400, f"{field} chooses what is drawn from, and at temperature 0 nothing is drawn.", field)
        try:
            check_modes(choice.method, ["sample" if temperature else "greedy"])
        except UnsupportedError as error:
            raise Refused(
                400, f"{error} In a request, temperature 0 is what does not sample.", "temperature"
            ) from error
        return Asked(body, choice, temperature, length or most, deadline)

    def job_of(self, asked: Asked) -> Job:
        """The job of a request; opens its pictures, so it may take long."""
        body, turns, addresses = asked.body, [], []
        for turn in body.messages:
            content = []
            for part in [turn.content] if isinstance(turn.content, str) else turn.content:
                if isinstance(part, str):
                    content.append({"type": "text", "text": part})
                elif part.type == "text":
                    content.append({"type": "text", "text": part.text})
                else:
                    content.append({"type": "image"})
                    addresses.append(part.image_url.url)
            turns.append({"role": turn.role, "content": content})
        if len(addresses) > MOST_PICTURES:
            raise Refused(400, f"the request has {len(addresses)} pictures; at most {MOST_PICTURES}.", "messages")
        return Job(
            turns,
            [self.rules.pictures.open(address) for address in addresses],
            asked.choice,
            asked.temperature,
            1.0 if body.top_p is None else body.top_p,
            body.top_k or 0,
            body.seed,
            body.sample_id,
            asked.max_tokens,
        )


class _Answer:
    """One answer on its way: the engine's parts as text."""

    def __init__(self, front: Front, asked: Asked, start: float):
        self._front, self.asked, self._start = front, asked, start
        self._text = Text(front.engine.tokenizer, asked.body.stops)
        self._parts: AsyncIterator[Part] | None = None
        self._first: Part | None = None
        self._prompt_tokens = 0
        self._finish: str | None = None
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.body.model,
            "system_fingerprint": f"lvlm-decode-{version('lvlm-decode')}",
        }

    async def begin(self) -> None:
        """Open the pictures, enter the queue, wait for the first tokens."""
        async with _in_time(self.asked.deadline):
            job = await asyncio.to_thread(self._front.job_of, self.asked)
            self._parts = self._front.engine.answer(job)
            self._first = await anext(self._parts)
        self._front.metrics.first.observe(time.monotonic() - self._start)

    async def texts(self) -> AsyncIterator[str]:
        """The text, piece by piece."""
        assert self._parts is not None and self._first is not None
        part: Part = self._first
        while True:
            self._prompt_tokens = part.prompt_tokens
            piece = self._text.add(part.tokens, last=part.finish is not None)
            self._finish = "stop" if self._text.stopped else part.finish
            if piece:
                yield piece
            if self._finish is not None:
                break
            async with _in_time(self.asked.deadline):
                part = await anext(self._parts)
        await self.close()
        self._front.metrics.answered(self.asked.choice.method, len(self._text.tokens), time.monotonic() - self._start)

    async def close(self) -> None:
        """Free the place in the engine."""
        if self._parts is not None:
            await self._parts.aclose()  # type: ignore[attr-defined]

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        content = "".join([piece async for piece in self.texts()])
        choice = {"index": 0, "message": {"role": "assistant", "content": content, "refusal": None}, "logprobs": None}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [{**choice, "finish_reason": self._finish}],
            "usage": self._usage(),
        }

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as chunks."""
        options = self.asked.body.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}

        def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}

        yield chunk({"role": "assistant", "content": ""})
        async for piece in self.texts():
            yield chunk({"content": piece})
        yield chunk({}, self._finish)
        if usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        prompt, own = self._prompt_tokens, len(self._text.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": own, "total_tokens": prompt + own}


class _Events(Response):
    """An answer as server-sent events; ends with the client."""

    media_type = "text/event-stream"

    def __init__(self, answer: _Answer):
        super().__init__(None, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Its length is not known.
        del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics = self._answer._front.metrics
        try:
            await _while_there(self._sent(send), receive)
        except (ClientDisconnect, OSError):
            metrics.hung_up.inc()
        finally:
            await self._answer.close()

    async def _sent(self, send: Send) -> None:
        async def event(data: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._answer.events():
                await event(json.dumps(chunk, ensure_ascii=False))
        except Refused as refused:
            self._answer._front.metrics.refused.labels(str(refused.status)).inc()
            await event(json.dumps(refused.body(), ensure_ascii=False), False)
        else:
            await event("[DONE]", False)


class Metrics:
    """What ``/metrics`` says."""

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()
        self._answers = Counter("lvlm_decode_answers", "Answers given whole.", ["method"], registry=registry)
        self._tokens = Counter("lvlm_decode_tokens", "Tokens of answers given whole.", ["method"], registry=registry)
        self._seconds = Histogram("lvlm_decode_answer_seconds", "From a request to its end.", registry=registry)
        self.first = Histogram(
            "lvlm_decode_first_token_seconds", "From a request to its first token.", registry=registry
        )
        self.refused = Counter("lvlm_decode_refused", "Requests that were not answered.", ["status"], registry=registry)
        self.hung_up = Counter("lvlm_decode_hung_up", "Clients that left before their answer.", registry=registry)
        self.batch = Histogram(
            "lvlm_decode_batch_size", "Requests in a batch.", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        waiting = Gauge("lvlm_decode_waiting", "Requests in the queue.", registry=registry)
        running = Gauge("lvlm_decode_running", "Requests that are being answered.", registry=registry)
        waiting.set_function(lambda: engine.load()[0])
        running.set_function(lambda: engine.load()[1])

    def answered(self, method: Any, tokens: int, seconds: float) -> None:
        # Clients can write any sum, and every label is kept.
        label = method.name if len(method.parts()) == 1 else "sum"
        self._answers.labels(label).inc()
        self._tokens.labels(label).inc(tokens)
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


async def _body_of(request: Request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Also what keeps forms of web pages out, which may send any other type anywhere.
        raise Refused(415, "the body must be JSON; send Content-Type: application/json.")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BYTES:
            raise Refused(413, f"the request is larger than {MOST_BYTES // 1_000_000} megabytes.")
    return bytes(body)


async def _while_there(work: Any, receive: Receive) -> Any:
    """The result of a coroutine, cancelled when the client hangs up.

    Raises:
        ClientDisconnect: it did.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def _in_time(deadline: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        raise Refused(504, "the answer took longer than this server waits; ask for fewer tokens.") from error


async def _no_such(request: Request, error: Exception) -> Response:
    """Addresses and ways to ask that do not exist."""
    status = getattr(error, "status_code", 404)
    known = "POST /v1/chat/completions, GET /v1/models, GET /health, GET /metrics"
    refused = Refused(status, f"{request.method} {request.url.path} is not served; there are: {known}.")
    return JSONResponse(refused.body(), status, getattr(error, "headers", None))
