"""What DCD and LOL contrast with: projectors and an amateur fitted to rejected answers, the model left as it was; stopped and
continued trainings; the parts that ship.
"""

import copy
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import Kept
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import lvlm_decode_data
from lvlm_decode import DCD, LOL, attach, attached, detach, parse
from lvlm_decode.cli import app
from lvlm_decode.engine import learned
from lvlm_decode.engine.learned import LowRank
from lvlm_decode.errors import InputError, LvlmDecodeError, ParameterError, UnsupportedError
from lvlm_decode.families import family_of
from lvlm_decode.testing.models import tiny
from lvlm_decode.training import negatives
from lvlm_decode.training.negatives import PARTS, Checkpoint, batches, train_part
from lvlm_decode.training.pairs import digest, file_pairs, scene_triples
from lvlm_decode_data.scenes import render, scene_seed
from lvlm_decode_data.texts import plural


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


def test_questions_of_all_kinds_have_their_right_answer():
    """Each question is one of the pair that its scene gives for a task, and the chosen answer says which of the two."""
    drawn = list(scene_triples(90, seed=3, questions="all"))
    asked = [triple for triple in drawn if triple.chosen in ("Yes", "No")]
    assert len(asked) == 60 and all({t.chosen, t.rejected} == {"Yes", "No"} for t in asked)
    kinds = {
        "existence": r"Is there an? [a-z ]+ in the image\?",
        "count": r"(Is there only one|Are there (two|three)) ",
        "position": r"Is the .* (side|top|bottom) of the image\?",
        "colour": r"(Are the [a-z ]+ \w+\?|Is there an? (red|green|blue|yellow|black|white|brown|orange|grey|pink|purple) )",
    }
    found = {kind: [t for t in asked if re.match(pattern, t.question)] for kind, pattern in kinds.items()}
    assert all({t.chosen for t in own} == {"Yes", "No"} for own in found.values()), found
    index = random.Random(3).sample(range(20_000), 30)
    scenes = [render(scene_seed("train", number))[1] for number in index]
    for number, triple in enumerate(drawn):
        counted = re.match(r"Are there (two|three) ([a-z ]+) in the image", triple.question)
        if counted:
            names = {plural(name): count for name, count in scenes[number % 30].counts.items()}
            right = names[counted[2]] == {"two": 2, "three": 3}[counted[1]]
            assert triple.chosen == ("Yes" if right else "No")


def test_labels_cover_the_answer_alone(tiny_llava, triples):
    _, processor = tiny_llava
    rows = next(batches(processor, triples, "rejected", 1, 4, seed=0))
    for ids, labels, mask in zip(rows["input_ids"], rows["labels"], rows["attention_mask"]):
        answer = labels != -100
        assert torch.equal(labels[answer], ids[answer]) and mask[answer].all()
        said = processor.tokenizer.decode(labels[answer], skip_special_tokens=True).strip()
        assert said in {triple.rejected for triple in triples}


def test_triples_are_the_same_in_every_process(triples):
    code = "from lvlm_decode.training.pairs import digest, scene_triples; print(digest(list(scene_triples(6, seed=3))))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(triples)


def test_triples_with_other_pictures_are_others(triples, tmp_path):
    changed = list(triples)
    other = changed[1].picture.copy()
    other.putpixel((0, 0), tuple(255 - value for value in other.getpixel((0, 0))))
    changed[1] = dataclasses.replace(changed[1], image=other)
    assert digest(changed) != digest(triples)
    for name, picture in (("a.png", triples[0].picture), ("b.png", other)):
        picture.save(tmp_path / name)
    lying = [dataclasses.replace(triples[0], image=tmp_path / "a.png")]
    before = digest(lying)
    shutil.copy(tmp_path / "b.png", tmp_path / "a.png")
    assert digest(lying) != before


def states_of(model, processor, triples, **settings):
    return {part: train_part(model, processor, triples, part, **settings) for part in ("positive", "negative")}


