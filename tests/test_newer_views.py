"""Views and branches of the methods of 2025 and 2026: LayerCD, MoD, CRoPS, ONLY, CausalMM, CICD."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from contract import pool
from helpers import spelled_logits
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, CLIPImageProcessor, DynamicCache

from lvlm_decode.engine import hf
from lvlm_decode.engine.run import Run
from lvlm_decode.errors import InputError, MissingFileError, ParameterError, UnknownNameError, UnsupportedError
from lvlm_decode.method import BELOW, Step
from lvlm_decode.methods.causalmm import CausalMM, edited
from lvlm_decode.methods.cicd import CICD, another, filling, pictures_of, read
from lvlm_decode.methods.crops import CRoPS
from lvlm_decode.methods.layercd import LayerCD
from lvlm_decode.methods.m3id import M3ID
from lvlm_decode.methods.mod import MoD, divergence
from lvlm_decode.methods.only import ONLY, textual
from lvlm_decode.methods.plain import Mask
from lvlm_decode.methods.sid import SID
from lvlm_decode.methods.vcd import VCD
from lvlm_decode.testing.models import IMAGE, tiny

B, T, N = 2, 3, 12


def step(views: int, weights=(), seed=0, scale=2.0) -> Step:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(views, B, T, N, generator=generator)
    return Step(logits, torch.tensor([[0, 1, 2], [40, 41, 42]]), tuple(weights))


def assert_scores(method, given: Step, literal) -> None:
    """``literal(b, t, logits (V, N))`` gives the scores of one position, -inf where the mask removes a token."""
    out = method.scores(given)
    for b in range(B):
        for t in range(T):
            logits = given.logits[:, b, t]
            want = literal(b, t, logits)
            below = logits[0] - logits[0].max() - BELOW
            torch.testing.assert_close(out[b, t], torch.where(want == -math.inf, below, want), atol=1e-5, rtol=1e-5)


def masked(scores: Tensor, main: Tensor, beta: float) -> Tensor:
    p = main.softmax(-1)
    return torch.where(p >= beta * p.max(), scores, -math.inf)


def run_of(family, method, texts=("is it a dog?",), **more) -> Run:
    zoo = tiny(family)
    return Run(zoo.model, method, zoo.inputs(list(texts), **more), processor=zoo.processor, seed=0)


# --- LayerCD


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("layer", [1, 2])
def test_layercd_reads_the_encoder_where_the_model_is_told_to_read_it(family, layer):
    zoo = tiny(family)
    inputs = zoo.inputs(["is it a dog?", "ab"])
    run = Run(zoo.model, LayerCD(layer=layer), inputs, processor=zoo.processor, seed=0)
    sizes = {"image_sizes": inputs["image_sizes"]} if family == "llava_next" else {}
    with torch.no_grad():
        want = zoo.model.get_image_features(inputs["pixel_values"], vision_feature_layer=layer, **sizes).pooler_output
    for row in range(2):
        image, own = run.samples[1][row].images[0].features, run.samples[0][row].images[0].features
        torch.testing.assert_close(image, want[row])
        # The model's own layer is the last but one of three.
        assert torch.equal(image, own) == (layer == 2)


@pytest.mark.parametrize("family", ["instructblip", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl", "gemma3"])
def test_layercd_with_the_last_layer_is_the_models_own_view(family):
    last = len(run_of(family, LayerCD()).family.vision_layers())
    for layer in (1, last):
        run = run_of(family, LayerCD(layer=layer))
        early, own = run.samples[1][0].images[0], run.samples[0][0].images[0]
        assert torch.allclose(early.features, own.features, atol=1e-6) == (layer == last)
        assert all(map(torch.equal, early.deep, own.deep))


def test_layercd_needs_a_layer_that_there_is():
    with pytest.raises(UnsupportedError, match="layer = 4, and the vision encoder has 3 layers"):
        run_of("llava", LayerCD(layer=4))


# --- MoD


def nats(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon divergence, term by term."""
    total = 0.0
    for a, b in zip(p.tolist(), q.tolist()):
        a, b = (min(max(x, 5e-8), 1 - 5e-8) for x in (a, b))
        total += 0.5 * a * math.log(2 * a / (a + b)) + 0.5 * b * math.log(2 * b / (a + b))
    return total


