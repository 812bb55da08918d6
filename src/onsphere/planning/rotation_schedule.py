r"""Schedules of a tuned learning rate as schedules of a rotation per step.

With a schedule :math:`f_t` on the learning rate the balance of growth and decay moves, by the
recursion of :mod:`onsphere.dynamics.trajectory`. With :math:`x_t` the power of the norm that
relaxes (:math:`|w|^4` for SGD, :math:`|w|^2` for the others) in units of its equilibrium at
:math:`f = 1`, and :math:`\rho` the rate there,

.. math:: x_{t+1} = f_t + (x_t - f_t)\,e^{-\rho f_t}, \qquad
          \theta_t = \theta_\infty f_t / \sqrt{x_t}.

A schedule that is slow beside :math:`1/\rho f` steps has :math:`x = f`, so that the rotation
follows :math:`\sqrt f`; a fast one leaves :math:`x` behind, and the rotation follows :math:`f`.

Source: Wan et al., 2020 (arXiv 2006.08419), for the drop of the rate.
"""

import math
from collections.abc import Callable

from onsphere.dynamics import Equilibrium
from onsphere.dynamics.optimizers import RecipeError
from onsphere.dynamics.trajectory import Motion

Schedule = Callable[[int], float]
"""Step -> factor of a learning rate, as ``LambdaLR`` takes it."""


def settled(factor: Schedule) -> Schedule:
    r"""Return step -> :math:`\sqrt{f_t}`: the rotation of a norm that keeps up with the rate.

    Example:
        >>> settled(lambda step: 0.25)(0)
        0.5
    """

    def rotation(step: int) -> float:
        return math.sqrt(factor_at(factor, step))

    return rotation


def followed(factor: Schedule, equilibrium: Equilibrium, initial_norm_ratio: float) -> Schedule:
    r"""Return step -> :math:`\theta_t/\theta_\infty`, with the norm that lags behind.

    Args:
        factor: step -> :math:`f_t`.
        equilibrium: at :math:`f = 1`, of norm 1.
        initial_norm_ratio: the norm at step 0 in units of the equilibrium's.

    Raises:
        RecipeError: ``initial_norm_ratio`` is not positive.
    """
    if not 0 < initial_norm_ratio < math.inf:
        raise RecipeError(f"initial_norm_ratio is positive and finite, got {initial_norm_ratio}")
    motion = Motion.of(equilibrium)
    powers = [float(initial_norm_ratio) ** motion.power]

    def rotation(step: int) -> float:
        while len(powers) <= step:
            now = factor_at(factor, len(powers) - 1)
            powers.append(motion.step(powers[-1], factor=now)[0])
        return factor_at(factor, step) / powers[step] ** (motion.slope / motion.power)

    return rotation


def factor_at(factor: Schedule, step: int) -> float:
    """Return a schedule's factor at a step.

    Raises:
        RecipeError: it is negative or not finite.
    """
    value = float(factor(step))
    if not 0 <= value < math.inf:
        raise RecipeError(f"a schedule's factor is at least 0 and finite, got {value} at {step}")
    return value
