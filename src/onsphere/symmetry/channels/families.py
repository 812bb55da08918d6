r"""Families of scale symmetries: the same rescaling for each of many channels.

A family says: for each channel :math:`j`, multiply slices :math:`S_j` of some weights by
:math:`a_j^{e}`, all :math:`a_j > 0` at once, and the function stays. For two linear maps with a
ReLU between them it is one line at any width: rows of the first by :math:`a_j`, columns of the
second by :math:`1/a_j`. The symmetries of whole weights are their sums, or are listed beside them.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from onsphere._torch.execution import OutputPicker
from onsphere._torch.materialize import on_gathered
from onsphere.symmetry.channels.components import Kind, Solved
from onsphere.symmetry.channels.followed import FollowedChannels, followed_channels
from onsphere.symmetry.channels.mixed import Mixed, mixed_symmetries
from onsphere.symmetry.channels.parts import parted
from onsphere.symmetry.claims import Family, Slices
from onsphere.symmetry.exact.trace import Call
from onsphere.symmetry.exact.units.channel_demands import Block
from onsphere.symmetry.exact.units.fields import NOTHING, Fields, Index
from onsphere.symmetry.exact.units.linear_forms import (
    Constraints,
    Form,
    Plain,
    Unit,
    plain,
    sparse_basis,
)

Ints = NDArray[np.int64]
Numbers = NDArray[np.float64]
_Look = tuple[int, bool, Fraction, Fraction]
"""Of an unknown that moves: the number of its block, whether small constants or buffers know of it,
how it is said to scale as one of a weight, and how it scales in all."""


@on_gathered
def channel_symmetries(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: OutputPicker | None = None,
    inert: Collection[str] = (),
    held: Collection[str] = (),
    others: Sequence[Call] = (),
    roles: Mapping[str, frozenset[str]] | None = None,
) -> list[Family]:
    """Find every scale symmetry of a model by row, column and channel, without numbers.

    Args:
        model: any module; on the meta device it needs no memory.
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors that must not change.
        inert: parameters known not to affect the output.
        held: weights that no family may scale.
        others: further inputs that the symmetries must hold for.
        roles: what the model does with its weights, as a trace tells.

    Whatever these inputs do not reach, as experts that no token asks for, counts as free;
    :func:`onsphere.symmetry.audit` leaves it out.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
        >>> found = channel_symmetries(net, torch.ones(5, 3))
        >>> [(f.names, [int(s.exponent) for s in f.slices], f.count) for f in found]
        [(('0.weight', '2.weight'), [1, -1], 8)]
    """
    followed = followed_channels(
        model, args, kwargs, output=output, inert=inert, held=held, others=others, roles=roles
    )
    return families_of(followed)


def families_of(followed: FollowedChannels) -> list[Family]:
    """Return every symmetry that meets the demands of a model's operations."""
    return _Solution(followed, followed.solution).families()


