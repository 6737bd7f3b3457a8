"""The small InstructBLIP, built on the small LLaVA: same scenes, texts, tokenizer and language model.

Three stages. The vision tower starts from the LLaVA's CLIP tower, weight by weight where the two correspond, and is
repaired with the same dense labels. The Q-Former, reading the question, learns to make each query carry what the
LLaVA's projector says about one region of the image. Then Q-Former, projection and language model learn the answers
together. A Q-Former that has to find out by itself what queries are for does not get off the ground in minutes.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from lvlm_decode.weights import load_into, read_checkpoint
from lvlm_decode_data import texts
from lvlm_decode_data.scenes import GRID
from lvlm_decode_data.texts import CoOccurrence, TextSampler, Turn

from .llava import (
    TASKS,
    ImageBatches,
    answer_weights,
    export,
    place_tokens,
    set_generation,
    tower_features,
    weighted_loss,
)
from .scene_cache import BACKGROUND, IMAGE_SIZE, SceneCache
from .vision import MEAN, STD, VisionTrainer, dense_targets, fit_tower, vision_config, weaken
from .workers import Log, average_gradients, cosine, parameter_groups, same_start, save_checkpoint

QUERIES = 16
REGIONS = 4  # the queries start as a REGIONS x REGIONS view of the image
QFORMER_WIDTH = 192


def blip_vision_config() -> InstructBlipVisionConfig:
    """The same sizes as the LLaVA's CLIP tower."""
    clip = vision_config()
    return InstructBlipVisionConfig(
        hidden_size=clip.hidden_size,
        intermediate_size=clip.intermediate_size,
        num_hidden_layers=clip.num_hidden_layers,
        num_attention_heads=clip.num_attention_heads,
        image_size=clip.image_size,
        patch_size=clip.patch_size,
        hidden_act=clip.hidden_act,
        layer_norm_eps=clip.layer_norm_eps,
        initializer_range=clip.initializer_range,
    )


