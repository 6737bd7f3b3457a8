"""What Hugging Face's generation tests cover, on every family: nothing attached, alpha 0, VCD, ICD and DoLa.

Switched off, a call returns what the model alone returns, in every field: sequences, scores, logits, hidden states, attentions,
cache, beam indices. Switched on, what those tests compare of one model's calls holds of the mitigated model's.
"""

import copy
import functools

import pytest
import torch
from contract import FAMILIES, method_of
from helpers import FAINT
from transformers import Cache

from lvlm_decode import VCD, attach, detach
from lvlm_decode.families import family_of
from lvlm_decode.testing.contract import same_scores
from lvlm_decode.testing.models import tiny

NEW = 5
METHODS = ["vcd", "icd", "dola"]
EVERYTHING = dict(
    return_dict_in_generate=True,
    output_scores=True,
    output_logits=True,
    output_hidden_states=True,
    output_attentions=True,
)
#: Mode -> options of generate(); what each returns is compared field by field.
MODES = {
    "greedy": {},
    "sampled": dict(do_sample=True),
    "warped": dict(do_sample=True, top_k=20, top_p=0.9, temperature=1.5, repetition_penalty=1.2),
    "several": dict(do_sample=True, num_return_sequences=2),
    "beams": dict(num_beams=3),
    "beams returned": dict(num_beams=3, num_return_sequences=3, length_penalty=0.5),
    "sampled beams": dict(do_sample=True, num_beams=2, num_return_sequences=2),
    "static": dict(cache_implementation="static"),
    "lookup": dict(prompt_lookup_num_tokens=2),
    "same assistant": dict(assistant="same"),
    "random assistant": dict(assistant="random"),
    "sampled assistant": dict(assistant="same", do_sample=True),
}
DRAFTED = ("lookup", "same assistant", "random assistant", "sampled assistant")


#: Cells in which an assistant changes what transformers itself answers or puts out: token types of Gemma3 and PaliGemma reach the
#: verification too, and InstructBLIP's draft reads placeholders. That a method's answer stays the greedy one is tested below.
OTHERWISE = {
    (family, mode) for family in ("paligemma", "gemma3", "instructblip") for mode in DRAFTED if mode != "lookup"
}


@functools.cache
def assistant(family, kind):
    other = copy.deepcopy(tiny(family).model)
    # InstructBLIP's own generate() cannot draft for another, with or without a method.
    other = other.language_model if family == "instructblip" else other
    if kind == "random":
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in other.get_output_embeddings().parameters():
                parameter.normal_(0, parameter.std().item(), generator=generator)
    return other


def generate(family, mode, method=None, rows=2, fields=None, **how):
    """The output of a call, from a fixed state of torch's generator."""
    zoo, how = tiny(family), {**MODES[mode], **how}
    how = dict(do_sample=False, num_beams=1, max_new_tokens=NEW, min_new_tokens=NEW) | how
    how |= EVERYTHING if fields is None else fields
    if (kind := how.pop("assistant", None)) is not None:
        how["assistant_model"] = assistant(family, kind)
    inputs = zoo.inputs(["is it a dog?", "ab"][: 1 if mode in DRAFTED else rows])
    zoo.model.set_attn_implementation("eager" if how.get("output_attentions") else "sdpa")
    if method is not None:
        attach(zoo.model, method, processor=zoo.processor)
    torch.manual_seed(11)
    try:
        return zoo.model.generate(**inputs, **how)
    finally:
        detach(zoo.model)
        zoo.model.set_attn_implementation("sdpa")


def same(got, want, path="output"):
    """Equal in kind, shape and, to rounding, in value; caches by what their layers hold."""
    assert type(got) is type(want) or isinstance(got, Cache), path
    if isinstance(want, torch.Tensor):
        assert got.shape == want.shape, (path, got.shape, want.shape)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, msg=lambda text: f"{path}: {text}")
    elif isinstance(want, dict):
        assert set(got) == set(want), path
        for key in want:
            same(got[key], want[key], f"{path}.{key}")
    elif isinstance(want, tuple | list):
        assert len(got) == len(want), (path, len(got), len(want))
        for number, (a, b) in enumerate(zip(got, want)):
            same(a, b, f"{path}[{number}]")
    elif isinstance(want, Cache):
        assert got.get_seq_length() == want.get_seq_length() and len(got.layers) == len(want.layers), path
        for number, (a, b) in enumerate(zip(got.layers, want.layers)):
            for name in ("keys", "values"):
                same(getattr(a, name), getattr(b, name), f"{path}.layers[{number}].{name}")
    else:
        assert got == want, path


