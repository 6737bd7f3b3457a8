"""Random calls for as long as you like: python benchmarks/properties/run.py --examples 1000 --seed 0 --calls 1000

Writes ``counts.json``, anew after each case: what ``--calls`` short calls of an attached model add to its memory, cases, how
often each property was looked at, and failures with their cases.
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
from contract import is_controller, method_of  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from properties import cases, hold  # noqa: E402
from test_memory import drafter_of, grows  # noqa: E402

from lvlm_decode.methods import load  # noqa: E402
from lvlm_decode.speculative.drafters import DRAFTERS  # noqa: E402

#: Whose short calls are counted: views, edits of attention, a drafter that learns, a search.
SUBJECTS = ("vcd", "pai", "recycling", "opera")


def memory(name, calls):
    """What ``calls`` short calls add, after ten others: bytes of tensors, objects of the collector, KiB of the process."""
    drafter = drafter_of(name) if name in DRAFTERS else None
    method = (
        load(name)() if name not in DRAFTERS and is_controller(name) else method_of("vcd" if drafter else name, "llava")
    )
    grows(method, 1, drafter=drafter, before=10)
    before = resident()
    size, objects = grows(method, calls, drafter=drafter, before=10)
    return {"calls": calls, "tensor_bytes": size, "objects": objects, "resident_kib_more": resident() - before}


def resident():
    """KiB of this process that are in memory now (Linux)."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="Random calls.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random calls.")
    parser.add_argument("--calls", type=int, default=1000, help="Short calls for the memory.")
    parser.add_argument("--minutes", type=float, default=60.0, help="No random call begins after that time.")
    parser.add_argument("--out", type=Path, default=HERE / "counts.json", help="File that is written.")
    asked = parser.parse_args()
    counts, failures, grown, tried, begun = {}, [], {}, 0, time.monotonic()

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
        # A run that is cut off leaves a record too.
        write()

    record = {"torch": torch.__version__, "transformers": transformers.__version__, "seed": asked.seed}

    def write():
        spent = {"seconds": round(time.monotonic() - begun)}
        record.update(cases=tried, properties=counts, failures=failures, **spent)
        asked.out.write_text(json.dumps(record | {"memory": grown}, indent=1) + "\n")

    for name in SUBJECTS if asked.calls else ():
        grown[name] = memory(name, asked.calls)
        write()
    one()
    print(asked.out.read_text())


if __name__ == "__main__":
    main()
