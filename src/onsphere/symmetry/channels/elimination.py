"""Exact elimination in one component of channels; alike layers are solved once."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from onsphere.symmetry.channels.multiples import LARGEST, Multiples, Sums, multiples
from onsphere.symmetry.channels.terms import Ints, Others, Short, Terms
from onsphere.symmetry.exact.units.channel_demands import Demand
from onsphere.symmetry.exact.units.linear_forms import Constraints, Plain, plain

Followers = list[tuple[int, int | Fraction]]
"""Columns that follow another unknown, and how far."""
LARGEST_COMPONENT = 2_000_000
"""Up to how many terms of demands a component is solved."""
LARGEST_WORK = 5_000_000
"""After how many terms that exact elimination reads and writes a component is left out."""


@dataclass(frozen=True, eq=False)
class Solution:
    """The solution of one component.

    Args:
        followed: free column -> the columns that are not free and follow it, and how far.
        common: unknown of no channel -> the columns that follow it, and how far.
        conditions: sums of unknowns of no channel that must vanish for it to be one.
    """

    followed: dict[int, Followers]
    common: dict[int, Followers]
    conditions: list[Plain]


class Solver:
    """Solves components: weights first, then what follows from them.

    Those of alike layers differ in the numbers of unknowns alone, and are solved once.

    Args:
        demands: all demands.
        terms: all terms of channels.
        others: all terms beside them that differ from row to row.
    """

    def __init__(self, demands: Sequence[Demand], terms: Terms, others: Others) -> None:
        self.demands, self.terms, self.others = demands, terms, others
        self._known: dict[object, Solution | None] = {}

    def solved(
        self, own: Ints, places: Short, weights: NDArray[np.bool_], beside: Ints
    ) -> Solution | None:
        """Solve one component; ``None`` if it is too large.

        Args:
            own: its terms.
            places: its unknowns, in their order.
            weights: which of them are exponents of weights.
            beside: terms of unknowns of no channel that stand in its rows, and not in all of some
                demand.
        """
        if len(own) > LARGEST_COMPONENT:
            return None
        rows = self._rows(own, beside)
        column = np.searchsorted(places, self.terms.place[own])
        first, count = len(rows.commons), len(places)
        key = (first, weights.tobytes(), column.tobytes(), rows.key)
        if key not in self._known:
            # Unknowns that no weight has are the first to be expressed, common ones the last.
            at = first + column + np.where(weights[column], 0, count)
            self._known[key] = _eliminated(rows, at, count)
        found = self._known[key]
        return found and Solution(
            found.followed,
            {rows.commons[k]: followers for k, followers in found.common.items()},
            [{rows.commons[k]: c for k, c in form.items()} for form in found.conditions],
        )

    def sums(self, own: Ints, beside: Ints) -> list[Plain]:
        """Return what the rows of a component have beside terms of channels, each sum once."""
        rows = self._rows(own, beside)
        distinct = {frozenset(form.items()) for form in rows.sums()}
        return [{rows.commons[k]: c for k, c in form if c} for form in distinct if form]

    def _rows(self, own: Ints, beside: Ints) -> "_Rows":
        terms, others = self.terms, self.others
        numbers, row = np.unique(terms.row[own], return_inverse=True)
        demands, demand = np.unique(terms.demand[own], return_inverse=True)
        some = [self.demands[d] for d in demands.tolist()]
        of = np.zeros(len(numbers), np.int64)
        of[row] = demand
        aside = others.number[beside]
        commons = sorted({k for d in some for k in d.scalars}.union(aside.tolist()))
        number = {k: i for i, k in enumerate(commons)}
        return _Rows(
            commons,
            [tuple(plain(c) for c in d.coefficients) for d in some],
            [tuple((number[k], plain(c)) for k, c in d.scalars.items()) for d in some],
            of,
            _Places(row, demand, terms.slot[own]),
            _Places(
                np.searchsorted(numbers, others.row[beside]),
                np.searchsorted(demands, others.demand[beside]),
                others.slot[beside],
            ),
            np.searchsorted(np.array(commons, np.int64), aside),
        )


@dataclass(frozen=True, eq=False)
class _Places:
    """Where terms stand.

    Args:
        row: the row of each.
        demand: of which demand it is.
        slot: which term of its demand.
    """

    row: Ints
    demand: Ints
    slot: NDArray[np.uint8]

    @property
    def key(self) -> tuple[bytes, ...]:
        """Equal where all of it is."""
        return self.row.tobytes(), self.demand.tobytes(), self.slot.tobytes()


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of one component, numbered from 0, as are its demands and common unknowns.

    Args:
        commons: the unknowns of no channel.
        coefficients: of the terms of each demand.
        scalars: the common unknowns that all rows of each demand have.
        demand: of each row.
        own: terms of channels.
        beside: terms of common unknowns that differ from row to row.
        numbers: the common unknown of each of these.
    """

    commons: list[int]
    coefficients: list[tuple[int | Fraction, ...]]
    scalars: list[tuple[tuple[int, int | Fraction], ...]]
    demand: Ints
    own: _Places
    beside: _Places
    numbers: Ints

    @property
    def key(self) -> tuple[object, ...]:
        """Equal where all is, up to the names of unknowns."""
        told = tuple(self.coefficients), tuple(self.scalars), self.numbers.tobytes()
        return *self.own.key, *self.beside.key, *told

    def sums(self) -> list[Plain]:
        """Return of each row what it has beside terms of channels."""
        forms = [dict(self.scalars[d]) for d in self.demand.tolist()]
        return self._add(forms, self.beside, self.numbers)

    def with_terms(self, at: Ints) -> list[Plain]:
        """Return all rows, where the unknowns of channels have these numbers."""
        return self._add(self.sums(), self.own, at)

    def in_whole_numbers(self, at: Ints) -> Sums | None:
        """Return all rows with whole coefficients; ``None`` where these are too large."""
        whole = [_whole(*pair) for pair in zip(self.coefficients, self.scalars, strict=True)]
        if any(abs(c) >= LARGEST for own, beside in whole for c in (*own, *beside)):
            return None
        width = max((len(own) for own, _ in whole), default=0)
        factors = np.zeros((len(whole), width), np.int64)
        for d, (coefficients, _) in enumerate(whole):
            factors[d, : len(coefficients)] = coefficients
        # Each row has all common unknowns of its demand: at these places of the lists of all.
        sizes = np.array([len(s) for s in self.scalars], np.int64)
        each = sizes[self.demand]
        row = np.repeat(np.arange(len(each)), each)
        begin = (np.cumsum(sizes) - sizes)[self.demand] - (np.cumsum(each) - each)
        place = np.arange(len(row)) + np.repeat(begin, each)
        scalars = np.array([k for some in self.scalars for k, _ in some], np.int64)
        amounts = np.array([c for _, some in whole for c in some], np.int64)
        terms, beside = self.own, self.beside
        sums = Sums.summed(
            np.concatenate([terms.row, beside.row, row]),
            np.concatenate([at, self.numbers, scalars[place]]),
            np.concatenate([
                factors[terms.demand, terms.slot],
                factors[beside.demand, beside.slot],
                amounts[place],
            ]),
        )  # fmt: skip
        return sums if sums.is_small else None

    def _add(self, forms: list[Plain], places: _Places, numbers: Ints) -> list[Plain]:
        where = (places.row.tolist(), places.demand.tolist(), places.slot.tolist())
        for row, d, slot, k in zip(*where, numbers.tolist(), strict=True):
            form = forms[row]
            form[k] = form.get(k, 0) + self.coefficients[d][slot]
        return forms


