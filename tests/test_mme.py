"""MME: the official rule, pairs by image, totals; identities, then the recorded leaderboard answers."""

import gzip
import json
import random
from dataclasses import replace

import pytest
import typer
from conftest import shared_path
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import lvlm_decode_data
from lvlm_decode.errors import EvalError, FileFormatError, MissingFileError
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.commands import add_to
from lvlm_decode_evals.mme import COGNITION, HALLUCINATION, MME, PERCEPTION, TASKS


def answer(task, image, label, text, number=0):
    return Answer(f"{task}/{image}/{number}", text, image=image, label=label, meta={"task": task})


def score(*answers):
    scorer = MME()
    return scorer.report(scorer.rows(answers))


def test_published_groups():
    assert len(TASKS) == 14 and len(PERCEPTION) == 10 and len(COGNITION) == 4
    assert set(HALLUCINATION) < set(PERCEPTION)


def test_both_right_gives_200_and_one_right_50():
    pair = [answer("count", "a", "yes", "Yes"), answer("count", "a", "no", "No", 1)]
    assert score(*pair)["tasks"]["count"]["score"] == 200
    half = [answer("count", "a", "yes", "Yes"), answer("count", "a", "no", "Yes", 1)]
    assert score(*half)["tasks"]["count"] == {
        "questions": 2,
        "images": 1,
        "correct": 1,
        "pairs_correct": 0,
        "other": 0,
        "yes": 2,
        "no": 0,
        "acc": 50,
        "acc_plus": 0,
        "score": 50,
    }


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        ("yes", "yes", True),
        ("Yes, there is", "yes", True),
        (" Yes", "yes", True),
        ("   Yes", "yes", False),
        ("not at all", "no", True),
        ("nope", "no", True),
        ("The answer is yes", "yes", False),
        ("", "no", False),
    ],
)
def test_first_four_characters_decide(text, label, right):
    row = MME().row(answer("existence", "a", label, text))
    assert row.correct is right and (right or row.parsed == "other")


def test_only_unreadable_answers_score_zero():
    report = score(answer("color", "a", "yes", "Blue"), answer("color", "a", "no", "Blue", 1))
    assert report["tasks"]["color"]["score"] == 0 and report["other"] == 2
    assert report["missing_tasks"] == [task for task in TASKS if task != "color"]


VERDICTS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=8)


@given(st.dictionaries(st.sampled_from(TASKS), VERDICTS, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_totals_are_sums_and_order_does_not_matter(tasks, rng):
    answers = []
    for task, verdicts in tasks.items():
        for image, pair in enumerate(verdicts):
            for number, (label, right) in enumerate(zip(("yes", "no"), pair)):
                said = label if right else {"yes": "no", "no": "yes"}[label]
                answers.append(answer(task, str(image), label, said, number))
    report = score(*answers)
    shuffled = answers[:]
    rng.shuffle(shuffled)
    assert score(*shuffled) == report
    for task, verdicts in tasks.items():
        result = report["tasks"][task]
        assert result["correct"] == sum(map(sum, verdicts)) and result["pairs_correct"] == sum(map(all, verdicts))
        assert 0 <= result["score"] <= 200 and result["acc_plus"] <= result["acc"]
    for total, members in (("perception", PERCEPTION), ("cognition", COGNITION), ("hallucination", HALLUCINATION)):
        assert report[total] == sum(report["tasks"][task]["score"] for task in members if task in tasks)


def test_the_subset_alone_is_not_called_perception():
    scorer = MME()
    rows = scorer.rows([answer("count", "a", "yes", "Yes"), answer("count", "a", "no", "No", 1)])
    assert "perception" not in scorer.summary(rows) and scorer.summary(rows)["hallucination"] == 200


# Files -------------------------------------------------------------------------------------------------------------


def write(folder, task, *lines):
    (folder / f"{task}.txt").write_text("\n".join(lines) + "\n")


def test_result_folder(tmp_path):
    write(tmp_path, "OCR", "1.jpg\tQ one?\tYes\tyes, it is", "1.jpg\tQ two?\tNo\tYes")
    write(tmp_path, "count", "1.jpg\tQ?\tNo\tNo.", "2.jpg\tQ?\tYes\tyes", "1.jpg\tQ?\tYes\tyes", "2.jpg\tQ?\tNo\tno")
    (tmp_path / "notes.txt").write_text("not a task")
    scorer = MME()
    report = scorer.report(scorer.rows(scorer.read_answers(tmp_path)))
    assert report["tasks"]["OCR"]["score"] == 50
    # Pairs are found by image, not by neighbouring lines.
    assert report["tasks"]["count"]["images"] == 2 and report["tasks"]["count"]["score"] == 200


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1.jpg\tQ?\tYes"], r"count\.txt, line 1: 3 fields; expected 4"),
        (["1.jpg\tQ?\tYes\tyes", "1.jpg\tQ?\tNo\tno\tway"], r"count\.txt, line 2: 5 fields"),
        (["1.jpg\tQ?\tYes\tyes"], r"count\.txt: image 1\.jpg has 1 lines"),
        (["1.jpg\tQ?\tmaybe\tyes", "1.jpg\tQ?\tNo\tno"], r"count\.txt, line 1: the gold answer must be Yes or No"),
    ],
)
def test_broken_result_files_are_named(tmp_path, lines, message):
    write(tmp_path, "count", *lines)
    with pytest.raises(EvalError, match=message):
        MME().read_answers(tmp_path)


