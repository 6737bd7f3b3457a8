"""`lvlm-decode reproduce`: verdicts on printed values by the interval that decides, within a budget, stopped and continued."""

import csv
import gzip
import json
import shutil
from dataclasses import replace

import pytest
import typer
import yaml
from conftest import ROOT, shared_path
from typer.testing import CliRunner

from lvlm_decode.errors import FileFormatError, MissingFileError, SettingsError
from lvlm_decode_evals import evaluator, loaders
from lvlm_decode_evals.answers import Audit
from lvlm_decode_evals.base import Answer, Column
from lvlm_decode_evals.commands import add_to
from lvlm_decode_evals.configs import on_scenes, paper_blocks, read_config, run_config, source_of
from lvlm_decode_evals.metrics import Interval
from lvlm_decode_evals.plan import TIMES, Decoding, Result
from lvlm_decode_evals.protocols import Protocol
from lvlm_decode_evals.reproduce import (
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    UNKNOWN,
    Job,
    Table,
    block_of,
    deciding,
    execute,
    half_unit,
    judge_gain,
    judge_value,
    report,
    rounds,
    spoken,
    verdicts,
    verdicts_csv,
    where_of,
)

ACCURACY = Column("accuracy", "Accuracy", better=+1, paired=True)
SAMPLE = Decoding(do_sample=True)
LLAVA = "llava-hf/llava-1.5-7b-hf"
VCD = "vcd(alpha=1.0,beta=0.1,noise_step=999)"


@pytest.fixture
def command():
    app = typer.Typer()
    add_to(app)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("published", "interval", "word"),
    [
        (87.7, (0.86, 0.85, 0.88), REPRODUCED),
        (88.04, (0.86, 0.85, 0.88), NOT_REPRODUCED),
        # 88.0 may have been 87.96 before it was rounded, and not 87.6: zeros at the end are digits too.
        (88.0, (0.86, 0.85, 0.8796), REPRODUCED),
        (88.0, (0.86, 0.85, 0.876), NOT_REPRODUCED),
        (80.0, (0.86, 0.85, 0.88), NOT_REPRODUCED),
        (87.7, (0.86, 0.80, 0.92), NOT_RUN),
        # A wide interval can still exclude a value.
        (60.0, (0.86, 0.80, 0.92), NOT_REPRODUCED),
    ],
)
def test_a_value_is_judged_by_our_interval(published, interval, word):
    assert judge_value(published, Interval(*interval), ACCURACY, half_unit([published, 87.7]))[0] == word


@pytest.mark.parametrize(
    ("gain", "interval", "word"),
    [
        (4.4, (0.05, 0.01, 0.09), REPRODUCED),
        (-4.4, (-0.05, -0.09, -0.01), REPRODUCED),
        (4.4, (-0.05, -0.09, -0.01), NOT_REPRODUCED),
        (-4.4, (0.05, 0.01, 0.09), NOT_REPRODUCED),
        (4.4, (0.05, -0.01, 0.09), NOT_RUN),
        (4.4, (0.0, 0.0, 0.0), NOT_RUN),
    ],
)
def test_a_gain_is_judged_by_its_sign(gain, interval, word):
    assert judge_gain(gain, Interval(*interval))[0] == word


def test_half_units_rounds_and_durations():
    printed = ([87.73], [45.0, 46.4], [46.4], [620, 565])
    assert [half_unit(values) for values in printed] == pytest.approx([0.005, 0.05, 0.05, 0.5])
    assert rounds(20) == [20] and rounds(32) == [32] and rounds(600) == [32, 128, 512, 600]
    assert [spoken(s) for s in (40, 600, 7200)] == ["40 seconds", "10 minutes", "2.0 hours"]


