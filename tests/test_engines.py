"""``eval --engine``: the files of a run on a server are those of a run in this process."""

import json
import re
from pathlib import Path

import pytest
from runs import cli
from servers import Fake, fake_front, front_of, running

from lvlm_decode.errors import SettingsError, UnreachableError
from lvlm_decode_evals import engines, evaluator
from lvlm_decode_evals.api import prepare
from lvlm_decode_evals.engines import Server
from lvlm_decode_evals.plan import Decoding, found_cells
from lvlm_decode_evals.runner import Options

pytestmark = pytest.mark.xdist_group("serving")
METHODS = ("vcd",)
SAMPLE = Decoding(do_sample=True, temperature=0.8, top_k=20)


@pytest.fixture(scope="module")
def url(loaded):
    with running(front_of(loaded, ("icd(alpha=0.5)",), queue=3).app()) as (address, _):
        yield address


def run(loaded, source, out, **how):
    prepared = prepare("pope", methods=how.pop("methods", METHODS), decoding=how.pop("decoding", SAMPLE), source=source)
    options = Options(batch_size=how.pop("size", 4), **how)
    return prepared.run(loaded, out, quiet=True, options=options).execute()


def files(out):
    """Relative path -> content of everything that names no engine."""
    found = {}
    for path in sorted(Path(out).rglob("*")):
        if path.is_file():
            text = path.read_text()
            if path.name == "settings.json":
                record = json.loads(text)
                record.pop("engine", None)
                record.pop("environment")
                text = json.dumps(record)
            elif path.name.startswith("answers"):
                # Made with everything that decides, the engine too.
                text = "\n".join(json.dumps(json.loads(line) | {"checksum": None}) for line in text.splitlines())
            found[str(path.relative_to(out))] = text
    return found


def test_a_run_on_our_server_leaves_the_same_files(loaded, source, url, tmp_path):
    """Sampled and greedy, with the controls, several requests in flight, more of them than the server lets wait."""
    few = source.first(6)
    run(loaded, few, tmp_path / "here")
    run(Server(url, "tiny"), few, tmp_path / "there", size=6)
    here, there = files(tmp_path / "here"), files(tmp_path / "there")
    assert here == there and len(here) > 8
    (cell,) = [path for path in found_cells(tmp_path / "there") if "vcd" in str(path)]
    settings = json.loads((cell / "settings.json").read_text())
    assert settings["engine"]["kind"] == "server" and settings["environment"]["server"] == url
    assert settings["model"]["weights"] == loaded.settings["weights"]
    answers = [json.loads(line)["answer"] for line in (cell / "answers.jsonl").read_text().splitlines()]
    assert len(set(answers)) > 1 and len(answers) == 6


def test_a_folder_holds_the_answers_of_one_engine(loaded, source, url, tmp_path):
    few = source.first(2)
    run(loaded, few, tmp_path, methods=("plain",), decoding=None)
    with pytest.raises(SettingsError, match="engine"):
        run(Server(url, "tiny"), few, tmp_path, methods=("plain",), decoding=None)


def test_a_run_that_ended_goes_on(source, url, tmp_path, monkeypatch):
    """The server goes away in the middle: what was answered is kept, and asked no more."""
    server, call, asked = Server(url, "tiny"), Server._call, []

    def dying(self, path, body):
        asked.append(path)
        if len(asked) > 10:
            raise UnreachableError("gone")
        return call(self, path, body)

    few, how = source.first(8), {"methods": ("plain",), "decoding": Decoding(), "size": 2}
    run(server, few, tmp_path / "whole", **how)
    monkeypatch.setattr(Server, "_call", dying)
    asked += [""] * 6
    with pytest.raises(UnreachableError):
        run(server, few, tmp_path / "cut", **how)
    (cell,) = found_cells(tmp_path / "cut")
    assert len((cell / "answers.jsonl").read_text().splitlines()) == 4
    asked.clear()
    run(server, few, tmp_path / "cut", **how)
    assert len(asked) == 4 and files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_sample_that_the_server_refuses_costs_the_others_nothing(source, url, tmp_path):
    questions = list(source.splits["adversarial"][:4])
    bad = questions[1] = type(questions[1])(**{**questions[1].__dict__, "text": "what is <image>?"})
    odd = type(source)({"adversarial": questions}, source.images, source.settings)
    (result,) = run(Server(url, "tiny"), odd, tmp_path, methods=("plain",), decoding=Decoding())
    assert len(result.rows) == 3 and str(bad.id) in result.audit.failed
    assert "<image>" in result.audit.reasons[0]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"methods": ("vti(vectors=v)",)}, "no method 'vti'"),
        ({"methods": ("icd",), "decoding": Decoding()}, r"'icd' is icd\(alpha=0.5\)"),
        ({"methods": ("opera",), "decoding": None}, "needs beams"),
        ({"template": "a {question}"}, "--template cannot"),
        ({"drafter": "vispec"}, "--drafter cannot"),
        ({"methods": ("vcd(alpha=0.5)",), "parameters": {"beta": 0.2}}, "into 'vcd"),
    ],
)  # fmt: skip
def test_what_our_server_cannot_be_told_is_refused_beforehand(source, url, tmp_path, how, words):
    with pytest.raises(SettingsError, match=words):
        run(Server(url, "tiny"), source, tmp_path, **how)


