"""RePOPE beside POPE: the same answers under both labels, never under labels of other questions."""

import gzip
import json
import shutil
from dataclasses import replace

import pytest
import typer
from conftest import shared_path
from runs import cli
from typer.testing import CliRunner

from lvlm_decode.errors import EvalError
from lvlm_decode_evals import loaders, score
from lvlm_decode_evals.answers import write_answers
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.commands import add_to
from lvlm_decode_evals.download import digest_of
from lvlm_decode_evals.joins import join
from lvlm_decode_evals.loaders import pope_files
from lvlm_decode_evals.plan import Settings, claim, read_cell, write_questions
from lvlm_decode_evals.pope import Pope, questions_of
from lvlm_decode_evals.tables import blocks, render

SPLITS = ("random", "popular", "adversarial")


def pope_records(split):
    """POPE's own questions of a split, from the recorded file."""
    path = shared_path(f"data/pope/questions/coco_{split}.jsonl.gz")
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines() if line.strip()]


def corrected(split):
    """RePOPE's file, rebuilt from POPE's questions and the recorded ids of flips and drops."""
    (facts,) = [f for f in json.loads(shared_path("data/benchmarks/repope.json").read_text()) if f["split"] == split]
    flipped = {**dict.fromkeys(facts["flipped_yes_to_no"], "no"), **dict.fromkeys(facts["flipped_no_to_yes"], "yes")}
    kept = [record for record in pope_records(split) if record["question_id"] not in set(facts["dropped"])]
    return [record | {"label": flipped.get(record["question_id"], record["label"])} for record in kept], facts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with the corrected labels of the splits whose questions are recorded."""
    monkeypatch.setenv("LVLM_DECODE_DATA", str(tmp_path / "data"))
    place = tmp_path / "data" / "repope"
    place.mkdir(parents=True)
    for split in ("random", "popular"):
        records, _ = corrected(split)
        lines = [json.dumps({k: r[k] for k in ("question_id", "image", "text", "label")}) + "\n" for r in records]
        (place / f"coco_repope_{split}.json").write_text("".join(lines))
    return place


def questions(split):
    return questions_of([(split, record) for record in pope_records(split)])


def scored(split, name):
    answers = Pope().read_answers(shared_path(f"data/pope/answers/{name}.jsonl.gz"))
    answers, _ = join(answers, questions(split), name)
    return Pope().summary(Pope().rows(answers))


@pytest.mark.parametrize(
    ("split", "name", "decoding"),
    [
        ("random", "cd_rethink_llava-v1.5-7b__coco_random_3000_greedy", "greedy"),
        ("popular", "cd_rethink_llava-v1.5-7b__coco_popular_3000_sample", "sample"),
    ],
)
def test_recorded_answers_under_both_labels(folder, split, name, decoding):
    recorded = json.loads(shared_path("data/benchmarks/repope_llava7b_counts.json").read_text())["counts"]
    result = scored(split, name)
    assert {k.upper(): result[k] for k in ("tp", "fp", "tn", "fn")} == recorded[f"{split}|{decoding}|POPE"]
    second = {k.upper(): result[f"repope_{k}"] for k in ("tp", "fp", "tn", "fn")}
    assert second == recorded[f"{split}|{decoding}|RePOPE"]
    _, facts = corrected(split)
    assert (result["n"], result["repope_n"]) == (3000, facts["n"])
    assert result["repope_labels_yes"] == facts["yes"] / facts["n"]
    assert result["repope_f1_change"] == result["repope_f1"] - result["f1"] > 0.02


def test_the_printed_row(folder):
    result = scored("random", "cd_rethink_llava-v1.5-7b__coco_random_3000_greedy")
    shown = [round(100 * result[f"repope_{k}"], 2) for k in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
    assert shown == [91.93, 94.06, 86.11, 89.91, 38.25]
    assert round(100 * result["f1"], 2) == 85.5


SEVERAL = {
    "random": ("cd_rethink_llava-v1.5-7b__coco_random_3000_greedy", "greedy"),
    "popular": ("cd_rethink_llava-v1.5-7b__coco_popular_3000_sample", "sample"),
}


def nested(path, kept_only=False, labels="POPE"):
    """Recorded answers to two splits in one file, in the form that RePOPE's authors write."""
    splits = {}
    for split, (name, _) in SEVERAL.items():
        said = Pope().read_answers(shared_path(f"data/pope/answers/{name}.jsonl.gz"))
        said = {str(answer.question_id): answer.answer for answer in said}
        records = corrected(split)[0] if labels == "RePOPE" else pope_records(split)
        kept = {record["question_id"] for record in corrected(split)[0]}
        splits[split] = {
            str(r["question_id"]): {
                "question_id": str(r["question_id"]), "text": r["text"], "label": r["label"], "dataset": split,
                "response": said[str(r["question_id"])], "answer": None,
            }
            for r in records if not kept_only or r["question_id"] in kept
        }  # fmt: skip
    path.write_text(json.dumps(splits))
    return path


