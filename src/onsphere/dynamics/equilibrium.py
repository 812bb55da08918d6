r"""Where weight decay and gradients balance: the rotation per step and the norm they settle at.

For a scale-invariant weight the gradient lengthens and the decay shortens. In the balance, the
weight turns by a fixed angle per step that no longer depends on the gradients' size.
:math:`\eta` is the learning rate, :math:`\lambda` the weight decay, :math:`\alpha` the momentum,
:math:`a = 1 - \eta\lambda`.

Two mechanisms cover all optimizers. *Decoupled decay* is :math:`w' = a w - \eta u`, so :math:`w` is
a geometric sum of past updates. With :math:`R_k` the mean of :math:`\langle u_t, u_{t+k}\rangle`,

.. math:: |w|^2 = \eta^2\,\frac{R_0 + 2\sum_{k\ge1} a^k R_k}{1-a^2}, \qquad
          \langle w, u\rangle = -\eta\sum_{k\ge1} a^{k-1} R_k, \qquad
          \cos\theta = a - \eta\,\frac{\langle w, u\rangle}{|w|^2}.

For the running average of Adam, :math:`R_k = R_0\beta_1^k`, this is
:math:`\cos\theta = (a + \beta_1)/(1 + a\beta_1)`. *Coupled decay* passes through the momentum as
gradients do, which makes :math:`w` an autoregression of order two with
:math:`\cos\theta = 1 - \eta\lambda/(1+\alpha)`.

All laws assume gradients orthogonal to the weight, uncorrelated from step to step, many
coordinates, and a norm that is steady over the memory of the momentum. In training the first two
hold as far as noise dominates.

Source: van Laarhoven, 2017 (arXiv 1706.05350); Wan et al., 2020 (arXiv 2006.08419); Kosson et al.,
2023 (arXiv 2305.17212), section 3; the sums over correlations are derived here.
"""

import math
from typing import NamedTuple

from onsphere.dynamics.autocorrelation import Memory, Response, arcsine, linear, polar


class Equilibrium(NamedTuple):
    """What a run with weight decay settles at.

    Attributes:
        rotation: root mean square angle between successive weights, in radians per step.
        norm: length of the weight, in its own units.
        rate: how fast ``norm**power`` approaches its value, per step: the distance shrinks as
            ``exp(-rate * steps)``.
        power: the power of the norm that approaches exponentially.
        slope: at another norm the same learning rate turns the weight by
            ``rotation * (self.norm / norm) ** slope``.
    """

    rotation: float
    norm: float
    rate: float
    power: int = 4
    slope: int = 2


