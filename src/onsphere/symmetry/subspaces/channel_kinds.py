"""Sort the channels of all families: which hang together, and which of these groups look alike.

Several families may scale the same row of a weight: what writes it against its gain, and its gain
against what reads it. Channels of different families that scale a common slice hang together; such
groups are few in kind, whatever the width of the network. Within a kind any combination of its
families is a symmetry, one number per group.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.channels.components import (
    Grouped,
    connected,
    numbered,
    signatures,
)
from onsphere.symmetry.channels.terms import Ints, Terms
from onsphere.symmetry.claims import Family
from onsphere.symmetry.exact.units.linear_forms import Form

Place = tuple[str, tuple[int, ...]]
"""A weight and the axes along which it is cut."""


@dataclass(frozen=True, eq=False)
class Block:
    """Slices of one weight that move alike, those of each group of channels.

    Args:
        name: the weight.
        axes: the axes along which they are cut.
        index: places along these axes, flattened: a row for each group.
    """

    name: str
    axes: tuple[int, ...]
    index: Ints


@dataclass(frozen=True, eq=False)
class ChannelKind:
    """Groups of channels that look alike.

    Args:
        count: how many groups there are.
        blocks: the slices that they move.
        symmetries: independent ones of each group: number of a block -> how it scales.
    """

    count: int
    blocks: tuple[Block, ...]
    symmetries: tuple[Form, ...]


def channel_kinds(families: Sequence[Family]) -> list[ChannelKind]:
    """Sort the channels of families.

    Example:
        >>> import torch
        >>> from onsphere.symmetry.claims import Slices
        >>> rows = torch.arange(3)[:, None]
        >>> first = Slices("a", Fraction(1), (0,), rows), Slices("gain", Fraction(-1), (0,), rows)
        >>> second = Slices("gain", Fraction(1), (0,), rows), Slices("b", Fraction(-1), (1,), rows)
        >>> [kind] = channel_kinds([Family(first, 3), Family(second, 3)])
        >>> kind.count, [b.name for b in kind.blocks], len(kind.symmetries)
        (3, ['a', 'gain', 'b'], 2)
    """
    return [kind for some in _sharing(families) for kind in _kinds_of(some)]


def _sharing(families: Sequence[Family]) -> Iterator[list[Family]]:
    """Yield families that scale the same axes of the same weights, together."""
    places: dict[Place, int] = {}
    edges = [
        (i, places.setdefault((s.name, s.axes), len(places)))
        for i, f in enumerate(families) for s in f.slices
    ]  # fmt: skip
    if not edges:
        return
    ends = np.array(edges, np.int32).T
    nodes = len(families) + len(places)
    groups = connected(nodes, [(ends[0], (ends[1] + len(families)).astype(np.int32))])
    for members in Grouped(*groups).members():
        some = [families[i] for i in members if i < len(families)]
        if some:
            yield some


def _kinds_of(families: Sequence[Family]) -> Iterator[ChannelKind]:
    if len(families) == 1:
        yield _alone(families[0])
        return
    places: dict[Place, int] = {}
    sizes: dict[Place, int] = {}
    slices = [(f, s) for f, family in enumerate(families) for s in family.slices]
    for _, s in slices:
        places.setdefault((s.name, s.axes), len(places))
        most = int(s.index.max()) + 1
        sizes[s.name, s.axes] = max(sizes.get((s.name, s.axes), 0), most)
    starts = dict(zip(places, np.cumsum([0, *sizes.values()])[:-1].tolist(), strict=True))
    first = np.cumsum([0, *(f.count for f in families)])
    # An edge for each place of each slice: its channel, its entry, and which slice that was.
    channel, entry, which = [], [], []
    for number, (f, s) in enumerate(slices):
        index = s.index.numpy()
        own = first[f] + np.arange(len(index))
        channel.append(np.repeat(own, index.shape[1]))
        entry.append(index.reshape(-1) + starts[s.name, s.axes])
        which.append(np.full(index.size, number))
    edges = _Edges(*(np.concatenate(x).astype(np.int32) for x in (channel, entry, which)))
    family = np.repeat(np.arange(len(families), dtype=np.int32), [f.count for f in families])
    exponents = [s.exponent for _, s in slices]
    where = list(starts.items())
    for rows, one, columns in _alike(edges, family):
        blocks: defaultdict[tuple[int, tuple[tuple[int, Fraction], ...]], list[int]]
        blocks = defaultdict(list)
        for i, form in enumerate(_forms(one, rows.shape[1], exponents)):
            place = int(np.searchsorted([start for _, start in where], rows[0, i], "right")) - 1
            blocks[place, tuple(sorted(form.items()))].append(i)
        found: list[Block] = []
        symmetries = [Form() for _ in range(columns)]
        for (place, scales), members in blocks.items():
            (name, axes), start = where[place]
            for column, exponent in scales:
                symmetries[column][len(found)] = exponent
            found.append(Block(name, axes, rows[:, members].astype(np.int64) - start))
        yield ChannelKind(len(rows), tuple(found), tuple(symmetries))


def _alone(family: Family) -> ChannelKind:
    """Return the kind of a family that shares nothing with others."""
    together: defaultdict[tuple[str, tuple[int, ...], Fraction], list[Ints]] = defaultdict(list)
    for s in family.slices:
        together[s.name, s.axes, s.exponent].append(s.index.numpy())
    blocks = tuple(
        Block(name, axes, np.concatenate(index, 1)) for (name, axes, _), index in together.items()
    )
    symmetry = {i: exponent for i, (_, _, exponent) in enumerate(together)}
    return ChannelKind(family.count, blocks, (symmetry,))


@dataclass(frozen=True, eq=False)
class _Edges:
    """Between channels and the entries that they scale.

    Args:
        channel: its number among those of all families.
        entry: its number among those of all weights and axes.
        slices: which slices say so.
    """

    channel: NDArray[np.int32]
    entry: NDArray[np.int32]
    slices: NDArray[np.int32]


def _alike(
    edges: _Edges, family: NDArray[np.int32]
) -> Iterator[tuple[NDArray[np.int32], list[tuple[int, int, int]], int]]:
    """Yield groups of channels that look alike.

    Yields:
        The entries of each group, a row each; the edges of one of them, as place of the entry,
        place of the channel, and slices; how many channels it has.
    """
    entries, inverse = np.unique(edges.entry, return_inverse=True)
    number: NDArray[np.int32] = inverse.reshape(-1).astype(np.int32)
    count = len(family)
    ends = edges.channel, number + np.int32(count)
    group, found = connected(count + len(entries), [ends])
    channels, rows = Grouped(group[:count], found), Grouped(group[count:], found)
    rank_of_row, rank_of_channel = rows.ranks(), channels.ranks()
    slot = np.zeros(len(number), np.uint8)
    terms = Terms(edges.slices, number, slot, edges.channel, len(entries))
    for members in Grouped(*numbered(signatures(channels, rank_of_row, family, terms))).members():
        one = members[0]
        mine = np.flatnonzero(channels.group[edges.channel] == one)
        wide = rows.order[rows.begin[members][:, None] + np.arange(rows.size[one])]
        joined = zip(
            rank_of_row[number[mine]].tolist(),
            rank_of_channel[edges.channel[mine]].tolist(),
            edges.slices[mine].tolist(),
            strict=True,
        )
        yield entries[wide], list(joined), int(channels.size[one])


def _forms(
    edges: Sequence[tuple[int, int, int]], count: int, exponents: Sequence[Fraction]
) -> list[Form]:
    """Return of each entry of a group how the channels of the group scale it."""
    forms = [Form() for _ in range(count)]
    for entry, channel, slices in edges:
        form = forms[entry]
        form[channel] = form.get(channel, Fraction(0)) + exponents[slices]
    return forms
