"""Unknowns that are multiples of each other: demands of two terms, settled for all at once.

Most demands on channels have two terms. They sort unknowns into classes, in which each is a whole
number of times one unit. Of the other demands, few are different then.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.channels.terms import Ints
from onsphere.symmetry.exact.units.linear_forms import Plain
from onsphere.symmetry.exact.units.repeats import alike

LARGEST = 2**20
"""Whole numbers below this can be multiplied three at a time, and two million products be added."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of unknowns with whole coefficients, row by row, each unknown once in a row.

    Args:
        row: of each term.
        unknown: of each term; ascending in a row.
        factor: of each term, never 0.
    """

    row: Ints
    unknown: Ints
    factor: Ints

    @classmethod
    def summed(cls, row: Ints, unknown: Ints, factor: Ints) -> "Sums":
        """Add up what stands at the same unknown of the same row."""
        key = row * (1 + int(unknown.max(initial=0))) + unknown
        order = np.argsort(key, kind="stable")
        first = np.flatnonzero(np.diff(key[order], prepend=-1))
        total = np.add.reduceat(factor[order], first) if len(first) else factor[:0]
        kept = total != 0
        at = order[first[kept]]
        return cls(row[at], unknown[at], total[kept])

    @property
    def is_small(self) -> bool:
        """Whether all coefficients are below :data:`LARGEST`."""
        return _are_small(self.factor)

    @property
    def starts(self) -> Ints:
        """Where rows begin."""
        return np.flatnonzero(np.diff(self.row, prepend=-1))

    def pairs(self) -> tuple["Sums", "Sums"]:
        """Return the rows of two terms, and the others."""
        starts = self.starts
        sizes = np.diff(starts, append=len(self.row))
        two = np.repeat(sizes == 2, sizes)
        return self._some(two), self._some(~two)

    def _some(self, which: NDArray[np.bool_]) -> "Sums":
        return Sums(self.row[which], self.unknown[which], self.factor[which])

    def forms(self) -> Iterator[Plain]:
        """Yield the rows that differ by more than a factor, the shortest ones first."""
        starts = self.starts
        if not len(starts):
            return
        sizes = np.diff(starts, append=len(self.row))
        divisor = np.gcd.reduceat(np.abs(self.factor), starts) * np.sign(self.factor[starts])
        factor = self.factor // np.repeat(divisor, sizes)
        for size in np.unique(sizes).tolist():
            at = starts[sizes == size][:, None] + np.arange(size)
            table = np.concatenate([self.unknown[at], factor[at]], 1)
            for row in table[alike(table)[0]].tolist():
                yield dict(zip(row[:size], row[size:], strict=True))


@dataclass(frozen=True, eq=False)
class Multiples:
    """What unknowns are multiples of.

    Args:
        root: of each unknown the first one of its class.
        times: how many units of its class each unknown is.
        nothing: the first unknowns of classes that vanish.
    """

    root: Ints
    times: Ints
    nothing: Ints

    @classmethod
    def none(cls, count: int) -> "Multiples":
        """Return classes of one unknown each."""
        return cls(np.arange(count), np.ones(count, np.int64), np.zeros(0, np.int64))

    def written(self, sums: Sums) -> Sums:
        """Write sums in units of classes, each at the number of the first unknown of its class."""
        once = np.ones(len(self.nothing), np.int64)
        last = 1 + int(sums.row.max(initial=0))
        return Sums.summed(
            np.concatenate([sums.row, last + np.arange(len(once))]),
            np.concatenate([self.root[sums.unknown], self.nothing]),
            np.concatenate([sums.factor * self.times[sums.unknown], once]),
        )


def multiples(pairs: Sums, count: int) -> Multiples | None:
    """Sort unknowns into classes; ``None`` if the numbers become too large.

    Args:
        pairs: sums of two terms, which vanish; their coefficients are small.
        count: of the unknowns.
    """
    (a, b), (ca, cb) = pairs.unknown.reshape(-1, 2).T, pairs.factor.reshape(-1, 2).T
    root, up, down = np.arange(count), np.ones(count, np.int64), np.ones(count, np.int64)
    nothing = root[:0]
    while len(a):
        # Of the first unknowns r and s of both classes: na * r + nb * s = 0.
        r, s = root[a], root[b]
        na, nb = _reduced(ca * up[a] * down[b], cb * up[b] * down[a])
        apart = r != s
        nothing = np.concatenate([nothing, r[~apart & (na + nb != 0)]])
        a, b, ca, cb, r, s, na, nb = (x[apart] for x in (a, b, ca, cb, r, s, na, nb))
        # Each that may join others joins the first of them: in any other order a star takes long.
        chosen = np.full(count, count * len(r))
        np.minimum.at(chosen, np.maximum(r, s), np.minimum(r, s) * len(r) + np.arange(len(r)))
        later = np.flatnonzero(chosen < count * len(r))
        k = chosen[later] % max(len(r), 1)
        own, other = np.where(r > s, na, nb)[k], np.where(r > s, nb, na)[k]
        root[later] = np.minimum(r, s)[k]
        up[later], down[later] = -other * np.sign(own), np.abs(own)
        while _are_small(up, down) and (root[root] != root).any():
            up, down = _reduced(up * up[root], down * down[root])
            root = root[root]
        if not _are_small(up, down):
            return None
    if math.lcm(*np.unique(down).tolist()) >= LARGEST:
        return None
    unit = np.ones(count, np.int64)
    parts = np.flatnonzero(down > 1)
    np.lcm.at(unit, root[parts], down[parts])
    times = up * (unit[root] // down)
    return Multiples(root, times, np.unique(root[nothing])) if _are_small(times) else None


def _are_small(*numbers: Ints) -> bool:
    return all(bool((np.abs(n) < LARGEST).all()) for n in numbers)


def _reduced(up: Ints, down: Ints) -> tuple[Ints, Ints]:
    """Return two numbers each, without common divisors."""
    divisor = np.gcd(up, down)
    return up // divisor, down // divisor
