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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.channels.elimination import Followers, Solution, Solver
from onsphere.symmetry.channels.terms import Ints, Short, Terms, terms_of
from onsphere.symmetry.exact.units.channel_demands import ChannelDemands
from onsphere.symmetry.exact.units.linear_forms import Plain

_CHUNK = 2**15
"""How many things are hashed at a time: few enough for the processor's cache."""


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


@dataclass(frozen=True, eq=False)
class Solved:
    """What demands leave free.

    Args:
        kinds: the components, those that look alike together, with all other unknowns at 0.
        beside: the same with what stands beside their channels; apart where that differs.
        conditions: sums of unknowns of no channel that must vanish for all components to be solved.
        left_out: the unknowns of components that take too long to be solved: none is free.
    """

    kinds: list[Kind]
    beside: list[Kind]
    conditions: list[Plain]
    left_out: list[Ints]


def solved(channels: ChannelDemands) -> Solved:
    """Solve all components."""
    if not channels.blocks:
        return Solved([], [], [], [])
    blocks = channels.blocks
    ids = np.concatenate([np.arange(b.start, b.start + b.size, dtype=np.int32) for b in blocks])
    terms, others = terms_of(channels.demands, ids)
    first = np.full(terms.rows, len(ids), np.int32)
    np.minimum.at(first, terms.row, terms.place)
    edges = ((first[terms.row[some]], terms.place[some]) for some in _chunks(len(terms.row)))
    columns = Grouped(*connected(len(ids), edges))
    group = columns.group[first]
    del first, edges
    company, rank = group[others.row], Grouped(group, count=len(columns.size)).ranks()
    del group
    block = np.repeat(np.arange(len(blocks), dtype=np.int32), [b.size for b in blocks])
    kind = signatures(columns, rank, block, terms)
    different = np.zeros(len(columns.size), np.uint64)
    mixed = _mixed(4, others.demand, others.slot, rank[others.row], others.number)
    np.add.at(different, company, mixed)
    is_weight = np.array([b.weight is not None for b in blocks])[block]
    del rank, block
    alike = sorted(Grouped(*numbered(kind)).members(), key=lambda members: int(members[0]))
    apart = [_apart(members, different) for members in alike]
    chosen = np.zeros(len(columns.size), bool)
    for members, groups in zip(alike, apart, strict=True):
        chosen[members[[some[0] for some in groups]]] = True
    chosen[[members[0] for members in alike]] = True
    own = _by_component(columns.group[terms.place], chosen)
    beside = _by_component(company, chosen)
    solver = Solver(channels.demands, terms, others)
    solution = Solved([], [], others.unbound, [])
    for members, groups in zip(alike, apart, strict=True):
        places = columns.of(members[0])
        at = columns.order[columns.begin[members][:, None] + np.arange(len(places))]
        everyone = ids[at].astype(np.int64)
        followed: dict[int, Followers] = {}
        for some in groups:
            component = int(members[some[0]])
            there = columns.of(component)
            one = solver.solved(own[component], there, is_weight[there], beside[component])
            if one is None:
                solution.left_out.append(everyone)
                one = Solution({}, {}, solver.sums(own[component], beside[component]))
            followed = one.followed
            mine = everyone if len(groups) == 1 else everyone[some]
            solution.beside.append(Kind(mine, followed, one.common))
            solution.conditions.extend(one.conditions)
        solution.kinds.append(Kind(everyone, followed, {}))
    return solution


def _apart(members: Short, different: NDArray[np.uint64]) -> list[Ints]:
    """Sort components that look alike by what stands beside them; return their places."""
    _, group = np.unique(different[members], return_inverse=True)
    order = np.argsort(group, kind="stable")
    return np.split(order, np.cumsum(np.bincount(group))[:-1])


def _by_component(component: Short, chosen: NDArray[np.bool_]) -> defaultdict[int, Ints]:
    """Return the terms of each of some components."""
    those = np.flatnonzero(chosen[component])
    those = those[np.argsort(component[those], kind="stable")]
    found: defaultdict[int, Ints] = defaultdict(lambda: those[:0])
    groups, begin = np.unique(component[those], return_index=True)
    if len(those):
        found.update(zip(groups.tolist(), np.split(those, begin[1:]), strict=True))
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
        self.size = np.bincount(group, minlength=count).astype(np.int32)
        self.begin = np.cumsum(self.size, dtype=np.int32) - self.size

    def ranks(self) -> Short:
        """Return the place of each thing in its group."""
        rank = np.empty(len(self.group), np.int32)
        begin = np.repeat(self.begin, self.size)
        for some in _chunks(len(rank)):
            places = np.arange(some.start, some.start + len(begin[some]), dtype=np.int32)
            rank[self.order[some]] = places - begin[some]
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


def connected(count: int, edges: Iterable[tuple[Short, Short]]) -> tuple[Short, int]:
    """Return the number of the component of each of some nodes, and how many there are.

    Args:
        count: of the nodes.
        edges: both ends of some edges at a time.
    """
    label = np.arange(count, dtype=np.int32)  # of the smallest node found in the same component
    while edges := [left for a, b in edges if len((left := _hooked(label, a, b))[0])]:
        while True:
            jumped = label[label]
            if (jumped == label).all():
                break
            label = jumped
    number = np.cumsum(label == np.arange(count, dtype=np.int32), dtype=np.int32) - np.int32(1)
    return number[label], int(number[-1]) + 1


def _hooked(label: Short, a: Short, b: Short) -> tuple[Short, Short]:
    """Lower the labels of edges that join two of them, in place; return these edges."""
    ours, theirs = label[a], label[b]
    apart = ours != theirs
    ours, theirs = ours[apart], theirs[apart]
    low = np.minimum(ours, theirs)
    np.minimum.at(label, ours, low)
    np.minimum.at(label, theirs, low)
    return a[apart], b[apart]


def signatures(columns: Grouped, rank: Short, block: Short, terms: Terms) -> Ints:
    """Return a number for each component: equal where everything about two of them is.

    Args:
        columns: the unknowns by component.
        rank: of each row its place in its component.
        block: of each unknown the block that it is of.
        terms: of all rows.
    """
    hashes, own = np.zeros(len(columns.size), np.uint64), columns.ranks()
    for some in _chunks(len(block)):
        np.add.at(hashes, columns.group[some], _mixed(1, own[some], block[some]))
    for some in _chunks(len(terms.row)):
        row, place = rank[terms.row[some]], terms.place[some]
        mixed = _mixed(2, terms.demand[some], terms.slot[some], row, own[place])
        np.add.at(hashes, columns.group[place], mixed)
    for some in _chunks(len(hashes)):
        hashes[some] = _mixed(3, hashes[some], columns.size[some])
    return hashes.view(np.int64)


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
