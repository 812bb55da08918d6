r"""Where weight decay and gradients balance: the rotation per step and the norm they settle at.

For a scale-invariant weight the gradient lengthens and the decay shortens. In the balance, the
weight turns by a fixed angle per step that no longer depends on the gradients' size.
:math:`\eta` is the learning rate, :math:`\lambda` the weight decay, :math:`\alpha` the momentum.

Source: van Laarhoven, 2017 (arXiv 1706.05350); Wan et al., 2020 (arXiv 2006.08419); Kosson et al.,
2023 (arXiv 2305.17212).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Equilibrium(NamedTuple):
    """What a run with weight decay settles at.

    Attributes:
        rotation: root mean square angle between successive weights, in radians per step.
        norm: length of the weight, in its own units.
        rate: how fast ``norm**4`` approaches its value, per step: the distance shrinks as
            ``exp(-rate * steps)``.
    """

    rotation: float
    norm: float
    rate: float


def sgd_equilibrium(
    *, lr: float, decay: float, unit_gradient_square: float, momentum: float = 0.0
) -> Equilibrium:
    r"""Return the equilibrium of SGD with coupled weight decay, as ``torch.optim.SGD`` has it.

    .. math:: \theta = \sqrt{\frac{2\eta\lambda}{1+\alpha}}, \qquad
              |w|^4 = \frac{\eta L}{\lambda(1-\alpha)(2 - \eta\lambda/(1+\alpha))},

    approached as :math:`|w|^4` at the rate :math:`4\eta\lambda/(1-\alpha)`. Assumes gradients
    orthogonal to the weight, uncorrelated from step to step, with :math:`L` the mean of their
    squared norm at the unit-norm point. Within 0.1% on a random walk.

    Args:
        lr: :math:`\eta`.
        decay: :math:`\lambda`.
        unit_gradient_square: :math:`L`, for the vector whose norm is asked for.
        momentum: :math:`\alpha`, without dampening.

    Returns:
        The rotation per step, the norm, and the rate of approach.

    Raises:
        ValueError: a value for which there is no equilibrium.

    Example:
        >>> at_rest = sgd_equilibrium(lr=0.1, decay=5e-4, unit_gradient_square=1.0, momentum=0.9)
        >>> round(at_rest.rotation, 5), round(at_rest.norm, 3)
        (0.00725, 5.623)
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if not (lr > 0 and decay > 0 and unit_gradient_square > 0):
        raise ValueError(
            "without a positive rate, decay and gradient there is no equilibrium (free_growth "
            f"gives the norm without decay): got lr={lr}, decay={decay}, "
            f"unit_gradient_square={unit_gradient_square}"
        )
    shrink = lr * decay
    if shrink >= 2 * (1 + momentum):
        raise ValueError(
            f"lr * decay = {shrink:g} makes the decay itself diverge; it must be below "
            f"2 (1 + momentum) = {2 * (1 + momentum):g}"
        )
    fourth_power = lr * unit_gradient_square
    fourth_power /= decay * (1 - momentum) * (2 - shrink / (1 + momentum))
    return Equilibrium(
        rotation=math.sqrt(2 * shrink / (1 + momentum)),
        norm=fourth_power**0.25,
        rate=4 * shrink / (1 - momentum),
    )


def relaxation(
    start_norm: float, equilibrium: Equilibrium, steps: Float[Tensor, "*times"]
) -> Float[Tensor, "*times"]:
    r"""Return the norm on its way to equilibrium.

    :math:`|w_t|^4 = |w_\infty|^4 + (|w_0|^4 - |w_\infty|^4)\,e^{-\rho t}`, with :math:`\rho` the
    rate of the equilibrium. With momentum a run falls behind by some :math:`1/(1-\alpha)` steps,
    while the buffer fills.

    Args:
        start_norm: :math:`|w_0|`.
        equilibrium: as :func:`sgd_equilibrium` gives it.
        steps: the times, in steps.

    Returns:
        One norm per time.

    Example:
        >>> import torch
        >>> at_rest = Equilibrium(rotation=0.01, norm=2.0, rate=1.0)
        >>> relaxation(1.0, at_rest, torch.tensor([0.0, 1e9]))
        tensor([1., 2.])
    """
    settled = equilibrium.norm**4
    return (settled + (start_norm**4 - settled) * torch.exp(-equilibrium.rate * steps)) ** 0.25
