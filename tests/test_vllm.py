"""The methods inside vLLM, on stand-ins of vLLM: groups stay together, tokens are the method's own, clients cannot break it."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import random
import sys
from types import SimpleNamespace

import fake_vllm as fake
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import lvlm_decode as ld
import lvlm_decode.vllm
import lvlm_decode.vllm.installed
import lvlm_decode_data
from lvlm_decode.engine import sampling
from lvlm_decode.errors import DependencyError, InputError, UnsupportedError
from lvlm_decode.method import Step
from lvlm_decode.methods import METHODS
from lvlm_decode.vllm import combine, gangs, served, wire

N, EOS = 24, 1
PACKAGE = ROOT / "lvlm_decode" / "vllm"


@pytest.fixture(scope="module")
def engine():
    """The files of the package that need vLLM, over the stand-ins."""
    own = ("port", "scheduler", "processor")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(fake.modules())
    lvlm_decode.vllm.installed.port.cache_clear()
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"lvlm_decode.vllm.{name}") for name in own})
    finally:
        for name in [*fake.CONTENTS, *(f"lvlm_decode.vllm.{name}" for name in own)]:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        lvlm_decode.vllm.installed.port.cache_clear()


def said_by(tokens):
    """(N,) logits of a make-believe model: they depend on all tokens, on the last ones most."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
    logits = torch.randn(N, generator=generator) * 2
    logits[EOS] -= 2.5
    return logits


def group_of(method, prompts, *, weights, counts=(), max_tokens=8, name=None, seed=0, id="a", **draw):
    """Requests of one group: prompts are ids."""
    method = ld.parse(method)
    member = wire.Member(
        group=name or f"g{next(fake.numbers)}",
        view=0,
        views=len(prompts),
        method=wire.described(method),
        weights=weights,
        counts=counts,
        seed=seed,
        id=wire.printed(id),
        **draw,
    )
    params = fake.SamplingParams(max_tokens=max_tokens, eos_token_id=EOS)
    return [
        fake.Request(f"{member.group}-{view}", prompt, wire.as_request(params, member, view, max_tokens))
        for view, prompt in enumerate(prompts)
    ]


def expected(method, prompts, *, weights, counts=(), max_tokens=8, seed=0, id="a", temperature=0.0):
    """The same answer token by token, without an engine."""
    method = ld.parse(method)
    if counts:
        method = method.with_counts(counts)
    out = []
    while len(out) < max_tokens and EOS not in out:
        logits = torch.stack([said_by([*prompt, *out]) for prompt in prompts])[:, None, None]
        scores = method.scores(Step(logits, torch.tensor([[len(out)]]), weights))[0, 0]
        if temperature:
            scores = scores / temperature + sampling.gumbel(seed, id, len(out), N)
        out.append(int(scores.argmax()))
    return out


