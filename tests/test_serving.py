"""``lvlm-decode serve``: answers are the library's, every field is honoured or refused, nobody harms anybody else."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import httpx2
import openai
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from servers import Fake, Letters, address_of, asking, fake_front, front_of, running

import lvlm_decode
import lvlm_decode_data
from lvlm_decode.errors import InputError, UnsupportedError
from lvlm_decode.methods import parse
from lvlm_decode.serving import batches
from lvlm_decode.serving.batches import Batches
from lvlm_decode.serving.body import NEUTRAL, Body, read_body
from lvlm_decode.serving.engines import Job
from lvlm_decode.serving.groups import Groups
from lvlm_decode.serving.menu import Choice, Menu
from lvlm_decode.serving.pictures import Pictures
from lvlm_decode.serving.refusals import Refused
from lvlm_decode.serving.text import Text
from lvlm_decode_evals.pictures import open_picture

# One worker starts the server.
pytestmark = pytest.mark.xdist_group("serving")


@pytest.fixture(scope="session")
def url(loaded):
    """The address of a server of the small LLaVA, whose default method is vcd."""
    with running(front_of(loaded).app()) as (address, _):
        yield address


@pytest.fixture(scope="session")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client, **request):
    return client.chat.completions.create(**{"model": "tiny-llava", "messages": asking(), "max_tokens": 24, **request})


def answered(loaded, method, scene=12, text="Please describe this image in detail.", **how):
    """What the library itself answers."""
    inputs = loaded.processor(
        images=[open_picture(lvlm_decode_data.load_scenes()[scene].path)],
        text=[f"USER: <image>\n{text} ASSISTANT:"],
        return_tensors="pt",
    )
    how = {"do_sample": False, "max_new_tokens": 24, **how}
    with lvlm_decode.attached(loaded.model, method, processor=loaded.processor), torch.inference_mode():
        row = loaded.model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :]
    return loaded.processor.tokenizer.decode(row, skip_special_tokens=True).removeprefix(" ")


# --- answers


@pytest.mark.parametrize(
    ("request_", "method", "how"),
    [
        ({"temperature": 0}, "vcd", {}),
        ({"temperature": 0, "model": "tiny-llava:plain"}, "plain", {}),
        ({"temperature": 0, "extra_body": {"method": "vcd", "alpha": 0.5}}, "vcd(alpha=0.5)", {}),
        ({"temperature": 0, "model": "tiny-llava:vcd(alpha=3.0)+icd"}, "vcd(alpha=3.0)+icd", {}),
        ({"temperature": 0, "seed": 5}, "vcd", {"seed": 5}),
        ({"seed": 5, "temperature": 1.5}, "vcd", {"do_sample": True, "seed": 5, "temperature": 1.5, "top_k": 0}),
        (
            {"seed": 5, "temperature": 0.7, "top_p": 0.8, "extra_body": {"top_k": 9, "method": "m3id"}},
            "m3id",
            {"do_sample": True, "seed": 5, "temperature": 0.7, "top_p": 0.8, "top_k": 9},
        ),
        (
            {"seed": 5, "extra_body": {"sample_id": "q7"}},
            "vcd",
            {"do_sample": True, "seed": 5, "top_k": 0, "sample_ids": ["q7"]},
        ),
        # Left out, the temperature of a method that does not sample is 0.
        ({"extra_body": {"method": "opera(num_beams=2)"}}, "opera(num_beams=2)", {}),
    ],
)  # fmt: skip
def test_an_answer_is_the_library_s(client, loaded, request_, method, how):
    whole = ask(client, **request_).choices[0]
    assert whole.message.content == answered(loaded, method, **how)
    pieces = list(ask(client, stream=True, stream_options={"include_usage": True}, **request_))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.message.content
    assert pieces[-2].choices[0].finish_reason == whole.finish_reason
    assert pieces[-1].usage.completion_tokens > 3 and pieces[-1].usage.prompt_tokens > 64


def test_settings_change_answers(client):
    """What the comparison above rests on."""
    vcd, drawn = {"temperature": 0}, {"temperature": 1.5, "seed": 5}
    for one, other in (
        (vcd, {**vcd, "model": "tiny-llava:plain"}),
        (vcd, {**vcd, "extra_body": {"alpha": 0.5}}),
        (drawn, {**drawn, "seed": 6}),
        (drawn, {**drawn, "extra_body": {"sample_id": "q7"}}),
    ):
        first, second = (ask(client, **how).choices[0].message.content for how in (one, other))
        assert first != second, other


def test_answers_in_a_batch_are_those_alone(loaded, client, url):
    """Twelve requests at once, of several scenes, lengths and decodings, against each alone."""
    wanted = [
        {"messages": asking(scene=scene), "temperature": temperature, "seed": 3, "max_tokens": 6 + scene}
        for scene in range(6)
        for temperature in (0, 1)
    ]
    before = httpx2.get(f"{url}/metrics", trust_env=False).text
    alone = [ask(client, **one).choices[0].message.content for one in wanted]

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as many:
            return await asyncio.gather(*(ask(many, **one) for one in wanted))

    found = [answer.choices[0].message.content for answer in asyncio.run(together())]
    assert found == alone and len(set(found)) > 8
    after = httpx2.get(f"{url}/metrics", trust_env=False).text

    def batches_of(text):
        return float(text.partition("\nlvlm_decode_batch_size_count ")[2].split()[0])

    assert len(wanted) < batches_of(after) - batches_of(before) < 2 * len(wanted), "requests at once shared batches"


def test_stop_and_length(client):
    whole = ask(client, temperature=0, max_tokens=48)
    text, tokens = whole.choices[0].message.content, whole.usage.completion_tokens
    assert whole.choices[0].finish_reason == "stop"
    stopped = ask(client, temperature=0, max_tokens=48, stop=["zebra", " in a"])
    assert stopped.choices[0].message.content == text.partition(" in a")[0] != text
    assert stopped.choices[0].finish_reason == "stop" and stopped.usage.completion_tokens < tokens
    short = ask(client, temperature=0, max_tokens=None, max_completion_tokens=tokens - 1)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == tokens - 1


def test_without_a_seed_draws_are_new(client):
    assert len({ask(client, temperature=1.5).choices[0].message.content for _ in range(4)}) > 1


def test_a_conversation_without_a_picture(client):
    talk = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "hi"}]},
        {"role": "user", "content": "and"},
    ]
    first = ask(client, messages=talk, temperature=0)
    assert first.usage.prompt_tokens > ask(client, messages=talk[-1:], temperature=0).usage.prompt_tokens


# --- refusals


BAD_PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("change", "status", "field", "words"),
    [
        ({"model": "tiny-lava"}, 404, "model", "the nearest is 'tiny-llava'"),
        ({"model": "tiny-llava:vdc"}, 400, "model", "the nearest is 'vcd'"),
        ({"method": "vdc"}, 400, "method", "the nearest is 'vcd'"),
        ({"model": "tiny-llava:vcd", "method": "icd"}, 400, "method", "name one"),
        ({"alpa": 1}, 400, "alpa", "the nearest is 'alpha'"),
        ({"temprature": 1}, 400, "temprature", "the nearest is 'temperature'"),
        ({"alpha": -1}, 400, "alpha", "at least 0"),
        ({"method": "vcd(alpha=0.5)", "beta": 0.2}, 400, "beta", "given twice"),
        ({"method": "vcd(alpha=)"}, 400, "method", ""),
        ({"method": "vti(vectors=x.safetensors)"}, 400, "vectors", "only the server's own"),
        ({"method": "lol(amateur=x.safetensors)"}, 400, "amateur", "only the server's own"),
        ({"method": "lol", "amateur": "x.safetensors"}, 400, "amateur", "only the server's own"),
        ({"method": "cicd(images=/etc)"}, 400, "images", "only the server's own"),
        ({"method": "vti", "vectors": "x.safetensors"}, 400, "vectors", "only the server's own"),
        ({"method": "opera(num_beams=400)"}, 400, "num_beams", "at most 16"),
        ({"method": "vcd+icd+m3id+cad+vdd"}, 400, "method", "at most 4"),
        ({"method": "damro+scmoe"}, 400, "method", "experts"),
        ({"method": "opera", "temperature": 1}, 400, "temperature", "temperature 0"),
        ({"temperature": 0, "top_p": 0.5}, 400, "top_p", "nothing is drawn"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, 400, "temperature", "valid number"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**6}, 400, "max_tokens", "at most 512"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", "give one"),
        ({"seed": True}, 400, "seed", "valid integer"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "send stream"),
        ({"n": 2}, 400, "n", "one answer"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": None}, 400, "messages", "missing"),
        ({"messages": [{"role": "usr", "content": "x"}]}, 400, "messages.0.role", "the nearest is 'user'"),
        ({"messages": [{"role": "user", "content": "a <image>"}]}, 400, "messages", "<image>"),
        ({"messages": [{"role": "user", "content": [BAD_PICTURE]}]}, 400, "messages", "cannot be read"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]}]}, 400,
         "messages", "not fetched"),
        ({"messages": [{"role": "user", "content": "a " * 2100}]}, 400, "max_tokens", "together the model takes 2048"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused(url, change, status, field, words):
    body = {"model": "tiny-llava", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **change}
    got = httpx2.post(f"{url}/v1/chat/completions", json=body, trust_env=False)
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (status, field), error
    assert words in error["message"] and error["message"].endswith(".")


def test_every_field_of_the_api_means_something_or_asks_for_nothing():
    """All fields that OpenAI's own client knows for a request."""
    from openai.types.chat import completion_create_params as params

    known = {name for base in (params.CompletionCreateParamsBase,) for name in base.__annotations__} | {"stream"}
    ours = set(Body.model_fields) | set(NEUTRAL)
    # Of hosted services alone; here they are unknown fields, and refused as such.
    hosted = {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "safety_identifier", "moderation"}
    assert known - ours <= hosted, known - ours - hosted
    said = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    for name, (allowed, _) in NEUTRAL.items():
        for value in allowed:
            read_body(json.dumps({**said, name: value}).encode())
        with pytest.raises(Refused) as refused:
            read_body(json.dumps({**said, name: {"another": "value"}}).encode())
        assert refused.value.field == name


