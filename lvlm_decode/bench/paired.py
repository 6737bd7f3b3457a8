"""Paired measurements: several ways of decoding in one process, on the same inputs, token ids compared.

Every sample runs through every arm, the order rotating from round to round, so that a slow moment of the machine hits all
arms alike. Ratios are taken within a round of a sample; their median is reported. Drafters that learn between calls are
warmed up on other samples, and every timed call starts from that state: no drafter ever measures an answer it has seen.

Decoding alone is what a call takes after its first token, which a stopping criterion sees come.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..attachment import attach, detach, last_run
from ..method import Method
from ..speculative.drafters import Drafter
from ..speculative.stats import Stats


@dataclass(frozen=True)
class Product:
    """A module that is run on states of a shape.

    Args:
        module: of the model.
        shape: of what it is given, (..., D).
    """

    module: torch.nn.Module
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Arm:
    """One way of decoding.

    Args:
        method: attached method; ``None`` is Hugging Face's own ``generate()`` on the bare model.
        drafter: with it the speculative loop runs.
        options: further arguments of ``generate()``.
        execution: of the views.
        copies: how often each row of a sample's inputs is decoded.
        products: run after every forward of the bare model, on drawn states; their results are not used.
    """

    method: Method | None = None
    drafter: Drafter | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    execution: str = "stacked"
    copies: int = 1
    products: tuple[Product, ...] = ()


@dataclass
class Measured:
    """What one arm did: per sample the ids of its rows; per round and sample the seconds of the call and to its first token."""

    answers: list[list[list[int]]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    firsts: list[list[float]] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)

    def per_token(self, decode_only: bool = False) -> list[float]:
        """Seconds per token of every round and sample; ``decode_only`` takes off those to the first token."""
        out = []
        for calls, ones in zip(self.seconds, self.firsts):
            for seconds, first, answer in zip(calls, ones, self.answers):
                tokens = len(answer[0]) - 1 if decode_only else len(answer[0])
                if tokens > 0:
                    out.append((seconds - first if decode_only else seconds) / tokens)
        return out

    def only(self, samples: slice) -> Measured:
        """The same of some samples; the counters stay those of all."""
        rounds = lambda table: [row[samples] for row in table]  # noqa: E731
        return dataclasses.replace(
            self, answers=self.answers[samples], seconds=rounds(self.seconds), firsts=rounds(self.firsts)
        )


@contextmanager
def ready(model: Any, processor: Any, arm: Arm):
    """Prepare the model as the arm needs it, for the length of the block."""
    if arm.method is None:
        with _running(model, arm.products):
            yield model
        return
    attach(model, arm.method, processor=processor, drafter=arm.drafter, execution=arm.execution)
    try:
        yield model
    finally:
        detach(model)


@contextmanager
def _running(model: Any, products: Sequence[Product]):
    """The model's forwards also run ``products``."""
    generator = torch.Generator().manual_seed(0)
    given = [
        (product.module.forward, torch.randn(product.shape, generator=generator).to(model.device, model.dtype))
        for product in products
    ]

    def run(*_: Any) -> None:
        for forward, states in given:
            forward(states)

    handle = model.register_forward_hook(run) if given else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


class _First:
    """Notes when the first token came, and stops nothing.

    A search that calls no criteria as it goes has no such moment.
    """

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.at, self._no = clock, math.nan, torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if math.isnan(self.at):
            finished(input_ids.device)
            self.at = self.clock()
        if len(self._no) != len(input_ids):
            self._no = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self._no