def pairs(values):
    """Every family once and every value twice at least in the default run; all under ``--full``."""
    values = list(values)
    kept = {(family, values[(3 * at + more) % len(values)]) for at, family in enumerate(FAMILIES) for more in (0, 5)}
    return [
        pytest.param(family, value, marks=() if (family, value) in kept else pytest.mark.full)
        for family in FAMILIES
        for value in values
    ]


@pytest.mark.parametrize(("family", "mode"), [cell for cell in pairs(MODES) if tuple(cell.values) not in OTHERWISE])
def test_switched_off_equals_unattached_in_every_field(family, mode):
    got, want = generate(family, mode, VCD(alpha=FAINT, beta=None)), generate(family, mode)
    same(got, want)
    same(got.to_tuple(), want.to_tuple())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family_of(tiny(family).model).position_keys])
def test_an_assistant_drafts_at_the_positions_of_the_images(family, monkeypatch):
    """Those that it has unattached: from the grids of the images, which no argument of the loop holds any more."""
    found, other = [], assistant(family, "same")
    real = type(other).forward

    @functools.wraps(real)
    def watch(self, *args, **kwargs):
        if self is other:
            found.append(kwargs["position_ids"].clone())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(other), "forward", watch)
    generate(family, "same assistant")
    want, found = found, []
    generate(family, "same assistant", VCD(alpha=0, beta=None))
    assert len(found) == len(want) > 0 and all(map(torch.equal, found, want))
    # A prompt's image makes them others than those of text.
    assert not torch.equal(want[0][1], want[0][0])


def cells(modes):
    return pairs([(name, mode) for name in METHODS for mode in modes])


TOKENS = dict(return_dict_in_generate=True, output_logits=True)


@functools.cache
def alone(family, name, row=None):
    """Greedy tokens and logits of a method; of one row or of the batch."""
    out = generate(family, "greedy", method_of(name, family), rows=2 if row is None else 1, fields=TOKENS)
    return out.sequences[:, -NEW:], torch.stack(out.logits)


@pytest.mark.parametrize(("family", "case"), cells(["static", "lookup", "same assistant", "random assistant"]))
def test_other_ways_to_the_same_greedy_answer(family, case):
    """Hugging Face's: static cache, assisted decoding and prompt lookup match greedy search."""
    name, mode = case
    out = generate(family, mode, method_of(name, family), fields=TOKENS)
    tokens, logits = alone(family, name, 0 if mode in DRAFTED else None)
    assert torch.equal(out.sequences[:, -NEW:], tokens)
    same_scores(torch.stack(out.logits), logits, atol=1e-4)


@pytest.mark.parametrize(("family", "case"), cells(["greedy", "sampled", "beams", "sampled beams"]))
def test_an_output_object_holds_what_the_tensor_is(family, case):
    """Hugging Face's ``*_dict_outputs``: the same tokens, and fields in the number and shapes that the call has."""
    name, mode = case
    method = method_of(name, family)
    out, ids = generate(family, mode, method), generate(family, mode, method, fields={})
    assert torch.equal(out.sequences, ids)
    width = out.sequences.shape[1] - len(out.scores)
    beams, rows = mode.endswith("beams"), len(out.scores[0])
    assert rows == 2 * MODES[mode].get("num_beams", 1) and len(out.scores) == len(out.logits) == NEW
    for step, (hidden, attended) in enumerate(zip(out.hidden_states, out.attentions)):
        queries, slots = (width, width) if step == 0 else (1, width + step)
        assert {state.shape[:2] for state in hidden} == {(rows, queries)}
        windows = {layer.shape[-1] for layer in attended}
        assert {layer.shape[2] for layer in attended} == {queries} and max(windows) == slots
    if beams:
        found = tiny(family).model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
        assert found.shape == (len(out.sequences), NEW) and bool(torch.isfinite(found).all())


@pytest.mark.parametrize(("family", "name"), pairs(METHODS))
def test_padding_on_the_left_changes_nothing(family, name):
    """Hugging Face's ``left_padding_compatibility``: the logits of a prompt with pads before it."""
    zoo = tiny(family)
    inputs = zoo.inputs(["is it a dog?"])
    padded = {**inputs}
    for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            padded[key] = torch.nn.functional.pad(inputs[key], (5, 0))
    how = dict(max_new_tokens=NEW, min_new_tokens=NEW, sample_ids=[0], **TOKENS)
    attach(zoo.model, method_of(name, family), processor=zoo.processor)
    try:
        want, got = (zoo.model.generate(**copy.copy(own), **how) for own in (inputs, padded))
    finally:
        detach(zoo.model)
    assert torch.equal(got.sequences[:, 5:], want.sequences)
    same_scores(torch.stack(got.logits), torch.stack(want.logits), atol=3e-5)
