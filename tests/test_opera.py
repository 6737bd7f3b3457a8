"""OPERA: recorded answers of the authors' function, a literal re-statement, batches, families, refusals, cost."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import shared_path
from helpers import FEW, full_but
from opera_restatement import restate
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, MistralConfig, StoppingCriteria, TextStreamer

from lvlm_decode.attachment import attach, detach, last_run
from lvlm_decode.controllers.base import Limits
from lvlm_decode.controllers.opera import OPERA, Model, Recorder, Search, search_all, spans
from lvlm_decode.controllers.rows import Rows, common
from lvlm_decode.engine import attention
from lvlm_decode.engine.attention import routed
from lvlm_decode.engine.batch import Batch
from lvlm_decode.errors import ParameterError, UnsupportedError
from lvlm_decode.families import family_of
from lvlm_decode.testing.models import BUILDERS, EOS, LAYERS, TEXT, react, tiny

# --- recorded answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(10))
def test_equals_the_authors_function(number):
    folder = shared_path("golden/opera")
    case = json.loads((folder / "cases.json").read_text())[number]
    model = LlavaForConditionalGeneration.from_pretrained(folder / case["model"], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = case["eos_token_id"]
    ids = torch.tensor([case["input_ids"]])
    attach(model, OPERA(prompt_length=1, **case["parameters"]))
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=load_file(folder / case["model"] / "inputs.safetensors")["pixel_values"],
        max_new_tokens=case["max_new_tokens"],
        do_sample=False,
    )
    assert out[0, ids.shape[1] :].tolist() == case["new_tokens"]
    assert last_run(model).trace.rollbacks == [case["rollbacks"]]


# --- scripted stubs against the literal re-statement ------------------------------------------------------------------

PROMPT, IMAGE, WIDTH, HEADS = 7, (1, 5), 11, 2


class Script:
    """A pure function of the prefix: random logits and attention, and where the script says so, leaning on one token.

    Args:
        lean: prefix -> the response token every head looks at, or ``None``.
        favour: prefix -> {token: added logit}.
        share: of the attention that the leant-on token gets; times scale_factor it must exceed 1 for products to grow.
    """

    def __init__(self, seed=0, lean=lambda prefix: None, favour=lambda prefix: {}, share=0.06):
        self.seed, self.lean, self.favour, self.share, self._known = seed, lean, favour, share, {}

    def _one(self, prefix):
        if prefix not in self._known:
            generator = torch.Generator().manual_seed(hash((self.seed, prefix)) % 2**31)
            logits = torch.randn(WIDTH, generator=generator)
            for token, bonus in self.favour(prefix).items():
                logits[token] += bonus
            rows = torch.rand(HEADS, PROMPT + len(prefix), generator=generator) + 0.1
            rows[:, PROMPT:] *= 0.01
            column = self.lean(prefix)
            if column is not None and column < len(prefix):
                rows[:, PROMPT + column] = 0
                rows[:, PROMPT + column] = rows.sum(-1) * self.share / (1 - self.share)
            self._known[prefix] = logits, rows / rows.sum(-1, keepdim=True)
        return self._known[prefix]

    def __call__(self, tokens):
        parts = [self._one(tuple(row)) for row in tokens.tolist()]
        return torch.stack([logits for logits, _ in parts]), torch.stack([rows for _, rows in parts])


class Stub:
    """Scripts in place of a language model, one per sample."""

    def __init__(self, scripts, beams):
        self.scripts, self.beams = scripts, beams

    def start(self):
        self.tokens = [torch.empty(self.beams, 0, dtype=torch.long) for _ in self.scripts]
        return self._logits()

    def _logits(self):
        return torch.stack([script(tokens)[0] for script, tokens in zip(self.scripts, self.tokens)])

    @staticmethod
    def _row(script, tokens):
        largest = script(tokens)[1].amax(1)
        return largest / largest.sum(-1, keepdim=True)

    def look(self, tokens):
        image, response = [], []
        for script, before, candidates in zip(self.scripts, self.tokens, tokens):
            rows = torch.stack([self._row(script, torch.cat([before, c[:, None]], 1)) for c in candidates.T], 1)
            image.append(rows[..., IMAGE[0] : IMAGE[1]].sum(-1))
            response.append(rows[..., PROMPT:])
        return torch.stack(image), response

    def rewind(self, prefixes):
        for number, prefix in prefixes.items():
            self.tokens[number] = prefix
        return {number: self.scripts[number](prefix)[0] for number, prefix in prefixes.items()}

    def advance(self, choices):
        self.scripts = [self.scripts[number] for number in choices]
        self.tokens = [
            torch.cat([self.tokens[n][choice.parents], choice.tokens[:, None]], 1) for n, choice in choices.items()
        ]
        appended = {
            place: self._row(self.scripts[place], self.tokens[place])[:, PROMPT:]
            for place, choice in enumerate(choices.values())
            if choice.columns[0] < 0
        }
        return self._logits(), appended


def searched(scripts, parameters, new_tokens=44, eos=None, length_penalty=1.0):
    method = OPERA(prompt_length=1, **parameters)
    limits = Limits(new_tokens, () if eos is None else (eos,), 0)
    searches = [
        Search(method, limits, torch.zeros(PROMPT, dtype=torch.long), 1, length_penalty=length_penalty) for _ in scripts
    ]
    search_all(searches, Stub(scripts, method.num_beams))
    return [search.answer()[0].tolist() for search in searches], [search.rollbacks for search in searches]


def restated(script, parameters, new_tokens=44, eos=None, length_penalty=1.0):
    parameters, log = dict(parameters), []
    paper = parameters.pop("form", "code") == "paper"
    answer = restate(
        script,
        PROMPT,
        IMAGE,
        max_new_tokens=new_tokens,
        eos=eos,
        length_penalty=length_penalty,
        paper=paper,
        log=log,
        **parameters,
    )
    return answer, log


SMALL = dict(num_beams=3, num_attn_candidates=3, threshold=4)


def leaning_until_changed(first):
    """Leans on token 12 as long as the token after it is one of ``first``."""
    return lambda prefix: 12 if len(prefix) > 13 and prefix[13] in first else None


CASES = {
    "no rollback": (Script(1), SMALL, {}, lambda log: not log),
    "one rollback": (
        Script(31, leaning_until_changed({0, 1, 2, 3})),
        SMALL,
        {},
        lambda log: [entry[2] for entry in log] == [13],
    ),
    "all candidates used up": (
        Script(2, lambda prefix: 12 if len(prefix) > 12 else None),
        SMALL,
        {},
        lambda log: [entry[2] for entry in log][:6] == [13, 13, 13, 12, 12, 12],
    ),
    "after a finished answer": (
        Script(
            3,
            lambda prefix: 12 if len(prefix) > 12 else None,
            lambda prefix: {9: 6.0} if len(prefix) == 14 else {9: -9.0},
        ),
        SMALL,
        dict(eos=9, length_penalty=4.0),
        lambda log: len(log) > 1 and log[0][0] > 14,
    ),
    "end token among the first candidates": (
        Script(4, favour=lambda prefix: {9: 8.0 if not prefix else -9.0}),
        SMALL,
        dict(eos=9, length_penalty=2.0),
        lambda log: not log,
    ),
    "one candidate": (
        Script(6, lambda prefix: 12 if len(prefix) > 12 else None),
        dict(num_beams=2, num_attn_candidates=1, threshold=3),
        {},
        lambda log: len(log) == 2,
    ),
    "beyond the window": (
        Script(7, lambda prefix: (len(prefix) - 1) // 8 * 8 if len(prefix) > 12 else None, share=0.1),
        dict(SMALL, window_size=26),
        {},
        lambda log: log and max(entry[2] for entry in log) < 26,
    ),
    "further back than the window holds": (
        Script(8, lambda prefix: 11 if len(prefix) > 11 else None),
        dict(SMALL, window_size=13, threshold=14),
        dict(new_tokens=30),
        lambda log: len(log) == 0,
    ),
    "threshold of zero": (
        Script(9, lambda prefix: len(prefix) - 1 if len(prefix) > 11 else None, share=0.4),
        dict(SMALL, threshold=0),
        dict(new_tokens=30),
        lambda log: any(entry[0] + 1 - entry[2] < 2 for entry in log),
    ),
    "other weight and scale": (
        Script(10, lambda prefix: 12 if len(prefix) > 12 else None, share=0.3),
        dict(SMALL, penalty_weights=0.7, scale_factor=80.0),
        {},
        lambda log: log,
    ),
    "five by five": (
        Script(11, lambda prefix: 11 if len(prefix) > 11 else None),
        dict(num_beams=5, num_attn_candidates=5, threshold=6),
        dict(new_tokens=30),
        lambda log: log,
    ),
    "paper, no rollback": (Script(12), dict(SMALL, form="paper", window_size=16), {}, lambda log: not log),
    "paper, one rollback": (
        Script(13, leaning_until_changed(range(6)), share=0.03),
        dict(SMALL, num_attn_candidates=6, form="paper", window_size=16),
        {},
        lambda log: log,
    ),
    "paper, all candidates used up": (
        Script(14, lambda prefix: 12 if len(prefix) > 12 else None, share=0.03),
        dict(SMALL, form="paper", window_size=10, num_attn_candidates=5),
        {},
        lambda log: len(log) > 2,
    ),
    "paper, the location moves on": (
        Script(15, lambda prefix: (len(prefix) - 1) // 6 * 6, share=0.04),
        dict(SMALL, form="paper", window_size=12),
        {},
        lambda log: len({entry[1] for entry in log}) > 1,
    ),
}


@pytest.mark.parametrize(
    "name", full_but(CASES, ["no rollback", "all candidates used up", "beyond the window", "paper, one rollback"])
)
def test_equals_the_literal_restatement(name):
    script, parameters, how, as_meant = CASES[name]
    expected, log = restated(script, parameters, **how)
    assert as_meant(log), log
    answers, rollbacks = searched([script], parameters, **how)
    assert answers == [expected]
    assert rollbacks == [len(log)]


def test_samples_of_a_batch_go_back_each_on_its_own():
    cases = [CASES[name] for name in ("no rollback", "one rollback", "all candidates used up")]
    alone = [searched([script], SMALL) for script, _, _, _ in cases]
    answers, rollbacks = searched([script for script, _, _, _ in cases], SMALL)
    assert answers == [answer for (answer,), _ in alone]
    assert rollbacks == [count for _, (count,) in alone] and len(set(rollbacks)) == 3


# --- models -----------------------------------------------------------------------------------------------------------

#: Rollbacks from the second token on, for models whose answers are short.
EARLY = dict(image_bonus_tokens=3, min_rollback_index=1)
SEARCH = dict(num_beams=3, num_attn_candidates=3, threshold=2, scale_factor=60.0, **EARLY)


@pytest.fixture()
def llava():
    return copy.deepcopy(tiny("llava").model)


def inputs_of(texts=("is it",), images=1, seed=0):
    return tiny("llava").inputs(texts, images, seed)


def generate(model, method, inputs, **how):
    attach(model, method)
    try:
        how = {"max_new_tokens": 28, "do_sample": False, **how}
        return model.generate(**inputs, **how)
    finally:
        model.run = last_run(model)
        detach(model)


def eager(model, inputs):
    """``forward`` of the re-statement: the whole sequence again, attention of every layer, no cache."""
    model = copy.deepcopy(model)
    embed, ids = model.get_input_embeddings(), inputs["input_ids"]
    vision = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        prompt = embed(ids)
        features = model.get_image_features(**vision, return_dict=True).pooler_output
    prompt[ids == model.config.image_token_id] = torch.cat(list(features))
    # InstructBLIP's loop is that of the language model inside it.
    model = getattr(model, "language_model", model)
    model.set_attn_implementation("eager")
    known = {}

    def one(prefix):
        if prefix not in known:
            longer = torch.cat([prompt, embed(torch.tensor([prefix], dtype=torch.long))], 1)
            out = model(inputs_embeds=longer, output_attentions=True)
            known[prefix] = out.logits[0, -1].float(), out.attentions[-1][0, :, -1]
        return known[prefix]

    @torch.no_grad()
    def forward(tokens):
        parts = [one(tuple(row)) for row in tokens.tolist()]
        return torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])

    return forward


@pytest.mark.parametrize("which", full_but(range(2), [0]))
@pytest.mark.parametrize(
    ("family", "form", "seeds", "more"),
    [
        ("llava", "code", (0, 4), {}),
        ("llava", "paper", (0, 4), {}),
        # So heavy a bonus that an image span off by one, as the authors' is for InstructBLIP, gives another answer.
        ("instructblip", "code", (1, 7), dict(image_bonus_tokens=8, penalty_weights=4.0)),
    ],
)
def test_a_model_equals_the_restatement_on_uncached_eager_forwards(family, form, seeds, more, which):
    built = tiny(family)
    model, inputs = copy.deepcopy(built.model), built.inputs(["is it"], 1, seeds[which])
    width = inputs["input_ids"].shape[1]
    (image,) = spans(inputs["input_ids"] == model.config.image_token_id)
    log, search = [], SEARCH | more
    expected = restate(
        eager(model, inputs),
        width,
        image,
        **search,
        window_size=16,
        max_new_tokens=24,
        eos=EOS,
        paper=form == "paper",
        log=log,
    )
    method = OPERA(**search, form=form, window_size=16, prompt_length=1)
    out = generate(model, method, inputs, max_new_tokens=24)
    assert out[0, width:].tolist() == expected
    assert model.run.trace.rollbacks == [len(log)] and log


@pytest.mark.parametrize("form", ["code", "paper"])
def test_a_batch_gives_each_sample_what_it_gets_alone(llava, form):
    method = OPERA(**SEARCH, form=form)
    texts = ["is it", "what", "a longer question"]
    alone, counts = [], []
    for text, seed in zip(texts, (0, 1, 2)):
        inputs = inputs_of([text], seed=seed)
        out = generate(llava, method, inputs)
        alone.append(out[0, inputs["input_ids"].shape[1] :].tolist())
        counts += llava.run.trace.rollbacks
    inputs = inputs_of(texts)
    out = generate(llava, method, inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    assert [row[: len(own)] for row, own in zip(out, alone)] == alone
    assert all(set(row[len(own) :]) <= {llava.generation_config.pad_token_id} for row, own in zip(out, alone))
    assert llava.run.trace.rollbacks == counts and len(set(counts)) > 1


@pytest.mark.parametrize("family", full_but(BUILDERS, FEW))
def test_every_family_that_exposes_attention(family):
    built = tiny(family)
    model = copy.deepcopy(built.model)
    texts = ["is it", "what then"]
    alone = []
    for number, text in enumerate(texts):
        inputs = built.inputs([text], 1, number)
        out = generate(model, OPERA(**SEARCH), inputs, max_new_tokens=12)
        alone.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    inputs = built.inputs(texts)
    out = generate(model, OPERA(**SEARCH), inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :].tolist()
    assert [row[: len(own)] for row, own in zip(out, alone)] == alone
    assert len(set(map(tuple, alone))) == 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "instructblip"])
def test_recorded_rows_are_those_of_eager_attention(family):
    """Prefill, a tree of alternatives, unequal rows and left padding, for grouped keys, M-RoPE and sliding windows."""
    built = tiny(family)
    model = copy.deepcopy(built.model)
    inputs = built.inputs(["is it", "what then"])
    batch = Batch(family_of(model), inputs)
    captured = batch.prepare(batch.resolve(batch.samples))
    module, tokens = captured.module, torch.tensor([[5, 6, 7], [8, 9, 10]])
    recorder = Recorder(LAYERS - 1)
    with torch.no_grad(), routed(module):
        rows = Rows(captured, edits=[recorder])
        rows.extend(torch.tensor([[11, 12], [13, 0]]), [2, 1])
        recorder.on = True
        rows.look(tokens)
        recorded = recorder.take()
    slots = recorded.shape[-1] - 3
    module.set_attn_implementation("eager")
    mask = captured.mask
    for row, own in enumerate(([11, 12], [13])):
        for column in range(3):
            batch = Batch(family_of(model), built.inputs(["is it", "what then"][row : row + 1], seed=row))
            single = batch.prepare(batch.resolve(batch.samples))
            whole = Rows(single)
            ids = torch.tensor([[*own, int(tokens[row, column])]])
            hook, seen = [], []
            hook = (
                module.get_decoder()
                .layers[-1]
                .self_attn.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[1]))
            )
            whole.extend(ids)
            hook.remove()
            expected = seen[-1][0, :, -1].amax(0)
            held = [int(i) for i in mask[row].nonzero().flatten()]
            held += [mask.shape[1] + i for i in range(len(own))] + [slots + column]
            assert torch.allclose(recorded[row, column, held], expected, atol=1e-6)
            assert recorded[row, column].sum() == pytest.approx(float(recorded[row, column, held].sum()), abs=1e-6)


@pytest.fixture()
def forwards(monkeypatch):
    """(tokens, logits) of every forward of a decoder by :class:`Rows` after the prompt's: widths of its input and output."""
    seen = []

    def recording(self, tokens, depth, mask, keep):
        out = forward(self, tokens, depth, mask, keep)
        seen.append((tokens.shape[1], out.logits.shape[1]))
        return out

    forward = Rows._forward
    monkeypatch.setattr(Rows, "_forward", recording)
    return seen


