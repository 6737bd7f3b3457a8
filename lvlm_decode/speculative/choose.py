"""The target's choice at each row of a draft: processors and warpers with the row's own path, arg max or keyed noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..engine.sampling import KeyedDraw, check_left, gumbel, left
from .tree import Tree

#: Processors that look at a row's scores alone, so that all rows of a draft can be processed at once.
ROW_WISE = frozenset(
    {
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        InfNanRemoveLogitsProcessor,
        LogitNormalization,
        MinPLogitsWarper,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    }
)


class Chooser:
    """Chooses tokens as the undrafted loop would.

    History-dependent processors are run along the accepted path alone, in order, one call for each committed token, with
    exactly the tokens that precede it: what they see, and how often they are called, is what they see without a draft.

    Args:
        processors: as ``generate()`` made them; a :class:`KeyedDraw` at the end is replaced by its noise.
        prompt: (B, S) prompt ids.
        sample: whether tokens are drawn. Without a :class:`KeyedDraw` the noise is keyed by a seed from torch's global
            generator: the law is that of ``torch.multinomial``, the tokens are not.
        record: keep the scores of committed tokens.
    """

    def __init__(self, processors: LogitsProcessorList, prompt: Tensor, sample: bool, record: bool = False):
        processors = LogitsProcessorList(processors)
        self.noise: KeyedDraw | None = None
        if processors and isinstance(processors[-1], KeyedDraw):
            self.noise = processors.pop()
        elif sample:
            seed = int(torch.randint(2**62, (1,)))
            self.noise = KeyedDraw(seed, range(len(prompt)), prompt.shape[1])
        # Their annotations ask for a LongTensor, which no tensor is to a checker.
        self.processors: Any = processors
        self.row_wise = all(type(processor) in ROW_WISE for processor in processors)
        self.rows = len(prompt)
        #: (1, S + generated) ids of each row; kept only for processors that read them.
        self.history = [] if self.row_wise else [prompt[b : b + 1] for b in range(self.rows)]
        self.record = record
        self.size = 0
        self.recorded: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.rows)]
        self._noise: dict[tuple[int, int], Tensor] = {}

    def at(self, scores: Tensor, tree: Tree, generated: Sequence[int]) -> Callable[[int, int], int]:
        """The choice at every row of a draft.

        Args:
            scores: (B, n, N) mitigated scores.
            tree: the draft.
            generated: for each sample the number of tokens generated before the one that row 0 chooses.

        Returns:
            (sample, row) -> token, to be asked along a path, from the root.
        """
        self.size = scores.shape[-1]
        if self.row_wise and self.noise is None and not self.record:
            every = self._process_all(scores)
            # Together, so that the host waits once.
            chosen, some = torch.stack([every.argmax(-1), left(every).long()]).tolist()

            def best(sample: int, row: int) -> int:
                if not some[sample][row]:
                    check_left(every[sample, row][None], f"after {generated[sample]} generated tokens")
                return chosen[sample][row]

            return best
        processed = self._process_all(scores) if self.row_wise else None
        if self.noise is not None:
            # Noise of rejected levels serves the next cycle; what lies behind is done with.
            self._noise = {key: noise for key, noise in self._noise.items() if key[1] >= generated[key[0]]}

        def choose(sample: int, row: int) -> int:
            if processed is not None:
                own = processed[sample, row]
            else:
                own = self._process_one(sample, scores[sample, row], tree.lists[sample][row] if row else None)
            check_left(own[None], f"after {generated[sample]} generated tokens")
            if self.noise is not None:
                position = generated[sample] + tree.shape(sample).depth[row]
                drawn = (own + self._gumbel(self.noise, sample, position, len(own), own.device)).argmax()
                token = int(drawn)
                if self.record:
                    own = torch.full_like(own, float("-inf")).index_fill_(0, drawn, 0.0)
            else:
                token = int(own.argmax())
            if self.record:
                self.recorded[sample].append((scores[sample, row].clone(), own.clone()))
            return token

        return choose

    def couple(self, scores: Tensor, positions: Sequence[int], ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A draft's scores under the noise that the target will draw with: couples what both choose.

        The best token of ``log q + G`` is far likelier to be the best one of ``log p + G`` than a token drawn apart
        (arXiv 2408.07978). Allowed because acceptance compares choices: the draft is then a function of prefix and noise.

        Args:
            scores: (B, t, N') scores of a draft.
            positions: for each sample the position of the token they choose.
            ids: (N',) tokens the scores are for; ``None`` for the whole vocabulary, N' = N.

        Returns:
            (B, t, N') as processors that look at a row alone leave them, and the same under the noise; ``scores``
            themselves, twice, unless tokens are drawn. Of a trimmed vocabulary processors may leave nothing: -inf
            throughout, or NaN from one that normalises.
        """
        if self.noise is None:
            return scores, scores
        if self.row_wise:
            scores = self._process_trimmed(scores, ids)
        drawn = [self._gumbel(self.noise, b, at, self.size, scores.device) for b, at in enumerate(positions)]
        noise = torch.stack(drawn)
        return scores, scores + (noise if ids is None else noise[:, ids])[:, None]

    def _process_trimmed(self, scores: Tensor, ids: Tensor | None) -> Tensor:
        """(..., N') processed scores of the tokens ``ids``: processors name tokens, so they see the whole vocabulary."""
        if ids is None:
            return self._process_all(scores)
        whole = scores.new_full((*scores.shape[:-1], self.size), float("-inf"))
        return self._process_all(whole.index_copy_(-1, ids, scores)).index_select(-1, ids)

    def commit(self, sample: int, token: int) -> None:
        """``token`` now ends the text of ``sample``."""
        if not self.row_wise:
            text = self.history[sample]
            self.history[sample] = torch.cat([text, text.new_full((1, 1), token)], 1)

    def _process_all(self, scores: Tensor) -> Tensor:
        if not self.processors:
            return scores
        flat = scores.reshape(-1, scores.shape[-1])
        ids = torch.zeros(len(flat), 1, dtype=torch.long, device=scores.device)
        return self.processors(ids, flat).view_as(scores)

    def _process_one(self, sample: int, scores: Tensor, token: int | None) -> Tensor:
        if token is not None:
            self.commit(sample, token)
        # As many rows as the batch has, so that a processor that counts rows finds this one in its place.
        ids = self.history[sample].expand(self.rows, -1)
        return self.processors(ids, scores.expand(self.rows, -1).clone())[sample]

    def _gumbel(self, noise: KeyedDraw, sample: int, position: int, size: int, device: torch.device) -> Tensor:
        key = (sample, position)
        if key not in self._noise:
            self._noise[key] = gumbel(noise.seed, noise.row_ids[sample], position, size).to(device)
        return self._noise[key]


