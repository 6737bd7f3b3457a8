"""Drafters without training: what they propose, what they learn, what they leave out."""

import random

import pytest
import torch

from lvlm_decode.attachment import attach, detach, last_run
from lvlm_decode.errors import ParameterError, UnknownNameError
from lvlm_decode.methods import parse
from lvlm_decode.speculative import drafters
from lvlm_decode.speculative.drafters import DRAFTERS, Context, Verified
from lvlm_decode.speculative.drafters.automaton import Automaton
from lvlm_decode.speculative.drafters.base import Drafter, Session
from lvlm_decode.speculative.heads import DraftHead, HeadConfig
from lvlm_decode.speculative.tree import Tree
from lvlm_decode.testing import models as zoo


def context(*texts, vocabulary=50, prompt=None):
    lengths = [len(text) if prompt is None else prompt for text in texts]
    return Context(None, None, [list(text) for text in texts], lengths, torch.zeros(len(texts), vocabulary))


def proposed(session, room=100):
    return [tokens[1:] for tokens in session.propose(room).lists]


def test_lookup_prefers_the_longest_and_latest_match():
    session = drafters.parse("lookup(tokens=3)").begin(context([1, 2, 3, 4, 9, 3, 5, 6, 2, 3], [7, 8]))
    assert proposed(session) == [[4, 9, 3], [-1, -1, -1]]
    session = drafters.parse("lookup(tokens=2,longest=1)").begin(context([1, 2, 3, 4, 9, 3, 5, 6, 2, 3]))
    assert proposed(session) == [[5, 6]]


def test_lookup_neither_matches_nor_copies_image_placeholders():
    text = [5, 6, -1, -1, -1, 7, 8, 5, 6]
    session = drafters.parse("lookup").begin(context(text))
    assert proposed(session) == [[]]
    session.context.tokens[0] += [-1]
    assert proposed(session) == [[]]


def test_copyspec_needs_its_whole_length():
    text = [1, 2, 3, 4, 5, 6, 7, 0, 2, 3, 4, 5]
    assert proposed(drafters.parse("copyspec").begin(context(text))) == [[]]
    assert proposed(drafters.parse("copyspec(longest=4,shortest=4,tokens=2)").begin(context(text))) == [[6, 7]]


def longest_suffix(text, seen):
    """The longest suffix of ``text`` inside ``seen``, by trying all."""
    for n in range(len(text), 0, -1):
        tail = text[-n:]
        if any(seen[i : i + n] == tail for i in range(len(seen) - n + 1)):
            return n
    return 0


@pytest.mark.parametrize("seed", range(8))
def test_the_automaton_knows_every_substring_and_where_it_last_ended(seed):
    rng = random.Random(seed)
    text = [rng.randrange(3) if rng.random() < 0.93 else -1 for _ in range(60)]
    automaton = Automaton()
    for at, token in enumerate(text):
        automaton.extend(token)
        for start in range(max(0, at - 6), at + 1):
            part = text[start : at + 1]
            if -1 in part:
                continue
            state = 0
            for t in part:
                state = automaton.next[state][t]
            assert automaton.end[state] == at
    state, matched, query = 0, 0, []
    for _ in range(80):
        token = rng.randrange(4)
        query.append(token)
        state, matched = automaton.follow(state, matched, token)
        assert matched == longest_suffix(query, text)


def test_the_automaton_remembers_earlier_answers_and_its_own_text():
    drafter = drafters.parse("automaton(tokens=3)")
    session = drafter.begin(context([1, 2, 3, 4, 5], prompt=2))
    assert proposed(session) == [[]]
    session.finish()
    assert drafter.seen.text == [3, 4, 5, -1]
    session = drafter.begin(context([9, 3, 4], [7, 8, 6, 1, 7, 8], prompt=1))
    assert proposed(session) == [[5, -1, -1], [6, 1, 7]]
    drafter.forget()
    assert proposed(drafter.begin(context([9, 3, 4]))) == [[]]
    forgetful = drafters.parse("automaton(memory=False)")
    forgetful.begin(context([1, 2, 3])).finish()
    assert forgetful.seen.text == []


