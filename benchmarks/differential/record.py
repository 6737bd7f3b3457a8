"""Runs the authors' code on the parts of the record, writes down what it gives, and how far this library is from it.

    python benchmarks/differential/record.py --upstream FOLDER [PART ...]

FOLDER holds a checkout of each repository in ``theirs.REPOSITORIES``, under the name given there. Repositories that are missing
are named, and their records are left as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import cases  # noqa: E402
from theirs import PARTS, REPOSITORIES  # noqa: E402
from upstream import Missing, Repository, all_of  # noqa: E402

#: Around the table in README.md.
BEGIN, END = "<!-- records -->", "<!-- end -->"


def plain(value: Any) -> Any:
    """Numbers as they stand in a record; a token that was masked is ``null``."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return None if value == float("-inf") else float(f"{value:.8g}")
    return value


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors, as a share of values above 1; infinite where one masks what the other does not."""
    if ours.shape != theirs.shape or not torch.equal(ours.isinf(), theirs.isinf()):
        return float("inf")
    apart = (ours.double() - theirs.double()) / theirs.double().abs().clamp(min=1)
    return float(apart.masked_fill(theirs.isinf(), 0.0).abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", type=Path, required=True, help="folder with the checkouts")
    parser.add_argument("parts", nargs="*", help="parts to record; all if none is named")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    repositories = {name: Repository(asked.upstream, name, *where) for name, where in REPOSITORIES.items()}
    for line in all_of(repositories.values()):
        print(f"missing: {line}", file=sys.stderr)
    made = {}
    for name, own in PARTS.items():
        if asked.parts and name not in asked.parts:
            continue
        repository = repositories[own.repository]
        worst, written = 0.0, []
        try:
            for given in own.given:
                theirs, ours = own.run(repository, **given), cases.ours(name)(**given)
                gaps = {key: gap(ours[key], theirs[key]) for key in theirs}
                if max(gaps.values()) > 1e-5:
                    print(f"{name} {given}: {gaps}", file=sys.stderr)
                worst = max(worst, *gaps.values())
                written.append({"given": given, "out": {key: plain(value.tolist()) for key, value in theirs.items()}})
            made[name] = {
                "repository": repository.source,
                "commit": repository.commit,
                "file": own.file,
                "sha256": repository.digest(own.file),
                "function": own.function,
                "note": own.note,
                "largest": float(f"{worst:.2g}"),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "other": own.other,
                "cases": written,
            }
        except Missing as missing:
            print(f"not recorded: {name}: {missing}", file=sys.stderr)
            continue
        print(f"{name:24} {len(written)} cases, largest difference {worst:.2g}")
    if not made:
        return 1
    for name, record in made.items():
        path = HERE / "records" / f"{name}.json"
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    page = HERE / "README.md"
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{cases.table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