class _Solution:
    """What the demands leave free."""

    def __init__(self, done: FollowedChannels, solution: Solved) -> None:
        self.done = done
        self._blocks = done.channels.blocks
        self._starts = np.array([b.start for b in self._blocks], np.int64)
        # Unknowns of which small constants, or buffers that estimate, know anything.
        self._asked = np.zeros(done.channels.unknowns + 1, bool)
        self._sites = [unit.fields for unit in done.beside_eps if unit.fields.terms]
        for fields in (*self._sites, *(unit.fields for _, unit in done.followers)):
            for _, index in fields.terms:
                self._asked[index] = True
        self._asked[NOTHING] = False
        self._alone = np.zeros(done.channels.unknowns, bool)  # what nothing hangs together with
        for kind in solution.kinds:
            if kind.followed and kind.members.shape[1] == 1:
                self._alone[kind.members] = True
        self.solution = replace(
            solution,
            kinds=[part for kind in solution.kinds for part in self._parted(kind, True)],
            beside=[part for kind in solution.beside for part in self._parted(kind, False)],
        )
        self._bases: dict[object, list[Form]] = {}
        self._at_sites = _Meeting(self._sites)
        self._at_followers = _Meeting([unit.fields for _, unit in done.followers])

    def families(self) -> list[Family]:
        """Return all ways to rescale channels, beside those that whole weights say."""
        found = [family for kind in self.solution.kinds for family in self._of(kind)]
        found += map(self._of_mixed, self._mixed())
        place = {n: i for i, n in enumerate(self.done.names)}
        found.sort(key=lambda f: [place[n] for n in f.names])
        return _merged(found)

    def _parted(self, kind: Kind, counting: bool) -> list[Kind]:
        """Take components apart; where vectors are counted, those that do nothing stay whole."""
        if len(kind.followed) + len(kind.common) < 2:
            return [kind]
        together = [list(v) for v in self._without_effect(kind.members[0])] if counting else []
        return parted(kind, self._labels(kind), together)

    def _labels(self, kind: Kind) -> list[tuple[int, bool]]:
        """Return of each column the block that it is of, and whether anything else knows of it."""
        blocks = np.searchsorted(self._starts, kind.members[0], "right") - 1
        asked: NDArray[np.bool_] = np.asarray(self._asked[kind.members].any(0))
        return list(zip(blocks.tolist(), asked.tolist(), strict=True))

    def _mixed(self) -> list[Mixed]:
        return mixed_symmetries(
            self.done.channels, self.solution, self._blocks_of, len(self.done.names),
            self._counts, self.done.held,
        )  # fmt: skip

    def _of_mixed(self, mixed: Mixed) -> Family:
        """Return a symmetry of wholes and parts as a family of one channel."""
        whole, names, shapes = mixed.common, self.done.names, self.done.shapes
        slices = [
            Slices(names[k], c, (0,)[: len(shapes[k])], torch.arange((*shapes[k], 1)[0])[None])
            for k, c in sorted(whole.items()) if k < len(names)
        ]  # fmt: skip
        moved: defaultdict[tuple[Block, Fraction], list[Ints]] = defaultdict(list)
        everywhere = []
        for (k, j), c in sorted(mixed.parts.items()):
            numbers = self.solution.beside[k].members[:, j]
            everywhere.append((numbers, float(c)))
            block = self._block(int(numbers[0]))
            if block.weight is not None:
                moved[block, c].append(numbers)
        slices += [
            self._slices(block, c, np.sort(np.concatenate(numbers))[None])
            for (block, c), numbers in moved.items()
        ]
        scaled = _Scaled.of(everywhere, whole)
        return Family(
            tuple(slices), 1, self._is_exact_for(scaled), tuple(self._following_all(scaled))
        )

    def _is_exact_for(self, scaled: "_Scaled") -> bool:
        """Return whether no small constant stands beside something that moves."""
        return not any(_moves(unit.fields, scaled(unit)) for unit in self.done.beside_eps)

    def _following_all(self, scaled: "_Scaled") -> Iterator[Slices]:
        """Yield how buffers that estimate something move along, slices that move alike together."""
        seen: set[int] = set()
        for own, unit in self.done.followers:
            places = own.fields.terms[0][1].ravel()
            block = self._block(int(places[0]))
            if block.weight is None or block.weight in seen:
                continue
            seen.add(block.weight)
            power = np.broadcast_to(scaled(unit).ravel(), places.shape)
            for value in np.unique(power[power != 0]):
                exponent = Fraction(float(value)).limit_denominator(1000)
                yield self._slices(block, exponent, np.sort(places[power == value])[None])

    def _of(self, kind: Kind) -> Iterator[Family]:
        """Yield families, one for all vectors that look alike."""
        basis = [v if v[min(v)] > 0 else {i: -c for i, c in v.items()} for v in self._basis(kind)]
        labels = self._labels(kind)
        asked = any(known for _, known in labels)
        alike: defaultdict[tuple[_Look, ...], list[list[int]]] = defaultdict(list)
        zero = Fraction(0)
        for v in basis:
            whole = self._all_moved(kind, v) if asked else {}
            columns = sorted(v.keys() | whole.keys())
            looks = [(*labels[i], v.get(i, zero), whole.get(i, zero)) for i in columns]
            alike[tuple(looks)].append(columns)
        for look, some in alike.items():
            members = kind.members[:, np.array(some)].swapaxes(0, 1)
            yield self._family(members.reshape(-1, len(look)), look, asked=asked)

    def _basis(self, kind: Kind) -> list[Form]:
        """Return how the weights of a component can scale while common unknowns stay."""
        columns = kind.members[0]
        blocks = self._blocks_of(columns)
        weights = {i for i, block in enumerate(blocks) if block.weight is not None}
        parameters = {i for i in weights if self._counts(blocks[i].weight)}
        vectors = [
            {i: c for i, c in ((f, 1), *followers) if i in weights}
            for f, followers in kind.followed.items()
        ]
        nothing = list(self._without_effect(columns))
        key = (frozenset(parameters), *(tuple(map(_key, some)) for some in (vectors, nothing)))
        if key not in self._bases:  # alike layers differ in the numbers of unknowns alone
            self._bases[key] = _basis_of(vectors, nothing, parameters)
        return self._bases[key]

    def _counts(self, weight: int | None) -> bool:
        return weight in self.done.used and weight < self.done.parameters

    def _without_effect(self, columns: Ints) -> Iterator[Plain]:
        """Return rescalings of all rows against all columns of one weight."""
        by_block: defaultdict[Block, dict[int, int]] = defaultdict(dict)
        for i, (k, block) in enumerate(zip(columns, self._blocks_of(columns), strict=True)):
            if block.weight is not None:
                by_block[block][int(k) - block.start] = i
        by_weight: defaultdict[int, list[tuple[Block, dict[int, int]]]] = defaultdict(list)
        for block, places in by_block.items():
            by_weight[block.weight].append((block, places))  # type: ignore[index]
        for blocks in by_weight.values():
            for i, (b, ours) in enumerate(blocks):
                for c, theirs in blocks[:i]:
                    yield from _against(self._filled(b, ours), self._filled(c, theirs))
            if len(blocks) == 1 and blocks[0][0].places is not None:
                yield from _whole_groups(*blocks[0])

    def _filled(self, block: Block, ours: Mapping[int, int]) -> "_Side":
        """Return one side of a rescaling; what stands alone is a family of its own anyway."""
        alone = self._alone[block.start : block.start + block.size]
        columns = np.where(alone, _Side.ALONE, _Side.ELSEWHERE)
        for place, column in ours.items():
            columns[place] = column
        return _Side(block.groups, columns)

    def _block(self, number: int) -> Block:
        return self._blocks[int(np.searchsorted(self._starts, number, "right")) - 1]

    def _blocks_of(self, numbers: Ints) -> list[Block]:
        return [self._blocks[i] for i in np.searchsorted(self._starts, numbers, "right") - 1]

    def _family(self, members: Ints, looks: Sequence[_Look], *, asked: bool) -> Family:
        """Return a family, a channel for each row of unknowns.

        Args:
            members: unknowns that move, a row per channel.
            looks: what there is to tell of each column.
            asked: whether small constants or buffers know of any of them.
        """
        grouped: defaultdict[tuple[int, Fraction], list[int]] = defaultdict(list)
        for i, (block, _, c, _) in enumerate(looks):
            if c:
                grouped[block, c].append(i)
        slices = tuple(
            self._slices(self._blocks[block], c, members[:, places])
            for (block, c), places in grouped.items()
        )
        count = len(members)
        if not asked:
            return Family(slices, count)
        moved = self._moved(members, [float(c) for _, _, _, c in looks])
        followers: dict[str, set[Slices]] = {}
        for s in self._following(moved, count):
            followers.setdefault(s.name, set()).add(s)
        alike = tuple(found.pop() for found in followers.values() if len(found) == 1)
        return Family(slices, count, self._is_exact(moved), alike)

    def _all_moved(self, kind: Kind, v: Form) -> Form:
        """Return all columns that move where some of weights do, and how far."""
        whole: defaultdict[int, int | Fraction] = defaultdict(int)
        for f in v.keys() & kind.followed.keys():
            amount = plain(v[f])
            whole[f] += amount
            for pivot, c in kind.followed[f]:
                whole[pivot] += c * amount
        return {i: Fraction(c) for i, c in whole.items() if c}

    def _moved(self, members: Ints, exponents: Sequence[float]) -> "_Moved":
        """Return how far those unknowns move of which small constants or buffers know anything."""
        moving = self._asked[members] & (np.array(exponents) != 0)
        member, column = moving.nonzero()
        value = np.array(exponents)[column]
        numbers = members[member, column]
        order = np.argsort(numbers)
        return _Moved(numbers[order], member[order], value[order])

    def _is_exact(self, moved: "_Moved") -> bool:
        """Return whether no small constant stands beside something that moves."""

        def amount(index: Index) -> Numbers:
            member, value = moved.at(index)
            return np.asarray(value * np.cos(1.0 + member))  # all different

        sites = (self._sites[k] for k in self._at_sites.of(moved.numbers))
        return not any(_moves(fields, _value(fields, amount)) for fields in sites)

    def _following(self, moved: "_Moved", count: int) -> Iterator[Slices]:
        """Yield how buffers that estimate something move along, once for each time they do."""
        for k in self._at_followers.of(moved.numbers):
            own, unit = self.done.followers[k]
            places = own.fields.terms[0][1].ravel()
            sizes = [i.size for _, i in unit.fields.terms]
            if not sizes or any(n not in (1, places.size) for n in sizes):
                continue
            flat = Fields(tuple((c, i.ravel()) for c, i in unit.fields.terms))
            power = np.broadcast_to(_value(flat, lambda i: moved.at(i)[1]), places.shape)
            owners = np.stack(
                [np.broadcast_to(moved.at(i)[0], places.shape) for _, i in flat.terms]
            )
            moving = np.flatnonzero(power)
            owner = owners.max(0)[moving]
            alone = ((owners[:, moving] == owner) | (owners[:, moving] < 0)).all()
            width = np.bincount(owner, minlength=count)
            if not len(moving) or not alone or len({*power[moving]}) > 1 or len({*width}) > 1:
                continue
            block = self._block(int(places[0]))
            exponent = Fraction(float(power[moving[0]])).limit_denominator(1000)
            numbers = places[moving[np.argsort(owner, kind="stable")]].reshape(count, -1)
            yield self._slices(block, exponent, numbers)

    def _slices(self, block: Block, exponent: Fraction, numbers: NDArray[np.integer]) -> Slices:
        """Return slices of a weight: the unknowns in a row are those of one channel."""
        assert block.weight is not None
        index = _placed(block, numbers.astype(np.int64) - block.start)
        name = self.done.names[block.weight]
        return Slices(name, exponent, block.axes, torch.from_numpy(index))


