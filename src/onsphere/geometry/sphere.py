r"""The sphere as a manifold: tangents, geodesics, transport, distance.

Every function acts on vectors along the last axis, batched over all the others. A point carries
its radius with it: ``p`` lies on the sphere of radius ``|p|``, so no radius is passed and none can
disagree. Other layouts are converted with :class:`~onsphere.geometry.vectors.VectorAxes`.

Source: Cho & Lee, *Riemannian approach to batch normalization*, 2017 (arXiv 1709.09603);
do Carmo, *Riemannian Geometry*, ch. 3.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Vectors = Float[Tensor, "*batch n"]
Lengths = Float[Tensor, "*batch"]


def vector_norm(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch 1"]:
    r"""Euclidean length :math:`|x|` along the last axis, kept as an axis of size 1.

    Vectors are scaled by their largest entry first, so lengths far below the square root of the
    smallest float (or above that of the largest) are still exact to rounding.

    Example:
        >>> import torch
        >>> vector_norm(torch.tensor([3e-30, 4e-30]))     # the squares underflow in float32
        tensor([5.0000e-30])
    """
    if x.shape[-1] == 0:
        return x.new_zeros((*x.shape[:-1], 1))
    scale = x.detach().abs().amax(dim=-1, keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    return scale * torch.linalg.vector_norm(x / scale, dim=-1, keepdim=True)


def directed_length(x: Float[Tensor, "*batch n"], what: str = "x") -> Float[Tensor, "*batch 1"]:
    """:func:`length`, for vectors that must have a direction.

    Raises:
        ValueError: a vector is zero, and so has no direction.
    """
    lengths = vector_norm(x)
    zeros = int((lengths == 0).sum())
    if zeros:
        raise ValueError(
            f"{zeros} of {lengths.numel()} vectors in `{what}` are zero and have no direction; "
            "remove them, or use eps > 0 where the function takes one"
        )
    return lengths


def to_sphere(x: Float[Tensor, "*batch n"], radius: float = 1.0) -> Float[Tensor, "*batch n"]:
    r"""Project onto the sphere along rays: :math:`r\,x/|x|`.

    Args:
        x: vectors along the last axis.
        radius: length of the result.

    Returns:
        Vectors of length ``radius`` in the directions of ``x``.

    Raises:
        ValueError: a vector is zero.

    Example:
        >>> import torch
        >>> to_sphere(torch.tensor([3.0, 4.0]), radius=10.0)
        tensor([6., 8.])
    """
    return x * (radius / directed_length(x))


def tangent(p: Float[Tensor, "*batch n"], v: Float[Tensor, "*batch n"]) -> Vectors:
    r"""Project onto the tangent space at ``p``: :math:`v - \langle\hat p, v\rangle\,\hat p`.

    Args:
        p: points, each on the sphere of radius ``|p|``.
        v: vectors of the ambient space.

    Returns:
        The part of ``v`` orthogonal to ``p``.

    Raises:
        ValueError: a point is zero.

    Example:
        >>> import torch
        >>> tangent(torch.tensor([2.0, 0.0]), torch.tensor([5.0, 3.0]))
        tensor([0., 3.])
    """
    unit = p / directed_length(p, "p")
    return v - (unit * v).sum(-1, keepdim=True) * unit


def retract(p: Float[Tensor, "*batch n"], v: Float[Tensor, "*batch n"]) -> Vectors:
    r"""Step along ``v`` and project back: :math:`|p|\,(p+v)/|p+v|`.

    Agrees with :func:`expmap` to second order in a tangent ``v`` (third order in the distance:
    the angle is ``atan(|v|/|p|)`` instead of ``|v|/|p|``) and costs no trigonometry.

    Args:
        p: points, each on the sphere of radius ``|p|``.
        v: steps, usually tangent at ``p``.

    Returns:
        Points on the same spheres.

    Raises:
        ValueError: ``p`` or ``p + v`` is zero.

    Example:
        >>> import torch
        >>> retract(torch.tensor([5.0, 0.0]), torch.tensor([-2.0, 4.0]))
        tensor([3., 4.])
    """
    return (p + v) * (directed_length(p, "p") / directed_length(p + v, "p + v"))


def expmap(p: Float[Tensor, "*batch n"], v: Float[Tensor, "*batch n"]) -> Vectors:
    r"""Follow the geodesic that leaves ``p`` with velocity ``v`` for unit time.

    :math:`\exp_p(v) = \cos(\theta)\,p + \mathrm{sinc}(\theta)\,v` with
    :math:`\theta = |v|/|p|` and :math:`\mathrm{sinc}(\theta) = \sin(\theta)/\theta`.

    Args:
        p: points, each on the sphere of radius ``|p|``.
        v: tangent vectors at ``p`` (their length is the distance travelled).

    Returns:
        The end points, on the same spheres.

    Raises:
        ValueError: a point is zero.

    Example:
        >>> import math, torch
        >>> expmap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, math.pi / 3]))
        tensor([0.5000, 0.8660])
    """
    angle = vector_norm(v) / directed_length(p, "p")
    return torch.cos(angle) * p + torch.sinc(angle / torch.pi) * v


def logmap(p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"]) -> Vectors:
    r"""Return the tangent vector at ``p`` whose geodesic reaches ``q``: :func:`expmap` undone.

    :math:`\log_p(q) = \theta/\sin\theta\;P_p(q - p)`, with :math:`\theta` the angle between them.

    Args:
        p: points, each on the sphere of radius ``|p|``.
        q: points on the same spheres.

    Returns:
        Tangent vectors of length ``distance(p, q)``.

    Raises:
        ValueError: a point is zero, or ``q = -p``, where every direction leads to ``q``.

    Example:
        >>> import torch
        >>> logmap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([0.0000, 1.5708])
    """
    _check_not_antipodal(p, q)
    radius = directed_length(p, "p")
    theta = _angle(p, q)
    return tangent(p, q - p) / torch.sinc(theta / torch.pi) * _same_radius(radius, q)


def transport(
    p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"], v: Float[Tensor, "*batch n"]
) -> Float[Tensor, "*batch n"]:
    r"""Carry a tangent vector from ``p`` to ``q`` along the geodesic between them.

    :math:`v - \frac{\langle \hat q, v\rangle}{1 + \langle \hat p, \hat q\rangle}(\hat p + \hat q)`.
    An isometry: lengths and angles of tangent vectors are kept.

    Args:
        p: points where the vectors live.
        q: points on the same spheres.
        v: tangent vectors at ``p``.

    Returns:
        Tangent vectors at ``q``.

    Raises:
        ValueError: a point is zero, or ``q = -p``.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> transport(p, q, torch.tensor([0.0, 2.0]))
        tensor([-2.,  0.])
    """
    _check_not_antipodal(p, q)
    p_unit, q_unit = p / directed_length(p, "p"), q / directed_length(q, "q")
    chord = p_unit + q_unit
    # 1 + <p, q> = |p + q|^2 / 2 loses no digits near the antipode.
    half_square = (chord * chord).sum(-1, keepdim=True) / 2
    return v - (q_unit * v).sum(-1, keepdim=True) / half_square * chord


def distance(p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"]) -> Lengths:
    r"""Length of the shortest arc between two points of a sphere.

    :math:`|p|\cdot 2\,\mathrm{atan2}(|\hat p-\hat q|, |\hat p+\hat q|)`: exactly 0 for equal
    points, accurate to rounding for near-equal and near-antipodal ones, where an arc cosine loses
    half of the digits (Kahan, *How futile are mindless assessments of roundoff*, 2006, sec. 12).

    Args:
        p: points, each on the sphere of radius ``|p|``.
        q: points in the directions to measure to.

    Returns:
        One distance per pair, in the units of ``p``; an angle in radians where ``|p| = 1``.

    Raises:
        ValueError: a point is zero.

    Example:
        >>> import torch
        >>> distance(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]))
        tensor(3.1416)
    """
    return (directed_length(p, "p") * _angle(p, q)).squeeze(-1)


def angle(p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"]) -> Lengths:
    r"""Angle between two vectors in radians, as :func:`distance` computes it.

    Args:
        p: vectors of any length but 0.
        q: likewise.

    Returns:
        One angle per pair, between 0 and :math:`\pi`.

    Raises:
        ValueError: a vector is zero.

    Example:
        >>> import torch
        >>> angle(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0]))
        tensor(1.5708)
    """
    return _angle(p, q).squeeze(-1)


def _angle(p: Tensor, q: Tensor) -> Tensor:
    p_unit, q_unit = p / directed_length(p, "p"), q / directed_length(q, "q")
    return 2 * torch.atan2(vector_norm(p_unit - q_unit), vector_norm(p_unit + q_unit))


def _same_radius(radius: Tensor, q: Tensor) -> Tensor:
    """Return ``|p|/|q|``: 1 up to rounding when both lie on one sphere, as they should."""
    return radius / directed_length(q, "q")


def _check_not_antipodal(p: Tensor, q: Tensor) -> None:
    p_unit, q_unit = p / directed_length(p, "p"), q / directed_length(q, "q")
    opposite = int((vector_norm(p_unit + q_unit) == 0).sum())
    if opposite:
        raise ValueError(
            f"{opposite} pairs of points are antipodal (q = -p): every direction is a shortest "
            "path, so there is no single one to take"
        )
