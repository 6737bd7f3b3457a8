"""What DCD and LOL contrast with: projectors and an adapter fitted to rejected answers, the model left as it was."""

import copy

import pytest
import torch
from conftest import needs_adapters
from helpers import Kept

from lvlm_decode import DCD, LOL, attach, detach
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.families import family_of
from lvlm_decode.training.negatives import batches, scene_triples, train_amateur, train_projectors


@pytest.fixture(scope="module")
def tiny_llava():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from lvlm_decode_data import tiny_path

    try:
        folder = tiny_path("tiny-llava")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(), processor


@pytest.fixture(scope="module")
def triples():
    return list(scene_triples(6, seed=3))


@pytest.fixture(scope="module")
def short(triples):
    """Answers of one word alone: captions take a minute on one core."""
    return [triple for triple in triples if triple.chosen in ("Yes", "No")]


def loss(model, processor, triples, which):
    with torch.no_grad():
        return float(model(**next(batches(processor, triples, which, 1, 4, seed=1))).loss)


def test_triples_prefer_what_is_in_the_scene(triples):
    captions = [t for t in triples if t.chosen not in ("Yes", "No")]
    assert len(captions) == 2 and all(t.question.startswith("Is there") for t in triples if t not in captions)
    assert all({t.chosen, t.rejected} == {"Yes", "No"} for t in triples if t not in captions)
    assert all(t.chosen != t.rejected for t in captions)
    assert [t.question for t in scene_triples(6, seed=3)] == [t.question for t in triples]


def test_labels_cover_the_answer_alone(tiny_llava, triples):
    _, processor = tiny_llava
    rows = next(batches(processor, triples, "rejected", 1, 4, seed=0))
    for ids, labels, mask in zip(rows["input_ids"], rows["labels"], rows["attention_mask"]):
        answer = labels != -100
        assert torch.equal(labels[answer], ids[answer]) and mask[answer].all()
        said = processor.tokenizer.decode(labels[answer], skip_special_tokens=True).strip()
        assert said in {triple.rejected for triple in triples}


def test_projectors_learn_their_own_answers(tiny_llava, triples, short):
    model, processor = tiny_llava
    projector = family_of(model).projector()
    before = copy.deepcopy(projector.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    states = train_projectors(model, processor, short, steps=4, batch=2, rate=3e-3)
    assert all(torch.equal(before[key], value) for key, value in projector.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    plain = loss(model, processor, short, "rejected")
    projector.load_state_dict(states["negative"])
    try:
        assert loss(model, processor, short, "rejected") < plain
    finally:
        projector.load_state_dict(before)
    attach(model, DCD(negative=states["negative"], positive=states["positive"]), processor=processor)
    try:
        inputs = {key: value for key, value in rows(processor, triples).items()}
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 2
    finally:
        detach(model)


def rows(processor, triples):
    content = [{"type": "image"}, {"type": "text", "text": "Is there a dog in the image?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[t.image for t in triples[:2]], text=[text] * 2, padding=True, return_tensors="pt")


def test_an_amateur_is_saved_loaded_and_contrasted(tiny_llava, triples, short, tmp_path):
    needs_adapters()
    model, processor = copy.deepcopy(tiny_llava[0]), tiny_llava[1]
    plain = loss(model, processor, short, "rejected")
    losses = train_amateur(model, processor, short, steps=4, batch=2, rate=3e-3)
    assert len(losses) == 4 and loss(model, processor, short, "rejected") < plain
    model.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2_000_000, "the adapter alone"
    other = copy.deepcopy(tiny_llava[0])
    other.load_adapter(str(tmp_path), adapter_name="amateur")
    other.disable_adapters()
    assert loss(other, processor, short, "rejected") == pytest.approx(plain, rel=1e-5)
    kept = Kept()
    attach(other, LOL(adapter="amateur"), processor=processor, recorder=kept)
    other.generate(**rows(processor, triples), max_new_tokens=1, do_sample=False)
    seen = kept.run.lanes.last_step.logits
    detach(other)
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    assert loss(other, processor, short, "rejected") == pytest.approx(plain, rel=1e-5)


def test_half_precision_is_refused(tiny_llava, triples):
    model = copy.deepcopy(tiny_llava[0]).half()
    with pytest.raises(UnsupportedError, match="float32"):
        train_projectors(model, tiny_llava[1], triples, steps=1)
