"""CHAIR of published captions, whole and at equal length: OPERA's own files, greedy against OPERA.

lvlm-decode data get opera-captions chair coco
lvlm-decode data objects objects.json --vocabulary synonyms.txt --instances ... --captions ...
python benchmarks/length-matched/run.py --captions FOLDER --objects objects.json --vocabulary synonyms.txt
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from lvlm_decode_evals.base import Column
from lvlm_decode_evals.chair import CUTS, Chair
from lvlm_decode_evals.metrics import compare, intervals
from lvlm_decode_evals.tables import Block, Value, difference_value, render

MODELS = {"LLaVA-1.5": "llava-1.5", "Shikra": "shikra", "MiniGPT-4": "minigpt4", "InstructBLIP": "instructblip"}
RUNS = {"greedy": "greedy", "OPERA": "ours"}
COUNTS = ("captions", "hallucinated_captions", "hallucinated_words", "object_words", "recalled", "gt_objects")
SENTENCES, MENTIONS, RECALL = (
    Column(key, title) for key, title in (("chair_s", "CHAIRs"), ("chair_i", "CHAIRi"), ("recall", "Recall"))
)


def counted(scorer: Chair, rows: list) -> dict:
    """The integers of one run, its tokens and how many captions are shorter than each cut included."""
    summary = scorer.summary(rows)
    cuts = {
        f"{name}_{length}": summary[f"{name}_{length}"]
        for length in CUTS
        for name in ("hallucinated_captions", "shorter")
    }
    return {name: summary[name] for name in COUNTS} | {"tokens": summary["reduced"]} | cuts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("captions", "objects", "vocabulary"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    scorer = Chair(vocabulary=str(given.vocabulary), objects=str(given.objects))
    record: dict = {"scorer": scorer.parser, "objects_sha256": hashlib.sha256(given.objects.read_bytes()).hexdigest()}
    lines, cut_lines = [], []
    for model, folder in MODELS.items():
        files = {name: given.captions / folder / f"{file}.jsonl" for name, file in RUNS.items()}
        whole = {name: scorer.rows(scorer.read_answers(path)) for name, path in files.items()}
        equal = dict(zip(whole, scorer.equal_length(list(whole.values()))))
        entry = record.setdefault("models", {})[model] = {
            "sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
        }
        for kind, runs in (("whole", whole), ("equal length", equal)):
            entry[kind] = {name: counted(scorer, rows) for name, rows in runs.items()}
            found = compare(scorer, [runs["OPERA"]], [runs["greedy"]])
            entry[kind]["difference"] = {c.key: asdict(found.differences[c.key]) for c in (SENTENCES, MENTIONS, RECALL)}
            rates = {name: intervals(scorer, [rows]) for name, rows in runs.items()}
            columns = [c for c in (SENTENCES, MENTIONS, RECALL) if kind == "whole" or c is not RECALL]
            cells = [
                cell
                for c in columns
                for cell in (
                    *(Value(rates[name][c.key].value, "percent", digits=2) for name in RUNS),
                    difference_value(found.differences[c.key], c, found.clusters),
                )
            ]
            (lines if kind == "whole" else cut_lines).append((model, Value(entry[kind]["greedy"]["tokens"], "count"),
                Value(entry[kind]["OPERA"]["tokens"], "count"), *cells))  # fmt: skip
        at_64 = compare(scorer, [whole["OPERA"]], [whole["greedy"]]).differences["chair_s_64"]
        entry["first 64 tokens"] = {"chair_s": asdict(at_64)}
        cut_lines[-1] += (difference_value(at_64, SENTENCES, 500),)

    def titles(*columns: Column) -> tuple[str, ...]:
        return tuple(f"{c.title} {name}" for c in columns for name in ("greedy", "OPERA", "difference"))

    head = ("Model", "Tokens greedy", "Tokens OPERA")
    made = [
        Block("Captions as they are", (*head, *titles(SENTENCES, MENTIONS, RECALL)), tuple(lines)),
        Block(
            "Both captions of an image cut to the shorter one",
            (*head, *titles(SENTENCES, MENTIONS), "CHAIRs difference, first 64 tokens"),
            tuple(cut_lines),
        ),
    ]
    (given.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (given.out / "results.md").write_text(render(made))
    print(render(made))


if __name__ == "__main__":
    main()
