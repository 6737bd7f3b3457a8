"""MVP: finding the answer in a path, adding certainty up, and the whole against a literal pass; captions are shared."""

import copy
import re

import pytest
import torch
from helpers import TextProcessor
from transformers import StoppingCriteria

from lvlm_decode.attachment import attach, detach, last_run
from lvlm_decode.controllers import mvp
from lvlm_decode.controllers.mvp import MVP, _decide, _Path
from lvlm_decode.engine import sampling
from lvlm_decode.errors import ParameterError, UnsupportedError
from lvlm_decode.testing.models import BUILDERS, EOS, tiny

#: Single letters stand as words often enough in what a random model says.
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
QUICK = dict(
    answers=LETTERS,
    bottom_up="parts",
    top_down="scene",
    regular="image",
    prompt="see {caption} say {question}",
    caption_tokens=6,
    path_tokens=8,
    min_probability=0.0,
)


def generate(method, inputs, family="llava", model=None, keep=False, **how):
    built = tiny(family)
    model = copy.deepcopy(built.model) if model is None else model
    if not keep or "generate" not in vars(model):
        attach(model, method, processor=TextProcessor(built))
    try:
        return model.generate(**inputs, **{"max_new_tokens": 30, "do_sample": False, "seed": 5, **how}), last_run(model)
    finally:
        if not keep:
            detach(model)


