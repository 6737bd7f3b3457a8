"""Intervals and tests over rows: paired bootstrap clustered by image, exact McNemar. Only numpy.

Questions about one image are not independent, so the image (`Row.cluster`) is what is drawn again. Two methods are
compared on the same questions, and replicates draw the same images for both, so what the images share cancels.
Several seeds of a method are averaged; every replicate draws the same images for all seeds, so the interval covers the
choice of images, and the spread over seeds is reported beside it.

Where every replicate gives the same number (all answers right, say) the bootstrap says nothing about how sure that is.
Then the interval is Wilson's for a rate over the images (E. B. Wilson, 1927), which stays open below 100 %.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lvlm_decode.errors import EvalError

from .base import Column, Evaluator, Row, tallies

REPLICATES = 5000
LEVEL = 0.95
# Replicates are drawn in blocks of about this many cluster weights, so memory does not grow with the data.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A number with its bootstrap interval; low and high bound the middle `LEVEL` of the replicates."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar's test of one pair of methods.

    gained: questions only the method has right; lost: only the control. p: exact two-sided binomial over questions,
    None with several seeds (the same question counted twice is no new evidence). p_clustered: exact two-sided
    sign-flip test of the net gain per image, which needs no independence within an image and equals p with one
    question an image.
    """

    gained: int
    lost: int
    p: float | None
    p_clustered: float


@dataclass(frozen=True)
class Comparison:
    """Method minus control on the questions both answered: column key -> interval, and McNemar's test of the
    verdicts.
    """

    questions: int
    clusters: int
    differences: dict[str, Interval]
    mcnemar: McNemar | None


def resample(clusters: int, replicates: int = REPLICATES, seed: int = 0) -> Iterator[np.ndarray]:
    """Blocks of bootstrap weights, (block, clusters) float64: how often each cluster is drawn in a replicate.

    Whole numbers, as floats: their products with counts are exact, and go through BLAS.
    """
    rng = np.random.default_rng([seed, clusters])
    block = max(1, _BLOCK // max(1, clusters))
    for start in range(0, replicates, block):
        size = min(block, replicates - start)
        yield rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=size).astype(np.float64)


@functools.lru_cache(maxsize=1)
def _one_block(clusters: int, replicates: int, seed: int) -> list[np.ndarray]:
    return list(resample(clusters, replicates, seed))


def _weights(clusters: int, replicates: int, seed: int) -> Iterable[np.ndarray]:
    """The weights, kept for the next comparison on as many clusters where they fit in one block."""
    if clusters * replicates <= _BLOCK:
        return _one_block(clusters, replicates, seed)
    return resample(clusters, replicates, seed)


def _per_seed_counts(evaluator: Evaluator, runs: Sequence[Sequence[Row]]) -> tuple[list[str], list[str], np.ndarray]:
    """Count names, cluster names and counts of shape (seeds, clusters, names), aligned by cluster name over seeds."""
    found = [tallies(evaluator, rows) for rows in runs]
    keys = list(dict.fromkeys(key for names, _ in found for key in names))
    clusters = list(dict.fromkeys(cluster for _, (names, _) in found for cluster in names))
    place = {cluster: i for i, cluster in enumerate(clusters)}
    counts = np.zeros((len(runs), len(clusters), len(keys)), dtype=np.int64)
    for seed, (names, (present, table)) in enumerate(found):
        columns = [keys.index(name) for name in names]
        for cluster, values in zip(present, table):
            counts[seed, place[cluster], columns] = values
    return keys, clusters, counts.astype(np.float64)


def _mean_rates(evaluator: Evaluator, keys: Sequence[str], totals: np.ndarray) -> dict[str, np.ndarray]:
    """Rates averaged over seeds from totals of shape (seeds, replicates, names); those that a seed lacks are left out."""
    per_seed = [evaluator.rates({key: seed[:, i] for i, key in enumerate(keys)}) for seed in totals]
    shared = [name for name in per_seed[0] if all(name in rates for rates in per_seed)]
    return {name: np.mean([np.asarray(rates[name], float) for rates in per_seed], axis=0) for name in shared}