class World:
    """The scheduler and the processor of the package, and a make-believe runner of kind V1 or V2."""

    def __init__(self, engine, runner="v1", seed=0, **shape):
        self.config = fake.shape(**shape)
        self.scheduler = engine.scheduler.GangScheduler(self.config)
        self.chance, self.runner = random.Random(seed), runner
        self.answers, self.ended, self.steps, self.alone = {}, {}, 0, 0
        size = 64
        self.state = SimpleNamespace(
            prompt_len=SimpleNamespace(np=np.zeros(size, int)), prefill_len=SimpleNamespace(np=np.zeros(size, int))
        )
        rest = (self.state,) if runner == "v2" else ("cpu", False)
        self.processor = engine.processor.Grouped(self.config, *rest)
        #: row or slot -> request
        self.places = {}

    def add(self, *requests):
        for request in requests:
            self.processor.validate_params(request.sampling_params)
            self.scheduler.add_request(request)

    def step(self):
        """One step of the engine; the rows of all scheduled requests, of unfinished prompts too, come in random order."""
        self.steps += 1
        plan = self.scheduler.schedule()
        requests = [self.scheduler.requests[name] for name in plan.num_scheduled_tokens]
        through = {r.request_id for r in requests if r.num_computed_tokens == r.num_tokens}
        logits = (
            torch.stack([said_by([*r.prompt, *r.output][: r.num_computed_tokens]) for r in requests])
            if requests
            else None
        )
        tokens = {}
        if requests:
            chosen = self._v1(requests, logits) if self.runner == "v1" else self._v2(requests, logits)
            tokens = {r.request_id: int(row.argmax()) for r, row in zip(requests, chosen) if r.request_id in through}
        for own in self.scheduler.update_from_output(plan, tokens).values():
            for told in own.outputs:
                if told.finish_reason is not None:
                    self.ended.setdefault(told.request_id, []).append(told.finish_reason)
                self.answers.setdefault(told.request_id, []).extend(told.new_token_ids)
        return bool(requests)

    def _v1(self, requests, logits):
        here = {row: r for row, r in self.places.items() if any(r is other for other in requests)}
        removed = [row for row in self.places if row not in here]
        free = [row for row in range(len(requests)) if row not in here]
        taken = {id(r) for r in here.values()}
        added = []
        for request in requests:
            if id(request) not in taken:
                row = free.pop(self.chance.randrange(len(free))) if free else max(here, default=-1) + 1
                here[row] = request
                added.append((row, request.sampling_params, request.prompt, request.output))
        moved = []
        # Rows are packed: those beyond the batch move down.
        for row in sorted(row for row in here if row >= len(requests)):
            gap = next(n for n in itertools.count() if n not in here)
            here[gap] = here.pop(row)
            moved.append((row, gap, False))
        if len(here) > 1 and self.chance.random() < 0.5:
            one, other = self.chance.sample(sorted(here), 2)
            here[one], here[other] = here[other], here[one]
            moved.append((one, other, True))
        self.places = here
        update = fake.BatchUpdate(added, removed, moved)
        self.processor.update_state(update if added or removed or moved else None)
        index = {id(r): n for n, r in enumerate(requests)}
        rows = [index[id(here[row])] for row in range(len(here))]
        out = self.processor.apply(logits[rows].clone())
        back = {index_: n for n, index_ in enumerate(rows)}
        return [out[back[n]] for n in range(len(requests))]

    def _v2(self, requests, logits):
        used = {slot: r for slot, r in self.places.items() if any(r is other for other in requests)}
        free = [slot for slot in range(64) if slot not in used]
        taken = {id(r): slot for slot, r in used.items()}
        for request in requests:
            # A preempted request comes back in another slot.
            if id(request) not in taken:
                slot = self.chance.choice(free[:8])
                free.remove(slot)
                used[slot] = request
                taken[id(request)] = slot
                self.state.prompt_len.np[slot] = len(request.prompt)
                self.state.prefill_len.np[slot] = request.num_tokens
                touched = self.processor.add_request(slot, request.sampling_params)
                assert touched == (wire.KEY in (request.sampling_params.extra_args or {}))
        self.places = used
        order = list(range(len(requests)))
        self.chance.shuffle(order)
        slots = np.array([taken[id(requests[n])] for n in order])
        seen = np.array([requests[n].num_computed_tokens for n in order])
        context = SimpleNamespace(idx_mapping_np=slots, seq_lens_upper_bound_np=seen)
        out = self.processor.apply(logits[order].clone(), context)
        back = {n: at for at, n in enumerate(order)}
        return [out[back[n]] for n in range(len(requests))]

    def run(self, late=(), abort_at=None, abort=()):
        late, idle = list(late), 0
        while (self.scheduler.requests or late) and idle < 40:
            for request in late[:2]:
                self.add(request)
            late = late[2:]
            idle = 0 if self.step() else idle + 1
            if self.steps == abort_at:
                self.scheduler.finish_requests(abort, fake.RequestStatus.FINISHED_ABORTED)
        assert self.scheduler.own_preemptions == 0 and self.scheduler.gangs_parted == 0
        return self


def prompt(chance, length):
    return [chance.randrange(2, N) for _ in range(length)]


