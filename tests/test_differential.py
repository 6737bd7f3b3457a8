"""Methods against what their authors' code computed on the same inputs: ``benchmarks/differential``."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "differential"


def _module(name):
    spec = importlib.util.spec_from_file_location(f"differential_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cases = _module("cases")
RECORDS = cases.records()
WITHIN = {"atol": 1e-5, "rtol": 1e-5}


def agrees(name, given, recorded) -> bool:
    found = cases.ours(name)(**given)
    assert found.keys() >= recorded.keys()
    pairs = [(found[key], cases.tensor(values).to(found[key].dtype)) for key, values in recorded.items()]
    return all(mine.shape == theirs.shape and torch.allclose(mine, theirs, **WITHIN) for mine, theirs in pairs)


@pytest.mark.parametrize(
    "name,number", [(name, number) for name, record in RECORDS.items() for number in range(len(record["cases"]))]
)
def test_equals_the_authors_code(name, number):
    case = RECORDS[name]["cases"][number]
    found = cases.ours(name)(**case["given"])
    for key, values in case["out"].items():
        theirs = cases.tensor(values).to(found[key].dtype)
        torch.testing.assert_close(found[key], theirs, **WITHIN, msg=lambda text, key=key: f"{name}, {key}: {text}")


@pytest.mark.parametrize("name", RECORDS)
def test_no_other_parameters_do(name):
    record = RECORDS[name]
    assert record["other"]
    for changed in record["other"]:
        assert not all(agrees(name, case["given"] | changed, case["out"]) for case in record["cases"]), changed


def test_the_page_shows_what_the_records_say():
    assert cases.table() in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(record["largest"] <= 1e-5 for record in RECORDS.values())


def test_the_script_names_the_repositories_that_are_missing(tmp_path, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in [FOLDER / "README.md", *(FOLDER / "records").iterdir()]}
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["record.py", "--upstream", str(tmp_path), "vcd.noise"])
    assert _module("record").main() == 1
    said = capsys.readouterr().err
    assert "missing: DAMO-NLP-SG/VCD @ d6568ff81b" in said
    assert "not recorded: vcd.noise" in said
    assert all(path.read_bytes() == content for path, content in before.items())
