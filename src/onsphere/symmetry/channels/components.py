"""Solve demands on rows, columns and channels: one small system for each kind of component.

Channels hang together only through a few demands each: channel 5 of a gain with row 5 of the map
before it and column 5 of the map after it. Unknowns that do hang together form a component; those
of channel 5 and of channel 6 look alike. So components are sorted into kinds, and one of each kind
is solved with fractions, whatever the width of the network.

Unknowns that belong to no channel (units of whole weights, common exponents of whole axes) join
everything. They are kept apart: a component is solved with them as givens, and what it leaves to
demand of them goes into one system for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.channel_demands import Block, ChannelDemands, Demand
from onsphere.symmetry.exact.fields import NOTHING
from onsphere.symmetry.exact.linear_forms import Constraints, Form

Ints = NDArray[np.int64]
LARGEST_COMPONENT = 4000
"""Up to how many terms a component is solved: exact elimination grows faster than they do."""


@dataclass(frozen=True, eq=False)
class Kind:
    """Components that look alike, and the solution of one.

    Args:
        members: numbers of the unknowns: a row per component, alike in their order.
        solution: column that is not free -> its value in terms of free columns, which count from
            0, and of unknowns of no channel, as ``-1 - number``.
        free: the free columns.
    """

    members: Ints
    solution: dict[int, Form]
    free: tuple[int, ...]


def kinds_of(channels: ChannelDemands) -> list[Kind]:
    """Solve all components; what they demand of common unknowns joins ``channels.scalars``."""
    blocks = channels.blocks
    if not blocks:
        return []
    starts = np.array([b.start for b in blocks], np.int64)
    ends = np.array([b.start + b.size for b in blocks], np.int64)
    entries = _entries(channels, starts, ends)
    ids = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
    first = _first(entries, ids)
    label = _connected(len(ids), first.of_entry, first.local)
    return _solved(channels, blocks, ids, label, entries, first)


@dataclass(frozen=True, eq=False)
class _Entries:
    """All terms of all demands, one entry each."""

    demand: Ints
    row: Ints  # of all rows of all demands
    slot: Ints
    column: Ints  # number of an unknown
    varies: NDArray[np.bool_]  # whether that belongs to a channel


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Entries that belong to channels: by place among all such unknowns."""

    local: Ints  # place of the unknown among those of channels
    of_entry: Ints  # place of the first one of the same row
    chosen: NDArray[np.bool_]  # which entries these are
    of_row: Ints  # row -> place of its first unknown, or -1


def _entries(channels: ChannelDemands, starts: Ints, ends: Ints) -> _Entries:
    demand, row, slot, column = [], [], [], []
    at = 0
    for d, some in enumerate(channels.demands):
        terms, count = some.index.shape
        rows = np.arange(at, at + count)
        at += count
        for t in range(terms):
            demand.append(np.full(count, d))
            row.append(rows)
            slot.append(np.full(count, t))
            column.append(some.index[t].astype(np.int64))
    if not column:
        none = np.zeros(0, np.int64)
        return _Entries(none, none, none, none, none.astype(bool))
    columns = np.concatenate(column)
    kept = columns != NOTHING
    columns = columns[kept]
    block = np.searchsorted(starts, columns, "right") - 1
    varies = (block >= 0) & (columns < ends[np.maximum(block, 0)])
    return _Entries(
        np.concatenate(demand)[kept],
        np.concatenate(row)[kept],
        np.concatenate(slot)[kept],
        columns,
        varies,
    )


def _first(entries: _Entries, ids: Ints) -> _Ranked:
    chosen = entries.varies
    local = np.searchsorted(ids, entries.column[chosen])
    rows = int(entries.row.max()) + 1 if entries.row.size else 0
    of_row = np.full(rows, np.iinfo(np.int64).max)
    np.minimum.at(of_row, entries.row[chosen], local)
    of_entry = of_row[entries.row[chosen]] if rows else local
    of_row[of_row == np.iinfo(np.int64).max] = -1
    return _Ranked(local, of_entry, chosen, of_row)


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


def _solved(
    channels: ChannelDemands,
    blocks: Sequence[Block],
    ids: Ints,
    label: Ints,
    entries: _Entries,
    first: _Ranked,
) -> list[Kind]:
    # Columns by component, and their rank in it.
    order = np.lexsort((ids, label))
    sorted_label = label[order]
    names, begin, size = np.unique(sorted_label, return_index=True, return_counts=True)
    component = np.searchsorted(names, label)  # of each column
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(len(ids)) - np.repeat(begin, size)
    sizes = np.array([b.size for b in blocks])
    block = np.repeat(np.arange(len(blocks)), sizes)
    # Rows by component, and their rank in it.
    bound = first.of_row >= 0
    row_component = np.full(len(first.of_row), -1)
    row_component[bound] = component[first.of_row[bound]]
    row_order = np.lexsort((np.arange(len(bound)), row_component))
    by_row = row_component[row_order]
    _, row_begin, row_size = np.unique(by_row, return_index=True, return_counts=True)
    row_rank = np.empty(len(bound), np.int64)
    row_rank[row_order] = np.arange(len(bound)) - np.repeat(row_begin, row_size)
    _common_rows(channels, entries, bound)
    kind = _kinds(len(names), component, rank, block, row_component, row_rank, entries, first, size)
    # Rows of each component, as slices of the entries in the order of rows.
    entry_component = np.where(
        row_component[entries.row] >= 0, row_component[entries.row], len(names)
    )
    entry_order = np.lexsort((entries.slot, entries.row, entry_component))
    edges = np.searchsorted(entry_component[entry_order], np.arange(len(names) + 1))
    weight_of = np.array([b.weight is not None for b in blocks])
    found = []
    kinds, chosen = np.unique(kind, return_index=True)
    by_kind = np.argsort(kind, kind="stable")
    kind_edges = np.searchsorted(kind[by_kind], np.append(kinds, kinds[-1] + 1))
    for k, one in enumerate(chosen):
        members = by_kind[kind_edges[k] : kind_edges[k + 1]]
        columns = order[begin[one] + np.arange(size[one])]
        own = entry_order[edges[one] : edges[one + 1]]
        solution, free = _one(channels, ids, columns, weight_of[block[columns]], entries, own)
        everyone = ids[order[begin[members][:, None] + np.arange(size[one])]]
        found.append(Kind(everyone, solution, free))
    return found


