"""Nothing large outlives a call: no keys and values, features, pixels, views or logits, and no cycle waits for a collection."""

import contextlib
import copy
import gc

import pytest
import torch
from contract import NAMES, family_for, is_controller, method_of
from helpers import Kept, TextProcessor, full_but

from lvlm_decode import attach, detach, last_run
from lvlm_decode.methods import METHODS, load
from lvlm_decode.speculative import drafters
from lvlm_decode.speculative.drafters import automaton
from lvlm_decode.speculative.heads import KINDS as HEADS
from lvlm_decode.speculative.heads import DraftHead, HeadConfig
from lvlm_decode.testing.models import tiny

#: Bytes of tensors that may remain. A key or value of one row of these models has 16 slots of 64 bytes at least, its
#: image more than that.
BOUND = 512
CONTROLLERS = [name for name in METHODS if is_controller(name)]


def drafter_of(name):
    if name not in HEADS:
        return drafters.parse(name, tiny("llava").model)
    head = DraftHead(HeadConfig.for_target(tiny("llava").model, name, depth=2, top_k=2))
    return drafters.get(name)(head=head)


def live() -> int:
    """Bytes of all tensor storages that somebody holds; the collector does not run."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            # What torch.compile traced with, in another test, has no memory.
            with contextlib.suppress(RuntimeError):
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@contextlib.contextmanager
def uncollected():
    """What a cycle holds remains in here, as it does between two runs of the collector."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def call(family, method, inputs, form="attach", recorder=None, options=None, measured=True, **how):
    """The bytes that a call leaves, read while the method is attached still."""
    zoo, how = tiny(family), {"do_sample": False, "max_new_tokens": 6, **how}
    if form == "attach":
        attach(zoo.model, method, processor=TextProcessor(zoo), recorder=recorder, **(options or {}))
    try:
        with uncollected() if measured else contextlib.nullcontext():
            before = live() if measured else 0
            if form == "processor":
                how["logits_processor"] = [method.processor(zoo.model, inputs)]
            try:
                zoo.model.generate(**inputs, **how, **({"custom_generate": method} if form == "custom" else {}))
            except ZeroDivisionError:
                pass
            how.clear()
            return live() - before if measured else 0
    finally:
        detach(zoo.model)


def left(family, method, options=None, **how) -> int:
    inputs = tiny(family).inputs(["is it a dog?", "ab"])
    # The first call makes what belongs to the process or to the drafter: tree shapes, hooks of transformers, the table of
    # Token Recycling, the weights of a draft head as they are multiplied.
    call(family, method, copy.copy(inputs), options=options, measured=False, **how)
    return call(family, method, copy.copy(inputs), options=options, **how)


@pytest.mark.parametrize("name", full_but((*NAMES, *CONTROLLERS), ["vcd", "dola", "pai", "opera"]))
def test_nothing_large_outlives_a_call(name):
    family = family_for(name)
    method = load(name)() if name in CONTROLLERS else method_of(name, family)
    assert left(family, method) <= BOUND


@pytest.mark.parametrize("drafter", full_but(drafters.DRAFTERS, ["recycling", "vispec"]))
def test_nothing_large_outlives_a_drafted_call(drafter):
    assert left("llava", method_of("vcd", "llava"), {"drafter": drafter_of(drafter)}) <= BOUND


def fail(ids, scores):
    return 1 / 0 if ids.shape[1] > 30 else scores


MODES = {
    "sampled": dict(do_sample=True),
    "beams": dict(num_beams=3),
    "static": dict(cache_implementation="static"),
    "lookup": dict(prompt_lookup_num_tokens=3),
    "states": dict(output_hidden_states=True, output_attentions=True, output_logits=True, return_dict_in_generate=True),
    "failed": dict(logits_processor=[fail]),
    "custom": dict(form="custom"),
    "processor": dict(form="processor"),
}


@pytest.mark.parametrize("mode", full_but(MODES, ["beams", "failed"]))
def test_nothing_large_outlives_a_call_in_another_mode(mode):
    method = method_of("vcd", "llava")
    if mode == "lookup":  # takes one row
        inputs = tiny("llava").inputs(["is it a dog?"])
        assert call("llava", method, inputs, **MODES[mode]) <= BOUND
    else:
        assert left("llava", method, **MODES[mode]) <= BOUND


@pytest.mark.full
def test_sequential_views_and_sums_are_gone_too():
    both = method_of("vcd", "llava") + method_of("icd", "llava")
    assert left("llava", both, {"execution": "sequential"}) <= BOUND
    assert left("qwen2_vl", method_of("m3id", "qwen2_vl") + method_of("vcd", "qwen2_vl")) <= BOUND


def test_a_recorder_keeps_what_it_asks_for():
    """That the tests above see what remains: the run of one call is far above the bound."""
    kept = Kept()
    assert call("llava", method_of("vcd", "llava"), tiny("llava").inputs(["is it"]), recorder=kept) > 20 * BOUND
    assert kept.run.lanes.forwards == 6


def test_what_is_known_after_a_call():
    zoo = tiny("llava")
    attach(zoo.model, method_of("vcd", "llava") + method_of("icd", "llava"), processor=zoo.processor)
    try:
        zoo.model.generate(**zoo.inputs(["is it", "ab"]), max_new_tokens=4, min_new_tokens=4, num_beams=2, seed=3)
        run = last_run(zoo.model)
    finally:
        detach(zoo.model)
    assert (run.views, run.lanes, run.forwards, run.rows_per_sample) == (3, ((0, 1, 2),), 4, 2)
    assert (
        run.seed == 3 and len(set(run.sample_ids)) == 2 and [part.name for part in run.method.parts()] == ["vcd", "icd"]
    )


def grows(method, calls, family="llava", drafter=None, before=3) -> tuple[int, int]:
    """(bytes of tensors, objects of the collector) that ``calls`` calls add, after the first few."""
    zoo = tiny(family)
    attach(zoo.model, method, processor=TextProcessor(zoo), drafter=drafter)
    try:
        marks = []
        for count in (before, calls):
            for number in range(count):
                zoo.model.generate(**zoo.inputs(["is it"], seed=number % 2), do_sample=False, max_new_tokens=4)
            gc.collect()
            marks.append((live(), len(gc.get_objects())))
    finally:
        detach(zoo.model)
    return marks[1][0] - marks[0][0], marks[1][1] - marks[0][1]


@pytest.mark.full
@pytest.mark.parametrize("name", full_but(["vcd", "recycling", *CONTROLLERS], ["vcd", "recycling"]))
def test_calls_do_not_grow_memory(name):
    """A thousand calls of each: ``benchmarks/properties``."""
    drafter = drafter_of(name) if name in drafters.DRAFTERS else None
    method = load(name)() if name in CONTROLLERS else method_of("vcd" if drafter else name, "llava")
    size, objects = grows(method, 8, drafter=drafter)
    assert size <= BOUND and objects < 8, "less than one object for each call"


def test_the_automaton_forgets_the_oldest_answers(monkeypatch):
    monkeypatch.setattr(automaton, "REMEMBERED", 40)
    drafter = automaton.SuffixAutomaton()
    for start in range(0, 1000, 10):
        drafter.learn(list(range(start, start + 10)))
        assert len(drafter.seen.text) <= 40 + 1
    assert drafter.seen.follow(0, 0, 995)[1] == 1 and drafter.seen.follow(0, 0, 5)[1] == 0
