r"""Units of tensors: rational exponents, the constraints between them, and their null space.

Give every weight :math:`p_i` an unknown exponent :math:`e_i`: under a rescale by :math:`a > 0` it
becomes :math:`a^{e_i} p_i`. A tensor computed from weights then scales as :math:`a^u`, where its
*unit* :math:`u = \sum_i c_i e_i` is a linear form with rational coefficients. Operations that only
make sense between equal units (a sum) each demand that one linear form vanishes. The exponents
that satisfy all demands are the null space of a rational matrix: every scale symmetry of the
network at the level of whole tensors, exactly.

Source: Buckingham's pi theorem (1914) gives the same null space for physical quantities.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from onsphere.symmetry.exact.units.fields import NONE, Fields

Form = dict[int, Fraction]
"""A sparse linear form: unknown -> non-zero coefficient."""


@dataclass(frozen=True)
class Unit:
    """How a tensor scales: a linear form in the unknown exponents.

    Args:
        terms: unknown -> coefficient, zeros left out.
        free: the tensor holds only 0, infinities or the dtype's extremes, which fit any unit.
        binary: the tensor holds only 0 and 1.
        guard: the tensor says where something is 0 or not finite, which no rescale changes.
        eps: constants added to this tensor that count as an ``eps`` *if* the tensor goes on into
            a root or a denominator (ids of :class:`EpsSite`).
        difference: the tensor is a difference whose two sides need equal units, *unless* what was
            taken away is added again (an id).
        fields: what varies along the axes of the tensor, beside ``terms``.

    Example:
        >>> weight, gain = Unit.of(0), Unit.of(1)
        >>> print(weight + gain * Fraction(1, 2))
        e0 + 1/2 e1
        >>> print(weight - weight)
        0
    """

    terms: Mapping[int, Fraction] = field(default_factory=dict)
    free: bool = False
    binary: bool = False
    guard: bool = False
    eps: frozenset[int] = frozenset()
    difference: int | None = None
    fields: Fields = NONE

    @property
    def vanishes(self) -> bool:
        """Whether the tensor is like data: no rescale changes it, as far as it was written."""
        return not self.terms and not self.fields

    def with_fields(self, fields: Fields, terms: Mapping[int, Fraction] | None = None) -> "Unit":
        """Return a unit with other fields, and maybe other terms."""
        if terms is None:
            if not (fields or self.fields):
                return self
            terms = self.terms
        return Unit(
            terms, self.free, self.binary, self.guard, self.eps, self.difference, fields
        )  # which `replace` takes five times as long for

    @classmethod
    def of(cls, unknown: int) -> "Unit":
        """Return the unit of a weight: its own unknown exponent."""
        return cls({unknown: Fraction(1)})

    def __add__(self, other: "Unit") -> "Unit":
        """Return the unit of a product."""
        if self.free or other.free:
            return ANY
        terms = add_scaled(self.terms, other.terms, Fraction(1))
        return Unit(terms, fields=self.fields.plus(other.fields))

    def __sub__(self, other: "Unit") -> "Unit":
        """Return the unit of a quotient."""
        if self.free or other.free:
            return ANY
        terms = add_scaled(self.terms, other.terms, Fraction(-1))
        return Unit(terms, fields=self.fields.plus(other.fields, -1))

    def __mul__(self, power: Fraction | int) -> "Unit":
        """Return the unit of a power.

        Raises:
            TypeError: the power is no whole number and no fraction.
        """
        if not isinstance(power, int | Fraction):
            raise TypeError(
                f"a unit is multiplied by an int or a Fraction, as Fraction(1, 2), not by {power!r}"
            )
        if self.free and power > 0:
            return ANY
        if self.free or power == 0:
            return ZERO
        return Unit({k: c * power for k, c in self.terms.items()}, fields=self.fields.times(power))

    def __str__(self) -> str:
        if self.free:
            return "any"
        shown = [f"e{k}" if c == 1 else f"{c} e{k}" for k, c in sorted(self.terms.items())]
        return " + ".join(shown) or "0"


ZERO = Unit()
"""The unit of data, of plain numbers and of everything that a rescale leaves alone."""
ANY = Unit(free=True)
"""The unit of a literal 0 and of infinities, which every rescale leaves alone as well."""


def add_scaled(
    a: Mapping[int, Fraction], b: Mapping[int, Fraction], factor: Fraction
) -> dict[int, Fraction]:
    """Return the form ``a + factor * b`` without zero coefficients."""
    total = dict(a)
    for k, c in (b if factor == 1 else _scaled(b, factor)).items():
        before = total.get(k)
        value = c if before is None else before + c
        if value:
            total[k] = value
        else:
            total.pop(k, None)
    return total


def _scaled(form: Mapping[int, Fraction], factor: Fraction) -> Form:
    """Return a multiple of a form; most factors are 1 or -1, and fractions are slow."""
    if factor == -1:
        return {k: -c for k, c in form.items()}
    return {k: c * factor for k, c in form.items()} if factor else {}


class Constraints:
    """Linear forms that must vanish, kept fully reduced as they arrive.

    Each stored row says ``pivot = -(the rest)`` and the rest holds no pivot, so reading a form is
    one pass of substitution and the null space can be read off.

    Args:
        count: number of unknowns.

    Attributes:
        work: how many terms were read and written so far.

    Example:
        >>> system = Constraints(3)
        >>> system.require_zero({0: Fraction(1), 1: Fraction(1)})     # e0 + e1 = 0
        True
        >>> system.require_zero({0: Fraction(2), 1: Fraction(2)})     # nothing new
        False
        >>> [{k: int(c) for k, c in v.items()} for v in system.null_space()]
        [{0: 1, 1: -1}, {2: 1}]
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.work = 0
        # Nearly all coefficients are whole, and Python's own numbers are faster than fractions.
        self._rows: dict[int, Plain] = {}
        self._rows_with: defaultdict[int, set[int]] = defaultdict(set)

    def copy(self) -> "Constraints":
        """Return the same demands, to which others can be added."""
        twin = Constraints(self.count)
        twin._rows = {k: dict(row) for k, row in self._rows.items()}
        twin._rows_with.update({k: set(rows) for k, rows in self._rows_with.items()})
        return twin

    def reduced(self, form: Mapping[int, Fraction]) -> Form:
        """Return the form with every pivot substituted: empty when it must vanish anyway."""
        return as_fractions(self._reduced(form))

    def _reduced(self, form: Mapping[int, int | Fraction]) -> "Plain":
        total: Plain = {}
        for k, c in form.items():
            row = self._rows.get(k)
            if row is not None:
                _add_multiple(total, row, plain(c))
            elif value := total.get(k, 0) + c:
                total[k] = value if type(value) is int else plain(value)
            else:
                total.pop(k, None)
        return total

    def require_zero(self, form: Mapping[int, int | Fraction]) -> bool:
        """Demand that a form vanishes; return whether that was news.

        The unknown with the highest number becomes the pivot: weights met first stay free, so a
        null vector reads "this weight, and what must follow it".
        """
        rest = self._reduced(form)
        self.work += len(form)
        if not rest:
            return False
        pivot = max(rest)
        row = _divided(rest, -rest.pop(pivot))
        for other in self._rows_with.pop(pivot, set()):
            self._substitute(other, pivot, row)
            self.work += len(row)
        self._rows[pivot] = row
        for k in row:
            self._rows_with[k].add(pivot)
        return True

    def _substitute(self, other: int, pivot: int, row: "Plain") -> None:
        """Write a row without a new pivot; it may be far longer than what stands for that."""
        changed = self._rows[other]
        factor = changed.pop(pivot)
        for k, c in row.items():
            before = changed.get(k, 0)
            value = before + c * factor
            if value:
                changed[k] = value if type(value) is int else plain(value)
            else:
                del changed[k]
            if not before:
                self._rows_with[k].add(other)
            elif not value:
                self._rows_with[k].discard(other)

    def rows(self) -> Iterator[tuple[int, Form]]:
        """Yield each unknown that others determine, and how: ``unknown = form``."""
        return ((pivot, as_fractions(row)) for pivot, row in self._rows.items())

    def plain_rows(self) -> Iterator[tuple[int, "Plain"]]:
        """Yield the same with whole numbers as such; they are not to be changed."""
        return iter(self._rows.items())

    def null_space(self) -> list[Form]:
        """Return a basis of all exponents that satisfy the demands: sparse, small integers."""
        return sparse_basis(self.plain_basis())

    def fundamental_basis(self) -> list[Form]:
        """Return a basis with one unknown of its own in each vector."""
        return [as_fractions(v) for v in self.plain_basis()]

    def plain_basis(self) -> Iterator["Plain"]:
        """Yield the same with whole numbers as such."""
        for unknown in range(self.count):
            if unknown not in self._rows:
                followed = sorted(self._rows_with.get(unknown, ()))
                yield {unknown: 1, **{p: self._rows[p][unknown] for p in followed}}


