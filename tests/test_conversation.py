"""A cache that goes on: a turn answers what it would answer if the whole conversation were given afresh."""

import copy

import pytest
import torch
from contract import FAMILIES, method_of
from transformers import DynamicCache, StaticCache

import lvlm_decode as ld
from lvlm_decode.engine import hf
from lvlm_decode.engine.hf import decoder
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.testing.contract import same_scores
from lvlm_decode.testing.models import BOS, IMAGE, VIDEO, VISION_END, VISION_START, Row, tiny

NEW = 6
#: No text is tokenized to these, so an answer that held them could not come back.
NO_TEXT = [IMAGE, VIDEO, VISION_START, VISION_END]
#: Families whose prompts or layers let no turn go on.
CLOSED = {"gemma3": "in both directions", "paligemma": "in both directions"}
#: Families that encode an image of an earlier turn otherwise in a later one, so that it runs again: a Q-Former reads the whole
#: prompt, and OneVision cuts an image into tiles only while it is alone.
CHANGING = ("instructblip", "llava_onevision")
METHODS = ["plain", "vcd", "icd", "m3id", "dola"]
ONE_IMAGE, EVERY_TURN = (1, 0), (1, 1)


def with_cache(cache):
    return hf.with_cache(cache)


def row(family, texts, images, answers=(), seed=0):
    """A conversation: turns of text with images before them, and what was answered between them."""
    zoo = tiny(family)
    ids, blocks = [BOS], iter(zoo.image_ids(sum(images)))
    for turn, (text, count) in enumerate(zip(texts, images)):
        for _ in range(count):
            ids += next(blocks)
        ids += zoo.tokenizer(text, add_special_tokens=False).input_ids
        ids += answers[turn] if turn < len(answers) else []
    pixels = zoo.pixels(sum(images), torch.Generator().manual_seed(seed)) if sum(images) else {}
    return Row(torch.tensor(ids), pixels)


class Talk:
    """Turns of some rows with one cache, and the forwards that each turn ran."""

    def __init__(self, family, method, execution="stacked", **options):
        self.zoo, self.method, self.execution = tiny(family), method, execution
        self.family, self.cache, self.options = family, DynamicCache(), options
        self.lengths = []

    def ask(self, rows, cache="own", **how):
        zoo = self.zoo
        options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
        options |= dict(output_logits=True, suppress_tokens=NO_TEXT) | self.options | how
        options |= with_cache(self.cache if cache == "own" else cache)
        self.lengths = []
        stack = decoder.decoder_of(tiny(self.family).model)

        def note(module, args, kwargs):
            ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
            self.lengths.append((embeds if ids is None else ids).shape[1])

        hook = stack.register_forward_pre_hook(note, with_kwargs=True)
        ld.attach(zoo.model, self.method, processor=zoo.processor, execution=self.execution)
        try:
            inputs = zoo.batch(rows)
            out = zoo.model.generate(**inputs, **options)
        finally:
            ld.detach(zoo.model)
            hook.remove()
        return out.sequences[:, inputs["input_ids"].shape[1] :].tolist(), torch.stack(out.logits)


def goes_on(family, method, images=ONE_IMAGE, execution="stacked", **options):
    """Two rows of unequal length, two turns with a cache; the second once more without."""
    talk = Talk(family, method, execution, sample_ids=["a", "b"], **options)
    texts = (["is it a dog?", "and a cat?"], ["no", "why is it so"])
    first, _ = talk.ask([row(family, own[:1], images[:1], seed=i) for i, own in enumerate(texts)])
    whole = [row(family, own, images, [first[i]], seed=i) for i, own in enumerate(texts)]
    got = talk.ask(whole)
    ran = talk.lengths[0]
    want = talk.ask(whole, cache=None)
    assert got[0] == want[0]
    same_scores(got[1], want[1], atol=3e-5)
    return ran, talk.lengths[0]


def full(*values):
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        (pytest.param if family in ("llava", "qwen2_5_vl") or name == "vcd" else full)(name, family)
        for family in FAMILIES
        if family not in CLOSED
        for name in METHODS
    ],
)
def test_a_turn_equals_the_whole_conversation(name, family):
    for images in (ONE_IMAGE, EVERY_TURN) if tiny(family).max_images > 1 else (ONE_IMAGE,):
        ran, afresh = goes_on(family, method_of(name, family), images)
        if family in CHANGING and (images == EVERY_TURN or family == "instructblip"):
            continue
        # Just the newest turn runs again, and an image's tokens if it has one.
        block = len(tiny(family).image_ids(2)[1]) if images == EVERY_TURN else 0
        assert ran <= NEW + len("why is it so") + block + 1 < afresh


@pytest.mark.parametrize("name", METHODS[1:])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_seeded_draws_go_on_too(name, family):
    goes_on(family, method_of(name, family), EVERY_TURN, do_sample=True, seed=5, temperature=1.5)


