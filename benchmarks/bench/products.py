"""How long a product of a few rows with a weight matrix takes, in units of a product of one row.

    python benchmarks/bench/products.py --out benchmarks/bench/products.json

Views ride as further rows of one forward, which costs little where a product waits for its weights alone. Seconds are those of
the processor, in one thread; the least of five tries. The ways are ``linear`` as models call it, the rows padded to four, the
weights as the left factor (``weight @ rows.T``), and ``linear`` under ``set_float32_matmul_precision("medium")``, which may round
factors to bfloat16. Each matrix is used over and over: one of a few MB stays in the processor's cache, as it does not within a
model, so of the shapes here those of more than 100 MB are like a model's.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

SHAPES = [(1024, 32000), (1024, 2816), (2816, 1024), (4096, 11008)]
ROWS = [1, 2, 3, 4, 5, 8, 25]


def least(run, repeats: int) -> float:
    """Seconds of one run."""
    tries = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(repeats):
            run()
        tries.append((time.process_time() - start) / repeats)
    return min(tries)


def ways(rows: torch.Tensor, weight: torch.Tensor, repeats: int) -> dict[str, float]:
    """Seconds of a product of rows (R, D) and a weight (N, D), by way."""
    linear = torch.nn.functional.linear
    padded = torch.nn.functional.pad(rows, (0, 0, 0, max(4 - len(rows), 0)))
    found = {
        "linear": least(lambda: linear(rows, weight), repeats),
        "padded to four": least(lambda: linear(padded, weight), repeats),
        "weights first": least(lambda: (weight @ rows.T).T, repeats),
    }
    torch.set_float32_matmul_precision("medium")
    found["medium precision"] = least(lambda: linear(rows, weight), repeats)
    torch.set_float32_matmul_precision("highest")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("products.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    for width, out in SHAPES:
        weight, repeats = torch.randn(out, width), max(2, 40_000_000 // (width * out))
        single = torch.randn(1, width)
        one = least(lambda w=weight, r=single: torch.nn.functional.linear(r, w), repeats)
        for rows in ROWS:
            times = ways(torch.randn(rows, width), weight, repeats)
            row = {
                "width": width,
                "out": out,
                "rows": rows,
                "of_one_row": {k: round(v / one, 3) for k, v in times.items()},
            }
            found.append({**row, "one_row_ms": round(one * 1e3, 4)})
            print(json.dumps(found[-1]), flush=True)
    about = {
        "machine": platform.platform(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    given.out.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
