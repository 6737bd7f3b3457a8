"""The runner: keyed answers, resume after a kill, shards and processes end with the files of one uninterrupted run."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from helpers import full_but
from PIL import Image
from runs import BATCH, SAMPLE, cell_folder, cli, files_of, make_run, run_of

import lvlm_decode
import lvlm_decode_data
from lvlm_decode.engine import vectors
from lvlm_decode.errors import EvalError, MissingFileError, SettingsError
from lvlm_decode_evals import EVALUATORS, evaluator
from lvlm_decode_evals.answers import append_answers, line_of, resume_answers
from lvlm_decode_evals.base import Answer, Question
from lvlm_decode_evals.loaders import Source, file_source, folder_images, scene_source
from lvlm_decode_evals.plan import (
    GREEDY,
    Cell,
    Decoding,
    Settings,
    cells,
    claim,
    controls,
    found_cells,
    read_cell,
    slug,
    write_questions,
)
from lvlm_decode_evals.pope import Pope
from lvlm_decode_evals.runner import (
    EvaluationRun,
    Options,
    Share,
    batches_of,
    check_parameters,
    decoding_for,
    load,
    new_tokens,
    token_counts,
)
from lvlm_decode_evals.tables import blocks, gather, render

# --- the plan


def test_controls_always_come_along():
    assert controls("vcd", SAMPLE) == [("plain", GREEDY), ("plain", SAMPLE), ("mask", SAMPLE)]
    sharp = ("mask", Decoding(do_sample=True, temperature=0.25))
    assert controls("vcd(alpha=0.5)+ritual", SAMPLE)[-1] == sharp
    assert controls("ritual", SAMPLE)[-1] == sharp
    assert controls("vcd", GREEDY) == [("plain", GREEDY)]
    assert controls("deco", Decoding(num_beams=3)) == [("plain", GREEDY), ("plain", Decoding(num_beams=3))]
    assert controls("opera", GREEDY) == [("plain", GREEDY), ("plain", Decoding(num_beams=5))]
    assert controls("opera(num_beams=4)", GREEDY)[-1] == ("plain", Decoding(num_beams=4))
    assert controls("plain", GREEDY) == []
    # DCD must beat its projector of the preferred answers alone.
    assert controls("dcd", GREEDY) == [("plain", GREEDY), ("dcd(alpha=0)", GREEDY)]
    assert controls("dcd(positive=p/q,alpha=0.5,beta=0.2)", SAMPLE)[-1] == (
        "dcd(alpha=0,positive=p/q,beta=0.2)",
        SAMPLE,
    )
    assert controls("dcd(alpha=0,beta=0.2)", GREEDY) == [("plain", GREEDY)]


def test_cells_are_controls_first_and_greedy_plain_has_one_seed():
    plan = cells(["a", "b"], [("vcd", SAMPLE)], [0, 1])
    assert [c.method for c in plan[:2]] == ["plain", "plain"] and plan[0].decoding == GREEDY
    assert sum(c.method == "plain" and c.decoding == GREEDY for c in plan) == 2
    assert sum(c.method == "vcd" for c in plan) == 4
    assert len(set(plan)) == len(plan)


def test_decodings_have_unique_names_and_sane_ranges():
    different = [
        GREEDY,
        SAMPLE,
        Decoding(True, 0.25),
        Decoding(True, top_p=0.9),
        Decoding(True, top_k=50),
        Decoding(num_beams=5),
    ]
    assert [d.name for d in different] == ["greedy", "sample", "sample-t0.25", "sample-p0.9", "sample-k50", "beam5"]
    assert SAMPLE.arguments()["top_k"] == 0  # Hugging Face's default of 50 would not be the model's distribution
    for wrong in (
        {"do_sample": True, "temperature": 0},
        {"num_beams": 0},
        {"top_p": 1.5},
        {"do_sample": True, "num_beams": 2},
    ):
        with pytest.raises(SettingsError):
            Decoding(**wrong)


def test_method_names_are_safe_folders():
    assert slug("vcd(alpha=0.5)+ritual") == "vcd_alpha=0.5_+ritual"
    assert slug("../x") == ".._x"


def test_default_decoding_is_sampling_and_wishes_are_honoured():
    assert decoding_for("vcd", None) == SAMPLE
    assert decoding_for("vcd", GREEDY) == GREEDY
    assert decoding_for("opera", None) == GREEDY
    with pytest.raises(EvalError, match="opera cannot run with sample: it searches for the best answer"):
        decoding_for("opera", SAMPLE)
    with pytest.raises(SettingsError, match="--param gamma belongs to none of vcd, plain"):
        check_parameters(["vcd", "plain"], {"gamma": 1})
    check_parameters(["vcd", "plain"], {"cd_alpha": 0.5})


def test_settings_are_compared_but_the_machine_is_not(loaded, source, tmp_path):
    run = run_of(loaded, source, tmp_path)
    cell = run.cells()[0]
    asked = source.splits[cell.split]
    claim(tmp_path, run.settings(cell), asked)
    claim(tmp_path, run_of(loaded, source, tmp_path, options=Options(batch_size=9)).settings(cell), asked)
    other = run_of(loaded, source, tmp_path, options=Options(suffix=" One word."))
    with pytest.raises(SettingsError, match=r"suffix was '', is ' One word\.'\); give another --out"):
        claim(tmp_path, other.settings(cell), asked)


@pytest.fixture(scope="module")
def vectors_of(loaded):
    """path, seed -> a file of vectors for the small model, of other numbers for another seed."""

    def write(path, seed):
        text = loaded.model.config.text_config
        drawn = torch.randn(text.num_hidden_layers, text.hidden_size, generator=torch.Generator().manual_seed(seed))
        vectors.save(path, "vti", drawn, loaded.model, {"model": "tiny"})
        return path

    return write


def test_a_run_knows_the_content_of_its_methods_files(loaded, source, tmp_path, vectors_of):
    """Another content under the same name is another method, and its answers must not share a file."""
    file = vectors_of(tmp_path / "v.safetensors", 1)
    cell = Cell("adversarial", f"vti(vectors={file},text=9)", GREEDY, 0)
    asked, out = source.splits["adversarial"], tmp_path / "run"

    def now():
        return run_of(loaded, source, tmp_path).settings(cell)

    first = now()
    assert list(first.decides["method"]["files"]) == [str(file)]
    claim(out, first, asked)
    claim(out, now(), asked)
    held = file.read_bytes()
    vectors_of(file, 2)
    assert now().key != first.key
    with pytest.raises(SettingsError, match=r"made with another content of .*v\.safetensors; give another --out"):
        claim(out, now(), asked)
    file.write_bytes(held)
    claim(out, now(), asked)
    file.unlink()
    with pytest.raises(MissingFileError, match=r"vti: vectors .*v\.safetensors is missing"):
        now()


def test_a_folder_of_pictures_is_known_by_what_lies_in_it(loaded, source, tmp_path):
    pool = tmp_path / "pool"
    pool.mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(pool / f"{number}.png")
    run = run_of(loaded, source, tmp_path)

    def key(method=f"cicd(images={pool})+vcd"):
        return run.settings(Cell("adversarial", method, GREEDY, 0)).key

    before = key()
    (pool / ".listing").write_text("what a file manager leaves")
    assert key() == before == key()
    (pool / "1.png").rename(pool / "2.png")
    renamed = key()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(pool / "2.png")
    assert len({before, renamed, key()}) == 3, "the draw goes by the names, so they count too"


def test_answers_of_a_version_that_noted_no_content_are_scored_and_not_continued(loaded, source, tmp_path, vectors_of):
    file = vectors_of(tmp_path / "v.safetensors", 1)
    method, asked = f"vti(vectors={file},text=9)", source.splits["adversarial"]
    cell = Cell("adversarial", method, GREEDY, 0)
    settings = run_of(loaded, source, tmp_path).settings(cell)
    older = Settings({**settings.decides, "method": {**settings.decides["method"]}}, {}, settings.scoring)
    del older.decides["method"]["files"]
    folder = cell.folder(tmp_path / "old", "pope")
    claim(folder, older, asked)
    write_questions(folder.parents[2], asked)
    append_answers(folder / "answers.jsonl", [Answer.to(q, "Yes", 1).sealed(older.key) for q in asked])
    result = read_cell(folder)
    assert len(result.rows) == len(asked) and not result.audit.edited
    with pytest.raises(
        SettingsError, match=r"did not note the content of files, .*v\.safetensors is still what made them"
    ):
        claim(folder, settings, asked)


def test_answers_of_two_contents_are_two_lines_of_a_table(tmp_path):
    pairs = {("vti(vectors=v)", SAMPLE): 0.8}
    made = []
    for seed, content in enumerate("ab"):
        out = make_run(tmp_path / content, pairs, seeds=(seed,))
        (folder,) = found_cells(out)
        path = folder / "settings.json"
        settings = json.loads(path.read_text())
        settings["method"]["files"] = {"v": content}
        path.write_text(json.dumps(settings))
        made.append(read_cell(folder))
    ((entries),) = gather(made).values()
    assert [entry.variant for entry in entries] == ["v='a'", "v='b'"]


def test_batches_are_cut_from_the_list_and_do_not_mix_images_with_none():
    questions = [Question(i, "Q", None if i in (2, 3) else "a") for i in range(8)]
    assert [[q.id for q in batch] for batch in batches_of(questions, 3)] == [[0, 1], [2, 3], [4, 5, 6], [7]]


def test_prompt_is_stripped_only_where_it_is_and_counts_stop_at_the_end():
    prompt = torch.tensor([[5, 6], [7, 8]])
    with_prompt = torch.tensor([[5, 6, 1, 2], [7, 8, 3, 9]])
    assert new_tokens(with_prompt, prompt).tolist() == [[1, 2], [3, 9]]
    assert new_tokens(torch.tensor([[1, 2, 4], [3, 9, 4]]), prompt).tolist() == [[1, 2, 4], [3, 9, 4]]
    assert token_counts(torch.tensor([[1, 2, 2], [3, 9, 4]]), 2) == [2, 3]
    assert token_counts(torch.tensor([[1, 2, 2]]), None) == [3]


def test_shards_parse():
    assert Share.parse("2/4") == Share(1, 4) and Share.parse("1/1").file == "answers.jsonl"
    for wrong in ("0/2", "3/2", "x", "1/", "-1/2"):
        with pytest.raises(SettingsError, match="--shard is"):
            Share.parse(wrong)


# --- answers on the small model


def test_a_run_writes_answers_settings_rows_and_summary_for_method_and_controls(finished, source):
    folder = cell_folder(finished)
    assert {p.name for p in folder.iterdir()} == {"answers.jsonl", "settings.json", "rows.jsonl", "summary.json"}
    answers = resume_answers(folder / "answers.jsonl")
    assert [a.question_id for a in answers] == [q.id for q in source.splits["adversarial"]]
    assert all(a.answer and a.tokens >= 1 for a in answers)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["method"] == {"name": "vcd", "parameters": settings["method"]["parameters"]}
    assert settings["method"]["parameters"]["alpha"] == 1.0 and settings["decoding"]["do_sample"] is True
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["n"] == 20 and summary["problems"] == {} and summary["options"] == {"rule": "pope-official"}
    ran = {(p.parents[1].name, p.parent.name) for p in finished.rglob("seed-0")}
    assert ran == {("vcd", "sample"), ("plain", "sample"), ("plain", "greedy"), ("mask", "sample")}


def test_the_model_sees_what_the_benchmark_draws(loaded, source, tmp_path):
    """A benchmark that covers the picture gets the answers to a blank one."""

    @dataclasses.dataclass(frozen=True)
    class Covered(Pope):
        def shown(self, question, image):
            return Image.new("RGB", image.size)

    class Blank:
        def open(self, name):
            return Image.new("RGB", (240, 240))

        def __getattr__(self, name):
            return getattr(source.images, name)

    def answers(chosen, asked):
        out = tmp_path / type(chosen).__name__ / type(asked.images).__name__
        EvaluationRun(
            chosen, asked, loaded, out, [("plain", GREEDY)], options=Options(batch_size=BATCH), quiet=True
        ).execute()
        return [a.answer for a in resume_answers(cell_folder(out, "plain", GREEDY) / "answers.jsonl")]

    covered = answers(Covered(), source)
    assert covered == answers(Pope(), dataclasses.replace(source, images=Blank())) != answers(Pope(), source)


def test_answers_do_not_depend_on_the_batch(loaded, source, finished, tmp_path):
    run_of(loaded, source, tmp_path, options=Options(batch_size=7)).execute()
    for method, decoding in (("vcd", SAMPLE), ("plain", GREEDY), ("plain", SAMPLE)):
        name = cell_folder("", method, decoding) / "answers.jsonl"
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_another_seed_draws_other_answers_and_the_same_seed_the_same(loaded, source, finished, tmp_path):
    run_of(loaded, source, tmp_path, methods=[("plain", Decoding(True, temperature=3.0))], seeds=(0, 1)).execute()
    hot = Decoding(True, temperature=3.0)
    first, second = ((cell_folder(tmp_path, "plain", hot, seed) / "answers.jsonl").read_bytes() for seed in (0, 1))
    assert first != second


def test_a_model_is_left_as_it_was(loaded):
    assert lvlm_decode.attached(loaded.model) is None


@pytest.mark.parametrize("stop_after", full_but([0, 1, 6, 13], [6]))
def test_stopped_anywhere_and_continued_it_ends_with_the_same_files(
    loaded, source, finished, tmp_path, monkeypatch, stop_after
):
    written = []

    def dying(path, answers):
        written.append(path)
        if len(written) > stop_after:
            # Half of what would have been appended reaches the disk, the last line torn.
            content = b"".join(line_of(answer.record()) for answer in answers)
            with open(path, "ab") as file:
                file.write(content[: len(content) * 2 // 3])
            raise KeyboardInterrupt
        append_answers(path, answers)

    monkeypatch.setattr("lvlm_decode_evals.runner.append_answers", dying)
    with pytest.raises(KeyboardInterrupt):
        run_of(loaded, source, tmp_path).execute()
    assert lvlm_decode.attached(loaded.model) is None
    monkeypatch.undo()
    assert files_of(tmp_path) != files_of(finished)
    run_of(loaded, source, tmp_path).execute()
    assert files_of(tmp_path) == files_of(finished)


def test_a_finished_run_asks_nothing_again(loaded, source, finished, monkeypatch):
    monkeypatch.setattr(EvaluationRun, "_generate", lambda *a: pytest.fail("asked again"))
    before = files_of(finished)
    run_of(loaded, source, finished).execute()
    assert files_of(finished) == before


def test_files_that_somebody_changed_are_made_whole_again(loaded, source, finished, tmp_path):
    """A question taken out, a checksum stripped, an answer edited: all is seen, asked again where it must be, and mended."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    folder = cell_folder(out)
    asked = folder.parents[2] / "questions.jsonl"
    asked.write_text("".join(asked.read_text().splitlines(keepends=True)[1:]))
    first, second, *others = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    changed = json.loads(first) | {"answer": "Maybe."}
    stripped = {name: value for name, value in json.loads(second).items() if name != "checksum"}
    (folder / "answers.jsonl").write_text("".join([*(json.dumps(r) + "\n" for r in (changed, stripped)), *others]))
    audit = read_cell(folder).audit
    assert len(audit.edited) == len(audit.unsealed) == len(audit.altered) == 1
    run_of(loaded, source, out).execute()
    assert files_of(out) == files_of(finished)


