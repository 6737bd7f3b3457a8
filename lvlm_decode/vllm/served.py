"""Which methods vLLM can be given, and why the others cannot: what combines logits of whole views can.

A method whose views are prompts and pictures needs nothing of the model but its logits. What changes attention or hidden
states, or reads them, would need to stand inside vLLM's own model code.
"""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedError
from ..method import Method
from ..methods import METHODS, load

_ELSEWHERE = "use lvlm_decode.attach on the model in transformers"
#: Test of a class -> why its methods cannot be served. Of a class, because some cannot be made without parameters.
_REASONS = (
    (
        lambda cls: callable(getattr(cls, "decode", None)),
        "it searches by itself over several forwards, and vLLM's scheduler decides which forwards there are",
    ),
    (
        lambda cls: cls.probes is not Method.probes,
        "it reads the hidden states of earlier layers, and vLLM hands out logits alone",
    ),
    (
        lambda cls: "experts" in cls.needs,
        "it weakens the routing of experts for one of its rows, and vLLM routes inside its own kernels",
    ),
    (
        lambda cls: cls.patch is not Method.patch,
        "it changes attention or hidden states inside the model's forward, and vLLM runs its own kernels there",
    ),
    (
        lambda cls: {"attention", "prompts"} & set(cls.costs),
        "it reads how the prompt attends to the image, and vLLM keeps no attention",
    ),
)


def reason(cls: type[Method]) -> str | None:
    """Why methods of this class cannot be served; ``None`` if they can."""
    return next((why for test, why in _REASONS if test(cls)), None)


def check_served(method: Method) -> None:
    """Raise unless every part of ``method`` can be served.

    Raises:
        UnsupportedError: names the part and the reason.
    """
    for part in method.parts():
        if (why := reason(type(part))) is not None:
            raise UnsupportedError(f"{part.name} cannot be served by vLLM: {why}; {_ELSEWHERE}.")


def served_methods() -> dict[str, str | None]:
    """Every registered method: ``None`` where it is served, else why it is not."""
    return {name: reason(load(name)) for name in METHODS}


def reads_encoder(method: Method) -> bool:
    """Whether a view is made of image features, for which the vision tower's weights are needed."""
    return any(type(part).observe is not Method.observe or "feature" in part.costs for part in method.parts())


def refused_setting(params: Any) -> str | None:
    """The first of a caller's sampling parameters that a group cannot honour, in words; ``None`` if there is none.

    Penalties and biases would act on each view before the contrast in one runner of vLLM, and not at all in the other.
    """
    plain = {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "logprob_token_ids": None,
        "structured_outputs": None,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": None,
        "thinking_token_budget": None,
        "repetition_detection": None,
    }
    for name, neutral in plain.items():
        value = getattr(params, name, neutral)
        if value != neutral and value not in ([], {}):
            return f"{name}={value!r}"
    return None
