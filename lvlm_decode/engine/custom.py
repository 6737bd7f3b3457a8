"""``generate(custom_generate=VCD())``: one call, nothing left behind.

``generate()`` hands over the rows it prepared, already expanded for beams; the samples are read back from them. Known limit
of transformers: it drops ``streamer``, ``assistant_model`` and ``tokenizer`` on this path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..families import family_of
from ..method import Method
from . import hf
from .attach import Run, decode


def custom_generate(
    method: Method,
    model: torch.nn.Module,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    vision: dict[str, Any],
    seed: int | None,
    model_kwargs: dict[str, Any],
) -> Any:
    """Decode as :func:`attach` would, from what ``generate()`` gives a callable.

    Args:
        input_ids: (B, T), sample-major rows of beams or return sequences.
        vision: the pixel-side inputs, not expanded.

    Raises:
        UnsupportedError: a language model inside an LVLM, to which pixels and other prompts never get.
    """
    if model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedError(
            f"{method.name} got the embeddings of the language model inside an LVLM, in which the image is already mixed; "
            "use lvlm_decode.attach(model, method) on the LVLM instead of custom_generate=."
        )
    family = family_of(model)
    expand = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    rows = slice(None, None, expand)
    inputs: dict[str, Any] = {"input_ids": input_ids[rows], **{k: v for k, v in vision.items() if v is not None}}
    mask = model_kwargs.get("attention_mask")
    inputs["attention_mask"] = None if mask is None else mask[rows]
    for key in family.token_keys:
        if isinstance(model_kwargs.get(key), Tensor):
            inputs[key] = model_kwargs[key][rows]
    features = None
    if (given := (model_kwargs.get("mm_encoder_outputs") or {}).get("image")) is not None:
        if expand > 1:
            raise UnsupportedError(
                "features instead of pixels cannot be told apart once they are expanded for beams; pass pixel_values, or "
                "use lvlm_decode.attach."
            )
        features = family.unpack(given)
    run = Run(model, method, inputs, seed=seed, rows_per_sample=expand, family=family, features=features)
    cache = hf.take_cache(model_kwargs)
    return decode(
        run,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        cache=cache,
        model_kwargs=model_kwargs,
    )
