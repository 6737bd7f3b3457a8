"""The engine: every mode of generate(), every entry, the same tokens; the model left as it was."""

import copy
import itertools
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import FAINT, full_but
from transformers import TextIteratorStreamer
from transformers.generation import LogitsProcessor

import lvlm_decode as ld
from lvlm_decode.engine import hf, stack
from lvlm_decode.engine.run import Run
from lvlm_decode.engine.sampling import KeyedDraw, gumbel
from lvlm_decode.errors import InputError, UnsupportedError
from lvlm_decode.methods import parse
from lvlm_decode.testing.models import EOS, PAD, tiny

METHODS = {
    "plain": ld.Plain(),
    "mask": ld.Mask(),
    "vcd": ld.VCD(),
    "ritual": ld.RITUAL(),
    "vcd+ritual": ld.VCD() + ld.RITUAL(),
}
NEW = 8
MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
    "beams": {"num_beams": 3},
    "returns": {"do_sample": True, "num_return_sequences": 2},
    "beam_returns": {"num_beams": 3, "num_return_sequences": 2},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module")
def zoo():
    return tiny("llava")


@pytest.fixture(scope="module")
def batch(zoo):
    """Three prompts of unequal length, left-padded."""
    return zoo.inputs(("is it", "is it a dog or a cat", "no"), seed=3)


def generate(model, inputs, method=None, execution="stacked", torch_seed=0, processor=None, **kwargs):
    """Tokens of one call; ``method=None`` is the model untouched."""
    kwargs = {"do_sample": False, "max_new_tokens": NEW, **kwargs}
    torch.manual_seed(torch_seed)
    if method is None:
        return model.generate(**inputs, **kwargs)
    ld.attach(model, method, execution=execution, processor=processor)
    try:
        return model.generate(**inputs, **kwargs)
    finally:
        ld.detach(model)


def alone(zoo, inputs, row):
    """Row ``row`` of a batch without its padding."""
    keep = inputs["attention_mask"][row].bool()
    return {
        "input_ids": inputs["input_ids"][row : row + 1, keep],
        "attention_mask": inputs["attention_mask"][row : row + 1, keep],
        "pixel_values": inputs["pixel_values"][row : row + 1],
    }


def test_fixture_reacts_to_its_image_and_to_each_method(zoo, batch):
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    base = generate(zoo.model, batch)
    assert not torch.equal(base, generate(zoo.model, other))
    for name, method in METHODS.items():
        if name not in ("plain", "mask"):
            assert not torch.equal(base, generate(zoo.model, batch, method)), name


@pytest.mark.parametrize("mode", MODES)
def test_zero_strength_equals_plain(zoo, batch, mode):
    base = generate(zoo.model, batch, **MODES[mode])
    for method in (
        ld.Plain(),
        ld.VCD(alpha=0, beta=None),
        ld.VCD(alpha=FAINT, beta=None),
        ld.RITUAL(alpha=FAINT, beta=None),
    ):
        assert torch.equal(base, generate(zoo.model, batch, method, **MODES[mode])), method


@pytest.mark.parametrize("name", full_but(METHODS, ["vcd+ritual"]))
@pytest.mark.parametrize("mode", MODES)
def test_entries_and_executions_agree(zoo, batch, mode, name):
    method, settings = METHODS[name], MODES[mode]
    stacked = generate(zoo.model, batch, method, **settings)
    assert torch.equal(stacked, generate(zoo.model, batch, method, "sequential", **settings))
    assert torch.equal(stacked, generate(zoo.model, batch, custom_generate=method, **settings))
    if mode != "processors":
        # A repetition penalty acts before the contrast in this form; see the module's docstring.
        form = method.processor(zoo.model, batch)
        assert torch.equal(stacked, generate(zoo.model, batch, logits_processor=[form], **settings))


