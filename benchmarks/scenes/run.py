"""POPE, CHAIR and NaturalBench on hundreds of held-out scenes with several seeds, for the main methods.

    nohup nice python benchmarks/scenes/run.py --images 500 --seed 0 1 2 --hours 6 > scenes.log &

Made to run in the background: every batch is on disk before the next is asked, the same command goes on where it was
stopped, and seed after seed is finished on all benchmarks, so that what is there is always whole. ``--record`` asks nothing
and writes the tables of the seeds that each benchmark has whole. Scenes beyond those that ship are rendered from their seeds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lvlm_decode_data
from lvlm_decode.reading import read_records
from lvlm_decode.speculative.bench import circumstances
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.base import Evaluator
from lvlm_decode_evals.loaders import Source, scene_source
from lvlm_decode_evals.plan import TIMES, Decoding, Result, read_cell
from lvlm_decode_evals.price import price_blocks
from lvlm_decode_evals.runner import EvaluationRun, Options, load
from lvlm_decode_evals.tables import blocks, render

HERE = Path(__file__).resolve().parent
METHODS = ("vcd", "icd", "m3id", "ritual", "pai", "dola", "deco")
# Benchmark -> the splits that are asked.
BENCHMARKS = {"pope": ["adversarial"], "naturalbench": ["all"], "chair": ["captions"]}
BATCH = 50
TOKENS = {"chair": 96}
# As the shipped scenes are stored.
QUALITY = 70


class Stopped(Exception):
    """The time is spent."""


def scenes(number: int, folder: Path) -> list:
    """The first held-out scenes; those that do not ship are rendered once, into `folder`."""
    found = lvlm_decode_data.load_scenes("heldout")[:number]
    for index in range(len(found), number):
        path = folder / f"{lvlm_decode_data.scene_seed('heldout', index)}.jpg"
        image, scene, _ = lvlm_decode_data.render(lvlm_decode_data.scene_seed("heldout", index))
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=QUALITY, optimize=True)
        found.append(replace(scene, path=path))
    return found


def runs(given: argparse.Namespace, loaded, seeds: Sequence[int], stop) -> list[EvaluationRun]:
    """One run for each benchmark with these seeds."""
    made = []
    drawn = scenes(given.images, given.out / "scenes")
    for name in given.benchmarks:
        chosen: Evaluator = evaluator(name)
        source: Source = scene_source(chosen, drawn).only(BENCHMARKS[name])
        methods = [(method, Decoding(do_sample=True)) for method in given.methods]
        options = Options(max_new_tokens=TOKENS.get(name), batch_size=BATCH, times=True)
        made.append(
            EvaluationRun(chosen, source, loaded, given.out / given.model, methods, seeds, None, options, stop=stop)
        )
    return made


def finished(given: argparse.Namespace, loaded) -> dict[str, tuple[list[int], list[Result]]]:
    """Benchmark -> the seeds that all its cells have whole, and their results; benchmarks without one are left out."""
    found = {}
    for number in range(len(given.seed), 0, -1):
        for run in runs(given, loaded, given.seed[:number], None):
            if run.evaluator.name in found:
                continue
            folders = [(cell, cell.folder(run.out, run.evaluator.name)) for cell in run.cells()]
            if not all((folder / "settings.json").exists() for _, folder in folders):
                continue
            results = [read_cell(folder) for _, folder in folders]
            if all(len(r.rows) >= len(run.source.splits[cell.split]) for r, (cell, _) in zip(results, folders)):
                found[run.evaluator.name] = given.seed[:number], results
    if not found:
        raise SystemExit("no seed of a benchmark is finished yet; run without --record to go on")
    return found


def cost(results: Sequence[Result]) -> dict:
    """What the answers cost: seconds in generation and around it, answers and tokens."""
    total = {"seconds": 0.0, "answers": 0, "tokens": 0}
    for result in results:
        for _, batch in read_records(result.folder / TIMES):
            for name in total:
                total[name] += batch[name]
    return total | {"hours": round(total["seconds"] / 3600, 3)}


def record(given: argparse.Namespace, loaded) -> None:
    """Tables, rates and raw answers of the seeds that are finished."""
    found = finished(given, loaded)
    seeds = {name: found[name][0] for name in given.benchmarks if name in found}
    results = [result for name in seeds for result in found[name][1]]
    cells = [
        {
            "benchmark": r.evaluator.name,
            "split": r.split,
            "method": r.method,
            "decoding": r.decoding.name,
            "seed": r.seed,
        }
        | {"summary": r.evaluator.summary(r.rows)}
        for r in results
    ]
    head = {"model": dict(loaded.settings), "images": given.images, "seeds": seeds, "cost": cost(results)}
    head |= circumstances(loaded.model)
    stem = given.record / given.model
    stem.with_suffix(".json").write_text(json.dumps({**head, "cells": cells}, indent=1) + "\n")
    priced = results
    if given.shared:
        # Of a machine with other work times compare nothing: the table does not find them here.
        priced = [replace(result, folder=given.record) for result in results]
    stem.with_suffix(".md").write_text(render([*blocks(results), *price_blocks(priced)]))
    answers = "".join(
        json.dumps([c["benchmark"], c["method"], c["decoding"], c["seed"], [row.answer for row in r.rows]]) + "\n"
        for c, r in zip(cells, results)
    )
    stem.with_suffix(".answers.jsonl.gz").write_bytes(gzip.compress(answers.encode(), 9, mtime=0))
    print(f"recorded {len(cells)} cells, seeds {seeds}, {head['cost']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument(
        "--benchmarks", nargs="+", default=list(BENCHMARKS), choices=list(BENCHMARKS), help="only these"
    )
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--hours", type=float, help="stop after so long")
    parser.add_argument("--out", type=Path, default=Path("runs") / "scenes")
    parser.add_argument(
        "--record", type=Path, nargs="?", const=HERE, help="write the tables of what is finished here, ask nothing"
    )
    parser.add_argument("--shared", action="store_true", help="the machine had other work: no times in the tables")
    given = parser.parse_args()
    loaded = load(given.model)
    if given.record is not None:
        record(given, loaded)
        return
    until = None if given.hours is None else time.monotonic() + 3600 * given.hours

    def stop() -> None:
        if until is not None and time.monotonic() > until:
            raise Stopped

    try:
        for number in range(1, len(given.seed) + 1):
            for run in runs(given, loaded, given.seed[:number], stop):
                run.execute()
                print(
                    f"{time.strftime('%H:%M:%S')} {run.evaluator.name}: seeds {given.seed[:number]} are there",
                    flush=True,
                )
    except Stopped:
        print("the time is spent; the same command goes on", flush=True)


if __name__ == "__main__":
    main()
