"""A user's own pictures end in a result: what is lacking is asked for before a model is loaded, scoring locks nothing."""

import inspect
import json
import re

import pytest
from PIL import Image
from runs import SAMPLE, cli, files_of, make_run

from lvlm_decode.errors import EvalError, SettingsError
from lvlm_decode_evals import commands, evaluator
from lvlm_decode_evals.api import check_folder, prepare
from lvlm_decode_evals.base import Question
from lvlm_decode_evals.plan import GREEDY, cells, check_without


@pytest.fixture
def pictures(tmp_path):
    """A list of three own pictures, their folder, and what they contain."""
    folder = tmp_path / "images"
    folder.mkdir()
    names = ("holiday.png", "garden.png", "IMG 7.png")
    for i, name in enumerate(names):
        Image.new("RGB", (60, 60), (80 * i, 90, 160)).save(folder / name)
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"image_id": name, "image": name}) + "\n" for name in names))
    objects = tmp_path / "objects.json"
    objects.write_text(json.dumps({name: ["dog", "person"] for name in names}))
    return file, folder, objects


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr("lvlm_decode_evals.runner.load", lambda *a, **k: pytest.fail("a model was loaded"))


def asked(pictures, out, *more):
    file, folder, _ = pictures
    return cli("eval", "chair", "--questions", file, "--images", folder, "--out", out, "--no-do-sample", *more)


def test_what_scoring_needs_is_asked_before_a_model_is_loaded(pictures, no_model, tmp_path):
    done = asked(pictures, tmp_path / "out")
    assert done.exit_code == 1 and "3 of 3 images are unknown (the first is holiday.png)" in done.output
    assert not (tmp_path / "out").exists()
    named = set(re.findall(r"--[a-z-]+", done.output))
    options = {f"--{name.replace('_', '-')}" for name in inspect.signature(commands.eval_command).parameters}
    assert named >= {"--objects", "--vocabulary"} and named <= options


def test_objects_of_some_pictures_only_are_not_enough(pictures, no_model, tmp_path):
    pictures[2].write_text(json.dumps({"holiday.png": ["dog"], "garden.png": ["dog"]}))
    done = asked(pictures, tmp_path / "out", "--objects", pictures[2])
    assert done.exit_code == 1 and "1 of 3 images are unknown (the first is IMG 7.png)" in done.output


def test_names_that_no_vocabulary_knows_are_refused_before_a_model_is_loaded(pictures, no_model, tmp_path):
    pictures[2].write_text(json.dumps({"holiday.png": ["unicorn"]}))
    done = asked(pictures, tmp_path / "out", "--objects", pictures[2])
    assert done.exit_code == 1 and "unicorn" in done.output and "--vocabulary" in done.output


def test_own_pictures_end_in_a_table_and_can_be_scored_in_another_way(pictures, tmp_path):
    out, objects = tmp_path / "out", pictures[2]
    done = asked(pictures, out, "--objects", objects, "--max-new-tokens", "12")
    assert done.exit_code == 0 and "CHAIRs" in done.stdout, done.output
    answers = next(out.rglob("answers.jsonl")).read_bytes()
    other = tmp_path / "other.json"
    other.write_text(json.dumps({name: [] for name in json.loads(objects.read_text())}))
    # Nothing is asked again, and no option of scoring is a reason to refuse the folder.
    again = asked(pictures, out, "--objects", other, "--max-new-tokens", "12")
    assert again.exit_code == 0 and again.stdout != done.stdout
    assert next(out.rglob("answers.jsonl")).read_bytes() == answers
    for command in ("score", "table"):
        first, second = (cli(command, out, "--objects", file) for file in (objects, other))
        assert first.exit_code == second.exit_code == 0 and first.stdout != second.stdout
    # The newest options are those of the folder.
    assert str(objects) not in next(out.rglob("settings.json")).read_text()


def test_labels_that_a_question_file_lacks_are_asked_before_a_model_is_loaded(no_model):
    with pytest.raises(EvalError, match="label"):
        prepare("pope", questions=[Question(1, "Is it?", "a.png")], images=".")


@pytest.mark.parametrize("name", ["mmhal", "vallu"])
def test_judged_benchmarks_need_no_judge_to_be_asked(name):
    evaluator(name).ready([Question(1, "What is it?", "a.png", "a dog", meta={"contents": "dog"})])


