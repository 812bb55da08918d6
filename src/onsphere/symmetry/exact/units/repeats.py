"""Find what repeats in tables of unknowns."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.units.fields import Index, padded

_FEW = 32
"""How many columns are looked at first: they mostly tell rows apart."""


def alike(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first row of each kind, and the kind of each row; kinds as they come.

    Rows are told apart by a hash, and then compared. In the order of hashes kinds would be numbered
    anew in every layer, and layers that are alike would not look so.
    """
    if rows.shape[1] > 2 * _FEW:
        first, kind = _by_hash(rows[:, :: rows.shape[1] // _FEW])
        if len(first) == len(rows) or (rows == rows[first[kind]]).all():
            return first, kind
    return _by_hash(rows)


def _by_hash(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    hashes = rows.astype(np.uint64) @ _factors(rows.shape[1])
    _, first, kind = np.unique(hashes, return_index=True, return_inverse=True)
    if len(first) < len(rows) and not (rows == rows[first[kind]]).all():
        _, first, kind = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[kind.reshape(-1)]


@lru_cache(8)
def _factors(count: int) -> NDArray[np.uint64]:
    return np.random.default_rng(0).integers(2**63, size=count, dtype=np.uint64) * 2 + 1


def first_alike(arrays: Sequence[Index], axis: int) -> NDArray[np.int64]:
    """Number the vectors along an axis: the same number where all arrays hold the same."""
    ndim, shape = max(a.ndim for a in arrays), np.broadcast_shapes(*(a.shape for a in arrays))
    wide = tuple(n for a, n in enumerate(shape) if a != axis % ndim)
    count = math.prod(wide)
    some = [np.moveaxis(padded(a, ndim), axis, -1) for a in arrays]
    some = [a for a in some if a.size > a.shape[-1]]  # the others are the same everywhere
    if not some:
        return np.zeros(count, np.int64)
    if any(_rises(np.broadcast_to(a[..., 0], wide).ravel()) for a in some):
        return np.arange(count)
    tables = [np.broadcast_to(a, (*wide, a.shape[-1])).reshape(count, -1) for a in some]
    return alike(np.concatenate(tables, 1))[1]


def without_repeats(arrays: Sequence[NDArray[Any]], axis: int) -> list[NDArray[Any]]:
    """Leave out slices along an axis that equal an earlier one in all arrays, which broadcast."""
    here = [np.moveaxis(a, axis, 0) for a in arrays if a.shape[axis] > 1]
    if not here or any(map(_rises, here)):
        return list(arrays)
    first, _ = alike(np.concatenate([a.reshape(len(a), -1) for a in here], 1))
    if len(first) == len(here[0]):
        return list(arrays)
    return [a.take(first, axis) if a.shape[axis] > 1 else a for a in arrays]


def _rises(array: NDArray[Any]) -> bool:
    """Return whether a number rises along the first axis: slices differ then."""
    numbers = array
    while numbers.ndim > 1:
        numbers = numbers[..., 0]
    return bool((numbers[1:] > numbers[:-1]).all())


def distinct(index: Index) -> Index:
    """Return the columns that differ; pairs are sorted as one number, which is ten times faster."""
    number = index[0]
    for row in index[1:-1]:
        number = np.unique(_paired(number, row), return_inverse=True)[1].astype(np.int32)
    keys = number if len(index) == 1 else _paired(number, index[-1])
    return index[:, np.unique(keys, return_index=True)[1]]


def _paired(high: Index, low: Index) -> NDArray[np.int64]:
    return high.astype(np.int64) << 32 | low.astype(np.int32).view(np.uint32)