def rows_of(texts):
    model = copy.deepcopy(tiny("llava").model)
    batch = Batch(family_of(model), inputs_of(texts))
    return Rows(batch.prepare(batch.resolve(batch.samples)))


def test_logits_are_those_of_the_places_where_rows_end(forwards):
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    with torch.no_grad():
        logits = rows_of(["is it", "what", "where"]).extend(tokens, [2, 4, 2])
        single = rows_of(["is it", "what", "where"])
        steps = torch.stack([single.extend(tokens[:, i : i + 1]) for i in range(4)], 1)
    assert forwards[0] == (4, 2)
    assert torch.allclose(logits, steps[torch.arange(3), [1, 3, 1]], atol=1e-5)


def test_prompts_are_not_moved_while_beams_stay_with_their_sample():
    with torch.no_grad():
        rows = rows_of(["is it", "what"])
        rows.select([0, 0, 1, 1])
        tokens = torch.tensor([[5, 6]] * 4)
        rows.look(tokens)
        where = [layer.keys.data_ptr() for layer in rows.kv.cache.layers]
        for parents, columns in (([1, 0, 2, 2], [0, 1, 1, 0]), ([0, 0, 3, 2], [1, -1, -1, 0])):
            rows.take(parents, columns)
            rows.look(tokens)
            assert [layer.keys.data_ptr() for layer in rows.kv.cache.layers] == where
        rows.take([2, 3], [0, 1])
        assert rows.kv.cache.layers[0].keys.data_ptr() not in where
        chosen = rows.extend(torch.tensor([[7], [8]]))
        again = rows_of(["is it", "what"])
        again.select([1, 1])
        # Row 2 was row 3 with 5, row 3 was row 2 with 6 and then 5.
        expected = again.extend(torch.tensor([[5, 5, 7, 0], [6, 5, 6, 8]]), [3, 4])
    assert torch.allclose(chosen, expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_rows_hold_their_tokens_however_they_branched(seed):
    """Only slots after the tokens that rows have in common are moved, so a slot that is wrong would show in the logits."""
    draw = torch.Generator().manual_seed(seed)
    number = lambda most: int(torch.randint(most, (), generator=draw))  # noqa: E731
    with torch.no_grad():
        rows = rows_of(["is it", "what"])
        rows.select([0, 0, 0, 1, 1, 1])
        texts = [[] for _ in range(6)]
        for step in range(10):
            tokens = torch.randint(5, 60, (6, 2), generator=draw)
            rows.look(tokens)
            # Half of the steps every row of a sample continues the same one, as beams do.
            best = [number(3), number(3)]
            parents = [3 * (row // 3) + (best[row // 3] if step % 2 else number(3)) for row in range(6)]
            columns = [-1 if step == 6 and row % 2 else number(2) for row in range(6)]
            rows.take(parents, columns)
            texts = [
                texts[p] + ([int(tokens[p, column])] if column >= 0 else []) for p, column in zip(parents, columns)
            ]
            if step == 4:
                part = rows.prompts([0, 1, 2])
                part.extend(torch.tensor([text[:3] for text in texts[:3]]))
                rows.put([0, 1, 2], part)
                texts = [text[:3] for text in texts[:3]] + texts[3:]
        assert rows.lengths == [len(text) for text in texts]
        logits = rows.extend(torch.full((6, 1), 7))
        again = rows_of(["is it", "what"])
        again.select([0, 0, 0, 1, 1, 1])
        most = max(map(len, texts)) + 1
        padded = torch.tensor([text + [7] + [0] * (most - 1 - len(text)) for text in texts])
        expected = again.extend(padded, [len(text) + 1 for text in texts])
    assert torch.allclose(logits, expected, atol=1e-5)


def test_beams_move_no_more_than_what_they_do_not_have_in_common(monkeypatch):
    assert common([1, 2, 3], [1, 2, 4, 5]) == 2 and common([1, 2], [1, 2, 3]) == 2 and common([], [1]) == 0
    moved = []
    select = torch.Tensor.index_select
    with torch.no_grad():
        rows = rows_of(["is it"])
        rows.select([0, 0])
        for parents in ([0, 1], [0, 0], [1, 0], [1, 0]):
            rows.look(torch.tensor([[5, 6]] * 2))
            monkeypatch.setattr(torch.Tensor, "index_select", lambda *a: (moved.append(a[0].shape[-2]), select(*a))[1])
            del moved[:]
            rows.take(parents, [0, 1])
            monkeypatch.undo()
            # The first tokens differ until both rows are row 0; then the newest do.
            keys = moved[: 2 * len(rows.kv.cache.layers)]
            assert keys == (
                [] if parents == [0, 1] else [{(0, 0): 1, (1, 0): rows.width - 2}[tuple(parents)]] * len(keys)
            )


def test_one_forward_per_step_and_two_per_rollback_and_one_vision_pass(llava, forwards, monkeypatch):
    passes, looked, refeeds = [], [], []

    def look(self, tokens):
        looked.append(tokens.shape)
        return rows_look(self, tokens)

    def rewind(self, prefixes):
        refeeds.extend(prefix.shape[1] for prefix in prefixes.values())
        return model_rewind(self, prefixes)

    rows_look, model_rewind = Rows.look, Model.rewind
    monkeypatch.setattr(Rows, "look", look)
    monkeypatch.setattr(Model, "rewind", rewind)
    hooks = [
        llava.get_decoder().register_forward_hook(lambda *_: passes.append("text")),
        llava.model.vision_tower.register_forward_hook(lambda *_: passes.append("vision")),
    ]
    generate(llava, OPERA(**SEARCH), inputs_of(seed=0))
    for hook in hooks:
        hook.remove()
    (rollbacks,) = llava.run.trace.rollbacks
    assert rollbacks > 0
    assert passes.count("vision") == 1
    # A prefill, a look per step; a rollback re-feeds once and runs its choice, which was no candidate, once.
    assert llava.run.trace.forwards == passes.count("text") == 1 + len(looked) + len(refeeds) + rollbacks
    assert len(refeeds) == rollbacks and len(looked) >= 28
    # The re-feed is that of the response alone, as long as it then is.
    widths = iter(width for width, _ in forwards)
    assert all(any(width == length for width in widths) for length in refeeds) and min(refeeds) > 0
    del forwards[:], looked[:], refeeds[:], attention.materialised[:]
    generate(llava, OPERA(**{**SEARCH, "threshold": 99}), inputs_of(seed=0))
    assert llava.run.trace.rollbacks == [0] and llava.run.trace.forwards == 1 + 28 and not refeeds
    # One layer's attention of three candidates of three beams, and nothing of the prompt's.
    assert attention.materialised == [(3, 3)] * 28


def test_the_model_is_left_as_it_was(llava):
    decoder = llava.get_decoder()
    before = decoder.config._attn_implementation, dict(vars(llava)), set(decoder.layers[-1]._forward_hooks)
    expected = llava.generate(**inputs_of(), max_new_tokens=8, do_sample=False)
    generate(llava, OPERA(**SEARCH), inputs_of())
    vars(llava).pop("run")

    class Broken(RuntimeError):
        pass

    def broken(_, __, out):
        if out[0].shape[1] == 3:
            raise Broken
        return out

    hook = decoder.register_forward_hook(broken)
    with pytest.raises(Broken):
        generate(llava, OPERA(**SEARCH), inputs_of())
    hook.remove()
    vars(llava).pop("run")
    assert (decoder.config._attn_implementation, dict(vars(llava)), set(decoder.layers[-1]._forward_hooks)) == before
    assert torch.equal(llava.generate(**inputs_of(), max_new_tokens=8, do_sample=False), expected)


def test_an_exception_inside_a_rollback_is_not_swallowed(llava, monkeypatch):
    def broken(*_):
        raise MemoryError("in the middle of a rollback")

    monkeypatch.setattr("lvlm_decode.controllers.opera.Search.rewound", broken)
    with pytest.raises(MemoryError, match="in the middle"):
        generate(llava, OPERA(**SEARCH), inputs_of(seed=0))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (dict(do_sample=True), "sampling.*do_sample=False"),
        (dict(num_beams=3), "beam search.*OPERA\\(num_beams"),
        (dict(cache_implementation="static"), "static cache"),
        (dict(prompt_lookup_num_tokens=3), "drafter"),
        (dict(num_return_sequences=2), "num_return_sequences.*best beam"),
        (dict(return_dict_in_generate=True, output_scores=True), "output_scores"),
        (dict(prefix_allowed_tokens_fn=lambda *_: [5]), "prefix_allowed_tokens_fn"),
    ],
)
def test_what_it_cannot_do_is_said_before_the_first_token(llava, how, says):
    forwards = []
    llava.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(UnsupportedError, match=says):
        generate(llava, OPERA(**SEARCH), inputs_of(), **how)
    assert not forwards


def test_streaming_and_sums_are_refused(llava):
    streamer = TextStreamer(tiny("llava").tokenizer)
    with pytest.raises(UnsupportedError, match=r"streamer.*takes tokens back"):
        generate(llava, OPERA(**SEARCH), inputs_of(), streamer=streamer)
    with pytest.raises(UnsupportedError, match="added to another method"):
        OPERA() + OPERA(form="paper")


def test_a_streamer_for_one_call_is_refused(llava):
    """A reader of it would wait for ever."""
    streamer = SimpleNamespace(put=lambda tokens: None, end=lambda: None)
    with pytest.raises(UnsupportedError, match="opera cannot run with a streamer"):
        llava.generate(
            **inputs_of(), max_new_tokens=4, do_sample=False, custom_generate=OPERA(**SEARCH), streamer=streamer
        )


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (dict(num_beams=0), "num_beams = 0"),
        (dict(form="slides"), "'code' or 'paper'"),
        (dict(score_dtype="int8"), "score_dtype"),
        (dict(max_rollbacks=-1), "max_rollbacks = -1"),
        (dict(prompt_length=0), "prompt_length = 0"),
    ],
)
def test_parameters_outside_their_range(parameters, says):
    with pytest.raises(ParameterError, match=says):
        OPERA(**parameters)


