"""What each method costs, counted: vision passes, forwards of the language model, attention rows, projected rows."""

import contextlib
import dataclasses
import functools
import sys
from dataclasses import dataclass, field

import pytest
import torch
from contract import NAMES, family_for, method_of
from transformers.models.llama import modeling_llama
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe

from lvlm_decode import VCD, attach, attached, detach
from lvlm_decode.attachment import last_run
from lvlm_decode.engine import attention
from lvlm_decode.methods import load
from lvlm_decode.testing.models import LAYERS, tiny

B, NEW = 2, 4


@dataclass
class Count:
    """What was counted during one call."""

    views: int = 0
    passes: int = 0
    pictures: int = 0
    forwards: int = 0
    rows: set = field(default_factory=set)
    attention: list = field(default_factory=list)
    eager: int = 0
    states: list = field(default_factory=list)
    projected: list = field(default_factory=list)


@contextlib.contextmanager
def counting(model, monkeypatch):
    count = Count()
    decoder = model.get_decoder()
    inner = next(m for m in model.get_encoder(modality="image").modules() if isinstance(m, torch.nn.Linear))

    def vision(module, args):
        count.passes += 1
        count.pictures += len(args[0])

    def language(module, args, kwargs, output):
        count.forwards += 1
        states = getattr(output, "hidden_states", None)
        count.states.append([] if states is None else [i for i, s in enumerate(states) if s is not None])
        count.rows.add(len(output.last_hidden_state))

    def head(module, args):
        count.projected.append(args[0].shape[:-1].numel())

    def eager(*args, **kwargs):
        count.eager += 1
        raise AssertionError("eager attention")

    for module in (modeling_llama, modeling_qwen3_vl_moe):
        monkeypatch.setattr(module, "eager_attention_forward", eager)
    hooks = [
        # A layer inside: an encoder that only repeats what it said runs none of them.
        inner.register_forward_pre_hook(vision),
        decoder.register_forward_hook(language, with_kwargs=True),
        model.get_output_embeddings().register_forward_pre_hook(head),
    ]
    before = len(attention.materialised)
    try:
        yield count
    finally:
        count.attention = attention.materialised[before:]
        for hook in hooks:
            hook.remove()


