"""The contract on every method and family that go together, or on one pair of each kind without ``--full``."""

import contract
import pytest
from contract import CELLS, FAMILIES, HONOURED, KINDS, NAMES, REFUSED, SMALL, by_default, family_for

from lvlm_decode.methods import load


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
    assert {name for name, _ in REFUSED} == {"damro", "scmoe"} and set(HONOURED).isdisjoint(REFUSED)
    assert len(HONOURED) + len(REFUSED) == len(CELLS) == len(NAMES) * len(FAMILIES)


def test_the_default_run_has_every_method_and_every_family_with_a_method_of_each_kind():
    taken = {pair for pair in HONOURED if by_default(*pair)}
    assert {name for name, _ in taken} == set(NAMES)
    assert taken >= {(name, family) for name in KINDS.values() for family in FAMILIES}
    costs = {kind: load(name).costs for kind, name in KINDS.items()}
    assert "image" in costs["image"] and "text" in costs["text"] and not {"image", "text"} & set(costs["layers"])


@pytest.mark.parametrize("name,family", REFUSED)
def test_what_a_family_cannot_do_raises_the_reason(name, family):
    contract.what_a_family_cannot_do_raises_the_reason(name, family)


@pairs([pair for pair in HONOURED if load(pair[0]).off is not None])
def test_switched_off_equals_plain(name, family):
    contract.switched_off_equals_plain(name, family)


@each_cell
def test_does_something(name, family):
    contract.does_something(name, family)


@each_cell
def test_stacked_equals_sequential(name, family):
    contract.stacked_equals_sequential(name, family)


@each_cell
def test_a_row_in_a_batch_equals_the_row_alone(name, family):
    contract.a_row_in_a_batch_equals_the_row_alone(name, family)


@each_cell
def test_verifying_a_draft_equals_decoding_it(name, family):
    contract.verifying_a_draft_equals_decoding_it(name, family)


@each_cell
def test_beams_follow(name, family):
    contract.beams_follow(name, family)


@each_cell
def test_prompt_lookup_follows(name, family):
    contract.prompt_lookup_follows(name, family)


@each_method
def test_an_assistant_follows(name):
    contract.an_assistant_follows(name)


@each_method
@pytest.mark.parametrize("mode", ["static", "returns"])
def test_other_modes_give_the_same_tokens(name, mode):
    contract.other_modes_give_the_same_tokens(name, mode)


@each_method
def test_runs_in_inference_mode(name):
    contract.runs_in_inference_mode(name)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "plain" and family_for(n) == "llava"])
def test_adds_to_vcd(name):
    contract.adds_to_vcd(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_detached_equals_untouched(family):
    contract.detached_equals_untouched(family)
