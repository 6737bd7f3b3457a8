"""SPIN, VAF, HGAI, CAI and ILVAD against the same model under plain eager attention, one unpadded row at a time."""

import copy
import math

import pytest
import torch
from helpers import spelled_logits
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from lvlm_decode import attach, detach
from lvlm_decode.engine import hf
from lvlm_decode.engine.attention import materialised
from lvlm_decode.errors import ParameterError, UnsupportedError
from lvlm_decode.method import Step
from lvlm_decode.methods.cai import CAI
from lvlm_decode.methods.hgai import HGAI
from lvlm_decode.methods.ilvad import ILVAD, log_factors
from lvlm_decode.methods.pai import PAI
from lvlm_decode.methods.spin import SPIN
from lvlm_decode.methods.vaf import VAF
from lvlm_decode.testing.models import IMAGE, tiny

LAYERS = range(1, 3)
TEXTS = [("ab", "is it a dog?"), ("is it a dog?", "ab")]
padded = pytest.mark.parametrize("texts", TEXTS, ids=["padded", "longest"])


def spelled(inputs, tokens: Tensor, edit=None, after=None, model=None) -> Tensor:
    """(steps, N) logits of one row that is fed ``tokens``, with all scores spelled out.

    Args:
        edit: (scores (H, q, S), images (S,) bool) changes the scores in LAYERS in place, before mask and softmax.
        after: (scores, weights, images) -> a factor per head (H,) on what the last row puts out.
    """
    model = copy.deepcopy(model or tiny("llava").model)
    prompt = inputs["input_ids"][0] == IMAGE

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * scaling
        q, slots = scores.shape[2:]
        images = torch.zeros(slots, dtype=torch.bool)
        images[: len(prompt)] = prompt
        inside = module.layer_idx in LAYERS
        if edit is not None and inside:
            edit(scores[0], images)
        weights = scores.masked_fill(~torch.ones(q, slots, dtype=torch.bool).tril(slots - q), -torch.inf).softmax(-1)
        out = (weights @ value).transpose(1, 2)
        if after is not None and inside:
            out[0, -1] *= after(scores[0, :, -1], weights[0, :, -1], images)[:, None]
        return out, None

    return spelled_logits(model, "lvlm_decode_test_spelled", attend, inputs, tokens)


def traced(method, texts, tokens: int = 5, model=None):
    """(steps, N) logits of the first row of a padded batch, and its tokens."""
    zoo = tiny("llava")
    model = model or zoo.model
    inputs = zoo.inputs(list(texts))
    attach(model, method, processor=zoo.processor)
    try:
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
    finally:
        detach(model)
    return torch.stack(out.logits)[:, 0], out.sequences[0, inputs["input_ids"].shape[1] :]


def assert_spelled(method, texts, **how) -> None:
    logits, tokens = traced(method, texts)
    inputs = tiny("llava").inputs(texts[:1])
    torch.testing.assert_close(logits, spelled(inputs, tokens[:-1], **how), atol=2e-5, rtol=1e-4)
    assert (logits - spelled(inputs, tokens[:-1])).abs().amax(-1).min() > 1e-2


@padded
@pytest.mark.parametrize("enhance,suppress", [(1.15, 0.95), (1.5, 0.5), (0.0, 1.0)])
def test_vaf_scales_what_the_words_after_the_image_attend_to(texts, enhance, suppress):
    def scale(scores, images):
        first, last = (int(images.nonzero()[i]) for i in (0, -1))
        q, slots = scores.shape[1:]
        for row in range(q):
            if slots - q + row > last:
                scores[:, row, first : last + 1] *= enhance
                scores[:, row, :first] *= suppress

    assert_spelled(VAF(enhance=enhance, suppress=suppress, layers=(1, 2)), texts, edit=scale)


@padded
def test_hgai_adds_the_heads_mean_to_the_newest_row(texts):
    def boost(scores, images):
        scores[:, -1, images] += 0.8 * scores[:, -1, images].abs().mean(0)

    assert_spelled(HGAI(alpha=0.8, layers=(1, 2)), texts, edit=boost)


@padded
@pytest.mark.parametrize("rank", ["scores", "attention"])
@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_spin_damps_the_heads_that_look_least(texts, rank, damp):
    def factor(scores, weights, images):
        looks = (scores if rank == "scores" else weights)[:, images].sum(-1)
        keep = looks.topk(2).indices
        out = torch.full((4,), damp)
        out[keep] = 1.0
        return out

    assert_spelled(SPIN(share=0.5, damp=damp, layers=(1, 2), rank=rank), texts, after=factor)


