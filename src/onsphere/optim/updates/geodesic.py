r"""How far a vector turns, along which curve, and what its momentum does meanwhile.

An optimizer step on a sphere needs few numbers of a vector: inner products of the point, the
gradient and the momentum. A step therefore has three parts, here and in the native kernels:

- *reduce*: sum the inner products over each vector (where a vector is spread over several tensors
  or processes, their sums are added);
- *plan*: turn them into a few coefficients per vector, which is all the geometry there is;
- *apply*: write the new point and momentum as linear combinations.

This file is the geometry that all plans share; :mod:`~onsphere.optim.updates.per_vector` and
:mod:`~onsphere.optim.updates.per_coordinate` are the two kinds of update.

With :math:`t` the tangent part of the update at the point :math:`p`, on the sphere of radius
:math:`r`, the point goes to :math:`a p + b t` and a tangent vector :math:`m` that travels along to
:math:`m + d p + e t`. For a rotation by the angle :math:`\theta`,

.. math:: a = \frac{r}{|p|}\cos\theta,\qquad b = -\frac{r}{|t|}\sin\theta,

where ``lr_mode="rate"`` means :math:`\tan\theta = \eta |t| / r` for the projection and
:math:`\theta = \eta |t| / r` for the exponential map (in space, both steps begin as
:math:`-\eta t`), and ``lr_mode="angle"`` means :math:`\theta = \eta` whatever the size of the
update. A rate depends on the length: where the function does not, a gradient is as large as
:math:`1/r`, so that SGD turns by :math:`\eta/r^2` and AdamW, whose update has one size, by
:math:`\eta/r` times what has nothing to do with the length. ``lr_mode="relative"`` puts a reference
length :math:`\rho` in its place: the optimizer does to a vector of any length what the rate does to
one of length :math:`\rho`, which is to step by :math:`-\eta (r/\rho)\,t`, and by
:math:`-\eta (r/\rho)^2\,t` for SGD. The projection takes :math:`m` to the tangent space at the
new point; the exponential map transports it in parallel along the geodesic.

What cannot be known of a turn is not made up. Three kinds of vectors are at rest:

- *zero*: a vector whose mean square is below ``Limits.least``, where squares lose their digits, has
  no direction; it and its momentum stay as they are.
- *unseen*: an update whose mean square is below it, or that is radial to rounding, has none either.
  For a large turn more of the update has to be tangent than for a small one, so that the length of
  the tangent part, and with it the radius, is right to rounding. The point stays.
- *without news*: under ``lr_mode="angle"`` the size of an update does not matter, so momentum that
  dies away would turn its vector by the full rate for as long as it can be represented. A vector
  whose gradient is a small share of what steady gradients are of their momentum turns in proportion
  to that share; one whose gradient is zero does not turn.

The first two are counted where a gradient asked for a turn (``Plan.refused``); an update that is
radial to rounding asks for none: at a minimum every gradient is radial.

Source: Cho & Lee, *Riemannian approach to batch normalization*, 2017 (arXiv 1709.09603), for the
exponential map; Absil, Mahony & Sepulchre, *Optimization Algorithms on Matrix Manifolds*, 2008,
section 4.1, for retractions.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from onsphere.geometry import Sphere

Retraction = Literal["projection", "exponential"]
LrMode = Literal["relative", "rate", "angle"]
Axes = tuple[int, ...]


@dataclass(frozen=True)
class StepOptions:
    """What one step does to every vector of a group.

    Attributes:
        lr: the learning rate; a tensor only where a step is ``capturable``.
        lr_mode: ``"rate"`` as in the base optimizer, ``"relative"`` for that at a reference length,
            ``"angle"`` for radians per step.
        retraction: how the step comes back to the sphere, by ``"projection"`` or along the
            geodesic, by the ``"exponential"`` map.
        radius: the radius that vectors not seen before get; ``None`` for the one they have.
        centered: whether vectors have a mean of zero.
        ascend: maximize instead of minimizing.
        reference: the reference length of a relative rate (:func:`reference_length`).
        capturable: whether numbers that change from step to step are tensors, so that the step
            can be recorded and replayed; the native kernels take numbers.
    """

    lr: float | Tensor
    lr_mode: LrMode = "rate"
    retraction: Retraction = "projection"
    radius: float | None = None
    centered: bool = False
    ascend: bool = False
    reference: float = 1.0
    capturable: bool = False


class StepCoefficients(NamedTuple):
    """The coefficients ``a, b, d, e`` of a move, one of each per vector."""

    a: Tensor
    b: Tensor
    d: Tensor
    e: Tensor


class Plan(NamedTuple):
    """Coefficients per vector, which vectors can follow them, and which of these do not turn.

    A vector that is *refused* was given a gradient, and its update has no direction.
    """

    coefficients: Tensor
    sound: Tensor
    refused: Tensor

    @property
    def skipped(self) -> Tensor:
        """How many vectors were left where they were."""
        return (~self.sound | self.refused).sum()


class Limits(NamedTuple):
    """What rounding leaves of the numbers of a vector, in one precision.

    Attributes:
        floor: a smaller share of an update's square cannot be told from rounding.
        steep: times the squared sine of a turn, the share of an update that must be tangent.
        least: squares below it have lost digits to underflow.
        close: how far off its sphere, relatively, rounding alone may put a vector.
    """

    floor: float
    steep: float
    least: float
    close: float


@functools.cache
def limits_of(dtype: torch.dtype) -> Limits:
    """Return the limits for parameters of a dtype; steps are computed in at least float32.

    Example:
        >>> limits_of(torch.bfloat16).floor
        1e-06
    """
    wide = torch.finfo(torch.promote_types(dtype, torch.float32))
    close = max(torch.finfo(dtype).eps / 2, 2 * wide.eps)
    floor, steep = (1e-6, 0.3) if wide.bits == 32 else (1e-14, 1e-4)
    return Limits(floor, steep, wide.tiny / wide.eps, close)


def share_of_news(fresh: Tensor, momentum: Tensor, decay: float) -> Tensor:
    r"""Return how much of a momentum is fresh gradient, beside what steady gradients make it.

    Args:
        fresh: :math:`|\kappa g|^2`, what the gradient adds to the momentum.
        momentum: :math:`|h|^2`, the momentum with it.
        decay: of which share remains from step to step.

    Returns:
        :math:`|\kappa g| / ((1 - \alpha) |h|)`: 1 for a gradient that is always the same.

    Example:
        >>> share_of_news(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 4.0]), 0.5)
        tensor([1., 0.])
    """
    share = (fresh / momentum).sqrt() / max(1 - decay, 1e-6)
    return torch.where(momentum > 0, share, 1)


# A gradient of a tenth of its steady share of the momentum still turns its vector by the full rate.
_ENOUGH = 0.1
# An update that turns its vector by less than that, whatever underflow hides, changes no radius.
_SMALL_TURN = 1e-4


class Update(NamedTuple):
    r"""What a plan knows of the update of each vector, one number per vector.

    Attributes:
        tangent: :math:`|t|^2`.
        along: :math:`\langle m, t\rangle`.
        whole: :math:`|u|^2`, of the update before its projection.
        gradient: :math:`|g|^2`; a gradient whose square underflows is none.
        share: of news in the momentum (:func:`share_of_news`).
        least: below this ``whole`` has lost digits to underflow.
        normed: whether its size does not depend on that of the gradients.
    """

    tangent: Tensor
    along: Tensor
    whole: Tensor
    gradient: Tensor
    share: Tensor
    least: Tensor
    normed: bool = False


def step_coefficients(
    options: StepOptions, square: Tensor, radius: Tensor, update: Update, limits: Limits
) -> StepCoefficients:
    r"""Return the coefficients of a move, in the terms of this module's first lines.

    Args:
        options: how far, and along which curve.
        square: :math:`|p|^2`, one number per vector; all others have its shape.
        radius: :math:`r`.
        update: what moves the vectors.
        limits: what rounding leaves of these numbers.

    Returns:
        ``a, b, d, e``; ``b`` is 0 where a vector does not turn.

    Example:
        >>> import torch
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> update = Update(one, zero, one, one, one, zero)
        >>> limits = limits_of(torch.float32)
        >>> step_coefficients(StepOptions(1.0), one, one, update, limits)[:2]  # to (p-t)/sqrt(2)
        (tensor([0.7071]), tensor([-0.7071]))
    """
    tangent, along, whole, _, share, least, normed = update
    length, size = square.sqrt(), tangent.sqrt()
    rotation = options.lr_mode == "angle"
    per_size = 1 / radius
    if options.lr_mode == "relative":
        rho = options.reference
        per_size = torch.full_like(radius, 1 / rho) if normed else radius / rho**2
    angle = options.lr * ((share / _ENOUGH).clamp_max(1) if rotation else size * per_size)
    needed = limits.steep * angle * angle / (1 + angle * angle)
    seen = whole > least
    if rotation:
        needed = needed.clamp_min(limits.floor)
    else:
        seen = seen | (options.lr * least.sqrt() * per_size < _SMALL_TURN)
    moving = (angle > 0) & seen & (tangent > needed * whole)
    angle = torch.where(moving, angle, 0)
    over = torch.where(moving, angle / size, 0)
    if rotation or options.retraction == "exponential":
        cosine, sine = angle.cos(), torch.sinc(angle / torch.pi) * over
    else:
        cosine = (1 + angle * angle).rsqrt()
        sine = cosine * over
    a, b = cosine * radius / length, torch.where(moving, -sine * radius, 0)
    if options.retraction == "exponential":
        half = torch.sinc(angle / (2 * torch.pi)) / 2 * over
        d, e = along * sine / length, -2 * half * half * along
    else:
        onto = -b * along / (radius * radius)
        d, e = onto * a, onto * b
    return StepCoefficients(a, b, torch.where(moving, d, 0), torch.where(moving, e, 0))


def refusals(
    moved: StepCoefficients, update: Update, options: StepOptions, limits: Limits
) -> Tensor:
    """Return which vectors were to turn and do not, for want of a direction known well enough.

    An update without a tangent part asks for no turn: at a minimum every gradient is radial.
    """
    asked = update.tangent > limits.floor * update.whole
    if options.lr_mode == "angle":
        asked = asked | (update.whole <= update.least)
    return asked & (update.gradient > 0) & (moved.b == 0) & (options.lr > 0)


def leave_resting(
    moved: StepCoefficients, count: int, square: Tensor, radius: Tensor, rounding: float
) -> StepCoefficients:
    """Leave vectors alone that do not turn and are on their sphere to rounding.

    A vector of one entry has no tangent: it is set to its radius and never turns.
    """
    a, b, d, e = moved
    if count == 1:
        a, (b, d, e) = radius / square.sqrt(), (torch.zeros_like(b) for _ in range(3))
    still = (b == 0) & ((a - 1).abs() <= rounding)
    return StepCoefficients(torch.where(still, 1, a), b, d, e)


def record(radius: Tensor, square: Tensor, given: float | None, sound: Tensor) -> Tensor:
    """Give vectors that have no radius yet the one they shall keep; return all radii, exact."""
    fresh = (radius == 0) & sound
    wanted = square.sqrt() if given is None else torch.full_like(square, given)
    radius.copy_(torch.where(fresh, wanted.to(radius.dtype), radius))
    return radius.to(square.dtype)


@functools.lru_cache(maxsize=4096)
def reference_length(shapes: tuple[tuple[int, ...], ...], sphere: Sphere) -> float:
    r"""Return :math:`\sqrt{n/3m}`, the length at which the layers of ``torch.nn`` start.

    They draw their entries uniformly from :math:`\pm1/\sqrt m`, with :math:`m` the inputs of one
    output. For a row or a filter that is 0.58, for a whole tensor the root of their number more, so
    that tensors turn by the same angle in whichever vectors they are cut.

    Args:
        shapes: of the tensors that share their vectors.
        sphere: which entries form a vector; :math:`n` is their number.

    Returns:
        A length; :math:`m` is the number of entries behind one index of a tensor's first axis. A
        tensor of one axis has that of the widest beside it, as a bias has, and 1 where it is alone.

    Example:
        >>> from onsphere.geometry import Sphere, VectorAxes
        >>> rows, whole = Sphere(VectorAxes((0,))), Sphere()
        >>> [round(reference_length(((9, 4, 3, 3),), sphere), 3) for sphere in (rows, whole)]
        [0.577, 1.732]
    """
    inputs = [math.prod(shape[1:]) if len(shape) > 1 else 0 for shape in shapes]
    widest = max(*inputs, 1)
    square = sum(math.prod(s) / (3 * (m or widest)) for s, m in zip(shapes, inputs, strict=True))
    return math.sqrt(square / max(1, sphere.axes.count(shapes[0]))) or 1.0


def inner(a: Tensor, b: Tensor, inside: Axes) -> Tensor:
    r"""Return the inner product :math:`\langle a, b\rangle` of each pair of vectors.

    Args:
        a: any tensor.
        b: a tensor of the same shape.
        inside: the axes along which one vector runs; ``()`` makes every entry a vector.

    Returns:
        One number per vector, in a single axis.

    Example:
        >>> import torch
        >>> inner(torch.ones(2, 3), torch.ones(2, 3), (1,))
        tensor([3., 3.])
    """
    return total(a * b, inside)


def total(x: Tensor, inside: Axes) -> Tensor:
    """Sum over each vector; one number per vector, in a single axis."""
    # An empty tuple of axes means "all axes" to torch.sum, and "none" here.
    return (x.sum(inside) if inside else x).reshape(-1)


def spread(numbers: Tensor, view: Tensor, inside: Axes) -> Tensor:
    """Lay one number per vector out so that it broadcasts against the view."""
    shape = [1 if axis in inside else size for axis, size in enumerate(view.shape)]
    return numbers.reshape(shape)


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which a step is computed: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


@torch.no_grad()
def project_(param: Tensor, sphere: Sphere) -> Tensor:
    r"""Scale the vectors of a tensor in place to the radius of their sphere.

    Args:
        param: any real floating point tensor that has the axes of ``sphere``.
        sphere: which entries form a vector, and its radius. With ``radius=None`` a vector already
            has its length, and nothing changes but the mean of centred vectors.

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
    view, inside = sphere.axes.split(param)
    if sphere.centered:
        center_(view, inside)
    if sphere.radius is None:
        return param
    norms = sphere.axes.norms(param)
    scale = torch.where((norms > 0) & norms.isfinite(), sphere.radius / norms, 1.0)
    view.copy_(view * scale)
    return param


def center_(view: Tensor, inside: Axes) -> Tensor:
    """Remove the mean of each vector, in place; vectors that are not finite stay as they are."""
    if inside and view.numel():
        mean = view.mean(inside, keepdim=True, dtype=working_dtype(view))
        view.sub_(torch.where(mean.isfinite(), mean, 0).to(view.dtype))
    return view
