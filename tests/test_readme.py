"""The README says what is so: computed parts are computed again, its code runs, its figures are the recorded ones."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from lvlm_decode import catalogue

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.S)
    assert found, f"README.md has no block {name}"
    return found[1].strip()


def test_table_of_methods_is_the_registry():
    assert block("methods") == catalogue.markdown(), "run: lvlm-decode methods --markdown, and paste it into README.md"


def test_ci_runs_the_command_of_the_readme():
    command = block("test")
    assert "pytest" in command and "pip install" in command and "venv" in command
    script = (ROOT / ".ci" / "run").read_text()
    assert "<!-- test -->" in script, ".ci/run reads the command out of README.md"


def test_code_of_the_readme_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) > 5
    statements = [line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(statements) <= 12


def speed_table() -> str:
    """The table of speeds from the records of the speculative benchmark."""
    lines = ["| model | method | drafter | time per token | accepted per verification | answers that differ |"]
    lines.append("|---|---|---|---|---|---|")
    for model, record in (("LLaVA", "captions"), ("InstructBLIP", "captions-instructblip")):
        report = json.loads((ROOT / "benchmarks" / "speculative" / f"{record}.json").read_text(encoding="utf-8"))
        for method in ("plain", "vcd", "vcd+ritual"):
            for drafter in ("", "sequential", "automaton(shortest=1)", "vispec"):
                if method == "plain" and drafter in ("", "sequential"):
                    continue
                name = f"{method} | {drafter}" if drafter not in ("", "sequential") else f"{method} {drafter}".strip()
                arm = report["arms"][name]
                how = {"": "none, views stacked", "sequential": "none, a forward for each view"}.get(
                    drafter, f"`{drafter}`"
                )
                tau = f"{arm['speculation']['tau']:.1f}" if "speculation" in arm else ""
                cells = [model, method, how, f"{arm['vs_plain']:.2f}x", tau, str(report["mismatches"].get(name, ""))]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_speeds_of_the_readme_are_the_recorded_ones():
    assert speed_table() in block("measured"), "\n" + speed_table()
    record = json.loads((ROOT / "benchmarks" / "speculative" / "captions.json").read_text(encoding="utf-8"))
    assert f"VCD takes {record['arms']['vcd | vispec']['vs_plain']:.2f} of the time per token of plain" in README


def test_captions_of_the_readme_are_the_recorded_ones():
    folder = ROOT / "benchmarks" / "controllers"
    cells = json.loads((folder / "quality-tiny-llava-chair.json").read_text(encoding="utf-8"))
    share = {(cell["method"], cell["decoding"]): cell["summary"]["chair_s"] for cell in cells}
    text = " ".join(block("measured").split())
    assert f"in {100 * share['cntp', 'greedy']:.1f} % of the LLaVA's captions, greedy decoding in" in text
    assert f"greedy decoding in {100 * share['plain', 'greedy']:.1f} %" in text


def test_layout_of_the_readme_exists():
    for path in re.findall(r"^\| `([\w./-]+/?)` \|", README, re.M):
        if "/" in path:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
