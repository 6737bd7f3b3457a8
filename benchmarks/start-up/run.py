"""How long the command line takes to start: medians over fresh processes.

python benchmarks/start-up/run.py > benchmarks/start-up/results.json
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 9


def measure(arguments: list[str], folder: Path) -> dict[str, float]:
    """Median wall and processor seconds of ``lvlm-decode ARGUMENTS`` over fresh processes, one warm-up left out."""
    wall, processor = [], []
    for _ in range(ROUNDS + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lvlm_decode", *arguments], cwd=folder, check=True, capture_output=True)
        wall.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"wall_s": round(statistics.median(wall[1:]), 3), "processor_s": round(statistics.median(processor[1:]), 3)}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "answers.jsonl").write_text('{"question_id": 1, "answer": "Yes", "label": "yes"}\n')
        commands = (["--help"], ["models"], ["eval", "--help"], ["score", "pope", "answers.jsonl"])
        found = {" ".join(command): measure(command, folder) for command in commands}
    machine = {"system": platform.system(), "cores": os.cpu_count(), "python": platform.python_version()}
    machine["load_average"] = round(os.getloadavg()[0], 2)
    print(json.dumps({"rounds": ROUNDS, "machine": machine, "seconds": found}, indent=1))


if __name__ == "__main__":
    main()
