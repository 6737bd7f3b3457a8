"""What comes back beside the tokens belongs to the samples themselves and has the caller's shape; nothing is read twice."""

import copy
import itertools

import pytest
import torch
from contract import family_for, is_controller, method_of
from helpers import FAINT, full_but
from transformers import DynamicCache, StaticCache

import lvlm_decode as ld
from lvlm_decode.engine import hf
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.families import FAMILIES
from lvlm_decode.methods import METHODS, parse
from lvlm_decode.testing.models import IMAGE, VIDEO, tiny

NEW = 5
ASK = dict(return_dict_in_generate=True, output_hidden_states=True, output_attentions=True, output_scores=True)
#: A view of the same width, a view with a longer prompt, a view without the image, and none.
SHAPES = {"vcd": ld.VCD(), "icd": ld.ICD(), "vdd": ld.VDD(absent="none"), "plain": ld.Plain()}


def ask(zoo, inputs, method=None, **kwargs):
    kwargs = {
        "do_sample": False,
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "suppress_tokens": [IMAGE, VIDEO],
        **kwargs,
    }
    if method is None:
        return zoo.model.generate(**copy.copy(inputs), **kwargs)
    with ld.attached(zoo.model, method, processor=zoo.processor):
        return zoo.model.generate(**copy.copy(inputs), **kwargs)


@pytest.fixture(params=["llava", "qwen2_vl", "gemma3", "instructblip", "idefics3"])
def eager(request):
    """A model whose attention can be read."""
    zoo = copy.copy(tiny(request.param))
    zoo.model = copy.deepcopy(zoo.model)
    zoo.model.set_attn_implementation("eager")
    return zoo


def padded(zoo, more=3):
    """Two unequal prompts with padding that is common to both."""
    inputs = zoo.inputs(("is it a dog", "no"), seed=1)
    width = inputs["input_ids"].shape[1]
    return {
        k: torch.nn.functional.pad(v, (more, 0)) if torch.is_tensor(v) and v.shape[-1] == width and v.dim() == 2 else v
        for k, v in inputs.items()
    }


def shapes(out):
    def of(value):
        if torch.is_tensor(value):
            return tuple(value.shape)
        return [of(one) for one in value] if isinstance(value, (tuple, list)) else type(value).__name__

    return {name: of(value) for name, value in out.items() if name != "logits"}


def kept(cache):
    """Slots of every layer, and how many tokens the cache says it holds."""
    return [(layer.keys, layer.values, int(layer.get_seq_length())) for layer in cache.layers]


MODES = {"greedy": {}, "beams": dict(num_beams=2), "static": dict(cache_implementation="static")}


