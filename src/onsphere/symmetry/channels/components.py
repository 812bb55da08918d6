"""Solve demands on rows, columns and channels: one small system for each kind of component.

Channels hang together only through a few demands each: channel 5 of a gain with row 5 of the map
before it and column 5 of the map after it. Unknowns that do hang together form a component; those
of channel 5 and of channel 6 look alike. So components are sorted into kinds, and one of each kind
is solved with fractions, whatever the width of the network.

Unknowns that belong to no channel (units of whole weights, common exponents of whole axes) join
everything. Families leave them alone, so no component is joined by them; how channels follow them,
and what a component demands of them, is kept beside its solution.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.units.channel_demands import Block, ChannelDemands, Demand
from onsphere.symmetry.exact.units.fields import NOTHING
from onsphere.symmetry.exact.units.linear_forms import Constraints, Form, Plain, plain

Ints = NDArray[np.int64]
Followers = list[tuple[int, Fraction]]
"""Columns that follow another unknown, and how far."""
Short = NDArray[np.int32]
"""Numbers of which a decoder of 70 billion weights has tens of millions."""
_CHUNK = 2**20
"""How many things are hashed at a time."""
LARGEST_COMPONENT = 2_000_000
"""Up to how many terms of demands a component is solved."""
LARGEST_WORK = 5_000_000
"""After how many terms that exact elimination reads and writes a component is left out."""


@dataclass(frozen=True, eq=False)
class Kind:
    """Components that look alike, and the solution of one.

    Args:
        members: numbers of the unknowns: a row per component, alike in their order.
        followed: free column -> the columns that are not free and follow it, and how far.
        common: unknown of no channel -> the columns that follow it, and how far.
    """

    members: Ints
    followed: dict[int, Followers]
    common: dict[int, Followers]

    @property
    def free(self) -> tuple[int, ...]:
        """The free columns."""
        return tuple(self.followed)


@dataclass(frozen=True, eq=False)
class Solved:
    """What demands leave free.

    Args:
        kinds: the components, those that look alike together, with all other unknowns at 0.
        beside: the same with what stands beside their channels; apart where that differs.
        conditions: sums of unknowns of no channel that must vanish for all components to be solved.
        left_out: components with too many terms to be solved: nothing of them is free.
    """

    kinds: list[Kind]
    beside: list[Kind]
    conditions: list[Form]
    left_out: list[Kind]


def solved(channels: ChannelDemands) -> Solved:
    """Solve all components."""
    if not channels.blocks:
        return Solved([], [], [], [])
    blocks = channels.blocks
    ids = np.concatenate([np.arange(b.start, b.start + b.size, dtype=np.int32) for b in blocks])
    terms, others = _terms(channels.demands, blocks, ids)
    first = np.full(terms.rows, len(ids), np.int32)
    np.minimum.at(first, terms.row, terms.place)
    columns = Grouped(*connected(len(ids), first[terms.row], terms.place))
    rows = Grouped(columns.group[first], count=len(columns.size))
    company = columns.group[first[others.row]]
    del first
    block = np.repeat(np.arange(len(blocks), dtype=np.int32), [b.size for b in blocks])
    kind = signatures(columns, rows, block, terms)
    different = np.zeros(len(columns.size), np.uint64)
    mixed = _mixed(4, others.demand, others.slot, rows.rank[others.row], others.number)
    np.add.at(different, company, mixed)
    del rows
    is_weight = np.array([b.weight is not None for b in blocks])[block]
    alike = sorted(Grouped(*numbered(kind)).members(), key=lambda members: int(members[0]))
    apart = [_apart(members, different) for members in alike]
    chosen = np.zeros(len(columns.size), bool)
    chosen[[some[0] for group in apart for some in group]] = True
    chosen[[members[0] for members in alike]] = True
    own = _by_component(columns.group[terms.place], chosen)
    beside = _by_component(company, chosen)
    solver = _Solver(channels.demands, terms, others)
    solution = Solved([], [], others.unbound, [])
    for members, groups in zip(alike, apart, strict=True):
        places = columns.of(members[0])
        at = columns.order[columns.begin[members][:, None] + np.arange(len(places))]
        everyone = ids[at].astype(np.int64)
        followed: dict[int, Followers] = {}
        for some in groups:
            there = columns.of(some[0])
            one = solver.solved(own[some[0]], there, is_weight[there], beside[some[0]])
            if one is None:
                solution.left_out.append(Kind(everyone, {}, {}))
                one = _Solution({}, {}, solver.sums(own[some[0]], beside[some[0]]))
            followed = one.followed
            mine = everyone if len(groups) == 1 else everyone[np.isin(members, some)]
            solution.beside.append(Kind(mine, followed, one.common))
            solution.conditions.extend(one.conditions)
        solution.kinds.append(Kind(everyone, followed, {}))
    return solution


def _apart(members: Short, different: NDArray[np.uint64]) -> list[Short]:
    """Sort components that look alike by what stands beside them."""
    _, group = np.unique(different[members], return_inverse=True)
    return [members[group == g] for g in range(int(group.max()) + 1)]


def _by_component(component: Short, chosen: NDArray[np.bool_]) -> defaultdict[int, Ints]:
    """Return the terms of each of some components."""
    those = np.flatnonzero(chosen[component])
    those = those[np.argsort(component[those], kind="stable")]
    found: defaultdict[int, Ints] = defaultdict(lambda: those[:0])
    groups, begin = np.unique(component[those], return_index=True)
    if len(those):
        found.update(zip(groups.tolist(), np.split(those, begin[1:]), strict=True))
    return found


@dataclass(frozen=True, eq=False)
class Terms:
    """All terms of all demands that belong to channels.

    Args:
        demand: of which demand each is.
        row: of which row of all demands; rows without such terms are not counted.
        slot: which term of its demand.
        place: of its unknown among all unknowns of channels.
        rows: how many rows there are.
    """

    demand: Short
    row: Short
    slot: NDArray[np.uint8]
    place: Short
    rows: int


@dataclass(frozen=True, eq=False)
class Others:
    """What stands beside channels in demands, and differs from row to row.

    Args:
        demand: of each such term the demand that it is of.
        row: its row, as in :class:`Terms`.
        slot: which term of its demand it is.
        number: its unknown, which belongs to no channel.
        unbound: the sums of rows that have no term of a channel.
    """

    demand: Short
    row: Short
    slot: NDArray[np.uint8]
    number: Short
    unbound: list[Form]


def _terms(demands: Sequence[Demand], blocks: Sequence[Block], ids: Ints) -> tuple[Terms, Others]:
    starts = np.array([b.start for b in blocks])
    ends = np.array([b.start + b.size for b in blocks])
    # Where the unknowns of each block stand among those of all blocks.
    offsets = starts - np.searchsorted(ids, starts)
    most = sum(some.index.size for some in demands)
    demand, row, place = (np.empty(most, np.int32) for _ in range(3))
    slot = np.empty(most, np.uint8)
    others: list[tuple[Short, Short, Short, Short]] = []
    unbound: list[Form] = []
    rows = end = 0
    for d, some in enumerate(demands):
        block = np.searchsorted(starts, some.index, "right") - 1  # -1: before the first, NOTHING
        kept = (block >= 0) & (some.index < ends[np.maximum(block, 0)])
        bound = kept.any(0)
        number = (np.cumsum(bound) + (rows - 1)).astype(np.int32)
        which, column = kept.nonzero()
        here = slice(end, end + len(which))
        demand[here] = d
        row[here] = number[column]
        slot[here] = which
        place[here] = some.index[which, column] - offsets[block[which, column]]
        rows += int(bound.sum())
        end += len(which)
        outside = np.where(kept, NOTHING, some.index)
        if not bound.all():
            unbound += _sums(some, outside[:, ~bound])
        outside[:, ~bound] = NOTHING
        which, column = (outside != NOTHING).nonzero()
        if len(which):
            others.append((
                np.full(len(which), d, np.int32), number[column], which.astype(np.int32),
                outside[which, column],
            ))  # fmt: skip
    found = [np.concatenate([np.zeros(0, np.int32), *x]) for x in zip(*others, strict=True)]
    of, at, which, what = found or [np.zeros(0, np.int32)] * 4
    return (
        Terms(demand[:end], row[:end], slot[:end], place[:end], rows),
        Others(of, at, which.astype(np.uint8), what, unbound),
    )


def _sums(demand: Demand, index: Short) -> list[Form]:
    """Return the sums of some rows of a demand, each once.

    Args:
        demand: the coefficients and what all rows have.
        index: unknowns by term and row, or NOTHING.
    """
    if (index == NOTHING).all():
        return [dict(demand.scalars)] if demand.scalars else []
    found = []
    for column in np.unique(index, axis=1).T.tolist():
        form = dict(demand.scalars)
        for k, c in zip(column, demand.coefficients, strict=True):
            if k != NOTHING:
                form[k] = form.get(k, Fraction(0)) + c
        found.append({k: c for k, c in form.items() if c})
    return found


class Grouped:
    """Things by the group that they are in, in their order.

    Args:
        group: of each thing the number of its group, counted from 0.
        count: how many groups there are; some may be empty.

    Attributes:
        order: things group by group.
        begin: where each group begins there.
        size: how many things each group has.
    """

    def __init__(self, group: Short, count: int) -> None:
        self.group = group
        self.order = np.argsort(group, kind="stable").astype(np.int32)
        self.size = np.bincount(group, minlength=count)
        self.begin = np.cumsum(self.size) - self.size

    @cached_property
    def rank(self) -> Short:
        """Of each thing its place in its group."""
        rank = np.empty(len(self.group), np.int32)
        begin = np.repeat(self.begin.astype(np.int32), self.size)
        rank[self.order] = np.arange(len(rank), dtype=np.int32) - begin
        return rank

    def of(self, group: int) -> Short:
        """Return the things in a group."""
        return self.order[self.begin[group] : self.begin[group] + self.size[group]]

    def members(self) -> Iterator[Short]:
        """Yield the things of each group."""
        return (self.of(group) for group in range(len(self.size)))


def numbered(label: Ints) -> tuple[Short, int]:
    """Return the number of each label among all that occur, and how many these are."""
    names, number = np.unique(label, return_inverse=True)
    return number.reshape(-1).astype(np.int32), len(names)


def connected(count: int, a: Short, b: Short) -> tuple[Short, int]:
    """Return the number of the component of each of some nodes, and how many there are.

    Args:
        count: of the nodes.
        a: one end of each edge.
        b: the other end.
    """
    label = np.arange(count, dtype=np.int32)  # of the smallest node found in the same component
    while True:
        la, lb = label[a], label[b]
        apart = la != lb
        if not apart.any():
            break
        a, la = a[apart], la[apart]  # one after the other: these are the largest arrays there are
        b, lb = b[apart], lb[apart]
        low = np.minimum(la, lb)
        np.minimum.at(label, la, low)
        np.minimum.at(label, lb, low)
        while True:
            jumped = label[label]
            if (jumped == label).all():
                break
            label = jumped
    number = np.cumsum(label == np.arange(count, dtype=np.int32), dtype=np.int32) - np.int32(1)
    return number[label], int(number[-1]) + 1


def signatures(columns: Grouped, rows: Grouped, block: Short, terms: Terms) -> Ints:
    """Return a number for each component: equal where everything about two of them is."""
    hashes = np.zeros(len(columns.size), np.uint64)
    for some in _chunks(len(block)):
        np.add.at(hashes, columns.group[some], _mixed(1, columns.rank[some], block[some]))
    for some in _chunks(len(terms.row)):
        row, place = rows.rank[terms.row[some]], terms.place[some]
        mixed = _mixed(2, terms.demand[some], terms.slot[some], row, columns.rank[place])
        np.add.at(hashes, columns.group[place], mixed)
    return _mixed(3, hashes, columns.size).view(np.int64)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(i, i + _CHUNK) for i in range(0, count, _CHUNK))


_FACTORS = np.random.default_rng(0).integers(2**63, size=8, dtype=np.uint64) * np.uint64(2) + (
    np.uint64(1)
)
"""What the parts of a tuple are multiplied with before they are summed."""


def _mixed(seed: int, *parts: NDArray[Any]) -> NDArray[np.uint64]:
    """Return a hash of each tuple of numbers: a random odd multiple of each, summed and mixed."""
    h = np.full(len(parts[0]), seed, np.uint64)
    for k, part in enumerate(parts):
        h += part.astype(np.uint64) * _FACTORS[seed + k]
    for factor, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        h ^= h >> np.uint64(shift)
        h *= np.uint64(factor)
    h ^= h >> np.uint64(31)
    return h


@dataclass(frozen=True, eq=False)
class _Solution:
    """The solution of one component.

    Args:
        followed: as in :class:`Kind`.
        common: as in :class:`Kind`.
        conditions: as in :class:`Solved`.
    """

    followed: dict[int, Followers]
    common: dict[int, Followers]
    conditions: list[Form]


class _Solver:
    """Solves components: weights first, then what follows from them.

    Those of alike layers differ in the numbers of unknowns alone, and are solved once.

    Args:
        demands: all demands.
        terms: all terms of channels.
        others: all terms beside them that differ from row to row.
    """

    def __init__(self, demands: Sequence[Demand], terms: Terms, others: Others) -> None:
        self.demands, self.terms, self.others = demands, terms, others
        self._known: dict[object, _Solution | None] = {}

    def solved(
        self, own: Ints, places: Short, weights: NDArray[np.bool_], beside: Ints
    ) -> _Solution | None:
        """Solve one component; ``None`` if it is too large.

        Args:
            own: its terms.
            places: its unknowns, in their order.
            weights: which of them are exponents of weights.
            beside: terms of unknowns of no channel that stand in its rows, and not in all of some
                demand.
        """
        if len(own) > LARGEST_COMPONENT:
            return None
        rows = self._rows(own, beside)
        column = np.searchsorted(places, self.terms.place[own])
        first, count = len(rows.commons), len(places)
        key = (first, weights.tobytes(), column.tobytes(), rows.key)
        if key not in self._known:
            # Unknowns that no weight has are the first to be expressed, common ones the last.
            at = first + column + np.where(weights[column], 0, count)
            self._known[key] = _eliminated(rows.with_terms(at), first, count)
        found = self._known[key]
        return found and _Solution(
            found.followed,
            {rows.commons[k]: followers for k, followers in found.common.items()},
            [{rows.commons[k]: c for k, c in form.items()} for form in found.conditions],
        )

    def sums(self, own: Ints, beside: Ints) -> list[Form]:
        """Return what the rows of a component have beside terms of channels, each sum once."""
        rows = self._rows(own, beside)
        distinct = {frozenset(form.items()) for form in rows.sums()}
        return [{rows.commons[k]: Fraction(c) for k, c in form if c} for form in distinct if form]

    def _rows(self, own: Ints, beside: Ints) -> "_Rows":
        terms, others = self.terms, self.others
        numbers, row = np.unique(terms.row[own], return_inverse=True)
        demands, demand = np.unique(terms.demand[own], return_inverse=True)
        some = [self.demands[d] for d in demands.tolist()]
        of = np.zeros(len(numbers), np.int64)
        of[row] = demand
        aside = others.number[beside]
        commons = sorted({k for d in some for k in d.scalars}.union(aside.tolist()))
        number = {k: i for i, k in enumerate(commons)}
        return _Rows(
            commons,
            [tuple(plain(c) for c in d.coefficients) for d in some],
            [tuple((number[k], plain(c)) for k, c in d.scalars.items()) for d in some],
            of,
            _Places(row, demand, terms.slot[own]),
            _Places(
                np.searchsorted(numbers, others.row[beside]),
                np.searchsorted(demands, others.demand[beside]),
                others.slot[beside],
            ),
            np.searchsorted(np.array(commons, np.int64), aside),
        )


@dataclass(frozen=True, eq=False)
class _Places:
    """Where terms stand.

    Args:
        row: the row of each.
        demand: of which demand it is.
        slot: which term of its demand.
    """

    row: Ints
    demand: Ints
    slot: NDArray[np.uint8]

    @property
    def key(self) -> tuple[bytes, ...]:
        """Equal where all of it is."""
        return self.row.tobytes(), self.demand.tobytes(), self.slot.tobytes()


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of one component, numbered from 0, as are its demands and common unknowns.

    Args:
        commons: the unknowns of no channel.
        coefficients: of the terms of each demand.
        scalars: the common unknowns that all rows of each demand have.
        demand: of each row.
        own: terms of channels.
        beside: terms of common unknowns that differ from row to row.
        numbers: the common unknown of each of these.
    """

    commons: list[int]
    coefficients: list[tuple[int | Fraction, ...]]
    scalars: list[tuple[tuple[int, int | Fraction], ...]]
    demand: Ints
    own: _Places
    beside: _Places
    numbers: Ints

    @property
    def key(self) -> tuple[object, ...]:
        """Equal where all is, up to the names of unknowns."""
        told = tuple(self.coefficients), tuple(self.scalars), self.numbers.tobytes()
        return *self.own.key, *self.beside.key, *told

    def sums(self) -> list[Plain]:
        """Return of each row what it has beside terms of channels."""
        forms = [dict(self.scalars[d]) for d in self.demand.tolist()]
        return self._add(forms, self.beside, self.numbers)

    def with_terms(self, at: Ints) -> list[Plain]:
        """Return all rows, where the unknowns of channels have these numbers."""
        return self._add(self.sums(), self.own, at)

    def _add(self, forms: list[Plain], places: _Places, numbers: Ints) -> list[Plain]:
        where = (places.row.tolist(), places.demand.tolist(), places.slot.tolist())
        for row, d, slot, k in zip(*where, numbers.tolist(), strict=True):
            form = forms[row]
            form[k] = form.get(k, 0) + self.coefficients[d][slot]
        return forms


def _eliminated(rows: Iterable[Plain], first: int, count: int) -> _Solution | None:
    """Solve rows whose unknowns are numbered; ``None`` if that is too much work.

    Args:
        rows: sums that vanish. Common unknowns come first, then those of weights, then all others,
            which stand ``count`` places behind their columns.
        first: how many common unknowns there are.
        count: how many columns.
    """
    system = Constraints(0)
    for form in rows:
        system.require_zero({k: c for k, c in form.items() if c})
        if system.work > LARGEST_WORK:
            return None
    pivots = {(pivot - first) % count: rest for pivot, rest in system.rows() if pivot >= first}
    followed: dict[int, Followers] = {i: [] for i in range(count) if i not in pivots}
    common: defaultdict[int, Followers] = defaultdict(list)
    for pivot, rest in pivots.items():
        for k, c in rest.items():
            if k < first:
                common[k].append((pivot, c))
            else:
                followed[(k - first) % count].append((pivot, c))
    conditions = [{pivot: Fraction(-1), **rest} for pivot, rest in system.rows() if pivot < first]
    return _Solution(followed, dict(common), conditions)
