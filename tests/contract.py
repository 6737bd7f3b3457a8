"""The contract: what every method must hold on every family. ``test_contract.py`` says which pairs a run takes.

Controllers (methods with a search of their own) have their own suites.
"""

import copy
import dataclasses
import functools

import pytest
import torch
import transformers
from zoo import tiny

from lvlm_decode import attach, detach
from lvlm_decode.attachment import last_run
from lvlm_decode.engine.hf import decoder, versions
from lvlm_decode.engine.hf.decoder import attention_of
from lvlm_decode.engine.modes import NEEDS
from lvlm_decode.engine.run import Run
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.families import FAMILIES as REGISTERED
from lvlm_decode.families import family_of
from lvlm_decode.method import BELOW
from lvlm_decode.methods import METHODS, load

NEW = 4


#: All families but those that the installed transformers itself breaks.
FAMILIES = [
    family
    for family in REGISTERED
    if family not in versions.BROKEN.get(versions.minor_of(transformers.__version__), {})
]


def is_controller(name: str) -> bool:
    return hasattr(load(name), "decode")


NAMES = [name for name in METHODS if not is_controller(name)]

#: Parameters under which a method works on models this small.
SMALL = {
    "mod": dict(share=0.3),
    "damro": dict(k=3),
    "code": dict(max_description=3),
    "dola": dict(layers=(0, 1, 3)),
    "sid": dict(share=0.3),
    "pai": dict(alpha=0.5, gamma=1.5, first_layer=1),
    "m3id": dict(decay=0.3),
    "uscd": dict(threshold=0.6),
    "vaf": dict(enhance=1.6, suppress=0.5),
    "spin": dict(share=0.5),
    "vista": dict(strength=0.4),
    "vti": dict(text=4.0),
}


def refusal(name: str, family: str) -> str | None:
    """The words of the reason why a method must refuse a family."""
    adapter = family_of(tiny(family).model)
    return next((NEEDS[need] for need in load(name).needs if not getattr(adapter, f"has_{need}")), None)


def family_for(name: str) -> str:
    """LLaVA, or the first family that has what the method needs."""
    return next(family for family in ("llava", *FAMILIES) if refusal(name, family) is None)


@functools.cache
def projector(family: str) -> torch.nn.Module:
    """Another projector than the model's."""
    other = copy.deepcopy(family_of(tiny(family).model).projector())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return other


@functools.cache
def directions(family: str, *more: int) -> torch.Tensor:
    """(L, D, ...) what calibration might give, orthonormal where there are several of a layer."""
    module = family_of(tiny(family).model).decoding_module(tiny(family).model)
    shape = decoder.layer_count(module), decoder.width(module), *more
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    return torch.linalg.qr(drawn).Q if more else drawn


#: Methods that need vectors -> what makes them for a family.
DIRECTIONS = {"vti": directions, "nullu": lambda family: directions(family, 6)}


def method_of(name: str, family: str, parameters=None):
    parameters = dict(SMALL.get(name, {}) if parameters is None else parameters)
    if name == "dcd":
        parameters["negative"] = projector(family)
    if name in DIRECTIONS:
        parameters["vectors"] = DIRECTIONS[name](family)
    return load(name)(**parameters)


@functools.cache
def batch(family: str):
    """Unequal prompts; a row with several images and a text-only one where the family can have them."""
    zoo = tiny(family)
    counts = [zoo.max_images, 0 if zoo.text_only else 1, 1]
    return [zoo.row(text, n, seed=i) for i, (text, n) in enumerate(zip(("is it a dog?", "ab", "no"), counts))]


def decode(family, method, rows=None, execution="stacked", model=None, **kwargs):
    """(tokens (B, NEW), scores (NEW, B, N)) of a call, and its run; ``model`` stands in for the family's own."""
    zoo = tiny(family)
    model = model or zoo.model
    numbers = range(3) if rows is None else rows
    inputs = zoo.batch([batch(family)[n] for n in numbers])
    options = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=1)
    options |= dict(output_logits=True, output_scores=True, return_dict_in_generate=True) | kwargs
    if method is None:
        out, run = model.generate(**inputs, **options), None
    else:
        attach(model, method, processor=zoo.processor, execution=execution)
        try:
            out = model.generate(**inputs, sample_ids=list(numbers), seed=0, **options)
            run = last_run(model)
        finally:
            detach(model)
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    return tokens, out, run


