"""Steps of weights that are spread over processes.

A vector that lies whole in one process is moved there, as if there were no other. Of a vector that
the sharding cuts, every process reduces its part, one all-reduce adds the sums of all of them, and
each process plans for itself, from the same bits. Which vectors are cut is arithmetic on sizes
(:mod:`~onsphere.optim.box`), so all processes know without asking.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from onsphere.geometry import Sphere
from onsphere.optim import product, restoration
from onsphere.optim.home import Home, Piece, add_up, home_of, local, numbers
from onsphere.optim.linear import Linear
from onsphere.optim.motion import Plan, Travel, spread, total, working_dtype
from onsphere.optim.product import Family, March, Part
from onsphere.optim.restoration import Leash


def advance(marches: Sequence[March]) -> list[list[Tensor | int]]:
    """Do what :func:`~onsphere.optim.product.advance` does, for families anywhere.

    Args:
        marches: families with their sphere and travel; all processes give the same ones.

    Returns:
        How many vectors of each family were not sound: of those that lie in this process, or of
        all where they are cut.
    """
    counts: list[list[Tensor | int]] = [[0] * len(families) for families, _, _ in marches]
    journeys: dict[tuple[int, int], _Journey] = {}
    for number, (families, sphere, travel) in enumerate(marches):
        whole: dict[Sphere, list[int]] = {}
        here = [_local_family(family) for family in families]
        for position, family in enumerate(families):
            params = [part.point for part in family.parts]
            home = home_of(params, sphere)
            pieces = home.pieces(sphere, params[0].device)
            if home.spread:
                entries = sum(p.numel() for p in params) // family.radius.numel()
                journey = _Journey(here[position], home, pieces, travel, entries)
                journeys[number, position] = journey
            elif pieces[0] is not None:
                whole.setdefault(pieces[0].sphere, []).append(position)
        for own, positions in whole.items():
            moved = product.advance([here[k] for k in positions], own, travel)
            for position, count in zip(positions, moved, strict=True):
                counts[number][position] = count
    arrived = _travel_together(list(journeys.values()))
    for (number, position), count in zip(journeys, arrived, strict=True):
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
class _Journey:
    """A family with vectors that are cut, between the sums of its parts and its plan.

    Attributes:
        family: what this process holds.
        home: where all of it lies.
        pieces: which vectors the parts here belong to.
        travel: how far they move.
        entries: of one vector, in all processes.
    """

    family: Family
    home: Home
    pieces: tuple[Piece | None, ...]
    travel: Travel
    entries: int

    def sums(self, width: int, of: Callable[[Part, Sphere], Tensor]) -> Tensor:
        """Return what this process adds to the sums over all vectors."""
        radius = self.family.radius
        sums = radius.new_zeros((radius.numel(), width), dtype=torch.float64)
        for part, piece in zip(self.family.parts, self.pieces, strict=True):
            if piece is not None and piece.speaks:
                mine = of(part, piece.sphere)
                sums.index_add_(0, piece.owner, pad(mine, (0, width - mine.shape[-1])))
        return sums

    def products(self) -> Tensor:
        """Return the inner products that the plan needs, as far as they are known here."""
        width = type(self.family.parts[0].update).width
        path = replace(self.travel, centered=False)  # a mean needs its own sum, added before
        return self.sums(width, lambda part, sphere: product.reduce(part, sphere, path))

    def center(self, sums: Tensor) -> None:
        """Remove the means of points and gradients, given their sums over all processes."""
        mean = sums / self.entries
        mean = torch.where(mean.isfinite(), mean, 0)
        for part, piece in zip(self.family.parts, self.pieces, strict=True):
            if piece is not None:
                part.slope = part.slope.clone()
                both = (part.point, part.slope)
                # What AdamW keeps of the gradient is not tangent.
                some = both if isinstance(part.update, Linear) else both[:1]
                for x, means in zip(some, mean[piece.owner].T, strict=False):
                    view, inside = piece.sphere.axes.split(x)
                    view.sub_(spread(means.to(view.dtype), view, inside))

    def arrive(self, sums: Tensor) -> Tensor:
        """Plan from the sums over all processes and follow; count vectors that are not sound."""
        plan = product.plan_for(self.family, self.entries, self.travel, sums)
        path = replace(self.travel, centered=False)
        for part, piece in zip(self.family.parts, self.pieces, strict=True):
            if piece is not None:
                mine = Plan(*(x[piece.owner] for x in plan))
                product.follow(part, piece.sphere, path, mine)
        return plan.skipped


def _travel_together(journeys: Sequence[_Journey]) -> list[Tensor]:
    centered = [journey for journey in journeys if journey.travel.centered]
    means = add_up([(j.home, j.home.spread, j.sums(2, _means)) for j in centered])
    for journey, sums in zip(centered, means, strict=True):
        journey.center(sums)
    products = add_up([(j.home, j.home.spread, j.products()) for j in journeys])
    return [journey.arrive(sums) for journey, sums in zip(journeys, products, strict=True)]


def _means(part: Part, sphere: Sphere) -> Tensor:
    columns = []
    for x in (part.point, part.slope):
        view, inside = sphere.axes.split(x)
        columns.append(total(view.to(working_dtype(x)), inside))
    return torch.stack(columns, -1).double()


def record(leashes: Sequence[Leash]) -> bool:
    """Record radii that are not known yet; return whether a vector here still has none."""
    whole, jobs = [], []
    for held in leashes:
        home = home_of(held.params, held.sphere)
        here = _local_leash(held, home)
        if here is not None and not home.spread:
            whole.append(here)
        if home.spread and bool((held.radius == 0).any()):  # the same in every process
            jobs.append((held, home))
    without = restoration.record(whole)
    added = add_up([(home, home.spread, _sums(held, home)) for held, home in jobs])
    for (held, _), sums in zip(jobs, added, strict=True):
        without |= restoration.note(held, sums)
    return without


def restore(leashes: Sequence[Leash], *, brake: bool = False, growth: float = 0.0) -> int | Tensor:
    """Do what :func:`~onsphere.optim.restoration.restore` does, for leashes anywhere."""
    whole, jobs = [], []
    for held in leashes:
        home = home_of(held.params, held.sphere)
        here = _local_leash(held, home)
        if home.spread:
            jobs.append((held, home))
        elif here is not None:
            whole.append(here)
    left = restoration.restore(whole, brake=brake, growth=growth)
    added = add_up([(home, home.spread, _sums(held, home)) for held, home in jobs])
    for (held, home), sums in zip(jobs, added, strict=True):
        scaling, unusable = restoration.scaling_for(held, sums, brake=brake, growth=growth)
        for param, piece in zip(held.params, home.pieces(held.sphere, sums.device), strict=True):
            if piece is not None:
                restoration.rescale(local(param), piece.sphere, scaling[piece.owner])
        left = left + restoration.count_in(held, unusable)
    return left


def put_on(sphere: Sphere, pairs: restoration.Pairs) -> list[tuple[Tensor, Tensor]]:
    """Do what :func:`~onsphere.optim.restoration.put_on` does, for weights anywhere."""
    params = [param for param, _ in pairs]
    home = home_of(params, sphere)
    pieces = home.pieces(sphere, params[0].device)
    if not home.spread:
        if pieces[0] is None:
            return list(pairs)
        here = [(local(param), local(grad)) for param, grad in pairs]
        moved = restoration.put_on(pieces[0].sphere, here)
        return [(param, grad) for param, (_, grad) in zip(params, moved, strict=True)]
    held = restoration.leash(params, sphere, numbers(params, sphere))
    (sums,) = add_up([(home, home.spread, _sums(held, home))])
    scaling, found = restoration.onto_radius(held, sums), []
    for (param, grad), piece in zip(pairs, pieces, strict=True):
        there = local(grad)
        if piece is not None:
            mine = scaling[piece.owner]
            there = restoration.scaled(local(param), there, piece.sphere, mine)
        found.append((param, there))
    return found


def _local_leash(held: Leash, home: Home) -> Leash | None:
    piece = home.pieces(held.sphere, held.params[0].device)[0]
    if piece is None:
        return None
    params = tuple(local(param) for param in held.params)
    return Leash(params, piece.sphere, local(held.radius), held.skipped)


def _sums(held: Leash, home: Home) -> Tensor:
    sums = held.radius.new_zeros((held.vectors, 2), dtype=torch.float64)
    pieces = home.pieces(held.sphere, held.params[0].device)
    for param, piece in zip(held.params, pieces, strict=True):
        if piece is not None and piece.speaks:
            sums.index_add_(0, piece.owner, restoration.sums(local(param), piece.sphere))
    return sums
