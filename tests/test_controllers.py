"""The controllers through every entry: attach, custom_generate, the command line and the evaluation runner."""

import copy
import json

import pytest
import torch
from helpers import MARKS, TextProcessor, full_but
from transformers import DynamicCache, StaticCache
from typer.testing import CliRunner

import lvlm_decode
from lvlm_decode.cli import app
from lvlm_decode.controllers.base import Controller
from lvlm_decode.controllers.opera import OPERA
from lvlm_decode.engine import hf
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.methods import METHODS
from lvlm_decode.methods import load as method_class
from lvlm_decode.testing.models import tiny
from lvlm_decode_evals import evaluator
from lvlm_decode_evals.answers import resume_answers
from lvlm_decode_evals.loaders import scene_source
from lvlm_decode_evals.plan import GREEDY
from lvlm_decode_evals.runner import EvaluationRun, Options, load

NAMES = [name for name in METHODS if issubclass(method_class(name), Controller)]
#: Short captions and descriptions, so that random models finish.
QUICK = {
    "opera": dict(num_beams=3, num_attn_candidates=3, threshold=2, image_bonus_tokens=3, min_rollback_index=1),
    "cntp": dict(punctuation=MARKS, max_segment=4, max_trials=3),
    "vdgd": dict(description_tokens=8),
    "mvp": dict(caption_tokens=5, path_tokens=4, answers=("a", "b")),
}


def test_the_four_are_registered():
    assert NAMES == ["opera", "cntp", "vdgd", "mvp"]


@pytest.mark.parametrize("name", NAMES)
def test_attached_or_for_one_call_the_answer_is_the_same(name, monkeypatch):
    built = tiny("llava")
    # A method for one call has no place for a processor; it is loaded from where the model came from.
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda path, **_: TextProcessor(built))
    model = copy.deepcopy(built.model)
    method = method_class(name)(**QUICK[name])
    inputs, how = built.inputs(["is it", "what then"]), dict(max_new_tokens=12, do_sample=False)
    torch.manual_seed(0)
    lvlm_decode.attach(model, method)
    attached = model.generate(**inputs, **how)
    lvlm_decode.detach(model)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, **how, custom_generate=method), attached)
    assert not torch.equal(attached, model.generate(**inputs, **how))


@pytest.mark.parametrize("name", NAMES)
def test_another_cache_is_refused(name):
    built = tiny("llava")
    model = copy.deepcopy(built.model)
    lvlm_decode.attach(model, method_class(name)(**QUICK[name]), processor=TextProcessor(built))

    class Quantised(DynamicCache):
        pass

    config = model.config.get_text_config()
    for cache in (StaticCache(config=config, max_cache_len=200), Quantised(config=config)):
        with pytest.raises(UnsupportedError, match="cache"):
            model.generate(**built.inputs(["is it"]), max_new_tokens=4, do_sample=False, **hf.with_cache(cache))
    filled = DynamicCache()
    filled.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(UnsupportedError, match=r"holds \d+ tokens already"):
        model.generate(**built.inputs(["is it"]), max_new_tokens=4, do_sample=False, **hf.with_cache(filled))


@pytest.mark.parametrize("name", NAMES)
def test_none_of_them_is_a_processor(name):
    built = tiny("llava")
    with pytest.raises(UnsupportedError, match=rf"{name} cannot run with the LogitsProcessor form: .*attach\(model"):
        method_class(name)(**QUICK[name]).processor(built.model, built.inputs(["is it"]))


@pytest.fixture(scope="module")
def loaded():
    try:
        return load("tiny")
    except lvlm_decode.errors.LvlmDecodeError as error:
        pytest.skip(f"the trained small model is not there: {error}")


@pytest.mark.parametrize("name", full_but(NAMES, ["cntp"]))
def test_runner_answers_do_not_depend_on_the_batch(name, loaded, tmp_path):
    scored = evaluator("pope")
    short = "vdgd(description_tokens=12)" if name == "vdgd" else "mvp(caption_tokens=12)" if name == "mvp" else name
    answers = []
    for size in (1, 2):
        out = tmp_path / str(size)
        options = Options(max_new_tokens=10, batch_size=size)
        run = EvaluationRun(
            scored, scene_source(scored).only(["random"]), loaded, out, [(short, GREEDY)], (0,), 2, options
        )
        run.quiet = True
        results = {result.method: result for result in run.execute()}
        rows = resume_answers(results[short].folder / "answers.jsonl")
        answers.append([(row.question_id, row.text) for row in rows])
    assert answers[0] == answers[1] and all(text for _, text in answers[0])


@pytest.mark.parametrize("name", NAMES)
def test_command_line(name, loaded):
    arguments = [
        "generate",
        "scene:1",
        "--method",
        name,
        "--json",
        "--max-new-tokens",
        "12",
        "--prompt",
        "Is there a dog?",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])


def test_length_counts_the_prompt_with_one_token_per_image():
    built = tiny("llava")
    inputs = built.inputs(["is it", "what then"], 2)
    run = lvlm_decode.engine.run.Run(built.model, OPERA(), inputs)
    text = [
        int((row[mask.bool()] != built.model.config.image_token_id).sum())
        for row, mask in zip(*map(inputs.get, ("input_ids", "attention_mask")))
    ]
    assert [OPERA()._prompt_length(run, s.input_ids) for s in run.batch.samples] == [n + 2 for n in text]
    assert OPERA(prompt_length=7)._prompt_length(run, run.batch.samples[0].input_ids) == 7
    blip = tiny("instructblip")
    run = lvlm_decode.engine.run.Run(blip.model, OPERA(), blip.inputs())
    assert OPERA()._prompt_length(run, run.batch.samples[0].input_ids) == 1
