"""Exact elimination in one component of channels; alike layers are solved once."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

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
            self._known[key] = _eliminated(rows.with_terms(at), first, count)
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

    def _add(self, forms: list[Plain], places: _Places, numbers: Ints) -> list[Plain]:
        where = (places.row.tolist(), places.demand.tolist(), places.slot.tolist())
        for row, d, slot, k in zip(*where, numbers.tolist(), strict=True):
            form = forms[row]
            form[k] = form.get(k, 0) + self.coefficients[d][slot]
        return forms


def _eliminated(rows: Iterable[Plain], first: int, count: int) -> Solution | None:
    """Solve rows whose unknowns are numbered; ``None`` if that is too much work.

    Args:
        rows: sums that vanish. Common unknowns come first, then those of weights, then all others,
            which stand ``count`` places behind their columns.
        first: how many common unknowns there are.
        count: how many columns.
    """
    system = Constraints(0)
    for form in rows:
        system.require_zero({k: c for k, c in form.items() if c})
        if system.work > LARGEST_WORK:
            return None
    found = [*system.plain_rows()]
    pivots = {(pivot - first) % count: rest for pivot, rest in found if pivot >= first}
    followed: dict[int, Followers] = {i: [] for i in range(count) if i not in pivots}
    common: defaultdict[int, Followers] = defaultdict(list)
    for pivot, rest in pivots.items():
        for k, c in rest.items():
            if k < first:
                common[k].append((pivot, c))
            else:
                followed[(k - first) % count].append((pivot, c))
    conditions = [{pivot: -1, **rest} for pivot, rest in found if pivot < first]
    return Solution(followed, dict(common), conditions)
