"""BEAF: change-aware groups against the recorded integers of GPT-4o, and scenes with an object taken out."""

import json

import numpy as np
import pytest
from conftest import shared_path

import lvlm_decode_data
from lvlm_decode.errors import EvalError, FileFormatError
from lvlm_decode_evals import score
from lvlm_decode_evals.base import Answer
from lvlm_decode_evals.beaf import BEAF
from lvlm_decode_evals.joins import join

BENCH = BEAF()
# A letter pair of the recorded counts: right or wrong, and what was said; so gold and answer follow.
GOLD = {"TP": "yes", "FN": "yes", "TN": "no", "FP": "no"}
SAID = {"TP": "Yes.", "FP": "Yes.", "TN": "No.", "FN": "No."}


def pair(number, before, after, removed):
    """The two records of a pair, original first, and what was said about each."""
    name = f"COCO_val2014_{number:012d}"
    record = {"question": f"Is there a {number} in the image?", "removed_q": removed}
    return [
        (record | {"id": 2 * number, "image": f"{name}.jpg", "orig_img": True, "gt": GOLD[before]}, SAID[before]),
        (record | {"id": 2 * number + 1, "image": f"{name}_01.png", "orig_img": False, "gt": GOLD[after]}, SAID[after]),
    ]


def scored(tmp_path, records, said):
    (tmp_path / "qna.json").write_text(json.dumps(records))
    (tmp_path / "said.json").write_text(json.dumps([{"id": r["id"], "answer": s} for r, s in zip(records, said)]))
    (questions,) = BENCH.file_questions(tmp_path / "qna.json").values()
    answers = join(BENCH.read_answers(tmp_path / "said.json"), questions, "answers")[0]
    return BENCH.summary(BENCH.rows(answers))


def test_recorded_pairs_of_gpt_4o(tmp_path):
    recorded = json.loads(shared_path("data/benchmarks/beaf_gpt4o.json").read_text())
    kinds = [(kind, n, True) for kind, n in recorded["pairs_removed_q"].items()]
    kinds += [(kind, n, False) for kind, n in recorded["id_pairs"].items()]
    lines = []
    for kind, n, removed in kinds:
        for _ in range(n):
            lines += pair(len(lines), kind[:2], kind[2:], removed)
    result = scored(tmp_path, [record for record, _ in lines], [said for _, said in lines])
    assert [result[f"{name}_pairs"] for name in ("tu", "ig", "sb_plus", "sb_minus")] == [1030, 5, 365, 327]
    assert (result["removals"], result["others"], result["turned"]) == (1727, 13230, 308)
    percent = {name: round(100 * result[name], 4) for name in ("tu", "ig", "sb_plus", "sb_minus", "id", "f1_tu_id")}
    assert percent == {
        "tu": 59.641, "ig": 0.2895, "sb_plus": 21.1349, "sb_minus": 18.9346, "id": 2.328, "f1_tu_id": 74.0594}  # fmt: skip


@pytest.mark.parametrize(("word", "group"), [("Yes", "sb_plus"), ("No", "sb_minus")])
def test_always_the_same_answer(tmp_path, word, group):
    lines = [*pair(1, "TP", "TN", True), *pair(2, "TN", "TN", False), *pair(3, "TP", "TP", True)]
    result = scored(tmp_path, [record for record, _ in lines], [word] * len(lines))
    assert (result[group], result["tu"], result["id"], result["removals"]) == (1, 0, 0, 1)
    assert sum(result[name] for name in ("tu", "ig", "sb_plus", "sb_minus")) == 1


def test_an_unparsed_answer_is_in_no_group_and_never_the_answer_before_it(tmp_path):
    lines = [*pair(1, "TP", "TN", True), *pair(2, "TP", "TN", True)]
    result = scored(tmp_path, [record for record, _ in lines], ["Yes", "No", "Yes", "???"])
    assert (result["tu"], result["removals"], result["unclear"], result["correct"]) == (0.5, 2, 1, 3)
    assert result["tp"] + result["tn"] + result["fp"] + result["fn"] == 3


