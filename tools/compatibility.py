"""The suite on other releases of transformers (and torch), without a second environment.

    python tools/compatibility.py --work /tmp/other --output benchmarks/compatibility
    python tools/compatibility.py --work /tmp/other --quick 5.18.0 5.19.0          # what .ci/run does

Another release is installed into a folder of its own (``pip install --no-deps --target``) and put before the environment's on
``PYTHONPATH``; everything else stays the environment's. Each release runs the same files of the suite, in processes of their
own, and its numbers are written as soon as they are known. The exit status is 1 where a test failed or nothing ran.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lvlm_decode.engine.hf.versions import TESTED  # noqa: E402

#: Part of the suite -> what pytest is given.
CONTRACT = ["tests/test_contract.py", "-k", "vcd or icd or m3id or dola or pai or sid or damro"]
PARTS: dict[str, list[str]] = {
    "port, engine, families": ["tests/test_port.py", "tests/test_engine.py", "tests/test_families.py"],
    "contract": [*CONTRACT, "--full"],
    "adapters": ["tests/test_negatives.py", "tests/test_methods.py", "-k", "negatives or lol or adapter or amateur"],
    "controllers": ["tests/test_opera.py", "tests/test_damro.py", "tests/test_controllers.py"],
    "drafters": [
        "tests/test_speculative_cache.py",
        "tests/test_speculative_exact.py",
        "tests/test_speculative_drafters.py",
    ],
    "command line": ["tests/test_cli.py"],
}
QUICK: dict[str, list[str]] = {
    "port, engine, families": PARTS["port, engine, families"],
    "contract": CONTRACT,
    "adapters": PARTS["adapters"],
}


def beside(work: Path, *packages: str) -> Path:
    """The folder that ``packages`` (``name==version``) are installed in, without what they depend on."""
    folder = work / "+".join(package.replace("==", "-") for package in packages)
    done = folder / ".complete"
    if not done.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--upgrade",
            "--target",
        ]
        subprocess.run([*command, str(folder), *packages], check=True)
        done.touch()
    return folder


def environment_with(folders: Sequence[Path]) -> dict[str, str]:
    """The present environment with ``folders`` before everything else that Python imports."""
    paths = [*map(str, folders), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def libraries() -> list[str]:
    """The CUDA libraries of the environment, which a torch installed beside it links against."""
    import importlib.util

    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return [str(folder) for root in roots for folder in sorted(Path(root).glob("*/lib"))]


def imported(environment: dict[str, str]) -> dict[str, str]:
    """Versions that a process of this environment imports.

    Raises:
        RuntimeError: it cannot import them; with the last line of what Python said.
    """
    code = "import json, torch, transformers as t; print(json.dumps({'torch': torch.__version__, 'transformers': t.__version__}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def tests(arguments: Sequence[str], environment: dict[str, str], processes: int) -> dict[str, object]:
    """Counts, failed tests and reasons of skips of one call of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", str(processes), "--dist", "loadgroup", "--tb=line"]
        began = time.perf_counter()
        done = subprocess.run(
            [*command, f"--junitxml={report}", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - began
        if not report.exists():
            return {
                "passed": 0,
                "failed": ["pytest: " + (done.stdout + done.stderr).strip()[-400:]],
                "skipped": {},
                "seconds": 0,
            }
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed, skipped = [], {}
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif (skip := case.find("skipped")) is not None:
            reason = skip.get("message", "")
            skipped[reason] = skipped.get(reason, 0) + 1
    passed = len(cases) - len(failed) - sum(skipped.values())
    return {"passed": passed, "failed": failed, "skipped": skipped, "seconds": round(seconds)}


def circumstances() -> dict[str, object]:
    """Machine, time, and the commit of the sources."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
    }


def table(records: Sequence[dict]) -> str:
    """The records as a Markdown table: tests passed, failed and skipped of each part."""
    parts = list(dict.fromkeys(part for record in records for part in record["parts"]))
    lines = [f"| transformers | torch | {' | '.join(parts)} | failed | seconds |"]
    lines.append("|---|---|" + "---:|" * (len(parts) + 2))
    for record in records:
        cells = []
        for part in parts:
            counts = record["parts"].get(part)
            skips = sum(counts["skipped"].values()) if counts else 0
            cells.append("" if counts is None else f"{counts['passed']}" + (f" ({skips} skipped)" if skips else ""))
        failed = sum(len(counts["failed"]) for counts in record["parts"].values())
        seconds = sum(counts["seconds"] for counts in record["parts"].values())
        versions = record["versions"]
        lines.append(
            f"| {versions['transformers']} | {versions['torch']} | {' | '.join(cells)} | {failed} | {seconds} |"
        )
    return "\n".join(lines)


def notes(records: Sequence[dict]) -> str:
    """What was skipped and why, and what failed, one line each."""
    lines = []
    for record in records:
        version = record["versions"]["transformers"]
        reasons: dict[str, int] = {}
        for counts in record["parts"].values():
            lines += [f"- {version}: FAILED {name}" for name in counts["failed"]]
            for reason, number in counts["skipped"].items():
                reasons[reason] = reasons.get(reason, 0) + number
        lines += [f"- {version}: {number} skipped: {reason}" for reason, number in reasons.items()]
    return "\n".join(lines)


def write(output: Path, records: Sequence[dict]) -> None:
    """``results.json``, and the part of ``README.md`` between its two markers."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(list(records), indent=1) + "\n", encoding="utf-8")
    page = output / "README.md"
    begin, end = "<!-- table -->", "<!-- /table -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    text = f"{before}{begin}\n{table(records)}\n\n{notes(records)}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "versions", nargs="*", default=list(TESTED), help="releases of transformers; all tested ones if left out"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the other releases, about 60 MB each")
    parser.add_argument("--output", type=Path, help="folder of README.md and results.json to write")
    parser.add_argument("--quick", action="store_true", help="a part of the suite of under three minutes a release")
    parser.add_argument("--torch", help="torch==X with this torchvision==Y as well, as X,Y; about 1 GB")
    parser.add_argument("--processes", type=int, default=2, help="of pytest")
    options = parser.parse_args()

    known = options.output / "results.json" if options.output else None
    records = json.loads(known.read_text(encoding="utf-8")) if known and known.exists() else []
    bad = False
    for version in options.versions:
        folders = [beside(options.work, f"transformers=={version}")]
        environment = environment_with(folders)
        if options.torch:
            torch, torchvision = options.torch.split(",")
            folders.append(beside(options.work, f"torch=={torch}", f"torchvision=={torchvision}"))
            environment = environment_with(folders)
            environment["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries(), os.environ.get("LD_LIBRARY_PATH", "")])
        versions = imported(environment)
        if versions["transformers"] != version:
            raise RuntimeError(f"transformers {versions['transformers']} was imported, and {version} was asked for")
        record = {"versions": versions, **circumstances(), "parts": {}}
        for part, arguments in (QUICK if options.quick else PARTS).items():
            record["parts"][part] = counts = tests(arguments, environment, options.processes)
            bad |= bool(counts["failed"]) or not counts["passed"]
            print(f"{version}, {part}: {counts['passed']} passed, {len(counts['failed'])} failed", flush=True)
            for name in counts["failed"]:
                print(f"  {name}", flush=True)
        records = [other for other in records if other["versions"] != versions] + [record]
        records.sort(key=lambda one: [*map(int, one["versions"]["transformers"].split(".")), one["versions"]["torch"]])
        if options.output:
            write(options.output, records)
    print(table(records))
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
