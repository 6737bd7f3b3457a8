"""CausalMM: counterfactual attention (Zhou et al., ICLR 2025; arXiv 2410.04780): the vision branch.

    A'  = attention of the encoder layer whose states are the features, with its entries shuffled, per head
    M   = mean over heads of A', read as a picture of query x key and resized to the grid of patches
    scores = (1 + alpha) * l(image) - alpha * l(features projected from M[p] * x_p)       x_p the states of patch p

Follows the authors' code: shuffled by default (``uniform``, ``reversed`` and ``random`` are theirs too), alpha 1 and beta 0.1 of
their parser; their script has beta 0.6. The mean entry of A is 1 / (patches + 1), so the branch is close to one whose states are
zero. In their code both branches share one cache, so that from the second token on nothing is left but the mask; here the
branch has its own. The branch that edits the language model's attention is published as functions without a place to put them,
and is not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..engine.hf import decoder
from ..engine.hooks import hooked
from ..engine.samples import Sample
from ..errors import InputError
from ..families.base import Family
from ..method import Contrast, View

Form = Literal["shuffle", "uniform", "reversed", "random"]


@dataclass(frozen=True)
class CausalMM(Contrast):
    """Subtracts a branch whose patches are weighed by shuffled attention of the vision encoder.

    Args:
        alpha: Contrast strength, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        form: What is done to the attention: ``shuffle`` its entries, all the same (``uniform``), the largest minus each
            (``reversed``), or ``random`` numbers from 0 to 2.
    """

    name: ClassVar[str] = "causalmm"
    paper: ClassVar[str] = "CausalMM (Zhou et al., ICLR 2025)"
    arxiv: ClassVar[str] = "2410.04780"
    aliases: ClassVar[dict[str, str]] = {**Contrast.aliases, "gamma": "alpha", "epsilon": "beta"}
    costs: ClassVar[tuple[str, ...]] = ("feature",)
    needs: ClassVar[tuple[str, ...]] = ("patches",)

    alpha: float = 1.0
    beta: float | None = 0.1
    form: Form = "shuffle"

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(
            self.form in ("shuffle", "uniform", "reversed", "random"), "form", "shuffle, uniform, reversed or random"
        )
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    @contextmanager
    def observe(self, family: Family) -> Iterator[dict[str, Any]]:
        seen: dict[str, Any] = {}

        def attend(module: Any, args: Any, kwargs: Any) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            heads = (module.num_heads, -1)
            query, key = (part(states).unflatten(-1, heads) for part in (module.q_proj, module.k_proj))
            scores = torch.einsum("mqhd,mkhd->mhqk", query, key).float() * query.shape[-1] ** -0.5
            seen["attention"] = scores.softmax(-1)

        def keep(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen["states"] = output

        attention = family.cls_layer()
        layer = next(layer for layer in family.vision_layers() if attention in layer.modules())
        with hooked(after={layer: keep}, before={attention: attend}):
            yield seen

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if not sample.has_image:
            return [sample.as_view(weight=-self.alpha)]
        if "pixel_values" not in sample.vision:
            raise InputError(
                "causalmm projects the image anew, and the images were given as features; pass pixel_values."
            )
        seen, family = sample.observed_by(self.name), sample.family
        starts = [*family.encoder_rows(sample.batch.vision), len(seen["attention"])]
        rows = slice(starts[sample.image_slice.start], starts[sample.image_slice.stop])
        states = decoder.states_of(seen["states"])[rows]
        weights = weights_of(edited(seen["attention"][rows], self.form, rng))
        # The CLS token is no patch; features do not have it, or have it as it is.
        weighed = torch.cat([states[:, :1], states[:, 1:] * weights[..., None].to(states)], 1)
        output = decoder.with_states(seen["states"], weighed)
        with family.putting_out(output):
            own = family.encode(family.cat_vision([sample.vision]))
        return [sample.with_features(lambda _, number: own[number].features, weight=-self.alpha)]


def edited(attention: Tensor, form: Form, rng: torch.Generator) -> Tensor:
    """Attention (M, H, P, P) of M images as the branch has it.

    Args:
        rng: on the CPU; one permutation per head, the same for the M images.
    """
    if form == "uniform":
        return attention.mean((2, 3), keepdim=True).expand_as(attention)
    if form == "reversed":
        return attention.amax((2, 3), keepdim=True) - attention
    if form == "random":
        return 2 * torch.rand(attention.shape, generator=rng).to(attention)
    flat = attention.flatten(2)
    orders = [torch.randperm(flat.shape[2], generator=rng) for _ in range(flat.shape[1])]
    return flat.gather(2, torch.stack(orders).to(flat.device).expand(len(flat), -1, -1)).view_as(attention)


def weights_of(attention: Tensor) -> Tensor:
    """(M, P) weight of each patch, from edited attention (M, H, 1 + P, 1 + P) read as a picture."""
    side = round((attention.shape[-1] - 1) ** 0.5)
    resized = torch.nn.functional.interpolate(attention, size=(side, side), mode="bilinear", align_corners=False)
    return resized.mean(1).flatten(1)
