"""R-Bench: the mean of five subsets as the authors' script computes it, restated."""

import json
import random
import re

import numpy as np
import pytest
from PIL import Image

import lvlm_decode_data
from lvlm_decode.errors import EvalError, FileFormatError, MissingFileError
from lvlm_decode_evals import joins, score
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.r_bench import RBench

BENCH = RBench()
TEXTS = ("Yes.", "No.", "There is not.", "Yes, no doubt", "Sure")


def files(tmp_path, number=40, missing=()):
    rng = random.Random(1)
    questions = [
        {"question_id": i, "image": f"{i % 7}.jpg", "text": f"Is {i}?", "label": rng.choice(["yes", "No"])}
        for i in range(number)
    ]
    (tmp_path / "image-level_filterd.json").write_text(json.dumps(questions))
    ids = {}
    for subset in range(1, 6):
        ids[subset] = rng.choices(range(number - 5), k=12)
        if subset not in missing:
            (tmp_path / f"image-level_ids_{subset}.json").write_text(json.dumps(ids[subset]))
    return questions, ids


def restated(questions, said, ids):
    """The authors' five figures for one subset."""
    golds = {q["question_id"]: 0 if "no" in q["label"].lower() else 1 for q in questions}
    pairs = []
    for name in ids:
        words = said[name].split(".")[0].replace(",", "").split(" ")
        pairs.append((0 if {"No", "not", "no"} & set(words) else 1, golds[name]))
    tp, fp, fn = pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1))
    precision, recall = tp / (tp + fp + 0.00001), tp / (tp + fn + 0.00001)
    f1 = 2 * precision * recall / (precision + recall + 0.00001)
    return [sum(p == g for p, g in pairs) / len(pairs), precision, recall, f1, sum(p for p, _ in pairs) / len(pairs)]


def test_the_authors_answer_file_has_the_answer_as_text(tmp_path):
    records, _ = files(tmp_path)
    (questions,) = BENCH.file_questions(tmp_path).values()
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"question_id": r["question_id"], "text": "No."}) + "\n" for r in records))
    answers, _ = joins.join(BENCH.matched(BENCH.read_answers(path), questions, str(path)), questions, str(path))
    assert {row.parsed for row in BENCH.rows(answers)} == {"no"}
    # With a prompt beside it (LLaVA's form) nothing changes.
    path.write_text(json.dumps({"question_id": 0, "prompt": records[0]["text"], "text": "Yes."}) + "\n")
    assert [(a.answer, a.text) for a in BENCH.read_answers(path)] == [("Yes.", records[0]["text"])]


def test_mean_of_five_subsets(tmp_path):
    records, ids = files(tmp_path)
    rng = random.Random(2)
    said = {record["question_id"]: rng.choice(TEXTS) for record in records}
    for place in (tmp_path, tmp_path / "image-level_filterd.json"):
        (questions,) = BENCH.file_questions(place).values()
        result = BENCH.summary(BENCH.rows([Answer.to(q, said[q.id]) for q in questions]))
        expected = [restated(records, said, ids[subset]) for subset in range(1, 6)]
        for i, name in enumerate(("accuracy", "precision", "recall", "f1", "yes_ratio")):
            assert result[name] == pytest.approx(sum(figures[i] for figures in expected) / 5)
        # Questions that no subset names are left out.
        assert result["subsets"] == 5 and result["n"] == len(set().union(*ids.values()))


def test_without_lists_all_questions_are_one_set(tmp_path):
    records, _ = files(tmp_path, missing=range(1, 6))
    (questions,) = BENCH.file_questions(tmp_path / "image-level_filterd.json").values()
    said = {q.id: "Yes" for q in questions}
    result = BENCH.summary(BENCH.rows([Answer.to(q, "Yes") for q in questions]))
    assert result["accuracy"] == restated(records, said, range(40))[0] and (result["subsets"], result["n"]) == (0, 40)


def test_an_incomplete_set_of_lists_is_an_error(tmp_path):
    files(tmp_path, missing=(3,))
    with pytest.raises(MissingFileError, match=r"lacks image-level_ids_3\.json; the mean is over five subsets"):
        BENCH.file_questions(tmp_path / "image-level_filterd.json")
    files(tmp_path)
    for subset in range(1, 6):
        (tmp_path / f"image-level_ids_{subset}.json").write_text('["x"]')
    with pytest.raises(FileFormatError, match="none of its ids is in the lists"):
        BENCH.file_questions(tmp_path / "image-level_filterd.json")


def test_listed_ids_without_a_question_are_told(tmp_path):
    records, ids = files(tmp_path)
    path = tmp_path / "image-level_filterd.json"
    path.write_text(json.dumps([r for r in records if r["question_id"] not in ids[1][:2]]))
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps({"question_id": r["question_id"], "text": "No."}) + "\n" for r in records)
    )
    found = score("r-bench", tmp_path / "answers.jsonl", path)
    gone = set(ids[1][:2])
    said = [f"{len(gone & set(ids[k]))} of {len(set(ids[k]))} of subset {k}" for k in ids if gone & set(ids[k])]
    assert found.problems[-1] == f"The question file lacks questions that the lists of ids name: {', '.join(said)}."
    assert found.audit.incomplete
    path.write_text(json.dumps(records))
    assert not score("r-bench", tmp_path / "answers.jsonl", path).problems
    # A subset of which nothing is asked leaves a mean of four.
    (tmp_path / "image-level_ids_4.json").write_text("[900, 901]")
    with pytest.raises(
        MissingFileError, match=r"has no question of image-level_ids_4\.json; the mean is over five subsets"
    ):
        score("r-bench", tmp_path / "answers.jsonl", path)


