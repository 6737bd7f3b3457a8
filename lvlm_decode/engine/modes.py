"""What a method may need of a model and which modes it may refuse, in words."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UnsupportedError
from ..method import Method

if TYPE_CHECKING:
    from ..families.base import Family

#: What ``Method.needs`` may name: key -> in words.
NEEDS = {
    "cls": "a vision encoder with a CLS token",
    "patches": "image tokens that are patches of a vision encoder with a CLS token",
    "qformer": "a Q-Former",
    "experts": "a decoder with a mixture of experts",
    "plain_layers": "decoder layers of two norms, attention and an MLP alone",
}

#: What ``Method.refuses`` may name: key -> in words.
MODES = {
    "greedy": "greedy search",
    "sample": "sampling",
    "beam": "beam search",
    "stream": "a streamer",
    "static": "a static cache",
    "speculation": "a drafter or assistant model",
    "batch": "several samples in one batch",
    "returns": "num_return_sequences above 1",
    "sum": "other methods",
    "processor": "the LogitsProcessor form",
}


def check_needs(method: Method, family: Family) -> None:
    """Raise unless the family has what every part of ``method`` needs.

    Raises:
        UnsupportedError: names the method and what the family, or this model of it, lacks.
    """
    for part in method.parts():
        for need in part.needs:
            if not getattr(family, f"has_{need}"):
                raise UnsupportedError(
                    f"{part.name} needs {NEEDS[need]}, which {family.config.model_type} does not have; choose another "
                    "method or model."
                )
        part.check_model(family)


def check_modes(method: Method, modes: Sequence[str]) -> None:
    """Raise if a part of ``method`` refuses one of ``modes``.

    Raises:
        UnsupportedError: with the method's own reason.
    """
    for part in method.parts():
        for mode in modes:
            if mode in part.refuses:
                raise UnsupportedError(f"{part.name} cannot run with {MODES[mode]}: {part.refuses[mode]}")


def rows_per_sample(num_beams: Any, num_return_sequences: Any) -> int:
    """How many rows of a loop each sample takes; ``None`` is what nobody set.

    Raises:
        InputError: a number that is no whole one, or below 1: transformers divides by it, or takes it for 1.
    """
    for name, value in (("num_beams", num_beams), ("num_return_sequences", num_return_sequences)):
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise InputError(f"{name} is {value!r}; give a whole number that is at least 1, or leave it out.")
    return max(num_beams or 1, num_return_sequences or 1)
