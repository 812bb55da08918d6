"""What losses say: where the optimum is, how far it moved, what it costs to keep a setting.

Losses come as rate -> one loss per seed, on rates a factor of two apart; a rate here is whatever
number is tuned, a learning rate or a rotation. The rules below were written before the runs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onsphere.report import Outcome
from onsphere.studies.setup.statistics import Estimate, estimate

Losses = Mapping[float, Sequence[float]]

MARGIN = 1.0
"""Per cent of the loss: a smaller difference in the cost of a kept setting does not matter."""

OCTAVES = 0.5
"""A smaller difference in how far optima moved does not matter."""

COST_RULE = (
    "Cost of a kept setting: loss of the larger model at the small model's best setting minus its "
    "loss at its own best, in % of the latter; for each seed the own best is the one of the other "
    "seeds. Asked of the cost for the tuned rate minus the cost for the rotation, paired by seed, "
    f"averaged over the axes at their largest factors: absent if the whole 95 % interval lies "
    f"within ±{MARGIN:g} %, else holds if it lies above 0, reversed if below, undecided otherwise. "
    "It must come out alike against the rate of all weights and against the rate of the hidden "
    "matrices alone, where all others keep theirs as they do with rotations; where it does not, "
    "it differs, or is undecided if one of both is."
)

SHIFT_RULE = (
    "Optimum: for each seed the vertex of the parabola, in the logarithm of the rate, through the "
    "best rate of the mean loss and its two neighbours, a factor of two away, and at most as far. "
    "Shift: the larger model's minus the small model's, in octaves, in the direction of the mean "
    "shift. Asked of the shift of the rate minus the shift of the rotation, paired by seed, "
    "averaged over the axes at their largest factors; "
    f"margin {OCTAVES:g} octaves, otherwise as for the cost."
)


def best(losses: Losses, without: int | None = None) -> float:
    """Return the rate with the lowest mean loss, of all seeds but one if it is named.

    Example:
        >>> best({0.1: [2.0, 3.0], 0.2: [3.0, 1.0]}), best({0.1: [2.0, 3.0], 0.2: [3.0, 1.0]}, 1)
        (0.2, 0.1)
    """

    def mean(rate: float) -> float:
        kept = [loss for seed, loss in enumerate(losses[rate]) if seed != without]
        return sum(kept) / len(kept)

    return min(sorted(losses), key=mean)


def missing(losses: Losses) -> list[float]:
    """Return the neighbours of the best rate that were not tried: with them, it lies inside.

    Example:
        >>> missing({1.0: [3.0], 2.0: [2.0]}), missing({1.0: [3.0], 2.0: [2.0], 4.0: [2.5]})
        ([4.0], [])
    """
    middle = best(losses)
    return [rate for rate in (middle / 2, middle * 2) if rate not in losses]


def costs(losses: Losses, kept: float) -> list[float]:
    """Return what keeping a setting costs, by seed, in per cent of the loss at the own best.

    The own best is chosen by the other seeds, so that no seed chooses what it is measured by; the
    cost can be negative.

    Args:
        losses: of the larger model, of two seeds or more.
        kept: the rate that is kept; between two that were tried, losses are interpolated in its
            logarithm.

    Raises:
        ValueError: the rate lies beyond those that were tried.

    Example:
        >>> costs({1.0: [1.1, 1.2], 2.0: [1.0, 1.0], 4.0: [1.5, 1.5]}, kept=1.0)
        [10.000000000000009, 19.999999999999996]
    """
    at = interpolated(losses, kept)
    own = [losses[best(losses, without=seed)][seed] for seed in range(len(at))]
    return [100 * (loss - lowest) / lowest for loss, lowest in zip(at, own, strict=True)]


def interpolated(losses: Losses, rate: float) -> list[float]:
    """Return losses by seed at a rate, interpolated in its logarithm.

    Raises:
        ValueError: the rate lies beyond those that were tried.
    """
    if rate in losses:
        return list(losses[rate])
    below, above = [r for r in losses if r < rate], [r for r in losses if r > rate]
    if not below or not above:
        raise ValueError(f"{rate} lies beyond the rates that were tried, {sorted(losses)}")
    low, high = max(below), min(above)
    share = math.log(rate / low) / math.log(high / low)
    return [a + share * (b - a) for a, b in zip(losses[low], losses[high], strict=True)]


def optima(losses: Losses) -> list[float]:
    """Return by seed the base-2 logarithm of the best rate, from a parabola.

    Through the best rate of the mean loss and its neighbours; where that of a seed has no minimum
    between these, the neighbour with the lower loss; where one of these was not tried, the best
    itself.

    Example:
        >>> optima({1.0: [2.0, 1.0], 2.0: [1.0, 1.25], 4.0: [2.0, 2.0]})
        [1.0, 0.0]
    """
    middle = best(losses)
    if missing(losses):
        return [math.log2(middle)] * len(losses[middle])
    three = [losses[rate] for rate in (middle / 2, middle, middle * 2)]
    return [math.log2(middle) + _vertex(*values) for values in zip(*three, strict=True)]


def _vertex(left: float, middle: float, right: float) -> float:
    """Return where the parabola through losses at -1, 0 and 1 is lowest in [-1, 1]."""
    slope, bend = (right - left) / 2, right + left - 2 * middle
    if bend > 0 and abs(slope) <= bend:
        return -slope / bend
    return -1.0 if left < right else 1.0 if right < left else 0.0


def shifts(larger: Losses, small: Losses) -> list[float]:
    """Return by seed how many octaves the optimum moved."""
    return [a - b for a, b in zip(optima(larger), optima(small), strict=True)]


def gain_in_cost(rate: Sequence[float], rotation: Sequence[float]) -> list[float]:
    """Return by seed what keeping the rate costs more than keeping the rotation."""
    return [a - b for a, b in zip(rate, rotation, strict=True)]


def gain_in_shift(rate: Sequence[float], rotation: Sequence[float]) -> list[float]:
    """Return by seed how much farther the rate moved than the rotation, each along its mean.

    Example:
        >>> gain_in_shift([-2.0, -1.0], [0.5, 0.5])
        [1.5, 0.5]
    """
    return [a - b for a, b in zip(_along(rate), _along(rotation), strict=True)]


def _along(values: Sequence[float]) -> list[float]:
    sign = math.copysign(1.0, sum(values))
    return [sign * value for value in values]


def averaged(rows: Iterable[Sequence[float]]) -> list[float]:
    """Return by seed the mean over rows."""
    return [float(mean) for mean in np.mean([list(row) for row in rows], axis=0)]


def decided(interval: Estimate, margin: float) -> Outcome:
    """Say what an interval shows.

    Example:
        >>> str(decided(Estimate(1.0, 0.5, 3.0, 4), 1.0)), str(decided(Estimate(0, -1, 3, 4), 1.0))
        ('holds', 'undecided')
    """
    if -margin < interval.low and interval.high < margin:
        return Outcome.ABSENT
    if interval.low > 0:
        return Outcome.HOLDS
    return Outcome.REVERSED if interval.high < 0 else Outcome.OPEN


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """Return what several outcomes say together: one that all share, or that they differ.

    Example:
        >>> str(together([Outcome.HOLDS, Outcome.HOLDS]))
        'holds'
        >>> str(together([Outcome.HOLDS, Outcome.OPEN]))
        'undecided'
    """
    found = {*outcomes}
    if len(found) == 1:
        return found.pop()
    return Outcome.OPEN if Outcome.OPEN in found else Outcome.MIXED


def exponent(moved: Sequence[float], factor: int) -> Estimate:
    """Return the power of the factor that the optimum follows, with its interval over seeds.

    Example:
        >>> print(exponent([-1.5, -1.5], 8))
        −0.5 [−0.5, −0.5]
    """
    return estimate([octaves / math.log2(factor) for octaves in moved])
