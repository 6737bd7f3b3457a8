"""A draft never changes an answer: every drafter, under every method, greedy and sampled, equals the run without one."""

import copy
import functools
import importlib

import pytest
import torch
from contract import KINDS as KINDS_OF_METHODS
from helpers import Ends, full_but
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from lvlm_decode.attachment import attach
from lvlm_decode.errors import LvlmDecodeError, UnsupportedError
from lvlm_decode.methods import METHODS, load, parse
from lvlm_decode.speculative import drafters
from lvlm_decode.speculative.heads import KINDS, DraftHead, HeadConfig
from lvlm_decode.testing import models as zoo
from lvlm_decode.testing.drafters import NEW, SAMPLED
from lvlm_decode.testing.drafters import drafted as run
from lvlm_decode.testing.replay import Replay

METHOD_NAMES = ["plain", "vcd", "icd", "ritual", "vcd+ritual", "damro", "dola"]
FREE = ["random", "oracle", "half", "half tree", "lookup", "copyspec", "recycling", "automaton"]
HEADS = [f"{kind} {form}" for kind in KINDS for form in ("chain", "tree")] + ["vispec contrast", "msd stop"]


def method_of(name):
    for part in name.split("+"):
        method_of_registry(part)
    return parse(name)


@functools.cache
def model_of(family, dtype):
    tiny = zoo.tiny(family)
    return tiny, copy.deepcopy(tiny.model).to(dtype)


@functools.cache
def head_of(family, kind, dtype):
    _, model = model_of(family, dtype)
    torch.manual_seed(0)
    return DraftHead(HeadConfig.for_target(model, kind, rows=7, depth=3, top_k=2)).to(dtype)


def drafter_of(name, family, dtype, answers):
    replay = Replay
    known = {
        "none": lambda: replay(tokens=0),
        "random": lambda: replay(tokens=3),
        "oracle": lambda: replay(answers=answers),
        "half": lambda: replay(answers=answers, acceptance=0.5),
        "half tree": lambda: replay(answers=answers, acceptance=0.5, width=3, tokens=3),
    }
    if name in known:
        return known[name]()
    kind, _, form = name.partition(" ")
    if kind not in KINDS:
        return drafters.parse(name)
    how = {"chain": {"top_k": 1}, "tree": {}, "contrast": {"contrast": True}, "stop": {"top_k": 1, "stop": 0.3}}[form]
    return drafters.get(kind)(head=head_of(family, kind, dtype), **how)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", full_but(METHOD_NAMES, ["plain", "vcd+ritual"]))
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float64, id="float64", marks=pytest.mark.full), pytest.param(torch.float32, id="float32")],
)
def test_every_drafter_gives_the_answer_of_the_method_alone(dtype, name, options):
    method = method_of(name)
    tiny, model = model_of("llava", dtype)
    inputs = tiny.inputs(["what is in it", "is it"], seed=4)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    expected, _ = run(tiny, model, method, inputs, **options)
    width = inputs["input_ids"].shape[1]
    answers = expected[:, width:].tolist()
    for drafting in ["none", *FREE, *HEADS]:
        if "contrast" in drafting and name == "dola":
            continue  # refused; see below
        out, stats = run(tiny, model, method, inputs, drafter_of(drafting, "llava", dtype, answers), **options)
        assert torch.equal(out, expected), (drafting, out[:, width:], expected[:, width:])
        assert stats.tokens == sum(len(a) for a in strip(answers))
        if drafting == "oracle":
            assert stats.tau > 3


def strip(answers):
    """Answers up to their end token; what follows fills up the batch."""
    return [a[: a.index(zoo.EOS) + 1] if zoo.EOS in a else a for a in answers]


