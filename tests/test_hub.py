"""A method written to files is the same method again, and an exported repository decodes as it does."""

import json

import pytest
from typer.testing import CliRunner

import lvlm_decode
import lvlm_decode_data
from lvlm_decode import hub
from lvlm_decode.cli import app
from lvlm_decode.errors import FileFormatError, MissingFileError
from lvlm_decode.methods import METHODS, load, parse


@pytest.mark.parametrize("name", METHODS)
def test_every_method_comes_back_equal(name, tmp_path):
    try:
        method = load(name)()
    except lvlm_decode.LvlmDecodeError as error:
        pytest.skip(f"{name} has no defaults: {error}")
    method.save_pretrained(tmp_path)
    assert lvlm_decode.Method.from_pretrained(tmp_path) == method


def test_settings_and_sums_come_back_and_the_rest_of_the_file_stays(tmp_path):
    (tmp_path / hub.FILE).write_text('{"temperature": 0.5}')
    method = parse("vcd(alpha=0.25,beta=null)+ritual")
    method.save_pretrained(tmp_path)
    assert lvlm_decode.Method.from_pretrained(tmp_path) == method != parse("vcd+ritual")
    assert json.loads((tmp_path / hub.FILE).read_text())["temperature"] == 0.5
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.5


def test_bad_files_are_named(tmp_path):
    with pytest.raises(MissingFileError, match="names no method"):
        lvlm_decode.Method.from_pretrained(tmp_path)
    for held, why in (("{", "JSON"), ("[]", "object"), ('{"lvlm_decode": [{"name": "vcd"}]}', "parameters")):
        (tmp_path / hub.FILE).write_text(held)
        with pytest.raises(FileFormatError, match=why):
            lvlm_decode.Method.from_pretrained(tmp_path)
    (tmp_path / hub.FILE).write_text('{"lvlm_decode": [{"name": "vcd", "parameters": {"alhpa": 1}}]}')
    with pytest.raises(FileFormatError, match="alhpa"):
        lvlm_decode.Method.from_pretrained(tmp_path)


def test_an_exported_repository_decodes_as_the_method(tmp_path, monkeypatch):
    from PIL import Image

    from lvlm_decode.evidence.explain import worded
    from lvlm_decode_evals.runner import load as loaded

    folder = tmp_path / "repository"
    done = CliRunner().invoke(app, ["export-hub", "avisc(alpha=2)", str(folder)])
    assert done.exit_code == 0, done.output
    card = (folder / "README.md").read_text()
    assert "custom_generate" in card and "2405.17820" in card
    assert "lvlm-decode" in (folder / "custom_generate" / "requirements.txt").read_text()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    tiny = loaded("tiny")
    text = worded(tiny.processor, "Please describe this image in detail.")
    picture = Image.open(lvlm_decode_data.load_scenes()[3].path)
    inputs = tiny.processor(images=[picture], text=[text], return_tensors="pt")
    given = {"do_sample": False, "max_new_tokens": 16}
    with lvlm_decode.attached(tiny.model, "avisc(alpha=2)"):
        expected = tiny.model.generate(**inputs, **given).tolist()
    assert tiny.model.generate(**inputs, **given).tolist() != expected
    got = tiny.model.generate(**inputs, **given, custom_generate=str(folder), trust_remote_code=True)
    assert got.tolist() == expected
    assert lvlm_decode.attached(tiny.model) is None
