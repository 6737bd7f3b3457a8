"""What is peculiar to each model family, shown on tiny models that are first shown to react to their images."""

import copy
import inspect

import pytest
import torch

from lvlm_decode import attach, detach
from lvlm_decode.engine.batch import Batch
from lvlm_decode.engine.run import Run
from lvlm_decode.errors import InputError, UnsupportedError
from lvlm_decode.families import FAMILIES, family_of
from lvlm_decode.methods.plain import Plain
from lvlm_decode.methods.ritual import RITUAL, TRANSFORMS
from lvlm_decode.methods.vcd import VCD
from lvlm_decode.testing import families
from lvlm_decode.testing.contract import Case
from lvlm_decode.testing.models import BUILDERS, GRIDS, IMAGE, VISION, tiny

ALL = list(FAMILIES)


def test_every_registered_family_has_a_tiny_model():
    assert set(BUILDERS) == set(FAMILIES)


def case(family: str, method=None) -> Case:
    return Case(method or Plain(), tiny(family))


@pytest.mark.parametrize("family", ALL)
def test_reacts_to_its_image(family):
    families.reacts_to_its_image(case(family))


@pytest.mark.parametrize("family", ALL)
def test_reacts_to_its_prompt(family):
    families.reacts_to_its_prompt(case(family))


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("method", [VCD(), RITUAL(transform="horizontal_flip")], ids=["vcd", "ritual"])
def test_several_images_and_text_only_rows(family, method):
    families.rows_of_a_mixed_batch_say_what_they_say_alone(case(family, method))


@pytest.mark.parametrize("family", ALL)
def test_plain_rows_are_prepared_as_the_model_would(family):
    families.plain_rows_are_prepared_as_the_model_would(case(family))


@pytest.mark.parametrize("family", ALL)
def test_image_spans_hold_exactly_the_placeholders(family):
    families.image_spans_hold_exactly_the_placeholders(case(family))


def test_an_unknown_family_raises_and_names_the_known_ones():
    with pytest.raises(UnsupportedError, match=r"'llama' is not supported; supported are .*llava"):
        family_of(tiny("llava").model.get_decoder())


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "smolvlm", "llava_onevision"])
@pytest.mark.parametrize("change", ["fewer", "none"])
def test_images_that_do_not_fit_their_prompts_raise(family, change):
    zoo = tiny(family)
    inputs = zoo.inputs(["is it", "ab"])
    places = (inputs["input_ids"][1] == IMAGE).nonzero().flatten()
    inputs["input_ids"][1, places[:1] if change == "fewer" else places] = zoo.tokenizer("x").input_ids[-1]
    with pytest.raises(InputError, match=r"belong together|every image needs|one image entry"):
        Run(zoo.model, VCD(), inputs, seed=0)


# Qwen: patches.


