"""What trials say: steps to a loss, width of the range of usable rates, differences over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.evidence.run import Space
from benchmarks.evidence.tuning import SPACES, Found, Trial
from onsphere.studies.setup.statistics import Estimate, estimate

WITHIN = 0.02  # a rate is usable when its loss is at most this share above the best


@dataclass(frozen=True)
class Range:
    """Which rates are usable.

    Attributes:
        decades: how many of them, the loss interpolated in the logarithm of the rate.
        open: the grid ends before the range does, so that it may be wider.
    """

    decades: float
    open: bool

    def __str__(self) -> str:
        return f"{'≥ ' if self.open else ''}{self.decades:.2f}"


def usable(rates: Sequence[float], losses: Sequence[float], best: float) -> Range:
    """Measure the range of rates whose loss is within :data:`WITHIN` of the best.

    Example:
        >>> print(usable([0.01, 0.1, 1.0], [1.04, 1.0, math.inf], best=1.0))
        0.50
        >>> print(usable([0.01, 0.1, 1.0], [1.01, 1.0, 1.5], best=1.0))
        ≥ 1.04
    """
    enough, total = (1 + WITHIN) * best, 0.0
    for (rate, a), (next_rate, b) in pairwise(zip(rates, losses, strict=True)):
        low, high = min(a, b), max(a, b)
        if low <= enough:
            share = 1.0 if high <= enough else (enough - low) / (high - low)
            total += math.log10(next_rate / rate) * share
    return Range(total, losses[0] <= enough or losses[-1] <= enough)


def steps_to(trial: Trial, target: float) -> float | None:
    """Return the step at which the validation loss first reached a target; ``None``: it did not.

    Between looks the loss is interpolated.
    """
    curve = [(s, math.inf if loss is None else loss) for s, loss in trial.record["curve"]]
    if curve[0][1] <= target:
        return float(curve[0][0])
    for (start, a), (end, b) in pairwise(curve):
        if b <= target:
            return float(end) if math.isinf(a) else start + (end - start) * (a - target) / (a - b)
    return None


def lowest(trial: Trial) -> float:
    """Return the lowest validation loss of a run, wherever on its way."""
    return min((loss for _, loss in trial.record["curve"] if loss is not None), default=math.inf)


def row(found: Found, space: Space) -> list[Trial]:
    """Return a space's trials over its rates; the base optimizer's at its best decay."""
    decay = found.chosen[space].run.weight_decay
    chosen = [trial for trial in found.grid[space] if trial.run.weight_decay == decay]
    return sorted(chosen, key=lambda trial: trial.swept)


def range_of(found: Found, space: Space, *, shared: bool = True) -> Range:
    """Return a space's usable range, against the best of all spaces or its own."""
    spaces = SPACES if shared else (space,)
    trials = row(found, space)
    return usable(
        [trial.swept for trial in trials],
        [trial.loss for trial in trials],
        min(found.chosen[one].loss for one in spaces),
    )


def difference(found: Found, space: Space, what: str) -> Estimate:
    """Return ours minus the base optimizer's, paired by seed; without end if a run diverged."""
    ours, theirs = ([t.record[what] for t in found.fresh[s]] for s in (space, "plain"))
    if None in ours or None in theirs:
        return Estimate(math.nan, -math.inf, math.inf, len(ours))
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def steps_share(found: Found, space: Space) -> list[float | None]:
    """Return by seed the share of all steps after which ours reached the baseline's best loss."""
    shares = []
    for ours, theirs in zip(found.fresh[space], found.fresh["plain"], strict=True):
        steps = steps_to(ours, lowest(theirs))
        shares.append(None if steps is None else steps / ours.run.steps)
    return shares


def at_the_edge(found: Found, space: Space) -> bool:
    """Whether the best rate is the smallest or largest tried, so that a better one may exist."""
    trials = row(found, space)
    return found.chosen[space] in (trials[0], trials[-1])
