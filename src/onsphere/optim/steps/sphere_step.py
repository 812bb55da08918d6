"""One step of many vectors: in pure PyTorch, or by the native kernels where they know how.

A *family* is a list of parts whose vectors belong together: one tensor, or the tensors of a joint
sphere, whose vectors number k are parts of one vector. What is summed over a vector is added over
the parts; processes that share a vector add theirs at the same place
(:mod:`~onsphere.optim.distributed.sharded_step`).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onsphere.geometry import Sphere
from onsphere.optim import kernels
from onsphere.optim.updates.geodesic import Plan, StepOptions, center_, limits_of
from onsphere.optim.updates.per_vector import PerVectorUpdate
from onsphere.optim.updates.types import Family, Part, StepBatch


def advance_all(batches: Sequence[StepBatch]) -> list[list[Tensor | int]]:
    """Do :func:`advance` for several sets of families, each on its sphere."""
    return [advance(*batch) for batch in batches]


def advance(families: Sequence[Family], sphere: Sphere, options: StepOptions) -> list[Tensor | int]:
    """Move all vectors by one step; return how many vectors of each family were not sound.

    A vector is not sound when it is zero or anything about it is not finite. It and its momentum
    stay as they were.
    """
    skipped: list[Tensor | int] = [0] * len(families)
    fast: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for number, family in enumerate(families):
        part = family.parts[0]
        if options.capturable or not kernels.takes(family.parts, sphere):
            skipped[number] = _advance_in_torch(family, sphere, options)
        elif sphere.joint:
            skipped[number] = _advance_jointly(family, sphere, options)
        else:
            fast.setdefault((part.point.dtype, part.point.device), []).append(number)
    for numbers in fast.values():
        counts = kernels.step([families[n] for n in numbers], sphere, options)
        for number, count in zip(numbers, counts, strict=True):
            skipped[number] = count
    return skipped


def _advance_in_torch(family: Family, sphere: Sphere, options: StepOptions) -> Tensor:
    views = [_views(part, sphere, options) for part in family.parts]
    numbers = sum(
        part.update.reduce(p, g, m, v, inside)
        for part, (p, g, m, v, inside) in zip(family.parts, views, strict=True)
    )
    assert isinstance(numbers, Tensor)
    plan = plan_for(family, _entries(family, sphere), options, numbers)
    for part, (p, g, m, v, inside) in zip(family.parts, views, strict=True):
        part.update.apply(p, g, m, v, inside, plan)
    return plan.skipped


def _advance_jointly(family: Family, sphere: Sphere, options: StepOptions) -> Tensor:
    numbers = sum(kernels.reduce(family.parts, sphere, options))
    assert isinstance(numbers, Tensor)
    plan = plan_for(family, _entries(family, sphere), options, numbers)
    kernels.apply(family.parts, sphere, options, plan)
    return plan.skipped


def reduce(part: Part, sphere: Sphere, options: StepOptions) -> Tensor:
    """Return the sums over each vector of one part, one vector per row."""
    if kernels.takes([part], sphere):
        return kernels.reduce([part], sphere, options)[0]
    p, g, m, v, inside = _views(part, sphere, options)
    return part.update.reduce(p, g, m, v, inside)


def follow(part: Part, sphere: Sphere, options: StepOptions, plan: Plan) -> None:
    """Move the vectors of one part as planned."""
    if kernels.takes([part], sphere):
        kernels.apply([part], sphere, options, plan)
    else:
        p, g, m, v, inside = _views(part, sphere, options)
        part.update.apply(p, g, m, v, inside, plan)


def plan_for(family: Family, entries: int, options: StepOptions, numbers: Tensor) -> Plan:
    """Plan for a family whose vectors have so many entries, all parts together.

    All of them have the update of the first.
    """
    first = family.parts[0]
    moment = None if family.moment is None else family.moment.view(-1)
    limits = limits_of(first.point.dtype)
    options = replace(options, reference=family.reference)
    return first.update.plan(numbers, family.radius.view(-1), moment, entries, options, limits)


def _entries(family: Family, sphere: Sphere) -> int:
    vectors = sphere.axes.count(family.parts[0].point.shape)
    return sum(part.point.numel() for part in family.parts) // max(1, vectors)


_Views = tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, ...]]


def _views(part: Part, sphere: Sphere, options: StepOptions) -> _Views:
    point, inside = sphere.axes.split(part.point)
    slope, _ = sphere.axes.split(-part.slope if options.ascend else part.slope)
    if options.centered:
        center_(point, inside)
        if isinstance(part.update, PerVectorUpdate):  # what is kept of the gradient is tangent
            slope = center_(slope.clone(), inside)
    momentum = None if part.momentum is None else sphere.axes.split(part.momentum)[0]
    moment = None if part.moment is None else sphere.axes.split(part.moment)[0]
    return point, slope, momentum, moment, inside