class Pieces:
    """Decodes ids by a table of pieces."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize(
    ("pieces", "ended", "answer", "said_at", "said_by"),
    [
        (["Well", ",", " y", "es", "."], False, "yes", 2, 3),
        (["Well", ",", " y", "es"], False, None, 0, 0),
        (["Well", ",", " y", "es"], True, "yes", 2, 3),
        (["No", "t", " a", " dog", "."], True, None, 0, 0),
        (["I", " know", " nothing", ",", " No", "!"], False, "no", 4, 4),
        (["There", " is", " a", " dog"], True, None, 0, 0),
    ],
)
def test_the_answer_is_a_whole_word(pieces, ended, answer, said_at, said_by):
    path = _Path(0, 0, 0, list(range(len(pieces))), 0.5)
    found = path.search(re.compile(r"\b(?:yes|no)\b", re.IGNORECASE), Pieces(*pieces), ended)
    assert (found, path.answer, path.said_at, path.said_by) == (answer is not None, answer, said_at, said_by)


def test_certainty_adds_up_over_views_and_paths():
    def path(view, first, answer, margins, said_at=0, tokens=(1, 2, 3)):
        return _Path(0, view, 0, list(tokens), first, margins, answer, said_at, said_at)

    paths = [
        path(0, 0.5, "yes", [0.2, 0.6], 1),
        path(1, 0.25, "no", [1.0]),
        path(2, 0.9, "no", [0.1, 0.1, 0.8], 2, (7, 8, 9)),
        path(2, 0.05, None, [0.3]),
    ]
    certainty, tokens = _decide(MVP(), paths)
    assert certainty == pytest.approx({"yes": 0.4 * 0.5 * 0.6, "no": 0.4 * 0.25 + 0.2 * 0.9 * 0.8})
    assert tokens == [7, 8, 9]
    nothing = [
        path(2, 0.3, None, [0.1]),
        path(1, 0.2, None, [0.1], tokens=(4,)),
        path(0, 0.1, None, [0.1], tokens=(5,)),
    ]
    assert _decide(MVP(weights=(0.2, 0.5, 0.3)), nothing) == ({"yes": 0.0, "no": 0.0}, [4])


def literal(inputs, question, method, seed, row_id, image_id):
    """Caption after caption, path after path, the whole sequence again for every token; one LLaVA sample."""
    built = tiny("llava")
    model, tokenizer = built.model, built.tokenizer
    ids = inputs["input_ids"][0]
    head = ids[: int((ids == model.config.image_token_id).nonzero()[-1]) + 1]
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]

    def logits(text, answer):
        words = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        whole = torch.cat([head, words, torch.tensor(answer, dtype=torch.long)])
        embeds = model.get_input_embeddings()(whole)
        embeds[: len(head)][head == model.config.image_token_id] = features
        return model(inputs_embeds=embeds[None]).logits[0, -1].float()

    def draw(scores, key, position):
        scores = scores.log_softmax(-1)
        return int((scores + sampling.gumbel(seed, key, position, len(scores))).argmax())

    certainty = dict.fromkeys(method.answers, 0.0)
    captions = []
    for view, prompt in enumerate((method.bottom_up, method.top_down, method.regular)):
        said = []
        while len(said) < method.caption_tokens:
            scores = logits(prompt, said)
            scores[model.config.image_token_id] = float("-inf")
            p = (scores / method.caption_temperature).softmax(-1)
            order = p.argsort(descending=True)
            outside = p[order].cumsum(0) - p[order] >= method.caption_top_p
            scores = (scores / method.caption_temperature).index_fill(0, order[outside], float("-inf"))
            token = draw(scores, (image_id, "mvp caption", view), len(said))
            if token == EOS:
                break
            said.append(token)
        captions.append(tokenizer.decode(said, skip_special_tokens=True).strip())
        text = method.prompt.format(caption=captions[-1], question=question.lower())
        p, tokens = logits(text, []).softmax(-1).topk(method.paths)
        for number, (first, token) in enumerate(zip(p.tolist(), tokens.tolist())):
            said, margins = [token], [float(p[0] - p[1])]
            while (
                said[-1] != EOS
                and len(said) <= method.path_tokens
                and tokenizer.decode([token]).lower() not in method.answers
            ):
                scores = logits(text, said)
                best = scores.softmax(-1).topk(2).values
                margins.append(float(best[0] - best[1]))
                key = (row_id, "mvp path", view, number)
                said.append(draw(scores.log_softmax(-1) / method.path_temperature, key, len(said)))
            spoken = tokenizer.decode(said, skip_special_tokens=True)
            match = re.search(rf"\b({'|'.join(method.answers)})\b", spoken, re.IGNORECASE)
            if match is None:
                continue
            place = next(
                i
                for i in range(len(said))
                if len(tokenizer.decode(said[: i + 1], skip_special_tokens=True)) > match.start()
            )
            direct = len(said) == 1
            certainty[match.group().lower()] += method.weights[view] * first * (1.0 if direct else margins[place])
    return captions, certainty


def test_equals_the_literal_pass(monkeypatch):
    monkeypatch.setattr("lvlm_decode.engine.samples.Sample.image_key", "picture")
    method = MVP(**QUICK, paths=12)
    inputs = tiny("llava").inputs(["what is it"])
    out, run = generate(method, inputs, sample_ids=["s"])
    with torch.no_grad():
        captions, certainty = literal(inputs, "wwhat is it", method, 5, "s", "picture")
    assert run.trace.captions == [captions]
    assert run.trace.certainties[0] == pytest.approx(certainty, abs=1e-5) and max(certainty.values()) > 0
    said = tiny("llava").tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.lower().endswith(max(certainty, key=certainty.get))


def test_a_batch_gives_each_sample_what_it_gets_alone():
    texts, method = ["is it", "what is this"], MVP(**QUICK)
    inputs = tiny("llava").inputs(texts)
    out, run = generate(method, inputs, sample_ids=["a", "b"])
    for row, (text, name) in enumerate(zip(texts, "ab")):
        single = tiny("llava").inputs([text], seed=row)
        alone, own = generate(method, single, sample_ids=[name])
        answer = alone[0, single["input_ids"].shape[1] :].tolist()
        assert out[row, inputs["input_ids"].shape[1] :].tolist()[: len(answer)] == answer
        assert own.trace.captions == run.trace.captions[row : row + 1]
        assert run.trace.certainties[row] == pytest.approx(own.trace.certainties[0], abs=1e-5)


@pytest.fixture()
def drawn(monkeypatch):
    """How many captions were drawn, each time some were."""
    counts = []

    def counting(method, run, asked, *more):
        counts.append(len(asked))
        return draw(method, run, asked, *more)

    draw = mvp._draw_captions
    monkeypatch.setattr(mvp, "_draw_captions", counting)
    return counts


def test_questions_about_one_image_share_its_captions(drawn):
    model = copy.deepcopy(tiny("llava").model)
    method = MVP(**QUICK)
    first = tiny("llava").inputs(["is it", "what"])
    first["pixel_values"][1] = first["pixel_values"][0]
    _, run = generate(method, first, model=model, keep=True)
    assert run.trace.captions[0] == run.trace.captions[1] and drawn == [3]
    again = tiny("llava").inputs(["where"])
    again["pixel_values"][0] = first["pixel_values"][0]
    _, later = generate(method, again, model=model, keep=True)
    assert later.trace.captions[0] == run.trace.captions[0] and drawn == [3]
    assert later.trace.forwards <= 1 + method.path_tokens
    other = tiny("llava").inputs(["where"], seed=9)
    _, fresh = generate(method, other, model=model, keep=True)
    assert fresh.trace.captions[0] != run.trace.captions[0] and fresh.trace.forwards > later.trace.forwards
    detach(model)
    _, after = generate(method, again, model=model)
    assert after.trace.captions == later.trace.captions and after.trace.forwards > later.trace.forwards


def test_captions_are_shared_between_calls_without_a_seed_too(drawn):
    model, inputs = copy.deepcopy(tiny("llava").model), tiny("llava").inputs(["is it"])
    captions = []
    for seed in (None, None, 3, 4, 3):
        _, run = generate(MVP(**QUICK), inputs, model=model, keep=True, seed=seed)
        captions.append(run.trace.captions)
    assert drawn == [3, 3, 3]
    assert captions[0] == captions[1] and captions[2] == captions[4] != captions[3]


@pytest.mark.parametrize("family", BUILDERS)
def test_every_family(family):
    inputs = tiny(family).inputs(["is it"])
    if "qformer_input_ids" in inputs:
        inputs["qformer_input_ids"].clamp_(max=100)
    out, run = generate(MVP(**QUICK), inputs, family)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :width], inputs["input_ids"]) and out.shape[1] > width
    assert len(run.trace.captions[0]) == 3


def test_forms_differ_in_direct_answers_alone():
    inputs = tiny("llava").inputs(["is it"])
    direct = {
        form: generate(MVP(**QUICK, form=form, paths=150), inputs)[1].trace.certainties[0] for form in ("code", "paper")
    }
    assert all(direct["paper"][answer] <= direct["code"][answer] + 1e-6 for answer in LETTERS)
    assert sum(direct["paper"].values()) < sum(direct["code"].values())


def test_limits_criteria_and_output_object():
    inputs = tiny("llava").inputs(["is it"])
    width = inputs["input_ids"].shape[1]
    out, _ = generate(MVP(**QUICK), inputs, max_new_tokens=1, return_dict_in_generate=True)
    assert out.sequences.shape[1] == width + 1

    class Now(StoppingCriteria):
        def __call__(self, input_ids, scores):
            return torch.ones(len(input_ids), dtype=torch.bool)

    _, run = generate(MVP(**QUICK), inputs, stopping_criteria=[Now()])
    _, free = generate(MVP(**QUICK), inputs)
    assert run.trace.forwards < free.trace.forwards


def test_what_it_cannot_do_is_said():
    inputs = tiny("llava").inputs(["is it"])
    for how, says in (
        (dict(do_sample=True), "sampling"),
        (dict(num_beams=2), "beam search"),
        (dict(cache_implementation="static"), "static cache"),
        (dict(prompt_lookup_num_tokens=3), "drafter"),
        (dict(num_return_sequences=2), "num_return_sequences"),
        (dict(return_dict_in_generate=True, output_logits=True), "output_logits"),
        (dict(prefix_allowed_tokens_fn=lambda *_: [5]), "mvp.*prefix_allowed_tokens_fn"),
    ):
        model, forwards = copy.deepcopy(tiny("llava").model), []
        model.get_decoder().register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        with pytest.raises(UnsupportedError, match=says):
            generate(MVP(**QUICK), inputs, model=model, **how)
        assert not forwards
    for parameters in (
        dict(answers=["yes"]),
        dict(weights=(1.0, 2.0)),
        dict(paths=0),
        dict(prompt="{question}"),
        dict(form="x"),
        dict(caption_top_p=0.0),
    ):
        with pytest.raises(ParameterError):
            MVP(**parameters)