@padded
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_cai_tilts_towards_what_is_like_the_newest_word(texts, threshold):
    """Literally, on a copy of the model whose layers and attention are followed by the test's own code."""
    logits, tokens = traced(CAI(threshold=threshold, first_layer=1), texts)
    inputs = tiny("llava").inputs(texts[:1])
    model, state = copy.deepcopy(tiny("llava").model), {}
    decoder = model.model.language_model
    prompt = inputs["input_ids"][0] == IMAGE

    def read(module, args):
        h = args[0][0]
        if len(h) > 1:
            state["v"] = h[prompt]
            last = int(prompt.nonzero()[-1])
            t = h[last + 1 :].mean(0)
        else:
            t = h[0]
        cosine = torch.nn.functional.cosine_similarity(state["v"], t[None])
        state["s"], state["edit"] = torch.sigmoid(100 * (cosine - cosine.min())), set()

    def look(number, h):
        p = model.lm_head(decoder.norm(h[0, -1])).softmax(-1)
        if number in (1, 2) and -(p * p.log()).sum() / math.log(10) > threshold:
            state["edit"].add(number + 1)

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * scaling
        q, slots = scores.shape[2:]
        if module.layer_idx in state["edit"]:
            own = scores[0, :, -1, : len(prompt)][:, prompt]
            scores[0, :, -1, prompt.nonzero()[:, 0]] = own + own.abs() * state["s"]
        seen = torch.ones(q, slots, dtype=torch.bool).tril(slots - q)
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("lvlm_decode_test_cai", attend)
    AttentionMaskInterface.register("lvlm_decode_test_cai", AttentionMaskInterface()["sdpa"])
    decoder.config._attn_implementation = "lvlm_decode_test_cai"
    decoder.layers[0].register_forward_pre_hook(read)
    for number, layer in enumerate(decoder.layers):
        layer.register_forward_hook(lambda m, a, h, number=number: look(number, h))
    cache, want, edited = DynamicCache(config=model.config.get_text_config()), [], []
    with torch.no_grad():
        for given in [inputs, *({"input_ids": token.view(1, 1)} for token in tokens[:-1])]:
            want.append(model(**given, **hf.with_cache(cache)).logits[0, -1])
            edited.append(frozenset(state["edit"]))
    torch.testing.assert_close(logits, torch.stack(want), atol=2e-5, rtol=1e-4)
    assert set(edited) == {frozenset({2, 3})} if not threshold else len(set(edited)) > 1


def test_cai_guides_as_pai_does():
    given = torch.randn(2, 2, 1, 9, generator=torch.Generator().manual_seed(0))
    step = Step(given, torch.zeros(2, 1, dtype=torch.long), (-0.5,))
    assert torch.equal(CAI(gamma=1.5).scores(step), PAI(gamma=1.5).scores(step))
    plain = spelled(tiny("llava").inputs(TEXTS[0][:1]), (told := traced(CAI(threshold=None), TEXTS[0]))[1][:-1])
    torch.testing.assert_close(told[0], plain, atol=2e-5, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="first_layer = 3 leaves no later layer"):
        traced(CAI(first_layer=3), TEXTS[0])


def literal_factors(attention: Tensor, alpha: float, tau: float) -> Tensor:
    """(n,) ILVAD's map, token by token and layer by layer."""
    layers, n = attention.shape
    comes, overall = torch.zeros(n), attention.mean(0)
    for j in range(n):
        before = None
        for layer in range(layers):
            high = bool(attention[layer, j] > tau * attention[layer].mean())
            comes[j] += before is False and high
            before = high
        comes[j] *= bool(overall[j] > overall.mean())
    comes = comes.clamp(comes.mean() - 3 * comes.std(), comes.mean() + 3 * comes.std())
    return (alpha * (comes - comes.min()) / (comes.max() - comes.min())).exp()


def test_ilvad_counts_how_often_attention_comes_back():
    attention = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) ** 3
    for tau in (1.2, 2.0):
        want = literal_factors(attention, 5.0, tau)
        torch.testing.assert_close(log_factors(attention, 5.0, tau).exp(), want)
        assert want.min() == 1 and want.max() == pytest.approx(math.exp(5.0), rel=1e-4)
    assert torch.equal(log_factors(attention, 5.0, 1e6), torch.zeros(40)), "where nothing stands out nothing is edited"


