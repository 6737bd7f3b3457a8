"""DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination.

Gong et al., EMNLP 2024; arXiv 2410.04514.

    outliers = the k patches the vision encoder's CLS token attends to most
    scores = (1 + alpha) * l(image) - alpha * l(the outliers' tokens alone)

Follows the authors' code, also in its defaults per family. LLaVA and LLaVA-NeXT: k 10, alpha 2; the layer that produces
the features; ``attention="concat"``, one softmax over query and key of all heads together (``"mean_heads"`` is the
encoder's own attention, as the paper's figure shows it). LLaVA-NeXT: only the small whole image, then the newline
token. InstructBLIP: k 4 and alpha 0.5 for POPE (pass 1.5 for CHAIR), the last layer but one, mean over heads; its code
reads the encoder's rows one place too early, CLS included (``offset="code"``; ``"fixed"`` reads the patches that were
chosen). The authors sample directly: temperature, top-p and penalties are accepted and ignored there, and apply here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..engine.hooks import hooked
from ..engine.samples import Sample
from ..families.base import Family
from ..method import Contrast, Places, View

#: What the authors' code takes for a family: patches, contrast strength, and one softmax over all heads or their mean.
DEFAULTS = {"instructblip": (4, 0.5, "mean_heads")}
#: The same for the LLaVAs, and for families the authors did not run.
OTHERWISE = (10, 2.0, "concat")


@dataclass(frozen=True)
class DAMRO(Contrast):
    """Subtracts a branch that sees only the few patches which the vision encoder attends to most.

    Args:
        alpha: Contrast strength, at least 0; ``None`` takes the authors' value for the model family.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        k: Number of outlier patches per image; ``None`` takes the authors' value for the model family.
        attention: ``concat`` takes one softmax over all heads, ``mean_heads`` the mean over heads; ``None`` takes the
            authors' choice for the model family.
        offset: InstructBLIP only: ``code`` reads the rows that the authors' code reads, ``fixed`` those of the chosen
            patches.
    """

    name: ClassVar[str] = "damro"
    paper: ClassVar[str] = "DAMRO (Gong et al., EMNLP 2024)"
    arxiv: ClassVar[str] = "2410.04514"
    aliases: ClassVar[dict[str, str]] = {**Contrast.aliases, "damro_topk": "k", "damro_alpha": "alpha"}
    costs: ClassVar[tuple[str, ...]] = ("feature",)
    needs: ClassVar[tuple[str, ...]] = ("cls",)

    alpha: float | None = None
    beta: float | None = 0.1
    k: int | None = None
    attention: Literal["concat", "mean_heads"] | None = None
    offset: Literal["code", "fixed"] = "code"

    def __post_init__(self) -> None:
        self.check(self.alpha is None or self.alpha >= 0, "alpha", "at least 0, or None")
        self.check(self.k is None or self.k >= 1, "k", "at least 1, or None")
        self.check(self.attention in (None, "concat", "mean_heads"), "attention", "'concat', 'mean_heads' or None")
        self.check(self.offset in ("code", "fixed"), "offset", "'code' or 'fixed'")
        self.check_beta()

    @property
    def plausibility_beta(self) -> float | None:
        return self.beta

    @contextmanager
    def observe(self, family: Family) -> Iterator[dict[str, Tensor]]:
        heads = (self.attention or authors(family)[2]) == "mean_heads"
        seen: dict[str, Tensor] = {}

        def attend(module: Any, args: Any, kwargs: Any) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            query, key = family.cls_query_and_keys(module, states)
            seen["attention"] = cls_row(query, key, module.num_heads if heads else 1)

        def keep(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen["states"] = output.last_hidden_state

        encoder = family.model.get_encoder(modality="image")
        with hooked(after={encoder: keep}, before={family.cls_layer(): attend}):
            yield seen

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        alpha = authors(sample.family)[1] if self.alpha is None else self.alpha
        if not sample.has_image:
            return [sample.as_view(weight=-alpha)]
        seen = sample.observed_by(self.name)

        def outliers(features: Tensor, number: int) -> Tensor:
            row, index = self._outliers(sample, number)
            return sample.family.only_patches(sample, number, index, seen["states"][row], self.offset == "fixed")

        return [sample.with_features(outliers, weight=-alpha)]

    def _outliers(self, sample: Sample, number: int) -> tuple[int, Tensor]:
        """The encoder's row of image ``number``, and the patches its CLS token attends to most, the first one most."""
        k = authors(sample.family)[0] if self.k is None else self.k
        row = sample.family.encoder_rows(sample.batch.vision)[sample.image_slice][number]
        attention = sample.observed_by(self.name)["attention"][row]
        return row, attention.topk(min(k, len(attention))).indices

    def places(self, sample: Sample) -> list[Places]:
        found = []
        for number in range(len(sample.images)):
            row, index = self._outliers(sample, number)
            weights = sample.observed_by(self.name)["attention"][row]
            chosen = torch.zeros_like(weights, dtype=torch.bool).index_fill(0, index, True)
            title = "outlier patches: what the vision encoder's CLS token attends to most"
            found.append(Places(title, chosen, weights, number, encoder=True))
        return found


def authors(family: Family) -> tuple[int, float, str]:
    """The authors' number of patches, contrast strength and attention for a family."""
    return DEFAULTS.get(family.config.model_type, OTHERWISE)


def cls_row(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """(M, P) attention of the CLS token to the P patches, mean over heads.

    Args:
        query: (M, D) of the CLS token.
        key: (M, 1 + P, D), CLS first.
        heads: 1 takes all of D as one head.
    """
    width = query.shape[-1] // heads
    scores = torch.einsum("mhd,mphd->mhp", query.unflatten(-1, (heads, width)), key.unflatten(-1, (heads, width)))
    return (scores.float() * width**-0.5).softmax(-1).mean(1)[:, 1:]
