r"""What is added to a tensor when weights are moved: a sum of terms, one for each linear map.

Entry :math:`(i_1, \dots, i_k)` of a tensor moves by :math:`\sum_t c_t\, x[I_t(i)]`: unknown numbers
:math:`x` picked by index arrays that have size 1 along the axes on which they do not depend, as
exponents are (:mod:`onsphere.symmetry.exact.units.fields`). That is the *plain* part. What went
through a product with data moves by something that nobody knows: :math:`M_{w(i)}\, x[I(i)]` with a
linear map that depends on the place :math:`w` along some axes, the *wild* ones. All that can be
done with such a part is to forget it: a norm takes away what is constant along an axis, so neither
the unknown nor the map may vary along it.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.units.fields import NONE, Fields, Index, compressed, padded

PLAIN = 0
"""The map of what is known entry by entry."""
_maps = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Part:
    """What one linear map adds.

    Args:
        fields: the unknowns, and how many times each.
        wild: numbered places, one array for each axis along which the map varies.
    """

    fields: Fields = NONE
    wild: tuple[Index, ...] = ()

    def moved(self, ndim: int, move: Callable[[NDArray[Any]], Index]) -> "Part":
        """Return the part after a move of the axes of its tensor."""
        places = (compressed(move(padded(w, ndim))) for w in self.wild)
        return Part(self.fields.moved(ndim, move), tuple(p for p in places if p.size > 1))

    def is_wild(self, axis: int) -> bool:
        """Return whether the map varies along an axis, counted from the last as -1."""
        return any(varies(w, axis) for w in self.wild)


@dataclass(frozen=True, eq=False)
class TensorShift:
    """What is added to a tensor.

    Args:
        parts: by the number of the map; 0 is the plain one.

    Example:
        >>> rows = Fields(((Fraction(1), np.array([[0], [1]], np.int32)),))
        >>> bool(TensorShift.plain(rows)), bool(TensorShift.plain(rows).plus(
        ...     TensorShift.plain(rows), -1))
        (True, False)
    """

    parts: Mapping[int, Part] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.parts)

    def __iter__(self) -> Iterator[tuple[int, Part]]:
        return iter(self.parts.items())

    @classmethod
    def plain(cls, fields: Fields) -> "TensorShift":
        """Return a shift that is known entry by entry."""
        return cls({PLAIN: Part(fields)} if fields.terms else {})

    @classmethod
    def through_a_map(cls, fields: Fields, wild: Sequence[Index]) -> "TensorShift":
        """Return a shift through a linear map that nobody knows, another one each time."""
        return cls({next(_maps): Part(fields, tuple(wild))} if fields.terms else {})

    @property
    def fields(self) -> Fields:
        """The plain part."""
        return self.parts[PLAIN].fields if PLAIN in self.parts else NONE

    def moved(self, ndim: int, move: Callable[[NDArray[Any]], Index]) -> "TensorShift":
        """Return the shift after a move of the axes of its tensor."""
        return TensorShift({k: p.moved(ndim, move) for k, p in self})

    def times(self, factor: Fraction | int) -> "TensorShift":
        """Return a multiple."""
        if not factor:
            return NO_SHIFT
        return TensorShift({k: Part(p.fields.times(factor), p.wild) for k, p in self})

    def plus(self, other: "TensorShift", factor: Fraction | int = 1) -> "TensorShift":
        """Return the sum with a multiple of another one."""
        parts = dict(self.parts)
        for k, part in other.times(factor):
            here = parts.get(k)
            if here is None:
                parts[k] = part
            elif k == PLAIN or _same(here.wild, part.wild):
                parts[k] = Part(here.fields.plus(part.fields), here.wild)
            else:  # the same map at other places, such as x + x.T
                parts[next(_maps)] = part
        return TensorShift({k: p for k, p in parts.items() if p.fields.terms})

    def arrays(self) -> list[Index]:
        """Return all arrays of unknowns."""
        return [i for _, p in self for _, i in p.fields.terms]


NO_SHIFT = TensorShift()
"""Nothing moves."""


def varies(array: NDArray[Any], axis: int) -> bool:
    """Return whether an array varies along an axis, counted from the last as -1."""
    return array.ndim >= -axis and array.shape[axis] > 1


def _same(some: Sequence[Index], others: Sequence[Index]) -> bool:
    return len(some) == len(others) and all(map(np.array_equal, some, others))
