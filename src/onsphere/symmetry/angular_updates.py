r"""How fast weights on spheres turn in training: effective rates, and the angle of the next step.

Of a weight on a sphere only the direction counts. Gradient descent turns it like gradient descent
on the unit sphere with rate :math:`\eta/|w|^2`, because the gradient itself falls as
:math:`1/|w|` (Roburin et al., arXiv 2006.13382); an optimizer whose steps do not scale with the
gradient, like Adam, turns it with :math:`\eta/|w|`.
"""

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from onsphere.geometry import VectorAxes, angle
from onsphere.symmetry.claims import MinMedianMax, WeightReport
from onsphere.symmetry.result import AuditResult

DEGREE: dict[type[Optimizer], int] = {
    SGD: 1, ASGD: 1,
    Adam: 0, AdamW: 0, Adamax: 0, NAdam: 0, RAdam: 0, RMSprop: 0, Adagrad: 0, Rprop: 0,
}  # fmt: skip
"""Optimizer -> the power of the gradient's size that its step is proportional to."""


def weight_reports(
    audit: AuditResult, model: nn.Module, optimizer: Optimizer | None
) -> list[WeightReport]:
    """Report on every parameter of an audited model; see :meth:`Audit.weight_reports`."""
    owned = audit.parameters_of(model)
    spheres = audit.own_spheres()
    rates = _rates(optimizer)
    turning = {owned[n]: s.axes for n, s in spheres.items() if owned[n].grad is not None}
    angles = next_angles(optimizer, turning) if optimizer is not None else {}
    degree = DEGREE.get(type(optimizer)) if optimizer is not None else None
    reports = []
    for name in audit.parameters:
        p = owned[name]
        lengths = _lengths(p, spheres[name].axes) if name in spheres else None
        effective = None
        if lengths is not None and degree is not None and p in rates:
            alive = lengths[lengths > 0]
            effective = spread(rates[p] / alive ** (1 + degree)) if len(alive) else None
        reports.append(
            WeightReport(
                name=name,
                kind=audit.kinds[name],
                norm=float(_lengths(p, VectorAxes())[0]),
                vectors=0 if lengths is None else len(lengths),
                lengths=None if lengths is None else spread(lengths),
                effective_rate=effective,
                angular_update=spread(angles[p]) if p in angles else None,
                decay=audit.decay_of(name),
            )
        )
    return reports


def next_angles(
    optimizer: Optimizer, spheres: Mapping[nn.Parameter, VectorAxes]
) -> dict[nn.Parameter, Tensor]:
    r"""Return the angles by which an optimizer's next step turns the vectors of its weights.

    The step is taken by a copy of the optimizer, with its state, on copies of the weights.

    Args:
        optimizer: any optimizer whose ``step`` needs no closure; it is not changed.
        spheres: weights with gradients -> which entries form one vector.

    Returns:
        Weight -> one angle in radians per vector; weights of other optimizers are left out.
        Nothing, with a warning, for an optimizer that cannot be copied or stepped.

    Example:
        >>> import torch
        >>> w = nn.Parameter(torch.tensor([3.0, 0.0]))
        >>> w.grad = torch.tensor([0.0, 1.0])
        >>> angles = next_angles(torch.optim.SGD([w], lr=3.0), {w: VectorAxes()})
        >>> torch.rad2deg(angles[w]).round()
        tensor([45.], dtype=torch.float64)
    """
    held = [p for g in optimizer.param_groups for p in g["params"]]
    copies = {p: _copied(p, p in spheres) for p in held}
    try:
        rehearsal = copy.deepcopy(optimizer, {id(p): c for p, c in copies.items()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer's own steps say it
            rehearsal.step()
    except Exception as error:
        warnings.warn(
            f"the next step of {type(optimizer).__name__} cannot be rehearsed "
            f"({type(error).__name__}: {error}); angular updates are left out",
            stacklevel=2,
        )
        return {}
    return {p: _turned(p, copies[p], axes) for p, axes in spheres.items() if p in copies}


def spread(values: Tensor) -> MinMedianMax:
    """Return the smallest, the middle and the largest value.

    Example:
        >>> import torch
        >>> spread(torch.tensor([3.0, 1.0, 2.0]))
        MinMedianMax(least=1.0, median=2.0, most=3.0)
    """
    return MinMedianMax(float(values.min()), float(values.median()), float(values.max()))


def _rates(optimizer: Optimizer | None) -> dict[Tensor, float]:
    if optimizer is None:
        return {}
    return {p: float(g["lr"]) for g in optimizer.param_groups for p in g["params"] if "lr" in g}


def _lengths(p: Tensor, axes: VectorAxes) -> Tensor:
    return axes.norms(p.detach()).flatten().double()


def _copied(p: nn.Parameter, moves: bool) -> nn.Parameter:
    """Copy a weight that moves; the others share memory, and without a gradient stay put."""
    twin = nn.Parameter(p.detach().clone() if moves else p.detach(), requires_grad=p.requires_grad)
    if moves and p.grad is not None:
        twin.grad = p.grad.detach().clone()
    return twin


def _turned(before: Tensor, after: Tensor, axes: VectorAxes) -> Tensor:
    """Angles between the vectors of two tensors; a vector that is 0 has none and turns by 0."""
    a, b = (_real_vectors(t.detach(), axes) for t in (before, after))
    angles = a.new_zeros(len(a))
    alive = (a.norm(dim=-1) != 0) & (b.norm(dim=-1) != 0)
    angles[alive] = angle(a[alive], b[alive])
    return angles


def _real_vectors(t: Tensor, axes: VectorAxes) -> Tensor:
    """Return vectors in float64; of complex ones the real parts, then the imaginary ones."""
    parts = [t.real, t.imag] if t.is_complex() else [t]
    return torch.cat([axes.gather(x.double()).reshape(-1, _inside(t, axes)) for x in parts], -1)


def _inside(t: Tensor, axes: VectorAxes) -> int:
    return t.numel() // axes.count(t.shape)
