"""Numbers at their edges, for every method: -inf and NaN among the model's own logits, bans, none and one new token."""

import copy
import dataclasses

import pytest
import torch
from contract import KINDS, SMALL, family_for, method_of
from helpers import full_but

import lvlm_decode as ld
from lvlm_decode.engine.run import Run
from lvlm_decode.errors import InputError, LvlmDecodeError
from lvlm_decode.method import Contrast, Step
from lvlm_decode.methods import METHODS, load
from lvlm_decode.testing.models import EOS, tiny

NEW = 5
#: Controllers that are quick enough on a small model.
QUICK = {
    "mvp": dict(caption_tokens=3, path_tokens=3),
    "vdgd": dict(description_tokens=3),
    "opera": dict(num_beams=2, num_attn_candidates=2),
    "cntp": dict(max_trials=2),
}
BANNED = [5, 9, 40, 77]


def made(name, **more):
    if name in QUICK:
        return load(name)(**{**QUICK[name], **more})
    family = family_for(name)
    return method_of(name, family, {**SMALL.get(name, {}), **more})


def unmasked(name, **more):
    """The method without its plausibility mask, which would hide much."""
    fields = load(name).__dataclass_fields__
    if "beta" in fields and name != "vdgd":
        more["beta"] = None
    return made(name, **more)


@pytest.fixture(params=full_but(METHODS, [*KINDS.values(), *QUICK]))
def name(request):
    return request.param


@pytest.fixture
def zoo(name):
    """A copy whose head may be hooked."""
    own = copy.copy(tiny(family_for(name)))
    own.model = copy.deepcopy(own.model)
    return own


def ask(zoo, method, inputs=None, drafter=None, **kwargs):
    inputs = zoo.inputs(("is it a dog", "no"), seed=1) if inputs is None else inputs
    with ld.attached(zoo.model, method, processor=zoo.processor, drafter=drafter):
        out = zoo.model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, "num_beams": 1, **kwargs})
        sequences = out if torch.is_tensor(out) else out.sequences
        return sequences[:, inputs["input_ids"].shape[1] :], out


def hook(zoo, change):
    zoo.model.get_output_embeddings().register_forward_hook(lambda module, args, out: change(out))


def test_what_the_model_bans_itself_stays_banned_and_nothing_becomes_nan(zoo, name):
    """Padded vocabularies and suppressed tokens are -inf in the head's own output."""
    method = unmasked(name)
    hook(zoo, lambda out: out.index_fill(-1, torch.tensor(BANNED), float("-inf")))
    for mode in ({}, {"do_sample": True, "seed": 3}, {"do_sample": True}, {"output_logits": True}):
        if name in QUICK and "output_logits" in mode:
            continue
        mode = {**mode, "return_dict_in_generate": True} if "output_logits" in mode else mode
        try:
            said, out = ask(zoo, method, min_new_tokens=NEW, **mode)
        except LvlmDecodeError as error:
            assert "do_sample" in mode and "cannot" in str(error), error
            continue
        assert not torch.isin(said, torch.tensor(BANNED)).any()
        if "output_logits" in mode:
            logits = torch.stack(out.logits)
            assert not logits.isnan().any() and bool((logits[..., BANNED] == float("-inf")).all())
            rest = [token for token in range(logits.shape[-1]) if token not in BANNED]
            assert bool(logits[..., rest].isfinite().all())


#: Methods whose gate is defined by the size of the vocabulary.
BY_SIZE = {"uscd": "the largest standard deviation that N probabilities can have"}