def test_output_object_and_lengths(llava):
    inputs = inputs_of(["is it", "what"])
    width = inputs["input_ids"].shape[1]
    out = generate(llava, OPERA(**SEARCH), inputs, return_dict_in_generate=True)
    plain = generate(llava, OPERA(**SEARCH), inputs)
    assert torch.equal(out.sequences, plain)
    assert out.sequences_scores.shape == (2,) and bool((out.sequences_scores < 0).all())
    assert torch.equal(plain[:, :width], inputs["input_ids"])
    assert generate(llava, OPERA(**SEARCH), inputs, max_new_tokens=1).shape[1] == width + 1


def test_one_beam_one_candidate_is_greedy_search(llava):
    inputs = inputs_of(["is it", "what"])
    method = OPERA(num_beams=1, num_attn_candidates=1, threshold=99)
    expected = llava.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert torch.equal(generate(llava, method, inputs, max_new_tokens=16), expected)


def test_all_candidates_without_a_penalty_is_beam_search(llava):
    """With every token a candidate, normalising among the candidates changes nothing."""
    inputs = inputs_of(["is it", "what"])
    width = llava.config.text_config.vocab_size
    method = OPERA(
        num_beams=3, num_attn_candidates=width, penalty_weights=0, image_bonus_tokens=0, threshold=99, prompt_length=1
    )
    expected = llava.generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=3)
    assert torch.equal(generate(llava, method, inputs, max_new_tokens=12), expected)