def results_of(config, right, images=600, model="llava-hf/llava-1.5-7b-hf"):
    """Answers of every row of a POPE table, with so many of ten right."""
    scorer = evaluator("pope")
    made = []
    for row in config.rows:
        for split in config.splits if row.name in right else ():
            rows = scorer.rows(
                Answer(i, "yes" if (i % 10 < right[row.name]) == (i // 10 % 2 == 0) else "no", image=str(i),
                       label="yes" if i // 10 % 2 == 0 else "no")
                for i in range(images)
            )  # fmt: skip
            settings = {"model": {"name": model}, "method": {"name": row.method, "parameters": {}}}
            made.append(Result(scorer, split, row.method, row.decoding, 0, rows, Audit(), settings, ROOT / "nowhere"))
    return made


def words(made, row, metric="Accuracy"):
    return {verdict.word for verdict in made if verdict.row.name == row and verdict.column.title == metric}


def test_verdicts_on_the_papers_model_are_about_values(tmp_path):
    config = read_config(ROOT / "configs" / "pope-vcd-llava-1.5.yaml")
    made = verdicts(config, results_of(config, {"Regular": 8, "VCD": 2}), LLAVA, 400)
    assert words(made, "Regular") == {REPRODUCED, NOT_REPRODUCED} and words(made, "VCD") == {NOT_REPRODUCED}
    random = next(v for v in made if v.row.name == "Regular" and v.split == "coco-popular" and v.column is v.column)
    assert random.ours.low < 0.8 < random.ours.high
    # Nothing asked, or too little.
    assert {v.word for v in verdicts(config, [], LLAVA, 400)} == {NOT_RUN}
    few = verdicts(config, results_of(config, {"Regular": 8, "VCD": 2}, images=20), LLAVA, 400)
    assert {v.word for v in few} == {NOT_RUN}


def test_answers_about_other_images_or_objects_are_no_verdict_on_a_list(monkeypatch):
    config = read_config(ROOT / "configs" / "chair-opera-512-llava-1.5.yaml")
    config = replace(config, options={"parser": "pattern"})
    scorer = evaluator("chair")
    row = config.rows[0]

    def word(key):
        rows = scorer.rows(Answer(i, "A dog.", image=str(i), label=["dog"]) for i in range(60))
        settings = {"model": {"name": LLAVA}, "data": {"questions_sha256": key}}
        result = Result(scorer, "captions", row.method, row.decoding, 0, rows, Audit(), settings, ROOT / "nowhere")
        found = next(v for v in verdicts(config, [result], LLAVA, 400) if v.row is row)
        return found.word, found.why

    assert word(config.protocol.list_key) == (NOT_REPRODUCED, "")
    assert word("of a file") == (NOT_RUN, "other images were asked about than the protocol's list")
    monkeypatch.setattr(Protocol, "other_truth", lambda protocol, chosen: "ground truth B")
    assert word(config.protocol.list_key) == (
        NOT_RUN,
        "the captions are held against ground truth B, the protocol's is A",
    )


def test_the_model_is_loaded_in_the_type_of_the_protocol(tmp_path, photographs, monkeypatch):
    _, model = photographs
    loaded = []
    monkeypatch.setattr("lvlm_decode_evals.runner.load", lambda name, **how: loaded.append(how) or exit_now())

    def exit_now():
        raise MissingFileError("no model is needed here")

    table = replace(
        read_config(small(tmp_path)), protocol=read_config(ROOT / "configs" / "pope-damro-llava-1.5.yaml").protocol
    )
    job = Job(table, source_of(table, False, None, None), tmp_path / "out", (0,), 4)
    with pytest.raises(MissingFileError):
        execute([job], str(model), False, None, print)
    with pytest.raises(MissingFileError):
        run_config(table, model=str(model), out=tmp_path / "out")
    assert loaded == [{"dtype": "float32"}] * 2
    other = replace(job, config=replace(read_config(small(tmp_path)), path=tmp_path / "other.yaml"))
    with pytest.raises(
        SettingsError, match=r"in different types \(small: float32, other: as the checkpoint\); reproduce"
    ):
        execute([job, other], str(model), False, None, print)


def test_verdicts_in_miniature_are_about_gains():
    config = on_scenes(read_config(ROOT / "configs" / "pope-vcd-llava-1.5.yaml"))
    better = verdicts(config, results_of(config, {"Regular": 6, "VCD": 9}), "tiny", 400)
    assert words(better, "VCD") == {REPRODUCED} and words(better, "Regular") == {NOT_RUN}
    worse = verdicts(config, results_of(config, {"Regular": 9, "VCD": 6}), "tiny", 400)
    assert words(worse, "VCD") == {NOT_REPRODUCED}


def test_a_verdict_on_the_small_model_says_that_it_is_one_in_miniature():
    config = on_scenes(read_config(ROOT / "configs" / "pope-vcd-llava-1.5.yaml"))
    made = verdicts(config, results_of(config, {"Regular": 6, "VCD": 9}), "tiny", 400)
    decided = next(v for v in made if v.word == REPRODUCED)
    assert decided.sentence("in miniature") == "reproduced in miniature" and decided.sentence("") == "reproduced"
    assert decided.target == 0 and decided.column.better
    real = read_config(ROOT / "configs" / "pope-vcd-llava-1.5.yaml")
    value = verdicts(real, results_of(real, {"Regular": 8, "VCD": 2}), LLAVA, 400)[0]
    assert value.target == pytest.approx(value.published.value)


def test_another_model_is_never_a_verdict_on_a_value():
    config = read_config(ROOT / "configs" / "pope-vcd-llava-1.5.yaml")
    answers = results_of(config, {"Regular": 6, "VCD": 9})
    assert [where_of(config, name) for name in (LLAVA, "folder/llava-1.5-7b-hf", "tiny", "llava-hf/llava-1.5-13b-hf")] == [
        "", "", "in miniature", "on another model"]  # fmt: skip
    other = verdicts(config, answers, "llava-hf/llava-1.5-13b-hf", 400)
    assert words(other, "Regular") == {NOT_RUN} and words(other, "VCD") == {REPRODUCED}
    assert words(verdicts(config, answers, LLAVA, 400), "Regular") == {NOT_REPRODUCED}


def test_what_nobody_knows_is_not_judged():
    vista = on_scenes(read_config(ROOT / "configs" / "chair-vista-512-llava-1.5.yaml"))
    assert {v.word for v in verdicts(vista, [], "tiny", 400)} == {UNKNOWN}
    mvp = on_scenes(read_config(ROOT / "configs" / "pope-mvp-llava-1.5.yaml"))
    found = {(v.word, v.why) for v in verdicts(mvp, [], "tiny", 400)}
    assert (UNKNOWN, "nobody here knows how it was measured") in found
    deco = on_scenes(read_config(ROOT / "configs" / "chair-deco-512-llava-1.5.yaml"))
    by_row = {v.row.name: (v.word, v.why) for v in verdicts(deco, [], "tiny", 400)}
    assert by_row["DoLa"] == (NOT_RUN, "it was measured by protocol opera-512, these rows by deco-512")
    assert by_row["DoLa + DeCo"][1].startswith("DoLa subtracts") and by_row["DeCo, beam"][1] == "not asked yet"


def test_a_gain_over_a_value_of_another_protocol_says_so():
    config = on_scenes(read_config(ROOT / "configs" / "chair-deco-512-llava-1.5.yaml"))
    scorer = evaluator("chair")

    def result(row, caption):
        rows = scorer.rows(Answer(i, caption, image=str(i), label=["dog"]) for i in range(60))
        settings = {"model": {"name": "tiny"}, "method": {"name": row.method, "parameters": {}}}
        return Result(scorer, "captions", row.method, row.decoding, 0, rows, Audit(), settings, ROOT / "nowhere")

    rows = {row.name: row for row in config.rows}
    results = [result(rows["Greedy"], "A dog and a cat."), result(rows["DeCo, greedy"], "A dog.")]
    decided = next(v for v in verdicts(config, results, "tiny", 400) if v.row.name == "DeCo, greedy")
    assert (decided.word, decided.why) == (
        REPRODUCED, "the printed gain is over a value measured by protocol opera-512")  # fmt: skip
    gains = paper_blocks(config, results, "tiny", 400)[1]
    shown = {line[0]: line[-1].text() for line in gains.lines if line[2] == "CHAIRs"}
    assert shown["DeCo, greedy"] == "-7.2 (protocol deco-512 minus opera-512)" and shown["DoLa"] == "+2.8"


def small(tmp_path):
    """A table with one method on the small model's one split, cheap to run."""
    raw = yaml.safe_load((ROOT / "configs" / "pope-vcd-llava-1.5.yaml").read_text())
    raw["splits"] = ["coco-adversarial"]
    raw["rows"] = [row for row in raw["rows"] if "published" in row]
    for row in raw["rows"]:
        row["published"] = {"coco-adversarial": row["published"]["coco-adversarial"]}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def answered(out):
    return {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("answers.jsonl"))}


@pytest.mark.full
def test_stopped_and_continued_it_ends_as_if_it_had_never_stopped(command, tmp_path, monkeypatch):
    monkeypatch.setattr("lvlm_decode_evals.reproduce.FIRST_ROUND", 8)
    arguments = ("reproduce", small(tmp_path), "--model", "tiny", "--samples", 16, "--replicates", 100)
    whole = command(*arguments, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert "The rest will take about" in whole.output and "by the first 8 questions of every row" in whole.output
    stopped = command(*arguments, "--out", tmp_path / "cut", "--hours", 0)
    assert stopped.exit_code == 0 and "The time is spent; the same command goes on from here." in stopped.output
    counts = {content.count(b"\n") for content in answered(tmp_path / "cut").values()}
    assert counts == {8}
    assert command(*arguments, "--out", tmp_path / "cut").exit_code == 0
    assert answered(tmp_path / "cut") == answered(tmp_path / "whole")
    for name in ("verdicts.md", "verdicts.tex", "verdicts.csv", "verdicts.html"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shown = (tmp_path / "whole" / "verdicts.md").read_text()
    assert (
        "| VCD     | adversarial | Accuracy  | 80.88     | +1.92          |" in shown
        and "In miniature: tiny on emoji scenes." in shown
    )
    assert "Protocol: pope-vcd." in shown
    # 16 questions are about 3 images: whatever the interval says, that decides nothing in favour.
    assert "| reproduced" not in shown
    lines = list(csv.DictReader((tmp_path / "whole" / "verdicts.csv").read_text().splitlines()))
    accuracy = next(line for line in lines if (line["row"], line["metric"]) == ("VCD", "Accuracy"))
    assert (accuracy["protocol"], accuracy["judged"], accuracy["where"], accuracy["verdict"]) == (
        "pope-vcd", "gain over Regular", "in miniature", NOT_RUN)  # fmt: skip
    assert accuracy["reason"].startswith("undecided: ") and "Model: tiny; 16 answers" in accuracy["notes"]
    assert float(accuracy["published_gain"]) == pytest.approx(0.0192)
    assert float(accuracy["low"]) <= float(accuracy["ours"]) <= float(accuracy["high"])
    page = (tmp_path / "whole" / "verdicts.html").read_text()
    assert (
        page.count("<svg") == 4
        and "<script" not in page
        and r"\begin{tabular}" in (tmp_path / "whole" / "verdicts.tex").read_text()
    )
    assert all(json.loads(line)["seconds"] > 0 for p in (tmp_path / "whole").rglob(TIMES) for line in p.open())


def test_the_budget_stops_between_batches_and_keeps_what_was_answered(tmp_path, monkeypatch):
    monkeypatch.setattr("lvlm_decode_evals.reproduce.FIRST_ROUND", 8)
    table = on_scenes(read_config(small(tmp_path)))
    job = Job(table, source_of(table, True, None, None), tmp_path / "out", (0,), 96)
    said = []
    # A budget cuts the first round too; without one, that is with 0, it is asked whole.
    assert execute([job], "tiny", True, 1e-9, said.append, quiet=True) == {}
    assert said == ["The time is spent; the same command goes on from here."] and not answered(tmp_path / "out")
    assert execute([job], "tiny", True, 0, said.append, quiet=True) == {}
    assert said[1].startswith("The rest will take about ") and said[2] == said[0]
    # Nothing is left where the first round was all.
    said.clear()
    whole = replace(job, out=tmp_path / "whole", samples=8)
    assert execute([whole], "tiny", True, 0, said.append, quiet=True) == {}
    assert not any("goes on from here" in sentence for sentence in said)
    assert {content.count(b"\n") for content in answered(tmp_path / "out").values()} == {8}


@pytest.mark.full
def test_a_table_that_cannot_be_asked_stops_no_other(command, tmp_path):
    (tmp_path / "other").mkdir()
    tables = (small(tmp_path / "other").rename(tmp_path / "other.yaml"), small(tmp_path))
    arguments = ("reproduce", *tables, "--model", "tiny", "--replicates", 100, "--out", tmp_path / "out", "--samples")
    assert command(*arguments, 4).exit_code == 0
    for path in (tmp_path / "out" / "other-tiny").rglob("settings.json"):
        path.write_text(path.read_text().replace('"suffix": ""', '"suffix": " In one word."'))
    done = command(*arguments, 6)
    assert done.exit_code == 3, done.output
    assert "holds answers made with other settings (suffix was ' In one word.', is '')" in done.stderr
    assert done.stdout.count("Not run: ") == 1
    counts = {name: {content.count(b"\n") for content in answered(tmp_path / "out" / f"{name}-tiny").values()}
              for name in ("other", "small")}  # fmt: skip
    assert counts == {"other": {4}, "small": {6}}


def test_every_line_of_the_csv_says_how_it_was_measured_and_why_it_is_so():
    deco = on_scenes(read_config(ROOT / "configs" / "chair-deco-512-llava-1.5.yaml"))
    real = read_config(ROOT / "configs" / "pope-vcd-llava-1.5.yaml")
    made = []
    for config, results, model in ((deco, [], "tiny"), (real, results_of(real, {"Regular": 8, "VCD": 2}), LLAVA)):
        found = verdicts(config, results, model, 400)
        block = block_of(found, config.title, ["Read this."], where_of(config, model))
        made.append(list(csv.DictReader(verdicts_csv([(config, block, found)], model).splitlines())))
    copied, own = ({line["row"]: line for line in lines} for lines in made)
    assert copied["DoLa"]["protocol"] == "opera-512" and copied["DeCo, beam"]["protocol"] == "deco-512"
    assert copied["DoLa"]["reason"].startswith("it was measured by protocol opera-512")
    assert copied["DeCo, beam"]["reason"] == "not asked yet" and copied["DeCo, beam"]["low"] == ""
    assert {line["notes"] for lines in made for line in lines} == {"Read this."}
    assert (
        own["VCD"]["published"] == "0.8133"
        and own["VCD"]["judged"] == "value"
        and own["VCD"]["where"] == ""
        and own["VCD"]["published_gain"] == ""
    )
    assert own["VCD"]["verdict"] == NOT_REPRODUCED and float(own["VCD"]["high"]) < float(own["VCD"]["published"])


def test_rows_whose_verdict_no_answer_can_change_are_not_asked():
    def names(stem, model):
        config = read_config(ROOT / "configs" / f"{stem}.yaml")
        return [row.name for row in deciding(on_scenes(config) if model == "tiny" else config, model)]

    assert names("chair-vista-512-llava-1.5", "tiny") == names("mme-vcd-llava-1.5", LLAVA) == []
    # No value is printed beside "VCD as the released script runs it".
    assert names("pope-vcd-llava-1.5", "tiny") == names("pope-vcd-llava-1.5", LLAVA) == ["Regular", "VCD"]
    # Greedy and DoLa were measured by another protocol; gains need the first all the same.
    deco = ["DeCo, greedy", "DeCo, beam", "DeCo, nucleus"]
    assert names("chair-deco-512-llava-1.5", LLAVA) == deco
    assert names("chair-deco-512-llava-1.5", "tiny") == ["Greedy", *deco]
    config = on_scenes(read_config(ROOT / "configs" / "pope-vcd-llava-1.5.yaml"))
    row = replace(config.rows[1], published=config.rows[0].published)
    config = replace(config, rows=(config.rows[0], row))
    assert deciding(config, "tiny") == ()
    assert {v.why for v in verdicts(config, [], "tiny", 400) if v.row is row} == {
        "the printed gain is zero and has no sign"
    }


def test_tables_of_unknown_protocol_are_marked_and_not_asked(command, tmp_path):
    # No model of that name is there: none is needed.
    done = command("reproduce", "chair-vista-512-llava-1.5", "--model", "tiny-nowhere", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "protocol unknown: its list of images is not known" in done.output
    page = (tmp_path / "verdicts.html").read_text()
    for shown in (done.output, page, (tmp_path / "verdicts.tex").read_text()):
        assert "Not asked: no answer could change these verdicts." in shown
    assert "lvlm-decode table chair-vista-512-llava-1.5 runs its rows all the same" in page
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A data folder in which POPE is there and CHAIR is not, and the small model under a name of its own."""
    import lvlm_decode_data

    scenes = lvlm_decode_data.load_scenes("heldout")[:3]
    data = tmp_path / "data"
    (data / "coco" / "val2014").mkdir(parents=True)
    for scene in scenes:
        shutil.copy(scene.path, data / "coco" / "val2014" / f"{scene.image_id}.png")
    asked = evaluator("pope").scene_questions(scenes)["adversarial"]
    (data / "pope").mkdir()
    lines = [{"question_id": q.id, "image": f"{q.image}.png", "text": q.text, "label": q.label} for q in asked]
    (data / "pope" / "coco-adversarial.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # A table asks the published files alone, known by their checksums.
    published = loaders.fingerprint(data / "pope" / "coco-adversarial.json")
    monkeypatch.setattr(loaders, "POPE_FILES", {published: "coco-adversarial"})
    monkeypatch.setenv("LVLM_DECODE_DATA", str(data))
    model = tmp_path / "small-llava"
    shutil.copytree(lvlm_decode_data.tiny_path("tiny-llava"), model)
    return data, model


def test_a_table_that_lacks_its_files_stops_no_other(command, tmp_path, photographs):
    data, model = photographs
    arguments = ("reproduce", "chair-opera-512-llava-1.5", small(tmp_path), "--model", model, "--replicates", 100)
    done = command(*arguments, "--samples", 4, "--seeds", 1, "--out", tmp_path / "out")
    assert done.exit_code == 3, done.output
    lacking = f"{data / 'chair' / 'synonyms.txt'} is not there; run lvlm-decode data get chair"
    assert f"warning: OPERA, Table 1: CHAIR at 512 tokens, LLaVA-1.5-7B is not run: {lacking}" in done.stderr
    for name in ("verdicts.md", "verdicts.html"):
        shown = (tmp_path / "out" / name).read_text()
        assert f"Not run: {lacking}" in shown and "not run: it could not be asked; the sentence below" in shown
        assert "undecided: the interval does not exclude zero" in shown
    assert len(answered(tmp_path / "out")) == 4
    # What is there goes on to be judged when files are lost.
    shutil.rmtree(data / "coco")
    done = command(*arguments, "--samples", 4, "--seeds", 1, "--out", tmp_path / "out")
    assert done.exit_code == 3 and done.stderr.count("is not run: ") == 2
    assert "undecided: the interval does not exclude zero" in done.output


def test_broken_answers_of_one_table_cost_the_others_nothing(command, tmp_path):
    table = small(tmp_path)
    (tmp_path / "out" / "small-tiny" / "x").mkdir(parents=True)
    (tmp_path / "out" / "small-tiny" / "x" / "settings.json").write_text("{")
    job = Job(on_scenes(read_config(table)), None, tmp_path / "out" / "small-tiny", (0,), 4)
    found = [Table(job.config, job.out, job, "its settings are broken.", lacking=True)]
    assert report(found, "tiny", tmp_path / "out", 100) is False
    assert "Not run: its settings are broken." in (tmp_path / "out" / "verdicts.md").read_text()
    with pytest.raises(FileFormatError, match="broken JSON"):
        report([replace(found[0], lacking=False)], "tiny", tmp_path / "out", 100)


def test_a_folder_with_none_of_the_images_is_no_folder_of_images(command, tmp_path, photographs):
    data, model = photographs
    for path in (data / "coco" / "val2014").glob("*.png"):
        path.unlink()
    done = command("reproduce", small(tmp_path), "--model", model, "--replicates", 100, "--out", tmp_path / "out")
    assert done.exit_code == 3, done.output
    assert "Not run: none of the first 3 images can be opened; the last, image " in done.stdout
    assert not answered(tmp_path / "out")


def test_questions_and_images_are_looked_for_where_data_get_puts_them(tmp_path, monkeypatch):
    monkeypatch.setenv("LVLM_DECODE_DATA", str(tmp_path))

    def source(stem, **given):
        return source_of(
            read_config(ROOT / "configs" / f"{stem}.yaml"), False, given.get("images"), given.get("questions")
        )

    def refused(stem, sentence):
        with pytest.raises(MissingFileError, match=sentence):
            source(stem)

    mme = tmp_path / "mme"
    refused(
        "mme-ritual-llava-1.5",
        r"mme_hallucination\.jsonl is not there; run lvlm-decode data get mme, or give --questions",
    )
    mme.mkdir()
    subset = gzip.decompress(shared_path("data/mme/mme_hallucination_questions.jsonl.gz").read_bytes())
    (mme / "mme_hallucination.jsonl").write_bytes(subset)
    found = source("mme-ritual-llava-1.5")
    assert len(found.splits["all"]) == 240 and found.images.describe == str(mme)
    (mme / "existence.txt").write_text("1.jpg\tIs there a dog?\tYes\n1.jpg\tIs there a cat?\tNo\n")
    assert len(source("mme-ritual-llava-1.5").splits["all"]) == 2
    shutil.copytree(shared_path("data/pope/questions"), tmp_path / "pope")
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    refused("pope-ritual-llava-1.5-gqa", "gqa/images is not there; put GQA's images there, or give --images")
    refused("chair-vista-512-llava-1.5", "which images the table is about is not known; give --questions")


def test_questions_that_could_not_be_asked_are_told(command, tmp_path, photographs):
    data, model = photographs
    min((data / "coco" / "val2014").glob("*.png"), key=lambda path: int(path.stem)).unlink()
    done = command("reproduce", small(tmp_path), "--model", model, "--samples", 7, "--seeds", 1,
                   "--replicates", 100, "--out", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 3, done.output
    assert "6 questions could not be asked and are in no number here; the first, 1: " in done.stdout
    assert "; 1 answers a row and split." in done.stdout


def test_wrong_command_lines(command, tmp_path):
    several = (ROOT / "configs" / "pope-vcd-llava-1.5.yaml", ROOT / "configs" / "pope-vcd-instructblip.yaml")
    for arguments, sentence in (
        (several, "the tables are of several models"),
        ((ROOT / "configs" / "pope-mvp-qwen-vl.yaml",), "has no class that runs here; give one with --model"),
        ((ROOT / "nowhere.yaml",), "nowhere.yaml is not a file"),
    ):
        done = command("reproduce", *arguments, "--out", tmp_path)
        assert done.exit_code == 1 and sentence in done.output