def test_mod_divergence():
    a, b = step(2, scale=8.0).logits
    got = divergence(a, b)
    want = torch.tensor([[nats(a[i, j].softmax(-1), b[i, j].softmax(-1)) for j in range(T)] for i in range(B)])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert divergence(a, a).abs().max() < 1e-6 and got.max() <= math.log(2) + 1e-4


@pytest.mark.parametrize("weight", [4.0, -1.0])
def test_mod_keeps_what_the_first_token_decided(weight):
    given = step(2, weights=[weight])

    def literal(b, t, z):
        return masked(z[0] + 4 * z[1] if weight > 0 else 2 * z[0] - z[1], z[0], 0.5)

    assert_scores(MoD(), given, literal)


def test_mod_decides_every_token_when_asked():
    given, kinds = step(2, weights=[1.0]), set()
    method = MoD(gate="token", positive=3.0, negative=0.5, beta=0.2, threshold=0.4)

    def literal(b, t, z):
        agree = nats(z[0].softmax(-1), z[1].softmax(-1)) < 0.4
        kinds.add(agree)
        return masked(z[0] + 3 * z[1] if agree else 1.5 * z[0] - 0.5 * z[1], z[0], 0.2)

    assert_scores(method, given, literal)
    assert kinds == {True, False}
    without_image = step(2, weights=[torch.tensor([1.0, 0.0])])
    assert torch.equal(method.combine(without_image)[1], without_image.logits[0, 1])


@pytest.mark.parametrize("share,kept", [(0.2, 4), (0.25, 4), (1.0, 16)])
def test_mod_leaves_the_features_of_the_most_attended_tokens(share, kept):
    run = run_of("llava", MoD(share=share), ["is it a dog?", "ab"])
    attention, images, _ = run.batch.once("attention to the prompt", None)
    for row in range(2):
        total = attention[:, row][:, images[row]].sum(0)
        most = total.topk(kept).indices
        want = torch.zeros_like(run.samples[0][row].images[0].features)
        want[most] = run.samples[0][row].images[0].features[most]
        torch.testing.assert_close(run.samples[1][row].images[0].features, want)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_mod_weighs_every_sample_by_its_own_first_token(family):
    texts, images = ["is it a dog?", "ab", "no", "a", "zebra"], [1, 0, 1, 1, 1]
    decided = set()
    for threshold in (0.01, 0.05, 0.2):
        run = run_of(family, MoD(threshold=threshold, share=0.3), texts, images=images)
        with torch.no_grad():
            run.open().prefill()
        main, branch = run.lanes.last_step.logits[:, :, 0]
        weights = [view for view in run._weights[0]]
        for row in range(5):
            own = nats(main[row].softmax(-1), branch[row].softmax(-1))
            assert weights[row] == (0.0 if not images[row] else 4.0 if own < threshold else -1.0)
        decided.add(tuple(weights))
    assert len(decided) > 1


def test_mod_has_an_image_free_sample_alone():
    run = run_of("llava", MoD(), ["ab"], images=0)
    assert run.weights(1) == (0.0,) and not (run.samples[1][0].input_ids == IMAGE).any()


# --- CRoPS


def test_crops_formula_is_two_contrasts_one_of_which_grows():
    given, gated = step(3, weights=[1.0, 1.0], scale=3.0), set()

    def literal(b, t, z):
        p = z[0].softmax(-1)
        kept = z[0].masked_fill(p < 0.1 * p.max(), -math.inf)
        gated.add(bool(kept.softmax(-1).max() > 0.9))
        if kept.softmax(-1).max() > 0.9:
            return kept
        seen, blind, few = kept.log_softmax(-1), z[1].log_softmax(-1), z[2].log_softmax(-1)
        growth = math.exp(0.05 * (int(given.positions[b, t]) + 1)) - 1
        language = seen + growth * (seen - blind)
        out = (1 + 0.7) * language - 0.7 * few
        # The authors' log-probabilities and these logits differ by a constant of the position.
        best = int(kept.argmax())
        raw = z[0] + 1.7 * growth * (z[0] - z[1]) + 0.7 * (z[0] - z[2])
        return out + (raw[best] - out[best])

    assert_scores(CRoPS(decay=0.05, alpha=0.7, gate=0.9), given, literal)
    assert gated == {True, False}


