"""A draft that is given up in the middle of a call: Hugging Face's loop says the rest, the answer is that without a drafter."""

import copy
import functools

import pytest
import torch
from helpers import Ends, full_but
from transformers import LogitsProcessor

from lvlm_decode.engine.stack import Lane
from lvlm_decode.errors import InputError
from lvlm_decode.methods import parse
from lvlm_decode.speculative import generate
from lvlm_decode.speculative.drafters.auto import Auto
from lvlm_decode.speculative.ledger import FIRST, Entry, Ledger
from lvlm_decode.testing import models as zoo
from lvlm_decode.testing.drafters import SAMPLED, drafted
from lvlm_decode.testing.replay import Replay

TEXTS = ["what is in it", "is it", "what color"]
NEW = 20
#: A sliding window takes no drafts.
DRAFTED = sorted(set(zoo.BUILDERS) - {"gemma3"})


class Quitter:
    """``drafter="auto"`` with one drafter, whose drafts it gives up after so many cycles of every call."""

    def __init__(self, monkeypatch, answers, cycles, **how):
        self.cycles, self.left = cycles, 0
        self.auto = Auto()
        self.auto.candidates = {"replay": Replay(answers=answers, **{"acceptance": 0.6, "tokens": 3, **how})}
        #: For each call that was handed over how many tokens its samples had, and how many the loop began with.
        self.handed = []
        monkeypatch.setattr(Ledger, "plan", self.plan)
        monkeypatch.setattr(Ledger, "depth", self.depth)
        decode_on = generate.decode_on

        def noted(run, lanes, call, chooser, said, ended, start, *rest):
            self.handed.append(([len(own) for own in said], start))
            return decode_on(run, lanes, call, chooser, said, ended, start, *rest)

        monkeypatch.setattr(generate, "decode_on", noted)

    @property
    def plan(self):
        def plan(ledger, names):
            if not ledger.plain_tokens:
                ledger.undrafted([1.0] * FIRST)
            ledger.entries.setdefault("replay", Entry())
            self.left = self.cycles
            return "replay"

        return plan

    @property
    def depth(self):
        def depth(ledger, name, room, at):
            self.left -= 1
            return min(3, room) if self.left >= 0 else 0

        return depth


@functools.cache
def model_of(family, dtype=torch.float32):
    built = zoo.tiny(family)
    return built, built.model if dtype is torch.float32 else copy.deepcopy(built.model).to(dtype)


def run(built, model, name, inputs, drafter=None, **options):
    return drafted(built, model, parse(name), inputs, drafter, **{"max_new_tokens": NEW, **options})


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "batch"])
@pytest.mark.parametrize("name", ["plain", "vcd"])
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_the_answer_is_that_without_a_drafter(family, name, texts, options, monkeypatch):
    built, model = model_of(family)
    inputs = built.inputs(texts, seed=4)
    expected, _ = run(built, model, name, inputs, eos_token_id=None, **options)
    answers = expected[:, -NEW:].tolist()
    # An end token that one sample says early, another later or never.
    for end in (None, answers[0][6]):
        how = {"eos_token_id": end, "pad_token_id": zoo.PAD, **options}
        expected, _ = run(built, model, name, inputs, **how)
        lengths = [next((at for at, t in enumerate(own, 1) if t == end), NEW) for own in answers]
        with monkeypatch.context() as patched:
            for cycles, width in ((0, 1), (1, 1), (3, 1), (3, 2)):
                quitter = Quitter(patched, answers, cycles, width=width)
                out, stats = run(built, model, name, inputs, quitter.auto, **how)
                assert torch.equal(out, expected), (end, cycles, width)
                assert stats.tokens == sum(lengths)
                assert stats.handed_over == len(quitter.handed) <= 1
                if end is None:
                    assert stats.handed_over == 1 and stats.cycles == cycles * len(texts) and stats.rest_s > 0
                    ((had, start),) = quitter.handed
                    assert start == min(had) and (cycles < 3 or len(texts) == 1 or max(had) > start)
            patched.undo()


