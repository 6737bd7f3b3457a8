"""Real processors, prompts of real length: what the views of a method hold is what the processor makes of the authors' prompt."""

import copy

import pytest
import torch
from helpers import FAINT, FEW, Kept, full_but
from processors import BUILDERS, picture, real, shown

import lvlm_decode as ld
from lvlm_decode.engine.prompts import asking
from lvlm_decode.engine.run import Run
from lvlm_decode.errors import InputError
from lvlm_decode.families import FAMILIES, adapter
from lvlm_decode.methods.cicd import CICD
from lvlm_decode.methods.code import CODE
from lvlm_decode.methods.code import PROMPT as DESCRIBE
from lvlm_decode.methods.damro import DAMRO
from lvlm_decode.methods.icd import DISTURBANCE

QUESTION = "Is there a dog in the image?"
WIDE, TALL = (640, 480), (300, 500)
NEW = dict(max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)

each_family = pytest.mark.parametrize("family", full_but(FAMILIES, FEW))


def run_of(family, method=None, text=None, sizes=(WIDE,), **more):
    """A run on one question about pictures of these sizes."""
    own = real(family)
    text = own.text(QUESTION) if text is None else text
    inputs = own.inputs([text] * len(sizes), [picture(*size, seed) for seed, size in enumerate(sizes)], **more)
    return Run(own.model, method or ld.Plain(), inputs, processor=own.processor, seed=0)


def view_of(family, method, **how):
    """The ids of the newest view, and the run."""
    run = run_of(family, method, **how)
    return run.samples[-1][0].input_ids.tolist(), run


def test_every_family_has_its_processor():
    assert list(BUILDERS) == list(FAMILIES)


@each_family
def test_a_picture_takes_the_published_number_of_tokens(family):
    own = real(family)
    for size, count in own.tokens.items():
        run = run_of(family, sizes=(size,))
        (sample,) = run.samples[0]
        assert int(run.family.is_placeholder(sample.input_ids).sum()) == count
        assert sum(len(image.features) for image in sample.images) == count


@each_family
def test_what_a_processor_makes_is_answered_as_by_the_bare_model(family):
    """All of its output, in a batch of unequal pictures and questions."""
    own = real(family)
    # Two pictures of one size, where other sizes would be tiles by the dozen.
    sizes = list(own.tokens) if len(own.tokens) > 1 else [WIDE, WIDE]
    texts = [own.text(QUESTION), own.text("What colour is the largest thing?")]
    inputs = own.inputs(texts, [picture(*size, seed) for seed, size in enumerate(sizes)])
    want = own.model.generate(**copy.copy(inputs), **NEW)
    with ld.attached(own.model, ld.Plain(), processor=own.processor):
        got = own.model.generate(**copy.copy(inputs), **NEW)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-3)
    # The picture is no bystander.
    other = own.inputs(texts, [picture(*size, seed + 7) for seed, size in enumerate(sizes)])
    moved = own.model.generate(**other, **NEW).logits[0] - want.logits[0]
    assert moved.abs().max() > 10 * 1e-4


# The prompt without its image.


@each_family
@pytest.mark.parametrize("method", [ld.VDD(), ld.M3ID(), ld.CAD(), ld.PAI(), ld.USCD()], ids=lambda method: method.name)
def test_the_view_without_the_image_is_the_prompt_without_it(family, method):
    own = real(family)
    ids, run = view_of(family, method)
    assert shown(own.processor, ids) == own.prompt(QUESTION, False)
    # The tokens are the prompt's own, in their order; none is made anew.
    whole = iter(run.samples[0][0].input_ids.tolist())
    assert all(token in whole for token in ids)
    assert not run.samples[-1][0].images and not run.samples[-1][0].vision


@each_family
def test_one_token_takes_the_place_of_the_image(family):
    own = real(family)
    ids, _ = view_of(family, ld.VDD(absent="unknown"))
    without, _ = view_of(family, ld.VDD())
    assert len(ids) == len(without) + 1
    at = next(i for i, (a, b) in enumerate(zip(ids, [*without, None])) if a != b)
    assert ids[at] == 0 and ids[:at] + ids[at + 1 :] == without
    before = own.prompt(QUESTION, False).index(QUESTION)
    assert at <= before


# Other words about the same image.


@each_family
def test_a_leading_query_is_what_the_processor_makes_of_it(family):
    own = real(family)
    method = ld.LQCD()
    ids, run = view_of(family, method)
    want = own.ids(own.text(f"{QUESTION} {method.hint}"), picture(*WIDE))
    assert ids == want
    if family == "instructblip":
        read = run.samples[-1][0].vision["qformer_input_ids"]
        assert (
            read.tolist()
            == own.processor.qformer_tokenizer([f"{QUESTION} {method.hint}"], return_tensors="pt")["input_ids"].tolist()
        )


