"""Whether runs of ``lvlm-decode eval`` on several engines gave the same answers.

    lvlm-decode eval pope --limit 20 --split adversarial --method vcd --method icd --out HERE
    lvlm-decode eval ... --engine vllm --dtype float32 --out THERE            # in the environment that has vLLM
    lvlm-decode eval ... --model tiny-llava --engine http://localhost:8000 --out OVER-HTTP
    python benchmarks/serving/engines.py HERE THERE OVER-HTTP --output benchmarks/serving/engines.json

The first folder is compared with each of the others, cell by cell: the words of every answer and how many tokens it took.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lvlm_decode_evals.plan import read_json


def answers(cell: Path) -> list[tuple[object, str, int | None]]:
    lines = (cell / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["question_id"], line["answer"], line.get("tokens")) for line in map(json.loads, lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    first, *others = options.folders
    cells = sorted(path.parent.relative_to(first) for path in first.rglob("answers.jsonl"))
    records = []
    for folder in others:
        equal = {}
        for cell in cells:
            want, got = answers(first / cell), answers(folder / cell)
            equal[str(cell)] = [sum(map(tuple.__eq__, want, got)) if len(want) == len(got) else 0, len(want)]
        records.append({"engine": settings(folder, cells[0]), "cells": equal})
    record = {"reference": settings(first, cells[0]), "compared": records}
    text = json.dumps(record, indent=1) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text)
    if any(same != all_ for one in records for same, all_ in one["cells"].values()):
        raise SystemExit(1)


def settings(folder: Path, cell: Path) -> dict:
    """What the run says of its engine, model and versions."""
    kept = read_json(folder / cell / "settings.json")
    return {name: kept.get(name) for name in ("engine", "model", "environment")}


if __name__ == "__main__":
    main()
