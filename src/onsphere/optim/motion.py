r"""Moving on a product of unit spheres, in any memory layout, without ever stopping.

The functions of :mod:`onsphere.geometry.sphere` act on vectors along the last axis and refuse a
zero vector, which costs a copy for most layouts and a device synchronization for all. An optimizer
step can afford neither. Here a vector runs along the axes ``inside`` of a view (what
:meth:`~onsphere.geometry.VectorAxes.split` gives), every reduction keeps its axes, and a vector
without a direction comes out as NaN for the caller to leave where it was.

Points are *unit* vectors: the radius belongs to the caller, who divides velocities by it.

Source: Cho & Lee, *Riemannian approach to batch normalization*, 2017 (arXiv 1709.09603).
"""

from typing import Literal

import torch
from torch import Tensor

from onsphere.geometry import Sphere

Step = Literal["retraction", "exponential"]
Axes = tuple[int, ...]


def inner(a: Tensor, b: Tensor, inside: Axes) -> Tensor:
    r"""Return the inner product :math:`\langle a, b\rangle` of each pair of vectors.

    Args:
        a: any tensor.
        b: a tensor of the same shape.
        inside: the axes along which one vector runs; ``()`` makes every entry a vector.

    Returns:
        One number per vector, with size 1 along each axis of ``inside``.

    Example:
        >>> import torch
        >>> inner(torch.ones(2, 3), torch.ones(2, 3), (1,))
        tensor([[3.],
                [3.]])
    """
    product = a * b
    # An empty tuple of axes means "all axes" to torch.sum, and "none" here.
    return product.sum(inside, keepdim=True) if inside else product


def lengths(x: Tensor, inside: Axes) -> Tensor:
    r"""Return the Euclidean length of each vector, with size 1 along each axis of ``inside``.

    Example:
        >>> import torch
        >>> lengths(torch.tensor([[3.0, 4.0]]), (1,))
        tensor([[5.]])
    """
    return torch.linalg.vector_norm(x, dim=inside, keepdim=True) if inside else x.abs()


def tangent(unit: Tensor, v: Tensor, inside: Axes) -> Tensor:
    r"""Return the tangent part :math:`v - \langle p, v\rangle\,p` at unit vectors :math:`p`.

    Args:
        unit: unit vectors.
        v: vectors of the ambient space, in the same layout.
        inside: the axes along which one vector runs.

    Returns:
        A tensor like ``v``. For vectors of one entry it is exactly zero.

    Example:
        >>> import torch
        >>> tangent(torch.tensor([1.0, 0.0]), torch.tensor([5.0, 3.0]), (0,))
        tensor([0., 3.])
    """
    return v - inner(unit, v, inside) * unit


def move(
    unit: Tensor, velocity: Tensor, carried: Tensor | None, inside: Axes, step: Step
) -> tuple[Tensor, Tensor | None]:
    r"""Move unit vectors along a tangent velocity and carry another tangent vector along.

    With ``"retraction"``, :math:`q = (p + v)/|p + v|` (a rotation by :math:`\arctan|v|`) and the
    carried vector is projected to the tangent space at :math:`q`. With ``"exponential"``,
    :math:`\theta = |v|`,

    .. math:: q = \cos\theta\,p + \tfrac{\sin\theta}{\theta} v,\qquad
              m' = m - \langle m, v\rangle \left(\tfrac12
              \left(\tfrac{\sin(\theta/2)}{\theta/2}\right)^2 v
              + \tfrac{\sin\theta}{\theta}\, p\right),

    which is parallel transport along the geodesic that was taken, whatever its length. The two
    agree to second order in the velocity.

    Args:
        unit: unit vectors.
        velocity: tangent vectors at ``unit``, in radians.
        carried: tangent vectors at ``unit`` (momentum), or ``None``.
        inside: the axes along which one vector runs.
        step: ``"retraction"`` or ``"exponential"``.

    Returns:
        The new unit vectors, and ``carried`` as tangent vectors there.

    Example:
        >>> import torch
        >>> p, v = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> move(p, v, None, (0,), "retraction")[0]
        tensor([0.7071, 0.7071])
        >>> move(p, v, v, (0,), "exponential")
        (tensor([0.5403, 0.8415]), tensor([-0.8415,  0.5403]))
    """
    if step == "retraction":
        ahead = unit + velocity
        there = ahead / lengths(ahead, inside)
        return there, None if carried is None else tangent(there, carried, inside)
    angle = lengths(velocity, inside)
    share = torch.sinc(angle / torch.pi)
    ahead = torch.cos(angle) * unit + share * velocity
    there = ahead / lengths(ahead, inside)  # of length 1 already, up to rounding that would add up
    if carried is None:
        return there, None
    turned = torch.sinc(angle / (2 * torch.pi)).square() / 2 * velocity + share * unit
    return there, carried - inner(carried, velocity, inside) * turned


@torch.no_grad()
def project_(param: Tensor, sphere: Sphere) -> Tensor:
    r"""Scale the vectors of a tensor in place to the radius of their sphere.

    Args:
        param: any real floating point tensor that has the axes of ``sphere``.
        sphere: which entries form a vector, and its radius. With ``radius=None`` a vector already
            has its length, and nothing changes.

    Returns:
        ``param``. Vectors that are zero or not finite are left as they are.

    Raises:
        ValueError: ``param`` lacks an axis that the sphere names.

    Example:
        >>> import torch
        >>> from onsphere.geometry import Sphere, VectorAxes
        >>> project_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), Sphere(VectorAxes((0,)), radius=1.0))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    view, _ = sphere.axes.split(param)
    if sphere.radius is None:
        return param
    norms = sphere.axes.norms(param)
    scale = torch.where((norms > 0) & norms.isfinite(), sphere.radius / norms, 1.0)
    view.copy_(view * scale)
    return param
