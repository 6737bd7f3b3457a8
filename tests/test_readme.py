"""The README says what is so: computed parts are computed again, its code runs, its figures are the recorded ones."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import lvlm_decode_data
from lvlm_decode import catalogue, checkpoints, demo, marks
from lvlm_decode.families import FAMILIES
from lvlm_decode_evals.runner import load

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.S)
    assert found, f"README.md has no block {name}"
    return found[1].strip()


def test_readme_is_short():
    assert len(README.encode()) <= 10_200


def test_list_of_models_names_every_family():
    assert set(checkpoints.CHECKPOINTS) == set(FAMILIES)
    assert block("models") == checkpoints.markdown(), (
        "run: python -c 'from lvlm_decode import checkpoints as c; print(c.markdown())'"
    )
    assert all(
        ids and all(re.fullmatch(r"[\w-]+/[\w.-]+", name) for name in ids) for ids in checkpoints.CHECKPOINTS.values()
    )


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
    printed = re.search(r"```text\n(.*?)```", block("printed"), re.S)[1]
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == printed.splitlines()
    assert "couch" in printed.splitlines()[0] and "couch" not in printed.splitlines()[1]
    assert "couch" not in lvlm_decode_data.load_scenes()[12].categories
    statements = [line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(statements) <= 12


#: The arms of the speculative benchmark that the README shows: method, drafter in the record, drafter in words.
SPEEDS = [
    ("plain", "vispec", "`vispec`"),
    ("vcd", "sequential", "none, a forward for each view"),
    ("vcd", "", "none, views stacked"),
    ("vcd", "vispec", "`vispec`"),
    ("vcd+ritual", "vispec", "`vispec`"),
]


def speed_table() -> str:
    """The table of speeds from the records of the speculative benchmark."""
    record = json.loads((ROOT / "benchmarks" / "speculative" / "captions.json").read_text(encoding="utf-8"))
    lines = ["| method | drafter | time per token |", "|---|---|---|"]
    for method, drafter, words in SPEEDS:
        name = f"{method} {drafter}".strip() if drafter in ("", "sequential") else f"{method} | {drafter}"
        assert record["mismatches"].get(name, 0) == 0, name
        lines.append(f"| {method} | {words} | {record['arms'][name]['vs_plain']:.2f}x |")
    return "\n".join(lines)


def test_speeds_of_the_readme_are_the_recorded_ones():
    assert speed_table() in block("measured"), "\n" + speed_table()
    record = json.loads((ROOT / "benchmarks" / "speculative" / "captions.json").read_text(encoding="utf-8"))
    assert f"VCD takes {record['arms']['vcd | vispec']['vs_plain']:.2f} of the time per token of plain" in README


def test_accuracy_of_the_readme_is_the_recorded_one():
    facts = json.loads((ROOT / "benchmarks" / "tiny-models" / "tiny-llava.json").read_text(encoding="utf-8"))
    text = " ".join(block("measured").split())
    for split in ("random", "popular", "adversarial"):
        assert f"{100 * facts['pope']['greedy'][split]['accuracy']:.1f} % ({split})" in text, split


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


@pytest.mark.full
def test_captions_of_the_demo_are_what_the_model_says():
    """The page of the demo and the README's figures on 32 scenes, computed again."""
    page = " ".join((ROOT / "docs" / "demo.md").read_text(encoding="utf-8").split())
    scenes = lvlm_decode_data.load_scenes()[: demo.CAPTION_SCENES]
    pictures, rates = demo.captions(load("tiny"), scenes, 0)
    for picture in pictures:
        assert f"{picture.title} {picture.path.name}: {', '.join(picture.truth)}" in page
        for caption in picture.captions:
            said = marks.bracketed(caption.pieces)
            assert f"{caption.method} {' '.join(said.split())}" in page, caption.method
    shares = ", ".join(f"{name} {100 * rate['chair_s']:.0f} %" for name, rate in rates.items())
    assert f"that name something absent (greedy): {shares}" in page
    vcd, plain = rates["vcd"], rates["plain"]
    text = " ".join(README.split())
    wrong = [f"{rate['hallucinated_captions']:.0f}" for rate in (plain, vcd)]
    assert (
        f"of the first {len(scenes)} scenes plain captions name something absent in {wrong[0]} and VCD in {wrong[1]}"
        in text
    )
    assert f"({vcd['recalled']:.0f} of {vcd['gt_objects']:.0f} against {plain['recalled']:.0f})" in text
