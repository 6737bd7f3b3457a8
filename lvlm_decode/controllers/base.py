"""Controllers: methods with a search of their own, run inside ``generate()`` in place of Hugging Face's loops."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, PrefixConstrainedLogitsProcessor

from ..engine import hf, sampling
from ..engine.hf import Call
from ..errors import UnsupportedError
from ..method import Method

if TYPE_CHECKING:
    from ..engine.run import Run


@dataclass(frozen=True)
class Controller(Method):
    """A method that decides more than one token's scores at a time.

    It has no views; ``attach(model, controller).generate(...)`` calls :meth:`decode` where ``generate()`` would have
    started its own loop, with everything ``generate()`` prepared.
    """

    kind: ClassVar[str] = "search"

    @abstractmethod
    def decode(self, run: Run, call: Call) -> Any:
        """Decode; returns what ``generate()`` would: (B, P + T) ids, or an output object.

        Args:
            run: the samples, their prepared rows, the model and its processor.
            call: the prompts (B, P), left-padded, and everything else that ``generate()`` prepared.
        """

    def check_search(self, call: Call, why: str) -> None:
        """Raise if the call asks for what a search with rows of its own cannot give.

        Args:
            why: the reason why there are no outputs per step.

        Raises:
            UnsupportedError: a cache of the caller's, outputs per step, or ``prefix_allowed_tokens_fn``.
        """
        hf.check_plain(call.cache, self.name)
        if call.config.return_dict_in_generate:
            for option in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
                if getattr(call.config, option, False):
                    raise UnsupportedError(f"{self.name} cannot honour {option}=True: {why}; leave it out.")
        if any(isinstance(processor, PrefixConstrainedLogitsProcessor) for processor in call.processors):
            raise UnsupportedError(
                f"{self.name} cannot honour prefix_allowed_tokens_fn, which tells samples apart by the rows of Hugging "
                "Face's own loops; leave it out, or pass a LogitsProcessor that reads the prompt."
            )


@dataclass(frozen=True)
class Limits:
    """When an answer ends.

    Args:
        new_tokens: the most tokens an answer may have.
        eos: ids of end tokens; empty when there are none.
        pad: fills shorter answers.
        other: criteria beside length and end tokens.
    """

    new_tokens: int
    eos: tuple[int, ...]
    pad: int
    other: tuple[Any, ...] = ()

    @classmethod
    def of(cls, run: Run, call: Call) -> Limits:
        """What ``generate()`` prepared, taken apart."""
        eos = call.config.eos_token_id
        eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        pad = call.config.pad_token_id
        if pad is None:
            pad = eos[0] if eos else run.family.pad_token_id
        other = tuple(c for c in call.criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria))
        return cls(call.config.max_length - call.prompt_length, eos, pad, other)

    def stopped(self, sequences: Tensor) -> list[bool]:
        """Which of the sequences (n, P + t) one of the other criteria ends."""
        done = torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)
        for criterion in self.other:
            done |= criterion(sequences, None)
        return done.tolist()


class AsCaller:
    """A processor or criterion of the caller, run on rows whose prompts are others than the caller's.

    It sees the caller's prompts with what was generated after the others, so that prompt lengths, repetition penalties and
    length limits mean what they would mean for the caller.

    Args:
        inner: maps (ids, scores) to scores, or to which rows are done.
        prompts: (B, P) the caller's.
        width: of the prompts the rows have instead.
    """

    def __init__(self, inner: Any, prompts: Tensor, width: int):
        self.inner, self.prompts, self.width = inner, prompts, width

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        prompts = self.prompts.repeat_interleave(len(input_ids) // len(self.prompts), 0)
        return self.inner(torch.cat([prompts, input_ids[:, self.width :]], 1), scores)


def seed_of(run: Run, call: Call) -> int:
    """The seed of what a search draws by itself: the run's, else the default of views, or torch's own when sampling."""
    if run.seed is not None:
        return run.seed
    return int(torch.randint(2**62, (1,))) if call.config.do_sample else sampling.DEFAULT_SEED


def pad_answers(input_ids: Tensor, answers: list[Tensor], pad: int) -> Tensor:
    """(B, P + T) prompts with their answers, filled on the right."""
    width = max(len(answer) for answer in answers)
    out = input_ids.new_full((len(answers), width), pad)
    for row, answer in enumerate(answers):
        out[row, : len(answer)] = answer
    return torch.cat([input_ids, out], 1)
