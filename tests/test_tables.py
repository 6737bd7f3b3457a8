"""Tables: controls beside every method, honest notes, three formats; papers' tables as files."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT
from runs import RIGHT, SAMPLE, cli, make_run, pope, result, results_of

import lvlm_decode
import lvlm_decode_data
from lvlm_decode.errors import FileFormatError, MissingFileError, UnknownNameError
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.answers import Audit
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.configs import MEAN, on_scenes, paper_blocks, read_config, scene_split
from lvlm_decode_evals.plan import (
    GREEDY,
    found_cells,
    mask_of,
    score_cell,
)
from lvlm_decode_evals.plots import dots, write_pictures
from lvlm_decode_evals.pope import Pope
from lvlm_decode_evals.tables import Block, Value, blocks, gather, markdown, render

# Printed F1 that does not follow from the printed precision and recall; the files say so in their notes.
SLIPS = {("pope-avisc-instructblip", "VCD", "coco-random"), ("pope-icd-instructblip", "ICD", "coco-random")}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_every_method_stands_beside_its_controls(tmp_path):
    results, differences = blocks(results_of(make_run(tmp_path)), replicates=200)
    assert [line[:2] for line in results.lines] == [
        ("plain", "greedy"), ("plain", "sample"), ("mask", "sample"), ("vcd", "sample")]  # fmt: skip
    against = [line[1] for line in differences.lines if line[0] == "vcd, sample"]
    assert against == ["plain, greedy", "plain, sample", "mask, sample"]
    titles = " ".join(results.columns)
    assert "Yes-ratio" in titles and "Unparsed" in titles


def test_dcd_stands_beside_its_projector_of_the_preferred_answers(tmp_path):
    pairs = {**RIGHT, ("dcd", SAMPLE): 0.8, ("dcd(alpha=0)", SAMPLE): 0.8}
    parameters = {"dcd": {"alpha": 1.0, "beta": 0.1}, "dcd(alpha=0)": {"alpha": 0.0, "beta": 0.1}}
    _, differences = blocks(results_of(make_run(tmp_path, pairs, parameters=parameters)), replicates=200)
    against = [line[1] for line in differences.lines if line[0] == "dcd, sample"]
    assert against == ["plain, greedy", "plain, sample", "mask, sample", "dcd(alpha=0), sample"]


def test_numbers_of_a_table_are_the_summary_s(tmp_path):
    make_run(tmp_path)
    results = results_of(tmp_path)
    table = blocks(results, replicates=200)[0]
    for found in results:
        summary = found.evaluator.summary(found.rows)
        (line,) = [line for line in table.lines if line[:2] == (found.method, found.decoding.name)]
        shown = {title.split(" %")[0]: value for title, value in zip(table.columns, line)}
        assert shown["Accuracy"].value == summary["accuracy"] and shown["Yes-ratio"].value == summary["yes_ratio"]
        assert shown["n"].value == summary["n"] == 120
        assert shown["Accuracy"].low <= shown["Accuracy"].value <= shown["Accuracy"].high


def test_differences_are_paired_and_signed(tmp_path):
    _, differences = blocks(results_of(make_run(tmp_path, questions=240)), replicates=500)
    (line,) = [row for row in differences.lines if row[:2] == ("plain, sample", "plain, greedy")]
    accuracy = line[differences.columns.index("Δ Accuracy")]
    assert (
        accuracy.value < 0 and accuracy.high < 0 and accuracy.text().startswith("-") and accuracy.text().endswith("*")
    )
    gained, lost = map(int, line[differences.columns.index("Gained/lost")].split("/"))
    assert lost - gained == round(-accuracy.value * 240)


def test_seeds_give_a_mean_and_a_spread(tmp_path):
    make_run(tmp_path, seeds=(0, 1, 2))
    results = results_of(tmp_path)
    table = blocks(results, replicates=200)[0]
    line = table.lines[-1]
    assert line[2] == "3" and table.lines[0][2] == "1"
    accuracies = [r.evaluator.summary(r.rows)["accuracy"] for r in results if r.method == "vcd"]
    shown = line[3]
    assert shown.value == pytest.approx(sum(accuracies) / 3) and shown.spread > 0 and "±" in shown.text()


def test_a_missing_control_is_said(tmp_path):
    pairs = {("plain", GREEDY): 0.9, ("vcd", SAMPLE): 0.8}
    text = markdown(blocks(results_of(make_run(tmp_path, pairs)), 200))
    assert "vcd, sample lacks its matched controls plain, sample; mask, sample" in text


def test_notes_say_what_the_numbers_are_and_name_trouble(tmp_path):
    text = markdown(blocks(results_of(make_run(tmp_path, skip=(3, 4))), 200))
    assert "rule pope-official" in text and "Model: tiny-llava" in text and "20 images" in text
    assert "95% bootstrap over images (200 replicates)" in text
    assert "6 comparisons, not corrected for multiplicity" in text
    assert "vcd, sample, seed 0: 2 questions without an answer (not scored): 3, 4." in text
    assert "Only 20 images: such intervals are too short, so nothing is marked" in text
    assert "]*" not in text
    assert "Only" not in markdown(blocks(results_of(make_run(tmp_path / "more", questions=240)), 200))


def test_a_mask_is_matched_in_its_threshold():
    assert mask_of("vcd") == mask_of("vcd(beta=0.1)") == "mask"
    assert mask_of("vcd(alpha=1,beta=0.2)") == "mask(beta=0.2)"
    assert mask_of("vcd(cd_beta=0.2)+ritual(beta=0.5)") == "mask(beta=0.5)"


def test_markdown_is_a_table(tmp_path):
    text = render(blocks(results_of(make_run(tmp_path)), 200))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    first = rows[: rows.index(next(r for r in rows if "Control" in r))]
    assert len({len(row) for row in first}) == 1 and set(first[1]) == {"|", "-"}


def test_csv_has_one_unrounded_number_a_line(tmp_path):
    made = blocks(results_of(make_run(tmp_path)), 200)
    lines = list(csv.DictReader(io.StringIO(render(made, "csv"))))
    numbers = sum(isinstance(value, Value) for block in made for line in block.lines for value in line)
    assert len(lines) == numbers
    (accuracy,) = [
        entry for entry in lines if entry["line"] == "vcd; sample; 1" and entry["column"].startswith("Accuracy")
    ]
    assert float(accuracy["value"]) == made[0].lines[-1][3].value and accuracy["low"]
    # What stands below the last of the tables belongs to every number of them.
    (said,) = {entry["notes"].partition("Model: ")[2] for entry in lines}
    assert said.startswith("tiny-llava. Scored with rule pope-official; 20 images.") and "Brackets: 95%" in said
    assert {entry["protocol"] for entry in lines} == {"none"}


def test_latex_escapes_and_balances(tmp_path):
    text = render(blocks(results_of(make_run(tmp_path, {("plain", GREEDY): 0.9, ("a_b", GREEDY): 0.8})), 200), "latex")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"a\_b" in text and "%" not in re.sub(r"\\%", "", text) and r"$\Delta$" in text
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert line.count("{") == line.count("}")


def test_unknown_format_and_values():
    with pytest.raises(UnknownNameError, match="table format 'xls' is unknown; known: csv, latex, markdown"):
        render([], "xls")
    assert Value(0.8731, "percent", 0.85, 0.9).text() == "87.3 [85.0, 90.0]"
    assert Value(-0.01, "percent", -0.02, -0.001, signed=True).text() == "-1.0 [-2.0, -0.1]*"
    assert Value(0.0, "percent", -0.02, 0.01, signed=True).text() == "+0.0 [-2.0, +1.0]"
    assert (
        Value(0.0004, "p").text() == "<0.001"
        and Value(12.34).text() == "12.3"
        and Value(3000, "count").text() == "3000"
    )


def test_pictures_one_a_split(tmp_path):
    make_run(tmp_path / "run")
    make_run(tmp_path / "run", split="popular")
    written = write_pictures(results_of(tmp_path / "run"), tmp_path / "pictures", 100)
    assert [path.name for path in written] == ["pope-popular.png", "pope-random.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_an_evaluator_without_two_axes_gets_a_panel_for_each_compared_column(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    monkeypatch.setattr(Pope, "axes", None)
    (path,) = write_pictures(results_of(tmp_path / "run"), tmp_path, 100)
    assert path.read_bytes()[:4] == b"\x89PNG"
    figure = dots(gather(results_of(tmp_path / "run"))["pope", "random"], "random", 100)
    assert [axes.get_xlabel() for axes in figure.axes] == ["Accuracy (%)", "F1 (%)"]


def test_scoring_again_with_another_rule_leaves_the_answers_alone(tmp_path):
    make_run(tmp_path)
    folder = found_cells(tmp_path)[0]
    before = (folder / "answers.jsonl").read_bytes()
    score_cell(folder, rule="strict")
    assert json.loads((folder / "summary.json").read_text())["options"] == {"rule": "strict"}
    assert (folder / "answers.jsonl").read_bytes() == before
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 120 and {"id", "cluster", "answer", "parsed", "correct", "clear", "rule"} <= set(rows[0])


def test_gather_groups_seeds_of_a_decoding(tmp_path):
    make_run(tmp_path, seeds=(1, 0))
    (methods,) = gather(results_of(tmp_path)).values()
    assert [[r.seed for r in method.results] for method in methods] == [[1], [0, 1], [0, 1], [0, 1]]


# --- papers' tables


def test_the_papers_named_in_the_project_have_tables():
    names = " ".join(path.stem for path in CONFIGS)
    for word in ("vcd", "opera", "ritual", "damro", "icd", "avisc", "deco", "mvp", "vdgd", "cntp"):
        assert word in names
    methods = {
        row.method.split("(")[0].split("+")[0] for path in CONFIGS for row in read_config(path).rows if row.method
    }
    assert {"plain", "vcd", "opera", "ritual", "damro", "icd", "m3id", "deco", "dola", "mvp", "vdgd", "cntp"} <= methods
    assert {path.stem.split("-")[0] for path in CONFIGS} == {"pope", "chair", "mme"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_table_is_complete_and_its_methods_exist(path):
    config = read_config(path)
    assert config.source and config.images and config.title
    assert config.benchmark == path.stem.split("-")[0] and config.evaluator.name == config.benchmark
    for row in config.rows:
        if row.method is not None:
            lvlm_decode.parse(row.method)
        for values in row.published.values.values():
            kinds = {column.key: column.kind for column in config.evaluator.columns}
            for metric, value in values.items():
                assert 0 < value <= (100 if kinds[metric] == "percent" else 2000), (row.name, metric, value)
    scenes = on_scenes(config)
    assert set(scenes.splits) <= {"random", "popular", "adversarial", "captions", "all"}
    assert [row.name for row in scenes.rows] == [row.name for row in config.rows]


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.startswith("pope")], ids=lambda path: path.stem)
def test_printed_f1_follows_from_printed_precision_and_recall(path):
    """A slip of the pen in our files would show: F1 is a function of its neighbours."""
    for row in read_config(path).rows:
        for split, values in row.published.values.items():
            if split != MEAN and {"precision", "recall", "f1"} <= set(values):
                p, r = values["precision"], values["recall"]
                follows = abs(2 * p * r / (p + r) - values["f1"]) < 0.12
                assert follows == ((path.stem, row.name, split) not in SLIPS), (row.name, split)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.startswith("mme")], ids=lambda path: path.stem)
def test_printed_totals_are_sums_except_the_known_slip(path):
    for row in read_config(path).rows:
        values = row.published.values.get("all", {})
        if {"existence", "count", "position", "color", "hallucination"} <= set(values):
            total = sum(values[task] for task in ("existence", "count", "position", "color"))
            slip = path.stem == "mme-mvp-instructblip" and row.name == "MVP"
            # Printed means of several runs: tasks and total were rounded apart.
            assert (abs(total - values["hallucination"]) < 0.05) != slip, (row.name, total)


def write_config(tmp_path, **changes):
    raw = yaml.safe_load((ROOT / "configs" / "pope-vcd-llava-1.5.yaml").read_text()) | changes
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in raw.items() if value != "drop"}))
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": "drop"}, r"table\.yaml: field 'images' is missing"),
        ({"imagez": 1}, "field 'imagez' is unknown; known: baseline"),
        ({"baseline": "Base"}, "baseline 'Base' is no row; rows: Regular, VCD"),
        ({"rows": [{"name": "x", "method": None}]}, "row 1: a row without a method needs `why`"),
        ({"rows": [{"name": "x", "method": "plain", "published": {"hard": {}}}]}, "row 1: split 'hard' is not among"),
        (
            {"rows": [{"name": "x", "method": "plain", "published": {"coco-random": {"acc": 1}}}], "baseline": None},
            "row 1: metric 'acc' is unknown; known: accuracy",
        ),
        ({"benchmark": "poppe"}, "evaluator 'poppe' is unknown"),
    ],
)
def test_wrong_tables_name_file_and_field(tmp_path, changes, sentence):
    with pytest.raises((FileFormatError, UnknownNameError), match=sentence):
        read_config(write_config(tmp_path, **changes))


def test_missing_and_broken_tables(tmp_path):
    with pytest.raises(MissingFileError, match="lvlm-decode table --list shows the papers' tables"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_text("a: [1")
    with pytest.raises(FileFormatError, match=r"x\.yaml: broken YAML"):
        read_config(tmp_path / "x.yaml")


def test_scene_splits_stand_for_real_ones():
    assert [scene_split("pope", name) for name in ("coco-random-2910", "gqa-popular", "random")] == [
        "random", "popular", "random"]  # fmt: skip
    assert scene_split("chair", "captions") == "captions"


def test_ours_beside_the_published_values(tmp_path):
    config = on_scenes(read_config(ROOT / "configs" / "pope-vcd-llava-1.5.yaml"))
    method = "vcd(alpha=1.0,beta=0.1,noise_step=999)"
    make_run(tmp_path, {("plain", SAMPLE): 0.7, (method, SAMPLE): 0.9})
    results = results_of(tmp_path)
    table, gains = paper_blocks(config, results, "tiny", replicates=200)
    (line,) = [row for row in table.lines if row[0] == "VCD" and row[3:5] == ("random", "Accuracy")]
    ours = Pope().summary(next(r.rows for r in results if r.method == method))["accuracy"]
    assert line[5].value == pytest.approx(ours) and line[6].text() == "87.73"
    assert line[7].value == pytest.approx(ours - 0.8773) and line[7].low < line[7].value < line[7].high
    (popular,) = [row for row in table.lines if row[0] == "VCD" and row[3:5] == ("popular", "Accuracy")]
    assert popular[5] == "–" and popular[6].text() == "85.38"
    (gain,) = [row for row in gains.lines if row[1:3] == ("random", "Accuracy")]
    assert gain[4].value == pytest.approx(0.0444) and gain[3].value == pytest.approx(
        ours - Pope().summary(next(r.rows for r in results if r.method == "plain"))["accuracy"]
    )
    lines = list(csv.DictReader(io.StringIO(render([table], "csv"))))
    published = [e["value"] for e in lines if e["column"] == "Published" and "; random; Accuracy" in e["line"]]
    assert [float(value) for value in published] == pytest.approx([0.8329, 0.8773])
    assert {e["protocol"] for e in lines if e["column"] == "Published"} == {"pope-vcd"}
    assert {e["protocol"] for e in lines if e["column"] == "Ours"} == {"pope-vcd on emoji scenes"}
    notes = " ".join(table.notes)
    assert {e["notes"] for e in lines} == {notes} and gains.elsewhere == table.notes
    assert "This run is a miniature: tiny on emoji scenes" in notes and "issues/16" in notes
    assert "miniature" not in " ".join(paper_blocks(config, results, config.model, 200)[0].notes)


def test_a_hyphen_in_a_mark_is_no_minus_sign():
    value = Value(-0.072, "percent", signed=True, mark=" (protocol deco-512 minus opera-512)†")
    tex = render([Block("t", ("x",), ((value,),))], "latex")
    assert r"$-$7.2 (protocol deco-512 minus opera-512)$\dagger$" in tex
    tex = render([Block("t", ("x",), (("a\\b^$ {c}",),))], "latex")
    assert r"a\textbackslash{}b\textasciicircum{}\$ \{c\}" in tex


def test_unverified_values_and_means_are_marked(tmp_path):
    config = on_scenes(read_config(ROOT / "configs" / "pope-damro-llava-1.5.yaml"))
    for split in ("random", "popular", "adversarial"):
        make_run(tmp_path, {("plain", SAMPLE): 0.8}, split=split)
    table = paper_blocks(config, results_of(tmp_path), "tiny", 200)[0]
    (line,) = [row for row in table.lines if row[0] == "Original" and row[3:5] == (MEAN, "Accuracy")]
    assert line[6].text() == "82.08†" and line[5].low is None
    tex = render([table], "latex")
    assert r"82.08$\dagger$" in tex and "†" not in tex
    marks = {e["mark"] for e in csv.DictReader(io.StringIO(render([table], "csv"))) if e["column"] == "Published"}
    assert marks == {"†"}
    accuracies = [Pope().summary(r.rows)["accuracy"] for r in results_of(tmp_path)]
    assert line[5].value == pytest.approx(sum(accuracies) / 3)
    assert any(note.startswith("†") for note in table.notes)


def test_a_table_of_a_paper_from_the_command_line_uses_answers_that_are_there(tmp_path):
    make_run(tmp_path / "run", {("plain", SAMPLE): 0.7, ("vcd(alpha=1.0,beta=0.1,noise_step=999)", SAMPLE): 0.9})
    arguments = ("table", ROOT / "configs" / "pope-vcd-llava-1.5.yaml", "--model", "tiny", "--no-run", "--out")
    done = cli(*arguments, tmp_path / "run", "--replicates", "200")
    assert done.exit_code == 0, done.output
    assert "miniature" in done.output and "87.73" in done.output and "method minus control" in done.output
    assert cli(*arguments, tmp_path / "none").exit_code == 1


def test_a_table_without_a_model_or_data_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setenv("LVLM_DECODE_DATA", str(tmp_path))
    done = cli("table", ROOT / "configs" / "pope-vcd-qwen-vl.yaml")
    assert done.exit_code == 1 and "give one with --model" in done.output
    done = cli("table", ROOT / "configs" / "pope-vcd-llava-1.5.yaml", "--out", tmp_path / "x")
    assert done.exit_code == 1 and "run lvlm-decode data get pope, or give --questions" in done.output


def test_evaluators_name_columns_that_exist():
    for name in ("pope", "chair", "mme"):
        chosen = evaluator(name)
        assert len({column.key for column in chosen.columns}) == len(chosen.columns)
        assert {column.kind for column in chosen.columns} <= {"percent", "number", "count"}


@pytest.mark.parametrize(
    ("name", "one", "several"),
    [
        ("pope", "image", "images"),
        ("mmvp", "pair of images", "pairs of images"),
        ("mmstar", "pair of images", "pairs of images"),
        ("naturalbench", "pair of images", "pairs of images"),
        ("beaf", "original image", "original images"),
        ("hallusionbench", "set of figures", "sets of figures"),
    ],
)
def test_notes_call_what_is_drawn_again_by_its_name(name, one, several):
    scenes = lvlm_decode_data.load_scenes("heldout")[:40]
    split, questions = next(iter(evaluator(name).scene_questions(scenes).items()))
    cells = [
        result(name, split, method, [Answer.to(q, word) for q in questions])
        for method, word in (("plain", "Yes"), ("vcd", "No"))
    ]
    second = blocks(cells, 200)[1]
    number = len({row.cluster for row in cells[0].rows})
    assert second.columns[-1] == f"p by {one}"
    assert f"; {number} {several}." in second.notes[0] and f"bootstrap over {several} (" in second.notes[1]
    assert f"net gain per {one}." in second.notes[1]
    assert any(f"Only {number} {several}:" in note for note in second.notes) == (number < 30)


def test_photographs_of_mmstar_are_images():
    meta = {"category": "coarse perception", "l2_category": "x"}
    cells = [
        result("mmstar", "all", "plain", [Answer(i, "A", image=f"{i}.jpg", label="A", meta=meta) for i in range(3)])
    ]
    assert "; 3 images." in blocks(cells, 200)[0].notes[0]


def test_what_makes_figures_others_than_the_benchmarks_is_said_once():
    """Not once for each method and seed."""
    doubt = Audit(empty=("1",), doubts=("The labels are altered.",))
    cells = [replace(pope(name, 20), audit=doubt, seed=seed) for name in ("plain", "vcd") for seed in (0, 1)]
    text = markdown(blocks(cells, 200))
    assert text.count("The labels are altered.") == 1 and text.count("vcd, greedy, seed 1: 1 empty answers") == 1
