r"""Whole numbers for weights: the symmetric grid of an integer format, and what it loses."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

Grid = Literal["tensor", "channel"] | int
"""Entries that share one step: all of a weight, a row (output) of it, or so many within a row."""


def rounded(weight: Tensor, bits: int, grid: Grid = "tensor") -> Tensor:
    r"""Round a weight to :math:`\Delta\,k` with whole :math:`|k| < 2^{b-1}`.

    The step is :math:`\Delta = \max|w| / (2^{b-1}-1)` over the entries that share it.

    Args:
        weight: of two or more axes, outputs first.
        bits: b, 2 or more.
        grid: which entries share a step; a number must divide the entries of a row.

    Returns:
        The values on the grid, in the weight's own type.

    Example:
        >>> rounded(torch.tensor([[1.0, 0.3], [100.0, 0.3]]), 8)[:, 1]
        tensor([0., 0.])
        >>> rounded(torch.tensor([[1.0, 0.3], [100.0, 0.3]]), 8, "channel")[0, 1]
        tensor(0.2992)
    """
    flat = weight.reshape(1, -1) if grid == "tensor" else weight.flatten(1)
    if isinstance(grid, int):
        flat = flat.reshape(-1, grid)
    step = flat.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    safe = torch.where(step > 0, step, torch.ones_like(step))
    return ((flat / safe).round() * safe).reshape(weight.shape)


def loss(weight: Tensor, bits: int, grid: Grid = "tensor") -> float:
    r"""Return the mean over rows of :math:`\|w_c - q(w_c)\|^2 / \|w_c\|^2`.

    By rows, since the scale of an output channel says nothing about how much it matters: one that
    is small beside others is lost to a common step, and the next layer may scale it up again.
    """
    wide = weight.detach().double().flatten(1)
    size = (wide**2).sum(1)
    lost = ((wide - rounded(wide, bits, grid)) ** 2).sum(1)
    there = size > 0
    return float((lost[there] / size[there]).mean()) if bool(there.any()) else 0.0


def total_loss(
    state: Mapping[str, Tensor], names: Iterable[str], bits: int, grid: Grid = "tensor"
) -> float:
    """Return the sum of what rounding loses of each of some weights."""
    return sum(loss(state[n], bits, grid) for n in names)
