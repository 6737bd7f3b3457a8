"""drafter="auto": decisions from made-up costs and acceptances, the share that may be lost, and answers that stay."""

import random

import pytest
import torch
from helpers import full_but

from lvlm_decode.attachment import attach, detach, last_run
from lvlm_decode.errors import ParameterError
from lvlm_decode.speculative import drafters
from lvlm_decode.speculative.drafters import auto
from lvlm_decode.speculative.drafters.auto import FREE
from lvlm_decode.speculative.ledger import DEEPEST, FIRST, LAG, SHARE, Entry, Ledger
from lvlm_decode.testing.models import tiny

#: Seconds of a verification without a draft, in the made-up worlds below.
PLAIN = 1.0


class World:
    """A machine and texts: what a cycle of each drafter costs and accepts."""

    def __init__(self, seed=0, start=0.0, idle=1.0, **drafters):
        #: name -> (seconds that each level adds, chance that a level is accepted).
        self.drafters, self.start, self.idle = drafters, start, idle
        self.rng = random.Random(seed)
        self.ledger = Ledger()

    def call(self, tokens):
        """One call of so many tokens; the drafter it was given."""
        ledger = self.ledger
        name = ledger.plan(list(self.drafters))
        if name is None:
            ledger.undrafted(tokens - 1, (tokens - 1) * PLAIN)
            return None
        ledger.started(name, self.start)
        done, given_up = 1, False
        while done < tokens:
            room = tokens - done - 1
            depth = 0 if given_up else ledger.depth(name, room)
            given_up = given_up or (depth == 0 and room > 0)
            price, chance = self.drafters[name]
            accepted = 0
            while accepted < depth and self.rng.random() < chance:
                accepted += 1
            seconds = PLAIN * (1 if depth else self.idle) + price * depth
            ledger.cycle(name, depth, [accepted], seconds)
            ledger.passed(accepted + 1, seconds)
            done += accepted + 1
        ledger.ended(tokens, True)
        return name

    def seconds_of_none(self, calls, tokens):
        return calls * (tokens - 1) * PLAIN


def test_the_first_call_has_no_draft_and_the_best_drafter_wins():
    world = World(good=(0.02, 0.9), bad=(0.5, 0.2))
    names = [world.call(96) for _ in range(20)]
    assert names[0] is None
    assert names[-8:].count("good") >= 7
    assert world.ledger.spent < 0.5 * world.seconds_of_none(20, 96)


def test_the_depth_follows_cost_and_acceptance():
    depths = {}
    for name, price, chance in (("sure", 0.02, 0.95), ("unsure", 0.2, 0.5)):
        world = World(**{name: (price, chance)})
        for _ in range(40):
            world.call(96)
        depths[name], _ = world.ledger.best(name)
    assert depths["sure"] >= 6 and depths["unsure"] <= 2


@pytest.mark.parametrize("tokens", [3, 12, 96])
@pytest.mark.parametrize(
    "bad", [{"slow": (0.6, 0.3)}, {"slow": (0.6, 0.3), "wrong": (0.05, 0.0), "worse": (2.0, 0.9)}], ids=["one", "three"]
)
@pytest.mark.parametrize("start", [0.0, 5.0])
def test_drafters_that_never_pay_cost_no_more_than_their_share(bad, tokens, start):
    """At any moment: no more than the share, and one cycle and one start of what was tried last."""
    world = World(start=start, **bad)
    calls = 2000 // tokens
    for number in range(1, calls + 1):
        world.call(tokens)
        none = world.seconds_of_none(number, tokens)
        assert world.ledger.spent <= (1 + SHARE) * none + 2 * start + PLAIN + 2.0 * DEEPEST
    assert world.ledger.spent <= 1.03 * world.seconds_of_none(calls, tokens) + 2 * start


def test_a_drafter_that_becomes_good_is_found_again():
    world = World(late=(0.02, 0.0))
    for _ in range(30):
        world.call(96)
    assert world.ledger.plan(["late"]) is None
    world.drafters["late"] = (0.02, 0.95)
    assert [world.call(96) for _ in range(60)][-5:] == ["late"] * 5


def test_short_answers_do_not_pay_for_a_start():
    """A head reads the prompt before it drafts: worth it for a long answer, not for two tokens."""
    world = World(start=3.0, head=(0.02, 0.95))
    for _ in range(30):
        world.call(96)
    assert world.ledger.plan(["head"]) == "head"
    for _ in range(400):
        world.call(3)
    assert world.ledger.plan(["head"]) is None