def mixed(seed, groups=12, temperature=0.0):
    """Groups of two and four views with their answers, and ordinary requests."""
    chance, found, ordinary = random.Random(seed), [], []
    for number in range(groups):
        kind = ("m3id", "vcd", "vcd+icd+ritual")[number % 3]
        weights = {"m3id": (0.0,), "vcd": (-1.0,), "vcd+icd+ritual": (-1.0, -0.5, 1.0)}[kind]
        how = dict(weights=weights, counts=(1, 1, 1) if len(weights) == 3 else (), id=f"s{number}", seed=seed)
        prompts = [prompt(chance, chance.randrange(3, 14)) for _ in range(len(weights) + 1)]
        requests = group_of(kind, prompts, temperature=temperature, **how)
        found.append((requests, expected(kind, prompts, temperature=temperature, **how)))
    for number in range(groups // 2):
        ids = prompt(chance, chance.randrange(3, 14))
        request = fake.Request(
            f"o{seed}-{number}", ids, fake.SamplingParams(temperature=0, max_tokens=8, eos_token_id=EOS)
        )
        ordinary.append((request, expected("plain", [ids], weights=())))
    return found, ordinary


SHAPES = {
    "roomy": dict(rows=32),
    "five rows": dict(rows=5),
    "chunks": dict(rows=8, budget=8),
    # The largest group needs 4 views of 13 + 8 tokens: 24 blocks of 4.
    "few blocks": dict(rows=16, blocks=25),
    "few blocks in chunks": dict(rows=16, blocks=25, budget=9),
    "warm prefix cache": dict(rows=16, warm=True),
    "warm, few blocks": dict(rows=16, blocks=25, warm=True),
}


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_groups_answer_as_their_method_does_alone_whatever_shares_the_engine(engine, shape, runner):
    preempted = 0
    for seed in range(4):
        groups, ordinary = mixed(seed, temperature=float(seed % 2))
        world = World(engine, runner, seed, **SHAPES[shape])
        requests = [r for own, _ in groups for r in own] + [r for r, _ in ordinary]
        world.chance.shuffle(requests)
        world.add(*requests[: len(requests) // 2])
        world.run(late=requests[len(requests) // 2 :])
        for own, answer in groups:
            assert [world.answers.get(r.request_id) for r in own] == [answer] * len(own)
        assert all(world.answers.get(r.request_id) == answer for r, answer in ordinary)
        assert not world.scheduler.gangs and not world.scheduler.running and not world.scheduler.waiting
        preempted += world.scheduler.gang_preemptions
    assert (preempted > 0) == ("few blocks" in shape)


def test_the_make_believe_model_tells_groups_apart_and_without_the_scheduler_they_part(engine):
    """What the tests above rest on: other views give other answers, and vLLM's own order would part groups."""
    views = [[2, 3, 4, 5], [6, 7, 8]]
    answer = expected("vcd", views, weights=(-1.0,))
    assert answer != expected("plain", views[:1], weights=()) != expected("vcd", [views[0], [9, 9, 9]], weights=(-1.0,))
    world = World(engine, budget=4)
    world.scheduler.__class__ = type("Stock", (fake.Scheduler,), {"gangs_parted": 0, "gang_preemptions": 0})
    requests = group_of("vcd", views, weights=(-1.0,))
    world.add(*requests)
    world.run()
    assert [world.answers[r.request_id] for r in requests] != [answer, answer]


@pytest.mark.parametrize("whole", [True, False])
def test_an_aborted_member_ends_its_group_and_nobody_else(engine, whole):
    groups, ordinary = mixed(5)
    world = World(engine, rows=32)
    world.add(*(r for own, _ in groups for r in own), *(r for r, _ in ordinary))
    gone, _ = groups[2]
    world.run(abort_at=2, abort=[r.request_id for r in gone[: None if whole else 1]])
    for own, answer in groups:
        if own is not gone:
            assert [world.answers[r.request_id] for r in own] == [answer] * len(own)
    # Who aborts knows it; the clients of the others are told, once.
    untold = [] if whole else gone[1:]
    assert {r.request_id: world.ended.get(r.request_id) for r in gone[1:]} == {
        r.request_id: (["abort"] if r in untold else None) for r in gone[1:]
    }
    assert not world.scheduler.requests and not world.scheduler.gangs


def changed(request, **fields):
    """A request whose text says something else."""
    params = dataclasses.replace(request.sampling_params)
    params.extra_args = {wire.KEY: json.dumps({**json.loads(params.extra_args[wire.KEY]), **fields})}
    return fake.Request(request.request_id, request.prompt, params)


def test_what_contradicts_itself_ends_alone_and_raises_nothing(engine):
    def pair(**more):
        return group_of("vcd", [[2, 3, 4, 5], [6, 7, 8]], weights=(-1.0,), **more)

    world = World(engine, rows=4, blocks=40)
    good = pair()
    lone = pair()[:1]
    twice = pair()
    again = fake.Request("again", twice[0].prompt, twice[0].sampling_params)
    limits = pair()
    limits[1].max_tokens = 3
    seeds = pair()
    seeds[1] = changed(seeds[1], seed=9)
    many = group_of("vcd+icd+ritual+cad", [[2, 3, 4]] * 5, weights=(-1.0, -1.0, 1.0, -1.0), counts=(1, 1, 1, 1))
    short = group_of("vcd", [[2, 3], [6]], weights=(-1.0,))
    wide = group_of("vcd", [[2] * 60, [3] * 20], weights=(-1.0,), max_tokens=30)
    long = group_of("vcd", [[2] * 64, [3] * 20], weights=(-1.0,))
    session = pair()
    session[1].resumable = True
    huge = group_of("vcd+icd+ritual", [[2] * 60] * 4, weights=(-1.0, -1.0, 1.0), counts=(1, 1, 1), max_tokens=4)
    world.add(*lone, twice[0], again, *limits, *seeds, *many, *short, *wide, *long, *huge, *session, *good, twice[1])
    for _ in range(40):
        world.step()
    answer = expected("vcd", [[2, 3, 4, 5], [6, 7, 8]], weights=(-1.0,))
    for own in (good, twice):
        assert [world.answers[r.request_id] for r in own] == [answer, answer]
    for own in ([again], limits, seeds, many, short, long, huge, session):
        assert [world.ended.get(r.request_id) for r in own] == [["abort"]] * len(own)
    # All views end where the longest has no room left.
    assert len({tuple(world.answers[r.request_id]) for r in wide}) == 1 and len(world.answers[wide[0].request_id]) <= 4
    assert list(world.scheduler.requests) == [lone[0].request_id]
    world.scheduler.finish_requests(lone[0].request_id, fake.RequestStatus.FINISHED_ABORTED)
    assert not world.scheduler.gangs


def test_views_whose_partners_do_not_come_are_ended_and_the_clients_told(engine):
    world = World(engine)
    now = [0.0]
    world.scheduler.clock = lambda: now[0]
    lone, other = group_of("vcd", [[2, 3, 4, 5], [6, 7, 8]], weights=(-1.0,)), mixed(6, groups=3)[0]
    world.add(lone[0])
    for _ in range(3):
        world.step()
    now[0] = gangs.PATIENCE - 1
    world.step()
    assert lone[0].request_id not in world.ended
    world.add(*(r for own, _ in other for r in own))
    now[0] = gangs.PATIENCE + 1
    world.step()
    assert world.ended[lone[0].request_id] == ["abort"]
    # A view that comes after its group broke up has nobody to wait for.
    world.add(lone[1])
    gone = group_of("vcd", [[2, 3, 4, 5], [6, 7, 8]], weights=(-1.0,))
    world.add(gone[1])
    world.scheduler.finish_requests(gone[1].request_id, fake.RequestStatus.FINISHED_ABORTED)
    world.add(gone[0])
    # Groups that were complete are waited for as long as it takes.
    now[0] = 10 * gangs.PATIENCE
    world.run()
    assert world.ended[lone[1].request_id] == world.ended[gone[0].request_id] == ["abort"]
    for own, answer in other:
        assert [world.answers[r.request_id] for r in own] == [answer] * len(own)


def test_a_group_that_vllm_parts_ends_as_an_error_and_the_others_go_on(engine):
    groups, _ = mixed(3, groups=6)
    world = World(engine, rows=32)
    world.add(*(r for own, _ in groups for r in own))
    bad = groups[0][0]
    once = iter([True])

    def held(self, request, computed, new):
        kept = type(self).held(self, request, computed, new)
        return 0 if request is bad[1] and kept and request.num_computed_tokens and next(once, False) else kept

    world.scheduler.held = held.__get__(world.scheduler)
    for _ in range(40):
        world.step()
    assert [world.ended[r.request_id] for r in bad] == [["error"]] * len(bad) and world.scheduler.gangs_parted == 1
    for own, answer in groups[1:]:
        assert [world.answers[r.request_id] for r in own] == [answer] * len(own)


def test_large_groups_are_not_passed_by_small_requests_for_ever(engine):
    chance = random.Random(0)
    world = World(engine, rows=4)
    small = [
        fake.Request(f"small{n}", prompt(chance, 4), fake.SamplingParams(temperature=0, max_tokens=8))
        for n in range(30)
    ]
    large = group_of("vcd+icd+ritual", [prompt(chance, 5)] * 4, weights=(-1.0, -1.0, 1.0), counts=(1, 1, 1))
    world.add(*small[:3], *large)
    done_after = None
    late = small[3:]
    while world.scheduler.requests or late:
        world.add(*late[:1])
        late = late[1:]
        world.step()
        if done_after is None and large[0].is_finished():
            done_after = sum(r.is_finished() for r in small)
    assert done_after is not None and done_after <= 6


# --- one combine ----------------------------------------------------------------------------------------------------------


def test_rows_of_strangers_and_of_groups_that_are_not_whole_are_left_alone():
    member = wire.Member("g", 0, 2, wire.described(ld.VCD()), (-1.0,))
    partner = dataclasses.replace(member, view=1)
    logits = torch.randn(5, N, generator=torch.Generator().manual_seed(0))
    out = logits.clone()
    combine.decide(out, [combine.Row(1, member, 0)])
    assert torch.equal(out, logits)
    combine.decide(out, [combine.Row(3, partner, 0), combine.Row(1, member, 0)])
    token = int(ld.VCD().scores(Step(logits[[1, 3]][:, None, None], torch.tensor([[0]]), (-1.0,))).argmax())
    assert out[1].tolist() == out[3].tolist() == [0.0 if n == token else -torch.inf for n in range(N)]
    assert torch.equal(out[[0, 2, 4]], logits[[0, 2, 4]])


@pytest.mark.parametrize(
    "draw", [{"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.3, "top_p": 0.6, "min_p": 0.05}]
)
def test_draws_are_those_of_generate_with_a_seed(draw, tiny_draws):
    """Processors and warpers of transformers, then the keyed draw: as a sampling run of ``attach`` ends."""
    scores = torch.randn(3, N, generator=torch.Generator().manual_seed(1)) * 3
    rows = [
        combine.Row(
            n,
            wire.Member(f"g{n}", 0, 1, wire.described(ld.parse("plain")), seed=7, id=wire.printed(("x", n)), **draw),
            n,
        )
        for n in range(3)
    ]
    got = combine.drawn(scores, rows).argmax(-1).tolist()
    assert got == [tiny_draws(scores[n : n + 1], draw, 7, ("x", n), n) for n in range(3)]
    assert torch.equal(
        combine.drawn(scores, [r._replace(member=dataclasses.replace(r.member, temperature=0.0)) for r in rows]),
        scores,
    )


@pytest.fixture
def tiny_draws():
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=N, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)

    def draw(scores, how, seed, id, position):
        settings = GenerationConfig(do_sample=True, **{"top_k": 0, **how})
        processors = model._get_logits_processor(settings, input_ids_seq_length=1)
        processors.append(sampling.KeyedDraw(seed, [id], 1))
        return int(processors(torch.zeros(1, 1 + position, dtype=torch.long), scores).argmax())

    return draw


# --- what travels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{" * 5000,
        "x" * 30_000,
        json.dumps({"group": "g", "view": 0, "views": 10**9, "method": "[]", "weights": []}),
        json.dumps(
            {"group": "g", "view": 2, "views": 2, "method": '[{"name": "vcd", "parameters": {}}]', "weights": [-1]}
        ),
        json.dumps(
            {
                "group": "g",
                "view": 0,
                "views": 2,
                "method": '[{"name": "vcd", "parameters": {}}]',
                "weights": [float("nan")],
            }
        ),
        json.dumps(
            {"group": "g", "view": 0, "views": 3, "method": '[{"name": "m3id", "parameters": {}}]', "weights": [0, 0]}
        ),
        json.dumps(
            {"group": "g", "view": 0, "views": 1, "method": '[{"name": "dola", "parameters": {}}]', "weights": []}
        ),
        json.dumps(
            {"group": "g", "view": 0, "views": 2, "method": '[{"name": "nobody", "parameters": {}}]', "weights": [-1]}
        ),
        json.dumps(
            {
                "group": "g",
                "view": 0,
                "views": 2,
                "method": '[{"name": "vcd", "parameters": {"alpha": -3}}]',
                "weights": [-1],
            }
        ),
        json.dumps(
            {
                "group": "g",
                "view": 0,
                "views": 1,
                "method": '[{"name": "plain", "parameters": {}}]',
                "weights": [],
                "temperature": -1,
            }
        ),
        json.dumps({"group": "g", "view": 0, "views": 1, "method": '[{"name": 5, "parameters": {}}]', "weights": []}),
        json.dumps(
            {"group": "g", "view": 0, "views": 1, "method": '[{"name": "plain", "parameters": 5}]', "weights": []}
        ),
        json.dumps({"group": "g", "view": 0, "views": 1, "method": "[" * 9000, "weights": []}),
        5,
    ],
)
def test_texts_that_describe_no_view_are_refused_by_the_frontend_and_harmless_in_the_engine(engine, text):
    params = fake.SamplingParams(temperature=0, extra_args={wire.KEY: text}, eos_token_id=EOS)
    with pytest.raises(ValueError):
        engine.processor.Grouped.validate_params(params)
    world = World(engine)
    world.scheduler.add_request(fake.Request("bad", [2, 3, 4], params))
    world.run()
    assert len(world.answers["bad"]) > 0


@pytest.mark.parametrize(
    "draw",
    [{"temperature": 2}, {"temperature": 1e-300}, {"temperature": 1, "top_k": 10**9}, {"temperature": 5, "min_p": 1}],
)
def test_settings_at_the_edge_end_no_engine(engine, draw):
    """Another client may write whole numbers, or very small ones, where this one writes numbers with a point."""
    requests = group_of("vcd", [[2, 3, 4], [5, 6, 7]], weights=(-1,), **draw)
    world = World(engine)
    world.add(*requests)
    world.run()
    assert len({tuple(world.answers[r.request_id]) for r in requests}) == 1


def test_a_views_own_sampling_settings_are_refused(engine):
    (request, _) = group_of("vcd", [[2, 3], [4, 5]], weights=(-1.0,))
    check = engine.processor.Grouped.validate_params
    check(request.sampling_params)
    for name, value in {"temperature": 0.5, "repetition_penalty": 1.2, "logprobs": 3, "n": 2, "min_tokens": 4}.items():
        with pytest.raises(InputError, match=name):
            check(dataclasses.replace(request.sampling_params, **{name: value}))
    check(fake.SamplingParams(temperature=0.5, repetition_penalty=1.2))


# --- the port -------------------------------------------------------------------------------------------------------------


def test_only_the_port_names_vllm_and_its_private_names():
    port = (PACKAGE / "port.py").read_text()
    private = {node.name for node in ast.walk(ast.parse(port)) if isinstance(node, ast.FunctionDef)}
    private = {name for name in private if name.startswith("_") and not name.startswith("__")}
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imports |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
        if path.name != "port.py":
            assert not any(name.partition(".")[0] == "vllm" for name in imports), path.name
            assert not names & private, path.name


def test_the_probe_says_what_moved_and_what_was_tested(engine, monkeypatch):
    assert engine.port.probe() == []
    monkeypatch.delattr(fake.Scheduler, "_reserve_prefill_lookahead")
    monkeypatch.setattr(fake.Scheduler, "_preempt_request", lambda self, requests: None)
    with pytest.raises(DependencyError) as error:
        engine.scheduler.GangScheduler(fake.shape())
    said = str(error.value)
    assert "Scheduler._reserve_prefill_lookahead is gone" in said and "(self, requests), not (self, request," in said
    assert "0.32.0" in said and "pip install 'vllm>=0.32,<0.33'" in said and said.count(". ") == 0


def test_engines_that_would_part_groups_are_refused_when_they_start(engine):
    def start(**fields):
        engine.scheduler.GangScheduler(SimpleNamespace(**{**vars(fake.shape()), **fields}))

    start()
    for fields, words in (
        ({"speculative_config": object()}, "speculative_config"),
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"scheduler_config": SimpleNamespace(policy="priority")}, "priority"),
        (
            {"parallel_config": SimpleNamespace(pipeline_parallel_size=2, data_parallel_size=1)},
            "pipeline_parallel_size",
        ),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=2)}, "data_parallel_size"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            start(**fields)
    with pytest.raises(UnsupportedError, match="disable_hybrid_kv_cache_manager"):
        engine.scheduler.GangScheduler(fake.shape(), SimpleNamespace(kv_cache_groups=[1, 2]))


def test_classes_are_passed_by_name_and_no_entry_point_is_registered(engine):
    args = lvlm_decode.vllm.engine_args()
    module, _, name = args["scheduler_cls"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is engine.scheduler.GangScheduler
    ((processor,),) = (args["logits_processors"],)
    module, _, name = processor.partition(":")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, fake.RowProcessor) and issubclass(found, fake.SlotProcessor)
    assert "enable_prompt_embeds" not in args and lvlm_decode.vllm.engine_args(features=True)["enable_prompt_embeds"]
    assert lvlm_decode.vllm.engine_args(overlap=True)["scheduler_cls"].endswith("AsyncGangScheduler")
    assert "vllm." not in (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[2].partition("[tool.")[0]


def test_without_vllm_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    sys.modules.pop("lvlm_decode.vllm.port", None)
    lvlm_decode.vllm.installed.port.cache_clear()
    with pytest.raises(DependencyError, match=r"lvlm-decode\[vllm\]"):
        lvlm_decode.vllm.engine_args()


# --- what is served -------------------------------------------------------------------------------------------------------

SERVED = {
    "plain",
    "mask",
    "vcd",
    "ritual",
    "icd",
    "m3id",
    "lqcd",
    "cad",
    "vdd",
    "cicd",
    "code",
    "damro",
    "dcd",
    "uscd",
    "layercd",
    "causalmm",
}


def test_methods_that_combine_whole_views_are_served_and_the_others_say_why():
    found = lvlm_decode.vllm.served_methods()
    assert set(found) == set(METHODS) and {name for name, why in found.items() if why is None} >= SERVED
    for name in ("dola", "deco", "lol", "pai", "sid", "avisc", "scmoe", "vti", "nullu", "vista", "spin", "vaf", "hgai"):
        assert found[name] is not None
    for name in ("opera", "cntp", "mvp", "vdgd"):
        assert "searches by itself" in found[name]
    with pytest.raises(UnsupportedError, match=r"^opera cannot be served by vLLM: [^.]*\.attach[^.]*\.$"):
        lvlm_decode.vllm.check_served(ld.parse("opera"))
    with pytest.raises(UnsupportedError, match="dola"):
        lvlm_decode.vllm.check_served(ld.parse("vcd+dola"))


# --- views without a model ------------------------------------------------------------------------------------------------

TEXT = "USER: <image>\nPlease describe this image in detail. ASSISTANT:"


@pytest.fixture(scope="module")
def views():
    asked = []

    def ask(prompts, most):
        asked.append((prompts, most))
        return [[7, 8, 9] for _ in prompts]

    made = lvlm_decode.vllm.Views(lvlm_decode_data.tiny_path("tiny-llava"), ask=ask)
    made.asked = asked
    return made


def picture(number=0):
    return Image.open(lvlm_decode_data.load_scenes()[number].path)


def sample(**more):
    return {"prompt": TEXT, "multi_modal_data": {"image": picture()}, "id": "x", **more}


def settings(**more):
    return fake.SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **more})