@pytest.mark.parametrize(
    "options",
    [{}, SAMPLED, {"repetition_penalty": 1.3}, {"cache_implementation": "static"}],
    ids=["greedy", "sampled", "penalty", "static"],
)
@pytest.mark.parametrize("name", full_but(["plain", "vcd", "icd", "vcd+ritual", "dola"], ["icd"]))
def test_a_single_sample_takes_shortcuts_and_gives_the_same_answer(name, options):
    """Batch 1 keeps paths, positions and caches by code of its own; ICD's first view is padded there too."""
    method = method_of(name)
    tiny, model = model_of("llava", torch.float32)
    inputs = tiny.inputs(["what is in it"], seed=4)
    undrafted = {key: value for key, value in options.items() if key != "cache_implementation"}
    expected, _ = run(tiny, model, method, inputs, **undrafted)
    answers = expected[:, inputs["input_ids"].shape[1] :].tolist()
    drafting = ["half tree", "recycling", "vispec chain", "vispec tree", "vispec contrast"]
    for each in drafting[: 4 if name == "dola" else 5]:
        out, _ = run(tiny, model, method, inputs, drafter_of(each, "llava", torch.float32, answers), **options)
        assert torch.equal(out, expected), each


@pytest.mark.parametrize("family", full_but(["instructblip", "qwen2_5_vl", "llava_next"], ["qwen2_5_vl"]))
@pytest.mark.parametrize("cache", [None, "static"])
def test_families_and_static_caches(family, cache):
    tiny, model = model_of(family, torch.float32)
    inputs = tiny.inputs(["is it", "what color"], seed=1)
    for name in ("plain", "vcd"):
        expected, _ = run(tiny, model, parse(name), inputs)
        answers = expected[:, inputs["input_ids"].shape[1] :].tolist()
        for drafting in ("half", "half tree", "recycling", "vispec tree", "msd chain"):
            extra = {"cache_implementation": cache} if cache else {}
            drafter = drafter_of(drafting, family, torch.float32, answers)
            out, _ = run(tiny, model, parse(name), inputs, drafter, **extra)
            assert torch.equal(out, expected), (name, drafting)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 6},
        {"repetition_penalty": 1.3, **SAMPLED},
        {"bad_words_ids": [[40], [41, 42]], "suppress_tokens": [50, 51]},
    ],
)
def test_processors_see_each_nodes_own_path(options):
    tiny, model = model_of("llava", torch.float64)
    inputs = tiny.inputs(["is it", "what color"], seed=2)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected, _ = run(tiny, model, parse("vcd"), inputs, **options)
    answers = expected[:, inputs["input_ids"].shape[1] :].tolist()
    for drafting in ("oracle", "half tree", "random", "recycling"):
        out, _ = run(
            tiny, model, parse("vcd"), inputs, drafter_of(drafting, "llava", torch.float64, answers), **options
        )
        assert torch.equal(out, expected), drafting