def test_shards_in_any_order_end_with_the_same_files(loaded, source, finished, tmp_path):
    for index in (2, 0, 1):
        results = run_of(loaded, source, tmp_path, share=Share(index, 3)).execute()
        assert bool(results) == (index == 1)
    assert files_of(tmp_path) == files_of(finished)


def test_a_run_continues_with_another_number_of_shards(loaded, source, finished, tmp_path):
    run_of(loaded, source, tmp_path, share=Share(1, 3)).execute()
    run_of(loaded, source, tmp_path, share=Share(0, 2)).execute()
    run_of(loaded, source, tmp_path).execute()
    assert files_of(tmp_path) == files_of(finished)


def test_what_falls_between_processes_the_main_one_asks_at_the_end(loaded, source, finished, tmp_path):
    class Alone:
        """accelerate's state in the main of two processes, of which the other answered nothing."""

        is_main_process = True

        def wait_for_everyone(self):
            pass

    results = run_of(loaded, source, tmp_path, share=Share(0, 2), state=Alone()).execute()
    assert len(results) == 4
    assert files_of(tmp_path) == files_of(finished)


def test_a_longer_run_keeps_what_a_shorter_one_answered(loaded, source, finished, tmp_path):
    run_of(loaded, source, tmp_path, limit=8).execute()
    run_of(loaded, source, tmp_path).execute()
    assert files_of(tmp_path) == files_of(finished)
    run_of(loaded, source, tmp_path, limit=8).execute()
    assert files_of(tmp_path) == files_of(finished)