def test_projectors_learn_their_own_answers(tiny_llava, triples, short):
    model, processor = tiny_llava
    projector = family_of(model).projector()
    before = copy.deepcopy(projector.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    states = states_of(model, processor, short, steps=4, batch=2, rate=3e-3)
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
    return processor(images=[t.picture for t in triples[:2]], text=[text] * 2, padding=True, return_tensors="pt")


def seen_by(model, method, processor, triples):
    """(V, B, N) logits of the first step."""
    kept = Kept()
    with attached(model, method, processor=processor, recorder=kept):
        model.generate(**rows(processor, triples), max_new_tokens=1, do_sample=False)
        return kept.run.lanes.last_step.logits[:, :, -1]


def test_an_amateur_is_trained_and_contrasted(tiny_llava, triples, short):
    model, processor = tiny_llava
    plain = loss(model, processor, short, "rejected")
    weights = train_part(model, processor, short, "amateur", steps=4, batch=2, rate=3e-3)
    assert loss(model, processor, short, "rejected") == plain, "the model was left as it was"
    with LowRank(weights, "lol")(model):
        assert loss(model, processor, short, "rejected") < plain
    seen = seen_by(model, LOL(amateur=weights, refocus=0.0), processor, triples)
    with torch.no_grad():
        base = model(**rows(processor, triples)).logits[:, -1]
    torch.testing.assert_close(seen[0], base, atol=1e-4, rtol=1e-4)
    merged = copy.deepcopy(model)
    layers = dict(merged.get_decoder().named_modules())
    with torch.no_grad():
        for path in {key.rpartition(".")[0] for key in weights}:
            layers[path].weight += weights[f"{path}.up"] @ weights[f"{path}.down"]
        amateur = merged(**rows(processor, triples)).logits[:, -1]
    torch.testing.assert_close(seen[1], amateur, atol=1e-4, rtol=1e-4)
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_half_precision_is_refused(tiny_llava, triples):
    model = copy.deepcopy(tiny_llava[0]).half()
    with pytest.raises(UnsupportedError, match="float32"):
        train_part(model, tiny_llava[1], triples, "positive", steps=1)


def test_weights_of_other_layers_are_refused(tiny_llava, triples):
    with pytest.raises(ParameterError, match=r"lol: the low-rank weights of 'layers\.9\.mlp' do not fit"):
        seen_by(tiny_llava[0], LOL(amateur={"layers.9.mlp.up": torch.ones(2, 2)}), tiny_llava[1], triples)


# Stopped and continued -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from lvlm_decode.training import commands, negatives
own = negatives.Checkpoint.keep
def keep(self, *reached):
    own(self, *reached)
    if self.path.name == sys.argv[1] and len(reached[2]) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
negatives.Checkpoint.keep = keep
negatives.Checkpoint.__init__.__defaults__ = (2,)
commands.app(sys.argv[2:])
"""


@pytest.mark.full
@pytest.mark.parametrize("part", ["negative", "amateur"])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, part):
    """Killed with SIGKILL between two steps; the same command then goes on."""
    options = ["negatives", "--steps", "6", "--batch", "2", "--triples", "6"]
    for name in ("whole", "killed"):
        where = [*options, "--output", str(tmp_path / name)]
        killed = f"{part}.checkpoint" if name == "killed" else "none"
        command = [sys.executable, "-c", KILLED]
        done = subprocess.run([*command, killed, *where], capture_output=True, text=True, check=False)
        if name == "killed":
            assert done.returncode == -signal.SIGKILL and (tmp_path / name / f"{part}.checkpoint").is_file()
            assert not (tmp_path / name / f"{part}.safetensors").exists()
            done = subprocess.run([*command, "none", *where], capture_output=True, text=True, check=False)
            assert f"{tmp_path / name}/positive.safetensors is there already" in done.stdout
        assert done.returncode == 0, done.stderr[-2000:]
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
            "amateur.safetensors",
            "log.jsonl",
            "negative.safetensors",
            "positive.safetensors",
        ]
    for name in PARTS:
        one, two = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "killed"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("part", ["positive", "amateur"])
def test_a_stopped_training_goes_on_to_the_same_weights(tiny_llava, short, tmp_path, monkeypatch, part):
    settings = {"steps": 4, "batch": 2, "rate": 3e-3, "seed": 1}
    whole = train_part(*tiny_llava, short, part, **settings)
    keeping = Checkpoint(tmp_path / "checkpoint", {"steps": 4}, every=2)

    def stopping(*given):
        for number, batch in enumerate(batches(*given)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(negatives, "batches", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_part(*tiny_llava, short, part, **settings, checkpoint=keeping)
    torch.manual_seed(99)
    asked = []

    def counted(*given):
        for batch in batches(*given):
            asked.append(1)
            yield batch

    monkeypatch.setattr(negatives, "batches", counted)
    gone_on = train_part(*tiny_llava, short, part, **settings, checkpoint=keeping)
    assert len(asked) == 2, "it went on from the second step"
    assert whole.keys() == gone_on.keys() and all(torch.equal(whole[key], gone_on[key]) for key in whole)


def test_the_checkpoint_of_another_training_is_refused(tiny_llava, short, tmp_path):
    settings = {"steps": 1, "batch": 1}
    keeping = Checkpoint(tmp_path / "checkpoint", {"seed": 0, "steps": 1}, every=1)
    train_part(*tiny_llava, short, "positive", **settings, checkpoint=keeping)
    other = Checkpoint(keeping.path, {"seed": 0, "steps": 2})
    with pytest.raises(InputError, match=r"steps was 1, is 2\); give another --output"):
        train_part(*tiny_llava, short, "positive", **settings, checkpoint=other)
    keeping.path.write_bytes(b"half a file")
    with pytest.raises(InputError, match="cannot be read"):
        train_part(*tiny_llava, short, "positive", **settings, checkpoint=keeping)


# Files of pairs --------------------------------------------------------------------------------------------------------

GOOD = {"image": "a.png", "question": "Is there a dog?", "truthful": "No", "hallucinated": "Yes"}


@pytest.mark.parametrize(
    "line,words",
    [
        ({**GOOD, "truthful": 3}, r"pairs\.jsonl, line 2: field 'truthful'"),
        (
            {key: GOOD[key] for key in GOOD if key != "hallucinated"},
            r"pairs\.jsonl, line 2: field 'hallucinated' is missing",
        ),
        ({**GOOD, "question": ""}, r"pairs\.jsonl, line 2: field 'question'"),
        ({**GOOD, "image": "b.png"}, r"pairs\.jsonl, line 2: field 'image': b\.png cannot be read"),
        ({**GOOD, "image": "cut.png"}, r"pairs\.jsonl, line 2: field 'image': cut\.png cannot be read"),
        ({**GOOD, "hallucinated": "No"}, r"pairs\.jsonl, line 2: 'truthful' and 'hallucinated' are the same"),
        ([GOOD], r"pairs\.jsonl, line 2: expected a JSON object"),
    ],
)
def test_bad_pairs_are_named_with_line_and_field(tmp_path, line, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(line)}\n")
    with pytest.raises(LvlmDecodeError, match=words) as raised:
        file_pairs(path)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_pairs_of_a_file_are_read_when_they_are_needed(tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n" * 2)
    first, _ = file_pairs(path)
    assert (first.question, first.chosen, first.rejected) == ("Is there a dog?", "No", "Yes")
    assert first.image == tmp_path / "a.png" and first.picture.size == (8, 6)
    path.write_text(f"{json.dumps(GOOD)}\n")
    with pytest.raises(InputError, match="has 1 pairs"):
        file_pairs(path)


def test_the_command_names_a_bad_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("{}\n")
    done = CliRunner().invoke(app, ["train", "negatives", "--pairs", str(path), "--output", str(tmp_path / "out")])
    assert done.exit_code == 1 and "pairs.jsonl, line 1: field 'image' is missing" in done.stderr


# What ships ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dcd", "lol"])
def test_learned_methods_run_out_of_the_box(tiny_llava, triples, name):
    model, processor = tiny_llava
    folder = lvlm_decode_data.HERE / "learned" / "tiny-llava"
    by_path = {
        "dcd": {part: str(folder / f"{part}.safetensors") for part in ("negative", "positive")},
        "lol": {"amateur": str(folder / "amateur.safetensors")},
    }
    seen = seen_by(model, parse(name), processor, triples)
    assert torch.equal(seen, seen_by(model, parse(name, **by_path[name]), processor, triples))
    assert (seen[0] - seen[1]).abs().max() > 1e-2


def test_at_strength_0_dcd_is_its_positive_projector_alone(tiny_llava, triples):
    """What DCD must beat: the model with a projector that was trained further."""
    model, processor = tiny_llava
    other = copy.deepcopy(model)
    state = load_file(lvlm_decode_data.HERE / "learned" / "tiny-llava" / "positive.safetensors")
    family_of(other).projector().load_state_dict(state)
    (seen,) = seen_by(model, DCD(alpha=0), processor, triples)
    with torch.no_grad():
        trained, own = (one(**rows(processor, triples)).logits[:, -1] for one in (other, model))
    torch.testing.assert_close(seen, trained, atol=1e-4, rtol=1e-4)
    assert (seen - own).abs().max() > 1e-2
    negative = str(lvlm_decode_data.HERE / "learned" / "tiny-llava" / "negative.safetensors")
    (seen,) = seen_by(model, DCD(negative=negative, alpha=0), processor, triples)
    torch.testing.assert_close(seen, own, atol=1e-4, rtol=1e-4)


def test_the_shipped_files_are_small_and_say_how_they_were_made():
    files = sorted((lvlm_decode_data.HERE / "learned" / "tiny-llava").glob("*.safetensors"))
    assert [path.stem for path in files] == sorted(PARTS)
    assert sum(path.stat().st_size for path in files) < 500_000
    for path in files:
        said = learned.about(path)
        assert said["kind"] == path.stem and said["model"] == "tiny-llava" and said["steps"] > 0


def test_models_without_shipped_parts_say_how_to_make_them(tmp_path):
    zoo = tiny("llava")
    with pytest.raises(
        UnsupportedError, match=r"dcd needs projectors .* lvlm-decode train negatives, and give negative="
    ):
        attach(zoo.model, DCD())
    weights = {"linear_1.weight": torch.zeros(1)}
    learned.save(
        tmp_path / "other.safetensors", "negative", weights, with_another_head(zoo.model), {"model": "another"}
    )
    with pytest.raises(ParameterError, match=r"made for another model \(another\)"):
        seen_by_tiny(zoo, DCD(negative=str(tmp_path / "other.safetensors")))
    learned.save(tmp_path / "amateur.safetensors", "amateur", weights, zoo.model, {})
    with pytest.raises(ParameterError, match="holds the part 'amateur'; give the one named 'negative'"):
        seen_by_tiny(zoo, DCD(negative=str(tmp_path / "amateur.safetensors")))


def seen_by_tiny(zoo, method):
    with attached(zoo.model, method, processor=zoo.processor):
        zoo.model.generate(**zoo.inputs(["is it a dog?"]), max_new_tokens=1)


def with_another_head(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_output_embeddings().weight.add_(1.0)
    return other
