"""From the rows of a step to one token per group. It knows no engine: both runners of vLLM call it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..engine import sampling
from ..method import Step
from .wire import Member, Printed, made


class Row(NamedTuple):
    """A row of the step's logits that belongs to a view.

    Args:
        number: of the row.
        member: whose it is.
        position: how many tokens its request has generated.
    """

    number: int
    member: Member
    position: int


def whole(rows: Sequence[Row]) -> list[list[Row]]:
    """The groups of which all views are in the step, each in the order of its views.

    A group that is not whole is not sampled in this step: its rows belong to prompts that are not through.
    """
    groups: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        groups[row.member.group][row.member.view] = row
    return [
        [members[view] for view in range(len(members))]
        for members in groups.values()
        if len(members) == next(iter(members.values())).member.views
    ]


def decide(logits: Tensor, rows: Sequence[Row]) -> None:
    """Give the rows of every whole group the token that its method chooses, in place: 0 for it, -inf for all others.

    Args:
        logits: (R, N) of the step.
        rows: those of views, in any order; other rows are left as they are.
    """
    batches: dict[Hashable, list[list[Row]]] = defaultdict(list)
    for group in whole(rows):
        batches[group[0].member.recipe].append(group)
    for groups in batches.values():
        first = groups[0][0].member
        numbers = [[row.number for row in group] for group in groups]
        index = torch.tensor(numbers, device=logits.device).T  # (V, B)
        positions = torch.tensor([[group[0].position] for group in groups], device=logits.device)
        step = Step(logits[index].float()[:, :, None], positions, first.weights)
        scores = made(*first.recipe).scores(step)[:, 0]
        tokens = drawn(scores, [group[0] for group in groups]).argmax(-1)
        for own in index:
            logits[own] = -torch.inf
            logits[own, tokens] = 0.0


def drawn(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """(B, N) ``scores`` whose arg max is the draw of each group, or its best token at temperature 0.

    The order is that of ``generate()``: the warpers, then noise keyed by (seed, sample id, position).

    Args:
        rows: view 0 of each group.
    """
    alike: dict[tuple[float, int, float, float], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if row.member.temperature:
            alike[row.member.draw].append(number)
    scores = scores.clone() if alike else scores
    for draw, numbers in alike.items():
        noise = [
            sampling.gumbel(own.member.seed, Printed(own.member.id), own.position, scores.shape[-1])
            for own in (rows[number] for number in numbers)
        ]
        at = torch.tensor(numbers, device=scores.device)
        # The warpers of generate() look at scores alone.
        warped = warpers(*draw)(torch.empty(0, dtype=torch.long), scores[at])  # type: ignore[arg-type]
        scores[at] = warped + torch.stack(noise).to(scores)
    return scores


def warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> LogitsProcessorList:
    """The warpers of ``generate()`` with these settings, in its order."""
    found: list[LogitsProcessor] = []
    if temperature != 1:
        found.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(TopPLogitsWarper(float(top_p)))
    if min_p:
        found.append(MinPLogitsWarper(float(min_p)))
    return LogitsProcessorList(found)
