"""NaturalBench: groups of two questions about two images, by truth table and by degenerate answers."""

import itertools
import json

import pytest
from runs import naturalbench, result

import lvlm_decode_data
from lvlm_decode.errors import EvalError, FileFormatError
from lvlm_decode_evals import score
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.joins import join
from lvlm_decode_evals.metrics import compare
from lvlm_decode_evals.naturalbench import NaturalBench, verdict
from lvlm_decode_evals.price import price_blocks
from lvlm_decode_evals.tables import blocks

BENCH = NaturalBench()


def group_file(tmp_path, kind="yes_no", groups=3):
    path = tmp_path / "groups.jsonl"
    records = [{"Index": g, "Question_0": f"Is {g} a?", "Question_1": f"Is {g} b?", "Question_Type": kind}
               for g in range(groups)]  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def scores(said, kind="yes_no"):
    """Summary of one group from its four answers."""
    answers = [Answer(index, text, meta={"type": kind}) for index, text in enumerate(said)]
    return BENCH.summary(BENCH.rows(answers))


@pytest.mark.parametrize("kind", ["yes_no", "multiple_choice"])
def test_truth_table(kind):
    """All 81 patterns of yes, no and nothing, against the authors' definitions written out."""
    words = {1: ("Yes.", "(A)"), 0: ("No, it is not.", "B."), -1: ("I cannot tell.", "the first")}
    for calls in itertools.product((1, 0, -1), repeat=4):
        result = scores([words[call][kind == "multiple_choice"] for call in calls], kind)
        a, b, c, d = calls
        question = (a == 1 and b == 0) + (d == 1 and c == 0)
        image = (a == 1 and c == 0) + (d == 1 and b == 0)
        assert result["q_acc"] == question / 2 and result["i_acc"] == image / 2, calls
        assert result["g_acc"] == (question == image == 2)
        assert result["accuracy"] == ((a == 1) + (b == 0) + (c == 0) + (d == 1)) / 4
        assert result["unparsed"] == calls.count(-1) / 4 and result["yes_ratio"] == calls.count(1) / 4


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("yes", "yes_no", 1),
        ("No yes", "yes_no", 0),
        ("I know", "yes_no", -1),
        ("Noyes", "yes_no", -1),
        ("", "yes_no", -1),
        ("b", "multiple_choice", 0),
        ("This is a dog, B", "multiple_choice", 1),
        ("Option B, not A", "multiple_choice", 0),
        ("Bat", "multiple_choice", -1),
    ],
)
def test_words_are_whole_and_the_earlier_one_counts(text, kind, expected):
    assert verdict(text, kind) == expected


def test_files_in_either_form_ask_the_same(tmp_path):
    (grouped,) = BENCH.file_questions(group_file(tmp_path, "multiple_choice")).values()
    lines = [
        {"Index": 4 * g + k, "Question": f"Is {g} {'ab'[k // 2]}?", "Question_Type": "multiple_choice"}
        for g in range(3) for k in range(4)
    ]  # fmt: skip
    for name, text in {
        "calls.json": json.dumps(lines),
        "calls.tsv": "Index\tQuestion\tQuestion_Type\n"
        + "".join(f"{r['Index']}\t{r['Question']}\tmultiple_choice\n" for r in lines),
    }.items():
        (tmp_path / name).write_text(text)
        (single,) = BENCH.file_questions(tmp_path / name).values()
        assert single == grouped
    assert [q.label for q in grouped[:4]] == ["A", "B", "B", "A"]
    assert [q.image for q in grouped[:4]] == ["0_0.jpg", "0_1.jpg", "0_0.jpg", "0_1.jpg"]
    assert {q.cluster for q in grouped[:4]} == {"0"} and grouped[4].text.startswith("Is 1 a? Please output the letter")


def test_always_the_same_answer_and_a_blind_model(tmp_path):
    (questions,) = BENCH.file_questions(group_file(tmp_path, groups=8)).values()
    for text in ("Yes", "No"):
        result = BENCH.summary(BENCH.rows([Answer.to(question, text) for question in questions]))
        assert (result["accuracy"], result["q_acc"], result["i_acc"], result["g_acc"]) == (0.5, 0, 0, 0)
    blind = [Answer.to(q, "Yes" if q.meta["place"] < 2 else "No") for q in questions]
    assert BENCH.summary(BENCH.rows(blind))["q_acc"] == 0
    right = [Answer.to(q, q.label) for q in questions]
    assert BENCH.summary(BENCH.rows(right))["g_acc"] == 1