# --- checks before work


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("eval", ("--out", "FILE")),
        ("eval", ("--out", "FILE/below")),
        ("eval", ("--limit", "0")),
        ("eval", ("--without", "sample")),
        ("eval", ("--split", "hard")),
        ("table", ("--plot", "FILE")),
        ("score", ("--rows", "nowhere/rows.jsonl")),
        ("score", ("--rows", "FOLDER")),
    ],
)
def test_output_and_options_are_checked_before_work_begins(command, more, no_model, tmp_path, monkeypatch):
    monkeypatch.setattr("lvlm_decode_evals.api.read_cell", lambda *a, **k: pytest.fail("scored"))
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", questions=12)
    answers = next((tmp_path / "run").rglob("answers.jsonl"))
    before = files_of(tmp_path)
    target = {"eval": ("pope",), "table": (tmp_path / "run",), "score": ("pope", answers)}[command]
    done = cli(command, *target, *more)
    assert done.exit_code == 1 and done.output.count("\n") == 1 and done.output.startswith("error: "), done.output
    assert files_of(tmp_path) == before


def test_a_folder_to_write_may_be_made_later_but_not_below_a_file(tmp_path):
    check_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="is a file, so nothing can be written below it"):
        check_folder(tmp_path / "file" / "a")


# --- cost, and controls left out


def test_the_cost_is_said_before_and_after_the_first_batch(model_folder, tmp_path):
    arguments = ("eval", "pope", "--model", model_folder, "--method", "vcd", "--split", "random", "--limit", "8",
                 "--batch-size", "4", "--out", tmp_path)  # fmt: skip
    told = cli(*arguments).stderr
    assert "32 answers in 4 arms (plain greedy, plain sample, mask sample, vcd sample)" in told
    assert "controls are left out by --without NAME" in told
    assert re.search(r"About \d+ (seconds|minutes) more at the speed of the first batch", told)
    assert "32 are there already" in (again := cli(*arguments).stderr) and "About" not in again


def test_controls_are_left_out_by_name():
    pairs = [("vcd", SAMPLE)]
    ran = [(c.method, c.decoding.name) for c in cells(["x"], pairs, [0], ["mask", "plain greedy"])]
    assert ran == [("plain", "sample"), ("vcd", "sample")]
    assert {c.method for c in cells(["x"], [("vcd(beta=0.2)", SAMPLE)], [0], ["mask"])} == {"plain", "vcd(beta=0.2)"}
    # A method that was asked for stays.
    assert [c.method for c in cells(["x"], [("plain", GREEDY), ("vcd", GREEDY)], [0], ["plain"])] == ["plain", "vcd"]
    with pytest.raises(
        SettingsError, match="--without maks names no control of vcd; controls: plain greedy, plain sample, mask"
    ):
        check_without(["maks"], pairs)


def test_a_run_without_a_control_says_so_in_its_table(model_folder, tmp_path):
    done = cli("eval", "pope", "--model", model_folder, "--method", "vcd", "--split", "random", "--limit", "4",
               "--without", "mask", "--out", tmp_path)  # fmt: skip
    assert done.exit_code == 0 and "12 answers in 3 arms" in done.stderr
    assert "vcd, sample lacks its matched controls mask, sample" in done.stdout and "| mask" not in done.stdout


def test_answers_that_wait_for_a_judge_are_kept_and_said_to_be(model_folder, tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.jpg")
    record = {"question_type": "attribute", "question_topic": "x", "image_id": "a", "image_src": "a.jpg",
              "image_content": ["dog"], "question": "What is it?", "gt_answer": "A dog.", "model_answer": ""}  # fmt: skip
    (tmp_path / "q.json").write_text(json.dumps([record]))
    done = cli("eval", "mmhal", "--model", model_folder, "--questions", tmp_path / "q.json", "--images", tmp_path,
               "--no-do-sample", "--max-new-tokens", "4", "--out", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 1 and "The answers are all in" in done.stderr and "graded by a judge" in done.stderr
    assert next((tmp_path / "out").rglob("answers.jsonl")).read_bytes().count(b"\n") == 1


def test_an_error_of_the_file_system_is_one_sentence_too(tmp_path, monkeypatch):
    def refuse(*arguments, **how):
        raise PermissionError(13, "Permission denied", "answers.jsonl")

    monkeypatch.setattr("lvlm_decode_evals.api.found_cells", refuse)
    done = cli("table", tmp_path)
    assert done.exit_code == 1 and done.output == "error: answers.jsonl cannot be used (Permission denied).\n"
