r"""Directions in which a weight can move without changing the function.

A common vector added to all rows before LayerNorm or softmax, a constant added to a filter before
weight standardization: entries that move together form the vectors of a
:class:`~onsphere.geometry.VectorAxes`, and the shift changes nothing when the gradient sums to 0
over each of them. Found by that sum, certified by a finite move.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes
from onsphere.symmetry.certificate import FINITE_TOLERANCE, RADIAL_TOLERANCE, relative_change
from onsphere.symmetry.granularity import divisors
from onsphere.symmetry.probe import Gradients, Point, Probe


@dataclass(frozen=True)
class Shift:
    """A weight whose entries can move together.

    Args:
        name: the weight.
        axes: entries that move by a common amount form one vector; each vector moves freely.
        residual: largest relative sum of the gradient over a vector, eps near 0.
        change: relative change of the output under a random finite move.
    """

    name: str
    axes: VectorAxes
    residual: float
    change: float


def find_shifts(
    probe: Probe, names: Sequence[str], points: Sequence[Point], *, cotangents: int = 3
) -> list[Shift]:
    """Find the shifts of every named weight; each is certified.

    Args:
        probe: the model.
        names: weights to look at.
        points: where to measure; random weights, so that nothing holds by accident.
        cotangents: random combinations of the outputs per point.

    Returns:
        At most one shift per weight and axis: the finest division that holds.
    """
    candidates = {n: _candidates(points[0].state[probe.own_name[n]].shape) for n in names}
    worst: dict[tuple[str, VectorAxes], float] = {}
    for point in points:
        for gradients in probe.gradients(point, cotangents):
            for name in names:
                candidates[name] = _surviving(name, candidates[name], gradients, worst)
    wanted = [(n, d) for n in names for d in _finest(candidates[n])]
    changes = _changes(probe, wanted, points)
    return [
        Shift(name, division, worst.get((name, division), 0.0), change)
        for (name, division), change in zip(wanted, changes, strict=True)
        if change <= FINITE_TOLERANCE
    ]


def _changes(
    probe: Probe, wanted: Sequence[tuple[str, VectorAxes]], points: Sequence[Point]
) -> list[float]:
    """Move everything at once; look for the culprits one by one if that changes the output."""
    together = max((_moved(probe, wanted, p) for p in points), default=0.0)
    if together <= FINITE_TOLERANCE:
        return [together] * len(wanted)
    return [max(_moved(probe, [w], p) for p in points) for w in wanted]


def _candidates(shape: Sequence[int]) -> list[list[VectorAxes]]:
    """Return families of divisions, coarsest first: each implies the ones before it."""
    families = []
    for axis, size in enumerate(shape):
        if size > 1:
            rest = tuple(a for a in range(len(shape)) if a != axis)
            pieces = [VectorAxes(rest, ((axis, n),)) for n in divisors(size)]
            families.append([VectorAxes(index=rest), *pieces])
    if len(shape) > 2:
        families.append([VectorAxes(index=(0,))])
    return families


def _surviving(
    name: str,
    families: list[list[VectorAxes]],
    gradients: Gradients,
    worst: dict[tuple[str, VectorAxes], float],
) -> list[list[VectorAxes]]:
    g = gradients.by_name.get(name)
    if g is None:
        return families
    kept = []
    for family in families:
        alive = []
        for i, division in enumerate(family):
            ratio = _imbalance(g, division)
            if ratio <= RADIAL_TOLERANCE:
                alive.append(division)
                worst[name, division] = max(worst.get((name, division), 0.0), ratio)
            elif i == 0:  # the coarsest fails, so all finer ones do
                break
        if alive:
            kept.append(alive)
    return kept


def _imbalance(g: Tensor, division: VectorAxes) -> float:
    view, inside = division.split(g)
    scale = float(view.abs().sum(dim=inside).max())
    return float(view.sum(dim=inside).abs().max()) / scale if scale else 0.0


def _finest(families: list[list[VectorAxes]]) -> list[VectorAxes]:
    finest = [max(f, key=lambda d: d.pieces[0][1] if d.pieces else 1) for f in families]
    single = [d for d in finest if len(d.index) != 1 or d.pieces]
    return single or finest


def _moved(probe: Probe, wanted: Sequence[tuple[str, VectorAxes]], point: Point) -> float:
    state = dict(point.state)
    for name, division in wanted:
        own = probe.own_name[name]
        p = state[own]
        vectors = division.gather(p)
        shape = vectors.shape[:-1]
        amounts = torch.randn(shape, generator=probe.generator, dtype=torch.float64).to(p)
        amounts = amounts * p.abs().mean().clamp_min(1e-3)
        state[own] = division.scatter(vectors + amounts[..., None], p.shape)
    moved = Point(state, point.args, point.kwargs)
    return relative_change(probe.outputs(point), probe.outputs(moved))