def sgd_equilibrium(
    *,
    lr: float,
    weight_decay: float,
    unit_gradient_square: float = 1.0,
    momentum: float = 0.0,
    decoupled: bool = False,
) -> Equilibrium:
    r"""Return the equilibrium of SGD; coupled decay is that of ``torch.optim.SGD``.

    .. math:: \cos\theta = 1 - \frac{\eta\lambda}{1+\alpha}, \qquad
              |w|^4 = \frac{\eta L}{\lambda(1-\alpha)(2 - \eta\lambda/(1+\alpha))},

    so :math:`\theta\approx\sqrt{2\eta\lambda/(1+\alpha)}`, approached as :math:`|w|^4` at the rate
    :math:`4\eta\lambda/(1-\alpha)`. With decoupled decay
    :math:`\theta\approx\sqrt{2\eta\lambda(1-\alpha)/(1+\alpha)}`,
    :math:`|w|^4\approx\eta L/(2\lambda(1-\alpha)^2)`, and the rate is :math:`4\eta\lambda`.

    Args:
        lr: :math:`\eta`.
        weight_decay: :math:`\lambda`.
        unit_gradient_square: :math:`L`, the mean of the squared gradient norm at the unit-norm
            point, for the vector whose norm is asked for. The rotation does not depend on it.
        momentum: :math:`\alpha`, without dampening.
        decoupled: shrink the weight directly instead of adding the decay to the gradient.

    Returns:
        The rotation per step, the norm, and the rate of approach.

    Raises:
        ValueError: a value for which there is no equilibrium.

    Example:
        >>> at_rest = sgd_equilibrium(lr=0.1, weight_decay=5e-4, momentum=0.9)
        >>> round(at_rest.rotation, 5), round(at_rest.norm, 3)
        (0.00725, 5.623)
        >>> at_rest = sgd_equilibrium(lr=0.1, weight_decay=5e-4, momentum=0.9, decoupled=True)
        >>> round(at_rest.rotation, 5)
        0.00229
    """
    _check(lr, weight_decay, momentum=momentum, unit_gradient_square=unit_gradient_square)
    shrink = lr * weight_decay
    if decoupled:
        # The buffer sums what Memory averages: its update is longer by 1 / (1 - momentum).
        memory = Memory.of_momentum(momentum)
        square = memory.power * unit_gradient_square / (1 - momentum) ** 2
        turned, fourth_power = _balance(lr, weight_decay, square, memory, linear)
        return Equilibrium(turned, fourth_power**0.25, 4 * shrink)
    if shrink >= 2 * (1 + momentum):
        raise ValueError(
            f"lr * weight_decay = {shrink:g} makes the decay itself diverge; it must be below "
            f"2 (1 + momentum) = {2 * (1 + momentum):g}"
        )
    fourth_power = lr * unit_gradient_square
    fourth_power /= weight_decay * (1 - momentum) * (2 - shrink / (1 + momentum))
    turned = _angle(shrink / (1 + momentum))
    return Equilibrium(turned, fourth_power**0.25, 4 * shrink / (1 - momentum))


def adamw_equilibrium(
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    coordinates: int = 1,
) -> Equilibrium:
    r"""Return the equilibrium of AdamW, as ``torch.optim.AdamW`` has it.

    .. math:: \cos\theta = \frac{a+\beta_1}{1+a\beta_1}, \qquad
              |w|^2 = \eta^2 C\,\frac{1-\beta_1}{1+\beta_1}\,
                      \frac{1+a\beta_1}{(1-a^2)(1-a\beta_1)},

    so :math:`\theta\approx\sqrt{2\eta\lambda(1-\beta_1)/(1+\beta_1)}` and
    :math:`|w|\approx\sqrt{\eta C/2\lambda}`, approached as :math:`|w|^2` at the rate
    :math:`2\eta\lambda`. Assumes that the second moment is that of the present gradients, which is
    so once :math:`\beta_2` remembers fewer steps than the norm takes to settle.

    Args:
        lr: :math:`\eta`.
        weight_decay: :math:`\lambda`.
        betas: :math:`\beta_1, \beta_2`, of which the balance depends on the first.
        coordinates: :math:`C`, entries of the weight; with 1 the norm is the root mean square of
            its entries.

    Returns:
        The rotation per step, the norm, and the rate of approach.

    Raises:
        ValueError: a value for which there is no equilibrium.

    Example:
        >>> at_rest = adamw_equilibrium(lr=1e-3, weight_decay=0.1)
        >>> round(at_rest.rotation, 5), round(at_rest.norm, 4)
        (0.00324, 0.0707)
    """
    memory = Memory.of_momentum(betas[0])
    return _decoupled(lr, weight_decay, memory.power * coordinates, memory, linear)


