"""What seeds say: intervals, tests of a difference and of its absence, and how many seeds it takes.

Seeds are the unit: every value is what one seed gave, in pairs a difference of the same seed. The
tests are Student's t; many tests share an error rate by Holm's method, and several looks at a
growing number of seeds share it by O'Brien and Fleming's spending.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

from onsphere.report.number import number

_Key = TypeVar("_Key", bound=Hashable)

POWER = 0.8
"""Chance of a decision that :func:`seeds_needed` and :func:`detectable` ask for."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

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


def estimate(values: Sequence[float], alpha: float = 0.05) -> Estimate:
    """Mean and Student t interval of independent values.

    Args:
        values: one per seed; at least one.
        alpha: chance that the interval leaves the truth out; 0.05 gives 95 %.

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
    half = _quantile(len(values) - 1, alpha / 2) * _error(values)
    return Estimate(mean, mean - half, mean + half, len(values))


def difference_p(values: Sequence[float], margin: float = 0.0) -> float:
    """Two-sided p-value of Student's t test that the mean lies beyond ``margin`` on either side.

    At most alpha exactly where the interval of :func:`estimate` at the same alpha lies outside
    [-margin, margin]; 1 for fewer than two values.

    Args:
        values: one per seed.
        margin: 0 for a difference from 0.

    Example:
        >>> round(difference_p([1.0, 2.0, 3.0]), 4)
        0.0742
    """
    return min(1.0, 2 * min(_tail(values, margin), _tail([-v for v in values], margin)))


def equivalence_p(values: Sequence[float], margin: float) -> float:
    """P-value of two one-sided t tests that the mean lies within ``margin`` of 0.

    Twice the larger of both, so that it is at most alpha exactly where the two-sided interval of
    :func:`estimate` at the same alpha lies inside (-margin, margin).

    Args:
        values: one per seed.
        margin: the smallest mean that matters, positive.

    Example:
        >>> equivalence_p([0.1, -0.1, 0.0], 1.0) < 0.01 < equivalence_p([0.1, -0.1, 0.0], 0.1)
        True

    Source: Schuirmann, A comparison of the two one-sided tests procedure and the power approach
    (1987).
    """
    return min(1.0, 2 * max(_tail(values, -margin), _tail([-v for v in values], -margin)))


def holm_levels(
    p_values: Mapping[_Key, float],
    alpha: float = 0.05,
    level: Callable[[float], float] = lambda share: share,
) -> dict[_Key, float]:
    """Share an error rate over tests: the level at which each of them is decided.

    Tests are taken from the smallest p-value on, at alpha/m, alpha/(m - 1), ..., until one is not
    significant; it and all later ones keep its level. A test is decided where its p-value is at
    most its level.

    Args:
        p_values: by the name of the test.
        alpha: chance of one or more wrong decisions among all.
        level: level of a test that has this share of alpha: less of it at an early look.

    Example:
        >>> levels = holm_levels({"a": 0.001, "b": 0.03, "c": 0.5})
        >>> {name: round(level, 4) for name, level in levels.items()}
        {'a': 0.0167, 'b': 0.025, 'c': 0.025}

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    levels: dict[_Key, float] = {}
    remaining, stopped = len(p_values), False
    for name in sorted(p_values, key=lambda name: p_values[name]):
        levels[name] = level(alpha / remaining)
        stopped |= p_values[name] > levels[name]
        remaining -= not stopped
    return {name: levels[name] for name in p_values}


def spent(alpha: float, fraction: float) -> float:
    r"""Error rate spent when a fraction of all seeds has been seen.

    :math:`4 - 4\Phi(z_{1-\alpha/4} / \sqrt{t})`, half of it on each side: next to nothing early,
    all of it at the end.

    Args:
        alpha: the whole error rate, two-sided.
        fraction: of the largest number of seeds, in (0, 1].

    Example:
        >>> [round(spent(0.05, t), 5) for t in (0.25, 0.5, 1.0)]
        [1e-05, 0.00305, 0.05]

    Source: Lan and DeMets, Discrete sequential boundaries for clinical trials (1983), of the
    O'Brien-Fleming type.
    """
    return float(4 * special.ndtr(special.ndtri(alpha / 4) / math.sqrt(fraction)))