@pytest.mark.parametrize("name", METHODS)
def test_stacked_logits_equal_sequential(zoo, batch, name):
    """Not only the tokens: every view's logits, at the prompt and after it."""
    tokens = torch.randint(4, 90, (3, 4), generator=torch.Generator().manual_seed(0))
    steps = {}
    for execution in ("stacked", "sequential"):
        lanes = Run(zoo.model, METHODS[name], batch, seed=0, execution=execution).open()
        lanes.prefill()
        first = lanes.last_step.logits
        lanes.extend(tokens[:, :1])
        lanes.extend(tokens[:, 1:])
        steps[execution] = torch.cat([first, lanes.last_step.logits], 2)
    assert steps["stacked"].shape[0] == 1 + len(Run(zoo.model, METHODS[name], batch, seed=0).views)
    torch.testing.assert_close(steps["stacked"], steps["sequential"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 5}], ids=["greedy", "seeded"])
def test_row_in_a_batch_equals_the_row_alone(zoo, batch, name, settings):
    method = METHODS[name]
    if not settings and name != "plain":
        settings = {"seed": 5}
    if name == "plain" and not settings:
        settings = {}
    together = generate(zoo.model, batch, method, **settings)
    width = batch["input_ids"].shape[1]
    for row in range(3):
        single = alone(zoo, batch, row)
        out = generate(zoo.model, single, method, **settings)
        new = out[0, single["input_ids"].shape[1] :]
        assert torch.equal(together[row, width : width + len(new)], new)
        assert bool((together[row, width + len(new) :] == 0).all())


def test_order_of_the_batch_does_not_matter(zoo, batch):
    settings = {"do_sample": True, "seed": 1}
    order = torch.tensor([2, 0, 1])
    turned = {key: value[order] for key, value in batch.items()}
    straight = generate(zoo.model, batch, METHODS["vcd+ritual"], **settings)
    assert torch.equal(straight[order], generate(zoo.model, turned, METHODS["vcd+ritual"], **settings))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 2}], ids=["greedy", "seeded"])
def test_drafts_are_verified_against_the_mitigated_model(zoo, name, settings):
    single = zoo.inputs(("abcabcabc",), seed=4)
    method = METHODS[name]
    draft = copy.deepcopy(zoo.model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.003)
    base = generate(zoo.model, single, method, max_new_tokens=16, **settings)
    for assistant in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
        out = generate(zoo.model, single, method, max_new_tokens=16, **settings, **assistant)
        assert torch.equal(base, out), assistant
    if not settings:
        form = method.processor(zoo.model, single)
        lookup = generate(zoo.model, single, logits_processor=[form], max_new_tokens=16, prompt_lookup_num_tokens=3)
        assert torch.equal(base, lookup)


def test_a_good_draft_saves_forwards(zoo):
    single = zoo.inputs(("abcabcabc",), seed=4)
    ld.attach(zoo.model, METHODS["vcd"])
    try:
        zoo.model.generate(**single, max_new_tokens=16, do_sample=False)
        plain = ld.last_run(zoo.model).forwards
        same = copy.deepcopy(ld.detach(zoo.model))
        ld.attach(zoo.model, ld.VCD(alpha=0))
        zoo.model.generate(**single, max_new_tokens=16, do_sample=False, assistant_model=same)
        assert ld.last_run(zoo.model).forwards < plain
    finally:
        ld.detach(zoo.model)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=["greedy", "beams", "lookup"]
)
def test_positions_and_masks_may_run_out_in_the_middle_of_an_answer(family, how, monkeypatch):
    """They are made for many tokens at once; a longer prompt of the view pads the sample's rows."""
    built = tiny(family)
    inputs = built.inputs(["abcabc"] if "prompt_lookup_num_tokens" in how else ["is it", "no"], seed=3)
    new = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    found = []
    for ahead in (64, 3, 1):
        monkeypatch.setattr(stack, "AHEAD", ahead)
        with ld.attached(built.model, "icd", processor=built.processor):
            found.append(built.model.generate(**inputs, **new, **how))
    for other in found[1:]:
        assert torch.equal(other.sequences, found[0].sequences)
        torch.testing.assert_close(torch.stack(other.logits), torch.stack(found[0].logits))


@pytest.mark.parametrize("name", METHODS)
def test_static_cache(zoo, batch, name):
    base = generate(zoo.model, batch, METHODS[name])
    assert torch.equal(base, generate(zoo.model, batch, METHODS[name], cache_implementation="static"))


