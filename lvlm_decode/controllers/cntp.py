"""Cautious Next Token Prediction (Wang et al., Findings of ACL 2025; arXiv 2507.03038).

    H = - sum p ln p          of the next token, after processors and warpers (temperature, top-p)
    N = 1 .. max_trials       grows with H between min_entropy and max_entropy
    N = 1: decode one token as usual.    N > 1: draw N continuations, each up to a punctuation mark, and append the one
    with the lowest perplexity, whole.

Follows the authors' code where it differs from the paper: how N rounds (``form``), and the comma and the closing brace among
the marks. Differences from that code on purpose: marks are found in the decoded text (their ids miss a mark inside a word),
the trials of a step run as rows of one forward instead of one after the other, nothing is computed twice, and a trial ends
after ``max_segment`` tokens at the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from ..engine import sampling
from .base import Controller, Limits, pad_answers, seed_of
from .rows import Rows

if TYPE_CHECKING:
    from ..engine.hf import Call
    from ..engine.run import Run


@dataclass(frozen=True)
class CNTP(Controller):
    """Draws several continuations where the model is uncertain and keeps the most fluent.

    With ``do_sample=False`` certain steps take the likeliest token and only trials are drawn, as in the authors' code; then
    neither entropy nor trials know ``temperature``, ``top_p`` or ``top_k``, which ``generate()`` applies when sampling alone.
    With ``do_sample=True`` they do, and also the ``top_k=50`` that ``generate()`` sets unless it is told ``top_k=0``. The
    authors sample at temperature 0.8 and top_p 0.9.

    Draws are keyed by (seed, sample id, start of the trials, trial, position): the batch never changes an answer.

    Args:
        min_entropy: Entropy in nats, at least 0, below which one trial is drawn.
        max_entropy: Entropy in nats, above ``min_entropy``, from which ``max_trials`` are drawn.
        max_trials: Maximum number of trials (N_max), at least 1.
        punctuation: Characters that end a trial.
        max_segment: Maximum length of a trial in tokens, at least 1.
        form: How the number of trials is rounded: ``code`` is int(1 + (N_max - 1) x), ``paper`` is max(1, floor(N_max
            x)), where x in [0, 1] is the place of the entropy between the two bounds.
    """

    name: ClassVar[str] = "cntp"
    paper: ClassVar[str] = "Cautious Next Token Prediction (Wang et al., Findings of ACL 2025)"
    arxiv: ClassVar[str] = "2507.03038"
    aliases: ClassVar[dict[str, str]] = {"h_min": "min_entropy", "h_max": "max_entropy", "n_max": "max_trials"}
    costs: ClassVar[tuple[str, ...]] = ("search",)
    refuses: ClassVar[dict[str, str]] = {
        "beam": "its trials take the place of beams; leave out num_beams.",
        "stream": "most of what it draws is thrown away again; leave the streamer out.",
        "static": "its trials branch in a cache that grows and shrinks; leave out cache_implementation.",
        "speculation": "it looks ahead by trials of its own; leave the drafter out.",
        "sum": "it replaces the search, and both would decide the next token.",
        "processor": "a processor sees one step and cannot try several; use attach(model, CNTP()).",
    }

    min_entropy: float = 0.01
    max_entropy: float = 1.5
    max_trials: int = 10
    punctuation: str = ".,\n?!:;)]}"
    max_segment: int = 64
    form: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        self.check(self.min_entropy >= 0, "min_entropy", "at least 0")
        self.check(self.max_entropy > self.min_entropy, "max_entropy", "greater than min_entropy")
        self.check(self.max_trials >= 1, "max_trials", "at least 1")
        self.check(self.max_segment >= 1, "max_segment", "at least 1")
        self.check(self.form in ("code", "paper"), "form", "'code' or 'paper'")

    def trials(self, entropy: float) -> int:
        """How many continuations a step of this entropy (nats) is worth."""
        place = (entropy - self.min_entropy) / (self.max_entropy - self.min_entropy)
        place = min(max(place, 0.0), 1.0)
        if self.form == "paper":
            return max(1, int(place * self.max_trials))
        return int(1 + (self.max_trials - 1) * place)

    def decode(self, run: Run, call: Call) -> Any:
        self.check_search(call, "most of its steps belong to trials that were not kept")
        input_ids, limits, config = call.input_ids, Limits.of(run, call), call.config
        # The engine's own draws decide one token per position; here every trial needs one.
        process = [p for p in call.processors if not isinstance(p, sampling.KeyedDraw)]
        tokenizer = getattr(run.processor, "tokenizer", run.processor)
        ends = EndsTrial(tokenizer, self.punctuation)
        seed = seed_of(run, call)
        writers = [
            Writer(self, limits, ids, process, bool(config.do_sample), seed, row_id, ends)
            for ids, row_id in zip(input_ids, run.row_ids)
        ]
        with torch.no_grad():
            rows = Rows(run.prepared[0], run.family.pad_token_id)
            write_all(writers, rows)
        run.trace.forwards = rows.forwards
        run.trace.trials = [writer.trials for writer in writers]
        answers = [torch.tensor(writer.tokens, dtype=torch.long, device=input_ids.device) for writer in writers]
        sequences = pad_answers(input_ids, answers, limits.pad)
        if config.return_dict_in_generate:
            # Hugging Face's annotation asks for a LongTensor, which no tensor is to a checker.
            found: Any = sequences
            return GenerateDecoderOnlyOutput(sequences=found)
        return sequences


class EndsTrial:
    """Whether a token holds a punctuation mark once it is decoded; remembered per token."""

    def __init__(self, tokenizer: Any, marks: str):
        self.tokenizer, self.marks = tokenizer, marks
        self._known: dict[int, bool] = {}

    def __call__(self, token: int) -> bool:
        if token not in self._known:
            text = self.tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self._known[token] = any(mark in text for mark in self.marks)
        return self._known[token]


@dataclass
class _Trial:
    number: int
    tokens: list[int] = field(default_factory=list)
    loss: float = 0.0
    done: bool = False

    @property
    def mean_loss(self) -> float:
        """Logarithm of the perplexity."""
        return self.loss / len(self.tokens)


class Writer:
    """One sample: what it has written, and the trials that are under way.

    Args:
        process: processors and warpers, in their order.
        do_sample: draw the tokens of certain steps too.
        row_id: with ``seed`` the key of the draws.
        ends: whether a token ends a trial.
    """

    def __init__(
        self,
        method: CNTP,
        limits: Limits,
        prompt: Tensor,
        process: list[Any],
        do_sample: bool,
        seed: int,
        row_id: Hashable,
        ends: Callable[[int], bool],
    ):
        self.method, self.limits, self.prompt, self.process = method, limits, prompt, process
        self.do_sample, self.seed, self.row_id, self.ends = do_sample, seed, row_id, ends
        self.tokens: list[int] = []
        self.open: list[_Trial] = []
        self.done = limits.new_tokens <= 0
        #: Number of trials of each uncertain step.
        self.trials: list[int] = []

    def step(self, logits: Tensor) -> tuple[list[int], list[int | None]]:
        """Decide the next tokens.

        A finished trial that another finished one beats is dropped at once; when all are finished, the best one's row alone
        goes on.

        Args:
            logits: (n, N) of the n rows this sample has: one, or one per open trial.

        Returns:
            per row from now on, the row it continues, and the token it appends (``None``: a finished trial waits).
        """
        if not self.open:
            said = self._said([[]], logits)
            entropy = float(-torch.special.xlogy(said.exp(), said.exp()).sum())
            count = self.method.trials(entropy)
            if count == 1:
                token = self._draw(said[0], 0, 0) if self.do_sample else int(said[0].argmax())
                self._append([token])
                return [0], [token]
            self.trials.append(count)
            self.open = [_Trial(number) for number in range(count)]
            parents, said = [0] * count, said.expand(count, -1)
            live = list(range(count))
        else:
            parents = list(range(len(self.open)))
            live = [i for i, trial in enumerate(self.open) if not trial.done]
            said = self._said([self.open[i].tokens for i in live], logits[live])
        tokens: list[int | None] = [None] * len(self.open)
        for scores, i in zip(said, live):
            trial = self.open[i]
            token = self._draw(scores, trial.number, len(trial.tokens))
            trial.loss -= float(scores[token])
            trial.tokens.append(token)
            tokens[i] = token
            trial.done = (
                self.ends(token)
                or token in self.limits.eos
                or len(trial.tokens) >= self.method.max_segment
                or len(self.tokens) + len(trial.tokens) >= self.limits.new_tokens
                or self._stopped(trial.tokens)
            )
        kept = self._settle()
        return [parents[i] for i in kept], [tokens[i] for i in kept]

    def _settle(self) -> list[int]:
        """Drop trials that have lost; the numbers of those that stay."""
        finished = [i for i, trial in enumerate(self.open) if trial.done]
        best = min(finished, key=lambda i: self.open[i].mean_loss, default=None)
        if best is not None and len(finished) == len(self.open):
            segment, self.open = self.open[best].tokens, []
            self._append(segment)
            return [best]
        kept = [i for i, trial in enumerate(self.open) if not trial.done or i == best]
        self.open = [self.open[i] for i in kept]
        return kept

    def _append(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.done = len(self.tokens) >= self.limits.new_tokens or tokens[-1] in self.limits.eos or self._stopped([])

    def _ids(self, more: list[int]) -> Tensor:
        return torch.cat([self.prompt, self.prompt.new_tensor([*self.tokens, *more])])

    def _stopped(self, more: list[int]) -> bool:
        return bool(self.limits.other) and self.limits.stopped(self._ids(more)[None])[0]

    def _said(self, texts: list[list[int]], logits: Tensor) -> Tensor:
        """(n, N) log-probabilities after processors and warpers."""
        ids = torch.stack([self._ids(text) for text in texts])
        for processor in self.process:
            logits = processor(ids, logits)
        sampling.check_left(logits, f"after {len(self.tokens)} generated tokens")
        return logits.log_softmax(-1)

    def _draw(self, said: Tensor, trial: int, offset: int) -> int:
        # With the place where the trials began, so that none reuses what a discarded one drew for the same position.
        start = len(self.tokens)
        noise = sampling.gumbel(self.seed, (self.row_id, "cntp", start, trial), start + offset, len(said))
        return int((said + noise.to(said.device)).argmax())


def write_all(writers: list[Writer], rows: Rows) -> None:
    """Let all writers finish, one forward per step for the rows of all of them."""
    active = [writer for writer in writers if not writer.done]
    logits, owned = rows.first, [1] * len(active)
    while active:
        parents: list[int] = []
        tokens: list[int | None] = []
        start, sizes = 0, []
        for writer, count in zip(active, owned):
            own_parents, own_tokens = writer.step(logits[start : start + count])
            start += count
            if not writer.done:
                parents += [start - count + parent for parent in own_parents]
                tokens += own_tokens
                sizes.append(len(own_tokens))
        active, owned = [writer for writer in active if not writer.done], sizes
        if not active:
            return
        if parents != list(range(len(rows))):
            rows.select(parents)
            logits = logits[parents]
        counts = [int(token is not None) for token in tokens]
        appended = torch.tensor([[token or 0] for token in tokens], device=logits.device)
        moved = torch.tensor(counts, dtype=torch.bool, device=logits.device)[:, None]
        logits = torch.where(moved, rows.extend(appended, counts), logits)
