"""DASH-B: the recorded 2 x 2 table, identity of a question, degenerate answers."""

import json

import pytest
from conftest import shared_path

import lvlm_decode_data
from lvlm_decode.errors import EvalError, FileFormatError
from lvlm_decode_evals.answers import audit
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.dash_b import DashB

BENCH = DashB()


def test_recorded_answers_of_paligemma(tmp_path):
    """Rebuilt from the per-object integers, in the authors' form of a file."""
    recorded = json.loads(shared_path("data/benchmarks/dash_b_paligemma.json").read_text())["per_object"]
    lines = []
    for name, (tn, negatives, tp, positives) in recorded.items():
        for gold, right, n in (("no", tn, negatives), ("yes", tp, positives)):
            wrong = {"no": "yes", "yes": "no"}[gold]
            lines += [
                # The same file name serves several objects, and both sides.
                {"img_id": f"{i}.png", "object_name": name, "gt": gold, "response": said, "answer": said}
                for i in range(n)
                for said in [gold if i < right else wrong]
            ]
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(lines))
    usable, trouble = audit(BENCH.read_answers(path))
    assert len(usable) == 2682 and not trouble
    report = BENCH.report(BENCH.rows(usable))
    assert (report["tn"], report["fp"], report["fn"], report["tp"]) == (354, 987, 183, 1158)
    assert report["accuracy"] == 0.5637583892617449 and report["harmonic"] == pytest.approx(0.40435353858172646)
    assert (report["tnr"], report["tpr"]) == (0.2639821029082774, 0.8635346756152126)
    assert {name: [*sides["no"], *sides["yes"]] for name, sides in report["objects"].items()} == recorded


def lists(tmp_path):
    (tmp_path / "dash_benchmark_neg.json").write_text(json.dumps({"coco": {"bed": ["1.png", "2.png"]}}))
    (tmp_path / "dash_benchmark_pos.json").write_text(json.dumps({"coco": {"bed": ["3.png"]}, "x": {"oar": ["3.png"]}}))
    return tmp_path


def test_lists_of_the_authors(tmp_path):
    (questions,) = BENCH.file_questions(lists(tmp_path)).values()
    assert [q.id for q in questions] == [
        "no/coco/bed/1.png", "no/coco/bed/2.png", "yes/coco/bed/3.png", "yes/x/oar/3.png"]  # fmt: skip
    # The article is always "a", as in the authors' prompt.
    assert questions[3].text == "Can you see a oar in this image? Please answer only with yes or no."
    assert questions[2].image == "pos/coco/bed/3.png"
    (half,) = BENCH.file_questions(tmp_path / "dash_benchmark_neg.json").values()
    assert half == questions[:2]


def test_rows_of_the_hub(tmp_path):
    (tmp_path / "DASH-B.jsonl").write_text(
        '{"question_id": 4, "object": "bed", "answer": "No", "image": "9", "question": "?"}\n'
    )
    (question,) = BENCH.file_questions(tmp_path / "DASH-B.jsonl")["all"]
    assert (question.id, question.label, question.image, question.meta) == (4, "no", "9", {"object": "bed"})
    (tmp_path / "DASH-B.jsonl").write_text('{"question_id": 4, "object": "bed", "answer": "maybe", "image": "9"}\n')
    with pytest.raises(FileFormatError, match="field 'answer' must be yes or no, found 'maybe'"):
        BENCH.file_questions(tmp_path / "DASH-B.jsonl")


@pytest.mark.parametrize(
    ("said", "accuracy", "tnr", "tpr", "harmonic"),
    [("Yes", 0.5, 0, 1, 0), ("No", 0.5, 1, 0, 0), ("", 0, 0, 0, 0), ("a bed", 0, 0, 0, 0)],
)
def test_degenerate_answers(tmp_path, said, accuracy, tnr, tpr, harmonic):
    (questions,) = BENCH.file_questions(lists(tmp_path)).values()
    result = BENCH.summary(BENCH.rows([Answer.to(q, said) for q in questions]))
    assert (result["accuracy"], result["tnr"], result["tpr"], result["harmonic"]) == (accuracy, tnr, tpr, harmonic)
    assert result["unparsed"] == (said not in ("Yes", "No"))


def test_scenes_ask_as_often_about_either_side_of_an_object():
    scenes = {str(scene.image_id): scene for scene in lvlm_decode_data.load_scenes("heldout")}
    (questions,) = BENCH.scene_questions(list(scenes.values())).values()
    counts = {}
    for question in questions:
        name = question.meta["object"]
        assert (name in scenes[question.image].categories) == (question.label == "yes")
        counts.setdefault(name, []).append(question.label)
    assert all(labels.count("yes") == labels.count("no") for labels in counts.values()) and len(questions) > 100
    # The first N questions are of both sides.
    assert [q.label for q in questions[:4]] == ["no", "yes", "no", "yes"]


def test_broken_files(tmp_path):
    (tmp_path / "dash_benchmark_pos.json").write_text('{"coco": ["bed"]}')
    with pytest.raises(FileFormatError, match="source 'coco' must map objects to lists of files"):
        BENCH.file_questions(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FileFormatError, match=r"expected dash_benchmark_neg\.json and"):
        BENCH.file_questions(tmp_path / "other.json")
    with pytest.raises(EvalError, match="the gold answer must be yes or no, found None"):
        BENCH.row(Answer(1, "yes"))


@pytest.mark.parametrize(("label", "rate"), [("yes", "tpr"), ("no", "tnr")])
def test_one_side_alone_has_no_rate_of_the_other(label, rate):
    text = "Can you see a dog in this image?"
    rows = BENCH.rows([Answer(i, label, text, f"{i}.png", label) for i in range(3)])
    result = BENCH.summary(rows)
    assert result[rate] == result["accuracy"] == 1
    assert not {"tnr", "tpr", "harmonic"} - {rate} & result.keys()
