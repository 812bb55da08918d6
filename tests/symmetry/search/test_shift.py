"""Shifts of single weights: which of them families tell already."""

from fractions import Fraction
from math import prod

import pytest
import torch
from torch import nn

from onsphere.geometry import VectorAxes
from onsphere.symmetry import audit
from onsphere.symmetry.claims import ShiftMove
from onsphere.symmetry.exact.trace import trace
from onsphere.symmetry.numeric.probe import Probe
from onsphere.symmetry.search.shift import ShiftSearch, moves_alike


def _move(places: list[object], free: tuple[int, ...] = ()) -> ShiftMove:
    return ShiftMove("weight", Fraction(1), torch.tensor(places), free)


@pytest.mark.parametrize(
    ("move", "division", "shape", "told"),
    [
        (_move([[0]], (1,)), VectorAxes(index=(1,)), (4, 3), True),
        (_move([[0]], (1,)), VectorAxes(index=(0,)), (4, 3), False),
        (_move([[0]], (1,)), VectorAxes(), (4, 3), True),
        (_move([[0]], (1,)), VectorAxes(index=(0, 1)), (4, 3), False),
        (_move([0, 1, 2, 3]), VectorAxes(), (4,), True),
        (_move([0, 1, 2, 3]), VectorAxes(pieces=((0, 2),)), (4,), True),
        (_move([0, 0, 1, 1]), VectorAxes(pieces=((0, 2),)), (4,), True),
        (_move([0, 1, 0, 1]), VectorAxes(pieces=((0, 2),)), (4,), False),
        (_move([0, 0, 0, 0]), VectorAxes(pieces=((0, 2),)), (4,), False),
        (_move([0, 1, 2, -1]), VectorAxes(), (4,), False),
        (_move([[0], [1]], (1,)), VectorAxes(index=(0, 1)), (2, 3), True),
    ],
)
def test_what_a_family_moves(
    move: ShiftMove, division: VectorAxes, shape: tuple[int, ...], told: bool
) -> None:
    assert moves_alike(move, division, shape) is told


@pytest.mark.parametrize(
    ("move", "division", "shape"),
    [
        (_move([[0], [1], [0], [1]], (1,)), VectorAxes(index=(1,)), (4, 3)),
        (_move([[0], [1], [0], [1]], (1,)), VectorAxes(pieces=((0, 2),)), (4, 3)),
        (_move([[0, 1, 2], [2, 1, 0]]), VectorAxes(index=(0,)), (2, 3)),
        (_move([[0, 0, 1], [2, 2, 3]]), VectorAxes(index=(0,)), (2, 3)),
    ],
)
def test_is_the_span_of_directions(
    move: ShiftMove, division: VectorAxes, shape: tuple[int, ...]
) -> None:
    """A division is told where its directions are combinations of those of the family."""
    labels = move.places.expand(shape).clone()
    for axis in move.free:
        steps = torch.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(2)])
        labels = labels * shape[axis] + steps
    family = torch.stack([(labels == v).double().flatten() for v in labels.unique()])
    vectors = division.gather(torch.arange(prod(shape)).reshape(shape))
    moved = torch.zeros(vectors.flatten(0, -2).shape[0], prod(shape), dtype=torch.float64)
    moved.scatter_(1, vectors.flatten(0, -2), 1.0)
    rank = torch.linalg.matrix_rank(family)
    told = bool(torch.linalg.matrix_rank(torch.cat([family, moved])) == rank)
    assert moves_alike(move, division, shape) is told


def test_an_audit_lists_what_families_tell() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.Softmax(-1))
    found = audit(net, torch.randn(3, 5))
    assert {(s.name, s.axes) for s in found.shifts} == {
        ("0.weight", VectorAxes(index=(1,))),
        ("0.bias", VectorAxes()),
        ("2.weight", VectorAxes(index=(1,))),
        ("2.bias", VectorAxes()),
    }
    assert all(s.change <= 1e-10 for s in found.shifts)


def test_gradients_without_entries_say_nothing() -> None:
    search = ShiftSearch({"empty": (0, 3), "weight": (2, 3), "complex": (2, 3)})
    search.see("empty", torch.zeros(0, 3))
    search.see("weight", torch.ones(2, 3))
    search.see("complex", torch.ones(2, 3, dtype=torch.complex128))
    net = nn.Linear(3, 2)
    probe = Probe(net, (torch.randn(4, 3),), {}, trace(net, torch.randn(4, 3)))
    assert search.certified(probe, ["empty", "weight", "complex"], []) == []
