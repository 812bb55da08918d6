r"""Learning rates that do the same: on the sphere, and without weight decay.

For a scale-invariant weight the length of the weight and the learning rate are two names for one
thing, so that a rate, a decay and a norm can be exchanged for another rate.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def effective_lr(lr: float | Tensor, norm: float | Tensor, degree: int = 2) -> float | Tensor:
    r"""Return the rate at which the same step moves the direction on the unit sphere.

    The gradient at :math:`w` is that at :math:`w/|w|` over :math:`|w|`, and the direction moves by
    a step over :math:`|w|`: SGD has the effective rate :math:`\eta/|w|^2`, exactly. A method whose
    update does not depend on the gradient's size (Adam, Lion, Muon) has :math:`\eta/|w|`.

    Args:
        lr: :math:`\eta`.
        norm: :math:`|w|`.
        degree: 2 for SGD, 1 for the adaptive methods.

    Returns:
        The effective rate.

    Raises:
        ValueError: another degree.

    Example:
        >>> effective_lr(0.1, 2.0), effective_lr(0.1, 2.0, degree=1)
        (0.025, 0.05)

    Source: van Laarhoven, 2017 (arXiv 1706.05350), section 2; Hoffer et al., 2018 (arXiv
    1803.01814).
    """
    if degree not in (1, 2):
        raise ValueError(f"degree is 2 for SGD and 1 for adaptive methods, got {degree}")
    return lr / norm**degree


class RisingRates(NamedTuple):
    r"""A run without weight decay that follows one with it.

    Attributes:
        base: :math:`a`, per step; the weight of this run is :math:`a^{-t}` times the other's.
        lrs: :math:`\tilde\eta_t = \eta a^{-2t-1}`, one per step, in float64.
        buffer: the factor :math:`b` of the momentum buffer to start with, :math:`b\,w_0`: the run
            with decay starts with an empty one, this one is already moving outwards.
    """

    base: float
    lrs: Tensor
    buffer: float


def rising_rates(
    *, lr: float, weight_decay: float, steps: int, momentum: float = 0.0
) -> RisingRates:
    r"""Return rates without weight decay that give the directions of a constant one with it.

    With :math:`w_{t+1} = w_t - \eta v_t,\ v_t = \alpha v_{t-1} + g_t + \lambda w_t` and :math:`a`
    the larger root of

    .. math:: a^2 - (1 + \alpha - \eta\lambda)\,a + \alpha = 0,

    the weights :math:`\tilde w_t = a^{-t} w_t` are those of SGD without decay at
    :math:`\tilde\eta_t = \eta a^{-2t-1}`, that moves as :math:`(\tilde w_{t+1} - \tilde w_t)/
    \tilde\eta_t = \alpha(\tilde w_t - \tilde w_{t-1})/\tilde\eta_{t-1} - \tilde g_t` and starts
    from :math:`\tilde w_{-1} = a w_0`. Exact for weights on whose scale the loss does not depend.

    Args:
        lr: :math:`\eta` of the run with decay.
        weight_decay: :math:`\lambda`, coupled.
        steps: how many rates.
        momentum: :math:`\alpha`.

    Returns:
        The rates, and how the run without decay starts.

    Raises:
        ValueError: a decay so strong that the weights would oscillate, :math:`\eta\lambda \ge
            (1-\sqrt\alpha)^2`.

    Example:
        >>> equal = rising_rates(lr=0.1, weight_decay=1.0, steps=3)
        >>> equal.base, equal.lrs
        (0.9, tensor([0.1111, 0.1372, 0.1694], dtype=torch.float64))

    Source: Li & Arora, 2019 (arXiv 1910.07454), theorems 1.1 and 2.13.
    """
    shrink = lr * weight_decay
    bound = (1 - math.sqrt(momentum)) ** 2
    if not 0 <= shrink < bound:
        raise ValueError(
            f"lr * weight_decay is from 0 to (1 - sqrt(momentum))**2 = {bound:g}, beyond which "
            f"weights oscillate: got {shrink:g}"
        )
    total = 1 + momentum - shrink
    base = (total + math.sqrt(total**2 - 4 * momentum)) / 2
    powers = torch.arange(steps, dtype=torch.float64)
    # 1 - base without cancellation: (1 - a)(1 - alpha / a) = shrink.
    outward = shrink / (1 - momentum / base)
    return RisingRates(base, lr * base ** (-2 * powers - 1), -outward / (lr * base))