def counts(result, prefix=""):
    return {name.upper(): result[f"{prefix}{name}"] for name in ("tp", "fp", "tn", "fn")}


def test_a_file_of_several_splits_is_scored_under_both_labels_split_by_split(folder, tmp_path):
    recorded = json.loads(shared_path("data/benchmarks/repope_llava7b_counts.json").read_text())["counts"]
    path = nested(tmp_path / "answers.json")
    questions = tmp_path / "questions"
    questions.mkdir()
    for split in SEVERAL:
        shutil.copy(shared_path(f"data/pope/questions/coco_{split}.jsonl.gz"), questions)
    for found in (score("pope", path, questions), score("pope", path)):
        assert list(found.splits) == list(SEVERAL) and not found.problems
        for split, (_, decoding) in SEVERAL.items():
            result = found.splits[split].rates
            assert counts(result) == recorded[f"{split}|{decoding}|POPE"]
            assert counts(result, "repope_") == recorded[f"{split}|{decoding}|RePOPE"]
    shown = cli("score", "pope", path)
    assert shown.exit_code == 0, shown.output
    (first, second) = shown.output.splitlines()
    assert first.startswith("random: Accuracy 87.0%") and "RePOPE F1 89.9%" in first
    assert second.startswith("popular: Accuracy 81.7%") and "RePOPE F1 82.6%" in second
    report = found.report
    assert report["splits"]["random"]["repope_n"] == 2774 and report["splits"]["popular"]["repope_n"] == 2727
    (block,) = replace(found, replicates=100).blocks()
    assert block.columns[0] == "Split" and [line[0] for line in block.lines] == ["random", "popular"]


def test_a_split_whose_labels_are_not_here_costs_the_others_nothing(folder, tmp_path):
    (folder / "coco_repope_popular.json").unlink()
    found = score("pope", nested(tmp_path / "answers.json"))
    assert "repope_f1" in found.splits["random"].rates and "repope_f1" not in found.splits["popular"].rates
    # Of all answers together only a part has second labels, so there is no second figure to set beside the first.
    assert found.rates["n"] == 6000 and "repope_f1" not in found.rates


@pytest.mark.full
def test_several_splits_of_the_questions_that_repope_keeps(folder, tmp_path):
    with pytest.raises(EvalError, match=r"no POPE score; give --questions coco_repope_random\.json"):
        score("pope", nested(tmp_path / "answers.json", kept_only=True))
    recorded = json.loads(shared_path("data/benchmarks/repope_llava7b_counts.json").read_text())["counts"]
    found = score("pope", nested(tmp_path / "answers.json", labels="RePOPE"))
    for split, (_, decoding) in SEVERAL.items():
        assert counts(found.splits[split].rates, "repope_") == recorded[f"{split}|{decoding}|RePOPE"]
        assert "accuracy" not in found.splits[split].rates


@pytest.mark.full
def test_questions_of_one_split_score_that_part_of_a_file_of_several(folder, tmp_path):
    asked = shared_path("data/pope/questions/coco_random.jsonl.gz")
    found = score("pope", nested(tmp_path / "answers.json"), asked)
    assert list(found.splits) == ["random"] and len(found.audit.unknown) == 3000


