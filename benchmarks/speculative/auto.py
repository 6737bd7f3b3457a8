"""``drafter="auto"`` against no drafter on this machine: short answers, captions, long descriptions, batches of 1, 4 and 16.

    python benchmarks/speculative/auto.py --output benchmarks/speculative/auto.json

Each workload starts with a drafter that has measured nothing, so what it loses to trying is in its numbers. Every batch of
samples is decoded twice, with and without the drafter, in turn first and second; the ratio of the sums of seconds is what the
workload cost, the ratio per batch says how it got there. Token ids are compared. "drafted in" counts the calls that were given a
drafter, "given up" those whose rest was decoded as without one. A table is written beside the JSON.

``--processor-seconds`` counts the seconds that this process computed, in one thread, instead of those that passed: on a machine
that others use at the same time, nothing else says anything. The drafter then chooses by the same clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from PIL import Image

import lvlm_decode
import lvlm_decode_data
from lvlm_decode.bench.paired import circumstances
from lvlm_decode.bench.workloads import CAPTION
from lvlm_decode.speculative import drafters
from lvlm_decode.speculative.drafters import auto as choosing
from lvlm_decode.speculative.stats import Stats
from lvlm_decode_evals.runner import load

#: name -> prompt, batches of each size, arguments of ``generate()``.
WORKLOADS: dict[str, tuple[str, dict[int, int], dict[str, int]]] = {
    "pope": ("Is there a dog in the image? Please answer yes or no.", {1: 240, 4: 60, 16: 24}, {"max_new_tokens": 5}),
    "captions": (CAPTION, {1: 24, 4: 12, 16: 6}, {"max_new_tokens": 96}),
    # The end token is held back, as no model of this size says much.
    "long": (CAPTION, {1: 10, 4: 6, 16: 4}, {"max_new_tokens": 256, "min_new_tokens": 256}),
}


def batches(processor: Any, prompt: str, size: int, count: int) -> list[dict[str, Any]]:
    """``count`` batches of ``size`` scenes, which begin anew where they run out."""
    text = prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    scenes = lvlm_decode_data.load_scenes()
    pictures = [Image.open(scene.path).convert("RGB") for scene in scenes]
    rows = [[pictures[(b * size + i) % len(pictures)] for i in range(size)] for b in range(count)]
    return [dict(processor(images=row, text=[text] * size, return_tensors="pt", padding=True)) for row in rows]


#: What ``drafter="auto"`` may choose from -> its name. The second does without a head.
CANDIDATES = {
    "with a head": "auto",
    "no training": "auto(drafters=('automaton(shortest=1)','recycling(rows=12,depth=5)'))",
}
#: The clock of the record and of the drafter.
clock = perf_counter


def timed(
    model: Any, method: str, drafter: Any, inputs: dict[str, Any], how: dict[str, int]
) -> tuple[list, float, Stats | None]:
    """Token ids, seconds, and what was drafted in one call."""
    with lvlm_decode.attached(model, method, drafter=drafter):
        begin = clock()
        out = model.generate(**inputs, do_sample=False, seed=0, **how)
        seconds = clock() - begin
        return out.tolist(), seconds, lvlm_decode.last_run(model).trace.speculation


def workload(loaded: Any, method: str, drafting: str, name: str, size: int, share: float) -> dict[str, Any]:
    prompt, counts, how = WORKLOADS[name]
    model, drafter = loaded.model, drafters.parse(drafting, model=loaded.model)
    pairs, mismatches, drafted_in, handed_over = [], 0, 0, 0
    given = batches(loaded.processor, prompt, size, max(2, int(counts[size] * share)))
    timed(model, method, None, given[0], how)  # what a first call alone takes, such as making tables
    for number, inputs in enumerate(given):
        found: dict[bool, tuple[list, float, Stats | None]] = {}
        for drafted in (True, False) if number % 2 else (False, True):
            found[drafted] = timed(model, method, drafter if drafted else None, inputs, how)
        mismatches += found[True][0] != found[False][0]
        pairs.append((found[True][1], found[False][1]))
        stats = found[True][2]
        assert stats is not None
        drafted_in += stats.cycles > 0 or stats.handed_over > 0
        handed_over += stats.handed_over
    ledgers = {
        f"{samples} samples, {views} views": {
            "seconds_without_a_draft": ledger.plain.value(1) if ledger.plain_tokens else None,
            "calls": {drafter: entry.calls for drafter, entry in ledger.entries.items()},
            "lost_seconds": ledger.behind,
        }
        for (samples, views), ledger in drafter.ledgers.items()
    }
    later = pairs[len(pairs) // 2 :]
    return {
        "batches": len(pairs),
        "time_of_none": round(sum(a for a, _ in pairs) / sum(b for _, b in pairs), 4),
        "time_of_none_second_half": round(sum(a for a, _ in later) / sum(b for _, b in later), 4),
        "median_of_pairs": round(statistics.median(a / b for a, b in pairs), 4),
        "mismatches": mismatches,
        "calls_with_a_drafter": drafted_in,
        "given_up": handed_over,
        "measured": ledgers,
        "raw_seconds": [[round(a, 5), round(b, 5)] for a, b in pairs],
    }


def run(
    which: str,
    chosen: list[str],
    sizes: list[int],
    methods: list[str],
    drafting: dict[str, str],
    share: float,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The report, which ``keep`` is given after each workload: a run that is cut off leaves what it has measured."""
    loaded = load(which)
    if getattr(loaded.processor, "tokenizer", None) is not None:
        loaded.processor.tokenizer.padding_side = "left"
    rows: dict[str, Any] = {}
    report = {
        "what": f"drafter auto against no drafter, {which}, greedy, from nothing measured",
        "seconds": "of the processor, one thread" if clock is process_time else "as they passed",
        "rows": rows,
    }
    for name in chosen:
        for size in sizes:
            for method in methods:
                for label, drafter in drafting.items():
                    found = workload(loaded, method, drafter, name, size, share)
                    rows[f"{name} | {size} | {method} | {label}"] = found
                    print(
                        name, size, method, label, found["time_of_none"], found["time_of_none_second_half"], flush=True
                    )
                    report["circumstances"] = circumstances(loaded.model)
                    keep(report)
    return report


