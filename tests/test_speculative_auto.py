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
from lvlm_decode.speculative.ledger import FIRST, LEVEL, SHARE, START, TRIED, Entry, Ledger, Line
from lvlm_decode.testing.models import tiny

#: Seconds of a forward without a draft at the beginning of a text, in the made-up worlds below.
PLAIN = 1.0


class World:
    """A machine and texts: what a cycle of each drafter costs and accepts."""

    def __init__(self, seed=0, start=0.0, slope=0.0, **drafters):
        #: name -> (forwards without a draft that each level costs, chance that a level is accepted).
        self.drafters, self.start, self.slope = drafters, start, slope
        self.rng = random.Random(seed)
        self.ledger = Ledger()
        #: Seconds of everything, as a clock outside would tell, and of the same calls without a drafter.
        self.seconds = self.none = 0.0

    def plain(self, at):
        return PLAIN + self.slope * at

    def spend(self, seconds):
        self.seconds += seconds
        return seconds

    def call(self, tokens):
        """One call of so many tokens; the drafter it was given."""
        ledger = self.ledger
        forwards = [self.plain(at) for at in range(1, tokens)]
        self.none += sum(forwards)
        name = ledger.plan(list(self.drafters))
        if name is None:
            ledger.undrafted(forwards)
            self.spend(sum(forwards))
            return None
        ledger.started(name, self.spend(self.start))
        done = 1
        while done < tokens:
            room = tokens - done - 1
            depth = ledger.depth(name, room, done)
            if depth == 0 and room > 0:
                ledger.rest(done, tokens - done, self.spend(sum(forwards[done - 1 :])))
                break
            price, chance = self.drafters[name]
            accepted = 0
            while accepted < depth and self.rng.random() < chance:
                accepted += 1
            seconds = self.spend(self.plain(done) * (1 + price * depth))
            if depth:
                ledger.cycle(name, depth, done, [accepted], seconds)
            ledger.passed(done, accepted + 1, seconds)
            done += accepted + 1
        ledger.finished(name, 0.0)
        ledger.ended(tokens, True)
        return name


def test_the_first_call_has_no_draft_and_the_best_drafter_wins():
    world = World(good=(0.02, 0.9), bad=(0.5, 0.2))
    names = [world.call(96) for _ in range(20)]
    assert names[0] is None
    assert names[-8:].count("good") >= 7
    assert world.seconds < 0.6 * world.none
    assert world.ledger.spent == pytest.approx(world.seconds)


def test_the_depth_follows_cost_and_acceptance():
    depths = {}
    for name, price, chance in (("sure", 0.02, 0.95), ("unsure", 0.2, 0.5)):
        world = World(**{name: (price, chance)})
        for _ in range(40):
            world.call(96)
        depths[name], _ = world.ledger.best(name)
    assert depths["sure"] >= 6 and depths["unsure"] <= 2


#: Of a drafter's first cycles and starts: what they may take beyond what is assumed of them before.
UNKNOWN = {"slow": 0.0, "wrong": 0.0, "worse": TRIED * 1.0}


