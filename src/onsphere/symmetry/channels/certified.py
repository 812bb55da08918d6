"""Put families of symmetries to the test: all channels rescaled at once, each by its own factor."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from onsphere._torch.memory import times
from onsphere.symmetry.claims import Family
from onsphere.symmetry.numeric.certificate import FINITE_TOLERANCE
from onsphere.symmetry.numeric.joint_tests import largest_changes
from onsphere.symmetry.numeric.probe import Point, Probe

_SPREAD = 1.0
"""Logarithm of the largest ratio of two factors of a family, half of it up and half down."""


def certified(probe: Probe, families: Sequence[Family], points: Iterable[Point]) -> list[Family]:
    """Return the families that hold: random factors for all channels of all of them together.

    A random combination of symmetries is one itself, and of directions one of which is none it is
    none, whatever the factors, but for a set of measure 0. So one evaluation per point tests all;
    only where that fails are they tested by halves.

    Args:
        probe: the model.
        families: what is claimed.
        points: weights and inputs; one at least.
    """
    if not families:
        return []
    changes = largest_changes(probe, families, _rescaled, points)
    return [f for f, c in zip(families, changes, strict=True) if c <= FINITE_TOLERANCE]


def _rescaled(probe: Probe, families: Sequence[Family], point: Point) -> Point:
    state = dict(point.state)
    shapes = {n: tuple(state[own].shape) for n, own in probe.own_name.items()}
    for family in families:
        largest = max(abs(float(s.exponent)) for s in family.slices)
        random = torch.rand(family.count, generator=probe.generator, dtype=torch.float64) - 0.5
        for name, moved in family.log_factors(_SPREAD / largest * random, shapes).items():
            own = probe.own_name[name]
            state[own] = times(state[own], moved.exp().to(state[own].device))
    return replace(point, state=state)
