"""Random cases of a call (method, family, batch, padding, dtype, mode), and what must hold of every one."""

import copy
import functools
from dataclasses import dataclass

import torch
from contract import FAMILIES, NAMES, method_of, refusal
from hypothesis import strategies as st

from lvlm_decode import attach, detach
from lvlm_decode.errors import UnsupportedError
from lvlm_decode.method import BELOW
from lvlm_decode.testing.models import IMAGE, VIDEO, VISION_END, VISION_START, tiny

MODES = {
    "greedy": {},
    "sampled": dict(do_sample=True, temperature=1.5),
    "beams": dict(num_beams=2),
    "lookup": dict(prompt_lookup_num_tokens=2),
    "automaton": dict(drafter="automaton"),
    "recycling": dict(drafter="recycling"),
    "static": dict(cache_implementation="static"),
    "sequential": dict(execution="sequential"),
}
#: Modes whose answer is that of greedy decoding.
AS_GREEDY = ("lookup", "automaton", "recycling", "static", "sequential")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
#: In which two ways to one sum may differ by more than what lies between two tokens.
COARSE = ("bfloat16",)


@dataclass(frozen=True)
class Drawn:
    """One case. ``texts`` and ``images`` have an entry for each row; ``pads`` stand before the longest."""

    name: str
    family: str
    mode: str
    dtype: str
    texts: tuple[str, ...]
    images: tuple[int, ...]
    pads: int
    tokens: int
    seed: int


@functools.cache
def model_of(family, dtype):
    return tiny(family).model if dtype == "float32" else copy.deepcopy(tiny(family).model).to(DTYPES[dtype])


@st.composite
def cases(draw):
    family = draw(st.sampled_from(FAMILIES))
    name = draw(st.sampled_from([name for name in NAMES if refusal(name, family) is None]))
    mode = draw(st.sampled_from([mode for mode in MODES]))
    zoo, count = tiny(family), 1 if mode == "lookup" else draw(st.integers(1, 3))
    texts = tuple(draw(st.text("abcdefgh is?", min_size=1, max_size=12)) for _ in range(count))
    # A batch without any image is one of text; InstructBLIP has none.
    images = tuple(draw(st.integers(0 if zoo.text_only else 1, zoo.max_images)) for _ in range(count))
    # torch multiplies the experts of a mixture in no more than 32 bits.
    dtype = "float32" if "moe" in family else draw(st.sampled_from(list(DTYPES)))
    return Drawn(
        name,
        family,
        mode,
        dtype,
        texts,
        images,
        draw(st.integers(0, 3)),
        draw(st.integers(1, 5)),
        draw(st.integers(0, 99)),
    )


def call(case, order=None, **how):
    """(tokens (B, T), scores (T, B, N) or ``None``) of the case, its rows in ``order``."""
    zoo, model = tiny(case.family), model_of(case.family, case.dtype)
    order = list(range(len(case.texts))) if order is None else order
    inputs = zoo.batch([zoo.row(case.texts[n], case.images[n], seed=case.seed + n) for n in order])
    for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = torch.nn.functional.pad(inputs[key], (case.pads, 0))
    options = {"do_sample": False, "max_new_tokens": case.tokens, "min_new_tokens": case.tokens} | how
    options["suppress_tokens"] = [IMAGE, VIDEO, VISION_START, VISION_END]
    attached = {key: options.pop(key) for key in ("drafter", "execution") if key in options}
    if "num_beams" not in options or not options["do_sample"]:
        options["seed"] = case.seed
    attach(model, method_of(case.name, case.family), processor=zoo.processor, **attached)
    try:
        out = model.generate(
            **inputs, sample_ids=list(order), return_dict_in_generate=True, output_logits=True, **options
        )
    finally:
        detach(model)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits)


def finite(case, tokens, scores):
    """No NaN, something to choose at every step, and the answer is what was asked for."""
    assert not scores.isnan().any() and bool((scores > -BELOW / 2).any(-1).all())
    assert tokens.shape == (len(case.texts), case.tokens)
    return True


def permuted(case, tokens, scores):
    """The rows of a batch in another order answer the same."""
    if case.dtype in COARSE or len(case.texts) == 1:
        return False
    order = list(range(len(case.texts)))[::-1]
    other, _ = call(case, order, **MODES[case.mode])
    assert torch.equal(other, tokens[order])
    return True


def alone(case, tokens, scores):
    """Every row answers by itself what it answers beside others, whatever pads stand before it."""
    if case.dtype in COARSE or len(case.texts) == 1:
        return False
    for row in range(len(case.texts)):
        assert torch.equal(call(case, [row], **MODES[case.mode])[0], tokens[row : row + 1])
    return True


def as_greedy(case, tokens, scores):
    """Drafts, a static cache and views one after the other change no answer."""
    if case.dtype in COARSE or case.mode not in AS_GREEDY:
        return False
    assert torch.equal(call(case)[0], tokens)
    return True


def repeated(case, tokens, scores):
    """The same call answers the same, and the model has nothing on it afterwards."""
    model = model_of(case.family, case.dtype)
    before = set(model.__dict__)
    assert torch.equal(call(case, **MODES[case.mode])[0], tokens)
    assert set(model.__dict__) == before and "generate" not in model.__dict__
    return True


#: Each raises where it does not hold, and says whether the case is one that it looks at.
PROPERTIES = (finite, permuted, alone, as_greedy, repeated)


def hold(case, counts=None):
    """Raise where a property of the case does not hold; ``counts`` notes which were looked at."""
    try:
        tokens, scores = call(case, **MODES[case.mode])
    except UnsupportedError:
        # A cache with a sliding window takes no draft back, and is refused in words; nothing else may be.
        if "drafter" not in MODES[case.mode]:
            raise
        if counts is not None:
            counts["refused"] = counts.get("refused", 0) + 1
        return
    for check in PROPERTIES:
        if check(case, tokens, scores) and counts is not None:
            counts[check.__name__] = counts.get(check.__name__, 0) + 1
