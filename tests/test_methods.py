"""Every method's formula against a literal re-statement, its views against the words and features they should hold."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import needs_adapters
from helpers import FAINT, Kept, spelled_logits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lvlm_decode import attach, detach
from lvlm_decode.attachment import last_run
from lvlm_decode.engine.batch import Batch
from lvlm_decode.engine.run import Run
from lvlm_decode.errors import InputError, ParameterError, UnknownNameError, UnsupportedError
from lvlm_decode.families import family_of
from lvlm_decode.method import BELOW, Step, plausible_tokens
from lvlm_decode.methods import METHODS, load, parse
from lvlm_decode.methods.avisc import AvisC
from lvlm_decode.methods.cad import CAD
from lvlm_decode.methods.code import CODE
from lvlm_decode.methods.damro import DAMRO, authors
from lvlm_decode.methods.dcd import DCD
from lvlm_decode.methods.deco import DeCo
from lvlm_decode.methods.dola import DoLa
from lvlm_decode.methods.icd import ICD
from lvlm_decode.methods.lol import LOL
from lvlm_decode.methods.lqcd import LQCD
from lvlm_decode.methods.m3id import M3ID
from lvlm_decode.methods.pai import PAI
from lvlm_decode.methods.ritual import RITUAL
from lvlm_decode.methods.scmoe import SCMoE
from lvlm_decode.methods.sid import SID
from lvlm_decode.methods.uscd import USCD
from lvlm_decode.methods.vcd import VCD, diffuse, kept_share
from lvlm_decode.methods.vdd import VDD
from lvlm_decode.testing.models import IMAGE, LAYERS, UNKNOWN, VISION_END, VISION_START, react, tiny

B, T, N, D = 2, 3, 12, 6
INF = float("inf")


def step(views: int, weights=(), layers=(), seed=0, scale=2.0) -> Step:
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(views, B, T, N, generator=g)
    hidden = {layer: torch.randn(views, B, T, D, generator=g) for layer in layers}
    head, norm = torch.randn(N, D, generator=g), torch.randn(D, generator=g)

    def project(x: Tensor, normed: bool = True, view: int = 0) -> Tensor:
        return (x * norm if normed else x) @ head.T * (1 + 0.1 * view)

    positions = torch.tensor([[0, 1, 2], [40, 41, 42]])
    return Step(logits, positions, tuple(weights), hidden, project)


def each(s: Step):
    """(b, t, logits per view) of every position."""
    for b in range(B):
        for t in range(T):
            yield b, t, s.logits[:, b, t]


def masked(scores: Tensor, main: Tensor, beta: float) -> Tensor:
    """The plausibility mask in probabilities, as the papers write it."""
    p = main.softmax(-1)
    return torch.where(p >= beta * p.max(), scores, torch.tensor(-INF))


def assert_scores(method, s: Step, literal) -> None:
    out = method.scores(s)
    assert out.shape == (B, T, N)
    for b, t, logits in each(s):
        want = literal(b, t, logits)
        # What the papers set to -inf lies far below here, in the order of view 0.
        below = logits[0] - logits[0].max() - BELOW
        torch.testing.assert_close(out[b, t], torch.where(want == -INF, below, want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha,beta", [(1.0, 0.1), (0.5, 0.3)])
@pytest.mark.parametrize("name", ["vcd", "icd", "sid", "avisc", "damro", "vdd", "cad"])
def test_one_negative_view(name, alpha, beta):
    method = load(name)(alpha=alpha, beta=beta)
    s = step(2, weights=[-alpha])
    assert_scores(method, s, lambda b, t, z: masked((1 + alpha) * z[0] - alpha * z[1], z[0], beta))


def test_dcd():
    s = step(2, weights=[-1.0])
    assert_scores(DCD(negative={}), s, lambda b, t, z: masked(2 * z[0] - z[1], z[0], 0.1))


def test_cad_has_no_mask_unless_asked():
    s = step(2, weights=[-0.5])
    assert_scores(CAD(), s, lambda b, t, z: 1.5 * z[0] - 0.5 * z[1])


def test_vdd_averages_the_negative_logits():
    s = step(3, weights=[-0.5, -0.5])
    method = VDD(absent="both")
    assert_scores(method, s, lambda b, t, z: masked(2 * z[0] - (z[1] + z[2]) / 2, z[0], 0.1))


@pytest.mark.parametrize("threshold,cap,first", [(None, None, 1), (0.3, None, 1), (None, 0.5, 1), (None, None, 0)])
def test_m3id(threshold, cap, first):
    s = step(2)
    method = M3ID(threshold=threshold, cap=cap, first=first)

    def literal(b, t, z):
        seen, blind = z.log_softmax(-1)
        g = math.exp(-0.02 * (int(s.positions[b, t]) + first))
        factor = (1 - g) / g
        factor = factor if cap is None else min(factor, cap)
        if threshold is not None and seen.max() >= math.log(threshold):
            factor = 0.0
        return masked(seen + factor * (seen - blind), z[0], 0.1)

    assert_scores(method, s, literal)


def test_m3id_stays_finite_on_long_answers():
    s = step(2)
    s = Step(s.logits, torch.full((B, T), 100_000), (), {}, None)
    out = M3ID().scores(s)
    assert not out.isnan().any() and (out.amax(-1) > -BELOW / 2).all()


@pytest.mark.parametrize("form", ["plain", "neutral"])
def test_lqcd(form):
    s = step(2)

    def literal(b, t, z):
        neutral, leading = (z[0], z[1]) if form == "plain" else (z[1], z[0])
        return masked((1 + 0.7) * neutral - 0.7 * leading, neutral, 0.1)

    assert_scores(LQCD(alpha=0.7, form=form), s, literal)


def test_code():
    s = step(2)

    def literal(b, t, z):
        v, d = z.softmax(-1)
        divergence = sum(0.5 * math.log2(abs(float(v[k] - d[k])) ** 0.7 + 1) * float(v[k] + d[k]) for k in range(N))
        assert 0 <= divergence <= 1
        alpha = 1 - divergence
        return masked((1 + alpha) * z[0] - alpha * z[1], z[0], divergence)

    assert_scores(CODE(), s, literal)


@pytest.mark.parametrize("gamma", [1.1, 2.0])
def test_pai_guidance(gamma):
    s = step(2, weights=[1 - gamma])

    def literal(b, t, z):
        seen, blind = z.log_softmax(-1)
        out = gamma * (seen - blind) + blind
        out = torch.where(seen >= math.log(0.1) + seen.max(), out, torch.tensor(-INF))
        # In raw logits the scores differ by a constant per position.
        return out + z[0].logsumexp(-1) * gamma - z[1].logsumexp(-1) * (gamma - 1)

    assert_scores(PAI(gamma=gamma), s, literal)


@pytest.mark.parametrize("divergence", ["code", "jsd"])
@pytest.mark.parametrize("normed", [False, True])
def test_dola(divergence, normed):
    s = step(1, layers=(0, 2, 4))
    method = DoLa(divergence=divergence, norm_early=normed)
    chosen = set()

    def literal(b, t, z):
        mature = z[0].softmax(-1)
        best, out = -1.0, None
        for layer, states in s.hidden.items():
            early = s.project(states[0, b, t], normed=normed).softmax(-1)
            middle = (mature + early) / 2
            if divergence == "jsd":
                gap = sum(0.5 * float(p * (p / m).log()) for q in (mature, early) for p, m in zip(q, middle))
            else:
                gap = sum(0.5 * float(m * (m / p).log()) for q in (mature, early) for p, m in zip(q, middle))
            if gap > best:
                best, out, layer_chosen = gap, mature.log() - early.log(), layer
        chosen.add(layer_chosen)
        return masked(out, z[0], 0.1)

    assert_scores(method, s, literal)
    assert len(chosen) > 1, "every position has a layer of its own"


def test_dola_buckets():
    model = tiny("llava").model
    assert LAYERS == 4
    assert DoLa(layers="low").probes(model).hidden == (0,)
    assert DoLa(layers="high").probes(model).hidden == (2,)

    class Deep:
        def __init__(self, count, tied=False):
            text = type("T", (), {"num_hidden_layers": count, "tie_word_embeddings": tied})
            self.config = type("C", (), {"get_text_config": lambda self, **_: text})()

    assert DoLa(layers="low").probes(Deep(32)).hidden == tuple(range(0, 16, 2))
    assert DoLa(layers="high").probes(Deep(32)).hidden == tuple(range(16, 32, 2))
    assert DoLa(layers="low").probes(Deep(60)).hidden == tuple(range(0, 20, 2))
    assert DoLa(layers="high").probes(Deep(60)).hidden == tuple(range(40, 60, 2))
    assert DoLa(layers="low").probes(Deep(32, tied=True)).hidden == tuple(range(2, 16, 2))
    assert DoLa(layers=[1, 3]).probes(model).hidden == (1, 3)
    with pytest.raises(UnsupportedError, match="0 to 3"):
        DoLa(layers=(4,)).probes(model)


@pytest.mark.parametrize("top_k,top_p", [(20, 0.9), (3, 0.9), (20, 0.5)])
def test_deco(top_k, top_p):
    s = step(1, layers=(1, 2, 3))

    def literal(b, t, z):
        p, order = z[0].softmax(-1).sort(descending=True)
        candidates, total = [], 0.0
        for k in range(min(top_k, N)):
            candidates.append(int(order[k]))
            total += float(p[k])
            if total >= top_p:
                break
        early = {layer: s.project(states[0, b, t]) for layer, states in s.hidden.items()}
        layer, token = max(
            ((layer, k) for layer in early for k in candidates), key=lambda at: float(early[at[0]].softmax(-1)[at[1]])
        )
        out = z[0] + 0.6 * early[layer].softmax(-1)[token] * early[layer]
        keep = torch.zeros(N, dtype=torch.bool)
        keep[candidates] = True
        return torch.where(keep, out, torch.tensor(-INF))

    assert_scores(DeCo(top_k=top_k, top_p=top_p), s, literal)


def test_deco_layers_scale_with_the_model():
    def hidden(count):
        text = type("T", (), {"num_hidden_layers": count})
        model = type("M", (), {"config": type("C", (), {"get_text_config": lambda self, **_: text})()})()
        return DeCo().probes(model).hidden

    assert hidden(32) == tuple(range(20, 29))
    assert hidden(40) == tuple(range(25, 36))
    assert hidden(4) == (2, 3), "the last state is normed already"


@pytest.mark.parametrize("refocus", [0.0, 0.4])
def test_lol(refocus):
    s = step(3 if refocus else 2, layers=(2,))
    method = LOL(strength=0.6, lower_strength=0.3, fusion=0.2, refocus=refocus)

    def literal(b, t, z):
        log = z.log_softmax(-1)
        final = log[0] - 0.6 * log[1]
        own = s.project(s.hidden[2][0, b, t]).log_softmax(-1)
        amateur = s.project(s.hidden[2][1, b, t], view=1).log_softmax(-1)
        out = final + 0.2 * (own - 0.3 * amateur)
        if refocus:
            out = out + refocus * (log[2] - log[0])
        return masked(out, z[0], 0.1)

    assert_scores(method, s, literal)


def test_uscd_contrasts_where_it_is_unsure():
    s = step(2, scale=4.0)
    method = USCD(alpha=0.5, threshold=0.8)
    certain = torch.eye(N)[0].std()
    unsure = []

    def literal(b, t, z):
        unsure.append(bool(z[0].softmax(-1).std() / certain < 0.8))
        return masked(z[0] - 0.5 * z[1] if unsure[-1] else z[0], z[0], 0.1)

    assert_scores(method, s, literal)
    assert 0 < sum(unsure) < len(unsure), "both sides of the gate"


def test_scmoe_divides_by_temperature_first():
    s = step(2)
    method = SCMoE(strong_temperature=0.7, weak_temperature=1.3)
    assert_scores(method, s, lambda b, t, z: masked(1.5 * z[0] / 0.7 - 0.5 * z[1] / 1.3, z[0] / 0.7, 0.1))


def test_sums_add_their_terms_under_one_mask():
    sums = VDD(beta=0.2) + USCD(threshold=0.8) + M3ID(beta=0.05)
    sums = sums.with_counts((1, 1, 1))
    s = step(4, weights=[-1.0, 0.0, 0.0], scale=3.0)

    def literal(b, t, z):
        unsure = z[0].softmax(-1).std() < 0.8 * torch.eye(N)[0].std()
        log = z.log_softmax(-1)
        factor = math.expm1(0.02 * (int(s.positions[b, t]) + 1))
        out = 2 * z[0] - z[1] - (0.5 * z[2] if unsure else 0) + (log[0] - z[0]) + factor * (log[0] - log[3])
        return masked(out, z[0], 0.2)

    assert_scores(sums, s, literal)


def test_pairs_that_own_the_same_rule_refuse():
    for a, b in ((DoLa(), DeCo()), (DoLa(), LOL())):
        with pytest.raises(UnsupportedError, match="early layer"):
            a + b
    with pytest.raises(UnsupportedError, match="itself"):
        ICD() + ICD(alpha=0.5)


def test_the_mask_keeps_ties_and_the_arg_max():
    logits = torch.tensor([0.0, math.log(0.5), math.log(0.5) - 1e-3])
    assert plausible_tokens(logits, 0.5).tolist() == [True, True, False]
    assert plausible_tokens(torch.randn(4, N), 1.0).sum(-1).tolist() == [1] * 4


BAD = {
    "icd": dict(alpha=-1),
    "m3id": dict(first=2),
    "lqcd": dict(form="other"),
    "cad": dict(beta=0),
    "vdd": dict(absent="all"),
    "code": dict(eta=-0.1),
    "cicd": dict(images="x", threshold=-1.0),
    "pai": dict(gamma=0.5),
    "sid": dict(share=0.0),
    "avisc": dict(gamma=0.0),
    "crops": dict(text_tokens=(0, 4)),
    "mod": dict(gate="last"),
    "damro": dict(k=0),
    "layercd": dict(layer=0),
    "only": dict(gamma=-0.1),
    "revis": dict(vectors=torch.zeros(1), threshold=1.5),
    "memvr": dict(ratio=1.5),
    "cai": dict(gamma=0.5),
    "causalmm": dict(form="mirror"),
    "ilvad": dict(tokens=1),
    "dcd": dict(alpha=-1.0),
    "dola": dict(layers="middle"),
    "deco": dict(top_p=0.0),
    "lol": dict(adapter="a", model=torch.nn.Identity()),
    "uscd": dict(threshold=2.0),
    "scmoe": dict(rank=0),
    "vcd": dict(noise_step=1000),
    "ritual": dict(transform="none"),
    "mask": dict(beta=1.5),
}


@pytest.mark.parametrize("name", [name for name in METHODS if name in BAD])
def test_values_out_of_range_raise_one_sentence(name):
    with pytest.raises(ParameterError, match=f"^{name}: .* must be|^{name}: .* give"):
        load(name)(**BAD[name])


@pytest.mark.parametrize("name", METHODS)
def test_methods_describe_themselves(name):
    cls = load(name)
    assert cls.name == name and cls.paper and cls.__doc__
    assert cls.arxiv or name in ("plain",) or "decode" in dir(cls) or cls.costs == ()


def test_command_line_forms():
    method = parse("vdd(absent=both)+icd(alpha=0.5)", beta=0.2)
    assert method.methods == (VDD(absent="both", beta=0.2), ICD(alpha=0.5, beta=0.2))
    assert parse("dola(layers=[1,3])") == DoLa(layers=(1, 3))
    assert parse("damro(damro_topk=4)").k == 4


# Views: what the other prompts and features are.


def run_of(family, method, texts=("is it a dog?",), **more) -> Run:
    zoo = tiny(family)
    inputs = zoo.inputs(list(texts), **more)
    return Run(zoo.model, method, inputs, processor=zoo.processor, seed=0)


def words(run: Run, view: int, row: int = 0) -> str:
    zoo = tiny(run.family.config.model_type)
    ids = run.samples[view][row].input_ids
    return zoo.tokenizer.decode(ids[ids != IMAGE], skip_special_tokens=True)


@pytest.mark.parametrize("system", ["SYS", "SYS "])
def test_icd_takes_the_system_prompt_away_where_tokens_begin_with_their_space(system):
    """As LLaMA's tokenizer has it: " USER:" is one token, and so the blank after the system prompt is none of its own."""
    vocabulary = {"<unk>": UNKNOWN, "▁SYS": 10, "▁USER:": 11, "▁fuzzy": 12, "▁": 14}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    processor = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    inputs = {"input_ids": torch.tensor([[1, 10, 11, *[IMAGE] * 16, 11]]), "pixel_values": torch.zeros(1, 3, 28, 28)}
    run = Run(tiny("llava").model, ICD(disturbance="fuzzy", system=system), inputs, processor=processor)
    assert run.samples[1][0].input_ids.tolist() == [1, 12, 11, *[IMAGE] * 16, 11]


