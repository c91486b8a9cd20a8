"""How sure a number is: 95 % intervals over seeds, texts or windows, whichever was repeated."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
from scipy import stats

LEVEL = 0.95


class Estimate(TypedDict):
    """A number and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Mean(TypedDict):
    """A mean over seeds and the ends of its 95 % interval, which a single seed does not have."""

    value: float
    low: float | None
    high: float | None


def student_mean(values: Sequence[float]) -> Mean:
    """Return the mean of repeated `values` with its interval."""
    low, high = student_interval(values) or (None, None)
    return Mean(value=float(np.mean(values)), low=low, high=high)


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the interval of the mean of repeated `values` (Student 1908), or None for a single one."""
    n = len(values)
    if n < 2:
        return None
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    mean = float(np.mean(values))
    return mean - half, mean + half


def bootstrap(n: int, statistic: Callable[[np.ndarray], float], seed: int = 0, resamples: int = 1000) -> Estimate:
    """Return `statistic` of `n` items, and between what most of its values lie when the items are drawn anew.

    `statistic` takes the indices [n] of the items it is of, drawn with replacement (Efron 1979, percentiles).
    """
    value = float(statistic(np.arange(n)))
    if n < 2:
        return Estimate(value=value, low=value, high=value)
    found = stats.bootstrap(
        (np.arange(n),),
        statistic,
        vectorized=False,
        method="percentile",
        n_resamples=resamples,
        confidence_level=LEVEL,
        rng=np.random.default_rng(seed),
    )
    return Estimate(value=value, low=float(found.confidence_interval.low), high=float(found.confidence_interval.high))
