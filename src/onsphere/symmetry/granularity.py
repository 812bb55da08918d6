r"""How finely a sphere divides: per filter, per group, per head, per expert, or the whole tensor.

If scaling one slice alone changes nothing, the slice's own radial derivative
:math:`\langle p_s, g_s\rangle` vanishes for every combination of the outputs. The finest division
for which all of them vanish is the answer, and a finite rescale of the slices by random factors
certifies it.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes
from onsphere.symmetry.certificate import FINITE_TOLERANCE, RADIAL_TOLERANCE, relative_change
from onsphere.symmetry.evidence import Evidence, Row, slicings
from onsphere.symmetry.probe import Point, Probe
from onsphere.symmetry.sifting import sift

Exponents = Mapping[str, float]


def divisors(n: int) -> list[int]:
    """Return the divisors of ``n`` between 1 and ``n``, both left out."""
    return [d for d in range(2, n) if n % d == 0]


def divisions(shape: Sequence[int]) -> list[VectorAxes]:
    """Return the ways to cut a tensor into vectors of two entries or more, finest first.

    Whole axes enumerate vectors, and at most one axis is cut into pieces; only the first three
    axes take part.

    Example:
        >>> [str(d.index or d.pieces) for d in divisions((4, 3))]
        ['(0,)', '(1,)', '((0, 2),)']
    """
    found = []
    for axes in slicings(len(shape)):
        if not axes:
            continue
        found.append(VectorAxes(index=axes))
        for cut in axes:
            others = tuple(a for a in axes if a != cut)
            found += [VectorAxes(others, ((cut, n),)) for n in divisors(shape[cut])]
    size = torch.Size(shape).numel()
    found = [d for d in found if 1 < d.count(shape) <= size // 2]
    return sorted(found, key=lambda d: (-d.count(shape), len(d.pieces), d.index, d.pieces))


def joint_divisions(shapes: Sequence[Sequence[int]]) -> list[VectorAxes]:
    """Return the ways to cut several tensors alike along their first axis, finest first."""
    if len({s[0] if len(s) else 0 for s in shapes}) != 1 or not shapes[0]:
        return []
    length = shapes[0][0]
    pieces = [VectorAxes(pieces=((0, n),)) for n in reversed(divisors(length))]
    return [*([VectorAxes(index=(0,))] if length > 1 else []), *pieces]


def finest_divisions(
    probe: Probe, spheres: Sequence[Exponents], points: Sequence[Point], evidence: Evidence
) -> list[VectorAxes]:
    """Find for each sphere the finest division into spheres of their own.

    Args:
        probe: the model.
        spheres: exponents of the weights of each sphere; all of them positive.
        points: where divisions are certified; random weights, so that nothing holds by accident.
        evidence: what was gathered.

    Returns:
        One division per sphere, the same for each of its weights.
    """
    candidates = [
        [d for d in _candidates(probe, s) if all(_is_radial(r, s, d) for r in evidence.rows)]
        for s in spheres
    ]
    found = [VectorAxes()] * len(spheres)
    open_ = [i for i, c in enumerate(candidates) if c]
    while open_:
        tried = [(spheres[i], candidates[i][0]) for i in open_]
        changes = sift(tried, lambda some: _change(probe, some, points), FINITE_TOLERANCE)
        for i, change in zip(list(open_), changes, strict=True):
            if change <= FINITE_TOLERANCE:
                found[i] = candidates[i][0]
                candidates[i] = []
            else:
                candidates[i].pop(0)
        open_ = [i for i in open_ if candidates[i]]
    return found


def _candidates(probe: Probe, sphere: Exponents) -> list[VectorAxes]:
    shapes = [probe.given().state[probe.own_name[n]].shape for n in sphere]
    return divisions(shapes[0]) if len(shapes) == 1 else joint_divisions(shapes)


def _is_radial(row: Row, sphere: Exponents, division: VectorAxes) -> bool:
    axes = tuple(sorted([*division.index, *(a for a, _ in division.pieces)]))
    parts = [
        (exponent, *row.weights[name][axes].divided(division))
        for name, exponent in sphere.items()
        if name in row.weights
    ]
    if not parts:
        return True
    total = torch.stack([e * radial for e, radial, _ in parts]).sum(0)
    bound = torch.stack([e * limit for e, _, limit in parts]).sum(0)
    floor = 1e-3 * RADIAL_TOLERANCE * float(bound.max())
    return bool((total.abs() <= RADIAL_TOLERANCE * bound + floor).all())


def _change(
    probe: Probe, some: Sequence[tuple[Exponents, VectorAxes]], points: Sequence[Point]
) -> float:
    """Rescale every vector of some weights by its own factor; return the change of the output."""
    worst = 0.0
    for point in points:
        state = dict(point.state)
        for sphere, division in some:
            count = division.count(state[probe.own_name[next(iter(sphere))]].shape)
            strengths = torch.rand(count, generator=probe.generator, dtype=torch.float64) - 0.5
            for name, exponent in sphere.items():
                own = probe.own_name[name]
                state[own] = scaled_slices(state[own], division, (exponent * strengths).exp())
        after = probe.outputs(Point(state, point.args, point.kwargs))
        worst = max(worst, relative_change(probe.baseline(point), after))
    return worst


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
        roles: what the model does with it: ``"convolution"``, ``"experts"``, ``"heads=4"``.

    Example:
        >>> described(VectorAxes(index=(0,)), (8, 3, 3, 3), frozenset({"convolution"}))
        'per filter'
        >>> described(VectorAxes(pieces=((0, 4),)), (32, 16), frozenset({"heads=4"}))
        'per head'
        >>> described(VectorAxes(), (4, 4), frozenset())
        'whole tensor'
    """
    return " and ".join(_parts(division, shape, roles)) or "whole tensor"


def _parts(division: VectorAxes, shape: Sequence[int], roles: frozenset[str]) -> Iterator[str]:
    experts = "experts" in roles
    for axis in division.index:
        if axis == 0 and experts:
            yield "per expert"
        elif axis == 0 and "convolution" in roles:
            yield "per filter"
        elif axis == 0 and len(shape) <= 2:
            yield "per row"
        elif "convolution" in roles:
            yield "per input channel" if axis == 1 else f"per entry of axis {axis}"
        else:
            yield "per column" if axis == len(shape) - 1 else "per row"
    for axis, count in division.pieces:
        heads = any(_divides(count, role) for role in roles)
        length = shape[axis] // count
        yield "per head" if heads else f"per group of {length}{_of(axis, shape)}"


def _divides(count: int, role: str) -> bool:
    kind, _, number = role.partition("=")
    return kind == "heads" and int(number) % count == 0


def _of(axis: int, shape: Sequence[int]) -> str:
    if len(shape) == 1:
        return ""
    return " rows" if axis == 0 else " columns" if axis == len(shape) - 1 else f" along axis {axis}"
