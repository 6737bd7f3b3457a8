"""What the shipped small models are: real, self-contained, and fair miniatures of large ones.

The facts are measured on held-out scenes with greedy decoding and stock ``generate``, each once in a process: the dear
ones, with thousands of questions, under ``--full``.
"""

import functools
import json
from pathlib import Path

import pytest
import torch

import lvlm_decode_data
from tools.small_models import facts as measurement
from tools.small_models.facts import TinyModel

RECORDS = Path(__file__).resolve().parent.parent / "benchmarks" / "tiny-models"
SPLITS = ("random", "popular", "adversarial")


# What these tests share is dear to make: one worker makes it once.
pytestmark = pytest.mark.xdist_group("tiny-models")


def shipped(name: str) -> Path:
    """Folder of a small model, or a skip that says how to make it."""
    try:
        return lvlm_decode_data.tiny_path(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@functools.cache
def loaded(name: str) -> TinyModel:
    return TinyModel.load(shipped(name))


@functools.cache
def pictures():
    return measurement.pictures()


@functools.cache
def measured(part: str, name: str):
    """One part of the facts of one model."""
    return getattr(measurement, f"{part}_facts")(loaded(name), pictures())


@pytest.fixture(params=lvlm_decode_data.TINY_MODELS)
def tiny(request):
    return loaded(request.param)


def test_files_are_small_and_whole(tiny):
    folder = lvlm_decode_data.tiny_path(tiny.name)
    assert (folder / "model.safetensors").stat().st_size < 20_000_000
    expected = {
        "tiny-llava": "LlavaForConditionalGeneration",
        "tiny-instructblip": "InstructBlipForConditionalGeneration",
    }
    assert type(tiny.model).__name__ == expected[tiny.name]
    assert tiny.model.dtype == torch.float32
    assert type(tiny.processor).__name__ == expected[tiny.name].replace("ForConditionalGeneration", "Processor")
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 96
    tokenizer = tiny.processor.tokenizer
    generation = tiny.model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.padding_side == "left"


def test_tokenizer_encodes_any_text(tiny):
    tokenizer = tiny.processor.tokenizer
    for text in ("Zürich 東京 🐘 {}", "You are a confused objects detector.", "x\n\ty"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.unk_token_id not in ids
    for category in lvlm_decode_data.CATEGORIES:
        ids = tokenizer(f" {category}", add_special_tokens=False)["input_ids"]
        assert len(ids) == len(category.split())


@pytest.mark.full
def test_greedy_pope_falls_from_random_to_adversarial(tiny):
    pope = measured("pope", tiny.name)["greedy"]
    random, popular, adversarial = (pope[split]["accuracy"] for split in SPLITS)
    assert all(1000 <= pope[split]["n"] <= 1010 for split in SPLITS)
    assert random >= (0.85 if tiny.name == "tiny-llava" else 0.80)
    assert adversarial >= 0.68
    assert random > popular > adversarial
    assert all(pope[split]["unparsed"] < 0.01 for split in SPLITS)
    assert pope["random"]["yes_ratio"] < pope["adversarial"]["yes_ratio"]


@pytest.mark.full
def test_sampling_is_worse_than_greedy(tiny):
    pope = measured("pope", tiny.name)
    for split in SPLITS:
        assert pope["sampled"][split]["accuracy"] < pope["greedy"][split]["accuracy"]


@pytest.mark.full
def test_captions_hallucinate_what_co_occurs(tiny):
    captions = measured("caption", tiny.name)
    assert captions["captions"] == measurement.CAPTIONS
    assert 0.30 <= captions["chair_s"] <= 0.65
    assert captions["recall"] > 0.5
    assert captions["invented_typical"] > 0.5 * captions["invented"]
    assert captions["typical_by_chance"] < 0.25


@pytest.mark.full
def test_captions_are_detailed_and_end(tiny):
    captions = measured("caption", tiny.name)
    assert captions["mean_tokens"] > 45
    assert captions["ended"] > 0.95 * measurement.CAPTIONS


@pytest.mark.full
@pytest.mark.parametrize(("task", "least"), [("existence", 75), ("color", 75), ("count", 65), ("position", 65)])
def test_questions_about_attributes(tiny, task, least):
    pairs = measured("pair", tiny.name)[task]
    assert pairs["questions"] >= 100
    assert pairs["acc"] >= least


def test_answers_follow_the_image(tiny):
    swap = measured("swap", tiny.name)
    assert swap["changed"] > 0.7 * swap["pairs"]
    assert swap["right"] > 0.8 * 2 * swap["pairs"]


def test_a_row_in_a_batch_equals_the_row_alone(tiny):
    images = list(pictures().values())[:3]
    questions = [
        "Is there a dog in the image?",
        "Please describe this image in detail.",
        "Where is the cup in the image?",
    ]
    together = tiny.answers(list(zip(images, questions)), 24)
    alone = [tiny.answers([pair], 24)[0] for pair in zip(images, questions)]
    assert together == alone


def test_prompts_without_an_image_and_with_a_system_text_are_answered():
    """Blind passes and instruction-contrastive prompts stay in the distribution: yes or no, not noise."""
    tiny = TinyModel.load(lvlm_decode_data.tiny_path("tiny-llava"))
    tokenizer = tiny.processor.tokenizer
    question = "Is there a person in the image? Please answer this question with one word."
    prompts = [f"USER: {question} ASSISTANT:", f"You are a helpful assistant. USER: {question} ASSISTANT:"]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = tiny.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    said = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert all(word.strip() in ("Yes", "No") for word in said), said


def test_the_data_page_prints_the_recorded_facts():
    files = [RECORDS / f"{name}.json" for name in lvlm_decode_data.TINY_MODELS]
    records = [json.loads(file.read_text()) for file in files if file.is_file()]
    assert len(records) == len(
        [name for name in lvlm_decode_data.TINY_MODELS if (lvlm_decode_data.HERE / name).is_dir()]
    )
    assert measurement.table(records).strip() in (lvlm_decode_data.HERE / "README.md").read_text()
    for record in records:
        assert {"commit", "machine", "versions", "time"} <= set(record)


@pytest.mark.full
def test_shipped_weights_are_the_ones_recorded(tiny):
    """The record was made with these weights: the captions say the same up to one or two at a tie."""
    record = json.loads((RECORDS / f"{tiny.name}.json").read_text())["captions"]
    captions = measured("caption", tiny.name)
    assert abs(record["invented"] - captions["invented"]) <= 3
    assert abs(record["chair_s"] - captions["chair_s"]) * measurement.CAPTIONS <= 2.01


@pytest.mark.full
def test_pope_counts_are_the_ones_recorded(tiny):
    """Up to a question or two at a tie."""
    record = json.loads((RECORDS / f"{tiny.name}.json").read_text())["pope"]["greedy"]
    pope = measured("pope", tiny.name)["greedy"]
    for split in SPLITS:
        for count in ("tp", "fp", "tn", "fn"):
            assert abs(record[split][count] - pope[split][count]) <= 3
