r"""Laws of norm growth for weights on which the loss does not depend by scale.

If :math:`f(aw) = f(w)` for every :math:`a > 0`, the gradient :math:`g` is orthogonal to
:math:`w`. Everything here follows from that by counting squares. :math:`\eta` is the learning
rate, :math:`\lambda` the weight decay, :math:`\alpha` the momentum.

Vectors do not appear, only their squared lengths, so one call serves any number of them: the
arguments are numbers or tensors that broadcast, and time is the first axis of a series.

The per-step laws are exact; :func:`free_growth` is the law of the mean. Source: Arora, Li & Lyu,
*Theoretical analysis of auto rate-tuning by batch normalization*, 2018 (arXiv 1812.03981) for the
first; Kunin et al., 2020 (arXiv 2012.04728) for decay; the momentum recursion is derived here.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from onsphere.dynamics.autocorrelation import Memory, Response, linear

Scalars = float | Tensor


class MomentumState(NamedTuple):
    r"""What the momentum recursion carries from one step to the next.

    Attributes:
        square: :math:`|w_t|^2`.
        inner: :math:`\langle w_t, v_{t-1}\rangle`, with :math:`v` the momentum buffer; 0 before
            the first step.
    """

    square: Scalars
    inner: Scalars = 0.0


def sgd_step(
    square: Scalars, gradient_square: Scalars, lr: Scalars, weight_decay: float = 0.0
) -> Scalars:
    r"""Return :math:`|w_{t+1}|^2 = (1-\eta\lambda)^2 |w_t|^2 + \eta^2 |g_t|^2`.

    Without decay this is Pythagoras: the step is orthogonal to the weight.

    Args:
        square: :math:`|w_t|^2`.
        gradient_square: :math:`|g_t|^2`, of the loss alone (decay not added).
        lr: :math:`\eta`.
        weight_decay: :math:`\lambda`.

    Returns:
        The squared norm after one step of SGD without momentum; exact.

    Example:
        >>> sgd_step(9.0, 16.0, lr=1.0)
        25.0
    """
    return (1 - lr * weight_decay) ** 2 * square + lr**2 * gradient_square


def momentum_step(
    state: MomentumState,
    buffer_square: Scalars,
    lr: Scalars,
    momentum: float,
    weight_decay: float = 0.0,
) -> MomentumState:
    r"""Advance the squared norm by one step of SGD with momentum and coupled decay.

    With :math:`v_t = \alpha v_{t-1} + g_t + \lambda w_t` and :math:`w_{t+1} = w_t - \eta v_t`, as
    ``torch.optim.SGD`` does it without dampening,

    .. math:: a_t = \langle w_t, v_t\rangle = \alpha\langle w_t, v_{t-1}\rangle
              + \lambda |w_t|^2, \qquad
              |w_{t+1}|^2 = |w_t|^2 - 2\eta a_t + \eta^2 |v_t|^2,

    and :math:`\langle w_{t+1}, v_t\rangle = a_t - \eta |v_t|^2` starts the next step, also when
    the learning rate changes in between.

    Args:
        state: the squared norm and its inner product with the last buffer.
        buffer_square: :math:`|v_t|^2`, of the momentum buffer *after* the step's gradient went in.
        lr: :math:`\eta` of this step.
        momentum: :math:`\alpha`.
        weight_decay: :math:`\lambda`, coupled (added to the gradient).

    Returns:
        The state after the step; exact.

    Example:
        >>> momentum_step(MomentumState(square=9.0), 16.0, lr=1.0, momentum=0.9)
        MomentumState(square=25.0, inner=-16.0)
    """
    inner = momentum * state.inner + weight_decay * state.square
    return MomentumState(
        state.square - 2 * lr * inner + lr**2 * buffer_square, inner - lr * buffer_square
    )


def sgd_growth(
    initial_square: Scalars,
    gradient_squares: Float[Tensor, "steps *vectors"],
    lr: Scalars,
    weight_decay: float = 0.0,
) -> Float[Tensor, "steps+1 *vectors"]:
    r"""Return the squared norms of a whole run of SGD without momentum, from its gradients.

    :math:`|w_n|^2 = (1-\eta\lambda)^{2n}|w_0|^2
    + \eta^2\sum_k (1-\eta\lambda)^{2(n-1-k)}|g_k|^2`, by :func:`sgd_step`.

    Args:
        initial_square: :math:`|w_0|^2`.
        gradient_squares: :math:`|g_t|^2` of every step.
        lr: :math:`\eta`, one number or a series of one per step.
        weight_decay: :math:`\lambda`.

    Returns:
        The squared norms before the first step and after each.

    Raises:
        ValueError: a series of rates has another length than the run.

    Example:
        >>> import torch
        >>> sgd_growth(1.0, torch.tensor([3.0, 5.0]), lr=1.0)
        tensor([1., 4., 9.])
    """
    rates = _per_step(lr, gradient_squares)
    squares = [_like_one_step(initial_square, gradient_squares)]
    for gradient_square, rate in zip(gradient_squares, rates, strict=True):
        squares.append(torch.as_tensor(sgd_step(squares[-1], gradient_square, rate, weight_decay)))
    return torch.stack(squares)


def momentum_growth(
    initial_square: Scalars,
    buffer_squares: Float[Tensor, "steps *vectors"],
    lr: Scalars,
    momentum: float,
    weight_decay: float = 0.0,
) -> Float[Tensor, "steps+1 *vectors"]:
    r"""Return the squared norms of a whole run of SGD with momentum, from its buffers.

    Args:
        initial_square: :math:`|w_0|^2`.
        buffer_squares: :math:`|v_t|^2` of every step, as in :func:`momentum_step`.
        lr: :math:`\eta`, one number or a series of one per step.
        momentum: :math:`\alpha`.
        weight_decay: :math:`\lambda`, coupled.

    Returns:
        The squared norms before the first step and after each.

    Raises:
        ValueError: a series of rates has another length than the run.

    Example:
        >>> import torch
        >>> momentum_growth(1.0, torch.tensor([3.0, 5.0]), lr=1.0, momentum=0.5)
        tensor([ 1.,  4., 12.])
    """
    rates = _per_step(lr, buffer_squares)
    state = MomentumState(_like_one_step(initial_square, buffer_squares))
    squares = [torch.as_tensor(state.square)]
    for buffer_square, rate in zip(buffer_squares, rates, strict=True):
        state = momentum_step(state, buffer_square, rate, momentum, weight_decay)
        squares.append(torch.as_tensor(state.square))
    return torch.stack(squares)


def free_growth(
    initial_norm: Scalars,
    unit_gradient_squares: Float[Tensor, "steps *vectors"],
    lr: Scalars,
    momentum: float = 0.0,
) -> Float[Tensor, "steps+1 *vectors"]:
    r"""Return the norms that SGD without weight decay is expected to reach.

    .. math:: |w_t|^4 = |w_0|^4 + \frac{2}{(1-\alpha)^2}\sum_{s<t} \eta_s^2 L_s,
              \qquad L = |\nabla f(w/|w|)|^2 = |w|^2\,|\nabla f(w)|^2,

    so :math:`|w| \sim t^{1/4}` at constant :math:`L`. Assumes that :math:`|w|` changes little in
    one step, and with momentum that successive gradients are uncorrelated and that :math:`|w|`
    changes little in :math:`1/(1-\alpha)` steps.

    Args:
        initial_norm: :math:`|w_0|`.
        unit_gradient_squares: :math:`L_t`, the squared gradient norm at the unit-norm point, one
            per step (``torch.full((steps,), L)`` if it is constant).
        lr: :math:`\eta`, one number or a series of one per step.
        momentum: :math:`\alpha` below 1.

    Returns:
        The norms before the first step and after each.

    Raises:
        ValueError: a series of rates has another length than the run.

    Example:
        >>> import torch
        >>> free_growth(1.0, torch.full((2,), 7.5), lr=1.0)
        tensor([1.0000, 2.0000, 2.3596])
    """
    rates = _per_step(lr, unit_gradient_squares)
    rates = rates.reshape(-1, *([1] * (unit_gradient_squares.ndim - 1)))
    added = 2 * (rates**2 * unit_gradient_squares).cumsum(0) / (1 - momentum) ** 2
    start = _like_one_step(initial_norm, unit_gradient_squares) ** 4
    return torch.cat([start.unsqueeze(0), start + added]) ** 0.25


def adaptive_growth(
    initial_norm: Scalars,
    lrs: Float[Tensor, "steps"],
    coordinates: int = 1,
    *,
    memory: Memory | None = None,
    response: Response = linear,
) -> Float[Tensor, "steps+1"]:
    r"""Return the norms that an adaptive method without weight decay is expected to reach.

    .. math:: |w_t|^2 = |w_0|^2 + \big(R_0 + 2\textstyle\sum_{k\ge1}R_k\big)\sum_{s<t}\eta_s^2,

    with :math:`R_k` the correlation of the updates over :math:`k` steps, so
    :math:`|w| \sim t^{1/2}` at a constant rate. For Adam the bracket is the number :math:`C` of
    coordinates, whatever :math:`\beta_1`. Assumes as :func:`adamw_equilibrium` does, and a rate
    that changes little over the memory of the updates.

    Args:
        initial_norm: :math:`|w_0|`.
        lrs: :math:`\eta_t`, one per step.
        coordinates: :math:`C`.
        memory: the averages that a nonlinear update is made of; not needed for Adam.
        response: :func:`arcsine` for Lion.

    Returns:
        The norms before the first step and after each.

    Example:
        >>> import torch
        >>> adaptive_growth(1.0, torch.ones(2), coordinates=4)
        tensor([1.0000, 2.2361, 3.0000])
    """
    spread = float(coordinates)
    if memory is not None:
        scale = memory.power if response is linear else 1.0
        spread *= scale * (1 + 2 * float(response(memory.correlations()).sum()))
    start = _like_one_step(initial_norm, lrs) ** 2
    return torch.cat([start.unsqueeze(0), start + spread * (lrs**2).cumsum(0)]) ** 0.5


def _per_step(lr: Scalars, series: Tensor) -> Tensor:
    rates = torch.as_tensor(lr, dtype=series.dtype, device=series.device)
    if rates.ndim and rates.shape != series.shape[:1]:
        raise ValueError(
            f"lr is one number or one per step: got shape {tuple(rates.shape)} for "
            f"{series.shape[0]} steps"
        )
    return rates.expand(series.shape[0])


def _like_one_step(value: Scalars, series: Tensor) -> Tensor:
    one = torch.as_tensor(value, dtype=series.dtype, device=series.device)
    return one.expand(series.shape[1:])