@functools.cache
def cell(name: str, family: str):
    """The stacked greedy call that most tests compare with."""
    return decode(family, method_of(name, family))


def scores(out) -> torch.Tensor:
    return torch.stack(out.logits)


def kept(scores: torch.Tensor) -> torch.Tensor:
    """What no mask removed."""
    return scores > -BELOW / 2


def assert_scores(got: torch.Tensor, want: torch.Tensor, atol: float = 1e-5) -> None:
    """Equal to ``atol`` where both are kept, and masked at the same tokens.

    CODE's threshold is the divergence of its views: on a text-only row, whose views are equal, it is rounding error,
    and the tokens at its edge are ones of next to no probability.
    """
    moved = kept(got) != kept(want)
    if moved.any():
        best = want.amax(-1, keepdim=True).expand_as(want)
        assert (torch.maximum(got, want) < best - 8)[moved].all()
    both = kept(got) & kept(want)
    torch.testing.assert_close(got[both], want[both], atol=atol, rtol=1e-5)


CELLS = [(name, family) for name in NAMES for family in FAMILIES]
HONOURED = [pair for pair in CELLS if refusal(*pair) is None]
REFUSED = [pair for pair in CELLS if refusal(*pair) is not None]

#: A method of each kind, by what it changes: every family runs these in the default run (and OPERA, in its own file).
KINDS = {"image": "vcd", "text": "icd", "layers": "dola", "attention": "pai", "steering": "vista"}


def by_default(name: str, family: str) -> bool:
    """Whether the default run takes this pair: every method on one family, and one method of each kind on every family."""
    return family == family_for(name) or name in KINDS.values()


def what_a_family_cannot_do_raises_the_reason(name, family):
    with pytest.raises(UnsupportedError, match=f"{name} needs {refusal(name, family)}, which {family} does not have"):
        decode(family, method_of(name, family))


def switched_off_equals_plain(name, family):
    """Where no mask of the method's own rules (CODE's and DeCo's do), all scores are the plain model's."""
    off = load(name).off
    known = {field.name for field in dataclasses.fields(load(name))}
    parameters = {**SMALL.get(name, {}), **{key: value for key, value in off.items() if key in known}}
    tokens, out, _ = decode(family, method_of(name, family, parameters))
    plain, want, _ = decode(family, None)
    assert torch.equal(tokens, plain)
    got, want = scores(out), scores(want)
    assert bool(kept(got).all()) == (name not in ("code", "deco"))
    gap = (got - want).masked_fill(~kept(got), float("nan"))
    # A constant per position is nothing to a softmax.
    assert (gap - gap.nanmean(-1, keepdim=True))[kept(got)].abs().max() < 2e-5


def does_something(name, family):
    """No cell passes the others because its views are copies of view 0."""
    _, out, _ = cell(name, family)
    _, plain, _ = decode(family, None)
    first, want = scores(out)[0].log_softmax(-1), scores(plain)[0].log_softmax(-1)
    both = kept(first)
    moved = (first - want)[both].abs().max() > 1e-3 or not bool(both.all())
    assert moved == (name != "plain")


def stacked_equals_sequential(name, family):
    tokens, out, run = cell(name, family)
    apart, want, alone = decode(family, method_of(name, family), execution="sequential")
    assert torch.equal(tokens, apart)
    assert_scores(scores(out), scores(want))
    assert len(run.lanes) == 1 and len(alone.lanes) == run.views


def a_row_in_a_batch_equals_the_row_alone(name, family):
    tokens, out, _ = cell(name, family)
    for row in range(3):
        alone, own, _ = decode(family, method_of(name, family), rows=[row])
        assert torch.equal(alone[0], tokens[row])
        assert_scores(scores(own)[:, 0], scores(out)[:, row], atol=3e-5)


def retold(family, method, rows, tokens) -> torch.Tensor:
    """(B, NEW, N) scores of given answers, from one verification of all of their tokens at once."""
    zoo = tiny(family)
    inputs = zoo.batch([batch(family)[n] for n in rows])
    run = Run(zoo.model, method, inputs, processor=zoo.processor, seed=0, sample_ids=list(rows))
    with torch.no_grad(), run.method.patch(run):
        lanes = run.open()
        first, _ = lanes.prefill(keep=1)
        rest, _ = lanes.extend(tokens[:, :-1])
    return torch.cat([first, rest], 1)


