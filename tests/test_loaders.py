"""Where questions and images come from: scenes, files, folders, the hub."""

import gzip
import json
import sys
import types

import pytest
from PIL import Image

import lvlm_decode_data
from lvlm_decode.errors import DependencyError, EvalError, FileFormatError, MissingFileError
from lvlm_decode_evals import EVALUATORS, evaluator, loaders
from lvlm_decode_evals.base import Question
from lvlm_decode_evals.loaders import (
    POPE_FILES,
    check_ids,
    data_source,
    file_source,
    files_of,
    fingerprint,
    folder_images,
    hub_source,
    pope_files,
    scene_images,
    scene_source,
)

RECORD = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_scenes_that_ship_make_balanced_splits_of_a_thousand_questions():
    source = scene_source(evaluator("pope"))
    assert sorted(source.splits) == ["adversarial", "popular", "random"]
    for questions in source.first(1000).splits.values():
        assert len(questions) == 1000
        assert sum(question.label == "yes" for question in questions) == 500
        assert len({question.image for question in questions}) == 167
    scenes = {str(scene.image_id): scene for scene in lvlm_decode_data.load_scenes()}
    for question in source.splits["adversarial"][:200]:
        there = question.meta["object"] in scenes[question.image].categories
        assert there == (question.label == "yes")


def test_scene_questions_are_seeded_and_images_open():
    scenes = lvlm_decode_data.load_scenes()[:40]
    first = scene_source(evaluator("pope"), scenes, seed=1)
    assert first.splits == scene_source(evaluator("pope"), scenes, seed=1).splits
    assert first.splits["random"] != scene_source(evaluator("pope"), scenes, seed=2).splits["random"]
    assert first.splits["popular"] == scene_source(evaluator("pope"), scenes, seed=2).splits["popular"]
    assert first.images.open(first.splits["random"][0].image).mode == "RGB"
    with pytest.raises(MissingFileError, match="image 7 is missing"):
        scene_images(scenes).open("7")


def test_every_benchmark_with_scene_questions_has_unique_ids():
    for name in set(EVALUATORS) - {"mmhal", "vallu"}:
        source = scene_source(evaluator(name), lvlm_decode_data.load_scenes()[:60])
        for split, questions in source.splits.items():
            assert questions, (name, split)
            check_ids(questions, f"{name} {split}")


def test_a_source_narrows_by_split_and_limit(tmp_path):
    file = write(tmp_path / "q.jsonl", *({**RECORD, "question_id": i} for i in range(5)))
    source = file_source(evaluator("pope"), file, tmp_path)
    assert [q.id for q in source.first(2).splits["q"]] == [0, 1]
    assert len(source.first(None).splits["q"]) == len(source.only(["q"]).splits["q"]) == 5
    with pytest.raises(EvalError, match="split 'r' is unknown here; there are: q"):
        source.only(["r"])
    with pytest.raises(EvalError, match="--limit is 0"):
        source.first(0)


def test_a_published_evaluation_asks_the_published_questions_alone(tmp_path, monkeypatch):
    """A file of the right name with other questions in it is not the split."""
    monkeypatch.setenv("LVLM_DECODE_DATA", str(tmp_path))
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    (tmp_path / "pope").mkdir()
    chosen = evaluator("pope")
    for name in ("coco-random", "coco_pope_random"):
        file = write(tmp_path / "pope" / f"{name}.json", RECORD)
        with pytest.raises(
            EvalError, match="does not hold the published questions of coco-random: no file there has the ch"
        ):
            data_source(chosen, ["coco-random"], None, None)
        # One's own file under that name is what it is where no publication is meant; elsewhere the message says how it is known.
        assert list(file_source(chosen, file, tmp_path).splits) == [name]
        file.unlink()
    file = write(tmp_path / "pope" / "coco_pope_random.json", RECORD)
    with pytest.raises(
        EvalError, match=r"split 'coco-random' is unknown here; .* checksum, .*lvlm-decode data verify FILE"
    ):
        file_source(chosen, file, tmp_path).only(["coco-random"])
    monkeypatch.setitem(loaders.POPE_FILES, fingerprint(file), "coco-random")
    assert list(data_source(chosen, ["coco-random"], None, None).splits) == ["coco-random"]


def test_an_altered_file_of_mme_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("LVLM_DECODE_DATA", str(tmp_path))
    (tmp_path / "mme").mkdir()
    (tmp_path / "mme" / "mme_hallucination.jsonl").write_text('{"question_id": "existence/1.jpg", "text": "Is it?"}\n')
    with pytest.raises(EvalError, match=r"does not hold the published questions of mme_hallucination\.jsonl"):
        data_source(evaluator("mme"), ["all"], None, None)