def test_recycling_fills_its_tree_from_what_was_verified():
    drafter = drafters.parse("recycling(rows=6,depth=3,width=2,chances=(0.6,0.3))")
    start = context([7, 10], vocabulary=20)
    start.scores[0, 10], start.scores[0, 4] = 5.0, 4.0
    session = drafter.begin(start)
    assert drafter.adjacency[7].tolist() == [10, 4]
    assert proposed(session) == [[]]  # nothing is known after token 10
    scores = torch.full((1, 3, 20), float("-inf"))
    scores[0, 0, 11], scores[0, 0, 12] = 2.0, 1.0
    scores[0, 1, 13] = 1.0  # the plausibility mask left one token
    scores[0, 2, 14], scores[0, 2, 15] = 2.0, 1.0
    tree = Tree.chain(torch.tensor([[10, 11, 10]]))
    session.observe(Verified(tree, scores, [[0, 1]], [[11, 13]]))
    # Row 0 was accepted and row 2 was not: the accepted one has the last word on token 10.
    assert drafter.adjacency[10].tolist() == [11, 12] and drafter.adjacency[11].tolist() == [13, -1]
    session.context.tokens[0] = [7, 10, 11, 13, 10]
    drafted = session.propose(100)
    paths = {tuple(drafted.lists[0][r] for r in drafted.shape(0).path(row)) for row in range(drafted.rows)}
    assert paths == {(10,), (10, 11), (10, 12), (10, 11, 13)}
    again = drafter.begin(context([1, 10], vocabulary=20))
    assert {11, 12} <= set(again.propose(100).lists[0]), "the adjacency outlives a call"
    drafter.forget()
    assert drafter.adjacency is None


def test_drafts_go_no_deeper_than_there_is_room():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    for name in ("lookup", "automaton", "recycling"):
        for room in (0, 1, 2):
            tree = drafters.parse(name).begin(context(text)).propose(room)
            assert max(tree.shape(0).depth) <= room, name


def test_the_confidence_stop_follows_the_running_acceptance():
    drafter = drafters.parse("lookup(tokens=8,stop=0.4)")
    session = drafter.begin(context([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]))
    before = len(proposed(session)[0])
    tree = Tree.chain(torch.tensor([[1, 2, 3, 4]]))
    nothing = torch.zeros(1, 4, 50)
    for _ in range(10):
        session.count(Verified(tree, nothing, [[0]], [[9]]))
    assert len(proposed(session)[0]) == 1 < before
    for _ in range(30):
        session.count(Verified(tree, nothing, [[0, 1, 2, 3]], [[2, 3, 4, 5]]))
    assert len(proposed(session)[0]) == 8
    with pytest.raises(ParameterError, match=r"stop = 1\.5"):
        drafters.parse("lookup(stop=1.5)")


def test_names_and_parameters():
    assert drafters.parse(None) is None and drafters.parse("none") is None
    given = drafters.parse("recycling(rows=8, chances=(0.5,0.2), depth=3)")
    assert (given.rows, given.chances, given.depth) == (8, (0.5, 0.2), 3)
    assert drafters.parse(given) is given
    with pytest.raises(UnknownNameError, match=r"unknown drafter 'medusa'.*recycling"):
        drafters.parse("medusa")
    with pytest.raises(UnknownNameError, match=r"no parameter 'row'.*rows"):
        drafters.parse("recycling(row=8)")
    with pytest.raises(ParameterError, match="'rows' has no value"):
        drafters.parse("recycling(rows)")
    with pytest.raises(ParameterError, match="bracket is not closed"):
        drafters.parse("recycling(rows=8")
    for name in DRAFTERS:
        assert drafters.get(name).name == name


def generate(model, tiny, drafter, **options):
    options = {"do_sample": False, **options}
    attach(model, parse("plain"), processor=tiny.tokenizer, drafter=drafter)
    try:
        out = model.generate(**tiny.inputs(["is it"], seed=2), max_new_tokens=24, **options)
        return out, last_run(model).trace.speculation
    finally:
        detach(model)


@pytest.mark.parametrize("name", ["recycling", "automaton", "lookup", "vispec"])
def test_what_is_learned_in_inference_mode_serves_outside_of_it(name):
    """And the other way round: the drafter, not the call, owns what is kept between calls."""
    tiny = zoo.tiny("llava")
    head = {"head": DraftHead(HeadConfig.for_target(tiny.model, name, depth=2, top_k=2))} if name == "vispec" else {}
    for first in (True, False):
        drafter, outs = drafters.get(name).create(model=tiny.model, **head), []
        for mode in (first, not first, first):
            with torch.inference_mode(mode):
                outs.append(generate(tiny.model, tiny, drafter)[0])
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[1], outs[2])


def test_a_drafter_must_begin_and_a_session_must_propose():
    with pytest.raises(TypeError, match="abstract"):
        Drafter()
    with pytest.raises(TypeError, match="abstract"):
        Session(None, None)
