"""Stage 2 of the small LLaVA: its own tokenizer, a projector, and a Llama that reads the frozen tower's patches.

One image is the shared prefix of all its turns: the turns are packed behind it with a block-diagonal mask and position
ids that start again at the prefix, so that a caption and seven questions cost one image instead of eight.

The rows a decoding method will ask for are in the training distribution: noised images (the schedule of VCD's code),
images masked out of attention, prompts without an image, a system text before the prompt, and a sentence before the
question.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from lvlm_decode.weights import load_into, read_checkpoint
from lvlm_decode_data import texts
from lvlm_decode_data.scenes import CATEGORIES, COLOURS, Scene
from lvlm_decode_data.texts import CoOccurrence, TextSampler, Turn

from .scene_cache import BACKGROUND, CELLS, IMAGE_SIZE, SceneCache
from .vision import VisionTrainer, dense_targets, pixels, vision_config, weaken
from .workers import Log, average_gradients, cosine, ddpm_noise, parameter_groups, same_start, save_checkpoint

IMAGE_TOKEN = "<image>"
WIDTH = 192
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Everyday words of prompts that evaluators and methods use, so that they cost few tokens; any other text is spelled in
# bytes.
PROMPT_WORDS = (
    "You are a an the of to and in on is not no yes what where which how many much color object objects picture photo "
    "describe detail image question answer using single word phrase please following briefly sentence long short list "
    "there this that it with for from by as at be can could does do did have has will about before after between "
    "provide give clear general overview impression detector assistant human user helpful detailed polite answers "
    "visible behind front next near left right top bottom middle center side above below under over one two three four "
    "more less than only some any all each other same different true false correct wrong sure look looks like scene"
)


def build_tokenizer(scenes: list[Scene]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training texts: any text can be encoded; left padding."""
    rng = random.Random(0)
    sampler = TextSampler(CoOccurrence(scenes))
    lines = []
    for scene in scenes:
        for turn in sampler.turns(rng, scene):
            prefix = rng.choice(texts.SYSTEM_PREFIXES) + " " if rng.random() < 0.05 else ""
            lines.append(f"{prefix}USER: \n{turn.question} ASSISTANT: {turn.answer}")
    for category in CATEGORIES:
        lines += [f"a {category} an {category} no {category} two {texts.plural(category)}"] * 60
    lines += [PROMPT_WORDS, *texts.SYSTEM_PREFIXES] * 40
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=1280,
        min_frequency=20,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def image_processor() -> CLIPImageProcessor:
    """Resize to the tower's 96 pixels, bicubic, CLIP's mean and deviation."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Image processor and tokenizer as one, with the chat template."""
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=vision_config().patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the "default" strategy drops again
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def text_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of five layers."""
    return LlamaConfig(
        vocab_size=(len(tokenizer) + 7) // 8 * 8,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model."""
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=CELLS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    set_generation(model, tokenizer)
    return model


