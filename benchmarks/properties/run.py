"""Random calls for as long as you like: python benchmarks/properties/run.py --examples 1000 --seed 0 --calls 1000

Writes ``counts.json``: cases, how often each property was looked at, failures with their cases, and what ``--calls`` short
calls of one attached model add to its memory.
"""

import argparse
import gc
import json
import resource
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402
from contract import method_of  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from properties import cases, hold  # noqa: E402
from test_memory import grows  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="Random calls.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random calls.")
    parser.add_argument("--calls", type=int, default=1000, help="Short calls for the memory.")
    parser.add_argument("--minutes", type=float, default=60.0, help="No random call begins after that time.")
    parser.add_argument("--out", type=Path, default=HERE / "counts.json", help="File that is written.")
    asked = parser.parse_args()
    counts, failures, tried, begun = {}, [], 0, time.monotonic()

    @seed(asked.seed)
    @settings(
        max_examples=asked.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def one(case):
        nonlocal tried
        if time.monotonic() - begun > 60 * asked.minutes:
            return
        tried += 1
        try:
            hold(case, counts)
        except Exception as error:
            failures.append({"case": repr(case), "error": f"{type(error).__name__}: {error}"[:300]})

    one()
    spent = time.monotonic() - begun
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size, objects = grows(method_of("vcd", "llava"), asked.calls, before=10) if asked.calls else (0, 0)
    gc.collect()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": asked.seed,
        "cases": tried,
        "properties": counts,
        "failures": failures,
        "seconds": round(spent),
        "memory": {"calls": asked.calls, "tensor_bytes": size, "objects": objects, "peak_kib_more": after - before},
    }
    asked.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