def test_crops_is_m3id_and_sid_where_one_branch_is_off():
    given = step(3, weights=[1.0, 1.0])
    m3id = M3ID(decay=0.1).scores(step_of(given, 1)).softmax(-1)
    torch.testing.assert_close(CRoPS(decay=0.1, alpha=0.0, gate=None).scores(given).softmax(-1), m3id)
    sid = SID(alpha=0.8).scores(step_of(given, 2, weight=-0.8))
    torch.testing.assert_close(CRoPS(decay=0.0, alpha=0.8, gate=None).scores(given), sid)
    assert torch.equal(CRoPS(gate=1e-9).scores(given), Mask(beta=0.1).scores(given))
    capped = CRoPS(decay=0.1, cap=0.0, alpha=0.0, gate=None, beta=None).scores(given)
    assert torch.equal(capped, given.logits[0])
    for long in (CRoPS(), CRoPS(decay=5.0)):
        assert not long.scores(Step(given.logits, given.positions * 10_000, given.weights)).isnan().any()


def step_of(given: Step, view: int, weight: float = 0.0) -> Step:
    return Step(given.logits[[0, view]], given.positions, (weight,))


def test_crops_keeps_more_words_as_the_answer_grows():
    kept = CRoPS().words_kept(torch.tensor([1.0, 2.0, 100.0, 512.0, 1e6]))
    assert kept.tolist() == [10, 10, 12, 22, 40]


def spelled(inputs, tokens: Tensor, rank_layer: int, keep) -> Tensor:
    """(steps, N) logits of one unpadded row whose later layers see few slots, with all scores spelled out.

    Args:
        keep: (last row of attention (S,), images (S,) bool, number of the token from 1) -> the slots (S,) bool that are left.
    """
    model = copy.deepcopy(tiny("llava").model)
    prompt = inputs["input_ids"][0] == IMAGE
    left = {}

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        q, slots = query.shape[2], key.shape[2]
        causal = torch.ones(q, slots, dtype=torch.bool).tril(slots - q)
        if module.layer_idx > rank_layer:
            causal = causal & left["slots"]
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~causal, torch.finfo(query.dtype).min)
        weights = scores.softmax(-1)
        if module.layer_idx == rank_layer:
            images = torch.zeros(slots, dtype=torch.bool)
            images[: len(prompt)] = prompt
            left["slots"] = keep(weights[0, :, -1].mean(0), images, slots - len(prompt) + 1)
        return (weights @ value).transpose(1, 2), None

    return spelled_logits(model, "lvlm_decode_test_thinned", attend, inputs, tokens)


def traced(method, texts, tokens: int = 5):
    """(steps, V, N) logits of the first row of a padded batch, and the tokens it generated."""
    zoo = tiny("llava")
    run = Run(zoo.model, method, zoo.inputs(list(texts)), processor=zoo.processor, seed=0)
    seen, chosen = [], []
    with torch.no_grad(), run.method.patch(run):
        lanes = run.open()
        scores, _ = lanes.prefill()
        for _ in range(tokens):
            seen.append(lanes.last_step.logits[:, 0, -1])
            chosen.append(scores[:, -1].argmax(-1, keepdim=True))
            scores, _ = lanes.extend(chosen[-1])
    return torch.stack(seen), torch.cat(chosen, 1)[0]