def qwen_processor(family):
    from transformers import Qwen2VLImageProcessor

    vision = tiny(family).model.config.vision_config
    mean, std = family_of(tiny(family).model).pixel_statistics
    return Qwen2VLImageProcessor(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        image_mean=list(mean),
        image_std=list(std),
        do_resize=False,
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("transform", ["horizontal_flip", "rotation"])
def test_qwen_patches_are_edited_as_the_picture_they_were_cut_from(family, transform):
    adapter, process = family_of(tiny(family).model), qwen_processor(family)
    pictures = [
        torch.rand(3, 4 * h, 4 * w, generator=torch.Generator().manual_seed(i)) for i, (h, w) in enumerate(GRIDS)
    ]

    def edit(x):
        return TRANSFORMS[transform](x, torch.Generator().manual_seed(4)).clamp(0, 1)

    plain = process(pictures, do_rescale=False, return_tensors="pt")
    want = process([edit(p) for p in pictures], do_rescale=False, return_tensors="pt")
    vision = {"image_grid_thw": plain["image_grid_thw"]}
    assert vision["image_grid_thw"].tolist() == [[1, h, w] for h, w in GRIDS]
    got = adapter.edit_pictures(edit, plain["pixel_values"], vision)
    torch.testing.assert_close(got, want["pixel_values"], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got, plain["pixel_values"], atol=0.1)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_noise_is_tied_over_the_two_frames(family):
    zoo = tiny(family)
    run = Run(zoo.model, VCD(noise_step=999), zoo.inputs(["is it"], images=2), seed=0)
    frames = run.samples[1][0].vision["pixel_values"].view(-1, 3, 2, 16)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    assert 0.9 < float(frames[:, :, 0].std()) < 1.1
    assert len(frames[:, :, 0].unique()) > 0.99 * frames[:, :, 0].numel()


# Idefics: padding images.


@pytest.mark.parametrize("method", [VCD(), RITUAL()], ids=["vcd", "ritual"])
@pytest.mark.parametrize("family", ["smolvlm"])
def test_idefics_padding_images_stay_empty(family, method):
    zoo = tiny(family)
    inputs = zoo.inputs(["is it", "ab"], images=[2, 1])
    assert not inputs["pixel_values"][1, 1].any()
    run = Run(zoo.model, method, inputs, seed=0)
    view = run.samples[1][1].vision["pixel_values"]
    assert view[0, 0].any() and not view[0, 1].any()
    assert len(run.samples[1][1].images) == 1


# LLaVA-OneVision: tiles only for a prompt with one image.


def test_onevision_counts_images_per_row():
    zoo = tiny("llava_onevision")
    run = Run(zoo.model, VCD(), zoo.inputs(["is it", "ab", "cd"], images=[2, 0, 1]), seed=0)
    several, none, single = run.samples[1]
    assert several.vision["batch_num_images"].tolist() == [2] and single.vision["batch_num_images"].tolist() == [1]
    assert none.vision == {}
    lengths = [len(image.features) for image in (*several.images, *single.images)]
    assert lengths[2] > max(lengths[:2]), "tiles"


# InstructBLIP: two prompts.


def test_instructblip_encodes_a_picture_once_for_several_queries():
    zoo = tiny("instructblip")
    family = family_of(zoo.model)
    batch = Batch(family, zoo.inputs(["is it", "ab"]), processor=zoo.processor)
    seen = []
    hook = zoo.model.vision_model.register_forward_hook(lambda m, a, out: seen.append(len(out.last_hidden_state)))
    try:
        views = [sample.with_query(lambda query: "what " + query).sample for sample in batch.samples]
        resolved = batch.resolve([*batch.samples, *views])
    finally:
        hook.remove()
    assert seen == [2], "one pass over two pictures for four rows"
    for own, other in zip(resolved[:2], resolved[2:]):
        assert not torch.allclose(own.images[0].features, other.images[0].features, atol=1e-3)
    with torch.no_grad():
        view = resolved[3].vision
        want = zoo.model.get_image_features(**view, return_dict=True).pooler_output[0]
    torch.testing.assert_close(resolved[3].images[0].features, want, atol=1e-5, rtol=1e-4)


def test_instructblip_puts_a_prefix_after_the_image_and_the_begin_token():
    family = family_of(tiny("instructblip").model)
    ids = torch.tensor([IMAGE, IMAGE, 1, 9])
    assert family.insert_prefix(ids, torch.tensor([7]))[0].tolist() == [IMAGE, IMAGE, 1, 7, 9]
    ids = torch.tensor([1, IMAGE, IMAGE, 9])
    assert family_of(tiny("llava").model).insert_prefix(ids, torch.tensor([7]))[0].tolist() == [1, 7, IMAGE, IMAGE, 9]


def test_instructblip_needs_one_picture_and_its_places_in_every_row():
    """The count that is named is the caller's, not that of the views."""
    zoo = tiny("instructblip")
    inputs = zoo.batch([zoo.row("is it", 1, seed=0), zoo.row("ab", 0), zoo.row("no", 1, seed=2)])
    pixels = inputs["pixel_values"]
    inputs["pixel_values"] = torch.cat([pixels[:1], torch.zeros_like(pixels[:1]), pixels[1:]])
    attach(zoo.model, VCD())
    try:
        with pytest.raises(InputError, match="the batch has 3 images and its prompts have places for 2"):
            zoo.model.generate(**inputs, max_new_tokens=1)
    finally:
        detach(zoo.model)


def test_instructblip_refuses_an_encoder_decoder():
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

    text = dict(model_type="t5", vocab_size=160, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    config = InstructBlipConfig(
        vision_config=dict(**VISION, image_size=28, patch_size=7),
        qformer_config=dict(**VISION, vocab_size=120, encoder_hidden_size=32, cross_attention_frequency=1),
        text_config=text | {"decoder_start_token_id": 0},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    with pytest.raises(UnsupportedError, match=r"encoder-decoder language model \(t5\)"):
        attach(InstructBlipForConditionalGeneration(config), VCD())


# Three entries, one engine.


@pytest.mark.parametrize("family", ALL)
def test_every_input_of_the_encoder_is_named_by_its_family_and_by_methods(family):
    """generate() hands a callable, unexpanded, only the inputs that its signature names."""
    adapter = family_of(tiny(family).model)
    assert set(adapter.vision_keys) <= set(adapter.encoder_inputs)
    assert set(adapter.encoder_inputs) <= set(inspect.signature(VCD()).parameters)


@pytest.mark.parametrize("family", ALL)
def test_the_three_entries_give_the_same_tokens(family):
    zoo = tiny(family)
    inputs = zoo.inputs(["is it a dog", "ab"], images=[zoo.max_images, 1], seed=1)
    new = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4)
    attach(zoo.model, VCD())
    try:
        want = zoo.model.generate(**copy.copy(inputs), seed=0, **new)
    finally:
        detach(zoo.model)
    form = VCD().processor(zoo.model, inputs, seed=0)
    assert torch.equal(zoo.model.generate(**copy.copy(inputs), logits_processor=[form], **new), want)
    if family == "instructblip":
        with pytest.raises(UnsupportedError, match="attach"):
            zoo.model.generate(**inputs, custom_generate=VCD(), seed=0, **new)
    else:
        assert torch.equal(zoo.model.generate(**inputs, custom_generate=VCD(), seed=0, **new), want)
