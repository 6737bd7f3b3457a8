"""Steered hidden states against literal re-statements, on copies of the model with hooks of the test's own."""

import copy
import json
import math
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache
from typer.testing import CliRunner

from lvlm_decode import attach, detach
from lvlm_decode.cli import app
from lvlm_decode.engine import hf, learned, sampling
from lvlm_decode.engine import vectors as store
from lvlm_decode.engine.hf import decoder
from lvlm_decode.engine.run import Run
from lvlm_decode.engine.steer import Add, Project, Turn, last_states, steering
from lvlm_decode.errors import InputError, ParameterError, UnsupportedError
from lvlm_decode.families import family_of
from lvlm_decode.method import Contrast, Method
from lvlm_decode.methods.deco import DeCo
from lvlm_decode.methods.memvr import MemVR, retraced
from lvlm_decode.methods.nullu import Nullu
from lvlm_decode.methods.plain import Plain
from lvlm_decode.methods.revis import Revis
from lvlm_decode.methods.vcd import VCD
from lvlm_decode.methods.vista import VISTA
from lvlm_decode.methods.vti import VTI
from lvlm_decode.testing.models import IMAGE, tiny
from lvlm_decode.training import vectors as calibration
from lvlm_decode.training.pairs import scene_pairs

TEXTS = ("ab", "is it a dog?")
D = 32


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def vectors(*more: int) -> Tensor:
    drawn = torch.randn(4, D, *more, generator=torch.Generator().manual_seed(3))
    return torch.linalg.qr(drawn).Q if more else drawn


def decoder_layers(model):
    return model.model.language_model.layers


def stepped(inputs, tokens: Tensor, edit=None, layers=range(4), late=None, model=None, at="mlp") -> Tensor:
    """(steps, N) logits of one row that is fed ``tokens``; ``edit(layer, y)`` changes what MLPs, or layers, put out.

    Args:
        late: (first, last, gamma) the window of layer outputs that is mixed in without the final norm.
    """
    model = copy.deepcopy(model or tiny("llava").model)
    states: dict[int, Tensor] = {}
    for number, layer in enumerate(decoder_layers(model)):
        if edit is not None and number in layers:
            part = layer.mlp if at == "mlp" else layer
            part.register_forward_hook(lambda m, a, y, number=number: edit(number, y))
        layer.register_forward_hook(lambda m, a, h, number=number: states.__setitem__(number, h))
    cache = DynamicCache(config=model.config.get_text_config())
    out = []
    with torch.no_grad():
        for given in [inputs, *({"input_ids": token.view(1, 1)} for token in tokens)]:
            logits = model(**given, **hf.with_cache(cache)).logits[0, -1]
            if late is not None:
                first, last, gamma = late
                mixed = [model.lm_head(states[i][0, -1]) for i in range(first, last + 1)]
                logits = (1 - gamma) * logits + gamma * sum(mixed) / len(mixed)
            out.append(logits)
    return torch.stack(out)


def traced(method, texts=TEXTS, images=1, tokens: int = 5, **more):
    """(steps, N) scores of the first row of a padded batch, and its tokens."""
    zoo = tiny("llava")
    inputs = zoo.inputs(list(texts), images)
    attach(zoo.model, method, processor=zoo.processor)
    options = dict(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    try:
        out = zoo.model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True, **more)
    finally:
        detach(zoo.model)
    return torch.stack(out.logits)[:, 0], out.sequences[0, inputs["input_ids"].shape[1] :]


def assert_stepped(method, plain: bool = False, **how) -> None:
    logits, tokens = traced(method)
    inputs = tiny("llava").inputs(TEXTS[:1])
    torch.testing.assert_close(logits, stepped(inputs, tokens[:-1], **how), atol=3e-5, rtol=1e-4)
    assert (logits - stepped(inputs, tokens[:-1])).abs().amax(-1).min() > 1e-2


# --- the primitive ----------------------------------------------------------------------------------------------------


def test_turn_is_the_authors_function():
    """What the authors' VSV and VTI layers gave on these numbers, in half precision."""
    x, v = torch.arange(8.0).sin().view(1, 2, 4), torch.arange(4.0).cos()
    vsv = [0.13867, 0.90820, 0.84277, 0.00253, -0.62109, -1.05176, -0.51514, 0.49487]
    away = [-0.13293, 0.75342, 0.94678, 0.27002, -0.79639, -0.91162, -0.18848, 0.70801]
    vti = [0.07172, 0.87939, 0.87842, 0.07001, -0.72803, -0.98584, -0.33765, 0.62109]
    for steer, want in (
        (Turn({0: v}, 0.17, boost=True), vsv),
        (Turn({0: -v}, 0.17, boost=True), away),
        (Turn({0: v}, 0.09), vti),
    ):
        torch.testing.assert_close(steer.edit(0, x).flatten(), torch.tensor(want), atol=1e-3, rtol=1e-3)


def test_turn_keeps_lengths_and_ends_at_the_vector():
    y, v = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0)), vectors()[0]
    torch.testing.assert_close(Turn({0: v}, 0.4, True).edit(0, y).norm(dim=-1), y.norm(dim=-1))
    torch.testing.assert_close(Turn({0: 7 * v}, 0.4).edit(0, y), Turn({0: v}, 0.4).edit(0, y))
    torch.testing.assert_close(unit(Turn({0: v}, 1e6).edit(0, y)), unit(v).expand(2, 3, D), atol=1e-4, rtol=1e-4)
    assert torch.equal(Turn({0: torch.zeros(D)}, 0.4).edit(0, y), y)


def test_add_with_its_gate_is_the_authors_function():
    """What Revis' hook gave on these numbers: risk 0.03255 and 0.81764 against 0.2."""
    x, v = torch.arange(8.0).sin().view(1, 2, 4), torch.arange(4.0).cos()
    out = Add({0: v}, 2.5, gate=-0.2).edit(0, x)
    assert torch.equal(out[0, 0], x[0, 0])
    torch.testing.assert_close(out[0, 1], torch.tensor([1.74320, 0.39183, -1.31978, -1.81799]), atol=1e-4, rtol=1e-4)
    assert torch.equal(Add({0: v}, 2.5, gate=-1.01).edit(0, x), x)
    torch.testing.assert_close(Add({0: v}, 2.5, gate=1.01).edit(0, x), Add({0: v}, 2.5).edit(0, x))


