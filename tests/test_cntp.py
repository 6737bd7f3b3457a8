"""CNTP: how many trials, which one is kept, and one sample written literally, trial by trial."""

import copy

import pytest
import torch
from helpers import FEW, MARKS, TextProcessor, full_but
from transformers import StoppingCriteria

from lvlm_decode.attachment import attach, detach, last_run
from lvlm_decode.controllers.cntp import CNTP, EndsTrial
from lvlm_decode.engine import sampling
from lvlm_decode.errors import ParameterError, UnsupportedError
from lvlm_decode.testing.models import BUILDERS, EOS, tiny


def generate(method, inputs, family="llava", model=None, **how):
    built = tiny(family)
    model = copy.deepcopy(built.model) if model is None else model
    attach(model, method, processor=TextProcessor(built))
    try:
        return model.generate(**inputs, **{"max_new_tokens": 24, "do_sample": False, "seed": 5, **how}), last_run(model)
    finally:
        detach(model)


@pytest.mark.parametrize(
    ("form", "entropy", "expected"),
    [
        ("code", 0.0, 1),
        ("code", 0.01, 1),
        ("code", 0.8, 5),
        ("code", 1.5, 10),
        ("code", 9.0, 10),
        ("paper", 0.0, 1),
        ("paper", 0.16, 1),
        ("paper", 0.8, 5),
        ("paper", 1.45, 9),
        ("paper", 1.5, 10),
    ],
)
def test_number_of_trials(form, entropy, expected):
    assert CNTP(form=form).trials(entropy) == expected


def test_marks_are_found_in_decoded_text():
    class Tokenizer:
        def decode(self, ids, **_):
            return {0: "dog", 1: " dog.", 2: "\n\n", 3: "a,b", 4: "▁"}[ids[0]]

    ends = EndsTrial(Tokenizer(), CNTP().punctuation)
    assert [ends(token) for token in range(5)] == [False, True, True, True, False]


def literal(inputs, row, row_id, method, seed, steps, do_sample=False, temperature=1.0):
    """One LLaVA sample, every trial after the other, the whole sequence again for every token."""
    built = tiny("llava")
    model = built.model
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    with torch.no_grad():
        prompt = model.get_input_embeddings()(ids)
        features = model.get_image_features(inputs["pixel_values"][row : row + 1], return_dict=True).pooler_output
        prompt[ids == model.config.image_token_id] = features[0]

        def said(text):
            embeds = model.get_input_embeddings()(torch.tensor(text, dtype=torch.long))
            logits = model(inputs_embeds=torch.cat([prompt, embeds])[None]).logits[0, -1].float()
            return (logits / temperature).log_softmax(-1)

        def draw(scores, trial, position):
            noise = sampling.gumbel(seed, (row_id, "cntp", len(answer), trial), position, len(scores))
            return int((scores + noise).argmax())

        answer, counts = [], []
        while len(answer) < steps and EOS not in answer:
            scores = said(answer)
            entropy = float(-(scores.exp() * scores).sum())
            n = method.trials(entropy)
            if n == 1:
                answer.append(draw(scores, 0, len(answer)) if do_sample else int(scores.argmax()))
                continue
            counts.append(n)
            segments = []
            for trial in range(n):
                segment, loss = [], 0.0
                while True:
                    scores = said(answer + segment)
                    token = draw(scores, trial, len(answer) + len(segment))
                    loss -= float(scores[token])
                    segment.append(token)
                    text = built.tokenizer.decode([token], skip_special_tokens=True)
                    if (
                        any(mark in text for mark in method.punctuation)
                        or token == EOS
                        or len(segment) == method.max_segment
                        or len(answer) + len(segment) == steps
                    ):
                        break
                segments.append((loss / len(segment), trial, segment))
            answer += min(segments)[2]
        return answer, counts


@pytest.mark.parametrize("how", [{}, dict(do_sample=True, temperature=0.7)])
def test_a_batch_equals_the_literal_samples(how):
    method = CNTP(punctuation=MARKS, max_trials=4, min_entropy=1.0, max_entropy=4.5, max_segment=6)
    inputs = tiny("llava").inputs(["is it", "what is this", "where"])
    out, run = generate(method, inputs, sample_ids=["a", "b", "c"], top_k=0, **how)
    width = inputs["input_ids"].shape[1]
    for row, name in enumerate("abc"):
        expected, counts = literal(inputs, row, name, method, 5, 24, **how)
        assert out[row, width : width + len(expected)].tolist() == expected
        assert run.trace.trials[row] == counts
    assert all(counts and min(counts) > 1 for counts in run.trace.trials)