@pytest.mark.full
def test_batch_size_auto_finds_one_that_fits(loaded, source, finished, tmp_path, monkeypatch):
    sizes = []
    generate = EvaluationRun._generate

    def small_card(self, cell, questions, images):
        sizes.append(len(questions))
        if len(questions) > 8:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return generate(self, cell, questions, images)

    monkeypatch.setattr(EvaluationRun, "_generate", small_card)
    run_of(loaded, source, tmp_path, methods=[("plain", GREEDY)], options=Options(batch_size="auto")).execute()
    assert max(sizes) == 20 and 1 <= sizes[-1] <= 8
    name = cell_folder("", "plain", GREEDY) / "answers.jsonl"
    assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


# --- bad samples


@pytest.fixture
def bad_images(tmp_path):
    """Four questions about three images: fine, corrupt, missing, fine again."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (60, 60), (90, 160, 90)).save(folder / "fine.jpg")
    (folder / "corrupt.jpg").write_bytes((folder / "fine.jpg").read_bytes()[:300])
    file = tmp_path / "questions.jsonl"
    images = ["fine.jpg", "corrupt.jpg", "missing.jpg", "fine.jpg"]
    lines = [
        {"question_id": i, "image": n, "text": "Is there a dog in the image?", "label": "no"}
        for i, n in enumerate(images)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file, folder


def test_bad_images_are_reported_not_scored_and_retried(bad_images, model_folder, tmp_path):
    file, folder = bad_images
    out = tmp_path / "out"
    arguments = ("eval", "pope", "--model", model_folder, "--questions", file, "--images", folder, "--out", out)
    done = cli(*arguments, "--no-do-sample")
    assert done.exit_code == 3, done.output
    assert "2 questions that could not be asked or scored (left out): 1, 2." in done.output
    assert "2 questions have no answer" in done.output
    cell = Cell("questions", "plain", GREEDY, 0).folder(out, "pope")
    errors = [a.error for a in resume_answers(cell / "answers.jsonl")]
    assert errors[0] is errors[3] is None
    assert "corrupt.jpg cannot be read" in errors[1] and "missing.jpg is missing" in errors[2]
    assert json.loads((cell / "summary.json").read_text())["problems"]["failed"] == {"count": 2, "ids": ["1", "2"]}
    assert json.loads((cell / "summary.json").read_text())["n"] == 2

    Image.new("RGB", (60, 60)).save(folder / "missing.jpg")
    again = cli(*arguments, "--no-do-sample")
    assert again.exit_code == 3 and "1 questions that could not be asked or scored (left out): 1." in again.output
    assert [a.question_id for a in resume_answers(cell / "answers.jsonl")] == [0, 1, 2, 3]


def test_a_sample_the_processor_cannot_take_does_not_cost_the_others(loaded, source, finished, tmp_path, monkeypatch):
    inputs = EvaluationRun._inputs
    bad = source.splits["adversarial"][5].id

    def picky(self, questions, images):
        if any(question.id == bad for question in questions):
            raise ValueError("odd picture")
        return inputs(self, questions, images)

    monkeypatch.setattr(EvaluationRun, "_inputs", picky)
    results = run_of(loaded, source, tmp_path, methods=[("plain", GREEDY)]).execute()
    assert [result.audit.failed for result in results] == [(str(bad),)]
    answers = resume_answers(cell_folder(tmp_path, "plain", GREEDY) / "answers.jsonl")
    assert answers[5].error == "the processor cannot take this sample (odd picture)"
    whole = resume_answers(cell_folder(finished, "plain", GREEDY) / "answers.jsonl")
    assert [a.answer for a in answers if a.error is None] == [a.answer for i, a in enumerate(whole) if i != 5]


def test_questions_that_changed_are_not_answered_into_the_same_file(loaded, source, tmp_path):
    run_of(loaded, source, tmp_path, methods=[("plain", GREEDY)], limit=2).execute()
    changed = [dataclasses.replace(q, text=q.text + " ") for q in source.splits["adversarial"]]
    other = dataclasses.replace(source, splits={"adversarial": changed})
    with pytest.raises(SettingsError, match=r"data\.split_hash was"):
        run_of(loaded, other, tmp_path, methods=[("plain", GREEDY)], limit=2).execute()


def test_a_model_placed_by_device_map_answers_alike(model_folder, source, finished, tmp_path):
    placed = load(str(model_folder), dtype="float32", device_map="auto")
    run_of(placed, source, tmp_path).execute()
    for method, decoding in (("vcd", SAMPLE), ("plain", GREEDY)):
        name = cell_folder("", method, decoding) / "answers.jsonl"
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_drafter_changes_no_answer(loaded, source, finished, tmp_path):
    run_of(loaded, source, tmp_path, options=Options(batch_size=BATCH, drafter="lookup")).execute()
    for method, decoding in (("vcd", SAMPLE), ("plain", SAMPLE), ("plain", GREEDY)):
        name = cell_folder("", method, decoding) / "answers.jsonl"
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_the_small_instructblip_answers_too(source, tmp_path):
    try:
        folder = lvlm_decode_data.tiny_path("tiny-instructblip")
    except FileNotFoundError:
        pytest.skip(
            "the small InstructBLIP's weights are not in data/; run python -m tools.small_models tiny-instructblip"
        )
    run_of(load(str(folder)), source, tmp_path, limit=6).execute()
    answers = resume_answers(cell_folder(tmp_path) / "answers.jsonl")
    assert len(answers) == 6 and all(a.answer and "Is there" not in a.answer for a in answers)


def test_missing_pieces_get_one_sentence(bad_images, tmp_path, model_folder):
    file, _ = bad_images
    with pytest.raises(EvalError, match="give the folder that holds them with --images FOLDER"):
        file_source(evaluator("pope"), file, None)
    with pytest.raises(MissingFileError, match="is not a folder"):
        folder_images(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="nothing-here' cannot be loaded"):
        load(str(tmp_path / "nothing-here"))
    with pytest.raises(SettingsError, match="dtype 'half-ish' is not a torch type"):
        load(str(model_folder), dtype="half-ish")
    with pytest.raises(EvalError, match="split 'hard' is unknown here; there are: x"):
        Source({"x": []}, None, {}).only(["hard"])
    with pytest.raises(SettingsError, match=r"has no \{question\}"):
        Options(template="USER: hello")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("eval", "poppe"), "evaluator 'poppe' is unknown; known: amber, beaf, chair"),
        (("eval", "pope", "--method", "vcdd"), "unknown method 'vcdd'; known methods: "),
        (("eval", "pope", "--method", "vcd(alpha=-1)"), "vcd: alpha = -1 is not valid"),
        (("eval", "pope", "--rule", "loose"), "parsing rule 'loose' is unknown; known: code"),
        (("eval", "pope", "--limit", "0"), "--limit is 0"),
        (("eval", "pope", "--images", "."), "--images needs --questions"),
        (("eval", "pope", "--shard", "1/2", "--batch-size", "auto"), "auto may differ between shards"),
        (("eval", "pope", "-p", "gamma=3"), "--param gamma belongs to none of plain"),
        (("eval", "pope", "--no-do-sample", "--temperature", "0.5"), "need sampling"),
        (("score", "pope"), "needs a file of answers"),
        (("score", "no-such-folder"), "no-such-folder is not a folder"),
        (("table", "tests"), "tests holds no evaluation"),
        (("table", "tests", "--format", "html"), "table format 'html' is unknown; known: csv, latex, markdown"),
    ],
)
def test_wrong_command_lines_get_one_sentence(arguments, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "--limit" in arguments:
        monkeypatch.setattr("lvlm_decode_evals.runner.load", lambda *a, **k: None)
        monkeypatch.setattr(EvaluationRun, "settings", lambda *a: None)
    done = cli(*arguments)
    assert done.exit_code == 1
    assert sentence in done.output and len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--num-beams", "0"), "num_beams is 0; it must be at least 1"),
        (("--num-beams", "-2"), "num_beams is -2"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0; give at least 1"),
        (("--max-new-tokens", "-3"), "max_new_tokens is -3"),
        (("--top-k", "-1"), "top_k is -1"),
        (("--top-p", "0"), "top_p is 0.0"),
        (("--temperature", "0"), "temperature is 0.0"),
        (("--temperature", "inf"), "temperature is inf; sampling needs a finite one"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--seed", "1", "--seed", "1"), "seed 1 is given twice"),
        (("--seed", "1" * 20), "has more than 64 bits"),
    ],
)
def test_numbers_that_no_run_can_use_are_refused_before_a_model_is_loaded(arguments, sentence, monkeypatch, tmp_path):
    monkeypatch.setattr("lvlm_decode_evals.runner.load", lambda *a, **k: pytest.fail("a model was loaded"))
    done = cli("eval", "pope", *arguments, "--out", tmp_path / "out")
    assert done.exit_code == 1 and sentence in done.output and len(done.output.strip().splitlines()) == 1, done.output
    assert not (tmp_path / "out").exists()


def test_scoring_and_tables_of_a_run_from_the_command_line(finished, tmp_path):
    done = cli("score", finished, "--json")
    assert done.exit_code == 0, done.output
    scored = json.loads(done.output)
    assert {entry["method"] for entry in scored} == {"plain", "mask", "vcd"} and all(e["n"] == 20 for e in scored)
    assert cli("score", finished, "--rule", "strict").exit_code == 0
    before = (cell_folder(finished) / "summary.json").read_text()
    assert '"strict"' in before
    assert cli("score", finished).exit_code == 0
    for format, sign in (("markdown", "| vcd "), ("csv", '"pope, adversarial",vcd;'), ("latex", r"\toprule")):
        done = cli("table", finished, "--format", format, "--replicates", "200", "--plot", tmp_path)
        assert done.exit_code == 0 and sign in done.output, done.output
    assert (tmp_path / "pope-adversarial.png").stat().st_size > 5000


def test_template_and_suffix_reach_the_prompt(loaded):
    from lvlm_decode_evals.runner import prompt_of

    question = Question(1, "Is it?", "a.jpg")
    assert (
        prompt_of(loaded.processor, question, Options(template="<image> {question} A:", suffix=" Now."))
        == "<image> Is it? Now. A:"
    )
    own = prompt_of(loaded.processor, question, Options(suffix=" One word."))
    assert "<image>" in own and "Is it? One word." in own
    assert "<image>" not in prompt_of(loaded.processor, Question(1, "Is it?", None), Options())


def test_a_template_without_the_image_is_refused_before_anything_is_asked(loaded, source, tmp_path):
    with pytest.raises(SettingsError, match="the template has no <image>, and the questions are about images"):
        run_of(loaded, source, tmp_path, options=Options(template="USER: {question} ASSISTANT:")).execute()
    assert not list(tmp_path.iterdir())


def test_scenes_in_a_run_are_the_ones_asked_about(source):
    assert source.images.open(source.splits["adversarial"][0].image).size == (lvlm_decode_data.SIZE,) * 2
    with pytest.raises(MissingFileError, match="image nowhere is missing"):
        source.images.open("nowhere")


@pytest.mark.parametrize("name", sorted(EVALUATORS))
def test_every_benchmark_runs_on_the_small_model_and_makes_a_table(loaded, tmp_path, name):
    chosen = evaluator(name)
    try:
        source = scene_source(chosen, lvlm_decode_data.load_scenes("heldout")[:40])
    except EvalError as error:
        # Benchmarks without scene questions are judged ones, and say what they need.
        assert "give --questions FILE" in str(error) and name in ("mmhal", "vallu")
        return
    options = Options(max_new_tokens=24)
    results = EvaluationRun(
        chosen, source, loaded, tmp_path, [("plain", GREEDY)], limit=6, options=options, quiet=True
    ).execute()
    assert {result.split for result in results} == set(source.splits)
    assert all(len(result.rows) == 6 and not result.audit.failed for result in results)
    made = blocks(results, replicates=100)
    assert len(made) == len(source.splits) and name in render(made)
    for result in results:
        assert json.loads((result.folder / "summary.json").read_text())["evaluator"] == name


# --- real kills and real processes


def command_line(model_folder, out, launcher=()):
    return [sys.executable, *launcher, "pope", "--model", str(model_folder), "--method", "vcd", "--split", "adversarial",
            "--limit", "15", "--batch-size", "3", "--out", str(out)]  # fmt: skip


def start(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def lines_in(out):
    """Lines of all answers files below a folder."""
    return sum(path.read_bytes().count(b"\n") for path in Path(out).rglob("answers*.jsonl"))


def wait_for_answers(process, out, more=1, seconds=120):
    """Until so many answers were written beyond those that are there already."""
    before = lines_in(out)
    for _ in range(seconds * 20):
        try:
            if lines_in(out) >= before + more:
                return
        except FileNotFoundError:
            pass  # a part was merged away while it was being counted
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.kill()
    pytest.fail("no answer was written in time")


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    """What the command line of `command_line` ends with, made in this process."""
    out = tmp_path_factory.mktemp("whole-cli")
    source = scene_source(evaluator("pope")).only(["adversarial"])
    run_of(loaded, source, out, limit=15, options=Options(batch_size=3)).execute()
    return out, source


@pytest.mark.full
def test_killed_with_sigkill_and_started_again_it_ends_with_the_same_files(loaded, model_folder, whole, tmp_path):
    process = start(command_line(model_folder, tmp_path, ("-m", "lvlm_decode_evals.run")))
    wait_for_answers(process, tmp_path, more=6)
    process.send_signal(signal.SIGKILL)
    process.wait()
    out, source = whole
    assert files_of(tmp_path) != files_of(out)
    run_of(loaded, source, tmp_path, limit=15, options=Options(batch_size=3)).execute()
    assert files_of(tmp_path) == files_of(out)


@pytest.mark.full
def test_two_processes_end_with_the_files_of_one_also_after_either_is_killed(model_folder, whole, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "lvlm_decode_evals.run")  # fmt: skip
    process = start(command_line(model_folder, tmp_path, launcher))
    wait_for_answers(process, tmp_path, more=3)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children(recursive=True)}
    ranks["1"].kill()
    process.wait(timeout=60)
    assert process.returncode != 0
    # What a kill of the other process in the middle of a write leaves behind.
    for part in tmp_path.rglob("answers.part-1-of-2.jsonl"):
        content = part.read_bytes()
        part.write_bytes(content[: len(content) * 2 // 3])
    out, _ = whole
    assert files_of(tmp_path) != files_of(out)
    process = start(command_line(model_folder, tmp_path, launcher))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert files_of(tmp_path) == files_of(out)
    assert output.count("pope, adversarial: method minus control") == 1


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch):
    """transformers would try again for minutes; behind a proxy nobody but it can tell."""
    import socket

    from huggingface_hub import constants

    from lvlm_decode_evals import runner

    def nobody(address, timeout):
        tried.append((address, timeout))
        raise OSError("no way there")

    tried = []
    monkeypatch.setattr(socket, "create_connection", nobody)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(runner, "getproxies", dict)
    with pytest.raises(MissingFileError, match="the hub cannot be reached"):
        runner.load("some-one/some-model")
    assert tried == [(("huggingface.co", 443), 5)]
    monkeypatch.setattr(runner, "getproxies", lambda: {"https": "http://proxy"})
    assert runner.hub_answers() and len(tried) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not runner.hub_answers()


@pytest.mark.full
def test_nothing_that_moves_is_written_into_a_file(tmp_path):
    """Progress bars, transformers' own included, are for terminals."""
    import subprocess
    import sys

    command = [
        sys.executable,
        "-m",
        "lvlm_decode",
        "eval",
        "pope",
        "--limit",
        "2",
        "--split",
        "random",
        "--without",
        "mask",
    ]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "answers in" in done.stderr, done.stderr
    assert "\r" not in done.stderr and "it/s" not in done.stderr