@pytest.mark.parametrize(("word", "accuracy"), [("Yes", 41.78), ("No", 58.22)])
def test_always_the_same_answer(folder, word, accuracy):
    result = Pope().summary(Pope().rows([Answer.to(question, word) for question in questions("random")]))
    assert round(100 * result["repope_accuracy"], 2) == accuracy and result["accuracy"] == 0.5


def test_other_questions_of_the_same_ids_get_no_second_label(folder):
    legacy = shared_path("data/pope/questions/coco_random_legacy2910.jsonl.gz")
    for path in (legacy, shared_path("data/pope/questions/aokvqa_random.jsonl.gz")):
        (asked,) = pope_files(path).values()
        result = Pope().summary(Pope().rows([Answer.to(question, "Yes") for question in asked]))
        assert not any(name.startswith("repope") for name in result)
    # Answers that do not say what they were asked cannot be told apart from others, so nothing is assumed.
    bare = [Answer(q.id, "Yes", label=q.label) for q in questions("random")]
    assert "repope_n" not in Pope().summary(Pope().rows(bare))


def test_copies_with_the_slip_of_the_pen_are_the_same_questions(folder):
    answers = [Answer.to(q, "Yes") for q in questions("random")]
    slipped = [Answer(a.question_id, "Yes", f"{a.text.replace('an ', 'an ').replace('image', 'imange')} In one word.",
                      a.image, a.label) for a in answers]  # fmt: skip
    assert Pope().summary(Pope().rows(slipped)) == Pope().summary(Pope().rows(answers))


def test_a_run_that_answered_only_what_repope_keeps_has_no_pope_score(folder):
    records, _ = corrected("random")
    kept = {record["question_id"]: record["label"] for record in records}
    answers = [Answer.to(question, "Yes") for question in questions("random") if question.id in kept]
    with pytest.raises(EvalError, match=r"no POPE score; give --questions coco_repope_random\.json"):
        Pope().rows(answers)
    own = [Answer(a.question_id, "Yes", a.text, a.image, kept[a.question_id]) for a in answers]
    result = Pope().summary(Pope().rows(own))
    assert result["n"] == result["repope_n"] == 2774 and round(100 * result["repope_accuracy"], 2) == 41.78
    # There is no figure of POPE's in it.
    assert not result.keys() & {"accuracy", "f1", "tp", "repope_f1_change"}
    # With half of the answers, or all but one, or under the first few ids, it is RePOPE's run and no other all the same.
    for part in (own[:1200], own[1:], own[:30], own[::2], own[100:140]):
        result = Pope().summary(Pope().rows(part))
        assert result["repope_n"] == len(part) and "accuracy" not in result
    for part in (answers[:1200], answers[1:], answers[::2]):
        with pytest.raises(EvalError, match=r"no POPE score; give --questions coco_repope_random\.json"):
            Pope().rows(part)


@pytest.mark.parametrize("number", [3, 60, 2999])
def test_a_part_of_popes_questions_is_scored_under_both_labels(folder, number):
    """Leaving out some of what RePOPE drops makes no run of RePOPE's."""
    for asked in (questions("random")[:number], questions("random")[-number:]):
        result = Pope().summary(Pope().rows([Answer.to(question, "Yes") for question in asked]))
        assert result["n"] == number and {"accuracy", "repope_accuracy"} <= result.keys()


def test_questions_of_the_published_repope_file_say_so(folder, monkeypatch, tmp_path):
    """Also the first few alone, where both files have the same questions and labels, and without the labels at hand."""
    path = folder / "coco_repope_random.json"
    monkeypatch.setitem(loaders.POPE_FILES, digest_of(path), "repope-random")
    (asked,) = pope_files(path).values()
    answers = tmp_path / "answers.jsonl"
    write_answers(answers, [Answer(q.id, "Yes", q.text, q.image) for q in asked[:3]])
    shutil.copy(path, tmp_path / path.name)
    shutil.rmtree(folder)
    result = score("pope", answers, tmp_path / path.name).rates
    assert result["repope_n"] == 3 and "accuracy" not in result
    shown = cli("score", "pope", answers, "--questions", tmp_path / path.name)
    assert "RePOPE F1" in shown.output and "Accuracy" not in shown.output


