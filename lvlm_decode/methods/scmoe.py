"""Self-Contrast Mixture-of-Experts (Shi et al., NeurIPS 2024; arXiv 2405.14507), for LVLMs on a mixture of experts.

    scores = (1 + alpha) * l_strong - alpha * l_weak,    l = logits / temperature of its branch,   mask on l_strong

The strong branch routes as the model does; in the weak one every token goes to the expert of rank ``rank`` alone.
Follows the authors' code, whose names are the other way round: its beta 0.5 is ``alpha`` here, its alpha 0.1 is
``beta``. Unlike in VCD, temperature comes before contrast and mask. The routers work per row, so both branches share
one forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.hooks import hooked
from ..engine.run import Run
from ..engine.running import running_lane
from ..engine.samples import Sample
from ..method import Method, Step, View, plausible_tokens


@dataclass(frozen=True)
class SCMoE(Method):
    """Subtracts the predictions of a lower-ranked expert (mixture-of-experts models only).

    Args:
        alpha: Contrast strength, at least 0.
        beta: Plausibility threshold in (0, 1]; ``None`` applies no mask.
        rank: Rank of the expert that the weak branch uses, 1 being the router's first choice.
        strong_temperature: Divisor of the strong branch's logits, above 0.
        weak_temperature: Divisor of the weak branch's logits, above 0.
    """

    name: ClassVar[str] = "scmoe"
    paper: ClassVar[str] = "Unchosen Experts Can Contribute Too (Shi et al., NeurIPS 2024)"
    arxiv: ClassVar[str] = "2405.14507"
    aliases: ClassVar[dict[str, str]] = {"student_routed_tok": "rank"}
    costs: ClassVar[tuple[str, ...]] = ("feature",)
    needs: ClassVar[tuple[str, ...]] = ("experts",)
    off: ClassVar[dict[str, Any] | None] = {"alpha": 0.0, "strong_temperature": 1.0, "beta": None}
    refuses: ClassVar[dict[str, str]] = {
        "processor": "it changes how tokens are routed to experts, which a processor cannot."
    }

    alpha: float = 0.5
    beta: float | None = 0.1
    rank: int = 2
    strong_temperature: float = 1.0
    weak_temperature: float = 1.0

    def __post_init__(self) -> None:
        self.check(self.alpha >= 0, "alpha", "at least 0")
        self.check(self.rank >= 1, "rank", "at least 1")
        self.check(self.strong_temperature > 0, "strong_temperature", "above 0")
        self.check(self.weak_temperature > 0, "weak_temperature", "above 0")
        self.check_beta()

    def views(self, sample: Sample, rng: torch.Generator) -> list[View]:
        return [sample.as_view(mark=self.name)]

    @contextmanager
    def patch(self, run: Run) -> Iterator[None]:
        view = run.view_number(self.name)

        def weaken(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            lane = running_lane(run)
            rows = None if lane is None else lane.rows_of(view)
            if rows is None:
                return output
            logits, weights, experts = output
            tokens = len(logits) // (len(lane.views) * lane.rows)
            own = slice(rows.start * tokens, rows.stop * tokens)
            weights, experts = weights.clone(), experts.clone()
            # One expert alone: its weight is 1, the other places keep theirs at 0.
            chosen = logits[own].topk(self.rank, -1).indices[:, -1]
            weights[own] = 0
            weights[own, 0], experts[own, 0] = 1, chosen
            return logits, weights, experts

        with hooked(after=dict.fromkeys(run.family.routers(), weaken)):
            yield

    @property
    def mask_view(self) -> int | None:
        return None if self.beta is None else 0

    def kept_tokens(self, step: Step) -> Tensor | None:
        return None if self.beta is None else plausible_tokens(step.logits[0] / self.strong_temperature, self.beta)

    def combine(self, step: Step) -> Tensor:
        strong, weak = step.logits[0] / self.strong_temperature, step.logits[1] / self.weak_temperature
        return strong + self.alpha * (strong - weak)