Plain = dict[int, int | Fraction]
"""A form whose whole coefficients are whole numbers."""


def plain(c: int | Fraction) -> int | Fraction:
    """Return a whole number as such: Python's own numbers are faster than fractions."""
    if type(c) is int:
        return c
    return c.numerator if c.denominator == 1 else c


def as_fractions(form: Plain) -> Form:
    """Return a form whose coefficients are all fractions."""
    return {k: Fraction(c) for k, c in form.items()}


def _divided(form: Plain, by: int | Fraction) -> Plain:
    """Return a form divided by a number; mostly that is 1 or -1, and fractions are slow."""
    if by in (1, -1):
        return {k: c * by for k, c in form.items()}
    factor = Fraction(1) / by
    return {k: plain(c * factor) for k, c in form.items()}


def _add_multiple(total: Plain, b: Plain, factor: int | Fraction) -> None:
    """Add a multiple of a form in place."""
    for k, c in b.items():
        value = total.get(k, 0) + c * factor
        if value:
            total[k] = value if type(value) is int else plain(value)
        else:
            total.pop(k, None)


def null_space(forms: Iterable[Mapping[int, Fraction]], count: int) -> list[Form]:
    """Return a sparse basis with small integers of the vectors on which all forms vanish."""
    system = Constraints(count)
    for form in forms:
        system.require_zero(form)
    return system.null_space()


