"""Draft heads: what each flag does to the slots, and that decoding runs what the module says."""

import contextlib
import copy
import dataclasses
import functools
import math

import pytest
import torch
from helpers import Kept, full_but
from torch.nn import functional as F

from lvlm_decode.attachment import attach, detach
from lvlm_decode.engine.sampling import gumbel
from lvlm_decode.errors import InputError, LvlmDecodeError, ParameterError, UnknownNameError
from lvlm_decode.methods import parse
from lvlm_decode.speculative import drafters
from lvlm_decode.speculative.features import watched
from lvlm_decode.speculative.heads import KINDS, DraftHead, HeadConfig, fingerprint, shipped
from lvlm_decode.speculative.heads.runner import HeadRunner
from lvlm_decode.testing import models as zoo
from lvlm_decode.testing.replay import Replay

SIZES = {
    "hidden_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "vocab_size": 40,
}


def head_of(kind, seed=0, **more):
    torch.manual_seed(seed)
    more = {"states": (1, 2, 3)} | more if kind == "eagle3" else more
    head = DraftHead(HeadConfig(**{**SIZES, "kind": kind, **KINDS[kind], **more})).double().eval()
    if head.config.use_global:
        torch.nn.init.normal_(head.img_fc.weight, std=0.2)
    return head


#: Two rows: two images of unlike length; left padding and one image.
IMAGE = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]]).bool()
MASK = torch.tensor([[1] * 10, [0, 0, *[1] * 8]]).bool()


def prompt(seed=1):
    torch.manual_seed(seed)
    return torch.randn(2, 10, 16).double(), torch.randn(2, 10, 16).double()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_slots_hold(kind):
    head = head_of(kind)
    embeds, features = prompt()
    slots = head.slots(embeds, features, IMAGE, MASK)
    assert torch.equal(slots.positions[1], torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6, 7]))
    text = MASK & ~IMAGE
    if kind == "eagle":
        assert torch.equal(slots.seen, MASK)
        torch.testing.assert_close(slots.z, head.fc(torch.cat([embeds, features], -1)))
    if kind == "eagle3":
        assert torch.equal(slots.seen, MASK)
        torch.testing.assert_close(slots.z, torch.cat([F.rms_norm(embeds, (16,), eps=1e-5), features], -1))
    if kind == "msd":
        assert torch.equal(slots.seen, MASK)
        torch.testing.assert_close(slots.z[IMAGE], embeds[IMAGE])
        torch.testing.assert_close(slots.z[text], head.fc(torch.cat([embeds, features], -1))[text])
    if kind == "vispec":
        # One slot stands for each image, at its last position; text keeps its own positions.
        assert slots.seen[0].tolist() == [1, 0, 0, 1, 1, 1, 0, 1, 1, 1]
        assert slots.seen[1].tolist() == [0, 0, 1, 0, 0, 0, 1, 1, 1, 1]
        every = torch.ones(1, 3, dtype=torch.bool)
        first = head.imadpt(embeds[:1, 1:4], every)[0]
        second = head.imadpt(embeds[:1, 6:8], every[:, :2])[0]
        torch.testing.assert_close(slots.z[0, 3], first[0])
        torch.testing.assert_close(slots.z[0, 7], second[0])
        # No global vector before the first image, its own after each.
        expected = [torch.zeros(16).double(), *[first[1]] * 2, *[second[1]] * 2]
        for at, g in zip((0, 4, 5, 8, 9), expected):
            joined = head.img_fc(torch.cat([features[0, at], g]))
            torch.testing.assert_close(slots.z[0, at], head.fc(torch.cat([embeds[0, at], joined])))
        torch.testing.assert_close(slots.g[0], second[1])


