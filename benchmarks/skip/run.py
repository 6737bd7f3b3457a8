"""The lossless skip: how many steps need no view but the sample's own, and what that saves.

    python benchmarks/skip/run.py --output benchmarks/skip/results.json

Where the runner-up lies below beta times the maximum, the plausibility mask leaves one token and no contrast can change
it; ``execution="skip"`` puts the views off and catches up in one forward. On POPE (one short answer per question) and on
captions, greedy, batch 1: the share of steps after the prompt that skipped, forwards of the views, time per answer
relative to stacked execution, paired question by question with the executions in turn. Answers must be equal.

The prompt's forward is never put off, so an answer of one word skips at most the steps after its first token.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from PIL import Image

import lvlm_decode
import lvlm_decode_data
from lvlm_decode.engine.attach import check_execution
from lvlm_decode.errors import LvlmDecodeError
from lvlm_decode.methods import METHODS
from lvlm_decode.speculative.bench import circumstances
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.loaders import scene_source
from lvlm_decode_evals.runner import Options, load, prompt_of

TASKS = {"pope": ("adversarial", 10), "chair": ("captions", 64)}


def skippable(names: list[str]) -> list[str]:
    """Methods whose views can be put off: they have views and a plausibility mask."""
    found = []
    for name in names:
        try:
            method = lvlm_decode.parse(name)
            check_execution("skip", method, 2)
        except LvlmDecodeError:
            continue
        if method.costs and "sum" not in method.refuses:
            found.append(name)
    return found


def answer(loaded, inputs, method: str, execution: str, tokens: int):
    """Tokens, seconds and lanes of one answer."""
    lvlm_decode.attach(loaded.model, method, processor=loaded.processor, execution=execution)
    try:
        start = time.perf_counter()
        out = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, seed=0)
        seconds = time.perf_counter() - start
        return out[0, inputs["input_ids"].shape[1] :], seconds, lvlm_decode.last_run(loaded.model).lanes
    finally:
        lvlm_decode.detach(loaded.model)


def measure(loaded, method: str, task: str, samples: int) -> dict | None:
    """Both executions of one method on one task; None where the model's family refuses it."""
    split, tokens = TASKS[task]
    scenes = {str(scene.image_id): scene.path for scene in lvlm_decode_data.load_scenes()}
    questions = scene_source(evaluator(task)).splits[split][:samples]
    steps = skipped = views = equal = 0
    ratios = []
    for question in questions:
        prompt = prompt_of(loaded.processor, question, Options())
        picture = Image.open(scenes[question.image]).convert("RGB")
        inputs = loaded.processor(images=[picture], text=[prompt], return_tensors="pt")
        stacked, base, _ = answer(loaded, inputs, method, "stacked", tokens)
        skipping, seconds, lanes = answer(loaded, inputs, method, "skip", tokens)
        if len(lanes.lanes) < 2:
            return None
        steps += lanes.lanes[0].forwards - 1
        skipped += lanes.skipped
        views += sum(lane.forwards for lane in lanes.lanes[1:])
        equal += torch.equal(stacked, skipping)
        ratios.append(seconds / base)
    return {
        "samples": len(questions),
        "equal_answers": equal,
        "steps_after_the_prompt": steps,
        "skipped": skipped,
        "share_skipped": skipped / max(steps, 1),
        "forwards_of_views": views,
        "time_vs_stacked": statistics.median(ratios),
        "time_vs_stacked_samples": ratios,
    }


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = ["| method | POPE: skipped | POPE: time | captions: skipped | captions: time | equal answers |"]
    lines.append("|---|---|---|---|---|---|")
    for name, found in results["methods"].items():
        if "refused" in found:
            continue
        cells = [cell for r in found.values() for cell in (f"{r['share_skipped']:.0%}", f"{r['time_vs_stacked']:.2f}x")]
        equal, asked = (sum(r[key] for r in found.values()) for key in ("equal_answers", "samples"))
        lines.append(f"| {' | '.join([name, *cells])} | {equal} of {asked} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load(arguments.model)
    results: dict = {"model": arguments.model, "circumstances": circumstances(loaded.model), "methods": {}}
    for name in [*skippable(list(METHODS)), "vcd+ritual"]:
        try:
            found = {task: measure(loaded, name, task, arguments.samples) for task in TASKS}
        except LvlmDecodeError as error:
            results["methods"][name] = {"refused": str(error)}
            continue
        if None in found.values():
            continue
        results["methods"][name] = found
        line = "  ".join(
            f"{task}: {r['share_skipped']:.0%} skipped, {r['time_vs_stacked']:.2f}x, {r['equal_answers']}/{r['samples']} equal"
            for task, r in found.items()
        )
        print(f"{name:<12} {line}", flush=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        arguments.output.with_suffix(".md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
