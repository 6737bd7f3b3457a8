"""Every field of GenerationConfig and every argument of generate(): what the bare model does, or one sentence."""

import contextlib
import copy
import functools
import inspect
import threading

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, TextIteratorStreamer
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

import lvlm_decode as ld
from lvlm_decode.errors import InputError, LvlmDecodeError, UnsupportedError
from lvlm_decode.testing.models import EOS, PAD, tiny

HOW = dict(max_new_tokens=5, do_sample=False)
#: A value other than the default, and what must be set beside it.
FIELDS = {
    "max_length": (40, {"max_new_tokens": None}), "max_new_tokens": (3, {}), "min_length": (30, {}),
    "min_new_tokens": (4, {}), "max_time": (100.0, {}), "stop_strings": (["a"], {"tokenizer": "own"}),
    "early_stopping": (True, {"num_beams": 2}), "do_sample": (True, {}), "num_beams": (2, {}),
    "use_cache": (False, {}), "cache_implementation": ("static", {}), "cache_config": ({"backend": "quanto"}, {}),
    "max_cache_len": (64, {"cache_implementation": "static"}), "prefill_chunk_size": (4, {}),
    "temperature": (0.7, {"do_sample": True}), "top_k": (5, {"do_sample": True}), "top_p": (0.5, {"do_sample": True}),
    "min_p": (0.1, {"do_sample": True}), "top_h": (0.4, {"do_sample": True}), "typical_p": (0.5, {"do_sample": True}),
    "epsilon_cutoff": (1e-3, {"do_sample": True}), "eta_cutoff": (1e-3, {"do_sample": True}),
    "repetition_penalty": (1.4, {}), "encoder_repetition_penalty": (1.4, {}), "length_penalty": (0.5, {"num_beams": 2}),
    "no_repeat_ngram_size": (1, {}), "bad_words_ids": ([[9], [40]], {}), "sequence_bias": ([[[9], 5.0]], {}),
    "renormalize_logits": (True, {}), "forced_bos_token_id": (9, {}), "forced_eos_token_id": (EOS, {}),
    "remove_invalid_values": (True, {}), "exponential_decay_length_penalty": ((2, 1.5), {}),
    "suppress_tokens": ([9, 40], {}), "begin_suppress_tokens": ([9], {}), "guidance_scale": (1.5, {}),
    "watermarking_config": ({"greenlist_ratio": 0.4}, {}), "num_return_sequences": (2, {"num_beams": 2}),
    "output_attentions": (True, {"return_dict_in_generate": True}), "token_healing": (True, {"tokenizer": "own"}),
    "output_hidden_states": (True, {"return_dict_in_generate": True}),
    "output_scores": (True, {"return_dict_in_generate": True}), "output_logits": (True, {"return_dict_in_generate": True}),
    "return_dict_in_generate": (True, {}), "pad_token_id": (PAD, {}), "bos_token_id": (1, {}), "eos_token_id": (9, {}),
    "is_assistant": (True, {}), "num_assistant_tokens": (3, {}), "num_assistant_tokens_schedule": ("constant", {}),
    "assistant_confidence_threshold": (0.3, {}), "prompt_lookup_num_tokens": (2, {}), "max_matching_ngram_size": (2, {}),
    "assistant_early_exit": (1, {}), "assistant_lookbehind": (5, {}), "target_lookbehind": (5, {}),
    "compile_config": (None, {}), "disable_compile": (True, {}), "num_beam_groups": (2, {"num_beams": 2}),
    "diversity_penalty": (0.5, {"num_beams": 2}), "penalty_alpha": (0.5, {}), "dola_layers": ("low", {}),
    "low_memory": (True, {}), "constraints": ([], {}), "force_words_ids": ([[9]], {"num_beams": 2}),
    "decoder_start_token_id": (1, {}), "transformers_version": ("5", {}), "speculation_type": ("dflash", {}),
    "assistant_ensemble_weight": (0.5, {}),
    "continuous_batching_config": (None, {}), "encoder_no_repeat_ngram_size": (2, {}), "use_mtp": (True, {}),
}  # fmt: skip


def fields():
    return sorted(name for name in GenerationConfig().to_dict() if not name.startswith("_"))


@pytest.fixture(scope="module")
def zoo():
    return tiny("llava")