@each_family
def test_the_disturbance_stands_before_the_prompt(family):
    own = real(family)
    ids, run = view_of(family, ld.ICD())
    if family == "instructblip":
        # To the Q-Former alone, as in the authors' code.
        assert ids == run.samples[0][0].input_ids.tolist()
        read = run.samples[-1][0].vision["qformer_input_ids"].tolist()
        assert read == [own.processor.qformer_tokenizer(f"{DISTURBANCE} {QUESTION}")["input_ids"]]
        return
    plain = run.samples[0][0].input_ids.tolist()
    begin = run.family.insert_prefix(run.samples[0][0].input_ids, torch.empty(0, dtype=torch.long))[1]
    words = own.processor.tokenizer(DISTURBANCE + " ", add_special_tokens=False)["input_ids"]
    assert ids == [*plain[:begin], *words, *plain[begin:]]
    left = [token for token in ids if not run.family.is_placeholder(torch.tensor(token))]
    assert DISTURBANCE in shown(own.processor, left)


#: What LLaVA's authors put before a conversation.
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the human's questions."
)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_disturbance_in_the_place_of_the_system_prompt(family):
    own = real(family)
    text = own.text(QUESTION)
    ids, _ = view_of(family, ld.ICD(system=SYSTEM), text=f"{SYSTEM} {text}")
    assert ids == own.ids(f"{DISTURBANCE} {text}", picture(*WIDE))


@each_family
@pytest.mark.parametrize("question", [DESCRIBE, "Describe “it”, naïvely:\n- a dog?"], ids=["code", "odd"])
def test_another_question_is_what_the_processor_makes_of_it(family, question):
    """CODE's, VDGD's and MVP's requests go this way."""
    own = real(family)
    (sample,) = run_of(family).samples[0]
    view = asking(sample, question)
    assert view.input_ids.tolist() == own.ids(own.text(question), picture(*WIDE))


@each_family
def test_a_description_takes_the_place_of_the_image(family):
    own = real(family)
    said = "a dog"
    # Of the first image's place alone the words are told apart from what the model would say.
    (sample,) = run_of(family).samples[0]
    words = torch.tensor(own.processor.tokenizer(said, add_special_tokens=False)["input_ids"])
    ids = sample.without_image(instead=words).sample.input_ids.tolist()
    without = sample.without_image().sample.input_ids.tolist()
    at = next(i for i, (a, b) in enumerate(zip(ids, [*without, None])) if a != b)
    assert ids == [*without[:at], *words.tolist(), *without[at:]]
    if family == "llava":
        method = CODE(max_description=2)
        _, run = view_of(family, method)
        assert len(run.samples[-1][0].input_ids) in range(len(without), len(without) + 3)


# Pixels and features at real sizes.


@each_family
@pytest.mark.parametrize("method", [ld.VCD(), ld.RITUAL(transform="vertical_flip")], ids=["vcd", "ritual"])
def test_pixels_of_a_view_are_those_of_a_picture_of_that_size(family, method):
    run = run_of(family, method)
    own, view = run.samples[0][0], run.samples[1][0]
    assert own.input_ids.tolist() == view.input_ids.tolist()
    before, after = own.vision["pixel_values"], view.vision["pixel_values"]
    assert before.shape == after.shape and not torch.allclose(before, after, atol=0.1)
    for one, other in zip(own.images, view.images):
        assert one.features.shape == other.features.shape and not torch.allclose(
            one.features, other.features, atol=1e-3
        )


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen3_vl", "internvl", "gemma3", "paligemma"])
def test_a_flipped_view_is_the_flipped_picture(family):
    """Where no picture is cropped or tiled, the view's pixels are the processor's of the picture flipped before it."""
    own = real(family)
    run = run_of(family, ld.RITUAL(transform="horizontal_flip"))
    flipped = picture(*WIDE).transpose(0)
    want = own.inputs([own.text(QUESTION)], [flipped])["pixel_values"]
    got = run.samples[1][0].vision["pixel_values"]
    if family in ("llava_next", "internvl"):
        # Every tile is flipped where it is: the whole picture is the one that compares.
        first = (lambda x: x[0, 0]) if family == "llava_next" else (lambda x: x[-1])
        got, want = first(got), first(want)
    # Resizing is not quite symmetric.
    assert (got - want).abs().mean() < 0.02
    assert (got - want.flip(-1)).abs().mean() > 0.1 or family.startswith("qwen")


