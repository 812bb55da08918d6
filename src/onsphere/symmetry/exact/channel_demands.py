"""Unknown exponents by row, column and channel, and what operations demand of them.

Unknowns come in blocks: one per row of a weight, one per column, or one for each place where a
sum over an axis must have a common exponent. Demands come in batches, one per operation, with a
row for each channel. :mod:`onsphere.symmetry.channels.components` solves them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.fields import LARGEST, NOTHING, Fields, Index
from onsphere.symmetry.exact.linear_forms import Constraints, Unit

_ONE = Fraction(1)
MOST_LENGTHS = 100_000
"""Up to how many norms at once may change by numbers of their own."""


@dataclass(frozen=True, eq=False)
class Block:
    """A run of unknowns.

    Args:
        start: number of its first unknown.
        shape: how they are arranged.
        weight: number of the weight whose exponents they are, if they are.
        axes: the axes of that weight along which they vary.
        places: where each of them stands along these axes, flattened: a row per unknown; one place
            each, in their order, without.
        groups: in how many groups of equal size they come.
    """

    start: int
    shape: tuple[int, ...]
    weight: int | None = None
    axes: tuple[int, ...] = ()
    places: NDArray[np.int64] | None = None
    groups: int = 1

    @property
    def size(self) -> int:
        """How many unknowns it has."""
        return math.prod(self.shape)

    def index(self) -> Index:
        """Return the numbers of its unknowns, in its shape."""
        return np.arange(self.start, self.start + self.size, dtype=np.int32).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Demand:
    """Sums that must vanish, one for each row: terms that vary, and terms that do not.

    Args:
        coefficients: of the terms that vary.
        index: number of the unknown, by term and row.
        scalars: the terms that every row has.
    """

    coefficients: tuple[Fraction, ...]
    index: Index
    scalars: Mapping[int, Fraction]


@dataclass(frozen=True, eq=False)
class _Tie:
    """Exponents that equal the common value of others along some axes, if anybody asks."""

    terms: list[tuple[Fraction, Index]]
    axes: list[int]
    own: Index


class ChannelDemands:
    """Blocks of unknowns, and the demands on them.

    Args:
        scalars: demands on units of whole tensors, which every demand without a varying part joins.
        first: number of the first unknown that is free to be given out.
    """

    def __init__(self, scalars: Constraints, first: int) -> None:
        self.scalars = scalars
        self.blocks: list[Block] = []
        self.demands: list[Demand] = []
        self._ties: list[_Tie] = []
        self._common: set[int] = set()
        self._first = self._next = first
        self._seen: set[tuple[object, ...]] = set()

    @property
    def unknowns(self) -> int:
        """How many numbers were given out."""
        return self._next

    def new(
        self,
        shape: Sequence[int],
        weight: int | None = None,
        axes: Sequence[int] = (),
        places: NDArray[np.int64] | None = None,
        groups: int = 1,
        *,
        common: bool = False,
    ) -> Index:
        """Give out a block of unknowns; return their numbers in this shape.

        Args:
            shape: how they are arranged; a single unknown belongs to no channel.
            weight: number of the weight whose exponents they are, if they are.
            axes: the axes of that weight along which they vary.
            places: where each of them stands along these axes, as in :class:`Block`.
            groups: in how many groups of equal size they come.
            common: whether none of them belongs to a channel.
        """
        block = Block(self._next, tuple(shape), weight, tuple(axes), places, groups)
        self._next += block.size
        if block.size > 1 and not common:
            self.blocks.append(block)
        else:
            self._common.update(range(block.start, block.start + block.size))
        return block.index()

    def vanish(self, unit: Unit) -> None:
        """Demand that a unit vanishes, entry by entry where it varies.

        A sum of a part that varies along one axis and a part that varies along another vanishes
        when both are constant and cancel: no row per pair is needed.
        """
        if unit.free:
            return
        shape = np.broadcast_shapes(*(a.shape for a in unit.fields.arrays()))
        if math.prod(shape) > LARGEST and len(unit.fields.arrays()) > len(unit.fields.terms):
            unit = unit.with_fields(Fields(unit.fields.terms))  # demands more than is needed
        terms = [(c, i) for c, i in unit.fields.terms]
        free = unit.fields.free
        axes = {a for _, i in terms for a in varying(i)}
        while free is None and axes:
            joint = {a: {b for _, i in terms if a in varying(i) for b in varying(i)} for a in axes}
            apart = [a for a in axes if joint[a] != axes]
            if not apart:
                break
            axis = min(apart, key=lambda a: (len(joint[a]), a))
            terms = self._constant(terms, axis)
            axes = {a for _, i in terms for a in varying(i)}
        self._add(terms, dict(unit.terms), free)

    def constant(self, unit: Unit, axes: Sequence[int], *, summed: bool = False) -> Unit:
        """Demand that a unit does not vary along some axes, and return it so.

        Args:
            unit: of a tensor.
            axes: counted from the last as -1.
            summed: a product of matrices sums over them. Then what stacked experts have in common,
                one number each, belongs to no channel, as that of a whole weight does not.
        """
        terms = list(unit.fields.terms)
        free = unit.fields.free
        for axis in axes:
            if any(axis in varying(i) for _, i in terms):
                terms = self._constant(terms, axis, free, summed)
            if free is not None and axis in varying(free):
                free = np.asarray(free.all(axis, keepdims=True))
        fields = Fields(tuple(terms), free if free is not None and free.any() else None)
        return unit.with_fields(fields)

    def looked_up(self, unit: Unit, axis: int, shape: Sequence[int]) -> Unit:
        """Pick entries along an axis that data decide.

        Whoever is picked brings an exponent along. Where nothing is demanded of it (a norm forgets
        it), the entries along the axis scale one by one; :meth:`finish` has them equal elsewhere.

        Args:
            unit: of what is picked from.
            axis: along which axis, counted from the last as -1.
            shape: of the positions; they take the place of the axis.
        """
        here = [(c, i) for c, i in unit.fields.terms if axis in varying(i)]
        rest = [(c, i) for c, i in unit.fields.terms if axis not in varying(i)]
        if len(here) != 1 or here[0][1].size != here[0][1].shape[axis]:
            unit = self.constant(unit, [axis])
            picked = []
        else:
            unit = unit.with_fields(Fields(tuple(rest), unit.fields.free))
            own = self.new(shape)
            self._ties.append(_Tie([(_ONE, here[0][1])], [axis], own))
            picked = [(here[0][0], own.reshape(tuple(shape) + (1,) * (-1 - axis)))]
        wide = len(shape)

        def move(a: NDArray[Any]) -> Index:
            at = a.ndim + axis if a.ndim >= -axis else None
            if at is None:
                return a
            return a.reshape(a.shape[:at] + (1,) * wide + a.shape[at + 1 :])

        ndim = max([-axis, *(a.ndim for a in unit.fields.arrays())])
        fields = unit.fields.moved(ndim, move)
        return unit.with_fields(fields.plus(Fields(tuple(picked))))

    def lengths(self, unit: Unit, axes: Sequence[int], shape: Sequence[int]) -> Unit:
        """Take a norm over some axes, which keep size 1.

        A norm of a vector whose entries scale differently changes by a positive number that
        depends on the vector. Where another norm forgets it again, that is no harm.

        Args:
            unit: of the tensor.
            axes: counted from the last as -1.
            shape: of the tensor.
        """
        varied = [(c, i) for c, i in unit.fields.terms if set(axes) & set(varying(i))]
        left = [1 if a - len(shape) in axes else n for a, n in enumerate(shape)]
        if not varied or unit.fields.free is not None or math.prod(left) > MOST_LENGTHS:
            return self.constant(unit, axes)
        rest = [(c, i) for c, i in unit.fields.terms if not set(axes) & set(varying(i))]
        own = self.new(left)
        self._ties.append(_Tie(varied, list(axes), own))
        return unit.with_fields(Fields((*rest, (_ONE, own))))

    def finish(self) -> None:
        """Tie exponents to what they depend on, where anything is demanded of them."""
        asked, at = np.zeros(self._next + 1, bool), 0  # the last stands for NOTHING
        while True:
            for d in self.demands[at:]:
                asked[d.index] = True
                asked[list(d.scalars)] = True
            for pivot, rest in self.scalars.rows():
                asked[[pivot, *rest]] = True
            asked[NOTHING], at = False, len(self.demands)
            met = [bool(asked[t.own].any()) for t in self._ties]
            if not any(met):
                break
            for tie, is_met in zip(self._ties, met, strict=True):
                if is_met:
                    unit = self.constant(Unit(fields=Fields(tuple(tie.terms))), tie.axes)
                    self.vanish(unit - Unit(fields=Fields(((_ONE, tie.own),))))
            self._ties = [t for t, m in zip(self._ties, met, strict=True) if not m]
            asked = np.append(asked[:-1], np.zeros(self._next + 1 - len(asked) + 1, bool))
        for tie in self._ties:
            self._add([(_ONE, tie.own)], {}, None)  # nobody asks, so any number will do

    def collapsed(self, unit: Unit) -> Unit:
        """Demand that a unit does not vary at all."""
        axes = sorted({a for i in unit.fields.arrays() for a in varying(i)})
        return self.flat(self.constant(unit, axes))

    def flat(self, unit: Unit) -> Unit:
        """Write what does not vary into the unit of the whole tensor."""
        terms = dict(unit.terms)
        kept = []
        for c, i in unit.fields.terms:
            if i.size > 1 or self._is_of_channel(int(i.flat[0])):
                kept.append((c, i))
            elif (k := int(i.flat[0])) != NOTHING:
                terms[k] = terms.get(k, Fraction(0)) + c
        free = unit.fields.free
        if free is not None and free.size == 1:
            return Unit(free=True) if free.all() else unit.with_fields(Fields(tuple(kept)))
        whole = {k: c for k, c in terms.items() if c}
        return unit.with_fields(Fields(tuple(kept), free), whole)

    def _is_of_channel(self, number: int) -> bool:
        """Return whether an unknown is one of many: not of a whole weight, and not common."""
        return number >= self._first and number not in self._common

    def _constant(
        self,
        terms: Sequence[tuple[Fraction, Index]],
        axis: int,
        free: NDArray[np.bool_] | None = None,
        summed: bool = False,
    ) -> list[tuple[Fraction, Index]]:
        """Give the terms that vary along an axis a common value along it: a new unknown."""
        here = [(c, i) for c, i in terms if axis in varying(i)]
        rest = [(c, i) for c, i in terms if axis not in varying(i)]
        shape = list(np.broadcast_shapes(*(i.shape for _, i in here)))
        if free is not None and math.prod(np.broadcast_shapes(shape, free.shape)) > LARGEST:
            free = None
        if len(here) > 1 and math.prod(shape) > LARGEST:
            each = (self.collapsed(Unit(fields=Fields((term,)))) for term in here)
            return [*rest, *((c, np.array(k, np.int32)) for u in each for k, c in u.terms.items())]
        shape[axis] = 1
        same = _first_alike([i for _, i in here], axis)
        alone = summed and self._is_of_experts(here, axis, same)
        values = self.new([int(same.max()) + 1], common=alone)
        common = values[same].reshape(shape)
        self._add([*here, (-_ONE, common)], {}, free)
        return [*rest, (_ONE, common)]

    def _is_of_experts(
        self, terms: Sequence[tuple[Fraction, Index]], axis: int, same: NDArray[np.int64]
    ) -> bool:
        """Return whether common values along an axis are one for each of some stacked experts."""
        for block in self.blocks:
            if block.groups == 1 or block.places is not None or block.groups <= same.max():
                continue
            for _, i in terms:
                if not block.start <= int(i.min()) <= int(i.max()) < block.start + block.size:
                    continue
                expert = np.moveaxis((i - block.start) // (block.size // block.groups), axis, -1)
                return bool((expert == expert[..., :1]).all())
        return False

    def _add(
        self,
        terms: Sequence[tuple[Fraction, Index]],
        scalars: dict[int, Fraction],
        free: NDArray[np.bool_] | None,
    ) -> None:
        """Write one demand per entry that varies."""
        varied = []
        for c, i in terms:
            if i.size > 1 or self._is_of_channel(int(i.flat[0])):
                varied.append((c, i))
            elif (k := int(i.flat[0])) != NOTHING:
                scalars[k] = scalars.get(k, Fraction(0)) + c
        scalars = self.scalars.reduced({k: c for k, c in scalars.items() if c})
        if not varied:
            if free is None or not free.all():
                self.scalars.require_zero(scalars)
            return
        arrays = [*(i for _, i in varied), *([] if free is None else [free])]
        shape = np.broadcast_shapes(*(a.shape for a in arrays))
        whole = np.stack([np.broadcast_to(a, shape) for a in arrays])
        several = sum(n > 1 for n in shape) > 1
        for axis in range(1, whole.ndim) if several else ():
            whole = _without_repeats(whole, axis)  # a batch that was merged with heads repeats them
        index = whole[: len(varied)].reshape(len(varied), -1)
        if free is not None:
            index = index[:, whole[-1].ravel() == 0]
        if several:
            index = _distinct(index)
        demand = Demand(tuple(c for c, _ in varied), index, scalars)
        key = (demand.coefficients, blake2b(index.tobytes()).digest(), frozenset(scalars.items()))
        if index.shape[1] and key not in self._seen:
            self._seen.add(key)
            self.demands.append(demand)


def _first_alike(arrays: Sequence[Index], axis: int) -> NDArray[np.int64]:
    """Number the slices along an axis: the same number where all arrays hold the same."""
    stacked = np.stack([np.moveaxis(a, axis, -1) for a in np.broadcast_arrays(*arrays)], -2)
    slices = stacked.reshape(-1, stacked.shape[-2] * stacked.shape[-1])
    if len(slices) == 1:
        return np.zeros(1, np.int64)
    return _alike(slices)[1]


def _alike(slices: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first row of each kind, and the kind of each row.

    Rows are told apart by a hash, and then compared.
    """
    hashes = slices.astype(np.uint64) @ _factors(slices.shape[1])
    _, first, kind = np.unique(hashes, return_index=True, return_inverse=True)
    if len(first) < len(slices) and not (slices == slices[first[kind]]).all():
        _, first, kind = np.unique(slices, axis=0, return_index=True, return_inverse=True)
    return first, kind.reshape(-1)