def test_unparsed_answers_leave_every_rate_under_the_authors_rule(folder):
    asked = questions("random")
    said = ["", *["yes"] * (len(asked) - 1)]
    scorer = Pope(rule="repope")
    result = scorer.summary(scorer.rows([Answer.to(q, text) for q, text in zip(asked, said)]))
    assert result["tp"] + result["fp"] == 2999 and result["yes_ratio"] == 1 and result["accuracy"] == 1499 / 2999
    assert result["repope_yes_ratio"] == 1


def old_run(tmp_path, split="random", number=60):
    """A run as it lies on disk, made before the labels came."""
    cell = tmp_path / "run" / "pope" / f"coco-{split}" / "plain" / "greedy" / "seed-0"
    cell.mkdir(parents=True)
    settings = {"evaluator": "pope", "split": f"coco-{split}", "method": {"name": "plain", "parameters": {}}}
    settings |= {"decoding": {"do_sample": False}, "seed": 0, "model": {"name": "m"}}
    asked = questions(split)[:number]
    claim(cell, made := Settings(settings, {}), asked)
    write_questions(cell.parents[2], asked)
    write_answers(cell / "answers.jsonl", [Answer.to(question, "Yes").sealed(made.key) for question in asked])
    return cell


def test_an_old_run_is_scored_again_without_a_model_and_tables_show_both(folder, tmp_path):
    cell = old_run(tmp_path)
    app = typer.Typer()
    add_to(app)
    shown = CliRunner().invoke(app, ["table", str(tmp_path / "run"), "--replicates", "200"])
    assert shown.exit_code == 0, shown.output
    assert "RePOPE F1" in shown.output and "F1 % ↑" in shown.output
    result = read_cell(cell)
    kept = sum(row.evidence["repope"] != "dropped" for row in result.rows)
    changed = sum(row.evidence["repope"] not in ("dropped", row.label) for row in result.rows)
    assert f"it keeps {kept} of these 60 questions and changes {changed} labels" in shown.output
    shutil.rmtree(folder)
    made = render(blocks([read_cell(cell)], 200))
    assert "RePOPE F1" not in made and "lvlm-decode data get repope" in made


def test_files_that_are_not_as_published_are_named(folder, tmp_path):
    path = folder / "coco_repope_random.json"
    published = "f464fcaf60b24ce2f280cf33f122e000dbdd35c8e88f77c4141c9c2cba864611"
    old_run(tmp_path)
    made = render(blocks([read_cell(next((tmp_path / "run").rglob("settings.json")).parent)], 200))
    assert ("RePOPE's random" in made) == (digest_of(path) != published)
    path.write_text(path.read_text().replace('"label": "yes"', '"label": "no"'))
    made = render(blocks([read_cell(next((tmp_path / "run").rglob("settings.json")).parent)], 200))
    assert made.count("RePOPE's random file is not as published.") == 1
    answers = [Answer.to(question, "Yes") for question in questions("random")]
    write_answers(tmp_path / "answers.jsonl", answers)
    shown = cli("score", "pope", tmp_path / "answers.jsonl")
    assert shown.exit_code == 3 and "warning: RePOPE's random file is not as published." in shown.output
    assert score("pope", answers).report["problems"]["doubts"]["count"] == 1


@pytest.mark.parametrize("content", [b"{", b"\x1f\x8b\x08 cut short", b"\x0es\xa0d no gzip"])
def test_a_broken_file_of_labels_stops_no_pope_score(folder, tmp_path, content):
    (folder / "coco_repope_popular.json").unlink()
    (folder / "coco_repope_popular.json.gz").write_bytes(content)
    answers = [Answer.to(question, "Yes") for question in questions("random")]
    # Neither of the split whose file is whole, nor of the other, whose table says what is wrong.
    assert score("pope", answers).rates["repope_n"] == 2774 and not score("pope", answers).problems
    other = [Answer.to(question, "Yes") for question in questions("popular")]
    found = score("pope", other)
    assert found.rates["n"] == 3000 and "repope_n" not in found.rates
    (said,) = [s for s in Pope().remarks(found.scored) if "popular" in s]
    assert said.startswith("RePOPE's popular file cannot be used (")
    if content != b"{":
        assert "damaged gzip file" in said
