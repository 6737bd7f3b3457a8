"""Randomness that belongs to the sample: keyed generators and Gumbel-max draws.

A draw keyed by (seed, sample id, position) does not depend on the composition or order of a batch, on a resumed run or on
a drafter; ``torch.multinomial`` depends on all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..errors import InputError

#: Keys the views where the caller gives no seed, so that the same inputs have the same views in every process.
DEFAULT_SEED = 0


def key(*parts: Hashable) -> int:
    """A 63-bit integer from the printed form of ``parts``; equal parts give equal keys in every process."""
    digest = hashlib.blake2b("\x1f".join(map(repr, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: Hashable) -> torch.Generator:
    """A CPU generator seeded by ``parts``, for instance (seed, sample id, "views")."""
    return torch.Generator().manual_seed(key(*parts))


def checked_seed(seed: Any) -> int | None:
    """``seed`` as it was given to a call, as a whole number of Python's: numbers that are equal key the same draws.

    Raises:
        InputError: something else than a whole number.
    """
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise InputError(f"seed is {seed!r}; give a whole number, or leave it out.")
    return int(seed)


def checked_ids(ids: Any, rows: int) -> list[Hashable]:
    """``ids`` as they were given to a call, one for each of ``rows`` rows.

    Raises:
        InputError: another number of them, or something that is no key.
    """
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes) or len(ids) != rows:
        raise InputError(f"sample_ids is {ids!r}; give a list with one key for each row of the batch, {rows} in all.")
    for one in ids:
        try:
            hash(one)
        except TypeError as error:
            raise InputError(f"sample_ids holds {one!r}, which is no key; give each row a text or a number.") from error
    return list(ids)


def gumbel(seed: int, sample_id: Hashable, position: int, n: int) -> Tensor:
    """(n,) float32 standard Gumbel noise for the token that is generated at ``position`` (0 is the first).

    The arg max of log-probabilities plus this noise is a draw from them (Gumbel-max).
    """
    uniform = torch.rand(n, generator=generator(seed, sample_id, position), dtype=torch.float64)
    # The open interval: log(0) would make one token win, or lose, for certain.
    uniform = uniform.clamp(1e-300, 1 - 1e-16)
    return -(-uniform.log()).log().float()


def numbers(logits: Tensor) -> Tensor:
    """``logits`` in which a token whose logit is NaN is one that is never said."""
    return torch.nan_to_num(logits, nan=float("-inf"), neginf=float("-inf"))


def left(scores: Tensor) -> Tensor:
    """(...) whether a row of ``scores`` (..., N) has a token that can be chosen, and no NaN."""
    return (scores > float("-inf")).any(-1) & ~scores.isnan().any(-1)


def check_left(scores: Tensor, what: str) -> None:
    """Raise unless every row of ``scores`` (R, N) has a token that can be chosen.

    Args:
        what: of which rows they are, in words.

    Raises:
        InputError: all tokens of a row are -inf, or its scores are NaN.
    """
    if not bool(left(scores).all()):
        raise InputError(
            f"{what}: no token of the vocabulary is left, because the model's own logits are NaN or -inf or the processors "
            "ban all of it; load the model in float32 or bfloat16, or ban less."
        )


class SomethingLeft(LogitsProcessor):
    """Follows the caller's processors: no answer comes from scores that hold no token.

    Args:
        prompt_length: width of ``input_ids`` before the first generated token.
        ends: end tokens; a row that said one is padded whatever its scores are.
        at_once: raise in the step that has no token left, which makes the host wait for every step. Otherwise :meth:`check`
            raises after the last one; rows must then be those of the answer, as in greedy decoding and sampling.
        drawn: tokens are drawn from the scores.
        before: tokens that every row has generated before the first call.
    """

    def __init__(
        self, prompt_length: int, ends: Sequence[int], at_once: bool = True, drawn: bool = False, before: int = 0
    ):
        self.prompt_length, self.ends, self.at_once, self.drawn = prompt_length, list(ends), at_once, drawn
        self.before = before
        #: Per step (R,) the best score of each row; -inf where no token was left, NaN where NaN is among the scores.
        self._best: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.at_once:
            said = input_ids[:, self.prompt_length :]
            check_left(scores[~self._ended(said)], f"at generated token {said.shape[1]}")
            return scores
        # Compared afterwards, all steps at once.
        best = scores.amax(-1)
        self._best.append(best)
        # A draw from nothing would fail before the sentence is said; what is drawn here never comes back.
        return torch.where((best > float("-inf"))[:, None], scores, 0.0) if self.drawn else scores

    def check(self, sequences: Tensor) -> None:
        """Raise unless every row of ``sequences`` (R, P + t) had a token left in each step until it ended.

        Raises:
            InputError: names the first step that had none.
        """
        if not self._best:
            return
        had = torch.stack(self._best, 1) > float("-inf")
        if bool(had.all()):
            return
        steps = range(self.before, self.before + had.shape[1])
        said = sequences[:, self.prompt_length : self.prompt_length + steps.stop]
        ended = torch.stack([self._ended(said[:, :step]) for step in steps], 1)
        bad = (~had & ~ended).any(0).nonzero()
        if len(bad):
            nothing = torch.full((1, 1), float("-inf"))
            check_left(nothing, f"at generated token {steps[int(bad[0])]}")

    def _ended(self, said: Tensor) -> Tensor:
        """(R,) bool: which rows of generated tokens (R, t) hold an end token."""
        return torch.isin(said, said.new_tensor(self.ends)).any(-1)


class KeyedDraw(LogitsProcessor):
    """The last processor of a sampling run: leaves only the token that keyed Gumbel-max draws.

    ``torch.multinomial`` of Hugging Face's loop then has one token to choose from.

    Args:
        seed: of the run.
        row_ids: one id per row of ``input_ids``.
        prompt_length: width of ``input_ids`` before the first generated token.
    """

    def __init__(self, seed: int, row_ids: Sequence[Hashable], prompt_length: int):
        self.seed, self.row_ids, self.prompt_length = seed, list(row_ids), prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        noise = torch.stack([gumbel(self.seed, row, position, scores.shape[-1]) for row in self.row_ids])
        drawn = (scores + noise.to(scores.device)).argmax(-1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)


class _Guarded(LogitsProcessorList):
    """The caller's processors and then ``guard``, whose signature transformers would look up for every token."""

    def __init__(self, processors: Sequence[Any], guard: SomethingLeft):
        super().__init__(processors)
        self._guard = guard

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self._guard(input_ids, super().__call__(input_ids, scores, **kwargs))


def guarded(processors: LogitsProcessorList, guard: SomethingLeft) -> LogitsProcessorList:
    """``processors`` followed by ``guard``, before a keyed draw, which would leave one token of none."""
    if not any(isinstance(one, KeyedDraw) for one in processors):
        return _Guarded(processors, guard)
    return LogitsProcessorList([*processors[:-1], guard, processors[-1]])