def test_views_are_made_of_configuration_and_processor_alone(views):
    assert all(parameter.is_meta for parameter in views._family.model.parameters())


@pytest.mark.parametrize(
    "method",
    [
        "plain",
        "vcd",
        "icd",
        "ritual",
        "m3id",
        "vdd(absent=both)",
        "cad",
        "lqcd",
        "uscd",
        "vcd+icd+ritual",
        "damro",
        "layercd",
        "causalmm",
        "cicd",
        "dcd",
    ],
)
def test_views_are_those_that_transformers_gets(views, llava, method, tmp_path):
    """Ids, pixels and weights of every view, against a run of the loaded model."""
    from safetensors.torch import save_file

    from lvlm_decode.engine.run import Run

    model, processor = llava
    if method == "cicd":
        method = ld.parse("cicd", images=str(lvlm_decode_data.load_scenes()[5].path))
    if method == "dcd":
        state = {k: v.contiguous() + 0.1 for k, v in model.model.multi_modal_projector.state_dict().items()}
        save_file(state, tmp_path / "negative.safetensors")
        method = ld.parse("dcd", negative=str(tmp_path / "negative.safetensors"))
    method = ld.parse(method) if isinstance(method, str) else method
    inputs = dict(processor(text=[TEXT], images=[picture().convert("RGB")], return_tensors="pt"))
    run = Run(model, method, inputs, processor=processor, seed=3, sample_ids=["x"])
    group = views.group(method, sample(), settings(seed=3), max_model_len=200)
    members = [wire.of_params(params) for params in group.params]
    assert members[0].weights == tuple(float(view.weight) for view in run.views)
    assert [m.view for m in members] == list(range(len(run.samples))) and len({m.group for m in members}) == 1
    for (own,), prompt, length in zip(run.samples, group.prompts, group.lengths):
        assert length == len(own.input_ids)
        if "prompt_embeds" in prompt:
            want = model.get_input_embeddings()(own.input_ids)
            want[own.input_ids == 4] = own.images[0].features
            torch.testing.assert_close(prompt["prompt_embeds"], want, rtol=0, atol=0)
            continue
        ids = own.input_ids.tolist()
        kept = [i for n, i in enumerate(ids) if i != 4 or n == 0 or ids[n - 1] != 4]
        assert prompt["prompt_token_ids"] == kept
        if own.has_image:
            (image,) = prompt["multi_modal_data"]["image"]
            if isinstance(image, np.ndarray):
                np.testing.assert_array_equal(image, own.vision["pixel_values"][0].numpy())
                assert not any(prompt["mm_processor_kwargs"].values())
            else:
                assert own.vision["pixel_values"] is run.batch.samples[0].vision["pixel_values"]


