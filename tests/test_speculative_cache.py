"""Tree masks and cache compaction: a verified tree says at every node what decoding its path says, and leaves no trace."""

import copy

import pytest
import torch
from transformers import Cache, cache_utils

from lvlm_decode.attachment import attach, detach
from lvlm_decode.engine import hf
from lvlm_decode.engine.run import Run
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.methods import parse
from lvlm_decode.speculative.cache_ops import accept_paths
from lvlm_decode.speculative.tree import Tree, chain_shape, shape_of
from lvlm_decode.testing import models as zoo


def opened(texts, method="vcd", static=False, dtype=torch.float64, family="llava", seed=3):
    tiny = zoo.tiny(family)
    model = copy.deepcopy(tiny.model).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs(texts, seed=seed).items()}
    run = Run(model, parse(method), inputs, processor=tiny.tokenizer, seed=0)
    cache = None
    if static:
        width = inputs["input_ids"].shape[1]
        cache = hf.KV.fixed(run.module, width + 40)
    lanes = run.open(cache)
    with torch.no_grad():
        lanes.prefill()
    return lanes


SHAPE = shape_of((-1, 0, 0, 1, 1, 2, 5))
TOKENS = [[20, 21, 22, 23, 24, 25, 26], [30, 31, 32, 33, 34, 35, 36]]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("texts", [["is it"], ["what is in it", "is it"]], ids=["one", "padded batch"])
@torch.no_grad()
def test_tree_scores_are_path_scores(texts, static):
    tokens = torch.tensor(TOKENS[: len(texts)])
    tree = Tree(tokens, (SHAPE,))
    lanes = opened(texts, static=static)
    scores, _ = lanes.extend(tokens, ancestors=tree.ancestors(), depth=tree.depths())
    for row in range(len(SHAPE)):
        alone = opened(texts)
        path, _ = alone.extend(tokens[:, SHAPE.path(row)])
        torch.testing.assert_close(scores[:, row], path[:, -1], atol=1e-5, rtol=0)


def states(lane, row):
    """Keys and values that one row of a lane sees, in order of its slots, with its position."""
    seen = torch.arange(lane.length) if lane.mask is None else lane.mask[row].nonzero().flatten()
    layers = [(layer.keys[row][:, seen], layer.values[row][:, seen]) for layer in lane.kv.cache.layers]
    return layers, lane.position.reshape(-1)[row]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "paths",
    [[[0, 2, 5, 6]], [[0, 1, 4]], [[0]], [[0, 1], [0, 2, 5, 6]], [[0, 2, 5], [0]], [[0, 1, 3], []]],
    ids=str,
)
@torch.no_grad()
def test_compaction_leaves_what_sequential_decoding_leaves(paths, static):
    texts = ["is it", "what is in it"][: len(paths)]
    tokens = torch.tensor(TOKENS[: len(paths)])
    tree = Tree(tokens, (SHAPE,))
    lanes = opened(texts, static=static)
    lanes.extend(tokens, ancestors=tree.ancestors(), depth=tree.depths())
    accept_paths(lanes, paths, len(SHAPE), chain=False)
    # And again with a chain, so that uneven rows meet a second verification.
    more = torch.tensor([[40, 41, 42], [50, 51, 52]])[: len(paths)]
    scores, _ = lanes.extend(more)
    again = [[0, 1] if path else [] for path in paths]
    again[0] = [0]
    accept_paths(lanes, again, 3, chain=True)
    for b, path in enumerate(paths):
        alone = opened([texts[b]], seed=3 + b)
        own = [TOKENS[b][row] for row in path]
        if own:
            alone.extend(torch.tensor([own]))
            expected, _ = alone.extend(more[b : b + 1])
            torch.testing.assert_close(scores[b : b + 1], expected, atol=1e-5, rtol=0)
            accept_paths(alone, [again[b]], 3, chain=True)
        assert int(lanes.generated[b]) == len(own) + len(again[b]) == int(alone.generated[0])
        for view in range(2):
            mine, position = states(lanes.main, view * len(paths) + b)
            theirs, other = states(alone.main, view)
            assert position == other
            for (k, v), (key, value) in zip(mine, theirs):
                torch.testing.assert_close(k, key, atol=1e-9, rtol=0)
                torch.testing.assert_close(v, value, atol=1e-9, rtol=0)


@torch.no_grad()
def test_uneven_batches_leave_no_holes():
    lanes = opened(["is it", "is it"], method="plain")
    base = lanes.main.length
    for turn in range(6):
        tokens = torch.full((2, 4), 20 + turn)
        lanes.extend(tokens)
        accept_paths(lanes, [[0, 1, 2, 3], [0]] if turn % 2 else [[0], [0, 1, 2, 3]], 4, chain=True)
    assert lanes.generated.tolist() == [15, 15] and lanes.main.length == base + 15 and lanes.main.mask is None


def test_caches_that_forget_are_refused():
    class Sliding:
        is_sliding = True

    class Windows:
        layers = (Sliding(),)
        crop = reorder_cache = None

    with pytest.raises(ValueError, match="layer 0 has a sliding window"):
        hf.KV(Windows()).check_rollback()


def test_caches_that_hold_more_than_keys_and_values_are_refused():
    """Cropping the keys of a quantized layer would only crop what is not quantized yet."""

    class Quantized(cache_utils.QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, tensor):
            return tensor

    tiny = zoo.tiny("llava")
    layers = [Quantized(residual_length=4) for _ in range(zoo.LAYERS)]
    attach(tiny.model, parse("plain"), drafter="recycling")
    try:
        with pytest.raises(
            UnsupportedError, match="recycling keeps keys and values of its own and cannot fill a cache"
        ):
            tiny.model.generate(**tiny.inputs(["is it"]), **hf.with_cache(Cache(layers=layers)), max_new_tokens=4)
    finally:
        detach(tiny.model)
    with pytest.raises(UnsupportedError, match="layer 0 is a Quantized, which holds more than keys and values"):
        hf.KV(Cache(layers=layers)).check_rollback()
    mixed = Cache(layers=[cache_utils.DynamicLayer(), cache_utils.LinearAttentionAndFullAttentionLayer()])
    with pytest.raises(UnsupportedError, match="layer 1 is a LinearAttentionAndFullAttentionLayer"):
        hf.KV(mixed).check_rollback()


def test_chains_are_trees_too():
    """The same rows through the causal mask and through the tree mask give the same scores."""
    with torch.no_grad():
        tokens = torch.tensor([[20, 21, 22]])
        chain, _ = opened(["is it"]).extend(tokens)
        shape = chain_shape(3)
        tree, _ = opened(["is it"]).extend(tokens, ancestors=shape.ancestors, depth=shape.depths)
    torch.testing.assert_close(chain, tree, atol=1e-5, rtol=0)
