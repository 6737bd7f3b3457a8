"""Heads that their authors published: names, shapes, files and the hub, and numbers of the authors' own code."""

import json
import math

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch.nn import functional as F

from lvlm_decode.attachment import attach, detach
from lvlm_decode.errors import InputError, UnsupportedError
from lvlm_decode.methods import parse
from lvlm_decode.speculative import drafters
from lvlm_decode.speculative.heads import KINDS, DraftHead, HeadConfig, from_state_dict
from lvlm_decode.testing import models as zoo
from lvlm_decode.training.draft_heads import drafting_passes


def eagle3(width, inner, heads, kv, size, vocabulary, drafted, device="cpu"):
    """Names and shapes of SpecForge's EAGLE-3 heads, whose embedding is left out when they are saved."""
    names = {"fc.weight": (width, 3 * width), "norm.weight": (width,), "lm_head.weight": (drafted, width)}
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        names[f"midlayer.{name}.weight"] = (width,)
    for name, count in (("q", heads), ("k", kv), ("v", kv)):
        names[f"midlayer.self_attn.{name}_proj.weight"] = (count * size, 2 * width)
    names |= {
        "midlayer.self_attn.o_proj.weight": (width, heads * size),
        "midlayer.mlp.gate_proj.weight": (inner, width),
        "midlayer.mlp.up_proj.weight": (inner, width),
        "midlayer.mlp.down_proj.weight": (width, inner),
    }
    state = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in names.items()}
    ids = torch.randperm(vocabulary)[:drafted].sort().values
    chosen = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, ids, True)
    return state | {"d2t": ids - torch.arange(drafted), "t2d": chosen}


