"""Training scenes on disk: rendered once by a few processes, read as memory maps.

A block holds BLOCK scenes: ``images`` uint8 (n, 96, 96, 3), already resized the way the models' image processor does
it, and per grid cell (row-major, 64 cells) what is seen there: ``category`` (background = number of categories),
``colour`` (0 none, 1.. the colours in order), ``count`` of the category in the scene, and ``centre`` of the object.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lvlm_decode_data.scenes import CATEGORIES, CATEGORY_ID, COLOURS, GRID, Scene, cell_owners, render, scene_seed

IMAGE_SIZE = 96
BLOCK = 2000
CELLS = GRID * GRID
BACKGROUND = len(CATEGORIES)
_COLOUR_ID = {name: index + 1 for index, name in enumerate(COLOURS)}
_PARTS = ("images", "category", "colour", "count", "centre")


def scene_arrays(seed: int) -> tuple[Scene, dict[str, np.ndarray]]:
    """One scene as the arrays of a block, without the leading axis."""
    image, scene, owner = render(seed)
    small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    counts = scene.counts
    arrays = {
        "images": np.asarray(small),
        "category": np.full(CELLS, BACKGROUND, np.uint8),
        "colour": np.zeros(CELLS, np.uint8),
        "count": np.zeros(CELLS, np.uint8),
        "centre": np.zeros((CELLS, 2), np.float16),
    }
    for cell, index in enumerate(cell_owners(owner)):
        if index < 255:
            item = scene.objects[index]
            arrays["category"][cell] = CATEGORY_ID[item.category]
            arrays["colour"][cell] = _COLOUR_ID.get(item.colour, 0)
            arrays["count"][cell] = counts[item.category]
            arrays["centre"][cell] = item.centre
    return scene, arrays


def _render_block(job: tuple[Path, str, int, int]) -> int:
    folder, split, first, count = job
    done = folder / f"{split}-{first:06d}.json.gz"
    if done.exists():
        return count
    scenes, columns = [], {name: [] for name in _PARTS}
    for index in range(first, first + count):
        scene, arrays = scene_arrays(scene_seed(split, index))
        scenes.append(scene.to_json())
        for name in _PARTS:
            columns[name].append(arrays[name])
    for name in _PARTS:
        np.save(folder / f"{split}-{first:06d}-{name}.npy", np.stack(columns[name]))
    temporary = done.with_suffix(".tmp")  # the truth is written last: its presence means the block is whole
    temporary.write_bytes(gzip.compress(json.dumps(scenes).encode(), 4))
    os.replace(temporary, done)
    return count


def build(folder: Path, split: str, count: int, processes: int = 2) -> None:
    """Render the first ``count`` scenes of a split into ``folder``; blocks already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, split, first, min(BLOCK, count - first)) for first in range(0, count, BLOCK)]
    with (
        multiprocessing.get_context("spawn").Pool(processes) as pool,
        tqdm(total=count, desc=f"scenes ({split})", unit="scene") as bar,
    ):
        for rendered in pool.imap_unordered(_render_block, jobs):
            bar.update(rendered)


class SceneCache:
    """Random access to the first ``count`` cached scenes of a split.

    Raises FileNotFoundError naming the block that is missing.
    """

    def __init__(self, folder: Path, split: str, count: int):
        self.count = count
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in _PARTS}
        self.scenes: list[Scene] = []
        for first in range(0, count, BLOCK):
            truth = folder / f"{split}-{first:06d}.json.gz"
            if not truth.exists():
                raise FileNotFoundError(f"{truth} is missing; render the scenes first (scene_cache.build)")
            for name in _PARTS:
                self._columns[name].append(np.load(folder / f"{split}-{first:06d}-{name}.npy", mmap_mode="r"))
            self.scenes += [
                Scene.from_json(record, folder) for record in json.loads(gzip.decompress(truth.read_bytes()))
            ]
        self.scenes = self.scenes[:count]

    def __len__(self) -> int:
        return self.count

    def take(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Rows of one column, in the order of ``indices``."""
        columns = self._columns[name]
        return np.stack([columns[i // BLOCK][i % BLOCK] for i in indices])