@pytest.mark.parametrize("raw", [b"", b"[1]", b"{", b'{"temperature": NaN}', b"[" * 100_000, b"\xff"])
def test_a_body_that_is_no_request(url, raw):
    got = httpx2.post(
        f"{url}/v1/chat/completions", content=raw, headers={"content-type": "application/json"}, trust_env=False
    )
    assert got.status_code == 400 and got.json()["error"]["type"] == "invalid_request_error"


def test_other_addresses_types_and_hosts(url):
    with httpx2.Client(base_url=url, trust_env=False) as client:
        assert client.get("/v1/completions").status_code == 404
        assert client.get("/v1/chat/completions").status_code == 405
        assert "POST /v1/chat/completions" in client.get("/v1/completions").json()["error"]["message"]
        form = client.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
        assert form.status_code == 415
    with running(fake_front(Fake(), hosts=("127.0.0.1",)).app()) as (other, _):
        assert httpx2.get(f"{other}/health", trust_env=False).status_code == 200
        # What a web page sends whose name was made to stand for this machine.
        assert httpx2.get(f"{other}/health", headers={"host": "evil.org"}, trust_env=False).status_code == 400


def test_key():
    with running(fake_front(Fake(), key="secret").app()) as (url, _):
        with httpx2.Client(base_url=url, trust_env=False) as client:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
                for way in ("/v1/models", "/metrics"):
                    got = client.get(way, headers=headers)
                    assert got.status_code == 401 and got.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
            assert client.get("/health").status_code == 200


