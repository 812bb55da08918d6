"""Solve demands on rows, columns and channels: one small system for each kind of component.

Channels hang together only through a few demands each: channel 5 of a gain with row 5 of the map
before it and column 5 of the map after it. Unknowns that do hang together form a component; those
of channel 5 and of channel 6 look alike. So components are sorted into kinds, and one of each kind
is solved with fractions, whatever the width of the network.

Unknowns that belong to no channel (units of whole weights, common exponents of whole axes) join
everything. Families leave them alone, so they count as 0 here; what moves them stands among the
symmetries of whole weights.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.channel_demands import Block, ChannelDemands, Demand
from onsphere.symmetry.exact.linear_forms import Constraints, Form

Ints = NDArray[np.int64]
LARGEST_COMPONENT = 4000
"""Up to how many terms a component is solved: exact elimination grows faster than they do."""


@dataclass(frozen=True, eq=False)
class Kind:
    """Components that look alike, and the solution of one.

    Args:
        members: numbers of the unknowns: a row per component, alike in their order.
        followed: free column -> the columns that are not free and follow it, and how far.
    """

    members: Ints
    followed: dict[int, list[tuple[int, Fraction]]]

    @property
    def free(self) -> tuple[int, ...]:
        """The free columns."""
        return tuple(self.followed)


def kinds_of(channels: ChannelDemands) -> list[Kind]:
    """Solve all components, with all common unknowns at 0."""
    if not channels.blocks:
        return []
    blocks = channels.blocks
    ids = np.concatenate([np.arange(b.start, b.start + b.size) for b in blocks])
    terms = _terms(channels.demands, blocks, ids)
    first = np.full(terms.rows, len(ids))
    np.minimum.at(first, terms.row, terms.place)
    label = _connected(len(ids), first[terms.row], terms.place)
    columns = _Grouped(label)
    rows = _Grouped(columns.group[first], count=len(columns.size))
    block = np.repeat(np.arange(len(blocks)), [b.size for b in blocks])
    kind = _kinds(columns, rows, block, terms)
    own = _Grouped(rows.group[terms.row], count=len(columns.size))
    is_weight = np.array([b.weight is not None for b in blocks])[block]
    found = []
    for members in _Grouped(kind).members():
        places = columns.of(members[0])
        some = own.of(members[0])
        followed = _solved(channels.demands, terms, some, places, is_weight[places])
        everyone = ids[columns.order[columns.begin[members][:, None] + np.arange(len(places))]]
        found.append(Kind(everyone, followed))
    return found


@dataclass(frozen=True, eq=False)
class _Terms:
    """All terms of all demands that belong to channels.

    Args:
        demand: of which demand each is.
        row: of which row of all demands; rows without such terms are not counted.
        slot: which term of its demand.
        place: of its unknown among all unknowns of channels.
        rows: how many rows there are.
    """

    demand: Ints
    row: Ints
    slot: Ints
    place: Ints
    rows: int


def _terms(demands: Sequence[Demand], blocks: Sequence[Block], ids: Ints) -> _Terms:
    parts: list[tuple[Ints, Ints, Ints, Ints]] = []
    at = 0
    for d, some in enumerate(demands):
        count = some.index.shape[1]
        rows = np.arange(at, at + count)
        at += count
        parts += [
            (np.full(count, d), rows, np.full(count, t), column.astype(np.int64))
            for t, column in enumerate(some.index)
        ]
    if not parts:
        none = np.zeros(0, np.int64)
        return _Terms(none, none, none, none, 0)
    demand, row, slot, number = (np.concatenate(x) for x in zip(*parts, strict=True))
    starts = np.array([b.start for b in blocks])
    ends = np.array([b.start + b.size for b in blocks])
    block = np.searchsorted(starts, number, "right") - 1  # -1 before the first, as of NOTHING
    kept = (block >= 0) & (number < ends[np.maximum(block, 0)])
    bound = np.zeros(at, bool)
    bound[row[kept]] = True
    row = (np.cumsum(bound) - 1)[row[kept]]
    place = np.searchsorted(ids, number[kept])
    return _Terms(demand[kept], row, slot[kept], place, int(bound.sum()))


class _Grouped:
    """Things by the group that they are in, in their order.

    Args:
        label: of each thing, any number.
        count: how many groups there are, if labels count them from 0; some may be empty then.

    Attributes:
        group: of each thing the number of its group, counted from 0.
        rank: its place in that group.
        order: things group by group.
        begin: where each group begins there.
        size: how many things each group has.
    """

    def __init__(self, label: Ints, count: int | None = None) -> None:
        if count is None:
            names, self.group = np.unique(label, return_inverse=True)
            self.group, count = self.group.reshape(-1), len(names)
        else:
            self.group = label
        self.order = np.argsort(self.group, kind="stable")
        self.size = np.bincount(self.group, minlength=count)
        self.begin = np.cumsum(self.size) - self.size
        self.rank = np.empty(len(label), np.int64)
        self.rank[self.order] = np.arange(len(label)) - np.repeat(self.begin, self.size)

    def of(self, group: int) -> Ints:
        """Return the things in a group."""
        return self.order[self.begin[group] : self.begin[group] + self.size[group]]

    def members(self) -> Iterator[Ints]:
        """Yield the things of each group."""
        return (self.of(group) for group in range(len(self.size)))


def _connected(count: int, a: Ints, b: Ints) -> Ints:
    """Return the smallest member of the component of each of some nodes."""
    label = np.arange(count)
    while True:
        la, lb = label[a], label[b]
        apart = la != lb
        if not apart.any():
            return label
        a, b, la, lb = a[apart], b[apart], la[apart], lb[apart]
        low = np.minimum(la, lb)
        np.minimum.at(label, la, low)
        np.minimum.at(label, lb, low)
        while True:
            jumped = label[label]
            if (jumped == label).all():
                break
            label = jumped


def _kinds(columns: _Grouped, rows: _Grouped, block: Ints, terms: _Terms) -> Ints:
    """Return a number for each component: equal where everything about two of them is."""
    signs = []
    for seed in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F):
        hashes = np.zeros(len(columns.size), np.uint64)
        np.add.at(hashes, columns.group, _mixed(seed, columns.rank, block))
        parts = (terms.demand, terms.slot, rows.rank[terms.row], columns.rank[terms.place])
        np.add.at(hashes, columns.group[terms.place], _mixed(seed + 1, *parts))
        signs.append(hashes)
    return _mixed(7, *signs, columns.size).view(np.int64)


def _mixed(seed: int, *parts: NDArray[Any]) -> NDArray[np.uint64]:
    """Return a hash of each tuple of numbers."""
    h = np.full(len(parts[0]), seed & (2**64 - 1), np.uint64)
    for part in parts:
        h = (h ^ part.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        h ^= h >> np.uint64(29)
        h *= np.uint64(0x94D049BB133111EB)
        h ^= h >> np.uint64(32)
    return h


def _solved(
    demands: Sequence[Demand], terms: _Terms, own: Ints, places: Ints, weights: NDArray[np.bool_]
) -> dict[int, list[tuple[int, Fraction]]]:
    """Solve one component: weights first, then what follows from them.

    One with very many terms is left out: its unknowns stay, so nothing is claimed of them.

    Args:
        demands: all demands.
        terms: all terms.
        own: those of this component.
        places: its unknowns.
        weights: which of them are exponents of weights.
    """
    count = len(places)
    if len(own) > LARGEST_COMPONENT:
        return {}
    column = {int(p): i for i, p in enumerate(places)}
    rows: defaultdict[int, Form] = defaultdict(dict)
    for term in own:
        i = column[int(terms.place[term])]
        # Unknowns that no weight has are the first to be expressed by others.
        at = i if weights[i] else count + i
        form = rows[int(terms.row[term])]
        coefficient = demands[terms.demand[term]].coefficients[terms.slot[term]]
        form[at] = form.get(at, Fraction(0)) + coefficient
    system = Constraints(0)
    for _, form in sorted(rows.items()):
        system.require_zero({k: c for k, c in form.items() if c})
    pivots = {pivot % count: rest for pivot, rest in system.rows()}
    followed: dict[int, list[tuple[int, Fraction]]] = {
        i: [] for i in range(count) if i not in pivots
    }
    for pivot, rest in pivots.items():
        for k, c in rest.items():
            followed[k % count].append((pivot, c))
    return followed