def test_an_unfinished_group_counts_among_questions_only(tmp_path):
    (questions,) = BENCH.file_questions(group_file(tmp_path)).values()
    result = BENCH.summary(BENCH.rows([Answer.to(q, q.label) for q in questions[:6]]))
    assert (result["n"], result["groups"], result["g_acc"], result["accuracy"]) == (6, 1, 1.0, 1.0)


def test_the_authors_plain_list_of_answers(tmp_path):
    (questions,) = BENCH.file_questions(group_file(tmp_path)).values()
    (tmp_path / "said.json").write_text(json.dumps(["Yes", "No", "No", "Yes"] * 3))
    answers = join(BENCH.read_answers(tmp_path / "said.json"), questions, "answers")[0]
    assert BENCH.summary(BENCH.rows(answers))["g_acc"] == 1


@pytest.mark.parametrize(
    ("listed", "entry", "found"),
    [
        (["Yes", None, "No", "Yes"], 2, "None"),
        ([None, "Yes", "No"], 1, "None"),
        (["Yes", "No", {"answer": "No"}], 3, "{'answer': 'No'}"),
        (["Yes", 3], 2, "3"),
    ],
)
def test_an_entry_of_the_plain_list_that_is_no_text_is_named(tmp_path, listed, entry, found):
    (tmp_path / "said.json").write_text(json.dumps(listed))
    with pytest.raises(
        FileFormatError, match=rf"said\.json, entry {entry}: expected the text of an answer, found {found}\."
    ):
        BENCH.read_answers(tmp_path / "said.json")


def test_scene_groups_are_true_of_one_image_and_false_of_the_other():
    scenes = {str(scene.image_id): scene for scene in lvlm_decode_data.load_scenes("heldout")}
    (questions,) = BENCH.scene_questions(list(scenes.values())).values()
    assert {q.meta["task"] for q in questions} == {"color", "count", "position"}
    assert len({q.id for q in questions}) == len(questions) > 400
    for question in questions:
        scene, asked = scenes[question.image], question.text
        if question.meta["task"] == "count":
            (name, number) = next(
                (n, k) for n in scene.counts for k in (1, 2, 3) if asked.startswith(_count_question(n, k))
            )
            truth = scene.counts[name] == number
        elif question.meta["task"] == "color":
            truth = any(scene.colour(n) and f" a {scene.colour(n)} {n} " in asked for n in scene.categories)
        else:
            name = next(n for n in scene.categories if asked.startswith(f"Is the {n} on"))
            truth = f"on the {scene.of(name)[0].horizontal()} side" in asked
        assert truth == (question.label == "yes"), question


def test_scenes_say_what_is_seen_by_task():
    (questions,) = BENCH.scene_questions(lvlm_decode_data.load_scenes("heldout")).values()
    said = [Answer.to(q, q.label if q.meta["task"] == "color" else "Yes") for q in questions]
    result = BENCH.summary(BENCH.rows(said))
    assert (result["color_acc"], result["count_acc"], result["position_acc"]) == (1, 0, 0)
    assert sum(result[f"{task}_groups"] for task in ("color", "count", "position")) == result["groups"]
    assert result["g_acc"] == result["color_groups"] / result["groups"]


def _count_question(name, number):
    from lvlm_decode_data.texts import count_question

    return count_question(name, number)


def test_broken_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"Index": 0, "Question": "?", "Question_Type": "yes_no"}\n')
    with pytest.raises(FileFormatError, match="1 lines; a group has four"):
        BENCH.file_questions(path)
    path.write_text('{"Index": 0, "Question_0": "?", "Question_1": "?", "Question_Type": "open"}\n')
    with pytest.raises(FileFormatError, match=r"line 1: Question_Type must be yes_no or multiple_choice, found 'open'"):
        BENCH.file_questions(path)
    with pytest.raises(FileFormatError, match="give --questions FILE"):
        BENCH.row(Answer(0, "Yes"))


@pytest.mark.parametrize("number", [3, 5, 8])
def test_a_list_of_another_length_than_its_questions_is_refused(tmp_path, number):
    """Its order is all that says what was answered."""
    group = {"Index": 7, "Question_0": "Is it?", "Question_1": "Is that?", "Question_Type": "yes_no"}
    questions, path = tmp_path / "q.json", tmp_path / "a.json"
    questions.write_text(json.dumps([group]))
    path.write_text(json.dumps(["Yes", "No", "No", "Yes", "Yes", "No", "No", "Yes"][:number]))
    with pytest.raises(EvalError, match=f"{number} answers without ids and 4 questions"):
        score("naturalbench", path, questions)
    path.write_text(json.dumps(["Yes", "No", "No", "Yes"]))
    assert score("naturalbench", path, questions).rates["g_acc"] == 1


