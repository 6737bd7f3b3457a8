"""The background run on many scenes: stopped, continued, recorded; scenes beyond the shipped ones are held out too."""

import collections
import gzip
import importlib.util
import json
import sys

import pytest
from conftest import ROOT

import lvlm_decode_data
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.loaders import scene_source


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("methods_run", ROOT / "benchmarks" / "methods" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    script.main()


def test_stopped_continued_and_recorded(script, monkeypatch, tmp_path, capsys):
    common = ("--images", 16, "--methods", "vcd", "--benchmarks", "naturalbench", "--out", tmp_path / "out", "--seed")
    call(script, monkeypatch, *common, 0, 1, "--hours", 0)
    assert "the time is spent; the same command goes on" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no method is finished"):
        call(script, monkeypatch, *common, 0, 1, "--record", tmp_path)
    call(script, monkeypatch, *common, 0)
    assert "naturalbench: seeds [0] are there" in capsys.readouterr().out
    # The second seed was not asked, so what is recorded is the first.
    call(script, monkeypatch, *common, 0, 1, "--record", tmp_path)
    found = json.loads((tmp_path / "tiny-llava.json").read_text())
    assert found["seeds"] == {"naturalbench": [0]} and found["images"] == 16
    assert found["owed"] == [f"naturalbench: {method}, sample, seed 1" for method in ("plain", "mask", "vcd")]
    assert (
        found["cost"]["answers"] == sum(cell["summary"]["n"] for cell in found["cells"]) > 0 < found["cost"]["seconds"]
    )
    assert {cell["method"] for cell in found["cells"]} == {"plain", "mask", "vcd"}
    raw = [
        json.loads(line)
        for line in gzip.decompress((tmp_path / "tiny-llava.answers.jsonl.gz").read_bytes()).splitlines()
    ]
    assert [len(line[5]) for line in raw] == [cell["summary"]["n"] for cell in found["cells"]]
    shown = (tmp_path / "tiny-llava.md").read_text()
    assert "What it costs: method minus the plain model" in shown


def test_more_scenes_than_ship_are_rendered_from_their_seeds(script, tmp_path):
    found = script.scenes(502, tmp_path)
    assert [scene.image_id for scene in found[498:]] == [3000498, 3000499, 3000500, 3000501]
    assert found[501].path.is_file() and found[501].split == "heldout"
    assert found[501].objects == lvlm_decode_data.render(3000501)[1].objects


def test_few_questions_an_image_are_as_often_yes_as_no(script):
    source = scene_source(evaluator("pope"), lvlm_decode_data.load_scenes()[:12])
    for split, questions in source.splits.items():
        for number in (1, 2, 3, 6):
            kept = script.per_image(questions, number)
            labels = collections.Counter(question.label for question in kept)
            images = collections.Counter(question.image for question in kept)
            assert set(images.values()) == {number} and len(images) == len(questions) // 6, split
            assert abs(labels["yes"] - labels["no"]) <= 1
        assert script.per_image(questions, None) == list(questions)