def finished(device: torch.device) -> None:
    """Wait until ``device`` has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(
    model: Any, inputs: Mapping[str, Any], clock: Callable[[], float] = perf_counter, **options: Any
) -> tuple[list[list[int]], float, float]:
    """One call of ``generate()``: the ids of each row, the seconds of the call, and those to its first token (NaN if unknown)."""
    first = _First(clock)
    finished(model.device)
    start = clock()
    out = model.generate(**inputs, stopping_criteria=[first], **options)
    finished(model.device)
    return out[:, inputs["input_ids"].shape[1] :].tolist(), clock() - start, first.at - start


def repeated(inputs: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """The inputs with each row ``copies`` times, all rows of a copy together."""
    return {key: torch.cat([value] * copies) if copies > 1 else value for key, value in inputs.items()}


def measure(
    model: Any,
    processor: Any,
    samples: Sequence[Mapping[str, Tensor]],
    arms: Mapping[str, Arm],
    *,
    max_new_tokens: int,
    rounds: int = 3,
    warm: Sequence[Mapping[str, Tensor]] = (),
    options: Mapping[str, Any] | None = None,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Measured]:
    """Run every sample through every arm ``rounds`` times, after an untimed round.

    Args:
        samples: inputs of ``generate()``, one batch each.
        arms: name -> arm.
        warm: other samples, on which drafters that learn between calls learn first.
        options: arguments of every call, for instance ``do_sample`` and ``temperature``; greedy by default. The seed of a
            sampled call is passed to attached models only.
        clock: gives the seconds; ``time.process_time`` counts what this process computed.
    """
    common = {"do_sample": False, "max_new_tokens": max_new_tokens, **(options or {})}
    bare = {key: value for key, value in common.items() if key != "seed"}
    how = {name: {**(bare if arm.method is None else common), **arm.options} for name, arm in arms.items()}
    for name, arm in arms.items():
        if arm.drafter is not None and type(arm.drafter).fork is not Drafter.fork:
            with ready(model, processor, arm):
                for inputs in warm:
                    timed(model, inputs, **how[name])
    results = {name: Measured() for name in arms}
    names = list(arms)
    for turn in range(rounds + 1):
        for name in names:
            results[name].seconds += [[]] if turn else []
            results[name].firsts += [[]] if turn else []
        for number, inputs in enumerate(samples):
            shift = (turn + number) % len(names)
            for name in names[shift:] + names[:shift]:
                arm, result = arms[name], results[name]
                if arm.drafter is not None:
                    arm = dataclasses.replace(arm, drafter=arm.drafter.fork())
                with ready(model, processor, arm):
                    answer, seconds, first = timed(model, repeated(inputs, arm.copies), clock, **how[name])
                    if turn:
                        result.seconds[-1].append(seconds)
                        result.firsts[-1].append(first)
                        if arm.drafter is not None:
                            run = last_run(model)
                            assert run is not None and run.trace.speculation is not None
                            result.stats = result.stats + run.trace.speculation
                    else:
                        result.answers.append(answer)
    return results


def ratios(of: Measured, to: Measured, decode_only: bool = False) -> list[float]:
    """The paired ratios of seconds per token of all rounds and samples."""
    return [x / y for x, y in zip(of.per_token(decode_only), to.per_token(decode_only))]


def ratio(of: Measured, to: Measured, decode_only: bool = False) -> float:
    """Their median."""
    return statistics.median(ratios(of, to, decode_only))


def mismatches(of: Measured, to: Measured) -> int:
    """How many samples got other token ids."""
    return sum(a != b for a, b in zip(of.answers, to.answers))


def raw(results: Mapping[str, Measured]) -> dict[str, Any]:
    """The samples behind a summary: seconds of every call, tokens of every row."""
    return {
        name: {
            "seconds": [[round(s, 6) for s in row] for row in result.seconds],
            "seconds_to_first_token": [[round(s, 6) for s in row] for row in result.firsts],
            "tokens": [len(answer[0]) for answer in result.answers],
        }
        for name, result in results.items()
    }


def circumstances(model: Any) -> dict[str, Any]:
    """Machine, versions, dtype, commit and load: what a recorded number came from."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return {
        "machine": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "gpu": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
        "dtype": str(model.dtype),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "commit": done.stdout.strip() or "unknown",
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