@pytest.fixture(scope="module")
def llava():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = lvlm_decode_data.tiny_path("tiny-llava")
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32), AutoProcessor.from_pretrained(path)


def test_a_description_is_asked_of_the_engine(views):
    group = views.group("code(max_description=20)", sample(), settings(), max_model_len=200)
    (asked,) = views.asked
    assert asked[1] == 20 and len(asked[0]) == 1 and "multi_modal_data" in asked[0][0]
    assert [7, 8, 9] == [i for i in group.prompts[1]["prompt_token_ids"] if i in (7, 8, 9)][:3]
    silent = lvlm_decode.vllm.Views(views.path)
    with pytest.raises(UnsupportedError, match="ask="):
        silent.group("code", sample(), settings())


def test_what_the_caller_sets_is_what_the_group_draws_by(views):
    group = views.group(
        "vcd", sample(), settings(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, seed=5, max_tokens=11)
    )
    first, second = group.params
    member = wire.of_params(first)
    assert member.draw == (0.7, 9, 0.8, 0.1) and member.seed == 5 and member.id == "'x'"
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (0.0, 1.0, 0, 11)
    assert first.detokenize and not second.detokenize and second.output_kind is fake.RequestOutputKind.FINAL_ONLY
    # Strings that stop must stop every view.
    assert all(p.detokenize for p in views.group("vcd", sample(), settings(stop=["."])).params)
    other = views.group("vcd", sample(), settings(temperature=1.0))
    assert (
        wire.of_params(other.params[0]).seed != wire.of_params(views.group("vcd", sample(), settings()).params[0]).seed
    )
    assert other.name != group.name and [i.rpartition("-")[0] for i in other.ids] == [other.name] * 2


