"""Runs the real lmms-eval on emoji scenes with the small model and our plug-in, and compares every answer with the library's own.

    python -m venv lmms && lmms/bin/pip install lmms-eval==0.7.3 'filelock<4' .
    lmms/bin/python benchmarks/lmms-eval/run.py --output benchmarks/lmms-eval/results.json

Nothing is downloaded: the tasks are made here from the scenes that ship, as JSON lines and YAML that lmms-eval reads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import lvlm_decode
import lvlm_decode_data
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.base import Question
from lvlm_decode_evals.loaders import scene_source
from lvlm_decode_evals.runner import Options, load, new_tokens, prompt_of

METHODS = {"plain": "method=plain", "vcd": "method=vcd,alpha=1.0", "vcd+icd": 'method="vcd(alpha=0.5,beta=0.2)+icd"'}
LENGTHS = {"pope": 8, "chair": 96}
METRICS = {"pope": "right", "chair": "words", "broken": "right"}
UTILS = """
from PIL import Image


def picture(document):
    return [Image.open(document["image"])]


def question(document, lmms_eval_specific_kwargs=None):
    return document["question"]


def right(document, results):
    return {"right": float(results[0].strip().lower().startswith(document["label"]))}


def words(document, results):
    return {"words": float(len(results[0].split()))}
"""
TASK = """
task: emoji_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.picture
doc_to_text: !function utils.question
doc_to_target: label
generation_kwargs: {{max_new_tokens: {length}, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}}
process_results: !function utils.{metric}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


def documents(name: str, limit: int) -> list[dict[str, Any]]:
    """The first questions of a benchmark on the scenes: id, question, image, label."""
    chosen = evaluator(name)
    source = scene_source(chosen)
    split = "adversarial" if name == "pope" else next(iter(source.splits))
    paths = {str(scene.image_id): str(scene.path) for scene in lvlm_decode_data.load_scenes()}
    return [
        {"id": q.id, "question": q.text, "image": paths[q.image], "label": str(q.label)}
        for q in source.splits[split][:limit]
    ]


def lmms(tasks: Path, names: list[str], arguments: str, out: Path, model: str = "lvlm_decode") -> Any:
    """The finished process of one lmms-eval command."""
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        model,
        "--model_args",
        arguments,
        "--include_path",
        str(tasks),
    ]
    command += ["--tasks", ",".join(names), "--batch_size", "8", "--log_samples", "--output_path", str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return subprocess.run(command, cwd=tasks, env=environment, capture_output=True, text=True, check=False)


def answers_of(out: Path, name: str) -> dict[int, str]:
    """Number of the document -> what lmms-eval logged as its answer."""
    (path,) = out.rglob(f"*_samples_emoji_{name}.jsonl")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["doc_id"]: record["filtered_resps"] for record in records}


def own_answers(loaded: Any, method: str, name: str, asked: list[dict[str, Any]]) -> dict[int, str]:
    """The same questions asked one by one through ``attach`` and ``generate``, without lmms-eval."""
    found = {}
    with lvlm_decode.attached(loaded.model, method, processor=loaded.processor):
        for number, document in enumerate(asked):
            question = Question(document["id"], document["question"], document["image"])
            prompt = prompt_of(loaded.processor, question, Options())
            inputs = loaded.processor(images=Image.open(document["image"]), text=prompt, return_tensors="pt")
            how = {"max_new_tokens": LENGTHS[name], "do_sample": False, "num_beams": 1}
            with torch.inference_mode():
                ids = loaded.model.generate(**inputs, seed=0, sample_ids=[f"emoji_{name}/test/{number}"], **how)
            new = new_tokens(ids, inputs["input_ids"])
            found[number] = loaded.processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=120, help="Number of POPE questions.")
    parser.add_argument("--captions", type=int, default=32, help="Number of captions.")
    given = parser.parse_args()
    asked = {"pope": documents("pope", given.questions), "chair": documents("chair", given.captions)}
    record: dict[str, Any] = {
        "versions": {name: version(name) for name in ("lmms-eval", "transformers", "torch", "lvlm-decode")},
        "documents": {name: len(found) for name, found in asked.items()},
        "methods": {},
        "errors": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder)
        (tasks / "utils.py").write_text(UTILS, encoding="utf-8")
        (tasks / "broken.jpg").write_bytes(b"no picture")
        asked["broken"] = [asked["pope"][0], {**asked["pope"][1], "image": str(tasks / "broken.jpg")}]
        for name, found in asked.items():
            data = tasks / f"{name}.jsonl"
            data.write_text("".join(json.dumps(document) + "\n" for document in found), encoding="utf-8")
            text = TASK.format(name=name, data=data, length=LENGTHS.get(name, 8), metric=METRICS[name])
            (tasks / f"emoji_{name}.yaml").write_text(text, encoding="utf-8")
        loaded = load("tiny")
        plain: dict[str, dict[int, str]] = {}
        for method, arguments in METHODS.items():
            out, begun = tasks / f"out-{method}", time.perf_counter()
            done = lmms(tasks, [f"emoji_{name}" for name in LENGTHS], f"pretrained=tiny,{arguments}", out)
            if done.returncode:
                raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
            cell: dict[str, Any] = {"model_args": arguments, "seconds": round(time.perf_counter() - begun, 1)}
            spelled = "vcd(alpha=0.5,beta=0.2)+icd" if "+" in method else method
            for name in LENGTHS:
                theirs, ours = answers_of(out, name), own_answers(loaded, spelled, name, asked[name])
                plain.setdefault(name, theirs)
                cell[name] = {
                    "equal_to_the_library": sum(theirs[i] == ours[i] for i in ours),
                    "other_than_plain": sum(theirs[i] != plain[name][i] for i in theirs),
                }
            (path,) = out.rglob("*_results.json")
            results = json.loads(path.read_text(encoding="utf-8"))["results"]
            for name in LENGTHS:
                cell[name][METRICS[name]] = results[f"emoji_{name}"][f"{METRICS[name]},none"]
            record["methods"][method] = cell
            print(method, cell, flush=True)
        wrong = {
            "unknown method": ("emoji_pope", "pretrained=tiny,method=vdc"),
            "unknown parameter": ("emoji_pope", "pretrained=tiny,method=vcd,alhpa=1"),
            "brackets without quotes": ("emoji_pope", "pretrained=tiny,method=vcd(alpha=1.0,beta=0.1)"),
            "a picture that cannot be read": ("emoji_broken", "pretrained=tiny,method=vcd"),
        }
        for what, (task, arguments) in wrong.items():
            done = lmms(tasks, [task], arguments, tasks / "out-wrong")
            last = done.stderr.strip().splitlines()[-1].replace(folder, "TASKS")
            record["errors"][what] = {"model_args": arguments, "exit_status": done.returncode, "says": last}
            print(what, record["errors"][what], flush=True)
    given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