class _Meeting:
    """Which of some fields are made of which unknowns."""

    def __init__(self, some: Sequence[Fields]) -> None:
        met = [np.unique(_numbers(fields)) for fields in some]
        numbers = np.concatenate([np.zeros(0, np.int32), *met])
        order = np.argsort(numbers, kind="stable")
        self._numbers = numbers[order]
        self._which = np.repeat(np.arange(len(met)), [*map(len, met)])[order]

    def of(self, numbers: Ints) -> list[int]:
        """Return those that are made of some of these unknowns, in their order."""
        at = np.searchsorted(self._numbers, numbers)
        end = np.searchsorted(self._numbers, numbers, "right")
        found: set[int] = set()
        while (left := at < end).any():
            at, end = at[left], end[left]
            found.update(np.unique(self._which[at]).tolist())
            at = at + 1
        return sorted(found)


@dataclass(frozen=True, eq=False)
class _Moved:
    """How far some unknowns move, in their order; all others stay.

    Args:
        numbers: which.
        member: to which channel each belongs.
        value: its exponent.
    """

    numbers: Ints
    member: Ints
    value: Numbers

    def at(self, index: Index) -> tuple[Ints, Numbers]:
        """Return to which channel unknowns belong (-1: none), and their exponents."""
        if not len(self.numbers):
            return np.full(index.shape, -1), np.zeros(index.shape)
        place = np.minimum(np.searchsorted(self.numbers, index), len(self.numbers) - 1)
        hit = self.numbers[place] == index
        return np.where(hit, self.member[place], -1), np.where(hit, self.value[place], 0.0)


