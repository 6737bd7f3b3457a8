"""One bad sample never ends a run; nothing outside the images' folder is read; no code of a checkpoint is run."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, shared_path
from helpers import full_but
from PIL import Image
from runs import BATCH, SAMPLE, cell_folder, cli, files_of, run_of
from safetensors.torch import save_file

from lvlm_decode.errors import EvalError, MissingFileError, OutsideError, UnsupportedError
from lvlm_decode_evals.answers import resume_answers
from lvlm_decode_evals.loaders import folder_images
from lvlm_decode_evals.plan import GREEDY, Cell
from lvlm_decode_evals.runner import EvaluationRun, Options, load

PLAIN = [("plain", GREEDY)]


def write_questions(path, names):
    lines = [
        {"question_id": i, "image": name, "text": "Is there a dog in the image?", "label": "no"}
        for i, name in enumerate(names)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (60, 60), (90, 160, 90)).save(folder / "fine.jpg")
    return folder


def run(tmp_path, images, names, *more):
    file = write_questions(tmp_path / "q.jsonl", names)
    out = tmp_path / "out"
    done = cli("eval", "pope", "--questions", file, "--images", images, "--out", out, "--no-do-sample", *more)
    path = Cell("q", "plain", GREEDY, 0).folder(out, "pope") / "answers.jsonl"
    return done, resume_answers(path) if path.exists() else []


def test_pictures_that_make_a_decoder_fail_in_any_way_cost_nobody_else_the_answer(tmp_path, images):
    shutil.copy(shared_path("cases/images/bad.avif"), images / "bad.avif")
    (images / "bad.dds").write_bytes(b"DDS " + (124).to_bytes(4, "little") + bytes(120))
    long = "a" * 300 + ".jpg"
    done, answers = run(tmp_path, images, ["fine.jpg", "bad.avif", "bad.dds", long, "nul\0.jpg", "fine.jpg"])
    assert done.exit_code == 3, done.output
    assert [answer.error is None for answer in answers] == [True, False, False, False, False, True]
    assert "4 questions that could not be asked or scored (left out): 1, 2, 3, 4." in done.output
    assert "Left out, 1: image" in done.output and "bad.avif" in done.output and "Traceback" not in done.output


@pytest.mark.parametrize(
    "error",
    full_but(
        [RuntimeError, KeyError, MemoryError, RecursionError, AssertionError, torch.OutOfMemoryError],
        [KeyError, torch.OutOfMemoryError],
    ),
)
@pytest.mark.parametrize("step", ["_inputs", "generate"])
def test_whatever_one_sample_raises_is_its_own_error(loaded, source, finished, tmp_path, monkeypatch, error, step):
    bad = source.splits["adversarial"][5].id
    name = "_inputs" if step == "_inputs" else "_generate"
    original = getattr(EvaluationRun, name)

    def picky(self, *arguments):
        questions = next(a for a in arguments if isinstance(a, list))
        if any(question.id == bad for question in questions):
            raise error("odd")
        return original(self, *arguments)

    monkeypatch.setattr(EvaluationRun, name, picky)
    results = run_of(loaded, source, tmp_path, methods=PLAIN).execute()
    assert [result.audit.failed for result in results] == [(str(bad),)]
    path = cell_folder("", "plain", GREEDY) / "answers.jsonl"
    assert "odd" in resume_answers(tmp_path / path)[5].error
    monkeypatch.undo()
    run_of(loaded, source, tmp_path, methods=PLAIN).execute()
    assert (tmp_path / path).read_bytes() == (finished / path).read_bytes()


@pytest.mark.full
def test_out_of_memory_makes_an_automatic_batch_smaller_before_it_is_a_sample_s_error(
    loaded, source, tmp_path, monkeypatch
):
    bad, generate, sizes = source.splits["adversarial"][5].id, EvaluationRun._generate, []

    def small_card(self, cell, questions, images):
        sizes.append(len(questions))
        if len(questions) > 8 or any(question.id == bad for question in questions):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(self, cell, questions, images)

    monkeypatch.setattr(EvaluationRun, "_generate", small_card)
    (result,) = run_of(loaded, source, tmp_path, methods=PLAIN, options=Options(batch_size="auto")).execute()
    assert result.audit.failed == (str(bad),) and sizes[0] > 8 and len(result.rows) == 19


def test_what_no_sample_can_be_asked_with_ends_the_run_at_once(loaded, source, tmp_path, monkeypatch):
    asked = []

    def refuse(self, cell, questions, images):
        asked.append(len(questions))
        raise UnsupportedError("this vision tower has no CLS token")

    monkeypatch.setattr(EvaluationRun, "_generate", refuse)
    with pytest.raises(UnsupportedError, match="no CLS token"):
        run_of(loaded, source, tmp_path, methods=PLAIN).execute()
    assert asked == [BATCH, *[1] * BATCH]


def test_a_lost_device_ends_the_run_in_one_sentence_and_the_sample_is_asked_last(
    loaded, source, finished, tmp_path, monkeypatch
):
    bad, generate, order = source.splits["adversarial"][5].id, EvaluationRun._generate, []

    def fragile(self, cell, questions, images):
        order.extend(question.id for question in questions)
        if any(question.id == bad for question in questions):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return generate(self, cell, questions, images)

    monkeypatch.setattr(EvaluationRun, "_generate", fragile)
    with pytest.raises(EvalError, match=r"cannot be used any more after question .* start again"):
        run_of(loaded, source, tmp_path, methods=PLAIN).execute()
    assert len(set(order)) < 20
    order.clear()
    with pytest.raises(EvalError, match="cannot be used any more"):
        run_of(loaded, source, tmp_path, methods=PLAIN).execute()
    # Everything else was answered before the bad batch came again.
    assert order[-1] == bad or bad in order[-BATCH:]
    monkeypatch.undo()
    run_of(loaded, source, tmp_path, methods=PLAIN).execute()
    path = cell_folder("", "plain", GREEDY) / "answers.jsonl"
    assert (tmp_path / path).read_bytes() == (finished / path).read_bytes()


# --- only inside


def leading_out(tmp_path, images):
    secret = tmp_path / "secret"
    secret.mkdir()
    Image.new("RGB", (60, 60)).save(secret / "s.png")
    (images / "link.png").symlink_to(secret / "s.png")
    (images / "folder").symlink_to(secret)
    return ["../secret/s.png", str(secret / "s.png"), "link.png", "folder/s.png", "../images/../secret/s.png"]


def test_images_outside_the_folder_are_refused_and_the_option_is_named(tmp_path, images):
    names = leading_out(tmp_path, images)
    done, answers = run(tmp_path, images, [*names, "fine.jpg"])
    assert done.exit_code == 3
    assert [answer.error is None for answer in answers] == [False] * 5 + [True]
    assert "image '../secret/s.png' leads out of" in done.output and "--allow-outside lets it be read" in done.output
    again, answers = run(tmp_path, images, [*names, "fine.jpg"], "--allow-outside")
    assert again.exit_code == 0 and all(answer.error is None for answer in answers)


def test_a_name_outside_does_not_tell_whether_the_file_exists(tmp_path, images):
    opened = folder_images(images)
    for name in ("/etc/passwd", "/no/such/file", "../nothing.png"):
        with pytest.raises(OutsideError, match="leads out of"):
            opened.open(name)
    assert opened.open("fine.jpg").size == opened.open("../images/fine.jpg").size == (60, 60)


def test_a_folder_of_images_may_itself_be_a_link(tmp_path, images):
    (tmp_path / "link").symlink_to(images)
    assert folder_images(tmp_path / "link").open("fine.jpg").size == (60, 60)


@pytest.fixture
def checkpoint(tmp_path, model_folder):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    return folder


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.full
def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(checkpoint, tmp_path):
    (checkpoint / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change(
        checkpoint / "config.json", model_type="mine", auto_map={"AutoConfig": "modeling.C", "AutoModel": "modeling.M"}
    )
    done = subprocess.run(
        [sys.executable, "-m", "lvlm_decode_evals.run", "pope", "--model", str(checkpoint), "--limit", "1", "--out",
         str(tmp_path / "out")], cwd=ROOT, input="y\n", capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 1 and "config.json wants code of the checkpoint to be run" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr and not (tmp_path / "ran").exists()


def test_weights_come_from_safetensors_only(checkpoint):
    weights = next(checkpoint.glob("*.safetensors"))
    torch.save({}, checkpoint / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(MissingFileError, match=r"pytorch_model\.bin is a pickle.*convert it to safetensors"):
        load(str(checkpoint))


@pytest.mark.parametrize("what", ["cut", "empty", "config", "processor", "list", "sizes", "header"])
def test_a_broken_checkpoint_is_one_sentence_that_names_the_file(checkpoint, what):
    weights, config = next(checkpoint.glob("*.safetensors")), checkpoint / "config.json"
    named = weights.name
    if what == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "empty":
        weights.write_bytes(b"")
    elif what == "header":
        weights.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    elif what == "sizes":
        save_file({"model.language_model.norm.weight": torch.zeros(3)}, str(weights))
        named = "model"
    elif what == "config":
        config.write_text(config.read_text()[:-20])
        named = "config.json"
    elif what == "list":
        config.write_text("[]")
        named = "config.json"
    else:
        path = checkpoint / "processor_config.json"
        path.write_text("{")
        named = path.name
    with pytest.raises(EvalError, match=named) as refused:
        load(str(checkpoint))
    assert "\n" not in str(refused.value)


@pytest.mark.full
def test_a_sampling_cell_is_unharmed_by_a_bad_sample_too(loaded, source, finished, tmp_path, monkeypatch):
    """Asked alone, its neighbours in the batch draw what they draw beside it."""
    bad, generate = source.splits["adversarial"][5].id, EvaluationRun._generate

    def picky(self, cell, questions, images):
        if any(question.id == bad for question in questions):
            raise RuntimeError("odd")
        return generate(self, cell, questions, images)

    monkeypatch.setattr(EvaluationRun, "_generate", picky)
    run_of(loaded, source, tmp_path).execute()
    path = cell_folder("", "vcd", SAMPLE) / "answers.jsonl"
    ours, theirs = (resume_answers(folder / path) for folder in (tmp_path, finished))
    assert [a for a in ours if a.question_id != bad] == [a for a in theirs if a.question_id != bad]
    monkeypatch.undo()
    run_of(loaded, source, tmp_path).execute()
    assert files_of(tmp_path) == files_of(finished)


def test_large_checkpoints_of_one_name_are_told_apart_without_reading_all_of_them(tmp_path, monkeypatch):
    from lvlm_decode_evals import runner

    monkeypatch.setattr(runner, "HASHED_BYTES", 10)
    found = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        weights = torch.zeros(300_000)
        weights[250_000] = number // 2
        save_file({"w": weights}, str(folder / "model.safetensors"))
        found.append(runner._weights(folder, None))
    assert found[0] == found[1] != found[2]
