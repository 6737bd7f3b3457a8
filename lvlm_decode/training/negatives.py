"""What DCD and LOL contrast with: two projectors, or an amateur that hallucinates, from preference triples.

DCD (arXiv 2504.08809) trains a copy of the vision-language projector on the preferred answers and another on the rejected
ones, apart from each other and by plain next-token loss; everything else is frozen. LOL's amateur (arXiv 2408.08769) is the
language model with low-rank weights trained on the rejected answers. Steps, rates and ranks are this library's, not the
papers'.

A training that was stopped goes on from its checkpoint to the weights that it would have had without the stop.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..engine.hf import decoder
from ..engine.learned import LowRank
from ..errors import InputError, UnsupportedError
from ..families import family_of
from ..weights import read_checkpoint
from .pairs import Triple

#: What is trained -> which answers it is fitted to.
PARTS = {"positive": "chosen", "negative": "rejected", "amateur": "rejected"}
#: What is trained -> learning rate. A projector that is good already loses its counting at the amateur's.
RATES = {"positive": 3e-4, "negative": 3e-4, "amateur": 1e-3}
#: Layers of the decoder that get low-rank weights.
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Checkpoint:
    """Where a training leaves what it has reached.

    Args:
        about: what decides the weights; the checkpoint of another training is refused.
        every: in steps.
    """

    path: Path
    about: Mapping[str, Any]
    every: int = 25

    def resume(self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
        """Put what was reached into parameters, optimizer and torch's generator; the losses of the steps so far.

        Raises:
            InputError: a file that cannot be read, or the checkpoint of another training.
        """
        if not self.path.is_file():
            return []
        state = read_checkpoint(self.path, needs=("about", "parameters", "optimizer", "losses", "generator"))
        check_same(self.path, state["about"], self.about)
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        return state["losses"]

    def keep(
        self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[float]
    ) -> None:
        """Write what was reached; a kill leaves the checkpoint before it or this one."""
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        state = {
            "about": dict(self.about),
            "parameters": [parameter.detach() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
            "losses": losses,
            "generator": torch.get_rng_state(),
        }
        torch.save(state, partial)
        os.replace(partial, self.path)


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise unless a file was made by a training with the same settings.

    Raises:
        InputError: names the first setting that differs.
    """
    differ = [name for name in now if before.get(name) != now[name]]
    if differ:
        name = differ[0]
        raise InputError(
            f"{path} belongs to a training with other settings ({name} was {before.get(name)!r}, is {now[name]!r}); give "
            "another --output, or move it away."
        )


def batches(
    processor: Any, triples: Sequence[Triple], which: str, steps: int, size: int, seed: int, first: int = 0
) -> Iterator[dict[str, Tensor]]:
    """``steps`` batches of ``size`` prompts with the chosen or rejected answer; labels cover the answer alone.

    Args:
        first: leave out so many of them, the others being the same.
    """
    tokenizer = processor.tokenizer
    rng = random.Random(seed)
    for step in range(steps):
        rows = rng.choices(triples, k=size)
        if step < first:
            continue
        prompts, answers = [], []
        for row in rows:
            content = [{"type": "image"}, {"type": "text", "text": row.question}]
            message = [{"role": "user", "content": content}]
            template = getattr(processor, "chat_template", None)
            prompts.append(
                processor.apply_chat_template(message, add_generation_prompt=True) if template else row.question
            )
            answers.append(
                [*tokenizer(" " + getattr(row, which), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            )
        inputs = processor(images=[row.picture for row in rows], text=prompts, padding=True, return_tensors="pt")
        asked = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
        # Padded on the right: what is learned must not depend on how a kernel treats rows that see nothing.
        width = max(len(question) + len(answer) for question, answer in zip(asked, answers))
        ids = torch.full((size, width), tokenizer.pad_token_id)
        attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for number, (question, answer) in enumerate(zip(asked, answers)):
            end = len(question) + len(answer)
            ids[number, :end] = torch.tensor(question + answer)
            labels[number, len(question) : end] = torch.tensor(answer)
            attention[number, :end] = 1
        yield {**inputs, "input_ids": ids, "attention_mask": attention, "labels": labels}


def fit(
    model: Any,
    parameters: Iterable[torch.nn.Parameter],
    data: Callable[[int], Iterable[dict[str, Tensor]]],
    rate: float,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train ``parameters`` of ``model`` alone; the losses, one per step. Other parameters keep their flags and values.

    Args:
        data: the batches from a step on.
        checkpoint: where to go on from, and what to leave on the way.

    Raises:
        UnsupportedError: weights in half precision, in which these losses overflow.
        InputError: a loss that is no number.
    """
    parameters = list(parameters)
    halves = {str(parameter.dtype) for parameter in parameters} - {"torch.float32"}
    if halves:
        raise UnsupportedError(
            f"the weights to train are {', '.join(halves)}; load the model with dtype=torch.float32."
        )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = [] if checkpoint is None else checkpoint.resume(parameters, optimizer)
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        for batch in tqdm(data(len(losses)), desc="fit", initial=len(losses), mininterval=1.0):
            loss = model(**{key: value.to(model.device) for key, value in batch.items()}).loss
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise InputError(f"the loss of step {len(losses)} is {losses[-1]}; give a smaller --rate.")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if checkpoint is not None and len(losses) % checkpoint.every == 0:
                checkpoint.keep(parameters, optimizer, losses)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
    return losses


def train_part(
    model: Any,
    processor: Any,
    triples: Sequence[Triple],
    part: str,
    *,
    steps: int = 200,
    batch: int = 16,
    rate: float | None = None,
    rank: int = 8,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Tensor]:
    """The weights of one of ``PARTS``. The model is left as it was.

    Args:
        rate: the learning rate; that of ``RATES`` when ``None``.
        rank: of the amateur's low-rank weights.
    """
    rate = RATES[part] if rate is None else rate
    data = lambda first: batches(processor, triples, PARTS[part], steps, batch, seed, first)  # noqa: E731
    if part == "amateur":
        weights = low_rank(model, rank, seed)
        module = family_of(model).decoding_module(model)
        with LowRank(weights, "train negatives")(module):
            fit(model, weights.values(), data, rate, checkpoint)
        return {name: weight.detach() for name, weight in weights.items()}
    projector = family_of(model).projector()
    own = copy.deepcopy(projector.state_dict())
    try:
        fit(model, projector.parameters(), data, rate, checkpoint)
        return copy.deepcopy(projector.state_dict())
    finally:
        projector.load_state_dict(own)


def low_rank(model: Any, rank: int, seed: int) -> dict[str, torch.nn.Parameter]:
    """Low-rank weights that add nothing yet to the decoder's linear layers of ``TARGETS``, as ``LowRank`` takes them.

    Raises:
        UnsupportedError: a decoder without such layers.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = decoder.decoder_of(family_of(model).decoding_module(model)).named_modules()
    found: dict[str, torch.nn.Parameter] = {}
    for path, layer in layers:
        if not isinstance(layer, torch.nn.Linear) or path.rpartition(".")[2] not in TARGETS:
            continue
        bound = 1 / math.sqrt(layer.in_features)
        down = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        place = layer.weight.device
        found[f"{path}.down"] = torch.nn.Parameter(down.to(place))
        found[f"{path}.up"] = torch.nn.Parameter(torch.zeros(layer.out_features, rank, device=place))
    if not found:
        raise UnsupportedError(f"the decoder has none of the linear layers {', '.join(TARGETS)}; choose another model.")
    return found
