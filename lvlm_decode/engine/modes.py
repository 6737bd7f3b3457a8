"""What a method may need of a model and which modes it may refuse, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UnsupportedError
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
        UnsupportedError: names the method and what the family lacks.
    """
    for part in method.parts():
        for need in part.needs:
            if not getattr(family, f"has_{need}"):
                raise UnsupportedError(
                    f"{part.name} needs {NEEDS[need]}, which {family.config.model_type} does not have; choose another "
                    "method or model."
                )


def check_modes(method: Method, modes: Sequence[str]) -> None:
    """Raise if a part of ``method`` refuses one of ``modes``.

    Raises:
        UnsupportedError: with the method's own reason.
    """
    for part in method.parts():
        for mode in modes:
            if mode in part.refuses:
                raise UnsupportedError(f"{part.name} cannot run with {MODES[mode]}: {part.refuses[mode]}")
