"""What demands on rows, columns and channels say, as arrays: one entry per term of each row."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.units.channel_demands import Block, Demand
from onsphere.symmetry.exact.units.fields import NOTHING
from onsphere.symmetry.exact.units.linear_forms import Form

Ints = NDArray[np.int64]
Short = NDArray[np.int32]
"""Numbers of which a decoder of 70 billion weights has tens of millions."""


@dataclass(frozen=True, eq=False)
class Terms:
    """All terms of all demands that belong to channels.

    Args:
        demand: of which demand each is.
        row: of which row of all demands; rows without such terms are not counted.
        slot: which term of its demand.
        place: of its unknown among all unknowns of channels.
        rows: how many rows there are.
    """

    demand: Short
    row: Short
    slot: NDArray[np.uint8]
    place: Short
    rows: int


@dataclass(frozen=True, eq=False)
class Others:
    """What stands beside channels in demands, and differs from row to row.

    Args:
        demand: of each such term the demand that it is of.
        row: its row, as in :class:`Terms`.
        slot: which term of its demand it is.
        number: its unknown, which belongs to no channel.
        unbound: the sums of rows that have no term of a channel.
    """

    demand: Short
    row: Short
    slot: NDArray[np.uint8]
    number: Short
    unbound: list[Form]


def terms_of(demands: Sequence[Demand], blocks: Sequence[Block], ids: Ints) -> tuple[Terms, Others]:
    """Return the terms of channels of all demands, and what stands beside them.

    Args:
        demands: all of them.
        blocks: of unknowns of channels.
        ids: the numbers of these unknowns.
    """
    starts = np.array([b.start for b in blocks])
    ends = np.array([b.start + b.size for b in blocks])
    # Where the unknowns of each block stand among those of all blocks.
    offsets = starts - np.searchsorted(ids, starts)
    most = sum(some.index.size for some in demands)
    demand, row, place = (np.empty(most, np.int32) for _ in range(3))
    slot = np.empty(most, np.uint8)
    others: list[tuple[Short, Short, Short, Short]] = []
    unbound: list[Form] = []
    rows = end = 0
    for d, some in enumerate(demands):
        block = np.searchsorted(starts, some.index, "right") - 1  # -1: before the first, NOTHING
        kept = (block >= 0) & (some.index < ends[np.maximum(block, 0)])
        bound = kept.any(0)
        number = (np.cumsum(bound) + (rows - 1)).astype(np.int32)
        which, column = kept.nonzero()
        here = slice(end, end + len(which))
        demand[here] = d
        row[here] = number[column]
        slot[here] = which
        place[here] = some.index[which, column] - offsets[block[which, column]]
        rows += int(bound.sum())
        end += len(which)
        outside = np.where(kept, NOTHING, some.index)
        if not bound.all():
            unbound += _sums(some, outside[:, ~bound])
        outside[:, ~bound] = NOTHING
        which, column = (outside != NOTHING).nonzero()
        if len(which):
            others.append((
                np.full(len(which), d, np.int32), number[column], which.astype(np.int32),
                outside[which, column],
            ))  # fmt: skip
    found = [np.concatenate([np.zeros(0, np.int32), *x]) for x in zip(*others, strict=True)]
    of, at, which, what = found or [np.zeros(0, np.int32)] * 4
    return (
        Terms(demand[:end], row[:end], slot[:end], place[:end], rows),
        Others(of, at, which.astype(np.uint8), what, unbound),
    )


def _sums(demand: Demand, index: Short) -> list[Form]:
    """Return the sums of some rows of a demand, each once.

    Args:
        demand: the coefficients and what all rows have.
        index: unknowns by term and row, or NOTHING.
    """
    if (index == NOTHING).all():
        return [dict(demand.scalars)] if demand.scalars else []
    found = []
    for column in np.unique(index, axis=1).T.tolist():
        form = dict(demand.scalars)
        for k, c in zip(column, demand.coefficients, strict=True):
            if k != NOTHING:
                form[k] = form.get(k, Fraction(0)) + c
        found.append({k: c for k, c in form.items() if c})
    return found
