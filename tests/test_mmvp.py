"""MMVP: pairs, disputed labels, and letters as lmms-eval reads them."""

import json

import pytest

import lvlm_decode_data
from lvlm_decode.errors import EvalError, FileFormatError, UnknownNameError
from lvlm_decode_evals import score
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.joins import join
from lvlm_decode_evals.mmvp import MMVP, answer_letter

OFFICIAL = MMVP(labels="official")


def sheet(tmp_path, labels=None):
    """300 invented questions; gold letters alternate as in pairs, the disputed ones as the authors have them."""
    labels = labels or {99: "(a)", 100: "(b)", 279: "(a)", 280: "(b)"}
    lines = ["Index,Question,Options,Correct Answer"]
    for i in range(1, 301):
        lines.append(f'{i},"Is it, {(i + 1) // 2}?",(a) Yes (b) No,{labels.get(i, "(a)" if i % 2 else "(b)")}')
    path = tmp_path / "Questions.csv"
    path.write_text("﻿" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(A).", "A"),
        ("b", "B"),
        ("B. The dog", "B"),
        ("A dog", "A"),
        ("The answer is (b)", "B"),
        ("I choose option A!", "A"),
        ("In front of the camera", "A"),
        ("banana!", "B"),
        ("zebra", "A"),
        ("", None),
        ("Unsure.", None),
    ],
)
def test_letters(text, expected):
    assert answer_letter(text) == expected


def test_pairs_and_degenerate_answers(tmp_path):
    (questions,) = OFFICIAL.file_questions(sheet(tmp_path)).values()
    assert len(questions) == 300 and questions[0].text.startswith("Is it, 1?\nA. Yes\nB. No\nAnswer with")
    assert [q.cluster for q in questions[:3]] == ["pair 1", "pair 1", "pair 2"]
    for letter in "AB":
        result = OFFICIAL.summary(OFFICIAL.rows([Answer.to(q, letter) for q in questions]))
        assert (result["accuracy"], result["pair_accuracy"], result["pairs"]) == (0.5, 0, 150)
    right = [Answer.to(q, q.label) for q in questions]
    assert OFFICIAL.summary(OFFICIAL.rows(right))["pair_accuracy"] == 1


def test_the_four_disputed_labels_move_two_pairs_whichever_file_is_read(tmp_path):
    corrected = {99: "(b)", 100: "(a)", 279: "(b)", 280: "(a)"}
    for labels in (None, corrected):
        (questions,) = MMVP().file_questions(sheet(tmp_path, labels)).values()
        # Answers that follow the authors' labels.
        said = [Answer.to(q, "A" if int(q.id) % 2 else "B") for q in questions]
        assert OFFICIAL.summary(OFFICIAL.rows(said))["pairs_correct"] == 150
        assert MMVP().summary(MMVP().rows(said))["pairs_correct"] == 148


