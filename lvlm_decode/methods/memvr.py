"""Memory-space Visual Retracing (Zou et al., ICML 2025; arXiv 2410.03577).

    u_l = entropy of the 10 most probable tokens of head(norm(h_l)), in units of ln 10
    at the first layer l of the range with u_l > threshold, the MLP of layer l + 1 puts out
        (1 - ratio) * f + ratio * mean|f| / mean|a| * a,        f = MLP(x),  a = (x Z^T) Z,  Z the image features (n, D)

In a prompt the last position decides for all positions, and the means run over them; later every position decides for itself.
Follows the authors' code for LLaVA: layers 6 to 15 of 32, threshold 0.75, ratio 0.12 (their captions and open questions take up
to 0.32), no activation between the two products; its scale of Z cancels. There the means, the entropy and Z are those of the
whole batch, which this method does row by row: for one sample they are the same. (The released code for Qwen and GLM, which has
an activation there, never switches the method on.) Of several images all features are looked at. Rows without an image are
left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.attention import choosing
from ..engine.hf import decoder
from ..engine.hooks import hooked
from ..engine.run import Run
from ..engine.running import running_lane
from ..errors import UnsupportedError
from ..method import Method

#: How many tokens the uncertainty is taken over.
CANDIDATES = 10


@dataclass(frozen=True)
class MemVR(Method):
    """Shows the image features again to the MLP of the first middle layer that is unsure.

    Args:
        ratio: Share of the image features in what the MLP puts out, from 0 to 1.
        threshold: Uncertainty above which the image is looked at again, from 0 to 1; at 1 it never is.
        layers: First and last layer whose uncertainty counts; ``None`` takes the share of the model that 6 to 15 is of the
            authors' 32 layers.
    """

    name: ClassVar[str] = "memvr"
    kind: ClassVar[str] = "steering"
    paper: ClassVar[str] = "Memory-Space Visual Retracing (Zou et al., ICML 2025)"
    arxiv: ClassVar[str] = "2410.03577"
    aliases: ClassVar[dict[str, str]] = {"retracing_ratio": "ratio", "entropy_threshold": "threshold"}
    costs: ClassVar[tuple[str, ...]] = ("states", "layers")
    refuses: ClassVar[dict[str, str]] = {"processor": "it changes hidden states, which a processor cannot."}
    off: ClassVar[dict[str, Any] | None] = {"ratio": 0.0}
    owns: ClassVar[str | None] = "the hidden states of view 0"

    ratio: float = 0.12
    threshold: float = 0.75
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.check(0 <= self.ratio <= 1, "ratio", "from 0 to 1")
        self.check(0 <= self.threshold <= 1, "threshold", "from 0 to 1")
        self.check_layers("layers")

    @contextmanager
    def patch(self, run: Run) -> Iterator[None]:
        layers = decoder.layers_given(run.module, self.name, self.layers, 6, 15)
        if layers[-1] + 1 >= decoder.layer_count(run.module):
            raise UnsupportedError(
                f"memvr: layers = {self.layers} reaches the last layer, and the layer after an unsure one looks at the image "
                f"again; layers 0 to {decoder.layer_count(run.module) - 2} can be unsure."
            )
        features = [[image.features for image in sample.images] for sample in run.samples[0]]
        if not self.ratio or not any(features):
            yield
            return
        retrace = _Retrace(self, run, layers, features)
        blocks, mlps = decoder.parts(run.module, "layer"), decoder.parts(run.module, "mlp")
        after = {blocks[layer]: retrace.unsure(layer) for layer in layers}
        after |= {mlps[layer + 1]: retrace.mixed(layer + 1) for layer in layers}
        with hooked(after=after):
            yield


class _Retrace:
    """What one run knows on its way through the layers of a forward."""

    def __init__(self, method: MemVR, run: Run, layers: range, features: list[list[Tensor]]):
        self.method, self.run, self.first = method, run, layers[0]
        joined = [torch.cat(own) if own else torch.zeros(0, decoder.width(run.module)) for own in features]
        most = max(map(len, joined))
        device = run.device
        #: (B, n, D) float32 image features; rows of zeros add nothing.
        self.features = torch.stack(
            [torch.nn.functional.pad(own.float(), (0, 0, 0, most - len(own))).to(device) for own in joined]
        )
        self.has_image = torch.tensor([len(own) > 0 for own in joined], device=device)
        #: (B, q) bool: positions that were unsure, and those whose next MLP looks again.
        self.fired = self.pending = torch.empty(0)

    def unsure(self, layer: int) -> Any:
        def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            lane = running_lane(self.run)
            rows = None if lane is None else lane.rows_of(0)
            if rows is None:
                return
            logits = self.run.project(decoder.states_of(output)[rows, choosing(lane)])
            unsure = uncertainty(logits) > self.method.threshold
            unsure = unsure & per_row(self.has_image, len(unsure))[:, None].to(unsure.device)
            if layer == self.first:
                self.fired = torch.zeros_like(unsure)
            self.pending = unsure & ~self.fired
            self.fired = self.fired | unsure

        return look

    def mixed(self, layer: int) -> Any:
        def mix(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            lane = running_lane(self.run)
            rows = None if lane is None else lane.rows_of(0)
            if rows is None:
                return None
            states = decoder.states_of(output).clone()
            own, given = states[rows], (args[0] if args else kwargs["hidden_states"])[rows]
            real = lane.mask[rows].to(own.device) if lane.prefilling and lane.mask is not None else None
            features = per_row(self.features, len(own)).to(own.device)
            looked = retraced(given.float(), own.float(), features, self.method.ratio, lane.prefilling, real)
            states[rows] = torch.where(self.pending[..., None].to(own.device), looked.to(own.dtype), own)
            return decoder.with_states(output, states)

        return mix


def per_row(values: Tensor, rows: int) -> Tensor:
    """(rows, ...) values of samples (B, ...), whose beams stand side by side."""
    return values.repeat_interleave(rows // len(values), 0)


def uncertainty(logits: Tensor) -> Tensor:
    """(...) entropy of the most probable tokens among themselves, from 0 to 1, of logits (..., N)."""
    p = logits.topk(min(CANDIDATES, logits.shape[-1])).values.softmax(-1)
    return -(p * p.log()).sum(-1) / math.log(CANDIDATES)


def retraced(
    given: Tensor, out: Tensor, features: Tensor, ratio: float, together: bool, real: Tensor | None = None
) -> Tensor:
    """(B, q, D) what an MLP puts out, mixed with the image features that what it was given is like.

    Args:
        given: (B, q, D) the MLP's input.
        out: (B, q, D) its output.
        features: (B, n, D) of the image.
        ratio: share of the features.
        together: the mean sizes run over all positions of a row; otherwise each position has its own.
        real: (B, q) bool, positions that are no padding; ``None`` where all are.
    """
    alike = (given @ features.transpose(1, 2)) @ features
    sizes = [states.abs().mean(-1, keepdim=True) for states in (out, alike)]
    if together:
        share = None if real is None else real[..., None] / real.sum(1)[:, None, None]
        sizes = [size.mean(1, keepdim=True) if share is None else (size * share).sum(1, keepdim=True) for size in sizes]
    return (1 - ratio) * out + ratio * sizes[0] / sizes[1] * alike