def published(kind, width=4096, heads=32, kv=32, inner=11008, vocabulary=32064, qkv_bias=False, device="meta"):
    """Names and shapes of the published checkpoints, without their values."""
    names = {
        "embed_tokens.weight": (vocabulary, width),
        "fc.weight": (width, 2 * width),
        "fc.bias": (width,),
        "layers.0.self_attn.q_proj.weight": (width, width),
        "layers.0.self_attn.k_proj.weight": (kv * width // heads, width),
        "layers.0.self_attn.v_proj.weight": (kv * width // heads, width),
        "layers.0.self_attn.o_proj.weight": (width, width),
        "layers.0.mlp.gate_proj.weight": (inner, width),
        "layers.0.mlp.up_proj.weight": (inner, width),
        "layers.0.mlp.down_proj.weight": (width, inner),
        "layers.0.post_attention_layernorm.weight": (width,),
    }
    if qkv_bias:
        for name in ("q_proj", "k_proj", "v_proj"):
            names[f"layers.0.self_attn.{name}.bias"] = (names[f"layers.0.self_attn.{name}.weight"][0],)
    if kind == "msd qwen2-vl":
        names["layers.0.input_layernorm.weight"] = (width,)
    if kind == "vispec":
        names |= {
            "img_fc.weight": (width, 2 * width),
            "img_fc.bias": (width,),
            "imadpt.q": (2, heads, width // heads),
            "imadpt.k_proj.weight": (width, width),
            "imadpt.v_proj.weight": (width, width),
            "imadpt.o_proj.weight": (width, width),
        }
        if qkv_bias:
            names |= {"imadpt.k_proj.bias": (width,), "imadpt.v_proj.bias": (width,)}
    return {
        name: torch.randn(shape) if device != "meta" else torch.empty(shape, device=device)
        for name, shape in names.items()
    }


@pytest.mark.parametrize("kind, parameters", [("vispec", 319.9e6), ("msd", 236.0e6)])
def test_published_sizes_are_ours(kind, parameters):
    """LLaVA-1.5-7B: layer 202.4 M + fc 33.6 M, and for ViSpec img_fc 33.6 M + adaptor 50.3 M."""
    with torch.device("meta"):
        config = HeadConfig(4096, 32, 32, 128, 11008, 32064, **{"kind": kind, **KINDS[kind]})
        head = DraftHead(config)
    theirs = {n: tuple(v.shape) for n, v in published(kind).items() if n != "embed_tokens.weight"}
    ours = {n: tuple(v.shape) for n, v in head.state_dict().items()}
    assert ours == theirs
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["vispec", "msd", "msd qwen2-vl", "eagle"])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.filterwarnings("ignore:the head came with the embedding of another model")
def test_published_state_dicts_load_and_draft(kind, qkv_bias, prefix):
    tiny = zoo.tiny("llava")
    text = tiny.model.config.text_config
    torch.manual_seed(0)
    # Full multi-head attention in the head although the target groups its keys, as in ViSpec's Qwen heads.
    kv = 2 if kind == "msd qwen2-vl" else 4
    state = published(kind, text.hidden_size, 4, kv, 40, zoo.VOCABULARY, qkv_bias, device="cpu")
    state = {prefix + name: value for name, value in state.items()}
    head = from_state_dict(state, tiny.model, kind if kind == "eagle" else None, rows=6, depth=2, top_k=2)
    assert head.config.input_norm == (kind == "msd qwen2-vl")
    kind = kind.partition(" ")[0]
    assert head.config.kind == kind and head.config.num_kv_heads == kv and head.config.intermediate_size == 40
    for name, value in head.state_dict().items():
        torch.testing.assert_close(value, state[prefix + name])
    inputs = tiny.inputs(["is it"])
    expected = tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    attach(tiny.model, parse("plain"), drafter=drafters.get(kind)(head=head))
    try:
        assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)
    finally:
        detach(tiny.model)


@pytest.mark.filterwarnings("ignore:the head came with the embedding of another model")
def test_foreign_state_dicts_are_refused():
    tiny = zoo.tiny("llava")
    width = tiny.model.config.text_config.hidden_size
    good = published("vispec", width, 4, 4, 40, zoo.VOCABULARY, device="cpu")
    with pytest.raises(InputError, match=r"no 'fc\.weight'"):
        from_state_dict({"lm.weight": torch.zeros(1)}, tiny.model)
    with pytest.raises(InputError, match=r"missing img_fc\.weight"):
        from_state_dict({k: v for k, v in good.items() if k != "img_fc.weight"}, tiny.model)
    with pytest.raises(InputError, match="unknown extra"):
        from_state_dict({**good, "extra": torch.zeros(1)}, tiny.model)
    with pytest.raises(InputError, match="belongs to another model"):
        from_state_dict({**good, "fc.weight": torch.zeros(8, 16)}, tiny.model)
    for name in ("fc.weight", "layers.0.mlp.down_proj.weight", "img_fc.weight"):
        with pytest.raises(InputError, match=f"{name} is .* belongs to another model"):
            from_state_dict({**good, name: good[name].t().contiguous()}, tiny.model)
    with pytest.raises(InputError, match=r"imadpt\.q is .* belongs to another model"):
        from_state_dict({**good, "imadpt.q": good["imadpt.q"].transpose(1, 2).contiguous()}, tiny.model)
    joined = from_state_dict({**good, "imadpt.q": good["imadpt.q"].flatten(1)}, tiny.model)
    torch.testing.assert_close(joined.imadpt.q.detach(), good["imadpt.q"])


@pytest.mark.filterwarnings("ignore:the head came with the embedding of another model")
def test_the_norm_before_attention_is_applied():
    """MSD's head for Qwen2-VL has one; without it the head guesses something else."""
    tiny = zoo.tiny("llava")
    torch.manual_seed(0)
    state = published("msd qwen2-vl", 32, 4, 2, 40, zoo.VOCABULARY, True, device="cpu")
    normed = from_state_dict(state, tiny.model)
    bare = from_state_dict({k: v for k, v in state.items() if "input_layernorm" not in k}, tiny.model)
    x = torch.randn(1, 5, 32)
    none, every = torch.zeros(1, 5, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    a, b = (head(head.slots(x, x, none, every)) for head in (normed, bare))
    assert not torch.allclose(a, b, atol=0.1)


# --- the numbers of the authors' code

RECORDED = json.loads((ROOT / "tests" / "recorded_heads.json").read_text(encoding="utf-8"))
SIZES = dict(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=40, rms_eps=1e-6)
#: Positions of a target with three axes: an image of three tokens after the first one.
AXES = torch.tensor([[[0, 1, 1, 1, 2, 3, 4]], [[0, 1, 1, 2, 2, 3, 4]], [[0, 1, 2, 1, 2, 3, 4]]])


def wave(name, *shape):
    """Numbers that depend on a name and on nothing that a release of torch may change."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    values = torch.sin(n * n * 0.37 + sum(map(ord, name))) * 1.4
    return (values / (shape[-1] ** 0.5 if len(shape) > 1 else 1)).reshape(shape)


def filled(head, theirs):
    """The head with weights made from the names its authors give them."""
    head = head.double().eval()
    state = {}
    for name, value in head.state_dict().items():
        values = wave(theirs(name), *value.shape)
        state[name] = 1 + 0.3 * values if "norm" in name else values
    head.load_state_dict(state)
    return head


def close(found, recorded):
    """The first six numbers at the third and the last of seven slots."""
    torch.testing.assert_close(found[0, [2, 6], :6], torch.tensor(recorded, dtype=found.dtype), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", ["eagle3", "eagle3 mrope"])
@torch.no_grad()
def test_eagle3_computes_what_its_authors_code_computed(kind):
    """Three passes from every slot at once, as their training unrolls them: true features, then the head's own guesses."""
    mrope = (1, 1, 2) if "mrope" in kind else ()
    config = HeadConfig(**SIZES, vocab_size=20, **KINDS["eagle3"], kind="eagle3", states=(1, 2, 3), mrope=mrope)
    head = filled(DraftHead(config), lambda name: name.replace("layers.0.", "midlayer."))
    embeds, states = wave("embeds", 1, 7, 32) * 4, wave("states", 1, 7, 96) * 6
    features = head.lift(states, dict(zip((1, 2, 3), states.chunk(3, -1))))
    every = torch.ones(1, 7, dtype=torch.bool)
    slots = head.slots(embeds, features, ~every, every, AXES if mrope else None)
    for guess, recorded in zip(drafting_passes(head, embeds, features, slots, 3), RECORDED[kind]["steps"], strict=True):
        close(guess, recorded["hidden"])
        close(head.lm_head(head.norm(guess)), recorded["logits"])
    # What decoding runs over a prompt is the first of these passes.
    close(head(slots), RECORDED[kind]["steps"][0]["hidden"])


@torch.no_grad()
def test_msd_for_qwen2_vl_computes_what_its_authors_code_computed():
    config = HeadConfig(**SIZES, vocab_size=20, **KINDS["msd"], input_norm=True, qkv_bias=True, rope_theta=1e6)
    head = filled(DraftHead(config), lambda name: name)
    embeds, features = wave("embeds", 1, 7, 32) * 4, (wave("states", 1, 7, 96) * 6)[..., :32]
    every = torch.ones(1, 7, dtype=torch.bool)
    close(head(head.slots(embeds, features, ~every, every)), RECORDED["msd qwen2-vl"]["hidden"])


@torch.no_grad()
def test_frequencies_take_turns_as_qwen3_vl_has_them():
    """Axes of interleaved positions, against transformers' own rotary embedding."""
    model = zoo.tiny("qwen3_vl").model
    config = HeadConfig.for_target(model, "eagle3")
    assert config.mrope_interleaved and sum(config.mrope) * 2 == config.head_dim
    positions = torch.randint(0, 50, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    cos, sin = DraftHead(config).rotary(positions)
    theirs = model.get_decoder().rotary_emb(torch.zeros(1), positions)
    torch.testing.assert_close(cos[:, 0], theirs[0])
    torch.testing.assert_close(sin[:, 0], theirs[1])
    model = zoo.tiny("qwen2_5_vl").model
    config = HeadConfig.for_target(model, "eagle3")
    assert config.mrope and not config.mrope_interleaved


# --- files


def write(folder, state, config=None, how="bin"):
    folder.mkdir(exist_ok=True)
    if how == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif how == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        save = save_file if how == "safetensors shards" else torch.save
        end = "safetensors" if how == "safetensors shards" else "bin"
        name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[end]
        places = {key: f"part-{number % 2}.{end}" for number, key in enumerate(state)}
        for place in set(places.values()):
            save({key: state[key] for key in state if places[key] == place}, folder / place)
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": places}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def state_for(kind, model, seed=0):
    """Random weights of a published head of ``kind`` for a tiny model, its embedding with them."""
    torch.manual_seed(seed)
    text = model.config.get_text_config(decoder=True)
    if kind == "eagle3":
        heads = text.num_attention_heads
        return eagle3(32, 40, heads, 2, 32 // heads, zoo.VOCABULARY, 50)
    state = published(kind, 32, 4, 2, 40, zoo.VOCABULARY, device="cpu")
    return state | {"embed_tokens.weight": model.get_input_embeddings().weight.detach().half()}


@pytest.mark.parametrize("how", ["bin", "safetensors", "bin shards", "safetensors shards"])
@pytest.mark.parametrize("kind", ["vispec", "msd", "eagle", "eagle3"])
def test_a_folder_drafts_by_its_path(kind, how, tmp_path, recwarn):
    tiny = zoo.tiny("llava")
    state = state_for(kind, tiny.model)
    folder = write(tmp_path / "head", state, {"hidden_size": 32, "vocab_size": zoo.VOCABULARY}, how)
    inputs = tiny.inputs(["is it"])
    expected = tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    attach(tiny.model, "plain", drafter=f"{kind}(path={folder},depth=2,top_k=2)")
    try:
        assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)
        head = tiny.model.generate.drafter.head
    finally:
        detach(tiny.model)
    for name, value in head.state_dict().items():
        theirs = name.replace("layers.0.", "midlayer.") if kind == "eagle3" else name
        if name == "trim":
            assert torch.equal(value, state["t2d"].nonzero()[:, 0])
        else:
            torch.testing.assert_close(value, state[theirs])
    assert not [w for w in recwarn if "another model" in str(w.message)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "instructblip", "llava_next"])
@pytest.mark.parametrize("name", ["plain", "vcd"])
def test_eagle3_drafts_for_every_family(family, name, tmp_path):
    tiny = zoo.tiny(family)
    write(tmp_path / "head", state_for("eagle3", tiny.model), {}, "safetensors")
    inputs = tiny.inputs(["is it", "what color"], seed=1)
    how = {"max_new_tokens": 10, "do_sample": False, "seed": 0}
    outs = []
    for drafter in (None, f"eagle3(path={tmp_path / 'head'},depth=3,top_k=2,rows=7)"):
        attach(tiny.model, name, processor=tiny.processor, drafter=drafter)
        try:
            outs.append(tiny.model.generate(**inputs, **how))
        finally:
            detach(tiny.model)
    assert torch.equal(*outs)


def test_settings_of_a_config_are_read(tmp_path):
    tiny = zoo.tiny("llava")
    target = tiny.model
    state = state_for("eagle3", target)

    def loaded(**config):
        return from_state_dict(state, target, "eagle3", config).config

    assert loaded().states == (1, 2, 3) and loaded().rms_eps == target.config.text_config.rms_norm_eps
    assert loaded(eagle_aux_hidden_state_layer_ids=[1, 2, 4]).states == (1, 2, 4)
    # SpecForge's nested list names the layer that puts a state out, from 0.
    assert loaded(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}).states == (1, 2, 3)
    assert loaded(rope_theta=5e5, rms_norm_eps=1e-4).rope_theta == 5e5
    assert loaded(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}).mrope == (1, 1, 2)
    assert loaded(norm_before_residual=True).residual_norm and not loaded().residual_norm
    for states, wrong in (((1, 2), "not three"), ((1, 2, 9), "layers 1 to 4")):
        with pytest.raises(InputError, match=wrong):
            loaded(eagle_aux_hidden_state_layer_ids=list(states))
    for config, error in (
        ({"fc_norm": True}, "fc_norm = True"),
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "'yarn'"),
        ({"speculators_model_type": "eagle3"}, "speculators"),
    ):
        with pytest.raises(UnsupportedError, match=error):
            loaded(**config)
    for config, error in (
        ({"hidden_size": 64}, "hidden_size 64, and the model has 32"),
        ({"vocab_size": 32000}, "vocab_size 32000"),
        ({"target_model_type": "qwen2_5_vl"}, "'qwen2_5_vl', and this one is 'llava'"),
    ):
        with pytest.raises(InputError, match=error):
            loaded(**config)
    # A drafter may say which states, where the files do not.
    write(tmp_path / "head", state)
    drafter = drafters.parse(f"eagle3(path={tmp_path / 'head'},states=(1,3,4))", model=target)
    assert drafter.layers(target) == (1, 3, 4)
    with pytest.raises(InputError, match="layers 1 to 4"):
        drafters.parse(f"eagle3(path={tmp_path / 'head'},states=(1,3,5))", model=target)


