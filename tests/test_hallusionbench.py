"""HallusionBench: accuracy by question, figure and pair with a deterministic rule."""

import json

import pytest
from conftest import shared_path
from hypothesis import given
from hypothesis import strategies as st

import lvlm_decode_data
from lvlm_decode.errors import EvalError, FileFormatError
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.hallusionbench import HallusionBench


def answer(text, gold="1", category="VD", visual_input="1", figure="1", question="0", number="0"):
    keys = {
        "category": category,
        "subcategory": "chart",
        "set_id": number,
        "figure_id": figure,
        "question_id": question,
        "visual_input": visual_input,
    }
    label = {"1": "yes", "0": "no"}[gold]
    cluster = f"{category}/chart/{number}"
    return Answer(f"{cluster}/{figure}/{question}", text, label=label, cluster=cluster, meta=keys)


def summary(*answers):
    scorer = HallusionBench()
    return scorer.summary(scorer.rows(answers))


def test_by_hand():
    result = summary(
        answer("Yes", "1", figure="1", question="0"),
        answer("No", "1", figure="1", question="1"),
        answer("Yes, it is.", "1", figure="2", question="0"),
        answer("No", "0", figure="2", question="1"),
    )
    assert (result["a_acc"], result["f_acc"], result["q_acc"]) == (3 / 4, 1 / 2, 1 / 2)
    assert (result["questions"], result["figures"], result["pairs"]) == (4, 2, 2)
    assert result["yes_ratio"] == 0.5


def test_questions_without_a_figure():
    without = {"category": "VS", "visual_input": "0", "figure": "0"}
    result = summary(answer("I cannot see a chart.", **without), answer("Yes", category="VS", question="0"))
    # Undecided is right where the figure is missing, and such questions make no figure.
    assert result["a_acc"] == 1 and result["figures"] == 1 and result["pairs"] == 1 and result["unparsed"] == 0.5
    assert summary(answer("I cannot see a chart."))["a_acc"] == 0
    assert summary(answer("No", **without))["a_acc"] == 0


@given(
    st.lists(
        st.tuples(st.sampled_from("12"), st.sampled_from("012"), st.booleans()), min_size=1, unique_by=lambda c: c[:2]
    )
)
def test_grouped_accuracies_bound_each_other(cases):
    rows = [answer("yes" if right else "no", figure=figure, question=question) for figure, question, right in cases]
    result = summary(*rows)
    figures = {}
    for figure, _, right in cases:
        figures.setdefault(figure, []).append(right)
    assert result["figures_correct"] == sum(map(all, figures.values()))
    assert result["a_acc"] == sum(right for *_, right in cases) / len(cases)
    assert (result["f_acc"] == 1) == (result["q_acc"] == 1) == (result["a_acc"] == 1)


@pytest.mark.parametrize(("word", "name"), [("Yes", "always_yes"), ("No", "always_no")])
def test_recorded_degenerate_answers(word, name):
    expected = json.loads(shared_path("data/expected_shared.json").read_text())["hallusionbench_degenerate"][name]
    scorer = HallusionBench()
    (questions,) = scorer.file_questions(shared_path("data/hallusionbench/HallusionBench.json.gz")).values()
    assert len({question.id for question in questions}) == len(questions)
    assert sum(question.image is None for question in questions) == 178
    result = scorer.summary(scorer.rows([Answer.to(question, word) for question in questions]))
    assert {key: result[key] for key in ("questions", "figures", "pairs")} == {
        key: expected[key] for key in ("questions", "figures", "pairs")
    }
    for key, column in (("a_acc", "aAcc"), ("f_acc", "fAcc"), ("q_acc", "qAcc")):
        assert 100 * result[key] == pytest.approx(expected[column], rel=1e-12)


def test_answers_in_the_authors_form(tmp_path):
    record = {
        "category": "VD",
        "subcategory": "math",
        "visual_input": "1",
        "set_id": "0",
        "figure_id": "0",
        "question_id": "0",
        "question": "Is it?",
        "gt_answer": "1",
        "filename": "./VD/math/0_0.png",
        "model_prediction": "Yes.",
    }
    path = tmp_path / "output.json"
    path.write_text(json.dumps([record]))
    scorer = HallusionBench()
    (row,) = scorer.rows(scorer.read_answers(path))
    assert row.correct and row.cluster == "VD/math/0"
    path.write_text(json.dumps([record | {"gt_answer": "2"}]))
    with pytest.raises(FileFormatError, match="entry 1: field 'gt_answer' must be one of '0', '1'"):
        scorer.read_answers(path)
    del record["set_id"]
    path.write_text(json.dumps([record]))
    with pytest.raises(FileFormatError, match="entry 1: field 'set_id' is missing"):
        scorer.read_answers(path)


def test_label_must_be_yes_or_no():
    with pytest.raises(EvalError, match="must be yes or no"):
        HallusionBench().row(Answer(1, "Yes", label="maybe"))


def test_scene_twins_have_opposite_answers():
    scenes = lvlm_decode_data.load_scenes()[:120]
    (questions,) = HallusionBench().scene_questions(scenes).values()
    pairs = {}
    for question in questions:
        pairs.setdefault((question.cluster, question.meta["question_id"]), []).append(question)
    assert len(pairs) > 50
    for first, second in pairs.values():
        assert {first.label, second.label} == {"yes", "no"} and first.text == second.text
        assert first.image != second.image
    perfect = summary(*(Answer.to(question, question.label) for question in questions))
    assert (perfect["a_acc"], perfect["f_acc"], perfect["q_acc"]) == (1, 1, 1)
    always = summary(*(Answer.to(question, "Yes") for question in questions))
    assert always["a_acc"] == 0.5 and always["q_acc"] == 0
