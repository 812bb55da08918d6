"""Is a gradient that of the function? Central differences tell.

It is not where a scale is detached, and where rounding hides the gradient alone: of equal tokens
the difference is 0 whatever the weights, and divided by its norm has a gradient as large as an eps
is small, of which sums leave the rounding.
"""

from collections.abc import Sequence
from itertools import compress

import torch

from onsphere.symmetry.numeric.probe import Point, Probe
from onsphere.symmetry.numeric.radial_derivatives import inner

_STEP = 1e-6
"""Logarithm of the factors between which differences are taken."""
_ERROR = 1e-4
"""Share of the largest slope by which they may be off: a ReLU may turn over within the step."""
_ROUNDING = 1e-14
"""Share of the output that is rounding."""


def slope_differs(probe: Probe, point: Point, names: Sequence[str]) -> bool:
    """Return whether central differences along a random rescale deny the gradients at a point.

    Args:
        probe: the model.
        point: where.
        names: weights that are rescaled, each up or down.
    """

    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    passes = list(probe.gradients(point, 1, names=names, generator=seed()))
    if not passes:
        return False
    (found,) = passes
    signs = (1.0 - 2.0 * torch.randint(2, (len(names),), generator=seed())).tolist()
    steps = dict(zip(names, signs, strict=True))
    slope = bound = 0.0
    for name, g in found.by_name.items():
        p = point.state[probe.own_name[name]]
        slope += steps[name] * inner(p, g)
        bound += float(p.norm() * g.norm())

    def combined(step: float) -> float:
        moved = probe.rescaled(point, {n: step * sign for n, sign in steps.items()})
        outputs = [*compress(probe.outputs(moved), found.combines)]
        return float(probe.combined(outputs, seed()))

    measured = (combined(_STEP) - combined(-_STEP)) / (2 * _STEP)
    return abs(measured - slope) > _ERROR * bound + _ROUNDING / _STEP * found.output