def test_a_new_vispec_head_is_an_eagle_head_on_text():
    torch.manual_seed(0)
    vispec = DraftHead(HeadConfig(**{**SIZES, **KINDS["vispec"]})).double()
    eagle = DraftHead(HeadConfig(**{**SIZES, **KINDS["eagle"]})).double()
    eagle.load_state_dict({k: v for k, v in vispec.state_dict().items() if k in eagle.state_dict()})
    embeds, features = prompt()
    none = torch.zeros_like(IMAGE)
    torch.testing.assert_close(
        vispec(vispec.slots(embeds, features, none, MASK)), eagle(eagle.slots(embeds, features, none, MASK))
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_padding_changes_nothing(kind):
    head = head_of(kind)
    embeds, features = prompt()
    padded = head(head.slots(embeds, features, IMAGE, MASK))
    alone = head(head.slots(embeds[1:, 2:], features[1:, 2:], IMAGE[1:, 2:], MASK[1:, 2:]))
    seen = head.slots(embeds, features, IMAGE, MASK).seen[1, 2:]
    torch.testing.assert_close(padded[1:, 2:][:, seen], alone[:, seen])


def test_images_too_short_to_compress_are_refused():
    head = head_of("vispec", queries=4)
    embeds, features = prompt()
    with pytest.raises(InputError, match="image of 2 tokens cannot be compressed to 3"):
        head.slots(embeds, features, IMAGE, MASK)
    with pytest.raises(ParameterError, match="queries = 1"):
        HeadConfig(**SIZES, queries=1)
    with pytest.raises(ParameterError, match="image = 'crop'"):
        HeadConfig(**SIZES, image="crop")


def test_dropped_images_are_not_seen():
    head = head_of("msd", image="drop")
    embeds, features = prompt()
    one = head(head.slots(embeds, features, IMAGE, MASK))
    other = embeds.clone()
    other[IMAGE] = 7.0
    two = head(head.slots(other, features, IMAGE, MASK))
    text = MASK & ~IMAGE
    torch.testing.assert_close(one[text], two[text])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_folded_weights_are_the_modules(kind):
    tiny = zoo.tiny("llava")
    model = copy.deepcopy(tiny.model).double()
    torch.manual_seed(0)
    head = DraftHead(HeadConfig.for_target(model, kind)).double()
    if head.config.use_global:
        torch.nn.init.normal_(head.img_fc.weight, std=0.2)
        torch.nn.init.normal_(head.img_fc.bias)
    runner = HeadRunner(head, model)
    width = head.config.hidden_size
    tokens, features = torch.randint(0, zoo.VOCABULARY, (2, 3)), torch.randn(2, 3, width).double()
    g = torch.randn(2, width).double() if head.config.use_global else None
    slots = dataclasses.replace(head.slots(features, features, torch.zeros(2, 3).bool(), torch.ones(2, 3).bool()), g=g)
    expected = head.text_slots(model.get_input_embeddings()(tokens), features, None if g is None else g[:, None])
    torch.testing.assert_close(runner.inputs(tokens, features, runner.constant(slots)), expected)


def recorded(model, drafter, inputs, method="plain", tokens=10, instead=None, **options):
    """What a run drafted: per cycle the texts, the session's guess (R, 1, D) and the tree; and the prompts of every view.

    Drafts of ``instead`` are verified if it is given: a random head's own are hardly ever accepted.
    """
    cycles, begin = [], type(drafter).begin

    def spied(context):
        session = begin(drafter, context)
        propose = session.propose
        other = None if instead is None else instead.begin(context)

        def wrapped(room):
            guess, tree = session.guess.clone(), propose(room)
            cycles.append(([list(text) for text in context.tokens], guess, tree))
            return tree if other is None else other.propose(room)

        session.propose = wrapped
        return session

    drafter.begin = spied
    how = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [zoo.IMAGE], **options}
    kept = Kept()
    with attach_for(model, method, drafter=drafter, recorder=kept):
        model.generate(**inputs, max_new_tokens=tokens, **how)
        return cycles, kept.run.lanes.main.prepared


@contextlib.contextmanager
def attach_for(model, method, **options):
    attach(model, parse(method), processor=zoo.tiny("llava").tokenizer, **options)
    try:
        yield
    finally:
        detach(model)