@torch.no_grad()
def tower_from_clip(clip: nn.Module, sample: torch.Tensor) -> InstructBlipVisionModel:
    """An InstructBLIP tower that starts with a CLIP tower's weights.

    CLIP normalises its embeddings before the first layer, InstructBLIP does not. The mean over channels and the affine
    part fold into the embeddings exactly; the division by each token's deviation is replaced by the mean over the
    pixels ``sample`` (B, 3, H, W), and a short fine-tuning repairs the rest.
    """
    state = clip.state_dict()
    embedded = clip.embeddings(sample)
    scale = (1 / embedded.std(-1, unbiased=False)).mean(0)  # one factor per position
    gain, bias = state["pre_layrnorm.weight"], state["pre_layrnorm.bias"]

    def normalised(vector: torch.Tensor) -> torch.Tensor:
        return (vector - vector.mean(0 if vector.dim() == 4 else -1, keepdim=True)) * (
            gain[:, None, None, None] if vector.dim() == 4 else gain
        )

    model = InstructBlipVisionModel(blip_vision_config())
    new = model.state_dict()
    patch_scale = scale[1:].mean()
    new["embeddings.patch_embedding.weight"] = normalised(state["embeddings.patch_embedding.weight"]) * patch_scale
    new["embeddings.patch_embedding.bias"] = torch.zeros_like(bias)
    new["embeddings.class_embedding"] = normalised(state["embeddings.class_embedding"])[None, None] * scale[0]
    positions = normalised(state["embeddings.position_embedding.weight"])
    positions = torch.cat([positions[:1] * scale[0], positions[1:] * patch_scale]) + bias
    new["embeddings.position_embedding"] = positions[None]
    for name in list(new):
        if not name.startswith("encoder.layers."):
            continue
        layer, part = name.split(".", 3)[2], name.split(".", 3)[3]
        old = f"encoder.layers.{layer}."
        if part.startswith("self_attn.qkv."):
            kind = part.rsplit(".", 1)[1]
            new[name] = torch.cat([state[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"])
        elif part.startswith("self_attn.projection."):
            new[name] = state[f"{old}self_attn.out_proj.{part.rsplit('.', 1)[1]}"]
        else:
            new[name] = state[old + part]
    model.load_state_dict(new)
    return model


class BlipVisionTrainer(VisionTrainer):
    """The InstructBLIP tower with the same read-outs, on its last layer: the one a Q-Former reads."""

    def __init__(self, tower: InstructBlipVisionModel):
        super().__init__(tower)

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.tower(pixel_values=x)
        return out.last_hidden_state[:, 1:], out.pooler_output


def train_blip_vision(rank: int, world: int, work: Path, train: int, steps: int, batch: int, peak: float) -> None:
    """Fine-tune the converted tower on dense labels; ends in ``blip-vision.pt``."""
    cache = SceneCache(work / "scenes", "train", train)
    clip = VisionTrainer()
    load_into(clip, read_checkpoint(work / "vision.pt", needs=("model",))["model"], str(work / "vision.pt"))
    sample = torch.from_numpy(cache.take("images", np.arange(64))).permute(0, 3, 1, 2).float() / 255
    trainer = BlipVisionTrainer(tower_from_clip(clip.tower, (sample - MEAN) / STD))
    trainer.heads.load_state_dict(clip.heads.state_dict())
    trainer.present.load_state_dict(clip.present.state_dict())
    fit_tower(rank, world, trainer, cache, work / "blip-vision.pt", work / "log.jsonl", steps, batch, peak)


@torch.no_grad()
def aim_queries(model: nn.Module, heads: nn.Module) -> None:
    """Let each query start by looking at its region of the image.

    Queries that look everywhere at once average the patches away, and the warm-up stays on that plateau for hundreds of
    steps. The tower's features say in which row and column a patch lies; the read-outs that show it become the keys of
    the first cross-attention, and each query starts with the code of its row and column.
    """
    step = GRID // REGIONS
    amplitude = 3.0
    for query in range(QUERIES):
        code = model.query_tokens[0, query]
        code[: 2 * REGIONS] = 0
        code[query // REGIONS] = amplitude
        code[REGIONS + query % REGIONS] = amplitude
    weight = torch.cat([h.weight.unflatten(0, (REGIONS, step)).mean(1) for h in (heads.row, heads.column)])
    bias = torch.cat([h.bias.unflatten(0, (REGIONS, step)).mean(1) for h in (heads.row, heads.column)])
    cross = model.qformer.encoder.layer[0].crossattention.attention
    size = cross.attention_head_size
    for head in range(cross.num_attention_heads - 2):  # two heads stay free
        rows = slice(head * size, head * size + 2 * REGIONS)
        cross.key.weight[rows], cross.key.bias[rows] = weight, bias
        cross.query.weight[rows] = 0
        cross.query.weight[rows, : 2 * REGIONS] = torch.eye(2 * REGIONS) * size**0.5 / 5


def build_model(tokenizer: PreTrainedTokenizerFast, llava: LlavaForConditionalGeneration) -> nn.Module:
    """The untrained InstructBLIP, its language model that of the LLaVA."""
    text = copy.deepcopy(llava.config.text_config)
    text.architectures = None
    config = InstructBlipConfig(
        vision_config=blip_vision_config(),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=text.vocab_size,
            hidden_size=QFORMER_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=6,
            intermediate_size=512,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            cross_attention_frequency=2,
            max_position_embeddings=512,
            layer_norm_eps=1e-6,
        ),
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = InstructBlipForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.5)
    # BERT's deviation of 0.02 suits a width of 768; at 192 what is attended to would hardly reach the output.
    for module in model.qformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    model.language_model.model.load_state_dict(llava.model.language_model.state_dict())
    model.language_model.lm_head.load_state_dict(llava.lm_head.state_dict())
    set_generation(model, tokenizer)
    set_generation(model.language_model, tokenizer)
    return model


def plain_tokenizer(tokenizer: PreTrainedTokenizerFast, padding_side: str) -> PreTrainedTokenizerFast:
    """The same vocabulary without the attribute ``image_token``: InstructBlipProcessor brings its own."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side=padding_side,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> InstructBlipProcessor:
    """The Q-Former reads the question with the same vocabulary, padded on the right: its positions are absolute."""
    image = BlipImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=MEAN.flatten().tolist(),
        image_std=STD.flatten().tolist(),
        resample=3,
    )
    return InstructBlipProcessor(
        image, plain_tokenizer(tokenizer, "left"), plain_tokenizer(tokenizer, "right"), num_query_tokens=QUERIES
    )


# ---- batches -------------------------------------------------------------------------------------------------------


def question_tokens(tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (rows, length) of what the Q-Former reads, padded on the right."""
    tokens = tokenizer(questions)["input_ids"]
    length = max(map(len, tokens))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in tokens])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in tokens])
    return ids, mask


