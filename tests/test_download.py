"""Fetching the benchmarks' own files: checksums, licences, what is said offline. Servers here are local."""

import gzip
import hashlib
import http.server
import json
import re
import threading
import zipfile
from functools import partial

import pytest
import typer
from conftest import shared_path
from typer.testing import CliRunner

from lvlm_decode.errors import EvalError, FileFormatError, MissingFileError, UnknownNameError
from lvlm_decode_evals import download, upstream
from lvlm_decode_evals.commands import add_to
from lvlm_decode_evals.download import check, data_folder, digest_of, fetch, get, identify, unpack, wanted
from lvlm_decode_evals.upstream import DATASETS, SOURCES, Source

CONTENT = b"dog, puppy\n"
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path):
    """A folder served over http."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_address[1]}", folder
    served.shutdown()
    served.server_close()


def source(base, name="synonyms.txt", sha256=SHA, dataset="chair"):
    return Source(dataset, name, f"{base}/{name}", "BSD-2-Clause", "words", len(CONTENT), sha256)


@pytest.fixture
def table(monkeypatch):
    """Replaces the table of sources."""

    def use(*entries):
        monkeypatch.setattr(upstream, "SOURCES", entries)
        monkeypatch.setattr(download, "SOURCES", entries)
        monkeypatch.setattr(download, "DATASETS", tuple(dict.fromkeys(entry.dataset for entry in entries)))

    return use


@pytest.fixture
def command():
    app = typer.Typer()
    add_to(app)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_source_is_pinned_and_has_a_licence():
    names = [(entry.dataset, entry.name) for entry in SOURCES]
    assert len(set(names)) == len(names)
    assert {"pope", "chair", "mme", "amber", "coco"} <= set(DATASETS)
    for entry in SOURCES:
        assert entry.licence and entry.what and entry.url.startswith(("https://", "http://images.cocodataset.org/"))
        if entry.dataset == "coco":
            assert entry.sha256 is None and "no checksum is pinned" in entry.what
        else:
            assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256) and entry.bytes > 0
            assert re.search(r"/[0-9a-f]{40}/", entry.url), "a commit, not a branch"


def test_sources_are_the_recorded_ones():
    recorded = json.loads(shared_path("data/upstream.json").read_text())
    expected = {}
    for entry in recorded:
        place = entry.get("url") or f"{entry['repository']}/{entry['commit']}/{entry['path']}"
        expected[entry["dataset"], place] = (entry["sha256"], entry.get("bytes"), entry["licence"])
    prefix = "https://raw.githubusercontent.com/"
    pinned = {(s.dataset, s.url.removeprefix(prefix)): (s.sha256, s.bytes, s.licence) for s in SOURCES}
    assert expected.items() <= pinned.items()
    # What else is pinned came later. Where authors state no licence nothing is shipped.
    later = {key: found[2] for key, found in pinned.items() if key not in expected}
    assert {name for name, _ in later} == {"repope", "dash-b", "beaf", "opera-captions", "chair-lists"}
    unclear = ("none stated by its authors", "not looked up; fetched, never shipped")
    assert all(licence in unclear for key, licence in later.items() if key[0] != "opera-captions")


def test_pinned_captions_are_the_recorded_ones():
    recorded = json.loads(shared_path("data/benchmarks/chair_sources.json").read_text()).values()
    known = {(entry["path"], entry["bytes"], entry["sha256"]) for entry in recorded}
    captions = [source for source in SOURCES if source.dataset in ("opera-captions", "chair-lists")]
    assert len(captions) == 15
    assert {(re.split(r"/[0-9a-f]{40}/", s.url)[1], s.bytes, s.sha256) for s in captions} <= known


def test_corrected_labels_are_pinned_as_recorded():
    recorded = json.loads(shared_path("data/benchmarks/repope.json").read_text())
    pinned = {s.name: (s.sha256, s.bytes) for s in SOURCES if s.dataset == "repope"}
    assert pinned == {f"coco_repope_{split['split']}.json": (split["sha256"], split["bytes"]) for split in recorded}


def test_a_benchmark_with_nothing_to_fetch_says_where_to_ask(command, tmp_path):
    done = command("data", "get", "mmvp", "--to", tmp_path)
    assert done.exit_code == 0 and "on the hub as MMVP/MMVP" in done.output


def test_recorded_files_are_the_pinned_ones():
    for name, found in (
        ("pope/questions/coco_random.jsonl.gz", "coco_pope_random.json"),
        ("pope/questions/coco_random_legacy2910.jsonl.gz", "coco_pope_random_2910.json"),
        ("amber/annotations.json.gz", "annotations.json"),
        ("mme/mme_hallucination_questions.jsonl.gz", "mme_hallucination.jsonl"),
    ):
        assert identify(shared_path(f"data/{name}")).name == found


def test_fetched_verified_and_not_fetched_twice(server, tmp_path, table):
    base, folder = server
    (folder / "synonyms.txt").write_bytes(CONTENT)
    table(source(base))
    said = []
    (found,) = get(["chair"], tmp_path / "data", tell=said.append)
    assert found.state == "ok" and found.path.read_bytes() == CONTENT
    assert "Licence: BSD-2-Clause" in said[0] and "fetched from" in said[1] and base in said[1]
    (folder / "synonyms.txt").unlink()
    (found,) = get(["chair"], tmp_path / "data", tell=said.append)
    assert found.state == "ok"
    assert [entry.name for entry in found.path.parent.iterdir()] == ["synonyms.txt"]


def test_wrong_checksum_keeps_nothing(server, tmp_path, table):
    base, folder = server
    (folder / "synonyms.txt").write_bytes(b"something else")
    table(source(base))
    with pytest.raises(EvalError, match=rf"gave 14 bytes with sha256 .*pinned are {len(CONTENT)} bytes with {SHA}"):
        fetch(source(base), tmp_path)
    with pytest.raises(EvalError, match="1 of 1 files"):
        get(["chair"], tmp_path, tell=lambda _: None)
    assert list((tmp_path / "chair").iterdir()) == []


def test_a_file_with_other_content_is_never_overwritten(server, tmp_path, table):
    base, folder = server
    (folder / "synonyms.txt").write_bytes(CONTENT)
    table(source(base))
    mine = tmp_path / "chair" / "synonyms.txt"
    mine.parent.mkdir()
    mine.write_text("my own words")
    with pytest.raises(EvalError, match="Move it away"):
        get(["chair"], tmp_path, tell=lambda _: None)
    assert mine.read_text() == "my own words"


def test_offline_it_says_which_file_to_put_where(tmp_path, table):
    entries = [source("http://127.0.0.1:1", name) for name in ("a.txt", "b.txt")]
    table(*entries)
    said = []
    with pytest.raises(EvalError) as raised:
        get(["chair"], tmp_path, tell=said.append, timeout=2)
    for entry in entries:
        where = tmp_path / "chair" / entry.name
        expected = f"{where}: missing; put there\n  {entry.url}\n  ({len(CONTENT):,} bytes, sha256 {SHA})"
        assert expected in str(raised.value)
    # One unreachable host is tried once, not once per file.
    assert sum("cannot be reached" in line for line in said) == 1


def test_missing_on_the_server(server, tmp_path, table):
    base, _ = server
    table(source(base))
    said = []
    with pytest.raises(EvalError, match="missing; put"):
        get(["chair"], tmp_path, tell=said.append)
    assert "answered 404" in said[-1]


@pytest.mark.parametrize("as_address", [False, True])
def test_mirror_folder(tmp_path, table, as_address):
    table(source("http://127.0.0.1:1"), source("http://127.0.0.1:1", "missing.txt"))
    mirror = tmp_path / "stick"
    (mirror / "chair").mkdir(parents=True)
    (mirror / "chair" / "synonyms.txt").write_bytes(CONTENT)
    with pytest.raises(EvalError, match=r"1 of 2 files.*\n.*missing\.txt: missing"):
        get(["chair"], tmp_path / "data", mirror=mirror.as_uri() if as_address else str(mirror), tell=lambda _: None)
    assert (tmp_path / "data" / "chair" / "synonyms.txt").read_bytes() == CONTENT


def test_compressed_and_unpinned_files_count(tmp_path):
    packed = tmp_path / "chair" / "synonyms.txt.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(CONTENT))
    found = check(source("x"), tmp_path)
    assert found.state == "ok" and found.path == packed
    assert check(source("x", sha256=None), tmp_path).state == "unpinned"
    assert SHA in check(source("x", sha256=None), tmp_path).sentence()
    packed.write_bytes(gzip.compress(CONTENT)[:-9])
    with pytest.raises(FileFormatError, match="damaged gzip"):
        digest_of(packed)


def test_archives_are_unpacked_beside_themselves(server, tmp_path, table):
    base, folder = server
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("annotations/instances.json", "{}")
    table(source(base, "a.zip", sha256=None, dataset="coco"))
    (found,) = get(["coco"], tmp_path, tell=lambda _: None)
    assert found.state == "unpinned" and found.sha256 == digest_of(folder / "a.zip")
    assert (tmp_path / "coco" / "annotations" / "instances.json").read_text() == "{}"
    (tmp_path / "bad.zip").write_text("no zip")
    with pytest.raises(FileFormatError, match="no readable zip"):
        unpack(tmp_path / "bad.zip")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../outside.txt", "x")
    with pytest.raises(FileFormatError, match="points outside"):
        unpack(tmp_path / "evil.zip")
    with zipfile.ZipFile(tmp_path / "nameless.zip", "w") as archive:
        archive.writestr("?", "x")
    # A name ends at a zero byte.
    (tmp_path / "nameless.zip").write_bytes((tmp_path / "nameless.zip").read_bytes().replace(b"?", b"\0"))
    with pytest.raises(FileFormatError, match="holds a file without a name"):
        unpack(tmp_path / "nameless.zip")


def test_large_files_only_on_request():
    assert "val2014.zip" not in {entry.name for entry in wanted(["coco"])}
    assert "val2014.zip" in {entry.name for entry in wanted(["coco"], with_images=True)}
    with pytest.raises(UnknownNameError, match="data set 'cocoa' is unknown"):
        wanted(["cocoa"])


def test_where_files_go(monkeypatch, tmp_path):
    monkeypatch.setenv("LVLM_DECODE_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.delenv("LVLM_DECODE_DATA")
    assert data_folder().name == "lvlm-decode"


# The command line --------------------------------------------------------------------------------------------------


def test_get_command(server, tmp_path, table, command):
    base, folder = server
    (folder / "synonyms.txt").write_bytes(CONTENT)
    table(source(base))
    result = command("data", "get", "chair", "--to", tmp_path)
    assert result.exit_code == 0, result.output
    assert "BSD-2-Clause" in result.stdout and "as pinned" in result.stdout and "data get coco" in result.stdout
    result = command("data", "get")
    assert result.exit_code == 1 and "needs the name of a data set" in result.stderr
    result = command("data", "get", "nonsense", "--to", tmp_path)
    assert result.exit_code == 1 and "'nonsense' is unknown" in result.stderr


def test_verify_command(tmp_path, command):
    result = command("data", "verify", "chair", "--to", tmp_path)
    assert result.exit_code == 1 and "none of these files" in result.stderr
    (tmp_path / "chair").mkdir()
    (tmp_path / "chair" / "synonyms.txt").write_text("x")
    result = command("data", "verify", "chair", "--to", tmp_path)
    assert result.exit_code == 1 and "is another version or damaged" in result.stdout
    result = command("data", "verify", tmp_path / "chair" / "synonyms.txt")
    assert result.exit_code == 0 and "no pinned file" in result.stdout
    with pytest.raises(MissingFileError, match="is not a file"):
        identify(tmp_path)


def test_objects_command(tmp_path, command):
    (tmp_path / "table.txt").write_text("dog, puppy\ncat, kitten\n")
    images = [{"id": 5}]
    instances = {
        "images": images,
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 1}],
    }
    captions = {"images": images, "annotations": [{"id": 1, "image_id": 5, "caption": "Two kittens."}]}
    for name, content in (("instances", instances), ("captions", captions)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    result = command(
        "data",
        "objects",
        tmp_path / "objects.json",
        "--vocabulary",
        tmp_path / "table.txt",
        "--instances",
        tmp_path / "instances.json",
        "--captions",
        tmp_path / "captions.json",
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "objects.json").read_text()) == {"5": ["cat", "dog"]}
    result = command("data", "objects", tmp_path / "o.json", "--vocabulary", tmp_path / "table.txt")
    assert result.exit_code == 1 and "needs --instances or --captions" in result.stderr
