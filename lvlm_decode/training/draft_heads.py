"""Training draft heads: EAGLE, MSD, ViSpec and EAGLE-3, with the target's features computed on the fly.

Stored features take terabytes at full scale, so only generated token ids are kept; a frozen forward of the target gives
features and embeddings for every batch. Answers are the target's own: the head drafts what the *target* will say.

What the kinds differ in, after their authors' code:

    kind     data                                              losses at slot t, p the target's next distribution
    eagle    pictures from the start                           smooth L1 of the feature + 0.1 * cross entropy with p
    msd      text only for half the steps, then a share of     the same
             pictures that grows linearly to all
    vispec   text only for a first stage, then pictures        first stage as eagle with 0.01 * ListMLE of p's ten best;
                                                               then 10 * |q - p|_1 + 0.1 * ListMLE, averaged over an
                                                               unrolled pass whose features are the head's own guesses
    eagle3  pictures from the start                            cross entropy with p over the tokens it may draft, summed
                                                               over passes that run as drafting does, 0.8 ** pass each

ViSpec's answers are sampled (``temperature``): a head trained on greedy answers learns to read the next-but-one token off
the true feature instead of looking at the context. The authors ask for answers of 1,000 words (``suffix``) and train
the first stage as an EAGLE head without the projection of the global vector, which here learns along from its neutral
start. MSD's authors flip the coin for every sample, here it falls once a batch, and they teach given answers, here the
target's own unless the data brings some. EAGLE-3's passes and weights are those of SpecForge (a6b6b02); its language head
starts from the target's. Learning rates are the authors' by default and suit a 7B target; a small head
from scratch needs a larger one.

Letters: ``R`` rows, ``T`` positions, ``D`` width, ``N`` vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from PIL import Image
from pydantic import Strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from lvlm_decode_evals.pictures import open_picture

from ..attachment import attach, detach, last_run
from ..engine import hf
from ..errors import InputError, ParameterError
from ..families import family_of
from ..methods.plain import Plain
from ..reading import Record, checked, read_json, read_records
from ..speculative.drafters import get as drafter_class
from ..speculative.features import watched
from ..speculative.heads import KINDS, DraftHead, HeadConfig, Slots, fingerprint, load
from ..speculative.stats import Stats
from ..weights import load_into, read_checkpoint

CHECKPOINT, ANSWERS = "training.pt", "answers.json"


@dataclass(frozen=True)
class Settings:
    """One training run.

    Args:
        target: folder or name of the model to draft for.
        output: folder the head is written to.
        kind: "eagle", "msd", "vispec" or "eagle3".
        data: JSON lines with ``prompt``, ``image`` (a path; left out for text) and optionally ``answer``; emoji scenes
            when ``None``.
        samples, text_samples: how many scenes, and texts without a picture, the built-in data has.
        steps, batch: optimiser steps, and samples per step and process.
        lr: peak learning rate; warmed up over ``warmup`` of the steps, then falling linearly to 0. That of the authors'
            code for this kind when ``None``: 5e-5 for MSD, 1e-4 for EAGLE-3, else 3e-5.
        text_share: share of the steps that see text only before pictures come (ViSpec's first stage, half for MSD).
        suffix: asked at the end of every prompt that has no answer yet. When ``None``, ViSpec's request for long answers
            with ``data``, nothing for emoji scenes and the other kinds.
        temperature: of the sampled answers; 0 is greedy.
        unroll: further passes on the head's own guesses (ViSpec, EAGLE-3); 1 for ViSpec and 6 for EAGLE-3 when ``None``.
        noise: uniform noise on features, ``noise * 512 / T``; EAGLE-3, whose features are its own mixture, has none.
        vocabulary: keep only this many of the target's most frequent answer tokens in the draft; ``None`` keeps all.
        evaluate_every, checkpoint_every: in steps.
        held_out: prompts whose acceptance is measured.
        rows, depth, top_k: how the head drafts by default; the authors' values when ``None``.
        answers: file of the answers that were generated, written when it is not there; heads of several kinds for one
            target can share it. Kept beside the checkpoint until the run is over when ``None``.
        start: folder or hub id of a head whose weights this one starts from, for instance a published one; random when
            ``None``.
        resume: go on from the checkpoint in ``output``.
    """

    target: str
    output: Path
    kind: str = "vispec"
    data: Path | None = None
    samples: int = 2000
    text_samples: int = 1000
    steps: int = 1000
    batch: int = 16
    lr: float | None = None
    warmup: float = 0.05
    text_share: float | None = None
    suffix: str | None = None
    temperature: float = 1.0
    max_new_tokens: int = 96
    unroll: int | None = None
    noise: float = 0.1
    vocabulary: int | None = None
    evaluate_every: int = 250
    checkpoint_every: int = 250
    held_out: int = 24
    rows: int | None = None
    depth: int | None = None
    top_k: int | None = None
    seed: int = 0
    answers: Path | None = None
    start: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ParameterError(f"kind = {self.kind!r} is not valid; it is one of {', '.join(KINDS)}.")

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return {"msd": 5e-5, "eagle3": 1e-4}.get(self.kind, 3e-5) if self.lr is None else self.lr

    @property
    def passes(self) -> int:
        """How many passes the head makes over a batch."""
        if self.kind not in ("vispec", "eagle3"):
            return 1
        return 1 + ({"vispec": 1, "eagle3": 6}[self.kind] if self.unroll is None else self.unroll)

    @property
    def long_answers(self) -> str:
        """What is asked at the end of a prompt."""
        if self.suffix is not None:
            return self.suffix
        return " Please answer with at least 1000 words." if self.kind == "vispec" and self.data is not None else ""

    @property
    def text_until(self) -> float:
        """Share of the run before the first picture."""
        return {"msd": 0.5, "vispec": 0.25}.get(self.kind, 0.0) if self.text_share is None else self.text_share

    def picture_share(self, progress: float) -> float:
        """Probability that a batch has pictures, at ``progress`` in [0, 1] of the run."""
        if progress < self.text_until:
            return 0.0
        if self.kind == "msd":
            return min(1.0, (progress - self.text_until) / max(1 - self.text_until, 1e-9))
        return 1.0


@dataclass
class Item:
    """One prompt with its answer.

    Args:
        load: the picture, or ``None`` for text.
        source: which picture it is.
        answer: given answer; generated when ``None``.
        ids: prompt and answer, empty until they are known; ``start`` is where the answer starts.
    """

    prompt: str
    load: Callable[[], Image.Image] | None = None
    source: str | None = None
    answer: str | None = None
    ids: list[int] = field(default_factory=list)
    start: int = 0


def scene_items(samples: int, text_samples: int, held_out: int, seed: int) -> tuple[list[Item], list[Item], list[Item]]:
    """Emoji scenes: pictures with a caption prompt, captions without picture, held-out pictures."""
    from lvlm_decode_data import render, scene_seed
    from lvlm_decode_data.texts import CAPTION_PROMPTS, caption

    rng = random.Random(seed)

    def picture(split: str, index: int) -> Item:
        return Item(rng.choice(CAPTION_PROMPTS), lambda: render(scene_seed(split, index))[0], f"{split} {index}")

    pictures = [picture("train", index) for index in range(samples)]
    held = [picture("validation", index) for index in range(held_out)]
    texts = []
    for index in range(samples, samples + text_samples):
        _, scene, _ = render(scene_seed("train", index))
        texts.append(Item(rng.choice(CAPTION_PROMPTS), answer=caption(rng, scene)))
    return pictures, texts, held


def file_items(path: Path, held_out: int) -> tuple[list[Item], list[Item], list[Item]]:
    """Items of a JSON lines file; the last ``held_out`` with a picture are held out.

    Raises:
        InputError: a line without a prompt, or a file without pictures.
    """
    pictures: list[Item] = []
    texts: list[Item] = []
    for where, record in read_records(path):
        line = checked(_Line, record, where)
        load = None if line.image is None else (lambda file=path.parent / line.image: open_picture(file))
        (texts if line.image is None else pictures).append(Item(line.prompt, load, line.image, line.answer))
    if len(pictures) <= held_out:
        raise InputError(
            f"{path} has {len(pictures)} records with an image; more than held_out = {held_out} are needed."
        )
    return pictures[:-held_out], texts, pictures[-held_out:]


class _Line(Record):
    """A line of a user's training data."""

    prompt: str
    image: str | None = None
    answer: str | None = None


class _Recorded(Record):
    """Answers of a target to the prompts of a run, as that run wrote them."""

    of: dict[str, Any]
    # JSON has no tuples.
    items: list[Annotated[tuple[int, list[int]], Strict(False)]]


class Target:
    """The frozen target with its processor: prepares items, answers them, gives features."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.family = family_of(model)
        self._vision: dict[int, dict[str, Tensor]] = {}

    def inputs(self, item: Item) -> dict[str, Tensor]:
        """The processor's output for one item's prompt."""
        text = item.prompt
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "text", "text": item.prompt}]
            if item.load is not None:
                content.insert(0, {"type": "image"})
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        images = {} if item.load is None else {"images": item.load()}
        return dict(self.processor(text=text, return_tensors="pt", **images))

    def vision(self, item: Item) -> dict[str, Tensor]:
        """The encoder's inputs of one item, kept in half precision: pictures are used many times."""
        key = id(item)
        if key not in self._vision:
            inputs = self.inputs(item)
            self._vision[key] = {
                name: value.half() if value.is_floating_point() else value
                for name in self.family.vision_keys
                if (value := inputs.get(name)) is not None
            }
        return self._vision[key]

    def complete(self, items: Sequence[Item], settings: Settings, batch: int = 32) -> None:
        """Fill in ``ids`` of every item, answering those without an answer."""
        tokenizer = self.processor.tokenizer
        end = self.model.generation_config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        if end is None:
            end = tokenizer.eos_token_id
        open_items = []
        for item in items:
            prompt = self.inputs(item)["input_ids"][0].tolist()
            item.start = len(prompt)
            if item.answer is None:
                item.ids = prompt
                open_items.append(item)
            else:
                answer = tokenizer(item.answer, add_special_tokens=False).input_ids
                item.ids = [*prompt, *answer[: settings.max_new_tokens], end]
        for at in range(0, len(open_items), batch):
            block = open_items[at : at + batch]
            sampled = settings.temperature > 0
            how = {"do_sample": True, "temperature": settings.temperature} if sampled else {"do_sample": False}
            out = self.model.generate(
                **self._stack(block, left=True),
                max_new_tokens=settings.max_new_tokens,
                top_k=0 if sampled else None,
                **how,
            )
            answers = out[:, -(out.shape[1] - max(item.start for item in block)) :]
            for item, answer in zip(block, answers.tolist()):
                item.ids = item.ids + (answer[: answer.index(end) + 1] if end in answer else answer)

    def _stack(self, items: Sequence[Item], left: bool = False) -> dict[str, Tensor]:
        width = max(len(item.ids) for item in items)
        pad = self.family.pad_token_id
        rows, masks = [], []
        for item in items:
            fill = width - len(item.ids)
            rows.append([pad] * fill + item.ids if left else item.ids + [pad] * fill)
            masks.append([0] * fill + [1] * len(item.ids) if left else [1] * len(item.ids) + [0] * fill)
        device, dtype = self.model.device, self.model.dtype
        inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
        pictures = [self.vision(item) for item in items if item.load is not None]
        if pictures:
            inputs.update(self.family.cat_vision(pictures))
            if (index := inputs.pop("picture", None)) is not None:
                # The engine encodes a picture once for all its views; a forward needs one per row.
                inputs["pixel_values"] = inputs["pixel_values"][index]
        if "mm_token_type_ids" in self.family.token_keys and any(k.endswith("grid_thw") for k in inputs):
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.family.image_token_id).long()
        return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}

    @torch.no_grad()
    def features(self, items: Sequence[Item], states: Sequence[int] = ()) -> dict[str, Any]:
        """One teacher-forced forward.

        Args:
            states: layers whose states are wanted too, 1 for the first.

        Returns:
            ``mask``, ``image``, ``answer`` (R, T); ``embeds``, ``hidden`` (R, T, D). With ``states`` also ``words`` (R, T, D),
            embeddings of the ids with image positions holding the placeholder's, ``layers`` with the states by layer, and
            ``positions`` (axes, R, T), or ``None`` of a target with one axis.
        """
        inputs = self._stack(items)
        # InstructBLIP as a whole insists on pictures; what decodes does not.
        pictures = any(item.load is not None for item in items)
        module = self.model if pictures else self.family.decoding_module(self.model)
        with watched(module, states) as watcher:
            hf.kwargs.run_whole(module, inputs, keep=1)
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        starts = torch.tensor([item.start for item in items], device=ids.device)
        answer = mask & (torch.arange(ids.shape[1], device=ids.device) >= starts[:, None])
        image = ids == self.family.image_token_id
        found: dict[str, Any] = {
            "mask": mask,
            "image": image,
            "answer": answer,
            "embeds": watcher.embeds,
            "hidden": watcher.hidden,
        }
        if states:
            words = module.get_input_embeddings()(ids)
            found |= {"words": words, "layers": watcher.layers, "positions": watcher.axes}
        return found