def row_space(vectors: Iterable[Mapping[int, Fraction]], keep: set[int]) -> list[Form]:
    """Return independent vectors that span the projection of ``vectors`` onto some unknowns.

    The vectors come back whole: only their independence is judged on ``keep``.
    """
    seen = Constraints(0)
    return [
        dict(v) for v in vectors if seen.require_zero({k: c for k, c in v.items() if k in keep})
    ]


def in_span(
    vectors: Iterable[Mapping[int, Fraction]], basis: Iterable[Mapping[int, Fraction]]
) -> list[bool]:
    """Return of each vector whether it is a rational combination of a basis."""
    seen = Constraints(0)
    for other in basis:
        seen.require_zero(other)
    return [not seen.reduced(vector) for vector in vectors]


def further(
    known: Iterable[Mapping[str, Fraction]], vectors: Iterable[Mapping[str, Fraction]]
) -> list[dict[str, Fraction]]:
    """Return the vectors that are no rational combinations of known ones and of those before them.

    Example:
        >>> one = Fraction(1)
        >>> found = further([{"a": one, "b": one}], [{"b": one, "a": one}, {"a": one}])
        >>> [{n: int(c) for n, c in v.items()} for v in found]
        [{'a': 1}]
    """
    index: dict[str, int] = {}

    def numbered(v: Mapping[str, Fraction]) -> Form:
        return {index.setdefault(n, len(index)): c for n, c in v.items()}

    seen = Constraints(0)
    for v in known:
        seen.require_zero(numbered(v))
    return [dict(v) for v in vectors if seen.require_zero(numbered(v))]


def vanishing(space: Sequence[Form], form: Form) -> list[Form]:
    """Return a basis of the vectors of a space on which a form vanishes.

    Example:
        >>> one = Fraction(1)
        >>> found = vanishing([{0: one, 1: one}, {1: one, 2: one}], {1: one})
        >>> [{k: int(c) for k, c in v.items()} for v in found]
        [{2: 1, 0: -1}]
    """
    values = [sum((c * v.get(k, 0) for k, c in form.items()), Fraction(0)) for v in space]
    pivot = next((i for i, value in enumerate(values) if value), None)
    if pivot is None:
        return list(space)
    return [
        add_scaled(v, space[pivot], -value / values[pivot])
        for i, (v, value) in enumerate(zip(space, values, strict=True))
        if i != pivot
    ]


