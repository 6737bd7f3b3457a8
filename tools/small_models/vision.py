"""Stage 1 of the small models: a CLIP vision tower that knows what is seen in each of its patches.

The renderer's truth supervises every patch of the layer the language model will read (the one before the last): its
category, its own row and column, and, on objects, the object's centre, colour and how many of its kind the scene holds.
Without the last four, position and count never reach the language model. The class token learns which categories are
present, through the last layer, which gets no dense labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from lvlm_decode.weights import load_into, read_checkpoint
from lvlm_decode_data.scenes import CATEGORY_ID, COLOURS, GRID

from .scene_cache import BACKGROUND, CELLS, IMAGE_SIZE, SceneCache
from .workers import Log, average_gradients, cosine, parameter_groups, same_start, save_checkpoint

WIDTH = 160
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
COUNTS = 4  # heads tell 0..3 of a kind apart


def vision_config() -> CLIPVisionConfig:
    """The tower's configuration: 64 patches of 12 x 12 pixels and a class token."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // GRID,
        projection_dim=WIDTH,
    )


class DenseHeads(nn.Module):
    """Linear read-outs of patch features (B, 64, D); used in training only."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.category = nn.Linear(width, BACKGROUND + 1)
        self.row = nn.Linear(width, GRID)
        self.column = nn.Linear(width, GRID)
        self.centre = nn.Linear(width, 2)
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.count = nn.Linear(width, COUNTS)


def dense_loss(heads: DenseHeads, features: torch.Tensor, target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Losses and accuracies of patch features (B, 64, D) against the truth per patch."""
    features = features.float()
    category = target["category"]
    seen = category < BACKGROUND
    weight = torch.ones(BACKGROUND + 1)
    weight[BACKGROUND] = 0.35  # most patches are background
    logits = heads.category(features)
    cells = torch.arange(CELLS).expand(len(features), CELLS)
    on = features[seen]
    colour, count = heads.colour(on), heads.count(on)
    counts = target["count"][seen].clamp(max=COUNTS - 1)
    centre_error = (heads.centre(on) - target["centre"][seen]).abs()
    losses = {
        "category": F.cross_entropy(logits.reshape(-1, BACKGROUND + 1), category.reshape(-1), weight=weight),
        "place": F.cross_entropy(heads.row(features).reshape(-1, GRID), (cells // GRID).reshape(-1))
        + F.cross_entropy(heads.column(features).reshape(-1, GRID), (cells % GRID).reshape(-1)),
        "centre": centre_error.mean(),
        "colour": F.cross_entropy(colour, target["colour"][seen]),
        "count": F.cross_entropy(count, counts, weight=torch.tensor([0.0, 0.6, 1.2, 1.2])),
    }
    painted = target["colour"][seen] > 0
    several = counts > 1
    with torch.no_grad():
        losses |= {
            "category_accuracy": (logits.argmax(-1) == category)[seen].float().mean(),
            "colour_accuracy": (colour.argmax(-1) == target["colour"][seen])[painted].float().mean(),
            "several_recall": (count.argmax(-1) > 1)[several].float().mean(),
            "one_recall": (count.argmax(-1) <= 1)[~several].float().mean(),
        }
    return losses


DENSE_WEIGHTS = {"category": 1.0, "place": 0.1, "centre": 0.5, "colour": 0.3, "count": 0.3}


def dense_targets(cache: SceneCache, indices: np.ndarray, flip: bool) -> dict[str, torch.Tensor]:
    """Truth per patch for a batch, mirrored left to right when ``flip``."""
    target = {
        name: torch.from_numpy(cache.take(name, indices).astype(np.int64)) for name in ("category", "colour", "count")
    }
    target["centre"] = torch.from_numpy(cache.take("centre", indices).astype(np.float32))
    if flip:
        target = {name: value.unflatten(1, (GRID, GRID)).flip(2).flatten(1, 2) for name, value in target.items()}
        target["centre"][..., 0] = 1 - target["centre"][..., 0]
    return target


def presence(cache: SceneCache, indices: np.ndarray) -> torch.Tensor:
    """(B, categories) float, 1 where the category is in the scene."""
    out = torch.zeros(len(indices), BACKGROUND)
    for row, index in enumerate(indices):
        out[row, [CATEGORY_ID[name] for name in cache.scenes[index].categories]] = 1
    return out


def pixels(cache: SceneCache, indices: np.ndarray, flip: bool = False, jitter: bool = True) -> torch.Tensor:
    """Normalised pixels (B, 3, 96, 96), with a little random contrast and brightness when ``jitter``."""
    x = torch.from_numpy(cache.take("images", indices)).permute(0, 3, 1, 2).float() / 255
    if flip:
        x = x.flip(3)
    if jitter:
        x = x * (1 + 0.2 * (torch.rand(len(x), 1, 1, 1) - 0.5)) + 0.15 * (torch.rand(len(x), 1, 1, 1) - 0.5)
    return (x - MEAN) / STD


class VisionTrainer(nn.Module):
    """A tower with its read-outs; subclasses say which layer the language model reads."""

    def __init__(self, tower: nn.Module | None = None):
        super().__init__()
        self.tower = CLIPVisionModel(vision_config()) if tower is None else tower
        self.heads = DenseHeads()
        self.present = nn.Linear(WIDTH, BACKGROUND)

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch features (B, 64, D) that get the dense labels, and the pooled class token (B, D)."""
        out = self.tower(pixel_values=x, output_hidden_states=True)
        return out.hidden_states[-2][:, 1:], out.pooler_output

    def losses(
        self, x: torch.Tensor, target: dict[str, torch.Tensor], present: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Losses and accuracies of pixels (B, 3, H, W) against the truth."""
        with torch.autocast("cpu", torch.bfloat16):
            features, pooled = self.features(x)
        losses = dense_loss(self.heads, features, target)
        logits = self.present(pooled.float())
        losses["present"] = F.binary_cross_entropy_with_logits(logits, present) * BACKGROUND / 4
        return losses


def fit_tower(
    rank: int,
    world: int,
    model: VisionTrainer,
    cache: SceneCache,
    path: Path,
    log_path: Path,
    steps: int,
    batch: int,
    peak: float,
) -> None:
    """Train a tower on dense labels; resumes from ``path``, which holds the finished tower at the end."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(parameters, 0.05), lr=peak, betas=(0.9, 0.98))
    start = 0
    if path.exists():
        state = read_checkpoint(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    same_start(parameters)
    log = Log(log_path, rank, path.stem)
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=path.stem, disable=rank > 0):
        rng = np.random.default_rng((step, rank))
        torch.manual_seed(step * world + rank)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, peak, 150)
        indices = rng.choice(len(cache), batch, replace=False)
        flip = bool(rng.random() < 0.5)
        losses = model.losses(
            pixels(cache, indices, flip), dense_targets(cache, indices, flip), presence(cache, indices)
        )
        loss = sum(losses[name] * weight for name, weight in DENSE_WEIGHTS.items()) + 0.5 * losses["present"]
        optimizer.zero_grad()
        loss.backward()
        norm = average_gradients(parameters, world)
        optimizer.step()
        log.add(**{name: value.item() for name, value in losses.items()}, norm=norm)
        last = step + 1 == steps
        if (step + 1) % 50 == 0 or last:
            record = log.report(step + 1)
            if rank == 0:
                tqdm.write(str(record))
        if rank == 0 and ((step + 1) % 200 == 0 or last):
            save_checkpoint(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)


def train_vision(rank: int, world: int, work: Path, train: int, steps: int, batch: int, peak: float) -> None:
    """Train the LLaVA's tower from scratch; ends in ``vision.pt``."""
    cache = SceneCache(work / "scenes", "train", train)
    torch.manual_seed(0)
    fit_tower(rank, world, VisionTrainer(), cache, work / "vision.pt", work / "log.jsonl", steps, batch, peak)


@torch.no_grad()
def weaken(tower: nn.Module, strength: float, seed: int = 0) -> None:
    """Add Gaussian noise to a tower's layer matrices, ``strength`` times each matrix's standard deviation.

    Emoji are easy: a tower trained for ten minutes knows nine object patches in ten, and a language model that reads it
    hardly hallucinates. With 0.5 it knows two in three, as unsure as the towers of large models are of photographs.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in tower.named_parameters():
        if ".layers." in name and weight.dim() > 1:
            weight += strength * weight.std() * torch.randn(weight.shape, generator=generator)


@torch.no_grad()
def validate_tower(model: VisionTrainer, path: Path, scenes: Path, count: int = 1000) -> dict[str, float]:
    """Losses and accuracies of the trained read-outs in ``path`` on validation scenes."""
    cache = SceneCache(scenes, "validation", count)
    load_into(model, read_checkpoint(path, needs=("model",))["model"], str(path))
    model.eval()
    sums: dict[str, list[float]] = {}
    for first in range(0, count, 100):
        indices = np.arange(first, min(first + 100, count))
        losses = model.losses(
            pixels(cache, indices, jitter=False), dense_targets(cache, indices, False), presence(cache, indices)
        )
        for name, value in losses.items():
            sums.setdefault(name, []).append(value.item())
    return {name: round(float(np.nanmean(values)), 4) for name, values in sums.items()}