@dataclass(frozen=True, eq=False)
class _Scaled:
    """How far all unknowns move.

    Args:
        moved: those of channels.
        whole: those of none.
    """

    moved: _Moved
    whole: Mapping[int, Fraction]

    @classmethod
    def of(cls, some: Sequence[tuple[Ints, float]], whole: Mapping[int, Fraction]) -> "_Scaled":
        """Take unknowns with the number that each of them moves by."""
        common = np.array(sorted(whole), np.int64)
        numbers = np.concatenate([common, *(n for n, _ in some)])
        value = np.concatenate([
            np.array([float(whole[int(k)]) for k in common]), *(np.full(len(n), c) for n, c in some)
        ])  # fmt: skip
        order = np.argsort(numbers)
        zeros = np.zeros(len(numbers), np.int64)
        return cls(_Moved(numbers[order], zeros, value[order]), whole)

    def __call__(self, unit: Unit) -> Numbers:
        """Return how something scales, entry by entry where it varies."""
        whole = sum((float(c * self.whole.get(k, 0)) for k, c in unit.terms.items()), 0.0)
        return whole + _value(unit.fields, lambda index: self.moved.at(index)[1])


def _moves(fields: Fields, by: Numbers) -> bool:
    """Return whether anything moves, entries that fit any exponent left out."""
    return bool(np.any(by if fields.free is None else np.where(fields.free, 0.0, by)))


def _numbers(fields: Fields) -> Ints:
    """Return the unknowns in some fields."""
    found = np.concatenate([np.zeros(0, np.int32), *(i.ravel() for _, i in fields.terms)])
    return found[found != NOTHING]


