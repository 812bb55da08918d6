"""Solve what is demanded of shifts: which unknowns are 0, which are equal, which follow others.

Most demands say that one unknown is 0 or equals another one; these are settled for all at once.
Each that is left gives a *pivot*, an unknown that no other demand holds any more, and leaves with
it, so that the rest can be read off backwards without any elimination. What cannot be settled like
that is small, and is eliminated with fractions; or else it must not move.

An image (``W @ v``) follows its sources, so it can be no pivot: where nothing else makes up for it,
its sources must not move. An image that multiplies entry by entry may be read the other way round.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.shifts.unknowns import Image, Unknowns, Weight
from onsphere.symmetry.exact.units.fields import Index
from onsphere.symmetry.exact.units.linear_forms import Constraints, Form
from onsphere.symmetry.shifts.rows import (
    TINY,
    Pivots,
    Rows,
    distinct,
    distinct_numbers,
    leaves,
    merged,
    read_off,
    stacked,
)

Ints = NDArray[np.int64]
Numbers = NDArray[np.float64]
_LARGEST_CORE = 4000
"""Up to how many terms demands are eliminated with fractions."""


@dataclass(eq=False)
class Solution:
    """What the demands leave.

    Args:
        unknowns: those that were solved for.
        zero: which of them are 0; the last entry stands for nothing.
        label: of each the first one that equals it.
        pivots: classes that follow others.
        image: of each class the image in it, or -1.
        inverted: numbers of the blocks of images that are read the other way round.
    """

    unknowns: Unknowns
    zero: NDArray[np.bool_]
    label: Ints
    pivots: Pivots
    image: Ints
    inverted: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._row = np.full(len(self.label), -1)
        self._row[self.pivots.labels] = np.arange(len(self.pivots.labels))

    @cached_property
    def makers(self) -> Ints:
        """Of each class the number of the block of the image in it, or -1."""
        blocks = self.unknowns.blocks
        starts = np.array([b.start for b in blocks])
        found = np.full(len(self.image), -1)
        some = np.flatnonzero(self.image >= 0)
        numbers = self.image[some]
        found[some] = np.searchsorted(starts, numbers, "right") - 1
        for k in self.inverted:
            image = blocks[k].of
            assert isinstance(image, Image)
            found[some[np.isin(numbers, image.rows)]] = k
        return found

    def terms(self, index: NDArray[Any]) -> Rows:
        """Return what unknowns come to: free ones and images, a row for each."""
        labels = self.label[index.ravel()]
        at = self._row[labels]
        wide = max(1, self.pivots.rows.labels.shape[1])
        found = Rows(np.zeros((len(labels), wide), np.int64), np.zeros((len(labels), wide)))
        found.labels[:, 0] = labels
        found.factors[:, 0] = ~self.zero[labels]
        moved = np.flatnonzero(at >= 0)
        if len(moved):
            found.labels[moved] = self.pivots.rows.labels[at[moved]]
            found.factors[moved] = self.pivots.rows.factors[at[moved]]
        return found

    def sources(self, number: int) -> Ints:
        """Return the unknowns that an image is read off, by the number of its block."""
        block = self.unknowns.blocks[number]
        assert isinstance(block.of, Image)
        if number in self.inverted:
            return block.index().ravel().astype(np.int64)
        found: Ints = distinct_numbers(block.of.rows)
        return found


@dataclass(frozen=True, eq=False)
class Summand:
    """What one move adds to a weight, in the terms of the solution.

    Args:
        block: number of the block of the weight.
        slot: which of the terms it is.
        factor: how many times it is added.
        labels: of the amounts that are added.
        maker: number of the block of the image that is added instead, or -1.
    """

    block: int
    slot: int
    factor: float
    labels: Ints
    maker: int = -1


def solved(unknowns: Unknowns) -> Solution:
    """Solve the demands on shifts."""
    return _Solver(unknowns).solution()


@dataclass(frozen=True, eq=False)
class _LiveImage:
    """An image in the numbers of the solver.

    Args:
        number: of its block.
        of: what it is made of.
        own: its unknowns.
        rows: its sources, as in ``of``.
    """

    number: int
    of: Image
    own: Ints
    rows: Ints


class _Solver:
    """Demands become fewer until nothing changes any more.

    Unknowns that must not move anyway are left out from the start: those that are left are numbered
    anew, and the last number stands for all others.
    """

    def __init__(self, unknowns: Unknowns) -> None:
        self.unknowns = unknowns
        rank = _preferences(unknowns)
        self.live = np.flatnonzero(~_stopped(unknowns, rank))
        count = len(self.live)
        place = np.full(unknowns.count + 1, count)
        place[self.live] = np.arange(count)
        self.rank = np.append(rank[self.live], 0)
        self.zero = np.zeros(count + 1, bool)
        self.zero[-1] = True
        self.label = np.arange(count + 1)
        self.inverted: set[int] = set()
        self.circular: set[int] = set()
        self.images = [
            _LiveImage(k, b.of, place[b.start : b.start + b.size], place[b.of.rows])
            for k, b in enumerate(unknowns.blocks) if isinstance(b.of, Image)
        ]  # fmt: skip
        self.is_image, self.is_bundle = (np.zeros(count + 1, bool) for _ in range(2))
        for image in self.images:
            (self.is_image if image.of.words else self.is_bundle)[image.own] = True
        self.rows = [Rows(place[index].T, factors.T) for factors, index in _by_width(unknowns.sums)]

    def solution(self) -> Solution:
        """Return what is left."""
        while True:
            self._settle()
            pivots = self._peeled()
            if pivots is None:
                continue
            found = self._of_all_unknowns(pivots)
            circle = {*self._circle(found)}
            if not circle:
                return found
            if circle <= self.circular:
                self._stop_sources(circle)
            self.circular |= circle

    def _of_all_unknowns(self, pivots: Pivots) -> Solution:
        """Return what is left, in numbers of all unknowns."""
        count, live = self.unknowns.count + 1, np.append(self.live, self.unknowns.count)
        zero, label, image = np.ones(count, bool), np.arange(count), np.full(count, -1)
        zero[live] = self.zero
        label[live] = live[self.label]
        found = self._images_of_classes()
        image[live] = np.where(found < 0, -1, live[found])
        rows = Rows(live[pivots.rows.labels], pivots.rows.factors)
        named = Pivots(live[pivots.labels], rows)
        return Solution(self.unknowns, zero, label, named, image, self.inverted)

    # --- zeros and equals ------------------------------------------------------------------------

    def _settle(self) -> None:
        """Settle all demands, short ones first: of the long ones many say nothing more then."""
        while True:
            while self._reduce(2) | self._follow_images() | self._equate_images():
                pass
            if not self._reduce():
                return

    def _reduce(self, most: float = math.inf) -> bool:
        """Merge what is equal, and drop what is 0; return whether anything changed.

        Args:
            most: how many terms demands have at most.
        """
        changed, kept, pairs = False, [], []
        for rows in self.rows:
            if rows.labels.shape[1] > most:
                kept.append(rows)
                continue
            rows = self._normal(rows)
            count = (rows.factors != 0).sum(1)
            single = count == 1
            if single.any():
                self.zero[rows.labels[single, 0]] = True
                changed = True
            equal = (count == 2) & (np.abs(rows.factors.sum(1)) < TINY)
            if equal.any():
                pairs.append(rows.labels[equal, :2])
            left = (count > 2) | ((count == 2) & ~equal)
            if left.any():
                kept.append(rows if left.all() else rows.taken(left))
        self.rows = kept
        if pairs:
            self._join(*np.concatenate(pairs).T)
        self._spread_zeros()
        return changed or bool(pairs)

    def _normal(self, rows: Rows) -> Rows:
        """Write rows with one term for each class, those that count first.

        Rows without any term, and such as say the same as the row before, are left out.
        """
        labels = self.label[rows.labels]
        nothing = self.zero[labels]
        if rows.settled and not nothing.any() and (labels == rows.labels).all():
            return rows
        labels[nothing] = len(self.label) - 1
        kept: NDArray[np.bool_] = np.asarray(~nothing.all(1))
        factors = np.where(nothing, 0.0, rows.factors)
        kept[1:] &= ((labels[1:] != labels[:-1]) | (factors[1:] != factors[:-1])).any(1)
        some = Rows(labels, factors)
        return merged(some if kept.all() else some.taken(kept))

    def _join(self, a: Ints, b: Ints) -> None:
        """Put equal unknowns into one class, named by its first member."""
        label = self.label
        while True:
            la, lb = label[a], label[b]
            apart = la != lb
            if not apart.any():
                break
            a, b, la, lb = a[apart], b[apart], la[apart], lb[apart]
            np.minimum.at(label, np.maximum(la, lb), np.minimum(la, lb))
            while True:
                jumped = label[label]
                if (jumped == label).all():
                    break
                label[:] = jumped

    def _spread_zeros(self) -> None:
        """Let whole classes vanish, and mark all their members."""
        some = np.zeros(len(self.zero), bool)
        some[self.label[self.zero]] = True
        self.zero = some[self.label]

    def _follow_images(self) -> bool:
        """Let images of nothing vanish, and sources of vanishing images; say if any did."""
        before = int(self.zero.sum())
        for image in reversed(self.images):
            own, rows, row = image.own, image.rows, image.of.row
            still: NDArray[np.bool_] = np.asarray(self.zero[rows].all(1))
            if image.number in self.inverted:
                self.zero[rows[row, 0]] |= self.zero[own]
                still = np.asarray(self.zero[rows].all(1))
            self.zero[own] |= still[row]
            stopped = self.zero[own] & ~still[row]
            if stopped.any():
                self.zero[rows[distinct_numbers(row[stopped])]] = True
        self._spread_zeros()
        self._forget_images_of_nothing()
        return int(self.zero.sum()) > before

    def _forget_images_of_nothing(self) -> None:
        self.images = [
            image for image in self.images
            if not (self.zero[image.own].all() and self.zero[image.rows].all())
        ]  # fmt: skip

    def _alike(self) -> list[list[_LiveImage]]:
        """Return the images of each map that stands for several."""
        by_map: defaultdict[Hashable, list[_LiveImage]] = defaultdict(list)
        for image in self.images:
            if image.of.words:
                by_map[image.of.map].append(image)
        return [some for some in by_map.values() if len(some) > 1]

    def _equate_images(self) -> bool:
        """Join images of one map whose sources turned out equal; say if any were apart."""
        changed = False
        for some in self._alike():
            first: dict[bytes, Ints] = {}
            for image in some:
                sources = np.where(self.zero[image.rows], -1, self.label[image.rows])
                twin = first.setdefault(sources.tobytes(), image.own)
                if (self.label[twin] != self.label[image.own]).any():
                    self._join(twin, image.own)
                    self._spread_zeros()
                    changed = True
        return changed

    def _stop_sources(self, numbers: Collection[int]) -> None:
        """Let vanish what some images depend on."""
        for image in self.images:
            if image.number in numbers:
                self.zero[image.rows] = True
        self._spread_zeros()

    def _stop(self, labels: Ints) -> None:
        """Let classes vanish."""
        self.zero[labels] = True
        self._spread_zeros()

    # --- images ----------------------------------------------------------------------------------

    def _images_of_classes(self) -> Ints:
        """Return of each class the image in it, or -1."""
        found = np.full(len(self.label), -1)
        numbers = np.flatnonzero(self._follows() & ~self.zero & ~self._twins())
        found[self.label[numbers]] = numbers
        return found

    def _follows(self) -> NDArray[np.bool_]:
        """Return which unknowns follow others by a map."""
        found = self.is_image.copy()
        for image in self.images:
            if image.number in self.inverted:
                found[image.own] = False
                found[image.rows.ravel()] = True
        found[-1] = False
        return found

    def _twins(self) -> NDArray[np.bool_]:
        """Return which images come to the same as others by the same map."""
        found, seen = (np.zeros(len(self.label), bool) for _ in range(2))
        for some in self._alike():
            for image in some:
                labels = self.label[image.own]
                found[image.own] = seen[labels]
                seen[labels] = True
            for image in some:
                seen[self.label[image.own]] = False
        return found

    def _sources_of_maps(self) -> NDArray[np.bool_]:
        """Return the classes that images depend on."""
        found = np.zeros(len(self.label), bool)
        for image in self.images:
            if image.of.words and not self.zero[image.own].all():
                found[self.label[image.rows]] = True
        return found

    def _clashes(self) -> bool:
        """Let vanish what would follow two maps at once, or a map of data; say if anything did."""
        follows = self._follows() & ~self.zero
        follows &= ~self._twins()
        counts = np.bincount(self.label[follows], minlength=len(self.label))
        twice = np.flatnonzero(counts > 1)
        bundles = self.is_bundle & ~self.zero
        sizes = np.bincount(self.label, minlength=len(self.label))
        tied = np.flatnonzero(bundles & (sizes[self.label] > 1))
        in_rows = [r.labels[r.factors != 0] for r in self.rows]
        used = np.zeros(len(self.label), bool)
        for labels in in_rows:
            used[labels] = True
        tied = np.union1d(self.label[tied], self.label[np.flatnonzero(bundles & used[self.label])])
        if len(twice) and self._inverts(twice):
            twice = twice[:0]
        self._stop(np.concatenate([twice, tied]))
        return bool(len(twice) or len(tied))

    def _inverts(self, labels: Ints) -> bool:
        """Read images of some classes the other way round, where that can be; say if it could."""
        wanted = np.zeros(len(self.label), bool)
        wanted[labels] = True
        before = len(self.inverted)
        alone: NDArray[np.bool_] | None = None
        for image in self.images:
            if not image.of.by_entry or image.number in self.inverted:
                continue
            own = self.label[image.own]
            if not wanted[own].any() or self.zero[own].any():
                continue
            alone = self._used_by_one_image() if alone is None else alone
            if self._may_invert(image, alone):
                self.inverted.add(image.number)
        return len(self.inverted) > before

    def _used_by_one_image(self) -> NDArray[np.bool_]:
        """Return the classes of one unknown that one image depends on, and nothing else."""
        found: NDArray[np.bool_] = np.bincount(self.label, minlength=len(self.label)) == 1
        user = np.full(len(self.label), -1)
        for image in self.images:
            labels = self.label[image.rows]
            others = labels[(user[labels] >= 0) & (user[labels] != image.number)]
            found[others] = False
            user[labels] = image.number
        for rows in self.rows:
            found[rows.labels[rows.factors != 0]] = False
        return found

    def _may_invert(self, image: _LiveImage, alone: NDArray[np.bool_]) -> bool:
        """Return whether the sources of an image can follow it, given what only it depends on."""
        if len(image.of.row) != len(distinct_numbers(image.of.row)):
            return False
        sources = image.rows.ravel()
        labels = self.label[sources]
        if not alone[labels].all() or len(distinct_numbers(labels)) < len(labels):
            return False
        return not self._follows()[sources].any()

    # --- pivots ----------------------------------------------------------------------------------

    def _peeled(self) -> Pivots | None:
        """Give each demand that is left a pivot; ``None`` where more had to vanish first."""
        inverted = len(self.inverted)
        if self._clashes() or len(self.inverted) > inverted:
            return None
        image = self._images_of_classes() >= 0
        score = np.full(len(self.label), -1)
        np.maximum.at(score, self.label, self.rank)
        score[image] = -1
        idle = (score == 0) & ~self._sources_of_maps()
        shy = np.zeros(len(score), bool)  # weights do not follow what may come from themselves
        for i in self.images:
            if i.number in self.circular:
                shy[self.label[i.own]] = True
        rows = stacked([self._normal(r) for r in self.rows])
        rounds: list[tuple[Ints, Rows]] = []
        while len(rows):
            taken = leaves(rows, score, idle, shy)
            if taken is None:
                rows = distinct(rows)
                taken = leaves(rows, score, idle, shy)
            if taken is None:
                core = self._core(rows, image)
                if core is None:
                    return None
                rounds.append(core)
                break
            which, slot = taken
            some = rows.taken(which)
            at = np.arange(len(slot))
            factors = -some.factors / some.factors[at, slot][:, None]
            factors[at, slot] = 0.0
            rounds.append((some.labels[at, slot], Rows(some.labels, factors)))
            rows = rows.taken(~which)
        return read_off(rounds, len(self.label))

    def _core(self, rows: Rows, image: NDArray[np.bool_]) -> tuple[Ints, Rows] | None:
        """Eliminate what is left with fractions, or let it vanish (``None``)."""
        counts = rows.factors != 0
        only = image[rows.labels] | ~counts
        if only.all(1).any() or counts.sum() > _LARGEST_CORE:
            which = only.all(1) if only.all(1).any() else np.ones(len(rows), bool)
            labels = rows.labels[which][counts[which]]
            if not self._inverts(labels):
                self._stop(labels)
            return None
        labels = np.unique(rows.labels[counts])
        order = sorted(labels.tolist(), key=lambda x: (not image[x], self.rank[x], x))
        place = {x: i for i, x in enumerate(order)}
        system = Constraints(len(order))
        for some, factors in zip(rows.labels.tolist(), rows.factors.tolist(), strict=True):
            form: Form = {}
            for x, c in zip(some, factors, strict=True):
                if c:
                    form[place[x]] = Fraction(c).limit_denominator(10**6)
            system.require_zero(form)
        found = list(system.rows())
        bad = [[order[p], *(order[k] for k in rest)] for p, rest in found if image[order[p]]]
        bad += [[order[p]] for p, rest in found if not rest]
        if bad:
            self._stop(np.array([x for some in bad for x in some]))
            return None
        wide = max(len(rest) for _, rest in found)
        out = Rows(np.zeros((len(found), wide), np.int64), np.zeros((len(found), wide)))
        for i, (_, rest) in enumerate(found):
            for j, (k, c) in enumerate(rest.items()):
                out.labels[i, j], out.factors[i, j] = order[k], float(c)
        return np.array([order[p] for p, _ in found]), out

    def _circle(self, found: Solution) -> list[int]:
        """Return images that would have to be known before they are."""
        starts = np.array([b.start for b in self.unknowns.blocks])
        needs: dict[int, set[int]] = {}
        for image in self.images:
            if self.zero[image.own].all() or not image.of.words:
                continue
            k = image.number
            terms = found.terms(found.sources(k))
            numbers = found.image[terms.labels[terms.factors != 0]]
            numbers = distinct_numbers(numbers[numbers >= 0])
            blocks = np.searchsorted(starts, numbers, "right") - 1
            needs[k] = {self._maker(int(x), int(n)) for x, n in zip(blocks, numbers, strict=True)}
        return _in_circles(needs)

    def _maker(self, block: int, number: int) -> int:
        """Return the block of the image that an unknown follows."""
        if isinstance(self.unknowns.blocks[block].of, Image):
            return block
        return next(
            k
            for k in self.inverted
            if (self.unknowns.blocks[k].of.rows == number).any()  # type: ignore[union-attr]
        )


def _stopped(unknowns: Unknowns, rank: Ints) -> NDArray[np.bool_]:
    """Return what must not move, or that no operation took up, or that is said in another way."""
    found = np.zeros(unknowns.count + 1, bool)
    found[-1] = True  # NOTHING
    for index in unknowns.zeros:
        found[index] = True
    ways: dict[str, set[str]] = {}
    for b in unknowns.blocks:
        if isinstance(b.of, Weight):
            ways.setdefault(b.of.name, set()).add(b.of.way)
    for b in unknowns.blocks:
        if not isinstance(b.of, Weight):
            continue
        own = slice(b.start, b.start + b.size)
        found[own] |= rank[own] <= 0
        name, way = b.of.name, b.of.way
        kept = {"slices"} if name in unknowns.mixed else {"slices", "common"}
        whole = name not in unknowns.mixed | unknowns.looked_up
        if whole and "entries" in ways[name]:
            kept = {"entries"}
        found[own] |= way not in kept
    return found


def _by_width(
    sums: Iterable[tuple[Sequence[Fraction], Index]],
) -> Iterator[tuple[Numbers, Index]]:
    """Yield demands of as many terms together: their factors and unknowns by term and row."""
    some: defaultdict[int, list[tuple[Numbers, Index]]] = defaultdict(list)
    for coefficients, index in sums:
        factors = np.array([[float(c)] for c in coefficients]).repeat(index.shape[1], 1)
        some[len(index)].append((factors, index))
    for group in some.values():
        yield np.concatenate([f for f, _ in group], 1), np.concatenate([i for _, i in group], 1)


def _preferences(unknowns: Unknowns) -> Ints:
    """Say what rather follows others: running means, then weights used late, and never maps."""
    found = np.zeros(unknowns.count + 1, np.int64)
    first: dict[int, tuple[int, Index]] = {}
    for place, index in enumerate(unknowns.seen):
        first.setdefault(id(index), (place, index))
    for place, index in reversed(first.values()):
        found[index] = 1 + place  # of the first operation that takes it up
    for b in unknowns.blocks:
        own = slice(b.start, b.start + b.size)
        if not isinstance(b.of, Weight):
            found[own] = -1 if isinstance(b.of, Image) else 0
        elif b.of.buffer:
            found[own] += len(unknowns.seen) * (found[own] > 0)
    found[-1] = 0
    return found


def _in_circles(needs: dict[int, set[int]]) -> list[int]:
    """Return the nodes from which one comes back to them."""
    left = {k: set(v) & needs.keys() for k, v in needs.items()}
    while True:
        done = {k for k, v in left.items() if not v}
        if not done:
            return sorted(left)
        left = {k: v - done for k, v in left.items() if k not in done}
