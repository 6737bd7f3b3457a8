"""The two entries beside ``attach``: ``generate(custom_generate=VCD())`` and ``generate(logits_processor=[...])``.

**One call.** ``generate()`` hands a callable the rows it prepared, already expanded for beams; the samples are read back from
them. It drops ``streamer``, ``assistant_model`` and ``tokenizer`` on this path: a streamer is looked up where ``generate()``
holds it, an assistant is refused, and stop strings are refused by transformers itself.

**The portable form.** A processor sees tokens and scores, never beams, drafts or caches. So this one keeps the views' own
caches and finds, for every row it is shown, the tokens those caches hold already by their common prefix: a view's keys and
values depend on the sample and the prefix alone. It follows beams and drafts exactly, and costs a forward of the views per
call. Processors that stand before it in the list (a repetition penalty, say) change view 0's scores before the contrast; in the
other forms the contrast comes first, as in the authors' code.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..errors import InputError, UnsupportedError
from ..families import families, family_of
from ..families.base import Family
from ..method import Method, Step
from . import conversation, hf, sampling
from .hf import Call
from .modes import check_modes, rows_per_sample
from .run import Run
from .stack import Lane
from .strategy import decode


@functools.cache
def signature() -> inspect.Signature:
    """What a method called by ``generate(custom_generate=method)`` says it takes.

    ``generate()`` hands a callable, unexpanded, the inputs that its signature names: those of the encoders of all families.
    """
    loop = ("model", "input_ids", "logits_processor", "stopping_criteria", "generation_config")
    vision = sorted({name for family in families() for name in family.encoder_inputs})
    plain, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            *(inspect.Parameter(name, plain) for name in loop),
            *(inspect.Parameter(name, named, default=None) for name in (*vision, "seed")),
            inspect.Parameter("model_kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
    )


def custom_generate(method: Method, model: torch.nn.Module, call: Call, seed: int | None) -> Any:
    """Decode as ``attach`` would, from what ``generate()`` gives a callable.

    Args:
        call: its rows are those of beams or return sequences, sample-major; its inputs hold the pixel-side ones unexpanded.

    Raises:
        UnsupportedError: a language model inside an LVLM, to which pixels and other prompts never get.
    """
    kept = conversation.kept_in(call.cache, model, method)
    asked = hf.asked()
    if asked.get("assistant_model") is not None:
        raise UnsupportedError(
            f"generate(custom_generate={method.name}) is given no assistant_model by transformers; use "
            "lvlm_decode.attach(model, method), or leave it out."
        )
    call = dataclasses.replace(call, streamer=asked.get("streamer"), synced=hf.synced(model, asked.get("synced_gpus")))
    if call.inputs.get("inputs_embeds") is not None:
        raise UnsupportedError(
            f"{method.name} got the embeddings of the language model inside an LVLM, in which the image is already mixed; "
            "use lvlm_decode.attach(model, method) on the LVLM instead of custom_generate=."
        )
    family = family_of(model)
    vision = {name: call.inputs.pop(name, None) for name in signature().parameters if name in call.inputs}
    expand = rows_per_sample(call.config.num_beams, call.config.num_return_sequences)
    rows = slice(None, None, expand)
    inputs: dict[str, Any] = {"input_ids": call.input_ids[rows], **{k: v for k, v in vision.items() if v is not None}}
    mask = call.inputs.get("attention_mask")
    # generate() leaves out a mask that hides nothing.
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"]) if mask is None else mask[rows]
    for key in family.token_keys:
        if isinstance(call.inputs.get(key), Tensor):
            inputs[key] = call.inputs[key][rows]
    features = None
    if given := hf.take_images(call.inputs):
        if expand > 1:
            raise UnsupportedError(
                "features instead of pixels cannot be told apart once they are expanded for beams; pass pixel_values, or "
                "use lvlm_decode.attach."
            )
        features = family.unpack(given)
    hf.check_inputs(call.inputs, family.input_keys, family.config.model_type)
    # Among the inputs are positions that generate() made itself; only the caller's own are those of no view but the sample's.
    inputs["position_ids"] = asked.get("position_ids")
    ids = None if kept is None else kept.sample_ids
    run = Run(
        model,
        method,
        inputs,
        seed=seed,
        sample_ids=ids,
        rows_per_sample=expand,
        family=family,
        features=features,
        kept=kept,
    )
    del kept
    with conversation.going_on(run, call.cache):
        return decode(run, call)


class ViewsProcessor(LogitsProcessor):
    """Combines the scores it is given (view 0) with those of the method's views.

    Args:
        model: the LVLM that generates.
        inputs: what ``generate()`` is called with, as the processor gave them.
        family: the adapter of a model family that is not registered.
        seed, sample_ids: see :class:`lvlm_decode.engine.run.Run`.

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
        family: type[Family] | None = None,
    ):
        check_modes(method, ["processor"])
        model = hf.unwrapped(model)
        hf.check_empty(inputs.values())
        if any(type(part).patch is not Method.patch for part in method.parts()):
            raise UnsupportedError(
                f"{method.name} changes the model's forward, which a LogitsProcessor cannot; use lvlm_decode.attach."
            )
        adapter = None if family is None else family(model)
        self.run = Run(
            model,
            method,
            hf.model_inputs(inputs),
            processor=processor,
            seed=seed,
            sample_ids=sample_ids,
            family=adapter,
        )
        self._prompt = inputs["input_ids"].shape[1]
        # Hidden states come from a forward of view 0 as well; its logits are the scores we are given.
        self._views = list(range(0 if self.run.probes.hidden else 1, len(self.run.samples)))
        self._samples = len(self.run.batch.samples)
        self._rows_per_sample = 1
        self._lanes: list[Lane] = []
        #: (R, t) generated tokens that the lanes hold.
        self._tokens = inputs["input_ids"][:0, :0]
        #: Per lane (R, t + 1, N) logits, and hidden states (R, t + 1, D) by layer.
        self._logits: list[Tensor] = []
        self._hiddens: list[dict[int, Tensor]] = []

    def _open(self, rows: int) -> None:
        """Prefill the views of every row, sample-major."""
        if rows % self._samples:
            raise InputError(
                f"the processor was made for {self._samples} samples and sees {rows} rows; make a new one for each call."
            )
        self._rows_per_sample = rows // self._samples
        prepared = self.run.prepare(self._rows_per_sample)
        self._lanes = [self.run.lane([number], [prepared[number]]) for number in self._views]
        for lane in self._lanes:
            lane.kv.record()
        outputs = [lane.prefill(1, **self._hidden()) for lane in self._lanes]
        self._logits = [out.logits[:, -1:].float() for out in outputs]
        self._hiddens = [self._states(out, 1) for out in outputs]

    def _hidden(self) -> dict[str, Any]:
        return {"output_hidden_states": list(self.run.probes.hidden)} if self.run.probes.hidden else {}

    def _states(self, out: Any, keep: int) -> dict[int, Tensor]:
        return {layer: out.hidden_states[layer][:, -keep:] for layer in self.run.probes.hidden}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = len(input_ids)
        tokens = input_ids[:, self._prompt :] if input_ids.shape[1] >= self._prompt else input_ids
        if not self._lanes:
            cache = hf.asked().get(next(iter(hf.with_cache(None))))
            if cache is not None and hf.KV(cache).length > input_ids.shape[1]:
                raise UnsupportedError(
                    f"the cache given to generate() holds tokens beside the {input_ids.shape[1]} of the prompt, and the views "
                    "are read from the prompt alone; leave out the cache, or pass the whole conversation."
                )
        if len(self._tokens) != rows:
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
            self.run.weights(rows),
            hidden,
            self.run.project,
        )
        # Beams add these up as log-probabilities, and no processor after this one would normalise them.
        combined = self.run.method.scores(step)[:, 0]
        sampling.check_left(combined, f"at generated token {at}")
        return combined.log_softmax(-1)

    def _follow(self, tokens: Tensor) -> None:
        """Bring the views' caches to ``tokens`` (B, t): keep what they share, take back the rest, run what is new."""
        have = self._tokens
        common = min(have.shape[1], tokens.shape[1])
        same = (have[None, :, :common] == tokens[:, None, :common]).cumprod(-1).sum(-1)
        sample = torch.arange(len(tokens), device=tokens.device) // self._rows_per_sample
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
                lane.drop(drop)
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