def test_icd_says_when_the_system_prompt_is_not_there():
    with pytest.raises(InputError, match="does not begin with 'SYSTEM', which is to be taken away"):
        run_of("llava", ICD(system="SYSTEM"))


def test_icd_puts_the_disturbance_first_and_takes_the_system_prompt_away():
    run = run_of("llava", ICD(disturbance="fuzzy"))
    assert words(run, 1) == "fuzzy " + words(run, 0)
    zoo = tiny("llava")
    row = zoo.row("is it", images=0)
    ids = zoo.tokenizer("<s>SYS <image>q", add_special_tokens=False).input_ids
    del row
    inputs = {"input_ids": torch.tensor([[ids[0], *ids[1:5], *[IMAGE] * 16, ids[-1]]])}
    inputs["pixel_values"] = torch.zeros(1, 3, 28, 28)
    run = Run(zoo.model, ICD(disturbance="fuzzy", system="SYS "), inputs, processor=zoo.processor)
    assert words(run, 0) == "SYS q" and words(run, 1) == "fuzzy q"


@pytest.mark.parametrize("form,want", [("question", "fuzzy {0}"), ("normal", "fuzzy")])
def test_icd_speaks_to_the_qformer_alone(form, want):
    run = run_of("instructblip", ICD(disturbance="fuzzy", qformer=form))
    (own,), (other,) = run.samples
    assert torch.equal(own.input_ids, other.input_ids)
    read = run.processor.qformer_tokenizer
    queries = [read.decode(s.vision["qformer_input_ids"][0], skip_special_tokens=True) for s in (own, other)]
    assert queries[1] == want.format(queries[0])
    assert not torch.allclose(own.images[0].features, other.images[0].features)


