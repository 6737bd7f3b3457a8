"""What answers requests: the queue of a transformers model, or vLLM."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..method import Method
from .menu import Choice


@dataclass(frozen=True)
class Job:
    """One request as an engine takes it.

    Args:
        turns: the conversation as chat templates take it; image parts stand where the pictures belong.
        pictures: RGB PIL images in the order of those parts.
        choice: the method.
        temperature: 0 takes the likeliest token of every step.
        top_p, top_k: as warpers of transformers; 1 and 0 leave all tokens.
        seed: of views and draws; ``None`` draws anew each time, with the views of seed 0.
        sample_id: keys randomness in place of a hash of prompt and picture.
        max_tokens: the most tokens of the answer.
    """

    turns: Sequence[Mapping[str, Any]]
    pictures: Sequence[Any]
    choice: Choice
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    sample_id: str | None = None
    max_tokens: int = 256

    @property
    def samples(self) -> bool:
        return self.temperature > 0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``generate()``, seed and length left out."""
        if not self.samples:
            return {"do_sample": False, "num_beams": 1}
        return {
            "do_sample": True,
            "num_beams": 1,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


@dataclass(frozen=True)
class Part:
    """Further tokens of an answer.

    Args:
        tokens: ids, an end token among them.
        prompt_tokens: how many tokens the prompt has, those of its pictures among them.
        finish: why the answer ends with these; ``None`` while it goes on.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int
    finish: Literal["stop", "length"] | None = None


class Engine(Protocol):
    """Answers jobs side by side."""

    #: "transformers" or "vllm".
    kind: str
    #: Decodes the tokens of answers.
    tokenizer: Any
    #: The model as the settings of an evaluation describe it.
    settings: Mapping[str, Any]

    @property
    def broken(self) -> str | None:
        """What ended it, in one sentence; ``None`` while it works."""

    def check(self, method: Method) -> None:
        """Raise a :class:`~lvlm_decode.errors.LvlmDecodeError` for a method that this engine or its model cannot run."""

    def answer(self, job: Job) -> AsyncIterator[Part]:
        """The answer, part by part; closing the iterator frees its place at once.

        Raises:
            Refused: 400 for a job that cannot be answered, 429 when too many wait, 503 when the engine ends or is broken.
        """

    def load(self) -> tuple[int, int]:
        """How many requests wait, and how many are being answered."""

    async def close(self) -> None:
        """Give up what is unanswered, and free the model."""