def _kinds(
    count: int,
    component: Ints,
    rank: Ints,
    block: Ints,
    row_component: Ints,
    row_rank: Ints,
    entries: _Entries,
    first: _Ranked,
    size: Ints,
) -> Ints:
    """Return a number for each component: equal where everything about two of them is."""
    place = np.zeros(len(entries.column), np.int64)
    place[first.chosen] = rank[first.local]
    place[~first.chosen] = -1 - entries.column[~first.chosen]
    of = row_component[entries.row] if len(entries.row) else entries.row
    inside = of >= 0
    signs = []
    for seed in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F):
        hashes = np.zeros(count, np.uint64)
        np.add.at(hashes, component, _mixed(seed, rank, block))
        parts = (entries.demand, entries.slot, row_rank[entries.row], place)
        np.add.at(hashes, of[inside], _mixed(seed + 1, *parts)[inside])
        signs.append(hashes)
    key = _mixed(7, *signs, size)
    _, kind = np.unique(key, return_inverse=True)
    return kind.reshape(-1)


def _mixed(seed: int, *parts: NDArray[Any]) -> NDArray[np.uint64]:
    """Return a hash of each tuple of numbers."""
    h = np.full(len(parts[0]), seed & (2**64 - 1), np.uint64)
    for part in parts:
        h = (h ^ part.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        h ^= h >> np.uint64(29)
        h *= np.uint64(0x94D049BB133111EB)
        h ^= h >> np.uint64(32)
    return h


def _common_rows(channels: ChannelDemands, entries: _Entries, bound: NDArray[np.bool_]) -> None:
    """Demand what rows without any channel say about common unknowns."""
    if not len(entries.row):
        return
    rows: dict[int, Form] = {}
    loose = ~bound[entries.row] if len(entries.row) else np.zeros(0, bool)
    for d, row, slot, column in zip(
        entries.demand[loose], entries.row[loose], entries.slot[loose], entries.column[loose],
        strict=True,
    ):  # fmt: skip
        demand = channels.demands[d]
        form = rows.setdefault(int(row), dict(demand.scalars))
        k = int(column)
        form[k] = form.get(k, Fraction(0)) + demand.coefficients[slot]
    for form in rows.values():
        channels.scalars.require_zero({k: c for k, c in form.items() if c})
    at = 0
    filled = np.zeros(sum(d.index.shape[1] for d in channels.demands), bool)
    filled[entries.row] = True
    for demand in channels.demands:
        count = demand.index.shape[1]
        if not filled[at : at + count].all():
            _only_scalars(channels.scalars, demand)
        at += count


def _only_scalars(system: Constraints, demand: Demand) -> None:
    system.require_zero(demand.scalars)


def _one(
    channels: ChannelDemands,
    ids: Ints,
    columns: Ints,
    weights: NDArray[np.bool_],
    entries: _Entries,
    own: Ints,
) -> tuple[dict[int, Form], tuple[int, ...]]:
    """Solve one component: common unknowns as givens, then weights, then what follows from both.

    One with very many terms is left out: its unknowns stay, so nothing is claimed of them.
    """
    if len(own) > LARGEST_COMPONENT:
        return {i: {} for i in range(len(columns))}, ()
    place = {int(ids[c]): i for i, c in enumerate(columns)}
    shift = len(columns)
    local: dict[int, int] = {}  # common unknowns, numbered below all others
    rows: dict[int, Form] = {}
    for e in own:
        demand = channels.demands[entries.demand[e]]
        row = int(entries.row[e])
        if row not in rows:
            rows[row] = {}
            for k, c in demand.scalars.items():
                _add(rows[row], local.setdefault(k, len(local)), c)
        k = int(entries.column[e])
        if entries.varies[e]:
            i = place[k]
            # Unknowns that no weight has are the first to be expressed by others.
            at = 10**9 + i + (0 if weights[i] else shift)
        else:
            at = local.setdefault(k, len(local))
        _add(rows[row], at, demand.coefficients[entries.slot[e]])
    system = Constraints(0)
    for form in rows.values():
        system.require_zero({k: c for k, c in form.items() if c})
    common = {v: -1 - k for k, v in local.items()}

    def outside(k: int) -> int:
        return common[k] if k < 10**9 else (k - 10**9) % shift

    solution: dict[int, Form] = {}
    for pivot, rest in system.rows():
        form = {outside(k): c for k, c in rest.items()}
        if pivot < 10**9:
            channels.scalars.require_zero(
                {-1 - k: c for k, c in form.items()} | {-1 - common[pivot]: Fraction(-1)}
            )
        else:
            solution[outside(pivot)] = form
    free = tuple(i for i in range(shift) if i not in solution)
    return solution, free


def _add(form: Form, k: int, c: Fraction) -> None:
    form[k] = form.get(k, Fraction(0)) + c
