"""The unknown numbers by which weights move, what follows from them, and what is demanded.

Every unknown has a key that says how it comes about, so that it is the same in every run. Beside
the entries of weights there are common values along an axis, sums, *images* (what a map that is
made of weights alone makes of other unknowns, ``W @ v``) and *bundles* (unknowns that go through
one map of data together). :mod:`onsphere.symmetry.shifts.solution` solves what is demanded.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.shifts.tensor_shift import Part, TensorShift, varies
from onsphere.symmetry.exact.units.fields import Fields, Index, TooLargeError, padded, within_limit
from onsphere.symmetry.exact.units.spanning import spanning, unmerged

MOST_IMAGES = 1_000_000
MOST_BUNDLES = 100_000
"""Where more unknowns would come about at once, nothing may move."""


@dataclass(frozen=True, eq=False)
class Weight:
    """Unknowns that are entries of a weight.

    Args:
        name: which weight or buffer.
        shape: of it.
        free: axes along which one unknown stands for a whole vector.
        way: in which way the weight is taken: ``"entries"``, ``"common"`` (the same vector at all
            places of the other axes) or ``"slices"``.
        buffer: whether it is a buffer.
    """

    name: str
    shape: tuple[int, ...]
    free: tuple[int, ...] = ()
    way: str = "entries"
    buffer: bool = False


@dataclass(frozen=True, eq=False)
class Image:
    """What unknowns make together.

    Args:
        rows: numbers of the sources, a row of them for each result.
        row: which of these rows belongs to which result.
        by_entry: whether each result is one source times a number of its own.
        words: how to write it, with ``{}`` for the sources; empty for a bundle.
        map: tells maps apart.
    """

    rows: Index
    row: NDArray[np.int64]
    by_entry: bool = False
    words: str = ""
    map: Hashable = None


@dataclass(frozen=True, eq=False)
class Block:
    """A run of unknowns.

    Args:
        start: number of the first.
        shape: how they are arranged.
        of: the weight whose entries they are, or what makes them; common values have neither.
    """

    start: int
    shape: tuple[int, ...]
    of: Weight | Image | None = None

    @property
    def size(self) -> int:
        """How many unknowns it has."""
        return math.prod(self.shape)

    def index(self) -> Index:
        """Return the numbers of its unknowns, in its shape."""
        return np.arange(self.start, self.start + self.size, dtype=np.int32).reshape(self.shape)


@dataclass
class Unknowns:
    """All unknowns of a model, and the demands on them; runs share them.

    Args:
        held: weights and buffers that may not move.
        kept: matrices and filters that only stand in products, and which of their axes these keep:
            they can move by slices along it, and in no other way.

    Attributes:
        blocks: in the order in which they were met.
        zeros: unknowns that must be 0.
        sums: coefficients, and unknowns by term and row, whose sums must be 0.
        seen: unknowns that operations took up.
        mixed: weights whose entries data have mixed: ``"slices"`` says all there is to say of them.
        looked_up: weights that data look up.
    """

    held: frozenset[str] = frozenset()
    kept: Mapping[str, int] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    zeros: list[Index] = field(default_factory=list)
    sums: list[tuple[tuple[Fraction, ...], Index]] = field(default_factory=list)
    seen: list[Index] = field(default_factory=list)
    mixed: set[str] = field(default_factory=set)
    looked_up: set[str] = field(default_factory=set)
    _by_key: dict[Hashable, Block] = field(default_factory=dict)
    _demanded: set[Hashable] = field(default_factory=set)
    _next: int = 0

    @property
    def count(self) -> int:
        """How many unknowns there are."""
        return self._next

    def block(
        self, key: Hashable, shape: Sequence[int], of: Weight | Image | None = None
    ) -> tuple[Block, bool]:
        """Return the block of this key, and whether it is new."""
        found = self._by_key.get(key)
        if found is not None:
            return found, False
        within_limit(math.prod(shape))
        block = Block(self._next, tuple(shape), of)
        self._next += block.size
        self._by_key[key] = block
        self.blocks.append(block)
        return block, True

    def fork(self) -> "Unknowns":
        """Return the same unknowns for a run of its own, without demands."""
        twin = Unknowns(self.held, self.kept, list(self.blocks))
        twin._by_key, twin._next = dict(self._by_key), self._next
        return twin

    def vanish(self, shift: TensorShift) -> None:
        """Demand that nothing is added to a tensor; of too large a sum, that no term moves."""
        for _, part in shift:
            try:
                self._demand(part.fields.terms)  # whatever the map makes of the sum
            except TooLargeError:
                self.zeros += [i for _, i in part.fields.terms]

    def constant(self, shift: TensorShift, axes: Sequence[int]) -> TensorShift:
        """Demand that a shift does not vary along some axes, and return it so.

        Args:
            shift: of a tensor.
            axes: counted from the last as -1.
        """
        kept = {}
        for number, part in shift:
            if any(part.is_wild(a) for a in axes):
                self.vanish(TensorShift({number: part}))
                continue
            fields = part.fields
            for a in axes:
                fields = self._constant_along(fields, a)
            kept[number] = Part(fields, part.wild)
        return TensorShift(kept)

    def _constant_along(self, fields: Fields, axis: int) -> Fields:
        """Give the terms that vary along an axis a common value along it."""
        here = [(c, i) for c, i in fields.terms if varies(i, axis)]
        if not here:
            return fields
        rest = [(c, i) for c, i in fields.terms if not varies(i, axis)]
        shape = list(np.broadcast_shapes(*(i.shape for _, i in here)))
        within_limit(math.prod(shape))  # a common value without its demand would be free
        ndim = len(shape)
        shape[axis] = 1
        last = [(c, np.moveaxis(padded(i, ndim), axis, -1)) for c, i in here]
        runs = _runs([i for _, i in here], shape)
        block, new = self.block(("common", *_key(last)), runs.shape)
        common = runs.spread(block.index())
        if new:
            self._demand([*here, (Fraction(-1), common)])
        return Fields((*rest, (Fraction(1), common)))

    def total(self, fields: Fields) -> Index:
        """Return one array of unknowns for a sum of terms."""
        if len(fields.terms) == 1 and fields.terms[0][0] == 1:
            return fields.terms[0][1]
        shape = np.broadcast_shapes(*(i.shape for _, i in fields.terms))
        within_limit(math.prod(shape))
        runs = _runs([i for _, i in fields.terms], shape)
        block, new = self.block(("total", *_key(fields.terms)), runs.shape)
        index = runs.spread(block.index())
        if new:
            self._demand([*fields.terms, (Fraction(-1), index)])
        return index

    def _demand(self, terms: Sequence[tuple[Fraction, Index]]) -> None:
        if len(terms) < 2:
            self.zeros += [i for _, i in terms]
            return
        shape = np.broadcast_shapes(*(i.shape for _, i in terms))
        within_limit(math.prod(shape))
        index = _without_repeats([i for _, i in terms])
        coefficients = tuple(c for c, _ in terms)
        key = (coefficients, blake2b(index.tobytes()).digest())
        if key not in self._demanded:
            self._demanded.add(key)
            self.sums.append((coefficients, index))

    def image(
        self, key: Hashable, sources: Index, shape: Sequence[int], *, words: str, by_entry: bool
    ) -> Block:
        """Return what a map that is made of weights alone makes of unknowns.

        Args:
            key: tells maps apart.
            sources: the unknowns, with the axes of the result and one more for those that are
                mixed.
            shape: of the result, of size 1 where it does not vary.
            words: how to write it.
            by_entry: whether nothing is mixed.
        """
        wide = [n for n in shape if n > 1]
        if math.prod(wide) > MOST_IMAGES:
            raise TooLargeError
        rows, row = _rows(sources, shape)
        map_ = (key, *wide, rows.shape, _digest(row))
        told = ("image", map_, _digest(rows))
        return self.block(told, wide, Image(rows, row, by_entry, words, map_))[0]

    def bundle(self, sources: Index) -> Index:
        """Return one unknown for each row of unknowns that goes through one map of data.

        Args:
            sources: the unknowns, those of a row along the last axis.
        """
        if sources.shape[-1] == 1:
            return sources[..., 0]
        shape = sources.shape[:-1]
        if math.prod(shape) > MOST_BUNDLES:
            raise TooLargeError
        runs = _runs([sources], shape, inner=1)
        rows, row = _rows(sources[np.ix_(*runs.starts)], runs.shape)
        told = ("bundle", *(n for n in runs.shape if n > 1), rows.shape, _digest(rows))
        block, _ = self.block(told, runs.shape, Image(rows, row))
        return runs.spread(block.index().reshape(runs.shape))


def _rows(sources: Index, shape: Sequence[int]) -> tuple[Index, NDArray[np.int64]]:
    """Return the rows of sources, and which of them belongs to each result."""
    rows = np.ascontiguousarray(sources.reshape(-1, sources.shape[-1]))
    number = np.arange(len(rows)).reshape(sources.shape[:-1])
    return rows, np.broadcast_to(number, tuple(shape)).ravel().copy()


@dataclass(frozen=True, eq=False)
class _Runs:
    """Which slices along each axis of some arrays differ from the ones before them.

    Args:
        starts: along each axis, where slices begin that look alike.
        lengths: how many of them there are each time.
    """

    starts: Sequence[NDArray[np.int64]]
    lengths: Sequence[NDArray[np.int64]]

    @property
    def shape(self) -> tuple[int, ...]:
        """How many runs there are along each axis."""
        return tuple(len(s) for s in self.starts)

    def first_of_each(self, array: Index) -> Index:
        """Return the entries where runs begin; axes of size 1 stay."""
        for a in range(array.ndim):
            starts = self.starts[a - array.ndim]
            if len(starts) < array.shape[a]:
                array = array.take(starts, a)
        return array

    def spread(self, array: Index) -> Index:
        """Repeat what there is of each run."""
        for a, lengths in enumerate(self.lengths):
            if (lengths > 1).any():
                array = array.repeat(lengths, a)
        return array


def _runs(arrays: Sequence[Index], shape: Sequence[int], inner: int = 0) -> _Runs:
    """Find slices that repeat the one before them in all arrays, along each axis of a shape.

    Args:
        arrays: broadcast to the shape.
        shape: common to all.
        inner: how many more axes the arrays have behind those of the shape.
    """
    ndim = len(shape) + inner
    starts = []
    for a, size in enumerate(shape):
        differs = np.ones(size, bool)
        differs[1:] = False
        for array in arrays if size > 1 else ():
            if varies(array, a - ndim):
                rows = np.moveaxis(array, a - ndim, 0)
                differs[1:] |= (rows[1:] != rows[:-1]).any(tuple(range(1, rows.ndim)))
        starts.append(np.flatnonzero(differs))
    lengths = [np.diff(s, append=n) for s, n in zip(starts, shape, strict=True)]
    return _Runs(starts, lengths)


def _without_repeats(arrays: Sequence[Index]) -> Index:
    """Return what stands together, by array and place, where that is not said by other places."""
    arrays = unmerged(arrays)
    shape = np.broadcast_shapes(*(i.shape for i in arrays))
    runs = _runs(arrays, shape)
    firsts = [runs.first_of_each(i) for i in arrays]
    index = np.stack([np.broadcast_to(i, runs.shape).ravel() for i in firsts])
    if sum(n > 1 for n in runs.shape) < 2:
        return index
    return index[:, spanning(firsts, runs.shape).ravel()]


def _key(terms: Sequence[tuple[Fraction, Index]]) -> tuple[Hashable, ...]:
    """Say what is added up; axes along which nothing varies do not count."""
    ndim = max(i.ndim for _, i in terms)
    shapes = [padded(i, ndim).shape for _, i in terms]
    kept = [a for a in range(ndim) if any(s[a] > 1 for s in shapes)]
    return tuple(
        (c, *(s[a] for a in kept), _digest(i)) for (c, i), s in zip(terms, shapes, strict=True)
    )


def _digest(array: NDArray[Any]) -> bytes:
    return blake2b(np.ascontiguousarray(array).tobytes()).digest()