def test_certain_models_are_decoded_greedily_and_plainly():
    inputs = tiny("llava").inputs(["is it", "what"])
    model = copy.deepcopy(tiny("llava").model)
    expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    out, run = generate(CNTP(min_entropy=90.0, max_entropy=91.0), inputs, model=model)
    assert torch.equal(out, expected)
    assert run.trace.trials == [[], []] and run.trace.forwards == expected.shape[1] - inputs["input_ids"].shape[1]


def test_the_seed_decides_and_torch_does_without_one():
    inputs = tiny("llava").inputs(["is it"])
    method = CNTP(punctuation=MARKS, max_segment=6)
    outs = [generate(method, inputs, seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    free = []
    for seed in (3, 3):
        torch.manual_seed(seed)
        free.append(generate(method, inputs, seed=None)[0])
    assert torch.equal(*free)


def test_no_draw_uses_the_noise_of_another(monkeypatch):
    keys = []

    def gumbel(*key):
        keys.append(key)
        return noise(*key)

    noise = sampling.gumbel
    monkeypatch.setattr(sampling, "gumbel", gumbel)
    _, run = generate(CNTP(punctuation=MARKS, max_segment=6), tiny("llava").inputs(["is it"]))
    # Trials that ran further than the one that was kept drew for positions that the next ones draw for again.
    positions = [position for _, _, position, _ in keys]
    assert len(run.trace.trials[0]) > 2 and len(set(positions)) < len(positions)
    assert len(set(keys)) == len(keys)


def test_trials_share_a_forward():
    inputs = tiny("llava").inputs(["is it"])
    out, run = generate(CNTP(punctuation=MARKS, max_segment=5), inputs)
    tokens = out.shape[1] - inputs["input_ids"].shape[1]
    assert sum(run.trace.trials[0]) > 10
    # Every step of every trial runs with its siblings: at most the longest trial's steps per segment.
    assert run.trace.forwards <= 1 + 5 * len(run.trace.trials[0]) + tokens


@pytest.mark.parametrize("family", full_but(BUILDERS, FEW))
def test_every_family(family):
    inputs = tiny(family).inputs(["is it", "what then"])
    method = CNTP(punctuation=MARKS, max_trials=3, max_segment=4)
    out, _ = generate(method, inputs, family, sample_ids=["a", "b"], max_new_tokens=10)
    single = tiny(family).inputs(["what then"], 1, 1)
    alone, _ = generate(method, single, family, sample_ids=["b"], max_new_tokens=10)
    answer = alone[0, single["input_ids"].shape[1] :].tolist()
    assert out[1, inputs["input_ids"].shape[1] :].tolist()[: len(answer)] == answer


def test_processors_and_criteria_are_honoured():
    inputs = tiny("llava").inputs(["is it"])
    width = inputs["input_ids"].shape[1]
    method = CNTP(punctuation=MARKS, max_segment=6)
    out, _ = generate(method, inputs, no_repeat_ngram_size=1)
    answer = out[0, width:].tolist()
    assert len(set(answer)) == len(answer) and not set(answer) & set(out[0, :width].tolist())

    class AtSeven(StoppingCriteria):
        def __call__(self, input_ids, scores):
            return torch.tensor([len(row) >= width + 7 for row in input_ids.tolist()])

    out, _ = generate(method, inputs, stopping_criteria=[AtSeven()], return_dict_in_generate=True)
    assert out.sequences.shape[1] <= width + 7


def test_what_it_cannot_do_is_said():
    inputs = tiny("llava").inputs(["is it"])
    for how, says in (
        (dict(num_beams=2), "beam search"),
        (dict(cache_implementation="static"), "static cache"),
        (dict(prompt_lookup_num_tokens=3), "drafter"),
        (dict(return_dict_in_generate=True, output_scores=True), "output_scores"),
        (dict(prefix_allowed_tokens_fn=lambda *_: [5]), "cntp.*prefix_allowed_tokens_fn"),
    ):
        model, forwards = copy.deepcopy(tiny("llava").model), []
        model.get_decoder().register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        with pytest.raises(UnsupportedError, match=says):
            generate(CNTP(), inputs, model=model, **how)
        assert not forwards
    for parameters in (dict(max_trials=0), dict(max_entropy=0.0), dict(form="x"), dict(max_segment=0)):
        with pytest.raises(ParameterError):
            CNTP(**parameters)