@pytest.mark.parametrize("name", METHODS)
def test_streamer(zoo, name):
    single = zoo.inputs(("is it",), seed=4)
    base = generate(zoo.model, single, METHODS[name])
    streamer = TextIteratorStreamer(zoo.tokenizer, skip_prompt=True)
    ld.attach(zoo.model, METHODS[name])
    try:
        thread = threading.Thread(
            target=zoo.model.generate,
            kwargs={**single, "streamer": streamer, "max_new_tokens": NEW, "do_sample": False},
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    finally:
        ld.detach(zoo.model)
    assert text == zoo.tokenizer.decode(base[0, single["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_differs_at_near_ties_only(zoo, batch, name):
    """Stacked against sequential in bfloat16: where a token differs, both candidates scored nearly the same."""
    model = copy.deepcopy(zoo.model).to(torch.bfloat16)
    method = METHODS[name]
    runs = {}
    for execution in ("stacked", "sequential"):
        ld.attach(model, method, execution=execution)
        out = model.generate(
            **batch, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        ld.detach(model)
        runs[execution] = out
    width = batch["input_ids"].shape[1]
    for row in range(3):
        a, b = (runs[e].sequences[row, width:] for e in ("stacked", "sequential"))
        differing = (a[: min(len(a), len(b))] != b[: min(len(a), len(b))]).nonzero()
        if len(differing) == 0:
            continue
        step = int(differing[0])
        scores = runs["stacked"].logits[step][row]
        gap = (scores[a[step]] - scores[b[step]]).abs()
        # Weights up to 4 multiply a rounding error of 2^-8 of logits around 8.
        assert gap < 0.25, f"row {row}, step {step}: {gap}"


def test_outputs_keep_the_shape_of_plain_generate(zoo, batch):
    ask = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    base = generate(zoo.model, batch, **ask)
    mixed = generate(zoo.model, batch, METHODS["vcd+ritual"], **ask)
    assert type(base) is type(mixed)
    assert len(mixed.scores) == NEW or mixed.sequences.shape[1] < base.sequences.shape[1] + 1
    assert mixed.scores[0].shape == base.scores[0].shape
    assert [h.shape for h in mixed.hidden_states[1]] == [h.shape for h in base.hidden_states[1]]
    assert hf.KV(hf.cache_in(mixed)).rows == len(batch["input_ids"]), "not those of all views"


def test_pipeline(tmp_path):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    import lvlm_decode_data

    path = lvlm_decode_data.tiny_path("tiny-llava")
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(path)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    picture = Image.open(lvlm_decode_data.load_scenes()[0].path)
    question = [{"type": "image", "image": picture}, {"type": "text", "text": "Please describe this image in detail."}]
    messages = [{"role": "user", "content": question}]

    def ask():
        return pipe(text=messages, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"]

    base = ask()
    ld.attach(model, ld.VCD(alpha=FAINT, beta=None))
    assert ask() == base
    ld.detach(model)
    ld.attach(model, ld.VCD(alpha=3.0, noise_step=900))
    assert ask() != base
    ld.detach(model)
    assert ask() == base


# --- the model is left as it was -------------------------------------------------------------------------------------


def state(model):
    """What an attachment could change: instance attributes and the class."""
    return (
        {key: value for key, value in model.__dict__.items() if key != "_previous_max_cache_length"},
        dict(vars(type(model))),
        model.config._attn_implementation,
    )


class Interrupt(LogitsProcessor):
    """Raises in the middle of a generation."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return scores


@pytest.mark.parametrize("error", [None, RuntimeError("stop"), KeyboardInterrupt()], ids=["end", "exception", "ctrl-c"])
@pytest.mark.parametrize("hooked", [False, True], ids=["bare", "accelerate"])
def test_detached_equals_untouched(zoo, batch, error, hooked):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = copy.deepcopy(zoo.model)
    if hooked:
        add_hook_to_module(model, ModelHook())
    base = generate(model, batch)
    before = state(model)
    ld.attach(model, METHODS["vcd+ritual"])
    processors = [Interrupt(error)] if error is not None else []
    if error is None:
        model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    else:
        with pytest.raises(type(error)):
            model.generate(**batch, max_new_tokens=NEW, do_sample=False, logits_processor=processors)
    assert "forward" in model.__dict__ if hooked else "forward" not in model.__dict__
    ld.detach(model)
    after = state(model)
    assert before[0].keys() == after[0].keys()
    assert all(before[0][key] is after[0][key] for key in before[0])
    assert before[1:] == after[1:]
    assert torch.equal(base, generate(model, batch))
    if hooked:
        remove_hook_from_module(model)


def test_one_call_leaves_nothing(zoo, batch):
    before = state(zoo.model)
    generate(zoo.model, batch, custom_generate=METHODS["vcd"])
    after = state(zoo.model)
    assert before[0].keys() == after[0].keys() and all(before[0][k] is after[0][k] for k in before[0])


def test_attaching_twice_is_refused_and_detaching_twice_is_not(zoo):
    ld.attach(zoo.model, "vcd")
    try:
        assert ld.attached(zoo.model) == ld.VCD()
        with pytest.raises(UnsupportedError, match="already attached"):
            ld.attach(zoo.model, "ritual")
    finally:
        ld.detach(zoo.model)
    assert ld.detach(zoo.model) is zoo.model
    assert ld.attached(zoo.model) is None


class Asks(LogitsProcessor):
    """A processor that asks the model something at every step and changes nothing."""

    def __init__(self, ask):
        self.ask, self.said = ask, []

    def __call__(self, input_ids, scores):
        self.said.append(self.ask(input_ids))
        return scores


NESTED = {
    "forward": lambda zoo, batch: lambda ids: zoo.model(input_ids=ids[:, -3:]).logits,
    "plain": lambda zoo, batch: (
        lambda ids: type(zoo.model).generate(zoo.model, **batch, max_new_tokens=2, do_sample=False)
    ),
    "vcd": lambda zoo, batch: (
        lambda ids: type(zoo.model).generate(
            zoo.model, **batch, max_new_tokens=2, do_sample=False, custom_generate=ld.VCD(alpha=3.0), seed=0
        )
    ),
    "pai": lambda zoo, batch: (
        lambda ids: type(zoo.model).generate(
            zoo.model, **batch, max_new_tokens=2, do_sample=False, custom_generate=ld.PAI(alpha=2.0)
        )
    ),
}
OUTER = ["vcd", "icd", "pai", "sid", "avisc", "dola", "damro", "cntp", "opera", "vdgd"]


@pytest.mark.parametrize("entry", ["attach", "custom_generate"])
@pytest.mark.parametrize("nested", full_but(NESTED, ["plain", "vcd"]))
@pytest.mark.parametrize("name", full_but(OUTER, ["vcd", "pai", "opera"]))
def test_calls_of_the_same_model_nest(zoo, batch, name, nested, entry):
    """A processor that calls the model gets what it gets alone, and the answer around it is what it is without."""
    ask = NESTED[nested](zoo, batch)
    ids = batch["input_ids"]
    alone, want = ask(ids), generate(zoo.model, batch, parse(name), seed=0, processor=zoo.processor)
    asking = Asks(ask)
    if entry == "attach":
        got = generate(zoo.model, batch, parse(name), seed=0, processor=zoo.processor, logits_processor=[asking])
    elif name in ("icd", "vdgd", "cntp"):
        pytest.skip(
            "it tokenizes text, and custom_generate= has no processor of a model that was not loaded from a path"
        )
    else:
        got = generate(zoo.model, batch, custom_generate=parse(name), seed=0, logits_processor=[asking])
    assert torch.equal(got, want)
    if nested == "forward":
        assert (
            torch.equal(asking.said[0], zoo.model(input_ids=ids[: len(asking.said[0]), -3:]).logits)
            or len(asking.said[0]) != 3
        )
    else:
        assert all(torch.equal(said, alone) for said in asking.said)


@pytest.mark.parametrize("name", ["plain", "vcd", "pai", "dola"])
def test_guidance_scale_gives_what_it_gives_the_bare_model(zoo, batch, name):
    """Classifier-free guidance calls the model from a processor; a method of strength 0 changes nothing beside it."""
    off = {
        "plain": ld.Plain(),
        "vcd": ld.VCD(alpha=FAINT, beta=None),
        "pai": ld.PAI(alpha=0, gamma=None),
        "dola": None,
    }[name]
    bare = generate(zoo.model, batch, guidance_scale=1.5)
    assert not torch.equal(bare, generate(zoo.model, batch))
    if off is None:
        assert torch.equal(*(generate(zoo.model, batch, parse(name), guidance_scale=1.5) for _ in range(2)))
        return
    assert torch.equal(bare, generate(zoo.model, batch, off, guidance_scale=1.5))
    assert torch.equal(bare, generate(zoo.model, batch, custom_generate=off, guidance_scale=1.5))


THREADS = ["plain", "vcd", "pai", "sid", "dcd", "lol", "damro", "dola", "opera"]


def test_calls_in_several_threads_give_what_each_gives_alone(zoo, batch):
    """Methods that edit attention, layers, projectors and adapters among them, and plain calls between them."""
    projector = {k: v + 0.3 for k, v in zoo.model.model.multi_modal_projector.state_dict().items()}
    methods = [ld.DCD(negative=projector) if n == "dcd" else None if n == "lol" else parse(n) for n in THREADS]
    methods = [method for method in methods if method is not None]
    pictures = [{**batch, "pixel_values": batch["pixel_values"].roll(n, 0)} for n in range(len(methods))]
    how = dict(max_new_tokens=6, do_sample=False)

    def mitigated(n):
        return zoo.model.generate(**pictures[n], custom_generate=methods[n], seed=0, **how).tolist()

    def plain(n):
        return zoo.model.generate(**pictures[n], **how).tolist()

    want = [(mitigated(n), plain(n)) for n in range(len(methods))]
    assert len({str(answers) for answers, _ in want}) > len(want) // 2, "the methods can be told apart"
    before, wrong = state(zoo.model), []

    def work(n):
        for _ in range(4):
            for ask, expected in zip((mitigated, plain), want[n]):
                try:
                    wrong.extend([] if ask(n) == expected else [f"{methods[n].name}: other tokens"])
                except Exception as error:
                    wrong.append(f"{methods[n].name}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(methods))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert state(zoo.model) == before


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_an_attached_model_is_copied_and_saved_with_its_method(zoo, batch, how, tmp_path):
    """The copy decodes with the method by itself: what happens to the first model afterwards does not reach it."""
    want = generate(zoo.model, batch, ld.VCD(alpha=2.0), seed=0)
    # A new one: transformers leaves hooks that cannot be pickled on a model whose vision tower ran.
    model = tiny.__wrapped__("llava").model
    ld.attach(model, ld.VCD(alpha=2.0))
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    ld.detach(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert ld.attached(model) is None and ld.attached(other) == ld.VCD(alpha=2.0)
    assert torch.equal(other.generate(**batch, max_new_tokens=NEW, do_sample=False, seed=0), want)
    ld.detach(other)
    assert torch.equal(other.generate(**batch, max_new_tokens=NEW, do_sample=False), generate(zoo.model, batch))


def test_attached_blocks_nest(zoo, batch):
    plain, vcd = generate(zoo.model, batch), generate(zoo.model, batch, ld.VCD(), seed=0)
    mask = generate(zoo.model, batch, ld.RITUAL(), seed=0)
    how = dict(max_new_tokens=NEW, do_sample=False)
    with ld.attached(zoo.model, "vcd"):
        assert torch.equal(zoo.model.generate(**batch, seed=0, **how), vcd)
        with pytest.raises(KeyError), ld.attached(zoo.model, "ritual"):
            assert torch.equal(zoo.model.generate(**batch, seed=0, **how), mask)
            raise KeyError
        assert torch.equal(zoo.model.generate(**batch, seed=0, **how), vcd)
    assert ld.attached(zoo.model) is None and torch.equal(zoo.model.generate(**batch, **how), plain)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_blocks_of_several_threads_end_in_any_order_and_leave_nothing(zoo, order):
    """As threads that share a model do: what is attached is the newest block that has not ended."""
    blocks = [ld.attached(zoo.model, name) for name in ("vcd", "icd", "ritual")]
    for block in blocks:
        block.__enter__()
    left = [0, 1, 2]
    for number in order:
        blocks[number].__exit__(None, None, None)
        left.remove(number)
        said = ld.attached(zoo.model)
        assert (said.name if said else None) == (("vcd", "icd", "ritual")[left[-1]] if left else None)
    assert "generate" not in vars(zoo.model)


# --- randomness ------------------------------------------------------------------------------------------------------


def test_keyed_draw_follows_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    draws = torch.stack([probabilities.log() + gumbel(0, "sample", position, 3) for position in range(4000)]).argmax(-1)
    share = torch.bincount(draws, minlength=3) / 4000
    torch.testing.assert_close(share, probabilities, atol=0.03, rtol=0)


def test_keyed_draw_depends_on_seed_sample_and_position():
    noise = {(s, i, p): gumbel(s, i, p, 5) for s in (0, 1) for i in ("a", "b") for p in (0, 1)}
    for (k1, v1), (k2, v2) in itertools.combinations(noise.items(), 2):
        assert not torch.equal(v1, v2), (k1, k2)
    assert torch.equal(noise[0, "a", 1], gumbel(0, "a", 1, 5))


BANS = {
    "ngrams": {"no_repeat_ngram_size": 1},
    "first words": {"bad_words_ids": "the first two tokens of the plain answer"},
    "early end": {"min_new_tokens": NEW, "eos_token_id": "the first token of the plain answer"},
}


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
@pytest.mark.parametrize("bans", BANS)
def test_where_processors_ban_what_the_mask_left_the_samples_own_order_decides(zoo, batch, bans, execution):
    """beta = 1 leaves the arg max alone, so contrast decides nothing: greedy decoding is the plain model's, bans included."""
    width = batch["input_ids"].shape[1]
    first = generate(zoo.model, batch)[:, width : width + 2]
    how = dict(BANS[bans])
    if "bad_words_ids" in how:
        how["bad_words_ids"] = [[token] for token in first.flatten().tolist()]
    if "eos_token_id" in how:
        how["eos_token_id"] = first[:, 0].tolist()
    expected = generate(zoo.model, batch, **how)
    method = ld.VCD(beta=1.0)
    assert torch.equal(generate(zoo.model, batch, method, execution, seed=0, **how), expected)
    for mode in ({"do_sample": True}, {"do_sample": True, "seed": 0}, {"num_beams": 3}):
        for row in generate(zoo.model, batch, method, execution, **{**how, **mode})[:, width:].tolist():
            said = row[: row.index(EOS)] if EOS in row else row
            assert PAD not in said, "a token was said of which nobody thought"
            assert bans != "ngrams" or len(set(said)) == len(said)
    if execution == "stacked":
        ld.attach(zoo.model, method, drafter="recycling(rows=6,depth=3)")
        try:
            assert torch.equal(
                zoo.model.generate(**batch, **how, do_sample=False, max_new_tokens=NEW, seed=0), expected
            )
        finally:
            ld.detach(zoo.model)


def test_keyed_draw_never_draws_what_is_masked():
    scores = torch.full((1, 6), float("-inf"))
    scores[0, 4] = -30.0
    draw = KeyedDraw(0, ["x"], 0)
    for position in range(20):
        assert int(draw(torch.zeros(1, position, dtype=torch.long), scores).argmax()) == 4


def test_seeds_change_views_and_draws(zoo, batch):
    method = METHODS["vcd"]
    outs = [generate(zoo.model, batch, method, do_sample=True, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    runs = [Run(zoo.model, method, batch, seed=seed) for seed in (0, 0, 1)]
    pixels = [run.samples[1][0].vision["pixel_values"] for run in runs]
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])


def test_a_sum_draws_what_its_parts_draw_alone(zoo, batch):
    both = Run(zoo.model, METHODS["vcd+ritual"], batch, seed=7)
    for number, part in enumerate((ld.VCD(), ld.RITUAL()), start=1):
        one = Run(zoo.model, part, batch, seed=7)
        for a, b in zip(both.samples[number], one.samples[1]):
            assert torch.equal(a.vision["pixel_values"], b.vision["pixel_values"])


# --- the same twice --------------------------------------------------------------------------------------------------

ONCE = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from lvlm_decode.testing.models import tiny
import lvlm_decode as ld
from lvlm_decode.methods import parse
zoo = tiny("llava")
batch = zoo.inputs(("is it", "is it a dog or a cat", "no"), seed=3)
torch.seed()
for name in ("vcd", "ritual", "vcd+ritual", "cntp", "mvp"):
    parameters = dict(caption_tokens=3, path_tokens=3) if name == "mvp" else {{}}
    with ld.attached(zoo.model, parse(name, **parameters), processor=zoo.processor):
        print(name, zoo.model.generate(**batch, max_new_tokens=8, do_sample=False).tolist())
"""


@pytest.mark.full
def test_greedy_answers_are_the_same_in_every_process():
    """Whatever torch's own generator starts from; methods that draw in a search of their own among them."""
    code = ONCE.format(tests=str(Path(__file__).parent))
    said = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2)]
    assert said[0].returncode == 0, said[0].stderr[-500:]
    assert said[0].stdout == said[1].stdout and said[0].stdout.count("[[") == 5


@pytest.mark.parametrize("name", ["vcd", "ritual", "vcd+ritual"])
def test_views_are_keyed_by_content_and_seed_alone(zoo, batch, name):
    """Neither torch's generator nor the batch around a row changes its views; another seed, prompt or picture does."""
    method = METHODS[name]
    base = generate(zoo.model, batch, method, torch_seed=1)
    assert torch.equal(base, generate(zoo.model, batch, method, torch_seed=2))
    assert torch.equal(base, generate(zoo.model, batch, method, seed=0))
    assert torch.equal(base, generate(zoo.model, batch, custom_generate=method, torch_seed=3))
    form = method.processor(zoo.model, batch)
    assert torch.equal(base, generate(zoo.model, batch, torch_seed=4, logits_processor=[form]))

    def views(inputs, seed=None):
        return [s.vision["pixel_values"] for s in Run(zoo.model, method, inputs, seed=seed).samples[1]]

    for row, view in enumerate(views(batch)):
        single = alone(zoo, batch, row)
        assert torch.equal(view, views(single)[0])
        if "vcd" in name:
            assert not torch.equal(view, views(single, 1)[0])
            other = {**single, "input_ids": single["input_ids"].clone()}
            other["input_ids"][0, -1] += 1
            assert not torch.equal(view, views(other)[0])


def test_what_fills_up_a_picture_beside_a_larger_one_does_not_change_its_key():
    zoo = tiny("llava_next")
    both = zoo.batch([zoo.row("is it", images=2, seed=1), zoo.row("no", images=1, seed=2)])
    single = zoo.batch([zoo.row("no", images=1, seed=2)])
    # As the processor would have made it alone: without tiles that are zeros.
    tiles = int((single["pixel_values"].flatten(2) != 0).any(-1).sum())
    single["pixel_values"] = single["pixel_values"][:, :tiles]
    ids = [Run(zoo.model, METHODS["vcd"], inputs).sample_ids[-1] for inputs in (both, single)]
    assert ids[0] == ids[1] and ids[0] != Run(zoo.model, METHODS["vcd"], both).sample_ids[0]


def test_token_draws_are_transformers_own_unless_a_seed_is_given(zoo, batch):
    off = ld.VCD(alpha=FAINT, beta=None)
    sample = dict(do_sample=True, temperature=0.9)
    for torch_seed in (1, 2):
        bare = generate(zoo.model, batch, torch_seed=torch_seed, **sample)
        assert torch.equal(bare, generate(zoo.model, batch, off, torch_seed=torch_seed, **sample))
    keyed = [generate(zoo.model, batch, off, torch_seed=s, seed=5, **sample) for s in (1, 2)]
    assert torch.equal(*keyed) and not torch.equal(keyed[0], bare)


# --- bad input and limits --------------------------------------------------------------------------------------------


def refuses(zoo, inputs, match, error=InputError, method="vcd", **kwargs):
    ld.attach(zoo.model, method)
    try:
        with pytest.raises(error, match=match) as caught:
            zoo.model.generate(**inputs, max_new_tokens=2, **kwargs)
        assert "\n" not in str(caught.value)
    finally:
        ld.detach(zoo.model)


def test_inputs_that_contradict_each_other(zoo, batch):
    no_image = {k: v for k, v in batch.items() if k != "pixel_values"}
    refuses(zoo, no_image, "row 0 has .* image placeholders and no pixel_values")
    text = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 159, 9)}
    refuses(zoo, text, "no prompt has an image token")
    refuses(zoo, {**batch, "pixel_values": batch["pixel_values"][:2]}, "row 2 has .* image placeholders")
    refuses(zoo, {**batch, "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)}, "6 images .* places for 3")
    right = {k: v.flip(1) if v.dim() == 2 else v for k, v in batch.items()}
    refuses(zoo, right, "right-padded")
    refuses(zoo, {"pixel_values": batch["pixel_values"]}, "no input_ids")
    refuses(zoo, {**batch, "attention_mask": batch["attention_mask"][:, 1:]}, "they must be equal")


def test_settings_that_cannot_be_honoured(zoo, batch):
    refuses(zoo, batch, "prefill_chunk_size", UnsupportedError, prefill_chunk_size=4)
    refuses(zoo, batch, "use_cache=False", UnsupportedError, use_cache=False)
    refuses(zoo, batch, "beam sampling", UnsupportedError, do_sample=True, num_beams=2, seed=0)
    refuses(zoo, batch, "detach it first", UnsupportedError, custom_generate=ld.VCD())
    refuses(zoo, {"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds", UnsupportedError)


def test_unknown_family_and_execution(zoo):
    with pytest.raises(UnsupportedError, match="'llama' is not supported"):
        ld.attach(zoo.model.model.language_model, "vcd")
    ld.attach(zoo.model, "vcd", execution="skip")
    try:
        with pytest.raises(UnsupportedError, match="execution = 'skip' is not known; it is one of stacked, sequential"):
            zoo.model.generate(**zoo.inputs(), max_new_tokens=2)
    finally:
        ld.detach(zoo.model)


def test_features_instead_of_pixels(zoo, batch):
    """Views that need no pixels run on features the caller encoded; those that do say so."""
    encoded = zoo.model.get_image_features(batch["pixel_values"], return_dict=True)
    given = {k: v for k, v in batch.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": encoded}}
    assert torch.equal(generate(zoo.model, batch, ld.Mask()), generate(zoo.model, given, ld.Mask()))
    refuses(zoo, given, "edits pixels")


# --- what the command line's benchmark and other callers lean on -----------------------------------------------------


@pytest.mark.parametrize("owner", ["model", "language_model"])
def test_beams_from_the_configuration_of_the_module_that_decodes(owner):
    """Inside InstructBLIP the language model's own configuration counts, as without this library."""
    zoo = tiny("instructblip")
    inputs = zoo.inputs(("is it", "is it a dog"))
    config = (zoo.model if owner == "model" else zoo.model.language_model).generation_config
    before = config.num_beams
    config.num_beams = 3
    try:
        base = zoo.model.generate(**copy.copy(inputs), max_new_tokens=NEW)
        assert torch.equal(base, generate(zoo.model, copy.copy(inputs), ld.Plain()))
        ld.attach(zoo.model, "vcd")
        try:
            zoo.model.generate(**inputs, max_new_tokens=2)
            rows = ld.last_run(zoo.model).rows_per_sample
        finally:
            ld.detach(zoo.model)
        assert rows == (1 if owner == "model" else 3)
    finally:
        config.num_beams = before


@pytest.mark.parametrize("entry", ["attach", "custom_generate"])
def test_options_of_the_encoder_are_honoured(zoo, batch, entry):
    options = dict(vision_feature_layer=-1)
    want = generate(zoo.model, batch, **options)
    assert not torch.equal(want, generate(zoo.model, batch))
    method = ld.VCD(alpha=FAINT, beta=None)
    if entry == "attach":
        assert torch.equal(want, generate(zoo.model, batch, method, **options))
    else:
        assert torch.equal(want, generate(zoo.model, batch, custom_generate=method, **options))


def test_views_that_differ_in_number_raise(zoo, batch):
    from dataclasses import dataclass

    from lvlm_decode.method import Contrast

    @dataclass(frozen=True)
    class Uneven(Contrast):
        name = "uneven"

        def views(self, sample, rng):
            return [sample.as_view(weight=1.0)] * (1 + sample.index)

    with pytest.raises(InputError, match=r"uneven made views .* that differ in number"):
        Run(zoo.model, Uneven(), batch, seed=0)