def set_generation(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tell ``generate`` the special tokens."""
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def export(model: nn.Module, processor: ProcessorMixin, output: Path) -> None:
    """Save weights in float16 with the processor, ready for ``from_pretrained``."""
    half = copy.deepcopy(model).to(torch.float16)
    half.config.dtype = "float16"
    half.save_pretrained(output)
    processor.save_pretrained(output)
    weights = output / "model.safetensors"
    save_file(published_names(load_file(weights)), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # written readable by its owner alone, which a package would keep


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of the checkpoints on the hub, which every transformers and vLLM read.

    transformers 5 writes a new model's CLIP tower without ``vision_model.``, and vLLM knows no other name.
    """
    old, new = "vision_tower.vision_model.", "vision_tower."
    return {
        f"{old}{name.removeprefix(new)}" if name.startswith(new) and not name.startswith(old) else name: tensor
        for name, tensor in state.items()
    }


# ---- packing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One image's turns as tokens: the shared prefix, and per turn (prompt, answer, answer weights, task)."""

    prefix: list[int]
    turns: list[tuple[list[int], list[int], list[float], str]]
    image: str  # seen, masked (hidden from attention) or none (no placeholder at all)


PLACE_WORDS = ("left", "right", "top", "bottom", "middle", "above", "below")


@functools.cache
def place_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of the words that say where something is."""
    return frozenset(tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in PLACE_WORDS)


def answer_weights(turn: Turn, tokens: list[int], places: frozenset[int]) -> list[float]:
    """The first token of a short answer and the words for places carry the information; other text counts evenly."""
    if turn.answer.split(",")[0] in ("Yes", "No") or " " not in turn.answer:
        return [3.0] + [0.3] * (len(tokens) - 1)
    return [3.0 if token in places else 1.0 for token in tokens]


def encode_row(
    tokenizer: PreTrainedTokenizerFast, turns: list[Turn], rng: random.Random, image_tokens: int, blank: float
) -> Row:
    """Tokens of one image's turns. ``blank``: share of rows without a visible image."""
    draw = rng.random()
    image = "masked" if draw < blank / 2 else "none" if draw < blank else "seen"
    system = rng.choice(texts.SYSTEM_PREFIXES) + " " if rng.random() < 0.08 else ""
    lead = rng.choice(texts.SYSTEM_PREFIXES) + " " if rng.random() < 0.06 else ""
    head = f"{system}USER:" if image == "none" else f"{system}USER: {IMAGE_TOKEN}"
    gap = " " if image == "none" else "\n"
    strings = [head, *[f"{gap}{lead}{t.question} ASSISTANT:" for t in turns], *[f" {t.answer}</s>" for t in turns]]
    tokens = tokenizer(strings, add_special_tokens=False)["input_ids"]
    prefix = [tokenizer.bos_token_id, *tokens[0]]
    if image != "none":
        prefix += [prefix[-1]] * (image_tokens - 1)
    packed = []
    places = place_tokens(tokenizer)
    for turn, prompt, answer in zip(turns, tokens[1 : len(turns) + 1], tokens[len(turns) + 1 :]):
        packed.append((prompt, answer, answer_weights(turn, answer, places), turn.task))
    return Row(prefix, packed, image)


TASKS = ("caption", "existence", "count", "position", "colour")


def collate(rows: list[Row], image_id: int) -> dict[str, torch.Tensor]:
    """Tensors (B, T): ``ids``, ``positions``, ``labels`` (next token, -100 elsewhere), ``weights``, ``tasks`` (index of
    the task at the first token of each answer, -1 elsewhere), and the additive attention ``mask`` (B, 1, T, T)."""
    lengths = [len(r.prefix) + sum(len(p) + len(a) for p, a, _, _ in r.turns) for r in rows]
    size = (len(rows), (max(lengths) + 7) // 8 * 8)
    ids, positions = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    segments = torch.full(size, -1)
    labels, tasks = torch.full(size, -100), torch.full(size, -1)
    weights = torch.zeros(size)
    hidden = torch.zeros(size, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = len(row.prefix)
        ids[b, :start] = torch.tensor(row.prefix)
        positions[b, :start] = torch.arange(start)
        segments[b, :start] = 0
        if row.image == "masked":
            hidden[b, :start] = ids[b, :start] == image_id
        at = start
        for number, (prompt, answer, weight, task) in enumerate(row.turns, 1):
            end, first = at + len(prompt) + len(answer), at + len(prompt) - 1
            ids[b, at:end] = torch.tensor(prompt + answer)
            positions[b, at:end] = torch.arange(start, start + end - at)
            segments[b, at:end] = number
            labels[b, first : end - 1] = torch.tensor(answer)
            weights[b, first : end - 1] = torch.tensor(weight)
            tasks[b, first] = TASKS.index(task)
            at = end
    order = torch.arange(size[1])
    own = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    allowed = (order[None, :, None] >= order[None, None, :]) & own & ~hidden[:, None, :]
    allowed |= torch.eye(size[1], dtype=torch.bool)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e4)[:, None]
    return {
        "ids": ids,
        "positions": positions,
        "labels": labels,
        "weights": weights,
        "tasks": tasks,
        "mask": mask,
    }


def weighted_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor], yes: int, no: int) -> tuple[torch.Tensor, dict]:
    """Cross-entropy of the labelled positions, logits (labelled, N), and what to log."""
    chosen = batch["labels"] != -100
    labels, weights, tasks = (batch[name][chosen] for name in ("labels", "weights", "tasks"))
    entropy = F.cross_entropy(logits.float(), labels, reduction="none")
    loss = (entropy * weights).sum() / weights.sum()
    report = {"loss": loss.item(), "caption": entropy[weights == 1].mean().item()}
    places = (weights == 3) & (tasks < 0)  # inside a text, three times the weight marks a word for a place
    if places.any():
        report["places"] = entropy[places].mean().item()
    with torch.no_grad():
        answered = (labels == yes) | (labels == no)
        right = (logits[:, yes] > logits[:, no]) == (labels == yes)
        for index, task in enumerate(TASKS[1:], 1):
            rows = answered & (tasks == index)
            if rows.any():
                report[task] = right[rows].float().mean().item()
    return loss, report


# ---- training ------------------------------------------------------------------------------------------------------


