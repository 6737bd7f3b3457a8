"""The mitigated model's forward, which Hugging Face's loops call: all views in stacked rows, the combined scores for the caller.

In a file of its own, so that on its way a token enters every file outside the port once: ``tests/test_structure.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import hf
from .run import Run
from .stack import Lanes


def mitigated(run: Run, lanes: Lanes, prompt_length: int, ran: Callable[[], None] | None = None) -> Callable[..., Any]:
    """The forward that a loop of Hugging Face calls instead of the module's own.

    Args:
        prompt_length: tokens beyond it in the first call are a draft.
        ran: called after every forward, that of the prompts first.
    """
    started = False
    lead = lanes.lead
    wanted = ("hidden_states", "output_hidden_states"), ("attentions", "output_attentions")

    def own(states: Any, name: str, first: bool) -> Any:
        """Of one layer's hidden states or attentions: the caller's rows, queries and slots."""
        if not isinstance(states, Tensor):
            return states
        states = states[: lanes.main.rows]
        if name == "hidden_states":
            return states[:, lead:] if first else states
        # A fixed cache is attended to in its whole size, other states in their length, or that of a sliding window.
        have, capacity = states.shape[-1], lanes.main.kv.capacity
        slots = (have if have == capacity else lanes.main.length) - lead
        return states[:, :, lead if first else 0 :, max(0, have - slots) :]

    @functools.wraps(run.module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal started
        tokens = args[0] if args else kwargs["input_ids"]
        keep = hf.kept_of(kwargs)
        call = {option: kwargs[option] for _, option in wanted if kwargs.get(option) is not None}
        first = not started
        if started:
            scores, out = lanes.extend(tokens, keep, **call)
        else:
            started = True
            tail = tokens[:, prompt_length:] if tokens is not None else None
            scores, out = lanes.prefill(tail, keep or 1, **call)
        if ran is not None:
            ran()
        # An item: an attribute of an output is looked for among all its fields.
        out["logits"] = scores
        for name, option in wanted:
            states = getattr(out, name, None)
            if states is not None:
                asked = kwargs.get(option)
                setattr(out, name, tuple(own(layer, name, first) for layer in states) if asked else None)
        return out

    return forward