def test_folder_without_task_files(tmp_path):
    with pytest.raises(MissingFileError, match=r"existence\.txt"):
        MME().read_answers(tmp_path)


def test_unknown_task_is_named():
    with pytest.raises(FileFormatError, match="no task 'sound'"):
        MME().row(answer("sound", "a", "yes", "yes"))


def test_score_command_reads_a_folder(tmp_path):
    write(tmp_path, "existence", "1.jpg\tQ?\tYes\tyes", "1.jpg\tQ?\tNo\tNo")
    app = typer.Typer()
    add_to(app)
    result = CliRunner().invoke(app, ["score", "mme", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["tasks"]["existence"]["score"] == 200 and report["hallucination"] == 200


# Recorded ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lavin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lavin")
    with gzip.open(shared_path("data/mme/LaVIN.tsv.gz"), "rt", newline="\n") as file:
        for line in file:
            task, rest = line.split("\t", 1)
            with open(folder / f"{task}.txt", "a") as out:
                out.write(rest)
    return folder


def test_recorded_leaderboard_answers(lavin):
    expected = json.loads(shared_path("data/expected_shared.json").read_text())["mme"]["LaVIN"]["official_rule"]
    scorer = MME()
    answers = scorer.read_answers(lavin)
    report = scorer.report(scorer.rows(answers))
    assert report["tasks"] == {task: expected[task] for task in TASKS}
    assert report["perception"] == expected["perception"] and report["cognition"] == expected["cognition"]
    assert report["hallucination"] == expected["hallucination_subset"]["total"]
    assert round(report["perception"], 2) == 963.61 and round(report["cognition"], 2) == 249.64


@pytest.mark.parametrize(("rule", "name"), [("mme", "mme_official"), ("lmms-eval-mme", "lmms_eval_mme")])
def test_recorded_parses(lavin, rule, name):
    with gzip.open(shared_path("data/mme/LaVIN.parse_expected.jsonl.gz"), "rt") as file:
        known = [json.loads(line)[name] for line in file]
    with gzip.open(shared_path("data/mme/LaVIN.tsv.gz"), "rt", newline="\n") as file:
        order = list(dict.fromkeys(line.split("\t", 1)[0] for line in file))
    scorer = MME(rule=rule)
    rows = scorer.rows(scorer.read_answers(lavin))
    rows.sort(key=lambda row: order.index(row.evidence["task"]))
    assert [row.parsed for row in rows] == known


def test_the_first_line_alone_is_asked_where_a_protocol_does_so(tmp_path):
    path = shared_path("data/mme/mme_hallucination_questions.jsonl.gz")
    whole, first = (MME(first_line=cut).file_questions(path)["all"] for cut in (False, True))
    assert all(q.text.endswith("\nAnswer the question using a single word or phrase.") for q in whole)
    assert [q.text for q in first] == [q.text.partition("\n")[0] for q in whole]
    assert [replace(q, text="") for q in first] == [replace(q, text="") for q in whole]


def test_questions_of_the_hallucination_subset(lavin):
    questions = MME().file_questions(shared_path("data/mme/mme_hallucination_questions.jsonl.gz"))["all"]
    assert len(questions) == len({question.id for question in questions}) == 240
    assert {question.meta["task"] for question in questions} == set(HALLUCINATION)
    # The file has no gold answers; the order that stands in for them agrees with the leaderboard's files.
    gold = {(a.image, a.text.removesuffix(" Please answer yes or no.")): a.label for a in MME().read_answers(lavin)}
    known = [(q, gold.get((q.image, q.text.split("\n")[0]))) for q in questions]
    assert sum(label is not None for _, label in known) > 230
    assert all(question.label == label for question, label in known if label is not None)


# Emoji scenes ------------------------------------------------------------------------------------------------------


def test_scene_questions_are_pairs_with_true_labels():
    scenes = lvlm_decode_data.load_scenes()[:40]
    (questions,) = MME().scene_questions(scenes).values()
    by_id = {str(scene.image_id): scene for scene in scenes}
    assert {question.meta["task"] for question in questions} == set(HALLUCINATION)
    assert questions == MME().scene_questions(scenes)["all"] and questions != MME().scene_questions(scenes, 1)["all"]
    for question in questions:
        names = [name for name in lvlm_decode_data.CATEGORIES if f" {name} " in question.text.replace("?", " ?")]
        if question.meta["task"] == "existence":
            assert (max(names, key=len) in by_id[question.image].categories) == (question.label == "yes")
    perfect = MME().summary(MME().rows([Answer.to(question, question.label) for question in questions]))
    assert perfect["hallucination"] == 800
    guesses = random.Random(0)
    guessed = [Answer.to(question, guesses.choice(("yes", "no"))) for question in questions]
    assert 200 < MME().summary(MME().rows(guessed))["hallucination"] < 400
