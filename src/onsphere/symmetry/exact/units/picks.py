"""Exponents of what data pick: nobody knows which entry, only that the same number picks the same.

``w[idx]`` takes one of the matrices that are stacked in ``w``, another one at each position of
``idx``. An exponent of such a matrix is a number of its own here, which stands for all that it may
be. A demand on exponents that one entry of ``idx`` picks must hold whatever that entry is: a row
per choice. A demand on those of two entries holds for any two choices, so none of them may depend
on its choice.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from onsphere.symmetry.exact.units.fields import Fields, Index

_LAST = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class Picked:
    """A run of numbers, each of which stands for one of several exponents.

    Args:
        start: the first.
        entry: of each, which entry of a tensor of positions decides.
        column: of each, its column among the exponents.
        among: the exponents: a row per choice.
    """

    start: int
    entry: Index
    column: Index
    among: Index

    @cached_property
    def first(self) -> Index:
        """Of each column the first number that stands for it."""
        found = np.zeros(self.among.shape[1], np.int32)
        columns, found_first = np.unique(self.column, return_index=True)
        found[columns] = self.start + found_first
        return found


class Picks:
    """All numbers that stand for exponents which data pick."""

    def __init__(self) -> None:
        self._runs: list[Picked] = []
        self._starts: list[int] = []
        self._instead: dict[int, Index] = {}
        self._memories: dict[tuple[object, ...], tuple[int, object]] = {}
        self._copies: dict[tuple[object, ...], Index] = {}
        self._writes: Counter[int] = Counter()
        self._entries = 1

    def __bool__(self) -> bool:
        return bool(self._runs)

    def entries(self, positions: Tensor) -> Index:
        """Return a number for each entry of a tensor of positions; views and copies share them."""
        memory = positions.untyped_storage()
        place = np.full((), positions.storage_offset(), np.int32)
        for size, stride in zip(positions.shape, positions.stride(), strict=True):
            place = place[..., None] + stride * np.arange(size, dtype=np.int32)
        key, size = self._memory_of(positions), positions.element_size()
        if key in self._copies:
            return self._copies[key][place]
        return place + self._numbered(key, memory.nbytes() // size, positions)

    def copied(self, copy: Tensor, original: Tensor) -> None:
        """Let a copy of positions, in a memory of its own, have the numbers of the original."""
        if copy.is_contiguous() and not copy.storage_offset() and copy.numel():
            key = self._memory_of(copy)
            self._numbered(key, 0, copy)  # which keeps it alive
            self._copies[key] = self.entries(original).ravel()

    def rows(self, ends: Tensor, count: int) -> Index:
        """Return a number for each of some rows, of which a tensor tells where each group ends."""
        place = (*self._memory_of(ends), ends.storage_offset(), ends.stride())
        first = self._numbered(("rows", *place, count), count, ends)
        return np.arange(first, first + count, dtype=np.int32)

    def written(self, memories: Iterable[int]) -> None:
        """Note that memories were written into: what they hold are other positions now."""
        self._writes.update(memories)

    def _memory_of(self, positions: Tensor) -> tuple[object, ...]:
        """Return what tells the memory of a tensor, as it is now, from any other."""
        key = positions.untyped_storage()._cdata
        return ("entries", key, positions.element_size(), self._writes[key])

    def _numbered(self, key: tuple[object, ...], count: int, alive: object) -> int:
        if key not in self._memories:
            self._memories[key] = self._entries, alive  # so that no address is used twice
            self._entries += count
        return self._memories[key][0]

    def add(self, start: int, entry: Index, column: Index, among: Index) -> None:
        """Let numbers from ``start`` on stand for exponents, as in :class:`Picked`."""
        self._runs.append(Picked(start, entry, column, among))
        self._starts.append(start)

    def replace(self, start: int, others: Index) -> None:
        """Let other numbers stand in the place of a run."""
        self._instead[start] = others

    def replaced(self, index: Index) -> Index:
        """Return numbers with others in their places, where there are such."""
        found = index
        for run, here, at in self.parts(index) if self._instead else ():
            if run.start in self._instead:
                found = found.copy() if found is index else found
                found[here] = self._instead[run.start][at]
        return found

    def parts(self, index: Index) -> Iterator[tuple[Picked, NDArray[np.bool_], Index]]:
        """Yield the runs that numbers belong to, where they stand, and which of a run they are."""
        run = np.searchsorted(self._starts, index, "right") - 1
        for k in np.unique(run[run >= 0]):
            some = self._runs[k]
            here = (run == k) & (index < some.start + len(some.entry))
            if here.any():
                yield some, here, index[here] - some.start

    def deciding(self, index: Index) -> Index:
        """Return the entry that decides on each number; 0 where none does."""
        found = np.zeros(index.shape, np.int32)
        for run, here, at in self.parts(index):
            found[here] = run.entry[at]
        return found

    def choices(self, index: Index) -> int:
        """Return among how many all that is picked is; 0 where that differs."""
        found = {len(run.among) for run, _, _ in self.parts(index)}
        return found.pop() if len(found) == 1 else 0

    def alike(self, index: Index) -> Index:
        """Return equal numbers for what differs in the deciding entry alone."""
        found = index.copy()
        for run, here, at in self.parts(index):
            found[here] = run.first[run.column[at]]
        return found

    def at_each_choice(self, index: Index) -> Index:
        """Return the exponents that numbers stand for: a row per choice, along a new first axis."""
        parts = list(self.parts(index))
        most = max([1, *(len(run.among) for run, _, _ in parts)])
        found = np.repeat(index[None], most, 0)
        for run, here, at in parts:
            rows = np.arange(most) % len(run.among)
            found[:, here] = run.among[rows[:, None], run.column[at]]
        return found

    def one_decides(self, index: Index, axis: tuple[int, ...]) -> Index | None:
        """Return the one entry that decides on all numbers along some axes, if there is one.

        Args:
            index: numbers.
            axis: along which they must have the same.
        """
        entries = self.deciding(index)
        last = entries.max(axis, keepdims=True)
        first = np.where(entries > 0, entries, _LAST).min(axis, keepdims=True)
        return last if bool((first == last).all()) and self.choices(index) else None

    def spelled_out(self, fields: Fields) -> Fields:
        """Return fields that hold exponents themselves, where numbers stand for what is picked.

        They have a row for each choice then, and what is alike stands there once.
        """
        fields = Fields(tuple((c, self.replaced(i)) for c, i in fields.terms), fields.free)
        if not any(self.deciding(i).any() for _, i in fields.terms):
            return fields
        shape = np.broadcast_shapes(*(i.shape for i in fields.arrays()))
        whole = np.stack([np.broadcast_to(i, shape).ravel() for _, i in fields.terms])
        if fields.free is not None:
            whole = whole[:, ~np.broadcast_to(fields.free, shape).ravel()]
        every = self.at_each_choice(np.unique(self.alike(whole), axis=1)).swapaxes(0, 1)
        terms = ((c, i) for (c, _), i in zip(fields.terms, every, strict=True))
        return Fields(tuple(terms))


def columns_of(index: Index, axis: int) -> Index:
    """Return an array as a matrix: the entries along an axis by all others."""
    moved = np.moveaxis(index, axis, 0)
    return moved.reshape(len(moved), math.prod(moved.shape[1:]))
