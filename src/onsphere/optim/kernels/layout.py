"""Where the vectors of a tensor lie in memory."""

import functools
from typing import NamedTuple

import torch

from onsphere.geometry import VectorAxes


class Layout(NamedTuple):
    """Memory as a dense array (batches, outer, vectors, inner).

    Entry (b, o, k, i) belongs to vector number ``b * vectors + k``. Rows are (rows, 1, 1, n), a
    whole tensor is (1, 1, 1, n), columns are (1, rows, columns, 1), heads along the second axis
    are (1, rows, heads, n).
    """

    batches: int
    outer: int
    vectors: int
    inner: int


@functools.lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], stride: tuple[int, ...], axes: VectorAxes) -> Layout | None:
    """Return the layout of a tensor's vectors, or ``None`` when it is not of this kind.

    Example:
        >>> layout_of((4, 3, 2), (6, 2, 1), VectorAxes((0,)))
        Layout(batches=4, outer=1, vectors=1, inner=6)
        >>> layout_of((4, 3), (3, 1), VectorAxes((1,)))
        Layout(batches=1, outer=4, vectors=3, inner=1)
    """
    view, inside = axes.split(torch.empty_strided(shape, stride, device="meta"))
    dims = [
        (view.stride(axis), view.shape[axis], axis in inside)
        for axis in range(view.ndim)
        if view.shape[axis] != 1
    ]
    numbering = [stride for stride, _, is_inside in dims if not is_inside]
    if numbering != sorted(numbering, reverse=True):
        return None  # vectors are numbered in the order of their axes
    dims.sort(reverse=True)
    runs: list[tuple[int, bool]] = []
    dense = 1
    for step, size, is_inside in reversed(dims):
        if step != dense:
            return None
        dense *= size
        if runs and runs[-1][1] == is_inside:
            runs[-1] = (runs[-1][0] * size, is_inside)
        else:
            runs.append((size, is_inside))
    sizes = [1, 1, 1, 1]  # innermost first: inside, vectors, inside, vectors
    place = 0
    for size, is_inside in runs:
        if (place % 2 == 0) != is_inside:
            place += 1
        if place > 3:
            return None
        sizes[place] = size
        place += 1
    inner, vectors, outer, batches = sizes
    if outer == 1:
        batches, vectors = batches * vectors, 1
    return Layout(batches, outer, vectors, inner)