def test_types_are_splits_and_answers_need_labels(tmp_path):
    path = tmp_path / "web_data.json"
    records = [{"question_id": i, "image": "x", "text": "?", "label": "yes", "type": t} for i, t in enumerate("ab")]
    path.write_text(json.dumps(records))
    assert set(BENCH.file_questions(path)) == {"a", "b"}
    with pytest.raises(EvalError, match="has no label"):
        BENCH.row(Answer(1, "Yes"))


def test_scene_relations_are_true_and_their_opposites_false():
    scenes = {str(scene.image_id): scene for scene in lvlm_decode_data.load_scenes("heldout")}
    questions = BENCH.scene_questions(list(scenes.values()))["all"]
    assert [q.label for q in questions[:4]] == ["yes", "no", "yes", "no"] and len(questions) > 200
    for question in questions:
        words = question.text.removeprefix("Is the ").removesuffix(" in the image?")
        word = next(
            w for w in (" to the left of the ", " to the right of the ", " above the ", " below the ") if w in words
        )
        first, second = (scenes[question.image].of(name)[0].centre for name in words.split(word))
        truth = {" to the left of the ": first[0] < second[0], " to the right of the ": first[0] > second[0],
                 " above the ": first[1] < second[1], " below the ": first[1] > second[1]}[word]  # fmt: skip
        assert truth == (question.label == "yes")


def instance(**more):
    record = {"question_id": 3, "image": "a.jpg", "text": "Is there a cat on the table?", "label": "yes"}
    record |= {"subject": "Cat", "object": "table", "sub_box": [0.1, 0.2, 0.5, 0.6], "obj_box": [0, 0, 1, 1]}
    return {name: value for name, value in (record | more).items() if value is not None}


def write(tmp_path, *records):
    path = tmp_path / "instance-level_filterd.json"
    path.write_text(json.dumps(records))
    return path


def test_an_instance_level_question_names_the_boxes_that_are_drawn(tmp_path):
    ((question,),) = BENCH.file_questions(write(tmp_path, instance())).values()
    assert question.text == "Is there a cat in red bounding box on the table in green bounding box?"
    plain = Image.new("RGB", (100, 50), "white")
    seen = np.array(BENCH.shown(question, plain))
    assert (np.array(plain) == 255).all(), "the image itself stays as it was"
    red, green = (seen == (255, 0, 0)).all(-1), (seen == (0, 128, 0)).all(-1)
    expected = np.zeros((50, 100), bool)
    expected[10:31, 10:51] = True
    expected[14:27, 14:47] = False
    assert (red == expected).all()
    edge = np.ones((50, 100), bool)
    edge[4:46, 4:96] = False
    # The green rectangle ends on the pixel beyond the image's last.
    assert green[:4].all() and green[:, :4].all() and not (green & ~edge).any()
    (first, *_) = BENCH.scene_questions(lvlm_decode_data.load_scenes("heldout"))["all"]
    assert BENCH.shown(first, plain) is plain


def test_boxes_of_scenes_lie_around_the_objects_that_are_asked_about():
    scenes = {str(scene.image_id): scene for scene in lvlm_decode_data.load_scenes("heldout")}
    splits = BENCH.scene_questions(list(scenes.values()))
    for plain, marked in zip(splits["all"], splits["box"], strict=True):
        assert (marked.id, marked.label, marked.meta["text"]) == (plain.id, plain.label, plain.text)
        first, second = re.fullmatch(
            r"Is the (.+) in red bounding box .+ the (.+) in green bounding box in the image\?", marked.text
        ).groups()
        for name, box in zip((first, second), marked.meta["boxes"].values()):
            x, y = scenes[marked.image].of(name)[0].centre
            assert box[0] < x < box[2] and box[1] < y < box[3]


def test_the_authors_answers_to_instance_level_questions_are_joined(tmp_path):
    questions = BENCH.file_questions(write(tmp_path, instance()))["all"]
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"question_id": 3, "prompt": instance()["text"], "text": "Yes"}))
    answers = BENCH.matched(BENCH.read_answers(path), questions, str(path))
    (joined,), _ = joins.join(answers, questions, str(path))
    assert (joined.answer, joined.label) == ("Yes", "yes")
    path.write_text(json.dumps({"question_id": 3, "prompt": "Is there a dog?", "text": "Yes"}))
    with pytest.raises(EvalError, match="Is there a dog"):
        joins.join(BENCH.matched(BENCH.read_answers(path), questions, str(path)), questions, str(path))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"obj_box": None}, "obj_box"),
        ({"sub_box": [0, 0, 2, 1]}, "sub_box"),
        ({"sub_box": [0, 0, 1]}, "sub_box"),
        ({"subject": "dog"}, "must name subject 'dog' and object 'table'"),
        ({"object": ""}, "object"),
    ],
)
def test_instance_level_records_are_checked(tmp_path, wrong, said):
    with pytest.raises(FileFormatError, match=said):
        BENCH.file_questions(write(tmp_path, instance(**wrong)))