def head_and_model(kind, **head_options):
    model = copy.deepcopy(zoo.tiny("llava").model).double()
    torch.manual_seed(0)
    head = DraftHead(HeadConfig.for_target(model, kind, **head_options)).double()
    if head.config.use_global:
        torch.nn.init.normal_(head.img_fc.weight, std=0.2)
    # So that what a slot sees, and from where, decides what it guesses.
    for projection in (head.layer.self_attn.q_proj, head.layer.self_attn.k_proj, head.layer.self_attn.o_proj):
        torch.nn.init.normal_(projection.weight, std=0.4)
    return model, head


def inputs_of(texts, images):
    inputs = zoo.tiny("llava").inputs(texts, images=images, seed=5)
    return inputs | {"pixel_values": inputs["pixel_values"].double()}


class ByHand:
    """The head over one whole text per view, from true features of what is committed and its own of what is drafted.

    Args:
        texts: per view the ids of the prompt without padding, then of what is committed.
        pixels: of the sample.
        score: (V, N) logits -> (N,) scores.
    """

    def __init__(self, model, head, texts, pixels, score=lambda logits: logits[0]):
        self.model, self.head, self.score, self.views = model, head, score, []
        for ids in texts:
            ids = torch.tensor([ids])
            with watched(model, head.config.states) as watcher:
                model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))
            embeds, features = watcher.embeds, watcher.hidden
            if head.config.kind == "eagle3":
                # The placeholder's own embedding stands for an image; three states of the target for a feature.
                embeds = model.get_input_embeddings()(ids)
                features = head.fc(torch.cat([watcher.layers[layer] for layer in head.config.states], -1))
            self.views.append((embeds[:, 1:], features[:, :-1], ids[:, 1:] == zoo.IMAGE))

    def guess(self, path=()):
        """(V, D) guessed features after drafting ``path``."""
        last = []
        for embeds, features, image in self.views:
            for token in (*path, None):
                guess = self.head(self.head.slots(embeds, features, image, torch.ones_like(image)))[:, -1:]
                if token is not None:
                    embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([[token]]))], 1)
                    features, image = torch.cat([features, guess], 1), F.pad(image, (0, 1))
            last.append(guess[0, -1])
        return torch.stack(last)

    def logprobs(self, path):
        """(N,) of the token after ``path``."""
        guess, out = self.guess(path), self.model.get_output_embeddings()
        if self.head.config.kind == "eagle3":
            guess, out = self.head.norm(guess), self.head.lm_head
        return self.score(out(guess)).log_softmax(-1)


def whole_texts(captured, b, text):
    """Per view the ids that sample ``b`` has with what ``text``, its own, holds beyond the prompt."""
    prompts = [c.input_ids[b][c.mask[b].bool()].tolist() for c in captured]
    return [[*prompt, *text[len(prompts[0]) :]] for prompt in prompts]


def decoding(captured, cycle, tokens=10):
    """The samples that are not finished in this cycle, with their texts."""
    lengths = captured[0].mask.sum(1).tolist()
    return [(b, text) for b, text in enumerate(cycle[0]) if len(text) - lengths[b] < tokens]


def pixels_of(inputs, images, b):
    counts = [images] * len(inputs["input_ids"]) if isinstance(images, int) else images
    return inputs["pixel_values"][sum(counts[:b]) : sum(counts[: b + 1])]


CHAIN, TREE = {"top_k": 1, "depth": 3}, {"top_k": 2, "depth": 3, "rows": 6}


