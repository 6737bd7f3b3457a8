"""The contract on every method and family that go together, or on one pair of each kind without ``--full``."""

import pytest
from contract import CELLS, FAMILIES, HONOURED, KINDS, NAMES, REFUSED, SMALL, by_default, case, family_for, refusal
from helpers import FEW, full_but

from lvlm_decode.methods import load
from lvlm_decode.testing import contract


def pairs(cells):
    """``name,family`` for a test; those that the default run leaves out are marked."""
    marks = [() if by_default(*pair) else pytest.mark.full for pair in cells]
    listed = [pytest.param(*pair, id="-".join(pair), marks=mark) for pair, mark in zip(cells, marks)]
    return pytest.mark.parametrize("name,family", listed)


each_cell = pairs(HONOURED)
each_method = pytest.mark.parametrize("name", NAMES)


def test_the_suite_covers_what_it_claims():
    assert not set(SMALL) - set(NAMES)
    assert [name for name in NAMES if load(name).off is None] == ["dola"], "log q_N - log q_j has no strength"
    assert {name for name, _ in REFUSED} == {"causalmm", "damro", "only", "scmoe"} and set(HONOURED).isdisjoint(REFUSED)
    assert len(HONOURED) + len(REFUSED) == len(CELLS) == len(NAMES) * len(FAMILIES)


def test_the_default_run_has_every_method_and_every_family_with_a_method_of_each_kind():
    taken = {pair for pair in HONOURED if by_default(*pair)}
    assert {name for name, _ in taken} == set(NAMES)
    assert taken >= {(name, family) for name in KINDS.values() for family in FAMILIES}
    costs = {kind: load(name).costs for kind, name in KINDS.items()}
    assert "image" in costs["image"] and "text" in costs["text"] and not {"image", "text"} & set(costs["layers"])


@pytest.mark.parametrize("name,family", REFUSED)
def test_what_a_family_cannot_do_raises_the_reason(name, family):
    contract.what_a_family_cannot_do_raises_the_reason(case(name, family))


@pairs([pair for pair in HONOURED if load(pair[0]).off is not None])
def test_switched_off_equals_plain(name, family):
    contract.switched_off_equals_plain(case(name, family))


@pairs([pair for pair in HONOURED if pair[0] != "plain"])
def test_does_something(name, family):
    contract.does_something(case(name, family))


def test_plain_does_nothing():
    with contract.raises(AssertionError, "scores are the plain model's"):
        contract.does_something(case("plain", "llava"))


@each_cell
def test_stacked_equals_sequential(name, family):
    contract.stacked_equals_sequential(case(name, family))


@each_cell
def test_a_row_in_a_batch_equals_the_row_alone(name, family):
    contract.a_row_in_a_batch_equals_the_row_alone(case(name, family))


@each_cell
def test_verifying_a_draft_equals_decoding_it(name, family):
    contract.verifying_a_draft_equals_decoding_it(case(name, family))


@each_cell
def test_beams_follow(name, family):
    contract.beams_follow(case(name, family))


@each_cell
def test_prompt_lookup_follows(name, family):
    contract.prompt_lookup_follows(case(name, family))


@each_method
def test_an_assistant_follows(name):
    contract.an_assistant_follows(case(name, family_for(name)))


@each_method
def test_a_static_cache_gives_the_same_tokens(name):
    contract.a_static_cache_gives_the_same_tokens(case(name, family_for(name)))


@each_method
def test_several_answers_begin_with_the_best(name):
    contract.several_answers_begin_with_the_best(case(name, family_for(name)))


@each_method
def test_runs_in_inference_mode(name):
    contract.runs_in_inference_mode(case(name, family_for(name)))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "plain" and family_for(n) == "llava"])
def test_adds_to_vcd(name):
    contract.adds_to_vcd(case(name, "llava"))


@pytest.mark.parametrize("family", full_but(FAMILIES, FEW))
def test_detached_equals_untouched(family):
    names = [name for name in NAMES if refusal(name, family) is None]
    contract.detached_equals_untouched(case("vcd", family), [case(name, family).method for name in names])


def test_every_rule_of_the_contract_is_tested_here():
    """The helper for other packages and this file hold methods to the same rules."""
    called = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {rule.__name__ for rule in contract.RULES} <= called