class Foreign(Fake):
    """Behind a front that says nothing of this project."""


@pytest.fixture(scope="module")
def foreign():
    front = fake_front(Foreign(3))
    models = front.models

    async def plain(request):
        listed = json.loads((await models(request)).body)
        for entry in listed["data"]:
            entry.pop("lvlm_decode")
            entry["owned_by"] = "somebody"
        return engines_response(listed)

    front.models = plain
    with running(front.app()) as (address, _):
        yield address, front.engine


def engines_response(body):
    from starlette.responses import JSONResponse

    return JSONResponse(body)


def test_a_foreign_server_is_asked_for_plain_decoding_alone(source, foreign, tmp_path):
    address, engine = foreign
    few = source.first(2)
    with pytest.raises(SettingsError, match=r"knows no method 'vcd'|knows no method 'mask'"):
        run(Server(address, "fake"), few, tmp_path)
    with pytest.raises(SettingsError, match="--top-k"):
        prepared = prepare("pope", decoding=SAMPLE, source=few, without=["mask"])
        prepared.run(Server(address, "fake"), tmp_path, quiet=True, options=Options()).execute()
    (result,) = run(Server(f"{address}/v1/", "fake"), few, tmp_path / "ok", methods=("plain",), decoding=Decoding())
    settings = json.loads((result.folder / "settings.json").read_text())
    assert settings["engine"] == {"kind": "server", "software": "somebody"} and settings["model"] == {"name": "fake"}
    assert len(engine.jobs) == 2 and all(job.sample_id is None for job in engine.jobs)
    answers = (result.folder / "answers.jsonl").read_text().splitlines()
    assert [(json.loads(line)["answer"], json.loads(line)["tokens"]) for line in answers] == [("abc", 3)] * 2


def test_names_and_addresses_that_are_wrong(url, monkeypatch):
    with pytest.raises(SettingsError, match="it serves: tiny-llava"):
        Server(url, "llava-hf/llava-1.5-7b-hf")
    with pytest.raises(SettingsError, match="is no address"):
        Server("vlm", "tiny")
    monkeypatch.setattr(engines, "PAUSE", 0.0)
    with pytest.raises(UnreachableError, match="does not answer"):
        Server("http://127.0.0.1:9", "tiny")


def test_a_key_that_is_wrong_or_right(monkeypatch):
    with running(fake_front(Fake(), key="secret").app()) as (address, _):
        with pytest.raises(UnreachableError, match="API key"):
            Server(address, "fake")
        monkeypatch.setenv("LVLM_DECODE_API_KEY", "secret")
        assert Server(address, "fake").settings == {"name": "fake"}


def test_from_the_command_line(url, tmp_path):
    how = ("eval", "pope", "--split", "random", "--limit", "2", "--no-do-sample", "--out", tmp_path)
    done = cli(*how, "--engine", url, "--method", "m3id")
    assert done.exit_code == 0, done.output
    assert re.search(r"\| *m3id *\| *greedy *\|", done.output), done.output
    assert len(found_cells(tmp_path)) == 2 and evaluator("pope").name == "pope"
    for more, words in ((("--dtype", "float32"), "--dtype"), (("--device-map", "auto"), "--device-map")):
        refused = cli(*how, "--engine", url, *more)
        assert refused.exit_code == 1 and words in refused.output


class Outputs:
    """An output of vLLM."""

    def __init__(self, tokens):
        self.outputs = [type("Output", (), {"token_ids": tokens})()]


def test_vllm_is_asked_with_the_sample_s_id_and_the_seed(loaded, source, tmp_path, monkeypatch):
    """On an engine that answers with fixed tokens: prompts, ids, parameters and files."""
    import lvlm_decode.vllm

    asked = []

    def generate(llm, method, samples, params):
        asked.append((method, samples, params))
        return [Outputs([330, 2]) for _ in samples]

    monkeypatch.setattr(lvlm_decode.vllm, "generate", generate, raising=False)
    made = object.__new__(engines.Vllm)
    made._llm, made._params, made._processor = None, dict, loaded.processor
    made.settings, made.engine, made.where = dict(loaded.settings), {"kind": "vllm"}, {"vllm": "0"}
    few = source.first(2)
    run(made, few, tmp_path, decoding=SAMPLE)
    sampled = [call for call in asked if call[0].name == "vcd"]
    assert [sample["id"] for sample in sampled[0][1]] == [f"pope/adversarial/{q.id}" for q in few.splits["adversarial"]]
    assert sampled[0][1][0]["prompt"].startswith("USER: <image>\n") and sampled[0][1][0]["multi_modal_data"]["image"]
    assert sampled[0][2]["seed"] == 0 and sampled[0][2]["top_k"] == 20 and sampled[0][2]["temperature"] == 0.8
    assert any(call[2]["temperature"] == 0.0 for call in asked)
    (cell, *_) = [path for path in found_cells(tmp_path) if "vcd" in str(path)]
    assert json.loads((cell / "settings.json").read_text())["engine"] == {"kind": "vllm"}
    assert [json.loads(line)["tokens"] for line in (cell / "answers.jsonl").read_text().splitlines()] == [2, 2]
    for method, words in (("opera", "cannot be served"), ("dola", "cannot be served")):
        with pytest.raises(ValueError, match=words):
            run(made, few, tmp_path / method, methods=(method,), decoding=None)
