"""The command line as a user types it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import ROOT
from typer.testing import CliRunner

import lvlm_decode
import lvlm_decode_data
from lvlm_decode import catalogue, demo, marks
from lvlm_decode.checkpoints import CHECKPOINTS
from lvlm_decode.cli import app
from lvlm_decode.examples import EXAMPLES
from lvlm_decode.methods import METHODS
from lvlm_decode_evals.configs import table_path

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
    assert not any(p["required"] for p in vcd["parameters"])
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


def test_a_parameter_without_which_there_is_no_method_is_required():
    found = {name: [p["name"] for p in catalogue.describe(name)["parameters"] if p["required"]] for name in METHODS}
    needed = {"vti": ["vectors"], "nullu": ["vectors"], "revis": ["vectors"], "cicd": ["images"]}
    assert {name: own for name, own in found.items() if own} == needed
    text = call("methods", "vti").stdout
    assert "vectors (required)" in text and "vectors = None" not in text and "image = 0.0" in text


def test_what_a_method_requires_may_be_given_beside_it(tmp_path):
    pool = tmp_path / "pool"
    pool.mkdir()
    for scene in lvlm_decode_data.load_scenes()[40:42]:
        (pool / scene.path.name).write_bytes(scene.path.read_bytes())
    given = ("--method", "cicd", "-p", f"images={pool}", "-p", "alpha=1", "--no-do-sample", "--limit", 2)
    out = call("eval", "pope", *given, "--split", "random", "--out", tmp_path / "out").output
    assert "cicd" in out and {p.parent.parent.parent.name for p in (tmp_path / "out").rglob("answers.jsonl")} >= {
        "cicd"
    }


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
        (["scene:0", "--method", "vdc"], r"the nearest is 'vcd'"),
        (["scene:0", "--method", "vcd,ritual"], r"methods are added up with \+"),
        (["scene:0", "--method", "vcd", "--param", "alhpa=1"], r"no parameter alhpa; the nearest is 'alpha'"),
        (["scene:0", "--method", "vcd(alhpa=1)"], r"no parameter 'alhpa'.*the nearest is 'alpha'"),
        (["scene:0", "--temperature", "0.5"], r"--temperature needs --do-sample"),
        (["https://example.com/a.jpg"], r"is an address.*download it first"),
        (["."], r"is a folder"),
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


@pytest.mark.full
def test_demo_measures_and_writes_one_page(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CAPTION_SCENES", 6)
    monkeypatch.setattr(demo, "TIMED_ROUNDS", 1)
    page = tmp_path / "demo.html"
    out = call("demo", "--page", page, "--images", 4).stdout
    for word in ("POPE", "mask", "sample-t0.25", "vcd+ritual", "Time per token", "adversarial"):
        assert word in out
    html = page.read_text()
    shown = re.findall(r"<h3>(\d) of 6 scenes: .*?</h3>", html)
    assert html.count("data:image/jpeg;base64,") == len(shown) >= 2 and sum(map(int, shown)) <= 6
    assert '<mark class="false">' in html and re.search(
        r"With <b>vcd</b> \d+ % of the captions name something absent", html
    )
    assert not re.search(r"(src|href)=\"(?!data:)", html), "nothing is fetched"
    assert html.count("<ins>") > 1, (
        "words that the plain caption does not have are underlined, and not in the legend alone"
    )
    assert re.search(r"vcd</div><span style=\"width:[\d.]+%\"></span><b>\d\.\d\d×", html)


def test_what_a_scene_contradicts_is_marked():
    scene = lvlm_decode_data.load_scenes()[3]  # a cell phone, two clocks, a dog and a mouse at the top right
    text = "Three clocks and a red laptop on a desk. The mouse is at the top left of the image. A clock is at the top left."
    found = marks.pieces(text, scene, ("laptop",))
    assert "".join(piece for piece, _ in found) == text
    wrong = [(piece, kind) for piece, kind in found if kind]
    assert wrong == [("Three", "false"), ("laptop", "absent"), ("at the top left of the image", "false")]
    assert marks.bracketed(found).startswith("{Three} clocks and a red [laptop] on")
    assert marks.pieces(text, scene, ()) == marks.pieces(text, scene, ("zebra",))


def test_words_that_another_text_does_not_have_are_found():
    text, other = "The image shows two cats and a red dog.", "The image shows cats and a dog."
    flags = marks.changed(text, other)
    assert "".join(letter if flag else "." for letter, flag in zip(text, flags)).strip(".").split(".") == [
        "two",
        *[""] * (len(" cats and a ") - 1),
        "red",
    ]
    assert not any(marks.changed(other, other)) and all(marks.changed("zebra", "")) and marks.changed("", "a") == ()


def commands():
    """Every command by its full name, with click's command."""

    def below(group, prefix):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from below(command, f"{prefix}{name} ")
            else:
                yield f"{prefix}{name}", command

    return dict(below(typer.main.get_command(app), ""))


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_of_every_command_fits_80_columns_and_shows_examples(name):
    text = call(*name.split(), "-h").stdout
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text
    assert f"  lvlm-decode {name}" in text.partition("Examples:")[2]
    for option in commands()[name].params:
        assert option.help and option.help.rstrip().endswith("."), (name, option.name, option.help)
        assert option.help[0].isupper() or option.help.split()[0].rstrip(",:.") in LOWER, (name, option.help)


