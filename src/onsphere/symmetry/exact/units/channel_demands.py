"""Unknown exponents by row, column and channel, and what operations demand of them.

Unknowns come in blocks: one per row of a weight, one per column, or one for each place where a
sum over an axis must have a common exponent. Demands come in batches, one per operation, with a
row for each channel. :mod:`onsphere.symmetry.channels.components` solves them.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.units.fields import (
    LARGEST,
    NOTHING,
    Fields,
    Index,
    compressed,
    padded,
)
from onsphere.symmetry.exact.units.linear_forms import Constraints, Unit
from onsphere.symmetry.exact.units.picks import Picks, columns_of
from onsphere.symmetry.exact.units.repeats import alike, distinct, first_alike, without_repeats
from onsphere.symmetry.exact.units.spanning import spanning

_ONE = Fraction(1)
_MOST_TOGETHER = 400
"""Up to how many exponents of what data pick may depend on choices if only their sums do not."""
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
        self.picks = Picks()
        self._experts: list[Block] = []
        self._ties: list[_Tie] = []
        self._instead: list[tuple[Index, Index]] = []
        self._stand_ins: Index | None = None  # by number, with NOTHING for itself
        self._lengths_of_picked: dict[int, _Tie] = {}
        self._common: set[int] = set()
        self._first = self._next = first
        self._seen: dict[tuple[object, ...], list[Demand]] = {}

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
        alone: bool = False,
    ) -> Index:
        """Give out a block of unknowns; return their numbers in this shape.

        Args:
            shape: how they are arranged.
            weight: number of the weight whose exponents they are, if they are.
            axes: the axes of that weight along which they vary.
            places: where each of them stands along these axes, as in :class:`Block`.
            groups: in how many groups of equal size they come.
            common: whether none of them belongs to a channel.
            alone: whether a single one does; else it belongs to none.
        """
        block = Block(self._next, tuple(shape), weight, tuple(axes), places, groups)
        self._next += block.size
        if (block.size > 1 or alone) and not common:
            self.blocks.append(block)
            self._experts += [block] if groups > 1 and places is None else []
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

    def looked_up(self, unit: Unit, axis: int, entries: Index) -> Unit:
        """Pick entries along an axis that data decide.

        Whoever is picked brings an exponent along, and where that varies along other axes as well,
        one for each of these: those of one expert (:mod:`onsphere.symmetry.exact.units.picks`).
        Where it does not and nothing is demanded of it (a norm forgets it), the entries along the
        axis scale one by one; :meth:`finish` has them equal elsewhere.

        Args:
            unit: of what is picked from.
            axis: along which axis, counted from the last as -1.
            entries: numbers of the entries that decide; their axes take the place of the axis.
        """
        varied = [(c, i) for c, i in unit.fields.terms if axis in varying(i)]
        rest = [(c, i) for c, i in unit.fields.terms if axis not in varying(i)]
        varied = varied if entries.size else []  # who picks nothing asks for nothing
        joint = [(c, i) for c, i in varied if i.size != i.shape[axis]]
        alone = [(c, i) for c, i in varied if i.size == i.shape[axis]]
        joint, large = _parted(joint, lambda i: self._can_be_picked(i, axis, entries.size))
        if len(alone) > 1 or large:
            common = self.constant(unit.with_fields(Fields((*alone, *large))), [axis])
            rest, alone = [*rest, *common.fields.terms], []
        picked = [(c, self._picked(i, axis, entries)) for c, i in joint]
        if alone:
            ((c, i),) = alone
            own = self.new(entries.shape)
            self._ties.append(_Tie([(_ONE, i)], [axis], own))
            picked.append((c, own.reshape(own.shape + (1,) * (-1 - axis))))
        free = unit.fields.free
        if free is not None and axis in varying(free):
            free = np.asarray(free.all(axis, keepdims=True))
        wide = entries.ndim

        def move(a: NDArray[Any]) -> Index:
            at = a.ndim + axis
            return a.reshape(a.shape[:at] + (1,) * wide + a.shape[at + 1 :])

        kept = Fields(tuple(rest), free if free is not None and free.any() else None)
        fields = kept.moved(max([-axis, *(a.ndim for a in kept.arrays())]), move)
        return unit.with_fields(fields.plus(Fields(tuple(picked))))

    def _can_be_picked(self, index: Index, axis: int, count: int) -> bool:
        if index.size // index.shape[axis] * count > LARGEST:
            return False
        return not self.picks or not self.picks.deciding(index).any()

    def _picked(self, index: Index, axis: int, entries: Index) -> Index:
        """Return numbers for the exponents that some entries pick along an axis."""
        among = columns_of(index, axis)
        columns = np.arange(among.shape[1], dtype=np.int32)
        shape = list(index.shape)
        at = index.ndim + axis
        del shape[at]
        found = self._standing_for(
            np.repeat(entries.ravel(), len(columns)), np.tile(columns, entries.size), among
        )
        found = np.moveaxis(found.reshape(*entries.shape, *shape), range(entries.ndim), range(
            at, at + entries.ndim
        ))  # fmt: skip
        return np.ascontiguousarray(found)

    def _standing_for(self, entry: Index, column: Index, among: Index) -> Index:
        """Give out numbers that stand for what entries pick, as in :class:`~.picks.Picked`."""
        start = self._next
        self._next += len(entry)
        self.picks.add(start, entry, column, among)
        return np.arange(start, self._next, dtype=np.int32)

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
        own = self._lengths(varied, axes, left)
        if own is None:
            return self.constant(unit, axes)
        return unit.with_fields(Fields((*rest, (_ONE, own))))

    def _lengths(
        self, terms: Sequence[tuple[Fraction, Index]], axes: Sequence[int], left: Sequence[int]
    ) -> Index | None:
        """Give out a number for each length; of what data pick, one for each choice."""
        arrays = [i for _, i in terms]
        if not any(self.picks.deciding(i).any() for i in arrays if self.picks):
            own = self.new(left)
            self._ties.append(_Tie(list(terms), list(axes), own))
            return own
        if math.prod(np.broadcast_shapes(*(i.shape for i in arrays))) > LARGEST or len(axes) > 1:
            return None
        whole = np.stack(np.broadcast_arrays(*arrays))
        entry = self.picks.one_decides(whole, (0, *axes))
        if entry is None:
            return None
        count = math.prod(left)
        among = np.full((self.picks.choices(whole), count), NOTHING, np.int32)
        entries = np.broadcast_to(entry[0], left).ravel()
        own = self._standing_for(entries, np.arange(count, dtype=np.int32), among).reshape(left)
        self._lengths_of_picked[int(own.flat[0])] = _Tie(list(terms), list(axes), own)
        return own

    def _known(self, index: Index) -> Index:
        """Put the common exponent of what has been picked in the place of its length.

        A demand asks for it. Of lengths that nobody asks for any number will do.
        """
        for start, tie in list(self._lengths_of_picked.items()):
            if _meets(index, tie.own):
                del self._lengths_of_picked[start]
                ((_, common),) = self._constant(tie.terms, tie.axes[0])
                self.picks.replace(start, np.broadcast_to(common, tie.own.shape).ravel())
        return self.picks.replaced(index)

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
                    self._tie(tie)
            self._ties = [t for t, m in zip(self._ties, met, strict=True) if not m]
            asked = np.append(asked[:-1], np.zeros(self._next + 1 - len(asked) + 1, bool))
        idle = {int(tie.own.flat[0]) for tie in self._ties}  # nobody asks: any number will do
        for tie in self._ties:
            if tie.own.size == 1:
                self._add([(_ONE, tie.own)], {}, None)
        self._drop(idle)

    def _tie(self, tie: _Tie) -> None:
        """Let exponents be what they depend on; a single other one stands in their places."""
        unit = self.constant(Unit(fields=Fields(tuple(tie.terms))), tie.axes)
        terms = unit.fields.terms
        if tie.own.size > 1 and len(terms) == 1 and terms[0][0] == 1 and not unit.terms:
            self._instead.append((tie.own, terms[0][1]))
        else:
            self.vanish(unit - Unit(fields=Fields(((_ONE, tie.own),))))

    def _drop(self, idle: Collection[int]) -> None:
        """Let go of unknowns that others stand for, and of those that nothing asks for.

        Args:
            idle: where the blocks of the latter start.
        """
        if self._instead:
            found = np.append(np.arange(self._next, dtype=np.int32), NOTHING)
            for own, others in self._instead:
                found[own] = others
            while not np.array_equal(found, again := found[found]):  # lengths of lengths
                found = again
            for k, d in enumerate(self.demands):
                if (found[d.index] != d.index).any():
                    self.demands[k] = Demand(d.coefficients, distinct(found[d.index]), d.scalars)
            self._stand_ins = found
        gone = {int(own.flat[0]) for own, _ in self._instead}.union(idle)
        self.blocks = [b for b in self.blocks if b.start not in gone]

    def replaced(self, fields: Fields) -> Fields:
        """Return fields after :meth:`finish`: without unknowns that others stand for."""
        if self._stand_ins is None:
            return fields
        return Fields(tuple((c, self._stand_ins[i]) for c, i in fields.terms), fields.free)

    def spelled_out(self, fields: Fields) -> list[Fields]:
        """Return fields after :meth:`finish`, and those that lengths in them depend on.

        A length that nobody asked for is no sum of exponents, but it moves where they do.
        """
        fields = self.replaced(fields)
        numbers = [self.picks.replaced(i) for _, i in fields.terms]
        ties = [*self._ties, *self._lengths_of_picked.values()]
        asked = [t for t in ties if any(_meets(i, t.own) for i in numbers)]
        below = (self.spelled_out(Fields((term,))) for tie in asked for term in tie.terms)
        return [self.picks.spelled_out(fields), *(f for found in below for f in found)]

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
        if self.picks:
            terms = self._decided_by_one(terms, axis)
        here = [(c, i) for c, i in terms if axis in varying(i)]
        rest = [(c, i) for c, i in terms if axis not in varying(i)]
        if not here:
            return rest
        shape = list(np.broadcast_shapes(*(i.shape for _, i in here)))
        if free is not None and math.prod(np.broadcast_shapes(shape, free.shape)) > LARGEST:
            free = None
        if len(here) > 1 and math.prod(shape) > LARGEST:
            each = (self.collapsed(Unit(fields=Fields((term,)))) for term in here)
            return [*rest, *((c, np.array(k, np.int32)) for u in each for k, c in u.terms.items())]
        shape[axis] = 1
        if (
            self.picks
            and (common := self._common_of_picked([i for _, i in here], axis, summed)) is not None
        ):
            self._add([*here, (-_ONE, common)], {}, free)
            return [*rest, (_ONE, common)]
        same = first_alike([i for _, i in here], axis)
        count = int(same.max()) + 1
        by_expert = (summed or count == 1) and self._is_of_experts(here, axis, same)
        values = self.new([count], common=summed and by_expert, alone=by_expert)
        common = values[same].reshape(shape)
        self._add([*here, (-_ONE, common)], {}, free)
        return [*rest, (_ONE, common)]

    def _decided_by_one(
        self, terms: Sequence[tuple[Fraction, Index]], axis: int
    ) -> list[tuple[Fraction, Index]]:
        """Let nothing depend on what is picked where several entries decide along an axis."""
        terms = [(c, self._known(i) if axis in varying(i) else i) for c, i in terms]
        here = [(c, i) for c, i in terms if axis in varying(i)]
        met, plain = _parted(here, lambda i: bool(self.picks.deciding(i).any()))
        if not met:
            return list(terms)
        rest = [(c, i) for c, i in terms if axis not in varying(i)]
        shape = np.broadcast_shapes(*(i.shape for _, i in met))
        if math.prod(shape) > LARGEST:
            return [*rest, *plain, *(t for some in met for t in self._settled([some]))]
        whole = np.stack(np.broadcast_arrays(*(i for _, i in met)))
        alone = self.picks.one_decides(whole, (0, axis)) is not None
        return list(terms) if alone else [*rest, *plain, *self._settled(met)]

    def _settled(self, terms: Sequence[tuple[Fraction, Index]]) -> list[tuple[Fraction, Index]]:
        """Demand that sums of what data pick are the same for all choices, and return them so."""
        whole = np.stack(np.broadcast_arrays(*(i for _, i in terms)))
        flat = whole.reshape(len(whole), -1)
        sums = self._same_for_all_choices([c for c, _ in terms], flat)
        kept = [(_ONE, compressed(s.reshape(whole.shape[1:]))) for s in sums]
        plain = [(c, np.where(self.picks.deciding(i) > 0, NOTHING, i)) for c, i in terms]
        return [*kept, *((c, compressed(i)) for c, i in plain if (i != NOTHING).any())]

    def _same_for_all_choices(
        self, coefficients: Sequence[Fraction], index: Index
    ) -> Iterator[Index]:
        """Yield what the terms of sums come to that one entry decides on, entry after entry.

        Args:
            coefficients: of the terms.
            index: numbers, a row per term.
        """
        entries = self.picks.deciding(index)
        while entries.any():
            here = (entries > 0) & (entries == entries.max(0))
            entries = np.where(here, 0, entries)
            part = self.picks.alike(np.where(here, index, NOTHING).astype(np.int32))
            first, kind = alike(np.ascontiguousarray(part.T))
            every = self.picks.at_each_choice(part[:, first])
            rows = np.arange(len(part))[:, None]
            together = every.size <= _MOST_TOGETHER and self.picks.choices(part)
            for some in rows.T if together else rows:
                sums = self.new([len(first)])
                columns = every[:, some].swapaxes(0, 1).reshape(len(some), -1)
                found = distinct(np.concatenate([columns, np.tile(sums, len(every))[None]]))
                self._write((*(coefficients[k] for k in some), -_ONE), found, {})
                yield np.where(here[some].any(0), sums[kind], NOTHING).astype(np.int32)

    def _common_of_picked(self, arrays: Sequence[Index], axis: int, summed: bool) -> Index | None:
        """Give out a common value along an axis for each choice, where one entry decides on all."""
        if not any(self.picks.deciding(i).any() for i in arrays):
            return None
        whole = np.stack(np.broadcast_arrays(*arrays))
        entry = self.picks.one_decides(whole, (0, axis))
        choices = self.picks.choices(whole)
        assert entry is not None
        same = first_alike([self.picks.alike(i) for i in arrays], axis)
        count = int(same.max()) + 1
        among = self.new((choices, count), common=summed and count == 1)
        kinds, at = np.unique(entry.ravel().astype(np.int64) * count + same, return_inverse=True)
        own = self._standing_for(
            (kinds // count).astype(np.int32), (kinds % count).astype(np.int32), among
        )
        return own[at.reshape(-1)].reshape(entry.shape[1:])

    def _is_of_experts(
        self, terms: Sequence[tuple[Fraction, Index]], axis: int, same: NDArray[np.int64]
    ) -> bool:
        """Return whether common values along an axis are one for each of some stacked experts."""
        for block in self._experts:
            if block.groups <= same.max():
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
        ndim = max(a.ndim for a in arrays)
        arrays = [padded(a, ndim) for a in arrays]
        shape = np.broadcast_shapes(*(a.shape for a in arrays))
        several = sum(n > 1 for n in shape) > 1
        for axis in range(ndim) if several else ():  # a batch merged with heads repeats them
            arrays = without_repeats(arrays, axis)
        shape = np.broadcast_shapes(*(a.shape for a in arrays))
        kept = np.ones(shape, bool)
        if free is not None:
            kept = ~np.broadcast_to(arrays.pop(), shape)
        elif several and not self.picks:
            kept = spanning([compressed(a) for a in arrays], shape)
        at = kept.nonzero()
        index = np.stack([
            a[tuple(k if n > 1 else 0 for k, n in zip(at, a.shape, strict=True))]
            if a.size > 1 else np.full(len(at[0]), a.flat[0])
            for a in arrays
        ])  # fmt: skip
        if several:
            index = distinct(index)
        own = [c for c, _ in varied]
        if self.picks and self.picks.deciding(index := self._known(index)).any():
            for coefficients, some in self._for_all_choices(own, index):
                self._write(coefficients, some, scalars)
        else:
            self._write(own, index, scalars)

    def _write(
        self, coefficients: Sequence[Fraction], index: Index, scalars: Mapping[int, Fraction]
    ) -> None:
        if not index.shape[1]:
            return
        demand = Demand(tuple(coefficients), index, scalars)
        numbers = (*index[:, [0, -1]].flat, index.sum())
        key = (demand.coefficients, index.shape, numbers, frozenset(scalars.items()))
        alike = self._seen.setdefault(key, [])
        if not any(np.array_equal(index, other.index) for other in alike):
            alike.append(demand)
            self.demands.append(demand)

    def _for_all_choices(
        self, coefficients: Sequence[Fraction], index: Index
    ) -> Iterator[tuple[Sequence[Fraction], Index]]:
        """Yield demands that must hold whatever data pick."""
        entries = self.picks.deciding(index)
        last = entries.max(0)
        single = (last > 0) & ~((entries > 0) & (entries != last)).any(0)
        if not self.picks.choices(index[:, single]):
            single = np.zeros_like(single)
        several = (last > 0) & ~single
        yield coefficients, index[:, last == 0]
        some = distinct(self.picks.alike(index[:, single]))
        every = self.picks.at_each_choice(some)
        yield coefficients, distinct(every.swapaxes(0, 1).reshape(len(index), -1))
        mixed = index[:, several]
        sums = list(self._same_for_all_choices(coefficients, mixed))
        plain = np.where(entries[:, several] > 0, NOTHING, mixed).astype(np.int32)
        ones = [_ONE] * len(sums)
        yield [*coefficients, *ones], distinct(np.concatenate([plain, *(s[None] for s in sums)]))


def _parted(
    terms: Sequence[tuple[Fraction, Index]], fits: Callable[[Index], bool]
) -> tuple[list[tuple[Fraction, Index]], list[tuple[Fraction, Index]]]:
    """Return the terms that fit, and the others."""
    return [t for t in terms if fits(t[1])], [t for t in terms if not fits(t[1])]


def _meets(index: Index, own: Index) -> bool:
    """Return whether an index array holds a number of a block."""
    start = int(own.flat[0])
    return bool(((index >= start) & (index < start + own.size)).any())


def varying(array: NDArray[Any]) -> list[int]:
    """Return the axes along which an array varies, counted from the last as -1."""
    return [a - array.ndim for a, n in enumerate(array.shape) if n > 1]