def test_processors_see_prompt_and_answer_of_their_sample(llava):
    inputs = inputs_of(["is it", "what"])
    width = inputs["input_ids"].shape[1]
    out = generate(llava, OPERA(**SEARCH), inputs, no_repeat_ngram_size=1, max_new_tokens=20)
    for row in out.tolist():
        answer = row[width:]
        answer = answer[: answer.index(EOS)] if EOS in answer else answer
        assert len(set(answer)) == len(answer) and not set(answer) & set(row[:width])


def test_other_stopping_criteria_end_an_answer(llava):
    inputs = inputs_of()
    width = inputs["input_ids"].shape[1]
    free = generate(llava, OPERA(**SEARCH), inputs)[0, width:].tolist()

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.tensor([row[-1] == free[5] for row in input_ids.tolist()])

    out = generate(llava, OPERA(**SEARCH, penalty_weights=0), inputs, stopping_criteria=[After()])[0, width:].tolist()
    assert out[-1] == free[5] and free[5] not in out[:-1]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_early_stopping_and_length_penalty_are_honoured(llava, early_stopping):
    inputs = inputs_of(seed=3)
    outs = [
        generate(llava, OPERA(**SEARCH), inputs, early_stopping=early_stopping, length_penalty=power, num_beams=1)
        for power in (-4.0, 4.0)
    ]
    assert outs[0].shape[1] <= outs[1].shape[1]