def test_project_twice_is_once_and_knows_no_basis():
    y, basis = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0)), vectors(4)[0]
    once = Project({0: basis}).edit(0, y)
    torch.testing.assert_close(Project({0: basis}).edit(0, once), once)
    assert (once @ basis).abs().max() < 1e-5
    turned = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    torch.testing.assert_close(Project({0: basis @ turned}).edit(0, y), once)


class Steered(Method):
    """Steers with what the test says."""

    name = "steered"
    how: ClassVar[dict] = {}

    def patch(self, run):
        return steering(run, **self.how)


@pytest.mark.parametrize("at", ["mlp", "attention", "layer"])
@pytest.mark.parametrize("positions", ["all", "choosing"])
def test_sites_and_positions(at, positions):
    """Adding a vector to what a part puts out, against a hook of the test's own."""
    v = vectors()
    Steered.how = dict(steer=Add(dict(enumerate(v)), 0.5), layers=(1, 3), at=at, positions=positions)
    logits, tokens = traced(Steered())
    model = copy.deepcopy(tiny("llava").model)

    def add(number):
        def hook(module, args, output):
            states = (output if isinstance(output, Tensor) else output[0]).clone()
            states[:, slice(None) if positions == "all" else slice(-1, None)] += 0.5 * v[number]
            return states if isinstance(output, Tensor) else (states, *output[1:])

        return hook

    for number in (1, 3):
        layer = decoder_layers(model)[number]
        {"mlp": layer.mlp, "attention": layer.self_attn, "layer": layer}[at].register_forward_hook(add(number))
    inputs = tiny("llava").inputs(TEXTS[:1])
    torch.testing.assert_close(logits, stepped(inputs, tokens[:-1], model=model), atol=3e-5, rtol=1e-4)
    assert (logits - stepped(inputs, tokens[:-1])).abs().amax(-1).min() > 1e-2


def test_other_views_and_other_calls_stay_as_they_are():
    """VCD's negative under Nullu is VCD's negative; the model's own calls in between are untouched."""
    zoo = tiny("llava")
    inputs = zoo.inputs(list(TEXTS))
    tokens = torch.tensor([[5, 9], [7, 4]])
    seen = {}
    for name, method in (("alone", VCD()), ("both", VCD() + Nullu(vectors=vectors(4)))):
        run = Run(zoo.model, method, inputs, seed=0)
        with torch.no_grad(), run.method.patch(run):
            lanes = run.open()
            lanes.prefill()
            lanes.extend(tokens)
            seen[name, "plain"] = zoo.model(**inputs).logits
        seen[name] = lanes.last_step.logits
    assert torch.equal(seen["alone"][1], seen["both"][1])
    assert (seen["alone"][0] - seen["both"][0]).abs().max() > 1e-2
    assert torch.equal(seen["alone", "plain"], seen["both", "plain"])


# --- VISTA ------------------------------------------------------------------------------------------------------------


def literal_vectors(text: str, code: bool) -> Tensor:
    """(L, D) states of the last prompt token with the image minus those without, from two plain forwards."""
    model = copy.deepcopy(tiny("llava").model)
    states: list[Tensor] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda m, a, h: states.append(h[0, -1]))
    inputs = tiny("llava").inputs((text,))
    words = inputs["input_ids"][:, inputs["input_ids"][0] != IMAGE]
    with torch.no_grad():
        model(**inputs)
        model(input_ids=words)
    out = torch.stack(states[:4]) - torch.stack(states[4:])
    if code:
        out[0, 0] += 1
    return out


@pytest.mark.parametrize("first_coordinate", ["code", "none"])
def test_vista(first_coordinate):
    v = literal_vectors(TEXTS[0], first_coordinate == "code")

    def edit(layer, y):
        s = 0.3 * (1 + (unit(y) * -unit(v[layer])).sum(-1, keepdim=True).clamp(min=0))
        return y.norm(dim=-1, keepdim=True) * unit(unit(y) + s * unit(v[layer]))

    method = VISTA(strength=0.3, gamma=0.4, window=(1, 2), first_coordinate=first_coordinate)
    assert_stepped(method, edit=edit, late=(1, 2, 0.4))


def test_vista_steers_the_layers_that_are_asked_for():
    v = literal_vectors(TEXTS[0], False)

    def edit(layer, y):
        s = 0.3 * (1 + (unit(y) * -unit(v[layer])).sum(-1, keepdim=True).clamp(min=0))
        return y.norm(dim=-1, keepdim=True) * unit(unit(y) + s * unit(v[layer]))

    method = VISTA(strength=0.3, gamma=0.0, layers=(1, 2), first_coordinate="none")
    assert_stepped(method, edit=edit, layers=(1, 2))


def test_vista_window_follows_the_depth_and_keeps_off_the_last_layer():
    config = copy.deepcopy(tiny("llava").model)
    config.config.get_text_config().num_hidden_layers = 32
    assert VISTA().probes(config).hidden == tuple(range(26, 32))
    assert VISTA(gamma=0.0).probes(config).hidden == ()
    with pytest.raises(UnsupportedError, match="reaches the last layer"):
        VISTA(window=(25, 31)).probes(config)


def test_vista_leaves_a_row_without_image_alone():
    logits, tokens = traced(VISTA(strength=0.5, gamma=0.0), images=[0, 1])
    plain, same = traced(VISTA(strength=0.0, gamma=0.0), images=[0, 1])
    assert torch.equal(tokens, same)
    torch.testing.assert_close(logits, plain, atol=2e-5, rtol=1e-4)


