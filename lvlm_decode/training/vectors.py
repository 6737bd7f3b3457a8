"""What VTI, Nullu and Revis steer with: directions between right and hallucinated captions of the same pictures.

VTI (arXiv 2410.15778): mean of the differences at the caption's last token, plus their first principal component. Nullu (arXiv
2412.13817): the first right singular vectors of half the differences, each the mean over all positions of prompt and caption.
As in the authors' code the last layer is read after the final norm. VTI's component is computed over the decoder layers; the
authors' has the embeddings in it too. Revis (arXiv 2602.11824): the first principal component of what the image adds to the
right caption's last state, without what a hallucinated caption adds to a sentence that says nothing, both without the image.
The authors draw that sentence from five; here it is one, of our own words. Their no-image prompt for LLaVA keeps the image's
placeholder as a word; here it is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..engine.hf import decoder
from ..engine.hooks import hooked
from ..errors import InputError
from ..families import family_of
from .negatives import batches
from .pairs import Triple

#: What is said of a picture by one who does not see it.
NEUTRAL = "I cannot tell what this picture shows."


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


def directions(model: Any, processor: Any, pairs: Sequence[Triple], kind: str, rank: int) -> Tensor:
    """The vectors of one method: (L, D) for ``kind`` "vti" and "revis", (L, D, rank) for "nullu"."""
    if kind == "revis":
        found = [revis_states(model, processor, pair) for pair in tqdm(pairs, desc="pairs", mininterval=1.0)]
        return revis(*(torch.stack(part) for part in zip(*found)))

    def read(pair: Triple, which: str) -> Tensor:
        seen = states(model, processor, pair, which)
        # The end token comes after the caption's last one.
        return seen[:, -2] if kind == "vti" else seen.mean(1)

    differences = torch.stack(
        [read(pair, "chosen") - read(pair, "rejected") for pair in tqdm(pairs, desc="pairs", mininterval=1.0)]
    )
    return vti(differences) if kind == "vti" else nullu(differences, rank)


def vti(differences: Tensor) -> Tensor:
    """(L, D) mean plus first principal component, of norm 1 over all layers, of differences (n, L, D)."""
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


def nullu(differences: Tensor, rank: int) -> Tensor:
    """(L, D, rank) first right singular vectors of each layer's differences (n, L, D) / 2.

    Raises:
        InputError: fewer pairs than directions.
    """
    if len(differences) < rank:
        raise InputError(f"{len(differences)} pairs have no {rank} directions; give more pairs or a smaller --rank.")
    right = torch.linalg.svd(differences.transpose(0, 1) / 2, full_matrices=False).Vh
    return right[:, :rank].transpose(1, 2)
