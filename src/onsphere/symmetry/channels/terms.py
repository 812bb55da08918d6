"""What demands on rows, columns and channels say, as arrays: one entry per term of each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.units.channel_demands import Demand
from onsphere.symmetry.exact.units.fields import NOTHING
from onsphere.symmetry.exact.units.linear_forms import Plain

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
    unbound: list[Plain]


def terms_of(demands: Sequence[Demand], ids: Short) -> tuple[Terms, Others]:
    """Return the terms of channels of all demands, and what stands beside them.

    Args:
        demands: all of them.
        ids: the numbers of the unknowns of channels, in their order.
    """
    places = np.full(int(ids[-1]) + 2, NOTHING, np.int32)  # the last stands for all other numbers
    places[ids] = np.arange(len(ids), dtype=np.int32)
    most = sum(some.index.size for some in demands)
    demand, row, place = (np.empty(most, np.int32) for _ in range(3))
    slot = np.empty(most, np.uint8)
    others: list[tuple[Short, Short, Short, Short]] = []
    unbound: list[Plain] = []
    rows = end = 0
    for d, some in enumerate(demands):
        at = places[np.minimum(some.index, len(places) - 1)]
        kept = at != NOTHING
        bound = kept.any(0)
        number = (np.cumsum(bound) + (rows - 1)).astype(np.int32)
        which, column = kept.nonzero()
        here = slice(end, end + len(which))
        demand[here] = d
        row[here] = number[column]
        slot[here] = which
        place[here] = at[which, column]
        rows += int(bound.sum())
        end += len(which)
        if len(which) == at.size:
            continue
        if not bound.all():
            unbound += _sums(some, np.where(kept, NOTHING, some.index)[:, ~bound])
        which, column = (~kept & bound & (some.index != NOTHING)).nonzero()
        if len(which):
            others.append((
                np.full(len(which), d, np.int32), number[column], which.astype(np.int32),
                some.index[which, column],
            ))  # fmt: skip
    found = [np.concatenate([np.zeros(0, np.int32), *x]) for x in zip(*others, strict=True)]
    of, at, which, what = found or [np.zeros(0, np.int32)] * 4
    return (
        Terms(demand[:end], row[:end], slot[:end], place[:end], rows),
        Others(of, at, which.astype(np.uint8), what, unbound),
    )


def _sums(demand: Demand, index: Short) -> list[Plain]:
    """Return the sums of some rows of a demand, each once.

    Args:
        demand: the coefficients and what all rows have.
        index: unknowns by term and row, or NOTHING.
    """
    if (index == NOTHING).all():
        return [dict(demand.scalars)] if demand.scalars else []
    found: list[Plain] = []
    for column in np.unique(index, axis=1).T.tolist():
        form: Plain = dict(demand.scalars)
        for k, c in zip(column, demand.coefficients, strict=True):
            if k != NOTHING:
                form[k] = form.get(k, 0) + c
        found.append({k: c for k, c in form.items() if c})
    return found