def table(report: dict[str, Any]) -> str:
    """A report as Markdown."""
    about = report["circumstances"]
    lines = [
        f"{report['what']}; seconds {report['seconds']}.",
        "",
        f"{about['processor']}, {about['threads']} threads, {about['dtype']}, load at the end {about['load_average'][0]}.",
        "",
        "| workload | batch | method | candidates | time of no drafter | second half | median of pairs | drafted in | given up "
        "| other tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["rows"].items():
        numbers = [f"{row[key]:.3f}x" for key in ("time_of_none", "time_of_none_second_half", "median_of_pairs")]
        counts = [str(row["calls_with_a_drafter"]), str(row["given_up"]), f"{row['mismatches']} of {row['batches']}"]
        lines.append(f"| {name} | {' | '.join([*numbers, *counts])} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--methods", nargs="+", default=["plain", "vcd"])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16], help="sizes")
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the batches of each workload")
    parser.add_argument("--processor-seconds", action="store_true", help="of this process alone, with one thread")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.processor_seconds:
        global clock
        clock = choosing.clock = process_time
        options.threads = 1
    torch.set_num_threads(options.threads)

    def keep(report: dict[str, Any]) -> None:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(table(report), encoding="utf-8")

    drafting = {label: CANDIDATES[label] for label in options.candidates}
    wanted = (options.workloads, options.batches, options.methods)
    return run(options.model, *wanted, drafting, options.share, keep)


if __name__ == "__main__":
    print(table(main()))
