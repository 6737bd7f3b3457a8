"""OPERA: over-trust penalty and retrospection-allocation (Huang et al., CVPR 2024; arXiv 2311.17911).

Beam search in which every beam's best candidates are tried one token ahead. Last-layer attention among the response tokens,
multiplied down each column, tells which earlier token the candidate leans on; leaning is penalised, and when the same
token was leant on too often the beams go back to it and choose differently.

``form="code"`` (default) follows the authors' code, which is not the paper's algorithm: the penalty carries a hidden factor
1e-7 and lives in half precision; the first ten tokens get a bonus for attention to the image instead; scores are
normalised again among the candidates; after going back neither penalty nor candidates apply, only what was chosen before
is excluded; the most frequent location is taken over candidates, then over beams. ``form="paper"`` penalises with full
weight from the first token, looks at the last ``window_size`` tokens, goes back to tokens leant on at least ``threshold``
times, never further back than last time, and chooses among the other candidates. The paper leaves open how beams agree;
both forms go back when all beams do.

Differences from the authors' code on purpose: image positions come from the inputs (their InstructBLIP span is off by one),
samples of a batch go back each on its own, an exception is an exception (theirs is taken for "no rollback"), and a rollback
that their tables of ``window_size`` positions cannot hold is not made.

What the numbers are: scores and attention are single precision, the column products double precision and kept from step to
step (clamped to its largest value), where the authors multiply them anew in single precision; before the half precision of
``score_dtype`` the two differ in the last bit, which may decide between columns that are nearly equal. The authors' runs on
a GPU have logits in half precision: penalties below about 0.004 vanish in them, and after the shift of a rollback (by about
``fill``) they are multiples of 0.5, so such runs are not reproduced token for token.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers.generation import GenerateBeamDecoderOnlyOutput

from ..engine import sampling
from ..engine.attention import Edit, probabilities, visible
from ..engine.hf import decoder
from ..errors import UnsupportedError
from .base import Controller, Limits, pad_answers
from .rows import Rows

if TYPE_CHECKING:
    from ..engine.hf import Call
    from ..engine.run import Run

#: What the two forms set where a parameter is left at ``None``.
_FORMS: dict[str, dict[str, Any]] = {
    "code": {
        "penalty_scale": 1e-7,
        "score_dtype": "float16",
        "image_bonus_tokens": 10,
        "min_rollback_index": 10,
    },
    "paper": {
        "penalty_scale": 1.0,
        "score_dtype": "float32",
        "image_bonus_tokens": 0,
        "min_rollback_index": 0,
        "max_rollbacks": 5,
    },
}


@dataclass(frozen=True)
class OPERA(Controller):
    """Beam search that penalises tokens which lean on an earlier token, and goes back when it repeats.

    The candidates are the most probable tokens of the model itself, before the caller's processors. The processors then get
    the log-probabilities among the candidates, as in the authors' code, so a processor that bans all candidates of a beam
    leaves tokens at ``fill``.

    Args:
        num_beams: Number of beams (N_beam), at least 1. ``generate()``'s own ``num_beams`` stays 1.
        num_attn_candidates: Number of candidates per beam whose attention is read (N_can), at least 1; 1 is greedy
            search with rollback.
        scale_factor: Factor (sigma), above 0, of the attention before the column product; 40 to 60 is useful.
        threshold: How often (r) beams must lean on a token before they go back to it: more than r times in the code,
            at least r times in the paper.
        penalty_weights: Weight of the penalty (alpha), at least 0.
        form: Whether the authors' ``code`` or the ``paper`` is followed; sets every parameter below that is ``None``.
        window_size: In the code, the positions and steps that can be gone back to; in the paper, the number k of
            response tokens that are read.
        penalty_scale: Factor inside the penalty: 1e-7 in the code, 1 in the paper.
        score_dtype: Precision of the column products: float16 in the code, in which products below 0.298 / 1e-7
            vanish.
        image_bonus_tokens: Number of first tokens that are scored by their attention to the image: 10 in the code, 0
            in the paper.
        min_rollback_index: First response token that can be gone back to: 10 in the code, 0 in the paper.
        max_rollbacks: Rollbacks per position (beta): ``num_attn_candidates`` in the code, 5 in the paper.
        fill: Score of excluded tokens, before normalisation.
        prompt_length: Number of prompt tokens that count when the score of a finished answer is divided by length **
            length_penalty. ``None`` takes the prompt with one token per run of image tokens for models fed by ids, as
            the authors' LLaVA (two images with nothing between them count once), and 1 for models fed by embeddings,
            as their InstructBLIP. 1 is also what Hugging Face 5 does, where the end token counts.
    """

    name: ClassVar[str] = "opera"
    paper: ClassVar[str] = "OPERA (Huang et al., CVPR 2024)"
    arxiv: ClassVar[str] = "2311.17911"
    aliases: ClassVar[dict[str, str]] = {
        "alpha": "penalty_weights",
        "sigma": "scale_factor",
        "num_candidates": "num_attn_candidates",
    }
    costs: ClassVar[tuple[str, ...]] = ("search", "attention")
    refuses: ClassVar[dict[str, str]] = {
        "sample": "it searches for the best answer and draws nothing; pass do_sample=False.",
        "beam": "it runs its own beams; set OPERA(num_beams=...) and leave num_beams out of generate().",
        "stream": "it takes tokens back after they were chosen; leave the streamer out.",
        "static": "its beams branch and roll back in a cache that grows and shrinks; leave out cache_implementation.",
        "speculation": "it looks ahead itself and its choice depends on all beams; leave the drafter out.",
        "returns": "it answers with the best beam alone; leave out num_return_sequences.",
        "sum": "it replaces the search, and both would decide the next token.",
        "processor": "a processor sees one step and cannot take tokens back; use attach(model, OPERA()).",
    }

    num_beams: int = 5
    num_attn_candidates: int = 5
    scale_factor: float = 50.0
    threshold: int = 15
    penalty_weights: float = 1.0
    form: Literal["code", "paper"] = "code"
    window_size: int = 512
    penalty_scale: float | None = None
    score_dtype: Literal["float16", "float32"] | None = None
    image_bonus_tokens: int | None = None
    min_rollback_index: int | None = None
    max_rollbacks: int | None = None
    fill: float = -999.0
    prompt_length: int | None = None

    def __post_init__(self) -> None:
        self.check(self.num_beams >= 1, "num_beams", "at least 1")
        self.check(self.num_attn_candidates >= 1, "num_attn_candidates", "at least 1")
        self.check(self.scale_factor > 0, "scale_factor", "greater than 0")
        self.check(self.threshold >= 0, "threshold", "at least 0")
        self.check(self.penalty_weights >= 0, "penalty_weights", "at least 0")
        self.check(self.form in _FORMS, "form", "'code' or 'paper'")
        self.check(self.window_size >= 1, "window_size", "at least 1")
        self.check(self.score_dtype in (None, "float16", "float32"), "score_dtype", "'float16', 'float32' or None")
        self.check(self.prompt_length is None or self.prompt_length >= 1, "prompt_length", "at least 1, or None")
        for name in ("penalty_scale", "image_bonus_tokens", "min_rollback_index", "max_rollbacks"):
            value = getattr(self, name)
            self.check(value is None or value >= 0, name, "at least 0, or None for the form's own")

    def constant(self, name: str) -> Any:
        """The value of a parameter that the form decides when it is ``None``."""
        value = getattr(self, name)
        if value is None:
            value = _FORMS[self.form].get(name, self.num_attn_candidates)
        return value

    def decode(self, run: Run, call: Call) -> Any:
        self.check_search(call, "tokens that were taken back have no place in a list of steps")
        input_ids, limits, config = call.input_ids, Limits.of(run, call), call.config
        # The rows of the cache are these, which may have less padding than the caller's.
        images = run.family.is_placeholder(run.prepared[0].input_ids)
        searches = [
            Search(
                self,
                limits,
                prompt=ids,
                counted=self._prompt_length(run, sample.input_ids),
                process=call.processors,
                length_penalty=config.length_penalty,
                early_stopping=config.early_stopping,
            )
            for ids, sample in zip(input_ids, run.batch.samples)
        ]
        recorder = Recorder(decoder.layer_count(run.module) - 1)
        with torch.no_grad(), run.editing(recorder):
            rows = Rows(run.prepared[0], run.family.pad_token_id, run.edits)
            search_all(searches, Model(rows, recorder, spans(images), self.num_beams))
        answers = [search.answer() for search in searches]
        run.trace.forwards = rows.forwards
        run.trace.rollbacks = [search.rollbacks for search in searches]
        if run.recorder is not None:
            run.recorder.searched(searches)
        sequences = pad_answers(input_ids, [tokens for tokens, _ in answers], limits.pad)
        if not config.return_dict_in_generate:
            return sequences
        scores = torch.tensor([score for _, score in answers], device=input_ids.device)
        # Hugging Face's annotation asks for a LongTensor, which no tensor is to a checker.
        found: Any = sequences
        return GenerateBeamDecoderOnlyOutput(sequences=found, sequences_scores=scores)

    def _prompt_length(self, run: Run, ids: Tensor) -> int:
        """``ids`` (P,) is a prompt without padding."""
        if self.prompt_length is not None:
            return self.prompt_length
        if run.module is not run.model:
            return 1
        image = run.family.is_placeholder(ids)
        first = image & ~torch.cat([image.new_zeros(1), image[:-1]])
        return int((~image).sum() + first.sum())


def spans(images: Tensor) -> list[tuple[int, int]]:
    """Per sample [start, stop) from its first to its last image token; (0, 0) without any. ``images`` is (B, P) bool."""
    out = []
    for row in images:
        places = row.nonzero().flatten()
        out.append((int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0))
    return out


class Hypotheses:
    """The best finished answers of one sample, as beam search kept them before Hugging Face 5.

    Args:
        size: how many are kept.
        length_penalty: scores are sums of log-probabilities divided by length ** length_penalty.
        early_stopping: ``True`` stops when enough are finished, ``False`` when no open beam looks better now,
            ``"never"`` when none can become better.
        longest: the greatest length a finished answer can have.
    """

    def __init__(self, size: int, length_penalty: float, early_stopping: bool | str, longest: int):
        self.size, self.length_penalty = size, length_penalty
        self.early_stopping, self.longest = early_stopping, longest
        self.kept: list[tuple[float, Tensor, bool]] = []
        self.worst = 1e9

    def add(self, tokens: Tensor, total: float, length: int, ended: bool) -> None:
        """Offer an answer (t,); ``ended`` if an end token belongs after it."""
        score = total / length**self.length_penalty
        if len(self.kept) >= self.size and score <= self.worst:
            return
        self.kept.append((score, tokens, ended))
        if len(self.kept) > self.size:
            self.kept.pop(min(range(len(self.kept)), key=lambda i: self.kept[i][0]))
        self.worst = min(score for score, _, _ in self.kept)

    def closed(self, best: float, length: int) -> bool:
        """No open beam, the best of which has the score sum ``best``, can still matter."""
        if len(self.kept) < self.size:
            return False
        if self.early_stopping is True:
            return True
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.longest
        return self.worst >= best / length**self.length_penalty

    def copy(self) -> Hypotheses:
        out = copy.copy(self)
        out.kept = list(self.kept)
        return out

    def best(self) -> tuple[float, Tensor, bool]:
        return sorted(self.kept, key=lambda item: item[0])[-1]


@dataclass
class _State:
    """The beams of one sample before a token is chosen; what a rollback brings back."""

    tokens: Tensor  # (beams, t)
    scores: Tensor  # (beams,) sums of log-probabilities
    products: Tensor  # (beams, t) running column products of scaled attention
    finished: Hypotheses
    closed: bool
    origin: tuple[Tensor, Tensor] | None  # parents and tokens, the choice that led here
    candidates: Tensor | None = None  # (beams, N_can) ids
    candidate_scores: Tensor | None = None  # (beams, N_can) logits after the penalty

    def judged(self) -> tuple[Tensor, Tensor]:
        """(beams, N_can) the candidates and their scores, once :meth:`Search.judge` has set them."""
        assert self.candidates is not None and self.candidate_scores is not None
        return self.candidates, self.candidate_scores


@dataclass(frozen=True)
class Rollback:
    """One time that the beams of a sample went back.

    Args:
        length: tokens every beam had.
        summary: number of the earlier token that they leant on.
        token: that token, in the best beam.
        kept: tokens they kept.
        taken_back: those of the best beam that were taken back.
    """

    length: int
    summary: int
    token: int
    kept: int
    taken_back: tuple[int, ...]


@dataclass
class Choice:
    """What to append: row k continues beam ``parents[k]`` with ``tokens[k]``, its candidate ``columns[k]`` (-1: none)."""

    parents: list[int]
    tokens: Tensor
    columns: list[int] = field(default_factory=list)


class Search:
    """OPERA for one sample, without a model: logits and attention in, choices out.

    One step is :meth:`candidates`, :meth:`judge`, then :meth:`rewound` if that asked to go back, then :meth:`choose`, then
    :meth:`appended` if the chosen tokens had to be run.
    """

    def __init__(
        self,
        method: OPERA,
        limits: Limits,
        prompt: Tensor,
        counted: int,
        process: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
        length_penalty: float | None = 1.0,
        early_stopping: bool | str | None = False,
    ):
        self.method, self.limits, self.prompt, self.counted, self.process = method, limits, prompt, counted, process
        self.beams = method.num_beams
        device = prompt.device
        scores = torch.full((self.beams,), -1e9, device=device)
        scores[0] = 0
        length_penalty = 1.0 if length_penalty is None else length_penalty
        self.state = _State(
            tokens=torch.empty(self.beams, 0, dtype=torch.long, device=device),
            scores=scores,
            # Products of a hundred factors leave single precision; mps has no other.
            products=torch.empty(
                self.beams, 0, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
            ),
            finished=Hypotheses(self.beams, length_penalty, early_stopping or False, counted + limits.new_tokens),
            closed=False,
            origin=None,
        )
        self.done = limits.new_tokens <= 0
        self.returns: list[Rollback] = []
        self.history: list[_State] = []
        self.locations: list[list[int]] = []
        self._counts: list[Counter[int]] = [Counter() for _ in range(self.beams)]
        self._rollbacks_at: Counter[int] = Counter()
        self._rejected: dict[int, Tensor] = {}
        self._latest = -1
        # What one step leaves for its next call: scaled attention of the candidates, the table of scores after going
        # back and what is excluded from it, and whether the beams just went back.
        self._weights: Tensor | None = None
        self._open: Tensor | None = None
        self._excluded = torch.empty(0, 2, dtype=torch.long)
        self._fresh = False

    @property
    def rollbacks(self) -> int:
        """How often the beams went back."""
        return len(self.returns)

    @property
    def summaries(self) -> list[int]:
        """Per token of the beams the number of the token that its candidates leant on most, itself included."""
        return [_most_frequent(step) for step in self.locations]

    @property
    def length(self) -> int:
        """Tokens every beam holds."""
        return self.state.tokens.shape[1]

    def candidates(self, logits: Tensor) -> Tensor:
        """(beams, N_can) the tokens to look at, from logits (beams, N) after the newest tokens."""
        count = min(self.method.num_attn_candidates, logits.shape[-1])
        self._logits = logits
        self._values, self._candidates = logits.topk(count, -1)
        return self._candidates

    def judge(self, image: Tensor, response: Tensor) -> Tensor | None:
        """Penalise the candidates, and decide whether to go back.

        Args:
            image: (beams, N_can) attention of each candidate to the image.
            response: (beams, N_can, t + 1) its attention to the response, itself last. Largest over heads, normalised over
                all it sees.

        Returns:
            (beams, t') the tokens to go back to, whose logits :meth:`rewound` then needs; ``None`` to go on.
        """
        method, state, t = self.method, self.state, self.length
        self._weights = weights = (method.scale_factor * response).to(state.products.dtype)
        products = torch.cat([state.products[:, None] * weights[..., :t], weights[..., t:]], -1)
        dtype = getattr(torch, method.constant("score_dtype"))
        table = (method.constant("penalty_scale") * products.float()).to(dtype)
        if method.form == "paper" and t + 1 > method.window_size:
            table[..., : t + 1 - method.window_size] = -1
        leaning, where = table.max(-1)
        penalty = -image if t + 1 <= method.constant("image_bonus_tokens") else leaning
        state.candidates = self._candidates
        state.candidate_scores = self._values - (method.penalty_weights * penalty).to(self._values.dtype)
        locations = [_most_frequent(row) for row in where.tolist()]
        self._note(locations)
        if len(self.history) >= method.window_size:
            self.history.pop(0)
        self.history.append(_snapshot(state))
        position = self._rollback_position(t + 1, _most_frequent(locations))
        self._open = None
        if position is None:
            return None
        return self._go_back(position, _most_frequent(locations))

    def _note(self, locations: list[int]) -> None:
        self.locations.append(locations)
        for count, location in zip(self._counts, locations):
            count[location] += 1
        if self.method.form == "paper" and len(self.locations) > self.method.window_size:
            for count, location in zip(self._counts, self.locations[-self.method.window_size - 1]):
                count[location] -= 1

    def _forget_locations(self, steps: int) -> None:
        window = self.method.window_size if self.method.form == "paper" else len(self.locations)
        del self.locations[len(self.locations) - steps :]
        kept = self.locations[-window:] if window else []
        self._counts = [Counter(step[beam] for step in kept) for beam in range(self.beams)]

    def _rollback_position(self, length: int, summary: int) -> int | None:
        """How many tokens the beams keep if they go back now, ``length`` being theirs with a candidate; else ``None``."""
        method = self.method
        enough = method.threshold if method.form == "paper" else method.threshold + 1
        if any(count[summary] < enough for count in self._counts) or summary < method.constant("min_rollback_index"):
            return None
        if method.form == "paper" and summary < self._latest:
            return None
        most = method.constant("max_rollbacks")
        position = next((p for p in (summary + 1, summary) if self._rollbacks_at[p] < most), None)
        if position is None or self._steps_back(length, position) > len(self.history):
            return None
        if method.form == "code" and summary + 1 >= method.window_size:
            return None
        if method.form == "paper" and not self._choices_left(length, position):
            return None
        self._rollbacks_at[position] += 1
        self._latest = max(self._latest, summary)
        return position

    @staticmethod
    def _steps_back(length: int, position: int) -> int:
        # The choice to be made again needs a choice that was made.
        return max(length - position, 2)

    def _choices_left(self, length: int, position: int) -> bool:
        """Enough candidates of live beams were never chosen at this position to fill the beams."""
        back = self._steps_back(length, position)
        old, after = self.history[-back], self.history[-back + 1]
        live = (old.scores > -1e8).tolist()
        there = {(beam, token) for beam, row in enumerate(old.judged()[0].tolist()) if live[beam] for token in row}
        return len(there - set(map(tuple, self._rejections(position, after).tolist()))) >= self.beams

    def _rejections(self, position: int, after: _State) -> Tensor:
        """(n, 2) the (beam, token) pairs that were chosen at this position before, ``after`` last."""
        # The first state alone has none, and it comes after no other.
        assert after.origin is not None
        pairs = torch.stack(after.origin, -1)
        return torch.cat([self._rejected[position], pairs]) if position in self._rejected else pairs

    def _go_back(self, position: int, summary: int) -> Tensor:
        back = self._steps_back(self.length + 1, position)
        old, after = self.history[-back], self.history[-back + 1]
        del self.history[len(self.history) - back + 1 :]
        self._forget_locations(back - 1)
        self._rejected.pop(position + 1, None)
        self._rejected[position] = self._excluded = self._rejections(position, after)
        self._fresh = True
        kept = old.tokens.shape[1]
        tokens = self.state.tokens[0].tolist()
        leant_on = tokens[min(summary, len(tokens) - 1)]
        self.returns.append(Rollback(self.length, summary, leant_on, kept, tuple(tokens[kept:])))
        # What was finished while this choice is made again stays finished if it is made a third time, as in the
        # authors' code: the state is used itself, not a copy.
        self.state = old
        return old.tokens

    def rewound(self, logits: Tensor) -> None:
        """Logits (beams, N) after the tokens that :meth:`judge` went back to."""
        if self.method.form == "paper":
            self._open = self._among_candidates(logits)
        else:
            lowest = logits.masked_fill(logits == float("-inf"), float("inf")).amin(-1, keepdim=True)
            self._open = logits + (self.method.fill - lowest)
        self._open[self._excluded[:, 0], self._excluded[:, 1]] = self.method.fill

    def _among_candidates(self, logits: Tensor) -> Tensor:
        scores = torch.full_like(logits, self.method.fill)
        return scores.scatter_(-1, *self.state.judged())

    def choose(self) -> Choice:
        """Rank the continuations of all beams and pick; may end the search."""
        state, beams, t = self.state, self.beams, self.length
        scores = self._among_candidates(self._logits) if self._open is None else self._open
        scores = scores.log_softmax(-1)
        if len(self.process):
            ids = torch.cat([self.prompt.expand(beams, -1), state.tokens], 1)
            for processor in self.process:
                scores = processor(ids, scores)
        sampling.check_left(scores, f"in the beams, after {state.tokens.shape[1]} generated tokens")
        scores = scores + state.scores[:, None]
        count = min((1 + max(len(self.limits.eos), 1)) * beams, scores.numel())
        values, places = scores.flatten().topk(count)
        parents, tokens = places // scores.shape[-1], places % scores.shape[-1]
        ended = [token in self.limits.eos for token in tokens.tolist()]
        stopped = [False] * count
        if self.limits.other:
            whole = torch.cat([self.prompt.expand(count, -1), state.tokens[parents], tokens[:, None]], 1)
            stopped = self.limits.stopped(whole)
        picked: list[int] = []
        for rank, (end, stop) in enumerate(zip(ended, stopped)):
            if end or stop:
                if rank < beams:
                    answer = state.tokens[parents[rank]]
                    if not end:
                        answer = torch.cat([answer, tokens[rank : rank + 1]])
                    state.finished.add(answer, float(values[rank]), self.counted + len(answer), end)
                continue
            picked.append(rank)
            if len(picked) == beams:
                break
        closed = state.closed or state.finished.closed(float(values[0]), self.counted + t + 1) or not picked
        totals = values[picked + [0] * (beams - len(picked))].clone()
        totals[len(picked) :] = -1e9
        picked = (picked + picked[:1] * beams)[:beams] if picked else [0] * beams
        parents, tokens = parents[picked], tokens[picked]
        columns = [-1] * beams
        if not self._fresh:
            same = self._candidates[parents] == tokens[:, None]
            columns = torch.where(same.any(-1), same.int().argmax(-1), -1).tolist()
            if min(columns) < 0:
                columns = [-1] * beams
        products = state.products
        if columns[0] >= 0:
            assert self._weights is not None
            weights = self._weights[parents, columns]
            products = torch.cat([state.products[parents] * weights[:, :t], weights[:, t:]], -1)
            products = products.clamp(max=torch.finfo(products.dtype).max)
        else:
            products = state.products[parents]
        self._fresh = False
        self.state = _State(
            tokens=torch.cat([state.tokens[parents], tokens[:, None]], 1),
            scores=totals,
            products=products,
            finished=state.finished,
            closed=closed,
            origin=(parents, tokens),
        )
        self.done = closed or self.length >= self.limits.new_tokens
        return Choice(parents.tolist(), tokens, columns)

    def appended(self, response: Tensor) -> None:
        """Attention (beams, t) of chosen tokens that were no candidates to the response, themselves last."""
        weights = (self.method.scale_factor * response).to(self.state.products.dtype)
        products = torch.cat([self.state.products * weights[:, :-1], weights[:, -1:]], -1)
        self.state.products = products.clamp(max=torch.finfo(products.dtype).max)

    def answer(self) -> tuple[Tensor, float]:
        """The best answer (t,), with its end token if there is room, and its score."""
        state = self.state
        if not state.closed:
            for tokens, total in zip(state.tokens, state.scores.tolist()):
                state.finished.add(tokens, total, self.counted + len(tokens), True)
        score, tokens, ended = state.finished.best()
        if ended and self.limits.eos and len(tokens) < self.limits.new_tokens:
            tokens = torch.cat([tokens, tokens.new_tensor([self.limits.eos[0]])])
        return tokens, score


def _snapshot(state: _State) -> _State:
    return _State(**{**vars(state), "finished": state.finished.copy()})


def _most_frequent(values: Sequence[int]) -> int:
    """The most frequent value, of several the smallest."""
    counts = Counter(values)
    most = max(counts.values())
    return min(value for value, count in counts.items() if count == most)


class Recorder(Edit):
    """Attention rows of the last decoder layer for the tokens of the newest forward, while ``on``.

    Args:
        last: number of that layer.
    """

    def __init__(self, last: int):
        self.on = False
        self._last = last
        self._rows: Tensor | None = None

    def output(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor
    ) -> Tensor:
        if self.on and layer == self._last:
            seen = visible(query.shape[2], key.shape[2], mask, key.device)
            self._rows = probabilities(query, key, seen, scaling).amax(1)
        return out

    def take(self) -> Tensor:
        """(R, q, S) float32: per new token the largest probability over heads for every slot of the cache, itself
        included; not normalised again.

        Raises:
            UnsupportedError: the decoder's last layer did not call the attention interface.
        """
        if self._rows is None:
            raise UnsupportedError(
                "the last decoder layer of this model has no attention that transformers' attention interface runs, so "
                "its attention rows cannot be read; OPERA needs a model whose last layer is ordinary attention."
            )
        rows, self._rows = self._rows, None
        return rows


class Model:
    """What a batch of searches asks of a language model: one forward per step for all of them.

    Args:
        rows: the prompts after their prefill, one row per sample.
        recorder: of the last layer's attention.
        spans: per sample the slots [start, stop) of its image.
        beams: rows per sample, sample-major.
    """

    def __init__(self, rows: Rows, recorder: Recorder, spans: Sequence[tuple[int, int]], beams: int):
        self.rows, self.recorder, self.spans, self.beams = rows, recorder, list(spans), beams

    def start(self) -> Tensor:
        """(B, beams, N) logits for the first token."""
        self.rows.select([row for row in range(len(self.rows)) for _ in range(self.beams)])
        return self._by_sample(self.rows.first)

    def look(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run candidates (B, beams, C); attention to the image (B, beams, C), and per sample to the response
        (beams, C, t + 1), as :meth:`Search.judge` takes them."""
        c = tokens.shape[-1]
        self.recorder.on = True
        self.rows.look(tokens.flatten(0, 1))
        self.recorder.on = False
        return self._attention(self.recorder.take().to(self.rows.device), c)

    def rewind(self, prefixes: dict[int, Tensor]) -> dict[int, Tensor]:
        """Go back in some samples to tokens (beams, t'), in one forward over these alone; their logits (beams, N)."""
        where = [row for sample in prefixes for row in self._rows_of(sample)]
        counts = [prefix.shape[1] for prefix in prefixes.values() for _ in range(self.beams)]
        width = max(counts)
        if len(prefixes) * self.beams == len(self.rows):
            self.rows.crop([0] * len(self.rows))
            part = self.rows
        else:
            part = self.rows.prompts(where)
        if width == 0:
            logits = part.first
        else:
            tokens = torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in prefixes.values()])
            logits = part.extend(tokens, counts)
            empty = torch.tensor([count == 0 for count in counts], device=logits.device)
            logits = torch.where(empty[:, None], part.first, logits)
        if part is not self.rows:
            self.rows.put(where, part)
        return dict(zip(prefixes, self._by_sample(logits)))

    def advance(self, choices: dict[int, Choice]) -> tuple[Tensor, dict[int, Tensor]]:
        """Append what was chosen; samples that are not named have ended and are dropped.

        Samples whose choices were no candidates take one more forward.

        Returns:
            (B', beams, N) logits, and for the last-named samples, by their place among the B' that go on, the attention
            (beams, t + 1) of what was appended.
        """
        parents = [s * self.beams + parent for s, choice in choices.items() for parent in choice.parents]
        columns = [column for choice in choices.values() for column in choice.columns]
        self.spans = [self.spans[s] for s in choices]
        logits = self.rows.take(parents, columns)
        going = list(choices.values())
        missing = [s for s, choice in enumerate(going) if choice.columns[0] < 0]
        if not missing:
            # Every row took one of its candidates.
            assert logits is not None
            return self._by_sample(logits), {}
        tokens = torch.cat([choice.tokens for choice in going])[:, None]
        counts = [int(column < 0) for column in columns]
        before = list(self.rows.lengths)
        self.recorder.on = True
        appended = self.rows.extend(tokens, counts)
        self.recorder.on = False
        _, response = self._attention(self.recorder.take().to(self.rows.device), 1, before)
        if logits is None:
            logits = appended
        else:
            chosen = torch.tensor(counts, dtype=torch.bool, device=logits.device)
            logits = torch.where(chosen[:, None], appended, logits)
        return self._by_sample(logits), {s: response[s][:, 0] for s in missing}

    def _rows_of(self, sample: int) -> range:
        return range(sample * self.beams, (sample + 1) * self.beams)

    def _by_sample(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, self.beams))

    def _attention(self, rows: Tensor, c: int, lengths: Sequence[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The recorded rows (R, C, P + T + C), each token's own slot put behind the response it saw."""
        lengths = self.rows.lengths if lengths is None else lengths
        own = rows[..., -c:].diagonal(dim1=-2, dim2=-1)
        past = rows[..., :-c]
        total = past.sum(-1) + own
        past, own = self._by_sample(past / total[..., None]), self._by_sample(own / total)
        image = torch.stack([past[s, ..., start:stop].sum(-1) for s, (start, stop) in enumerate(self.spans)])
        prompt = self.rows.prompt
        response = [
            torch.cat([past[s, ..., prompt : prompt + lengths[s * self.beams]], own[s, ..., None]], -1)
            for s in range(len(own))
        ]
        return image, response


def search_all(searches: Sequence[Search], model: Model) -> None:
    """Run the searches of a batch to their ends, one forward per step, and one more per step in which some go back."""
    active = [search for search in searches if not search.done]
    if not active:
        return
    logits = model.start()
    while True:
        image, response = model.look(torch.stack([s.candidates(own) for s, own in zip(active, logits)]))
        prefixes = {}
        for number, search in enumerate(active):
            prefix = search.judge(image[number], response[number])
            if prefix is not None:
                prefixes[number] = prefix
        if prefixes:
            for number, own in model.rewind(prefixes).items():
                active[number].rewound(own)
        choices = {number: search.choose() for number, search in enumerate(active)}
        choices = {number: choice for number, choice in choices.items() if not active[number].done}
        if not choices:
            return
        active = [active[number] for number in choices]
        logits, appended = model.advance(choices)
        for number, own in appended.items():
            active[number].appended(own)