def test_lqcd_leads_before_the_cue():
    run = run_of("llava", LQCD(hint="No."), ["is it a dog? ASSISTANT:"])
    assert words(run, 1) == words(run, 0).replace("dog? ASSISTANT:", "dog? No. ASSISTANT:")
    run = run_of("llava", LQCD(hint="No."), ["is it a dog?"])
    assert words(run, 1) == words(run, 0) + " No."
    run = run_of("llava", LQCD(hint="No."), ["is it? ASSISTANT:"], images=0)
    assert words(run, 1) == words(run, 0).replace("it? A", "it? No. A")


def test_lqcd_neutralises_the_users_suggestion():
    run = run_of(
        "llava", LQCD(form="neutral"), ["is it a dog? I think it is not. ASSISTANT:", "is it a dog? ASSISTANT:"]
    )
    assert words(run, 1) == words(run, 0).replace(" I think it is not.", "")
    assert words(run, 1, 1) == words(run, 0, 1)


@pytest.mark.parametrize("slots", ["both", "language", "qformer"])
def test_lqcd_leads_in_the_slots_that_are_asked_for(slots):
    run = run_of("instructblip", LQCD(slots=slots, hint="No."))
    (own,), (other,) = run.samples
    read = run.processor.qformer_tokenizer
    queries = [read.decode(s.vision["qformer_input_ids"][0], skip_special_tokens=True) for s in (own, other)]
    assert (words(run, 1) == words(run, 0) + " No.") == (slots != "qformer")
    assert queries[1].endswith("No.") == (slots != "language")


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "instructblip"])
def test_image_free_views_have_no_placeholders(family):
    for absent, count in (("none", 1), ("unknown", 1), ("both", 2)):
        run = run_of(family, VDD(absent=absent, unknown_id=UNKNOWN))
        assert len(run.samples) == 1 + count
        assert words(run, 1).strip() == words(run, 0).strip()
        for (view,) in run.samples[1:]:
            assert view.images == ()
            assert not torch.isin(view.input_ids, torch.tensor([IMAGE, VISION_START, VISION_END])).any()
        unknown = int((run.samples[-1][0].input_ids == UNKNOWN).sum())
        assert unknown == (absent != "none")


