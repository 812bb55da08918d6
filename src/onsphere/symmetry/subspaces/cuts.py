"""Which parts the entries of a weight fall into that is cut along several axes."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.subspaces.channel_kinds import Block


@dataclass(frozen=True, eq=False)
class Cut:
    """Blocks of a weight along the same axes, none over another.

    Args:
        blocks: in the order in which they are counted, from 1 on; 0 is what lies in none.
    """

    blocks: Sequence[Block]

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that are cut."""
        return self.blocks[0].axes

    def numbers(self, shape: Sequence[int]) -> NDArray[np.int64]:
        """Return the number of the block of each place along the axes."""
        sizes = [shape[a] for a in self.axes]
        found = np.zeros(math.prod(sizes), np.int64)
        for i, block in enumerate(self.blocks):
            found[block.index.reshape(-1)] = i + 1
        return found.reshape(sizes)


def shares(cuts: Sequence[Cut], shape: Sequence[int]) -> dict[tuple[int, ...], Fraction]:
    """Return which blocks meet, one of each cut, and in which share of the entries of a weight.

    Along axes that one cut alone has, all of its blocks meet all of the others.

    Example:
        >>> rows = Cut([Block("w", (0,), np.array([[0]]))])
        >>> first, third = np.array([[0], [1]]), np.array([[2]])
        >>> columns = Cut([Block("w", (1,), first), Block("w", (1,), third)])
        >>> shares([rows, columns], (4, 4))[1, 2]    # the first row, the third column
        Fraction(1, 16)
    """
    axes = [a for cut in cuts for a in cut.axes]
    shared = sorted({a for a in axes if axes.count(a) > 1})
    tables = [_table(cut, shape, shared) for cut in cuts]
    if not tables:
        return {(): Fraction(1)}
    found: Counter[tuple[int, ...]] = Counter()
    alike, times = np.unique(np.concatenate(tables, 1), axis=0, return_counts=True)
    ends = np.cumsum([t.shape[1] for t in tables])[:-1]
    for row, count in zip(alike, times.tolist(), strict=True):
        of_cuts = [c.tolist() for c in np.split(row, ends)]
        for numbers in product(*([i for i, n in enumerate(c) if n] for c in of_cuts)):
            sizes = (c[i] for c, i in zip(of_cuts, numbers, strict=True))
            found[numbers] += count * math.prod(sizes)
    total = sum(found.values())
    return {numbers: Fraction(n, total) for numbers, n in found.items()}


def _table(cut: Cut, shape: Sequence[int], shared: Sequence[int]) -> NDArray[np.int64]:
    """Return how many places of each block there are at every place along the shared axes."""
    own = [a for a in shared if a in cut.axes]
    numbers = np.moveaxis(cut.numbers(shape), [cut.axes.index(a) for a in own], range(len(own)))
    flat = numbers.reshape(math.prod(shape[a] for a in own), -1)
    table = np.stack([(flat == i).sum(1) for i in range(len(cut.blocks) + 1)], 1)
    wide = table.reshape([*(shape[a] if a in own else 1 for a in shared), -1])
    every = np.broadcast_to(wide, [*(shape[a] for a in shared), wide.shape[-1]])
    return np.ascontiguousarray(every.reshape(-1, wide.shape[-1]), np.int64)