#: Words that begin a help text and keep their small letter: names that are typed as they are.
LOWER = {"tiny", "float32", "chair", "plain", "vcd", "recycling", "vispec", "i/n", "auto", "markdown"}


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_can_be_read(line):
    """Every option and argument of an example is one its command has."""
    words = shlex.split(line)[1:]
    (name,) = (n for n in commands() if words[: len(n.split())] == n.split())
    commands()[name].make_context(name, words[len(name.split()) :])


def test_alone_it_says_what_one_can_do():
    text = call().stdout
    assert all(
        f"lvlm-decode {name}" in text for name in ("demo", "generate", "methods", "models", "eval", "table", "doctor")
    )
    for line in re.findall(r"^  (lvlm-decode \S+)", text, re.M):
        assert line.split()[1] in commands(), line
    assert max(map(len, text.splitlines())) <= 80


def test_version():
    assert call("--version").stdout == call("-V").stdout == f"lvlm-decode {lvlm_decode.__version__}\n"


def test_exit_statuses_are_documented():
    text = call("--help").stdout
    assert all(re.search(rf"^ +{status}  ", text, re.M) for status in (0, 1, 2, 3, 130))
    assert call("generate", "--no-such-option", status=2)


def test_help_and_score_import_no_torch(tmp_path):
    """Counted in a fresh process; how long it takes is for a benchmark."""
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "answer": "Yes", "label": "yes"}\n')
    for arguments in (["--help"], [], ["models"], ["eval", "--help"], ["score", "pope", "a.jsonl"]):
        code = (
            "import sys\nfrom lvlm_decode.cli import app\n"
            f"try: app({arguments!r})\nexcept SystemExit as end: assert end.code == 0, end.code\n"
            "heavy = {'torch', 'transformers', 'torchvision', 'accelerate', 'matplotlib'} & set(sys.modules)\n"
            "assert not heavy, heavy\nprint(len(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stderr[-1000:])
        assert int(done.stdout.split()[-1]) < 1500, arguments


def test_python_m_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lvlm_decode", "--version"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"lvlm-decode {lvlm_decode.__version__}\n"


def test_models_lists_families_with_hub_ids():
    text = call("models").stdout
    for kind, ids in CHECKPOINTS.items():
        assert re.search(rf"^{kind} +{re.escape(ids[0])}$", text, re.M)
    assert json.loads(call("models", "--json").stdout) == {kind: list(ids) for kind, ids in CHECKPOINTS.items()}


def test_tables_of_papers_are_listed_and_found_by_name(tmp_path, monkeypatch):
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    listed = call("table", "--list").stdout
    assert {line.split()[0] for line in listed.splitlines()} == names
    monkeypatch.chdir(tmp_path)
    assert table_path(Path("pope-vcd-llava-1.5")).samefile(ROOT / "configs" / "pope-vcd-llava-1.5.yaml")
    assert "the nearest is 'pope-vcd-llava-1.5'" in call("table", "pope-vdc-llava-1.5", status=1).stderr
    assert "--list shows those" in call("table", status=1).stderr


def test_one_method_in_full():
    text = call("methods", "vcd").stdout
    for word in ("arXiv 2311.16922", "noise_step = 500", "a vision pass", "cd_alpha for alpha"):
        assert word in text
    assert "the nearest is 'vcd'" in call("methods", "vdc", status=1).stderr


def test_generate_shows_plain_beside_the_method_and_marks_absent_objects():
    text = call("generate", "scene:12").stdout
    plain, vcd, truth = text.splitlines()
    assert plain.startswith("plain: ") and "[couch]" in plain
    assert vcd.startswith("vcd: ") and "[" not in vcd
    # There are two cats.
    assert "{three} cats" in plain and "{three} cats" in vcd
    assert re.match(r"In the picture: cat \(\d\), tv \(1\)\.", truth)


def test_generate_says_that_the_small_model_knows_no_photographs(tmp_path):
    path = lvlm_decode_data.load_scenes()[12].path
    (tmp_path / "photo.jpg").write_bytes(path.read_bytes())
    result = call("generate", tmp_path / "photo.jpg", "--method", "plain", "--max-new-tokens", 4)
    assert "toy model trained on emoji scenes" in result.stderr and "In the picture" not in result.stdout
    assert "toy" not in call("generate", "scene:12", "--method", "plain", "--max-new-tokens", 4).stderr


def test_help_lists_every_command():
    text = call("--help").stdout
    for command in ("demo", "methods", "generate", "eval", "score", "table", "bench", "train"):
        assert re.search(rf"\b{command}\b", text), command
