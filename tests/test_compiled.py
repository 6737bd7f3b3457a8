"""Static cache and torch.compile: compiled once, whatever strengths, noise or image are, and the tokens of the eager run."""

import copy
import dataclasses

import pytest
import torch
from helpers import full_but
from torch._dynamo.utils import counters
from transformers.generation.configuration_utils import CompileConfig

import lvlm_decode as ld
from lvlm_decode.errors import LvlmDecodeError
from lvlm_decode.method import Method
from lvlm_decode.methods import METHODS, load
from lvlm_decode.testing import models

#: What the default run takes; the rest, and inductor, under --full. Compiling takes seconds.
OFTEN = {"vcd"}
#: Methods that read states inside of the decoder in every step, which transformers collects through hooks: not compiled.
READS = {"dola", "deco", "lol"}


def everywhere(backend: str) -> CompileConfig:
    """A setting of transformers that compiles on the CPU too."""
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def generate(model, method, seed, backend=None, **how):
    tiny = models.tiny("llava")
    inputs = tiny.inputs(["is it", "what color"], seed=seed)
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "seed": seed, **how}
    if backend is not None:
        how["compile_config"] = everywhere(backend)
    with ld.attached(model, method, processor=tiny.processor):
        return model.generate(**inputs, cache_implementation="static", **how)


def other(method: Method) -> Method:
    """The same method at other strengths, with other noise."""
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    new = {}
    if "alpha" in fields:
        new["alpha"] = 0.7 * (fields["alpha"] or 1.0)
    if "beta" in fields:
        new["beta"] = 0.5 * (fields["beta"] or 0.1)
    if "noise_step" in fields:
        new["noise_step"] = fields["noise_step"] // 2
    return dataclasses.replace(method, **new)


def runs(method: Method, backend: str) -> list[int]:
    """How many graphs there are after a call, after one with the same settings, and after others with everything changed."""
    model = copy.deepcopy(models.tiny("llava").model)
    torch._dynamo.reset()
    counters.clear()
    found = []
    for kind, seed in ((method, 1), (method, 1), (other(method), 2), (other(method), 3)):
        out = generate(model, kind, seed, backend)
        assert torch.equal(out, generate(models.tiny("llava").model, kind, seed)), (
            "a compiled run has the tokens of an eager one"
        )
        found.append(counters["stats"]["unique_graphs"])
    return found


@pytest.mark.parametrize("name", full_but(METHODS, OFTEN))
def test_no_method_compiles_twice(name):
    cls = load(name)
    if "static" in cls.refuses:
        pytest.skip(f"{name} takes no static cache")
    if name in ("dcd", "vti", "nullu", "cicd"):
        pytest.skip(f"{name} reads files of its own, which its own tests make")
    if name == "code":
        pytest.skip("its view holds a description of the image, whose length is another with another image")
    try:
        generate(models.tiny("llava").model, cls(), 1)
    except LvlmDecodeError as error:
        pytest.skip(f"{name} does not run on this model: {error}")
    first, *later = runs(cls(), "eager")
    assert later == [first] * 3
    # What changes the decoder, or reads its layers, is not compiled at all.
    changes = cls.patch is not Method.patch
    assert (first == 0) == (changes or name in READS)


@pytest.mark.full
@pytest.mark.parametrize("name", ["plain", "vcd"])
def test_inductor_compiles_once_too(name, tmp_path, monkeypatch):
    """Real kernels of the CPU; CUDA graphs, which inductor adds on a GPU, no CPU can show."""
    # A cache of its own: what a compilation that was cut off leaves in the common one cannot be loaded.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first, *later = runs(load(name)(), "inductor")
    assert first > 0 and later == [first] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are captured and replayed on a GPU alone")
@pytest.mark.parametrize("name", ["plain", "vcd", "icd", "ritual", "damro", "m3id"])
def test_cuda_graphs_are_captured_once_and_say_what_the_eager_run_says(name, tmp_path, monkeypatch):
    """As transformers compiles for a static cache on a GPU by itself."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, tiny = copy.deepcopy(models.tiny("llava").model).to("cuda"), models.tiny("llava")
    torch._dynamo.reset()
    counters.clear()

    def tokens(method, seed, **how):
        inputs = {key: value.to("cuda") for key, value in tiny.inputs(["is it", "what color"], seed=seed).items()}
        how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "seed": seed, **how}
        with ld.attached(model, method, processor=tiny.processor):
            return model.generate(**inputs, cache_implementation="static", **how).tolist()

    found = []
    for method, seed in ((load(name)(), 1), (load(name)(), 1), (other(load(name)()), 2), (other(load(name)()), 3)):
        assert tokens(method, seed) == tokens(method, seed, disable_compile=True)
        found.append((counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]))
    assert found[0][0] > 0 and found == [(found[0][0], 0)] * 4


def test_without_a_static_cache_nothing_is_compiled():
    counters.clear()
    model = copy.deepcopy(models.tiny("llava").model)
    tiny = models.tiny("llava")
    with ld.attached(model, "vcd"):
        for how in (
            {},
            {"cache_implementation": "static", "disable_compile": True, "compile_config": everywhere("eager")},
        ):
            model.generate(**tiny.inputs(["is it"], seed=1), max_new_tokens=3, do_sample=False, **how)
    assert counters["stats"]["unique_graphs"] == 0
