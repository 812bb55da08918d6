"""Put families of shifts to the test: all weights moved at once, by random amounts.

Amounts are drawn; what the maps make of them (``W @ v``) is read off a run of the model at the
weights where it is tested, which follows the same rules on numbers. Then the weights are moved, and
the output must be the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from onsphere._torch.execution import ModelError, weights
from onsphere.symmetry.claims import ShiftFamily
from onsphere.symmetry.numeric.certificate import FINITE_TOLERANCE
from onsphere.symmetry.numeric.joint_tests import largest_changes
from onsphere.symmetry.numeric.probe import Point, Probe
from onsphere.symmetry.shifts.amounts import Amounts, learn
from onsphere.symmetry.shifts.families import Found
from onsphere.symmetry.shifts.solution import Solution


def certified(
    probe: Probe, solution: Solution, families: Sequence[Found], points: Iterable[Point]
) -> list[ShiftFamily]:
    """Return the families that hold under random amounts for all of them together.

    Args:
        probe: the model.
        solution: what was demanded of shifts, solved.
        families: what is claimed.
        points: weights and inputs; one at least.
    """
    if not families:
        return []
    generator = torch.Generator().manual_seed(0)  # of its own: other tests draw as without this
    changes = largest_changes(probe, families, partial(_moved, solution, generator), points)
    return [
        replace(f.family, change=change)
        for f, change in zip(families, changes, strict=True)
        if change <= FINITE_TOLERANCE
    ]


def _moved(
    solution: Solution,
    generator: torch.Generator,
    probe: Probe,
    families: Sequence[Found],
    point: Point,
) -> Point:
    """Return a point with all weights moved along some families."""
    labels = np.concatenate([f.labels for f in families])
    amounts = Amounts(solution, labels, generator)
    parameters, persistent = weights(probe.model)
    own = {n: point.state[n] for n in parameters}
    buffers = {n: point.state[n] for n, _ in probe.model.named_buffers()}
    try:
        learn(amounts, lambda: probe.outputs(point), own, buffers, persistent)
    except ModelError:
        return replace(point, state={n: t * torch.nan for n, t in point.state.items()})
    state = dict(point.state)
    for name, added in amounts.added().items():
        state[probe.own_name[name]] = state[probe.own_name[name]] + added.to(
            state[probe.own_name[name]]
        )
    return replace(point, state=state)
