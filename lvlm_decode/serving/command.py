"""``lvlm-decode serve``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lvlm_decode_evals.commands import one_sentence

from ..errors import DependencyError, InputError

_KEY = "LVLM_DECODE_API_KEY"
_LOOPBACK = {
    "127.0.0.1": ("127.0.0.1", "localhost"),
    "localhost": ("127.0.0.1", "localhost"),
    "::1": ("::1", "localhost"),
}
#: Seconds that answers in progress get when the server is told to end.
GRACE = 30
#: Seconds that an idle connection stays open: longer than clients of OpenAI's keep one, who would otherwise send the next
#: request at the moment it is closed.
KEEP_ALIVE = 60


@one_sentence
def serve(
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder, or a hub id.")] = "tiny",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method of requests that name none, for example vcd; further ones are what clients get who say their bare "
            "name. Default: plain."
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="What runs the model: transformers or vllm.")] = "transformers",
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model in requests. Default: that of --model.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=_KEY, show_envvar=False, help=f"Key that clients must send; {_KEY} keeps it off the command line."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of requests in one batch at most.")] = 16,
    queue: Annotated[
        int, typer.Option(min=1, help="Number of requests that may wait; further ones get status 429.")
    ] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Number of tokens of one answer at most.")] = 512,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a request is given up.")] = 300.0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Device map of transformers, for example auto.")] = None,
    fetch_images: Annotated[
        bool, typer.Option("--fetch-images", help="Fetch pictures from http and https addresses.")
    ] = False,
    private_addresses: Annotated[
        bool, typer.Option("--private-addresses", help="Also fetch from this machine and its local network.")
    ] = False,
    image_folder: Annotated[
        Path | None, typer.Option(help="Folder whose pictures clients may name as file:///NAME.")
    ] = None,
) -> None:
    """Serve a model with all methods to clients of OpenAI's chat API; Ctrl-C lets answers finish and ends.

    A request names its method behind the model (tiny-llava:vcd) or as the field method.
    """
    if host not in _LOOPBACK and not api_key:
        raise InputError(
            f"--host {host} lets other machines in, and without a key everybody; set {_KEY}, or leave out --host."
        )
    if engine not in ("transformers", "vllm"):
        raise InputError(f"--engine is {engine!r}; it is transformers or vllm.")
    if engine == "vllm" and device_map is not None:
        raise InputError("--device-map spreads models of transformers; leave it out with --engine vllm.")
    if private_addresses and not fetch_images:
        raise InputError("--private-addresses is about pictures that are fetched; add --fetch-images.")
    if image_folder is not None and not image_folder.is_dir():
        raise InputError(f"--image-folder {image_folder} is not a folder.")
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise DependencyError(
            f"Serving needs {error.name}; install it with: pip install 'lvlm-decode[serve]'."
        ) from error
    from .pictures import Pictures

    pictures = Pictures(fetch_images, private_addresses, image_folder)
    from .app import Front, Rules

    rules = Rules(api_key, _LOOPBACK.get(host), pictures, max_tokens, timeout)
    listening = _listen(host, port)
    from lvlm_decode_evals.runner import checkpoint, load

    from .batches import Batches
    from .engines import Engine
    from .groups import started
    from .menu import Menu

    running: Engine
    if engine == "vllm":
        running = started(checkpoint(model), queue, dtype)
    else:
        loaded = load(model, dtype=dtype, device_map=device_map)
        running = Batches(loaded.model, loaded.processor, loaded.settings, batch_size, queue)
    front = Front(running, Menu(name or str(running.settings["name"]), method or (), running.check), rules)
    if isinstance(running, Batches):
        running.noted = front.metrics.batch.observe
    place = f"[{host}]" if ":" in host else host
    typer.echo(
        f"{front.menu.served} is served at http://{place}:{listening.getsockname()[1]}/v1; requests that name no method get "
        f"{front.menu.default.spec}.",
        err=True,
    )
    config = uvicorn.Config(
        front.app(),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=KEEP_ALIVE,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)


def _listen(host: str, port: int) -> Any:
    """A socket that listens; taken before the model is loaded, so that a port in use is told at once."""
    import socket

    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port} cannot be listened on ({os.strerror(error.errno or 0)}); give another --port."
        ) from error