def call(zoo, form, *args, inputs=None, method=None, **kwargs):
    """The answer, or the error in the place of it."""
    method = method or ld.Plain()
    inputs = inputs or zoo.inputs(("is it a dog",), seed=1)
    kwargs = {**HOW, **kwargs}
    if kwargs.get("tokenizer") == "own":
        kwargs["tokenizer"] = zoo.tokenizer
    torch.manual_seed(0)
    try:
        if form == "attach":
            with ld.attached(zoo.model, method):
                return zoo.model.generate(*args, **inputs, **kwargs)
        more = {"custom_generate": method} if form == "custom_generate" else {}
        return zoo.model.generate(*args, **inputs, **kwargs, **more)
    except Exception as error:
        return error


@pytest.mark.parametrize("form", ["attach", "custom_generate"])
@pytest.mark.parametrize("field", fields())
def test_every_field_is_honoured_or_refused(zoo, field, form):
    assert field in FIELDS, f"transformers has a new setting {field!r}: give it a value here, and see what happens"
    value, beside = FIELDS[field]
    want, got = (call(zoo, one, **{field: value}, **beside) for one in ("bare", form))
    if isinstance(got, Exception):
        # One sentence of this library, or what transformers says itself.
        own = isinstance(got, LvlmDecodeError)
        same = isinstance(want, Exception) and type(got) is type(want)
        assert own or same or (form == "custom_generate" and "tokenizer" in str(got)), repr(got)
        assert not own or "\n" not in str(got)
        return
    assert not isinstance(want, Exception), f"transformers refuses it and {form} does not: {want}"
    first, second = (out if torch.is_tensor(out) else out.sequences for out in (want, got))
    assert torch.equal(first, second)
    if not torch.is_tensor(want):
        assert set(want) == set(got)


def test_every_argument_of_generate_is_known(zoo):
    """Each by its place, as transformers' signature has them."""
    names = [p for p in inspect.signature(GenerationMixin.generate).parameters if p not in ("self", "kwargs")]
    values = {
        "generation_config": GenerationConfig(max_new_tokens=3, pad_token_id=PAD, eos_token_id=EOS),
        "logits_processor": LogitsProcessorList([lambda ids, scores: scores.roll(1, -1)]),
        "stopping_criteria": StoppingCriteriaList(),
        "prefix_allowed_tokens_fn": lambda row, ids: [9, 40, 50],
        "synced_gpus": False,
    }
    inputs = zoo.inputs(("is it a dog",), seed=1)
    ids = inputs.pop("input_ids")
    args = [ids, *(values.get(name) for name in names[1:])]
    for count in range(1, len(args) + 1):
        given = {k: v for k, v in HOW.items() if count == 1}
        want = zoo.model.generate(*args[:count], **inputs, **given)
        with ld.attached(zoo.model, ld.Plain()):
            assert torch.equal(want, zoo.model.generate(*args[:count], **inputs, **given)), names[:count]


@pytest.mark.parametrize("form", ["attach", "custom_generate"])
@pytest.mark.parametrize("method", [ld.VCD(), ld.OPERA(num_beams=2, num_attn_candidates=2)], ids=lambda m: m.name)
def test_a_streamer_gets_the_answer_and_its_end(zoo, form, method):
    streamer = TextIteratorStreamer(zoo.tokenizer, skip_prompt=True, timeout=60)
    out = []
    thread = threading.Thread(target=lambda: out.append(call(zoo, form, method=method, streamer=streamer)))
    if "stream" in method.refuses:
        assert isinstance(call(zoo, form, method=method, streamer=streamer), UnsupportedError)
        return
    thread.start()
    text = "".join(streamer)
    thread.join()
    want = call(zoo, "attach", method=method)
    assert torch.equal(out[0], want)
    assert text == zoo.tokenizer.decode(want[0, zoo.inputs(("is it a dog",), seed=1)["input_ids"].shape[1] :])


METHODS = [ld.VCD(), ld.OPERA(num_beams=2, num_attn_candidates=2), ld.CNTP()]


