r"""Test claims on the numbers: radial derivatives and finite rescales.

For a symmetry :math:`e`, every combination :math:`\langle v, f\rangle` of the outputs has
:math:`\sum_i e_i \langle p_i, \nabla_{p_i}\langle v, f\rangle\rangle = 0` (Euler), and the
rescaled model gives the same output. Both are checked in float64 with eps at almost 0, at the
model's own weights and at random ones. At the real eps the same sum is the *leak*.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import lcm
from typing import TypeVar

import torch
from torch import Tensor

from onsphere.symmetry.evidence import Evidence, RadialRows, radial_rows
from onsphere.symmetry.probe import Point, Probe
from onsphere.symmetry.sifting import sift

RADIAL_TOLERANCE = 1e-7
"""Largest relative radial derivative of a claim that counts as 0 in float64: deep networks amplify
rounding in the backward pass, so the finite rescale is the sharper test."""
FINITE_TOLERANCE = 1e-10
"""Largest relative change of the output under a finite rescale that counts as 0."""

WORST_AMPLIFICATION = 1e3
"""Largest relative change of the output per relative change of the weights at a usable point."""
EPSILON = torch.finfo(torch.float64).eps
"""Relative rounding error of float64."""

Exponents = Mapping[str, Fraction]
T = TypeVar("T")


@dataclass(frozen=True)
class Certificate:
    """How well a claim held.

    Args:
        residual: largest radial derivative at eps near 0, relative to the sum of
            :math:`|e_i||p_i||g_i|` (Cauchy-Schwarz's bound for it), at the best conditioned point.
        change: largest relative change of the output under a finite rescale, eps near 0.
        leak: relative change of the output per e-fold of rescale, at the real eps.
        allowed: how much of such a change rounding may explain.
    """

    residual: float
    change: float
    leak: float
    allowed: float = FINITE_TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether the claim may be made."""
        return self.residual <= 10 * RADIAL_TOLERANCE and self.change <= self.allowed


def rounding_floor(probe: Probe, point: Point) -> float:
    """Relative change of the output that rounding the weights alone makes at a point.

    Infinite where nothing can be compared. With eps near 0, a normalization of something constant
    divides by the rounding error of 0: such points are ill conditioned.
    """
    if point not in probe.floors:
        probe.floors[point] = _rounding_floor(probe, point)
    return probe.floors[point]


def _rounding_floor(probe: Probe, point: Point) -> float:
    before = probe.baseline(point)
    if not all(bool(t.isfinite().any()) and not bool(t.isnan().any()) for t in before):
        return float("inf")
    nudge = 1e-12
    change = relative_change(before, probe.outputs(probe.nudged(point, nudge)))
    return max(change / nudge, 1.0) * EPSILON


def is_well_conditioned(probe: Probe, point: Point) -> bool:
    """Return whether rounding stays rounding at a point."""
    return rounding_floor(probe, point) < WORST_AMPLIFICATION * EPSILON


def certify(
    probe: Probe,
    claims: Sequence[Exponents],
    points: Sequence[Point],
    evidence: Evidence,
    *,
    cotangents: int = 3,
) -> list[Certificate]:
    """Test symmetries against radial derivatives and finite rescales.

    Args:
        probe: the model.
        claims: exponents by name.
        points: where to test.
        evidence: what was gathered at these points.
        cotangents: random combinations of the outputs at the real eps.

    Returns:
        One certificate per claim.
    """
    if not claims:
        return []
    rows = [evidence.radial(i) for i in range(len(points))]
    real = radial_rows(probe, probe.given(), cotangents, real_eps=True)
    allowed = min(FINITE_TOLERANCE, 1e5 * max(rounding_floor(probe, p) for p in points))
    changes = sift(claims, partial(_finite_change, probe, points, allowed), allowed)
    return [
        Certificate(min(_residual(r, claim) for r in rows), change, _leak(real, claim), allowed)
        for claim, change in zip(claims, changes, strict=True)
    ]


def _residual(rows: RadialRows, claim: Exponents) -> float:
    e = torch.tensor([float(claim.get(n, 0)) for n in rows.names], dtype=torch.float64)
    bound = rows.bounds @ e.abs()
    floor = 1e-3 * rows.bounds.sum(1)  # so that noise of 1e-12 of the whole passes
    scale = torch.maximum(torch.maximum(bound, floor), torch.tensor(1e-300, dtype=torch.float64))
    ratios = (rows.values @ e).abs() / scale
    worst = float(ratios.max()) if len(ratios) else 0.0
    return worst if worst == worst else float("inf")


def _leak(rows: RadialRows, claim: Exponents) -> float:
    e = torch.tensor([float(claim.get(n, 0)) for n in rows.names], dtype=torch.float64)
    if not len(rows.values):
        return 0.0
    relative = (rows.values @ e) / rows.outputs.clamp_min(1e-300)
    return float(relative.square().mean().sqrt())


def _finite_change(
    probe: Probe, points: Sequence[Point], allowed: float, claims: Sequence[Exponents]
) -> float:
    """Rescale by any factors; where the output changes, by powers of two, which do not round.

    A point may be well conditioned and a rescale of it not.
    """
    change = largest_change(probe, points, _rescaled, claims)
    if change > allowed:
        change = min(change, largest_change(probe, points, _doubled, claims))
    return change


def _rescaled(probe: Probe, claims: Sequence[Exponents], point: Point) -> Point:
    """Rescale along every claim at once, each by its own random factor."""
    strengths = torch.rand(len(claims), generator=probe.generator, dtype=torch.float64) + 0.2
    strengths *= torch.where(torch.rand(len(claims), generator=probe.generator) < 0.5, -1.0, 1.0)
    return probe.rescaled(point, _combined(claims, strengths.tolist()))


def _doubled(probe: Probe, claims: Sequence[Exponents], point: Point) -> Point:
    """Rescale along every claim at once, each by its own random power of two."""
    powers = torch.randint(1, 9, (len(claims),), generator=probe.generator)
    powers *= 2 * torch.randint(0, 2, (len(claims),), generator=probe.generator) - 1
    whole = [lcm(*(e.denominator for e in claim.values())) for claim in claims]
    strengths = [p * d for p, d in zip(powers.tolist(), whole, strict=True)]
    return probe.rescaled(point, _combined(claims, strengths), base=2.0)


def _combined(claims: Sequence[Exponents], strengths: Sequence[float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for claim, t in zip(claims, strengths, strict=True):
        for name, e in claim.items():
            total[name] = total.get(name, 0.0) + t * float(e)
    return total


def largest_change(
    probe: Probe,
    points: Sequence[Point],
    edited: Callable[[Probe, Sequence[T], Point], Point],
    claims: Sequence[T],
) -> float:
    """Return the largest relative change of the output when claims are put to the test.

    Args:
        probe: the model.
        points: where; one at least.
        edited: gives the point at which the output should be the same if all claims hold.
        claims: what is tested together.
    """
    return max(
        relative_change(probe.baseline(p), probe.outputs(edited(probe, claims, p))) for p in points
    )


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest change of any output tensor, relative to its largest entry."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            return float("inf")
        same = (a == b) | (a.isnan() & b.isnan())
        if bool(same.all()):
            continue
        scale = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
        change = float(torch.where(same, torch.zeros_like(a), (a - b).abs()).max())
        change = change / scale if scale else float("inf")
        worst = max(worst, change if change == change else float("inf"))
    return worst