@padded
def test_ilvad_raises_what_the_first_words_looked_at(texts):
    """Both passes with all scores spelled out: what a plain answer looks at, and the edited rows of the answer."""
    alpha, tau, count = 3.0, 1.1, 4
    logits, tokens = traced(ILVAD(alpha=alpha, tau=tau, tokens=count, layers=(1, 2)), texts)
    model, inputs = copy.deepcopy(tiny("llava").model), tiny("llava").inputs(texts[:1])
    prompt = inputs["input_ids"][0] == IMAGE
    state = {"factors": None, "seen": [[] for _ in range(4)]}

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * scaling
        q, slots = scores.shape[2:]
        causal = torch.ones(q, slots, dtype=torch.bool).tril(slots - q)
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        own = weights[0, :, -1, : len(prompt)][:, prompt]
        if state["factors"] is None and q == 1:
            state["seen"][module.layer_idx].append(own[own.sum(-1).topk(2).indices].mean(0))
        elif state["factors"] is not None and module.layer_idx in LAYERS:
            grounded = (own * state["factors"].log()).sum(-1) / (own.sum(-1) + 1e-8)
            for head in grounded.topk(2).indices.tolist():
                row = weights[0, head, -1].clone()
                row[: len(prompt)][prompt] *= state["factors"]
                weights[0, head, -1] = row / row.sum()
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("lvlm_decode_test_ilvad", attend)
    AttentionMaskInterface.register("lvlm_decode_test_ilvad", AttentionMaskInterface()["sdpa"])
    model.model.language_model.config._attn_implementation = "lvlm_decode_test_ilvad"
    with torch.no_grad():
        model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=count)
        looked = torch.stack([torch.stack(rows).mean(0) for rows in state["seen"]])
        state["factors"] = literal_factors(looked, alpha, tau)
        cache, want = DynamicCache(config=model.config.get_text_config()), []
        for given in [inputs, *({"input_ids": token.view(1, 1)} for token in tokens[:-1])]:
            want.append(model(**given, **hf.with_cache(cache)).logits[0, -1])
    assert len(state["seen"][0]) == count - 1 and state["factors"].max() > 2
    torch.testing.assert_close(logits, torch.stack(want), atol=2e-5, rtol=1e-4)
    assert (logits - spelled(inputs, tokens[:-1])).abs().amax(-1).min() > 1e-3


def test_spin_ranks_by_scores_what_the_abstract_ranks_by_attention():
    """The two may keep other heads; a fixture on which they never did would not tell them apart."""
    by_scores, _ = traced(SPIN(share=0.5, damp=0.0, layers=(1, 2)), TEXTS[0])
    by_attention, _ = traced(SPIN(share=0.5, damp=0.0, layers=(1, 2), rank="attention"), TEXTS[0])
    assert (by_scores - by_attention).abs().max() > 1e-2


@pytest.mark.parametrize("method", [SPIN(share=1.0), SPIN(damp=1.0), HGAI(alpha=0.0), VAF(enhance=1.0, suppress=1.0)])
def test_switched_off_is_plain(method):
    logits, tokens = traced(method, TEXTS[0])
    plain = spelled(tiny("llava").inputs(TEXTS[0][:1]), tokens[:-1])
    torch.testing.assert_close(logits, plain, atol=2e-5, rtol=1e-4)


def test_hgai_of_equal_heads_is_pai():
    """Where all heads are copies of one, their mean score is each one's own."""
    model = copy.deepcopy(tiny("llava").model)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for name, heads in (("q_proj", 4), ("k_proj", 2)):
                weight = getattr(layer.self_attn, name).weight
                weight.copy_(weight[: len(weight) // heads].repeat(heads, 1))
    mean, tokens = traced(HGAI(alpha=0.5, layers=(1, 3)), TEXTS[1], model=model)
    own, same = traced(PAI(alpha=0.5, gamma=None, first_layer=1), TEXTS[1], model=model)
    assert torch.equal(tokens, same)
    torch.testing.assert_close(mean, own, atol=1e-5, rtol=1e-5)
    plain = spelled(tiny("llava").inputs(TEXTS[1][:1]), tokens[:-1], model=model)
    assert (mean - plain).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("method", [VAF(), SPIN()], ids=["vaf", "spin"])
def test_no_attention_row_is_computed_beside_sdpa(method):
    before = len(materialised)
    traced(method, TEXTS[0])
    assert len(materialised) == before


@pytest.mark.parametrize("method", [VAF, SPIN, HGAI])
def test_layers_that_the_model_does_not_have(method):
    with pytest.raises(UnsupportedError, match=r"layers = \(1, 4\) are not all layers of this model, which are 0 to 3"):
        traced(method(layers=(1, 4)), TEXTS[0])
    with pytest.raises(ParameterError, match="layers"):
        method(layers=(2, 1))