def adam_l2_equilibrium(
    *,
    lr: float,
    weight_decay: float,
    unit_gradient_square: float,
    betas: tuple[float, float] = (0.9, 0.999),
    coordinates: int = 1,
) -> Equilibrium:
    r"""Return the equilibrium of Adam with the decay in its gradient, as ``torch.optim.Adam``.

    .. math:: |w|^3 = \frac{\eta\sqrt{CL}}{2\lambda}, \qquad
              \theta = \frac{\eta}{|w|}\sqrt{C\,\frac{1-\beta_1}{1+\beta_1}}.

    The norm, and so the rotation, depend on :math:`L`: unlike with AdamW, weights with small
    gradients turn faster than others. Assumes that the decay is a small part of the gradient, and a
    small angle. Near the balance :math:`|w|^3` approaches at the rate
    :math:`3\eta\lambda\sqrt{C/L}\,|w|`.

    Args:
        lr: :math:`\eta`.
        weight_decay: :math:`\lambda`.
        unit_gradient_square: :math:`L`, of the vector whose norm is asked for.
        betas: :math:`\beta_1, \beta_2`, of which the balance depends on the first.
        coordinates: :math:`C`, entries of the weight.

    Returns:
        The rotation per step, the norm, and the rate of approach.

    Raises:
        ValueError: a value for which there is no equilibrium.

    Example:
        >>> for unit_gradient_square in (1.0, 64.0):
        ...     at_rest = adam_l2_equilibrium(
        ...         lr=1e-3, weight_decay=1e-2, unit_gradient_square=unit_gradient_square)
        ...     print(round(at_rest.rotation, 5), round(at_rest.norm, 3))
        0.00062 0.368
        0.00031 0.737
    """
    _check(
        lr, weight_decay, unit_gradient_square=unit_gradient_square, coordinates=float(coordinates)
    )
    memory = Memory.of_momentum(betas[0])
    norm = (lr * math.sqrt(coordinates * unit_gradient_square) / (2 * weight_decay)) ** (1 / 3)
    turned = lr * math.sqrt(coordinates * memory.power) / norm
    rate = 3 * lr * weight_decay * math.sqrt(coordinates / unit_gradient_square) * norm
    return Equilibrium(turned, norm, rate, power=3, slope=1)


def lion_equilibrium(
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.99),
    coordinates: int = 1,
) -> Equilibrium:
    r"""Return the equilibrium of Lion by the arcsine law.

    Each entry moves by the sign of :math:`c_t` (:class:`Memory`), whose correlation over :math:`k`
    steps is :math:`R_k = \frac2\pi\arcsin\rho_k` for Gaussian gradients, per entry; the rest is the
    balance of decoupled decay. :math:`|w|^2` is approached at the rate :math:`2\eta\lambda`.

    Args:
        lr: :math:`\eta`.
        weight_decay: :math:`\lambda`.
        betas: :math:`\beta_1, \beta_2`.
        coordinates: :math:`C`, entries of the weight that get a gradient; with 1 the norm is the
            root mean square of its entries.

    Returns:
        The rotation per step, the norm, and the rate of approach.

    Raises:
        ValueError: a value for which there is no equilibrium.

    Example:
        >>> at_rest = lion_equilibrium(lr=1e-4, weight_decay=1.0)
        >>> round(at_rest.rotation, 5), round(at_rest.norm, 4)
        (0.00209, 0.0477)
    """
    return _decoupled(lr, weight_decay, float(coordinates), Memory(*betas), arcsine)


def lion_published_equilibrium(
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.99),
    coordinates: int = 1,
) -> Equilibrium:
    r"""Return the equilibrium of Lion as it was published, for comparison.

    .. math:: \theta = k\sqrt{\pi\eta\lambda}, \qquad |w| = \frac1k\sqrt{\frac{\eta C}{\pi\lambda}},

    with :math:`k^2` the :attr:`Memory.power`. It takes the sign for a linear function; use
    :func:`lion_equilibrium`, which does not.

    Args:
        lr: :math:`\eta`.
        weight_decay: :math:`\lambda`.
        betas: :math:`\beta_1, \beta_2`.
        coordinates: :math:`C`, entries of the weight.

    Returns:
        The rotation per step, the norm, and the rate of approach.

    Raises:
        ValueError: a value for which there is no equilibrium.

    Example:
        >>> round(lion_published_equilibrium(lr=1e-4, weight_decay=1.0).rotation, 5)
        0.0021

    Source: Kosson et al., 2023 (arXiv 2305.17212), table 1.
    """
    _check(lr, weight_decay, coordinates=float(coordinates))
    blend = math.sqrt(Memory(*betas).power)
    turned = blend * math.sqrt(math.pi * lr * weight_decay)
    norm = math.sqrt(lr * coordinates / (math.pi * weight_decay)) / blend
    return Equilibrium(turned, norm, 2 * lr * weight_decay, power=2, slope=1)