class Stopper:
    """Whether a row ends with a token, as ``generate()``'s stopping criteria say.

    Every criterion is called once for each committed token of each sample, in order, with that sample's ids alone
    (1, S + generated) and without scores. A criterion that keeps something for each row of the batch, by its index,
    cannot be served: samples of a batch are at different lengths while drafts are verified.

    Args:
        criteria: as ``generate()`` made them.
        prompt: (B, S) prompt ids.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompt: Tensor):
        self.width = prompt.shape[1]
        self.most: int | None = None
        self.ends: set[int] = set()
        self.other: list[Any] = []
        #: Whether rows that ended are filled up. Without end tokens Hugging Face decodes them on, until all have ended.
        self.fills = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                limit = criterion.max_length - self.width
                self.most = limit if self.most is None else min(self.most, limit)
            elif type(criterion) is EosTokenCriteria:
                self.ends.update(criterion.eos_token_id.flatten().tolist())
            else:
                self.other.append(criterion)
        self.prompt = prompt

    def room(self, generated: int) -> int:
        """How many further draft tokens could be committed, given one more is committed anyway."""
        return 1 << 30 if self.most is None else self.most - generated - 1

    def full(self, generated: list[int]) -> bool:
        """Whether the length limit is reached."""
        return self.most is not None and len(generated) >= self.most

    def stops(self, sample: int, generated: list[int]) -> bool:
        """Whether the text of ``sample`` ends with the last of ``generated``."""
        ended = generated[-1] in self.ends or self.full(generated)
        if self.other:
            text = torch.cat([self.prompt[sample], self.prompt.new_tensor(generated)])[None]
            # A list, so that each is called: criteria may count their calls.
            ended = any([ended, *(bool(criterion(text, None).all()) for criterion in self.other)])
        return ended
