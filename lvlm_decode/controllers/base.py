"""Controllers: methods with a search of their own, run inside ``generate()`` in place of Hugging Face's loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, PrefixConstrainedLogitsProcessor

from ..errors import UnsupportedError
from ..method import Method

if TYPE_CHECKING:
    from ..engine.attach import Run


@dataclass(frozen=True)
class Controller(Method):
    """A method that decides more than one token's scores at a time.

    It has no views; ``attach(model, controller).generate(...)`` calls :meth:`decode` where ``generate()`` would have
    started its own loop, with everything ``generate()`` prepared.
    """

    def decode(
        self,
        run: Run,
        input_ids: Tensor,
        *,
        cache: Any,
        streamer: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ) -> Any:
        """Decode; returns what ``generate()`` would: (B, P + T) ids, or an output object.

        Args:
            run: the samples, their prepared rows, the model and its processor.
            input_ids: (B, P) the prompts, left-padded.
            cache: the empty cache that ``generate()`` made.
            streamer: as given to ``generate()``; the prompt has been put already.
        """
        raise NotImplementedError(f"{type(self).__name__} has no decode")

    def check_cache(self, cache: Any) -> None:
        """Raise if ``generate()`` was asked for a cache that a search cannot put its own in place of.

        Raises:
            UnsupportedError: a cache that is quantised, offloaded, or holds tokens already.
        """
        if cache is None:
            return
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            raise UnsupportedError(
                f"{self.name} keeps keys and values in a dynamic cache of its own, and {type(cache).__name__} was asked "
                "for; leave out cache_implementation and the cache."
            )
        if cache.get_seq_length() > 0:
            raise UnsupportedError(
                f"{self.name} starts from the whole prompt; leave out the cache, which holds tokens."
            )

    def check_search(self, cache: Any, logits_processor: Any, generation_config: GenerationConfig, why: str) -> None:
        """Raise if the call asks for what a search with rows of its own cannot give; ``why`` it has no outputs per step.

        Raises:
            UnsupportedError: such a cache, outputs per step, or ``prefix_allowed_tokens_fn``.
        """
        self.check_cache(cache)
        if generation_config.return_dict_in_generate:
            for option in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
                if getattr(generation_config, option, False):
                    raise UnsupportedError(f"{self.name} cannot honour {option}=True: {why}; leave it out.")
        if any(isinstance(processor, PrefixConstrainedLogitsProcessor) for processor in logits_processor):
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
    def of(cls, run: Run, input_ids: Tensor, stopping_criteria: Any, generation_config: GenerationConfig) -> Limits:
        """What ``generate()`` prepared, taken apart."""
        eos = generation_config.eos_token_id
        eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        pad = generation_config.pad_token_id
        if pad is None:
            pad = eos[0] if eos else run.family.pad_token_id
        other = tuple(c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria))
        return cls(generation_config.max_length - input_ids.shape[1], eos, pad, other)

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


def memory_of(run: Run) -> dict[Any, Any]:
    """What a controller may keep between the calls of one attached model; a fresh one if none is attached."""
    attachment = run.model.__dict__.get("_lvlm_decode_attached")
    return {} if attachment is None else attachment.__dict__.setdefault("memory", {})


def seed_of(run: Run) -> int:
    """The seed of the run, or one drawn from torch's own generator."""
    return int(torch.randint(2**62, (1,))) if run.seed is None else run.seed


def pad_answers(input_ids: Tensor, answers: list[Tensor], pad: int) -> Tensor:
    """(B, P + T) prompts with their answers, filled on the right."""
    width = max(len(answer) for answer in answers)
    out = input_ids.new_full((len(answers), width), pad)
    for row, answer in enumerate(answers):
        out[row, : len(answer)] = answer
    return torch.cat([input_ids, out], 1)
