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
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.channel_demands import Block, ChannelDemands, Demand
from onsphere.symmetry.exact.linear_forms import Constraints, Form

Ints = NDArray[np.int64]
Short = NDArray[np.int32]
"""Numbers of which a decoder of 70 billion weights has tens of millions."""
_CHUNK = 2**20
"""How many things are hashed at a time."""
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
    ids = np.concatenate([np.arange(b.start, b.start + b.size, dtype=np.int32) for b in blocks])
    terms = _terms(channels.demands, blocks, ids)
    first = np.full(terms.rows, len(ids), np.int32)
    np.minimum.at(first, terms.row, terms.place)
    columns = Grouped(*connected(len(ids), first[terms.row], terms.place))
    rows = Grouped(columns.group[first], count=len(columns.size))
    del first
    block = np.repeat(np.arange(len(blocks), dtype=np.int32), [b.size for b in blocks])
    kind = signatures(columns, rows, block, terms)
    del rows
    is_weight = np.array([b.weight is not None for b in blocks])[block]
    alike = sorted(Grouped(*numbered(kind)).members(), key=lambda members: int(members[0]))
    chosen = np.zeros(len(columns.size), bool)
    chosen[[members[0] for members in alike]] = True
    those = np.flatnonzero(chosen[columns.group[terms.place]])
    own: defaultdict[int, list[int]] = defaultdict(list)
    belongs = columns.group[terms.place[those]]
    for term, component in zip(those.tolist(), belongs.tolist(), strict=True):
        own[component].append(term)
    found = []
    for members in alike:
        places = columns.of(members[0])
        followed = _solved(channels.demands, terms, own[members[0]], places, is_weight[places])
        everyone = ids[columns.order[columns.begin[members][:, None] + np.arange(len(places))]]
        found.append(Kind(everyone.astype(np.int64), followed))
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


def _terms(demands: Sequence[Demand], blocks: Sequence[Block], ids: Ints) -> Terms:
    starts = np.array([b.start for b in blocks])
    ends = np.array([b.start + b.size for b in blocks])
    # Where the unknowns of each block stand among those of all blocks.
    offsets = starts - np.searchsorted(ids, starts)
    most = sum(some.index.size for some in demands)
    demand, row, place = (np.empty(most, np.int32) for _ in range(3))
    slot = np.empty(most, np.uint8)
    rows = end = 0
    for d, some in enumerate(demands):
        block = np.searchsorted(starts, some.index, "right") - 1  # -1: before the first, NOTHING
        kept = (block >= 0) & (some.index < ends[np.maximum(block, 0)])
        bound = kept.any(0)
        which, column = kept.nonzero()
        here = slice(end, end + len(which))
        demand[here] = d
        row[here] = (np.cumsum(bound) + (rows - 1))[column]
        slot[here] = which
        place[here] = some.index[which, column] - offsets[block[which, column]]
        rows += int(bound.sum())
        end += len(which)
    return Terms(demand[:end], row[:end], slot[:end], place[:end], rows)


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
        a, b, la, lb = a[apart], b[apart], la[apart], lb[apart]
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


def _solved(
    demands: Sequence[Demand],
    terms: Terms,
    own: Sequence[int],
    places: Short,
    weights: NDArray[np.bool_],
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
    those = [a[own].tolist() for a in (terms.place, terms.row, terms.demand, terms.slot)]
    is_weight = weights.tolist()
    for place, row, demand, slot in zip(*those, strict=True):
        i = column[place]
        # Unknowns that no weight has are the first to be expressed by others.
        at = i if is_weight[i] else count + i
        form = rows[row]
        coefficient = demands[demand].coefficients[slot]
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
