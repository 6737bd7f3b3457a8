"""The scripts of ``tools/``: they stay out of the wheel, and the matrix counts what pytest reports."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from tools import compatibility

RECORD = {
    "versions": {"transformers": "5.18.0", "torch": "2.14.1"},
    "parts": {
        "engine": {"passed": 3, "failed": ["tests.test_x::test_y"], "skipped": {"no peft": 2}, "seconds": 7},
        "contract": {"passed": 5, "failed": [], "skipped": {}, "seconds": 4},
    },
}


def test_table_and_notes_say_what_passed_failed_and_was_skipped(tmp_path):
    assert compatibility.table([RECORD]).splitlines()[-1] == "| 5.18.0 | 2.14.1 | 3 (2 skipped) | 5 | 1 | 11 |"
    assert compatibility.notes([RECORD]).splitlines() == [
        "- 5.18.0: FAILED tests.test_x::test_y",
        "- 5.18.0: 2 skipped: no peft",
    ]
    (tmp_path / "README.md").write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    compatibility.write(tmp_path, [RECORD])
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert json.loads((tmp_path / "results.json").read_text()) == [RECORD]


def test_counts_are_those_of_pytest(tmp_path, monkeypatch):
    case = tmp_path / "test_three.py"
    case.write_text(
        "import pytest\n\ndef test_good(): pass\ndef test_bad(): assert False\n"
        "@pytest.mark.skip(reason='why')\ndef test_left(): pass\n"
    )
    arguments = [str(case), "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    counts = compatibility.tests(arguments, compatibility.environment_with([]), 0)
    assert (counts["passed"], counts["skipped"]) == (1, {"why": 1})
    assert [name.split("::")[1] for name in counts["failed"]] == ["test_bad"]


@pytest.mark.full
def test_another_release_comes_before_the_environments(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    environment = compatibility.environment_with([tmp_path])
    assert compatibility.imported(environment)["transformers"] == "0.0.1"
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('broken release')\n")
    with pytest.raises(RuntimeError, match="broken release"):
        compatibility.imported(environment)


def test_the_small_models_command_names_its_commands():
    done = subprocess.run(
        [sys.executable, "-m", "tools.small_models", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert all(name in done.stdout for name in ("tiny-llava", "tiny-instructblip", "check"))
