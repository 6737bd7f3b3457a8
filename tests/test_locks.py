"""A folder has one writer, or the shards of one run; locks of dead processes go, nothing of them stays behind."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import ROOT
from runs import cli, files_of, one_cell

from lvlm_decode.errors import LockedError, OutputError
from lvlm_decode_evals import locks
from lvlm_decode_evals.answers import Answer, append_answers, remove_partials, write_whole
from lvlm_decode_evals.locks import writing

HOLDER = """
import sys, time
from lvlm_decode_evals.locks import writing
with writing([sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.2)
    monkeypatch.setattr(locks, "PATIENCE", 0.2)


@pytest.fixture
def holder(tmp_path):
    """Starts other processes that hold a folder; they are killed at the end."""
    started = []

    def start(folder, index=0, count=1):
        arguments = [sys.executable, "-c", HOLDER, str(folder), str(index), str(count)]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_that_is_held_is_refused_in_one_sentence_that_says_by_whom_and_since_when(tmp_path, holder):
    process = holder(tmp_path)
    with pytest.raises(LockedError) as refused, writing([tmp_path]):
        pass
    sentence = str(refused.value)
    assert f"{tmp_path} is being written by another run (process {process.pid} on " in sentence
    assert re.search(r"since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", sentence) and sentence.endswith("or give another --out.")


def test_the_lock_of_a_killed_process_is_taken_over_and_goes(tmp_path, holder):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert files_of(tmp_path)
    with writing([tmp_path]):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock.note"}
    assert not files_of(tmp_path)


@pytest.mark.parametrize("left", ["", "filelock/2\npid=1"])
def test_a_lock_whose_process_was_killed_while_it_made_it_is_taken_over(tmp_path, monkeypatch, left):
    # filelock takes over what has not changed for two seconds.
    monkeypatch.setattr(locks, "WAIT", 2.5)
    (tmp_path / ".lock").write_text(left)
    with writing([tmp_path]):
        assert locks._marker(tmp_path / ".lock")["pid"] == str(os.getpid())
    assert not files_of(tmp_path)


def test_shards_of_one_run_stand_side_by_side_and_nothing_else_does(tmp_path, holder):
    holder(tmp_path, 0, 3)
    with writing([tmp_path], 1, 3):
        for index, count in ((0, 3), (1, 3), (0, 1), (0, 2)):
            with (
                pytest.raises(LockedError, match=r"is being written by shard [12]/3"),
                writing([tmp_path], index, count),
            ):
                pass
        with writing([tmp_path], 2, 3):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {".lock-1-of-3", ".lock-1-of-3.note"}


def test_a_whole_run_clears_locks_of_dead_shards(tmp_path, holder):
    processes = [holder(tmp_path, index, 3) for index in (0, 2)]
    for process in processes:
        process.kill()
        process.wait()
    with writing([tmp_path]):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock.note"}
    assert not files_of(tmp_path)


def test_of_two_folders_neither_stays_held_when_one_is_refused(tmp_path, holder):
    holder(tmp_path / "b")
    with pytest.raises(LockedError), writing([tmp_path / "a", tmp_path / "b"]):
        pass
    assert not files_of(tmp_path / "a")


def elsewhere(folder, **changes):
    """Makes a held lock look as if another machine had made it."""
    path = folder / ".lock"
    path.write_text(re.sub(r"host=.*", "host=another-machine", path.read_text()))
    return path


def test_a_lock_of_another_machine_is_refused_while_it_gives_signs_of_life(tmp_path, holder):
    holder(tmp_path)
    path, stop = elsewhere(tmp_path), threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LockedError, match="on another-machine"), writing([tmp_path]):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_silent_lock_of_another_machine_is_taken_over_and_its_holder_learns_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LEASE", 1.0)
    with writing([tmp_path]) as first:
        lease = first._leases[0]
        lease._stop_heartbeat()  # what a machine that sleeps does
        elsewhere(tmp_path)
        with writing([tmp_path]):
            lease._record_unreported_loss()  # what its first beat after waking finds
            with pytest.raises(LockedError, match="was taken over by another run"):
                first.check()
    assert not (tmp_path / ".lock").exists()


