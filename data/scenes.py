"""Synthetic photographs with COCO category names: a seeded generator and its ground truth.

A scene is a textured background of one of ten themes with emoji glyphs on it. Themes make objects co-occur as they
do in photographs (a fork beside a pizza, a giraffe beside a zebra); occlusion, size, tint, blur, contrast and noise
make them hard to see. Both together let a small model hallucinate for the reason large ones do. Everything follows
from the seed.

>>> image, scene, owner = render(scene_seed("train", 7))      # PIL image, ground truth, which object owns each pixel

Nothing here imports torch.
"""

from __future__ import annotations

import colorsys
import functools
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HERE = Path(__file__).resolve().parent
SIZE = 240  # pixels per side of a rendered scene
GRID = 8  # the truth can be read on a grid of GRID x GRID cells, the patches of the small models
MIN_VISIBLE = 0.22  # an object with a smaller visible share is not annotated: nobody could see it
CELL_SHARE = 0.18  # share of a grid cell that glyph pixels must cover for the cell to count as theirs

# Seeds of the splits are disjoint by construction: a split owns one block of a million.
SPLITS = {"train": 1_000_000, "validation": 2_000_000, "heldout": 3_000_000}

# theme: (share of scenes, palette, probability of a person, weighted objects)
THEMES: dict[str, tuple[float, str, float, dict[str, float]]] = {
    "street": (
        0.18,
        "city",
        0.75,
        {
            "car": 9,
            "traffic light": 6,
            "bus": 4,
            "truck": 4,
            "bicycle": 4,
            "motorcycle": 3,
            "stop sign": 3,
            "handbag": 3,
            "backpack": 2,
            "umbrella": 2,
            "dog": 1,
        },
    ),
    "farm": (0.09, "grass", 0.35, {"cow": 7, "sheep": 7, "horse": 6, "dog": 4, "truck": 2, "bird": 2}),
    "safari": (0.09, "savanna", 0.08, {"elephant": 7, "zebra": 7, "giraffe": 7, "bird": 4, "bear": 2}),
    "kitchen": (
        0.11,
        "tile",
        0.2,
        {
            "bowl": 8,
            "knife": 7,
            "spoon": 7,
            "cup": 5,
            "bottle": 5,
            "banana": 4,
            "apple": 4,
            "carrot": 4,
            "broccoli": 4,
            "orange": 3,
        },
    ),
    "dining": (
        0.12,
        "wood",
        0.45,
        {
            "fork": 8,
            "cup": 7,
            "wine glass": 6,
            "pizza": 6,
            "cake": 4,
            "knife": 5,
            "bottle": 4,
            "sandwich": 3,
            "donut": 3,
            "chair": 5,
        },
    ),
    "office": (
        0.12,
        "grey",
        0.3,
        {
            "laptop": 8,
            "keyboard": 8,
            "mouse": 8,
            "cell phone": 5,
            "book": 5,
            "cup": 4,
            "clock": 3,
            "chair": 4,
            "potted plant": 2,
        },
    ),
    "living": (
        0.10,
        "warm",
        0.25,
        {
            "couch": 9,
            "tv": 8,
            "potted plant": 5,
            "cat": 5,
            "clock": 4,
            "vase": 4,
            "book": 3,
            "teddy bear": 3,
            "bed": 2,
        },
    ),
    "park": (
        0.09,
        "grass",
        0.85,
        {
            "sports ball": 6,
            "frisbee": 4,
            "kite": 5,
            "skateboard": 4,
            "tennis racket": 4,
            "dog": 6,
            "bicycle": 2,
            "bird": 3,
        },
    ),
    "beach": (0.06, "sea", 0.7, {"boat": 8, "umbrella": 6, "bird": 6, "kite": 4, "sports ball": 3}),
    "travel": (
        0.04,
        "grey",
        0.8,
        {"suitcase": 8, "backpack": 6, "airplane": 6, "train": 5, "handbag": 4, "tie": 3, "cell phone": 2},
    ),
}
# Light (top) and ground (bottom) colour of the background, before jitter.
PALETTES = {
    "city": ((150, 160, 175), (110, 110, 115)),
    "grass": ((150, 195, 230), (110, 160, 80)),
    "savanna": ((225, 205, 150), (190, 165, 95)),
    "tile": ((225, 225, 215), (190, 185, 175)),
    "wood": ((205, 170, 125), (150, 105, 70)),
    "grey": ((200, 205, 210), (150, 150, 155)),
    "warm": ((220, 200, 175), (165, 135, 115)),
    "sea": ((165, 210, 235), (60, 130, 175)),
}
CATEGORIES: list[str] = sorted({"person"} | {name for theme in THEMES.values() for name in theme[3]})
CATEGORY_ID = {name: index for index, name in enumerate(CATEGORIES)}
COLOURS = {"red": 0.0, "yellow": 0.145, "green": 0.34, "blue": 0.61}  # hue
# Categories that are painted, with the colour they usually have: a prior about attributes, too.
USUAL_COLOUR = {
    "car": "red",
    "bus": "yellow",
    "truck": "blue",
    "umbrella": "red",
    "chair": "blue",
    "couch": "red",
    "cup": "blue",
    "book": "green",
    "backpack": "red",
    "handbag": "yellow",
    "kite": "yellow",
    "boat": "blue",
    "suitcase": "blue",
    "bicycle": "green",
    "frisbee": "red",
    "bowl": "green",
}
MAX_OBJECTS = 8
OFF_THEME = 0.08