def costs(name, monkeypatch, family="llava", method=None):
    zoo = tiny(family)
    inputs = zoo.inputs(["is it a dog?", "ab"])
    attach(zoo.model, method or method_of(name, family), processor=zoo.processor)
    try:
        with counting(zoo.model, monkeypatch) as count:
            zoo.model.generate(**inputs, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
        summary = last_run(zoo.model)
        # A view of partial depth has no row.
        count.views = sum(map(len, summary.lanes))
    finally:
        detach(zoo.model)
    return count


@pytest.mark.parametrize("name", NAMES)
def test_one_vision_pass_whatever_the_views(name, monkeypatch):
    count = costs(name, monkeypatch, family_for(name))
    assert count.passes == 1
    if family_for(name) == "llava":  # the rows that Qwen encodes are patches
        edited = load(name).costs.count("image")
        assert count.pictures == (1 + edited) * B, "only edited pixels are encoded as well"


@pytest.mark.parametrize("name", NAMES)
def test_one_forward_per_token(name, monkeypatch):
    count = costs(name, monkeypatch, family_for(name))
    # One prefill that is looked at, and one of the view; a description of three tokens; a prefill with and without the image.
    extra = dict(ilvad=3 + 2, avisc=1, mod=2, code=3, vista=1)
    assert count.forwards == NEW + extra.get(name, 0)
    rows = count.views * B
    own = {"avisc": {B}, "ilvad": {B}, "mod": {B}, "code": {B}, "vista": {2 * B}}.get(name, set())
    assert count.rows == {rows} | own


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_computed_for_single_rows_alone(name, monkeypatch):
    count = costs(name, monkeypatch, family_for(name))
    want = {
        # From the second token on, every layer but the first, the newest row of view 0.
        "pai": [(B, 1)] * (NEW - 1) * (LAYERS - 1),
        # One layer, the newest row of the pruned view.
        "sid": [(B, 1)] * NEW,
        # The layer that the branch leaves, the newest row.
        "only": [(B, 1)] * NEW,
        # The same as SID of two views.
        "crops": [(B, 1)] * 2 * NEW,
        # One layer, the row of every token, the prompt's too.
        "hgai": [(B, 1)] * NEW,
        # What two tokens of an answer look at; then every layer, the row of every token.
        "ilvad": [(B, 2)] * LAYERS + [(B, 1)] * LAYERS * NEW,
        # The two layers after the first one that may be unsure.
        "cai": [(B, 1)] * 2 * NEW,
        # Every layer's last row, once.
        "avisc": [(B, 1)] * LAYERS,
        "mod": [(B, 1)] * LAYERS,
    }.get(name, [])
    assert count.attention == want
    assert count.eager == 0


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_of_the_layers_in_use_alone(name, monkeypatch):
    count = costs(name, monkeypatch, family_for(name))
    layers = {"dola": [0, 1, 3], "deco": [2, 3], "lol": [2]}.get(name, [])
    if name == "vista":
        # Its vector comes from a prefill of its own, which is asked for no states by the method's probes.
        count.states.pop(0)
        layers = [3]
    assert all(states == layers for states in count.states)
    # The head sees the newest position of every row, and that of the early layers: of view 0, and of the amateur's; and of
    # a branch, which has no row.
    rows = count.views * B
    early = {"dola": [3 * B], "deco": [2 * B], "lol": [B] * 2, "only": [B]}.get(name, [])
    if name not in ("avisc", "mod", "code", "vista", "ilvad"):
        # Layers are asked on the way, so their projections come before.
        asked = {"memvr": [B], "cai": [B] * 2}.get(name, [])
        assert count.projected == [*asked, rows, *early] * NEW


SWITCHED = [name for name in NAMES if load(name).off is not None]


def off(name, family):
    """The method at strength 0, under its mask."""
    known = {field.name for field in dataclasses.fields(load(name))} - {"beta"}
    return dataclasses.replace(
        method_of(name, family), **{key: value for key, value in load(name).off.items() if key in known}
    )


@functools.cache
def plain_cost(family):
    with pytest.MonkeyPatch.context() as patch:
        return costs("plain", patch, family)


@pytest.mark.parametrize("name", [name for name in SWITCHED if off(name, family_for(name)).is_off])
def test_strength_0_costs_what_plain_decoding_does(name, monkeypatch):
    family = family_for(name)
    assert costs(name, monkeypatch, family, off(name, family)) == plain_cost(family)


def test_what_has_a_strength_can_be_switched_off():
    assert [name for name in SWITCHED if not off(name, family_for(name)).is_off] == ["plain", "mask"]


def test_of_a_sum_the_part_at_strength_0_does_not_run(monkeypatch):
    count = costs(
        "ritual", monkeypatch, method=VCD(alpha=0, beta=0.3) + load("ritual")() + load("pai")(alpha=0, gamma=1)
    )
    assert (count.passes, count.pictures, count.forwards) == (1, 2 * B, NEW)
    assert count.rows == {2 * B} and count.attention == []


@pytest.mark.parametrize("name", ["pai", "cai"])
def test_guidance_of_1_runs_no_branch_beside_the_edits(name, monkeypatch):
    count = costs(name, monkeypatch, method=dataclasses.replace(method_of(name, "llava"), gamma=1.0))
    assert count.rows == {B} and count.attention


def test_a_sum_shares_the_pass_and_the_forward(monkeypatch):
    from lvlm_decode.methods import parse

    count = costs("vcd+ritual+icd+vdd", monkeypatch, method=parse("vcd+ritual+icd+vdd"))
    assert (count.passes, count.pictures, count.forwards) == (1, 3 * B, NEW)
    assert count.rows == {5 * B}


@pytest.mark.parametrize("name,pictures", [("icd", B), ("lqcd", B), ("vcd", 2 * B), ("damro", B)])
def test_the_qformer_reads_another_prompt_without_another_vision_pass(name, pictures, monkeypatch):
    count = costs(name, monkeypatch, "instructblip")
    assert (count.passes, count.pictures) == (1, pictures)


def test_an_amateur_that_is_another_model_runs_its_own_forwards(monkeypatch):
    import copy

    from lvlm_decode.methods.lol import LOL

    amateur = copy.deepcopy(tiny("llava").model)
    seen = []
    amateur.get_decoder().register_forward_hook(lambda module, args, output: seen.append(len(output.last_hidden_state)))
    count = costs("lol", monkeypatch, method=LOL(model=amateur))
    assert count.forwards == NEW and count.rows == {2 * B}, "the sample and its guided view"
    assert seen == [B] * NEW
    assert torch.is_grad_enabled()


def functions_per_token(method: str | None) -> int:
    """Functions of Python that one token of one row calls, greedy; what a token of a small model costs beside its products."""
    model, calls = tiny("llava").model, []
    inputs = tiny("llava").inputs(["is it a dog"])
    with contextlib.nullcontext() if method is None else attached(model, method):
        # The first call of a process leaves hooks and the like, once.
        for length in (3, 3, 7):
            count = [0]

            def called(frame, event, arg, count=count):
                count[0] += event == "call"

            before = sys.getprofile()
            sys.setprofile(called)
            try:
                model.generate(**inputs, do_sample=False, max_new_tokens=length, eos_token_id=None, pad_token_id=0)
            finally:
                sys.setprofile(before)
            calls.append(count[0])
    return (calls[2] - calls[1]) // 4


#: At most how many functions of Python a token calls beside those of transformers' own loop: what was counted, and two more.
FUNCTIONS = {"plain": 48, "mask": 61, "vcd(alpha=0)": 66}


@pytest.mark.parametrize("method", FUNCTIONS)
def test_a_token_calls_few_functions_of_its_own(method):
    assert functions_per_token(method) <= functions_per_token(None) + FUNCTIONS[method]
