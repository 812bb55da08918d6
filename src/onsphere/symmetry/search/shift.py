r"""Directions in which a weight can move without changing the function.

A common vector added to all rows before LayerNorm or softmax, a constant added to a filter before
weight standardization: entries that move together form the vectors of a
:class:`~onsphere.geometry.VectorAxes`, and the shift changes nothing when the gradient sums to 0
over each of them. Found by that sum, certified by a finite move.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes
from onsphere.symmetry.claims import ShiftFamily, ShiftMove
from onsphere.symmetry.numeric.certificate import (
    FINITE_TOLERANCE,
    RADIAL_TOLERANCE,
)
from onsphere.symmetry.numeric.joint_tests import largest_changes
from onsphere.symmetry.numeric.probe import Point, Probe
from onsphere.symmetry.search.granularity import divisors
from onsphere.symmetry.search.inert import along
from onsphere.symmetry.shifts.single_weights import decides

_FEW = 4
"""Along each axis, how many vectors are looked at first."""


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


class ShiftSearch:
    """Watches gradients go by, and remembers which weights' entries may move together.

    Args:
        shapes: of the weights to look at, by name.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self._shapes = shapes
        self._open = {n: _candidates(s) for n, s in shapes.items()}
        self._worst: dict[tuple[str, VectorAxes], float] = {}
        self._seen: dict[tuple[str, VectorAxes], Tensor] = {}

    def see(self, name: str, g: Tensor) -> None:
        """Drop the shifts of a weight that the gradient of a combination of outputs denies."""
        if not self._open.get(name):
            return
        largest = _largest(g)
        if largest != 0:  # a gradient of 0 says nothing
            self._open[name] = _surviving(name, self._open[name], g, largest, self._worst)
            for division in (d for family in self._open[name] for d in family if d.pieces):
                view, inside = division.split(g)
                reached = view.abs().sum(dim=inside) > 0
                before = self._seen.get((name, division))
                self._seen[name, division] = reached if before is None else before | reached

    def certified(
        self,
        probe: Probe,
        names: Sequence[str],
        points: Iterable[Point],
        known: Sequence[ShiftFamily] = (),
        few: Iterable[Point] = (),
    ) -> list[Shift]:
        """Return the shifts of the named weights that a finite random move confirms.

        Args:
            probe: the model.
            names: weights whose shifts are wanted.
            points: where to move them; random weights, so that nothing holds by accident.
            known: families of shifts, as operations tell them.
            few: where shifts are tested that follow from these.

        Returns:
            At most one shift per weight and axis: the finest division that holds.
        """
        seen = {name for name, _ in self._worst}
        wanted = [(n, d) for n in names if n in seen for d in _finest(self._reached(n))]
        alone = [f.moves[0] for f in known if len(f.moves) == 1 and not f.moves[0].map]
        told = [
            (n, d) for n, d in wanted
            if any(m.name == n and moves_alike(m, d, self._shapes[n]) for m in alone)
        ]  # fmt: skip
        rest = [pair for pair in wanted if pair not in told]
        changes = dict(zip(told, largest_changes(probe, told, _moved, few), strict=True))
        changes |= zip(rest, largest_changes(probe, rest, _moved, points), strict=True)
        return [
            Shift(name, division, self._worst[name, division], changes[name, division])
            for name, division in wanted
            if changes[name, division] <= FINITE_TOLERANCE
        ]

    def _reached(self, name: str) -> list[list[VectorAxes]]:
        """Leave out divisions into blocks of which some block never had a gradient."""
        return [
            kept
            for family in self._open[name]
            if (
                kept := [
                    d for d in family
                    if not d.pieces or bool(self._seen.get((name, d), torch.zeros(1)).all())
                ]
            )
        ]  # fmt: skip


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
    g: Tensor,
    largest: float,
    worst: dict[tuple[str, VectorAxes], float],
) -> list[list[VectorAxes]]:
    kept = []
    for family in families:
        if _is_unbalanced(g, family[0], largest):  # the coarsest fails, so all finer ones do
            continue
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


def _largest(g: Tensor) -> float:
    """Return the largest size of an entry, 0 where there is none."""
    if not g.numel():
        return 0.0
    return float(torch.stack((g.abs() if g.is_complex() else g).aminmax()).abs().max())


def _is_unbalanced(g: Tensor, division: VectorAxes, largest: float) -> bool:
    """Return whether the sums over a few vectors show already that they are not 0.

    No vector sums to more than its length times the largest entry, which saves looking at all.
    """
    view, inside = division.split(g)
    others = [a for a in range(view.ndim) if a not in inside]
    few = view
    for axis in others:
        few = few.narrow(axis, 0, min(_FEW, few.shape[axis]))
    most = torch.Size([view.shape[a] for a in inside]).numel() * largest
    return float(few.sum(dim=inside).abs().max()) > RADIAL_TOLERANCE * most


def _imbalance(g: Tensor, division: VectorAxes) -> float:
    view, inside = division.split(g)
    scale = float(view.abs().sum(dim=inside).max())
    return float(view.sum(dim=inside).abs().max()) / scale if scale else 0.0


def _finest(families: list[list[VectorAxes]]) -> list[VectorAxes]:
    finest = [max(f, key=lambda d: d.pieces[0][1] if d.pieces else 1) for f in families]
    single = [d for d in finest if len(d.index) != 1 or d.pieces]
    return single or finest


def moves_alike(move: ShiftMove, division: VectorAxes, shape: Sequence[int]) -> bool:
    """Return whether a move along a family can add to every vector an amount of its own.

    Args:
        move: of the only weight that moves in a family.
        division: which entries form one vector.
        shape: of the weight.

    Example:
        >>> from fractions import Fraction
        >>> common = ShiftMove("weight", Fraction(1), torch.zeros(1, 1, dtype=torch.long), (1,))
        >>> moves_alike(common, VectorAxes(index=(1,)), (4, 3))  # a vector added to all rows
        True
        >>> moves_alike(common, VectorAxes(index=(0,)), (4, 3))
        False
    """
    if bool((move.places < 0).any()):
        return False
    enumerated = {*division.index, *(axis for axis, *_ in (*division.pieces, *division.strided))}
    sizes = [n if a in enumerated else move.places.shape[a] for a, n in enumerate(shape)]
    taken = move.places.expand(sizes)
    for axis in enumerated & set(move.free):
        taken = taken * sizes[axis] + along(axis, torch.arange(sizes[axis]), len(sizes))
    vectors = division.gather(taken)
    vectors = vectors.reshape(-1, vectors.shape[-1])
    return decides(vectors, torch.arange(len(vectors))[:, None].expand_as(vectors))


def _moved(probe: Probe, wanted: Sequence[tuple[str, VectorAxes]], point: Point) -> Point:
    """Move every vector of some weights by its own common amount."""
    state = dict(point.state)
    for name, division in wanted:
        own = probe.own_name[name]
        p = state[own]
        vectors = division.gather(p)
        shape = vectors.shape[:-1]
        amounts = torch.randn(shape, generator=probe.generator, dtype=torch.float64).to(p)
        sizes = torch.rand(shape, generator=probe.generator, dtype=torch.float64).to(p)
        amounts = amounts * (p.abs().mean() + 1) * 10 ** (2 * sizes - 1)
        state[own] = division.scatter(vectors + amounts[..., None], p.shape)
    return replace(point, state=state)