def test_scenes_lose_an_object_and_nothing_else():
    scenes = lvlm_decode_data.load_scenes("heldout")[:30]
    (questions,) = BENCH.scene_questions(scenes).values()
    edited = [q for q in questions if not q.meta["orig_img"]]
    assert len({q.id for q in questions}) == len(questions) and len(edited) > 60
    for question in edited:
        assert question.cluster == question.image.partition("-without-")[0]
        removed = question.image.partition("-without-")[2]
        if question.id.endswith(f"/{removed}"):
            assert question.label == "no" and question.meta["removed_q"]
    image, scene, owner = lvlm_decode_data.render(scenes[0].image_id)
    assert scene.objects == scenes[0].objects
    gone = sorted(scene.categories)[0]
    without, rest, _ = lvlm_decode_data.render(scenes[0].image_id, without=(gone,))
    assert gone not in rest.categories and scene.categories - {gone} <= rest.categories
    changed = np.abs(np.asarray(image).astype(int) - np.asarray(without).astype(int)).max(-1) > 0
    (box,) = [item.box for item in scene.of(gone)]
    x, y, width, height = box
    outside = changed.copy()
    outside[max(0, y - 12) : y + height + 12, max(0, x - 12) : x + width + 12] = False
    assert changed.any() and not outside.any() and (owner != 255).any()


def test_edited_images_open_and_differ_from_their_original():
    scenes = lvlm_decode_data.load_scenes("heldout")[:2]
    images = BENCH.scene_images(scenes)
    (questions,) = BENCH.scene_questions(scenes).values()
    original, edited = (next(q.image for q in questions if q.meta["orig_img"] == kind) for kind in (True, False))
    assert images.open(original).size == images.open(edited).size
    assert images.open(original).tobytes() != images.open(edited).tobytes()


def test_broken_files(tmp_path):
    record = pair(1, "TP", "TN", True)[0][0]
    for change, sentence in (
        ({"gt": "maybe"}, "field 'gt' must be one of 'yes' or 'no', found 'maybe'"),
        ({"removed_q": "no"}, "field 'removed_q' must be true or false"),
    ):
        (tmp_path / "qna.json").write_text(json.dumps([record | change]))
        with pytest.raises(FileFormatError, match=sentence):
            BENCH.file_questions(tmp_path / "qna.json")
    with pytest.raises(EvalError, match="give --questions FILE"):
        BENCH.row(Answer(1, "Yes"))


def test_the_authors_lines_are_compared_with_their_questions(tmp_path):
    asked = [
        {"id": i, "image": name, "question": "Is there a dog in the image?", "gt": gt, "orig_img": o, "removed_q": True}
        for i, (name, gt, o) in enumerate(
            (("COCO_val2014_000000000042.jpg", "yes", True), ("COCO_val2014_000000000042_01.png", "no", False))
        )
    ]
    questions, path = tmp_path / "beaf_qna.json", tmp_path / "answers.json"
    questions.write_text(json.dumps(asked))

    def scored(**more):
        path.write_text(json.dumps([{"id": 0, "answer": "Yes."} | more, {"id": 1, "answer": "No."}]))
        return score("beaf", path, questions)

    assert scored().rates["accuracy"] == 1
    assert not scored(**{name: asked[0][name] for name in ("image", "question", "gt")}).audit.contradicted
    assert scored(gt="no").audit.contradicted == ("0",)
    for more in ({"image": "COCO_val2014_000000000043.jpg"}, {"question": "Is there a cat in the image?"}):
        with pytest.raises(EvalError, match="1 of 2 answers are about something else"):
            scored(**more)


def test_figures_of_pairs_that_are_not_there_are_left_out_and_said(tmp_path):
    """Questions about edited images alone: 0 % indecision would be the best figure there is."""
    lines = [*pair(1, "TP", "TN", True), *pair(2, "TN", "TN", False), *pair(3, "TP", "TN", True)]
    pairs_of = {"tu", "ig", "sb_plus", "sb_minus", "id", "f1_tu_id"}
    edited = scored(tmp_path, [record for record, _ in lines[1::2]], [said for _, said in lines[1::2]])
    assert not pairs_of & edited.keys() and edited["accuracy"] == 1
    found = score("beaf", tmp_path / "said.json", tmp_path / "qna.json")
    assert found.audit.incomplete and found.problems == [
        "3 of 3 answers about edited images are in no pair: the same question about the original image has no answer here.",
        "TU, IG, SB+, SB-, ID, F1 of TU, ID cannot be told: they are of pairs that are not here.",
    ]
    assert "TU" not in found.blocks()[0].columns and "Accuracy" in found.blocks()[0].columns
    # With one original among them the others are told; with all nothing is.
    scored(tmp_path, [record for record, _ in lines[:5]], [said for _, said in lines[:5]])
    assert score("beaf", tmp_path / "said.json", tmp_path / "qna.json").problems == []
    rest = [record for record, _ in lines[1:]]
    result = scored(tmp_path, rest, [said for _, said in lines[1:]])
    assert (result["tu"], result["removals"], result["id"]) == (1, 1, 0)
    (said,) = score("beaf", tmp_path / "said.json", tmp_path / "qna.json").problems
    assert said.startswith("1 of 3 answers about edited images are in no pair")
