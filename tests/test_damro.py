"""DAMRO against what the authors' function generated on small LLaVA models, and its parts by hand."""

import copy
import json

import pytest
import torch
from conftest import shared_path
from helpers import Kept
from transformers import LlavaForConditionalGeneration

from lvlm_decode import attach, detach
from lvlm_decode.engine.run import Run
from lvlm_decode.errors import InputError, UnsupportedError
from lvlm_decode.methods.damro import DAMRO, cls_row
from lvlm_decode.testing.models import tiny


def golden():
    from safetensors.torch import load_file

    folder = shared_path("golden/damro")
    for case in json.loads((folder / "cases.json").read_text()):
        model = LlavaForConditionalGeneration.from_pretrained(folder / case["model"]).eval()
        yield case, model, load_file(folder / case["model"] / "inputs.safetensors")["pixel_values"]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_recorded_cases_token_for_token(sampled):
    cases = [item for item in golden() if item[0]["do_sample"] == sampled]
    assert len(cases) == 2
    for case, model, pixels in cases:
        ids = torch.tensor([case["input_ids"]])
        kept = Kept()
        attach(model, DAMRO(**case["parameters"]), recorder=kept)
        if sampled:
            torch.manual_seed(case["torch_seed"])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            do_sample=sampled,
            # The authors sample directly from the masked scores.
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=case["max_new_tokens"],
            pad_token_id=case["pad_token_id"],
            eos_token_id=case["eos_token_id"],
        )
        assert out[0, ids.shape[1] :].tolist() == case["new_tokens"], case["model"]
        views = kept.run.prepared
        images = int((ids == model.config.image_token_id).sum())
        assert views[1].input_ids.shape[1] == ids.shape[1] - images + case["parameters"]["k"]


def test_cls_attention_both_definitions():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 1 + 16, 32, generator=generator)
    attention = tiny("llava").model.get_encoder(modality="image").encoder.layers[0].self_attn
    with torch.no_grad():
        query, key = attention.q_proj(states[:, 0]), attention.k_proj(states)
        joined = torch.softmax(query[:, None] @ key.transpose(1, 2) / 32**0.5, -1)[:, 0, 1:]
        torch.testing.assert_close(cls_row(query, key, 1), joined)
        heads = attention.num_heads
        q = query.view(2, heads, 1, 8)
        k = key.view(2, 17, heads, 8).transpose(1, 2)
        split = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, -1).mean(1)[:, 0, 1:]
        torch.testing.assert_close(cls_row(query, key, heads), split)
    assert not torch.allclose(joined, split)


def outliers(family: str, **parameters):
    """The method's view of a one-image sample, and what the encoder said."""
    zoo = tiny(family)
    inputs = zoo.inputs(["is it"])
    encoder = zoo.model.get_encoder(modality="image")
    said = {}
    hook = encoder.register_forward_hook(lambda module, args, output: said.update(states=output.last_hidden_state))
    kept = Kept()
    attach(zoo.model, DAMRO(**parameters), recorder=kept)
    try:
        zoo.model.generate(**inputs, do_sample=False, max_new_tokens=1)
        run = kept.run
    finally:
        detach(zoo.model)
        hook.remove()
    return zoo, run, said["states"]


def test_llava_takes_the_layer_that_makes_the_features():
    zoo, run, _ = outliers("llava", k=3)
    encoder, inputs = zoo.model.get_encoder(modality="image"), zoo.inputs(["is it"])
    with torch.no_grad():
        states = encoder(inputs["pixel_values"], output_hidden_states=True).hidden_states
        # hidden_states[-2] comes out of layer -2, whose input is the one before.
        layer = encoder.encoder.layers[-2]
        x = layer.layer_norm1(states[-3])
        query, key = layer.self_attn.q_proj(x[:, :1]), layer.self_attn.k_proj(x)
        attention = torch.softmax(query @ key.transpose(1, 2) / x.shape[-1] ** 0.5, -1)[0, 0, 1:]
        want = zoo.model.model.multi_modal_projector(states[-2][:, 1:])[0][attention.topk(3).indices]
    (image,) = run.samples[1][0].images
    torch.testing.assert_close(image.features, want)