@lru_cache(8)
def _factors(count: int) -> NDArray[np.uint64]:
    return np.random.default_rng(0).integers(2**63, size=count, dtype=np.uint64) * 2 + 1


def _without_repeats(whole: Index, axis: int) -> Index:
    """Return an array without the slices along an axis that equal an earlier one."""
    if whole.shape[axis] == 1:
        return whole
    slices = np.moveaxis(whole, axis, 0)
    first, _ = _alike(slices.reshape(len(slices), -1))
    return whole if len(first) == len(slices) else whole.take(np.sort(first), axis)


def _distinct(index: Index) -> Index:
    """Return the columns that differ; pairs are sorted as one number, which is ten times faster."""
    number = index[0]
    for row in index[1:-1]:
        number = np.unique(_paired(number, row), return_inverse=True)[1].astype(np.int32)
    keys = number if len(index) == 1 else _paired(number, index[-1])
    return index[:, np.unique(keys, return_index=True)[1]]


def _paired(high: Index, low: Index) -> NDArray[np.int64]:
    return high.astype(np.int64) << 32 | low.astype(np.int32).view(np.uint32)


def varying(array: NDArray[Any]) -> list[int]:
    """Return the axes along which an array varies, counted from the last as -1."""
    return [a - array.ndim for a, n in enumerate(array.shape) if n > 1]
