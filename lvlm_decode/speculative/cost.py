"""What a drafter should bring, from what its parts cost: the formula that benchmarks print beside the measurement.

With the time of a plain step as the unit, ``verify`` the time of one verification (all views, all rows), ``draft`` and
``other`` the rest of a cycle, and ``tau`` accepted draft tokens per cycle (bonus excluded):

    time per token = (verify + draft + other) / (1 + tau)

so speculation pays off against plain decoding once ``1 + tau > verify + draft + other``.
"""

from __future__ import annotations

from collections.abc import Sequence


def time_per_token(tau: float, verify: float, draft: float = 0.0, other: float = 0.0) -> float:
    """Time per committed token, in the unit of the arguments."""
    return (verify + draft + other) / (1 + tau)


def break_even(verify: float, draft: float = 0.0, other: float = 0.0) -> float:
    """The ``tau`` at which a cycle costs per token what one unit does."""
    return max(verify + draft + other - 1, 0.0)


def tau_of(acceptance: Sequence[float]) -> float:
    """Expected accepted tokens of a draft whose level i is right with ``acceptance[i]``, given all above it were."""
    reach, total = 1.0, 0.0
    for chance in acceptance:
        reach *= chance
        total += reach
    return total


def alpha_of(tau: float, levels: int) -> float:
    """The constant per-level acceptance that would give this ``tau`` over ``levels``: what compares drafts of unlike depth."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tau_of([middle] * levels) < tau else (low, middle)
    return (low + high) / 2
