"""Many clients at once on ``lvlm-decode serve``: mixed methods, broken requests, clients that hang up; every answer is compared.

    python benchmarks/serving/load.py --clients 24 --requests 20 --output benchmarks/serving/load.json

Starts the server in a process of its own, and asks the library for the answer to every scene and method beforehand, one
sample at a time. Then each client sends its requests one after the other. Counted are answers that are right and wrong,
refusals as expected and others, and requests that got neither: a client waits at most two minutes. A client that is told
to come again (429) does so.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import openai

import lvlm_decode_data

MODEL = "tiny-llava"
PROMPTS = ("Please describe this image in detail.", "Is there a cat in the image?")
#: Method and decoding of the requests; a seed where tokens are drawn.
ARMS = (
    ("plain", {"temperature": 0}),
    ("vcd", {"temperature": 0}),
    ("vcd", {"temperature": 1, "seed": 7}),
    ("icd", {"temperature": 0}),
    ("m3id", {"temperature": 0}),
    ("pai", {"temperature": 0}),
    ("vcd+ritual", {"temperature": 0.7, "top_p": 0.9, "seed": 7}),
    ("opera", {"temperature": 0}),
)
#: Methods that vLLM cannot serve.
NOT_IN_VLLM = ("pai", "opera")
LENGTH = 48
_NO_PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
#: Broken requests: what is changed, the status, and the field that the answer names.
BROKEN: tuple[tuple[dict[str, Any], int, str | tuple[str, str]], ...] = (
    ({"model": f"{MODEL}:vdc"}, 400, "model"),
    ({"model": "another"}, 404, "model"),
    ({"alpa": 1.0}, 400, "alpa"),
    ({"model": MODEL, "method": "vcd", "alpha": -1}, 400, "alpha"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "what does <image> show?"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [_NO_PICTURE]}]}, 400, "messages"),
    # vLLM refuses the method itself.
    ({"model": f"{MODEL}:opera", "temperature": 1}, 400, ("temperature", "model")),
)
#: Seconds that a client waits for one answer.
PATIENCE = 120.0


@dataclass(frozen=True)
class Case:
    """A scene, a question and a way to decode."""

    scene: int
    prompt: str
    method: str
    decoding: tuple[tuple[str, Any], ...]

    def body(self, pictures: Sequence[str]) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": pictures[self.scene]}},
            {"type": "text", "text": self.prompt},
        ]
        return {
            "model": f"{MODEL}:{self.method}",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": LENGTH,
            **dict(self.decoding),
        }


@dataclass
class Counts:
    """What became of the requests."""

    sent: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    #: Neither an answer nor a refusal that was to be expected.
    lost: list[str] = field(default_factory=list)
    refused: int = 0
    hung_up: int = 0
    #: How often a client was told to come again.
    again: int = 0
    by_method: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0


def cases(scenes: int, served_by_vllm: bool = False) -> list[Case]:
    return [
        Case(scene, prompt, method, tuple(decoding.items()))
        for scene in range(scenes)
        for prompt in PROMPTS
        for method, decoding in ARMS
        if not (served_by_vllm and method in NOT_IN_VLLM)
    ]


def pictures(scenes: int) -> list[str]:
    """The scenes as addresses that hold the picture."""
    found = lvlm_decode_data.load_scenes()[:scenes]
    return [f"data:image/jpeg;base64,{base64.b64encode(scene.path.read_bytes()).decode()}" for scene in found]


def references(loaded: Any, wanted: Sequence[Case]) -> dict[Case, list[str]]:
    """What the library answers to every case by itself: the text after each number of tokens."""
    import torch

    import lvlm_decode
    from lvlm_decode_evals.pictures import open_picture

    scenes, out = lvlm_decode_data.load_scenes(), {}
    ends = loaded.model.generation_config.eos_token_id
    for case in wanted:
        inputs = loaded.processor(
            images=[open_picture(scenes[case.scene].path)],
            text=[f"USER: <image>\n{case.prompt} ASSISTANT:"],
            return_tensors="pt",
        )
        decoding = dict(case.decoding)
        drawn = decoding.pop("temperature") > 0
        if drawn:
            decoding |= {"temperature": dict(case.decoding)["temperature"], "top_k": 0}
            decoding.setdefault("top_p", 1.0)
        with lvlm_decode.attached(loaded.model, case.method, processor=loaded.processor), torch.inference_mode():
            row = loaded.model.generate(**inputs, do_sample=drawn, max_new_tokens=LENGTH, **decoding)[0]
        new = row[inputs["input_ids"].shape[1] :].tolist()
        new = new[: new.index(ends) + 1] if ends in new else new
        decode = loaded.processor.tokenizer.decode
        out[case] = [decode(new[: n + 1], skip_special_tokens=True).removeprefix(" ") for n in range(len(new))]
    return out


async def load(url: str, expected: dict[Case, list[str]], clients: int, requests: int, seed: int = 0) -> Counts:
    """Send the requests of all clients, and count.

    Args:
        url: of the server, without ``/v1``.
        expected: as :func:`references` gives it.
        requests: of each client.
        seed: of what they send.
    """
    counts, seen = Counts(), pictures(max(case.scene for case in expected) + 1)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, trust_env=False) as plain:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as chat:
            await asyncio.gather(
                *(
                    _client(random.Random(f"{seed} {i}"), requests, chat, plain, expected, seen, counts)
                    for i in range(clients)
                )
            )
        counts.lost += [f"left over: {line}" for line in await _left_over(plain)]
    return counts


async def _client(
    rng: random.Random,
    requests: int,
    chat: Any,
    plain: Any,
    expected: dict[Case, list[str]],
    seen: list[str],
    counts: Counts,
) -> None:
    for _ in range(requests):
        case = rng.choice(list(expected))
        kind = rng.choices(["whole", "streamed", "short", "stopped", "broken", "hung up"], [30, 30, 8, 8, 12, 12])[0]
        counts.sent += 1
        counts.by_method[case.method] += 1
        body, texts = case.body(seen), expected[case]
        wanted = texts[-1]
        # A search that has fewer tokens to give takes other ones, so that its shorter answer is no beginning of the longer.
        if kind == "short" and case.method != "opera":
            body["max_tokens"] = n = rng.randint(1, len(texts))
            wanted = texts[n - 1]
        elif kind == "stopped":
            body["stop"] = [" a "]
            wanted = wanted.partition(" a ")[0]
        try:
            async with asyncio.timeout(PATIENCE):
                if kind == "broken":
                    await _broken(rng, body, plain, counts)
                elif kind == "hung up":
                    await _hung_up(rng, body, plain, counts)
                else:
                    start = time.perf_counter()
                    found, tokens = await _asked(chat, body, kind == "streamed" or rng.random() < 0.5, counts)
                    counts.seconds.append(time.perf_counter() - start)
                    counts.tokens += tokens
                    if found == wanted:
                        counts.right += 1
                    else:
                        counts.wrong.append(f"{kind} {case}: {found!r} instead of {wanted!r}")
        except (openai.APIError, httpx2.HTTPError, TimeoutError) as error:
            counts.lost.append(f"{kind} {case}: {type(error).__name__} {error}")


async def _asked(chat: Any, body: dict[str, Any], stream: bool, counts: Counts) -> tuple[str, int]:
    while True:
        try:
            if not stream:
                answer = await chat.chat.completions.create(**body)
                return answer.choices[0].message.content, answer.usage.completion_tokens
            text, tokens = "", 0
            async for chunk in await chat.chat.completions.create(
                **body, stream=True, stream_options={"include_usage": True}
            ):
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            return text, tokens
        except openai.RateLimitError:
            counts.again += 1
            await asyncio.sleep(0.2)


async def _broken(rng: random.Random, body: dict[str, Any], plain: Any, counts: Counts) -> None:
    change, status, blamed = rng.choice(BROKEN)
    while True:
        answer = await plain.post("/v1/chat/completions", json={**body, **change})
        if answer.status_code != 429:
            break
        counts.again += 1
        await asyncio.sleep(0.2)
    error = answer.json()["error"]
    if answer.status_code == status and error["param"] in ((blamed,) if isinstance(blamed, str) else blamed):
        counts.refused += 1
    else:
        counts.lost.append(f"broken {change}: status {answer.status_code}, {error}")


async def _hung_up(rng: random.Random, body: dict[str, Any], plain: Any, counts: Counts) -> None:
    """Leave after a few events, or after a moment; told to come again, leave for good."""
    if rng.random() < 0.5:
        async with plain.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            left = rng.randint(1, 8)
            async for _ in answer.aiter_lines():
                left -= 1
                if not left:
                    break
    else:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.random() * 0.3):
                await plain.post("/v1/chat/completions", json=body)
    counts.hung_up += 1


async def _left_over(plain: Any) -> list[str]:
    """Requests that the server still holds when all clients are gone; it gets five seconds to notice."""
    for _ in range(50):
        text = (await plain.get("/metrics")).text
        held = [line for line in text.splitlines() if line.startswith(("lvlm_decode_waiting ", "lvlm_decode_running "))]
        if all(line.endswith(" 0.0") for line in held):
            return []
        await asyncio.sleep(0.1)
    return held


@contextlib.contextmanager
def served(*options: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "lvlm_decode", "serve", "--port", "0", *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            for line in process.stderr:
                said += line
                if "is served at " in line:
                    yield line.partition("is served at ")[2].partition("/v1;")[0]
                    return
            raise SystemExit(said[-2000:])
        finally:
            process.terminate()
            process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--url", help="a server that runs already, in place of one of this script")
    parser.add_argument("--vllm", action="store_true", help="that server runs vLLM: ask for what it can serve")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    import torch

    from lvlm_decode_evals.runner import load as load_model

    torch.set_num_threads(1)
    expected = references(load_model("tiny"), cases(options.scenes, options.vllm))
    own = served("--model", "tiny", "--queue", str(options.queue), "--batch-size", str(options.batch_size))
    with own if options.url is None else contextlib.nullcontext(options.url) as url:
        start = time.perf_counter()
        counts = asyncio.run(load(url, expected, options.clients, options.requests))
        seconds = time.perf_counter() - start
        metrics = httpx2.get(f"{url}/metrics", trust_env=False).text
        server = httpx2.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["lvlm_decode"]
    batches = {
        name: float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        for name in ("count", "sum")
        if line.startswith(f"lvlm_decode_batch_size_{name} ")
    }
    record = {
        "clients": options.clients,
        "requests": options.requests,
        "engine": server["engine"],
        "model": server["model"],
        "queue": options.queue,
        "batch_size": options.batch_size,
        "references": len(expected),
        "sent": counts.sent,
        "right": counts.right,
        "wrong": counts.wrong,
        "lost": counts.lost,
        "refused_as_expected": counts.refused,
        "hung_up": counts.hung_up,
        "told_to_come_again": counts.again,
        "by_method": dict(counts.by_method.most_common()),
        "batches": batches["count"],
        # vLLM makes batches of its own, of which the front knows nothing.
        "mean_batch": round(batches["sum"] / batches["count"], 2) if batches["count"] else None,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(counts.tokens / seconds, 1),
        "median_seconds": round(statistics.median(counts.seconds), 2),
        "slowest_seconds": round(max(counts.seconds), 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU, other work beside it",
        "versions": {
            name: version(name) for name in ("lvlm-decode", "torch", "transformers", "starlette", "uvicorn", "openai")
        },
    }
    text = json.dumps(record, indent=1) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text)
    if counts.wrong or counts.lost:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
