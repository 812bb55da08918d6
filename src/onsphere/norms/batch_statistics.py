r"""Normalization by statistics of a batch, and their running averages.

BatchNorm by PyTorch's kernel; SyncBatchNorm, whose batch is that of all processes; L1 BatchNorm,
whose spread is :math:`\sqrt{\pi/2}` times the mean absolute deviation. All keep ``running_mean``
and ``running_var`` alike, so one method's state dict loads into another.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from onsphere.norms.activation import ActivationNorm


def batch_norm(norm: "ActivationNorm", x: Tensor) -> Tensor:
    """BatchNorm of one process, by PyTorch's kernel."""
    statistics = (norm.running_mean, norm.running_var)
    factor, eps = _factor(norm), norm.eps_for(x)
    return F.batch_norm(x, *statistics, norm.weight, norm.bias, _from_batch(norm), factor, eps)


def sync_batch_norm(norm: "ActivationNorm", x: Tensor) -> Tensor:
    r"""BatchNorm over the batches of all processes of the default group.

    Two all-reduces: sum and count, then squares of deviations from the common mean, so that no
    digits are lost to a large mean; the backward pass has as many. Where there is one process, or
    in eval mode, it is :func:`batch_norm`.
    """
    joint = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not (joint and norm.training):
        return batch_norm(norm, x)
    vectors = norm.method.vector_axes(x.ndim).gather(x)
    count = vectors.new_full((1,), vectors.shape[1])
    total = _summed(torch.cat([vectors.sum(1), count]))
    mean, n = total[:-1] / total[-1], total[-1].detach()
    squares = _summed((vectors - mean[:, None]).square().sum(1))
    _refuse_single(x, int(n))
    _follow(norm, mean, squares / (n - 1))
    scaled = (vectors - mean[:, None]) * (squares / n + norm.eps_for(x)).rsqrt()[:, None]
    return norm.gain_and_shift(norm.method.vector_axes(x.ndim).scatter(scaled, x.shape))


class _SumOverProcesses(torch.autograd.Function):
    """A sum over processes, in which every process's gradient has a part."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(x: Tensor) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(x)  # type: ignore[no-untyped-call]
    return total


def l1_batch_norm(norm: "ActivationNorm", x: Tensor) -> Tensor:
    r"""L1 BatchNorm: :math:`(x - \mu)/(\sqrt{\pi/2}\,E|x - \mu| + \epsilon)`.

    ``running_var`` follows the square of the denominator, the estimate of a variance.
    """
    spread = (-1, *([1] * (x.ndim - 2)))
    if _from_batch(norm):
        vectors = norm.method.vector_axes(x.ndim).gather(x)
        _refuse_single(x, vectors.shape[1])
        mean = vectors.mean(1)
        deviation = math.sqrt(math.pi / 2) * (vectors - mean[:, None]).abs().mean(1)
        if norm.training:
            _follow(norm, mean, deviation.square())
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, deviation = norm.running_mean, norm.running_var.sqrt()
    y = (x - mean.reshape(spread)) / (deviation + norm.eps_for(x)).reshape(spread)
    return norm.gain_and_shift(y)


def _from_batch(norm: "ActivationNorm") -> bool:
    return norm.training or norm.running_mean is None


def _factor(norm: "ActivationNorm") -> float:
    """Count a batch in training mode; return its weight in the running statistics."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum


def _follow(norm: "ActivationNorm", mean: Tensor, var: Tensor) -> None:
    factor = _factor(norm)
    if norm.running_mean is not None and norm.running_var is not None:
        follow(norm.running_mean, mean, factor)
        follow(norm.running_var, var, factor)


@torch.no_grad()
def follow(running: Tensor, newest: Tensor, momentum: float) -> None:
    r"""Move a running average towards the newest batch, in place: :math:`(1-m)\,r + m\,b`.

    It is PyTorch's BatchNorm that averages, over two equal rows: the audit knows the running
    statistics of that kernel for estimates, which constrain no weight.

    Args:
        running: averages, one per channel.
        newest: what the newest batch has.
        momentum: its weight.
    """
    rows = newest.detach().to(running).flatten().expand(2, -1)
    F.batch_norm(rows, running, torch.ones_like(running), training=True, momentum=momentum)


def _refuse_single(x: Tensor, count: int) -> None:
    if count < 2:
        raise ValueError(
            f"expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )
