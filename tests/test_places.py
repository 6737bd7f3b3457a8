"""Offloaded, device-mapped and wrapped models give what the bare model in memory gives."""

import copy

import pytest
import torch
from helpers import FEW, full_but

import lvlm_decode as ld
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.families import FAMILIES
from lvlm_decode.testing.models import tiny

HOW = dict(max_new_tokens=6, do_sample=False)
METHODS = [ld.VCD(), ld.PAI(alpha=0.5, first_layer=1), ld.DoLa(layers=(0, 1, 3))]
FORMS = ("attach", "custom_generate", "processor")


def own(family):
    zoo = copy.copy(tiny(family))
    zoo.model = copy.deepcopy(zoo.model)
    return zoo


def call(zoo, method, form, model=None):
    model, inputs = zoo.model if model is None else model, zoo.inputs(("is it a dog", "no"), seed=1)
    if form == "custom_generate":
        return model.generate(**inputs, **HOW, custom_generate=method)
    if form == "processor":
        return model.generate(**inputs, **HOW, logits_processor=[method.processor(model, inputs)])
    with ld.attached(model, method, processor=zoo.processor):
        return model.generate(**inputs, **HOW)


@pytest.mark.parametrize("family", full_but([f for f in FAMILIES if f != "instructblip"], FEW))
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_model_offloaded_to_memory(family, method):
    """Weights are on the meta device between the forwards of their modules."""
    accelerate = pytest.importorskip("accelerate")
    zoo = own(family)
    want = call(zoo, method, "attach")
    accelerate.cpu_offload(zoo.model, torch.device("cpu"))
    try:
        zoo.model.generate(**zoo.inputs(("is it",)), **HOW)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"transformers itself cannot: {error}")
    assert next(zoo.model.parameters()).is_meta
    forms = FORMS if method.name == "vcd" else FORMS[:2]
    for form in forms:
        assert torch.equal(want, call(zoo, method, form)), form


@pytest.mark.parametrize("part", ["model.vision_tower", "model.language_model", "lm_head"])
def test_a_model_whose_parts_are_on_disk(part, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    zoo = own("llava")
    want = [call(zoo, method, "attach") for method in METHODS]
    names = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    places = {name: "disk" if name == part else "cpu" for name in names}
    model = accelerate.dispatch_model(zoo.model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    for method, expected in zip(METHODS, want):
        for form in FORMS if method.name == "vcd" else FORMS[:2]:
            assert torch.equal(expected, call(zoo, method, form, model)), (method.name, form)


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "peft": lora,
    "compiled-peft": lambda model: torch.compile(lora(model), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("form", FORMS)
def test_wrapped_models_attach(wrapper, form):
    zoo = own("llava")
    outer = WRAPPERS[wrapper](zoo.model)
    plain, want = zoo.model.generate(**zoo.inputs(("is it a dog", "no"), seed=1), **HOW), call(zoo, ld.VCD(), "attach")
    assert not torch.equal(plain, want)
    assert torch.equal(want, call(zoo, ld.VCD(), form, outer))
    assert ld.attach(outer, "vcd") is outer and ld.attached(outer) == ld.attached(zoo.model) == ld.VCD()
    assert torch.equal(want, outer.generate(**zoo.inputs(("is it a dog", "no"), seed=1), **HOW))
    with pytest.raises(UnsupportedError, match="already attached"):
        ld.attach(zoo.model, "vcd")
    assert ld.detach(outer) is outer and ld.attached(zoo.model) is None
    assert torch.equal(plain, outer.generate(**zoo.inputs(("is it a dog", "no"), seed=1), **HOW))


def test_what_has_no_generate_says_what_to_attach_to():
    zoo = own("llava")
    parallel = torch.nn.DataParallel(zoo.model)
    for attempt in (lambda: ld.attach(parallel, "vcd"), lambda: ld.VCD().processor(parallel, zoo.inputs())):
        with pytest.raises(UnsupportedError, match=r"DataParallel wraps the model .* attach\(model.module, method\)"):
            attempt()
    ld.attach(parallel.module, "vcd")
    assert ld.attached(zoo.model) == ld.VCD()


def test_adapters_of_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    zoo = own("llava")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32, num_layers=4)
    config.num_transformer_submodules, config.num_attention_heads = 1, 4
    with pytest.raises(UnsupportedError, match="virtual tokens"):
        ld.attach(peft.get_peft_model(zoo.model, config), "vcd")