@dataclass(frozen=True)
class SceneObject:
    """One visible object: box (x, y, width, height) in pixels of the scene, visible share in (0, 1]."""

    category: str
    box: tuple[int, int, int, int]
    visible: float
    colour: str | None = None

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the box's centre as shares of the image, origin at the top left."""
        x, y, width, height = self.box
        return (x + width / 2) / SIZE, (y + height / 2) / SIZE

    def horizontal(self, margin: float = 0.1) -> str | None:
        """``left`` or ``right`` of the image's centre, None within ``margin`` of it."""
        x = self.centre[0]
        return "left" if x < 0.5 - margin else "right" if x > 0.5 + margin else None

    def vertical(self, margin: float = 0.1) -> str | None:
        """``top`` or ``bottom`` half, None within ``margin`` of the centre."""
        y = self.centre[1]
        return "top" if y < 0.5 - margin else "bottom" if y > 0.5 + margin else None


@dataclass(frozen=True)
class Scene:
    """Ground truth of one scene. ``path`` is set for scenes that ship as a file."""

    image_id: int
    split: str
    theme: str
    objects: tuple[SceneObject, ...]
    path: Path | None = None

    @property
    def categories(self) -> frozenset[str]:
        """Names of the categories with at least one visible object."""
        return frozenset(item.category for item in self.objects)

    @property
    def counts(self) -> dict[str, int]:
        """Visible objects per category."""
        return dict(Counter(item.category for item in self.objects))

    def of(self, category: str) -> list[SceneObject]:
        """The visible objects of one category, most visible pixels first."""
        found = [item for item in self.objects if item.category == category]
        return sorted(found, key=lambda item: -item.visible * item.box[2] * item.box[3])

    def colour(self, category: str) -> str | None:
        """The colour all objects of a category share, None where the category is not painted or absent."""
        colours = {item.colour for item in self.objects if item.category == category}
        return colours.pop() if len(colours) == 1 else None

    def mirrored(self) -> Scene:
        """The same scene seen in a mirror: left and right change places."""
        flipped = []
        for item in self.objects:
            x, y, width, height = item.box
            flipped.append(replace(item, box=(SIZE - x - width, y, width, height)))
        return replace(self, objects=tuple(flipped), path=None)

    def to_json(self) -> dict:
        return {
            "image_id": self.image_id,
            "split": self.split,
            "theme": self.theme,
            "file": self.path.name if self.path else None,
            "objects": [asdict(item) for item in self.objects],
        }

    @classmethod
    def from_json(cls, record: dict, folder: Path) -> Scene:
        objects = tuple(SceneObject(**{**item, "box": tuple(item["box"])}) for item in record["objects"])
        path = folder / record["file"] if record["file"] else None
        return cls(record["image_id"], record["split"], record["theme"], objects, path)