def query_outputs(
    model: nn.Module, features: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, owner: torch.Tensor
) -> torch.Tensor:
    """Query outputs (rows, Q, D) for questions (rows, length) about the images ``owner`` (rows,) points to."""
    rows = len(owner)
    queries = model.query_tokens.expand(rows, -1, -1)
    return model.qformer(
        input_ids=ids,
        attention_mask=torch.cat([torch.ones(rows, QUERIES, dtype=torch.long), mask], 1),
        query_embeds=queries,
        encoder_hidden_states=features[owner],
        encoder_attention_mask=torch.ones(rows, features.shape[1], dtype=torch.long),
    ).last_hidden_state[:, :QUERIES]


@torch.no_grad()
def tower_outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Class token and patches (B, 65, D) the Q-Former reads."""
    with torch.autocast("cpu", torch.bfloat16):
        return model.vision_model(pixel_values=x).last_hidden_state.float()


def answer_batch(
    tokenizer: PreTrainedTokenizerFast, turns: list[Turn], hidden: list[bool], image_id: int
) -> dict[str, torch.Tensor]:
    """Tensors (rows, T) of query slots, question and answer, as in llava.collate but one turn a row; ``attention`` is
    0 on padding and on the slots of images ``hidden`` from the language model."""
    prompts = tokenizer([turn.question for turn in turns])["input_ids"]
    answers = tokenizer([f" {turn.answer}</s>" for turn in turns], add_special_tokens=False)["input_ids"]
    length = max(QUERIES + len(p) + len(a) for p, a in zip(prompts, answers))
    size = (len(turns), (length + 7) // 8 * 8)
    batch = {
        "ids": torch.zeros(size, dtype=torch.long),
        "attention": torch.zeros(size, dtype=torch.long),
        "labels": torch.full(size, -100),
        "weights": torch.zeros(size),
        "tasks": torch.full(size, -1),
    }
    places = place_tokens(tokenizer)
    for row, (turn, prompt, answer) in enumerate(zip(turns, prompts, answers)):
        first = QUERIES + len(prompt) - 1
        end = first + 1 + len(answer)
        batch["ids"][row, :end] = torch.tensor([image_id] * QUERIES + prompt + answer)
        batch["attention"][row, QUERIES if hidden[row] else 0 : end] = 1
        batch["labels"][row, first : end - 1] = torch.tensor(answer)
        batch["weights"][row, first : end - 1] = torch.tensor(answer_weights(turn, answer, places))
        batch["tasks"][row, first] = TASKS.index(turn.task)
    return batch


class RegionHeads(nn.Module):
    """What is seen in the region of each query (rows, Q, D); used in training only."""

    def __init__(self, width: int = QFORMER_WIDTH):
        super().__init__()
        self.present = nn.Linear(width, BACKGROUND)


def region_presence(target: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, Q, categories) float, 1 where a patch of the region shows the category."""
    step = GRID // REGIONS
    one_hot = F.one_hot(target["category"], BACKGROUND + 1)[..., :BACKGROUND].float()
    cells = one_hot.unflatten(1, (REGIONS, step, REGIONS, step)).amax((2, 4))
    return cells.flatten(1, 2)