def test_models_health_and_metrics(url, client):
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert {"tiny-llava", "tiny-llava:vcd", "tiny-llava:opera"} <= listed.keys()
    # Of those, one needs experts and the other a file.
    assert not {"tiny-llava:scmoe", "tiny-llava:vti"} & listed.keys()
    own = listed["tiny-llava"]["lvlm_decode"]
    assert own["method"] == "vcd" and own["model"]["dtype"] == "float32" and own["engine"] == "transformers"
    assert httpx2.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}
    ask(client, temperature=0)
    text = httpx2.get(f"{url}/metrics", trust_env=False).text
    for name in (
        'answers_total{method="vcd"}',
        'tokens_total{method="vcd"}',
        "first_token_seconds_count",
        "waiting 0.0",
    ):
        assert f"lvlm_decode_{name}" in text, name


def test_operator_s_method_under_its_bare_name(loaded):
    menu = Menu("m:1", ["vcd(alpha=0.5)", "icd"], lambda method: None)
    assert menu.choose("m:1", None, {}).method == menu.choose("m:1:vcd", None, {}).method == parse("vcd(alpha=0.5)")
    assert menu.choose("m:1", "vcd(alpha=2)", {}).method == parse("vcd(alpha=2)")
    assert menu.choose("m:1", "icd", {"alpha": 2.0}).method == parse("icd(alpha=2.0)")
    with pytest.raises(InputError):
        Menu("m", ["vcd"], lambda method: (_ for _ in ()).throw(InputError("no")))


