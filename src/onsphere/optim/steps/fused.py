"""When ordinary parameters move by PyTorch's fused step, and which steps a graph may record."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onsphere.optim.updates.types import Group


def fused_as(group: Group, possible: bool) -> bool | None:
    """Whether ordinary parameters move by PyTorch's fused step; ``None`` leaves it to PyTorch."""
    if group["fused"] is False or group["foreach"]:
        return False
    return True if possible else None


def capturable(group: Group) -> bool:
    """Whether a CUDA graph may record the steps of a group.

    ``torch.compile`` sets the flag by itself while it traces a step. It takes the kernels as they
    are, so that a compiled step gives the numbers of one that is not.
    """
    return group["capturable"] and not torch.compiler.is_compiling()


def fusable(params: Sequence[Tensor], *columns: Sequence[Tensor]) -> bool:
    """Whether torch's fused CPU step takes these parameters with their gradients and state.

    Its kernels walk through memory: with gaps in it, or where a gradient has another layout than
    its parameter, they give wrong numbers without a word (seen in torch 2.13). A gradient that is
    negated lazily they refuse.
    """
    for p, *others in zip(params, *columns, strict=True):
        if not (p.is_cpu and p.is_floating_point()):
            return False
        if any(x.layout is not torch.strided or x.is_neg() for x in (p, *others)):
            return False
        if p.is_contiguous():
            if all(x.is_contiguous() for x in others):
                continue
        elif torch.empty_like(p, device="meta").stride() != p.stride():
            return False
        if any(x.stride() != p.stride() for x in others):
            return False
    return True


def plain_numbers(*settings: Any) -> bool:
    """Whether settings of a group are numbers, as the fused step takes them, and not tensors.

    Example:
        >>> plain_numbers(0.1, 1), plain_numbers(torch.tensor(0.1))
        (True, False)
    """
    return all(isinstance(x, (float, int)) for x in settings)
