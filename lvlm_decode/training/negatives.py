"""What DCD and LOL contrast with: two projectors, or an adapter that hallucinates, from preference triples.

DCD (arXiv 2504.08809) trains a copy of the vision-language projector on the preferred answers and another on the rejected
ones, apart from each other and by plain next-token loss; everything else is frozen. LOL's amateur (arXiv 2408.08769) is a
LoRA adapter of the language model trained on the rejected answers. Steps, rates and ranks are this library's, not the
papers'.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..engine import hf
from ..errors import UnsupportedError
from ..families import family_of


@dataclass(frozen=True)
class Triple:
    """A picture, a question about it, and two answers, of which the first is preferred."""

    image: Image.Image
    question: str
    chosen: str
    rejected: str


def scene_triples(count: int, seed: int = 0) -> Iterator[Triple]:
    """``count`` triples over rendered training scenes: captions that name an absent object, and wrong yes/no answers.

    The absent objects are ones that usually stand beside what is there, as in the training of the small models.
    """
    from lvlm_decode_data.scenes import render, scene_seed
    from lvlm_decode_data.texts import CAPTION_PROMPTS, ONE_WORD, CoOccurrence, caption, with_article

    rng = random.Random(seed)
    drawn = [render(scene_seed("train", index))[:2] for index in rng.sample(range(20_000), max(count // 3, 1))]
    prior = CoOccurrence(scene for _, scene in drawn)
    for number in range(count):
        image, scene = drawn[number % len(drawn)]
        absent = prior.draw_absent(rng, scene) or prior.absent(scene)[0][0]
        if number % 3 == 0:
            words = rng.getrandbits(32)
            chosen = caption(random.Random(words), scene)
            yield Triple(image, rng.choice(CAPTION_PROMPTS), chosen, caption(random.Random(words), scene, absent))
            continue
        there = rng.random() < 0.5
        name = rng.choice(list(scene.categories)) if there else absent
        answers = ("Yes", "No") if there else ("No", "Yes")
        yield Triple(image, f"Is there {with_article(name)} in the image?{ONE_WORD}", *answers)


def batches(
    processor: Any, triples: Sequence[Triple], which: str, steps: int, size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """``steps`` batches of ``size`` prompts with the chosen or rejected answer; labels cover the answer alone."""
    tokenizer = processor.tokenizer
    rng = random.Random(seed)
    for _ in range(steps):
        rows = rng.choices(triples, k=size)
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
        inputs = processor(images=[row.image for row in rows], text=prompts, padding=True, return_tensors="pt")
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


def fit(model: Any, parameters: Iterable[torch.nn.Parameter], data: Iterable[dict[str, Tensor]], rate: float):
    """Train ``parameters`` of ``model`` alone; the losses, one per step. Other parameters keep their flags and values.

    Raises:
        UnsupportedError: weights in half precision, in which these losses overflow.
    """
    parameters = list(parameters)
    halves = {str(parameter.dtype) for parameter in parameters} - {"torch.float32"}
    if halves:
        raise UnsupportedError(
            f"the weights to train are {', '.join(halves)}; load the model with dtype=torch.float32."
        )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        for batch in tqdm(data, desc="fit", mininterval=1.0):
            loss = model(**{key: value.to(model.device) for key, value in batch.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
    return losses


def train_projectors(
    model: Any,
    processor: Any,
    triples: Sequence[Triple],
    *,
    steps: int = 200,
    batch: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """DCD's projectors: ``{"positive": state, "negative": state}``. The model's own projector is left as it was."""
    projector = family_of(model).projector()
    own, states = copy.deepcopy(projector.state_dict()), {}
    try:
        for name, which in (("positive", "chosen"), ("negative", "rejected")):
            projector.load_state_dict(own)
            fit(model, projector.parameters(), batches(processor, triples, which, steps, batch, seed), rate)
            states[name] = copy.deepcopy(projector.state_dict())
    finally:
        projector.load_state_dict(own)
    return states


def train_amateur(
    model: Any,
    processor: Any,
    triples: Sequence[Triple],
    *,
    name: str = "amateur",
    rank: int = 8,
    steps: int = 200,
    batch: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """LOL's amateur: adds a LoRA adapter ``name`` to the language model of ``model`` and fits it to rejected answers.

    Save it with ``model.save_pretrained(folder)``, which then writes the adapter alone; bring it back with
    ``model.load_adapter(folder, adapter_name=name)``. Returns the losses.

    Raises:
        DependencyError: no peft that the installed transformers loads adapters with.
    """
    hf.require_adapters()
    from peft import LoraConfig

    decoder = model.get_decoder()
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    targets = [
        f"{prefix}.{path}"
        for path, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear)
        and path.rpartition(".")[2] in ("q_proj", "v_proj", "up_proj", "down_proj")
    ]
    model.add_adapter(LoraConfig(target_modules=targets, r=rank, lora_alpha=2 * rank), adapter_name=name)
    added = [parameter for path, parameter in model.named_parameters() if f".{name}." in path]
    return fit(model, added, batches(processor, triples, "rejected", steps, batch, seed), rate)