class Objective(nn.Module):
    """The head with its losses as one forward, so that gradients are shared between processes as they should be."""

    def __init__(self, head: DraftHead, out: nn.Module, settings: Settings):
        super().__init__()
        self.head, self.settings = head, settings
        # In a list, so that the target's head is no parameter of this module.
        self._out: list[Any] = [out]

    def forward(self, batch: dict[str, Any], pictures: bool) -> dict[str, Tensor]:
        """Loss of one batch of :meth:`Target.features`, and what to report beside it."""
        if self.head.config.states:
            return self._as_drafting(batch)
        head, settings = self.head, self.settings
        dtype = head.fc.weight.dtype
        embeds, hidden = batch["embeds"].to(dtype), batch["hidden"].to(dtype)
        mask, image = batch["mask"][:, 1:], batch["image"][:, 1:]
        truth = hidden[:, :-1]
        if settings.noise:
            truth = truth + (torch.rand_like(truth) * 2 - 1) * settings.noise * 512 / truth.shape[1]
        # Slot t guesses f_{t+1}, which predicts token t + 2: that one must belong to the answer.
        supervised = F.pad(batch["answer"][:, 2:], (0, 1))
        wanted = hidden[:, 1:][supervised]
        out_head = self._out[0]
        with torch.no_grad():
            target = F.softmax(out_head(wanted.to(out_head.weight.dtype)).float(), -1)
        text = settings.kind != "vispec" or not pictures
        features, losses, overlaps = truth, [], []
        for _ in range(1 if text else settings.passes):
            slots = head.slots(embeds[:, 1:], features, image, mask)
            guess = head(slots)
            own = guess[supervised]
            logits = F.linear(own.float(), out_head.weight.float())
            if text:
                loss = eagle_loss(own, wanted, logits, target)
                if settings.kind == "vispec":
                    loss = loss + 0.01 * list_mle(logits, target)
            else:
                loss = vispec_loss(logits, target)
            losses.append(loss)
            overlaps.append(torch.minimum(F.softmax(logits.detach(), -1), target).sum(-1).mean())
            # The next pass reads guesses where a slot of text made one, and the truth elsewhere.
            guessed = F.pad(slots.seen & ~image, (1, 0))[:, :-1, None]
            features = torch.where(guessed, F.pad(guess, (0, 0, 1, 0))[:, :-1], truth)
        return {"loss": torch.stack(losses).mean(), "overlap": torch.stack(overlaps).mean()}

    def _as_drafting(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """EAGLE-3: pass k drafts the token k after the next one, from slots that passes before it drafted."""
        head, out, hidden = self.head, self._out[0], batch["hidden"]
        dtype = head.fc.weight.dtype
        mask, image, positions = batch["mask"][:, 1:], batch["image"][:, 1:], batch["positions"]
        features = head.lift(hidden, {layer: states.to(dtype) for layer, states in batch["layers"].items()})[:, :-1]
        slots = head.slots(
            words := batch["words"][:, 1:].to(dtype),
            features,
            image,
            mask,
            None if positions is None else positions[..., :-1],
        )
        loss, overlaps = hidden.new_zeros((), dtype=torch.float32), []
        guesses = drafting_passes(head, words, features, slots, self.settings.passes)
        for number, guess in enumerate(guesses):
            supervised = F.pad(batch["answer"][:, 2 + number :], (0, 1 + number))
            if not bool(supervised.any()):
                # Answers are shorter than the draft; the passes that follow have less still.
                break
            with torch.no_grad():
                wanted = F.pad(hidden[:, 1 + number :], (0, 0, 0, number))[supervised]
                whole = out(wanted.to(out.weight.dtype)).float()
                own = whole if head.trim is None else whole[:, head.trim]
                # Where the target says a token that cannot be drafted, nothing is to be learned.
                can = own.amax(-1) == whole.amax(-1)
            logits = F.linear(head.norm(guess[supervised]).float(), head.lm_head.weight.float())
            soft = -(F.softmax(own, -1) * F.log_softmax(logits, -1)).sum(-1)
            loss = loss + 0.8**number * (soft * can).mean()
            chances = F.softmax(whole, -1) if head.trim is None else F.softmax(whole, -1)[:, head.trim]
            overlaps.append(torch.minimum(F.softmax(logits.detach(), -1), chances).sum(-1).mean())
        return {"loss": loss, "overlap": torch.stack(overlaps).mean()}


def drafting_passes(head: DraftHead, embeds: Tensor, features: Tensor, slots: Slots, passes: int) -> Iterator[Tensor]:
    """The guesses (R, T, D) of each pass, computed as drafting computes them, at all positions at once.

    Pass k stands at slot t for the slot k levels below it: it reads the embedding of the token k further on, the guess that
    pass k - 1 made there, and the keys of the true slots up to t and of the passes before it at t (training-time test,
    arXiv 2503.01840).

    Args:
        head: an EAGLE-3 head.
        embeds: (R, T, D) of the token after each slot.
        features: (R, T, D) see :meth:`DraftHead.lift`.
        slots: of the prompt, for positions and for which slots exist.
    """
    config, attention = head.config, head.layer.self_attn
    width = embeds.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=embeds.device).tril()
    seen = (causal & slots.seen[:, None]) | torch.eye(width, dtype=torch.bool, device=embeds.device)
    past: list[tuple[Tensor, Tensor]] = []
    for number in range(passes):
        x, kept = head.entered(head.text_slots(embeds, features, None))
        q, *own = head.projected(x, slots.positions + number)
        key, value = (state.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for state in own)
        past.append((key, value))
        (keys, values), drafted = past[0], past[1:]
        scores = [(q @ keys.transpose(2, 3)).masked_fill(~seen[:, None], float("-inf"))]
        scores += [(q * key).sum(-1, keepdim=True) for key, _ in drafted]
        weights = (torch.cat(scores, -1).float() * config.head_dim**-0.5).softmax(-1).to(q.dtype)
        out = weights[..., :width] @ values
        for at, (_, value) in enumerate(drafted, start=width):
            out = out + weights[..., at : at + 1] * value
        kept = kept + attention.o_proj(out.transpose(1, 2).flatten(2))
        features = kept + head.feed_forward(kept)
        yield features
        embeds = F.pad(embeds, (0, 0, 0, 1))[:, 1:]


