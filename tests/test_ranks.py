"""Several processes that must run the same number of forwards: one goes on for the other, with all views."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "ranks.py"
#: What the longer answer takes; see ``ranks.py``.
FORWARDS = 8


def together(folder, case):
    """What both processes say of a case."""
    command = [sys.executable, "-W", "ignore", str(RANKS)]
    running = [
        subprocess.Popen([*command, str(rank), str(folder), case], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.full
@pytest.mark.parametrize("case", ["views", "pictures-custom", "views-sharded", "dola-sharded"])
def test_the_process_that_ends_first_runs_all_views_until_the_other_ends(tmp_path, case):
    """The answers are those of each process alone, with synced_gpus=True and where transformers itself says so for FSDP."""
    views = 1 if case.startswith("dola") else 3
    for said in together(tmp_path, case):
        assert said["out"] == said["alone"] and said["rows"] == [views] * FORWARDS


@pytest.mark.full
@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("search", "cntp cannot run with synced_gpus=True"),
        ("search-sharded", "cntp cannot run with synced_gpus=True"),
        ("views-unregistered", "register_fsdp_forward_method(model, 'get_image_features') once."),
    ],
)
def test_what_would_wait_for_ever_is_refused_in_every_process(tmp_path, case, sentence):
    for said in together(tmp_path, case):
        assert sentence in said["out"] and "\n" not in said["out"] and said["rows"] == []
