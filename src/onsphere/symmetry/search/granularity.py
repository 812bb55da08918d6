r"""How finely a sphere divides: per filter, per group, per head, per expert, or the whole tensor.

If scaling one slice alone changes nothing, the slice's own radial derivative
:math:`\langle p_s, g_s\rangle` vanishes for every combination of the outputs. The finest division
for which all of them vanish is the answer, and a finite rescale of the slices by random factors
certifies it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes
from onsphere.symmetry.claims import Family, Slices
from onsphere.symmetry.numeric.certificate import (
    FINITE_TOLERANCE,
    RADIAL_TOLERANCE,
)
from onsphere.symmetry.numeric.joint_tests import largest_changes
from onsphere.symmetry.numeric.probe import Point, Probe
from onsphere.symmetry.numeric.radial_derivatives import RadialDerivatives, Row, slicings
from onsphere.symmetry.search.inert import SILENT

Exponents = Mapping[str, float]

SPREAD = 6.0
"""Slices are rescaled by factors up to e to half of this, either way: a function may be constant
for a while (a sign, a choice) and change in the end."""

LONE = 12.0
"""And one slice by this power of e more: a sum of all of them then has the sign of one."""


def divisors(n: int) -> list[int]:
    """Return the divisors of ``n`` between 1 and ``n``, both left out."""
    return [d for d in range(2, n) if n % d == 0]


def divisions(shape: Sequence[int], axis: int) -> list[VectorAxes]:
    """Return the ways to cut a tensor along an axis into vectors, finest first.

    Example:
        >>> [str(d.index or d.pieces) for d in divisions((4, 3), 0)]
        ['(0,)', '((0, 2),)']
    """
    length = shape[axis]
    pieces = [VectorAxes(pieces=((axis, n),)) for n in reversed(divisors(length))]
    return [*([VectorAxes(index=(axis,))] if length > 1 else []), *pieces]


def finest_divisions(
    probe: Probe,
    spheres: Sequence[Exponents],
    points: Iterable[Point],
    evidence: Sequence[RadialDerivatives | None],
    known: Sequence[VectorAxes],
) -> list[VectorAxes]:
    """Find for each sphere the finest division into spheres of their own.

    Args:
        probe: the model.
        spheres: exponents of the weights of each sphere; all of them positive.
        points: where divisions are certified; random weights, so that nothing holds by accident.
        evidence: what was gathered; ``None`` for a sphere of which gradients tell nothing.
        known: a division of each that holds; only finer ones are looked for.

    Returns:
        One division per sphere, the same for each of its weights.
    """
    state = probe.given().state
    candidates = [
        _finer(_candidates(probe, e, s, k), k, state[probe.own_name[next(iter(s))]].shape)
        for e, s, k in zip(evidence, spheres, known, strict=True)
    ]
    found = list(known)
    while any(candidates):
        asked = [i for i, c in enumerate(candidates) if c]
        tried = [(spheres[i], candidates[i].pop(0)) for i in asked]
        changes = largest_changes(probe, tried, _rescaled, points)
        for i, (_, division), change in zip(asked, tried, changes, strict=True):
            if change <= FINITE_TOLERANCE:
                found[i] = division
                candidates[i] = []
    return found


def entry_by_entry(
    probe: Probe,
    spheres: Mapping[str, RadialDerivatives | None],
    points: Iterable[Point],
    families: Sequence[Family],
) -> list[Family]:
    """Find gains on spheres each entry of which scales by itself, as only numbers tell.

    A norm behind a norm may divide by what no input moves; one after it forgets the scales.

    Args:
        probe: the model.
        spheres: weights on spheres of their own, and what was gathered, as for divisions.
        points: where the entries are put to the test.
        families: what is known already.
    """
    known = {f.names[0] for f in families if len(f.slices) == 1 and f.slices[0].index.shape[1] == 1}
    state = probe.given().state
    asked = []
    for name, evidence in spheres.items():
        shape = state[probe.own_name[name]].shape
        axes = [a for a, n in enumerate(shape) if n > 1]
        if len(axes) != 1 or evidence is None or name in known:
            continue
        if _is_without_slope(evidence, name):
            asked.append(({name: 1.0}, VectorAxes(index=(axes[0],))))
    changes = largest_changes(probe, asked, _rescaled, points) if asked else []
    found = []
    for (sphere, division), change in zip(asked, changes, strict=True):
        if change <= FINITE_TOLERANCE:
            ((name, _),), (axis,) = sphere.items(), division.index
            count = state[probe.own_name[name]].shape[axis]
            found.append(Family(
                (Slices(name, Fraction(1), (axis,), torch.arange(count)[:, None]),), count
            ))  # fmt: skip
    return found


def _is_without_slope(evidence: RadialDerivatives, name: str) -> bool:
    """Return whether the gradient of a weight is rounding, beside those of all others."""
    rows = [r.weights for r in evidence.rows if name in r.weights]
    bounds = [{n: float(s[()].size * s[()].slope) ** 0.5 for n, s in w.items()} for w in rows]
    return bool(rows) and all(b[name] <= SILENT * max(b.values()) for b in bounds)


def _candidates(
    probe: Probe, evidence: RadialDerivatives | None, sphere: Exponents, known: VectorAxes
) -> list[VectorAxes]:
    """Return divisions that the evidence allows, finest first; a finite rescale has the last word.

    Without evidence all divisions along one axis are tried. Along each axis alone it is complete.
    What holds along several axes may hold for all of their slices together.
    """
    shapes = [tuple(probe.given().state[probe.own_name[n]].shape) for n in sphere]
    if len(shapes) > 1 and len({s[:1] for s in shapes}) > 1:
        return []
    axes = [a for (a,) in slicings(len(shapes[0]))[1:]] if len(shapes) == 1 else [0]
    axes = axes if shapes[0] else []
    limit = 0 if len(shapes) > 1 else torch.Size(shapes[0]).numel() // 2  # two entries or more
    if evidence is None:
        fine = [d for a in axes for d in divisions(shapes[0], a)]
        return _largest_first(
            [d for d in fine if not limit or d.count(shapes[0]) <= limit], shapes[0]
        )
    single = [
        VectorAxes(index=(a,)) if a in known.index  # along this axis nothing is finer
        else next((d for d in divisions(shapes[0], a) if _allowed(evidence, sphere, a, d)), None)
        for a in axes
    ]  # fmt: skip
    held = [d for d in single if d is not None]
    joined = [_joined(some) for r in range(len(held), 0, -1) for some in combinations(held, r)]
    fine = [d for d in joined if not limit or d.count(shapes[0]) <= limit]
    return _largest_first(fine, shapes[0])


def _finer(some: Sequence[VectorAxes], known: VectorAxes, shape: Sequence[int]) -> list[VectorAxes]:
    """Leave out divisions that make no more vectors than one that holds."""
    return [d for d in some if d.count(shape) > known.count(shape)]


def _largest_first(some: Sequence[VectorAxes], shape: Sequence[int]) -> list[VectorAxes]:
    """Order divisions by how many vectors they make, the finest first."""
    return sorted(some, key=lambda d: -d.count(shape))


def _joined(some: Sequence[VectorAxes]) -> VectorAxes:
    """Cut along several axes at once."""
    return VectorAxes(
        tuple(a for d in some for a in d.index), tuple(p for d in some for p in d.pieces)
    )


def _allowed(
    evidence: RadialDerivatives, sphere: Exponents, axis: int, division: VectorAxes
) -> bool:
    told = False
    for row in evidence.rows:
        says = _is_radial(row, sphere, axis, division)
        if says is False:
            return False
        told |= says is True
    return told


def _is_radial(row: Row, sphere: Exponents, axis: int, division: VectorAxes) -> bool | None:
    """Return whether gradients allow a division; ``None`` where there are none."""
    parts = [
        (exponent, *row.weights[name][axis,].divided(division))
        for name, exponent in sphere.items()
        if name in row.weights
    ]
    if not parts:
        return None
    total = torch.stack([e * radial for e, radial, _ in parts]).sum(0)
    bound = torch.stack([e * limit for e, _, limit in parts]).sum(0)
    if not bool(bound.any()):
        return None
    floor = 1e-3 * RADIAL_TOLERANCE * float(bound.max())
    return bool((total.abs() <= RADIAL_TOLERANCE * bound + floor).all())


def _rescaled(probe: Probe, some: Sequence[tuple[Exponents, VectorAxes]], point: Point) -> Point:
    """Rescale every vector of some weights by its own factor."""
    state = dict(point.state)
    for sphere, division in some:
        count = division.count(state[probe.own_name[next(iter(sphere))]].shape)
        strengths = torch.rand(count, generator=probe.generator, dtype=torch.float64) - 0.5
        powers = SPREAD * strengths
        if count > 1:
            powers[int(torch.randint(count, (), generator=probe.generator))] += LONE
        largest = max(map(abs, sphere.values()))
        for name, exponent in sphere.items():
            own, factors = probe.own_name[name], (exponent / largest * powers).exp()
            state[own] = scaled_slices(state[own], division, factors)
    return replace(point, state=state)


def scaled_slices(x: Tensor, division: VectorAxes, factors: Tensor) -> Tensor:
    """Multiply every vector of a tensor by its own factor."""
    vectors = division.gather(x)
    factors = factors.to(x).reshape(vectors.shape[:-1])
    return division.scatter(vectors * factors[..., None], x.shape)


def described(division: VectorAxes, shape: Sequence[int], roles: frozenset[str]) -> str:
    """Say in words how a tensor is divided.

    Args:
        division: how.
        shape: of the tensor.
        roles: what the model does with it: ``"convolution"``, ``"transposed"`` (convolution),
            ``"experts"``, ``"heads=4"``.

    Example:
        >>> described(VectorAxes(index=(0,)), (8, 3, 3, 3), frozenset({"convolution"}))
        'per filter'
        >>> described(VectorAxes(pieces=((0, 4),)), (32, 16), frozenset({"heads=4"}))
        'per head'
        >>> described(VectorAxes(strided=((0, 4, 4),)), (32, 16), frozenset())
        'per 2 rows, 4 apart'
        >>> described(VectorAxes(), (4, 4), frozenset())
        'whole tensor'
    """
    return " and ".join(_parts(division, shape, roles)) or "whole tensor"


def _parts(division: VectorAxes, shape: Sequence[int], roles: frozenset[str]) -> Iterator[str]:
    experts = "experts" in roles
    for axis in division.index:
        if axis == 0 and experts:
            yield "per expert"
        elif "transposed" in roles:
            yield {0: "per input channel", 1: "per filter"}.get(axis, f"per entry of axis {axis}")
        elif axis == 0 and ("convolution" in roles or len(shape) > 2):
            yield "per filter"
        elif len(shape) == 1:
            yield "per entry"
        elif axis == 0:
            yield "per row"
        elif "convolution" in roles:
            yield "per input channel" if axis == 1 else f"per entry of axis {axis}"
        else:
            yield "per column" if axis == len(shape) - 1 else "per row"
    for axis, count in division.pieces:
        heads = any(_divides(count, role) for role in roles)
        length = shape[axis] // count
        yield "per head" if heads else f"per group of {length}{_of(axis, shape)}"
    for axis, count, step in division.strided:
        yield f"per {shape[axis] // (count * step)}{_of(axis, shape) or ' entries'}, {step} apart"


def _divides(count: int, role: str) -> bool:
    kind, _, number = role.partition("=")
    return kind == "heads" and int(number) % count == 0


def _of(axis: int, shape: Sequence[int]) -> str:
    if len(shape) == 1:
        return ""
    return " rows" if axis == 0 else " columns" if axis == len(shape) - 1 else f" along axis {axis}"