@pytest.mark.parametrize("tokens", [3, 12, 96])
@pytest.mark.parametrize("slope", [0.0, 0.02], ids=["level", "rising"])
@pytest.mark.parametrize(
    "bad", [{"slow": (0.6, 0.3)}, {"slow": (0.6, 0.3), "wrong": (0.05, 0.0), "worse": (2.0, 0.9)}], ids=["one", "three"]
)
@pytest.mark.parametrize("start", [0.0, 5.0])
def test_drafters_that_never_pay_cost_no_more_than_their_share(bad, tokens, slope, start):
    """At any moment: no more than the share, and what was not known of a drafter before it was tried."""
    world = World(start=start, slope=slope, **bad)
    unknown = sum(UNKNOWN[name] * world.plain(tokens) + max(start - START, 0.0) for name in bad)
    for _ in range(2000 // tokens):
        world.call(tokens)
        # Beside it two thousandths: a line through short answers is nearly level.
        assert world.seconds <= (1.002 + SHARE) * (world.none + unknown)
    assert any(entry.tried for entry in world.ledger.entries.values())


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
    assert [entry.cost(depth) for depth in (0, 1, 3)] == [1.0, 1 + LEVEL, 1 + 3 * LEVEL], "what is assumed"
    ledger = Ledger(entries={"d": entry})
    ledger.undrafted([2.0] * FIRST)
    ledger.cycle("d", 4, 1, [4], 3.6)
    assert [round(entry.cost(depth), 6) for depth in (0, 2, 4, 6)] == [1.0, 1.4, 1.8, 2.2]
    ledger.cycle("d", 4, 1, [0], 3.6)
    assert sum(entry.shares(4)) == pytest.approx(4 * 0.98 / 1.98)
    # Two samples of a batch count by their mean.
    other = Ledger(entries={"d": Entry()})
    other.undrafted([1.0] * 4)
    other.cycle("d", 2, 1, [2, 0], 1.2)
    assert sum(other.entries["d"].shares(2)) == 1.0 and other.entries["d"].forwards(2) == 2.0


def test_a_forward_late_in_a_text_takes_longer():
    line = Line()
    for _ in range(3):
        for at in range(1, 256):
            line.add(at, 1 + 0.004 * at)
    assert [round(line.value(at), 1) for at in (1, 128, 255)] == [1.0, 1.5, 2.0]
    # As one point for many forwards, of the rest of a call.
    line.add(200, 1.8, 110)
    assert line.value(200) == pytest.approx(1.8, rel=0.02)
    short = Line()
    for seconds in (1.0, 3.0) * 50:
        short.add(1, seconds)
        short.add(2, 4 - seconds)
    assert short.value(100) == pytest.approx(2.0, rel=0.05), "two positions say nothing of the hundredth"


def test_early_drafts_are_not_held_against_late_forwards():
    """A cycle that costs three early forwards and brings two of them loses, also where a late forward takes thrice as long."""
    world = World(slope=0.02, even=(0.5, 0.5))
    for _ in range(8):
        world.call(200)
    assert world.ledger.entries["even"].tried
    assert world.ledger.entries["even"].cost(4) == pytest.approx(3.0, rel=0.05)
    assert world.ledger.behind == pytest.approx(world.seconds - world.none, abs=0.01 * world.none / 8)


def test_a_batch_comes_forward_with_its_slowest_sample():
    """Four samples of which one accepts nothing: three tokens a cycle on average, and the call takes as many as without."""
    ledger = Ledger()
    ledger.undrafted([1.0] * 255)
    ledger.plan(["d"])
    for at in range(1, 10):
        ledger.cycle("d", 2, at, [2, 2, 2, 0], 1.5)
        ledger.passed(at, 1, 1.5)
    assert ledger.best("d", 2)[1] == pytest.approx(1.5 / 2.5) and ledger.behind == pytest.approx(4.5)
    ledger.paced("d", 9 / (9 * 2.5))
    assert ledger.best("d", 2)[1] == pytest.approx(1.5), "what the call came forward by counts"


def test_a_batch_whose_slowest_sample_lags_is_given_up():
    """By the mean of its samples the draft wins; what it may lose next is known before it is lost."""
    ledger = Ledger()
    ledger.undrafted([1.0] * 255)
    assert ledger.plan(["d"]) == "d"
    cycles = 0
    while (depth := ledger.depth("d", 100, 1 + cycles)) and cycles < 250:
        ledger.cycle("d", depth, 1 + cycles, [depth, depth, depth, 0], 1.5)
        ledger.passed(1 + cycles, 1, 1.5)
        cycles += 1
    assert ledger.best("d")[1] < 1 and 3 < cycles < 30 and ledger.behind < SHARE * ledger.spent + 0.5


def test_what_a_drafter_does_after_a_call_is_in_its_price():
    ledger = Ledger()
    ledger.undrafted([1.0] * 150)
    assert ledger.plan(["d"]) == "d"
    ledger.started("d", 0.5)
    ledger.finished("d", 3.0)
    assert ledger.behind == 3.5 and ledger.plan(["d"]) is None


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
    assert ledger.spent > 0 and ledger.plain_tokens > FIRST
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