def test_llava_next_keeps_the_whole_image_and_the_newline():
    zoo, run, _ = outliers("llava_next", k=3)
    (own,), (image,) = run.samples[0][0].images, run.samples[1][0].images
    assert len(image.features) == 4
    torch.testing.assert_close(image.features[-1], zoo.model.model.image_newline.detach())
    # The whole image is the first tile: four patches.
    for patch in image.features[:-1]:
        assert any(torch.allclose(patch, whole, atol=1e-5) for whole in own.features[:4])


def test_instructblip_offset_of_the_authors_and_the_right_one():
    zoo, code, states = outliers("instructblip", k=3)
    _, fixed, _ = outliers("instructblip", k=3, offset="fixed")
    model, inputs = zoo.model, zoo.inputs(["is it"])
    with torch.no_grad():
        hidden = model.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states
        layer = model.vision_model.encoder.layers[-2]
        x = layer.layer_norm1(hidden[-3])
        query, key, _ = layer.self_attn.qkv(x).view(1, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(query[:, :, :1] @ key.transpose(2, 3) / 8**0.5, -1).mean(1)[0, 0, 1:]
        chosen = attention.topk(3).indices
        for run, rows in ((code, chosen), (fixed, chosen + 1)):
            queries = model.query_tokens
            mask = torch.cat([torch.ones(1, queries.shape[1]), inputs["qformer_attention_mask"]], 1)
            read = model.qformer(
                input_ids=inputs["qformer_input_ids"],
                attention_mask=mask,
                query_embeds=queries,
                encoder_hidden_states=states[:1, rows],
            ).last_hidden_state[:, : queries.shape[1]]
            (image,) = run.samples[1][0].images
            torch.testing.assert_close(image.features, model.language_projection(read)[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(code.samples[1][0].images[0].features, fixed.samples[1][0].images[0].features)


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "gemma3"])
def test_families_without_a_readable_cls_token_refuse(family):
    with pytest.raises(UnsupportedError, match="CLS"):
        attach(tiny(family).model, DAMRO())


@pytest.mark.parametrize("family,per_image", [("llava", 3), ("llava_next", 4)])
def test_the_second_image_of_a_prompt_keeps_its_own_outliers(family, per_image):
    """As the same image would alone: neither the first image's patches nor the neighbour row's."""
    zoo = tiny(family)
    rows = [zoo.row("ab", 1, seed=9), zoo.row("is it", 2, seed=1)]
    run = Run(zoo.model, DAMRO(k=3), zoo.batch(rows), processor=zoo.processor, seed=0)
    first, second = run.samples[1][1].images
    assert [len(image.features) for image in (first, second)] == [per_image] * 2
    assert int((run.samples[1][1].input_ids == run.family.image_token_id).sum()) == 2 * per_image
    lonely = copy.deepcopy(rows[1])
    lonely.images = {key: values[1:] for key, values in lonely.images.items()}
    lonely.ids = torch.cat([lonely.ids[:1], torch.tensor(zoo.image_ids(2)[1]), lonely.ids[-5:]])
    alone = Run(zoo.model, DAMRO(k=3), zoo.batch([lonely]), processor=zoo.processor, seed=0)
    (own,) = alone.samples[1][0].images
    torch.testing.assert_close(second.features, own.features, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(first.features, second.features, atol=1e-2)


def test_images_given_as_features_are_refused():
    zoo = tiny("llava")
    inputs = zoo.inputs(["is it"])
    features = zoo.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    attach(zoo.model, DAMRO(k=3))
    try:
        with pytest.raises(InputError, match=r"damro reads the vision encoder .* given as features; pass pixel_values"):
            zoo.model.generate(**inputs, mm_encoder_outputs={"image": features}, max_new_tokens=1)
    finally:
        detach(zoo.model)
