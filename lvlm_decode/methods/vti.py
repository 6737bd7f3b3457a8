"""Visual and Textual Intervention (Liu et al., ICLR 2025; arXiv 2410.15778).

    d = mean over pairs (h(right caption) - h(hallucinated caption)) + first principal component of the differences
    y <- |y| * unit(unit(y) + 0.1 * text * unit(d_l))           every position, ``y`` the output of decoder layer l's MLP

    e = mean over pictures (mean over masks v(masked picture) - v(picture)) + first principal component, row by row
    z <- |z| * unit(unit(z) + 0.1 * image * unit(e_lp))      every token p of an image, ``z`` that of encoder layer l's MLP

The directions are calibrated on pairs of captions of the same picture (``lvlm-decode train vector --kind vti``). Follows the
authors' code, which steers the MLPs' outputs where the paper speaks of the stream, has a factor 0.1 in front of both strengths,
and takes the decoder's last layer's direction after the final norm. Their parser's strengths are 0 and 0.8, their example's 0.9
each. They steer the vision encoder while the textual direction is made, so that it depends on the image's strength; here it
does not. Only the images of the samples themselves are encoded so: what other views change of the pixels (VCD's noise) is
encoded as without VTI, and views that read the sample's own image as it is share its steered features.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..engine.hf import decoder
from ..engine.run import Run
from ..engine.samples import Sample
from ..engine.steer import Turn, steering, steering_encoder
from ..engine.vectors import Given, vectors_for, visual_for
from ..errors import UnsupportedError
from ..families.base import Family
from ..method import Method, View

#: What the authors' code multiplies both strengths by.
UNIT = 0.1


@dataclass(frozen=True)
class VTI(Method):
    """Steers every layer along a direction from hallucinated to right captions.

    Args:
        vectors: Directions made by ``lvlm-decode train vector --kind vti``: the file's path, or the tensor (L, D) of the
            decoder alone.
        text: How far outputs of the decoder turn along the direction, at least 0, in tenths.
        layers: First and last layer of the decoder that is steered; ``None`` steers all.
        image: The same of the vision encoder's outputs, all its layers; needs an encoder that sees every image as one grid of
            one size.
    """

    name: ClassVar[str] = "vti"
    kind: ClassVar[str] = "steering"
    paper: ClassVar[str] = "Latent Space Steering (Liu et al., ICLR 2025)"
    arxiv: ClassVar[str] = "2410.15778"
    aliases: ClassVar[dict[str, str]] = {"alpha_text": "text", "alpha_image": "image"}
    costs: ClassVar[tuple[str, ...]] = ("states",)
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes hidden states, which a processor cannot."}
    off: ClassVar[dict[str, Any] | None] = {"text": 0.0, "image": 0.0}
    owns: ClassVar[str | None] = "the hidden states of view 0"

    vectors: Given | None = field(default=None, compare=False, repr=False)
    text: float = 0.8
    layers: tuple[int, int] | None = None
    image: float = 0.0

    def __post_init__(self) -> None:
        self.check(
            self.vectors is not None,
            "vectors",
            "the directions or the path of their file, which is made with: lvlm-decode train vector --kind vti",
        )
        self.check(self.text >= 0, "text", "at least 0")
        self.check_layers("layers")
        self.check(self.image >= 0, "image", "at least 0")

    def check_model(self, family: Family) -> None:
        if self.image and not family.has_grid:
            raise UnsupportedError(
                f"vti has a visual direction for each token of one grid, and {family.config.model_type} sees images in tiles or "
                "at their own resolution; leave image at 0."
            )

    def observe(self, family: Family) -> AbstractContextManager[Any]:
        if not self.image:
            return nullcontext()
        assert self.vectors is not None
        directions = visual_for(family, self.name, self.vectors)
        return steering_encoder(family, self.name, directions, UNIT * self.image)

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        if self.image and sample.has_image:
            # Now, and so apart from the pixels of other methods' views, which are not to be steered.
            sample.observed_by(self.name)
        return []

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        layers = decoder.layers_given(run.module, self.name, self.layers, 0, 31)
        assert self.vectors is not None
        directions = vectors_for(run, self.name, self.vectors, 2)
        if not self.text:
            return nullcontext()
        return steering(run, Turn(dict(enumerate(directions)), UNIT * self.text), layers)