@pytest.mark.parametrize("form", ["attach", "custom_generate"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("field", ["num_beams", "num_return_sequences"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_number_of_rows_below_one_is_refused_in_one_sentence(zoo, form, method, field, value):
    for given in ({field: value}, {"generation_config": GenerationConfig(**HOW, **{field: value})}):
        out = call(zoo, form, method=method, **given)
        assert isinstance(out, InputError) and str(out).startswith(f"{field} is {value}; give a whole number"), repr(
            out
        )


def test_numbers_of_rows_are_whole(zoo):
    for value in (1.5, "3"):
        out = call(zoo, "attach", num_beams=value)
        assert isinstance(out, InputError) and "num_beams" in str(out)
    assert torch.equal(call(zoo, "attach", num_beams=np.int64(2)), call(zoo, "bare", num_beams=2))
    with ld.attached(zoo.model, ld.VCD(), drafter="recycling"), pytest.raises(InputError, match="num_beams is 0"):
        zoo.model.generate(**zoo.inputs(("is it a dog",), seed=1), **HOW, num_beams=0)


@pytest.mark.parametrize("form", ["attach", "custom_generate"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_mode_without_a_loop_is_refused_by_searches_too(zoo, form, method):
    out = call(zoo, form, method=method, num_beams=2, num_beam_groups=2, diversity_penalty=0.5)
    assert isinstance(out, UnsupportedError) and "group_beam_search" in str(out), repr(out)


def test_what_a_callable_is_not_given_is_refused(zoo):
    out = call(zoo, "custom_generate", assistant_model=zoo.model)
    assert isinstance(out, UnsupportedError) and "assistant_model" in str(out)


@pytest.mark.parametrize("form", ["attach", "custom_generate"])
def test_synced_processes_run_the_same_number_of_forwards(zoo, form, monkeypatch):
    """The flag reaches the loop; a search of its own refuses it."""
    seen = []
    real = GenerationMixin._sample

    @functools.wraps(real)
    def watch(self, *args, **kwargs):
        seen.append(kwargs["synced_gpus"])
        return real(self, *args, **{**kwargs, "synced_gpus": False})

    monkeypatch.setattr(GenerationMixin, "_sample", watch)
    call(zoo, form, synced_gpus=True, method=ld.VCD())
    assert seen == [True]
    out = call(zoo, form, synced_gpus=True, method=ld.CNTP())
    assert isinstance(out, UnsupportedError) and "synced_gpus" in str(out)


@pytest.mark.parametrize("form", ["attach", "custom_generate", "processor"])
def test_gradient_checkpointing_while_training_is_refused(form):
    zoo = copy.copy(tiny("llava"))
    zoo.model = copy.deepcopy(zoo.model)
    zoo.model.gradient_checkpointing_enable()
    zoo.model.train()
    if form == "processor":
        with pytest.raises(UnsupportedError, match="gradient checkpointing"):
            ld.VCD().processor(zoo.model, zoo.inputs())
    else:
        out = call(zoo, form, method=ld.VCD())
        assert isinstance(out, UnsupportedError) and "gradient checkpointing" in str(out)
    zoo.model.eval()
    assert torch.is_tensor(call(zoo, "attach", method=ld.VCD()))


ODD_SEEDS = ["1", 1.5, True, [], torch.tensor(3), object()]
ODD_IDS = [["a", "b"], "a", 5, {"a": 1}, {"a"}, torch.arange(1), [["x"]], [({},)]]


@pytest.mark.parametrize("form", ["attach", "custom_generate", "processor"])
def test_keys_of_randomness_are_whole_numbers_and_one_for_each_row(zoo, form):
    """Arguments that are this library's own, for one row."""
    inputs, method = zoo.inputs(("is it a dog",), seed=1), ld.VCD()

    def ask(**keys):
        if form == "processor":
            return method.processor(zoo.model, inputs, **keys)
        with ld.attached(zoo.model, method) if form == "attach" else contextlib.nullcontext():
            more = {} if form == "attach" else {"custom_generate": method}
            return zoo.model.generate(**inputs, **HOW, **keys, **more)

    for seed in ODD_SEEDS:
        with pytest.raises(InputError, match=r"^seed is .*; give a whole number, or leave it out\.$"):
            ask(seed=seed)
    for ids in ODD_IDS[: 0 if form == "custom_generate" else None]:
        with pytest.raises(InputError, match=r"^sample_ids (is .*|holds .*, which is no key); give .*\.$"):
            ask(sample_ids=ids)
    if form == "attach":
        want = ask(seed=3, sample_ids=["a"])
        assert torch.equal(ask(seed=np.int64(3), sample_ids=("a",)), want), "equal numbers key the same draws"
