"""What VTI, Nullu and Revis steer with: directions between right and hallucinated captions of the same pictures.

VTI (arXiv 2410.15778): mean of the differences at the caption's last token, plus their first principal component. Nullu (arXiv
2412.13817): the first right singular vectors of half the differences, each the mean over all positions of prompt and caption.
As in the authors' code the last layer is read after the final norm. VTI's component is computed over the decoder layers; the
authors' has the embeddings in it too. VTI's visual direction: mean over pairs, and first principal component row by row, of what
the vision encoder's states are on average over masked pictures minus what they are of the whole one. A mask puts the mean colour
in the place of nearly all patches. The authors' rows are cut from (layers, tokens, D) without a transposition, so that one of
them holds neighbouring tokens of a layer or two; ``rows="token"`` takes a token over all layers, as their comments read.
Revis (arXiv 2602.11824): the first principal component of what the image adds to the
right caption's last state, without what a hallucinated caption adds to a sentence that says nothing, both without the image.
The authors draw that sentence from five; here it is one, of our own words. Their no-image prompt for LLaVA keeps the image's
placeholder as a word; here it is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..engine import sampling
from ..engine.hf import decoder
from ..engine.hooks import hooked
from ..errors import InputError
from ..families import family_of
from ..weights import read_safetensors
from .negatives import batches, check_same
from .pairs import Triple

#: What is said of a picture by one who does not see it.
NEUTRAL = "I cannot tell what this picture shows."
#: Masked copies of a picture that the vision encoder sees at once.
AT_ONCE = 16


class Kept:
    """What was read of each pair, on disk, so that a calibration that was stopped goes on to the same vectors.

    Args:
        folder: made when the first pair is kept.
        about: what decides the vectors; a folder of another calibration is refused.

    Raises:
        InputError: a folder that another calibration left, or one whose description cannot be read.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self.folder, self.about = folder, dict(about)
        said = folder / "about.json"
        if said.is_file():
            try:
                before = json.loads(said.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{said} cannot be read ({error}); move {folder} away.") from error
            check_same(folder, before, self.about)

    def read(self, part: str, number: int, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives for pair ``number`` and ``part`` of the calibration, or what it gave before the stop."""
        from safetensors.torch import save_file

        path = self.folder / f"{part}-{number:06}.safetensors"
        if path.is_file():
            # One that a full disk or a crash of the machine cut off is computed again.
            with contextlib.suppress(InputError, KeyError):
                return read_safetensors(path)[part]
        found = compute().cpu().contiguous()
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            (self.folder / "about.json").write_text(json.dumps(self.about), encoding="utf-8")
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        save_file({part: found}, partial)
        os.replace(partial, path)
        return found

    def forget(self) -> None:
        """Take the folder away, when the vectors are saved."""
        shutil.rmtree(self.folder, ignore_errors=True)


def states(model: Any, processor: Any, pair: Triple, which: str, image: bool = True) -> Tensor:
    """(L, T, D) float32 states of prompt and answer, the end token included; the last layer's after the final norm.

    Args:
        image: ``False`` takes the image and its placeholders out of the prompt.
    """
    module = family_of(model).decoding_module(model)
    layers = decoder.parts(module, "layer")
    found: dict[Any, Tensor] = {}

    def keep(part: Any, args: Any, kwargs: Any, output: Any) -> None:
        found[part] = decoder.states_of(output)[0].float()

    (row,) = batches(processor, [pair], which, 1, 1, 0)
    row.pop("labels")
    whole = decoder.decoder_of(module)
    runs = model
    if not image:
        words = family_of(model).drop_image(row["input_ids"][0])
        runs, row = module, {"input_ids": row["input_ids"][:, words]}
    with torch.no_grad(), hooked(after=dict.fromkeys([*layers, whole], keep)):
        runs(**{key: value.to(model.device) for key, value in row.items()})
    return torch.stack([*(found[layer] for layer in layers[:-1]), found[whole]])


def directions(
    model: Any, processor: Any, pairs: Sequence[Triple], kind: str, rank: int, kept: Kept | None = None
) -> Tensor:
    """The vectors of one method: (L, D) for ``kind`` "vti" and "revis", (L, D, rank) for "nullu".

    Args:
        kept: where what was read of each pair is left, and looked for.

    Raises:
        InputError: fewer pairs than directions, before any is read.
    """
    if kind == "nullu":
        check_rank(len(pairs), rank)

    def read(number: int, pair: Triple) -> Tensor:
        if kind == "revis":
            return torch.stack(revis_states(model, processor, pair))
        chosen, rejected = (states(model, processor, pair, which) for which in ("chosen", "rejected"))
        # The end token comes after the caption's last one.
        return chosen[:, -2] - rejected[:, -2] if kind == "vti" else chosen.mean(1) - rejected.mean(1)

    differences = _of_pairs(pairs, "text", read, kept)
    if kind == "revis":
        return revis(*differences.unbind(1))
    return vti(differences) if kind == "vti" else nullu(differences, rank)


def _of_pairs(pairs: Sequence[Triple], part: str, read: Callable[[int, Triple], Tensor], kept: Kept | None) -> Tensor:
    """(n, ...) what ``read`` says of each pair and its number."""
    found = []
    for number, pair in enumerate(tqdm(pairs, desc=part, mininterval=1.0)):
        one = functools.partial(read, number, pair)
        found.append(one() if kept is None else kept.read(part, number, one))
    return torch.stack(found)


def visual(
    model: Any,
    processor: Any,
    pairs: Sequence[Triple],
    *,
    share: float = 0.99,
    trials: int = 50,
    rows: str = "code",
    seed: int = 0,
    kept: Kept | None = None,
) -> Tensor:
    """(l, n, D) VTI's visual direction: for each of the l layers of the vision encoder and n tokens of its grid.

    Args:
        pairs: whose pictures are looked at.
        share: of the patches that a mask covers.
        trials: masks per picture.
        rows: "code" or "token", see the module.
        seed: of the masks; those of a picture follow from it and the picture's number.
        kept: as in :func:`directions`.
    """
    family = family_of(model)
    encoder, patch = model.get_encoder(modality="image"), family.config.vision_config.patch_size

    def read(number: int, pair: Triple) -> Tensor:
        rng = sampling.generator(seed, number, "masks")
        pixels = processor.image_processor(images=[pair.picture], return_tensors="pt")["pixel_values"].to(model.device)
        clean = encoder_states(family, encoder, pixels)[:, 0]
        total = torch.zeros_like(clean)
        for copies in masked(pixels, patch, share, trials, rng).split(AT_ONCE):
            total += encoder_states(family, encoder, copies).sum(1)
        return total / trials - clean

    return visual_direction(_of_pairs(pairs, "image", read, kept), rows)


def masked(pixels: Tensor, patch: int, share: float, trials: int, rng: torch.Generator) -> Tensor:
    """(trials, 3, H, W) copies of an image (1, 3, H, W), each with its mean colour in the place of ``share`` of its patches."""
    height, width = (size // patch for size in pixels.shape[-2:])
    count = int(share * height * width)
    hidden = torch.zeros(trials, height * width, dtype=torch.bool)
    for row in hidden:
        row[torch.randperm(height * width, generator=rng)[:count]] = True
    grid = hidden.view(trials, 1, height, width).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    mean = pixels.mean((2, 3), keepdim=True)
    out = pixels.repeat(trials, 1, 1, 1)
    seen = out[..., : height * patch, : width * patch]
    seen.copy_(torch.where(grid.to(pixels.device), mean, seen))
    return out


def encoder_states(family: Any, encoder: Any, pixels: Tensor) -> Tensor:
    """(l + 1, M, n, D) float32 states of the vision encoder for M images: what its first layer is given, what each puts out."""
    layers = family.vision_layers()
    found: dict[Any, Tensor] = {}

    def first(part: Any, args: Any, kwargs: Any) -> None:
        found[None] = (args[0] if args else kwargs["hidden_states"]).float()

    def keep(part: Any, args: Any, kwargs: Any, output: Any) -> None:
        found[part] = decoder.states_of(output).float()

    with torch.no_grad(), hooked(after=dict.fromkeys(layers, keep), before={layers[0]: first}):
        encoder(pixels.to(family.model.dtype))
    return torch.stack([found[None], *(found[layer] for layer in layers)])


def visual_direction(differences: Tensor, rows: str) -> Tensor:
    """(l, n, D) mean plus first principal component, row by row, of differences (pairs, l + 1, n, D), the embeddings left out.

    Args:
        rows: how the n rows are cut, "code" or "token"; a component has norm 1 over its row.
    """
    count, levels, tokens, width = differences.shape
    cut = differences if rows == "code" else differences.transpose(1, 2)
    cut = cut.reshape(count, tokens, levels * width)
    # One row after the other: all at once would take the memory of the differences several times over.
    found = torch.stack([vti(cut[:, row]) for row in range(tokens)])
    found = found.view(levels, tokens, width) if rows == "code" else found.view(tokens, levels, width).transpose(0, 1)
    return found[1:]


def vti(differences: Tensor) -> Tensor:
    """(...) mean plus first principal component, of norm 1 over all of it, of differences (n, ...)."""
    mean = differences.mean(0)
    left, _, right = torch.linalg.svd((differences - mean).flatten(1), full_matrices=False)
    sign = left[left[:, 0].abs().argmax(), 0].sign()
    return mean + sign * right[0].view_as(mean)


def revis_states(model: Any, processor: Any, pair: Triple) -> tuple[Tensor, Tensor]:
    """What the image adds to the right caption, and what a hallucinated one adds to saying nothing; (L, D) each.

    Of the caption's last token; the end token comes after it.
    """
    silent = dataclasses.replace(pair, chosen=NEUTRAL)
    truth, blind = (states(model, processor, pair, "chosen", image)[:, -2] for image in (True, False))
    invented, nothing = (
        states(model, processor, one, w, False)[:, -2] for one, w in ((pair, "rejected"), (silent, "chosen"))
    )
    return truth - blind, invented - nothing


def revis(seen: Tensor, prior: Tensor) -> Tensor:
    """(L, D) of what the image adds (n, L, D), the direction of its largest variance without that of ``prior`` (n, L, D).

    As long as the differences are on average, and on the side of their mean.
    """
    words = component(prior)
    clean = seen - (seen * words).sum(-1, keepdim=True) * words
    found = component(clean)
    sign = torch.where((found * clean.mean(0)).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return sign * found * clean.norm(dim=-1).mean(0)[:, None]


def component(differences: Tensor) -> Tensor:
    """(L, D) first principal component of each layer's differences (n, L, D), of length 1; its sign is the solver's."""
    centred = (differences - differences.mean(0)).transpose(0, 1)
    return torch.linalg.svd(centred, full_matrices=False).Vh[:, 0]


def check_rank(pairs: int, rank: int) -> None:
    """Raise :class:`InputError` for fewer pairs than directions."""
    if pairs < rank:
        raise InputError(f"{pairs} pairs have no {rank} directions; give more pairs or a smaller --rank.")


def nullu(differences: Tensor, rank: int) -> Tensor:
    """(L, D, rank) first right singular vectors of each layer's differences (n, L, D) / 2.

    Raises:
        InputError: fewer pairs than directions.
    """
    check_rank(len(differences), rank)
    right = torch.linalg.svd(differences.transpose(0, 1) / 2, full_matrices=False).Vh
    return right[:, :rank].transpose(1, 2)
