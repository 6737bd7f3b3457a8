"""Draft heads, checkpoints and projectors from files: damaged or foreign ones are one sentence, and no code runs."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_decode.errors import InputError
from lvlm_decode.speculative.heads import DraftHead, HeadConfig
from lvlm_decode.weights import load_into, read_checkpoint, read_safetensors

SIZES = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "intermediate_size": 8, "vocab_size": 12}


@pytest.fixture
def folder(tmp_path):
    DraftHead(HeadConfig(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


def test_a_whole_head_is_read(folder):
    assert DraftHead.from_pretrained(folder).config == HeadConfig(**SIZES)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": "8"}, r"head\.json: field 'hidden_size' must be a whole number"),
        ({"hidden_size": 0}, "field 'hidden_size' must be greater than or equal to 1"),
        ({"hiden_size": 8}, "field 'hiden_size' is unknown; .* the nearest is 'hidden_size'"),
        ({"image": "fold"}, "field 'image' must be one of"),
        ({"queries": 1}, r"head\.json: queries = 1"),
        ({"hidden_size": 16}, r"head\.safetensors does not fit DraftHead"),
    ],
)
def test_a_wrong_config_is_named(folder, change, sentence):
    path = folder / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=sentence):
        DraftHead.from_pretrained(folder)


def test_damaged_head_files_are_named(folder):
    weights = folder / "head.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:-7], b"\xff" * 64, pickle.dumps({"a": 1})):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=r"head\.safetensors is no whole safetensors file"):
            DraftHead.from_pretrained(folder)
    weights.write_bytes(whole)
    state = load_file(weights)
    save_file({name: value for name, value in state.items() if name != "fc.bias"}, weights)
    with pytest.raises(InputError, match=r"does not fit DraftHead: .*fc\.bias"):
        DraftHead.from_pretrained(folder)
    save_file(state | {"fc.bias": torch.full_like(state["fc.bias"], float("nan"))}, weights)
    with pytest.raises(InputError, match=r"tensor fc\.bias holds numbers that are not finite"):
        DraftHead.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(InputError, match="is missing"):
        DraftHead.from_pretrained(folder)
    (folder / "head.json").write_text("{")
    with pytest.raises(InputError, match=r"head\.json.*broken JSON"):
        DraftHead.from_pretrained(folder)


class Harmful:
    def __reduce__(self):
        return (print, ("code ran",))


def test_checkpoints_run_no_code(tmp_path, capsys):
    path = tmp_path / "c.pt"
    torch.save({"model": {"w": torch.ones(2)}, "step": 3}, path)
    assert read_checkpoint(path, needs=("model", "step"))["step"] == 3
    with pytest.raises(InputError, match=r"c\.pt has no field 'curve'"):
        read_checkpoint(path, needs=("curve",))
    whole = path.read_bytes()
    torch.save({"model": Harmful()}, path)
    harmful = path.read_bytes()
    for content in (harmful, whole[:-20], b"", b"PK\x03\x04", b"[1]"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"checkpoint .*c\.pt cannot be read"):
            read_checkpoint(path)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(InputError, match="is missing"):
        read_checkpoint(tmp_path / "none.pt")


def test_weights_of_another_module(tmp_path):
    with pytest.raises(InputError, match="here does not fit Linear"):
        load_into(torch.nn.Linear(2, 2), {"weight": torch.ones(3, 3)}, "here")
    with pytest.raises(InputError, match="is missing"):
        read_safetensors(tmp_path / "none.safetensors")