def test_what_cannot_be_honoured_is_refused_before_a_request_is_made(views):
    for more in ({"n": 2}, {"repetition_penalty": 1.1}, {"min_tokens": 3}, {"logprobs": 1}, {"logit_bias": {1: 2.0}}):
        with pytest.raises(UnsupportedError, match=next(iter(more))):
            views.group("vcd", sample(), settings(**more))
    with pytest.raises(InputError, match="has 104 tokens, and with max_tokens=8 it exceeds the model's 110"):
        views.group("icd", sample(), settings(), max_model_len=110)
    assert wire.of_params(views.group("icd", sample(), settings(max_tokens=None), max_model_len=110).params[1])
    assert views.group("icd", sample(), settings(max_tokens=None), max_model_len=110).params[0].max_tokens == 6
    with pytest.raises(InputError, match="max_tokens is None"):
        views.group("icd", sample(), settings(max_tokens=None))
    for bad in ({"text": "x"}, {"prompt": 3}, "x", sample(extra=1), sample(multi_modal_data={"image": "a.png"})):
        with pytest.raises(InputError):
            views.group("vcd", bad, settings())
    with pytest.raises(UnsupportedError, match="video"):
        views.group("vcd", sample(multi_modal_data={"video": 1}), settings())
    with pytest.raises(InputError):
        views.group("vcd", sample(multi_modal_data={}), settings())