def _whole(
    coefficients: Sequence[int | Fraction], scalars: Sequence[tuple[int, int | Fraction]]
) -> tuple[list[int], list[int]]:
    """Multiply all coefficients of a demand by what makes them whole."""
    beside = [c for _, c in scalars]
    common = math.lcm(*(c.denominator for c in (*coefficients, *beside)))
    return [int(c * common) for c in coefficients], [int(c * common) for c in beside]


def _eliminated(rows: _Rows, at: Ints, count: int) -> Solution | None:
    """Solve rows whose unknowns are numbered; ``None`` if that is too much work.

    The last unknown of a row follows the others. Common unknowns come first, then those of weights,
    then all others, which stand ``count`` places behind their columns.

    Args:
        rows: sums that vanish.
        at: numbers of the unknowns of channels, term by term.
        count: how many columns there are.
    """
    first = len(rows.commons)
    classes, forms = _classes(rows, at, first + 2 * count)
    system = Constraints(0)
    for form in forms:
        system.require_zero(form)
        if system.work > LARGEST_WORK:
            return None
    known = dict(system.plain_rows())
    root, times = classes.root.tolist(), classes.times.tolist()
    pivots = [k for k, r in enumerate(root) if k != r or k in known]
    columns = {(k - first) % count for k in pivots if k >= first}
    followed: dict[int, Followers] = {i: [] for i in range(count) if i not in columns}
    common: defaultdict[int, Followers] = defaultdict(list)
    conditions: list[Plain] = []
    alike: dict[tuple[int, int], Plain] = {}
    for pivot in pivots:
        key = root[pivot], times[pivot]
        rest = alike.get(key)
        if rest is None:
            row = known.get(root[pivot], {root[pivot]: 1})
            rest = alike[key] = {k: _in_units(c, times[pivot], times[k]) for k, c in row.items()}
        if pivot < first:
            conditions.append({pivot: -1, **rest})
            continue
        column = (pivot - first) % count
        for k, c in rest.items():
            (common[k] if k < first else followed[(k - first) % count]).append((column, c))
    return Solution(followed, dict(common), conditions)


def _classes(rows: _Rows, at: Ints, unknowns: int) -> tuple[Multiples, Iterable[Plain]]:
    """Return which unknowns are multiples of each other, and what else must vanish."""
    sums = rows.in_whole_numbers(at)
    if sums is not None:
        pairs, others = sums.pairs()
        classes = multiples(pairs, unknowns)
        if classes is not None:
            return classes, classes.written(others).forms()
    forms = rows.with_terms(at)  # numbers too large for those of machines
    return Multiples.none(unknowns), ({k: c for k, c in f.items() if c} for f in forms)


def _in_units(c: int | Fraction, up: int, down: int) -> int | Fraction:
    return c if up == down else plain(c * Fraction(up, down))