def test_the_norm_of_the_residual_changes_what_is_guessed():
    """The flag of heads in vLLM's later format; against the layer written out."""
    config = HeadConfig(**SIZES, vocab_size=20, **KINDS["eagle3"], kind="eagle3", states=(1, 2, 3), residual_norm=True)
    head = filled(DraftHead(config), lambda name: name)
    embeds, features = wave("embeds", 1, 1, 32), wave("states", 1, 1, 32) * 3
    every = torch.ones(1, 1, dtype=torch.bool)
    found = head(head.slots(embeds, features, ~every, every))
    layer, rms = head.layer, lambda x, norm: F.rms_norm(x, (32,), norm.weight, 1e-6)
    normed = rms(features, layer.hidden_norm)
    # One slot sees itself alone, so attention hands on its value.
    value = layer.self_attn.v_proj(torch.cat([rms(embeds, layer.input_layernorm), normed], -1))
    value = value.unflatten(-1, (2, 8)).repeat_interleave(2, 2).flatten(2)
    h = normed + layer.self_attn.o_proj(value)
    torch.testing.assert_close(found, h + head.feed_forward(h))


def test_damaged_files_are_refused(tmp_path):
    model = zoo.tiny("llava").model
    good = state_for("eagle3", model)

    def refused(state, match, how="bin", kind="eagle3", config=None):
        folder = write(tmp_path / f"head {len(list(tmp_path.iterdir()))}", state, config, how)
        with pytest.raises(InputError, match=match):
            drafters.parse(f"{kind}(path={folder})", model=model)

    refused({k: v for k, v in good.items() if k != "norm.weight"}, r"missing norm\.weight")
    refused({**good, "extra": torch.zeros(1)}, "unknown extra")
    refused({**good, "fc.weight": good["fc.weight"].t().contiguous()}, r"fc\.weight is .* belongs to another model")
    refused({**good, "fc.weight": torch.zeros(32, 64)}, r"fc\.weight is \(32, 64\)")
    refused({**good, "d2t": good["d2t"].flip(0)}, "rising tokens")
    refused({**good, "d2t": good["d2t"] + 1000}, "rising tokens of a vocabulary of 160")
    refused({**good, "t2d": good["t2d"].roll(1)}, "d2t and t2d")
    refused({**good, "d2t": good["d2t"][:-1]}, "two heads")
    refused({k: v for k, v in good.items() if k != "d2t"}, "no d2t says which")
    refused(good, "of kind 'eagle3'.*use drafter eagle3", kind="msd")
    refused(state_for("vispec", model), "of kind 'vispec'", kind="eagle3")
    refused({"embed": good}, "no table of tensors")
    folder = write(tmp_path / "index", good, how="bin shards")
    (folder / "part-1.bin").unlink()
    with pytest.raises(InputError, match=r"part-1\.bin is missing"):
        drafters.parse(f"eagle3(path={folder})", model=model)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    with pytest.raises(InputError, match="outside of its folder"):
        drafters.parse(f"eagle3(path={folder})", model=model)
    folder = write(tmp_path / "config", good)
    (folder / "config.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        drafters.parse(f"eagle3(path={folder})", model=model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"neither head\.json nor model\.safetensors"):
        drafters.parse(f"eagle3(path={tmp_path / 'empty'})", model=model)


class Runs:
    """What unpickling calls."""

    def __reduce__(self):
        return (print, ("a pickle ran",))


def test_a_pickle_that_runs_code_is_not_read(tmp_path, capsys):
    torch.save({"fc.weight": Runs()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"can run code.*safetensors"):
        drafters.parse(f"msd(path={tmp_path})", model=zoo.tiny("llava").model)
    assert "a pickle ran" not in capsys.readouterr().out


def test_tensors_in_a_field_of_the_file_are_found(tmp_path):
    model = zoo.tiny("llava").model
    state = state_for("eagle", model)
    torch.save({"state_dict": state}, tmp_path / "pytorch_model.bin")
    drafter = drafters.parse(f"eagle(path={tmp_path})", model=model)
    torch.testing.assert_close(drafter.head.fc.weight.detach(), state["fc.weight"])


def test_a_head_of_another_model_is_told_of(tmp_path):
    tiny = zoo.tiny("llava")
    state = state_for("msd", tiny.model)
    folder = write(tmp_path / "head", {**state, "embed_tokens.weight": torch.randn(zoo.VOCABULARY, 32)})
    with pytest.warns(UserWarning, match="embedding of another model.*no answer changes"):
        drafters.parse(f"msd(path={folder})", model=tiny.model)
    with pytest.raises(InputError, match=r"embed_tokens\.weight is \(160, 16\)"):
        from_state_dict({**state, "embed_tokens.weight": torch.randn(zoo.VOCABULARY, 16)}, tiny.model)
    # A head of this library knows the language head it was trained for.
    head = DraftHead(HeadConfig.for_target(tiny.model, "msd", fingerprint="0" * 16, target="other", depth=1))
    attach(tiny.model, parse("plain"), drafter=drafters.get("msd")(head=head))
    try:
        with pytest.warns(UserWarning, match="trained for other, whose language head is not this model's"):
            tiny.model.generate(**tiny.inputs(["is it"]), max_new_tokens=3, do_sample=False)
    finally:
        detach(tiny.model)


def test_a_hub_id_is_fetched_without_pickles_where_it_can_be(tmp_path, monkeypatch):
    model = zoo.tiny("llava").model
    folder = write(tmp_path / "head", state_for("eagle3", model), how="safetensors")
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert drafters.parse("eagle3(path=someone/head)", model=model).head is not None
    assert {name for name, _, _ in asked} == {"someone/head"} and {revision for _, revision, _ in asked} == {None}
    assert not any("bin" in pattern for _, _, patterns in asked for pattern in patterns)
    asked.clear()
    (folder / "model.safetensors").unlink()
    write(tmp_path / "head", state_for("msd", model))
    assert drafters.parse("msd(path=someone/head@a1b2c3)", model=model).head is not None
    assert {revision for _, revision, _ in asked} == {"a1b2c3"} and "pytorch_model*.bin" in asked[1][2]


def test_a_hub_that_cannot_be_reached_is_said_in_one_sentence(monkeypatch):
    def offline(*args, **options):
        raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"no such folder, and the hub says: Cannot find.*hf download someone/head"):
        drafters.parse("vispec(path=someone/head)", model=zoo.tiny("llava").model)
    with pytest.raises(InputError, match="no such folder"):
        drafters.parse("vispec(path=/nowhere/to/be/found)", model=zoo.tiny("llava").model)
