"""Lengths of examples: each one is a vector, whatever its shape."""

from jaxtyping import Shaped
from torch import Tensor

from onsphere.geometry import length


def lengths(x: Shaped[Tensor, "batch *shape"]) -> Shaped[Tensor, "batch"]:
    """Return the Euclidean length of each example, without squaring tiny numbers.

    Example:
        >>> import torch
        >>> lengths(torch.ones(2, 3, 3))
        tensor([3., 3.])
    """
    return length(x.flatten(1)).squeeze(1) if x.ndim > 1 else x.abs()


def per_example(values: Shaped[Tensor, "batch"], x: Tensor) -> Tensor:
    """Shape one value per example so that it multiplies ``x``.

    Example:
        >>> import torch
        >>> per_example(torch.ones(2), torch.ones(2, 3, 3)).shape
        torch.Size([2, 1, 1])
    """
    return values.reshape(-1, *([1] * (x.ndim - 1)))