class PlaceReadout(nn.Module):
    """Reads an object's centre off the projected patches (B, 64, D), as the first norm of the Llama will see them.

    Used in training only. A projector learns early that categories pay and drops where they are; then the language model
    never finds it. The read-out's loss keeps it there.
    """

    def __init__(self):
        super().__init__()
        self.centre = nn.Linear(WIDTH, 2)

    def forward(self, projected: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
        projected = projected.float()
        projected = projected * projected.pow(2).mean(-1, keepdim=True).clamp(min=1e-6).rsqrt()
        seen = target["category"] < BACKGROUND
        return (self.centre(projected[seen]) - target["centre"][seen]).abs().mean()


class ImageBatches:
    """Scenes and their pixels for a step: mirrored half of the time, some noised."""

    def __init__(self, cache: SceneCache, noisy: float):
        self.cache, self.noisy = cache, noisy

    def draw(self, rng: np.random.Generator, size: int) -> tuple[list[Scene], torch.Tensor, np.ndarray, bool]:
        indices = rng.choice(len(self.cache), size, replace=False)
        flip = bool(rng.random() < 0.5)
        x = pixels(self.cache, indices, flip)
        for row in range(size):
            if rng.random() < self.noisy:
                x[row] = ddpm_noise(x[row], int(rng.integers(300, 1000)))
        scenes = [self.cache.scenes[i] for i in indices]
        return [s.mirrored() if flip else s for s in scenes], x, indices, flip


def patch_words(target: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Words that say what is in a patch, each with the mask (B, 64) of patches it is true of."""
    seen = target["category"] < BACKGROUND
    x, y = target["centre"][..., 0], target["centre"][..., 1]
    yield " left", seen & (x < 0.45)
    yield " right", seen & (x > 0.55)
    yield " top", seen & (y < 0.45)
    yield " bottom", seen & (y > 0.55)
    yield " two", seen & (target["count"] == 2)
    yield " three", seen & (target["count"] == 3)
    for index, colour in enumerate(COLOURS, 1):
        yield f" {colour}", seen & (target["colour"] == index)


def align(
    rank: int,
    world: int,
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    tower: nn.Module,
    cache: SceneCache,
    steps: int,
) -> None:
    """Warm start of the projector: a patch starts as the sum of the embeddings of the words true of it.

    The counterpart of LLaVA's first stage, in a minute. Position, count and colour words are part of the sum; with the
    category alone they would be projected away.
    """
    embedding = model.model.language_model.embed_tokens
    projector = model.model.multi_modal_projector
    nn.init.normal_(embedding.weight, std=0.3)

    def vector(words: str) -> torch.Tensor:
        return embedding.weight[tokenizer(words, add_special_tokens=False)["input_ids"]].mean(0).detach()

    names = torch.stack([*[vector(f" {name}") for name in CATEGORIES], torch.zeros(WIDTH)])
    optimizer = torch.optim.AdamW(projector.parameters(), lr=3e-3)
    parameters = list(projector.parameters())
    same_start([embedding.weight, *parameters])
    for step in tqdm(range(steps), desc="projector", disable=rank > 0):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, 3e-3, 30)
        rng = np.random.default_rng((7, step, rank))
        indices = rng.choice(len(cache), 32, replace=False)
        flip = bool(rng.random() < 0.5)
        target = dense_targets(cache, indices, flip)
        features = tower_features(tower, pixels(cache, indices, flip))
        wanted = names[target["category"]]
        for word, true in patch_words(target):
            wanted = wanted + 0.5 * true[..., None] * vector(word)
        weight = torch.where(target["category"] < BACKGROUND, 1.0, 0.2)
        projected = projector(features)
        distance = (projected - wanted).pow(2).sum(-1)
        logits = projected @ names.T - 0.5 * names.pow(2).sum(-1)
        matched = F.cross_entropy(logits.transpose(1, 2), target["category"], reduction="none")
        loss = ((0.2 * distance + matched) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters, world)
        optimizer.step()
    with torch.no_grad():
        model.lm_head.weight.copy_(embedding.weight * 0.1)


@torch.no_grad()
def tower_features(tower: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Patch features (B, 64, D) the language model reads: the layer before the last, without the class token."""
    with torch.autocast("cpu", torch.bfloat16):
        return tower(pixel_values=x, output_hidden_states=True).hidden_states[-2][:, 1:].float()


@dataclass(frozen=True)
class LlavaSettings:
    """What stage 2 is trained with; the defaults are what the shipped model was trained with."""

    scenes: int = 40_000
    align_steps: int = 250
    steps: int = 3_900
    batch: int = 8  # images per process and step
    peak: float = 1.2e-3
    easy: float = 0.11  # share of the steps with clean, balanced existence questions
    weaken: float = 0.5  # noise on the tower's weights, see vision.weaken
    noisy: float = 0.06  # share of images noised at a step in 300..999
    blank: float = 0.05  # share of rows without a visible image
    seed: int = 0


def train_llava(rank: int, world: int, work: Path, output: Path, settings: LlavaSettings) -> None:
    """Train projector and language model; resumes from ``llava.pt`` in ``work``, exports to ``output`` on the way."""
    path = work / "llava.pt"
    cache = SceneCache(work / "scenes", "train", settings.scenes)
    if rank == 0 and not (work / "tokenizer").exists():
        build_tokenizer(cache.scenes[:6000]).save_pretrained(work / "tokenizer")
    dist.barrier()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")  # token ids belong to the checkpoint
    processor = build_processor(tokenizer)
    torch.manual_seed(settings.seed)
    model = build_model(tokenizer)
    tower = VisionTrainer()
    load_into(tower, read_checkpoint(work / "vision.pt", needs=("model",))["model"], str(work / "vision.pt"))
    tower = tower.tower.eval()
    weaken(tower, settings.weaken)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    language = model.model.language_model
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = parameter_groups([p for p in parameters if p is not language.embed_tokens.weight], 0.03)
    groups.append({"params": [language.embed_tokens.weight], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=settings.peak, betas=(0.9, 0.98))
    readout = PlaceReadout()
    readout_optimizer = torch.optim.AdamW(readout.parameters(), lr=3e-3)
    start = 0
    if path.exists():
        state = read_checkpoint(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        readout.load_state_dict(state["readout"])
        readout_optimizer.load_state_dict(state["readout_optimizer"])
        start = state["step"]
    else:
        align(rank, world, model, tokenizer, tower, cache, settings.align_steps)
    same_start([*parameters, *readout.parameters()])
    sampler = TextSampler(CoOccurrence(cache.scenes))
    images = ImageBatches(cache, settings.noisy)
    image_id = model.config.image_token_id
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" Yes", " No"))
    log = Log(work / "log.jsonl", rank, "llava")
    model.train()
    for step in tqdm(range(start, settings.steps), initial=start, total=settings.steps, desc="LLaVA", disable=rank > 0):
        numbers = np.random.default_rng((settings.seed, step, rank))
        rng = random.Random(f"{settings.seed}-{step}-{rank}")
        torch.manual_seed((settings.seed * settings.steps + step) * world + rank)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, settings.steps, settings.peak, 150)
        scenes, x, indices, flip = images.draw(numbers, settings.batch)
        easy = step < settings.easy * settings.steps
        turns = [sampler.first_turns(rng, s) if easy else sampler.turns(rng, s) for s in scenes]
        rows = [encode_row(tokenizer, t, rng, CELLS, settings.blank) for t in turns]
        batch = collate(rows, image_id)
        shown = torch.tensor([row.image != "none" for row in rows])
        features = tower_features(tower, x[shown])
        with torch.autocast("cpu", torch.bfloat16):
            embedded = language.embed_tokens(batch["ids"])
            projected = model.model.multi_modal_projector(features).to(embedded.dtype)
            slots = (batch["ids"] == image_id)[..., None]
            embedded = embedded.masked_scatter(slots, projected.reshape(-1, WIDTH))
            hidden = language(
                inputs_embeds=embedded,
                attention_mask=batch["mask"],
                position_ids=batch["positions"],
                use_cache=False,
            ).last_hidden_state
            logits = model.lm_head(hidden[batch["labels"] != -100])
        loss, report = weighted_loss(logits, batch, yes, no)
        target = {name: value[shown] for name, value in dense_targets(cache, indices, flip).items()}
        place = readout(projected, target)
        report["place"] = place.item()
        optimizer.zero_grad()
        readout_optimizer.zero_grad()
        (loss + place).backward()
        average_gradients(list(readout.parameters()), world)
        report["norm"] = average_gradients(parameters, world)
        optimizer.step()
        readout_optimizer.step()
        log.add(**report)
        last = step + 1 == settings.steps
        if (step + 1) % 50 == 0 or last:
            record = log.report(step + 1)
            if rank == 0:
                tqdm.write(str(record))
        if rank == 0 and ((step + 1) % 250 == 0 or last):
            save_checkpoint(
                path,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                readout=readout.state_dict(),
                readout_optimizer=readout_optimizer.state_dict(),
                step=step + 1,
            )
        if rank == 0 and ((step + 1) % 500 == 0 or last):
            export(model, processor, output)
