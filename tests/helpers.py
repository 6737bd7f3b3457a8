"""What several test files share beside what ``lvlm_decode.testing`` has."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StoppingCriteria

from lvlm_decode.engine import hf
from lvlm_decode.engine.recorder import Recorder

#: Letters of the tiny tokenizers that end a trial of CNTP, frequent enough for short answers.
MARKS = "aeiou.,AEIOU01234#"

#: A strength at which views run, which they do not at 0, and change no score of 32 bits.
FAINT = 1e-12

#: Families that a test over families meets in every run; the others with --full. Between them: image tokens in the prompt,
#: queries instead of them, and a grid whose size follows the picture.
FEW = ("llava", "instructblip", "qwen2_5_vl")


class TextProcessor:
    """A tokenizer and nothing else, as a processor without a chat template."""

    chat_template = None

    def __init__(self, built):
        self.tokenizer = self.qformer_tokenizer = built.tokenizer


class Kept(Recorder):
    """Keeps the newest run, with all its tensors; ``run.lanes`` counts forwards and holds the newest :class:`Step`."""

    run = None

    def began(self, run):
        self.run = run


def full_but(values, default):
    """Parameters of a test: those in ``default`` in every run, the others with --full."""
    return [pytest.param(value, marks=() if value in default else pytest.mark.full) for value in values]


def spelled_logits(model, name, attend, inputs, tokens):
    """(steps, N) logits of one row of a LLaVA that is fed ``tokens`` under an attention function of the test's own.

    Args:
        model: its attention is changed for good; give a copy.
        name: of the attention function, another one for every test file.
        attend: as transformers calls an attention function.
    """
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])
    model.model.language_model.config._attn_implementation = name
    cache = DynamicCache(config=model.config.get_text_config())
    out = []
    with torch.no_grad():
        out.append(model(**inputs, **hf.with_cache(cache)).logits[0, -1])
        for token in tokens:
            out.append(model(input_ids=token.view(1, 1), **hf.with_cache(cache)).logits[0, -1])
    return torch.stack(out)


class Ends(StoppingCriteria):
    """Holds for texts of a length that the first token decides; keeps what it was called with."""

    def __init__(self, width):
        self.width, self.calls = width, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += [row[self.width :].tolist() for row in input_ids]
        return torch.tensor([len(row) - self.width >= 4 + int(row[self.width]) % 7 for row in input_ids])