def _placed(block: Block, unknowns: Ints) -> Ints:
    """Return where some unknowns of a block stand in its weight: a row per channel."""
    if block.places is None:
        return unknowns
    return block.places[unknowns].reshape(len(unknowns), -1)


@dataclass(frozen=True, eq=False)
class _Side:
    """The unknowns along one axis of a weight.

    Args:
        groups: of how many groups.
        columns: of each its column in a component, or one of the constants.
    """

    ELSEWHERE: ClassVar[int] = -1
    ALONE: ClassVar[int] = -2

    groups: int
    columns: Ints

    def of_group(self, g: int, count: int) -> Plain | None:
        """Return the columns of one of some groups, if none of it hangs together elsewhere."""
        some = self.columns.reshape(count, -1)[g].tolist()
        return None if self.ELSEWHERE in some else {i: 1 for i in some if i >= 0}


def _against(ours: _Side, theirs: _Side) -> Iterator[Plain]:
    """Yield rescalings of all along one axis against all along another, group by group."""
    count = max(ours.groups, theirs.groups)
    for g in range(count):
        some, others = ours.of_group(g, count), theirs.of_group(g, count)
        if some is not None and others is not None and (some or others):
            yield some | {i: -c for i, c in others.items()}


def _whole_groups(b: Block, ours: Mapping[int, int]) -> Iterator[Plain]:
    """Yield rescalings of a whole group, which those of its rows say in other components."""
    each = b.size // b.groups
    for g in range(b.groups if b.groups > 1 else 0):
        some = [ours.get(k, -1) for k in range(g * each, (g + 1) * each)]
        if min(some) >= 0:
            yield dict.fromkeys(some, 1)


def _key(v: Plain) -> frozenset[tuple[int, int | Fraction]]:
    return frozenset(v.items())


def _basis_of(vectors: Sequence[Plain], nothing: Sequence[Plain], counted: set[int]) -> list[Form]:
    """Return a short basis of some vectors, up to those that do nothing.

    Args:
        vectors: they span it.
        nothing: what does nothing.
        counted: the unknowns that tell vectors apart.
    """
    free = {next(iter(v)) for v in vectors if v}  # each is in one of them: last, it takes no sums
    last = 1 + max(chain(counted, *vectors, *nothing), default=0)

    def numbered(v: Plain) -> Plain:
        return {i + last if i in free else i: c for i, c in v.items()}

    held = Constraints(0)
    for v in nothing:
        held.require_zero(numbered(v))
    found = sparse_basis([
        v for v in vectors
        if held.require_zero(numbered({i: c for i, c in v.items() if i in counted}))
    ])  # fmt: skip
    return _shortest(found, nothing, counted) if nothing and found else found


def _shortest(found: Sequence[Form], nothing: Sequence[Plain], counted: set[int]) -> list[Form]:
    """Return as many vectors with fewer entries, up to such as do nothing.

    Args:
        found: independent vectors, up to those that do nothing.
        nothing: these.
        counted: the unknowns that tell vectors apart.
    """
    held = Constraints(0)
    for v in nothing:
        held.require_zero(v)
    candidates = sorted(sparse_basis([*found, *nothing]), key=lambda v: (len(v), sorted(v.items())))
    best = [
        v for v in candidates
        if held.require_zero({i: c for i, c in v.items() if i in counted})
    ]  # fmt: skip
    return best if len(best) == len(found) else list(found)


def _value(fields: Fields, moved: Callable[[Index], Numbers]) -> Numbers:
    """Return what fields come to where unknowns have some exponents."""
    return sum((float(c) * moved(i) for c, i in fields.terms), np.zeros(1))


def _merged(families: Iterable[Family]) -> list[Family]:
    """Join families that scale the same axes of the same weights alike."""
    found: defaultdict[Any, list[Family]] = defaultdict(list)
    for f in families:
        found[
            tuple((s.name, s.exponent, s.axes, s.index.shape[1]) for s in (*f.slices, *f.followers))
        ].append(f)
    return [some[0] if len(some) == 1 else _joined(some) for some in found.values()]


def _joined(some: Sequence[Family]) -> Family:
    return Family(
        _side_by_side([f.slices for f in some]),
        sum(f.count for f in some),
        all(f.exact for f in some),
        _side_by_side([f.followers for f in some]),
    )


def _side_by_side(some: Sequence[Sequence[Slices]]) -> tuple[Slices, ...]:
    return tuple(
        replace(alike[0], index=torch.cat([s.index for s in alike]))
        for alike in zip(*some, strict=True)
    )
