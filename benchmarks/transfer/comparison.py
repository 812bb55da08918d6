"""Sweeps set side by side: the small model's with the larger ones', rates with rotations."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.transfer.outcome import costs, gain_in_cost, gain_in_shift, interpolated, shifts
from benchmarks.transfer.scale import Axis, Method
from benchmarks.transfer.search import Found, Rule


@dataclass(frozen=True)
class Comparison:
    """A rotation against a rate at the largest size along an axis, by seed.

    Attributes:
        cost: of the kept rate minus that of the kept rotation, %.
        shift: how many octaves farther the rate's optimum moved than the rotation's.
        own: loss of the rotation above that of the rate, each at its own best, %.
        kept: the same, each at the small model's setting.
    """

    cost: Sequence[float]
    shift: Sequence[float]
    own: Sequence[float]
    kept: Sequence[float]


def price(found: Found, axis: Axis, factor: int, method: Method) -> list[float]:
    """Return by seed what it costs to keep the small model's setting, %."""
    return costs(found.larger[axis][factor][method].losses, found.kept(method))


def moved(found: Found, axis: Axis, factor: int, method: Method) -> list[float]:
    """Return by seed how far the optimum moved, in octaves."""
    return shifts(found.larger[axis][factor][method].losses, found.small[method].losses)


def compare(found: Found, axis: Axis, rotation: Method, rate: Method) -> Comparison:
    """Set a rotation against a rate at the largest size along an axis."""
    factor = found.largest(axis)
    ours, theirs = (found.larger[axis][factor][method] for method in (rotation, rate))
    kept = [interpolated(s.losses, found.kept(s.start.method)) for s in (ours, theirs)]
    return Comparison(
        cost=gain_in_cost(price(found, axis, factor, rate), price(found, axis, factor, rotation)),
        shift=gain_in_shift(moved(found, axis, factor, rate), moved(found, axis, factor, rotation)),
        own=_above(ours.losses[ours.best], theirs.losses[theirs.best]),
        kept=_above(*kept),
    )


def comparisons(found: Found, rotation: Method, rate: Method) -> dict[Axis, Comparison]:
    """Return the comparisons of a rotation with a rate along all axes."""
    return {axis: compare(found, axis, rotation, rate) for axis in found.larger}


def _above(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [100 * (a - b) / b for a, b in zip(ours, theirs, strict=True)]


def cost_of_rule(found: Found, rule: Rule, method: Method) -> list[float] | None:
    """Return by seed what a rule's setting costs at the largest size; ``None``: not tried."""
    factor = found.largest(rule.axis)
    scaled = found.kept(method) * factor**rule.power
    try:
        return costs(found.larger[rule.axis][factor][method].losses, scaled)
    except ValueError:
        return None