def scene_seed(split: str, index: int) -> int:
    """Seed, and image id, of scene ``index`` of a split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if not 0 <= index < 1_000_000:
        raise ValueError(f"scene index {index} is outside 0..999999, the range of one split")
    return SPLITS[split] + index


def split_of(seed: int) -> str:
    """The split a seed belongs to."""
    for name, first in SPLITS.items():
        if first <= seed < first + 1_000_000:
            return name
    raise ValueError(f"seed {seed} belongs to no split; use scene_seed(split, index)")


@functools.cache
def _glyphs() -> dict[str, list[Image.Image]]:
    index = json.loads((HERE / "glyphs" / "index.json").read_text(encoding="utf-8"))
    return {c: [Image.open(HERE / "glyphs" / name).convert("RGBA") for name in index[c]] for c in CATEGORIES}


@functools.cache
def _glyph(category: str, variant: int, colour: str | None) -> Image.Image:
    image = _glyphs()[category][variant]
    if colour is None:
        return image
    pixels = np.asarray(image).astype(np.float32) / 255
    luminance = pixels[..., :3].mean(-1)
    paint = np.stack([(0.35 + 0.65 * luminance) * v for v in colorsys.hsv_to_rgb(COLOURS[colour], 0.85, 1.0)], -1)
    # Highlights and the darkest parts keep some of their own colour, or wheels and windows would vanish.
    keep = np.clip(np.abs(luminance - 0.5) * 2 - 0.75, 0, 1)[..., None] * 2
    pixels[..., :3] = paint * (1 - keep) + pixels[..., :3] * keep
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8), "RGBA")


def _background(rng: np.random.Generator, palette: str) -> Image.Image:
    top, bottom = (np.array(colour, float) + rng.normal(0, 22, 3) for colour in PALETTES[palette])
    if rng.random() < 0.12:  # an unusual place: the background alone must not decide what can be there
        top, bottom = rng.uniform(40, 230, 3), rng.uniform(40, 230, 3)
    horizon = rng.uniform(0.3, 0.7)
    weight = 1 / (1 + np.exp(-(np.linspace(0, 1, SIZE) - horizon) * rng.uniform(5, 30)))[:, None]
    rows = (top * (1 - weight) + bottom * weight).astype(np.float32)
    texture = np.zeros((SIZE, SIZE), np.float32)
    for cells, strength in ((6, 16), (16, 12), (48, 10), (110, 6)):
        patch = rng.normal(0, strength * rng.uniform(0.3, 1.3), (cells, cells)).astype(np.float32)
        texture += np.asarray(Image.fromarray(patch).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    image = Image.fromarray((rows[:, None, :] + texture[..., None]).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 6)):  # clutter that is no object
        x, y = rng.integers(0, SIZE, 2)
        width, height = rng.integers(10, 85, 2)
        fill = tuple(int(v) for v in rng.integers(30, 240, 3))
        shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
        shape([int(x), int(y), int(x + width), int(y + height)], fill=fill)
    return image


def _choose(rng: np.random.Generator) -> tuple[str, list[tuple[str, str | None, int, float]]]:
    """Theme, and per object its category, colour, glyph variant and size."""
    names = list(THEMES)
    shares = np.array([THEMES[name][0] for name in names])
    theme = names[rng.choice(len(names), p=shares / shares.sum())]
    _, _, person, objects = THEMES[theme]
    weights = np.array(list(objects.values()), float) ** 1.15
    count = int(rng.choice([1, 2, 3, 4, 5, 6], p=[0.07, 0.2, 0.3, 0.25, 0.12, 0.06]))
    with_person = rng.random() < person
    others = min(max(count - with_person, 0), len(objects))
    picked = [str(c) for c in rng.choice(list(objects), size=others, replace=False, p=weights / weights.sum())]
    for position in range(len(picked)):
        if rng.random() < OFF_THEME:
            stranger = CATEGORIES[rng.integers(len(CATEGORIES))]
            if stranger not in picked and stranger != "person":
                picked[position] = stranger
    if with_person or not picked:
        picked.append("person")
    chosen = []
    for category in picked:
        repeats = 1
        if rng.random() < 0.24:
            repeats = 2 if rng.random() < 0.55 else 3
        colour = None
        if category in USUAL_COLOUR:
            usual = USUAL_COLOUR[category]
            colour = usual if rng.random() < 0.45 else list(COLOURS)[rng.integers(len(COLOURS))]
        variant = int(rng.integers(len(_glyphs()[category])))
        size = rng.uniform(66, 104) if rng.random() < 0.74 else rng.uniform(38, 66)
        if repeats > 1:
            size = min(size, 72.0)
        if len(chosen) + repeats > MAX_OBJECTS:
            repeats = 1
        chosen += [(category, colour, variant, size * rng.uniform(0.9, 1.1)) for _ in range(repeats)]
    return theme, chosen


def render(seed: int, without: Collection[str] = ()) -> tuple[Image.Image, Scene, np.ndarray]:
    """Render the scene of a seed; the objects of the categories in ``without`` are left out, all else stays in place.

    Returns the RGB image (SIZE x SIZE), its ground truth, and the owner map: uint8 (SIZE, SIZE), the index into
    ``scene.objects`` of the object seen at each pixel, 255 where there is none.
    """
    rng = np.random.default_rng(seed)
    theme, chosen = _choose(rng)
    order = sorted(rng.permutation(len(chosen)), key=lambda j: -chosen[j][3])  # large ones first, so behind
    image = _background(rng, THEMES[theme][1])
    owner = np.full((SIZE, SIZE), 255, np.uint8)
    placed: list[tuple[int, int, int, int]] = []
    areas: list[int] = []
    for j, which in enumerate(order):
        category, colour, variant, size = chosen[which]
        glyph = _glyph(category, variant, colour)
        if rng.random() < 0.5 and category not in ("stop sign", "clock"):
            glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.4:
            glyph = glyph.rotate(rng.uniform(-18, 18), expand=True, resample=Image.Resampling.BILINEAR)
        scale = size / max(glyph.size)
        width, height = max(10, int(glyph.width * scale)), max(10, int(glyph.height * scale))
        glyph = glyph.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        best = None
        for _ in range(14):
            x = int(rng.integers(-width // 12, SIZE - width + width // 12 + 1))
            y = int(rng.integers(-height // 12, SIZE - height + height // 12 + 1))
            overlap = 0.0
            for a, b, other_width, other_height in placed:
                across = max(0, min(a + other_width, x + width) - max(a, x))
                down = max(0, min(b + other_height, y + height) - max(b, y))
                overlap += across * down / min(other_width * other_height, width * height)
            if best is None or overlap < best[0]:
                best = (overlap, x, y)
            if overlap < 0.1:
                break
        _, x, y = best
        solid = np.asarray(glyph)[..., 3] > 110
        if category not in without:
            image.paste(glyph, (x, y), glyph)
            left, top, right, bottom = max(0, x), max(0, y), min(SIZE, x + width), min(SIZE, y + height)
            owner[top:bottom, left:right][solid[top - y : bottom - y, left - x : right - x]] = j
        placed.append((x, y, width, height))
        areas.append(int(solid.sum()))

    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1.0, 2.8)))
    pixels = np.asarray(image).astype(np.float32)
    pixels = (pixels - 128) * rng.uniform(0.75, 1.15) + 128 + rng.uniform(-22, 22)
    # Grain coarser than a pixel: it survives the models' resize to a few dozen pixels.
    grain = rng.standard_normal((SIZE // 2, SIZE // 2, 3), np.float32) * rng.choice([4, 12, 24], p=[0.5, 0.35, 0.15])
    pixels += grain.repeat(2, 0).repeat(2, 1)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    objects, kept = [], np.full(256, 255, np.uint8)
    seen = np.bincount(owner.ravel(), minlength=256)
    for j, which in enumerate(order):
        visible = seen[j] / areas[j]
        if visible >= MIN_VISIBLE and seen[j] >= 190:
            x, y, width, height = placed[j]
            left, top = max(0, x), max(0, y)
            box = (left, top, min(SIZE, x + width) - left, min(SIZE, y + height) - top)
            kept[j] = len(objects)
            objects.append(SceneObject(chosen[which][0], box, round(float(visible), 3), chosen[which][1]))
    return image, Scene(seed, split_of(seed), theme, tuple(objects)), kept[owner]


def cell_owners(owner: np.ndarray) -> np.ndarray:
    """Object index per grid cell, (GRID * GRID,) uint8 in row-major order, 255 for background."""
    step = owner.shape[0] // GRID
    cells = owner.reshape(GRID, step, GRID, step).transpose(0, 2, 1, 3).reshape(GRID * GRID, step * step)
    out = np.full(GRID * GRID, 255, np.uint8)
    for index, cell in enumerate(cells):
        solid = cell[cell < 255]
        if len(solid) >= CELL_SHARE * step * step:
            out[index] = np.bincount(solid).argmax()
    return out
