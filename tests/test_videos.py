"""Videos: honoured by every family that takes them, in all forms; edits of frames; the contract with video rows."""

import copy
import dataclasses

import pytest
import torch
from contract import KINDS, NAMES, case, family_for, refusal
from helpers import FAINT, MARKS, Kept

import lvlm_decode as ld
from lvlm_decode.controllers.cntp import CNTP
from lvlm_decode.controllers.mvp import MVP
from lvlm_decode.controllers.opera import OPERA
from lvlm_decode.controllers.vdgd import VDGD
from lvlm_decode.engine.run import Run
from lvlm_decode.errors import InputError, UnsupportedError
from lvlm_decode.families import FAMILIES, adapter, family_of
from lvlm_decode.method import Contrast
from lvlm_decode.methods.ritual import TRANSFORMS
from lvlm_decode.methods.vcd import kept_share
from lvlm_decode.testing import contract
from lvlm_decode.testing.models import IMAGE, VIDEO, VISION_END, VISION_START, WITH_VIDEO, tiny

#: The families that take videos as videos.
FILMS = [family for family in FAMILIES if "pixel_values_videos" in adapter(family).encoder_inputs]
QWEN = [family for family in FILMS if family.startswith("qwen")]
NEW = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4)
SCORED = dict(NEW, output_logits=True, return_dict_in_generate=True)

each_family = pytest.mark.parametrize("family", FILMS)


def attached(zoo, inputs, method, **how):
    """What ``generate()`` returns under a method, and its run."""
    kept = Kept()
    with ld.attached(zoo.model, method, processor=zoo.processor, recorder=kept):
        return zoo.model.generate(**copy.copy(inputs), **{**SCORED, **how}), kept.run


def bare(zoo, inputs, **how):
    return zoo.model.generate(**copy.copy(inputs), **{**SCORED, **how})


def run_of(family, method, **rows):
    zoo = tiny(family)
    return Run(zoo.model, method, zoo.inputs(**{"images": 0, "videos": 1, **rows}), processor=zoo.processor, seed=0)


def film(sample):
    """Per video the frames that the sample has."""
    return sample.family.frames_of(sample.vision)


def test_every_family_whose_forward_takes_videos_is_here():
    takes = [name for name in FAMILIES if hasattr(tiny(name).model, "get_video_features")]
    assert FILMS == takes and set(QWEN) < set(FILMS)
    assert all("pixel_values_videos" in family_of(tiny(name).model).vision_keys for name in FILMS)


@each_family
def test_reacts_to_its_video(family):
    """Without this every other test here could pass on a model that is blind to videos."""
    zoo = tiny(family)
    one, other = (zoo.inputs(images=0, videos=1, seed=seed) for seed in (0, 5))
    assert torch.equal(one["input_ids"], other["input_ids"])
    with torch.no_grad():
        a, b = (zoo.model(**inputs).logits[:, -1].log_softmax(-1) for inputs in (one, other))
    # Little in Qwen3-VL, where the words of the times take most of a short prompt.
    assert float((a.exp() * (a - b)).sum()) > 0.02, "nats between the answers to two videos"


MIXED = {
    "video": dict(images=0, videos=1),
    "two-videos": dict(images=0, videos=2),
    "image-and-video": dict(images=1, videos=1),
    "rows": dict(texts=["is it a dog", "ab", "no", "is"], images=[2, 0, 1, 0], videos=[1, 0, 0, 2]),
}


@each_family
@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED)
def test_rows_are_prepared_as_the_model_would(family, rows):
    """Under no method, and at strength 0, in all three forms: bare transformers' answer, which videos change."""
    zoo = tiny(family)
    inputs, others = zoo.inputs(**rows, seed=1), zoo.inputs(**rows, seed=8)
    want = bare(zoo, inputs)
    assert (bare(zoo, others).logits[0] - want.logits[0]).abs().max() > 0.1
    for method in (ld.Plain(), ld.VCD(alpha=FAINT, beta=None)):
        got, _ = attached(zoo, inputs, method)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-5, rtol=1e-4)
    one_call = bare(zoo, inputs, custom_generate=ld.VCD(alpha=FAINT, beta=None))
    assert torch.equal(one_call.sequences, want.sequences)
    form = ld.VCD(alpha=FAINT, beta=None).processor(zoo.model, inputs)
    assert torch.equal(bare(zoo, inputs, logits_processor=[form]).sequences, want.sequences)