def test_half_precision_runs(llava):
    inputs = inputs_of(["is it", "what"])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    out = generate(llava.bfloat16(), OPERA(**SEARCH), inputs, max_new_tokens=12)
    assert out.shape[1] > inputs["input_ids"].shape[1]


def padded(inputs, columns):
    """The batch as ``pad_to_multiple_of`` makes it: columns on the left that hold nothing in any row."""
    pad = torch.nn.functional.pad
    return inputs | {
        "input_ids": pad(inputs["input_ids"], (columns, 0)),
        "attention_mask": pad(inputs["attention_mask"], (columns, 0)),
    }


def test_padding_of_all_rows_moves_no_image(llava):
    inputs = inputs_of(["is it", "what"])
    width = inputs["input_ids"].shape[1]
    how = dict(return_dict_in_generate=True, max_new_tokens=12)
    method = OPERA(**{**SEARCH, "image_bonus_tokens": 10})
    out = generate(llava, method, inputs, **how)
    more = generate(llava, method, padded(inputs, 3), **how)
    assert torch.equal(more.sequences[:, width + 3 :], out.sequences[:, width:])
    assert torch.allclose(more.sequences_scores, out.sequences_scores, atol=1e-5)


def test_one_window_for_all_layers_is_seen():
    """Mistral: a window and no list of layer kinds."""
    config = copy.deepcopy(tiny("llava").model.config)
    config.text_config = MistralConfig(**TEXT, sliding_window=12)
    model = react(LlavaForConditionalGeneration(config))
    model.generation_config.eos_token_id = None
    inputs = inputs_of(["is it", "what"])
    assert inputs["input_ids"].shape[1] > 12 and not hasattr(config.text_config, "layer_types")
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    method = OPERA(num_beams=1, num_attn_candidates=1, threshold=99)
    assert torch.equal(generate(model, method, inputs, max_new_tokens=16), expected)
    config.text_config.sliding_window = None
    wide = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert not torch.equal(wide, expected)


def test_image_positions_come_from_the_inputs():
    images = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert spans(images) == [(1, 5), (0, 0)]


def test_rows_with_several_images_or_none(llava):
    texts, images = ["is it", "what", "where"], [1, 0, 2]
    inputs = inputs_of(texts, images)
    out = generate(llava, OPERA(**SEARCH), inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :].tolist()
    for row, (text, count) in enumerate(zip(texts, images)):
        single = inputs_of([text], count, row)
        own = generate(llava, OPERA(**SEARCH), single, max_new_tokens=12)[0, single["input_ids"].shape[1] :].tolist()
        assert out[row][: len(own)] == own