def sparse_basis(
    basis: Iterable[Mapping[int, int | Fraction]], counted: int | None = None
) -> list[Form]:
    """Return another basis of the same space with fewer and smaller exponents.

    Every vector is scaled to coprime integers; then multiples of others are added as long as that
    makes its largest exponent, or its number of entries, smaller. A weight with a symmetry of its
    own is always found as such when the basis given is fundamental (each free unknown in one
    vector only): the supports of a fundamental basis reveal the direct summands.

    Args:
        basis: independent vectors.
        counted: unknowns below this number are weights, the others follow them: a vector with
            one weight and no opposite signs is kept, however many follow. All are without.

    Example:
        >>> gain, q, k, v = range(4)
        >>> one = {gain: Fraction(1), k: Fraction(-2), v: Fraction(-1)}
        >>> two = {q: Fraction(1), k: Fraction(-1)}
        >>> [{k: int(c) for k, c in b.items()} for b in sparse_basis([one, two])]
        [{0: -1, 1: 1, 2: 1, 3: 1}, {1: 1, 2: -1}]
    """
    vectors = [_coprime(v) for v in basis]
    own = [_own(v, counted) for v in vectors]
    having: defaultdict[int, set[int]] = defaultdict(set)
    for i, v in enumerate(vectors):
        for k in v:
            having[k].add(i)
    # Those that changed since each vector was last compared with all beside it; None: all of them.
    changed: dict[int, set[int] | None] = dict.fromkeys(range(len(vectors)))
    compared = 0
    while changed and compared <= _MOST_COMPARED:
        for i in range(len(vectors)):
            if i not in changed:
                continue
            new = changed.pop(i)
            neighbours = set().union(*(having[k] for k in vectors[i])) - {i}
            if new is not None:
                neighbours &= new
            compared += len(neighbours)
            if compared > _MOST_COMPARED:
                break
            better = _shortened(i, vectors, own, sorted(neighbours), counted)
            if better is not None:
                beside = vectors[i].keys() | better.keys()
                for k in vectors[i]:
                    having[k].discard(i)
                vectors[i], own[i] = better, _own(better, counted)
                for k in better:
                    having[k].add(i)
                for j in set().union(*(having[k] for k in beside)):
                    seen = changed.setdefault(j, set())
                    if seen is not None:
                        seen.add(i)
                changed[i] = None
    return [{k: Fraction(c) for k, c in sorted(v.items())} for v in vectors]


_MOST_COMPARED = 200_000
"""After how many comparisons of two vectors a basis stays as it is: as good, and not as short."""
_Whole = dict[int, int]
"""A form with whole coefficients and no common divisor: faster than fractions by far."""
_Cost = tuple[bool, int, int, int]
"""What tells vectors apart, the better ones first."""


def _shortened(
    i: int,
    vectors: list[_Whole],
    own: Sequence[int],
    neighbours: Iterable[int],
    counted: int | None,
) -> _Whole | None:
    """Return a vector with a multiple of another one added that makes it shorter, if one does.

    Args:
        i: which vector.
        vectors: all of them.
        own: how many weights each has.
        neighbours: which may be added.
        counted: as for :func:`sparse_basis`.
    """
    here = vectors[i]
    best, best_cost = None, _cost(here, counted)
    sums = _Sums(here, counted)
    for j in neighbours:
        there = vectors[j]
        if _stays_longer(here, there, best_cost, counted):
            continue
        fewer, more = (there, here) if len(there) < len(here) else (here, there)
        both = {k: here[k] for k in fewer if k in more}
        stays_shared = own[i] + own[j] - 2 * len(both) > 1
        length = len(here) + len(there) - 2 * len(both)
        if stays_shared and (True, 1, length, 0) >= best_cost:
            continue
        stays_primitive = sums.ones > len(both)
        ratios = {_reduced(-c, there[k]) for k, c in both.items()}
        for up, down in sorted(ratios | {(1, 1), (-1, 1)}, key=lambda r: r[0] / r[1]):
            if down == 1:
                largest = max([abs(c + up * there[k]) for k, c in both.items()])
                if stays_shared and stays_primitive and largest > best_cost[1]:
                    continue
                known = sums.cost(there, up, both)
                if known is not None and known >= best_cost:
                    continue
            candidate = {k: down * c for k, c in here.items()}
            for k, c in there.items():
                candidate[k] = candidate.get(k, 0) + up * c
            candidate = _primitive({k: c for k, c in candidate.items() if c})
            if candidate and (cost := _cost(candidate, counted)) < best_cost:
                best, best_cost = candidate, cost
    return best