def region_mean(projected: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the patches of each region that show an object, over all its patches where none does: (B, Q, D)."""
    step = GRID // REGIONS
    seen = (target["category"] < BACKGROUND).float()
    weight = seen + 1e-3
    grid = (projected * weight[..., None]).unflatten(1, (REGIONS, step, REGIONS, step)).sum((2, 4))
    total = weight.unflatten(1, (REGIONS, step, REGIONS, step)).sum((2, 4))
    return (grid / total[..., None]).flatten(1, 2)


# ---- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InstructBlipSettings:
    """What the Q-Former and the joint stage are trained with; the defaults made the shipped model."""

    scenes: int = 40_000
    warm_steps: int = 260
    warm_batch: int = 32
    warm_peak: float = 1e-3
    steps: int = 320
    batch: int = 8  # images per process and step
    peak: float = 8e-4
    captions: float = 0.4  # share of images whose caption is learned; the language model knows captions already
    weaken: float = 0.35  # noise on the tower's weights, see vision.weaken; the Q-Former loses some more
    noisy: float = 0.06
    blank: float = 0.05
    seed: int = 0


def _start(
    work: Path, llava_dir: Path, settings: InstructBlipSettings
) -> tuple[nn.Module, LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    tokenizer = AutoProcessor.from_pretrained(llava_dir).tokenizer
    llava = LlavaForConditionalGeneration.from_pretrained(llava_dir, dtype=torch.float32).eval()
    model = build_model(tokenizer, llava)
    tower = BlipVisionTrainer(InstructBlipVisionModel(blip_vision_config()))
    load_into(tower, read_checkpoint(work / "blip-vision.pt", needs=("model",))["model"], str(work / "blip-vision.pt"))
    aim_queries(model, tower.heads)
    weaken(tower.tower, settings.weaken)
    model.vision_model.load_state_dict(tower.tower.state_dict())
    model.vision_model.requires_grad_(False)
    return model, llava, tokenizer


def train_qformer(rank: int, world: int, work: Path, llava_dir: Path, settings: InstructBlipSettings) -> None:
    """Warm-up: query k carries what the LLaVA's projector says about region k; ends in ``qformer.pt``."""
    path = work / "qformer.pt"
    torch.manual_seed(settings.seed)
    model, llava, tokenizer = _start(work, llava_dir, settings)
    cache = SceneCache(work / "scenes", "train", settings.scenes)
    heads = RegionHeads()
    parameters = [model.query_tokens, *model.qformer.parameters(), *model.language_projection.parameters()]
    trained = [*parameters, *heads.parameters()]
    optimizer = torch.optim.AdamW(parameter_groups(trained, 0.03), lr=settings.warm_peak, betas=(0.9, 0.98))
    start = 0
    if path.exists():
        state = read_checkpoint(path)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    same_start(trained)
    sampler = TextSampler(CoOccurrence(cache.scenes))
    images = ImageBatches(cache, 0.0)
    log = Log(work / "log.jsonl", rank, "qformer")
    steps = settings.warm_steps
    for step in tqdm(range(start, steps), initial=start, total=steps, desc="Q-Former", disable=rank > 0):
        numbers = np.random.default_rng((settings.seed, 1, step, rank))
        rng = random.Random(f"qformer-{settings.seed}-{step}-{rank}")
        torch.manual_seed(step * world + rank)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, settings.warm_peak, 60)
        scenes, x, indices, flip = images.draw(numbers, settings.warm_batch)
        target = dense_targets(cache, indices, flip)
        ids, mask = question_tokens(tokenizer, [sampler.existence(rng, scene).question for scene in scenes])
        with torch.no_grad():
            patches = llava.model.multi_modal_projector(tower_features(llava.model.vision_tower, x))
            wanted = region_mean(patches, target)
        with torch.autocast("cpu", torch.bfloat16):
            queries = query_outputs(model, tower_outputs(model, x), ids, mask, torch.arange(len(x)))
            projected = model.language_projection(queries)
        queries, projected = queries.float(), projected.float()
        distance = F.mse_loss(projected, wanted) / wanted.var()
        present = F.binary_cross_entropy_with_logits(heads.present(queries), region_presence(target)) * BACKGROUND
        optimizer.zero_grad()
        (distance + 0.5 * present).backward()
        norm = average_gradients(trained, world)
        optimizer.step()
        log.add(distance=distance.item(), present=present.item(), norm=norm)
        last = step + 1 == steps
        if (step + 1) % 50 == 0 or last:
            record = log.report(step + 1)
            if rank == 0:
                tqdm.write(str(record))
        if rank == 0 and ((step + 1) % 200 == 0 or last):
            save_checkpoint(
                path,
                model=model.state_dict(),
                heads=heads.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
            )


