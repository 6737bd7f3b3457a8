"""VDGD: what grounds a token, which tokens are re-ranked, and the whole pass against a literal one."""

import copy

import pytest
import torch
from helpers import TextProcessor
from transformers import TextStreamer

from lvlm_decode.attachment import attach, detach, last_run
from lvlm_decode.controllers.vdgd import VDGD, Grounding, candidates_of
from lvlm_decode.errors import InputError, ParameterError, UnsupportedError
from lvlm_decode.testing.models import BUILDERS, EOS, tiny

QUICK = dict(describe="say {question}", prompt="see {description} {question}", description_tokens=10)


def generate(family, method, inputs, model=None, **how):
    built = tiny(family)
    model = copy.deepcopy(built.model) if model is None else model
    attach(model, method, processor=TextProcessor(built))
    try:
        return model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False, **how}), last_run(model)
    finally:
        detach(model)


def new_tokens(out, inputs):
    return [
        [token for token in row if token not in (0, EOS)] for row in out[:, inputs["input_ids"].shape[1] :].tolist()
    ]


def literal(question, method, seed=0, steps=12):
    """Everything again for every token, no cache; one LLaVA sample."""
    built = tiny("llava")
    model, tokenizer, whole = built.model, built.tokenizer, built.inputs([question], seed=seed)
    # The builder of tiny prompts says the first letter twice.
    question = question[0] + question

    def logits(text, answer):
        head = whole["input_ids"][:, : int((whole["input_ids"][0] == model.config.image_token_id).nonzero()[-1]) + 1]
        words = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([head, words, torch.tensor([answer], dtype=torch.long)], 1)
        embeds = model.get_input_embeddings()(ids)
        features = model.get_image_features(whole["pixel_values"], return_dict=True).pooler_output
        image = (ids == model.config.image_token_id) & (torch.arange(ids.shape[1]) < head.shape[1])
        embeds[image] = torch.cat(list(features))
        return model(inputs_embeds=embeds).logits[0, -1].float().log_softmax(-1)

    with torch.no_grad():
        said, steps_of_description = [], []
        while len(said) < method.description_tokens:
            step = logits(method.describe.format(question=question), said)
            steps_of_description.append(step)
            best = step.clone()
            best[model.config.image_token_id] = float("-inf")
            token = int(best.argmax())
            if token == EOS:
                break
            said.append(token)
        description = tokenizer.decode(said, skip_special_tokens=True).strip()
        table = torch.stack(steps_of_description)
        grounds = table.amax(0) if method.reduction == "min" else table.mean(0)
        answer = []
        while len(answer) < steps:
            step = logits(method.prompt.format(description=description, question=question), answer)
            allowed = [w for w in range(len(step)) if step[w].exp() >= method.beta * step.exp().max()]
            score = {w: float(grounds[w]) + (float(step[w]) if method.mode == "add" else 0) for w in allowed}
            token = max(score, key=score.get)
            if token == EOS:
                break
            answer.append(token)
    return answer, description


@pytest.mark.parametrize("how", [{}, dict(reduction="avg"), dict(mode="add"), dict(beta=0.5)])
def test_equals_the_literal_pass(how):
    method = VDGD(**QUICK, **how)
    expected, description = literal("what is it", method)
    inputs = tiny("llava").inputs(["what is it"])
    out, run = generate("llava", method, inputs)
    assert run.trace.descriptions == [description]
    assert new_tokens(out, inputs)[0] == [token for token in expected if token]


def test_a_batch_gives_each_sample_what_it_gets_alone():
    texts = ["is it", "what is that thing"]
    inputs = tiny("llava").inputs(texts)
    out, _ = generate("llava", VDGD(**QUICK), inputs)
    for number, text in enumerate(texts):
        single = tiny("llava").inputs([text], seed=number)
        alone, _ = generate("llava", VDGD(**QUICK), single)
        assert new_tokens(alone, single)[0] == new_tokens(out, inputs)[number]


