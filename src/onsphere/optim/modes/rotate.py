"""Mode ``"rotate"``: vectors turn by the rate of their group, where the base's update points to."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from onsphere.geometry import Sphere
from onsphere.optim.distributed import sharded_step
from onsphere.optim.steps.displacement import Buffers, Displacements, steps_from_anywhere
from onsphere.optim.steps.project import ConstrainedParameters
from onsphere.optim.steps.sphere_step import advance_all
from onsphere.optim.updates.geodesic import StepOptions
from onsphere.optim.updates.per_vector import PerVectorUpdate
from onsphere.optim.updates.types import Family, Group, Part, rate_of

Closure = Callable[[], float]


def step_for_updates(
    base: Optimizer,
    moving: Sequence[Tensor],
    buffers: Buffers,
    guarded: Callable[[Displacements | None], Closure] | None,
) -> tuple[float | None, dict[Tensor, Tensor]]:
    """Step with the base, the weights kept; return the loss and what it adds to each.

    Args:
        base: the optimizer.
        moving: the weights on spheres that it moves.
        buffers: zeros to step from.
        guarded: makes the closure for the base, if there is one, that sees the weights where they
            are displaced.
    """
    if not steps_from_anywhere(base):
        before = [p.detach().clone() for p in moving]
        loss = base.step() if guarded is None else base.step(guarded(None))
        added = {p: p.detach() - x for p, x in zip(moving, before, strict=True)}
        for p, x in zip(moving, before, strict=True):
            p.copy_(x)
        return loss, added
    displaced = Displacements(moving, buffers)
    try:
        loss = base.step() if guarded is None else base.step(guarded(displaced))
    finally:
        added = displaced.arrive()
    return loss, added


def rotate(
    constrained: Iterable[ConstrainedParameters],
    groups: Iterable[Group],
    added: dict[Tensor, Tensor],
    buffers: Buffers,
    *,
    sharded: bool,
    before_turning: Callable[[torch.dtype, float], None],
) -> int | Tensor:
    """Turn the vectors of parameters that something was added to; return how many could not.

    Args:
        constrained: parameters on spheres.
        groups: the param groups of the base, for their rates.
        added: what the base adds to each parameter.
        buffers: in which this lies; zero afterwards.
        sharded: whether a parameter is spread over processes.
        before_turning: told the precision of a weight, and by how much it turns.
    """
    rates = {p: rate_of(group) for group in groups for p in group["params"]}
    alike: dict[tuple[Sphere, float], list[ConstrainedParameters]] = {}
    for held in constrained:
        if any(param in added for param in held.params):
            rate = _rate(rates[held.params[0]])
            before_turning(held.params[0].dtype, rate)
            alike.setdefault((held.sphere, rate), []).append(held)
    batches, moved = [], []
    for (sphere, rate), many in alike.items():
        families = []
        for held in many:
            parts = [_turning(p, added.get(p), sphere) for p in held.params]
            families.append(Family(parts, held.radius))
        options = StepOptions(rate, "angle", "projection", sphere.radius, sphere.centered)
        batches.append((families, sphere, options))
        moved += many
    left: int | Tensor = 0
    counts = (sharded_step.advance if sharded else advance_all)(batches)
    for held, count in zip(moved, itertools.chain(*counts), strict=True):
        held.skipped.add_(count)
        left = left + count
        if not isinstance(count, int) or count or held.sphere.centered:
            buffers.forget(held.params)
    return left


def _turning(param: Tensor, added: Tensor | None, sphere: Sphere) -> Part:
    """Turn a parameter towards what was added to it; that is zero afterwards, where it could."""
    if added is None:
        added = torch.zeros_like(param)
    if sphere.centered:  # which takes the mean off gradients only
        return Part(param, -added, None, None, PerVectorUpdate(0.0, 1.0, 1.0, 0.0))
    # As momentum that nothing remains of; the gradient has no weight but must be there.
    return Part(param, added, added, None, PerVectorUpdate(0.0, 0.0, 0.0, -1.0))


def _rate(lr: Any) -> float:
    if lr is None:
        raise ValueError(
            'mode="rotate" turns vectors by the lr of their param group, and this one has lr=None; '
            'give it a number of radians, or use mode="hard"'
        )
    return float(lr)