@pytest.mark.parametrize("method", full_but(["plain", "icd"], ["icd"]))
@pytest.mark.parametrize(
    "texts, images", [(["is it"], 1), (["is it", "what is in"], [2, 1])], ids=["one", "padded batch"]
)
@pytest.mark.parametrize("how", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", sorted(KINDS))
@torch.no_grad()
def test_a_session_guesses_what_the_module_guesses_from_true_features(kind, how, texts, images, method):
    """After every cycle the head's cache holds true features alone: its guess is that of one pass over the whole text.

    With ICD the head runs on both views, the second of which has the longer prompt.
    """
    model, head = head_and_model(kind)
    inputs = inputs_of(texts, images)
    drafter = drafters.get(kind)(head=head, contrast=method == "icd", **how)
    greedy = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "suppress_tokens": [zoo.IMAGE]}
    with attach_for(model, method):
        answers = model.generate(**inputs, **greedy)[:, inputs["input_ids"].shape[1] :].tolist()
    # Accepted rows that do not stand next to each other, as many as not for each sample.
    known = Replay(answers=answers, acceptance=0.6, width=1 if how is CHAIN else 3, tokens=3)
    cycles, captured = recorded(model, drafter, inputs, method, instead=known)
    assert len(cycles) > 2 and len(captured) == (2 if method == "icd" else 1)
    for cycle in cycles:
        for b, text in decoding(captured, cycle):
            hand = ByHand(model, head, whole_texts(captured, b, text), pixels_of(inputs, images, b))
            own = cycle[1][b :: len(texts), -1]
            torch.testing.assert_close(own, hand.guess(), atol=1e-6, rtol=1e-5)


def contrasted(logits, alpha=1.0, beta=0.1):
    """(V, N) -> (N,) ICD's scores, written out."""
    scores = (1 + alpha) * logits[0] - alpha * logits[1]
    return scores.masked_fill(logits[0].softmax(-1) < beta * logits[0].softmax(-1).max(), float("-inf"))


def chain_by_hand(hand, depth, log_stop=-math.inf, choose=lambda level, scores: int(scores.argmax())):
    """The paths of its rows, the root's empty one left out. ``choose`` (level, log-probabilities) -> token."""
    path, value = (), 0.0
    while len(path) < depth and value >= log_stop:
        logprobs = hand.logprobs(path)
        path += (choose(len(path), logprobs),)
        value += float(logprobs[path[-1]])
    return {path[: n + 1] for n in range(len(path))}


def tree_by_hand(hand, depth, k, rows, log_stop=-math.inf):
    """EAGLE-2's tree: the paths of its rows, the root's empty one left out."""
    frontier, pool = [((), 0.0)], []
    for _ in range(depth):
        if frontier[0][1] < log_stop:
            break
        children = []
        for path, value in frontier:
            best = hand.logprobs(path).topk(k)
            children += [((*path, int(t)), value + float(v)) for v, t in zip(*best) if v > float("-inf")]
        pool += children
        frontier = sorted(children, key=lambda entry: -entry[1])[:k]
    return {path for path, _ in sorted(pool, key=lambda entry: -entry[1])[: rows - 1]}


def paths_of(tree, b):
    shape, tokens = tree.shape(b), tree.lists[b]
    rows = [row for row in range(1, len(shape)) if tokens[row] >= 0]
    return {tuple(tokens[r] for r in shape.path(row)[1:]) for row in rows}


