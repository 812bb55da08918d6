r"""The way to equilibrium at a constant rate, in closed form.

Under a rate that changes it is followed step by step: :mod:`onsphere.dynamics.trajectory`.
"""

import math
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from onsphere.dynamics.equilibrium import Equilibrium


def relaxation(
    initial_norm: float, equilibrium: Equilibrium, steps: Float[Tensor, "*times"]
) -> Float[Tensor, "*times"]:
    r"""Return the norm on its way to equilibrium.

    :math:`|w_t|^p = |w_\infty|^p + (|w_0|^p - |w_\infty|^p)\,e^{-\rho t}`, with :math:`\rho` the
    rate of the equilibrium and :math:`p` its power. With momentum a run falls behind by some
    :math:`1/(1-\alpha)` steps, while the buffer fills.

    Args:
        initial_norm: :math:`|w_0|`.
        equilibrium: as :func:`sgd_equilibrium` and the others give it.
        steps: the times, in steps.

    Returns:
        One norm per time.

    Example:
        >>> import torch
        >>> at_rest = Equilibrium(rotation=0.01, norm=2.0, rate=1.0)
        >>> relaxation(1.0, at_rest, torch.tensor([0.0, 1e9]))
        tensor([1., 2.])
    """
    power = equilibrium.power
    settled = equilibrium.norm**power
    left = torch.exp(-equilibrium.rate * steps)
    return (settled + (initial_norm**power - settled) * left) ** (1 / power)


def half_life(equilibrium: Equilibrium) -> float:
    r"""Return :math:`\ln 2/\rho`, the steps in which half of the way to equilibrium is gone.

    It is measured by the power of the norm that falls exponentially: :math:`|w|^4` for SGD,
    :math:`|w|^2` for the adaptive methods with decoupled decay.

    Args:
        equilibrium: where the run goes.

    Returns:
        A number of steps.

    Example:
        >>> from onsphere.dynamics import adamw_equilibrium
        >>> round(half_life(adamw_equilibrium(lr=1e-3, weight_decay=0.1)))
        3466
    """
    return math.log(2) / equilibrium.rate


@overload
def rotation_at(norm: float, equilibrium: Equilibrium) -> float: ...


@overload
def rotation_at(norm: Tensor, equilibrium: Equilibrium) -> Tensor: ...


def rotation_at(norm: float | Tensor, equilibrium: Equilibrium) -> float | Tensor:
    r"""Return the rotation per step of a weight that is not (yet) as long as in equilibrium.

    :math:`\theta(|w|) = \theta_\infty(|w_\infty|/|w|)^s` with the slope :math:`s` of the
    equilibrium: a short weight turns fast. A small-angle law: the update keeps its length (adaptive
    methods) or has it as :math:`1/|w|` (SGD), and its correlation with the weight stays that of the
    equilibrium.

    Args:
        norm: length of the weight, or a tensor of lengths.
        equilibrium: of the present learning rate and decay.

    Returns:
        Radians per step, one per norm.

    Example:
        >>> import torch
        >>> at_rest = Equilibrium(rotation=0.01, norm=2.0, rate=1.0)
        >>> rotation_at(torch.tensor([1.0, 2.0]), at_rest)
        tensor([0.0400, 0.0100])
    """
    return equilibrium.rotation * (equilibrium.norm / norm) ** equilibrium.slope


def mean_rotation(initial_norm: float, equilibrium: Equilibrium, steps: int) -> float:
    r"""Return the mean rotation per step of a run at a constant rate that starts at some norm.

    With :math:`x_0 = (|w_0|/|w_\infty|)^p` and :math:`T` steps

    .. math:: \bar\theta = \theta_\infty\left(1 + \frac{2}{\rho T}
              \ln\frac{1+\sqrt{x_T}}{1+\sqrt{x_0}}\right), \qquad x_T = 1 + (x_0-1)\,e^{-\rho T},

    the mean of :func:`rotation_at` over the norms of :func:`relaxation`.

    Args:
        initial_norm: :math:`|w_0|`.
        equilibrium: where the run goes; of a law whose rotation goes as :math:`|w|^{-p/2}`, as
            all do but that of Adam with L2.
        steps: :math:`T`.

    Returns:
        Radians per step.

    Raises:
        ValueError: a law with another slope.

    Example:
        >>> at_rest = Equilibrium(rotation=0.01, norm=2.0, rate=1e-3)
        >>> [round(mean_rotation(norm, at_rest, 1000), 4) for norm in (1.0, 2.0, 10.0)]
        [0.0174, 0.01, 0.0005]
    """
    if 2 * equilibrium.slope != equilibrium.power:
        raise ValueError(
            f"the mean is known where the slope is half the power, got {equilibrium.slope} and "
            f"{equilibrium.power}"
        )
    time = equilibrium.rate * steps
    begin = (initial_norm / equilibrium.norm) ** equilibrium.power
    end = 1 + (begin - 1) * math.exp(-time)
    gained = math.log((1 + math.sqrt(end)) / (1 + math.sqrt(begin)))
    return equilibrium.rotation * (1 + 2 * gained / time)
