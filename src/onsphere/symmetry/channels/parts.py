"""Take components apart again where their solution does not hang together.

The heads of a network meet in its residual stream, so all their channels are one component. Solved,
most of them turn out to trade in pairs, thousands of which look alike. Each pair is a component of
its own then, and those that look alike are one kind.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from onsphere.symmetry.channels.components import Grouped, Kind, connected
from onsphere.symmetry.channels.elimination import Followers
from onsphere.symmetry.channels.terms import Ints
from onsphere.symmetry.exact.units.repeats import alike


def parted(
    kind: Kind, labels: Sequence[Hashable], together: Iterable[Sequence[int]] = ()
) -> list[Kind]:
    """Return the parts of components whose free columns share no follower, those alike together.

    Args:
        kind: the components.
        labels: of each column what tells it apart, beside how it moves.
        together: columns that stay in one part.
    """
    count = kind.members.shape[1]
    edges = [(f, j) for f, followers in kind.followed.items() for j, _ in followers]
    edges += [(some[0], j) for some in together for j in some[1:]]
    ends = np.array(edges, np.int32).reshape(-1, 2)
    groups = Grouped(*connected(count, [(ends[:, 0], ends[:, 1])]))
    if len(groups.size) == 1:
        return [kind]
    place, group = groups.ranks().tolist(), groups.group.tolist()
    kinds = _alike(groups, _looks(kind, labels, place))
    firsts = {group[some[0, 0]] for some in kinds}
    followed: defaultdict[int, dict[int, Followers]] = defaultdict(dict)
    for f, followers in kind.followed.items():
        if group[f] in firsts:
            followed[group[f]][place[f]] = [(place[j], c) for j, c in followers]
    common: defaultdict[int, dict[int, Followers]] = defaultdict(dict)
    for unknown, followers in kind.common.items():
        for j, c in followers:
            if group[j] in firsts:
                common[group[j]].setdefault(unknown, []).append((place[j], c))
    found = []
    for some in kinds:
        g = group[some[0, 0]]
        members = kind.members[:, some].swapaxes(0, 1)
        found.append(Kind(members.reshape(-1, members.shape[-1]), followed[g], common[g]))
    return found


def _alike(groups: Grouped, looks: Ints) -> list[Ints]:
    """Return the columns of groups that look alike together, a row per group."""
    found = []
    for size in np.unique(groups.size):
        begin = groups.begin[groups.size == size]
        columns = groups.order[begin[:, None] + np.arange(size)]
        _, kind = alike(looks[columns])
        order = np.argsort(kind, kind="stable")
        found += np.split(columns[order], np.cumsum(np.bincount(kind))[:-1])
    return sorted(found, key=lambda some: groups.group[some[0, 0]])


def _looks(kind: Kind, labels: Sequence[Hashable], rank: Sequence[int]) -> Ints:
    """Number what there is to tell of each column: its label, and how it moves."""
    numbers: dict[Hashable, int] = {}
    told = zip(labels, _moves(kind, rank), strict=True)
    return np.array([numbers.setdefault((x, *m), len(numbers)) for x, m in told], np.int64)


def _moves(kind: Kind, rank: Sequence[int]) -> list[list[Hashable]]:
    """Return of each column how it moves: whether it is free, and what it follows how far."""
    found: list[list[Hashable]] = [[] for _ in rank]
    for f, followers in kind.followed.items():
        found[f].append("free")
        for j, c in followers:
            found[j].append((rank[f], c))
    for unknown, followers in kind.common.items():
        for j, c in followers:
            found[j].append((-1 - unknown, c))
    return found
