"""One weight before and after a rewrite: ranges of its channels, sizes of its entries."""

from dataclasses import dataclass

import torch
from torch import Tensor

from onsphere.symmetry.rewrite.weight_grid import Grid, loss

HALVINGS = 16
"""How many halvings below the largest entry sizes are counted."""


@dataclass(frozen=True, eq=False)
class WeightRanges:
    """One weight before and after.

    Args:
        name: the weight, of two or more axes.
        before: the largest absolute entry of each output channel.
        after: the same afterwards.
        loss_before: the share of the squared norm of an output channel that rounding to whole
            numbers loses, in the mean over channels.
        loss_after: the same afterwards.
        sizes_before: shares of the entries by how many halvings they are below the largest one:
            less than 1, 1 to 2, and so on; what is smaller than the last, or 0, is left out.
        sizes_after: the same afterwards.
    """

    name: str
    before: Tensor
    after: Tensor
    loss_before: float
    loss_after: float
    sizes_before: Tensor
    sizes_after: Tensor

    @property
    def spread(self) -> tuple[float, float]:
        """The largest range over the smallest one that is not 0, before and after."""
        return _spread(self.before), _spread(self.after)


def compared(
    name: str, before: Tensor, after: Tensor, bits: int = 8, grid: Grid = "tensor"
) -> WeightRanges:
    """Compare a weight with what became of it.

    Args:
        name: of the weight.
        before: its entries, outputs first.
        after: its entries now.
        bits: of the whole numbers that losses are of.
        grid: which entries share a step there.
    """
    return WeightRanges(
        name, row_ranges(before), row_ranges(after),
        loss(before, bits, grid), loss(after, bits, grid), _sizes(before), _sizes(after),
    )  # fmt: skip


def row_ranges(weight: Tensor) -> Tensor:
    """Return the largest absolute entry of each output channel."""
    return weight.abs().flatten(1).amax(1)


def _spread(ranges: Tensor) -> float:
    there = ranges[ranges > 0]
    return float(there.max() / there.min()) if len(there) else 1.0


def _sizes(weight: Tensor) -> Tensor:
    sizes = weight.detach().abs().double().flatten()
    largest = sizes.max()
    if not 0 < largest < float("inf"):
        return torch.zeros(HALVINGS, dtype=torch.float64)
    sizes = sizes[sizes.isfinite()]
    below = (largest / sizes[sizes > 0]).log2().floor().long()
    counts = torch.bincount(below[below < HALVINGS], minlength=HALVINGS)
    return counts.double() / len(sizes)