def _stays_longer(here: _Whole, there: _Whole, best: _Cost, counted: int | None) -> bool:
    """Return whether a sum of two vectors costs more than the best one, whatever its coefficients.

    What only one of them has stays.
    """
    shared, largest, length, _ = best
    if largest != 1:
        return False
    if counted is None:
        return len(there) - len(here) > max(length, 1)
    apart = here.keys() ^ there.keys()
    return len(apart) > length and (not shared or _own(apart, counted) > 1)


def _own(unknowns: Collection[int], counted: int | None) -> int:
    """Return how many unknowns are weights."""
    return len(unknowns) if counted is None else sum([k < counted for k in unknowns])


class _Sums:
    """What a vector would cost with multiples of others added to it, without adding them.

    Args:
        here: the vector.
        counted: as for :func:`sparse_basis`.
    """

    def __init__(self, here: _Whole, counted: int | None) -> None:
        self._here, self._counted = here, counted
        self._sizes = Counter(map(abs, here.values()))
        self.ones = self._sizes[1]
        self._descending = sorted(self._sizes, reverse=True)
        self._negative = sum([c < 0 for c in here.values()])
        self._own = _own(here, counted)

    def cost(self, there: _Whole, times: int, before: _Whole) -> _Cost | None:
        """Return the cost with a multiple of another vector; ``None`` where it has to be added.

        That is where nothing is left, or what is left may have a common divisor.

        Args:
            there: the other vector.
            times: how many times it is added.
            before: what of the vector the other one has, too.
        """
        after = {k: before.get(k, 0) + times * c for k, c in there.items()}
        after = {k: c for k, c in after.items() if c}
        gone, come = [*map(abs, before.values())], [*map(abs, after.values())]
        if self.ones == gone.count(1) and 1 not in come:
            return None
        count = len(self._here) - len(gone) + len(come)
        negative = self._negative + sum([c < 0 for c in after.values()])
        negative -= sum([c < 0 for c in before.values()])
        own = self._own + _own(after, self._counted) - _own(before, self._counted)
        left = (s for s in self._descending if self._sizes[s] > gone.count(s))
        largest = max(next(left, 0), *come) if come else next(left, 0)
        return _cost_of(count, own, negative, largest)


def _reduced(up: int, down: int) -> tuple[int, int]:
    """Return a quotient in lowest terms, its denominator positive."""
    common = math.gcd(up, down) if down > 0 else -math.gcd(up, down)
    return up // common, down // common


def _cost(v: _Whole, counted: int | None) -> _Cost:
    negative = sum([c < 0 for c in v.values()])
    return _cost_of(len(v), _own(v, counted), negative, max(map(abs, v.values())))


def _cost_of(count: int, own: int, negative: int, largest: int) -> _Cost:
    """Spheres first, then the largest exponent, the number of weights, and of opposite signs."""
    shared = own > 1 or 0 < negative < count
    return shared, largest, count, min(negative, count - negative)


def _coprime(v: Mapping[int, Fraction | int]) -> _Whole:
    """Scale to coprime integers; more positive exponents than negative ones, the first positive."""
    if not v:
        return {}
    common = math.lcm(*(c.denominator for c in v.values()))
    return _primitive({k: c.numerator * (common // c.denominator) for k, c in v.items()})


def _primitive(v: _Whole) -> _Whole:
    """Divide integers by what they have in common, and by a sign as :func:`_coprime` wants it."""
    divisor = math.gcd(*v.values())
    positive = sum([c > 0 for c in v.values()])
    if 2 * positive < len(v) or (2 * positive == len(v) and v and v[min(v)] < 0):
        divisor = -divisor
    return v if divisor == 1 else {k: c // divisor for k, c in v.items()}
