"""POPE on the emoji scenes with every method, beside its matched controls.

    lvlm-decode train negatives --model tiny --output negatives-tiny-llava
    python benchmarks/methods/run.py --model tiny-llava --negatives negatives-tiny-llava --limit 200

Methods run with their defaults, but for what is in ``PARAMETERS``: set because these models have 64 patches instead of
576, know few phrasings of a request for a description, or need weights (DCD, LOL). Answers are kept in ``--out`` and a
run continues where it stopped. ``benchmarks/methods/MODEL.json`` gets the circumstances, rates and raw answers,
``MODEL.md`` the tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lvlm_decode.engine.modes import check_needs
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.families import family_of
from lvlm_decode.methods import METHODS, parse
from lvlm_decode.methods import load as method_class
from lvlm_decode.speculative.bench import circumstances
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.loaders import scene_source
from lvlm_decode_evals.plan import GREEDY, Decoding, Result, read_json
from lvlm_decode_evals.runner import EvaluationRun, Options, Share, load
from lvlm_decode_evals.tables import blocks, render

HERE = Path(__file__).resolve().parent
PARAMETERS = {
    "code": "code(prompt=Please describe this image in detail.,max_description=96)",
    "dcd": "dcd(negative={negatives}/negative.safetensors,positive={negatives}/positive.safetensors)",
    "lol": "lol(adapter=amateur)",
}
BATCH = 40
SUMS = ("vcd+ritual", "icd+vdd")


def chosen(model, negatives: Path | None) -> list[str]:
    """The methods that this model can run, in the registry's order, then some sums."""
    family, names = family_of(model), []
    for name in METHODS:
        if hasattr(method_class(name), "decode") or name in ("plain", "mask", "scmoe"):
            continue
        if name == "dcd" and negatives is None:
            continue
        # Without an adapter LOL's amateur is the model under an instruction.
        text = name if name == "lol" and negatives is None else PARAMETERS.get(name, name).format(negatives=negatives)
        try:
            check_needs(parse(text), family)
        except UnsupportedError as error:
            print(f"left out: {error}")
            continue
        names.append(text)
    return [*names, *SUMS]


def record(results: Sequence[Result], settings: dict) -> dict:
    """Circumstances once, then per cell its rates and what was answered, in the order of the questions."""
    cells = []
    for result in results:
        answers = [json.loads(line)["answer"] for line in (result.folder / "answers.jsonl").open(encoding="utf-8")]
        cell = {"split": result.split, "method": result.method, "decoding": result.decoding.name, "seed": result.seed}
        cells.append(cell | {"summary": read_json(result.folder / "summary.json"), "answers": answers})
    return {**settings, "cells": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--negatives", type=Path, help="folder of lvlm-decode train negatives")
    parser.add_argument("--split", nargs="+", help="only these splits")
    parser.add_argument("--limit", type=int, default=200, help="questions of each split")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--greedy", action="store_true", help="greedy instead of sampling at temperature 1")
    parser.add_argument(
        "--shard", default="1/1", help="i/n: only this share of the batches; the last one to end records"
    )
    arguments = parser.parse_args()

    loaded = load(arguments.model)
    if arguments.negatives is not None:
        loaded.model.load_adapter(str(arguments.negatives / "amateur"), adapter_name="amateur")
        # The controls and all other methods are the model without it.
        loaded.model.disable_adapters()
    decoding = GREEDY if arguments.greedy else Decoding(do_sample=True)
    names = arguments.methods or chosen(loaded.model, arguments.negatives)
    pope = evaluator("pope")
    source = scene_source(pope)
    source = source.only(arguments.split) if arguments.split else source
    run = EvaluationRun(
        pope,
        source,
        loaded,
        arguments.out / arguments.model,
        [(name, decoding) for name in names],
        arguments.seed,
        arguments.limit,
        Options(batch_size=BATCH),
        Share.parse(arguments.shard),
    )
    results = run.execute()
    if len(results) < len(run.cells()):
        print("another share still owes a part")
        return
    # A folder of this machine says nothing to a reader.
    results = [replace(r, method=r.method.replace(str(arguments.negatives), "negatives")) for r in results]
    settings = {"model": dict(loaded.settings), "limit": arguments.limit, **circumstances(loaded.model)}
    stem = HERE / f"{arguments.model}-{'greedy' if arguments.greedy else 'sample'}"
    stem.with_suffix(".json").write_text(json.dumps(record(results, settings), indent=1) + "\n")
    stem.with_suffix(".md").write_text(render(blocks(results)) + "\n")
    print(stem.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