def calls_sheet(tmp_path, first=0, answers=None):
    """Three groups, a line for each call; answers: what the four calls of a group have in the column of that name."""
    lines = [f"Index\tQuestion\tQuestion_Type{'' if answers is None else chr(9) + 'Answer'}"]
    for g in range(3):
        for k in range(4):
            more = "" if answers is None else f"\t{answers[k]}"
            lines.append(f"{first + 4 * g + k}\tIs {g} {'ab'[k // 2]}?\tyes_no{more}")
    path = tmp_path / "calls.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_sheet_that_counts_from_1_is_refused(tmp_path):
    gold = ("Yes", "No", "No", "Yes")
    for answers in (None, gold):
        (questions,) = BENCH.file_questions(calls_sheet(tmp_path, answers=answers)).values()
        assert [q.label for q in questions[:4]] == ["yes", "no", "no", "yes"]
    with pytest.raises(EvalError, match=r"calls 2 and 3 of group 0 must ask one question.*indices must count from 0"):
        BENCH.file_questions(calls_sheet(tmp_path, first=1))
    with pytest.raises(
        EvalError, match=r"line 2, index 1: the sheet's answer is yes, and by the order of calls it is no"
    ):
        BENCH.file_questions(calls_sheet(tmp_path, first=1, answers=gold))


def test_a_sheet_whose_answers_contradict_the_order_of_calls_is_refused(tmp_path):
    with pytest.raises(
        EvalError, match="line 2, index 0: the sheet's answer is no, and by the order of calls it is yes"
    ):
        BENCH.file_questions(calls_sheet(tmp_path, answers=("No", "Yes", "Yes", "No")))
    path = group_file(tmp_path, "multiple_choice", groups=1)
    record = json.loads(path.read_text())
    gold = {f"Image_{i}_Question_{q}": "AB"[i != q] for i in (0, 1) for q in (0, 1)}
    path.write_text(json.dumps(record | gold) + "\n")
    assert [q.label for q in BENCH.file_questions(path)["all"]] == ["A", "B", "B", "A"]
    path.write_text(json.dumps(record | gold | {"Image_1_Question_0": "A"}) + "\n")
    with pytest.raises(
        EvalError, match="question 0 about image 1: the sheet's answer is A, and by the order of calls it is B"
    ):
        BENCH.file_questions(path)


def test_answers_whose_places_ask_something_else_are_refused(tmp_path):
    (questions,) = BENCH.file_questions(calls_sheet(tmp_path)).values()
    shifted = [Answer(q.id + 1, q.label, q.text, meta={"type": "yes_no"}) for q in questions]
    with pytest.raises(EvalError, match="the answers: calls 2 and 3 of group 0"):
        BENCH.rows(shifted)


def test_without_a_whole_group_there_is_no_grouped_figure(tmp_path):
    (questions,) = BENCH.file_questions(group_file(tmp_path)).values()
    result = BENCH.summary(BENCH.rows([Answer.to(q, q.label) for q in questions[:3]]))
    assert result["groups"] == 0 and not {"g_acc", "q_acc", "i_acc"} & result.keys()


def test_colour_count_and_position_are_compared_in_pairs():
    """In the differences of a table and as figures of ability in the price of a method."""
    (questions,) = BENCH.scene_questions(lvlm_decode_data.load_scenes("heldout")).values()
    right = [Answer.to(q, q.label) for q in questions]
    blind = [Answer.to(q, q.label if q.meta["task"] == "color" else "Yes") for q in questions]
    found = compare(BENCH, [BENCH.rows(blind)], [BENCH.rows(right)], replicates=200).differences
    assert found["color_acc"].value == 0 and found["count_acc"].value == found["position_acc"].value == -1
    assert found["count_acc"].excludes_zero and not found["color_acc"].excludes_zero
    cells = [result("naturalbench", "all", name, said) for name, said in (("plain", right), ("vcd", blind))]
    titles = [column for column in price_blocks(cells, 200)[0].columns if column.startswith("Δ naturalbench")]
    assert titles == [f"Δ naturalbench: gAcc{task} ↑" for task in ("", " color", " count", " position")]
    (differences,) = [block for block in blocks(cells, 200) if "minus" in block.title]
    assert {"Δ gAcc color", "Δ gAcc count", "Δ gAcc position"} <= set(differences.columns)
    # A file of questions names no skills, and then there are no such columns.
    cells = [naturalbench("plain", 30), naturalbench("vcd", 10)]
    assert not any("color" in column for column in price_blocks(cells, 200)[0].columns)
