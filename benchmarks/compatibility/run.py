"""Which releases of transformers this library works with: the same tests on each, one table.

    python benchmarks/compatibility/run.py                     # every tested release, the whole subset
    python benchmarks/compatibility/run.py --quick 5.18.0      # one release, under three minutes

A release is installed beside the environment (``pip install --no-deps --target``), so that torch and the rest are those of
the environment. Results are kept per release in ``results.json``; a run that was stopped goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from lvlm_decode.engine.hf.versions import TESTED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
#: The subset: name -> arguments of pytest. The engine, the families, the contract of methods of every kind, a search, drafts,
#: adapters, and the command line.
PARTS = {
    "port": ["tests/test_port.py"],
    "engine": ["tests/test_engine.py"],
    "families": ["tests/test_families.py"],
    "contract": ["tests/test_contract.py", "-k", "vcd or icd or m3id or dola or pai or sid or damro"],
    "opera": ["tests/test_opera.py"],
    "drafts": [
        "tests/test_speculative_cache.py",
        "tests/test_speculative_exact.py",
        "-k",
        "cache or float64 or stop_strings",
    ],
    "adapters": ["tests/test_methods.py", "-k", "lora or adapter"],
    "command line": ["tests/test_cli.py"],
}
#: What continuous integration runs of it, in under three minutes.
QUICK = {
    "port": PARTS["port"],
    "engine": ["tests/test_engine.py", "-k", "entries or strength or nest"],
    "families": ["tests/test_families.py", "-k", "entries or reacts"],
    "contract": [
        "tests/test_contract.py",
        "-k",
        "(vcd or dola or pai) and (llava or qwen2_5_vl) and not next and not onevision",
    ],
    "opera": ["tests/test_opera.py", "-k", "eager or literal"],
    "drafts": ["tests/test_speculative_cache.py"],
    "adapters": PARTS["adapters"],
}


def installed(release: str, folder: Path) -> Path:
    """The folder that holds ``release`` of transformers; it is installed there once."""
    target = folder / release
    if not (target / "transformers").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*command, f"transformers=={release}"], check=True)
    return target


def run(release: str, part: str, arguments: list[str], folder: Path) -> dict:
    """Counts of one part on one release, and the names of what failed."""
    paths = [] if release == version("transformers") else [str(installed(release, folder))]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    found = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if not counts or done.returncode not in (0, 1):
        found.append((done.stdout + done.stderr)[-400:])
    return {
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0) + (not counts),
        "skipped": counts.get("skipped", 0),
        "seconds": round(time.perf_counter() - started),
        "failures": found,
    }


def circumstances() -> dict:
    """Machine, versions beside transformers, and commit."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    packages = ("torch", "torchvision", "tokenizers", "huggingface_hub", "accelerate", "peft", "numpy", "pillow")
    return {
        "machine": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "commit": done.stdout.strip() or "unknown",
    }


def table(results: dict) -> str:
    """The results as Markdown: a release per row, passed, failed and skipped per part."""
    lines = [f"| transformers | {' | '.join(PARTS)} |", "|---|" + "---|" * len(PARTS)]
    for release in TESTED:
        cells = []
        for part in PARTS:
            got = results.get(release, {}).get(part)
            cells.append("not run" if got is None else _cell(got))
        lines.append(f"| {release} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(got: dict) -> str:
    failed = f", **{got['failed']} failed**" if got["failed"] else ""
    return f"{got['passed']}{failed}" + (f", {got['skipped']} skipped" if got["skipped"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "releases", nargs="*", default=None, help="releases of transformers; all tested ones by default"
    )
    parser.add_argument("--quick", action="store_true", help="the small subset; nothing is recorded")
    parser.add_argument("--folder", type=Path, help="where releases are installed; a temporary folder by default")
    parser.add_argument("--again", action="store_true", help="run what is recorded already again")
    given = parser.parse_args()
    releases = given.releases or list(TESTED)
    file = HERE / "results.json"
    record = json.loads(file.read_text()) if file.exists() else {"results": {}}
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        for release in releases:
            for part, arguments in (QUICK if given.quick else PARTS).items():
                own = record["results"].setdefault(release, {})
                if part in own and not given.again and not given.quick:
                    continue
                got = run(release, part, arguments, folder)
                print(f"transformers {release}, {part}: {_cell(got)}, {got['seconds']} s", flush=True)
                for failure in got["failures"]:
                    print(f"    {failure}", flush=True)
                failed = failed or bool(got["failed"])
                if not given.quick:
                    own[part] = got
                    record["circumstances"] = circumstances()
                    file.write_text(json.dumps(record, indent=1) + "\n")
    if not given.quick:
        print(table(record["results"]))
    sys.exit(failed)


if __name__ == "__main__":
    main()
