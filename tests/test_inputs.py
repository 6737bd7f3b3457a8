"""Every input that a family's forward or processor knows is honoured or refused by name; missing ones are inferred."""

import copy
import dataclasses
import inspect
from typing import ClassVar

import pytest
import torch
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

import lvlm_decode as ld
from lvlm_decode.engine.hf import inputs as hf_inputs
from lvlm_decode.engine.run import Run
from lvlm_decode.errors import InputError, UnsupportedError
from lvlm_decode.families import FAMILIES, family_of
from lvlm_decode.method import Contrast
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


@dataclasses.dataclass(frozen=True)
class Mirror(Contrast):
    """The sample against itself: its own scores, to rounding."""

    name: ClassVar[str] = "mirror"
    beta: float | None = None

    def views(self, sample, rng):
        return [sample.as_view(-1.0)]


def positions_for(zoo, inputs):
    """By form, positions unlike those that the model makes: 2-D for every family, and of several axes where it has them."""
    made = Run(zoo.model, ld.Plain(), inputs).prepared[0].positions
    flat = 3 * torch.arange(inputs["input_ids"].shape[1])[None].expand(len(inputs["input_ids"]), -1)
    more = {} if made.dim() == 2 else {"3 axes": 2 * made[1:], "4 axes": 2 * made}
    return made, {"2-D": flat, "one row": flat[:1], **more}


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_the_caller_are_those_of_the_sample(family):
    """As the bare model takes them, and not those that it makes itself."""
    zoo = tiny(family)
    inputs = zoo.inputs(("is it a dog", "no"))
    how = dict(output_logits=True, return_dict_in_generate=True, min_new_tokens=6)
    _, given = positions_for(zoo, inputs)
    own = call(zoo, inputs, "bare", **how)
    for kind, positions in given.items():
        moved = {**inputs, "position_ids": positions}
        want = call(zoo, moved, "bare", **how)
        assert not torch.allclose(want.logits[0], own.logits[0], atol=1e-3), kind
        for form in FORMS:
            if family == "instructblip" and form == "custom_generate":
                continue  # its language model decodes from embeddings; this form is refused
            got = call(zoo, moved, form, **how)
            assert torch.equal(got.sequences, want.sequences), (kind, form)
            for one, other in zip(got.logits, want.logits):
                torch.testing.assert_close(one.log_softmax(-1), other.log_softmax(-1), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_the_caller_are_those_of_every_view_of_the_same_prompt(family):
    """A contrast with a view that equals the sample is the sample's own answer, so the view has its positions."""
    zoo = tiny(family)
    inputs = zoo.inputs(("is it a dog", "no"))
    _, given = positions_for(zoo, inputs)
    how = dict(num_beams=2, num_return_sequences=2)
    for positions in given.values():
        if len(positions) == 1 and positions.dim() == 2:
            continue  # transformers expands no row for beams
        moved = {**inputs, "position_ids": positions}
        want = call(zoo, moved, "bare", **how)
        for form in ("attach", "processor") if family == "instructblip" else FORMS:
            assert torch.equal(call(zoo, moved, form, Mirror(), **how), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_views_of_another_prompt_take_no_positions_but_the_models_own(family):
    zoo = tiny(family)
    inputs = zoo.inputs(("is it a dog", "no"))
    made, given = positions_for(zoo, inputs)
    if family == "paligemma":
        made = made - 1  # what its generate() adds to those it is given
    # ICD's words go to a Q-Former alone, where there is one.
    for method in (ld.VDD(absent="none"), ld.VDGD(), *([] if family == "instructblip" else [ld.ICD()])):
        want = call(zoo, inputs, "attach", method)
        same = {**inputs, "position_ids": made}
        assert torch.equal(call(zoo, same, "attach", method), want)
        for positions in given.values():
            for form in ("attach",) if method.name == "vdgd" else ("attach", "processor"):
                with pytest.raises(UnsupportedError, match="nothing says those of this method's view") as caught:
                    call(zoo, {**inputs, "position_ids": positions}, form, method)
                assert "\n" not in str(caught.value)


def test_positions_of_another_shape_are_told_the_right_one():
    for family, more in (("llava", ""), ("qwen2_vl", r" or \(3, 2, \d+\) or \(4, 2, \d+\)")):
        zoo = tiny(family)
        inputs = zoo.inputs(("is it a dog", "no"))
        rows, width = inputs["input_ids"].shape
        odd = [
            torch.zeros(rows, width),
            torch.zeros(rows, width - 1).long(),
            torch.zeros(2, rows, width).long(),
            "0, 1",
        ]
        for given in odd:
            for form in ("attach", "processor"):
                with pytest.raises(InputError, match=rf"^position_ids is .*; pass a whole .*, \(2, {width}\){more}\.$"):
                    call(zoo, {**inputs, "position_ids": given}, form, ld.VCD())


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


@pytest.mark.parametrize("family", FAMILIES)
def test_an_input_that_is_none_was_not_given(family):
    """Every input that somebody decides about; of a few of them transformers itself takes no None."""
    zoo = tiny(family)
    inputs = zoo.inputs(("is it",), seed=4)
    none = dict.fromkeys(name for name in known_to(family) if name not in (*inputs, *hf_inputs.options()))
    none |= {"attention_mask": None, "generation_config": None, "assistant_model": None}
    want = call(zoo, inputs, "attach", ld.VCD())
    assert torch.equal(call(zoo, {**inputs, **none}, "attach", ld.VCD()), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_no_tensor_is_told_how_to_get_one(family):
    """A processor that was not asked for tensors."""
    zoo = tiny(family)
    inputs = zoo.inputs(("is it", "no"))
    ids = inputs["input_ids"]
    wrong = {"input_ids": [ids.tolist(), ids.numpy(), ids[0], ids[None], ids.float()]}
    wrong["pixel_values"] = [inputs["pixel_values"].tolist(), inputs["pixel_values"].numpy(), "a.jpg"]
    for name, values in wrong.items():
        for value in values:
            for form in ("attach", "processor"):
                with pytest.raises(InputError, match=rf"^{name} is .*(return_tensors='pt'\)|\(B, T\))\.$"):
                    call(zoo, {**inputs, name: value}, form, ld.VCD())
