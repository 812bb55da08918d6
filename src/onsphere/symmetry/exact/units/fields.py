r"""How the entries of a tensor scale one by one: exponents that vary along its axes.

The log scale of entry :math:`(i_1, \dots, i_k)` of a tensor is :math:`u + \sum_t c_t\, x[I_t(i)]`:
a unit :math:`u` of the whole tensor, and unknown exponents :math:`x` picked by index arrays
:math:`I_t` that have size 1 along the axes on which they do not depend. A matrix ``W[out, in]``
starts with one unknown per row and one per column, which is :math:`\mathrm{diag}(a)\,W\,
\mathrm{diag}(b)`: every rescaling of rows and columns there is.

Index arrays broadcast as tensors do, so what happens to the axes of a tensor (permutations, slices,
views) happens to them, at the size of a row or a column and never of a matrix.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int32]
"""Numbers of unknowns, or :data:`NOTHING`; shaped to broadcast against a tensor."""

NOTHING = -1
"""Where a term adds nothing."""
LARGEST = 4_000_000
"""Index arrays do not grow beyond this."""


class TooLargeError(Exception):
    """An index array would have as many entries as a matrix; the exponents must be constant."""


@dataclass(frozen=True, eq=False)
class Fields:
    """Exponents that vary along axes: a sum of terms, each a coefficient and an index array.

    Args:
        terms: coefficients and index arrays, aligned with the tensor at the last axis.
        free: which entries are 0 or infinite, so that every exponent fits them.

    Example:
        >>> rows = Fields(((Fraction(1), np.array([[0], [1]], np.int32)),))
        >>> columns = Fields(((Fraction(1), np.array([[2, 3, 4]], np.int32)),))
        >>> [i.shape for _, i in rows.plus(columns).terms]
        [(2, 1), (1, 3)]
        >>> rows.plus(rows, Fraction(-1)).terms
        ()
    """

    terms: tuple[tuple[Fraction, Index], ...] = ()
    free: NDArray[np.bool_] | None = None

    def __bool__(self) -> bool:
        return bool(self.terms) or self.free is not None

    def plus(self, other: "Fields", factor: Fraction | int = 1) -> "Fields":
        """Return the sum with a multiple of other fields: those of a product, entry by entry."""
        if not other:
            return self
        terms = list(self.terms)
        for c, index in other.terms:
            same = next((k for k, (_, i) in enumerate(terms) if _equal(i, index)), None)
            if same is None:
                terms.append((c * factor, index))
            else:
                terms[same] = (terms[same][0] + c * factor, index)
        free = [f for f in (self.free, other.free) if f is not None]
        both = free[0] | free[1] if len(free) == 2 else free[0] if free else None
        return Fields(tuple(t for t in terms if t[0]), both)

    def times(self, power: Fraction | int) -> "Fields":
        """Return the fields of a power."""
        return Fields(tuple((c * power, i) for c, i in self.terms) if power else (), self.free)

    def moved(self, ndim: int, move: Callable[[NDArray[Any]], Index]) -> "Fields":
        """Return the fields after a move of the axes of a tensor.

        Args:
            ndim: number of axes of the tensor.
            move: from an array with that many axes, of size 1 where it does not vary, to the same
                of the result.
        """
        terms = tuple((c, move(padded(i, ndim))) for c, i in self.terms)
        free = None if self.free is None else move(padded(self.free, ndim)).astype(bool)
        return Fields(terms, free)

    def arrays(self) -> list[NDArray[Any]]:
        """Return all arrays: of indices, and of free entries."""
        free = [] if self.free is None else [self.free]
        return [*(i for _, i in self.terms), *free]

    def varies(self, axis: int) -> bool:
        """Return whether anything varies along an axis, counted from the last as -1."""
        return any(a.ndim >= -axis and a.shape[axis] > 1 for a in self.arrays())


NONE = Fields()
"""No exponent varies."""


def joined(parts: Sequence[tuple[Fields, tuple[int, ...]]], axis: int) -> Fields:
    """Return the fields of tensors laid one after the other along an axis.

    Args:
        parts: fields and shape of each tensor.
        axis: along which axis, counted from the first.
    """
    ndim, ends = len(parts[0][1]), [*accumulate(s[axis] for _, s in parts)]
    places = [slice(end - s[axis], end) for end, (_, s) in zip(ends, parts, strict=True)]
    laid: dict[Fraction, list[list[_Piece]]] = {}  # by coefficient, for each term that has it
    for place, (fields, _) in zip(places, parts, strict=True):
        for c in {c for c, _ in fields.terms}:
            same = [i for d, i in fields.terms if d == c]
            terms = laid.setdefault(c, [])
            terms += [[] for _ in same[len(terms) :]]
            for pieces, index in zip(terms, same, strict=False):
                pieces.append((place, padded(index, ndim)))
    masks = [
        (p, padded(f.free, ndim))
        for p, (f, _) in zip(places, parts, strict=True)
        if f.free is not None
    ]
    return Fields(
        tuple((c, _laid(some, axis, ends[-1])) for c, terms in laid.items() for some in terms),
        _laid(masks, axis, ends[-1]).astype(bool) if masks else None,
    )


_Piece = tuple[slice, NDArray[Any]]
"""An array, and where it lies along an axis."""


def _laid(pieces: Sequence[_Piece], axis: int, total: int) -> Index:
    """Lay pieces along an axis, with nothing between them."""
    first = pieces[0][1]
    covered = sum(place.stop - place.start for place, _ in pieces) == total
    if covered and first.shape[axis] == 1 and all(_equal(p, first) for _, p in pieces[1:]):
        return compressed(first)
    sizes = [max([p.shape[a] for _, p in pieces]) for a in range(first.ndim)]
    sizes[axis] = total
    within_limit(math.prod(sizes))
    nothing = False if first.dtype == bool else NOTHING
    whole = np.full(sizes, nothing, np.result_type(*{p.dtype for _, p in pieces}))
    for place, piece in pieces:
        whole[(slice(None),) * axis + (place,)] = piece
    return compressed(whole)


def reshaped(array: NDArray[Any], old: Sequence[int], new: Sequence[int]) -> Index:
    """Return an array after a view of its tensor with another shape.

    Args:
        array: of size 1 along the axes on which it does not depend.
        old: shape of the tensor.
        new: its shape afterwards.

    Example:
        >>> reshaped(np.array([[0], [1]], np.int32), (2, 6), (2, 3, 2)).shape
        (2, 1, 1)
        >>> reshaped(np.arange(6, dtype=np.int32)[None], (2, 6), (2, 3, 2)).shape
        (1, 3, 2)
    """
    wide, target = [1] * len(old), [1] * len(new)
    if array.size == 1:
        return array.reshape(target)
    for before, after in _groups(tuple(old), tuple(new)):
        if any(array.shape[a] > 1 for a in before):
            for a in before:
                wide[a] = old[a]
            for a in after:
                target[a] = new[a]
    within_limit(math.prod(wide))
    return compressed(np.broadcast_to(array, wide).reshape(target))


def merged_with_others(array: NDArray[Any], old: Sequence[int], new: Sequence[int]) -> list[int]:
    """Return the axes along which an array varies and that a view merges with such as it does not.

    Args:
        array: of size 1 along the axes on which it does not depend.
        old: shape of the tensor.
        new: its shape afterwards.

    Returns:
        The axes, counted from the last as -1.
    """
    found = []
    wide = padded(array, len(old)).shape
    for before, _ in _groups(tuple(old), tuple(new)):
        varied = [a for a in before if wide[a] > 1]
        if any(wide[a] < old[a] for a in before):
            found += [a - len(old) for a in varied]
    return found


@lru_cache(1000)
def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[range, range]]:
    """Match axes of two shapes: the smallest runs with the same number of entries."""
    found = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i, j
        left = old[i] if i < len(old) else 1
        right = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        found.append((range(a, i), range(b, j)))
    return found


def compressed(array: NDArray[Any]) -> Index:
    """Give size 1 to the axes along which an array is constant."""
    for a, size in enumerate(array.shape):
        if size > 1:
            ends = array.take([0, -1], a)
            first = ends.take([0], a)
            if (ends == first).all() and (size == 2 or (array == first).all()):
                array = first
    return array


def within_limit(count: int) -> None:
    """Refuse an array with more entries than :data:`LARGEST`.

    Raises:
        TooLargeError: it has.
    """
    if count > LARGEST:
        raise TooLargeError


def padded(array: NDArray[Any], ndim: int) -> NDArray[Any]:
    """Give an array as many axes as its tensor has."""
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def _equal(a: Index, b: Index) -> bool:
    if a is b:
        return True
    return a.shape == b.shape and a.flat[0] == b.flat[0] and np.array_equal(a, b)
