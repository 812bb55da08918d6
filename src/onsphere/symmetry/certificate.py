r"""Test claims on the numbers: radial derivatives, finite rescales, and what the units missed.

For a symmetry :math:`e`, every combination :math:`\langle v, f\rangle` of the outputs has
:math:`\sum_i e_i \langle p_i, \nabla_{p_i}\langle v, f\rangle\rangle = 0` (Euler), and the
rescaled model gives the same output. Both are checked in float64 with eps at almost 0, at the
model's own weights and at random ones. At the real eps the same sum is the *leak*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import torch
from torch import Tensor

from onsphere.symmetry.probe import Point, Probe
from onsphere.symmetry.units import in_span, sparse_basis

RADIAL_TOLERANCE = 1e-7
"""Largest relative radial derivative of a claim that counts as 0 in float64: deep networks amplify
rounding in the backward pass, so the finite rescale is the sharper test."""
FINITE_TOLERANCE = 1e-10
"""Largest relative change of the output under a finite rescale that counts as 0."""

WORST_AMPLIFICATION = 1e3
"""Largest relative change of the output per relative change of the weights at a usable point."""
EPSILON = torch.finfo(torch.float64).eps
"""Relative rounding error of float64."""
SMALLEST_GAP = 1e3
"""Ratio of neighbouring singular values that separates a null space from small numbers."""

Exponents = Mapping[str, Fraction]


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
        return self.residual <= RADIAL_TOLERANCE and self.change <= self.allowed


@dataclass(frozen=True)
class RadialRows:
    r"""Radial derivatives of random combinations of the outputs.

    Args:
        names: weights, one per column.
        values: :math:`\langle p_i, g_i\rangle`, one row per combination.
        bounds: :math:`|p_i||g_i|`, likewise.
        outputs: norm of the outputs behind each row.
    """

    names: tuple[str, ...]
    values: Tensor
    bounds: Tensor
    outputs: Tensor


def radial_rows(probe: Probe, point: Point, count: int, *, real_eps: bool = False) -> RadialRows:
    """Measure radial derivatives at a point for ``count`` random cotangents."""
    values, bounds, outputs = [], [], []
    for gradients in probe.gradients(point, count, real_eps=real_eps):
        row, bound = [], []
        for name in probe.names:
            g = gradients.by_name.get(name)
            p = point.state[probe.own_name[name]]
            row.append(0.0 if g is None else float((p * g).sum()))
            bound.append(0.0 if g is None else float(p.norm() * g.norm()))
        values.append(row)
        bounds.append(bound)
        outputs.append(gradients.output)
    shape = (len(values), len(probe.names))
    return RadialRows(
        tuple(probe.names),
        torch.tensor(values, dtype=torch.float64).reshape(shape),
        torch.tensor(bounds, dtype=torch.float64).reshape(shape),
        torch.tensor(outputs, dtype=torch.float64),
    )


def join(rows: Sequence[RadialRows]) -> RadialRows:
    """Stack rows measured at several points."""
    return RadialRows(
        rows[0].names,
        torch.cat([r.values for r in rows]),
        torch.cat([r.bounds for r in rows]),
        torch.cat([r.outputs for r in rows]),
    )


def rounding_floor(probe: Probe, point: Point) -> float:
    """Relative change of the output that rounding the weights alone makes at a point.

    Infinite where nothing can be compared. With eps near 0, a normalization of something constant
    divides by the rounding error of 0: such points are ill conditioned.
    """
    before = probe.outputs(point)
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
    *,
    cotangents: int = 3,
) -> list[Certificate]:
    """Test symmetries against radial derivatives and finite rescales.

    Args:
        probe: the model.
        claims: exponents by name.
        points: where to test.
        cotangents: random combinations of the outputs per point.

    Returns:
        One certificate per claim.
    """
    if not claims:
        return []
    rows = [radial_rows(probe, p, cotangents) for p in points]
    real = radial_rows(probe, probe.given(), cotangents, real_eps=True)
    floor = max(rounding_floor(probe, p) for p in points)
    allowed = min(FINITE_TOLERANCE, 1e5 * floor)
    changes = _finite_changes(probe, claims, points, allowed)
    return [
        Certificate(min(_residual(r, claim) for r in rows), change, _leak(real, claim), allowed)
        for claim, change in zip(claims, changes, strict=True)
    ]


def withstands(probe: Probe, claim: Exponents) -> bool:
    """Return whether a symmetry that only the numbers suggest holds far from where it was seen.

    A clamp that is never reached, a softmax of nearly equal scores: near one set of weights such
    things look like symmetries. So the weights are redrawn at many sizes and rescaled by large
    factors; whatever exceeds rounding at any of them refutes the claim.
    """
    tested = 0
    for size in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
        for noise in (0.3, 1.0):
            point = probe.redrawn(noise, size)
            floor = rounding_floor(probe, point)
            if floor > WORST_AMPLIFICATION * EPSILON:
                continue
            before = probe.outputs(point)
            for strength in (-5.0, -0.7, 0.7, 5.0):
                other = probe.rescaled(point, {n: strength * float(e) for n, e in claim.items()})
                allowed = 1e3 * max(floor, rounding_floor(probe, other))
                if allowed > FINITE_TOLERANCE:
                    continue
                tested += 1
                if relative_change(before, probe.outputs(other)) > allowed:
                    return False
    return tested >= 8


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


def _finite_changes(
    probe: Probe, claims: Sequence[Exponents], points: Sequence[Point], allowed: float
) -> list[float]:
    """Rescale along all claims at once; look for the culprits one by one if that fails."""
    together = max(_finite_change(probe, claims, p) for p in points)
    if together <= allowed:
        return [together] * len(claims)
    return [max(_finite_change(probe, [c], p) for p in points) for c in claims]


def _finite_change(probe: Probe, claims: Sequence[Exponents], point: Point) -> float:
    before = probe.outputs(point)
    strengths = torch.rand(len(claims), generator=probe.generator, dtype=torch.float64) + 0.2
    strengths *= torch.where(torch.rand(len(claims), generator=probe.generator) < 0.5, -1.0, 1.0)
    total: dict[str, float] = {}
    for claim, t in zip(claims, strengths.tolist(), strict=True):
        for name, e in claim.items():
            total[name] = total.get(name, 0.0) + t * float(e)
    return relative_change(before, probe.outputs(probe.rescaled(point, total)))


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


def inert_candidates(rows: RadialRows) -> list[str]:
    """Return weights whose gradient is lost in rounding in every row: candidates to be tested."""
    largest = rows.bounds.amax(1, keepdim=True).clamp_min(1e-300)
    share = (rows.bounds / largest).amax(0) if len(rows.bounds) else rows.bounds.sum(0)
    return [n for n, s in zip(rows.names, share.tolist(), strict=True) if s <= 1e-8]


def are_inert(probe: Probe, names: Sequence[str], points: Sequence[Point]) -> list[str]:
    """Return the weights that can be replaced by something else without changing any output."""
    if not names or _unmoved(probe, names, points):
        return list(names)
    return [n for n in names if _unmoved(probe, [n], points)]


def _unmoved(probe: Probe, names: Sequence[str], points: Sequence[Point]) -> bool:
    """Replace weights by large random ones; whatever exceeds rounding is an effect."""
    points = [*points, probe.redrawn(1.0, 3.0), probe.redrawn(1.0, 10.0)]
    floors = [rounding_floor(probe, p) for p in points]
    usable = [
        (p, f) for p, f in zip(points, floors, strict=True) if f < WORST_AMPLIFICATION * EPSILON
    ]
    # Adding a large number and taking it away again rounds: larger moves are allowed more.
    moves = ((0.1, 500.0), (1.0, 3e3), (30.0, 1e5))
    for (point, floor), (size, slack) in product(usable, moves):
        before = probe.outputs(point)
        after = probe.outputs(_replaced(probe, point, names, size))
        if relative_change(before, after) > min(10 * FINITE_TOLERANCE, slack * floor):
            return False
    return True


def _replaced(probe: Probe, point: Point, names: Sequence[str], size: float) -> Point:
    state = dict(point.state)
    for name in names:
        p = state[probe.own_name[name]]
        noise = torch.randn(p.shape, generator=probe.generator, dtype=torch.float64).to(p.device)
        state[probe.own_name[name]] = p + size * (p.abs().mean() + 1) * noise
    return Point(state, point.args, point.kwargs)


def missed_symmetries(rows: RadialRows, known: Sequence[Exponents]) -> list[dict[str, Fraction]]:
    """Return rational null vectors of the radial derivatives beyond the known symmetries.

    Args:
        rows: radial derivatives at random weights, at least as many rows as columns.
        known: symmetries that the units gave.

    Returns:
        A sparse basis of known and new ones together when the numbers show a clear gap and the
        null space is rational with small entries; nothing otherwise. The new ones are candidates:
        they still need certificates.
    """
    null = _numeric_null_space(rows)
    if null is None or null.shape[1] <= len(known):
        return []
    position = {n: i for i, n in enumerate(rows.names)}
    vectors = []
    for row in _reduced_echelon(null.T):
        entries = {
            i: Fraction(x).limit_denominator(24)
            for i, x in enumerate(row.tolist())
            if abs(x) > 1e-6
        }
        if any(abs(float(f) - row[i].item()) > 1e-6 or abs(f) > 24 for i, f in entries.items()):
            return []
        vectors.append(entries)
    mapped = [{position[n]: e for n, e in k.items() if n in position} for k in known]
    if not all(in_span(v, vectors) for v in mapped):
        return []
    return [{rows.names[i]: e for i, e in v.items()} for v in sparse_basis(vectors)]


def _numeric_null_space(rows: RadialRows) -> Tensor | None:
    scale = rows.bounds.square().mean(0).sqrt()
    largest = float(scale.max()) if len(scale) else 0.0
    if not largest or len(rows.values) < len(rows.names):
        return None
    scale = torch.where(scale <= 1e-9 * largest, torch.full_like(scale, largest), scale)
    matrix = rows.values / scale
    matrix = matrix / rows.bounds.div(scale).norm(dim=1, keepdim=True).clamp_min(1e-300)
    if not bool(matrix.isfinite().all()):
        return None
    _, s, vh = torch.linalg.svd(matrix)
    padded = torch.cat([s, s.new_zeros(1)]).clamp_min(1e-17 * float(s[0]))
    ratios = torch.where(s > 1e-12 * s[0], s / padded[1:], torch.zeros_like(s))
    rank = int(ratios.argmax()) + 1  # the widest gap between signal and rounding
    if float(ratios.max()) < SMALLEST_GAP:
        return None
    return vh[rank:].T / scale[:, None] * largest


def _reduced_echelon(rows: Tensor) -> Tensor:
    """Gauss-Jordan elimination with complete pivoting by column scale."""
    rows = rows.clone()
    rows = rows / rows.norm(dim=1, keepdim=True)
    for i in range(rows.shape[0]):
        rest = rows[i:].abs()
        flat = int(rest.argmax())
        r, c = i + flat // rows.shape[1], flat % rows.shape[1]
        rows[[i, r]] = rows[[r, i]]
        rows[i] = rows[i] / rows[i, c].clone()
        others = [j for j in range(rows.shape[0]) if j != i]
        rows[others] -= rows[others, c : c + 1] * rows[i]
    return rows