# --- one client and the others


def job(method="plain", text="hello", scene=None, **how):
    content = [{"type": "text", "text": text}]
    pictures = [] if scene is None else [open_picture(lvlm_decode_data.load_scenes()[scene].path)]
    turns = [{"role": "user", "content": [{"type": "image"}] * len(pictures) + content}]
    return Job(turns, pictures, Choice(parse(method), method), **{"temperature": 0.0, "max_tokens": 12, **how})


async def said(engine, asked):
    tokens = []
    async with contextlib.aclosing(engine.answer(asked)) as parts:
        async for part in parts:
            tokens += part.tokens
    return tokens


@pytest.fixture
def engine(loaded):
    made = Batches(loaded.model, loaded.processor, loaded.settings, batch_size=8, queue=3)
    yield made
    asyncio.run(made.close())


def test_an_error_of_one_request_costs_the_others_nothing(engine, monkeypatch):
    """In the middle of a batch, in the processor, and from the model: the others get what they would get alone."""
    engine._queue = 8
    generate, hurt = engine._generate, []

    def failing(batch):
        if any(place.job.sample_id == "bad" for place in batch):
            hurt.append(len(batch))
            follow = batches._Follow
            if len(batch) > 1:
                # After three tokens, some of which were handed on.
                monkeypatch.setattr(batches, "_Follow", lambda *a: _Breaking(follow(*a), 3))
                try:
                    return generate(batch)
                finally:
                    monkeypatch.setattr(batches, "_Follow", follow)
            raise RuntimeError("boom")
        return generate(batch)

    how = {"text": "Please describe this image in detail.", "sample_id": "good"}
    good = [job(scene=scene, **how) for scene in (12, 3)]
    bad, wrong = job(scene=12, **{**how, "sample_id": "bad"}), job(scene=12, **{**how, "text": "a <image>"})

    async def run():
        alone = [await said(engine, one) for one in good]
        monkeypatch.setattr(engine, "_generate", failing)
        rounds = [[good[0], other, good[1]] for other in (bad, wrong)]
        found = [
            await asyncio.gather(*(said(engine, one) for one in asked), return_exceptions=True) for asked in rounds
        ]
        return alone, found

    alone, found = asyncio.run(run())
    assert all([first, second] == alone for first, _, second in found) and alone[0] != alone[1]
    assert [error.status for _, error, _ in found] == [500, 400]
    assert "boom" not in found[0][1].message and hurt == [3, 1]


class _Breaking:
    def __init__(self, inner, steps):
        self.inner, self.left = inner, steps

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("boom")
        return self.inner(*args, **kwargs)


