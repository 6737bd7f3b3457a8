"""A few single-threaded processes that train one model: start them, average their gradients, keep a log.

On a small shared machine two processes with one thread each and gloo are several times faster than one process with
two threads: every OpenMP barrier waits for a thread the scheduler has taken away.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank: int, function: Callable[..., None], world: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        function(rank, world, *arguments)
    finally:
        dist.destroy_process_group()


def launch(function: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Run ``function(rank, world, *arguments)`` in ``processes`` single-threaded processes joined by gloo."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_entry, args=(function, processes, port, arguments), nprocs=processes)


def same_start(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the parameters of process 0."""
    for parameter in parameters:
        dist.broadcast(parameter.data, 0)


def average_gradients(parameters: list[torch.nn.Parameter], world: int, max_norm: float = 1.0) -> float:
    """Average gradients over processes in one message, clip them to ``max_norm``; returns the norm before clipping."""
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    flat /= world
    norm = flat.norm().item()
    flat *= min(1.0, max_norm / (norm + 1e-6))
    start = 0
    for parameter in parameters:
        size = parameter.numel()
        parameter.grad = flat[start : start + size].view_as(parameter)
        start += size
    return norm


def cosine(step: int, steps: int, peak: float, warmup: int, floor: float = 0.03) -> float:
    """Learning rate at ``step`` of ``steps``: linear warm-up, then a cosine down to ``floor * peak``."""
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) * (1 - floor) + floor
    return peak * min(1.0, (step + 1) / warmup) * decay


def parameter_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def ddpm_noise(pixels: torch.Tensor, step: int) -> torch.Tensor:
    """Noise normalised pixels as after ``step`` of 1000 diffusion steps, the sigmoid schedule of VCD's code."""
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (5e-3 - 1e-5) + 1e-5
    kept = torch.cumprod(1 - betas, 0)[step]
    return kept.sqrt() * pixels + (1 - kept).sqrt() * torch.randn_like(pixels)


class Log:
    """JSON lines, one per report, appended by process 0; averages what was added since the last report."""

    def __init__(self, path: Path, rank: int, stage: str):
        self.path, self.rank, self.stage = path, rank, stage
        self.started = time.perf_counter()
        self.sums: dict[str, float] = {}
        self.numbers: dict[str, int] = {}

    def add(self, **values: float) -> None:
        for name, value in values.items():
            if not math.isnan(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.numbers[name] = self.numbers.get(name, 0) + 1

    def report(self, step: int, **values: Any) -> dict[str, Any]:
        record = {"stage": self.stage, "step": step, "seconds": round(time.perf_counter() - self.started, 1)}
        record |= {name: round(total / self.numbers[name], 4) for name, total in self.sums.items()}
        record |= values
        self.sums, self.numbers = {}, {}
        if self.rank == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return record


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
