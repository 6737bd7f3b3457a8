"""Kill test of evaluations: whatever ends a run, starting it again must end with the files of an undisturbed one.

    python benchmarks/trust/kill.py --out benchmarks/trust/kill.json

The runner is the real one; where it says so below, the whole command with the small model. Elsewhere answers are made up
in place of `generate`, from the same keys that seed real ones, so that a run takes a second and hundreds of kills can be
tried. The moments of kills are drawn from `--seed`. Prints, and writes as JSON, what was tried and how many final
folders equal the undisturbed run's, byte for byte, with nothing left over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

import lvlm_decode
import lvlm_decode_data
from lvlm_decode.errors import LvlmDecodeError
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.loaders import scene_source
from lvlm_decode_evals.plan import Decoding
from lvlm_decode_evals.runner import EvaluationRun, Loaded, Options, Share

SAMPLE = Decoding(do_sample=True)
WHOLE = Share()
# Exit statuses of a child: one sentence, and an error that nobody expected.
REFUSED, BROKEN = 1, 99
# What one made-up batch takes, in seconds.
BATCH_SECONDS = 0.005
CASES: dict[str, dict[str, Any]] = {
    "pope, vcd, 2 splits": {"evaluator": "pope", "splits": ["random", "popular"], "methods": [("vcd", SAMPLE)]},
    "pope, plain, 2 seeds": {
        "evaluator": "pope",
        "splits": ["random"],
        "methods": [("plain", SAMPLE)],
        "seeds": (0, 1),
    },
    "mme, ritual": {"evaluator": "mme", "splits": ["all"], "methods": [("ritual", SAMPLE)]},
    "chair, opera": {"evaluator": "chair", "splits": ["captions"], "methods": [("opera", Decoding())]},
}


class MadeUp(EvaluationRun):
    """A run whose answers are made up from the keys that seed real ones."""

    @contextmanager
    def _attached(self, method):
        yield

    def _check_template(self, asked):
        pass

    def _generate(self, cell, questions, images):
        time.sleep(BATCH_SECONDS)
        answers = []
        for question in questions:
            key = f"{cell.method} {cell.decoding.name} {cell.seed} {cell.split} {question.id}"
            number = int(hashlib.sha256(key.encode()).hexdigest(), 16)
            said = "Yes, there is a dog.\u2028" if number % 2 else "No."
            answers.append(Answer.to(question, said * (1 + number % 7), tokens=1 + number % 7))
        return answers


@cache
def asked(benchmark: str):
    """An evaluator and its questions about a few scenes; made once, before any child."""
    chosen = evaluator(benchmark)
    return chosen, scene_source(chosen, lvlm_decode_data.load_scenes("heldout")[:20])


def run_of(case: str, out: Path, share: Share = WHOLE) -> EvaluationRun:
    given = CASES[case]
    chosen, source = asked(given["evaluator"])
    loaded = Loaded(SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(), {"name": "made up"})
    return MadeUp(
        chosen, source.only(given["splits"]), loaded, out, given["methods"],
        given.get("seeds", (0,)), 60, Options(batch_size=4), share, quiet=True,
    )  # fmt: skip


def start(make: Callable[[], EvaluationRun], log: Path) -> int:
    """A child process that runs it; its process number. Errors go to `log`, as the command line says them."""
    pid = os.fork()
    if pid:
        return pid
    status = 0
    try:
        try:
            make().execute()
        except LvlmDecodeError as error:
            log.write_text(f"error: {error}\n")
            status = REFUSED
        except BaseException:
            log.write_text(traceback.format_exc())
            status = BROKEN
    finally:
        os._exit(status)


def wait(pid: int, seconds: float | None = None) -> int | None:
    """Exit status of a child (negative: the signal); None while it runs after so many seconds."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the machine's own (of a file system's root)."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Bench:
    """Undisturbed trees by case, a place for trials, and what was found."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.rng = place, random.Random(seed)
        self.log = place / "log"
        self.trees: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        for number, case in enumerate(CASES):
            # What a run imports is imported before it is forked, so that kills hit the run.
            for method, _ in run_of(case, place).methods:
                for name in (method, "plain", "mask"):
                    lvlm_decode.parse(name)
            out = place / f"undisturbed-{number}"
            begun = time.monotonic()
            status = wait(start(partial(run_of, case, out), self.log))
            if status:
                raise SystemExit(f"the undisturbed run of {case} ended with {status}: {self.log.read_text()}")
            self.seconds[case] = time.monotonic() - begun
            self.trees[case] = tree(out)

    def trial(self) -> tuple[str, Path]:
        """A case by chance and an empty folder."""
        return self.rng.choice(list(CASES)), Path(tempfile.mkdtemp(dir=self.place))

    def moment(self, case: str) -> float:
        return self.rng.uniform(0, 1.1 * self.seconds[case])

    def end(self, case: str, out: Path, found: Counter) -> None:
        """Run to the end, undisturbed; count whether the tree is right, and remove it."""
        status = wait(start(partial(run_of, case, out), self.log))
        self.judge(case, out, found, status)

    def judge(self, case: str, out: Path, found: Counter, status: int | None = 0) -> None:
        found["folders"] += 1
        if status:
            found["last start failed"] += 1
            print(f"  last start failed: {self.log.read_text()}", flush=True)
        same = tree(out) == self.trees[case]
        found["equal"] += same
        if not same:
            ours, theirs = tree(out), self.trees[case]
            names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            print(f"  {case}: not equal in {names[:5]}", flush=True)
        shutil.rmtree(out)

    def count(self, status: int | None, found: Counter) -> None:
        """How a child that was not killed ended."""
        found[{0: "finished", REFUSED: "one sentence", BROKEN: "traceback"}.get(status, f"exit {status}")] += 1
        if status == BROKEN:
            print(self.log.read_text(), flush=True)


def kills(bench: Bench, wanted: int) -> Counter:
    """SIGKILL at random moments, several to a folder, until the run ends."""
    found: Counter = Counter()
    while found["kills"] < wanted:
        case, out = bench.trial()
        for _ in range(bench.rng.randint(1, 8)):
            pid = start(partial(run_of, case, out), bench.log)
            status = wait(pid, bench.moment(case))
            if status is not None:
                bench.count(status, found)
                break
            kill(pid)
            found["kills"] += 1
        bench.end(case, out, found)
        print(f"  {found['kills']} of {wanted} kills, {found['equal']} of {found['folders']} folders equal", flush=True)
    return found


def shards(bench: Bench, wanted: int) -> Counter:
    """Three shards at once; each is killed at a random moment with a chance of one half and started again."""
    found: Counter = Counter()
    for _ in range(wanted):
        case, out = bench.trial()

        def one(index, case=case, out=out):
            return start(partial(run_of, case, out, Share(index, 3)), out.parent / f"log-{index}")

        children = {index: one(index) for index in range(3)}
        for index in range(3):
            if bench.rng.random() < 0.5:
                if wait(children[index], bench.moment(case) / 3) is None:
                    kill(children[index])
                    found["kills"] += 1
                children[index] = one(index)
        for index, pid in children.items():
            status = wait(pid)
            bench.log.write_bytes((out.parent / f"log-{index}").read_bytes() if status else b"")
            bench.count(status, found)
        bench.judge(case, out, found)
    return found


def two_runs(bench: Bench, wanted: int) -> Counter:
    """Two whole runs started on one folder within a few milliseconds; then one more, to the end."""
    found: Counter = Counter()
    for _ in range(wanted):
        case, out = bench.trial()
        logs = [out.parent / f"log-{i}" for i in range(2)]
        children = []
        for log in logs:
            children.append(start(partial(run_of, case, out), log))
            time.sleep(bench.rng.choice((0, 0.001, 0.01, 0.1)))
        for pid, log in zip(children, logs):
            status = wait(pid)
            bench.log.write_bytes(log.read_bytes() if status else b"")
            bench.count(status, found)
        bench.end(case, out, found)
    return found


@contextmanager
def small_disk(place: Path, kilobytes: int):
    """A file system of its own size in memory. Raises OSError where this user may not mount one."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], capture_output=True, text=True
    )
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def disk_full(bench: Bench, wanted: int) -> Counter:
    """A disk too small for the run, grown once the run has said so."""
    found: Counter = Counter()
    place = bench.place / "disk"
    for _ in range(wanted):
        case = bench.rng.choice(list(CASES))
        needed = sum(-(-len(content) // 4096) * 4 for content in bench.trees[case].values())
        with small_disk(place, max(16, int(needed * bench.rng.uniform(0.1, 0.9)))):
            bench.count(wait(start(partial(run_of, case, place / "out"), bench.log)), found)
            remount(place, "size=64m")
            bench.end(case, place / "out", found)
    return found


def read_only(bench: Bench, wanted: int) -> Counter:
    """A file system that is read-only when a run starts or, killed at a random moment, is started again."""
    found: Counter = Counter()
    place = bench.place / "disk"
    for number in range(wanted):
        case = bench.rng.choice(list(CASES))
        make = partial(run_of, case, place / "out")
        with small_disk(place, 65536):
            if number % 2:
                pid = start(make, bench.log)
                if wait(pid, bench.moment(case)) is None:
                    kill(pid)
                    found["kills"] += 1
            remount(place, "ro")
            bench.count(wait(start(make, bench.log)), found)
            remount(place, "rw")
            bench.end(case, place / "out", found)
    return found


def command(out: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """The real command with the small model."""
    arguments = [sys.executable, *launcher, "-m", "lvlm_decode_evals.run", "pope", "--method", "vcd", "--split", "adversarial",
                 "--limit", "15", "--batch-size", "3", "--out", str(out), *more]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def lines_in(out: Path) -> int:
    total = 0
    for path in out.rglob("answers*.jsonl"):
        try:
            total += path.read_bytes().count(b"\n")
        except FileNotFoundError:
            continue
    return total


def real_commands(bench: Bench, wanted: int) -> Counter:
    """SIGKILL of the real command with the small model, at a random number of answers, three to a folder."""
    found: Counter = Counter()
    whole = bench.place / "real"
    process = command(whole)
    said = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"the real command failed: {said}")
    bench.trees["real"] = tree(whole)
    total = lines_in(whole)
    while found["kills"] < wanted:
        out = Path(tempfile.mkdtemp(dir=bench.place))
        for _ in range(3):
            process, goal = command(out), bench.rng.randrange(total)
            while process.poll() is None and lines_in(out) < goal:
                time.sleep(0.01)
            time.sleep(bench.rng.uniform(0, 0.1))
            if process.poll() is None:
                process.kill()
                found["kills"] += 1
            process.communicate()
        process = command(out)
        said = process.communicate()[1]
        bench.log.write_text(said)
        found["traceback"] += "Traceback" in said
        bench.judge("real", out, found, process.returncode)
    return found


def lost_worker(bench: Bench, wanted: int) -> Counter:
    """One of two processes of `accelerate launch` is killed; then the launch is started again."""
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    found: Counter = Counter()
    for number in range(wanted):
        out = Path(tempfile.mkdtemp(dir=bench.place))
        process = command(out, launcher=launcher)
        while process.poll() is None and lines_in(out) < bench.rng.randint(1, 20):
            time.sleep(0.01)
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.environ().get("RANK") == str(number % 2):
                child.kill()
                found["kills"] += 1
        process.communicate()
        process = command(out, launcher=launcher)
        bench.log.write_text(process.communicate()[1])
        bench.judge("real", out, found, process.returncode)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument(
        "--disks", type=int, default=10, help="Trials with a full disk, and as many with a read-only one."
    )
    parser.add_argument("--real", type=int, default=9, help="Kills of the real command; 0 leaves it and workers out.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    record: dict[str, Any] = {
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "filelock")},
        "commit": commit.stdout.strip(),
        "seed": given.seed,
        "tried": {},
    }
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), given.seed)
        trials = [
            ("SIGKILL at random moments", kills, given.kills),
            ("three shards at once, half of them killed", shards, given.shards),
            ("two runs on one folder", two_runs, given.pairs),
            ("disk full, then grown", disk_full, given.disks),
            ("read-only file system, then writable", read_only, given.disks),
        ]
        if given.real:
            trials += [
                ("SIGKILL of the real command with the small model", real_commands, given.real),
                ("a lost worker of accelerate launch, real command", lost_worker, given.workers),
            ]
        for name, trial, wanted in trials:
            if not wanted:
                continue
            begun = time.monotonic()
            try:
                found = dict(trial(bench, wanted))
            except OSError as error:
                found = {"not tried": str(error)}
            record["tried"][name] = {**found, "seconds": round(time.monotonic() - begun, 1)}
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in record['tried'][name].items())}", flush=True)
    folders, equal = (sum(t.get(key, 0) for t in record["tried"].values()) for key in ("folders", "equal"))
    tracebacks = sum(trial.get("traceback", 0) for trial in record["tried"].values())
    record |= {"folders": folders, "equal": equal, "tracebacks": tracebacks}
    print(f"{equal} of {folders} final folders equal the undisturbed run's; {tracebacks} tracebacks.")
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(0 if equal == folders and not tracebacks else 1)


if __name__ == "__main__":
    main()
