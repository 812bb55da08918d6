r"""Symmetries that scale some weights as wholes and only a part of others.

Two maps of weight norm share one length, and their results are laid side by side: the length can be
traded against the columns of the next map that read the first of them, and no other. Neither whole
weights say this (the map has other columns), nor families (the length belongs to no channel).

Such a symmetry moves all channels that look alike by one number. So the unknowns are few: one for
each weight, one for each slice of each kind of component, and those of no channel. What all demands
on them leave free is everything there is; what rescalings that do nothing, families and whole
weights do not say already is returned.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from onsphere.symmetry.channels.components import Kind, Solved
from onsphere.symmetry.channels.terms import Ints
from onsphere.symmetry.exact.units.channel_demands import Block, ChannelDemands
from onsphere.symmetry.exact.units.linear_forms import (
    Constraints,
    Form,
    Plain,
    add_scaled,
    as_fractions,
    plain,
    sparse_basis,
)

Place = tuple[int, int]
"""A kind of components and a column of it."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """A symmetry of wholes and parts.

    Args:
        common: weight, or other unknown of no channel -> how it scales.
        parts: column of a kind -> how it scales in all of its components.
    """

    common: Form
    parts: Mapping[Place, Fraction]


def mixed_symmetries(
    channels: ChannelDemands,
    solved: Solved,
    blocks_of: Callable[[Ints], Sequence[Block]],
    count: int,
    counts: Callable[[int], bool],
    held: Collection[int] = (),
) -> list[Mixed]:
    """Return what neither families nor symmetries of whole weights say.

    Args:
        channels: the demands.
        solved: their components.
        blocks_of: from numbers of unknowns of channels to their blocks.
        count: of weights and buffers.
        counts: whether the scale of a weight counts: a parameter that is used.
        held: weights that nothing may scale.
    """
    return _System(channels, solved, blocks_of, count, counts).found(held)


class _System:
    """The demands on wholes and on kinds of channels.

    Unknowns are numbered: weights, then columns of weights, then all others of no channel, which
    follow from those.
    """

    def __init__(
        self,
        channels: ChannelDemands,
        solved: Solved,
        blocks_of: Callable[[Ints], Sequence[Block]],
        count: int,
        counts: Callable[[int], bool],
    ) -> None:
        self.channels, self.solved, self.count = channels, solved, count
        self.column: dict[Place, int] = {}
        self.block: dict[int, Block] = {}
        self.followed: dict[int, Plain] = {}
        for k, kind in enumerate(solved.beside):
            self._number_columns(k, kind, blocks_of(kind.members[0]))
        self.moves = count + len(self.block)
        self.counted = {k for k in range(count) if counts(k)}
        self.counted |= {i for i, b in self.block.items() if b.weight in self.counted}
        self.number: dict[int, int] = {}

    def _number_columns(self, k: int, kind: Kind, blocks: Sequence[Block]) -> None:
        """Number the columns of weights; those of one block that always move alike have one."""
        own = {j: block for j, block in enumerate(blocks) if block.weight is not None}
        rows: dict[int, Plain] = {j: {} for j in own}
        for free, followers in kind.followed.items():
            for j, c in ((free, 1), *followers):
                if j in own:
                    rows[j][free] = c
        for unknown, followers in kind.common.items():
            for j, c in followers:
                if j in own:
                    rows[j][-1 - unknown] = c
        alike: dict[tuple[int, frozenset[tuple[int, int | Fraction]]], int] = {}
        for j, block in own.items():
            key = block.start, frozenset(rows[j].items())
            number = alike.setdefault(key, self.count + len(self.block))
            self.column[k, j] = number
            self.block[number] = block
        for j, row in rows.items():
            form = {i if i < 0 else self.column[k, i]: c for i, c in row.items()}
            if self.column[k, j] not in form:
                self.followed[self.column[k, j]] = form

    def found(self, held: Collection[int]) -> list[Mixed]:
        """Return what is not said already; ``held`` weights stay."""
        system = Constraints(self.moves)
        demands = list(self._demands(held))
        for form in demands:
            system.require_zero(form)
        families, whole = list(self._families()), list(self._of_whole_weights(demands))
        known = Constraints(0)
        for v in (*families, *self._nothing, *whole):
            known.require_zero(self._counted(v))
        new = [v for v in system.plain_basis() if known.require_zero(self._counted(v))]
        said = [*self._nothing, *families, *whole]
        return [self._mixed(self._short(self._moving(v), said), system) for v in new]

    def _demands(self, held: Collection[int]) -> Iterator[Plain]:
        """Yield what must vanish."""
        for pivot, rest in self.channels.scalars.plain_rows():
            yield self._of_common({**rest, pivot: -1})
        for form in self.solved.conditions:
            yield self._of_common(form)
        for k in held:
            yield self._of_common({k: 1})
        for number, followed in self.followed.items():
            moved: Plain = {self._number(-1 - i) if i < 0 else i: c for i, c in followed.items()}
            yield {**moved, number: -1}

    def _of_common(self, form: Mapping[int, int | Fraction]) -> Plain:
        """Write a sum of unknowns of no channel in the numbers of this system."""
        return {self._number(k): plain(c) for k, c in form.items()}

    def _number(self, unknown: int) -> int:
        if unknown < self.count:
            return unknown
        return self.number.setdefault(unknown, self.moves + len(self.number))

    def _families(self) -> Iterator[Plain]:
        """Yield how channels move, each free one with all that follows it."""
        for k, kind in enumerate(self.solved.beside):
            for free, followers in kind.followed.items():
                v = {free: 1, **dict(followers)}
                yield {self.column[k, j]: c for j, c in v.items() if (k, j) in self.column}

    def _of_whole_weights(self, demands: Iterable[Plain]) -> Iterator[Plain]:
        """Yield symmetries of whole weights."""
        system = Constraints(self.count)  # no slice moves by itself
        for form in demands:
            system.require_zero({k: c for k, c in form.items() if k not in self.block})
        for v in system.plain_basis():
            yield {i: c for i, c in v.items() if i < self.count}

    @cached_property
    def _nothing(self) -> list[Plain]:
        """Rescalings of a weight, or of groups in it, against all slices along an axis."""
        found: list[Plain] = []
        of_weight: defaultdict[int, list[Block]] = defaultdict(list)
        for block, numbers in self._columns.items():
            if block.weight is not None:
                of_weight[block.weight].append(block)
                found.append({block.weight: 1, **dict.fromkeys(numbers, -1)})
        for some in of_weight.values():
            count = max(b.groups for b in some)
            if count > 1:
                found += self._nothing_in_groups(some, count)
        return found

    def _nothing_in_groups(self, blocks: Sequence[Block], count: int) -> Iterator[Plain]:
        """Yield rescalings of all of a group along one axis against all of it along another."""
        wholes = [self._groups(block, count) for block in blocks]
        for i, these in enumerate(wholes):
            for those in wholes[:i]:
                for group in sorted(these.keys() & those.keys()):
                    yield {
                        **dict.fromkeys(these[group], 1),
                        **dict.fromkeys(those[group], -1),
                    }

    def _groups(self, block: Block, count: int) -> dict[int, list[int]]:
        """Return the columns that make up each group of a block, of groups that some do."""
        each = max(block.size // count, 1)
        columns: defaultdict[int, list[int]] = defaultdict(list)
        size: defaultdict[int, int] = defaultdict(int)
        for number in self._columns[block]:
            places = self._places[number] - block.start
            group = int(places[0]) // each
            if (places // each == group).all():
                columns[group].append(number)
                size[group] += len(places)
        return {g: numbers for g, numbers in columns.items() if size[g] == each}

    @cached_property
    def _columns(self) -> dict[Block, list[int]]:
        """Return the columns of each block."""
        found: defaultdict[Block, list[int]] = defaultdict(list)
        for number, block in self.block.items():
            found[block].append(number)
        return found

    @cached_property
    def _places(self) -> dict[int, Ints]:
        """Return the unknowns behind each column."""
        found: defaultdict[int, list[Ints]] = defaultdict(list)
        for (k, j), number in self.column.items():
            found[number].append(self.solved.beside[k].members[:, j])
        return {number: np.concatenate(some) for number, some in found.items()}

    def _moving(self, v: Plain) -> Form:
        return {i: Fraction(c) for i, c in v.items() if i < self.moves}

    def _counted(self, v: Plain) -> Plain:
        """Return what tells symmetries apart, with free columns last: each is in few of them."""
        return {
            i + self.moves if i in self._free else i: c
            for i, c in v.items() if i in self.counted
        }  # fmt: skip

    @cached_property
    def _free(self) -> set[int]:
        """Columns that follow no other."""
        free = ((k, j) for k, kind in enumerate(self.solved.beside) for j in kind.followed)
        return {self.column[place] for place in free if place in self.column}

    def _short(self, v: Form, said: Iterable[Plain]) -> Form:
        """Return a symmetry that differs by what is said already, and moves less."""
        v = _gathered(v, self._nothing)
        best, better = _cost(v), True
        while better:
            better = False
            for w in said:
                for ratio in {Fraction(-v[i]) / w[i] for i in w.keys() & v.keys()}:
                    other = _gathered(add_scaled(v, as_fractions(w), ratio), self._nothing)
                    if (cost := _cost(other)) < best:
                        v, best, better = other, cost, True
                        break
        return sparse_basis([v])[0]

    def _mixed(self, v: Form, system: Constraints) -> Mixed:
        """Add what follows from how weights move."""
        common = {i: c for i, c in v.items() if i < self.count}
        rows = dict(system.rows())
        for unknown, i in self.number.items():
            c = sum((c * v.get(k, 0) for k, c in rows.get(i, {}).items()), Fraction(0))
            if c:
                common[unknown] = c
        parts: defaultdict[Place, Fraction] = defaultdict(Fraction)
        for k, kind in enumerate(self.solved.beside):
            moved = {j: v.get(self.column[k, j], Fraction(0)) for j in kind.followed
                     if (k, j) in self.column}  # fmt: skip
            for j, c in moved.items():
                parts[k, j] += c
            sources = [*((kind.followed[j], c) for j, c in moved.items())]
            sources += [(f, common[u]) for u, f in kind.common.items() if u in common]
            for followers, c in sources:
                for j, factor in followers:
                    parts[k, j] += c * factor
        return Mixed(common, {p: c for p, c in parts.items() if c})


def _gathered(v: Form, nothing: Iterable[Plain]) -> Form:
    """Write what moves all slices of a weight alike as moving the weight."""
    for w in nothing:
        _, *slices = w
        found = {v.get(i) for i in slices}
        if len(found) == 1 and (c := found.pop()):
            v = add_scaled(v, as_fractions(w), c)
    return v


def _cost(v: Form) -> tuple[Fraction, int, int]:
    """The largest exponent, how many slices move, and how many of them down."""
    return max(map(abs, v.values())), len(v), sum(c < 0 for c in v.values())
