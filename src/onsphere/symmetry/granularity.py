r"""How finely a sphere divides: per filter, per group, per head, per expert, or the whole tensor.

If scaling one slice alone changes nothing, the slice's own radial derivative
:math:`\langle p_s, g_s\rangle` vanishes for every combination of the outputs. One backward pass
gives it for every slice of every weight at once; the finest division for which all of them vanish
is the answer, and a finite rescale of the slices by random factors certifies it.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes
from onsphere.symmetry.certificate import FINITE_TOLERANCE, RADIAL_TOLERANCE, relative_change
from onsphere.symmetry.probe import Gradients, Point, Probe

Weights = tuple[str, ...]
"""Weights that share their spheres: usually one, or a layer's weight and bias."""


def divisors(n: int) -> list[int]:
    """Return the divisors of ``n`` between 1 and ``n``, both left out."""
    return [d for d in range(2, n) if n % d == 0]


def divisions(shape: Sequence[int]) -> list[VectorAxes]:
    """Return the ways to cut a tensor into vectors of two entries or more, finest first.

    Whole axes enumerate vectors, and at most one axis (of the first three) is cut into pieces.

    Example:
        >>> [str(d.index or d.pieces) for d in divisions((4, 3))]
        ['(0,)', '(1,)', '((0, 2),)', '()']
    """
    axes = range(len(shape))
    found = [VectorAxes(index=c) for r in axes for c in combinations(axes, r)]
    for cut in axes[:3]:
        others = [a for a in axes if a != cut][:3]
        for r in range(len(others)):
            for index in combinations(others, r):
                found += [VectorAxes(index, ((cut, n),)) for n in divisors(shape[cut])]
    size = torch.Size(shape).numel()
    found = [d for d in found if 2 * d.count(shape) <= size or d == VectorAxes()]
    return sorted(found, key=lambda d: (-d.count(shape), len(d.pieces), d.index, d.pieces))


def joint_divisions(shapes: Sequence[Sequence[int]]) -> list[VectorAxes]:
    """Return the ways to cut several tensors alike along their first axis, finest first."""
    if len({s[0] if len(s) else 0 for s in shapes}) != 1 or not shapes[0]:
        return [VectorAxes()]
    length = shapes[0][0]
    pieces = [VectorAxes(pieces=((0, n),)) for n in reversed(divisors(length))]
    return [*([VectorAxes(index=(0,))] if length > 1 else []), *pieces, VectorAxes()]


def finest_divisions(
    probe: Probe,
    spheres: Sequence[Mapping[str, float]],
    points: Sequence[Point],
    *,
    cotangents: int = 3,
) -> list[VectorAxes]:
    """Find for each sphere the finest division into spheres of their own.

    Args:
        probe: the model.
        spheres: exponents of the weights of each sphere; all of them positive.
        points: where to measure; random weights, so that nothing holds by accident.
        cotangents: random combinations of the outputs per point.

    Returns:
        One division per sphere, the same for each of its weights.
    """
    candidates = [_candidates(probe, points[0], sphere) for sphere in spheres]
    for point in points:
        for gradients in probe.gradients(point, cotangents):
            for i, sphere in enumerate(spheres):
                candidates[i] = [
                    d for d in candidates[i] if _all_radial(probe, point, gradients, sphere, d)
                ]
    return [
        next((d for d in found if _certified(probe, sphere, d, points)), VectorAxes())
        for sphere, found in zip(spheres, candidates, strict=True)
    ]


def _candidates(probe: Probe, point: Point, sphere: Mapping[str, float]) -> list[VectorAxes]:
    shapes = [point.state[probe.own_name[n]].shape for n in sphere]
    found = divisions(shapes[0]) if len(shapes) == 1 else joint_divisions(shapes)
    return [d for d in found if d != VectorAxes()]


def _all_radial(
    probe: Probe,
    point: Point,
    gradients: Gradients,
    sphere: Mapping[str, float],
    division: VectorAxes,
) -> bool:
    total: Tensor | float = 0.0
    bound: Tensor | float = 0.0
    for name, exponent in sphere.items():
        g = gradients.by_name.get(name)
        if g is None:
            continue
        p = point.state[probe.own_name[name]]
        total = total + exponent * _sums(division, p * g)
        bound = bound + exponent * _sums(division, p * p).sqrt() * _sums(division, g * g).sqrt()
    if not isinstance(total, Tensor) or not isinstance(bound, Tensor):
        return True
    floor = 1e-3 * RADIAL_TOLERANCE * float(bound.max())
    return bool((total.abs() <= RADIAL_TOLERANCE * bound + floor).all())


def _sums(division: VectorAxes, x: Tensor) -> Tensor:
    view, inside = division.split(x)
    return view.sum(dim=inside).flatten() if inside else view.flatten()


def _certified(
    probe: Probe, sphere: Mapping[str, float], division: VectorAxes, points: Sequence[Point]
) -> bool:
    for point in points:
        state = dict(point.state)
        count = division.count(state[probe.own_name[next(iter(sphere))]].shape)
        strengths = torch.rand(count, generator=probe.generator, dtype=torch.float64) - 0.5
        for name, exponent in sphere.items():
            own = probe.own_name[name]
            state[own] = scaled_slices(state[own], division, (exponent * strengths).exp())
        after = probe.outputs(Point(state, point.args, point.kwargs))
        if relative_change(probe.outputs(point), after) > FINITE_TOLERANCE:
            return False
    return True


def scaled_slices(x: Tensor, division: VectorAxes, factors: Tensor) -> Tensor:
    """Multiply every vector of a tensor by its own factor."""
    vectors = division.gather(x)
    factors = factors.to(x).reshape(vectors.shape[:-1])
    return division.scatter(vectors * factors[..., None], x.shape)


def described(division: VectorAxes, shape: Sequence[int]) -> str:
    """Say in words how a tensor is divided.

    Example:
        >>> described(VectorAxes(index=(0,)), (8, 3, 3, 3)), described(VectorAxes(), (4, 4))
        ('per filter', 'whole tensor')
    """
    return " and ".join(_parts(division, shape)) or "whole tensor"


def _parts(division: VectorAxes, shape: Sequence[int]) -> Iterator[str]:
    for axis in division.index:
        first = {2: "per row", 3: "per expert"}.get(len(shape), "per filter")
        yield (
            first if axis == 0 else "per column" if len(shape) == 2 else f"per entry of axis {axis}"
        )
    for axis, count in division.pieces:
        yield f"per block of {shape[axis] // count} along axis {axis}"
