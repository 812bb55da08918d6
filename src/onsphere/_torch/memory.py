"""What tells the memory of tensors apart, and memory for large ones that are soon dropped."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_STRIDED = torch.strided
LARGE = 1_000_000
"""Entries from which a tensor is large."""


def key_of(tensor: Tensor) -> int:
    """Return what tells one storage from another."""
    return tensor.untyped_storage()._cdata if tensor.layout is _STRIDED else id(tensor)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor to be filled.

    Large ones of float64 on the CPU are NumPy's, which asks the system for huge pages: filling
    them takes a third of the time, most of which PyTorch's own spend on page faults.

    Args:
        shape: its shape.
        dtype: its type.
        device: where it lies.

    Example:
        >>> empty((2, 3), torch.float64, torch.device("cpu")).shape
        torch.Size([2, 3])
    """
    if device.type == "cpu" and dtype is torch.float64 and math.prod(shape) >= LARGE:
        return torch.from_numpy(np.empty(tuple(shape)))
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def times(t: Tensor, factor: Tensor | float) -> Tensor:
    """Return ``t * factor``, in memory of :func:`empty` if large and dense."""
    plain = t.layout is torch.strided and not t.requires_grad
    if not plain or t.numel() < LARGE or not t.is_contiguous():
        return t * factor
    return torch.mul(t, factor, out=empty(t.shape, t.dtype, t.device))
