"""Sums over kinds of methods: one forward, views that do not touch each other, terms that add up, and pairs that refuse."""

import itertools

import pytest
import torch
from contract import NAMES, family_for, is_controller, method_of

from lvlm_decode.engine.run import Run
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.methods import METHODS, load, parse
from lvlm_decode.testing.models import tiny

#: Methods that change view 0 itself, and methods that see it beside others or read its layers.
CHANGES = ["pai", "spin", "vaf", "hgai", "cai", "ilvad", "vista", "vti", "nullu", "revis", "memvr"]
SEES = ["vcd", "m3id", "mod", "crops", "sid", "layercd", "only", "dola", "uscd"]
#: What the default run takes; the rest under --full.
OFTEN = [("vista", "vcd"), ("vaf", "m3id"), ("cai", "only"), ("memvr", "mod"), ("revis", "crops"), ("pai", "dola")]


def run_of(method) -> Run:
    zoo = tiny("llava")
    return Run(zoo.model, method, zoo.inputs(("is it a dog?", "ab")), processor=zoo.processor, seed=0)


def told(method, tokens):
    """The steps (prompt, then ``tokens`` at once) of a call, its scores, and its lanes."""
    run = run_of(method)
    with torch.no_grad(), run.method.patch(run):
        lanes = run.open()
        first, _ = lanes.prefill()
        steps = [lanes.last_step]
        rest, _ = lanes.extend(tokens)
        steps.append(lanes.last_step)
    return steps, torch.cat([first, rest], 1), lanes, run


pairs = [
    pytest.param(*pair, id="+".join(pair), marks=() if pair in OFTEN else pytest.mark.full)
    for pair in itertools.product(CHANGES, SEES)
]


@pytest.mark.parametrize("change,sees", pairs)
def test_a_change_of_view_0_adds_to_a_method_that_sees_it(change, sees):
    """View 0 is what the change makes of it, other views are as without it, and the scores are the sum of both terms."""
    tokens = torch.tensor([[7, 11, 30], [20, 9, 40]])
    one, other = method_of(change, "llava"), method_of(sees, "llava")
    both, scores, lanes, run = told(one + other, tokens)
    alone, *_ = told(one, tokens)
    views, _, _, apart = told(other, tokens)
    assert len(lanes.lanes) == 1 and lanes.forwards == 2, "one forward for all views"
    own = len(alone[0].logits)
    for sum_step, its, theirs in zip(both, alone, views):
        torch.testing.assert_close(sum_step.logits[:own], its.logits, atol=2e-5, rtol=1e-4)
        if sees != "only":  # its branch leaves view 0, so it is as changed as that
            torch.testing.assert_close(sum_step.logits[own:], theirs.logits[1:], atol=2e-5, rtol=1e-4)
    assert run.weights(2)[own - 1 :] == pytest.approx(apart.weights(2)) or sees == "mod"
    got = []
    for sum_step in both:
        step, main = sum_step.finite(), sum_step.logits[0]
        parts = run.method._steps(step)
        got.append(sum((part.combine(its) - main for part, its in parts), main))
        for part, its in parts:
            keep = part.kept_tokens(its)
            if keep is not None:
                got[-1] = got[-1].masked_fill(~keep, -torch.inf)
    want = torch.cat(got, 1)
    kept = want > -torch.inf
    torch.testing.assert_close(scores[kept], want[kept], atol=1e-4, rtol=1e-4)
    assert bool((scores[~kept] < scores[kept].min()).all())


@pytest.mark.parametrize("change,sees", [pair for pair in OFTEN if pair != ("pai", "dola")])
def test_the_order_of_a_sum_does_not_matter(change, sees):
    tokens = torch.tensor([[7, 11, 30], [20, 9, 40]])
    one, other = method_of(change, "llava"), method_of(sees, "llava")
    torch.testing.assert_close(told(one + other, tokens)[1], told(other + one, tokens)[1], atol=1e-4, rtol=1e-4)


def test_an_attention_edit_and_a_steering_act_together():
    """Both own another part of view 0, so neither hides the other."""
    tokens = torch.tensor([[7, 11, 30], [20, 9, 40]])
    logits = [told(method, tokens)[0][1].logits[0] for method in (parse("vaf+vista"), parse("vaf"), parse("vista"))]
    assert min((logits[0] - logits[1]).abs().max(), (logits[0] - logits[2]).abs().max()) > 1e-3
    off = parse("vaf(enhance=1.0,suppress=1.0)+vista")
    torch.testing.assert_close(told(off, tokens)[0][1].logits[0], logits[2], atol=2e-5, rtol=1e-4)


def test_every_pair_adds_up_or_says_why_not():
    """Two owners of one rule and a search beside anything; with their defaults no other two are refused."""
    made = {name: method_of(name, family_for(name)) for name in NAMES} | {
        name: load(name)() for name in METHODS if is_controller(name)
    }
    refused = set()
    for one, other in itertools.combinations(METHODS, 2):
        a, b = made[one], made[other]
        owners = a.owns is not None and a.owns == b.owns
        searches = is_controller(one) or is_controller(other)
        if not (owners or searches):
            assert (a + b).methods == (a, b)
            continue
        with pytest.raises(UnsupportedError) as caught:
            a + b
        words = str(caught.value)
        assert words.endswith((".", "one.")) and ("both own" in words) + ("cannot be added" in words) >= 1, words
        refused.add("owners" if owners else "searches")
    assert refused == {"owners", "searches"}


@pytest.mark.parametrize(
    "text,reason",
    [
        ("vaf+hgai", "both own the attention of view 0"),
        ("cai+pai", "both own the attention of view 0"),
        ("vista+memvr", "both own the hidden states of view 0"),
        ("dola+deco", "both own the choice of an early layer"),
        ("opera+vcd", "opera cannot be added"),
    ],
)
def test_what_cannot_be_added_raises_the_reason(text, reason):
    with pytest.raises(UnsupportedError, match=reason):
        parse(text)