@pytest.mark.parametrize("family", BUILDERS)
def test_every_family(family):
    inputs = tiny(family).inputs(["is it"])
    if "qformer_input_ids" in inputs:
        # A Q-Former has a vocabulary of its own; the tiny one's tokenizer is the language model's.
        inputs["qformer_input_ids"].clamp_(max=100)
    out, run = generate(family, VDGD(**QUICK), inputs, max_new_tokens=6)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert 1 <= out.shape[1] - inputs["input_ids"].shape[1] <= 6
    assert len(run.trace.descriptions) == 1


@pytest.mark.parametrize("how", [dict(num_beams=3), dict(do_sample=True, temperature=0.7, top_p=0.9)])
def test_beams_and_sampling(how):
    inputs = tiny("llava").inputs(["is it", "what"])
    torch.manual_seed(0)
    out, _ = generate("llava", VDGD(**QUICK), inputs, **how)
    torch.manual_seed(0)
    again, _ = generate("llava", VDGD(**QUICK), inputs, **how)
    assert torch.equal(out, again)
    seeded, _ = generate("llava", VDGD(**QUICK), inputs, seed=4, **{**how, "num_beams": 1})
    assert seeded.shape[0] == 2


def test_one_vision_pass_and_one_forward_per_token():
    model = copy.deepcopy(tiny("llava").model)
    passes = []
    model.model.vision_tower.register_forward_hook(lambda *_: passes.append("vision"))
    model.get_decoder().register_forward_hook(lambda *_: passes.append("text"))
    inputs = tiny("llava").inputs(["is it"])
    out, run = generate("llava", VDGD(**QUICK), inputs, model)
    assert passes.count("vision") == 1
    assert passes.count("text") == run.trace.forwards + out.shape[1] - inputs["input_ids"].shape[1]