def test_a_full_queue_a_client_that_leaves_it_and_the_end(engine, monkeypatch):
    held, decode = threading.Event(), engine._decode
    monkeypatch.setattr(engine, "_decode", lambda batch: (held.wait(20), decode(batch)))

    async def run():
        first = asyncio.ensure_future(said(engine, job(text="first")))
        while engine.load() != (0, 1):
            await asyncio.sleep(0.01)
        waiting = [asyncio.ensure_future(said(engine, job(text=f"{i}"))) for i in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Refused) as full:
            await said(engine, job())
        assert full.value.status == 429 and full.value.headers["Retry-After"]
        waiting[1].cancel()
        await asyncio.gather(waiting[1], return_exceptions=True)
        assert engine.load() == (2, 1), "who hangs up leaves the queue at once"
        another = asyncio.ensure_future(said(engine, job(text="another")))
        await asyncio.sleep(0.05)
        held.set()
        assert all(await asyncio.gather(first, waiting[0], waiting[2], another))
        assert engine.load() == (0, 0)
        await engine.close()
        with pytest.raises(Refused) as ended:
            await said(engine, job())
        assert ended.value.status == 503

    asyncio.run(run())


def test_the_row_of_a_client_that_hangs_up_ends():
    async def run():
        loop = asyncio.get_running_loop()
        places = [batches._Place(job(max_tokens=50), loop) for _ in range(2)]
        follow = batches._Follow(places, [2])
        assert follow(torch.tensor([[1, 5], [1, 6]]), None).tolist() == [False, False]
        places[0].gone = True
        assert follow(torch.tensor([[1, 5, 7], [1, 6, 8]]), None).tolist() == [True, False]
        assert follow(torch.tensor([[1, 5, 7, 0], [1, 6, 8, 2]]), None).tolist() == [True, True]
        assert batches._Gone(places)(torch.zeros(5, 3), None).tolist() == [False] * 5
        places[1].gone = True
        assert batches._Gone(places)(torch.zeros(5, 3), None).tolist() == [True] * 5
        await asyncio.sleep(0)
        return [[place.parts.get_nowait().tokens for _ in range(place.parts.qsize())] for place in places]

    assert asyncio.run(run()) == [[(5,)], [(6,), (8,), (2,)]]


def test_what_may_share_a_batch():
    loop = asyncio.new_event_loop()
    kind = lambda *a, **k: batches._Place(job(*a, **k), loop).kind  # noqa: E731
    assert kind(text="a", max_tokens=3) == kind(text="b", max_tokens=9)
    assert kind(seed=None) == kind(seed=0) and kind(seed=1) != kind(seed=0)
    assert kind(temperature=1.0, seed=None) != kind(temperature=1.0, seed=0) != kind(temperature=0.5, seed=0)
    assert kind("vcd") != kind("icd") and kind("vcd(alpha=1)") != kind("vcd(alpha=2)")
    assert kind("opera", max_tokens=3) != kind("opera", max_tokens=4)
    loop.close()


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_frees_the_place(stream):
    """Of a client that waits for its first token, for the next, or for a whole answer."""
    for allowed in (0, 3):
        engine = Fake(100, allowed)
        with running(fake_front(engine).app()) as (url, _):
            body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": stream}
            with httpx2.Client(base_url=url, timeout=0.5, trust_env=False) as client:
                with (
                    pytest.raises(httpx2.TimeoutException),
                    client.stream("POST", "/v1/chat/completions", json=body) as got,
                ):
                    list(got.iter_lines())
            deadline = time.monotonic() + 5
            while not engine.closed and time.monotonic() < deadline:
                time.sleep(0.02)
            assert engine.closed == [allowed]
            assert "hung_up_total 1.0" in httpx2.get(f"{url}/metrics", trust_env=False).text


def test_an_answer_that_takes_too_long():
    with running(fake_front(Fake(100, 0), timeout=0.2).app()) as (url, _):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIStatusError) as late:
                client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x"}])
            assert late.value.status_code == 504
    with running(fake_front(engine := Fake(100, 2), timeout=0.4).app()) as (url, _):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            request = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
            with pytest.raises(openai.APIError, match="longer than"):
                # What was said before it was given up is there; then the stream says why it ends.
                for chunk in client.chat.completions.create(stream=True, **request):
                    assert chunk.choices[0].delta.content in ("", "a", "b")
        assert engine.closed == [2]