@pytest.mark.parametrize("texts", [("is it a dog?", "ab"), ("a dog", "is it a dog?")], ids=["longest", "padded"])
def test_crops_thins_what_later_layers_see(texts):
    """Rows that are left nothing to see attend to all slots alike, as under the authors' mask; the fixture has such rows."""
    method = CRoPS(text_tokens=(1, 7), text_rate=0.1, share=0.25)
    logits, tokens = traced(method, texts)
    blind = []

    def words(last, images, t):
        keep = math.floor(1 + 6 * (1 - math.exp(-0.1 * t)))
        slots = torch.zeros_like(images)
        slots[last.argsort(stable=True)[:keep]] = True
        blind.append(int(slots.nonzero()[0]))
        return slots

    def few(last, images, t):
        slots = ~images
        slots[last.masked_fill(~images, math.inf).argsort(stable=True)[: round(0.25 * int(images.sum()))]] = True
        return slots

    inputs = tiny("llava").inputs(texts[:1])
    ids = inputs["input_ids"][:, inputs["input_ids"][0] != IMAGE]
    torch.testing.assert_close(logits[:, 1], spelled({"input_ids": ids}, tokens[:-1], 1, words), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits[:, 2], spelled(inputs, tokens[:-1], 1, few), atol=2e-5, rtol=1e-4)
    assert blind[0] > 0 or texts[0] != "is it a dog?"
    plain = spelled(inputs, tokens[:-1], 1, lambda last, images, t: torch.ones_like(images))
    torch.testing.assert_close(logits[:, 0], plain, atol=2e-5, rtol=1e-4)
    assert (logits[:, 2] - plain).abs().amax(-1).min() > 1e-2


def test_crops_leaves_rows_without_an_image_alone():
    run = run_of("llava", CRoPS(beta=None, text_tokens=(1, 1)), ["is it a dog?", "ab"], images=[0, 1])
    with torch.no_grad(), run.method.patch(run):
        scores, _ = run.open().prefill()
    main = run.lanes.last_step.logits[0]
    assert torch.equal(scores[0], main[0]) and not torch.equal(scores[1], main[1])


def test_crops_needs_a_layer_after_the_one_that_ranks():
    run = run_of("llava", CRoPS(rank_layer=3))
    with pytest.raises(UnsupportedError, match="rank_layer = 3"):
        run.method.patch(run)


# --- ONLY, and views of partial depth


def literal_heads(attention: Tensor, words: Tensor, image: Tensor) -> Tensor:
    """(H, S) what ONLY leaves of one row's attention (H, S); the segments (S,) bool."""
    out, ratios = attention.clone(), []
    for head in out:
        for segment in (words, image):
            own = head[segment]
            own[own > own.mean() + own.std()] = 0.0
            head[segment] = own
        entropies = []
        for segment in (words, image):
            share = head[segment] / head[segment].sum()
            entropies.append(float(-(share * (share + 1e-6).log()).sum()))
        ratios.append(entropies[0] / entropies[1])
    for head, ratio in zip(out, ratios):
        if ratio < sum(ratios) / len(ratios):
            head.zero_()
    return out


def test_only_takes_outliers_and_the_heads_that_read_the_image_out_of_the_attention():
    scores = 3 * torch.randn(2, 4, 3, 20, generator=torch.Generator().manual_seed(1))
    attention = scores.softmax(-1)
    image = torch.zeros(1, 1, 1, 20, dtype=torch.bool)
    image[..., 5:13] = True
    words = ~image
    words[..., 0] = False
    got = textual(attention, words, image)
    for row in range(2):
        for query in range(3):
            want = literal_heads(attention[row, :, query], words[0, 0, 0], image[0, 0, 0])
            torch.testing.assert_close(got[row, :, query], want)
    assert 0 < (got.sum(-1) == 0).float().mean() < 1, "some heads are left, and some are not"
    assert torch.equal(got[..., 0][got.sum(-1) > 0], attention[..., 0][got.sum(-1) > 0]), "the begin token stays"
    flat = torch.full((1, 2, 1, 20), 0.05)
    torch.testing.assert_close(textual(flat, words, image), flat)


