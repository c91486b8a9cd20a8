"""A training loss taken apart: where it is, how fast it falls, how much it scatters."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

# Long enough for a straight line to be told from noise, short enough for the loss to fall along one.
_TREND_UPDATES = 60


@dataclass(frozen=True)
class Trend:
    """A training loss taken apart."""

    level: float
    """Where the trend ends, in nats."""
    slope: float
    """By how much it changes in 100 updates at the end, in nats."""
    noise: float
    """Standard deviation of the updates' losses about the trend, in nats."""


def trend_of(losses: np.ndarray) -> Trend:
    """Take the second half of a run's training losses [n] apart, in the first half of which it falls too fast.

    The trend is made of straight lines over about 60 updates each, by the median of slopes (Theil 1950, Sen 1968): a
    few wild updates move neither it nor the level, but count as noise.
    """
    half = losses[len(losses) // 2 :]
    pieces = np.array_split(half, max(1, round(len(half) / _TREND_UPDATES)))
    level = slope = squares = 0.0
    for piece in pieces:
        steps = np.arange(len(piece))
        slope, intercept = stats.theilslopes(piece, steps)[:2] if len(piece) > 1 else (0.0, piece[0])
        level = intercept + slope * (len(piece) - 1)
        squares += float(((piece - intercept - slope * steps) ** 2).sum())
    # Two numbers of each line are fitted to the losses themselves.
    return Trend(float(level), 100 * float(slope), math.sqrt(squares / max(1, len(half) - 2 * len(pieces))))
