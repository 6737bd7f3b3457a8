"""MMStar: the authors' letters, both averages, and the recorded integers of a 34B model."""

import json

import pytest
from conftest import shared_path

import lvlm_decode_data
from lvlm_decode.errors import FileFormatError, UnknownNameError
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.mmstar import MMStar, answer_letters

BENCH = MMStar()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", {"B"}),
        (" b.\n", {"B"}),
        ("(C) a cat", {"C"}),
        ("Option D", {"D"}),
        ("The answer is A.", {"A"}),
        ("because", {"B"}),
        ("a cat", {"A"}),
        ("The answer is (A)", set()),
        ("E", set()),
        ("", set()),
        ("(", set()),
    ],
)
def test_letters(text, expected):
    assert answer_letters(text) == expected


def test_recorded_answers_of_llava_next_34b():
    recorded = json.loads(shared_path("data/benchmarks/mmstar_llava_next_yi_34b.json").read_text())
    answers = [
        Answer(f"{skill} {i}", "A" if i < right else "B", label="A", meta={"category": category, "l2_category": skill})
        for category, skill, right, n in recorded["by_l2"]
        for i in range(n)
    ]
    result = BENCH.summary(BENCH.rows(answers))
    assert (result["correct"], result["n"]) == (781, 1500) and result["accuracy"] == 781 / 1500
    # The two averages in use differ on the same answers.
    assert round(100 * result["by_skill"], 2) == 52.72
    names = ("coarse perception", "fine-grained perception", "instance reasoning", "logical reasoning", "math")
    assert [round(250 * result[name]) for name in names] == [164, 130, 156, 115, 133]
    assert round(250 * result["science & technology"]) == 83


def test_sheets_of_questions_and_of_answers(tmp_path):
    header = "index\tquestion\tanswer\tcategory\tl2_category"
    (tmp_path / "q.tsv").write_text(f"{header}\n7\tWhich? Options: A: x, B: y\tB\tmath\tgeometry\n")
    (question,) = BENCH.file_questions(tmp_path / "q.tsv")["all"]
    assert (question.id, question.image, question.label) == (7, "7.jpg", "B")
    assert question.meta == {"category": "math", "l2_category": "geometry"}
    (tmp_path / "a.csv").write_text(
        "index,question,answer,category,l2_category,bench,prediction\n"
        '7.0,"Which?\nOptions: A: x, B: y",B,math,geometry,x,"B, y"\n'
    )
    (answer,) = BENCH.read_answers(tmp_path / "a.csv")
    assert (answer.question_id, answer.answer, answer.label) == (7, "B, y", "B")
    assert BENCH.summary(BENCH.rows([answer]))["math"] == 1
    # A record without a prediction is no answer: its gold letter must not be scored as one.
    record = {"question_id": 7, "answer": "B"}
    (tmp_path / "a.json").write_text(json.dumps([{**record, "prediction": "A"}, {**record, "question_id": 8}]))
    with pytest.raises(FileFormatError, match="entry 2: field 'prediction' is missing"):
        BENCH.read_answers(tmp_path / "a.json")


def test_scene_words_are_read_and_several_words_are_no_answer():
    (questions,) = BENCH.scene_questions(lvlm_decode_data.load_scenes("heldout")).values()
    assert {q.meta["category"] for q in questions} == {"color", "count", "position"}
    right = [Answer.to(q, q.meta["choices"][ord(q.label) - 65]) for q in questions]
    result = BENCH.summary(BENCH.rows(right))
    assert result["accuracy"] == result["by_skill"] == result["color"] == 1
    for answer in (" ".join(questions[0].meta["choices"]), "", "A"):
        row = BENCH.row(Answer.to(questions[0], answer))
        assert not row.correct and not row.clear


def test_broken_sheets(tmp_path):
    (tmp_path / "q.csv").write_text("index,question,answer,category,l2_category\nx,?,A,math,geometry\n")
    with pytest.raises(FileFormatError, match=r"line 2: field 'index' must be a whole number, found 'x'"):
        BENCH.file_questions(tmp_path / "q.csv")
    (tmp_path / "q.csv").write_text("index,question,category,l2_category\n1,?,math,geometry\n")
    with pytest.raises(FileFormatError, match="field 'answer' is missing; found index, question"):
        BENCH.file_questions(tmp_path / "q.csv")
    with pytest.raises(FileFormatError, match="has no label"):
        BENCH.row(Answer(1, "A", meta={"category": "math"}))


def test_an_unknown_category_is_named_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"question 1: category of MMStar 'maths' is unknown.*nearest is 'math'"):
        BENCH.row(Answer(1, "A", label="A", meta={"category": "maths"}))
