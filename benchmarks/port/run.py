"""Time per token of two checkouts of this repository, paired: one process of each in turn, the same captions.

    python benchmarks/port/run.py --before FOLDER [--path FOLDER] --output benchmarks/port/results.json

``--before`` and ``--after`` are folders with the packages ``lvlm_decode`` and ``lvlm_decode_data``; ``--path`` goes before
both, for instance a release of transformers that both work with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

WORKER = """
import json, time, warnings; warnings.simplefilter("ignore")
import torch, transformers; torch.set_num_threads(1)
import lvlm_decode as ld, lvlm_decode_data as data
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
path = data.tiny_path("tiny-llava")
model, processor = AutoModelForImageTextToText.from_pretrained(path).float(), AutoProcessor.from_pretrained(path)
text = "USER: <image>\\nPlease describe this image in detail. ASSISTANT:"
inputs = [processor(images=Image.open(s.path), text=text, return_tensors="pt") for s in data.load_scenes()[:3]]
found, answers = {}, {}
for arm, how in {"plain": {}, "vcd": {}, "vcd+ritual": {}, "vcd + vispec": {"drafter": "vispec"}}.items():
    ld.attach(model, arm.split(" ")[0], processor=processor, **how)
    ask = lambda x: model.generate(**x, do_sample=False, max_new_tokens=48, min_new_tokens=48, seed=0)
    ask(inputs[0])
    start = time.process_time()
    answers[arm] = [ask(x)[0].tolist() for x in inputs]
    found[arm] = (time.process_time() - start) / (48 * len(inputs))
    ld.detach(model)
print(json.dumps({"seconds": found, "answers": answers, "transformers": transformers.__version__}))
"""


def worker(*folders: Path | None) -> dict:
    """Processor seconds per token of every arm, in a process of its own."""
    path = os.pathsep.join(str(folder) for folder in folders if folder is not None)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # In another folder: Python looks for packages first where it is started.
    here = tempfile.gettempdir()
    command = [sys.executable, "-c", WORKER]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    rounds = []
    for _ in range(given.rounds):
        before, after = worker(given.path, given.before), worker(given.path, given.after)
        rounds.append({"before": before["seconds"], "after": after["seconds"]})
        print({arm: round(after["seconds"][arm] / before["seconds"][arm], 3) for arm in before["seconds"]}, flush=True)
    same = {arm: before["answers"][arm] == after["answers"][arm] for arm in before["answers"]}
    ratios = {arm: [one["after"][arm] / one["before"][arm] for one in rounds] for arm in rounds[0]["before"]}
    record = {
        "what": "processor seconds per token, small LLaVA, 3 captions of 48 tokens, prompt and vision tower included, one thread",
        "median_ratio": {arm: round(statistics.median(values), 3) for arm, values in ratios.items()},
        "lowest_and_highest": {arm: [round(min(v), 3), round(max(v), 3)] for arm, v in ratios.items()},
        "same_answers": same,
        "rounds": rounds,
        "transformers": after["transformers"],
        "torch": version("torch"),
        "machine": platform.platform(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }
    given.output.write_text(json.dumps(record, indent=1) + "\n")
    print(record["median_ratio"], same)


if __name__ == "__main__":
    main()