@pytest.mark.parametrize("method", full_but(["plain", "icd"], ["icd"]))
@pytest.mark.parametrize(
    "texts, images", [(["is it"], 1), (["is it", "what is in"], [2, 1])], ids=["one", "padded batch"]
)
@pytest.mark.parametrize("how", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", ["vispec", "eagle3"])
@torch.no_grad()
def test_drafts_are_those_computed_by_hand(kind, how, texts, images, method):
    """Chains and trees of the head alone, and contrast-aware ones: from the scores of its guesses for both views."""
    model, head = head_and_model(kind)
    inputs = inputs_of(texts, images)
    drafter = drafters.get(kind)(head=head, contrast=method == "icd", **how)
    cycles, captured = recorded(model, drafter, inputs, method)
    others = 0
    for cycle in cycles[:4]:
        tree = cycle[2]
        for b, text in decoding(captured, cycle):
            score = contrasted if method == "icd" else lambda logits: logits[0]
            hand = ByHand(model, head, whole_texts(captured, b, text), pixels_of(inputs, images, b), score)
            draft = functools.partial(chain_by_hand, depth=3)
            if how is TREE:
                draft = functools.partial(tree_by_hand, depth=3, k=2, rows=6)
            assert paths_of(tree, b) == draft(hand)
            hand.score = lambda logits: logits[0]
            others += paths_of(tree, b) != draft(hand)
    assert (others > 0) == (method == "icd"), "the contrast must show in the draft"


@pytest.mark.parametrize("how", [CHAIN, TREE], ids=["chain", "tree"])
@torch.no_grad()
def test_the_confidence_stop_of_heads(how):
    """Nothing follows a path whose probability, as the head sees it, is below the stop."""
    model, head = head_and_model("vispec")
    inputs = inputs_of(["is it"], 1)
    stop = 0.02 if how is CHAIN else 0.08
    cycles, captured = recorded(model, drafters.get("vispec")(head=head, stop=stop, **how), inputs)
    depths = set()
    for cycle in cycles:
        hand = ByHand(model, head, whole_texts(captured, 0, cycle[0][0]), inputs["pixel_values"])
        limits = {"depth": min(3, 10 - 1 - len(cycle[0][0]) + inputs["input_ids"].shape[1]), "log_stop": math.log(stop)}
        expected = chain_by_hand(hand, **limits) if how is CHAIN else tree_by_hand(hand, k=2, rows=6, **limits)
        assert paths_of(cycle[2], 0) == expected
        depths.add(max(map(len, expected), default=0))
    assert len(depths & {1, 2, 3}) > 1, "a stop that never or always stops shows nothing"


SUPPRESSED = [0, 7, 8, 9, 14, 21, 28, 56, 63, 77, 84, 91, zoo.IMAGE]


def drawn_by_hand(seed, row, position, logprobs, temperature=0.7, top_k=30):
    """Log-probabilities under the processors of a sampling run, and with its noise."""
    scores = logprobs.clone()
    scores[SUPPRESSED] = -math.inf
    scores = scores / temperature
    scores[scores < scores.topk(top_k).values[-1]] = -math.inf
    return scores.log_softmax(-1), scores + gumbel(seed, row, position, len(scores))


@torch.no_grad()
@pytest.mark.parametrize("stop", [0.0, 0.1])
def test_a_trimmed_head_in_sampling_sees_the_processors_and_the_noise_of_the_whole_vocabulary(stop):
    """Suppressed tokens are told by their ids, not by where they stand in the trimmed vocabulary; nor is the noise.

    The confidence stop asks for probabilities before the noise, which would make any token look certain.
    """
    model, head = head_and_model("vispec")
    allowed = torch.arange(0, zoo.VOCABULARY, 7)
    trimmed = DraftHead(head.config, trim=allowed).double()
    trimmed.load_state_dict(head.state_dict() | {"trim": allowed})
    inputs = inputs_of(["is it"], 1)
    width = inputs["input_ids"].shape[1]
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 1.0, "seed": 3, "sample_ids": ["one"]}
    drafter = drafters.get("vispec")(head=trimmed, top_k=1, depth=3, stop=stop)
    cycles, captured = recorded(model, drafter, inputs, suppress_tokens=SUPPRESSED, **sampling)
    outside = torch.ones(zoo.VOCABULARY, dtype=torch.bool).index_fill_(0, allowed, False)
    lengths = set()
    for cycle in cycles:
        at = len(cycle[0][0]) - width

        def score(logits):
            return logits[0].masked_fill(outside, -math.inf)

        hand = ByHand(model, head, whole_texts(captured, 0, cycle[0][0]), inputs["pixel_values"], score)
        path, value = (), 0.0
        while len(path) < min(3, 10 - 1 - at) and not (stop and value < math.log(stop)):
            plain, noisy = drawn_by_hand(3, "one", at + len(path), hand.logprobs(path))
            path += (int(noisy.argmax()),)
            value += float(plain[path[-1]])
        assert paths_of(cycle[2], 0) == {path[: n + 1] for n in range(len(path))}
        assert not set(path) & set(SUPPRESSED)
        lengths.add(len(path))
    assert not stop or (1 in lengths and len(lengths) > 1)


