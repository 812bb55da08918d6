"""What varies along the axes of tensors, kept by memory: views of one memory see each other."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from onsphere.symmetry.exact.units.fields import (
    NOTHING,
    Fields,
    Index,
    TooLargeError,
    compressed,
    within_limit,
)

_MOST_COMPARED = 2**20
"""Views that span more of a memory count as overlapping where their spans do."""
_Place = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Offset, shape and stride of a view."""


class FieldMemory:
    """Fields of tensors, by the memory that they share and the place of each view in it."""

    def __init__(self) -> None:
        self._views: dict[int, dict[_Place, Fields]] = {}

    def knows(self, key: int) -> bool:
        """Return whether anything varies in a memory."""
        return key in self._views

    def forget(self, key: int) -> None:
        """Nothing varies in a memory any more."""
        self._views.pop(key, None)

    def all(self, key: int) -> list[Fields]:
        """Return the fields of all views that are known."""
        return list(self._views[key].values())

    def read(self, key: int, tensor: Tensor) -> Fields:
        """Return the fields of a view, from what is known of its memory.

        Raises:
            TooLargeError: they can only be had entry by entry, and there are too many.
        """
        views = self._views[key]
        place = place_of(tensor)
        if place not in views:
            flat = self._flat(key, _entries(tensor))
            views[place] = flat.moved(1, lambda a: _seen(a, place))
        return views[place]

    def write(self, key: int, tensor: Tensor, fields: Fields) -> None:
        """Describe a whole memory anew, as a view sees it."""
        self._views.pop(key, None)
        if fields:
            self._views[key] = {place_of(tensor): fields}

    def view(self, key: int, tensor: Tensor, fields: Fields) -> None:
        """Describe a view of a memory that is known."""
        if key in self._views:
            self._views[key].setdefault(place_of(tensor), fields)

    def write_part(self, key: int, tensor: Tensor, before: Fields, fields: Fields) -> None:
        """Describe a part of a memory anew, entry by entry.

        Args:
            key: which memory.
            tensor: the view that was written through.
            before: what holds for the whole memory, beside what is known of its views.
            fields: of the view.

        Raises:
            TooLargeError: the memory has too many entries.
        """
        count = _entries(tensor)
        within_limit(count)
        flat = self._flat(key, count).plus(before) if key in self._views else before
        place = place_of(tensor)
        coefficients = [c for c, _ in flat.terms]
        rest = [c for c, _ in fields.terms]
        for c in coefficients:
            if c in rest:
                rest.remove(c)
        written = list(fields.terms)
        terms: list[tuple[Fraction, Index]] = []
        for c, index in [*flat.terms, *((c, np.array([NOTHING], np.int32)) for c in rest)]:
            here = next((t for t in written if t[0] == c), None)
            if here is not None:
                written.remove(here)
            part = np.array([NOTHING], np.int32) if here is None else here[1]
            terms.append((c, _overwritten(index, count, place, part)))
        old = np.zeros(1, bool) if flat.free is None else flat.free
        new = np.zeros(1, bool) if fields.free is None else fields.free
        free = _overwritten(old, count, place, new).astype(bool)
        whole: _Place = (0, (count,), (1,))
        self._views[key] = {whole: Fields(tuple(terms), free if free.any() else None)}

    def _flat(self, key: int, count: int) -> Fields:
        """Return the fields of a memory, as one axis over all its entries."""
        views = self._views[key]
        whole: _Place = (0, (count,), (1,))
        if whole not in views:
            within_limit(count)
            place = next((p for p in views if p[0] == 0 and _size(p[1]) == count), None)
            if place is None:
                raise TooLargeError  # no view shows all of it
            ndim = len(place[1])
            views[whole] = views[place].moved(ndim, lambda a: _spread(a, count, place))
        return views[whole]


def place_of(tensor: Tensor) -> _Place:
    """Return where a view lies in its memory."""
    return (int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def overlap(some: Any, other: Any) -> bool:
    """Return whether two views of a memory may share an entry.

    Args:
        some: place of a view, or something else, which shares none.
        other: place of another one.
    """
    if len(some) != 3 or not isinstance(some[0], int):
        return False
    first, second = (_span(place) for place in (some, other))
    if first.stop <= second.start or second.stop <= first.start:
        return False
    if max(len(first), len(second)) > _MOST_COMPARED:
        return True
    start = min(first.start, second.start)
    shown = np.zeros(max(first.stop, second.stop) - start, bool)
    for place in (some, other):
        window = _window(shown, (place[0] - start, *place[1:]))
        if window.any():
            return True
        window[...] = True
    return False


def _span(place: _Place) -> range:
    offset, shape, stride = place
    reach = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return range(offset, offset + reach + 1 if 0 not in shape else offset)


def _entries(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes()) // tensor.element_size()


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _window(flat: NDArray[Any], place: _Place) -> NDArray[Any]:
    offset, shape, stride = place
    bytes_ = tuple(s * flat.itemsize for s in stride)
    return as_strided(flat[offset:], shape, bytes_, writeable=True)


def _seen(flat: NDArray[Any], place: _Place) -> Index:
    if flat.size == 1:
        return np.broadcast_to(flat, (1,) * len(place[1])).copy()
    return compressed(_window(np.ascontiguousarray(flat), place))


def _spread(array: NDArray[Any], count: int, place: _Place) -> Index:
    if array.size == 1:
        return array.reshape(1)
    flat = np.full(count, False if array.dtype == bool else NOTHING, array.dtype)
    _window(flat, place)[...] = array
    return flat


def _overwritten(flat: NDArray[Any], count: int, place: _Place, part: NDArray[Any]) -> NDArray[Any]:
    full = np.broadcast_to(flat.ravel(), (count,)).copy()
    _window(full, place)[...] = part
    return full
