"""The command line as a user types it."""

import json
import re

import pytest
from typer.testing import CliRunner

import lvlm_decode_data
from lvlm_decode import catalogue, demo
from lvlm_decode.cli import app
from lvlm_decode.methods import METHODS

runner = CliRunner()


def call(*arguments, status=0):
    result = runner.invoke(app, list(map(str, arguments)))
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_methods_as_json_names_every_registered_method():
    found = json.loads(call("methods", "--json").stdout)
    assert [method["name"] for method in found] == list(METHODS)
    for method in found:
        assert method["paper"] and method["summary"], method["name"]
        assert method["costs"] or method["name"] in ("plain", "mask"), method["name"]
        for why in method["refuses"].values():
            assert len(why) > 20, (method["name"], why)
    vcd = next(method for method in found if method["name"] == "vcd")
    assert {p["name"]: p["default"] for p in vcd["parameters"]} == {
        "alpha": 1.0,
        "beta": 0.1,
        "noise_step": 500,
        "schedule": "code",
    }
    assert vcd["aliases"] == {"cd_alpha": "alpha", "cd_beta": "beta"}


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_says_what_it_is(name):
    """Whatever stands in a public signature is explained where it stands."""
    method = catalogue.describe(name)
    silent = [p["name"] for p in method["parameters"] if not p["description"]]
    assert silent == [], silent


def test_methods_for_people():
    text = call("methods").stdout
    assert all(re.search(rf"^{re.escape(name)}  ", text, re.M) for name in METHODS)


def test_generate_answers_and_parameters_matter(tmp_path):
    answers = {}
    for method in ("plain", "vcd(alpha=0,beta=null)", "vcd+ritual"):
        line = call("generate", "scene:1", "--method", method, "--json", "--max-new-tokens", 24).stdout
        answers[method] = json.loads(line)["answer"]
    assert answers["plain"] == answers["vcd(alpha=0,beta=null)"]
    assert len(answers["plain"].split()) > 5


def test_generate_sampled_with_a_seed_repeats_itself():
    lines = [
        call("generate", "scene:1", "--do-sample", "--seed", seed, "--max-new-tokens", 24, "--json").stdout
        for seed in (1, 1, 2)
    ]
    assert lines[0] == lines[1] != lines[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scene:0", "--method", "vdc"], r"unknown method 'vdc'; known methods: plain, mask, vcd"),
        (["scene:0", "--method", "vcd", "--param", "gamma=1"], r"vcd has no parameter gamma"),
        (["scene:0", "--method", "vcd(beta=0)"], r"vcd: beta = 0 is not valid; it must be in \(0, 1\]"),
        (["scene:0", "--method", "vcd(beta=1.5)"], r"vcd: beta = 1.5 is not valid"),
        (["scene:0", "--method", "vcd(alpha=-1)"], r"vcd: alpha = -1 is not valid; it must be at least 0"),
        (["scene:0", "--method", "vcd(alpha=1"], r"a closing parenthesis is missing"),
        (["scene:0", "--method", "vcd+vcd"], r"vcd is added to itself"),
        (["scene:99999"], r"there is no scene:99999; scenes are scene:0 to"),
        (["missing.jpg"], r"missing\.jpg"),
        (["broken.jpg"], r"broken\.jpg"),
        (["scene:0", "--model", "no-such-folder"], r"model 'no-such-folder' cannot be loaded"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    result = call("generate", *arguments, status=1)
    assert re.search(said, result.stderr), result.stderr
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_demo_measures_and_writes_one_page(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CAPTION_SCENES", 6)
    monkeypatch.setattr(demo, "TIMED_ROUNDS", 1)
    page = tmp_path / "demo.html"
    out = call("demo", "--page", page, "--images", 4).stdout
    for word in ("POPE", "mask", "sample-t0.25", "vcd+ritual", "Time per token", "adversarial"):
        assert word in out
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", html), "nothing is fetched"
    assert re.search(r"vcd</div><span style=\"width:[\d.]+%\"></span><b>\d\.\d\d×", html)


def test_hallucinated_words_are_marked():
    words = lvlm_decode_data.synonyms()
    pieces = demo.mark("A dog and two sports balls near a hot dog.", ("sports ball", "dog"), words)
    assert "".join(text for text, _ in pieces) == "A dog and two sports balls near a hot dog."
    assert ("sports balls", True) in pieces and ("dog", True) in pieces


def test_help_lists_every_command():
    text = call("--help").stdout
    for command in ("demo", "methods", "generate", "eval", "score", "table", "bench", "train"):
        assert re.search(rf"\b{command}\b", text), command