def eagle_loss(guess: Tensor, wanted: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 of the feature + 0.1 * cross entropy with the target's distribution; (S, D), (S, D), (S, N), (S, N)."""
    soft = -(target * F.log_softmax(logits, -1)).sum(-1).mean()
    return F.smooth_l1_loss(guess.float(), wanted.float()) + 0.1 * soft


def list_mle(logits: Tensor, target: Tensor, best: int = 10) -> Tensor:
    """How improbable the target's order of its ``best`` tokens is under the guess, mean over rows; (S, N), (S, N)."""
    order = target.topk(min(best, target.shape[-1]), -1).indices
    scores = logits.gather(-1, order)
    rest = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (rest - scores).sum(-1).mean()


def vispec_loss(logits: Tensor, target: Tensor) -> Tensor:
    """10 * L1 between distributions + 0.1 * ListMLE of the target's ten best tokens; (S, N), (S, N).

    The L1 term starts near 10 * 2 (nothing in common) and is twice the chance that a drafted sample is refused.
    """
    return 10 * (F.softmax(logits, -1) - target).abs().sum(-1).mean() + 0.1 * list_mle(logits, target)


def acceptance(target: Target, head: DraftHead, items: Sequence[Item], settings: Settings) -> Stats:
    """What the head brings in greedy decoding of ``items``, by the library's own loop."""
    drafter = drafter_class(head.config.kind).create(head=copy.deepcopy(head))
    attach(target.model, Plain(), processor=target.processor, drafter=drafter)
    try:
        total = Stats()
        for item in items:
            inputs = {k: v.to(target.model.device) for k, v in target.inputs(item).items()}
            target.model.generate(**inputs, do_sample=False, max_new_tokens=settings.max_new_tokens)
            run = last_run(target.model)
            assert run is not None and run.trace.speculation is not None
            total = total + run.trace.speculation
    finally:
        detach(target.model)
    return total


def answer_all(target: Target, items: Sequence[Item], settings: Settings, path: Path) -> None:
    """Complete ``items``, from ``path`` if it holds the answers of this target to these prompts; else write it."""
    of = {
        "target": fingerprint(target.model),
        "items": hashlib.blake2b(
            repr([(i.prompt, i.source, i.answer) for i in items]).encode(), digest_size=8
        ).hexdigest(),
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
    }
    if path.is_file():
        record = checked(_Recorded, read_json(path), str(path))
        if record.of == of:
            for item, (start, ids) in zip(items, record.items, strict=True):
                item.start, item.ids = start, ids
            return
    torch.manual_seed(settings.seed)
    target.complete(items, settings)
    made = {"of": of, "items": [[item.start, item.ids] for item in items]}
    path.write_text(json.dumps(made), encoding="utf-8")


def frequent_tokens(items: Sequence[Item], count: int, vocabulary: int) -> Tensor:
    """(count,) the tokens most frequent in the answers, in order of id; unseen ones by id."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for item in items:
        counts += torch.bincount(torch.tensor(item.ids[item.start :]), minlength=vocabulary)
    return counts.argsort(descending=True, stable=True)[:count].sort().values


def train(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train a head and write it to ``settings.output``; returns the report that is written beside it."""
    # Batches of text leave a vision adaptor unused.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no", kwargs_handlers=[unused])
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(settings.target, dtype=dtype).to(accelerator.device)
    target = Target(model, AutoProcessor.from_pretrained(settings.target))
    torch.manual_seed(settings.seed)
    drafting = {name: value for name in ("rows", "depth", "top_k") if (value := getattr(settings, name)) is not None}
    head = DraftHead(HeadConfig.for_target(model, settings.kind, **drafting))
    if head.config.states:
        head.lm_head.weight.data.copy_(model.get_output_embeddings().weight)
    if settings.start is not None:
        started = load(settings.start, target.family.decoding_module(model), settings.kind)
        if started.trim is not None:
            if settings.vocabulary is not None:
                raise ParameterError("the head to start from drafts tokens of its own choice; leave out vocabulary.")
            head.restrict(started.trim)
        # Weights it has beyond those of the start keep their own beginning: a vision adaptor on top of an EAGLE head.
        head.load_state_dict(started.state_dict(), strict=False)

    if settings.data is None:
        pictures, texts, held = scene_items(settings.samples, settings.text_samples, settings.held_out, settings.seed)
    else:
        pictures, texts, held = file_items(settings.data, settings.held_out)
    for item in (*pictures, *texts, *held):
        if item.answer is None:
            item.prompt += settings.long_answers
    # Every process answers and trains on its own share.
    rank, world = accelerator.process_index, accelerator.num_processes
    if settings.text_until > 0 and len(texts) < world:
        raise InputError(
            f"{settings.kind} starts with text, and the data has {len(texts)} records without an image for {world} "
            "processes; add some or set text_share = 0."
        )
    pictures, texts = pictures[rank::world], texts[rank::world]
    settings.output.mkdir(parents=True, exist_ok=True)
    answers = settings.answers or settings.output / ANSWERS
    answer_all(target, [*pictures, *texts], settings, answers.with_name(f"{answers.stem}-{rank}{answers.suffix}"))
    if settings.vocabulary is not None:
        head.restrict(frequent_tokens(pictures, settings.vocabulary, head.config.vocab_size))
    say(f"{len(pictures)} answered pictures and {len(texts)} texts on process {rank} of {world}")

    objective = Objective(head.to(accelerator.device), model.get_output_embeddings(), settings)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=settings.rate, betas=(0.9, 0.95))
    warm = max(1, int(settings.steps * settings.warmup))
    rate = lambda step: min((step + 1) / warm, (settings.steps - step) / max(settings.steps - warm, 1))  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    first, curve = 0, []
    checkpoint = settings.output / CHECKPOINT
    if settings.resume and checkpoint.is_file():
        needs = ("head", "optimizer", "scheduler", "step", "curve")
        state = read_checkpoint(checkpoint, accelerator.device, needs)
        load_into(head, state["head"], f"checkpoint {checkpoint}")
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        first, curve = state["step"], state["curve"]
        say(f"resumed at step {first}")
    objective, optimizer = accelerator.prepare(objective, optimizer)

    for step in range(first, settings.steps):
        # The batch is a function of the step, so that a resumed run sees what an unbroken one would have seen.
        rng = random.Random(f"{settings.seed} {rank} {step}")
        torch.manual_seed(rng.randrange(2**31))
        coin = random.Random(f"{settings.seed} {step}").random()
        with_pictures = coin < settings.picture_share(step / settings.steps)
        chosen = rng.sample(pool := pictures if with_pictures else texts, min(settings.batch, len(pool)))
        with accelerator.autocast():
            result = objective(target.features(chosen, head.config.states), with_pictures)
        accelerator.backward(result["loss"])
        accelerator.clip_grad_value_(objective.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        done = step + 1
        if accelerator.is_main_process and (done % settings.evaluate_every == 0 or done == settings.steps):
            head.eval()
            stats = acceptance(target, head, held, settings)
            head.train()
            curve.append(
                {
                    "step": done,
                    "loss": round(result["loss"].item(), 4),
                    "overlap": round(result["overlap"].item(), 4),
                    "tau": round(stats.tau, 3),
                    "acceptance_per_level": [round(a, 3) for a in stats.acceptance],
                }
            )
            say(json.dumps(curve[-1]))
        if accelerator.is_main_process and (done % settings.checkpoint_every == 0 or done == settings.steps):
            head.save_pretrained(settings.output)
            torch.save(
                {
                    "head": head.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "step": done,
                    "curve": curve,
                },
                checkpoint,
            )
    report = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()},
        "parameters": sum(p.numel() for p in head.parameters()),
        "curve": curve,
    }
    if accelerator.is_main_process:
        (settings.output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        checkpoint.unlink(missing_ok=True)
    if settings.answers is None:
        (settings.output / f"{answers.stem}-{rank}{answers.suffix}").unlink(missing_ok=True)
    return report
