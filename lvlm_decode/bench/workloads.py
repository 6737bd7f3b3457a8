"""What is decoded: models that anybody has at hand, and batches of prompts of a given length."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import lvlm_decode_data
from lvlm_decode_evals.base import Question
from lvlm_decode_evals.runner import Loaded, Options, load, loaded_of, prompt_of

from ..errors import InputError

CAPTION = "Please describe this image in detail."
#: Added to a prompt until it is long enough.
FILLER = "The picture shows a dog."
#: Models of drawn weights: 221 million parameters, and the width and depth of LLaVA-1.5-7B's language model.
RANDOM: dict[str, dict[str, int]] = {"random": {}, "random-7b": {"hidden": 4096, "layers": 32, "head": 128}}


def loaded(name: str, dtype: str | None = None) -> Loaded:
    """``random``, ``random-7b``, or what ``lvlm_decode_evals.runner.load`` knows: ``tiny``, a folder or a hub id."""
    if name not in RANDOM:
        return load(name, dtype=dtype)
    small = load("tiny", dtype=dtype)
    return loaded_of(random_llava(small.model, **RANDOM[name]), small.processor, name)


def random_llava(
    small: Any, hidden: int = 1024, layers: int = 12, words: int = 32000, head: int = 64
) -> torch.nn.Module:
    """A LLaVA with drawn weights that reads what the processor of ``small`` makes; 221 million parameters by default."""
    torch.manual_seed(0)
    config = copy.deepcopy(small.config)
    text = config.get_text_config()
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, hidden * 11 // 4, layers
    text.num_attention_heads = text.num_key_value_heads = hidden // head
    text.head_dim, text.vocab_size, text.max_position_embeddings = head, words, 4096
    before = torch.get_default_dtype()
    torch.set_default_dtype(small.dtype)
    try:
        # Made where it will be: drawing billions of weights on a CPU takes minutes.
        with torch.device(small.device):
            model = type(small)(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.pad_token_id = small.generation_config.pad_token_id
    return model


def inputs_for(processor: Any, scenes: Sequence[Any], prompt: str) -> dict[str, Tensor]:
    """One batch: each of ``scenes`` under the same prompt."""
    pictures = [Image.open(scene.path).convert("RGB") for scene in scenes]
    text = prompt_of(processor, Question("", prompt, "image"), Options())
    return dict(processor(images=pictures, text=[text] * len(pictures), return_tensors="pt"))


def caption_inputs(processor: Any, count: int) -> list[dict[str, Tensor]]:
    """Inputs for ``count`` of the scenes that ship, each by itself, with a caption prompt."""
    return [inputs_for(processor, [scene], CAPTION) for scene in lvlm_decode_data.load_scenes()[:count]]


def prompts(loaded: Loaded, batch: int, tokens: int) -> dict[str, Tensor]:
    """``batch`` scenes under one prompt of about ``tokens`` tokens, its image included; a sentence more or less.

    Raises:
        InputError: a number that the shortest prompt exceeds.
    """
    scenes = lvlm_decode_data.load_scenes()
    scenes = [scenes[i % len(scenes)] for i in range(batch)]

    def inputs(sentences: int, count: int) -> dict[str, Tensor]:
        return inputs_for(loaded.processor, scenes[:count], " ".join([*[FILLER] * sentences, CAPTION]))

    none, ten = (inputs(sentences, 1)["input_ids"].shape[1] for sentences in (0, 10))
    each = (ten - none) / 10
    if tokens < none - each:
        raise InputError(f"prompts of {tokens} tokens were asked for, and one with its image has {none}; ask for more.")
    found = inputs(max(round((tokens - none) / each), 0), batch)
    return {key: value.to(loaded.model.device) for key, value in found.items()}