@pytest.mark.parametrize("name", [n for n in METHODS if n not in QUICK and n not in BY_SIZE], indirect=True)
def test_gates_and_masks_see_a_banned_token_as_no_token(zoo, name):
    """What every view bans is to a method as if the vocabulary did not have it: gates, masks and normalisation too."""
    run = Run(zoo.model, made(name), zoo.inputs(("is it a dog", "no"), seed=1), processor=zoo.processor, seed=0)
    with torch.no_grad(), run.method.patch(run):
        run.open().prefill()
    step, bans = run.lanes.last_step, torch.tensor(BANNED)
    rest = torch.tensor([token for token in range(step.logits.shape[-1]) if token not in BANNED])

    def with_logits(change):
        return dataclasses.replace(
            step, logits=change(step.logits), project=lambda *a, **k: change(step.project(*a, **k))
        )

    banned = run.method.scores(with_logits(lambda logits: logits.index_fill(-1, bans, float("-inf"))))
    smaller = run.method.scores(with_logits(lambda logits: logits.index_select(-1, rest)))
    assert bool((banned[..., bans] == float("-inf")).all()) and not banned.isnan().any()
    torch.testing.assert_close(banned[..., rest], smaller, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bad", ["nan", "-inf"])
def test_a_model_that_says_no_number_is_told_of(zoo, name, bad):
    """Half precision that overflows: the first step without a number ends the call in one sentence."""
    hook(zoo, lambda out: torch.full_like(out, float(bad)))
    for mode in ({}, {"do_sample": True, "seed": 0}, {"do_sample": True}):
        try:
            with pytest.raises(InputError, match="no token of the vocabulary is left") as caught:
                ask(zoo, unmasked(name), **mode)
            assert "\n" not in str(caught.value)
        except LvlmDecodeError as error:
            assert "do_sample" in mode and "cannot" in str(error), error


def test_one_nan_among_the_logits_is_a_token_that_is_never_said(zoo, name):
    hook(zoo, lambda out: out.index_fill(-1, torch.tensor(BANNED), float("nan")))
    said, _ = ask(zoo, unmasked(name), min_new_tokens=NEW)
    assert not torch.isin(said, torch.tensor(BANNED)).any()


def test_a_vocabulary_banned_whole_is_told_of(zoo, name):
    everything = lambda ids, scores: torch.full_like(scores, float("-inf"))  # noqa: E731
    for mode in ({}, {"do_sample": True}, {"do_sample": True, "seed": 0}):
        try:
            with pytest.raises(InputError, match="no token of the vocabulary is left"):
                ask(zoo, made(name), logits_processor=[everything], **mode)
        except LvlmDecodeError as error:
            assert "do_sample" in mode and "cannot" in str(error), error


def test_none_and_one_new_token(zoo, name):
    one, _ = ask(zoo, made(name), max_new_tokens=1)
    assert one.shape == (2, 1)
    try:
        none, _ = ask(zoo, made(name), max_new_tokens=0)
    except ValueError as error:
        assert "max_new_tokens" in str(error) or "max_length" in str(error)
    else:
        raise AssertionError(f"transformers refuses max_new_tokens=0, and {name} said {none.shape[1]} tokens")


def test_an_empty_batch_is_refused(zoo, name):
    inputs = {key: value[:0] for key, value in zoo.inputs(("is it", "no")).items()}
    with pytest.raises(InputError, match="the batch is empty"):
        ask(zoo, made(name), inputs)


def test_a_finished_row_needs_no_token():
    """Grammars ban everything once a row has ended; that is no error while another row goes on."""
    zoo = tiny("llava")
    inputs = zoo.inputs(("is it a dog", "no"), seed=1)
    width = inputs["input_ids"].shape[1]

    def grammar(ids, scores):
        scores = scores.clone()
        if ids.shape[1] == width:
            scores[0, [t for t in range(scores.shape[1]) if t != EOS]] = float("-inf")
            scores[1, EOS] = float("-inf")
        else:
            scores[0] = float("-inf")
        return scores

    said, _ = ask(zoo, ld.VCD(), inputs, logits_processor=[grammar], max_new_tokens=3)
    assert int(said[0, 0]) == EOS and said.shape[1] == 3


@pytest.mark.parametrize("drafter", ["lookup", "recycling"])
@pytest.mark.parametrize("bad", ["nan", "-inf"])
def test_drafts_too(drafter, bad):
    zoo = copy.copy(tiny("llava"))
    zoo.model = copy.deepcopy(zoo.model)
    hook(zoo, lambda out: torch.full_like(out, float(bad)))
    for mode in ({}, {"do_sample": True}, {"repetition_penalty": 1.2}):
        with pytest.raises(InputError, match="no token of the vocabulary is left"):
            ask(zoo, ld.VCD(beta=None), drafter=drafter, **mode)


def test_views_that_ban_more_or_less_than_the_sample():
    """What view 0 bans stays banned; what another view alone bans counts as no difference."""

    class Two(Contrast):
        name = "two"

    inf = float("-inf")
    main, view = torch.tensor([1.0, 2.0, inf, float("nan")]), torch.tensor([0.5, inf, 3.0, 1.0])
    step = Step(torch.stack([main, view])[:, None, None], torch.zeros(1, 1, dtype=torch.long), (-1.0,))
    assert Two().scores(step)[0, 0].tolist() == [1.5, 2.0, inf, inf]
