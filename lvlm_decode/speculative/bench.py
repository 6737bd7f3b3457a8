"""Measuring what a drafter brings: paired runs in one process, on the same inputs, token ids compared.

Every sample runs through every arm, the order rotating from round to round, so that a slow moment of the machine hits all
arms alike. Ratios are taken within a round of a sample; their median is reported. Drafters that learn between calls are
warmed up on other samples, and every timed call starts from that state: no drafter ever measures an answer it has seen.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
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
from .cost import alpha_of, break_even, time_per_token
from .drafters import Drafter
from .stats import Stats

CAPTION = "Please describe this image in detail."
#: Scenes that drafters learn from before others are measured.
WARM = 16


@dataclass(frozen=True)
class Arm:
    """One way of decoding.

    Args:
        method: attached method; ``None`` is Hugging Face's own ``generate()`` on the bare model.
        drafter: with it the speculative loop runs.
        options: further arguments of ``generate()``.
        execution: of the views.
    """

    method: Method | None = None
    drafter: Drafter | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    execution: str = "stacked"


@dataclass
class Measured:
    """What one arm did: per sample its ids; per round and sample the seconds of the whole call and of one token."""

    answers: list[list[int]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    firsts: list[list[float]] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)

    def per_token(self, decode_only: bool = False) -> list[float]:
        """Seconds per token of every round and sample; ``decode_only`` takes off the call that made one token."""
        out = []
        for calls, ones in zip(self.seconds, self.firsts):
            for seconds, first, answer in zip(calls, ones, self.answers):
                tokens = len(answer) - 1 if decode_only else len(answer)
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
        yield model
        return
    attach(model, arm.method, processor=processor, drafter=arm.drafter, execution=arm.execution)
    try:
        yield model
    finally:
        detach(model)


def _timed(model: Any, inputs: Mapping[str, Any], **options: Any) -> tuple[list[int], float]:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    out = model.generate(**inputs, **options)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return out[0, inputs["input_ids"].shape[1] :].tolist(), perf_counter() - start


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
) -> dict[str, Measured]:
    """Run every sample through every arm ``rounds`` times, after an untimed round.

    Args:
        samples: inputs of ``generate()``, one sample each.
        arms: name -> arm.
        warm: other samples, on which drafters that learn between calls learn first.
        options: arguments of every call, for instance ``do_sample`` and ``temperature``; greedy by default. The seed of a
            sampled call is passed to attached models only.
    """
    common = {"do_sample": False, "max_new_tokens": max_new_tokens, **(options or {})}
    bare = {key: value for key, value in common.items() if key != "seed"}
    how = {name: {**(bare if arm.method is None else common), **arm.options} for name, arm in arms.items()}
    for name, arm in arms.items():
        if arm.drafter is not None and type(arm.drafter).fork is not Drafter.fork:
            with ready(model, processor, arm):
                for inputs in warm:
                    _timed(model, inputs, **how[name])
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
                    answer, seconds = _timed(model, inputs, **how[name])
                    if turn:
                        result.seconds[-1].append(seconds)
                        if arm.drafter is not None:
                            run = last_run(model)
                            assert run is not None and run.trace.speculation is not None
                            result.stats = result.stats + run.trace.speculation
                        result.firsts[-1].append(_timed(model, inputs, **{**how[name], "max_new_tokens": 1})[1])
                    else:
                        result.answers.append(answer)
    return results


def ratio(of: Measured, to: Measured, decode_only: bool = False) -> float:
    """Median over rounds and samples of the paired ratio of seconds per token."""
    a, b = of.per_token(decode_only), to.per_token(decode_only)
    return statistics.median(x / y for x, y in zip(a, b))


def mismatches(of: Measured, to: Measured) -> int:
    """How many samples got other token ids."""
    return sum(a != b for a, b in zip(of.answers, to.answers))


def summary(results: Mapping[str, Measured], plain: str) -> dict[str, Any]:
    """Per arm: milliseconds per token, ratios to the arm ``plain``, acceptance, the split, and the cost formula.

    The formula's unit is a decoding step of ``plain``. It adds up what the loop clocked of verification, drafting and the
    rest, over tau; ``vs_plain_decode`` is clocked from outside.
    """
    unit = statistics.median(results[plain].per_token(decode_only=True))
    out: dict[str, Any] = {}
    for name, result in results.items():
        entry: dict[str, Any] = {
            "ms_per_token": round(1e3 * statistics.median(result.per_token()), 4),
            "ms_per_token_decode": round(1e3 * statistics.median(result.per_token(decode_only=True)), 4),
            "vs_plain": round(ratio(result, results[plain]), 4),
            "vs_plain_decode": round(ratio(result, results[plain], decode_only=True), 4),
            "tokens": sum(map(len, result.answers)),
        }
        stats = result.stats
        if stats.cycles:
            cycle = {part: getattr(stats, f"{part}_s") / stats.cycles / unit for part in ("target", "draft", "other")}
            entry["speculation"] = {
                **stats.to_json(),
                "alpha": round(alpha_of(stats.tau, len(stats.reached)), 4) if stats.reached else 0.0,
                "ms_per_token_split": {
                    part: round(1e3 * getattr(stats, f"{part}_s") / stats.tokens, 4)
                    for part in ("target", "draft", "other")
                },
                "cycle_in_plain_steps": {part: round(value, 3) for part, value in cycle.items()},
                "formula": {
                    "time_per_token": round(time_per_token(stats.tau, *cycle.values()), 4),
                    "break_even_tau": round(break_even(*cycle.values()), 4),
                },
            }
        out[name] = entry
    return out


def raw(results: Mapping[str, Measured]) -> dict[str, Any]:
    """The samples behind a summary: seconds of every call, tokens of every answer."""
    return {
        name: {
            "seconds": [[round(s, 6) for s in row] for row in result.seconds],
            "seconds_of_one_token": [[round(s, 6) for s in row] for row in result.firsts],
            "tokens": [len(answer) for answer in result.answers],
        }
        for name, result in results.items()
    }


def caption_inputs(processor: Any, count: int, start: int = 0, prompt: str = CAPTION) -> list[dict[str, Tensor]]:
    """Inputs for ``count`` of the scenes that ship, each with a caption prompt."""
    from PIL import Image

    import lvlm_decode_data

    text = prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    scenes = lvlm_decode_data.load_scenes()[start : start + count]
    return [
        dict(processor(images=[Image.open(s.path).convert("RGB")], text=[text], return_tensors="pt")) for s in scenes
    ]


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
        "dtype": str(model.dtype),
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


def speculative(
    model: Any,
    processor: Any,
    method: Method,
    drafter: Drafter,
    *,
    samples: int,
    max_new_tokens: int,
    rounds: int = 3,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``lvlm-decode bench speculative``: a method with a drafter against itself without one, and against plain."""
    inputs = [{k: v.to(model.device) for k, v in x.items()} for x in caption_inputs(processor, samples + WARM)]
    arms = {"plain": Arm(), "method": Arm(method), "method with drafter": Arm(method, drafter)}
    results = measure(
        model,
        processor,
        inputs[WARM:],
        arms,
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        warm=inputs[:WARM],
        options=options,
    )
    speculated = summary(results, "plain")
    own = speculated["method with drafter"]
    return {
        "mismatches": mismatches(results["method with drafter"], results["method"]),
        "time_per_token_vs_plain": own["vs_plain"],
        "time_per_token_vs_method": round(ratio(results["method with drafter"], results["method"]), 4),
        "tau": own["speculation"]["tau"],
        "split": own["speculation"]["ms_per_token_split"],
        "arms": speculated,
        "raw": raw(results),
        "circumstances": circumstances(model),
    }
