"""What seeds say: means with intervals, and slopes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from onsphere.report.number import number


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: of the values.
        low: lower end of the interval.
        high: upper end.
        count: how many values.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            return f"{number(self.mean, 3)} (one value, no interval)"
        return f"{number(self.mean, 3)} [{number(self.low, 3)}, {number(self.high, 3)}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % Student t interval of independent values.

    Args:
        values: one per seed; at least one.

    Returns:
        The estimate; with a single value the interval is infinite, because nothing is known.

    Raises:
        ValueError: no values.

    Example:
        >>> print(estimate([1.0, 2.0, 3.0]))
        2 [−0.484, 4.48]
    """
    if not values:
        raise ValueError("an estimate needs at least one value")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(special.stdtrit(len(values) - 1, 0.975)) * error
    return Estimate(mean, mean - half, mean + half, len(values))


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y against log x: the exponent of a power law.

    Args:
        x: positive positions.
        y: positive values.

    Example:
        >>> round(log_slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]), 6)
        2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one side is constant (nothing can track it).

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0], [1.0, 4.0, 9.0])
        1.0
    """
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    from scipy import stats  # as long as a third of torch, and every worker imports this file

    return round(float(stats.spearmanr(x, y).statistic), 12)