def test_last_states_are_before_the_final_norm():
    zoo = tiny("llava")
    run = Run(zoo.model, VISTA(), zoo.inputs(list(TEXTS)), seed=0)
    states = last_states(run, [run.samples[0]])[:, 0]
    with torch.no_grad():
        normed = zoo.model.model.language_model.norm(states[-1])
        hidden = zoo.model(**zoo.inputs(list(TEXTS)), output_hidden_states=True).hidden_states
    torch.testing.assert_close(normed, hidden[-1][:, -1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(states[0], hidden[1][:, -1], atol=1e-5, rtol=1e-4)


def test_a_sum_hands_each_method_the_layers_it_asked_for():
    """DeCo beside VISTA chooses among its own layers, not among VISTA's too."""
    zoo = tiny("llava")
    deco, vista = DeCo(layers=(1,)), VISTA(strength=0.0, gamma=0.5, window=(1, 2))
    scores = []
    for method in (deco, vista, deco + vista):
        run = Run(zoo.model, method, zoo.inputs(list(TEXTS)), seed=0)
        with torch.no_grad():
            lanes = run.open()
            lanes.prefill()
        scores.append((run.method.combine(lanes.last_step), lanes.last_step.logits[0]))
    (first, plain), (second, _), (both, _) = scores
    torch.testing.assert_close(both, first + second - plain, atol=1e-4, rtol=1e-4)


# --- VTI and Nullu ----------------------------------------------------------------------------------------------------


def test_vti():
    d = vectors()

    def edit(layer, y):
        return y.norm(dim=-1, keepdim=True) * unit(unit(y) + 0.1 * 3.0 * unit(d[layer]))

    assert_stepped(VTI(vectors=d, text=3.0), edit=edit)


#: Layers, tokens and width of the small model's vision encoder.
GRID = (3, 17, D)


@pytest.fixture
def calibrated(tmp_path):
    """A file of both directions, and the visual one."""
    visual = torch.randn(GRID, generator=torch.Generator().manual_seed(4))
    store.save(tmp_path / "vti.safetensors", "vti", vectors(), tiny("llava").model, {"model": "tiny"}, visual)
    return tmp_path / "vti.safetensors", visual


def seeing(visual: Tensor, strength: float):
    """A copy of the model whose vision encoder is steered by hooks of the test's own."""
    model = copy.deepcopy(tiny("llava").model)

    def edit(number):
        def hook(module, args, z):
            turned = unit(z) + 0.1 * strength * unit(visual[number])
            return z.norm(dim=-1, keepdim=True) * unit(turned)

        return hook

    for number, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.mlp.register_forward_hook(edit(number))
    return model


def test_turn_per_token_is_the_authors_function():
    """What the authors' VTI layer gave on these numbers with a direction for each token, in half precision."""
    x, d = torch.arange(8.0).sin().view(1, 2, 4), torch.arange(8.0).cos().view(1, 2, 4)
    want = torch.tensor([-0.79639, -0.91162, -0.18835, 0.70801])
    torch.testing.assert_close(Turn({0: d}, 0.09).edit(0, x)[0, 1], want, atol=1e-3, rtol=1e-3)


def test_vti_steers_the_vision_encoder(calibrated):
    path, visual = calibrated
    assert_stepped(VTI(vectors=path, text=0.0, image=4.0), model=seeing(visual, 4.0))


def test_vti_steers_both(calibrated):
    path, visual = calibrated
    d = vectors()

    def edit(layer, y):
        return y.norm(dim=-1, keepdim=True) * unit(unit(y) + 0.1 * 3.0 * unit(d[layer]))

    assert_stepped(VTI(vectors=path, text=3.0, image=4.0), edit=edit, model=seeing(visual, 4.0))


def test_vti_without_strength_is_plain_whatever_the_file_holds(calibrated):
    path, _ = calibrated
    off = VTI(vectors=path, text=0.0, image=0.0)
    assert off.is_off and not VTI(vectors=path, text=0.0, image=0.1).is_off
    logits, tokens = traced(off)
    plain, same = traced(Plain())
    assert torch.equal(logits, plain) and torch.equal(tokens, same)
    text, _ = traced(VTI(vectors=path, text=3.0))
    assert torch.equal(text, traced(VTI(vectors=vectors(), text=3.0))[0])


def test_vti_steers_the_image_of_every_row_alike(calibrated):
    """A row of a batch is the row alone, also beside one without an image; that one stays as it is."""
    method = VTI(vectors=calibrated[0], text=0.0, image=4.0)
    batched, tokens = traced(method, images=[1, 0])
    alone, same = traced(method, TEXTS[:1])
    assert torch.equal(tokens, same)
    torch.testing.assert_close(batched, alone, atol=2e-5, rtol=1e-4)
    blind, _ = traced(method, TEXTS[::-1], images=[0, 1])
    plain, _ = traced(Plain(), TEXTS[::-1], images=[0, 1])
    torch.testing.assert_close(blind, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("order", [1, -1], ids=["vti first", "vcd first"])
def test_vti_leaves_the_noised_image_of_vcd_alone(calibrated, order):
    zoo = tiny("llava")
    steer = VTI(vectors=calibrated[0], text=0.0, image=4.0)
    first, second = (steer, VCD())[::order]
    steps = {}
    for name, method in (("vcd", VCD()), ("vti", steer), ("both", first + second)):
        run = Run(zoo.model, method, zoo.inputs(list(TEXTS)), seed=0)
        with torch.no_grad(), run.method.patch(run):
            lanes = run.open()
            lanes.prefill()
        steps[name] = lanes.last_step.logits
    torch.testing.assert_close(steps["both"][1], steps["vcd"][1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(steps["both"][0], steps["vti"][0], atol=2e-5, rtol=1e-4)
    assert (steps["both"][0] - steps["vcd"][0]).abs().max() > 1e-2


def test_vti_leaves_nothing_in_the_vision_encoder(calibrated):
    zoo = tiny("llava")
    inputs = zoo.inputs(list(TEXTS))
    options = dict(do_sample=False, max_new_tokens=3, output_logits=True, return_dict_in_generate=True)
    before = zoo.model.generate(**inputs, **options)
    hooks = [len(part._forward_hooks) for part in zoo.model.modules()]
    traced(VTI(vectors=calibrated[0], image=4.0))
    assert [len(part._forward_hooks) for part in zoo.model.modules()] == hooks
    after = zoo.model.generate(**inputs, **options)
    assert torch.equal(torch.stack(before.logits), torch.stack(after.logits))


def test_vti_image_refuses_what_it_cannot_steer(calibrated, tmp_path):
    path, visual = calibrated
    zoo = tiny("llava")
    with pytest.raises(
        ParameterError, match="no visual direction; make a file with: lvlm-decode train vector --kind vti"
    ):
        traced(VTI(vectors=vectors(), image=0.9))
    store.save(tmp_path / "other.safetensors", "vti", vectors(), zoo.model, {}, visual[:, :9])
    with pytest.raises(InputError, match=r"is \(3, 9, 32\), and the vision encoder has \(3, 17, 32\)"):
        traced(VTI(vectors=tmp_path / "other.safetensors", image=0.9))
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"cut\.safetensors cannot be read as a file of vectors"):
        traced(VTI(vectors=tmp_path / "cut.safetensors", image=0.9))
    tiles = tiny("llava_next")
    with pytest.raises(UnsupportedError, match="llava_next sees images in tiles or at their own resolution"):
        Run(tiles.model, VTI(vectors=path, image=0.9), tiles.inputs(), seed=0)
    inputs = zoo.inputs(["is it"])
    features = zoo.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    attach(zoo.model, VTI(vectors=path, image=0.9))
    try:
        with pytest.raises(InputError, match=r"vti reads the vision encoder .* given as features; pass pixel_values"):
            zoo.model.generate(**inputs, mm_encoder_outputs={"image": features}, max_new_tokens=1)
    finally:
        detach(zoo.model)


@pytest.mark.parametrize("family", ["instructblip", "gemma3", "paligemma"])
def test_vti_steers_every_encoder_of_one_grid(family, tmp_path):
    zoo = tiny(family)
    module = family_of(zoo.model).decoding_module(zoo.model)
    config = zoo.model.config.vision_config
    tokens = (config.image_size // config.patch_size) ** 2 + (family == "instructblip")
    visual = torch.randn(
        config.num_hidden_layers, tokens, config.hidden_size, generator=torch.Generator().manual_seed(4)
    )
    text = torch.randn(decoder.layer_count(module), decoder.width(module))
    store.save(tmp_path / "v.safetensors", "vti", text, module, {}, visual)
    images = []
    for strength in (0.0, 5.0):
        run = Run(zoo.model, VTI(vectors=tmp_path / "v.safetensors", image=strength), zoo.inputs(), seed=0)
        images.append(run.samples[0][0].images[0].features)
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_nullu_is_the_edited_weights():
    """The authors write W <- (I - V V^T) W into the MLP's last product."""
    bases = vectors(6)
    logits, tokens = traced(Nullu(vectors=bases, rank=3))
    model = copy.deepcopy(tiny("llava").model)
    with torch.no_grad():
        for number in (2, 3):
            v, weight = bases[number, :, :3], decoder_layers(model)[number].mlp.down_proj.weight
            weight.copy_((torch.eye(D) - v @ v.T) @ weight)
    inputs = tiny("llava").inputs(TEXTS[:1])
    torch.testing.assert_close(logits, stepped(inputs, tokens[:-1], model=model), atol=3e-5, rtol=1e-4)
    assert (logits - stepped(inputs, tokens[:-1])).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        (lambda: VTI(), ParameterError, "vectors"),
        (lambda: VTI(vectors=vectors()[:3]), ParameterError, r"are \(3, 32\), and this model needs \(4, 32\)"),
        (lambda: Nullu(vectors=vectors()), ParameterError, "and a number of directions"),
        (lambda: Nullu(vectors=vectors(2), rank=3), UnsupportedError, "have 2 directions"),
        (lambda: VTI(vectors="nowhere.safetensors"), InputError, "nowhere.safetensors cannot be read"),
    ],
)
def test_vectors_that_do_not_fit(method, error, words):
    with pytest.raises(error, match=words):
        traced(method())


def test_steers_do_not_add_to_each_other():
    with pytest.raises(UnsupportedError, match="both own the hidden states of view 0"):
        VISTA() + VTI(vectors=vectors())


# --- weights that differ from sample to sample ------------------------------------------------------------------------


class PerSample(Contrast):
    """Subtracts the prompt without image from long prompts, and adds it to short ones."""

    name = "per_sample"

    def views(self, sample, rng):
        return [sample.without_image(weight=-0.7 if len(sample.input_ids) > 25 else 1.5)]


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_views_weight_may_differ_from_sample_to_sample(more):
    both, _ = traced(PerSample(), tokens=4)
    assert len(tiny("llava").inputs(TEXTS[:1])["input_ids"][0]) <= 25
    for texts in (TEXTS, TEXTS[::-1]):
        _, batched = traced(PerSample(), texts, tokens=4, **more)
        _, alone = traced(PerSample(), texts[:1], tokens=4, **more)
        assert torch.equal(batched, alone)
    one, _ = traced(PerSample(), TEXTS[:1], tokens=4)
    torch.testing.assert_close(both, one, atol=3e-5, rtol=1e-4)


# --- Revis and MemVR --------------------------------------------------------------------------------------------------


def test_revis_adds_where_states_point_away():
    """As a hook of the test's own on one layer's output."""
    found = 3 * vectors()
    for threshold in (0.05, -1.0):
        logits, tokens = traced(Revis(vectors=found, layer=1, threshold=threshold, strength=1.5))
        opened = []

        def add(number, h, threshold=threshold, opened=opened):
            v = found[1]
            away = -(h @ v) / (h.norm(dim=-1) * v.norm()) > threshold
            opened.append(away.float().mean())
            return h + 1.5 * away[..., None] * v

        want = stepped(tiny("llava").inputs(TEXTS[:1]), tokens[:-1], edit=add, layers=[1], at="layer")
        torch.testing.assert_close(logits, want, atol=3e-5, rtol=1e-4)
        assert 0 < torch.stack(opened).mean() < 1 or threshold == -1.0
    never, _ = traced(Revis(vectors=found, threshold=1.0))
    torch.testing.assert_close(never, traced(VTI(vectors=found, text=0.0))[0], atol=3e-5, rtol=1e-4)


def test_revis_reads_the_authors_files(tmp_path):
    path = tmp_path / "llava.pt"
    found = vectors()
    held = {0: {"visual": torch.zeros(D)}} | {n + 1: {"visual": v, "language": -v} for n, v in enumerate(found)}
    torch.save(held, path)
    own, tokens = traced(Revis(vectors=found, threshold=-1.0))
    theirs, same = traced(Revis(vectors=path, threshold=-1.0))
    assert torch.equal(tokens, same) and torch.equal(own, theirs)
    torch.save({"a": 1}, path)
    with pytest.raises(InputError, match="cannot be read as the authors' vectors"):
        traced(Revis(vectors=path))
    with pytest.raises(UnsupportedError, match=r"layers = \(4, 4\) are not all layers"):
        traced(Revis(vectors=found, layer=4))


def test_revis_vector_is_the_widest_direction_without_the_words():
    g = torch.Generator().manual_seed(0)
    words, image = torch.linalg.qr(torch.randn(5, 2, generator=g)).Q.T
    rows = torch.tensor([3.0, -1.0, 0.5, 2.0])[:, None, None]
    prior = (rows * words).expand(-1, 3, -1) + 0.1
    seen = (rows + 1.5) * image + torch.tensor([2.0, 1.0, -3.0, 0.0])[:, None, None] * words
    found = calibration.revis(seen.expand(-1, 3, -1), prior)
    clean = (rows + 1.5) * image
    torch.testing.assert_close(found, (image * clean.norm(dim=-1).mean()).expand(3, -1), atol=1e-4, rtol=1e-4)


def test_revis_reads_states_without_the_image(loaded):
    model, processor = loaded.model, loaded.processor
    pair = scene_pairs(1)[0]
    added, prior = calibration.revis_states(model, processor, pair)
    for found in (added, prior):
        assert len(found) == model.config.text_config.num_hidden_layers and (found.abs().amax(-1) > 1e-3).all()
    told = calibration.states(model, processor, pair, "chosen", image=False)
    whole = calibration.states(model, processor, pair, "chosen")
    assert told.shape[1] < whole.shape[1]


def test_memvr_mixes_the_image_into_the_mlp_after_the_first_unsure_layer():
    """Literally: one layer of a forward at most, the prompt as its last position says, by the means of the whole forward."""
    model = copy.deepcopy(tiny("llava").model)
    layers, fired = decoder_layers(model), []
    inputs = tiny("llava").inputs(TEXTS[:1])
    with torch.no_grad():
        image = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    ratio, threshold, state = 0.4, 0.9, {}

    def look(number, h):
        logits = model.lm_head(model.model.language_model.norm(h[0, -1]))
        p = logits.topk(10).values.softmax(-1)
        if number in (0, 1, 2) and state.get("at") is None and -(p * p.log()).sum() / math.log(10) > threshold:
            state["at"] = number + 1

    def mix(number, module, x, f):
        if state.get("at") != number:
            return None
        a = (x @ image.T) @ image
        return (1 - ratio) * f + ratio * f.abs().mean() / a.abs().mean() * a

    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda m, a, h, number=number: look(number, h))
        layer.mlp.register_forward_hook(lambda m, a, f, number=number: mix(number, m, a[0], f))
    logits, tokens = traced(MemVR(ratio=ratio, threshold=threshold, layers=(0, 2)))
    cache, want = DynamicCache(config=model.config.get_text_config()), []
    with torch.no_grad():
        for given in [inputs, *({"input_ids": token.view(1, 1)} for token in tokens[:-1])]:
            state["at"] = None
            want.append(model(**given, **hf.with_cache(cache)).logits[0, -1])
            fired.append(state["at"])
    torch.testing.assert_close(logits, torch.stack(want), atol=3e-5, rtol=1e-4)
    assert len(set(fired)) > 1, "positions differ in the layer that is unsure"
    never, plain = traced(MemVR(threshold=1.0, layers=(0, 2)))
    torch.testing.assert_close(never, stepped(inputs, plain[:-1]), atol=3e-5, rtol=1e-4)


def test_memvr_is_the_authors_function():
    """What their mixed MLP gave on these numbers, at ratio 0.12, before the activation of its own parts was restated here."""
    f = torch.tensor([-0.10481, -0.10068, -0.08853, -0.06933, 0.12107, 0.12125, 0.11177, 0.09339]).view(1, 2, 4)
    x, z = torch.arange(8.0).sin().view(1, 2, 4), torch.arange(12.0).cos().view(1, 3, 4)
    want = [-0.09726, -0.07515, -0.05835, -0.05332, 0.08855, 0.09122, 0.09962, 0.09903]
    torch.testing.assert_close(retraced(x, f, z, 0.12, True).flatten(), torch.tensor(want), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(retraced(x, f, 7 * z, 0.12, True), retraced(x, f, z, 0.12, True))


def test_memvr_needs_a_layer_after_an_unsure_one():
    with pytest.raises(UnsupportedError, match="reaches the last layer"):
        traced(MemVR(layers=(1, 3)))


# --- calibration ------------------------------------------------------------------------------------------------------


def test_directions_are_those_of_the_formulas():
    """A known mean and a known spread are found again; the signs follow the largest score."""
    g = torch.Generator().manual_seed(0)
    mean, spread = torch.randn(3, 5, generator=g), unit(torch.randn(15, generator=g)).view(3, 5)
    scores = torch.tensor([3.0, -1.0, -1.0, -1.0])
    found = calibration.vti(mean + scores[:, None, None] * spread)
    torch.testing.assert_close(found, mean + spread, atol=1e-5, rtol=1e-5)
    bases = calibration.nullu(scores[:, None, None] * spread + mean, 2)
    assert bases.shape == (3, 5, 2)
    for layer in range(3):
        inside = torch.stack([mean[layer], spread[layer]])
        torch.testing.assert_close(inside @ bases[layer] @ bases[layer].T, inside, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="2 pairs have no 3 directions"):
        calibration.nullu(torch.randn(2, 3, 5), 3)


class Literal:
    """States of a few pairs on the small model, each read at a place that the test counts itself; no function of the library.

    The prompt is the one of the model's template, the answer comes after a space, and the end token after the answer.
    """

    def __init__(self, loaded, pairs):
        self.model, self.processor, self.pairs = loaded.model, loaded.processor, pairs

    def states(self, pair, answer: str, image: bool = True) -> tuple[Tensor, int]:
        """(L, T, D) states of prompt, answer and end token, and the number of the answer's last token."""
        words = self.processor.tokenizer(" " + answer, add_special_tokens=False).input_ids
        content = [{"type": "image"}, {"type": "text", "text": pair.question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        given = self.processor(images=[pair.picture], text=[prompt], return_tensors="pt")
        asked = given["input_ids"][0].tolist()
        pixels = {"pixel_values": given["pixel_values"]}
        if not image:
            asked, pixels = [token for token in asked if token != self.model.config.image_token_id], {}
        ids = torch.tensor([[*asked, *words, self.processor.tokenizer.eos_token_id]])
        with torch.no_grad():
            found = self.model(input_ids=ids, **pixels, output_hidden_states=True).hidden_states[1:]
        return torch.cat(found).float(), len(asked) + len(words) - 1

    def last(self, pair, answer: str, image: bool = True) -> Tensor:
        states, at = self.states(pair, answer, image)
        return states[:, at]

    def vti(self) -> Tensor:
        return literal_mean_and_component([self.last(p, p.chosen) - self.last(p, p.rejected) for p in self.pairs])

    def nullu(self, rank: int) -> Tensor:
        """(L, D, D) what is left out of each layer's weights."""
        means = [(self.states(p, p.chosen)[0].mean(1) - self.states(p, p.rejected)[0].mean(1)) / 2 for p in self.pairs]
        spread = torch.stack(means, 1).double()
        basis = torch.linalg.eigh(spread.mT @ spread).eigenvectors[..., -rank:]
        return (basis @ basis.mT).float()

    def revis_states(self, pair) -> tuple[Tensor, Tensor]:
        """(L, D) what the image adds to the truth, and an invention to saying nothing."""
        seen = self.last(pair, pair.chosen) - self.last(pair, pair.chosen, image=False)
        nothing = self.last(pair, "I cannot tell what this picture shows.", image=False)
        return seen, self.last(pair, pair.rejected, image=False) - nothing

    def revis(self) -> Tensor:
        seen, prior = (torch.stack(part, 1).double() for part in zip(*map(self.revis_states, self.pairs)))
        out = []
        for image, words in zip(seen, prior):
            blind = image - (image @ torch.outer(*[literal_component(words)] * 2))
            found = literal_component(blind)
            out.append(found * (found @ blind.mean(0)).sign() * blind.norm(dim=-1).mean())
        return torch.stack(out).float()

    def visual(self, share: float, trials: int, seed: int) -> Tensor:
        """(l, n, D), a component a row of (layers, tokens, D) as the authors cut it."""
        encoder, kept = self.model.get_encoder(modality="image"), []
        for number, pair in enumerate(self.pairs):
            pixels = self.processor.image_processor(images=[pair.picture], return_tensors="pt")["pixel_values"]
            rng = sampling.generator(seed, number, "masks")
            copies = calibration.masked(pixels, self.model.config.vision_config.patch_size, share, trials, rng)
            with torch.no_grad():
                clean, masked = (
                    torch.stack(encoder(x, output_hidden_states=True).hidden_states) for x in (pixels, copies)
                )
            kept.append(masked.mean(1) - clean[:, 0])
        levels, tokens, width = kept[0].shape
        rows = [one.flatten().view(tokens, levels * width) for one in kept]
        made = torch.stack([literal_mean_and_component([one[row] for one in rows]) for row in range(tokens)])
        return made.view(levels, tokens, width)[1:]


def literal_component(rows: Tensor) -> Tensor:
    """(D) first principal component of rows (n, D), of length 1."""
    centred = rows - rows.mean(0)
    return torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]


def literal_mean_and_component(rows: list[Tensor]) -> Tensor:
    """Mean plus first component, whose largest score is positive, by the products of the rows with each other."""
    flat = torch.stack(rows).flatten(1).double()
    centred = flat - flat.mean(0)
    scores = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
    component = centred.T @ scores
    component = component / component.norm() * scores[scores.abs().argmax()].sign()
    return (flat.mean(0) + component).view_as(rows[0]).float()


@pytest.fixture(scope="module")
def literal(loaded):
    # Of two pairs both scores of a component are equally large, and its sign would be that of rounding.
    return Literal(loaded, scene_pairs(3))


def trained(kind: str, model_folder, tmp_path, *more: str) -> dict[str, Tensor]:
    command = ["train", "vector", "--kind", kind, "--model", str(model_folder), "--scenes", "3", *more]
    said = CliRunner().invoke(app, [*command, "--output", str(tmp_path / f"{kind}.safetensors")])
    assert said.exit_code == 0, said.output
    return store.load(tmp_path / f"{kind}.safetensors")[0]


def test_trained_vti_is_its_definition(literal, model_folder, tmp_path):
    """Right minus hallucinated at the caption's last token, and masked minus whole picture: signs and places."""
    found = trained("vti", model_folder, tmp_path, "--trials", "3", "--mask-share", "0.9", "--seed", "0")
    torch.testing.assert_close(found["vectors"], literal.vti(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["visual"], literal.visual(0.9, 3, 0), atol=1e-4, rtol=1e-4)


def test_trained_nullu_is_its_definition(literal, model_folder, tmp_path):
    """The widest directions of the means over all positions; a basis has no signs, what is projected out is compared."""
    found = trained("nullu", model_folder, tmp_path, "--rank", "2")["vectors"]
    torch.testing.assert_close(found @ found.mT, literal.nullu(2), atol=1e-3, rtol=1e-3)


def test_trained_revis_is_its_definition(literal, model_folder, tmp_path):
    """The image's share of the truth's last state without the words', of which each has its sign."""
    pair = literal.pairs[0]
    found = calibration.revis_states(literal.model, literal.processor, pair)
    torch.testing.assert_close(found, literal.revis_states(pair), atol=1e-4, rtol=1e-4)
    found = trained("revis", model_folder, tmp_path)["vectors"]
    torch.testing.assert_close(found, literal.revis(), atol=1e-3, rtol=1e-3)


def test_a_mask_puts_the_mean_colour_in_the_place_of_patches():
    pixels = torch.randn(1, 3, 29, 28, generator=torch.Generator().manual_seed(0))
    copies = calibration.masked(pixels, 7, 0.9, 5, torch.Generator().manual_seed(1))
    hidden = (copies[:, :, :28] == pixels.mean((2, 3), keepdim=True)).view(5, 3, 4, 7, 4, 7).all((1, 3, 5))
    assert hidden.flatten(1).sum(1).tolist() == [int(0.9 * 16)] * 5
    assert len({tuple(row.flatten().tolist()) for row in hidden}) > 1, "every mask is one of its own"
    same = (copies == pixels)[:, :, :28].view(5, 3, 4, 7, 4, 7).all((1, 3, 5))
    assert torch.equal(same, ~hidden) and torch.equal(copies[:, :, 28:], pixels[:, :, 28:].expand(5, -1, -1, -1))


@pytest.mark.parametrize("rows", ["code", "token"])
def test_visual_rows(rows):
    """Literally, one row at a time: as the authors cut (layers, tokens, D) without a transposition, or a token over layers."""
    seen = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    found = calibration.visual_direction(seen, rows)
    assert found.shape == (3, 3, 5)
    flat = seen.flatten(1)
    for row in range(3):
        if rows == "code":
            at = torch.arange(row * 20, (row + 1) * 20)
        else:
            at = torch.arange(60).view(4, 3, 5)[:, row].flatten()
        own = flat[:, at]
        centred = own - own.mean(0)
        _, basis = torch.linalg.eigh(centred.T @ centred)
        left = found.new_zeros(60)
        left[at] = own.mean(0)
        for layer, token, d in torch.ones(3, 3, 5).nonzero().tolist():
            place = ((layer + 1) * 3 + token) * 5 + d
            if place in at:
                column = at.tolist().index(place)
                assert abs(abs(float(found[layer, token, d] - left[place])) - abs(float(basis[column, -1]))) < 1e-4


def test_encoder_states_are_those_of_the_encoder():
    zoo = tiny("llava")
    pixels = zoo.inputs(list(TEXTS))["pixel_values"]
    encoder = zoo.model.get_encoder(modality="image")
    found = calibration.encoder_states(family_of(zoo.model), encoder, pixels)
    with torch.no_grad():
        want = torch.stack(encoder(pixels, output_hidden_states=True).hidden_states)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)


def test_a_stopped_calibration_goes_on_to_the_same_vectors(loaded, tmp_path, monkeypatch):
    pairs = scene_pairs(3)
    how = dict(share=0.9, trials=3, seed=2)

    def both(kept=None):
        text = calibration.directions(loaded.model, loaded.processor, pairs, "vti", 1, kept)
        return text, calibration.visual(loaded.model, loaded.processor, pairs, **how, kept=kept)

    whole = both()
    assert all(torch.equal(*same) for same in zip(whole, both()))
    folder, about = tmp_path / "v.parts", {"seed": 2}
    seen, read = [], calibration.encoder_states

    def stops(*given):
        seen.append(given)
        if len(seen) == 4:  # the second picture's masks
            raise KeyboardInterrupt
        return read(*given)

    monkeypatch.setattr(calibration, "encoder_states", stops)
    with pytest.raises(KeyboardInterrupt):
        both(calibration.Kept(folder, about))
    assert len(list(folder.glob("*.safetensors"))) == 4
    with pytest.raises(InputError, match=r"settings \(seed was 2, is 3\)"):
        calibration.Kept(folder, {"seed": 3})
    kept = calibration.Kept(folder, about)
    assert all(torch.equal(*same) for same in zip(whole, both(kept)))
    assert len(seen) == 4 + 4, "two passes each of the two pictures that were left"
    (folder / "about.json").write_text("{")
    with pytest.raises(InputError, match=r"about\.json cannot be read"):
        calibration.Kept(folder, about)
    kept.forget()
    assert not folder.exists()


def test_train_vector_makes_both_directions_of_vti(model_folder, tmp_path):
    path = tmp_path / "v.safetensors"
    command = ["train", "vector", "--kind", "vti", "--model", str(model_folder), "--scenes", "2", "--trials", "2"]
    said = CliRunner().invoke(app, [*command, "--output", str(path)])
    assert said.exit_code == 0, said.output
    tensors, about = store.load(path)
    assert tensors["vectors"].dim() == 2 and tensors["visual"].dim() == 3
    assert about["masks"] == {"share": 0.99, "trials": 2, "rows": "code", "seed": 0}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v.safetensors"]


def test_train_vector_writes_over_nothing(model_folder, tmp_path, monkeypatch):
    """The same command says that its file is there; another one is refused, and each kind has a file of its own."""
    monkeypatch.chdir(tmp_path)

    def train(kind, *more):
        command = ["train", "vector", "--kind", kind, "--model", str(model_folder), "--scenes", "2", *more]
        return CliRunner().invoke(app, command)

    for kind in ("nullu", "revis"):
        said = train(kind, "--rank", "2")
        assert said.exit_code == 0, said.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["nullu.safetensors", "revis.safetensors"]
    before = (tmp_path / "nullu.safetensors").read_bytes()
    again = train("nullu", "--rank", "2")
    assert again.exit_code == 0 and "nullu.safetensors is there already" in again.output
    for more, words in (
        (("revis", "--output", "nullu.safetensors"), "kind was 'nullu', is 'revis'"),
        (("nullu", "--rank", "1"), "rank was 2, is 1"),
        (("nullu", "--rank", "2", "--seed", "1"), "source was 'scenes, seed 0', is 'scenes, seed 1'"),
        (("nullu", "--output", "."), "is a folder; give --output the name of a file"),
    ):
        refused = train(*more)
        assert refused.exit_code == 1 and words in " ".join(refused.output.split()), refused.output
    assert (tmp_path / "nullu.safetensors").read_bytes() == before


def test_a_stopped_calibration_does_not_go_on_with_other_pictures(model_folder, tmp_path, monkeypatch):
    lines = []
    for number, pair in enumerate(scene_pairs(2)):
        pair.picture.save(tmp_path / f"{number}.png")
        answers = dict(question=pair.question, truthful=pair.chosen, hallucinated=pair.rejected)
        lines.append(json.dumps({"image": f"{number}.png", **answers}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    command = ["train", "vector", "--kind", "revis", "--model", str(model_folder)]
    command += ["--pairs", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "v.safetensors")]
    read, seen = calibration.revis_states, []

    def stops(*given):
        seen.append(given)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return read(*given)

    monkeypatch.setattr(calibration, "revis_states", stops)
    assert CliRunner().invoke(app, command).exit_code == 130
    monkeypatch.setattr(calibration, "revis_states", read)
    held = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1 and "other settings (content was" in refused.output
    (tmp_path / "0.png").write_bytes(held)
    assert CliRunner().invoke(app, command).exit_code == 0


def test_half_of_a_kept_file_is_computed_again(tmp_path):
    kept = calibration.Kept(tmp_path / "v.parts", {})
    whole = kept.read("text", 0, lambda: torch.arange(3.0))
    (file,) = (tmp_path / "v.parts").glob("*.safetensors")
    content = file.read_bytes()
    for damaged in (content[:50], content[:-4], b""):
        file.write_bytes(damaged)
        assert torch.equal(kept.read("text", 0, lambda: torch.arange(3.0)), whole) and file.read_bytes() == content


def test_more_directions_than_pairs_are_refused_before_any_is_read(loaded, monkeypatch):
    monkeypatch.setattr(calibration, "states", None)
    with pytest.raises(InputError, match="2 pairs have no 8 directions"):
        calibration.directions(loaded.model, loaded.processor, scene_pairs(2), "nullu", 8)


@pytest.mark.parametrize("part", ["layers", "encoder"])
def test_vectors_of_other_layers_below_the_same_head_are_refused(tmp_path, part):
    """A fine-tuned decoder, or another vision encoder; a file that says nothing of them is taken, as are quantized layers."""
    zoo, path = tiny("llava"), tmp_path / "v.safetensors"
    family = family_of(zoo.model)
    store.save(path, "vti", vectors(), zoo.model, store.layers_of(family))
    traced(VTI(vectors=path, text=3.0))
    other = family_of(copy.deepcopy(zoo.model))
    layers = decoder.layers(other.model) if part == "layers" else other.vision_layers()
    matrix = layers[-1].self_attn.v_proj.weight
    with torch.no_grad():
        # What a merged adapter of rank 1 adds.
        matrix += 0.1 * torch.outer(torch.ones(len(matrix)), torch.ones(matrix.shape[1]))
    assert decoder.fingerprint(other.model) == decoder.fingerprint(zoo.model)
    with pytest.raises(ParameterError, match="made for another model"):
        store.tensors_of(path, "vti", other)
    layers[-1].self_attn.v_proj.weight = torch.nn.Parameter(matrix.to(torch.int8), requires_grad=False)
    assert decoder.layers_fingerprint(layers) is None and store.tensors_of(path, "vti", other)
    store.save(path, "vti", vectors(), zoo.model, {"model": "tiny"})
    assert store.tensors_of(path, "vti", other)


def test_layers_have_one_name_in_every_precision():
    layers = decoder.layers(copy.deepcopy(tiny("llava").model).to(torch.bfloat16))
    names = {
        decoder.layers_fingerprint([layer.to(kind) for layer in layers]) for kind in (torch.float32, torch.bfloat16)
    }
    assert len(names) == 1 and None not in names


@pytest.mark.parametrize("said", ["{}", "not json", "[]", '{"kind": "vti"}', '{"kind": 1, "fingerprint": "x"}'])
def test_a_damaged_description_is_one_sentence(tmp_path, said):
    path = tmp_path / "v.safetensors"
    save_file({"vectors": vectors()}, path, metadata={learned.ABOUT: said})
    for read in (lambda: traced(VTI(vectors=path)), lambda: learned.about(path)):
        with pytest.raises(InputError, match=r"v\.safetensors does not say what it holds and for which model"):
            read()


@pytest.mark.parametrize("method", [VTI, Nullu, Revis])
def test_a_method_without_vectors_names_the_command_that_makes_them(method):
    with pytest.raises(ParameterError, match=f"made with: lvlm-decode train vector --kind {method.name}"):
        method()


def test_a_file_knows_its_method_and_its_model(tmp_path):
    model = tiny("llava").model
    path = tmp_path / "v.safetensors"
    store.save(path, "vti", vectors(), model, {"model": "tiny"})
    _, tokens = traced(VTI(vectors=str(path), text=3.0))
    assert torch.equal(tokens, traced(VTI(vectors=vectors(), text=3.0))[1])
    with pytest.raises(ParameterError, match="holds vectors of vti"):
        traced(Nullu(vectors=path))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    store.save(path, "vti", vectors(), other, {"model": "another"})
    with pytest.raises(ParameterError, match="made for another model"):
        traced(VTI(vectors=path))