def test_partials_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    living = psutil.Process().parent().pid
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (living, ended.pid, os.getpid()):
        (tmp_path / f"rows.jsonl.{pid}.partial").write_text("x")
    remove_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"rows.jsonl.{living}.partial"]


def test_a_failing_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"x\.json cannot be written \(No space left on device\)"):
        write_whole(path, b"new")
    with pytest.raises(OutputError, match="No space left on device"):
        append_answers(tmp_path / "a.jsonl", [Answer(1, "Yes")])
    assert files_of(tmp_path)["x.json"] == b"old" and not list(tmp_path.glob("*.partial"))


def test_a_folder_that_is_a_file_or_read_only_gets_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), writing([tmp_path / "file"]):
        pass

    def refuse(*arguments, **how):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(locks.SoftFileLease, "acquire", refuse)
    with pytest.raises(OutputError, match="Read-only file system"), writing([tmp_path / "folder"]):
        pass


def test_scores_can_be_read_while_a_run_writes(tmp_path, holder):
    folder = one_cell(tmp_path)
    holder(folder.parents[2])
    done = cli("score", tmp_path)
    assert done.exit_code == 0 and "Accuracy" in done.output, done.output


def test_the_note_says_when_it_was_taken(tmp_path):
    before = time.time()
    with writing([tmp_path]):
        note = json.loads((tmp_path / ".lock.note").read_text())
    from datetime import datetime

    assert abs(datetime.fromisoformat(note["since"]).timestamp() - before) < 5 and note["by"]


def test_eval_on_a_held_folder_ends_in_one_sentence_and_changes_nothing(tmp_path, holder):
    holder(tmp_path / "pope" / "random")
    before = files_of(tmp_path)
    done = cli("eval", "pope", "--limit", "2", "--split", "random", "--no-do-sample", "--out", tmp_path)
    assert done.exit_code == 1 and "is being written by another run" in done.output
    assert "Traceback" not in done.output and files_of(tmp_path) == before


def test_a_run_removes_what_a_killed_one_left_anywhere_in_its_split(tmp_path):
    arguments = ("eval", "pope", "--limit", "2", "--split", "random", "--no-do-sample", "--out", tmp_path)
    assert cli(*arguments).exit_code == 0
    whole = files_of(tmp_path)
    for place in ("questions.jsonl", "plain/greedy/seed-0/rows.jsonl"):
        (tmp_path / "pope" / "random" / f"{place}.999999.partial").write_text("x")
    assert cli(*arguments).exit_code == 0 and files_of(tmp_path) == whole


def test_a_disk_that_fills_or_becomes_read_only_is_one_sentence_wherever_it_happens(tmp_path, monkeypatch):
    def full(*arguments, **how):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(locks.Path, "write_text", full)
        with pytest.raises(OutputError, match="No space left on device"), writing([tmp_path]):
            pass
    gone = locks._note

    class Unwritable(type(tmp_path)):
        def unlink(self, missing_ok=False):
            full()

    with pytest.raises(OutputError, match="during the run"), monkeypatch.context() as patched, writing([tmp_path]):
        patched.setattr(locks, "_note", lambda lease: Unwritable(gone(lease)))
        raise OutputError("during the run")
    with writing([tmp_path]):
        pass
    assert not files_of(tmp_path)


def test_a_lock_that_is_held_in_passing_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 20.0)
    order, taken = [], threading.Event()

    def merge():
        with writing([tmp_path], passing=True):
            taken.set()
            time.sleep(1)
            order.append("merged")

    thread = threading.Thread(target=merge)
    thread.start()
    taken.wait()
    with writing([tmp_path], 0, 3):
        order.append("started")
    thread.join()
    assert order == ["merged", "started"]
