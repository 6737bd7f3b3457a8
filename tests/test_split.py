"""A model split over devices by a map, as accelerate runs it: the tokens of the model in one place."""

import copy
import functools

import pytest
import torch
from contract import family_for, is_controller, method_of
from rehearsal import DEVICE, rehearsing, to_device

import lvlm_decode as ld
from lvlm_decode.engine.hf import decoder
from lvlm_decode.methods import METHODS, load
from lvlm_decode.testing.models import tiny

HOW = dict(max_new_tokens=4, do_sample=False)
#: What of a model lies elsewhere than the rest, and whether its prompt comes from there.
SPLITS = {"late": False, "early": True, "encoder": False}
#: What the default run takes: every way of reading a layer, the encoder or the head.
OFTEN = {
    ("pai", "late"),
    ("dola", "late"),
    ("sid", "early"),
    ("avisc", "early"),
    ("opera", "early"),
    ("damro", "encoder"),
}


def hooks():
    """A hook that sends what a module is given to where it runs, and one that sends what the model puts out to its caller."""
    accelerate = pytest.importorskip("accelerate")

    class There(accelerate.hooks.ModelHook):
        def __init__(self, device=None):
            self.execution_device, self.home = device, None

        def pre_forward(self, module, *args, **kwargs):
            if self.execution_device is None:
                self.home = accelerate.utils.find_device([args, kwargs])
                return args, kwargs
            return accelerate.utils.send_to_device((args, kwargs), self.execution_device)

        def post_forward(self, module, output):
            return output if self.home is None else accelerate.utils.send_to_device(output, self.home)

    return There, accelerate.hooks.add_hook_to_module


@functools.cache
def split(family, how):
    """A copy of a tiny model with a part on the rehearsal device, and hooks where accelerate puts them."""
    model = copy.deepcopy(tiny(family).model)
    layers, half = decoder.layers(model), len(decoder.layers(model)) // 2
    encoder, embeddings = model.get_encoder(modality="image"), decoder.embeddings(model)
    far = {
        "late": [*layers[half:], decoder.head(model)],
        "early": [embeddings, *layers[:half]],
        "encoder": [encoder],
    }[how]
    names = {module: name for name, module in model.named_modules()}
    there = [names[part] for part in far]
    hook, add = hooks()
    with rehearsing():
        for part in far:
            to_device(part)
        for module, name in names.items():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if name and (own or module in (*layers, encoder)):
                on = any(f"{name}.".startswith(f"{part}.") for part in there)
                add(module, hook(DEVICE if on else torch.device("cpu")))
        add(model, hook())
    return model


def answer(family, model, method, device="cpu"):
    zoo = tiny(family)
    texts = ("is it a dog",) if "batch" in method.refuses else ("is it a dog", "no")
    inputs = {key: value.to(device) for key, value in zoo.inputs(texts, seed=1).items()}
    with ld.attached(model, method, processor=zoo.processor):
        return model.generate(**inputs, **HOW).tolist()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=() if (name, how) in OFTEN else pytest.mark.full)
        for name in METHODS
        for how in SPLITS
    ],
)
def test_a_model_on_two_devices(name, how):
    family = family_for(name)
    if family == "qwen3_vl_moe" or (family == "instructblip" and how == "early"):
        pytest.skip("the rehearsal device has no experts, and this model's own generate() mixes devices there")
    method = load(name)() if is_controller(name) else method_of(name, family)
    want = answer(family, tiny(family).model, method)
    with rehearsing():
        assert answer(family, split(family, how), method, "cuda" if SPLITS[how] else "cpu") == want


@pytest.mark.full
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "llava_next", "idefics3", "paligemma"])
@pytest.mark.parametrize("how", SPLITS)
def test_other_families_on_two_devices(family, how):
    for method in (ld.VCD() + ld.ICD(), method_of("pai", family)):
        want = answer(family, tiny(family).model, method)
        with rehearsing():
            assert answer(family, split(family, how), method, "cuda" if SPLITS[how] else "cpu") == want