def test_code_describes_the_whole_batch_once_and_writes_it_where_the_image_was():
    zoo = tiny("llava")
    method = CODE(prompt="say", max_description=4)
    inputs = zoo.inputs(["is it a dog? ASSISTANT:", "ab ASSISTANT:"])
    run = Run(zoo.model, method, inputs, processor=zoo.processor, seed=0)
    for row, own in enumerate(run.samples[0]):
        letters = zoo.tokenizer("say ASSISTANT:", add_special_tokens=False).input_ids
        images = int((own.input_ids == IMAGE).nonzero().max()) + 1
        asked = torch.cat([own.input_ids[:images], torch.tensor(letters)])[None]
        out = zoo.model.generate(
            input_ids=asked, pixel_values=inputs["pixel_values"][row : row + 1], do_sample=False, max_new_tokens=4
        )
        said = [t for t in out[0, asked.shape[1] :].tolist() if t not in (IMAGE, 2)]
        ids = own.input_ids.tolist()
        first = ids.index(IMAGE)
        assert run.samples[1][row].input_ids.tolist() == [*ids[:first], *said, *[t for t in ids[first:] if t != IMAGE]]


def test_code_describes_an_image_once_for_all_its_questions(monkeypatch):
    zoo, asked = tiny("llava"), []
    answers = Batch.answers

    def counted(self, samples, max_new_tokens):
        asked.append(len(samples))
        return answers(self, samples, max_new_tokens)

    monkeypatch.setattr(Batch, "answers", counted)
    inputs = zoo.inputs(["is it a dog? ASSISTANT:", "ab ASSISTANT:", "what? ASSISTANT:"])
    inputs["pixel_values"] = inputs["pixel_values"][[0, 1, 0]]
    run = Run(zoo.model, CODE(prompt="say", max_description=4), inputs, processor=zoo.processor, seed=0)
    assert asked == [2]
    alone = {key: value[2:] for key, value in inputs.items()}
    other = Run(zoo.model, CODE(prompt="say", max_description=4), alone, processor=zoo.processor, seed=0)
    seen = run.samples[1][2].input_ids.tolist()
    assert seen[-len(other.samples[1][0].input_ids) :] == other.samples[1][0].input_ids.tolist()