def _interval(value: float, replicates: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a rate over n independent units; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _collapsed(interval: Interval) -> bool:
    # Averages over seeds may differ in the last digit of a float.
    return interval.high - interval.low <= 1e-9 * max(1.0, abs(interval.value))


def _images_of(column: Column, keys: Sequence[str], counts: np.ndarray) -> int:
    """How many clusters a rate is a share of: those with something to count in some seed."""
    if not column.of:
        return counts.shape[1]
    places = [keys.index(name) for name in column.of if name in keys]
    return int((counts[:, :, places].sum(axis=(0, 2)) > 0).sum())


def _honest_rate(interval: Interval, column: Column, keys: Sequence[str], counts: np.ndarray) -> Interval:
    """Wilson's interval for a rate whose bootstrap collapsed; a number without a largest value keeps its own."""
    if column.scale is None:
        return interval
    share = min(1.0, max(0.0, interval.value / column.scale))
    low, high = wilson(share, _images_of(column, keys, counts))
    return Interval(interval.value, min(low * column.scale, interval.value), max(high * column.scale, interval.value))


def _honest_difference(interval: Interval, scale: float, clusters: int) -> Interval:
    """As `_honest_rate`, for a difference that is the same in every replicate. scale: the rate's largest value.

    Of two methods that are both right everywhere (or nowhere), Wilson bounds the share of images that could differ, in
    either direction.
    """
    size = min(1.0, abs(interval.value) / scale)
    low, high = (bound * scale for bound in wilson(size, clusters))
    if size < 1e-9:
        return Interval(interval.value, -high, high)
    return Interval(interval.value, low, high) if interval.value > 0 else Interval(interval.value, -high, -low)


def intervals(
    evaluator: Evaluator, runs: Sequence[Sequence[Row]], replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Interval]:
    """Every rate of a method with its interval; `runs` holds the rows of each seed, the value is their mean."""
    keys, clusters, counts = _per_seed_counts(evaluator, runs)
    if not clusters:
        raise EvalError("There is no scored answer to compute an interval from.")
    point = _mean_rates(evaluator, keys, counts.sum(axis=1, keepdims=True))
    drawn = [_mean_rates(evaluator, keys, weights @ counts) for weights in _weights(len(clusters), replicates, seed)]
    found = {name: _interval(point[name][0], np.concatenate([rates[name] for rates in drawn])) for name in point}
    for column in evaluator.columns:
        if column.key in found and _collapsed(found[column.key]):
            found[column.key] = _honest_rate(found[column.key], column, keys, counts)
    return found


def compare(
    evaluator: Evaluator,
    method: Sequence[Sequence[Row]],
    control: Sequence[Sequence[Row]],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Comparison:
    """Paired differences method - control, over the questions that every run of both answered.

    Each argument holds the rows of each seed. Rows align by id. Raises EvalError when no question is shared.
    """
    runs = [*method, *control]
    shared = set.intersection(*({row.id for row in rows} for rows in runs)) if runs else set()
    if not shared:
        raise EvalError("The two methods share no question id, so nothing can be paired; score the same question file.")
    method, control = ([[row for row in rows if row.id in shared] for rows in side] for side in (method, control))

    keys, clusters, counts = _per_seed_counts(evaluator, [*method, *control])
    split = len(method)

    def difference(totals: np.ndarray) -> dict[str, np.ndarray]:
        ours, theirs = _mean_rates(evaluator, keys, totals[:split]), _mean_rates(evaluator, keys, totals[split:])
        return {name: ours[name] - theirs[name] for name in ours if name in theirs}

    point = difference(counts.sum(axis=1, keepdims=True))
    drawn = [difference(weights @ counts) for weights in _weights(len(clusters), replicates, seed)]
    wanted = [column.key for column in evaluator.columns if column.key in point]
    differences = {key: _interval(point[key][0], np.concatenate([block[key] for block in drawn])) for key in wanted}
    ours = _mean_rates(evaluator, keys, counts[:split].sum(axis=1, keepdims=True))
    for column in evaluator.columns:
        found = differences.get(column.key)
        if found is None or column.scale is None or not _collapsed(found):
            continue
        # The same answers twice are no evidence of anything; the same rate at its end is that of a few images.
        if abs(found.value) > 1e-9 or min(ours[column.key][0], column.scale - ours[column.key][0]) <= 1e-9:
            differences[column.key] = _honest_difference(found, column.scale, _images_of(column, keys, counts))
    return Comparison(len(shared), len(clusters), differences, _mcnemar(method, control))


def _mcnemar(method: Sequence[Sequence[Row]], control: Sequence[Sequence[Row]]) -> McNemar | None:
    """The test on rows that carry a verdict; None when none does."""
    ours, theirs = (
        [{row.id: row for row in rows if row.correct is not None} for rows in side] for side in (method, control)
    )
    shared = set.intersection(*(set(rows) for rows in [*ours, *theirs]))
    if not shared:
        return None
    gained = lost = 0
    net: dict[str, int] = {}
    for name in sorted(shared):
        right_ours, right_theirs = (sum(bool(rows[name].correct) for rows in side) for side in (ours, theirs))
        # Each seed of one side against each seed of the other.
        gained += right_ours * (len(theirs) - right_theirs)
        lost += right_theirs * (len(ours) - right_ours)
        cluster = ours[0][name].cluster
        net[cluster] = net.get(cluster, 0) + right_ours * len(theirs) - right_theirs * len(ours)
    single = len(ours) == len(theirs) == 1
    return McNemar(gained, lost, mcnemar_exact(gained, lost) if single else None, sign_flip_exact(list(net.values())))


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided exact McNemar's test: under the null each discordant question goes either way with probability 1/2."""
    discordant = gained + lost
    tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1))
    # Integers of any size: their quotient is exact to the last digit of a float.
    return min(1.0, 2 * tail / (1 << discordant))


def sign_flip_exact(differences: Sequence[int]) -> float:
    """Two-sided exact test that the sum of `differences` is no larger than random signs would make it.

    The distribution over all 2^n sign patterns is built by convolution, so it is exact for any n. With differences in
    {-1, 0, 1} this is McNemar's exact test.
    """
    sizes = [abs(d) for d in differences if d]
    if not sizes:
        return 1.0
    unit = math.gcd(*sizes)
    sizes = [size // unit for size in sizes]
    observed = abs(sum(differences)) // unit
    # chances[i] = P(sum of the sizes with a plus sign = i); the signed sum is 2 * i - total.
    total = sum(sizes)
    chances = np.zeros(total + 1)
    chances[0] = 1.0
    for size in sizes:
        chances[size:] = 0.5 * (chances[size:] + chances[:-size])
        chances[:size] *= 0.5
    sums = np.abs(2 * np.arange(total + 1) - total)
    return min(1.0, float(chances[sums >= observed].sum()))