@pytest.mark.parametrize("gamma", [0.0, 0.7, 2.1])
def test_only_adds_where_the_branch_is_near_and_subtracts_elsewhere(gamma):
    given, near = step(2, weights=[1.0], scale=1.0), set()

    def literal(b, t, z):
        branch = 0.5 * z[0] + z[1]
        distance = float((z[0].softmax(-1) - branch.softmax(-1)).abs().sum())
        near.add(distance < gamma)
        return masked(z[0] + 3 * branch if distance < gamma else 2 * z[0] - branch, z[0], 0.1)

    assert_scores(ONLY(gamma=gamma), given, literal)
    assert near == {0.0: {False}, 0.7: {True, False}, 2.1: {True}}[gamma]
    alone = step(2, weights=[torch.tensor([1.0, 0.0])])
    assert torch.equal(ONLY().combine(alone)[1], alone.logits[0, 1])


@pytest.mark.parametrize("texts", [("is it a dog?", "ab"), ("ab", "is it a dog?")], ids=["longest", "padded"])
@pytest.mark.parametrize("layer,normed", [(0, True), (1, False)])
def test_only_ends_its_branch_in_the_last_layers_mlp(texts, layer, normed):
    logits, tokens = traced(ONLY(layer=layer, normed=normed), texts)
    model = copy.deepcopy(tiny("llava").model)
    inputs = tiny("llava").inputs(texts[:1])
    prompt, layers, seen = inputs["input_ids"][0] == IMAGE, model.model.language_model.layers, {}

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        q, slots = query.shape[2], key.shape[2]
        causal = torch.ones(q, slots, dtype=torch.bool).tril(slots - q)
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~causal, -torch.inf).softmax(-1)
        if module.layer_idx == layer:
            image = torch.zeros(slots, dtype=torch.bool)
            image[: len(prompt)] = prompt
            words = ~image
            words[0] = False
            heads = literal_heads(weights[0, :, -1], words, image)[:, None] @ value[0]
            seen["o"] = module.o_proj(heads.flatten())
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("lvlm_decode_test_only", attend)
    AttentionMaskInterface.register("lvlm_decode_test_only", AttentionMaskInterface()["sdpa"])
    model.model.language_model.config._attn_implementation = "lvlm_decode_test_only"
    layers[-1].register_forward_pre_hook(lambda module, args: seen.__setitem__("x", args[0][0, -1]))
    cache = DynamicCache(config=model.config.get_text_config())
    want = []
    with torch.no_grad():
        for given in [inputs, *({"input_ids": token.view(1, 1)} for token in tokens[:-1])]:
            model(**given, **hf.with_cache(cache))
            z = 0.2 * seen["x"] + (layers[-1].input_layernorm(seen["o"]) if normed else seen["o"])
            z = z + layers[-1].mlp(layers[-1].post_attention_layernorm(z))
            want.append(model.lm_head(model.model.language_model.norm(z)))
    torch.testing.assert_close(logits[:, 1], torch.stack(want), atol=2e-5, rtol=1e-4)
    assert (logits[:, 1] - logits[:, 0]).abs().amax(-1).min() > 1e-2


def test_a_branch_has_no_row_and_no_keys():
    run = run_of("llava", ONLY() + VCD(), ["is it a dog?", "ab"])
    with torch.no_grad(), run.method.patch(run):
        lanes = run.open()
        lanes.prefill()
        assert lanes.last_step.logits.shape[:2] == (3, 2) and lanes.main.kv.rows == 2 * 2
        assert run.branches and not run_of("llava", VCD()).branches
    assert not run.branches and not run.edits


def test_only_scores_all_positions_that_are_asked_for():
    """A prefill may be asked for the scores of its last positions; the branch answers for each."""
    run = run_of("llava", ONLY(), ["is it a dog?", "ab"])
    with torch.no_grad(), run.method.patch(run):
        run.open().prefill(keep=3)
        several = run.lanes.last_step.logits
        run.open().prefill()
        torch.testing.assert_close(several[:, :, -1:], run.lanes.last_step.logits)
    assert several.shape[2] == 3 and (several[1, :, 0] - several[1, :, 2]).abs().max() > 1e-2


def test_only_begins_before_the_last_layer():
    run = run_of("llava", ONLY(layer=3))
    with pytest.raises(UnsupportedError, match="layer = 3 is not before the last layer"):
        run.method.patch(run)


# --- CausalMM