def test_costs_between_known_depths_are_on_a_line():
    entry = Entry()
    ledger = Ledger(entries={"d": entry})
    ledger.undrafted(FIRST, FIRST * 1.0)
    ledger.cycle("d", 4, [4], 1.8)
    assert [round(entry.seconds(depth, 1.0), 6) for depth in (0, 2, 4, 6)] == [1.0, 1.4, 1.8, 2.2]
    ledger.cycle("d", 4, [0], 1.8)
    assert sum(entry.shares(4)) == pytest.approx(4 * 0.98 / 1.98)
    # Two samples of a batch count by their mean.
    other = Ledger(entries={"d": Entry()})
    other.undrafted(4, 4.0)
    other.cycle("d", 2, [2, 0], 1.2)
    assert sum(other.entries["d"].shares(2)) == 1.0 and other.entries["d"].forwards(2) == 2.0


def test_a_batch_comes_forward_with_its_slowest_sample():
    """Four samples of which one accepts nothing: three tokens a cycle on average, and the call takes as many as without."""
    ledger = Ledger()
    ledger.undrafted(10, 10.0)
    ledger.plan(["d"])
    for _ in range(9):
        ledger.cycle("d", 2, [2, 2, 2, 0], 1.5)
        ledger.passed(1, 1.5)
    assert ledger.best("d", 2)[1] == pytest.approx(1.5 / 2.5) and ledger.behind == pytest.approx(4.5)
    ledger.paced("d", 9 / (9 * 2.5))
    assert ledger.best("d", 2)[1] == pytest.approx(1.5), "what the call came forward by counts"


def test_a_batch_whose_slowest_sample_lags_is_given_up():
    """By the mean of its samples the draft wins; what it loses is known before the call is over."""
    ledger = Ledger()
    ledger.undrafted(255, 255.0)
    assert ledger.plan(["d"]) == "d"
    cycles = 0
    while (depth := ledger.depth("d", 100)) and cycles < 250:
        ledger.cycle("d", depth, [depth, depth, depth, 0], 1.5)
        ledger.passed(1, 1.5)
        cycles += 1
    assert ledger.best("d")[1] < 1 and cycles < 30 and ledger.behind < SHARE * 300 + LAG + 1


def test_a_loop_that_is_slow_without_a_draft_is_in_the_price_of_trying():
    """Drafting is given up after a cycle, and the rest of the call verifies what nobody drafted."""
    world = World(slow=(0.6, 0.0), idle=1.1)
    for number in range(1, 121):
        world.call(60)
        # What the first trial costs is not known before it.
        assert world.ledger.spent <= 1.02 * world.seconds_of_none(number, 60) + 60 * 0.1 + 4 * 0.6 + PLAIN
    assert world.ledger.entries["slow"].tried > 1 and world.ledger.spent <= 1.025 * world.seconds_of_none(120, 60)


class Ticks:
    """A clock that a drafter moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.5
        return self.now


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "texts", full_but([["is it"], ["is it", "what color"]], [["is it", "what color"]]), ids=["one", "batch"]
)
@pytest.mark.parametrize("method", full_but(["plain", "vcd"], ["vcd"]))
def test_answers_are_those_without_a_draft(method, texts, options, monkeypatch):
    monkeypatch.setattr(auto, "clock", Ticks())
    built = tiny("llava")
    drafter = drafters.parse("auto", model=built.model)
    used = set()
    for seed in range(5):
        how = {"max_new_tokens": 40, "do_sample": False, "seed": seed, "eos_token_id": None, **options}
        outs = []
        for given in (None, drafter):
            attach(built.model, method, processor=built.processor, drafter=given)
            try:
                outs.append(built.model.generate(**built.inputs(texts, seed=seed), **how))
                if given is not None:
                    assert last_run(built.model).trace.speculation.tokens == 40 * len(texts)
            finally:
                detach(built.model)
        assert torch.equal(*outs)
    (ledger,) = drafter.ledgers.values()
    used = {name for name, entry in ledger.entries.items() if entry.calls}
    assert used, "something was tried"
    drafter.forget()
    assert drafter.ledgers == {}


def test_candidates():
    built = tiny("llava")
    assert tuple(drafters.parse("auto", model=built.model).candidates) == FREE
    own = drafters.parse("auto(drafters=('lookup','recycling(rows=6)'))", model=built.model)
    assert list(own.candidates) == ["lookup", "recycling(rows=6)"] and own.candidates["recycling(rows=6)"].rows == 6
    assert not own.features
    for wrong in ("('auto',)", "('none',)", "()"):
        with pytest.raises(ParameterError, match="drafters"):
            drafters.parse(f"auto(drafters={wrong})", model=built.model)
    other = own.fork()
    assert other.candidates["recycling(rows=6)"] is not own.candidates["recycling(rows=6)"]


def test_the_small_model_drafts_with_the_head_that_ships():
    import lvlm_decode_data
    from lvlm_decode_evals.runner import load

    try:
        loaded = load(str(lvlm_decode_data.tiny_path("tiny-llava")))
        found = drafters.parse("auto", model=loaded.model)
    except FileNotFoundError as error:
        pytest.skip(f"the small LLaVA is not here: {error}")
    assert tuple(found.candidates) == ("vispec", *FREE) and found.features