@each_family
@pytest.mark.parametrize("size", [WIDE, TALL], ids=["wide", "tall"])
def test_an_unrelated_image_is_not_the_samples_own(family, size, tmp_path):
    """However a processor brings a picture to its size, CICD passes over it."""
    picture(*size).save(tmp_path / "own.png")
    with pytest.raises(InputError, match="is another than the sample's own"):
        run_of(family, CICD(images=tmp_path), sizes=(size,))
    picture(*size, 1).save(tmp_path / "other.png")
    view = run_of(family, CICD(images=tmp_path), sizes=(size,)).samples[1][0].vision["pixel_values"]
    assert torch.equal(
        view, run_of(family, CICD(images=tmp_path / "other.png"), sizes=(size,)).samples[1][0].vision["pixel_values"]
    )


@pytest.mark.parametrize("family", ["llava", "llava_next", "instructblip"])
def test_outlier_patches_alone(family):
    """DAMRO's k is of the published 576 patches of CLIP, 256 of InstructBLIP's encoder."""
    own = real(family)
    run = run_of(family, DAMRO(k=10))
    count = int(run.family.is_placeholder(run.samples[1][0].input_ids).sum())
    # The newline that closes LLaVA-NeXT's small whole stays; a Q-Former always gives its queries.
    assert count == {"llava": 10, "llava_next": 11, "instructblip": 32}[family]
    (places,) = DAMRO(k=10).places(run.samples[0][0])
    assert len(places.chosen) == (256 if family == "instructblip" else 576) and int(places.chosen.sum()) == 10
    assert own.processor is run.processor


@each_family
@pytest.mark.full
@pytest.mark.parametrize("method", [ld.VCD(), ld.ICD(), ld.VDD(), ld.AvisC(), ld.SID(), ld.PAI()], ids=lambda m: m.name)
def test_at_real_length_stacked_equals_sequential(family, method):
    own = real(family)
    inputs = own.inputs([own.text(QUESTION)], [picture(*WIDE)])
    said = []
    for execution in ("stacked", "sequential"):
        with ld.attached(own.model, method, processor=own.processor, execution=execution):
            said.append(own.model.generate(**copy.copy(inputs), seed=0, **NEW))
    assert torch.equal(said[0].sequences, said[1].sequences)
    torch.testing.assert_close(said[0].logits[0], said[1].logits[0], atol=1e-3, rtol=1e-3)


# Videos, through the real video processors.

FILMS = [name for name in FAMILIES if "pixel_values_videos" in adapter(name).encoder_inputs]


def clip(frames, seed=0):
    """(F, 3, H, W) frames of uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (frames, 3, 4, 4), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, size=(448, 672)).to(torch.uint8)


def watched(own, frames, seed=0):
    """The processor's output for a question about a video of one frame per second."""
    video = clip(frames, seed)
    metadata = {
        "fps": 1.0,
        "total_num_frames": frames,
        "duration": float(frames),
        "frames_indices": list(range(frames)),
    }
    # Qwen3-VL would make the frames of a short video larger.
    how = dict(
        do_sample_frames=False, do_resize="qwen" not in own.family, video_metadata=[metadata], return_tensors="pt"
    )
    return dict(own.processor(text=[own.text(QUESTION, "video")], videos=[video], **how))


@pytest.mark.parametrize("family", FILMS)
def test_a_video_of_a_real_processor(family):
    own = real(family)
    inputs = watched(own, 4)
    want = own.model.generate(**copy.copy(inputs), **NEW)
    kept = Kept()
    with ld.attached(own.model, ld.VDD(alpha=FAINT, beta=None), processor=own.processor, recorder=kept):
        got = own.model.generate(**copy.copy(inputs), **NEW)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-3)
    moved = own.model.generate(**watched(own, 4, seed=1), **NEW).logits[0] - want.logits[0]
    assert moved.abs().max() > 1e-3
    ids = kept.run.samples[1][0].input_ids
    # As the text without a video: the times of Qwen3-VL's frames are gone too.
    assert shown(own.processor, ids) == own.prompt(QUESTION, False)


@pytest.mark.parametrize("family", FILMS)
def test_dropping_frames_gives_the_prompt_and_the_pixels_of_a_shorter_video(family):
    own = real(family)
    inputs, shorter = watched(own, 6), watched(own, 4)
    (sample,) = Run(own.model, ld.Plain(), inputs, processor=own.processor, seed=0).samples[0]
    # The first four frames; the clip's colours are drawn frame by frame.
    view = sample.with_frames(lambda frames, number: frames[:4]).sample
    assert view.input_ids.tolist() == shorter["input_ids"][0].tolist()
    for name, value in shorter.items():
        if name in view.vision:
            torch.testing.assert_close(view.vision[name], value, msg=name)
    assert "pixel_values_videos" in view.vision