def verifying_a_draft_equals_decoding_it(name, family):
    tokens, out, _ = cell(name, family)
    got = retold(family, method_of(name, family), range(3), tokens)
    assert_scores(got.transpose(0, 1), scores(out), atol=3e-5)


def beams_follow(name, family):
    """The score of the best beam is the sum of its tokens' scores, told again without beams."""
    method = method_of(name, family)
    beams, out, _ = decode(family, method, num_beams=3)
    told = retold(family, method, range(3), beams).log_softmax(-1)
    # As under min_new_tokens in the search: it forbids the end token without renormalising.
    sums = told.gather(-1, beams[..., None])[..., 0].sum(-1) / NEW
    torch.testing.assert_close(out.sequences_scores, sums, atol=2e-5, rtol=1e-4)


def prompt_lookup_follows(name, family):
    tokens, *_ = cell(name, family)
    drafted, *_ = decode(family, method_of(name, family), rows=[0], prompt_lookup_num_tokens=3)
    assert torch.equal(drafted[0], tokens[0])


def an_assistant_follows(name):
    family = family_for(name)
    zoo = tiny(family)
    assistant = copy.deepcopy(zoo.model)
    with torch.no_grad():
        for parameter in assistant.get_output_embeddings().parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    tokens, *_ = cell(name, family)
    drafted, *_ = decode(family, method_of(name, family), rows=[0], assistant_model=assistant)
    assert torch.equal(drafted[0], tokens[0])


def other_modes_give_the_same_tokens(name, mode):
    family = family_for(name)
    tokens, out, _ = cell(name, family)
    method = method_of(name, family)
    if mode == "static":
        got, own, _ = decode(family, method, cache_implementation="static")
        assert_scores(scores(own), scores(out))
        assert torch.equal(got, tokens)
    else:
        got, *_ = decode(family, method, num_beams=3, num_return_sequences=2)
        assert torch.equal(got[::2], decode(family, method, num_beams=3)[0])


def runs_in_inference_mode(name):
    """As evaluation harnesses call it; what a method changes for a call must come back there too."""
    family = family_for(name)
    with torch.inference_mode():
        tokens, *_ = decode(family, method_of(name, family))
    assert torch.equal(tokens, cell(name, family)[0])
    assert not any(parameter.is_inference() for parameter in tiny(family).model.parameters())


def adds_to_vcd(name):
    """The sum's views are its parts' views, and its scores their terms, for every method that can be added."""
    vcd = load("vcd")(alpha=0.5)
    own = method_of(name, "llava") if name != "vcd" else load("ritual")()
    tokens, out, run = decode("llava", vcd + own)
    assert torch.equal(tokens, decode("llava", vcd + own, execution="sequential")[0])
    parts = [decode("llava", method)[2] for method in (vcd, own)]
    assert run.views - 1 == sum(part.views - 1 for part in parts)
    changed = own.owns in ("the attention of view 0", "the hidden states of view 0")
    if not changed and run.views > 2:
        told = retold("llava", vcd + own, range(3), tokens)
        assert_scores(told.transpose(0, 1), scores(out), atol=3e-5)


def detached_equals_untouched(family):
    zoo = tiny(family)
    inputs = zoo.batch(batch(family))
    parts = list(zoo.model.modules())

    def state():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in parts]
        attention = [attention_of(m.config) for m in parts if hasattr(m, "config")]
        return (
            hooks,
            attention,
            [set(m.__dict__) for m in parts],
            {k: v.clone() for k, v in zoo.model.state_dict().items()},
        )

    # transformers puts its own hooks, once and for all, where hidden states are first asked for.
    zoo.model.generate(**inputs, max_new_tokens=1, output_hidden_states=True, return_dict_in_generate=True)
    before, plain = state(), decode(family, None)[0]
    for name in NAMES:
        if refusal(name, family) is None:
            decode(family, method_of(name, family), rows=[0])
    # Also after an exception in the middle of a call.
    attach(zoo.model, method_of("pai", family), processor=zoo.processor)
    with pytest.raises(ZeroDivisionError):
        zoo.model.generate(**inputs, max_new_tokens=2, logits_processor=[lambda ids, s: 1 / 0])
    detach(zoo.model)
    after = state()
    assert before[:3] == after[:3]
    assert all(torch.equal(value, after[3][key]) for key, value in before[3].items())
    assert torch.equal(decode(family, None)[0], plain)