def test_families_that_were_not_compared_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="'instructblip' is not served"):
        lvlm_decode.vllm.Views(lvlm_decode_data.tiny_path("tiny-instructblip"))
    with pytest.raises(InputError, match="nowhere"):
        lvlm_decode.vllm.Views(str(ROOT / "nowhere"))


def test_a_sample_may_show_several_pictures(views):
    two = {"prompt": "USER: <image>\n<image>\nCompare them. ASSISTANT:", "id": "x"}
    two["multi_modal_data"] = {"image": [picture(0), picture(1)]}
    group = views.group("vcd+icd+m3id", two, settings())
    for number in (0, 2):
        assert (
            group.prompts[number]["prompt_token_ids"].count(4)
            == 2
            == len(group.prompts[number]["multi_modal_data"]["image"])
        )
    noised = group.prompts[1]["multi_modal_data"]["image"]
    assert [image.shape for image in noised] == [(3, 96, 96)] * 2 and not np.allclose(*noised)
    assert group.lengths[0] - group.lengths[3] == 2 * 64 and "multi_modal_data" not in group.prompts[3]


def test_a_method_that_reads_features_without_saying_so_is_told(views):
    class Reader(ld.Contrast):
        name = "reader"

        def views(self, sample, rng):
            return [sample.with_features(lambda features, number: features * 0)]

    with pytest.raises(UnsupportedError, match=r"costs = \('feature',\)"):
        views.group(Reader(), sample(), settings())


