"""Steps of weights that are spread over processes.

A vector that lies whole in one process is moved there, as if there were no other. Of a vector that
the sharding cuts, every process reduces its part, one all-reduce adds the sums of all of them, and
each process plans for itself, from the same bits. Which vectors are cut is arithmetic on sizes
(:mod:`~onsphere.optim.distributed.partition`), so all processes know without asking.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from onsphere.geometry import Sphere
from onsphere.optim.distributed.placement import (
    LocalShard,
    Placement,
    add_up,
    local,
    numbers,
    placement_of,
)
from onsphere.optim.steps import project, sphere_step
from onsphere.optim.steps.project import ConstrainedParameters
from onsphere.optim.updates.geodesic import Plan, StepOptions, spread, total, working_dtype
from onsphere.optim.updates.per_vector import PerVectorUpdate
from onsphere.optim.updates.types import Family, Part, StepBatch


def advance(batches: Sequence[StepBatch]) -> list[list[Tensor | int]]:
    """Do what :func:`~onsphere.optim.steps.sphere_step.advance` does, for families anywhere.

    Args:
        batches: families, their sphere, options of the step; the same in all processes.

    Returns:
        How many vectors of each family were not sound: of those that lie in this process, or of
        all where they are cut.
    """
    counts: list[list[Tensor | int]] = [[0] * len(families) for families, _, _ in batches]
    cut_families: dict[tuple[int, int], _CutFamily] = {}
    for number, (families, sphere, options) in enumerate(batches):
        whole: dict[Sphere, list[int]] = {}
        here = [_local_family(family) for family in families]
        for position, family in enumerate(families):
            params = [part.point for part in family.parts]
            placement = placement_of(params, sphere)
            shards = placement.shards(sphere, params[0].device)
            if placement.spread:
                entries = sum(p.numel() for p in params) // family.radius.numel()
                cut_family = _CutFamily(here[position], placement, shards, options, entries)
                cut_families[number, position] = cut_family
            elif shards[0] is not None:
                whole.setdefault(shards[0].sphere, []).append(position)
        for own, positions in whole.items():
            moved = sphere_step.advance([here[k] for k in positions], own, options)
            for position, count in zip(positions, moved, strict=True):
                counts[number][position] = count
    counted = _step_together(list(cut_families.values()))
    for (number, position), count in zip(cut_families, counted, strict=True):
        counts[number][position] = count
    return counts


def _local_family(family: Family) -> Family:
    parts = [
        Part(
            local(part.point),
            local(part.slope),
            None if part.momentum is None else local(part.momentum),
            None if part.moment is None else local(part.moment),
            part.update,
        )
        for part in family.parts
    ]
    moment = None if family.moment is None else local(family.moment)
    return Family(parts, local(family.radius), moment, family.reference)


@dataclass
class _CutFamily:
    """A family with vectors that are cut, between the sums of its parts and its plan.

    Attributes:
        family: what this process holds.
        placement: where all of it lies.
        shards: which vectors the parts here belong to.
        options: how far they move, and along which curve.
        entries: of one vector, in all processes.
    """

    family: Family
    placement: Placement
    shards: tuple[LocalShard | None, ...]
    options: StepOptions
    entries: int

    def sums(self, width: int, of: Callable[[Part, Sphere], Tensor]) -> Tensor:
        """Return what this process adds to the sums over all vectors."""
        radius = self.family.radius
        sums = radius.new_zeros((radius.numel(), width), dtype=torch.float64)
        for part, shard in zip(self.family.parts, self.shards, strict=True):
            if shard is not None and shard.is_primary:
                mine = of(part, shard.sphere)
                sums.index_add_(0, shard.owner, pad(mine, (0, width - mine.shape[-1])))
        return sums

    def products(self) -> Tensor:
        """Return the inner products that the plan needs, as far as they are known here."""
        width = type(self.family.parts[0].update).width
        path = replace(self.options, centered=False)  # a mean needs its own sum, added before
        return self.sums(width, lambda part, sphere: sphere_step.reduce(part, sphere, path))

    def center(self, sums: Tensor) -> None:
        """Remove the means of points and gradients, given their sums over all processes."""
        mean = sums / self.entries
        mean = torch.where(mean.isfinite(), mean, 0)
        for part, shard in zip(self.family.parts, self.shards, strict=True):
            if shard is not None:
                part.slope = part.slope.clone()
                both = (part.point, part.slope)
                # What AdamW keeps of the gradient is not tangent.
                some = both if isinstance(part.update, PerVectorUpdate) else both[:1]
                for x, means in zip(some, mean[shard.owner].T, strict=False):
                    view, inside = shard.sphere.axes.split(x)
                    view.sub_(spread(means.to(view.dtype), view, inside))

    def finish(self, sums: Tensor) -> Tensor:
        """Plan from the sums over all processes and follow; count vectors that are not sound."""
        plan = sphere_step.plan_for(self.family, self.entries, self.options, sums)
        path = replace(self.options, centered=False)
        for part, shard in zip(self.family.parts, self.shards, strict=True):
            if shard is not None:
                mine = Plan(*(x[shard.owner] for x in plan))
                sphere_step.follow(part, shard.sphere, path, mine)
        return plan.skipped


def _step_together(cut_families: Sequence[_CutFamily]) -> list[Tensor]:
    centered = [cut for cut in cut_families if cut.options.centered]
    means = add_up([(cut.placement, cut.placement.spread, cut.sums(2, _means)) for cut in centered])
    for cut_family, sums in zip(centered, means, strict=True):
        cut_family.center(sums)
    products = add_up(
        [(cut.placement, cut.placement.spread, cut.products()) for cut in cut_families]
    )
    return [
        cut_family.finish(sums) for cut_family, sums in zip(cut_families, products, strict=True)
    ]


def _means(part: Part, sphere: Sphere) -> Tensor:
    columns = []
    for x in (part.point, part.slope):
        view, inside = sphere.axes.split(x)
        columns.append(total(view.to(working_dtype(x)), inside))
    return torch.stack(columns, -1).double()


def record(constrained: Sequence[ConstrainedParameters]) -> bool:
    """Record radii that are not known yet; return whether a vector here still has none."""
    whole, jobs = [], []
    for held in constrained:
        placement = placement_of(held.params, held.sphere)
        here = _local_part(held, placement)
        if here is not None and not placement.spread:
            whole.append(here)
        if placement.spread and bool((held.radius == 0).any()):  # the same in every process
            jobs.append((held, placement))
    without = project.record(whole)
    added = add_up(
        [(placement, placement.spread, _sums(held, placement)) for held, placement in jobs]
    )
    for (held, _), sums in zip(jobs, added, strict=True):
        without |= bool(project.note(held, sums))
    return without


def restore(
    constrained: Sequence[ConstrainedParameters], *, brake: bool = False, growth: float = 0.0
) -> int | Tensor:
    """Do what :func:`~onsphere.optim.steps.project.restore` does, for parameters anywhere."""
    whole, jobs = [], []
    for held in constrained:
        placement = placement_of(held.params, held.sphere)
        here = _local_part(held, placement)
        if placement.spread:
            jobs.append((held, placement))
        elif here is not None:
            whole.append(here)
    left = project.restore(whole, brake=brake, growth=growth)
    added = add_up(
        [(placement, placement.spread, _sums(held, placement)) for held, placement in jobs]
    )
    for (held, placement), sums in zip(jobs, added, strict=True):
        scaling, unusable = project.scaling_for(held, sums, brake=brake, growth=growth)
        for param, shard in zip(
            held.params, placement.shards(held.sphere, sums.device), strict=True
        ):
            if shard is not None:
                project.rescale(local(param), shard.sphere, scaling[shard.owner])
        left = left + project.count_in(held, unusable)
    return left


def put_on(sphere: Sphere, pairs: project.Pairs) -> list[tuple[Tensor, Tensor]]:
    """Do what :func:`~onsphere.optim.steps.project.put_on` does, for weights anywhere."""
    params = [param for param, _ in pairs]
    placement = placement_of(params, sphere)
    shards = placement.shards(sphere, params[0].device)
    if not placement.spread:
        if shards[0] is None:
            return list(pairs)
        here = [(local(param), local(grad)) for param, grad in pairs]
        moved = project.put_on(shards[0].sphere, here)
        return [(param, grad) for param, (_, grad) in zip(params, moved, strict=True)]
    held = project.constrain(params, sphere, numbers(params, sphere))
    (sums,) = add_up([(placement, placement.spread, _sums(held, placement))])
    scaling, found = project.onto_radius(held, sums), []
    for (param, grad), shard in zip(pairs, shards, strict=True):
        there = local(grad)
        if shard is not None:
            mine = scaling[shard.owner]
            there = project.scaled(local(param), there, shard.sphere, mine)
        found.append((param, there))
    return found


def _local_part(held: ConstrainedParameters, placement: Placement) -> ConstrainedParameters | None:
    shard = placement.shards(held.sphere, held.params[0].device)[0]
    if shard is None:
        return None
    params = tuple(local(param) for param in held.params)
    return ConstrainedParameters(params, shard.sphere, local(held.radius), held.skipped)


def _sums(held: ConstrainedParameters, placement: Placement) -> Tensor:
    sums = held.radius.new_zeros((held.vectors, 2), dtype=torch.float64)
    shards = placement.shards(held.sphere, held.params[0].device)
    for param, shard in zip(held.params, shards, strict=True):
        if shard is not None and shard.is_primary:
            sums.index_add_(0, shard.owner, project.sums(local(param), shard.sphere))
    return sums