def test_answers_in_progress_are_finished_when_the_server_ends():
    engine = Fake(30, 3)
    with running(fake_front(engine).app()) as (url, server):
        body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": True}
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=10, trust_env=False) as got:
            lines = got.iter_lines()
            next(lines)
            server.should_exit = True
            time.sleep(0.3)
            with pytest.raises(httpx2.ConnectError):
                httpx2.get(f"{url}/health", trust_env=False)
            engine.allowed = 100
            assert [line for line in lines if line][-1] == "data: [DONE]"
    assert engine.ended and not engine.closed


def test_a_lost_device_is_told(engine, monkeypatch):
    monkeypatch.setattr(engine, "_generate", lambda batch: (_ for _ in ()).throw(RuntimeError("CUDA error: gone")))

    async def run():
        with pytest.raises(Refused) as told:
            await said(engine, job())
        with pytest.raises(Refused) as later:
            await said(engine, job())
        return told.value.status, later.value.status

    assert asyncio.run(run()) == (503, 503) and "started again" in engine.broken


# --- text


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character may be unfinished."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode("utf-8", "replace")


@settings(deadline=None, max_examples=200)
@given(
    st.text("ab é🐈\n", max_size=24),
    st.lists(st.text("ab é", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(1, 4), min_size=1),
)
def test_pieces_add_up_to_the_text(text, stops, sizes):
    """Whatever the pieces are, nothing is taken back, and the text ends before the stop string that is complete first."""
    tokens, told, made = list(text.encode()), "", Text(Bytes(), stops)
    at = turn = 0
    while at < len(tokens) and not made.stopped:
        size = sizes[turn % len(sizes)]
        told += made.add(tokens[at : at + size], last=at + size >= len(tokens))
        at, turn = at + size, turn + 1
    # The blank before the first word is not part of the answer.
    text = text.removeprefix(" ")
    starts = (text[: n + 1] for n in range(len(text)))
    ended = next((start for start in starts if any(stop in start for stop in stops)), None)
    places = [] if ended is None else [place for stop in stops if (place := ended.find(stop)) >= 0]
    assert told == (text if ended is None else ended[: min(places)])
    assert made.stopped == (ended is not None)


def test_nothing_of_a_stop_string_is_sent():
    made = Text(Letters(), ["END"])
    assert [made.add([ord(c)]) for c in "xENxEND"] == ["x", "", "", "ENx", "", "", ""]
    assert made.stopped and made.sent == "xENx" and len(made.tokens) == 7


# --- pictures


def refused(pictures, address):
    with pytest.raises(Refused) as error:
        pictures.open(address)
    assert error.value.status == 400
    return error.value.message


def png(size, **how):
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, "PNG", **how)
    return stream.getvalue()


def test_pictures_in_the_request():
    assert Pictures().open(address_of()).size == open_picture(lvlm_decode_data.load_scenes()[12].path).size
    assert "base64" in refused(Pictures(), "data:image/png,abc")
    assert "no base64" in refused(Pictures(), "data:image/png;base64,@@@@")
    bomb = base64.b64encode(png((9000, 9000))).decode()
    assert "pixels" in refused(Pictures(), f"data:image/png;base64,{bomb}")
    assert "megabytes" in refused(Pictures(), "data:image/png;base64," + "A" * 27_000_000)
    # Decoders for rare formats are no door for strangers.
    tiff = io.BytesIO()
    Image.new("RGB", (4, 4)).save(tiff, "TIFF")
    assert "cannot be read" in refused(
        Pictures(), f"data:image/tiff;base64,{base64.b64encode(tiff.getvalue()).decode()}"
    )
    assert "begins with" in refused(Pictures(), "ftp://a/b.png")


