"""Trees, their masks, and the walk that accepts: pure functions, no model."""

import itertools
import random

import pytest
import torch

from lvlm_decode.errors import ParameterError
from lvlm_decode.speculative.cost import alpha_of, break_even, tau_of, time_per_token
from lvlm_decode.speculative.stats import Stats
from lvlm_decode.speculative.tree import PAD, Shape, Tree, chain_shape, ranked_shape, rerank, shape_of
from lvlm_decode.speculative.verify import walk


def random_shape(rng: random.Random, n: int) -> Shape:
    return Shape((-1, *(rng.randrange(row) for row in range(1, n))))


@pytest.mark.parametrize("seed", range(5))
def test_ancestors_are_the_rows_on_the_path(seed):
    shape = random_shape(random.Random(seed), 12)
    seen = shape.ancestors
    assert torch.equal(seen, seen.tril())
    for row in range(len(shape)):
        path = shape.path(row)
        assert seen[row].nonzero().flatten().tolist() == path
        assert shape.depth[row] == len(path) - 1


def test_a_shape_names_the_row_that_is_wrong():
    with pytest.raises(ParameterError, match="starts with the root"):
        Shape((0, 0))
    with pytest.raises(ParameterError, match=r"row 2 .* parent 5"):
        Shape((-1, 0, 5))


def test_chains_need_no_mask_and_batches_are_filled_up():
    chain = Tree.of([([5, 6, 7], chain_shape(3)), ([8], chain_shape(1))])
    assert chain.is_chain and chain.ancestors() is None and chain.depths() is None
    assert chain.lists == [[5, 6, 7], [8, PAD, PAD]]
    mixed = Tree.of([([5, 6, 7], shape_of((-1, 0, 0))), ([8, 9], chain_shape(2))])
    assert mixed.ancestors().shape == (2, 3, 3) and mixed.depths().tolist() == [[0, 1, 1], [0, 1, 1]]
    # The row that fills up hangs on the root and is no token.
    assert mixed.lists[1] == [8, 9, PAD]


def test_limits_and_pruning_keep_every_ancestor():
    shape = shape_of((-1, 0, 0, 1, 3, 4))
    tree = Tree(torch.tensor([[1, 2, 3, 4, 5, 6]]), (shape,))
    assert tree.limited(2).lists == [[1, 2, 3, 4]]
    assert tree.limited(0).lists == [[1]] and tree.limited(9) is tree
    pruned = Tree(torch.tensor([[1, 2, PAD, 4, 5, 6]]), (shape,)).pruned()
    assert pruned.lists == [[1, 2, 4, 5, 6]] and pruned.shape(0).parents == (-1, 0, 1, 2, 3)


@pytest.mark.parametrize("rows, depth", [(2, 3), (8, 3), (26, 5), (60, 6)])
def test_the_static_tree_accepts_most_among_trees_of_its_size(rows, depth):
    chances = (0.6, 0.2, 0.1)
    shape, ranks = ranked_shape(rows, chances, depth)
    assert len(shape) == rows and max(shape.depth) <= depth
    assert len({tuple(ranks[r] for r in shape.path(row)) for row in range(rows)}) == rows
    values = {(): 1.0}
    for length in range(1, depth + 1):
        for path in itertools.product(range(3), repeat=length):
            value = 1.0
            for rank in path:
                value *= chances[rank]
            values[path] = value
    best = sum(sorted(values.values(), reverse=True)[:rows])
    mine = sum(values[tuple(ranks[r] for r in shape.path(row)[1:])] for row in range(rows))
    assert mine == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_reranking_keeps_ancestors_even_among_ties(seed):
    rng = random.Random(seed)
    parents, values = [], []
    for entry in range(40):
        parent = rng.choice([-1, *range(entry)]) if entry else -1
        parents.append(parent)
        # Half of the steps cost nothing: ties with the parent.
        values.append((values[parent] if parent >= 0 else 0.0) - rng.choice([0.0, rng.random()]))
    chosen = rerank(values, 15)
    assert len(chosen) == 15 and chosen == sorted(chosen)
    assert all(parents[entry] == -1 or parents[entry] in chosen for entry in chosen)
    assert min(values[e] for e in chosen) >= max(v for e, v in enumerate(values) if e not in chosen)


@pytest.mark.parametrize("none", [float("-inf"), float("nan")])
def test_reranking_leaves_out_what_has_no_chance(none):
    parents, values = [-1, -1, 0, 1, 2, 3, 0], [-0.1, none, -0.2, none, none, none, -0.3]
    chosen = rerank(values, 6)
    assert chosen == [0, 2, 6] and all(parents[entry] in (-1, *chosen) for entry in chosen)
    assert rerank([none] * 4, 3) == []


def run_walk(shape, tokens, law, end=None):
    """The walk under a deterministic law: prefix of tokens -> next token."""
    out = []

    def choose(row):
        return law(tuple(tokens[r] for r in shape.path(row)))

    def emit(token):
        out.append(token)
        return token == end

    path, ended = walk(shape, tokens, choose, emit)
    return path, ended, out


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_drafted_the_walk_commits_what_the_law_says(seed):
    rng = random.Random(seed)
    law = lambda prefix: hash((seed, prefix)) % 3  # noqa: E731
    shape = random_shape(rng, 10)
    tokens = [rng.randrange(3) for _ in range(10)]
    path, _, committed = run_walk(shape, tokens, law)
    prefix = (tokens[0],)
    for token in committed:
        assert token == law(prefix)
        prefix = (*prefix, token)
    assert [tokens[row] for row in path[1:]] == committed[:-1]


def test_the_walk_stops_with_the_text():
    shape = chain_shape(4)
    law = {(1,): 2, (1, 2): 9, (1, 2, 9): 4, (1, 2, 9, 4): 5}.__getitem__
    assert run_walk(shape, [1, 2, 9, 4], law, end=9) == ([0, 1, 2], True, [2, 9])
    assert run_walk(shape, [1, 2, 9, 4], law) == ([0, 1, 2, 3], False, [2, 9, 4, 5])


def test_rows_that_fill_up_are_never_accepted():
    tree = Tree.of([([1, 2], chain_shape(2)), ([1, 2, 3], shape_of((-1, 0, 1)))])
    for token in range(5):
        path, _, _ = run_walk(tree.shape(0), tree.lists[0], lambda prefix, token=token: token if len(prefix) > 1 else 2)
        assert path == [0, 1]


def test_cost_formula_identities():
    assert time_per_token(0.0, 1.0) == 1.0
    assert time_per_token(break_even(1.7, 0.3, 0.1), 1.7, 0.3, 0.1) == pytest.approx(1.0)
    assert tau_of([1.0] * 4) == 4 and tau_of([]) == 0
    # The specification's fit of ViSpec on LLaVA-1.5: tau 2.98 over four levels.
    assert alpha_of(2.98, 4) == pytest.approx(0.886, abs=2e-3)


def test_stats_count_levels_and_add_up():
    stats = Stats(cycles=3, accepted=3)
    for depth, accepted in [(4, 2), (4, 0), (2, 1)]:
        stats.level(depth, accepted)
    assert stats.reached == [3, 2, 1, 0] and stats.accepted_per_level == [2, 1, 0, 0]
    assert stats.tau == 1.0 and stats.acceptance == [2 / 3, 1 / 2, 0.0, 0.0]
    both = stats + Stats(cycles=1, accepted=1, reached=[1], accepted_per_level=[1])
    assert both.cycles == 4 and both.reached == [4, 2, 1, 0] and both.accepted_per_level == [3, 1, 0, 0]