@pytest.mark.full
@pytest.mark.parametrize("name", ["ritual", "lqcd", "cad", "vdd", "code", "avisc", "damro", "dcd", "deco", "uscd"])
def test_other_methods_go_on(name):
    goes_on("llava", method_of(name, "llava"), EVERY_TURN)


def test_sums_and_views_one_after_the_other_go_on():
    goes_on("llava", method_of("vcd", "llava") + method_of("icd", "llava"), EVERY_TURN)
    ran, afresh = goes_on("qwen2_vl", method_of("icd", "qwen2_vl"), ONE_IMAGE, execution="sequential")
    assert ran < afresh


def test_many_turns_a_branch_and_another_tokenization():
    talk = Talk("llava", method_of("vcd", "llava"), sample_ids=["a"])
    texts, images, answers = ["is it", "and a cat?", "why", "no"], [1, 0, 1, 0], []
    for turn in range(1, 5):
        # The second answer comes back as other tokens than were said.
        said = [[*answer[:2], 40, 41] if number == 1 else answer for number, answer in enumerate(answers)]
        whole = [row("llava", texts[:turn], images[:turn], said)]
        before = copy.deepcopy(talk.cache)
        got = talk.ask(whole)
        want = talk.ask(whole, cache=None)
        assert got[0] == want[0]
        same_scores(got[1], want[1], atol=3e-5)
        answers.append(got[0][0])
    other = [row("llava", [*texts[:3], "yes?"], images, said)]
    got = talk.ask(other, cache=before)
    assert talk.lengths[0] < 12
    want = talk.ask(other, cache=None)
    assert got[0] == want[0] and got[0] != [answers[-1]]


def test_another_picture_or_another_prompt_is_not_taken_for_the_one_before():
    """Sensitive to its input: what the cache holds of other images or words is not attended to."""
    for change in (dict(seed=9), dict(texts=["was it a dog?", "and a cat?"])):
        talk = Talk("llava", method_of("icd", "llava"), sample_ids=["a"])
        texts = ["is it a dog?", "and a cat?"]
        (answer,), _ = talk.ask([row("llava", texts[:1], (1,), seed=0)])
        whole = row("llava", change.get("texts", texts), (1, 0), [answer], seed=change.get("seed", 0))
        got = talk.ask([whole])
        ran = talk.lengths[0]
        want = talk.ask([whole], cache=None)
        assert got[0] == want[0] and ran > 20
        same_scores(got[1], want[1], atol=3e-5)


def test_views_keep_the_noise_of_the_first_turn():
    """Without ids of the caller's, the conversation has those of its first prompt, which last_run tells."""
    talk, zoo = Talk("llava", method_of("vcd", "llava")), tiny("llava")
    (answer,), _ = talk.ask([row("llava", ["is it"], (1,))])
    whole = [row("llava", ["is it", "and"], (1, 0), [answer])]
    got = talk.ask(whole)
    assert talk.lengths[0] < 12
    ids = zoo.batch([row("llava", ["is it"], (1,))])
    ld.attach(zoo.model, talk.method)
    zoo.model.generate(**ids, max_new_tokens=1)
    first = ld.last_run(zoo.model).sample_ids
    ld.detach(zoo.model)
    want = talk.ask(whole, cache=None, sample_ids=first)
    assert got[0] == want[0]
    same_scores(got[1], want[1], atol=3e-5)


def test_what_the_caller_holds_is_the_samples_own():
    talk, zoo = Talk("llava", method_of("icd", "llava"), sample_ids=["a"]), tiny("llava")
    inputs = [row("llava", ["is it"], (1,))]
    talk.ask(inputs)
    assert talk.cache.get_seq_length() == len(inputs[0].ids) + NEW - 1 and hf.KV(talk.cache).rows == 1
    bare = DynamicCache()
    zoo.model.generate(**zoo.batch(inputs), **with_cache(bare), max_new_tokens=1)
    width = len(inputs[0].ids)
    own, want = talk.cache.layers[0].keys[:, :, :width], bare.layers[0].keys[:, :, :width]
    torch.testing.assert_close(own, want, atol=1e-5, rtol=1e-4)


def test_the_one_call_form_goes_on():
    zoo, method = tiny("llava"), method_of("vcd", "llava")
    cache, how = DynamicCache(), dict(max_new_tokens=NEW, min_new_tokens=NEW, suppress_tokens=NO_TEXT)
    first = zoo.batch([row("llava", ["is it"], (1,))])
    out = zoo.model.generate(**first, custom_generate=method, **with_cache(cache), **how)
    answer = out[0, first["input_ids"].shape[1] :].tolist()
    whole = zoo.batch([row("llava", ["is it", "and"], (1, 0), [answer])])
    got = zoo.model.generate(**whole, custom_generate=method, **with_cache(cache), **how)
    talk = Talk("llava", method)
    talk.ask([row("llava", ["is it"], (1,))])
    assert talk.ask([row("llava", ["is it", "and"], (1, 0), [answer])])[0][0] == got[0, -NEW:].tolist()