def train_joint(
    rank: int, world: int, work: Path, llava_dir: Path, output: Path, settings: InstructBlipSettings
) -> None:
    """Q-Former, projection and language model together, on the answers; resumes from ``instructblip.pt``."""
    path = work / "instructblip.pt"
    torch.manual_seed(settings.seed)
    model, _, tokenizer = _start(work, llava_dir, settings)
    load_into(model, read_checkpoint(work / "qformer.pt", needs=("model",))["model"], str(work / "qformer.pt"))
    processor = build_processor(tokenizer)
    cache = SceneCache(work / "scenes", "train", settings.scenes)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(parameters, 0.03), lr=settings.peak, betas=(0.9, 0.98))
    start = 0
    if path.exists():
        state = read_checkpoint(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    same_start(parameters)
    sampler = TextSampler(CoOccurrence(cache.scenes))
    images = ImageBatches(cache, settings.noisy)
    image_id = model.config.image_token_id
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" Yes", " No"))
    log = Log(work / "log.jsonl", rank, "instructblip")
    steps = settings.steps
    for step in tqdm(range(start, steps), initial=start, total=steps, desc="InstructBLIP", disable=rank > 0):
        numbers = np.random.default_rng((settings.seed, 2, step, rank))
        rng = random.Random(f"instructblip-{settings.seed}-{step}-{rank}")
        torch.manual_seed((settings.seed * steps + step) * world + rank)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, settings.peak, 100)
        scenes, x, _, _ = images.draw(numbers, settings.batch)
        captions, answers = [], []
        for image, scene in enumerate(scenes):
            turns = sampler.turns(rng, scene, existence=2, attributes=3)
            for turn in turns if rng.random() < settings.captions else turns[1:]:
                if rng.random() < 0.06:  # instruction-contrastive methods put a sentence before the question
                    turn = Turn(f"{rng.choice(texts.SYSTEM_PREFIXES)} {turn.question}", turn.answer, turn.task)
                (captions if turn.task == "caption" else answers).append((image, turn))
        features = tower_outputs(model, x)
        optimizer.zero_grad()
        total = 0.0
        # Captions and short answers differ in length, so they go through in two passes whose gradients add up.
        for name, rows in (("caption", captions), ("answers", answers)):
            if not rows:
                continue
            owner = torch.tensor([image for image, _ in rows])
            turns = [turn for _, turn in rows]
            hidden = [rng.random() < settings.blank for _ in rows]
            batch = answer_batch(tokenizer, turns, hidden, image_id)
            ids, mask = question_tokens(tokenizer, [turn.question for turn in turns])
            with torch.autocast("cpu", torch.bfloat16):
                queries = query_outputs(model, features, ids, mask, owner)
                embedded = model.language_model.model.embed_tokens(batch["ids"])
                slots = (batch["ids"] == image_id)[..., None]
                projected = model.language_projection(queries).to(embedded.dtype)
                embedded = embedded.masked_scatter(slots, projected.reshape(-1, projected.shape[-1]))
                positions = (batch["attention"].cumsum(1) - 1).clamp(min=0)
                out = model.language_model.model(
                    inputs_embeds=embedded,
                    attention_mask=batch["attention"],
                    position_ids=positions,
                    use_cache=False,
                ).last_hidden_state
                logits = model.language_model.lm_head(out[batch["labels"] != -100])
            loss, report = weighted_loss(logits, batch, yes, no)
            (loss * (0.5 if name == "caption" else 1.0)).backward()
            total += loss.item()
            if name == "answers":
                report.pop("caption")
            report.pop("loss")
            log.add(**report)
        norm = average_gradients(parameters, world)
        optimizer.step()
        log.add(loss=total, norm=norm)
        last = step + 1 == steps
        if (step + 1) % 50 == 0 or last:
            record = log.report(step + 1)
            if rank == 0:
                tqdm.write(str(record))
        if rank == 0 and ((step + 1) % 250 == 0 or last):
            save_checkpoint(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
        if rank == 0 and ((step + 1) % 250 == 0 or last):
            export(model, processor, output)