def test_streaming_output_object_and_limits():
    inputs = tiny("llava").inputs(["is it"])
    width = inputs["input_ids"].shape[1]
    plain, _ = generate("llava", VDGD(**QUICK), inputs)

    class Collect(TextStreamer):
        def __init__(self):
            super().__init__(tiny("llava").tokenizer)
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    streamer = Collect()
    out, _ = generate(
        "llava", VDGD(**QUICK), inputs, streamer=streamer, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(out.sequences, plain) and len(out.scores) == plain.shape[1] - width
    assert streamer.tokens == plain[0].tolist()
    short, _ = generate("llava", VDGD(**QUICK), inputs, max_new_tokens=2, min_new_tokens=2)
    assert short.shape[1] == width + 2
    once, _ = generate("llava", VDGD(**QUICK), inputs, no_repeat_ngram_size=1)
    answer = once[0, width:].tolist()
    # The caller's prompt must not repeat either; the description, which is no part of it, may.
    assert len(set(answer)) == len(answer) and not set(answer) & set(inputs["input_ids"][0].tolist())


def test_candidates():
    p = torch.tensor([[0.5, 0.3, 0.12, 0.05, 0.03]])
    kept = {
        "mask": dict(beta=0.2),
        "knee": {},
        "nucleus": dict(top_p=0.6, temperature=1.0),
    }
    keep = {name: candidates_of(VDGD(candidates=name, **how), p.log())[0].tolist() for name, how in kept.items()}
    assert keep["mask"] == [True, True, True, False, False]
    # The steepest drop is from the first to the second.
    assert keep["knee"] == [True, False, False, False, False]
    assert keep["nucleus"] == [True, True, False, False, False]
    flipped = candidates_of(VDGD(candidates="nucleus", top_p=0.6, temperature=1.0), p.flip(-1).log())
    assert flipped[0].tolist() == keep["nucleus"][::-1]
    sharp = candidates_of(VDGD(candidates="nucleus", top_p=0.6), p.log())
    assert sharp[0].tolist() == [True, False, False, False, False]


def test_grounding_decides_among_candidates_alone():
    p = torch.tensor([[0.4, 0.35, 0.25, 1e-4]]).log()
    grounds = torch.tensor([[-5.0, -1.0, -2.0, 0.0]])
    scores = Grounding(VDGD(beta=0.5), grounds)(torch.zeros(1, 1), p)
    assert int(scores.argmax()) == 1 and scores.softmax(-1)[0, 3] == 0
    assert scores.exp().sum() == pytest.approx(1.0)
    assert torch.allclose((scores[0, 1] - scores[0, 2]).exp(), torch.tensor(1.0).exp())
    rows = Grounding(VDGD(beta=0.5), grounds)(torch.zeros(3, 1), p.repeat(3, 1))
    assert torch.allclose(rows, scores.repeat(3, 1))
    added = Grounding(VDGD(beta=0.5, mode="add", kappa=0.0), grounds)(torch.zeros(1, 1), p)
    assert int(added.argmax()) == 0


def test_where_all_candidates_are_banned_the_likeliest_other_token_is_said():
    p = torch.tensor([[0.6, 0.05, 0.2, 0.15]]).log()
    scores = Grounding(VDGD(beta=1.0), torch.tensor([[-1.0, -9.0, -3.0, -0.1]]))(torch.zeros(1, 1), p)
    assert scores.argsort(-1, descending=True).tolist() == [[0, 2, 3, 1]]
    assert ((scores / 10).softmax(-1) > 0).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("how", [{}, dict(do_sample=True, top_k=0), dict(num_beams=2)])
def test_processors_may_ban_every_candidate(how):
    """beta = 1 leaves one candidate, and it is the end token here, which may not come yet."""
    inputs = tiny("llava").inputs(["is it"])
    width, method = inputs["input_ids"].shape[1], VDGD(**QUICK, beta=1.0)
    plain, _ = generate("llava", method, inputs, max_new_tokens=6)
    model = copy.deepcopy(tiny("llava").model)
    model.generation_config.eos_token_id = int(plain[0, width + 2])
    out, _ = generate("llava", method, inputs, model, max_new_tokens=6, min_new_tokens=6, **how)
    answer = out[0, width:].tolist()
    assert len(answer) == 6 and not set(answer) & {model.generation_config.eos_token_id, 0}
    once, _ = generate("llava", method, inputs, no_repeat_ngram_size=1, **how)
    answer = [token for token in once[0, width:].tolist() if token != EOS]
    assert len(set(answer)) == len(answer) and 0 not in answer


@pytest.mark.parametrize("beams", [1, 3])
def test_allowed_tokens_are_those_of_the_sample(beams):
    inputs, allowed = tiny("llava").inputs(["is it", "what"]), ([20, 21, 22, 23], [30, 31, 32, 33])
    how = dict(num_beams=beams, prefix_allowed_tokens_fn=lambda sample, _: allowed[sample])
    out, _ = generate("llava", VDGD(**QUICK), inputs, max_new_tokens=4, **how)
    for row, own in zip(out[:, inputs["input_ids"].shape[1] :].tolist(), allowed):
        assert set(row) <= set(own)


def test_what_it_cannot_do_is_said():
    inputs, model, forwards = tiny("llava").inputs(["is it"]), copy.deepcopy(tiny("llava").model), []
    model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(UnsupportedError, match="static cache"):
        generate("llava", VDGD(**QUICK), inputs, model, cache_implementation="static")
    with pytest.raises(UnsupportedError, match="drafter"):
        generate("llava", VDGD(**QUICK), inputs, model, prompt_lookup_num_tokens=3)
    with pytest.raises(InputError, match="has no image"):
        generate("llava", VDGD(**QUICK), tiny("llava").inputs(["is it"], 0), model)
    assert not forwards
    with pytest.raises(UnsupportedError, match="added"):
        VDGD() + VDGD()
    texts = dict(prompt="{question}"), dict(prompt="{description}")
    for how in (dict(beta=0), dict(mode="mix"), dict(candidates="all"), *texts):
        with pytest.raises(ParameterError):
            VDGD(**how)