def test_settings_know_the_content_not_the_place(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        write(folder / "q.jsonl", RECORD)
    assert (
        file_source(evaluator("pope"), first / "q.jsonl", first).settings
        == file_source(evaluator("pope"), second / "q.jsonl", second).settings
    )
    write(second / "q.jsonl", {**RECORD, "label": "no"})
    assert fingerprint(first / "q.jsonl") != fingerprint(second / "q.jsonl")


def test_fingerprints_ignore_compression_and_see_every_file(tmp_path):
    plain, packed = tmp_path / "q.jsonl", tmp_path / "q.jsonl.gz"
    write(plain, RECORD)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert fingerprint(plain) == fingerprint(packed)
    folder = tmp_path / "many"
    folder.mkdir()
    write(folder / "a.json", RECORD)
    before = fingerprint(folder)
    write(folder / "b.json", RECORD)
    assert fingerprint(folder) != before


def test_the_legacy_file_is_another_benchmark():
    assert len(set(POPE_FILES.values())) == len(POPE_FILES) == 13
    assert "coco-random-2910" in POPE_FILES.values() and "coco-random" in POPE_FILES.values()


def test_ids_that_occur_twice_are_named(tmp_path):
    with pytest.raises(FileFormatError, match="question ids must be unique, but 1 occur more than once"):
        pope_files(write(tmp_path / "q.jsonl", RECORD, RECORD))
    with pytest.raises(FileFormatError, match="but 3 occur"):
        check_ids([Question(3, "", None), Question("3", "", None), Question(3, "", None)], "here")


def test_files_and_folders(tmp_path):
    with pytest.raises(MissingFileError, match="does not exist; give a question file"):
        files_of(tmp_path / "nothing")
    with pytest.raises(MissingFileError, match=r"holds no \.json or \.jsonl file"):
        files_of(tmp_path)
    write(tmp_path / "b.jsonl", RECORD)
    write(tmp_path / "a.json", RECORD)
    (tmp_path / "notes.txt").write_text("x")
    assert [path.name for path in files_of(tmp_path)] == ["a.json", "b.jsonl"]


def test_images_of_a_folder_are_rgb_and_troubles_are_named(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    (tmp_path / "text.jpg").write_text("no picture")
    images = folder_images(tmp_path)
    assert images.open("grey.png").mode == "RGB"
    with pytest.raises(FileFormatError, match=r"text\.jpg cannot be read"):
        images.open("text.jpg")
    with pytest.raises(MissingFileError, match=r"none\.jpg is missing"):
        images.open("none.jpg")


class FakeDataset(list):
    """As much of `datasets.Dataset` as the loader touches."""

    @property
    def column_names(self):
        return list(self[0])

    def remove_columns(self, names):
        return FakeDataset({k: v for k, v in row.items() if k not in names} for row in self)


def fake_hub(monkeypatch, rows):
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, split: FakeDataset(rows)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_the_hub_s_pope(monkeypatch):
    picture = Image.new("L", (5, 5))
    row = {"id": "0", "question": "Is there a dog in the image?", "image": picture}
    rows = [
        row | {"question_id": "1", "answer": "yes", "image_source": "COCO_val2014_000000310196", "category": "random"},
        row | {"question_id": "1", "answer": "no", "image_source": "COCO_val2014_000000210789", "category": "popular"},
    ]
    fake_hub(monkeypatch, rows)
    source = hub_source(evaluator("pope"), "lmms-lab/POPE")
    assert {split: [(q.id, q.label) for q in found] for split, found in source.splits.items()} == {
        "random": [("1", "yes")],
        "popular": [("1", "no")],
    }
    assert source.images.open(source.splits["popular"][0].image).mode == "RGB"
    assert source.settings == {"questions": "hub:lmms-lab/POPE", "split": "test"}
    with pytest.raises(MissingFileError, match="image x is not in lmms-lab/POPE"):
        source.images.open("x")


def test_the_hub_s_mme(monkeypatch):
    picture = Image.new("RGB", (5, 5))
    rows = [
        {"question_id": "count/1.png", "image": picture, "question": q, "answer": a, "category": "count"}
        for q, a in (("Are there two?", "Yes"), ("Are there three?", "No"))
    ]
    fake_hub(monkeypatch, rows)
    source = hub_source(evaluator("mme"), "lmms-lab/MME")
    (questions,) = source.splits.values()
    assert [(q.text, q.label, q.meta["task"]) for q in questions] == [
        ("Are there two?", "yes", "count"),
        ("Are there three?", "no", "count"),
    ]
    assert source.images.open(questions[0].image).size == (5, 5)


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"pip install 'lvlm-decode\[eval\]'"):
        hub_source(evaluator("pope"), "lmms-lab/POPE")
