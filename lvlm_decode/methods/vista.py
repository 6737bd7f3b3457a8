"""Visual Information Steering with Token-logit Augmentation (Li et al., ICML 2025; arXiv 2502.03628).

    v_l = h_l(prompt with image) - h_l(prompt without)          states of decoder layer l at the last prompt token
    y   <- |y| * unit(unit(y) + s * unit(v_l)),    s = strength * (1 + max(0, cos(y, -v_l)))     every position
    scores = (1 - gamma) * l_L + gamma * mean over a window of late layers of head(h_l)          without the final norm

Follows the authors' code: ``y`` is what the layer's MLP puts out before it is added to the stream, not the stream itself,
and the principal component of a single difference, which is the first unit vector, is added to the vector of layer 0
(``first_coordinate="none"`` leaves it out). Their runs use strength 0.17 for captions and 0.01 for yes/no questions. Rows
without an image are left alone. The authors' vectors are made in half precision where the model is; here they are float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..engine.hf import decoder
from ..engine.run import Run
from ..engine.steer import Turn, last_states, steering
from ..errors import UnsupportedError
from ..method import Method, Probes, Step


@dataclass(frozen=True)
class VISTA(Method):
    """Steers every layer towards what the image changed, and mixes late layers' predictions in.

    Args:
        strength: How far outputs turn towards the vector, at least 0; the authors' 0.17 is for captions, they use 0.01
            for yes/no questions.
        gamma: Share of the late layers' mean logits, from 0 to 1.
        window: First and last of the late layers, counted from 0; ``None`` takes the share of the model that 25 to 30 is
            of the authors' 32 layers.
        layers: First and last layer that is steered; ``None`` steers all.
        first_coordinate: ``code`` adds 1 to the first coordinate of layer 0's vector, as the authors' code does.
    """

    name: ClassVar[str] = "vista"
    kind: ClassVar[str] = "steering"
    paper: ClassVar[str] = "The Hidden Life of Tokens (Li et al., ICML 2025)"
    arxiv: ClassVar[str] = "2502.03628"
    aliases: ClassVar[dict[str, str]] = {"vsv_lambda": "strength", "logits_alpha": "gamma", "logits_layers": "window"}
    costs: ClassVar[tuple[str, ...]] = ("prompts", "states", "layers")
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes hidden states, which a processor cannot."}
    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0, "gamma": 0.0}
    owns: ClassVar[str | None] = "the hidden states of view 0"

    strength: float = 0.17
    gamma: float = 0.3
    window: tuple[int, int] | None = None
    layers: tuple[int, int] | None = None
    first_coordinate: Literal["code", "none"] = "code"

    def __post_init__(self) -> None:
        self.check(self.strength >= 0, "strength", "at least 0")
        self.check(0 <= self.gamma <= 1, "gamma", "from 0 to 1")
        self.check_layers("window")
        self.check_layers("layers")
        self.check(self.first_coordinate in ("code", "none"), "first_coordinate", "'code' or 'none'")

    def probes(self, model: torch.nn.Module) -> Probes:
        if not self.gamma:
            return Probes()
        count = decoder.layer_count(model)
        window = decoder.layers_given(model, self.name, self.window, 25, 30)
        if self.window is not None and self.window[1] > count - 2:
            raise UnsupportedError(
                f"vista: window = {self.window} reaches the last layer, whose logits are the model's own; layers 0 to "
                f"{count - 2} can be mixed in."
            )
        # States are counted from the embeddings, and the last ones are after the final norm.
        return Probes(hidden=tuple(sorted({min(layer + 1, count - 1) for layer in window})))

    def patch(self, run: Run) -> AbstractContextManager[Any]:
        if not self.strength:
            return nullcontext()
        layers = decoder.layers_given(run.module, self.name, self.layers, 0, 31)
        samples = run.samples[0]
        if not any(sample.has_image for sample in samples):
            return nullcontext()
        seen, blind = last_states(run, [samples, [sample.without_image().sample for sample in samples]]).unbind(1)
        vectors = seen - blind
        images = torch.tensor([sample.has_image for sample in samples], device=vectors.device)
        if self.first_coordinate == "code":
            vectors[0, :, 0] += 1
        vectors = vectors * images[:, None]
        return steering(run, Turn(dict(enumerate(vectors)), self.strength, boost=True), layers)

    def combine(self, step: Step) -> Tensor:
        main = step.logits[0]
        if not self.gamma:
            return main
        # Together, so that the head's weights are read once.
        late = step.project(torch.stack([states[0] for states in self.late(step)]), normed=False).mean(0)
        return (1 - self.gamma) * main + self.gamma * late

    def late(self, step: Step) -> list[Tensor]:
        """The hidden states of the window's layers."""
        return list(step.hidden.values())
