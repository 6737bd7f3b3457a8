"""Views and branches of the methods of 2025 and 2026: LayerCD, MoD."""

import math

import pytest
import torch
from torch import Tensor

from lvlm_decode.engine.run import Run
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.method import BELOW, Step
from lvlm_decode.methods.layercd import LayerCD
from lvlm_decode.methods.mod import MoD, divergence
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
