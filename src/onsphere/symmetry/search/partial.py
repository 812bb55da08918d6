r"""Weights of which only a part lives on spheres, or only a part has no effect.

A fused projection holds queries, keys and values in one tensor: behind QK-norm the first two live
on spheres, head by head, and the third does not; the key's part of the bias has no effect at all.
Such parts are intervals along one axis: the shortest over which the radial derivative sums to 0
for every combination of the outputs (or over which the gradient itself is lost in rounding). Each
is certified by a finite change of the parts alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from onsphere.symmetry.numeric.certificate import (
    FINITE_TOLERANCE,
    RADIAL_TOLERANCE,
)
from onsphere.symmetry.numeric.joint_tests import largest_changes
from onsphere.symmetry.numeric.probe import Point, Points, Probe
from onsphere.symmetry.numeric.radial_derivatives import RadialDerivatives, Row
from onsphere.symmetry.numeric.samples import Samples
from onsphere.symmetry.search.granularity import SPREAD, divisors
from onsphere.symmetry.search.inert import SILENT, act_through_eps, along, are_inert_parts

Interval = tuple[int, int]
Kind = Literal["sphere", "inert"]

_FINE = 512
"""Up to this length of an axis intervals of every length are tried, beyond those that divide it."""
_MOST = 256
"""More intervals than this in one weight are no structure."""
_GAP = 1e4
"""Smallest ratio between what is above rounding and rounding."""


@dataclass(frozen=True)
class Part:
    """Intervals along one axis of a weight that are alike.

    Args:
        name: the weight.
        axis: the axis that is cut.
        intervals: ``(start, stop)`` of each part.
        kind: ``"sphere"``: each interval alone can be scaled; ``"inert"``: none has any effect.
        change: largest relative change of the output when all of them are changed at random.
    """

    name: str
    axis: int
    intervals: tuple[Interval, ...]
    kind: Kind
    change: float


def find_parts(
    probe: Probe,
    names: Sequence[str],
    drawn: Samples,
    evidence: RadialDerivatives,
    known: Mapping[str, Part] | None = None,
) -> list[Part]:
    """Find parts of weights that are on spheres or inert while the whole weight is not.

    Args:
        probe: the model.
        names: weights that are neither on spheres of their own nor inert.
        drawn: where parts are certified.
        evidence: what was gathered.
        known: inert parts of vectors that structure tells: they are not put to the test again.

    Returns:
        At most one part of each kind per weight; each passed its certificate.
    """
    known = known or {}
    largest = [_largest(row) for row in evidence.rows]
    wanted = [w for name in names for w in _wanted(name, evidence, largest)]
    spheres = [w for w in wanted if w[3] == "sphere"]
    inert = [w for w in wanted if w[3] == "inert" and not _covered(w[2], known.get(w[0]))]
    moved = Points(chain(drawn.random, drawn.further))
    changes = largest_changes(probe, spheres, _rescaled, moved)
    held = [
        Part(*w, change)
        for w, change in zip(spheres, changes, strict=True)
        if change <= FINITE_TOLERANCE
    ]
    silent = are_inert_parts(probe, [(n, a, i) for n, a, i, _ in inert], drawn.random, drawn)
    quiet = [Part(*w, c) for w, c in zip(inert, silent, strict=True) if c is not None]
    acting = act_through_eps(probe, [(p.name, p.axis, p.intervals) for p in quiet], drawn.random)
    found = [p for p, acts in zip(quiet, acting, strict=True) if not acts]
    more = [p for n, p in known.items() if all(n != q.name for q in found)]
    return [*held, *found, *more]


def _covered(intervals: Sequence[Interval], part: Part | None) -> bool:
    """Return whether all intervals lie in those of a part."""
    inside = () if part is None else part.intervals
    return all(any(a <= start and stop <= b for a, b in inside) for start, stop in intervals)


_Wanted = tuple[str, int, tuple[Interval, ...], Kind]


def _largest(row: Row) -> float:
    """Return the largest bound of a whole weight."""
    return max((float(w[()].size * w[()].slope) for w in row.weights.values()), default=0.0) ** 0.5


def _wanted(name: str, evidence: RadialDerivatives, largest: Sequence[float]) -> Iterator[_Wanted]:
    rows = [r.weights[name] for r in evidence.rows if name in r.weights]
    if not rows:
        return
    whole = [x for r, x in zip(evidence.rows, largest, strict=True) if name in r.weights]
    for axes in rows[0]:
        if len(axes) != 1:
            continue
        slices = [r[axes] for r in rows]
        radial = torch.stack([s.radial for s in slices])
        bound = torch.stack([(s.size * s.slope).sqrt() for s in slices])
        slope = torch.stack([s.slope for s in slices])
        silent = _silent(bound, slope, torch.tensor(whole, dtype=torch.float64))
        if silent:
            yield (name, axes[0], silent, "inert")
        found = null_intervals(radial, bound)
        if found:
            yield (name, axes[0], found, "sphere")
        if silent or found:
            return


def _silent(bound: Tensor, slope: Tensor, whole: Tensor) -> tuple[Interval, ...]:
    """Return runs of slices whose gradient is rounding; exactly 0 in every row was not reached.

    A wide gap parts rounding from what is only small.
    """
    share = (bound / whole[:, None]).amax(0).clamp_min(1e-300)
    reached = (slope > 0).any(0)
    ordered = share[reached].sort().values
    gaps = torch.where(ordered[:-1] <= SILENT, ordered[1:] / ordered[:-1], 0.0)
    if not len(gaps) or float(gaps.max()) < _GAP:
        return ()
    runs = _runs((reached & (share <= ordered[gaps.argmax()])).tolist())
    return tuple(runs) if all(b - a > 1 for a, b in runs) and len(runs) <= _MOST else ()


def _runs(flags: Sequence[bool]) -> list[Interval]:
    runs: list[Interval] = []
    for i, flag in enumerate(flags):
        if flag and runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        elif flag:
            runs.append((i, i + 1))
    return runs


def null_intervals(radial: Tensor, bound: Tensor) -> tuple[Interval, ...]:
    """Return the shortest disjoint intervals over which every row of ``radial`` sums to 0.

    Args:
        radial: one row per measurement, one column per slice.
        bound: bounds of the same numbers; an interval with bound 0 was not reached and is left out.

    Example:
        >>> null_intervals(torch.tensor([[1.0, -1.0, 3.0]]), torch.ones(1, 3))
        ((0, 2),)
    """
    n = radial.shape[1]
    if not n:
        return ()
    sums, limits = (torch.cat([t.new_zeros(len(t), 1), t.cumsum(1)], 1) for t in (radial, bound))
    floor = 1e-3 * RADIAL_TOLERANCE * bound.amax(1)
    starts, stops = _ends(n)
    for total, limit, least in zip(sums, limits, floor, strict=True):
        inside = limit[stops] - limit[starts]
        null = (total[stops] - total[starts]).abs() <= RADIAL_TOLERANCE * inside + least
        null &= inside > 0
        starts, stops = starts[null], stops[null]
    taken: list[Interval] = []
    free = torch.ones(n, dtype=torch.bool)
    while len(starts):
        length = int((stops - starts).min())
        for start in starts[stops - starts == length].tolist():
            stop = start + length
            if bool(free[start:stop].all()):
                taken.append((start, stop))
                free[start:stop] = False
        if len(taken) > _MOST:
            return ()
        used = torch.cat([torch.zeros(1), (~free).cumsum(0)])
        left = used[stops] == used[starts]
        starts, stops = starts[left], stops[left]
    return tuple(sorted(taken))


@lru_cache(16)
def _ends(n: int) -> tuple[Tensor, Tensor]:
    """Return where the intervals of all lengths that are tried begin and end, among n slices."""
    lengths = torch.arange(1, n) if n <= _FINE else torch.tensor([1, *divisors(n)])
    counts = n + 1 - lengths
    long = lengths.repeat_interleave(counts)
    starts = torch.arange(len(long)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return starts, starts + long


def _rescaled(probe: Probe, some: Sequence[_Wanted], point: Point) -> Point:
    """Rescale every interval by its own factor."""
    state = dict(point.state)
    for name, axis, intervals, _ in some:
        own = probe.own_name[name]
        factors = torch.ones(state[own].shape[axis], dtype=torch.float64)
        for start, stop in intervals:
            draw = torch.rand((), generator=probe.generator, dtype=torch.float64) - 0.5
            factors[start:stop] = (SPREAD * draw).exp()
        state[own] = state[own] * along(axis, factors.to(state[own]), state[own].ndim)
    return replace(point, state=state)