@pytest.mark.parametrize("mode", full_but(MODES, ["greedy", "static"]))
@pytest.mark.parametrize("name", SHAPES)
def test_states_and_cache_are_the_samples_own(eager, name, mode):
    """At the prompt they are the plain model's, in values too: what a view adds is not seen in view 0."""
    inputs, settings = padded(eager), {**ASK, **MODES[mode]}
    bare, out = ask(eager, inputs, **settings), ask(eager, inputs, SHAPES[name], **settings)
    assert shapes(out) == shapes(bare) and len(out.to_tuple()) == len(bare.to_tuple())
    seen = inputs["attention_mask"].bool().repeat_interleave(settings.get("num_beams", 1), 0)
    for got, want in zip(out.hidden_states[0], bare.hidden_states[0]):
        torch.testing.assert_close(got[seen], want[seen], atol=1e-4, rtol=1e-4)
    for got, want in zip(out.attentions[0], bare.attentions[0]):
        seen_by = got.transpose(1, 2)[seen], want.transpose(1, 2)[seen]
        torch.testing.assert_close(*seen_by, atol=1e-4, rtol=1e-4)
    cache = hf.cache_in(out)
    for (keys, values, length), (k, v, n) in zip(kept(cache), kept(hf.cache_in(bare))):
        assert keys.shape == k.shape and values.shape == v.shape and length == n
    assert out[hf.kwargs.CACHE] is cache and cache is next(v for k, v in out.items() if k == hf.kwargs.CACHE)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_the_callers_cache_continues_the_answer(eager, name, kind):
    """The cache given is the one filled: a plain call on the whole answer goes on from it as from nothing."""
    inputs = eager.inputs(("is it",), seed=2)
    if eager.family == "instructblip":
        pytest.skip("its language model decodes from embeddings, which a cache cannot continue")
    text = eager.model.config.get_text_config(decoder=True)
    width = inputs["input_ids"].shape[1]
    cache = kind(config=text) if kind is DynamicCache else kind(config=text, max_cache_len=width + NEW + 4)
    out = ask(eager, inputs, SHAPES[name], **hf.with_cache(cache), return_dict_in_generate=True)
    assert hf.cache_in(out) is cache and int(cache.get_seq_length()) == out.sequences.shape[1] - 1
    whole = {**inputs, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in whole:
            whole[key] = torch.nn.functional.pad(whole[key], (0, NEW))
    fresh = ask(eager, whole, output_logits=True, return_dict_in_generate=True, max_new_tokens=2, min_new_tokens=2)
    with torch.no_grad():
        positions = {"position_ids": fresh_positions(eager, whole)}
        last = eager.model(input_ids=out.sequences[:, -1:], **hf.with_cache(cache), **positions).logits[:, -1]
    torch.testing.assert_close(last, fresh.logits[0], atol=1e-4, rtol=1e-4)


def fresh_positions(zoo, whole):
    """The position of the newest token, as the model's own generate() gives it."""
    from lvlm_decode.engine.run import Run

    return Run(zoo.model, ld.Plain(), whole).prepared[0].positions[..., -1:]


@pytest.mark.parametrize("name", SHAPES)
def test_assisted_decoding_returns_states_of_the_whole_prompt(name):
    zoo = copy.copy(tiny("llava"))
    zoo.model = copy.deepcopy(zoo.model)
    zoo.model.set_attn_implementation("eager")
    inputs = zoo.inputs(("is it",), seed=2)
    settings = {**ASK, "prompt_lookup_num_tokens": 3}
    off = {"vcd": ld.VCD(alpha=FAINT, beta=None), "icd": ld.ICD(alpha=FAINT, beta=None), "plain": ld.Plain()}
    method = off.get(name, ld.VDD(alpha=FAINT, beta=None))
    bare, out = ask(zoo, inputs, **settings), ask(zoo, inputs, method, **settings)
    assert torch.equal(bare.sequences, out.sequences) and shapes(out) == shapes(bare)
    for got, want in zip(out.hidden_states[0], bare.hidden_states[0]):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# --- a cache that holds something ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["attach", "drafter", "custom_generate", "processor"])
def test_a_cache_that_holds_tokens_is_refused(family, form):
    zoo = tiny(family)
    inputs = zoo.inputs(("is it",), seed=2)
    how = dict(max_new_tokens=2, do_sample=False)
    for tokens, name in itertools.product((7, 300), (*hf.with_cache(None), "past_key_values")):
        if form == "custom_generate" and name not in hf.with_cache(None):
            continue  # transformers gives it the name above, and a warning.
        cache = DynamicCache(config=zoo.model.config.get_text_config(decoder=True))
        cache.update(torch.zeros(1, 2, tokens, 8), torch.zeros(1, 2, tokens, 8), 0)
        whole = {**inputs, name: cache}
        with pytest.raises(UnsupportedError, match=f"the cache given to generate.* holds {tokens} tokens") as caught:
            if form == "custom_generate":
                zoo.model.generate(**whole, **how, custom_generate=ld.VCD())
            elif form == "processor":
                ld.VCD().processor(zoo.model, whole)
            else:
                drafter = "lookup" if form == "drafter" else None
                with ld.attached(zoo.model, ld.VCD(), drafter=drafter):
                    zoo.model.generate(**whole, **how)
        assert "\n" not in str(caught.value) and cache.get_seq_length() == tokens


@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_a_cache_that_holds_tokens(name):
    family = family_for(name)
    zoo, method = tiny(family), parse(name) if is_controller(name) else method_of(name, family)
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 7, 8), torch.zeros(1, 2, 7, 8), 0)
    with pytest.raises(UnsupportedError, match="holds 7 tokens already"):
        ask(zoo, zoo.inputs(("is it",)), method, **hf.with_cache(cache))


@pytest.mark.parametrize("method", [ld.OPERA(), ld.CNTP(), "lookup"])
def test_what_cannot_fill_a_cache_refuses_an_empty_one(method):
    zoo = tiny("llava")
    drafter = method if isinstance(method, str) else None
    with ld.attached(zoo.model, ld.VCD() if drafter else method, drafter=drafter, processor=zoo.processor):
        with pytest.raises(UnsupportedError, match="cannot fill a cache"):
            zoo.model.generate(**zoo.inputs(("is it",)), **hf.with_cache(DynamicCache()), max_new_tokens=2)


@pytest.mark.parametrize("name", ["vcd", "icd"])
def test_the_processor_form_sees_a_cache_of_another_turn(name):
    """A cache that holds this very prompt goes on as from nothing; one that holds more is refused."""
    zoo = tiny("llava")
    first, method = zoo.inputs(("is it",), seed=2), SHAPES[name]
    cache = DynamicCache(config=zoo.model.config.get_text_config())
    turn = zoo.model.generate(**first, max_new_tokens=NEW, do_sample=False, **hf.with_cache(cache))
    how = dict(max_new_tokens=NEW, do_sample=False)
    whole = {**first, "input_ids": turn, "attention_mask": torch.ones_like(turn)}
    fresh = ask(zoo, whole, method, suppress_tokens=None, min_new_tokens=None)
    form = method.processor(zoo.model, whole, processor=zoo.processor)
    text = {key: value for key, value in whole.items() if key != "pixel_values"}
    going_on = zoo.model.generate(**text, **how, **hf.with_cache(copy.deepcopy(cache)), logits_processor=[form])
    assert torch.equal(going_on, fresh)
    other = zoo.inputs(("no",), seed=5)
    form = method.processor(zoo.model, other, processor=zoo.processor)
    with pytest.raises((UnsupportedError, ValueError)):
        zoo.model.generate(**other, **how, **hf.with_cache(cache), logits_processor=[form])