def test_in_the_authors_file_answer_is_the_gold_letter(tmp_path):
    path = tmp_path / "answers.jsonl"
    lines = [{"question_id": i, "prompt": "?", "answer": "(a)" if i % 2 else "(b)", "response": "(b)"} for i in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = OFFICIAL.read_answers(path)
    assert [answer.answer for answer in answers] == ["(b)", "(b)"]
    result = OFFICIAL.summary(OFFICIAL.rows(answers))
    assert (result["accuracy"], result["pair_accuracy"], result["pairs"]) == (0.5, 0, 1)
    # A line without what the model said is no answer, and its gold letter is none either.
    path.write_text(
        json.dumps(lines[0]) + "\n" + json.dumps({**lines[1], "question_id": "2.0", "response": None}) + "\n"
    )
    (_, silent) = OFFICIAL.rows(OFFICIAL.read_answers(path))
    assert not silent.clear and silent.evidence["pair"] == "1"
    del lines[1]["response"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(FileFormatError, match="line 2: field 'response' is missing"):
        OFFICIAL.read_answers(path)
    # Answers without a label take the question file's, and keep their pair.
    (questions,) = OFFICIAL.file_questions(sheet(tmp_path)).values()
    plain = join([Answer(1, "A"), Answer(2, "B")], questions, "answers")[0]
    assert OFFICIAL.summary(OFFICIAL.rows(plain))["pair_accuracy"] == 1


def test_the_authors_prompts_are_those_of_their_question_file(tmp_path):
    path, questions = tmp_path / "answers.jsonl", tmp_path / "Questions.csv"
    options = "(a) The left (b) The right"
    rows = [(1, "Where does the dog look?", options, "(a)"), (2, "Where does the dog look?", options, "(b)")]
    questions.write_text(
        "Index,Question,Options,Correct Answer\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    )

    def lines(prompt):
        return "".join(
            json.dumps({"question_id": i, "prompt": prompt, "answer": gold, "response": gold}) + "\n"
            for i, _, _, gold in rows
        )

    for prompt in (f"Where does the dog look? {options}", f"<image>\nWhere does the dog look?\n{options}\nOne letter."):
        path.write_text(lines(prompt))
        found = score(MMVP(), path, questions)
        assert found.rates["pair_accuracy"] == 1 and not found.audit
    for prompt in (f"Where does the cat look? {options}", "Where does the dog look? (a) The left (b) Away", "look"):
        path.write_text(lines(prompt))
        with pytest.raises(EvalError, match="2 of 2 answers are about something else"):
            score(MMVP(), path, questions)


def test_scenes_have_opposite_answers_in_words():
    (questions,) = MMVP().scene_questions(lvlm_decode_data.load_scenes("heldout")).values()
    for first, second in zip(questions[::2], questions[1::2]):
        assert first.text == second.text and first.image != second.image
        assert (first.label, second.label) == ("A", "B") and first.meta == second.meta
    words = [Answer.to(q, f"{q.meta['choices'][q.label == 'B'].capitalize()}.") for q in questions]
    assert MMVP().summary(MMVP().rows(words))["pair_accuracy"] == 1
    assert MMVP().summary(MMVP().rows([Answer.to(q, q.meta["choices"][0]) for q in questions]))["pair_accuracy"] == 0
    both = Answer.to(questions[0], " or ".join(questions[0].meta["choices"]))
    assert not MMVP().row(both).clear


def test_broken_files_and_options(tmp_path):
    with pytest.raises(UnknownNameError, match="labels of mmvp 'mine' is unknown"):
        MMVP(labels="mine")
    path = tmp_path / "Questions.csv"
    path.write_text("Index,Question,Options,Correct Answer\n1,?,(a) x (b) y,(c)\n")
    with pytest.raises(FileFormatError, match=r"line 2: the gold answer must be one of A, B, found '\(c\)'"):
        MMVP().file_questions(path)
    path.write_text("Index,Question,Options,Correct Answer\n1,?,x or y,(a)\n")
    with pytest.raises(FileFormatError, match="options must read"):
        MMVP().file_questions(path)
    path.write_text("Index,Question,Options,Correct Answer\n1,?,(a) x (b) y\n")
    with pytest.raises(FileFormatError, match="line 2: 3 cells, the header has 4"):
        MMVP().file_questions(path)
    path.write_text("Index,Question\n")
    with pytest.raises(FileFormatError, match="holds no line below its header"):
        MMVP().file_questions(path)


def test_a_sheet_or_answers_that_count_from_0_are_refused(tmp_path):
    """The last question of one pair and the first of the next would be taken for one pair."""
    path = sheet(tmp_path)
    header, *lines = path.read_text(encoding="utf-8-sig").splitlines()
    shifted = [f"{int(line.partition(',')[0]) - 1},{line.partition(',')[2]}" for line in lines]
    path.write_text("\n".join([header, *shifted]) + "\n")
    with pytest.raises(
        EvalError, match=r"1 and 2 are no pair.*'Is it, 1\?' and 'Is it, 2\?'; indices must count from 1"
    ):
        OFFICIAL.file_questions(path)
    texts = [(i, f"Is it, {i // 2}? (a) Yes (b) No", "ab"[i % 2]) for i in range(6)]
    said = [{"question_id": i, "prompt": text, "answer": gold, "response": gold} for i, text, gold in texts]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    with pytest.raises(EvalError, match="the answers: 1 and 2 are no pair"):
        score("mmvp", tmp_path / "answers.jsonl")
    # The options of the two may differ, and answers that do not say what was asked cannot be told.
    for line in said:
        line |= {
            "question_id": line["question_id"] + 1,
            "prompt": line["prompt"].replace("No", str(line["question_id"])),
        }
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    assert score("mmvp", tmp_path / "answers.jsonl").rates["pair_accuracy"] == 1


def test_without_a_whole_pair_there_is_no_pair_accuracy(tmp_path):
    (questions,) = OFFICIAL.file_questions(sheet(tmp_path)).values()
    result = OFFICIAL.summary(OFFICIAL.rows([Answer.to(q, q.label) for q in questions[::2]]))
    assert "pair_accuracy" not in result and (result["accuracy"], result["pairs"]) == (1, 0)