@pytest.mark.parametrize("method", ["vcd(alpha=0)", "m3id(decay=0)", "vcd(alpha=0)+ritual"])
def test_a_part_at_strength_0_has_no_view(views, method):
    group = views.group(method, {"prompt": "USER: hello ASSISTANT:"}, settings())
    member = wire.of_params(group.params[0])
    assert len(group.prompts) == member.views == 1 + ("ritual" in method)
    scores = wire.made(*member.recipe).scores(
        Step(torch.randn(member.views, 1, 1, 64), torch.zeros(1, 1), member.weights)
    )
    assert scores.shape == (1, 1, 64)


def test_text_alone_is_served(views):
    group = views.group("vcd", {"prompt": "USER: hello ASSISTANT:"}, settings())
    assert all(set(prompt) == {"prompt_token_ids"} for prompt in group.prompts) and len(group.prompts) == 2


def test_the_small_llava_is_stored_under_names_that_vllm_reads():
    from safetensors import safe_open

    from tools.small_models.llava import published_names

    with safe_open(lvlm_decode_data.tiny_path("tiny-llava") / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    vision = [name for name in names if name.startswith("vision_tower.")]
    assert len(vision) > 50 and all(name.startswith("vision_tower.vision_model.") for name in vision)
    # transformers writes a new model without that part.
    new = {name.replace("vision_model.", ""): torch.zeros(()) for name in names}
    assert set(new) != set(names) == set(published_names(new)) == set(published_names(published_names(new)))


# --- the offline client ---------------------------------------------------------------------------------------------------


class LLM:
    """Answers every view of a group alike, or not."""

    def __init__(
        self, apart=False, scheduler="lvlm_decode.vllm.scheduler.GangScheduler", rows=8, embeds=False, normalizes=False
    ):
        media = SimpleNamespace(mm_device_do_normalize=normalizes)
        model = SimpleNamespace(
            revision=None,
            model=str(lvlm_decode_data.tiny_path("tiny-llava")),
            max_model_len=200,
            enable_prompt_embeds=embeds,
            multimodal_config=media,
        )
        schedule = SimpleNamespace(scheduler_cls=scheduler, max_num_seqs=rows)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model, scheduler_config=schedule))
        self.apart, self.calls = apart, []

    def generate(self, prompts, params, use_tqdm):
        self.calls.append((prompts, params))
        found = []
        for number, own in enumerate(params):
            member = wire.of_params(own)
            said = [int(member.id.strip("'")), number if self.apart else 0]
            found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=said, finish_reason="length")]))
        return found


def test_generate_returns_one_output_per_sample_in_order(engine, views):
    llm = LLM()
    outputs = lvlm_decode.vllm.generate(llm, "vcd", [sample(id=str(n)) for n in range(3)], settings(), views=views)
    assert [output.outputs[0].token_ids for output in outputs] == [[0, 0], [1, 0], [2, 0]] and len(llm.calls) == 1
    with pytest.raises(RuntimeError, match="did not stay together"):
        lvlm_decode.vllm.generate(LLM(apart=True), "vcd", [sample(id="1")], settings(), views=views)


def test_generate_refuses_engines_that_cannot_do_it(engine, views):
    def run(method, **more):
        lvlm_decode.vllm.generate(LLM(**more), method, [sample()], settings(), views=views)

    with pytest.raises(InputError, match="engine_args"):
        run("vcd", scheduler=None)
    with pytest.raises(InputError, match="engine_args"):
        run("vcd", normalizes=True)
    with pytest.raises(InputError, match="max_num_seqs=3"):
        run("vcd+icd+ritual", rows=3)
    with pytest.raises(InputError, match=r"engine_args\(features=True\)"):
        run("damro")
    with pytest.raises(UnsupportedError, match="opera"):
        run("opera")


def test_the_package_imports_neither_torch_nor_vllm():
    import subprocess

    code = "import sys, lvlm_decode.vllm; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_signatures_of_the_stand_ins_are_those_the_port_relies_on(engine):
    """``benchmarks/serving/run.py`` compares them with an installed vLLM."""
    for owner, names in engine.port.SIGNATURES.items():
        for name, wanted in names.items():
            assert tuple(inspect.signature(getattr(owner, name)).parameters)[: len(wanted)] == wanted
    assert served.reads_encoder(ld.DAMRO()) and not served.reads_encoder(ld.VCD())
