"""Every input that a family's forward or processor knows is honoured or refused by name; missing ones are inferred."""

import copy
import inspect

import pytest
import torch
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

import lvlm_decode as ld
from lvlm_decode.engine.hf import inputs as hf_inputs
from lvlm_decode.errors import InputError, UnsupportedError
from lvlm_decode.families import FAMILIES, family_of
from lvlm_decode.testing.models import IMAGE, PAD, VIDEO, tiny

FORMS = ("attach", "custom_generate", "processor")
HOW = dict(max_new_tokens=6, do_sample=False)


def call(zoo, inputs, form, method=None, **kwargs):
    method = method or ld.Plain()
    inputs, kwargs = copy.copy(inputs), {**HOW, **kwargs}
    if form == "bare":
        return zoo.model.generate(**inputs, **kwargs)
    if form == "custom_generate":
        return zoo.model.generate(**inputs, **kwargs, custom_generate=method)
    if form == "processor":
        processor = method.processor(zoo.model, inputs, processor=zoo.processor)
        return zoo.model.generate(**inputs, **kwargs, logits_processor=[processor])
    with ld.attached(zoo.model, method, processor=zoo.processor):
        return zoo.model.generate(**inputs, **kwargs)


def known_to(family):
    """Names that the forward of a family takes, and those that its image and video processors put out."""
    names = set(inspect.signature(type(tiny(family).model).forward).parameters) - {"self", "kwargs"}
    for registry in (IMAGE_PROCESSOR_MAPPING_NAMES, VIDEO_PROCESSOR_MAPPING_NAMES):
        import transformers

        entry = registry.get(tiny(family).model.config.model_type)
        for name in entry.values() if isinstance(entry, dict) else [entry] if entry else []:
            names |= set(getattr(getattr(transformers, name, None), "model_input_names", None) or [])
    return sorted(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_somebody_decides_about_every_input(family):
    """A new input of transformers has to be honoured or refused in words before this passes again."""
    honoured = {*family_of(tiny(family).model).input_keys, *hf_inputs.HONOURED, *hf_inputs.options()}
    undecided = [name for name in known_to(family) if name not in honoured and name not in hf_inputs.REFUSED]
    assert undecided == []
    assert "input_ids" in honoured and "pixel_values" in known_to(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_honoured_is_what_the_zoo_gives(family):
    """No family's list is short of what a processor makes, which the other tests hold to the bare model's answer."""
    zoo = tiny(family)
    given = set(zoo.inputs(("is it",), videos=1 if zoo.video_ids else 0))
    assert given <= {*family_of(zoo.model).input_keys, "input_ids", "attention_mask"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*hf_inputs.REFUSED, "pixel_value", "nonsense"])
def test_what_cannot_be_honoured_is_refused_by_name(family, name):
    zoo = tiny(family)
    if name in family_of(zoo.model).input_keys:
        pytest.skip("honoured by this family")
    for form in ("attach", "processor"):
        with pytest.raises(UnsupportedError, match=f"^{name} ") as caught:
            call(zoo, {**zoo.inputs(("is it",)), name: torch.ones(1, 2)}, form, ld.VCD())
        assert "\n" not in str(caught.value) and str(caught.value)[-1] in ".?"


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "instructblip"])
def test_positions_of_the_caller_are_refused_and_the_models_own_are_not(family):
    zoo = tiny(family)
    inputs = zoo.inputs(("is it a dog", "no"))
    want = call(zoo, inputs, "bare")
    for form in FORMS:
        assert torch.equal(want, call(zoo, inputs, form)), form
    positions = 3 * torch.arange(inputs["input_ids"].shape[1])[None].expand(2, -1)
    for form in FORMS:
        with pytest.raises(UnsupportedError, match="position_ids cannot be honoured"):
            call(zoo, {**inputs, "position_ids": positions}, form)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_a_missing_mask_is_inferred_as_transformers_infers_it(family, form):
    zoo = tiny(family)
    inputs = zoo.inputs(("is it a dog", "no"), seed=4)
    assert bool((inputs["input_ids"] == PAD).any())
    without = {key: value for key, value in inputs.items() if key != "attention_mask"}
    how = dict(output_scores=True, return_dict_in_generate=True)
    if family == "instructblip" and form == "custom_generate":
        pytest.skip("its language model decodes from embeddings; this form is refused")
    want, got = call(zoo, without, "bare", **how), call(zoo, without, form, **how)
    assert torch.equal(want.sequences, got.sequences)
    torch.testing.assert_close(got.scores[0].log_softmax(-1), want.scores[0].log_softmax(-1), atol=2e-5, rtol=1e-4)
    if form == "attach" and family != "instructblip":
        # A caller's padding token counts, as it does in transformers: here no token is one.
        other = dict(pad_token_id=VIDEO, **how)
        want, got = call(zoo, without, "bare", **other), call(zoo, without, form, **other)
        assert torch.equal(want.sequences, got.sequences)


def test_masks_of_another_kind_are_refused():
    zoo = tiny("llava")
    inputs = zoo.inputs(("is it a dog", "no"))
    rows, width = inputs["input_ids"].shape
    hidden = inputs["attention_mask"].clone()
    hidden[0, (inputs["input_ids"][0] == IMAGE).nonzero()[:2, 0]] = 0
    for mask, match in (
        (torch.ones(rows, 1, width, width), "they must be equal"),
        ({"full_attention": None}, "attention_mask is a dict"),
        (hidden, "hides image placeholders"),
    ):
        for form in ("attach", "processor"):
            with pytest.raises(InputError, match=match):
                call(zoo, {**inputs, "attention_mask": mask}, form, ld.VCD())
