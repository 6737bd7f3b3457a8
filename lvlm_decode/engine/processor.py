"""The portable form: ``generate(logits_processor=[VCD().processor(model, inputs)])``.

A processor sees tokens and scores, never beams, drafts or caches. So this one keeps the views' own caches and finds, for
every row it is shown, the tokens those caches hold already by their common prefix: a view's keys and values depend on the
sample and the prefix alone. It follows beams and drafts exactly, and costs a forward of the views per call.

Processors that stand before it in the list (a repetition penalty, say) change view 0's scores before the contrast; in the
two other forms the contrast comes first, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..errors import InputError, UnsupportedError
from ..method import Method, Step
from .attach import Run, check_modes, project_of
from .stack import Lane


class ViewsProcessor(LogitsProcessor):
    """Combines the scores it is given (view 0) with those of the method's views.

    Args:
        model: the LVLM that generates.
        inputs: what ``generate()`` is called with, as the processor gave them.
        seed, sample_ids: see :meth:`lvlm_decode.engine.attach.Run`.

    Raises:
        UnsupportedError: a method that changes the model or its search, not its scores.
    """

    #: Read by transformers: continuous batching shows rows of different requests, which have no views here.
    supports_continuous_batching = False

    def __init__(
        self,
        method: Method,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        *,
        processor: Any = None,
        seed: int | None = None,
        sample_ids: Sequence[Hashable] | None = None,
    ):
        check_modes(method, ["processor"])
        if any(type(part).patch is not Method.patch for part in method.parts()):
            raise UnsupportedError(
                f"{method.name} changes the model's forward, which a LogitsProcessor cannot; use lvlm_decode.attach."
            )
        self.run = Run(model, method, dict(inputs), processor=processor, seed=seed, sample_ids=sample_ids)
        captured = self.run.captured()
        self._prompt = inputs["input_ids"].shape[1]
        # Hidden states come from a forward of view 0 as well; its logits are the scores we are given.
        first = 0 if self.run.probes.hidden else 1
        self._views = list(range(first, len(captured)))
        self._samples = len(captured[0].input_ids)
        self._lanes: list[Lane] | None = None
        self._tokens: Tensor | None = None
        self._project = project_of(self.run.module)

    def _open(self, rows: int) -> None:
        """Prefill the views of every row, sample-major."""
        if rows % self._samples:
            raise InputError(
                f"the processor was made for {self._samples} samples and sees {rows} rows; make a new one for each call."
            )
        self.run.rows_per_sample = rows // self._samples
        self.run._captured = None
        captured = self.run.captured()
        self._lanes = []
        for number in self._views:
            view = self.run.views[number - 1] if number else None
            lane = Lane(
                [captured[number]],
                [number],
                patch=view.patch if view else None,
                forward=view.module.forward if view and view.module else captured[number].module.forward,
                pad_token_id=self.run.family.pad_token_id,
            )
            lane.cache.activate_past_recording()
            self._lanes.append(lane)
        outputs = [lane.prefill(1, **self._hidden()) for lane in self._lanes]
        self._keep([(out.logits[:, -1:], self._states(out, 1)) for out in outputs])

    def _hidden(self) -> dict[str, Any]:
        return {"output_hidden_states": list(self.run.probes.hidden)} if self.run.probes.hidden else {}

    def _states(self, out: Any, keep: int) -> dict[int, Tensor]:
        return {layer: out.hidden_states[layer][:, -keep:] for layer in self.run.probes.hidden}

    def _keep(self, new: list[tuple[Tensor, dict[int, Tensor]]]) -> None:
        self._logits = [logits.float() for logits, _ in new]
        self._hiddens = [states for _, states in new]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = len(input_ids)
        tokens = input_ids[:, self._prompt :] if input_ids.shape[1] >= self._prompt else input_ids
        if self._lanes is None or self._tokens is None or len(self._tokens) != rows:
            self._open(rows)
            self._tokens = tokens[:, :0]
        self._follow(tokens)
        at = tokens.shape[1]
        logits = [own[:, at : at + 1] for own in self._logits]
        hidden = {
            layer: torch.stack([states[layer][:, at : at + 1] for states in self._hiddens])
            for layer in self.run.probes.hidden
        }
        if self._views and self._views[0] == 0:
            logits = logits[1:]
        stacked = torch.stack([scores.float()[:, None], *logits])
        step = Step(
            stacked,
            torch.full((rows, 1), at, device=scores.device),
            tuple(view.weight for view in self.run.views),
            hidden,
            self._project,
        )
        # Beams add these up as log-probabilities, and no processor after this one would normalise them.
        return self.run.method.scores(step)[:, 0].log_softmax(-1)

    def _follow(self, tokens: Tensor) -> None:
        """Bring the views' caches to ``tokens`` (B, t): keep what they share, take back the rest, run what is new."""
        have = self._tokens
        common = min(have.shape[1], tokens.shape[1])
        same = (have[None, :, :common] == tokens[:, None, :common]).cumprod(-1).sum(-1)
        sample = torch.arange(len(tokens), device=tokens.device) // self.run.rows_per_sample
        same = same.masked_fill(sample[:, None] != sample[None], -1)
        index = same.argmax(1)
        shared = int(same.gather(1, index[:, None]).min())
        if not torch.equal(index, torch.arange(len(index), device=index.device)):
            for i, lane in enumerate(self._lanes):
                lane.reorder(index)
                self._logits[i] = self._logits[i][index]
                self._hiddens[i] = {layer: states[index] for layer, states in self._hiddens[i].items()}
        drop = have.shape[1] - shared
        if drop:
            for i, lane in enumerate(self._lanes):
                lane.crop(drop)
                self._logits[i] = self._logits[i][:, : shared + 1]
                self._hiddens[i] = {layer: states[:, : shared + 1] for layer, states in self._hiddens[i].items()}
        new = tokens[:, shared:]
        if new.shape[1]:
            for i, lane in enumerate(self._lanes):
                out = lane.extend(new, new.shape[1], **self._hidden())
                self._logits[i] = torch.cat([self._logits[i], out.logits.float()], 1)
                for layer, states in self._states(out, new.shape[1]).items():
                    self._hiddens[i][layer] = torch.cat([self._hiddens[i][layer], states], 1)
        self._tokens = tokens
