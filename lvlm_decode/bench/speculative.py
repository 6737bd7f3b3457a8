"""What a drafter brings to the small models' captions, against the method without one and against plain ``generate()``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from ..method import Method
from ..speculative.cost import alpha_of, break_even, time_per_token
from ..speculative.drafters import Drafter
from .paired import Arm, Measured, circumstances, measure, mismatches, ratio, raw
from .workloads import caption_inputs

#: Scenes that drafters learn from before others are measured.
WARM = 16


def summary(results: Mapping[str, Measured], plain: str) -> dict[str, Any]:
    """Per arm: milliseconds per token, ratios to the arm ``plain``, acceptance, the split, and the cost formula.

    The formula's unit is a decoding step of ``plain``. It adds up what the loop clocked of verification, drafting and the
    rest, over tau; ``vs_plain_decode`` is clocked from outside.
    """
    unit = statistics.median(results[plain].per_token(decode_only=True))
    out: dict[str, Any] = {}
    for name, result in results.items():
        entry: dict[str, Any] = {
            "ms_per_token": round(1e3 * statistics.median(result.per_token()), 4),
            "ms_per_token_decode": round(1e3 * statistics.median(result.per_token(decode_only=True)), 4),
            "vs_plain": round(ratio(result, results[plain]), 4),
            "vs_plain_decode": round(ratio(result, results[plain], decode_only=True), 4),
            "tokens": sum(len(answer[0]) for answer in result.answers),
        }
        stats = result.stats
        if stats.cycles:
            cycle = {part: getattr(stats, f"{part}_s") / stats.cycles / unit for part in ("target", "draft", "other")}
            entry["speculation"] = {
                **stats.to_json(),
                "alpha": round(alpha_of(stats.tau, len(stats.reached)), 4) if stats.reached else 0.0,
                "ms_per_token_split": {
                    part: round(1e3 * getattr(stats, f"{part}_s") / stats.tokens, 4)
                    for part in ("target", "draft", "other")
                },
                "cycle_in_plain_steps": {part: round(value, 3) for part, value in cycle.items()},
                "formula": {
                    "time_per_token": round(time_per_token(stats.tau, *cycle.values()), 4),
                    "break_even_tau": round(break_even(*cycle.values()), 4),
                },
            }
        out[name] = entry
    return out


def speculative(
    model: Any,
    processor: Any,
    method: Method,
    drafter: Drafter,
    *,
    samples: int,
    max_new_tokens: int,
    rounds: int = 3,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``lvlm-decode bench speculative``: a method with a drafter against itself without one, and against plain."""
    inputs = [{k: v.to(model.device) for k, v in x.items()} for x in caption_inputs(processor, samples + WARM)]
    arms = {"plain": Arm(), "method": Arm(method), "method with drafter": Arm(method, drafter)}
    results = measure(
        model,
        processor,
        inputs[WARM:],
        arms,
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        warm=inputs[:WARM],
        options=options,
    )
    speculated = summary(results, "plain")
    own = speculated["method with drafter"]
    return {
        "mismatches": mismatches(results["method with drafter"], results["method"]),
        "time_per_token_vs_plain": own["vs_plain"],
        "time_per_token_vs_method": round(ratio(results["method with drafter"], results["method"]), 4),
        "tau": own["speculation"]["tau"],
        "split": own["speculation"]["ms_per_token_split"],
        "arms": speculated,
        "raw": raw(results),
        "circumstances": circumstances(model),
    }
