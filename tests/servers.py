"""What the tests of serving share: servers on free ports, an engine that does as it is told, and requests."""

import asyncio
import base64
import contextlib
import socket
import threading

import uvicorn

import lvlm_decode_data
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.serving.app import Front, Rules
from lvlm_decode.serving.batches import Batches
from lvlm_decode.serving.engines import Part
from lvlm_decode.serving.menu import Menu


@contextlib.contextmanager
def running(app, grace=5):
    """(address, server) of an ASGI application on a free port of this machine."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=grace)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(30)


def front_of(loaded, methods=("vcd",), rules=None, **options):
    """The front of a transformers engine on a loaded model."""
    engine = Batches(loaded.model, loaded.processor, loaded.settings, **options)
    front = Front(engine, Menu("tiny-llava", methods, engine.check), rules)
    engine.noted = front.metrics.batch.observe
    return front


class Letters:
    """A tokenizer whose tokens are code points."""

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


class Fake:
    """An engine that says ``abc...`` letter by letter, each when :attr:`go` allows; it notes what was closed early."""

    kind, settings, broken = "fake", {"name": "fake"}, None

    def __init__(self, length=5, allowed=10**6):
        self.tokenizer, self.length = Letters(), length
        self.allowed, self.closed, self.ended, self.jobs = allowed, [], False, []

    def check(self, method):
        if method.name == "dola":
            raise UnsupportedError("dola cannot run here.")

    def load(self):
        return 0, 0

    async def answer(self, job):
        self.jobs.append(job)
        said = 0
        try:
            while True:
                while said >= self.allowed:
                    await asyncio.sleep(0.01)
                said += 1
                ends = said == min(self.length, job.max_tokens)
                yield Part((96 + said,), 7, "length" if ends else None)
                if ends:
                    return
        finally:
            if said < min(self.length, job.max_tokens):
                self.closed.append(said)

    async def close(self):
        self.ended = True


def fake_front(engine, **rules):
    return Front(engine, Menu("fake", (), engine.check), Rules(**rules))


def address_of(scene=12):
    """A scene as an address that holds the picture."""
    path = lvlm_decode_data.load_scenes()[scene].path
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


def asking(text="Please describe this image in detail.", scene=12):
    """The messages of a request about a scene."""
    picture = {"type": "image_url", "image_url": {"url": address_of(scene)}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]
