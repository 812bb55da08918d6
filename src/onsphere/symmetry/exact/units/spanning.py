"""Of demands on sums over several axes, find those that say all of the others.

Biases of relative positions add ``a[q, i] + b[q, j]`` to each of ``i x j`` attention weights; that
all of these sums are equal is said by ``i + j`` of them.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.units.fields import Index, padded
from onsphere.symmetry.exact.units.repeats import alike


def spanning(terms: Sequence[NDArray[Any]], shape: Sequence[int]) -> NDArray[np.bool_]:
    """Return entries at which a sum has to vanish, so that it vanishes everywhere.

    Where no term varies along two axes at once, the sum is one of functions of each, ``f(i) +
    g(j)``. It vanishes everywhere where it does in the first row and in the first column. Along one
    pair of axes other terms may vary: rows that are equal in these are treated like that.

    Args:
        terms: what is added up, of size 1 along axes on which it does not depend.
        shape: of the sum.

    Example:
        >>> rows, columns = np.arange(3)[:, None], np.arange(4)[None]
        >>> spanning([rows, columns], (3, 4)).astype(int)
        array([[1, 1, 1, 1],
               [1, 0, 0, 0],
               [1, 0, 0, 0]])
        >>> spanning([rows, columns, np.arange(4) * (rows > 0)], (3, 4)).astype(int)
        array([[1, 1, 1, 1],
               [1, 1, 1, 1],
               [1, 0, 0, 0]])
    """
    first = [i == 0 for i in np.indices(shape, sparse=True)]
    kept = np.ones(shape, bool)
    joint: list[NDArray[np.bool_]] = []
    for a, b in combinations(range(-len(shape), 0), 2):
        along_both = [t for t in terms if -a <= t.ndim and t.shape[a] > 1 and t.shape[b] > 1]
        if not along_both:
            kept &= first[a] | first[b]
        elif shape[a] > 1 and shape[b] > 1:
            joint.append(_is_new_slice(along_both, shape, a) | first[b])
            joint.append(_is_new_slice(along_both, shape, b) | first[a])
    fewest = min(joint, key=np.count_nonzero, default=kept)
    return kept & fewest


def _is_new_slice(
    terms: Sequence[NDArray[Any]], shape: Sequence[int], axis: int
) -> NDArray[np.bool_]:
    """Return which slices along an axis differ from all earlier ones in some of the terms."""
    slices = [np.moveaxis(t, axis, 0).reshape(shape[axis], -1) for t in terms]
    new = np.zeros(shape[axis], bool)
    new[alike(np.concatenate(slices, 1))[0]] = True
    return new.reshape([-1 if a == axis else 1 for a in range(-len(shape), 0)])


def unmerged(arrays: Sequence[Index]) -> list[Index]:
    """Split axes that a view merged: where an array repeats each entry, and others all entries.

    Args:
        arrays: they broadcast.

    Example:
        >>> rows, columns = np.arange(3).repeat(4), np.tile(np.arange(4), 3)
        >>> [a.shape for a in unmerged([rows, columns])]
        [(3, 1), (1, 4)]
    """
    ndim = max(a.ndim for a in arrays)
    arrays = [padded(a, ndim) for a in arrays]
    axis = 0
    while axis < arrays[0].ndim:
        inner = _inner(arrays, axis)
        if not inner:
            axis += 1
            continue
        arrays = [_split(a, axis, inner) for a in arrays]
    return list(arrays)


def _inner(arrays: Sequence[Index], axis: int) -> int:
    """Return in what size an axis splits: of the inner part, or 0 where it does not."""
    own = [a for a in arrays if a.shape[axis] > 1]
    if len(own) < 2 or own[0].shape[axis] < 4:
        return 0
    size = own[0].shape[axis]
    for inner in {math.gcd(size, _length(a, axis)) for a in own} - {1, size}:
        parts = [_split(a, axis, inner).shape[axis : axis + 2] for a in own]
        if all(1 in p for p in parts) and len({*parts}) > 1:
            return inner
    return 0


def _length(array: Index, axis: int) -> int:
    """Return a length of which all runs of equal slices along an axis are multiples."""
    rows = np.moveaxis(array, axis, 0)
    if (rows[1] != rows[0]).any():
        return 1
    rows = rows.reshape(len(rows), -1)
    return int(np.gcd.reduce(np.flatnonzero((rows[1:] != rows[:-1]).any(1)) + 1))


def _split(array: Index, axis: int, inner: int) -> Index:
    """Split an axis; a part along which nothing varies has size 1."""
    size = array.shape[axis]
    if size == 1:
        return np.expand_dims(array, axis)
    array = array.reshape(*array.shape[:axis], size // inner, inner, *array.shape[axis + 1 :])
    for part in (axis, axis + 1):
        first = array.take([0], part)
        if (array == first).all():
            array = first
    return array
