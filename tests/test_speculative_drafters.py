"""Drafters without training: what they propose, what they learn, what they leave out."""

import random

import pytest
import torch
import zoo

from lvlm_decode.engine.attach import attach, detach, last_run
from lvlm_decode.errors import ParameterError, UnknownNameError, UnsupportedError
from lvlm_decode.methods import parse
from lvlm_decode.speculative import drafters
from lvlm_decode.speculative.drafters import DRAFTERS, Context, Verified
from lvlm_decode.speculative.drafters.automaton import Automaton
from lvlm_decode.speculative.heads import DraftHead, HeadConfig
from lvlm_decode.speculative.tree import Tree


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
    for name in ("lookup", "automaton", "recycling", "replay"):
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
        return out, last_run(model).speculation
    finally:
        detach(model)


def test_early_exit_at_the_last_layer_but_one_of_a_model_whose_last_layer_does_nothing_is_always_right():
    tiny = zoo.tiny("llava")
    model = tiny.model
    last = model.get_decoder().layers[-1]
    saved = [p.clone() for p in (last.self_attn.o_proj.weight, last.mlp.down_proj.weight)]
    with torch.no_grad():
        last.self_attn.o_proj.weight.zero_()
        last.mlp.down_proj.weight.zero_()
    try:
        _, stats = generate(model, tiny, drafters.parse("early-exit(exits=(3,),tokens=4)"), eos_token_id=None)
        # Its drafts are the model's own choices; only their number varies.
        assert stats.acceptance == [1.0] * len(stats.acceptance) and stats.tau >= 2
        # Sampled drafts are coupled with the target's draws, so they are right too.
        sampled = {"do_sample": True, "seed": 1, "temperature": 1.5, "top_k": 20}
        _, stats = generate(model, tiny, drafters.parse("early-exit(exits=(3,))"), eos_token_id=None, **sampled)
        assert stats.acceptance == [1.0] * len(stats.acceptance)
        # Among several exits the one that is right is found from measured acceptance.
        session_exit = drafters.parse("early-exit(tokens=4)")
        _, stats = generate(model, tiny, session_exit, eos_token_id=None)
        assert stats.tau > 0
    finally:
        with torch.no_grad():
            last.self_attn.o_proj.weight.copy_(saved[0])
            last.mlp.down_proj.weight.copy_(saved[1])


def test_early_exit_chooses_by_measured_acceptance():
    tiny = zoo.tiny("llava")
    drafter = drafters.parse("early-exit(tokens=4)")
    start = context([1, 2])
    start.module = tiny.model
    session = drafter.begin(start)
    assert session.exits == (1, 2, 3)
    session.right, session.asked = {1: 0.1, 2: 9.5, 3: 9.6}, {1: 10.0, 2: 10.0, 3: 10.0}
    layer, length = session.plan(4)
    assert layer == 2 and length == 4
    session.right = {1: 0.0, 2: 0.0, 3: 0.0}
    assert session.plan(4)[1] == 1, "a hopeless exit still drafts one token, so that it can be measured"
    with pytest.raises(ParameterError, match="exits = \\(9,\\)"):
        drafters.parse("early-exit(exits=(9,))").layers(tiny.model)


def test_early_exit_refuses_decoders_it_cannot_run():
    class Decoder(torch.nn.Module):
        layers = (1, 2, 3)

    class Module:
        def get_decoder(self):
            return Decoder()

    with pytest.raises(UnsupportedError, match="rotary"):
        drafters.parse("early-exit").layers(Module())


@pytest.mark.parametrize("name", ["recycling", "automaton", "lookup", "early-exit", "vispec"])
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


@pytest.mark.parametrize("temperature", [None, 1.5], ids=["greedy", "sampled"])
def test_the_confidence_stop_of_early_exit(temperature):
    """Nothing follows a draft whose probability at the exit, before the noise of sampling, is below the stop."""
    tiny, stop = zoo.tiny("llava"), 0.02
    drafter, logits, drafted = drafters.parse(f"early-exit(exits=(2,),tokens=5,stop={stop})"), [], []
    begin = type(drafter).begin

    def spied(context):
        session = begin(drafter, context)
        run, propose = session._run, session.propose

        def noted(*args):
            logits[-1].append(run(*args))
            return logits[-1][-1]

        def wrapped(room):
            logits.append([])
            drafted.append((propose(room).lists[0][1:], min(room, 5)))
            return Tree.chain(torch.tensor([context.tokens[0][-1:] + drafted[-1][0]]))

        session.plan = lambda most: (2, most)
        session._run, session.propose = noted, wrapped
        return session

    drafter.begin = spied
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "seed": 1} if temperature else {}
    generate(tiny.model, tiny, drafter, eos_token_id=None, **how)
    for steps, (tokens, most) in zip(logits, drafted):
        chance, expected = 1.0, 0
        for step, token in zip(steps, tokens):
            chance *= float((step / (temperature or 1.0)).softmax(-1)[0, 0, token])
            expected += 1
            if chance < stop:
                break
        assert len(tokens) == len(steps) == expected and (chance < stop or len(tokens) == most)
    assert len({len(tokens) for tokens, most in drafted if most == 5}) > 1, "it must stop early at times"