REFUSED = {
    "beams": (dict(num_beams=2), "num_beams cannot go on"),
    "lookup": (dict(prompt_lookup_num_tokens=2), "assisted decoding cannot go on"),
    "returns": (dict(num_return_sequences=2, do_sample=True), "num_return_sequences cannot go on"),
    "states": (dict(output_hidden_states=True), "output_hidden_states cannot go on"),
}


@pytest.mark.parametrize("mode", REFUSED)
def test_what_cannot_go_on_refuses_and_leaves_the_cache(mode):
    how, message = REFUSED[mode]
    talk = Talk("llava", method_of("vcd", "llava"), sample_ids=["a"])
    (answer,), _ = talk.ask([row("llava", ["is it"], (1,))])
    whole, length = [row("llava", ["is it", "and"], (1, 0), [answer])], talk.cache.get_seq_length()
    with pytest.raises(UnsupportedError, match=message):
        talk.ask(whole, **how)
    assert talk.cache.get_seq_length() == length
    got = talk.ask(whole)
    assert talk.lengths[0] < 12 and got[0] == talk.ask(whole, cache=None)[0]


def test_caches_that_carry_no_views_refuse():
    zoo = tiny("llava")
    first = [row("llava", ["is it"], (1,))]
    whole = [row("llava", ["is it", "and"], (1, 0), [[9] * NEW])]
    bare = Talk("llava", method_of("vcd", "llava"))
    zoo.model.generate(**zoo.batch(first), **with_cache(bare.cache), max_new_tokens=NEW)
    with pytest.raises(UnsupportedError, match="not those of the views: pass an empty cache in the first turn"):
        bare.ask(whole)
    for name, how, message in (
        ("pai", {}, "pai changes attention or hidden states"),
        ("vcd", dict(num_beams=2), "filled under beams"),
    ):
        talk = Talk("llava", method_of(name, "llava"))
        talk.ask(first, **how)
        with pytest.raises(UnsupportedError, match=message):
            talk.ask(whole)
    talk = Talk("llava", method_of("vcd", "llava"))
    talk.ask(first)
    talk.method = method_of("icd", "llava")
    with pytest.raises(UnsupportedError, match="not under ICD"):
        talk.ask(whole)
    static = StaticCache(config=zoo.model.config.get_text_config(), max_cache_len=64)
    talk.ask(first, cache=static)
    with pytest.raises(UnsupportedError, match="keep something else than all keys and values"):
        talk.ask(whole, cache=static)


@pytest.mark.parametrize("family", [family for family in CLOSED if family in FAMILIES])
def test_prompts_that_are_read_in_both_directions_refuse(family):
    talk = Talk(family, method_of("icd", family))
    talk.ask([row(family, ["is it"], (1,))])
    with pytest.raises(UnsupportedError, match=CLOSED[family]):
        talk.ask([row(family, ["is it", "and"], (1, 0), [[9] * NEW])])


FILMS = [family for family in FAMILIES if tiny(family).video_ids]


@pytest.mark.parametrize(
    ("name", "family"),
    [(pytest.param if name == "vcd" else full)(name, family) for family in FILMS for name in METHODS],
)
def test_a_conversation_about_a_video_goes_on(name, family):
    """With a picture beside it in one row; the video runs in the first turn alone."""
    zoo, talk = tiny(family), Talk(family, method_of(name, family), sample_ids=["a", "b"])
    rows = [zoo.row("is it", images=0, videos=1), zoo.row("no", images=1, videos=1, seed=1)]
    answers, _ = talk.ask(rows)
    further = zoo.tokenizer("why is it", add_special_tokens=False).input_ids
    whole = [Row(torch.tensor([*one.ids, *said, *further]), one.images) for one, said in zip(rows, answers)]
    got = talk.ask(whole)
    ran = talk.lengths[0]
    want = talk.ask(whole, cache=None)
    assert got[0] == want[0]
    same_scores(got[1], want[1], atol=3e-5)
    # OneVision's picture runs again, see above, and with it what follows.
    assert ran <= NEW + len(further) + 1 < talk.lengths[0] or family in CHANGING
    # Another video is not taken for the one before.
    other = [zoo.row("is it", images=0, videos=1, seed=7), zoo.row("no", images=1, videos=1, seed=1)]
    whole = [Row(torch.tensor([*one.ids, *said, *further]), one.images) for one, said in zip(other, answers)]
    got = talk.ask(whole)
    assert talk.lengths[0] > len(further) + 2 * NEW and got[0] == talk.ask(whole, cache=None)[0]