class Listener(LogitsProcessor):
    """Keeps what it was called with; changes scores by the length and the last token."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids[0].tolist())
        return scores + 0.1 * ((torch.arange(scores.shape[-1]) * int(input_ids[0, -1]) + input_ids.shape[1]) % 7)


def test_a_processor_is_called_as_without_a_draft():
    tiny, model = model_of("llava", torch.float64)
    inputs = tiny.inputs(["is it"], seed=2)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    calls = []
    answers = None
    for drafting in (None, "half tree", "random"):
        listener = Listener()
        drafter = None if drafting is None else drafter_of(drafting, "llava", torch.float64, answers)
        out, _ = run(
            tiny,
            model,
            parse("vcd"),
            inputs,
            drafter,
            logits_processor=LogitsProcessorList([listener]),
            eos_token_id=None,
        )
        calls.append(listener.calls)
        answers = out[:, inputs["input_ids"].shape[1] :].tolist()
    assert calls[0] == calls[1] == calls[2] and len(calls[0]) == NEW


class Contains(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([self.token in row[-3:].tolist() for row in input_ids])


def test_ends_and_lengths_are_honoured():
    tiny, model = model_of("llava", torch.float32)
    inputs = tiny.inputs(["what is in it"], seed=4)
    full, _ = run(tiny, model, parse("plain"), inputs, eos_token_id=None)
    answer = full[0, inputs["input_ids"].shape[1] :].tolist()
    oracle = lambda: drafter_of("oracle", "llava", torch.float32, [answer])  # noqa: E731
    for length in (1, 2, 3, 7):
        out, _ = run(tiny, model, parse("plain"), inputs, oracle(), eos_token_id=None, max_new_tokens=length)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == answer[:length]
    end = answer[5]
    stop = answer.index(end) + 1
    out, stats = run(tiny, model, parse("plain"), inputs, oracle(), eos_token_id=end)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == answer[:stop] and stats.tokens == stop
    criteria = StoppingCriteriaList([Contains(end)])
    expected, _ = run(tiny, model, parse("plain"), inputs, eos_token_id=None, stopping_criteria=criteria)
    out, _ = run(tiny, model, parse("plain"), inputs, oracle(), eos_token_id=None, stopping_criteria=criteria)
    assert torch.equal(out, expected)


#: Tokens that are no printable character, which alone a string can be made of.
UNPRINTABLE = [*range(4), *range(99, zoo.VOCABULARY)]


@pytest.mark.parametrize("texts", [["is it"], ["is it", "what color"]], ids=["one", "batch"])
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_stop_strings_are_honoured(family, texts):
    tiny, model = model_of(family, torch.float32)
    inputs = tiny.inputs(texts, seed=2)
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": UNPRINTABLE, "eos_token_id": None}
    # An InstructBLIP's own generate() gives no prompt back, so both are compared from the end.
    free = model.generate(**inputs, **options)
    answer = free[0, -NEW:].tolist()
    stop = tiny.tokenizer.decode(answer[5:7])
    options |= {"stop_strings": [stop], "tokenizer": tiny.tokenizer, "pad_token_id": zoo.PAD}
    expected = model.generate(**inputs, **options)
    ended = expected.shape[1] - free.shape[1] + NEW
    assert answer[:7] == expected[0, expected.shape[1] - ended :][:7].tolist()
    assert ended < NEW or len(texts) > 1, "the stop string must stop it"
    for drafter in (None, "oracle", "half tree", "recycling"):
        given = drafter_of(drafter, family, torch.float32, free[:, -NEW:].tolist()) if drafter else None
        out, _ = run(tiny, model, parse("plain"), inputs, given, **options)
        assert torch.equal(out[:, -ended:], expected[:, -ended:]), drafter
    vcd, _ = run(tiny, model, parse("vcd"), inputs, **options)
    out, _ = run(tiny, model, parse("vcd"), inputs, "recycling", **options)
    assert torch.equal(out, vcd)
    # From a configuration, as a checkpoint may bring them.
    del options["stop_strings"]
    config = GenerationConfig(stop_strings=[stop], eos_token_id=None, pad_token_id=zoo.PAD)
    for drafter in (None, "recycling"):
        out, _ = run(tiny, model, parse("plain"), inputs, drafter, **options, generation_config=config)
        assert torch.equal(out[:, -ended:], expected[:, -ended:]), drafter
    assert "_get_stopping_criteria" not in model.__dict__


@pytest.mark.parametrize("eos", [None, zoo.EOS])
def test_criteria_of_a_batch_end_it_as_without_a_draft(eos):
    """Without end tokens Hugging Face decodes samples on that have ended, until all have; with them it fills up."""
    tiny, model = model_of("llava", torch.float32)
    inputs = tiny.inputs(["is it", "what color", "what is in it"], seed=2)
    width = inputs["input_ids"].shape[1]
    how = {"eos_token_id": eos, "suppress_tokens": [zoo.EOS], "pad_token_id": zoo.PAD}
    free, _ = run(tiny, model, parse("vcd"), inputs, **how)
    answers = free[:, width:].tolist()
    assert len({answer[0] % 7 for answer in answers}) > 1, "samples must end at different lengths"
    for options in ({}, {"return_dict_in_generate": True, "output_scores": True}):
        expected, _ = run(tiny, model, parse("vcd"), inputs, stopping_criteria=[Ends(width)], **how, **options)
        for drafting in ("none", "oracle", "half tree", "recycling", "vispec tree"):
            drafter = drafter_of(drafting, "llava", torch.float32, answers)
            out, stats = run(
                tiny, model, parse("vcd"), inputs, drafter, stopping_criteria=[Ends(width)], **how, **options
            )
            if options:
                assert torch.equal(out.sequences, expected.sequences) and len(out.scores) == len(expected.scores)
            else:
                assert torch.equal(out, expected), drafting
                assert stats.tokens == (out[:, width:] != zoo.PAD).sum()


def test_every_criterion_is_called_once_a_token():
    tiny, model = model_of("llava", torch.float32)
    inputs = tiny.inputs(["is it"], seed=2)
    width = inputs["input_ids"].shape[1]
    calls = []
    for drafting in (None, "half tree"):
        criteria = [Ends(width), Ends(width)]
        drafter = drafter_of(drafting, "llava", torch.float32, [calls[-1][0][-1]]) if drafting else None
        run(tiny, model, parse("vcd"), inputs, drafter, stopping_criteria=criteria, eos_token_id=None)
        calls.append([criterion.calls for criterion in criteria])
    assert calls[0] == calls[1] and len(calls[0][0]) == len(calls[0][1]) > 3


class Collector:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_the_streamer_gets_every_token_once():
    tiny, model = model_of("llava", torch.float32)
    inputs = tiny.inputs(["is it"], seed=2)
    streams = []
    for drafter in (None, "recycling"):
        streamer = Collector()
        out, _ = run(tiny, model, parse("vcd"), inputs, drafter, streamer=streamer)
        assert streamer.ended and streamer.tokens == out[0].tolist()
        streams.append(streamer.tokens)
    assert streams[0] == streams[1]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_recorded_scores_are_those_of_the_undrafted_run(options):
    tiny, model = model_of("llava", torch.float64)
    inputs = tiny.inputs(["is it", "what color"], seed=2)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    record = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "eos_token_id": None}
    expected, _ = run(tiny, model, parse("vcd"), inputs, **record, **options)
    answers = expected.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    out, stats = run(
        tiny, model, parse("vcd"), inputs, drafter_of("half tree", "llava", torch.float64, answers), **record, **options
    )
    assert torch.equal(out.sequences, expected.sequences) and out.speculation is stats
    for name in ("logits", "scores"):
        for mine, theirs in zip(getattr(out, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_unseeded_sampling_follows_torchs_seed_and_the_law():
    tiny, model = model_of("llava", torch.float32)
    inputs = tiny.inputs(["is it"], seed=2)
    how = {"do_sample": True, "temperature": 0.5, "seed": None, "max_new_tokens": 2}
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(run(tiny, model, parse("plain"), inputs, "recycling", **how)[0])
    assert torch.equal(*runs)
    first = model(**inputs).logits[0, -1].float().div(0.5).softmax(-1)
    counts = torch.zeros_like(first)
    for _ in range(150):
        counts[run(tiny, model, parse("plain"), inputs, "recycling", **how)[0][0, -2]] += 1
    # Total variation of 150 draws; five times what the law itself gives on average.
    spread = (first * (1 - first) / 150).sqrt().sum() * 0.4
    assert 0.5 * (counts / 150 - first).abs().sum() < 5 * spread


@pytest.mark.parametrize("name", ["plain", "vcd"])
def test_bfloat16_differs_only_at_near_ties(name):
    """Where a drafted run first differs, what it chose instead scores within rounding of the best."""
    tiny, model = model_of("llava", torch.bfloat16)
    for seed in range(4):
        inputs = tiny.inputs(["is it"], seed=seed)
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        record = {"return_dict_in_generate": True, "output_logits": True}
        expected, _ = run(tiny, model, parse(name), inputs, **record)
        width = inputs["input_ids"].shape[1]
        theirs = expected.sequences[0, width:].tolist()
        for drafting in ("half", "half tree", "vispec tree", "recycling"):
            out, _ = run(tiny, model, parse(name), inputs, drafter_of(drafting, "llava", torch.bfloat16, [theirs]))
            mine = out[0, width:].tolist()
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), None)
            if at is None:
                assert len(mine) == len(theirs), (drafting, seed)
                continue
            logits = expected.logits[at][0]
            # Two units in the last place of the largest logit, amplified by the contrast (1 + 2 alpha).
            unit = 2.0 ** (logits.amax().abs().log2().floor().item() - 7)
            gap = logits.amax() - logits[mine[at]]
            assert gap <= 2 * unit * (1 if name == "plain" else 3), (drafting, seed, at, gap, unit)


def test_several_sequences_per_sample():
    tiny, model = model_of("llava", torch.float32)
    inputs = tiny.inputs(["is it", "what color"], seed=2)
    options = {**SAMPLED, "num_return_sequences": 3}
    expected, _ = run(tiny, model, parse("vcd"), inputs, **options)
    for drafting in ("random", "recycling", "vispec tree"):
        out, _ = run(tiny, model, parse("vcd"), inputs, drafter_of(drafting, "llava", torch.float32, []), **options)
        assert torch.equal(out, expected) and len(out) == 6, drafting


def test_what_cannot_be_honoured_is_refused():
    tiny, model = model_of("llava", torch.float32)
    inputs = tiny.inputs(["is it"], seed=2)
    with pytest.raises(UnsupportedError, match="num_beams"):
        run(tiny, model, parse("plain"), inputs, "recycling", num_beams=2)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        run(tiny, model, parse("plain"), inputs, "recycling", return_dict_in_generate=True, output_attentions=True)
    for other in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": zoo.tiny("llava").model}):
        with pytest.raises(UnsupportedError, match=r"drafter recycling is attached.*leave those out"):
            run(tiny, model, parse("plain"), inputs, "recycling", **other)


@pytest.mark.parametrize("name", full_but(sorted(METHODS), [*KINDS_OF_METHODS.values(), "opera", "mvp"]))
def test_every_registered_method_takes_a_drafter_or_refuses_it(name):
    method_of_registry(name)
    tiny, model = model_of("llava", torch.float32)
    cls = load(name)
    if "speculation" in cls.refuses:
        with pytest.raises(UnsupportedError, match="drafter"):
            attach(model, constructed(cls), drafter="recycling")
        assert "generate" not in model.__dict__
        return
    method = constructed(cls)
    inputs = tiny.inputs(["is it", "what color"], seed=2)
    try:
        expected, _ = run(tiny, model, method, inputs)
    except LvlmDecodeError as error:
        pytest.skip(f"{name} does not run on this model without a draft either: {error}")
    answers = expected[:, inputs["input_ids"].shape[1] :].tolist()
    for drafting in ("oracle", "half tree", "vispec tree"):
        out, _ = run(tiny, model, method, inputs, drafter_of(drafting, "llava", torch.float32, answers))
        assert torch.equal(out, expected), drafting


def method_of_registry(name):
    module = METHODS[name].split(":")[0]
    try:
        importlib.import_module(module, "lvlm_decode.methods")
    except ModuleNotFoundError:
        pytest.skip(f"{name} is registered, its module is not here")


def constructed(cls):
    try:
        return cls()
    except (TypeError, LvlmDecodeError) as error:
        pytest.skip(f"{cls.name} needs arguments: {error}")


def test_contrast_aware_drafting_says_what_it_lacks():
    tiny, model = model_of("llava", torch.float32)
    method = method_of("dola")
    with pytest.raises(UnsupportedError, match="leave out contrast"):
        run(tiny, model, method, tiny.inputs(["is it"]), drafter_of("vispec contrast", "llava", torch.float32, []))