@lru_cache(maxsize=4096)
def look_levels(
    alpha: float, fractions: tuple[float, ...], closing: bool = False
) -> tuple[float, ...]:
    """Two-sided level of each look, so that all looks together err with chance ``alpha``.

    The boundaries in z solve, look by look, P(first crossing now) = what :func:`spent` allows;
    the density of the running sum between looks is integrated numerically. Used as levels of t
    tests (the significance-level approach of Jennison and Turnbull, 2000, section 3.8).

    Args:
        alpha: the whole error rate.
        fractions: of the largest number of seeds, increasing, the last at most 1.
        closing: the last of these looks takes all that is left of ``alpha``, whatever its fraction.
            Nothing is lost by that where it is the last for a reason that does not depend on what
            was measured, such as the time.

    Returns:
        One level per look.

    Example:
        >>> [round(float(-special.ndtri(a / 2)), 3) for a in look_levels(0.05, (0.5, 1.0))]
        [2.963, 1.969]
        >>> [f"{level:.4f}" for level in look_levels(0.05, (0.25, 0.5), closing=True)]
        ['0.0000', '0.0500']
    """
    from scipy import optimize  # as long to import as it is rarely used; workers do without

    totals = [spent(alpha, fraction) for fraction in fractions]
    if closing:
        totals[-1] = alpha
    levels = totals[:1]
    bound = -special.ndtri(levels[0] / 2) * math.sqrt(fractions[0])
    nodes, density = _free(bound, math.sqrt(fractions[0]))
    for (before, now), (total, goal) in zip(pairwise(fractions), pairwise(totals), strict=True):
        allowed, step = goal - total, math.sqrt(now - before)
        excess = partial(_crossing, nodes=nodes, density=density, step=step, now=now, less=allowed)
        z = float(optimize.brentq(excess, 0.0, 38.0, xtol=1e-10))
        levels.append(float(2 * special.ndtr(-z)))
        fresh, weights = _grid(z * math.sqrt(now))
        kernel = np.exp(-0.5 * ((fresh[:, None] - nodes) / step) ** 2)
        density = weights * (kernel @ density) / (step * math.sqrt(2 * math.pi))
        nodes = fresh
    return tuple(levels)


def seeds_needed(away: float, spread: float, alpha: float, *, both_sides: bool = False) -> float:
    r"""Seeds after which a statement would probably be decided.

    :math:`(z_{1-\alpha/2} + z_{power})^2 s^2 / d^2`, and two more for Student's heavier tails;
    with a chance of :data:`POWER`, if mean and spread stay as they are.

    Args:
        away: distance d of the mean from the value that it must be told from.
        spread: standard deviation s of the values.
        alpha: two-sided level of the decision.
        both_sides: there is such a value on either side, as of a margin: the chance of a decision
            is then that of passing both.

    Returns:
        A whole number; infinity where the mean is on that value, or past it.

    Example:
        >>> seeds_needed(0.5, 1.0, 0.05), seeds_needed(0.0, 0.1, 0.05)
        (34.0, inf)
    """
    if away <= 0:
        return math.inf
    reach = float(-special.ndtri(alpha / 2) - special.ndtri((1 - POWER) / (1 + both_sides)))
    return float(math.ceil((reach * spread / away) ** 2)) + 2


def detectable(spread: float, count: int, alpha: float) -> float:
    """Smallest mean that so many seeds would probably have told from 0.

    Args:
        spread: standard deviation of the values.
        count: how many seeds, at least 2.
        alpha: two-sided level of the decision.

    Example:
        >>> round(detectable(1.0, 16, 0.05), 3)
        0.749
    """
    reach = _quantile(count - 1, alpha / 2) + _quantile(count - 1, 1 - POWER)
    return reach * spread / math.sqrt(count)


def fisher_z(correlation: float, most: float = 0.9999) -> float:
    """Fisher's transform of a correlation, on which means and intervals are taken.

    Args:
        correlation: in [-1, 1].
        most: where it is cut off, since ±1 have no transform.

    Example:
        >>> round(fisher_z(0.5), 4)
        0.5493
    """
    return math.atanh(max(-most, min(most, correlation)))


def _crossing(
    z: float, nodes: "_Reals", density: "_Reals", step: float, now: float, less: float
) -> float:
    """Probability that the running sum crosses z at the next look, less what is allowed."""
    limit = z * math.sqrt(now)
    beyond = special.ndtr((nodes - limit) / step) + special.ndtr((-limit - nodes) / step)
    return float(density @ beyond) - less


def _quantile(freedom: int, tail: float) -> float:
    return -float(special.stdtrit(freedom, tail))


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _tail(values: Sequence[float], least: float) -> float:
    """One-sided p-value of a t test that the mean exceeds ``least``."""
    if len(values) < 2:
        return 1.0
    gap, error = float(np.mean(values)) - least, _error(values)
    if error == 0:
        return 0.0 if gap > 0 else 1.0
    return float(special.stdtr(len(values) - 1, -gap / error))


_Reals = NDArray[np.float64]


def _grid(bound: float, count: int = 240) -> tuple[_Reals, _Reals]:
    """Nodes and weights of Gauss and Legendre between -bound and bound."""
    nodes, weights = _legendre(count)
    return bound * nodes, bound * weights


@lru_cache(maxsize=4)
def _legendre(count: int) -> tuple[_Reals, _Reals]:
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return np.asarray(nodes, np.float64), np.asarray(weights, np.float64)


def _free(bound: float, spread: float) -> tuple[_Reals, _Reals]:
    """Nodes and weighted density of a normal sum that has not crossed the bound."""
    nodes, weights = _grid(min(bound, 9 * spread))
    normal = np.exp(-0.5 * (nodes / spread) ** 2) / (spread * math.sqrt(2 * math.pi))
    return nodes, weights * normal


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
