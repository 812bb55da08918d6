"""Ordinary parameters, moved by PyTorch's fused step on the CPU as in the step before."""

import torch
from torch import Tensor

from onsphere.optim.steps.fused import plain_numbers
from onsphere.optim.steps.repeated import ReadyInSpace
from onsphere.optim.updates.types import Group


def moved_fused(param: Tensor) -> bool:
    """Whether torch's fused SGD moves a parameter: half precision it does not (seen in 2.13)."""
    return param.dtype.itemsize >= 4


def adamw_again(ready: ReadyInSpace, group: Group, *, decoupled: bool = True) -> bool:
    """Take a step of AdamW; return whether it can be taken.

    Args:
        ready: parameters with gradients, moments and counters.
        group: their settings, without ``amsgrad``.
        decoupled: whether weight decay stays out of the moments; without, it is Adam.
    """
    beta1, beta2 = group["betas"]
    if not ready.steps or not plain_numbers(group["lr"], beta1, beta2):
        return False
    ready.count_all()
    first, second = ready.columns
    (torch._fused_adamw_ if decoupled else torch._fused_adam_)(
        ready.params,
        ready.take_grads(),
        first,
        second,
        [],
        ready.steps,
        amsgrad=False,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    return True


def sgd_again(ready: ReadyInSpace, group: Group) -> bool:
    """Take a step of SGD that is not the first one; return whether it can be taken."""
    momentum, lr = group["momentum"], group["lr"]
    if (momentum != 0) != bool(ready.columns) or not plain_numbers(lr, momentum):
        return False
    torch._fused_sgd_(
        ready.params,
        ready.take_grads(),
        ready.columns[0] if ready.columns else [],
        weight_decay=group["weight_decay"],
        momentum=momentum,
        lr=lr,
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,
    )
    return True