def test_files_are_read_below_one_folder_only(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a b.png").write_bytes(png((4, 4)))
    (tmp_path / "out.png").write_bytes(png((4, 4)))
    os.symlink(tmp_path / "out.png", tmp_path / "in" / "link.png")
    here = Pictures(folder=tmp_path / "in")
    assert here.open("file:///a%20b.png").size == (4, 4)
    for name in ("/../out.png", "/%2e%2e/out.png", "/link.png", "/none.png", "/", f"{tmp_path}/out.png"):
        assert "no such file" in refused(here, f"file://{name}")
    assert "not read here" in refused(Pictures(), f"file://{tmp_path}/out.png")


@pytest.fixture
def web():
    """A web server of this machine: a picture, ways elsewhere, and things that never end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            where = {
                "/moved": "/a.png",
                "/circle": "/circle",
                "/file": "file:///etc/passwd",
                "/meta": "http://169.254.169.254/",
            }
            if self.path in where:
                self.send_response(302)
                self.send_header("Location", where[self.path])
                self.end_headers()
                return
            self.send_response(404 if self.path == "/none" else 200)
            self.end_headers()
            with contextlib.suppress(OSError):
                if self.path == "/slow":
                    for _ in range(100):
                        self.wfile.write(b"x")
                        time.sleep(0.05)
                elif self.path == "/large":
                    for _ in range(400):
                        self.wfile.write(b"x" * 100_000)
                else:
                    self.wfile.write(png((4, 4)))

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_pictures_from_the_network(web, monkeypatch):
    inside, public = Pictures(fetch=True, private=True), Pictures(fetch=True)
    assert inside.open(f"{web}/a.png").size == inside.open(f"{web}/moved").size == (4, 4)
    assert "404" in refused(inside, f"{web}/none")
    assert "sent us on" in refused(inside, f"{web}/circle")
    assert "none of http" in refused(inside, f"{web}/file")
    assert "megabytes" in refused(inside, f"{web}/large")
    start = time.monotonic()
    monkeypatch.setattr("lvlm_decode.serving.pictures.MOST_SECONDS", 0.4)
    refused(inside, f"{web}/slow")
    assert time.monotonic() - start < 3
    assert "not fetched" in refused(Pictures(), f"{web}/a.png")
    for host in ("127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "[::ffff:127.0.0.1]", "0.0.0.0"):
        assert "not public" in refused(public, f"http://{host}:{web.rpartition(':')[2]}/a.png"), host


def test_the_address_that_was_checked_is_the_one_that_is_asked(web, monkeypatch):
    """A name that stands for a public address when it is looked up first, and for this machine afterwards."""
    asked, real = [], socket.create_connection
    answers = iter([[(2, 1, 6, "", ("93.184.216.34", 80))]])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: next(answers))

    def connect(address, **how):
        asked.append(address)
        return real(("127.0.0.1", int(web.rpartition(":")[2])), **how)

    with monkeypatch.context() as patched:
        patched.setattr(socket, "create_connection", connect)
        with contextlib.suppress(Refused, StopIteration):
            Pictures(fetch=True).open("http://rebinding.example/a.png")
    assert asked == [("93.184.216.34", 80)]


# --- load


def load_module():
    sys.path.insert(0, str(ROOT / "benchmarks" / "serving"))
    try:
        import load
    finally:
        sys.path.pop(0)
    return load


@pytest.mark.full
def test_load(loaded, url):
    """The load test of benchmarks/serving, smaller: nothing is lost, and nobody gets another's answer."""
    load = load_module()
    expected = load.references(loaded, [case for case in load.cases(2) if case.method != "opera"])
    assert len({texts[-1] for texts in expected.values()}) > len(expected) // 3, "answers tell requests apart"
    counts = asyncio.run(load.load(url, expected, clients=6, requests=5))
    assert counts.wrong == [] and counts.lost == []
    assert counts.sent == 30 == counts.right + counts.refused + counts.hung_up and counts.right > 10


def test_load_notices_a_wrong_answer(url, loaded):
    load = load_module()
    expected = load.references(loaded, load.cases(1)[:2])
    wrong = {case: [f"#{text}" for text in texts] for case, texts in expected.items()}
    counts = asyncio.run(load.load(url, wrong, clients=2, requests=3))
    assert counts.wrong and not counts.right


# --- the command


def test_help_imports_no_server():
    names = ("starlette", "uvicorn", "prometheus_client", "torch")
    code = f"import lvlm_decode.cli, sys; print(sorted(set({names}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_the_command_refuses(tmp_path):
    from typer.testing import CliRunner

    from lvlm_decode.cli import app

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, words in (
            (["--host", "0.0.0.0"], "LVLM_DECODE_API_KEY"),
            (["--private-addresses"], "--fetch-images"),
            (["--image-folder", str(tmp_path / "none")], "is not a folder"),
            (["--port", str(port)], "--port"),
        ):
            done = CliRunner().invoke(app, ["serve", *options], env={"LVLM_DECODE_API_KEY": ""})
            assert done.exit_code == 1 and words in done.output, options


@pytest.mark.full
def test_the_command_serves_and_ends():
    load = load_module()
    command = [
        sys.executable,
        "-m",
        "lvlm_decode",
        "serve",
        "--port",
        "0",
        "--method",
        "icd",
        "--method",
        "vcd(alpha=3.0)",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "is served at " in line:
                break
        url = line.partition("is served at ")[2].partition("/v1;")[0]
        assert "get icd" in line
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            assert ask(client, temperature=0).choices[0].message.content
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert load.MODEL == "tiny-llava"


# --- vLLM's asynchronous engine, made up


class Lockstep:
    """As vLLM's asynchronous engine under the scheduler of groups: no request goes on before its whole group is there."""

    errored = False

    def __init__(self, length):
        self.length, self.there, self.aborted, self.fails = length, set(), [], False

    async def generate(self, prompt, params, request_id):
        name = request_id.rpartition("-")[0]
        self.there.add(request_id)
        while sum(one.startswith(name) for one in self.there) < prompt["of"]:
            await asyncio.sleep(0.005)
        for step in range(1, self.length + 1):
            await asyncio.sleep(0.005)
            if request_id in self.aborted:
                return
            if self.fails:
                raise RuntimeError("boom")
            ended = "stop" if step == self.length else None
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(range(97, 97 + step)), finish_reason=ended)])

    async def abort(self, ids):
        self.aborted += ids
        self.there -= set(ids)

    def shutdown(self):
        pass


class TwoViews:
    """Makes groups of two requests."""

    def __init__(self):
        self.processor, self.made = Letters(), 0

    def group(self, method, sample, params, max_model_len):
        if "long" in sample["prompt"]:
            raise InputError("the longest view does not fit.")
        self.made += 1
        name = f"g{self.made}"
        prompts = [{"of": 2}] * 2
        return SimpleNamespace(prompts=prompts, params=[params] * 2, ids=[f"{name}-0", f"{name}-1"], lengths=[5, 9])


def test_groups_are_sent_and_aborted_whole():
    async def run():
        engine = Lockstep(6)
        groups = Groups(engine, TwoViews(), dict, {}, 8, 256, queue=2)
        assert await said(groups, job("vcd")) == [97, 98, 99, 100, 101, 102]
        # Who hangs up in the middle takes all views along.
        parts = groups.answer(job("vcd"))
        assert (await anext(parts)).prompt_tokens == 5
        await parts.aclose()
        assert {"g2-0", "g2-1"} <= set(engine.aborted) and not engine.there and groups.load() == (0, 0)
        with pytest.raises(Refused) as long:
            await said(groups, job("vcd", text="long"))
        assert long.value.status == 400 and not engine.there
        held = [groups.answer(job("vcd")) for _ in range(2)]
        for one in held:
            await anext(one)
        with pytest.raises(Refused) as full:
            await said(groups, job("vcd"))
        assert full.value.status == 429
        engine.fails = True
        with pytest.raises(Refused) as failed:
            await anext(held[0])
        assert failed.value.status == 503 and "boom" not in failed.value.message
        await held[1].aclose()
        assert not engine.there and groups.load() == (0, 0)
        with pytest.raises(UnsupportedError, match="cannot be served"):
            groups.check(parse("opera"))

    asyncio.run(run())