@pytest.mark.parametrize("family", full_but(DRAFTED, ["qwen2_5_vl", "paligemma"]))
def test_every_family_goes_on(family, monkeypatch):
    built, model = model_of(family)
    inputs = built.inputs(TEXTS[:2], seed=1)
    expected, _ = run(built, model, "vcd", inputs, eos_token_id=None)
    quitter = Quitter(monkeypatch, expected[:, -NEW:].tolist(), 2)
    out, stats = run(built, model, "vcd", inputs, quitter.auto, eos_token_id=None)
    assert torch.equal(out, expected) and stats.handed_over == 1


@pytest.mark.parametrize(
    "name, options",
    [
        ("icd", {}),  # its view is longer, so the samples' own rows are padded
        ("vcd+ritual", SAMPLED),
        ("dola", {}),
        ("vcd", {"cache_implementation": "static"}),
        ("vcd", {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 9}),
        ("vcd", {"num_return_sequences": 2, **SAMPLED}),
    ],
    ids=["padded", "three views", "layers", "static", "processors", "sequences"],
)
def test_caches_processors_and_views_go_on(name, options, monkeypatch):
    built, model = model_of("llava", torch.float64)
    inputs = built.inputs(TEXTS, seed=2)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected, _ = run(built, model, name, inputs, **{k: v for k, v in options.items() if k != "cache_implementation"})
    answers = expected[:, inputs["input_ids"].shape[1] :].tolist()
    quitter = Quitter(monkeypatch, answers, 3)
    out, stats = run(built, model, name, inputs, quitter.auto, **options)
    assert torch.equal(out, expected) and stats.handed_over == 1
    ((had, start),) = quitter.handed
    assert max(had) > start, "some sample must be ahead"


def test_slots_without_a_token_are_left_behind(monkeypatch):
    """Where nothing is proposed for a while, a sample that is behind has holes in its cache; the loop after it has none."""
    built, model = model_of("llava")
    inputs = built.inputs(TEXTS, seed=4)
    expected, _ = run(built, model, "plain", inputs, eos_token_id=None)
    answers = expected[:, -NEW:].tolist()
    quitter = Quitter(monkeypatch, answers, 5)
    begin = quitter.auto.candidates["replay"].begin

    def every_other(context):
        session = begin(context)
        propose, turn = session.propose, iter([True, False, True, False, True])
        session.propose = lambda room: propose(room) if next(turn) else propose(0)
        return session

    quitter.auto.candidates["replay"].begin = every_other
    masks, extend = [], Lane.extend

    def extended(lane, tokens, *args, **kwargs):
        masks.append(lane.mask)
        return extend(lane, tokens, *args, **kwargs)

    monkeypatch.setattr(Lane, "extend", extended)
    out, _ = run(built, model, "plain", inputs, quitter.auto, eos_token_id=None)
    assert torch.equal(out, expected)
    ((had, start),) = quitter.handed
    rest = masks[-(NEW - start) :]
    prompt = inputs["attention_mask"].bool()
    assert max(had) > start and len(masks) == 5 + NEW - start
    for mask in rest:
        assert (mask is None and bool(prompt.all())) or bool(mask[:, prompt.shape[1] :].all())


class Listener(LogitsProcessor):
    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids[0].tolist())
        return scores


class Collector:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_everything_hears_of_a_token_once(monkeypatch):
    built, model = model_of("llava")
    inputs = built.inputs(TEXTS[:1], seed=2)
    width = inputs["input_ids"].shape[1]
    heard, answers = [], None
    for cycles in (None, 0, 2):
        criteria, listener, streamer = Ends(width), Listener(), Collector()
        how = {"stopping_criteria": [criteria], "logits_processor": [listener], "streamer": streamer}
        quitter = None if cycles is None else Quitter(monkeypatch, answers, cycles)
        out, _ = run(built, model, "vcd", inputs, None if quitter is None else quitter.auto, eos_token_id=None, **how)
        answers = out[:, width:].tolist()
        assert streamer.ended == 1 and streamer.values == out[0].tolist()
        heard.append((criteria.calls, listener.calls, answers))
    assert heard[0] == heard[1] == heard[2] and len(heard[0][0]) > 3


