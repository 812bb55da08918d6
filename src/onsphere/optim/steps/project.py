r"""Bring vectors that an optimizer has moved freely back to their length, or brake their growth.

A vector that was on the sphere of radius :math:`r` and was moved to :math:`p` goes to
:math:`r\,p/|p|`: the retraction of the whole update. Its radial part only changes the rate: with
:math:`p = (1 - \eta b)\,p_0 - \eta t`, :math:`t` tangent at :math:`p_0`, the direction is that of a
tangent step with the rate :math:`\eta/(1 - \eta b)`. Nothing but the radius has to be remembered.

The brake lets a vector shrink, and grow by a share of what it would:
:math:`|p| \leftarrow r + \kappa\,(|p| - r)` where :math:`|p| > r`, and that is the next :math:`r`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onsphere.geometry import Sphere
from onsphere.optim import kernels
from onsphere.optim.updates.geodesic import inner, limits_of, spread, total, working_dtype


class ConstrainedParameters(NamedTuple):
    """The parameters of one family, and what each of their vectors owns.

    Attributes:
        params: one tensor, or several that share their spheres.
        sphere: the product of spheres they live on.
        radius: one number per vector, 0 for those not seen yet.
        skipped: how often a vector was left where it was.
    """

    params: tuple[Tensor, ...]
    sphere: Sphere
    radius: Tensor
    skipped: Tensor

    @property
    def vectors(self) -> int:
        """How many vectors there are."""
        return self.radius.numel()


def constrain(params: Sequence[Tensor], sphere: Sphere, radius: Tensor) -> ConstrainedParameters:
    """Join parameters and their sphere with the numbers in which radii will be recorded."""
    skipped = torch.zeros((), dtype=torch.int64, device=params[0].device)
    return ConstrainedParameters(tuple(params), sphere, radius, skipped)


def record(constrained: Sequence[ConstrainedParameters]) -> bool:
    """Record radii of vectors that have a direction now; return whether any has none."""
    return sum(bool(note(held, _sums(held))) for held in constrained) > 0


def note(held: ConstrainedParameters, numbers: Tensor) -> Tensor:
    """Do what :func:`record` does for one family, from the sums over each vector."""
    square, ones = numbers.unbind(-1)
    count = _count(held)
    norms = (square - (ones * ones / count if held.sphere.centered else 0)).clamp_min(0).sqrt()
    given = held.sphere.radius
    wanted = norms if given is None else torch.full_like(norms, given)
    fresh = (held.radius.view(-1) == 0) & (norms > 0) & norms.isfinite()
    held.radius.view(-1).copy_(
        torch.where(fresh, wanted.to(held.radius.dtype), held.radius.view(-1))
    )
    return (held.radius == 0).any()


def restore(
    constrained: Sequence[ConstrainedParameters], *, brake: bool = False, growth: float = 0.0
) -> int | Tensor:
    """Restore all vectors in place; return how many could not be.

    Args:
        constrained: vectors with recorded radii. One without goes back to zero, where it was.
        brake: brake growth instead of fixing the length; ``radius`` follows.
        growth: the share of its growth that a vector keeps under the brake.
    """
    fast: dict[tuple[Sphere, torch.dtype, torch.device], list[ConstrainedParameters]] = {}
    left: int | Tensor = 0
    for held in constrained:
        first = held.params[0]
        if not held.sphere.joint and kernels.known(first, held.sphere, first.dtype):
            fast.setdefault((held.sphere, first.dtype, first.device), []).append(held)
        else:
            scaling, unusable = scaling_for(held, _sums(held), brake=brake, growth=growth)
            for param in held.params:
                rescale(param, held.sphere, scaling)
            left = left + count_in(held, unusable)
    for (sphere, _, _), many in fast.items():
        points, radii = [held.params[0] for held in many], [held.radius for held in many]
        counts = kernels.restore(points, radii, sphere, brake=brake, growth=growth)
        if isinstance(counts, Tensor):
            torch._foreach_add_([held.skipped for held in many], list(counts.unbind()))
            left = left + counts.sum()
            continue
        for held, count in zip(many, counts, strict=True):
            if count:
                left = left + count_in(held, count)
    return left


def repeated(
    constrained: Sequence[ConstrainedParameters],
) -> list[tuple[kernels.RepeatedRestore, list[ConstrainedParameters]]]:
    """Return calls that restore all on the CPU again and again; none where they cannot."""
    alike: dict[tuple[Sphere, torch.dtype], list[ConstrainedParameters]] = {}
    for held in constrained:
        first = held.params[0]
        if held.sphere.joint or first.device.type != "cpu" or not kernels.usable():
            return []
        if not kernels.known(first, held.sphere, first.dtype):
            return []
        alike.setdefault((held.sphere, first.dtype), []).append(held)
    return [
        (kernels.RepeatedRestore([h.params[0] for h in many], [h.radius for h in many], s), many)
        for (s, _), many in alike.items()
    ]


def count_in(held: ConstrainedParameters, count: int | Tensor) -> int | Tensor:
    """Count vectors that were left where they were, and return how many."""
    held.skipped.add_(count)
    return count


def scaling_for(
    held: ConstrainedParameters, numbers: Tensor, *, brake: bool, growth: float
) -> tuple[Tensor, Tensor]:
    """Return factor and shift of each vector, from its sums, and how many cannot be restored."""
    square, ones = numbers.unbind(-1)
    count = _count(held)
    mean = ones / count if held.sphere.centered else torch.zeros_like(ones)
    size = (square - count * mean * mean).sqrt()
    radius = held.radius.view(-1).to(size.dtype)
    known, usable = radius != 0, size.isfinite() & (size > 0)
    goal = radius
    if brake:
        goal = torch.where(size > radius, radius + growth * (size - radius), size)
        follows = torch.where(known & usable, goal.to(held.radius.dtype), held.radius.view(-1))
        held.radius.view(-1).copy_(follows)
    close = limits_of(held.params[0].dtype).close
    factor = torch.where((goal / size - 1).abs() <= close, 1, goal / size)
    factor = torch.where(known, torch.where(usable, factor, 1), 0)
    shift = torch.where(usable & known, -factor * mean, 0)
    return torch.stack([factor, shift], -1), (~(known & usable)).sum()


def rescale(param: Tensor, sphere: Sphere, scaling: Tensor) -> None:
    """Multiply each vector by its factor and shift it, in place."""
    view, inside = sphere.axes.split(param)
    wide = working_dtype(param)
    scale, move = (spread(x, view, inside) for x in scaling.to(wide).unbind(-1))
    back = view.to(wide) * scale + move
    # Zero times what is not finite would be NaN where a zero was.
    view.copy_(torch.where(scale == 0, 0, torch.where((scale == 1) & (move == 0), view, back)))


Pairs = Sequence[tuple[Tensor, Tensor]]


def put_on(sphere: Sphere, pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
    """Scale vectors to a given radius, and their gradients to what they are there.

    Where the function does not depend on the length, a gradient is as large as one over it.

    Args:
        sphere: with a radius.
        pairs: weights, changed in place, and gradients, which are not.

    Returns:
        The same weights, with other gradients.
    """
    params = [param for param, _ in pairs]
    zeros = torch.zeros(sphere.axes.count(params[0].shape), device=params[0].device)
    held = constrain(params, sphere, zeros.to(working_dtype(params[0])))
    scaling = onto_radius(held, _sums(held))
    return [(param, scaled(param, grad, sphere, scaling)) for param, grad in pairs]


def onto_radius(held: ConstrainedParameters, numbers: Tensor) -> Tensor:
    """Return factor and shift that bring vectors not seen before to the radius given for them."""
    note(held, numbers)
    scaling, _ = scaling_for(held, numbers, brake=False, growth=0.0)
    stay = torch.tensor([1.0, 0.0], dtype=scaling.dtype, device=scaling.device)
    return torch.where((held.radius.view(-1) == 0)[:, None], stay, scaling)


def scaled(param: Tensor, grad: Tensor, sphere: Sphere, scaling: Tensor) -> Tensor:
    """Rescale a weight in place, and return its gradient as it is there."""
    rescale(param, sphere, scaling)
    there = grad.clone()
    view, inside = sphere.axes.split(there)
    view.div_(spread(scaling[:, 0], view, inside))
    return there


def _sums(held: ConstrainedParameters) -> Tensor:
    return torch.stack([sums(param, held.sphere) for param in held.params]).sum(0)


def sums(param: Tensor, sphere: Sphere) -> Tensor:
    """Return <p,p> and <1,p> of each vector of one tensor, one vector per row."""
    view, inside = sphere.axes.split(param.detach())
    wide = view.to(working_dtype(param))
    return torch.stack([inner(wide, wide, inside), total(wide, inside)], -1).double()


def _count(held: ConstrainedParameters) -> int:
    return max(1, sum(param.numel() for param in held.params) // max(1, held.vectors))