def test_avisc_blind_tokens():
    # Layer 0 and 2 hold 0.4 and 0.3 of the attention on the image: together the first 0.5 of it.
    attention = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.2, 0.0, 0.0, 0.0], [0.0, 0.0, 0.3, 0.0], [0.1, 0.0, 0.0, 0.0]])
    mean = (attention[0] + attention[2]) / 2
    want = [bool(x > mean.mean() + mean.std()) for x in mean]
    assert AvisC().blind(attention).tolist() == want == [False, False, True, False]


def eager_rows(family: str, inputs) -> Tensor:
    """(L, heads, B, T) attention of the last prompt row under transformers' eager attention."""
    model = copy.deepcopy(tiny(family).model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    return torch.stack([layer[:, :, -1] for layer in out.attentions])


def test_avisc_leaves_the_blind_tokens_features():
    texts = ["is it a dog?", "ab"]
    run = run_of("llava", AvisC(deviations=0.5), texts)
    inputs = tiny("llava").inputs(texts)
    attention = eager_rows("llava", inputs).mean(2)
    for row in range(2):
        own = attention[:, row][:, inputs["input_ids"][row] == IMAGE]
        blind = AvisC(deviations=0.5).blind(own)
        assert 0 < int(blind.sum()) < 16
        image = run.samples[0][row].images[0].features
        torch.testing.assert_close(run.samples[1][row].images[0].features, image * blind[:, None])


# Methods that change how the model attends: the same model under plain eager attention, one row at a time.


class Eager:
    """Attention with all scores spelled out; ``edit`` may change them, ``hidden`` the slots that are seen."""

    def __init__(self, images: Tensor):
        self.images = images
        self.prompt = len(images)
        self.alpha, self.first_layer, self.skip_prompt = 0.0, 0, False
        self.rank_layer, self.share, self.hide = None, 0.0, None

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * scaling
        q, slots = scores.shape[2:]
        images = torch.zeros(slots, dtype=torch.bool)
        images[: self.prompt] = self.images
        if self.alpha and module.layer_idx >= self.first_layer and not (q > 1 and self.skip_prompt):
            scores[:, :, -1, images] += self.alpha * scores[:, :, -1, images].abs()
        causal = torch.ones(q, slots, dtype=torch.bool).tril(slots - q)
        if self.rank_layer is not None and module.layer_idx > self.rank_layer:
            causal = causal & ~self.hide
        weights = scores.masked_fill(~causal, -INF).softmax(-1)
        if module.layer_idx == self.rank_layer:
            last = weights.mean(1)[0, -1]
            keep = round(int(images.sum()) * self.share)
            least = last.masked_fill(~images, INF).argsort()[:keep]
            self.hide = images.clone()
            self.hide[least] = False
        return (weights @ value).transpose(1, 2), None


def literal_logits(inputs, tokens: Tensor, **settings) -> Tensor:
    """(steps, N): logits of one row of tiny LLaVA that is fed ``tokens``, under :class:`Eager` attention."""
    model = copy.deepcopy(tiny("llava").model)
    eager = Eager(inputs["input_ids"][0] == IMAGE)
    for name, value in settings.items():
        setattr(eager, name, value)
    return spelled_logits(model, "lvlm_decode_test_eager", eager, inputs, tokens)


def traced(method, texts=("is it a dog?", "ab"), tokens: int = 5):
    """(steps, V, N) logits of the first row of a padded batch, and the tokens it generated."""
    zoo = tiny("llava")
    inputs = zoo.inputs(list(texts))
    attach(zoo.model, method, processor=zoo.processor)
    seen = []
    scores = type(method).scores
    try:
        type(method).scores = lambda self, s: (seen.append(s.logits[:, 0, -1]), scores(self, s))[1]
        out = zoo.model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    finally:
        type(method).scores = scores
        detach(zoo.model)
    return torch.stack(seen), out[0, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("gamma,first_token", [(1.5, "code"), (1.5, "boosted"), (None, "code")])
@pytest.mark.parametrize("texts", [("ab", "is it a dog?"), ("is it a dog?", "ab")], ids=["padded", "longest"])
def test_pai_boosts_the_newest_row(gamma, first_token, texts):
    logits, tokens = traced(PAI(alpha=0.5, gamma=gamma, first_layer=1, first_token=first_token), texts)
    inputs = tiny("llava").inputs(texts[:1])
    late = gamma is not None and first_token == "code"
    want = literal_logits(inputs, tokens[:-1], alpha=0.5, first_layer=1, skip_prompt=late)
    torch.testing.assert_close(logits[:, 0], want, atol=2e-5, rtol=1e-4)
    plain = literal_logits(inputs, tokens[:-1])
    assert (logits[:, 0] - plain).abs().amax(-1)[1:].min() > 1e-2
    assert torch.allclose(logits[0, 0], plain[0], atol=1e-4) == late
    if gamma is not None:
        words = inputs["input_ids"][:, inputs["input_ids"][0] != IMAGE]
        blind = literal_logits({"input_ids": words}, tokens[:-1])
        torch.testing.assert_close(logits[:, 1], blind, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("texts", [("ab", "is it a dog?"), ("is it a dog?", "ab")], ids=["padded", "longest"])
def test_sid_hides_what_the_newest_row_attends_to_most(texts):
    logits, tokens = traced(SID(rank_layer=1, share=0.25), texts)
    inputs = tiny("llava").inputs(texts[:1])
    plain = literal_logits(inputs, tokens[:-1])
    torch.testing.assert_close(logits[:, 0], plain, atol=2e-5, rtol=1e-4)
    want = literal_logits(inputs, tokens[:-1], rank_layer=1, share=0.25)
    torch.testing.assert_close(logits[:, 1], want, atol=2e-5, rtol=1e-4)
    assert (logits[:, 1] - plain).abs().amax(-1).min() > 1e-2


def test_sid_needs_a_layer_after_the_one_that_ranks():
    with pytest.raises(UnsupportedError, match="rank_layer = 3"):
        traced(SID(rank_layer=3))


# Other projectors, adapters, amateurs and experts.


def other_projector(family: str, seed: int = 7) -> torch.nn.Module:
    from lvlm_decode.families import family_of

    projector = copy.deepcopy(family_of(tiny(family).model).projector())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return projector


@pytest.mark.parametrize("family", ["llava", "llava_next", "instructblip", "qwen2_5_vl", "qwen3_vl", "idefics3"])
@pytest.mark.parametrize("both", [False, True])
def test_dcd_projects_twice_what_was_encoded_once(family, both):
    from lvlm_decode.families import family_of

    zoo = tiny(family)
    negative, positive = other_projector(family), other_projector(family, seed=8) if both else None
    before = copy.deepcopy(family_of(zoo.model).projector().state_dict())
    zoo.inputs()  # counts the tiles' placeholders with the model, once
    passes = []
    inner = next(m for m in zoo.model.get_encoder(modality="image").modules() if isinstance(m, torch.nn.Linear))
    hook = inner.register_forward_pre_hook(lambda *a: passes.append(1))
    run = run_of(family, DCD(negative=negative.state_dict(), positive=positive))
    hook.remove()
    assert len(passes) == 1
    for view, projector in ((0, positive), (1, negative)):
        model = copy.deepcopy(zoo.model)
        if projector is not None:
            family_of(model).projector().load_state_dict(projector.state_dict())
        want = family_of(model).encode(run.batch.family.cat_vision([run.batch.vision]))
        torch.testing.assert_close(run.samples[view][0].images[0].features, want[0].features, atol=1e-5, rtol=1e-4)
    after = family_of(zoo.model).projector().state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_dcd_reads_safetensors_and_refuses_another_models_projector(tmp_path):
    from safetensors.torch import save_file

    projector = other_projector("llava")
    save_file(projector.state_dict(), tmp_path / "negative.safetensors")
    run = run_of("llava", DCD(negative=str(tmp_path / "negative.safetensors")))
    same = run_of("llava", DCD(negative=projector))
    assert torch.equal(run.samples[1][0].images[0].features, same.samples[1][0].images[0].features)
    with pytest.raises(ParameterError, match="not those of"):
        run_of("llava", DCD(negative=torch.nn.Linear(3, 3)))
    zoo = tiny("llava")
    inputs = zoo.inputs(["is it"])
    pixels = inputs.pop("pixel_values")
    features = zoo.model.get_image_features(pixels, return_dict=True)
    attach(zoo.model, DCD(negative=projector))
    try:
        with pytest.raises(InputError, match="pixel_values"):
            zoo.model.generate(**inputs, mm_encoder_outputs={"image": features}, max_new_tokens=1)
    finally:
        detach(zoo.model)


def lora(model: torch.nn.Module) -> None:
    needs_adapters()
    from peft import LoraConfig

    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], r=2), adapter_name="amateur")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))