@pytest.mark.parametrize("more", [{}, {"top_p": 0.9, "min_p": 0.05}, {"renormalize_logits": True}], ids=str)
@pytest.mark.parametrize("how", [CHAIN, {**CHAIN, "stop": 0.3}, TREE, {**TREE, "stop": 0.3}], ids=str)
def test_a_trimmed_head_of_which_nothing_is_left(how, more):
    model, head = head_and_model("msd")
    allowed = torch.arange(0, zoo.VOCABULARY, 7)
    trimmed = DraftHead(head.config, trim=allowed).double()
    inputs = inputs_of(["is it"], 1)
    options = {"do_sample": True, "seed": 3, "suppress_tokens": allowed.tolist(), "eos_token_id": None, **more}
    with attach_for(model, "plain"):
        expected = model.generate(**inputs, max_new_tokens=8, **options)
    with attach_for(model, "plain", drafter=drafters.get("msd")(head=trimmed, **how)):
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, **options), expected)
    cycles, _ = recorded(model, drafters.get("msd")(head=trimmed, **how), inputs, tokens=8, **options)
    # A tree leaves out what cannot be chosen; a chain notices once it asks how sure it is.
    most = 0 if how["top_k"] > 1 else 1 if "stop" in how else 3
    assert all(len(paths_of(tree, 0)) <= most for _, _, tree in cycles)


def test_a_trimmed_head_drafts_only_its_tokens():
    tiny = zoo.tiny("llava")
    torch.manual_seed(0)
    allowed = torch.arange(0, zoo.VOCABULARY, 7)
    head = DraftHead(HeadConfig.for_target(tiny.model, "msd", top_k=2, depth=3, rows=6), trim=allowed)
    drafter, seen = drafters.get("msd")(head=head), set()
    begin = type(drafter).begin

    def spied(context):
        session = begin(drafter, context)
        propose = session.propose

        def wrapped(room):
            tree = propose(room)
            seen.update(tree.lists[0][1:])
            return tree

        session.propose = wrapped
        return session

    drafter.begin = spied
    attach(tiny.model, parse("plain"), drafter=drafter)
    try:
        tiny.model.generate(**tiny.inputs(["is it"]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    finally:
        detach(tiny.model)
    assert seen and seen <= set(allowed.tolist())


def test_saving_and_loading(tmp_path):
    tiny = zoo.tiny("llava")
    for trim in (None, torch.tensor([1, 5, 9])):
        head = DraftHead(HeadConfig.for_target(tiny.model, "vispec", rows=5, depth=4, top_k=1), trim=trim)
        head.save_pretrained(tmp_path)
        again = DraftHead.from_pretrained(tmp_path)
        assert again.config == head.config and again.config.fingerprint == fingerprint(tiny.model)
        for name, value in head.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    drafter = drafters.parse(f"vispec(path={tmp_path},depth=2)")
    assert drafter.depth == 2 and drafter.head.config == head.config
    with pytest.raises(InputError, match=r"no draft head.*train draft-head"):
        DraftHead.from_pretrained(tmp_path / "missing")
    with pytest.raises(InputError, match="of kind 'vispec'"):
        drafters.parse(f"msd(path={tmp_path})")
    with pytest.raises(InputError, match="no msd head ships for this model"):
        shipped(tiny.model, "msd")
    with pytest.raises(UnknownNameError, match="medusa"):
        HeadConfig.for_target(tiny.model, "medusa")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_model_has_one_fingerprint_in_every_dtype(stored):
    """Also with weights so small that float16 rounds them."""
    model = copy.deepcopy(zoo.tiny("llava").model)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[:, :4] *= 1e-5
        weight.copy_(weight.to(stored))
    names = {fingerprint(copy.deepcopy(model).to(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    assert len(names) == 1
    with torch.no_grad():
        weight[0, 5] += 0.1
    assert fingerprint(model) not in names


def test_a_head_for_another_width_is_refused():
    tiny = zoo.tiny("llava")
    head = DraftHead(HeadConfig(**SIZES, kind="msd"))
    attach(tiny.model, parse("plain"), drafter=drafters.get("msd")(head=head))
    try:
        with pytest.raises(LvlmDecodeError, match="width 16 and 40 tokens"):
            tiny.model.generate(**tiny.inputs(["is it"]), max_new_tokens=3)
    finally:
        detach(tiny.model)