@each_family
@pytest.mark.parametrize("method", [ld.VCD(), ld.VDD()], ids=["vcd", "vdd"])
def test_the_three_forms_give_the_same_tokens(family, method):
    zoo = tiny(family)
    inputs = zoo.inputs(**MIXED["rows"], seed=1)
    want = attached(zoo, inputs, method, seed=0)[0].sequences
    form = method.processor(zoo.model, inputs, seed=0)
    assert torch.equal(bare(zoo, inputs, logits_processor=[form]).sequences, want)
    assert torch.equal(bare(zoo, inputs, custom_generate=method, seed=0).sequences, want)


# The contract, with rows of an image and a video, of text alone, and of a video.

VIDEO_CELLS = [(name, family) for name in NAMES for family in FILMS if refusal(name, family) is None]
#: In the default run: every method on one family, one method of each kind on one more; all pairs with --full.
FIRST, SECOND = "qwen2_5_vl", "llava_onevision"


def pairs(cells, everywhere=()):
    def default(name, family):
        first = FIRST if refusal(name, FIRST) is None else family_for(name)
        return family == first or (family == SECOND and name in KINDS.values()) or name in everywhere

    marks = [() if default(*pair) else pytest.mark.full for pair in cells]
    return pytest.mark.parametrize(
        "name,family", [pytest.param(*pair, id="-".join(pair), marks=mark) for pair, mark in zip(cells, marks)]
    )


def test_every_method_of_the_contract_meets_videos_or_says_what_it_lacks():
    refused = {name for name in NAMES for family in FILMS if refusal(name, family) is not None}
    # A CLS token and patches that are tokens: no encoder of videos has them; experts: one has.
    assert refused == {"causalmm", "damro", "scmoe"}
    assert {name for name, _ in VIDEO_CELLS} == set(NAMES) - {"causalmm", "damro"}


@pairs(VIDEO_CELLS, everywhere=("vcd", "avisc"))
def test_stacked_equals_sequential(name, family):
    contract.stacked_equals_sequential(case(name, family + WITH_VIDEO))


@pairs(VIDEO_CELLS, everywhere=("vcd",))
def test_a_row_in_a_batch_equals_the_row_alone(name, family):
    contract.a_row_in_a_batch_equals_the_row_alone(case(name, family + WITH_VIDEO))


@pairs([pair for pair in VIDEO_CELLS if pair[0] != "plain"])
def test_does_something(name, family):
    contract.does_something(case(name, family + WITH_VIDEO))


@pairs([pair for pair in VIDEO_CELLS if ld.methods.load(pair[0]).off is not None])
def test_switched_off_equals_plain(name, family):
    contract.switched_off_equals_plain(case(name, family + WITH_VIDEO))


@pytest.mark.full
@pytest.mark.parametrize("name,family", VIDEO_CELLS)
def test_drafts_and_beams_follow(name, family):
    contract.verifying_a_draft_equals_decoding_it(case(name, family + WITH_VIDEO))
    contract.beams_follow(case(name, family + WITH_VIDEO))
    contract.prompt_lookup_follows(case(name, family + WITH_VIDEO))


# Views.


@each_family
@pytest.mark.parametrize("method", [ld.VDD(), ld.M3ID()], ids=["vdd", "m3id"])
def test_the_view_without_the_video_is_the_prompt_without_it(family, method):
    zoo = tiny(family)
    inputs = zoo.inputs(["is it"], images=1, videos=2, seed=2)
    _, run = attached(zoo, inputs, method, max_new_tokens=1, min_new_tokens=1)
    sample = run.samples[1][0]
    # The row's builder puts one letter after every image and video.
    text = zoo.row("is it", images=0).ids
    want = torch.cat([text[:1], text[1:2].expand(3), text[1:]])
    assert sample.input_ids.tolist() == want.tolist() and not sample.images
    ids = want[None]
    alone = bare(zoo, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, max_new_tokens=1, min_new_tokens=1)
    torch.testing.assert_close(run.lanes.last_step.logits[1][:, 0], alone.logits[0], atol=2e-5, rtol=1e-4)