@pytest.mark.parametrize("eos", [None, zoo.EOS])
def test_criteria_of_a_batch_end_it(eos, monkeypatch):
    built, model = model_of("llava")
    inputs = built.inputs(TEXTS, seed=2)
    width = inputs["input_ids"].shape[1]
    how = {"eos_token_id": eos, "suppress_tokens": [zoo.EOS], "pad_token_id": zoo.PAD}
    free, _ = run(built, model, "vcd", inputs, **how)
    answers = free[:, width:].tolist()
    for cycles in (1, 2, 3):
        for more in ({}, {"return_dict_in_generate": True, "output_scores": True}):
            expected, _ = run(built, model, "vcd", inputs, stopping_criteria=[Ends(width)], **how, **more)
            quitter = Quitter(monkeypatch, answers, cycles)
            out, _ = run(built, model, "vcd", inputs, quitter.auto, stopping_criteria=[Ends(width)], **how, **more)
            if more:
                assert torch.equal(out.sequences, expected.sequences) and len(out.scores) == len(expected.scores)
            else:
                assert torch.equal(out, expected), cycles


def test_a_streamer_of_a_batch_gets_every_token_once(monkeypatch):
    built, model = model_of("llava")
    inputs = built.inputs(TEXTS, seed=2)
    width = inputs["input_ids"].shape[1]
    expected, _ = run(built, model, "plain", inputs, eos_token_id=None)
    streamer = Collector()
    quitter = Quitter(monkeypatch, expected[:, width:].tolist(), 3)
    run(built, model, "plain", inputs, quitter.auto, eos_token_id=None, streamer=streamer)
    assert streamer.ended == 1
    said = streamer.values[inputs["input_ids"].numel() :]
    assert sorted(said) == sorted(expected[:, width:].flatten().tolist())
    ((had, start),) = quitter.handed
    assert max(had) > start


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kinds", [("scores", "logits"), ("scores",), ("logits",)], ids=["both", "scores", "logits"])
def test_recorded_scores_are_those_without_a_drafter(kinds, options, monkeypatch):
    built, model = model_of("llava", torch.float64)
    inputs = built.inputs(TEXTS, seed=2)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    record = {"return_dict_in_generate": True, "eos_token_id": None, **{f"output_{kind}": True for kind in kinds}}
    expected, _ = run(built, model, "vcd", inputs, **record, **options)
    quitter = Quitter(monkeypatch, expected.sequences[:, inputs["input_ids"].shape[1] :].tolist(), 3)
    out, stats = run(built, model, "vcd", inputs, quitter.auto, **record, **options)
    assert torch.equal(out.sequences, expected.sequences) and out.speculation is stats
    for kind in kinds:
        for mine, theirs in zip(getattr(out, kind), getattr(expected, kind), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_scores_that_hold_no_token_are_told_of(monkeypatch):
    class Bans(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores if input_ids.shape[1] < width + 8 else scores - float("inf")

    built, model = model_of("llava")
    inputs = built.inputs(TEXTS, seed=2)
    width = inputs["input_ids"].shape[1]
    for cycles in (None, 1):
        quitter = None if cycles is None else Quitter(monkeypatch, [], cycles)
        with pytest.raises(InputError, match="at generated token 8: no token of the vocabulary is left"):
            run(
                built,
                model,
                "plain",
                inputs,
                None if quitter is None else quitter.auto,
                eos_token_id=None,
                logits_processor=[Bans()],
            )