@pytest.mark.parametrize("form", ["uniform", "reversed"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_causalmm_weighs_patches_by_edited_attention(family, form):
    """Against the encoder's own eager attention and states; of LLaVA-NeXT the features are tiles put together, so the whole
    is computed by the model from an encoder whose layer puts out the weighed states."""
    run = run_of(family, CausalMM(form=form), ["is it a dog?", "ab"])
    inputs = tiny(family).inputs(["is it a dog?", "ab"])
    model = copy.deepcopy(tiny(family).model)
    encoder = model.get_encoder(modality="image")
    encoder.config._attn_implementation = "eager"
    pixels = inputs["pixel_values"].flatten(0, -4)
    with torch.no_grad():
        out = encoder(pixels, output_attentions=True, output_hidden_states=True)
        attention, states = out.attentions[-2], out.hidden_states[-2]
        patches = states.shape[1] - 1
        side = round(patches**0.5)
        if form == "uniform":
            weights = torch.full((len(states), patches), 1 / (patches + 1))
        else:
            turned = attention.amax((2, 3), keepdim=True) - attention
            resize = torch.nn.functional.interpolate(turned, size=(side, side), mode="bilinear", align_corners=False)
            weights = resize.mean(1).flatten(1)
        weighed = torch.cat([states[:, :1], states[:, 1:] * weights[..., None]], 1)
        if family == "llava":
            want = [model.model.multi_modal_projector(one[1:]) for one in weighed]
        else:
            encoder.encoder.layers[-2].forward = lambda *args, **kwargs: given["states"]
            # Tiles of zeros fill an image up; the model leaves them out.
            real = inputs["pixel_values"].flatten(2).abs().sum(-1) > 0
            given = {"states": weighed[real.flatten()]}
            want = model.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"]).pooler_output
    for row in range(2):
        features = run.samples[1][row].images[0].features
        torch.testing.assert_close(features, want[row], atol=1e-5, rtol=1e-4)
        assert (features - run.samples[0][row].images[0].features).abs().max() > 1e-2


def test_causalmm_shuffles_every_head_with_the_samples_own_generator():
    attention = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    got = edited(attention, "shuffle", torch.Generator().manual_seed(7))
    again = torch.Generator().manual_seed(7)
    for head in range(3):
        order = torch.randperm(25, generator=again)
        assert torch.equal(got[:, head].flatten(1), attention[:, head].flatten(1)[:, order])
    drawn = edited(attention, "random", torch.Generator().manual_seed(7))
    assert 0 <= drawn.min() < 0.5 and 1.5 < drawn.max() <= 2
    one, other = (
        run_of("llava", CausalMM(), ["is it a dog?", "ab"]).samples[1][1].images[0].features for _ in range(2)
    )
    alone = Run(tiny("llava").model, CausalMM(), tiny("llava").inputs(["ab"], seed=1), processor=None, seed=0)
    assert torch.equal(one, other)
    torch.testing.assert_close(alone.samples[1][0].images[0].features, one)


# --- CICD


@pytest.fixture
def paint(tmp_path):
    """Writes a picture of so many pixels, noise of a seed, and gives its path."""

    def write(name: str, seed: int, size=(40, 28), folder=tmp_path):
        drawn = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(drawn).save(folder / name)
        return folder / name

    return write


def test_cicd():
    method = CICD(images="unread", alpha=2.0, beta=0.02, threshold=0.05)
    contrasted = []

    def literal(b, t, logits):
        main, other = logits
        p, q = main.softmax(-1), other.softmax(-1)
        m = (p + q) / 2
        d = min(1.0, float(0.5 * (m * (m / p).log()).sum() + 0.5 * (m * (m / q).log()).sum()))
        a = min(2.0, 1 - math.log10(d)) if d > 0.05 else 0.0
        contrasted.append(a)
        return masked((1 + a) * main - a * other, main, 0.02)

    for scale in (0.4, 1.2, 3.0):
        assert_scores(method, step(2, (1.0,), scale=scale), literal)
    assert {0.0, 2.0} < set(contrasted), "all three ranges of the divergence were met"


def test_cicd_is_the_authors_loop():
    """What their sampling loop made of these logits: one far pair, one near, and one that its gate holds back."""
    k = torch.arange(8.0)
    main = 3 * k.sin()
    near = main + 0.3 * k.cos()
    low = -math.inf
    for other, threshold, beta, want in (
        (3 * k.cos(), 1e-4, 0.1, [low, 3.57089, 7.33344, low, low, low, low, 1.63420]),
        (near, 1e-4, 0.02, [-0.9, 2.03814, 3.10242, 1.31435, low, low, -1.70240, 1.29245]),
        (near, 0.1, 0.02, [0.0, 2.52441, 2.72789, 0.42336, low, low, -0.83825, 1.97096]),
    ):
        given = Step(torch.stack([main, other])[:, None, None], torch.tensor([[0]]), (1.0,))
        out = CICD(images="unread", beta=beta, threshold=threshold).scores(given)[0, 0]
        kept = torch.tensor(want) > low
        assert torch.equal(out > main.max() - main.max() - BELOW / 2, kept)
        torch.testing.assert_close(out[kept], torch.tensor(want)[kept], atol=1e-5, rtol=1e-5)


def test_cicd_with_banned_tokens_and_equal_images():
    main = torch.randn(1, 1, N, generator=torch.Generator().manual_seed(0))
    main[..., 3] = -math.inf
    for other in (main, main.roll(1, -1)):
        given = Step(torch.stack([main, other]), torch.tensor([[0]]), (1.0,))
        out = CICD(images="unread", beta=None).scores(given)
        assert torch.isfinite(out[..., :3]).all() and out[0, 0, 3] == -math.inf
        if other is main:
            torch.testing.assert_close(out, main)


def test_cicd_shows_a_picture_of_the_pool():
    """The view's pixels are one of the pool's, the one the sample's own generator draws, alone and in a batch."""
    zoo = tiny("llava")
    texts = ["is it", "ab", "what is it?", "no"]
    method = CICD(images=pool())
    run = run_of("llava", method, texts)
    seen = [run.samples[1][row].vision["pixel_values"] for row in range(len(texts))]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in run.family.pixel_statistics)
    pictures = [(filling(read(path)[0], 28, 28) - mean) / std for path in pictures_of(pool())]
    found = [
        next(i for i, picture in enumerate(pictures) if torch.allclose(own[0], picture, atol=1e-5)) for own in seen
    ]
    assert len(set(found)) > 1, "each sample draws its own"
    for row, text in enumerate(texts):
        alone = Run(zoo.model, method, zoo.inputs([text], seed=row), processor=zoo.processor, seed=0)
        assert torch.equal(alone.samples[1][0].vision["pixel_values"], seen[row])


def test_cicd_leaves_a_row_without_image_alone():
    run = run_of("llava", CICD(images=pool(), beta=None), ["ab", "is it"], images=[0, 1])
    with torch.no_grad():
        lanes = run.open()
        scores, main = lanes.prefill()[0][:, -1], lanes.last_step.logits[0][:, -1]
    torch.testing.assert_close(scores[0], main[0])
    assert (scores[1] - main[1]).abs().max() > 1e-2


def test_cicd_passes_over_the_samples_own_picture(paint):
    own, other = paint("own.png", 1), paint("other.png", 2)
    shown = filling(read(own)[0], 28, 28)[None]
    assert torch.equal(another([own, other])(shown), filling(read(other)[0], 28, 28)[None])
    assert torch.equal(another([other, own])(shown), filling(read(other)[0], 28, 28)[None])
    with pytest.raises(InputError, match="none of the 1 pictures of the pool is another than the sample's own"):
        another([own])(shown)


def squashed(picture):
    return picture.resize((28, 28), Image.Resampling.BICUBIC)


def framed(picture):
    return ImageOps.pad(picture, (28, 28), Image.Resampling.BICUBIC, color=(122, 116, 104))


def stretched(picture):
    """To sides that a patch divides, as Qwen's processor does."""
    return picture.resize((56, 28), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("shape", [squashed, framed, stretched])
@pytest.mark.parametrize("size", [(60, 40), (40, 60)], ids=["wide", "high"])
def test_cicd_knows_the_samples_own_picture_in_every_shape(paint, shape, size):
    own, other = paint("own.png", 1, size), paint("other.png", 2, size)
    with Image.open(own) as picture:
        shown = torch.tensor(np.array(shape(picture))).permute(2, 0, 1)[None].float() / 255
    # A tile of the picture stands before the whole one.
    for seen in (shown, torch.stack([torch.rand_like(shown), shown], 1)):
        assert torch.equal(another([own, other])(seen), another([other])(seen))
        with pytest.raises(InputError, match="is another than the sample's own"):
            another([own])(seen)


@pytest.mark.parametrize("turn", [True, False], ids=["turned", "as stored"])
def test_cicd_reads_which_way_is_up(paint, tmp_path, turn):
    noted, other = Image.Exif(), paint("other.png", 2)
    noted[ExifTags.Base.Orientation] = 6
    with Image.open(paint("own.png", 1)) as picture:
        picture.save(tmp_path / "own.jpg", exif=noted, quality=95)
        picture.save(tmp_path / "plain.jpg", quality=95)
    upright = read(tmp_path / "plain.jpg")[0].rot90(-1, (1, 2))
    assert torch.equal(read(tmp_path / "own.jpg")[0], upright)
    shown = filling(read(tmp_path / "own.jpg")[0 if turn else 1], 28, 28)[None]
    assert torch.equal(another([tmp_path / "own.jpg", other])(shown), another([other])(shown))


@pytest.mark.parametrize("size", [(60, 31), (31, 60), (28, 28)], ids=["wide", "high", "as it is"])
def test_cicd_cuts_a_picture_as_clip_does(paint, size):
    path = paint("a.png", 3, size)
    how = dict(do_normalize=False, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    with Image.open(path) as picture:
        want = CLIPImageProcessor(**how)(images=picture, return_tensors="pt")["pixel_values"][0]
    assert (filling(read(path)[0], 28, 28) - want).abs().mean() < 0.01
    assert filling(read(path)[0], 20, 44).shape == (3, 20, 44)


def test_cicd_pools(paint, tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir()
    with pytest.raises(ParameterError, match="a folder of pictures, or the paths of some"):
        CICD()
    with pytest.raises(InputError, match="holds no picture"):
        run_of("llava", CICD(images=folder))
    with pytest.raises(MissingFileError, match=r"nowhere is missing; give a folder of pictures"):
        run_of("llava", CICD(images=tmp_path / "nowhere"))
    (folder / "a.txt").write_text("no picture")
    paint("b.png", 1, folder=folder)
    paint("a.png", 2, folder=folder)
    assert [path.name for path in pictures_of(folder)] == ["a.png", "b.png"]
    # What macOS writes beside a picture.
    (folder / "._b.png").write_bytes(b"hidden")
    assert [path.name for path in pictures_of(folder)] == ["a.png", "b.png"]
    (folder / "a.png").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"a\.png cannot be read as a picture .* take it out of images"):
        run_of("llava", CICD(images=(folder / "a.png",)))


def test_cicd_passes_over_what_cannot_be_read(paint, tmp_path):
    own, other, cut = paint("own.png", 1), paint("other.png", 2), tmp_path / "cut.png"
    cut.write_bytes(other.read_bytes()[:200])
    shown = filling(read(own)[0], 28, 28)[None]
    with pytest.warns(UserWarning, match=r"cut\.png cannot be read .* Another picture takes its place"):
        assert torch.equal(another([cut, other])(shown), another([other])(shown))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            another([own, cut, other])(shown)
    assert len(said) == 1
    with pytest.raises(InputError, match="1 of 2 pictures, and the rest are the sample's own"):
        another([cut, own])(shown)


def test_cicd_opens_one_picture_a_sample(monkeypatch):
    opened, open_ = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or open_(path))
    run_of("llava", CICD(images=pool()), ["ab", "is it"])
    assert len(opened) == 2


def test_cicd_has_no_cd_alpha():
    assert CICD(images="unread", cd_beta=0.2).beta == 0.2
    with pytest.raises(UnknownNameError, match="no parameter 'cd_alpha'"):
        CICD(images="unread", cd_alpha=1.0)