def test_lol_with_a_lora_amateur_runs_one_set_of_weights_both_ways():
    model = copy.deepcopy(tiny("llava").model)
    plain = copy.deepcopy(model)
    lora(model)
    inputs = tiny("llava").inputs(["is it a dog?", "ab"])
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    kept = Kept()
    attach(model, LOL(adapter="amateur", refocus=0.0), processor=tiny("llava").processor, recorder=kept)
    model.generate(**inputs, do_sample=False, max_new_tokens=1)
    seen = kept.run.lanes.last_step
    assert last_run(model).lanes == ((0,), (1,))
    detach(model)
    with torch.no_grad():
        base = plain(**inputs)
        features = plain.get_image_features(inputs["pixel_values"], return_dict=True)
        words = {key: value for key, value in inputs.items() if key != "pixel_values"}
        amateur = model(**words, mm_encoder_outputs={"image": features}, output_hidden_states=[2])
    torch.testing.assert_close(seen.logits[0, :, -1], base.logits[:, -1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.logits[1, :, -1], amateur.logits[:, -1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.hidden[2][1, :, -1], amateur.hidden_states[2][:, -1], atol=1e-5, rtol=1e-4)
    assert (base.logits - amateur.logits).abs().max() > 0.1
    assert {name: p.requires_grad for name, p in model.named_parameters()} == gradients
    with pytest.raises(UnsupportedError, match="'other'"):
        attach(model, LOL(adapter="other"), processor=tiny("llava").processor)
        model.generate(**inputs, max_new_tokens=1)
    detach(model)


def test_lol_with_another_model_uses_its_norm_and_head():
    zoo = tiny("llava")
    amateur = react(copy.deepcopy(zoo.model), seed=5)
    inputs = zoo.inputs(["is it a dog?", "ab"])
    kept = Kept()
    attach(zoo.model, LOL(model=amateur, refocus=0.0), processor=zoo.processor, recorder=kept)
    try:
        zoo.model.generate(**inputs, do_sample=False, max_new_tokens=1)
        seen = kept.run.lanes.last_step
    finally:
        detach(zoo.model)
    with torch.no_grad():
        features = zoo.model.get_image_features(inputs["pixel_values"], return_dict=True)
        words = {k: v for k, v in inputs.items() if k != "pixel_values"}
        out = amateur(**words, mm_encoder_outputs={"image": features}, output_hidden_states=[2])
        lower = amateur.lm_head(amateur.get_decoder().norm(out.hidden_states[2][:, -1]))
    torch.testing.assert_close(seen.logits[1, :, -1], out.logits[:, -1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.project(seen.hidden[2][1, :, -1], view=1), lower, atol=1e-5, rtol=1e-4)


def test_scmoe_sends_the_weak_rows_to_one_expert():
    zoo = tiny("qwen3_vl_moe")
    inputs = zoo.inputs(["is it a dog?", "ab"])
    routers = [m for m in zoo.model.modules() if type(m).__name__.endswith("TopKRouter")]
    seen = []
    zoo.model.generate(**inputs, do_sample=False, max_new_tokens=1)
    hooked = [len(router._forward_hooks) for router in routers]
    kept = Kept()
    attach(zoo.model, SCMoE(rank=2), recorder=kept)
    try:
        zoo.model.generate(**inputs, do_sample=False, max_new_tokens=2)
        logits = kept.run.lanes.last_step.logits
    finally:
        detach(zoo.model)
    assert [len(router._forward_hooks) for router in routers] == hooked
    assert (logits[0] - logits[1]).abs().max() > 1e-2

    # The weak branch by hand: every router gives rank 2 all the weight.
    def weak(module, args, output):
        scores, weights, experts = output
        seen.append(1)
        second = scores.topk(2, -1).indices[:, 1:]
        return scores, torch.tensor([[1.0, 0.0]]).expand_as(weights), torch.cat([second, experts[:, :1]], -1)

    first = zoo.inputs(["is it a dog?", "ab"])
    hooks = [router.register_forward_hook(weak) for router in routers]
    try:
        with torch.no_grad():
            want = zoo.model(**first).logits[:, -1]
    finally:
        for hook in hooks:
            hook.remove()
    kept = Kept()
    attach(zoo.model, SCMoE(rank=2), recorder=kept)
    try:
        zoo.model.generate(**first, do_sample=False, max_new_tokens=1)
        got = kept.run.lanes.last_step.logits[1, :, -1]
    finally:
        detach(zoo.model)
    assert len(seen) == len(routers)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_scmoe_needs_experts():
    with pytest.raises(UnsupportedError, match="mixture of experts"):
        attach(tiny("llava").model, SCMoE())


# What the formulas say of sums, their masks and their defaults.


def test_ritual():
    s = step(2, weights=[3.0])
    assert_scores(RITUAL(), s, lambda b, t, z: masked(z[0] + 3 * z[1], z[0], 0.1))


def test_vcd_and_ritual_add_up():
    s = step(3, weights=[-1.0, 3.0])
    both = (VCD() + RITUAL()).with_counts((1, 1))
    assert_scores(both, s, lambda b, t, z: masked(2 * z[0] - z[1] + 3 * z[2], z[0], 0.1))


def test_masks_relative_to_different_views_do_not_add():
    neutral = LQCD(form="neutral")
    for other in (VDD(), CODE(), DeCo(), SCMoE()):
        for pair in ((neutral, other), (other, neutral)):
            with pytest.raises(UnsupportedError, match=f"lqcd and {other.name} cannot be added with a mask each"):
                pair[0] + pair[1]
    s = step(3, weights=[-1.0, -1.0], scale=6.0)
    one = [
        (VDD(beta=None) + neutral).with_counts((1, 1)),
        (VDD() + LQCD(form="neutral", beta=None)).with_counts((1, 1)),
    ]
    # On these logits the two masks that are refused together have no token in common somewhere.
    kept = [method.kept_tokens(s) for method in one]
    assert not (kept[0] & kept[1]).any(-1).all()
    for method in (*one, (VDD() + LQCD() + SCMoE() + CODE()).with_counts((1, 1, 1, 1))):
        out = method.scores(s if len(method.counts) == 2 else step(5, weights=[-1.0] * 4))
        assert (out > -BELOW / 2).any(-1).all()


#: What the specification of each method says of its numbers.
DEFAULTS = {
    "mask": dict(beta=0.1),
    "vcd": dict(alpha=1.0, beta=0.1, noise_step=500),
    "ritual": dict(alpha=3.0, beta=0.1),
    "icd": dict(alpha=1.0, beta=0.1),
    "m3id": dict(decay=0.02, beta=0.1, threshold=None, cap=None, first=1),
    "lqcd": dict(alpha=1.0, beta=0.1),
    "cad": dict(alpha=0.5, beta=None),
    "vdd": dict(alpha=1.0, beta=0.1, unknown_id=0),
    "code": dict(eta=0.7, max_description=512),
    "pai": dict(alpha=0.2, gamma=1.1, beta=0.1, first_layer=2),
    "sid": dict(alpha=1.0, beta=0.1, rank_layer=1, share=100 / 576),
    "avisc": dict(alpha=1.0, beta=0.1, gamma=0.5, deviations=1.0),
    "damro": dict(alpha=None, beta=0.1, k=None),
    "crops": dict(
        decay=0.01,
        alpha=1.0,
        beta=0.1,
        gate=0.95,
        cap=None,
        rank_layer=1,
        share=0.25,
        text_tokens=(10, 40),
        text_rate=0.001,
    ),
    "mod": dict(positive=4.0, negative=1.0, beta=0.5, share=0.2, threshold=0.05),
    "cicd": dict(alpha=3.0, beta=0.1, threshold=1e-4),
    "layercd": dict(alpha=1.0, beta=0.1, layer=1),
    "only": dict(positive=3.0, negative=1.0, gamma=0.2, beta=0.1, layer=0),
    "dcd": dict(alpha=1.0, beta=0.1),
    "dola": dict(beta=0.1),
    "deco": dict(alpha=0.6, layers=None, top_k=20, top_p=0.9),
    "lol": dict(strength=0.5, lower_strength=0.5, fusion=0.5, refocus=0.5, layer=None, beta=0.1),
    "uscd": dict(alpha=0.5, beta=0.1, threshold=0.9),
    "spin": dict(share=0.95, damp=0.08, layers=None),
    "vaf": dict(enhance=1.15, suppress=0.95, layers=None),
    "hgai": dict(alpha=0.5, layers=None),
    "vista": dict(strength=0.17, gamma=0.3, window=None, layers=None),
    "vti": dict(text=0.8, layers=None, image=0.0),
    "nullu": dict(rank=4, layers=None),
    "revis": dict(strength=2.5, threshold=0.2, layer=None),
    "memvr": dict(ratio=0.12, threshold=0.75, layers=None),
    "cai": dict(threshold=0.15, first_layer=None, gamma=None, beta=0.1),
    "causalmm": dict(alpha=1.0, beta=0.1),
    "ilvad": dict(alpha=5.0, tau=5.0, tokens=10, layers=None),
    "scmoe": dict(alpha=0.5, beta=0.1, rank=2, strong_temperature=1.0, weak_temperature=1.0),
}


@pytest.mark.parametrize("name", [name for name in METHODS if not hasattr(load(name), "decode") and name != "plain"])
def test_numbers_default_to_the_specification(name):
    """A parameter whose default is a number, or that may be a number, is in the table above."""
    numeric = {
        field.name: field.default
        for field in dataclasses.fields(load(name))
        if any(kind in str(field.type) for kind in ("int", "float")) and "Literal" not in str(field.type)
    }
    assert numeric == DEFAULTS[name]


def test_damro_defaults_to_the_authors_values_of_the_family():
    for family, k, alpha in (("llava", 10, 2.0), ("llava_next", 10, 2.0), ("instructblip", 4, 0.5)):
        assert authors(family_of(tiny(family).model))[:2] == (k, alpha)
    run = run_of("llava", DAMRO())
    assert len(run.samples[1][0].images[0].features) == 10 and run.views[0].weight == -2.0
    run = run_of("llava", DAMRO(k=3, alpha=FAINT))
    assert len(run.samples[1][0].images[0].features) == 3 and run.views[0].weight == -FAINT
    assert run_of("instructblip", DAMRO()).views[0].weight == -0.5


def test_vcd_noise_schedule():
    """Signal left of the image, as the specification tabulates the authors' code."""
    kept = kept_share("code").sqrt()
    table = {0: 1.0, 100: 0.9983, 300: 0.9810, 500: 0.8630, 700: 0.5927, 999: 0.2850}
    for at, want in table.items():
        assert round(float(kept[at]), 4) == want
    assert float(kept_share("paper")[500].sqrt()) < 1e-11
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noise = diffuse(x, 500, "code", torch.Generator().manual_seed(1)) - kept[500] * x
    assert abs(float(noise.std()) - 0.5052) < 0.01


def test_sid_hides_all_but_a_share_of_the_authors_image():
    assert round(SID().share * 576) == 100
    with pytest.raises(UnknownNameError, match="fast_v_agg_layer"):
        SID(fast_v_agg_layer=2)


# The second image of a prompt.


def test_avisc_judges_the_tokens_of_all_images_together():
    zoo = tiny("llava")
    inputs = zoo.batch([zoo.row("ab", 1, seed=9), zoo.row("is it", 2, seed=1)])
    method = AvisC(deviations=0.5)
    run = Run(zoo.model, method, inputs, processor=zoo.processor, seed=0)
    attention = eager_rows("llava", inputs).mean(2)[:, 1][:, inputs["input_ids"][1] == IMAGE]
    blind = method.blind(attention).split([16, 16])
    assert all(0 < int(part.sum()) < 16 for part in blind) and not torch.equal(*blind)
    for own, view, keep in zip(run.samples[0][1].images, run.samples[1][1].images, blind):
        torch.testing.assert_close(view.features, own.features * keep[:, None])


def test_avisc_leaves_an_image_of_one_token_alone():
    """Its deviation is not a number; the authors' code falls back on view 0."""
    assert AvisC().blind(torch.tensor([[0.2], [0.3]])).tolist() == [True]


def test_lol_leaves_the_users_own_adapter_on_for_the_model():
    """View 0 is the model as the user has it, without the amateur; the amateur is its adapter alone."""
    needs_adapters()
    from peft import LoraConfig

    model = copy.deepcopy(tiny("llava").model)
    generator = torch.Generator().manual_seed(1)
    for name in ("mine", "amateur"):
        model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], r=2), adapter_name=name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)
    inputs = tiny("llava").inputs(["is it a dog?"])
    words = {key: value for key, value in inputs.items() if key != "pixel_values"}
    want = {}
    with torch.no_grad():
        model.set_adapter("mine")
        features = model.get_image_features(inputs["pixel_values"], return_dict=True)
        for name in ("mine", "amateur"):
            model.set_adapter(name)
            image = {"image": copy.deepcopy(features)}
            want[name] = model(**words, mm_encoder_outputs=image).logits[0, -1]
    for active in (["mine"], ["mine", "amateur"]):
        model.set_adapter(active)
        kept = Kept()
        attach(model, LOL(adapter="amateur", refocus=0.0), processor=tiny("llava").processor, recorder=kept)
        try:
            model.generate(**inputs, do_sample=False, max_new_tokens=1)
            seen = kept.run.lanes.last_step.logits[:, 0, -1]
        finally:
            detach(model)
        torch.testing.assert_close(seen[0], want["mine"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen[1], want["amateur"], atol=1e-5, rtol=1e-4)
        assert model.active_adapters() == active
    assert (want["mine"] - want["amateur"]).abs().max() > 0.1


def test_lqcd_neutral_decides_no_step_by_the_users_own_query():
    """Where the mask on view 0 leaves one token, that of the neutral query may want another."""
    method = LQCD(form="neutral", beta=0.3)
    s = step(2, scale=6.0)
    alone = plausible_tokens(s.logits[0], 0.3).sum(-1) == 1
    assert alone.any() and not torch.equal(method.scores(s).argmax(-1)[alone], s.logits[0].argmax(-1)[alone])
