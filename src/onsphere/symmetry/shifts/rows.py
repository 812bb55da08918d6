"""Demands as rows of a table, and how one after the other is left out with its pivot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.exact.units.repeats import alike

Ints = NDArray[np.int64]
Numbers = NDArray[np.float64]
TINY = 1e-9
"""Factors below this are 0."""
_FEW_TERMS = 8
"""Up to how many terms are sorted by exchanges."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Sums of unknowns, padded with 0 times the first one.

    Where there are many, they are stored term by term: few terms are faster to go through so.

    Args:
        labels: of the unknowns, by row and term.
        factors: by row and term.
        settled: whether each row holds each unknown once, those that count first.
    """

    labels: Ints
    factors: Numbers
    settled: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def taken(self, which: Any) -> "Rows":
        """Return some of the rows."""
        at = np.arange(len(self))[which]
        return Rows(self.labels.T.take(at, 1).T, self.factors.T.take(at, 1).T, self.settled)


@dataclass(frozen=True, eq=False)
class Pivots:
    """Unknowns that follow others.

    Args:
        labels: of those that follow.
        rows: what they come to, in unknowns of which none follows others.
    """

    labels: Ints
    rows: Rows


def stacked(some: Sequence[Rows]) -> Rows:
    """Return all rows in one table."""
    wide = max((r.labels.shape[1] for r in some), default=1)

    def padded(a: NDArray[Any]) -> NDArray[Any]:
        return np.pad(a, ((0, 0), (0, wide - a.shape[1])))

    if not some:
        return Rows(np.zeros((0, 1), np.int64), np.zeros((0, 1)))
    return Rows(
        np.concatenate([padded(r.labels) for r in some]),
        np.concatenate([padded(r.factors) for r in some]),
    )


def leaves(
    rows: Rows, score: Ints, idle: NDArray[np.bool_], shy: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], Ints] | None:
    """Return rows with an unknown that no other row holds, and which of its terms that is.

    Args:
        rows: what is demanded.
        score: which unknowns rather follow others; common values and sums have 0, maps -1.
        idle: sums and common values that nothing else depends on.
        shy: maps; where a row holds one of these, a sum follows the weights and not the reverse.
    """
    counts = rows.factors != 0
    degree = np.bincount(rows.labels.T[counts.T], minlength=len(score))
    alone = counts & (degree[rows.labels] == 1)
    named = alone & idle[rows.labels]
    if named.any():
        return named.any(1), named[named.any(1)].argmax(1)
    worth = np.where(alone, score[rows.labels], -1)
    turned = (counts & shy[rows.labels]).any(1) & (worth == 0).any(1)
    worth[turned] = np.where(worth[turned] == 0, 1, -1)
    for least in (1, 0):  # weights rather than common values
        best = worth.max(1)
        if (best >= least).any():
            which = best >= least
            return which, worth[which].argmax(1)
    return None


def distinct(rows: Rows) -> Rows:
    """Drop rows that say the same as others."""
    counts = rows.factors != 0
    degree = np.bincount(rows.labels.T[counts.T])
    kept = (counts & (degree[rows.labels] == 1)).any(1)
    others = np.flatnonzero(~kept)
    if not len(others):
        return rows
    kept[others[_first_of_each(_signs(rows.taken(others)))]] = True
    return rows.taken(kept)


def _signs(rows: Rows) -> Numbers:
    """Return the same for rows that say the same."""
    own = np.where(rows.factors == 0, -1, rows.labels)
    labels, factors = _ordered(own, rows.factors, own)
    first = factors[np.arange(len(rows)), (factors != 0).argmax(1)][:, None]
    signs: Numbers = np.concatenate([labels, factors / first], 1).round(9)
    return signs


def _first_of_each(table: Numbers) -> Ints:
    """Return the first of each kind of row."""
    words = np.ascontiguousarray(table + 0.0).view(np.uint64)  # -0.0 is 0.0
    # Numbers with few digits end in zeros, which a hash by products would keep.
    return alike(words ^ (words >> np.uint64(32)))[0]


def distinct_numbers(numbers: NDArray[Any]) -> NDArray[Any]:
    """Return the different ones of some numbers, sorted."""
    flat = numbers.ravel()
    if not flat.size:
        return flat
    first, last = int(flat.min()), int(flat.max())
    if last - first > 8 * flat.size:
        return np.unique(flat)
    met = np.zeros(last - first + 1, bool)
    met[flat - first] = True
    return np.flatnonzero(met) + first


def read_off(rounds: Sequence[tuple[Ints, Rows]], count: int) -> Pivots:
    """Write pivots in unknowns that are no pivots: those of a round hold only later ones."""
    row = np.full(count, -1)
    labels = np.zeros(0, np.int64)
    known = Rows(np.zeros((0, 1), np.int64), np.zeros((0, 1)))
    for own, rows in reversed(rounds):
        pieces_l, pieces_f = [], []
        for k in range(rows.labels.shape[1]):
            lab, fac = rows.labels[:, k], rows.factors[:, k]
            at = np.where(fac != 0, row[lab], -1)
            wide = known.labels.shape[1] if (at >= 0).any() else 1
            piece_l = np.zeros((len(own), wide), np.int64)
            piece_f = np.zeros((len(own), wide))
            piece_l[:, 0], piece_f[:, 0] = lab, np.where(at >= 0, 0.0, fac)
            some = np.flatnonzero(at >= 0)
            if len(some):
                piece_l[some] = known.labels[at[some]]
                piece_f[some] = known.factors[at[some]] * fac[some][:, None]
            pieces_l.append(piece_l)
            pieces_f.append(piece_f)
        new = merged(Rows(np.concatenate(pieces_l, 1), np.concatenate(pieces_f, 1)))
        row[own] = len(labels) + np.arange(len(own))
        labels = np.concatenate([labels, own])
        known = stacked([known, new])
    return Pivots(labels, known)


def merged(rows: Rows) -> Rows:
    """Write rows with each unknown once."""
    labels, factors = rows.labels, rows.factors.copy()
    if (labels[:, 1:] < labels[:, :-1]).any():
        labels, factors = _ordered(labels, factors, labels)
    for k in range(1, labels.shape[1]):
        same = labels[:, k] == labels[:, k - 1]
        factors[:, k] += np.where(same, factors[:, k - 1], 0.0)
        factors[:, k - 1] = np.where(same, 0.0, factors[:, k - 1])
    factors[np.abs(factors) < TINY] = 0.0
    nothing = factors == 0
    if nothing.any():
        labels, factors = _ordered(labels, factors, nothing)
        width = max(1, int((factors != 0).sum(1).max(initial=0)))
        labels, factors = labels[:, :width], factors[:, :width]
        labels = np.where(factors == 0, labels[:, :1], labels)
    return Rows(labels, factors, settled=True)


def _ordered(labels: Ints, factors: Numbers, key: NDArray[Any]) -> tuple[Ints, Numbers]:
    """Sort the terms of each row by a key."""
    if labels.shape[1] > _FEW_TERMS:
        order = np.argsort(key, axis=1, kind="stable")
        return np.take_along_axis(labels, order, 1), np.take_along_axis(factors, order, 1)
    tables = [np.array(t, order="F") for t in (key, labels, factors)]
    for last in range(labels.shape[1] - 1, 0, -1):
        for k in range(last):
            swapped = np.flatnonzero(tables[0][:, k] > tables[0][:, k + 1])
            for table in tables if len(swapped) else ():
                later = table[swapped, k + 1]
                table[swapped, k + 1] = table[swapped, k]
                table[swapped, k] = later
    return tables[1], tables[2]