def muon_equilibrium(
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    shape: tuple[int, int] | None = None,
    scale: float = 1.0,
) -> Equilibrium:
    r"""Return the equilibrium of Muon, as ``torch.optim.Muon`` has it.

    The update is the nearest orthogonal matrix of the momentum: its squared length is the smaller
    side of the matrix, and how much of the momentum's correlation it keeps depends on the shape
    (:func:`polar`). Without a shape, all of it is kept, as in a long thin matrix, and then the
    rotation without Nesterov's step is that of AdamW. :math:`|w|^2` is approached at the rate
    :math:`2\eta\lambda`.

    Args:
        lr: :math:`\eta`; the factor for the shape goes into ``scale``.
        weight_decay: :math:`\lambda`.
        momentum: :math:`\alpha`.
        nesterov: whether the step looks ahead.
        shape: rows and columns of the weight, both large; without it the norm is that of a matrix
            whose smaller side is 1.
        scale: factor of the update alone, as torch's ``adjust_lr_fn`` gives it. It changes the norm
            and not the rotation.

    Returns:
        The rotation per step of the whole matrix, its Frobenius norm, and the rate of approach.

    Raises:
        ValueError: a value for which there is no equilibrium.

    Example:
        >>> thin, square = (
        ...     muon_equilibrium(lr=0.02, weight_decay=0.1, shape=shape)
        ...     for shape in (None, (64, 64)))
        >>> round(thin.rotation, 4), round(square.rotation, 4)
        (0.0111, 0.0128)
    """
    _check(lr, weight_decay, scale=scale)
    memory = Memory.of_momentum(momentum, nesterov)
    response = linear if shape is None else polar(*shape)
    square = scale**2 * (1.0 if shape is None else min(shape))
    return _decoupled(lr, weight_decay, square, memory, response)


def _decoupled(
    lr: float, weight_decay: float, update_square: float, memory: Memory, response: Response
) -> Equilibrium:
    """Return the balance of decoupled decay where the length of an update is not the norm's."""
    turned, square = _balance(lr, weight_decay, update_square, memory, response)
    return Equilibrium(turned, math.sqrt(square), 2 * lr * weight_decay, power=2, slope=1)


def _balance(
    lr: float, weight_decay: float, update_square: float, memory: Memory, response: Response
) -> tuple[float, float]:
    """Return the angle, and the square of the norm that updates of this square would give."""
    _check(lr, weight_decay, update_square=update_square)
    shrink = lr * weight_decay
    if shrink >= 1:
        raise ValueError(
            f"lr * weight_decay = {shrink:g} leaves nothing of the weight; it is below 1"
        )
    kept = response(memory.correlations())
    lags = kept.new_tensor(range(len(kept)))
    repeated = float((kept * (1 - shrink) ** lags).sum())  # sum of a^(k-1) R_k / R_0
    total = 1 + 2 * (1 - shrink) * repeated
    lost = shrink * (2 - shrink)  # 1 - a^2
    return (
        _angle(shrink - lost * repeated / total),
        lr**2 * update_square * total / lost,
    )


def _angle(one_minus_cosine: float) -> float:
    """Return the angle, with all its digits where it is small."""
    return 2 * math.asin(math.sqrt(one_minus_cosine / 2))


def _check(lr: float, weight_decay: float, momentum: float = 0.0, **positive: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    given = {"lr": lr, "weight_decay": weight_decay, **positive}
    if not all(value > 0 for value in given.values()):
        raise ValueError(
            "without a positive rate, decay and gradient there is no equilibrium (free_growth "
            "gives the norm without decay): got "
            + ", ".join(f"{name}={value}" for name, value in given.items())
        )
