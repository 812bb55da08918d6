r"""The lemma behind every normalization: centre, then project onto a sphere.

For a length :math:`\ell_0` (Euclidean, the sum of absolute values, or the spectral norm of a
matrix), centring
:math:`P` (:math:`I - 11^T/n`, or the identity) and :math:`c = Px`,

.. math:: N(x) = r\,\frac{c}{\ell(\ell_0(c))},\qquad
          \ell(s) = \sqrt{s^2 + \epsilon},\; s + \epsilon\; \text{or}\; \max(s, \epsilon).

Because :math:`\ell_0` has degree one, Euler's identity gives its derivative :math:`m` a partner:
with :math:`a = c/\ell_0(c)`, :math:`\langle m, a\rangle = 1`, and

.. math:: J = \frac{r}{\ell}\,(I - \rho\,a\,m^T)\,P,\qquad
          \rho = \frac{\ell_0\,\ell'(\ell_0)}{\ell},

which is 1 at :math:`\epsilon = 0`. For the Euclidean length :math:`a = m = \hat c`, so ``J`` is
symmetric with singular values :math:`r/\ell`, once :math:`(1-\rho)\,r/\ell` (the radial
direction) and, when centred, once 0 (the constant direction). For the spectral norm
:math:`m = u v^T`, for the sum of absolute values :math:`m = \mathrm{sign}(c)`, and ``J`` is an
oblique projection.

Source: Sun et al., *New Interpretations of Normalization Methods in Deep Learning*, AAAI 2020
(the lemma: projection and its invariances); the derivative with eps and the spectral case are
derived here and tested against autograd.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from onsphere.errors import choice
from onsphere.geometry.sphere import vector_norm

EpsPlace = Literal["inside", "outside", "clamp"]
Length = Literal["l2", "l1", "spectral"]


@dataclass(frozen=True)
class SphereMap:
    r"""One normalization: which sphere, what radius, centred or not, and how it is kept from 0/0.

    Args:
        centered: subtract the mean of each vector (of each row, for the spectral sphere) first.
        radius: length of the result at ``eps = 0``.
        norm: ``"l2"`` for vectors along the last axis; ``"l1"`` for the same, with the sum of
            absolute values as their length; ``"spectral"`` for matrices along the last two,
            whose length is their largest singular value.
        eps: the constant that keeps zero vectors finite, in the units of the squared length
            (``"inside"``) or of the length (``"outside"``, ``"clamp"``).
        eps_place: ``"inside"`` the root, :math:`\sqrt{s^2+\epsilon}`; ``"outside"``,
            :math:`s+\epsilon`; ``"clamp"``, :math:`\max(s,\epsilon)`.

    Raises:
        ValueError: a negative ``eps``, a radius that is not positive, an unknown name.
    """

    centered: bool = False
    radius: float = 1.0
    norm: Length = "l2"
    eps: float = 0.0
    eps_place: EpsPlace = "inside"

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ValueError(f"eps must be at least 0, got {self.eps}")
        if not 0 < self.radius < math.inf:
            raise ValueError(f"radius must be positive and finite, got {self.radius}")
        object.__setattr__(self, "norm", choice("norm", self.norm, get_args(Length)))
        place = choice("eps_place", self.eps_place, get_args(EpsPlace))
        object.__setattr__(self, "eps_place", place)


class Spectrum(NamedTuple):
    """Singular values of a Jacobian with their multiplicities.

    Attributes:
        values: shape ``(*batch, k)``, the distinct singular values, largest first.
        multiplicities: ``k`` counts that add up to the number of entries of one vector.
    """

    values: Float[Tensor, "*batch k"]
    multiplicities: tuple[int, ...]

    def expand(self) -> Float[Tensor, "*batch n"]:
        """Return every singular value as often as it occurs, largest first."""
        counts = torch.tensor(self.multiplicities, device=self.values.device)
        return self.values.repeat_interleave(counts, dim=-1)


class _Local(NamedTuple):
    """What the lemma needs at one point; every field broadcasts against the vectors."""

    slope: Tensor  # r / l
    rho: Tensor
    radial: Tensor  # a: the centred input over its length
    dual: Tensor  # m: the derivative of the length


def center(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    r"""Subtract the mean of each vector: :math:`P_1 x = x - \frac{1}{n} 1 1^T x`.

    Args:
        x: vectors along the last axis.

    Returns:
        Vectors whose entries sum to zero. ``center`` is linear, symmetric and idempotent, so it
        is its own derivative and its own adjoint.

    Example:
        >>> import torch
        >>> center(torch.tensor([1.0, 2.0, 6.0]))
        tensor([-2., -1.,  3.])
    """
    if x.shape[-1] == 0:
        return x
    return x - x.mean(dim=-1, keepdim=True)


def normalize(x: Float[Tensor, "*batch n"], map: SphereMap) -> Float[Tensor, "*batch n"]:
    r"""Centre, then project onto the sphere: :math:`N(x) = r\,Px/\ell(Px)`.

    Args:
        x: vectors along the last axis; matrices along the last two for the spectral sphere.
        map: the normalization.

    Returns:
        A tensor like ``x``. At ``eps = 0`` each vector has length ``map.radius`` exactly up to
        rounding; with ``eps > 0`` it is shorter by the factor ``length / (length with eps)``, and a
        zero vector stays zero.

    Raises:
        ValueError: ``eps`` is 0 and a (centred) vector is zero.

    Example:
        >>> import torch
        >>> normalize(torch.tensor([1.0, 2.0, 6.0]), SphereMap(centered=True, radius=14.0**0.5))
        tensor([-2., -1.,  3.])
    """
    c = center(x) if map.centered else x
    return c * (map.radius / regularized_length(raw_length(c, map), map))


def jacobian(x: Float[Tensor, "*batch n"], map: SphereMap) -> Float[Tensor, "*stack m m"]:
    r"""Return the dense derivative :math:`J = \frac{r}{\ell}(I-\rho\,a\,m^T)P`.

    Args:
        x: vectors along the last axis (matrices along the last two for the spectral sphere).
        map: the normalization.

    Returns:
        Shape ``(*batch, n, n)`` with ``J[..., i, j]`` the derivative of output ``i`` by input
        ``j``; a matrix counts as one row-major vector. O(n^2) memory: use :func:`jvp` and
        :func:`vjp` for anything large.

    Raises:
        ValueError: as :func:`normalize`.
    """
    rank = _vector_rank(map)
    size = math.prod(x.shape[x.ndim - rank :])
    basis = torch.eye(size, dtype=x.dtype, device=x.device)
    basis = basis.reshape(size, *([1] * (x.ndim - rank)), *x.shape[x.ndim - rank :])
    columns = jvp(x.unsqueeze(0), basis.expand(size, *x.shape), map)
    return columns.flatten(columns.ndim - rank).movedim(0, -1)


def jvp(
    x: Float[Tensor, "*batch n"], t: Float[Tensor, "*stack n"], map: SphereMap
) -> Float[Tensor, "*stack n"]:
    r"""Derivative along a direction, in O(n): :math:`J t`.

    Args:
        x: vectors, as for :func:`normalize`.
        t: directions, one per vector.
        map: the normalization.

    Returns:
        A tensor like ``t``.

    Raises:
        ValueError: as :func:`normalize`.

    Example:
        >>> import torch
        >>> x = torch.tensor([3.0, 4.0])
        >>> jvp(x, x, SphereMap())                    # scaling the input changes nothing
        tensor([0., 0.])
    """
    at = _local(x, map)
    t = center(t) if map.centered else t
    along = _inner(at.dual, t, map)
    return at.slope * (t - at.rho * along * at.radial)


def vjp(
    x: Float[Tensor, "*batch n"], g: Float[Tensor, "*stack n"], map: SphereMap
) -> Float[Tensor, "*stack n"]:
    r"""Pull a gradient back, in O(n): :math:`J^T g`.

    Args:
        x: vectors, as for :func:`normalize`.
        g: gradients with respect to the output, one per vector.
        map: the normalization.

    Returns:
        Gradients with respect to ``x``: orthogonal to ``x`` at ``eps = 0``, and of zero mean
        when centred.

    Raises:
        ValueError: as :func:`normalize`.

    Example:
        >>> import torch
        >>> vjp(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]), SphereMap(radius=25.0))
        tensor([ 3.2000, -2.4000])
    """
    at = _local(x, map)
    along = _inner(at.radial, g, map)
    pulled = at.slope * (g - at.rho * along * at.dual)
    return center(pulled) if map.centered else pulled


def spectrum(x: Float[Tensor, "*batch n"], map: SphereMap) -> Spectrum:
    r"""Singular values of the Jacobian, with multiplicities, in O(n).

    On the L2 sphere: :math:`r/\ell`, then :math:`(1-\rho)\,r/\ell` once, then 0 once if centred.
    On the other spheres the plane of :math:`a` and :math:`Pm` holds two of them, with product
    :math:`1-\rho` and sum of squares :math:`2-2\rho+\rho^2|a|^2|Pm|^2` (times
    :math:`(r/\ell)^2`).

    Args:
        x: vectors, as for :func:`normalize`.
        map: the normalization.

    Returns:
        Values, largest first, and how often each occurs; counts that vanish (short vectors) are
        dropped.

    Raises:
        ValueError: as :func:`normalize`.

    Example:
        >>> import torch
        >>> spectrum(torch.tensor([0.0, 3.0, -3.0, 0.0]), SphereMap(centered=True, radius=2.0))
        Spectrum(values=tensor([0.4714, 0.0000]), multiplicities=(2, 2))
    """
    at = _local(x, map)
    rank = _vector_rank(map)
    slope, rho = at.slope.flatten(-rank)[..., 0], at.rho.flatten(-rank)[..., 0]
    size = math.prod(x.shape[x.ndim - rank :])
    constant = math.prod(x.shape[x.ndim - rank : -1]) if map.centered else 0
    free = size - constant  # the dimension of the space that centring leaves
    if map.norm != "l2":
        axes = tuple(range(-rank, 0))
        dual = center(at.dual) if map.centered else at.dual
        square = at.radial.square().sum(axes) * dual.square().sum(axes)  # and <m, a> = 1
        total = (4 - 4 * rho + (rho * rho * square)).clamp_min(0).sqrt()
        gap = rho * (square).sqrt()
        blocks = [((total + gap) / 2, 1), (torch.ones_like(rho), free - 2)]
        blocks += [((total - gap).clamp_min(0) / 2, 1)]
        if free < 2:  # a single entry: the plane of a and m is a line
            blocks = [(1 - rho, free)]
    else:
        blocks = [(torch.ones_like(rho), free - 1), (1 - rho, min(free, 1))]
    blocks.append((torch.zeros_like(rho), constant))
    return _merge_zeros([(slope * value, count) for value, count in blocks if count > 0])


def raw_length(c: Float[Tensor, "*batch n"], map: SphereMap) -> Float[Tensor, "*lengths 1"]:
    """Length of (centred) vectors before eps, with the axes of one vector kept at size 1."""
    if map.norm == "spectral":
        return torch.linalg.matrix_norm(c, ord=2)[..., None, None]
    return c.abs().sum(-1, keepdim=True) if map.norm == "l1" else vector_norm(c)


def regularized_length(s: Float[Tensor, "*lengths 1"], map: SphereMap) -> Tensor:
    """Return the length that divides: ``s`` with eps in its place.

    Raises:
        ValueError: ``eps`` is 0 and a length is zero.
    """
    if map.eps == 0:
        zeros = int((s == 0).sum())
        if zeros:
            raise ValueError(
                f"{zeros} of {s.numel()} vectors are zero"
                f"{' after centring' if map.centered else ''} and have no direction; "
                "give eps > 0 to send them to zero"
            )
        return s
    if map.eps_place == "inside":
        return torch.hypot(s, s.new_tensor(map.eps).sqrt())
    if map.eps_place == "outside":
        return s + map.eps
    return s.clamp_min(map.eps)


def _local(x: Tensor, map: SphereMap) -> _Local:
    c = center(x) if map.centered else x
    s = raw_length(c, map)
    regularized = regularized_length(s, map)
    share = s / regularized
    if map.eps == 0:
        rho = torch.ones_like(s)
    elif map.eps_place == "inside":
        rho = share * share
    elif map.eps_place == "outside":
        rho = share
    else:
        rho = (s >= map.eps).to(s.dtype)
    radial = c / torch.where(s == 0, torch.ones_like(s), s)
    dual = radial
    if map.norm == "spectral":
        u, _, vh = torch.linalg.svd(c, full_matrices=False)
        dual = u[..., :, :1] * vh[..., :1, :]
    elif map.norm == "l1":
        dual = c.sign()
    return _Local(map.radius / regularized, rho, radial, dual)


def _vector_rank(map: SphereMap) -> int:
    return 2 if map.norm == "spectral" else 1


def _inner(a: Tensor, b: Tensor, map: SphereMap) -> Tensor:
    axes = (-2, -1) if map.norm == "spectral" else (-1,)
    return (a * b).sum(axes, keepdim=True)


def _merge_zeros(blocks: list[tuple[Tensor, int]]) -> Spectrum:
    """Join trailing blocks that are identically zero, so that eps = 0 reads as one null space."""
    while len(blocks) > 1 and not blocks[-1][0].any() and not blocks[-2][0].any():
        (value, first), (_, second) = blocks[-2:]
        blocks[-2:] = [(value, first + second)]
    return Spectrum(torch.stack([v for v, _ in blocks], -1), tuple(n for _, n in blocks))
