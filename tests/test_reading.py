"""Every file is read by a declared shape: what does not fit is one sentence with file, line and field, and no traceback."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import main, write

from lvlm_decode.errors import FileFormatError, LvlmDecodeError, MissingFileError, OutputError
from lvlm_decode.reading import Closed, Identity, Record, checked, read_bytes, read_records, read_text, read_yaml
from lvlm_decode_evals.answers import write_answers, write_whole
from lvlm_decode_evals.base import Answer, Question
from lvlm_decode_evals.chair import build_objects, image_key, vocabulary_file
from lvlm_decode_evals.configs import read_config
from lvlm_decode_evals.download import unpack
from lvlm_decode_evals.plan import Settings, claim, write_questions

ROOT = Path(__file__).resolve().parent.parent
CONFIG = (ROOT / "configs" / "pope-vcd-llava-1.5.yaml").read_text()


class Line(Record):
    question_id: Identity
    answer: str | None
    tokens: int = 0
    words: list[str] | None = None


class Part(Closed):
    temperature: float = 1.0
    top_p: float | None = None


class Whole(Closed):
    title: str
    parts: list[Part]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"answer": "a"}, "f, line 3: field 'question_id' is missing; found answer."),
        ({"question_id": 1.0, "answer": "a"}, "field 'question_id' must be a whole number or text, found 1.0."),
        ({"question_id": True, "answer": "a"}, "field 'question_id' must be a whole number or text, found True."),
        ({"question_id": 10**30, "answer": "a"}, "field 'question_id' must be less than"),
        ({"question_id": 1, "answer": ["a"]}, "field 'answer' must be text, found ['a']."),
        ({"question_id": 1, "answer": "a", "tokens": "2"}, "field 'tokens' must be a whole number, found '2'."),
        ({"question_id": 1, "answer": "a", "words": "dog"}, "field 'words' must be a list, found 'dog'."),
        (
            {"question_id": 1, "answer": "a", "words": ["dog", ["cat"]]},
            "field 'words', entry 2 must be text, found ['cat'].",
        ),
        ([1], "f, line 3: expected an object, found [1]."),
    ],
)
def test_a_wrong_shape_is_named_with_its_field(record, sentence):
    with pytest.raises(FileFormatError) as caught:
        checked(Line, record, "f, line 3")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_fields_nobody_declared_are_kept():
    assert checked(Line, {"question_id": 1, "answer": "a", "model": "m"}, "f").model_extra == {"model": "m"}


def test_an_unknown_field_of_a_closed_shape_is_named_with_line_and_nearest(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("title: t\nparts:\n  - top_p: 0.5\n  - temprature: 2\n")
    with pytest.raises(FileFormatError) as caught:
        read_yaml(path, Whole)
    assert str(caught.value).endswith(
        "a.yaml, line 4: field 'parts', entry 2, field 'temprature' is unknown; known: temperature, top_p; the nearest is "
        "'temperature'."
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"a": NaN}', "broken JSON"),
        (b'{"a": 1e999}', "number '1e999' is out of range"),
        (b'{"a": "\\ud83d"}', "unexpected end of hex escape"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number out of range"),
        (b"[" * 100000, "recursion limit exceeded"),
        (b'{"a": 1, "a": 2}', "field 'a' is there twice"),
        (b'{"a": 1}\n\n{"a": }', r"line 3: broken JSON \(expected value"),
        ('{"a": "é"}'.encode("latin-1"), r"is not UTF-8 text \(line 1"),
        ('{"a": 1}'.encode("utf-16"), r"it looks like UTF-16\); save it as UTF-8"),
        (b"", "is empty"),
        (b"3", "expected a JSON object, found int"),
        (gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], "damaged gzip file"),
        (gzip.compress(bytes(range(99)), mtime=0)[:30] + b"xxxx", "damaged gzip file"),
    ],
)
def test_broken_content_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=sentence) as caught:
        read_records(path)
    assert "a.jsonl" in str(caught.value) and len(str(caught.value)) < 600


def test_whole_content_of_every_kind_is_read(tmp_path):
    path = tmp_path / "a.json"
    for content in (
        b'[{"a": 1}]',
        b'{"a": 1}\n',
        b'\xef\xbb\xbf{"a":\n 1}',
        gzip.compress(b'\n{"a": 1}', mtime=0),
        b'{"a": 1}\r\n',
    ):
        path.write_bytes(content)
        assert [record for _, record in read_records(path)] == [{"a": 1}]
    path.write_text('{"a": "x\u2028y"}\n{"a": "\\ud83d\\ude00"}\n')
    assert [record["a"] for _, record in read_records(path)] == ["x\u2028y", "😀"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("title: [", r"broken YAML \(line 1"),
        ("title: a\ntitle: b\nparts: []", r"line 2: field 'title' is there twice"),
        ("title: &a x\nparts: [*a]", "an alias"),
        ("title: 2001-99-99\nparts: []", "broken YAML"),
        ("title: !!int ''\nparts: []", "broken YAML"),
        ("title: !!python/object:os.system x\nparts: []", "broken YAML"),
        ("[" * 3000, "nested too deeply"),
        ("title: 2001-01-01\nparts: []", "line 1: field 'title' must be text"),
        ("title: a\nparts: 3", "line 2: field 'parts' must be a list, found 3"),
        ("- a", "expected an object"),
        ("", "expected an object"),
    ],
)
def test_broken_yaml_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(FileFormatError, match=sentence):
        read_yaml(path, Whole)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path,
        tmp_path / "none",
        tmp_path / "none" / "x",
        tmp_path / "a\0b",
        tmp_path / "pipe",
        Path("/dev/null"),
    ):
        with pytest.raises(MissingFileError, match="is not a file"):
            read_bytes(path)
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_text(tmp_path / ("x" * 300))


def test_output_goes_to_files_and_streams_alone(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    with pytest.raises(OutputError, match="is a folder"):
        write_whole(tmp_path, b"x")
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    write_whole(tmp_path / "pipe", b"through")
    assert reader.communicate(timeout=20)[0] == b"through" and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("into", ["pipe", "file"])
def test_rows_to_standard_output_leave_the_device(tmp_path, into):
    answers = write(tmp_path / "a.jsonl", [{"question_id": 1, "answer": "Yes", "label": "yes"}])
    before = os.lstat("/dev/stdout")
    command = [
        sys.executable,
        "-m",
        "lvlm_decode_evals.commands",
        "score",
        "pope",
        str(answers),
        "--rows",
        "/dev/stdout",
    ]
    if into == "pipe":
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        with open(tmp_path / "out.txt", "w") as file:
            subprocess.run(command, stdout=file, check=True)
        said = (tmp_path / "out.txt").read_text()
    assert '"correct": true' in said and "Accuracy 100.0%" in said
    assert (before.st_ino, before.st_dev) == (os.lstat("/dev/stdout").st_ino, os.lstat("/dev/stdout").st_dev)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            ("decoding: {do_sample: true}", "decoding: {do_sample: true, temprature: 0.7}"),
            "'temprature' is unknown.*nearest is 'temperature'",
        ),
        (("seeds: [42", "seeds: 5 # ["), "field 'seeds' must be a list, found 5"),
        (("benchmark: pope", "benchmark: [pope]"), "field 'benchmark' must be text"),
        (("rule: vcd", "rule: [vcd]"), r"option rule of pope: expected text, found \['vcd'\]"),
        (("rule: vcd", "rulez: vcd"), "option of pope 'rulez' is unknown"),
        (("{accuracy: 83.29", "{accuracy: .nan"), "must be a finite number"),
        (("    published:\n", "    published: 3\n    x:\n"), "is unknown"),
        (("do_sample: true}", "do_sample: true, num_beams: 5}"), "field 'decoding': beam sampling"),
    ],
)
def test_wrong_tables_are_named(tmp_path, change, sentence):
    path = tmp_path / "c.yaml"
    assert change[0] in CONFIG
    path.write_text(CONFIG.replace(*change, 1))
    with pytest.raises(FileFormatError, match=sentence) as caught:
        read_config(path)
    assert "c.yaml" in str(caught.value)


def test_a_table_in_utf_16(tmp_path):
    (tmp_path / "c.yaml").write_bytes(CONFIG.encode("utf-16"))
    with pytest.raises(FileFormatError, match=r"c\.yaml is not UTF-8 text"):
        read_config(tmp_path / "c.yaml")


SETTINGS = {
    "evaluator": "pope",
    "split": "random",
    "method": {"name": "plain", "parameters": {}},
    "decoding": {"do_sample": False},
    "seed": 0,
}


@pytest.fixture
def cell(tmp_path):
    folder = tmp_path / "run/pope/random/plain/greedy/seed-0"
    question = Question(1, "Is it?", "a.jpg", "yes")
    claim(folder, settings := Settings(SETTINGS, {}), [question])
    write_questions(folder.parents[2], [question])
    write_answers(folder / "answers.jsonl", [Answer.to(question, "Yes", 1).sealed(settings.key)])
    return folder


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("settings.json", json.dumps(SETTINGS).replace('"seed"', '"sead"'), "settings.json: field 'seed' is missing"),
        ("settings.json", "[]", "settings.json: expected an object"),
        ("settings.json", json.dumps(SETTINGS | {"method": "plain"}), "field 'method' must be an object"),
        ("settings.json", json.dumps(SETTINGS | {"decoding": {"beams": 1}}), "'beams' is unknown"),
        ("settings.json", json.dumps(SETTINGS | {"evaluator": "pop"}), "evaluator 'pop' is unknown"),
        ("answers.jsonl", "[]\n", "answers.jsonl, line 1: expected an object"),
        ("answers.jsonl", '{"question_id": 1, "text": "Is it?"}\n', "answers.jsonl, line 1: field 'answer' is missing"),
        ("answers.jsonl", '{"question_id": 1, "answer": "Yes", "meta": "note"}\n', "field 'meta' must be an object"),
        (
            "../../../questions.jsonl",
            '{"id": 1, "text": "Is it?"}\n',
            "questions.jsonl, line 1: field 'image' is missing",
        ),
        (
            "../../../questions.jsonl",
            '{"id": [1], "text": "a", "image": null}\n',
            "field 'id' must be a whole number or text",
        ),
    ],
)
def test_files_of_a_former_run_are_named(cell, capsys, name, content, sentence):
    assert main("score", cell.parents[4], capsys=capsys)[0] == 0
    (cell / name).write_text(content)
    for command in ("score", "table"):
        status, _, err = main(command, cell.parents[4], capsys=capsys)
        assert status == 1 and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("value", ["rule=[a", "rule=*x", "rule=2001-99-99", "rule=3", "rule"])
def test_options_of_the_command_line(tmp_path, capsys, value):
    answers = write(tmp_path / "a.jsonl", [{"question_id": 1, "answer": "Yes", "label": "yes"}])
    status, _, err = main("score", "pope", answers, "-o", value, capsys=capsys)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1


def test_vocabularies_and_annotations_of_other_shapes(tmp_path):
    path = tmp_path / "v.json"
    for content in (
        '{"synonyms": ["dog"]}',
        '{"synonyms": {"dog": "dog"}}',
        '{"synonyms": {}, "double_words": [1]}',
        "{}",
    ):
        path.write_text(content)
        with pytest.raises(FileFormatError, match=r"v\.json: field"):
            vocabulary_file(path)
    path.write_text('{"synonyms": {"dog": ["dog"]}}')
    words = vocabulary_file(path)
    coco = {
        "images": [{"id": 1}],
        "categories": [{"id": 7, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7}],
    }
    write(tmp_path / "i.json", coco, lines=False)
    assert build_objects([tmp_path / "i.json"], [], words) == {"1": ["dog"]}
    for change, sentence in (
        ({"images": [{}]}, "field 'images', entry 1 has no field 'id'"),
        ({"categories": [{"id": 7, "name": 3}]}, "field 'name' must be text"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 8}]}, "category 8, which the file does not name"),
        (
            {"annotations": [{"id": 1, "image_id": 2, "category_id": 7}]},
            "annotation 1 is about image 2, which the file does not",
        ),
        ({"categories": [{"id": 7, "name": "dog"}] * 2}, "category 7 is there twice"),
        ({"annotations": [{"id": 1, "image_id": "1", "category_id": 7}]}, "field 'image_id' must be a whole number"),
    ):
        write(tmp_path / "i.json", coco | change, lines=False)
        with pytest.raises(FileFormatError, match=sentence):
            build_objects([tmp_path / "i.json"], [], words)


def test_image_ids_of_any_length():
    assert image_key("COCO_val2014_000000000042.jpg") == image_key(42) == "42"
    assert image_key("0") == "0" and len(image_key("1" * 5000)) == 5000


def test_archives_that_are_damaged_or_of_another_kind(tmp_path):
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "trust" / "fuzz.py")
    fuzz = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = fuzz
    spec.loader.exec_module(fuzz)
    good = fuzz.zipped()["a.zip"]
    # Byte 8 of a member's header is its method of compression, byte 4 the version it needs.
    for at in (4, 8, 40, 45, 60, len(good) - 30):
        (tmp_path / "a.zip").write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            unpack(tmp_path / "a.zip")
        except LvlmDecodeError as error:
            assert "a.zip" in str(error)


def test_every_reader_takes_its_valid_input_and_a_few_wrong_ones(tmp_path):
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "trust" / "fuzz.py")
    fuzz = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = fuzz
    spec.loader.exec_module(fuzz)
    for name in fuzz.readers():
        counts = fuzz.fuzz(name, 60, seed=7, keep=None, most=12)
        assert counts["accepted"] and not counts["tracebacks"], (name, counts)
