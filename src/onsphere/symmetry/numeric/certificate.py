r"""Test claims on the numbers: radial derivatives and finite rescales.

For a symmetry :math:`e`, every combination :math:`\langle v, f\rangle` of the outputs has
:math:`\sum_i e_i \langle p_i, \nabla_{p_i}\langle v, f\rangle\rangle = 0` (Euler), and the
rescaled model gives the same output. Both are checked in float64 with eps at almost 0, at the
model's own weights and at random ones. At the real eps the same sum is the *leak*.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import product
from math import lcm

import torch
from torch import Tensor

from onsphere._torch.execution import ModelError
from onsphere.symmetry.numeric.float64_mode import TINY
from onsphere.symmetry.numeric.group_testing import group_test
from onsphere.symmetry.numeric.probe import Point, Probe
from onsphere.symmetry.numeric.radial_derivatives import (
    RadialDerivatives,
    RadialRows,
    radial_rows,
)

RADIAL_TOLERANCE = 1e-7
"""Largest relative radial derivative of a claim that counts as 0 in float64: deep networks amplify
rounding in the backward pass, so the finite rescale is the sharper test."""
_NO_ROUNDING = 1e-4
"""Relative radial derivative that rounding does not explain at a well-conditioned point."""
FINITE_TOLERANCE = 1e-10
"""Largest relative change of the output under a finite rescale that counts as 0."""

WORST_AMPLIFICATION = 1e3
"""Largest relative change of the output per relative change of the weights at a usable point."""
EPSILON = torch.finfo(torch.float64).eps
"""Relative rounding error of float64."""

_ALIVE = 0.1
"""Relative change of the output per relative change of the weights that is no rounding."""

NOISES = 30
"""How many times the change that rounding makes at a point is still rounding."""
_COTANGENTS = {False: 3, True: 2}
"""Random combinations of the outputs at the real eps; by whether the model is large."""
_LEAST_TESTS = {False: 8, True: 24}
"""How many rescales must change nothing; by whether weights act by steps, without a gradient."""
_ROUNDINGS = 3e5
"""How many times the rounding at a point a change under a large rescale may be."""
_FACTORS = (-7.0, -1.3, 0.7, 7.0)
"""Powers of two by which weights are rescaled far; two of them between, since a model may itself
round a scale to a power of two."""
_ANYWHERE = tuple(product((0.1, 0.3, 1.0, 3.0, 10.0, 30.0), (0.3, 1.0)))
"""Sizes of weights, and how far they are moved, at which a claim must hold."""
_HUGE = 30.0
"""And one that makes weights huge, of each sign of a trade: a clamp at 65504 acts only there."""
_COARSE = 1e-3
"""Largest change that counts as 0 there: what becomes tiny in turn is no longer far above eps."""
_OTHER_EPS = (1e2 * TINY, 1e4 * TINY, 1e1 * TINY)
"""What stands for eps in turn where it is looked whether they show; all alike could cancel."""

Exponents = Mapping[str, Fraction]


@dataclass(frozen=True)
class Certificate:
    """How well a claim held.

    Args:
        residual: largest radial derivative at eps near 0, relative to the sum of
            :math:`|e_i||p_i||g_i|` (Cauchy-Schwarz's bound for it), at the best conditioned point;
            ``None`` where there are no gradients.
        change: largest relative change of the output under a finite rescale, eps near 0.
        leak: relative change of the output per e-fold of rescale, at the real eps.
        allowed: how much of such a change rounding may explain.
        withstands: whether it holds at weights of many sizes and under large factors; looked at
            only where gradients do not speak for it.
    """

    residual: float | None
    change: float
    leak: float
    allowed: float = FINITE_TOLERANCE
    withstands: bool = False

    @property
    def tangent(self) -> bool:
        """Whether gradients stand at right angles to the symmetry, as those of its function do.

        A scale that the model detaches takes part in the function and not in its gradient.
        """
        return self.residual is None or self.residual <= 10 * RADIAL_TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether the claim may be made."""
        told = self.residual is not None and self.tangent
        return self.change <= self.allowed and (told or self.withstands)


def rounding_floor(probe: Probe, point: Point, *, real_eps: bool = False) -> float:
    """Relative change of the output that rounding the weights alone makes at a point.

    Infinite where nothing can be compared: where the model does not run, or gives no numbers. With
    eps near 0, a normalization of something constant divides by the rounding error of 0: such
    points are ill conditioned.
    """
    return max(_amplification(probe, point, real_eps), 1.0) * EPSILON


def _amplification(probe: Probe, point: Point, real_eps: bool = False) -> float:
    """Relative change of the output per relative change of the weights at a point."""
    known = probe.amplifications[real_eps]
    if point not in known:
        try:
            known[point] = _measured_amplification(probe, point, real_eps)
        except ModelError:
            known[point] = float("inf")
    return known[point]


def _measured_amplification(probe: Probe, point: Point, real_eps: bool) -> float:
    before = probe.baseline(point, real_eps=real_eps)
    if not all(bool(t.isfinite().any()) and not bool(t.isnan().any()) for t in before):
        return float("inf")
    nudge = 1e-12
    # Other eps, too: where they show, a normalization divides by one, and hides what is added.
    after = probe.outputs(probe.nudged(point, nudge), real_eps=real_eps, tiny=_OTHER_EPS)
    return relative_change(before, after) / nudge


def rounding(
    probe: Probe, point: Point, outputs: Sequence[Tensor], real_eps: bool = False
) -> float:
    """Return how much the output changes when every weight is rounded differently."""
    near = probe.nudged(point, 4 * EPSILON)
    try:
        return relative_change(outputs, probe.outputs(near, real_eps=real_eps))
    except ModelError:
        return float("inf")


def is_well_conditioned(probe: Probe, point: Point, *, real_eps: bool = False) -> bool:
    """Return whether rounding stays rounding at a point."""
    return rounding_floor(probe, point, real_eps=real_eps) < WORST_AMPLIFICATION * EPSILON


def is_alive(probe: Probe, point: Point) -> bool:
    """Return whether the output changes at all when all weights do.

    Where every token has the same nearest code, or no input passes a gate, nothing changes the
    output, and every claim seems to hold.
    """
    if _ALIVE < _amplification(probe, point) < WORST_AMPLIFICATION:
        return True
    return changed(probe, point, probe.nudged(point, 0.3)) > 10 * FINITE_TOLERANCE


def certify(
    probe: Probe,
    claims: Sequence[Exponents],
    points: Sequence[Point],
    evidence: RadialDerivatives | None,
) -> list[Certificate]:
    """Test symmetries against radial derivatives and finite rescales.

    A claim that gradients speak against may still hold for the function, where the model detaches
    something: it then has to hold at weights of many sizes and under large factors too.

    Args:
        probe: the model.
        claims: exponents by name.
        points: where to test.
        evidence: what was gathered at these points; ``None`` where there are no gradients.

    Returns:
        One certificate per claim.
    """
    if not claims:
        return []
    allowed = min(FINITE_TOLERANCE, 1e5 * max(rounding_floor(probe, p) for p in points))
    if evidence is None:
        residuals: list[float | None] = [None] * len(claims)
        real = None
    else:
        rows = [
            (r, is_well_conditioned(probe, point))
            for i, point in enumerate(points)
            if len((r := evidence.radial(i)).values)
        ]
        seen = set(evidence.names)
        residuals = [
            _least_residual(rows, claim) if rows and seen.issuperset(claim) else None
            for claim in claims
        ]
        # Before anything is rescaled: of a huge model each takes a gigabyte beside its weights.
        real = radial_rows(probe, probe.given(), _COTANGENTS[probe.large], real_eps=True)
    changes = group_test(claims, partial(_finite_change, probe, points, allowed), allowed)
    found = []
    for claim, residual, change in zip(claims, residuals, changes, strict=True):
        first = Certificate(residual, change, 0.0, allowed)
        if real is not None and first.residual is not None and first.tangent:
            found.append(replace(first, leak=_leak(real, claim)))
        else:
            held = change <= allowed and withstands(probe, claim)
            found.append(replace(first, leak=_finite_leak(probe, claim), withstands=held))
    return found


def withstands(probe: Probe, claim: Exponents, doubted: Collection[str] = ()) -> bool:
    """Return whether a symmetry holds far from where it was seen.

    A clamp that is never reached, a softmax of nearly equal scores: near one set of weights such
    things look like symmetries. So the weights are redrawn at many sizes and rescaled by large
    factors; a change beyond rounding at any of them refutes the claim. Rounding is allowed more
    than elsewhere: a bias that a norm takes away again may be a thousand times what it is added to.

    Args:
        probe: the model.
        claim: exponents by name.
        doubted: weights of which no gradient shows whether inputs reach them; a point counts only
            where other values of each of them change the output. Of the claim's own weights, other
            values of one must: an expert that nobody asked would withstand anything. Where that is
            rare, more weights are drawn, which route their inputs elsewhere.
    """
    tested = 0
    # A rounding, or the nearest of some codes, hides what is smaller than a step.
    stepwise = not claim.keys().isdisjoint({*doubted, *probe.traced.jumping})
    least = _LEAST_TESTS[stepwise]
    for turn in range(2 * len(_ANYWHERE)):
        if turn >= len(_ANYWHERE) and tested >= least:
            break
        many = turn % 3 == 2 or (stepwise and turn < len(_ANYWHERE))
        draw = partial(_anywhere, probe, turn, many)
        point = probe.shared(("anywhere", turn, many), draw)
        if not is_well_conditioned(probe, point) or not _reached(probe, point, doubted):
            continue
        if not any(_reached(probe, point, [name]) for name in claim):
            continue
        if not is_alive(probe, point):
            continue
        size, _ = _ANYWHERE[turn % len(_ANYWHERE)]
        count = _withstood(probe, claim, point, huge=size >= 1)
        if count is None:
            return False
        tested += count
    return tested >= least


def _anywhere(probe: Probe, turn: int, many: bool) -> Point:
    """Draw weights of any size; in the second round they keep their mean and spread only."""
    size, noise = _ANYWHERE[turn % len(_ANYWHERE)]
    anew = turn >= len(_ANYWHERE)
    return probe.redrawn(noise, size, turn, 0.1 * (turn % 2), many=many, anew=anew)


def _withstood(probe: Probe, claim: Exponents, point: Point, *, huge: bool) -> int | None:
    """Return under how many factors a symmetry held at a point; ``None`` where one refutes it."""
    tested, largest = 0, max(abs(e) for e in claim.values())
    signs = [sign for sign in (-1, 1) if huge and any(e * sign > 0 for e in claim.values())]
    extreme = [_HUGE * sign for sign in signs]
    for powers in (*_FACTORS, *extreme):
        factors = {n: powers * float(e / largest) for n, e in claim.items()}
        other = probe.rescaled(point, factors, base=2.0)
        if not is_well_conditioned(probe, other):
            continue
        tested += 1
        change = relative_change(probe.baseline(point), probe.baseline(other))
        floor = max(rounding_floor(probe, point), rounding_floor(probe, other))
        allowed = _COARSE if powers in extreme else 100 * FINITE_TOLERANCE
        if not change <= max(allowed, _ROUNDINGS * floor):
            return None
    return tested


def _least_residual(rows: Sequence[tuple[RadialRows, bool]], claim: Exponents) -> float:
    """Return the residual at the point that rounds least, or one that is no rounding anywhere.

    Where the claimed weights act hardly at all, as behind a saturated softmax, any residual is
    small; so one that is large where numbers can be trusted counts.

    Args:
        rows: of every point, with whether it is well conditioned.
        claim: exponents by name.
    """
    found = [(_residual(r, claim), trusted) for r, trusted in rows]
    clear = [residual for residual, trusted in found if trusted and residual > _NO_ROUNDING]
    return max(clear) if clear else min(residual for residual, _ in found)


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


def _reached(probe: Probe, point: Point, names: Collection[str]) -> bool:
    """Return whether other values of each of these weights change the output.

    It does not where the model refuses them.
    """
    for name in names:
        own = probe.own_name[name]
        held = point.state[own]
        other = held.flip(0).roll(1, -1) if held.ndim else held
        state = {**point.state, own: other * -1.7}
        try:
            after = probe.outputs(replace(point, state=state))
        except ModelError:
            return False
        if not relative_change(probe.baseline(point), after) > 10 * FINITE_TOLERANCE:
            return False
    return True


def _finite_leak(probe: Probe, claim: Exponents) -> float:
    """Measure the leak by a small rescale, where gradients do not tell it."""
    step = 1e-3
    moved = probe.rescaled(probe.given(), {n: step * float(e) for n, e in claim.items()})
    return relative_change(probe.real_baseline(), probe.outputs(moved, real_eps=True)) / step


def _finite_change(
    probe: Probe, points: Sequence[Point], allowed: float, claims: Sequence[Exponents]
) -> float:
    """Rescale by any factors; where rounding changes the output, by powers of two, which are exact.

    A point may be well conditioned and a rescale of it not.
    """
    worst = 0.0
    for point in points:
        moved = _rescaled(probe, claims, point)
        change = changed(probe, point, moved)
        if allowed < change < float("inf"):
            rough = not is_well_conditioned(probe, point)
            if rough or change <= NOISES * rounding(probe, moved, probe.outputs(moved)):
                change = changed(probe, point, _doubled(probe, claims, point))
        del moved  # before the next one is made
        worst = max(worst, change)
    return worst


def _rescaled(probe: Probe, claims: Sequence[Exponents], point: Point) -> Point:
    """Rescale along every claim at once, each by its own random factor."""
    strengths = torch.rand(len(claims), generator=probe.generator, dtype=torch.float64) + 0.2
    strengths *= torch.where(torch.rand(len(claims), generator=probe.generator) < 0.5, -1.0, 1.0)
    return probe.rescaled(point, combined(claims, strengths.tolist()))


def _doubled(probe: Probe, claims: Sequence[Exponents], point: Point) -> Point:
    """Rescale along every claim at once, each by its own random power of two."""
    powers = torch.randint(1, 9, (len(claims),), generator=probe.generator)
    powers *= 2 * torch.randint(0, 2, (len(claims),), generator=probe.generator) - 1
    whole = [lcm(*(e.denominator for e in claim.values())) for claim in claims]
    strengths = [p * d for p, d in zip(powers.tolist(), whole, strict=True)]
    return probe.rescaled(point, combined(claims, strengths), base=2.0)


def combined(claims: Sequence[Exponents], strengths: Sequence[float]) -> dict[str, float]:
    """Return by how much every name moves when each claim is followed by its own strength."""
    total: dict[str, float] = {}
    for claim, t in zip(claims, strengths, strict=True):
        for name, e in claim.items():
            total[name] = total.get(name, 0.0) + t * float(e)
    return total


def changed(probe: Probe, before: Point, after: Point, *, real_eps: bool = False) -> float:
    """Return the relative change of the output between two points; infinite if one has none."""
    try:
        outputs = probe.outputs(after, real_eps=real_eps)
    except ModelError:
        return float("inf")
    return relative_change(probe.baseline(before, real_eps=real_eps), outputs)


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest change of any output tensor, relative to its largest entry."""
    worst = 0.0
    if len(before) != len(after):
        return float("inf")
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not a.numel():
            continue
        farthest = float((a - b).abs().max())
        if not farthest:
            continue
        if farthest < float("inf"):  # and so all entries are finite
            scale = float(a.abs().max())
            worst = max(worst, farthest / scale if scale else float("inf"))
            continue
        same = (a == b) | (a.isnan() & b.isnan())
        if bool(same.all()):
            continue
        scale = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
        change = float((a - b).abs().masked_fill(same, 0.0).max())
        change = change / scale if scale else float("inf")
        worst = max(worst, change if change == change else float("inf"))
    return worst
