r"""Choose rows, columns and whole weights whose norms can all be held without losing a function.

A symmetry that scales each row of a weight meets any norms of these rows. So does one that scales
the columns of another weight; but if it scales the rows of the first as well, unevenly, their norms
move in a way that no exponent tells. Both together are safe in one order: columns first, then the
rows, if those of the rows leave the columns alone. So here a set of weights is *held* when there is
an order of it in which every weight has symmetries of its own, one per vector, that scale each of
its vectors evenly and leave all weights before it alone. Then any norms are met, weight by weight,
by a function that did not change; and as many symmetries are gone as there are vectors.

Within groups of channels that hang together (:mod:`.channel_kinds`) this is linear algebra on a few
numbers; between them it is a graph without cycles. Weights are taken in the order of preference; a
kind of channels for which nothing is left gets the first choice in another try, and the best try
counts. It is not proved to be the largest set; how many symmetries stay is counted.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from graphlib import CycleError, TopologicalSorter

import numpy as np
import torch

from onsphere.geometry import VectorAxes
from onsphere.symmetry.channels.terms import Ints
from onsphere.symmetry.claims import Family, Slices
from onsphere.symmetry.exact.units.linear_forms import Form, sparse_basis, vanishing
from onsphere.symmetry.subspaces.channel_kinds import ChannelKind

_TRIES = 8
"""How often in a row a choice is tried that is no larger than the best one."""


@dataclass(frozen=True)
class Moves:
    """Symmetries that scale the vectors of a weight, each vector by its own.

    Args:
        family: the symmetries of channels; a channel scales its vector with exponent 1.
        owner: the number of the vector that each channel scales.
    """

    family: Family
    owner: torch.Tensor


@dataclass(frozen=True)
class HeldWeight:
    """A weight whose vectors keep their norms, and what moves these.

    Args:
        name: the weight.
        axes: how it divides into vectors.
        moves: what scales each vector, and leaves those of all weights held before it alone.
    """

    name: str
    axes: VectorAxes
    moves: tuple[Moves, ...]


@dataclass(frozen=True, eq=False)
class _Part:
    """What one kind of channels does to a candidate.

    Args:
        kind: its number.
        blocks: numbers of the blocks that lie in the vectors.
        owner: the number of the vector in which those of each group of channels lie.
    """

    kind: int
    blocks: tuple[int, ...]
    owner: Ints


@dataclass(frozen=True, eq=False)
class Candidate:
    """A way to hold a weight.

    Args:
        name: the weight.
        axes: how it would divide into vectors.
        vectors: how many these are.
        parts: what moves them.
    """

    name: str
    axes: VectorAxes
    vectors: int
    parts: tuple[_Part, ...]


def candidates(
    kinds: Sequence[ChannelKind], shapes: Mapping[str, Sequence[int]]
) -> list[Candidate]:
    """Return the weights that are cut so that channels scale every vector of it, each its own.

    At most one per axis, and for groups along one and all of the other (a grouped convolution):
    as finely as can be. Vectors of one entry are none.
    """
    along: defaultdict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = defaultdict(list)
    for k, kind in enumerate(kinds):
        for b, block in enumerate(kind.blocks):
            if any(b in v for v in kind.symmetries):
                along[block.name, block.axes].append((k, b))
    found = (
        _candidate(name, axes, shapes[name], kinds, own)
        for (name, axes), own in along.items()
        if name in shapes and 0 < len(axes) <= 2
    )
    return [c for c in found if c]


def _candidate(
    name: str,
    axes: tuple[int, ...],
    shape: Sequence[int],
    kinds: Sequence[ChannelKind],
    own: Sequence[tuple[int, int]],
) -> Candidate | None:
    sizes = [shape[a] for a in axes]
    by_kind: defaultdict[int, list[int]] = defaultdict(list)
    for k, b in own:
        by_kind[k].append(b)
    places = {
        k: np.concatenate([kinds[k].blocks[b].index for b in blocks], 1)
        for k, blocks in by_kind.items()
    }
    if sum(p.size for p in places.values()) != math.prod(sizes):
        return None
    cuts = _cuts(axes[0], sizes[0]) if len(axes) == 1 else _cuts_of_two(axes, sizes)
    vectors = ((cut, numbers) for cut, numbers in cuts if _keeps(numbers, places.values()))
    division, vector = next(vectors, (None, np.zeros(1, np.int64)))
    if division is None or division.count(shape) in (1, torch.Size(shape).numel()):
        return None
    parts = tuple(_Part(k, tuple(by_kind[k]), vector[p[:, 0]]) for k, p in places.items())
    if any(_own_symmetry(kinds[p.kind], p.blocks, ()) is None for p in parts):
        return None
    return Candidate(name, division, int(vector.max()) + 1, parts)


def _cuts(axis: int, length: int) -> Iterator[tuple[VectorAxes, Ints]]:
    """Yield ways to cut an axis, the finest first, and the number of the vector of each place."""
    place = np.arange(length)
    yield VectorAxes(index=(axis,)), place
    sizes = [n for n in range(1, length + 1) if length % n == 0]
    pairs = [(n, step) for n in sizes for step in sizes if length % (n * step) == 0]
    for count, step in sorted(pairs, key=lambda c: (-c[0] * c[1], c[1])):
        if count * step == length:
            continue
        if step == 1:
            yield VectorAxes(pieces=((axis, count),)), place // (length // count)
        else:
            number = place // (length // count) * step + place % step
            yield VectorAxes(strided=((axis, count, step),)), number


def _cuts_of_two(axes: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[VectorAxes, Ints]]:
    """Yield ways to cut by all of the second axis and by groups along the first, finest first."""
    (first, second), (length, width) = axes, sizes
    place = np.arange(length * width)
    for groups in range(length, 0, -1):
        if length % groups == 0:
            number = place // width // (length // groups) * width + place % width
            if groups == length:
                yield VectorAxes(index=(first, second)), number
            else:
                yield VectorAxes(index=(second,), pieces=((first, groups),)), number


def _keeps(vector: Ints, places: Iterable[Ints]) -> bool:
    """Whether each group of places lies in one vector."""
    return all(bool((vector[p] == vector[p[:, :1]]).all()) for p in places)


def _own_symmetry(kind: ChannelKind, own: Sequence[int], others: Sequence[int]) -> Form | None:
    """Return a symmetry that scales some blocks by 1 and leaves others alone, with fewest blocks.

    Args:
        kind: of channels.
        own: numbers of the blocks to be scaled.
        others: of those to be left alone.
    """
    space = list(kind.symmetries)
    for form in [{b: Fraction(1)} for b in others] + [
        {own[0]: Fraction(1), b: Fraction(-1)} for b in own[1:]
    ]:
        space = vanishing(space, form)
    found = [v for v in sparse_basis(space) if own[0] in v]
    if not found:
        return None
    best = min(found, key=len)
    return {b: c / best[own[0]] for b, c in best.items()}


Held = dict[str, Candidate]


def held_vectors(kinds: Sequence[ChannelKind], wanted: Sequence[Candidate]) -> list[HeldWeight]:
    """Choose weights whose vectors are held, and the order in which their norms are met.

    Args:
        kinds: of channels.
        wanted: candidates in the order of preference; several may be of one weight.

    Returns:
        The weights held, each with symmetries that leave all weights before it alone.
    """
    chooser = _Chooser(kinds)
    return [held for some in _hanging_together(kinds, wanted) for held in chooser.chosen(some)]


def _hanging_together(
    kinds: Sequence[ChannelKind], wanted: Sequence[Candidate]
) -> Iterator[list[Candidate]]:
    """Yield candidates that share kinds of channels, or weights that these move."""
    leader: dict[object, object] = {}

    def find(x: object) -> object:
        while (above := leader.setdefault(x, x)) != x:
            leader[x] = x = leader[above]
        return x

    named = {c.name for c in wanted}
    for c in wanted:
        for part in c.parts:
            leader[find(part.kind)] = find(c.name)
            for block in kinds[part.kind].blocks:
                if block.name in named:
                    leader[find(block.name)] = find(part.kind)
    groups: defaultdict[object, list[Candidate]] = defaultdict(list)
    for c in wanted:
        groups[find(c.name)].append(c)
    yield from groups.values()


class _Chooser:
    """Chooses among candidates that hang together."""

    def __init__(self, kinds: Sequence[ChannelKind]) -> None:
        self.kinds = kinds
        self._own_symmetry: Callable[..., Form | None] = cache(
            lambda k, own, others: _own_symmetry(kinds[k], own, others)
        )

    def chosen(self, wanted: Sequence[Candidate]) -> list[HeldWeight]:
        """Choose, with first choice for kinds of channels that would have none."""
        order = list(wanted)
        best = held = self._greedy(order)
        preferred: Counter[int] = Counter()
        worse = 0
        while worse < _TRIES and (still := self._open(held, order)):
            kind = min(still, key=lambda k: preferred[k])
            preferred[kind] += 1
            first = [c for c in order if any(p.kind == kind for p in c.parts)]
            order = first + [c for c in order if c not in first]
            held = self._greedy(order)
            worse = 0 if _size(held) > _size(best) else worse + 1
            best = max(best, held, key=_size)
        return [self._described(best[name], best) for name in self._order(best) or ()]

    def _greedy(self, wanted: Sequence[Candidate]) -> Held:
        held: Held = {}
        for c in wanted:
            if c.name not in held and self._order({**held, c.name: c}) is not None:
                held[c.name] = c
        return held

    def _open(self, held: Held, wanted: Sequence[Candidate]) -> list[int]:
        """Return kinds of channels of which something stays, the largest first."""
        taken = [p.kind for c in held.values() for p in c.parts]
        known = dict.fromkeys(p.kind for c in wanted for p in c.parts)
        still = [k for k in known if taken.count(k) < len(self.kinds[k].symmetries)]
        return sorted(still, key=lambda k: -self.kinds[k].count)

    def _order(self, held: Held) -> list[str] | None:
        """Return an order in which the norms can be met one after the other, if there is one."""
        before: dict[str, set[str]] = {name: set() for name in held}
        for c in held.values():
            for part in c.parts:
                symmetry = self._symmetry(c, part, held)
                if symmetry is None:
                    return None
                for name in self._disturbed(part, symmetry, held):
                    before[name].add(c.name)
        try:
            return list(TopologicalSorter(before).static_order())
        except CycleError:
            return None

    def _symmetry(self, c: Candidate, part: _Part, held: Held) -> Form | None:
        others = tuple(
            b for o in held.values() if o is not c for p in o.parts if p.kind == part.kind
            for b in p.blocks
        )  # fmt: skip
        found: Form | None = self._own_symmetry(part.kind, part.blocks, others)
        return found

    def _disturbed(self, part: _Part, symmetry: Form, held: Held) -> Iterator[str]:
        """Yield the held weights whose vectors a symmetry scales unevenly."""
        for b in symmetry:
            name = self.kinds[part.kind].blocks[b].name
            if name in held and not any(
                p.kind == part.kind and b in p.blocks for p in held[name].parts
            ):
                yield name

    def _described(self, c: Candidate, held: Held) -> HeldWeight:
        moves = []
        for part in c.parts:
            kind = self.kinds[part.kind]
            symmetry = self._symmetry(c, part, held) or {}
            slices = tuple(_slices(kind, b, e) for b, e in symmetry.items())
            moves.append(Moves(Family(slices, kind.count), torch.from_numpy(part.owner)))
        return HeldWeight(c.name, c.axes, tuple(moves))


def _slices(kind: ChannelKind, block: int, exponent: Fraction) -> Slices:
    own = kind.blocks[block]
    return Slices(own.name, exponent, own.axes, torch.from_numpy(own.index))


def _size(held: Held) -> int:
    return sum(c.vectors for c in held.values())


def without(kind: ChannelKind, names: Collection[str]) -> ChannelKind:
    """Return a kind of channels with those symmetries only that leave some weights alone."""
    space = list(kind.symmetries)
    for b, block in enumerate(kind.blocks):
        if block.name in names:
            space = vanishing(space, {b: Fraction(1)})
    return ChannelKind(kind.count, kind.blocks, tuple(sparse_basis(space)))