@each_family
def test_every_frame_has_noise_of_its_own(family):
    step = 300
    run = run_of(family, ld.VCD(noise_step=step))
    (before,), (after,) = film(run.samples[0][0]), film(run.samples[1][0])
    kept = kept_share("code")[step]
    noise = ((after - kept.sqrt() * before) / (1 - kept).sqrt()).flatten(1)
    assert noise.mean().abs() < 0.1 and 0.9 < noise.std() < 1.1
    shared = torch.corrcoef(noise) - torch.eye(len(noise))
    assert len(noise) >= 4 and shared.abs().max() < 0.3


@each_family
@pytest.mark.parametrize("name", ["horizontal_flip", "rotation", "crop"])
def test_all_frames_are_transformed_alike(family, name):
    run = run_of(family, ld.RITUAL(transform=name))
    (before,), (after,) = film(run.samples[0][0]), film(run.samples[1][0])
    adapter = run.family
    # One draw per frame, from a generator that stands where the method's stood.
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in adapter.pixel_statistics)
    drawn = {}

    def edit(pictures):
        drawn["all"] = TRANSFORMS[name](pictures, torch.Generator().manual_seed(3)).clamp(0, 1)
        return drawn["all"]

    sample = run.samples[0][0]
    edited = film(sample.with_pictures(edit).sample)[0]
    alone = [
        TRANSFORMS[name]((frame[None] * std + mean).clamp(0, 1), torch.Generator().manual_seed(3)).clamp(0, 1)
        for frame in before
    ]
    torch.testing.assert_close(drawn["all"], torch.cat(alone), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(edited, (drawn["all"] - mean) / std, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(after, before, atol=0.1)
    if name == "horizontal_flip":
        torch.testing.assert_close(
            after, ((before * std + mean).clamp(0, 1).flip(-1) - mean) / std, atol=1e-5, rtol=1e-4
        )


@dataclasses.dataclass(frozen=True)
class Reframed(Contrast):
    """The sample minus the sample with other frames."""

    name = "reframed"
    order: tuple[int, ...] = ()

    def views(self, sample, rng):
        return [sample.with_frames(lambda frames, number: frames[list(self.order)], weight=-0.5)]


@each_family
@pytest.mark.parametrize("order", [(3, 1, 0, 2), (0, 2), (1,)], ids=["shuffled", "dropped", "one"])
def test_other_frames_give_what_a_video_of_those_frames_gives(family, order):
    """The view's scores are those of the bare model on the video that has these frames, and on its prompt."""
    zoo = tiny(family)
    inputs = zoo.inputs(["is it"], images=1, videos=1, seed=2)
    _, run = attached(zoo, inputs, Reframed(order=order), max_new_tokens=1, min_new_tokens=1)
    before, view = run.samples[0][0], run.samples[1][0]
    frames = film(before)[0][list(order)]
    if family in QWEN:
        # As the processor cuts it: the last frame again where a pair is not full.
        frames = torch.cat([frames, frames[-1:]])[: len(frames) + len(frames) % 2]
        steps, (height, width) = len(frames) // 2, (side // 4 for side in frames.shape[-2:])
        cut = frames.view(steps, 2, 3, height // 2, 2, 4, width // 2, 2, 4).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        given = {"pixel_values_videos": cut.reshape(-1, 96), "video_grid_thw": torch.tensor([[steps, height, width]])}
        count = steps * height * width // 4
    else:
        given, count = {"pixel_values_videos": frames[None]}, len(frames) + 1
    block = [VISION_START, *[VIDEO] * count, VISION_END]
    if family.startswith("qwen3"):
        pair = [VISION_START, *[VIDEO] * (count // steps), VISION_END]
        times = [
            zoo.tokenizer(f"<{0.5 + step:.1f} seconds>", add_special_tokens=False).input_ids for step in range(steps)
        ]
        block = [VISION_START, *(token for time in times for token in [*time, *pair]), VISION_END]
    elif family not in QWEN:
        block = [VIDEO] * count
    ids = inputs["input_ids"][0].tolist()
    start = ids.index(VIDEO) if family not in QWEN else [i for i, token in enumerate(ids) if token == VISION_START][1]
    stop = len(ids) - ids[::-1].index(VIDEO) if family not in QWEN else len(ids) - ids[::-1].index(VISION_END)
    want = torch.tensor([[*ids[:start], *block, *ids[stop:]]])
    assert view.input_ids.tolist() == want[0].tolist()
    own = {**inputs, **given, "input_ids": want, "attention_mask": torch.ones_like(want)}
    if family in QWEN:
        own["mm_token_type_ids"] = (want == IMAGE).long() + 2 * (want == VIDEO).long()
    alone = bare(zoo, own, max_new_tokens=1, min_new_tokens=1)
    got = run.lanes.last_step.logits[:, :, 0]
    torch.testing.assert_close(got[1], alone.logits[0], atol=2e-5, rtol=1e-4)
    assert (got[1] - got[0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_an_edit_of_frames_that_is_none_raises(family):
    sample = run_of(family, ld.Plain()).samples[0][0]
    for edit in (
        lambda frames, _: frames[:0],
        lambda frames, _: torch.cat([frames, frames]),
        lambda frames, _: frames[..., :-1],
    ):
        with pytest.raises(InputError, match="keeps their size, and gives at least one"):
            sample.with_frames(edit)
    still = run_of(family, ld.Plain(), images=1, videos=0).samples[0][0]
    assert still.with_frames(lambda frames, _: 1 / 0).sample is still


def test_videos_of_one_prompt_keep_one_length_where_the_model_wants_it():
    sample = run_of("llava_onevision", ld.Plain(), videos=2).samples[0][0]
    with pytest.raises(UnsupportedError, match="videos of one length"):
        sample.with_frames(lambda frames, number: frames[: 2 + number])


@each_family
def test_frames_are_those_that_the_pixels_hold(family):
    sample = run_of(family, ld.Plain(), videos=2).samples[0][0]
    frames = film(sample)
    assert len(frames) == 2 and all(own.shape[1] == 3 for own in frames)
    again = sample.family.with_frames(sample.vision, frames)
    assert all(torch.equal(again[key], value) for key, value in sample.vision.items())


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_qwen_frames_are_those_the_processor_cut(family):
    from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    vision = tiny(family).model.config.vision_config
    kind = Qwen3VLVideoProcessor if family == "qwen3_vl" else Qwen2VLVideoProcessor
    process = kind(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        do_resize=False,
        do_normalize=False,
        do_rescale=False,
        do_sample_frames=False,
    )
    clip = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    cut = process([clip], return_tensors="pt")
    family = family_of(tiny(family).model)
    vision = {key: cut[key] for key in ("pixel_values_videos", "video_grid_thw")}
    (frames,) = family.frames_of(vision)
    # The processor says the last one twice, so that pairs are full.
    torch.testing.assert_close(frames, torch.cat([clip, clip[-1:]]))
    back = family.with_frames(vision, [clip])
    assert torch.equal(back["pixel_values_videos"], vision["pixel_values_videos"])
    assert torch.equal(back["video_grid_thw"], vision["video_grid_thw"])


@each_family
def test_images_and_videos_stand_in_the_order_of_the_prompt(family):
    zoo = tiny(family)
    inputs = zoo.inputs(["is it"], images=2, videos=1)
    (sample,) = Run(zoo.model, ld.Plain(), inputs, seed=0).samples[0]
    assert [image.kind for image in sample.images] == ["image", "image", "video"]
    for (start, stop), image in zip(sample.image_spans(), sample.images):
        token = VIDEO if image.kind == "video" else IMAGE
        assert int((sample.input_ids[start:stop] == token).sum()) == len(image.features)
        assert sample.input_ids[start] == sample.input_ids[stop - 1] == token


@each_family
def test_everything_is_encoded_once(family):
    """One pass for all images and one for all videos, with VCD's views in them; none for a view without pixels of its own."""
    zoo = tiny(family)
    inputs = zoo.inputs(["is it", "no"], images=1, videos=1)
    seen = []
    tower = zoo.model.get_encoder(modality="image")
    hook = tower.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    try:
        attached(zoo, inputs, ld.VCD() + ld.VDD())
        both, seen[:] = list(seen), []
        attached(zoo, inputs, Reframed(order=(1, 0)))
    finally:
        hook.remove()
    assert len(both) == 2, "images and their noised copies, videos and theirs"
    # Fewer frames are a pass of their own where videos of one pass must have one length.
    assert len(seen) == (3 if family == "llava_onevision" else 2)
    assert seen[0] == both[0] // 2, "the images are not encoded again for a view that has other frames"


# What else the caller may give.


def test_the_time_between_frames_moves_positions():
    zoo = tiny("qwen2_5_vl")
    inputs = zoo.inputs(["is it", "no"], images=[1, 0], videos=[1, 1], seed=3)
    slow = {**inputs, "second_per_grid_ts": inputs["second_per_grid_ts"] * 4}
    assert (bare(zoo, slow).logits[0] - bare(zoo, inputs).logits[0]).abs().max() > 1e-3
    for given in (inputs, slow, {**inputs, "second_per_grid_ts": inputs["second_per_grid_ts"].tolist()}):
        want = bare(zoo, given)
        got, run = attached(zoo, given, ld.VCD(alpha=FAINT, beta=None))
        torch.testing.assert_close(got.logits[0], want.logits[0], atol=2e-5, rtol=1e-4)
        # The view of a video keeps its time too.
        assert [p.positions.tolist() for p in run.prepared[:1]] == [p.positions.tolist() for p in run.prepared[1:]]


@pytest.mark.parametrize("family", [name for name in QWEN if name != "qwen2_5_vl"])
def test_the_time_between_frames_is_refused_where_nobody_reads_it(family):
    zoo = tiny(family)
    inputs = zoo.inputs(images=0, videos=1) | {"second_per_grid_ts": torch.ones(1)}
    with pytest.raises(UnsupportedError, match=r"^second_per_grid_ts cannot be honoured"):
        attached(zoo, inputs, ld.VCD())


@each_family
def test_an_encoded_video_is_honoured(family):
    zoo = tiny(family)
    inputs = zoo.inputs(["is it"], images=1, videos=1, seed=4)
    want = bare(zoo, inputs)
    adapter = family_of(zoo.model)
    run = Run(zoo.model, ld.Plain(), inputs, family=adapter)
    packed = adapter.pack(run.samples[0][0].images)
    assert set(packed) == {"image", "video"}
    pixels = ("pixel_values", "pixel_values_videos", "image_sizes", "batch_num_images")
    given = {key: value for key, value in inputs.items() if key not in pixels}
    got, _ = attached(zoo, given | {"mm_encoder_outputs": packed}, ld.VDD(alpha=FAINT, beta=None))
    torch.testing.assert_close(got.logits[0], want.logits[0], atol=2e-5, rtol=1e-4)
    for method in (ld.VCD(), Reframed(order=(0,))):
        with pytest.raises(InputError, match="were given as features; pass pixel_values"):
            attached(zoo, given | {"mm_encoder_outputs": adapter.pack(run.samples[0][0].images)}, method)


def test_an_encoded_video_is_refused_by_a_model_that_takes_none():
    zoo = tiny("llava")
    inputs = zoo.inputs()
    with pytest.raises(UnsupportedError, match="encoded video cannot be honoured: llava takes none"):
        attached(zoo, inputs | {"mm_encoder_outputs": {"video": object()}}, ld.VCD())


@each_family
def test_videos_that_do_not_fit_their_prompts_raise(family):
    zoo = tiny(family)
    inputs = zoo.inputs(["is it", "no"], images=0, videos=1)
    letter = zoo.tokenizer("x").input_ids[-1]
    places = (inputs["input_ids"] == VIDEO).nonzero()
    without = {key: value for key, value in inputs.items() if key not in ("pixel_values_videos", "video_grid_thw")}
    with pytest.raises(InputError, match="video placeholders and no pixel_values_videos were given"):
        attached(zoo, without, ld.VCD())
    for rows in ([0], [0, 1]):
        ids = inputs["input_ids"].clone()
        for row, at in places.tolist():
            if row in rows:
                ids[row, at] = letter
        match = "no prompt has a video token" if len(rows) == 2 else "belong together|every video needs one video token"
        with pytest.raises(InputError, match=match):
            attached(zoo, {**inputs, "input_ids": ids}, ld.VCD())


# Searches and drafts.


@each_family
@pytest.mark.parametrize("drafter", ["lookup", "recycling"])
def test_drafters_follow(family, drafter):
    zoo = tiny(family)
    inputs = zoo.inputs(["is it a dog", "no"], images=[1, 0], videos=[1, 2], seed=6)
    want = attached(zoo, inputs, ld.VCD())[0].sequences
    with ld.attached(zoo.model, ld.VCD(), drafter=drafter):
        assert torch.equal(zoo.model.generate(**inputs, **NEW), want)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_an_assistant_sees_the_video(family):
    own = case("vcd", family + WITH_VIDEO)
    drafted, *_ = own.decode(rows=[2], assistant_model=copy.deepcopy(tiny(family).model))
    assert torch.equal(drafted[0], own.stacked[0][2])


CONTROLLERS = {
    "opera": OPERA(num_beams=2),
    "cntp": CNTP(punctuation=MARKS, max_segment=4, max_trials=3),
    "mvp": MVP(caption_tokens=3, path_tokens=3, answers=("a", "b")),
    "vdgd": VDGD(description_tokens=3),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_searches_see_the_video(name):
    """What a search says of a row does not depend on its batch."""
    zoo = tiny("qwen2_5_vl")
    rows = [zoo.row("is it a dog", 0, seed=1, videos=1), zoo.row("no", 1, seed=2, videos=1)]
    method = CONTROLLERS[name]
    how = dict(max_new_tokens=4, seed=0, do_sample=name == "cntp")
    with ld.attached(zoo.model, method, processor=zoo.processor):
        whole = zoo.model.generate(**zoo.batch(rows), sample_ids=[0, 1], **how)
        for number, row in enumerate(rows):
            inputs = zoo.batch([row])
            alone = zoo.model.generate(**inputs, sample_ids=[number], **how)
            answer = alone[0, inputs["input_ids"].shape[1] :].tolist()
            width = zoo.batch(rows)["input_ids"].shape[1]
            assert whole[number, width:][: len(answer)].tolist() == answer


# Videos that the processor hands over as images.


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_a_video_given_as_images_is_a_sample_with_images(family):
    zoo = tiny(family)
    assert not family_of(zoo.model).placeholder_ids.keys() - {"image"}
    inputs = zoo.inputs(["is it"], images=2)
    # Frames of one colour each, which a crop leaves as they are and a jitter of colours does not.
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"]) + 0.25
    run = Run(zoo.model, ld.RITUAL(transform="color_jitter"), inputs, seed=0)
    view = run.samples[1][0].vision["pixel_values"].flatten(0, -4)
    assert torch.equal(view[0], view[1]) and not torch.allclose(view, inputs["pixel_values"].flatten(0, -4), atol=0.01)
    with pytest.raises(UnsupportedError, match=r"pixel_values_videos cannot be honoured.*pass frames as images"):
        attached(zoo, inputs | {"pixel_values_videos": torch.zeros(1, 2, 3, 32, 32)}, ld.VCD())


def test_an_adapter_that_reads_no_videos_says_what_it_lacks():
    llava = family_of(tiny("llava").model)
    for name, given in (("tokens_per_video", ({},)), ("frames_of", ({},)), ("with_frames", ({}, []))):
        with pytest.raises(UnsupportedError, match=f"reads no videos; give its adapter {name}"):
            getattr(llava, name)(*given)
