r"""The least total norm among rescaled weights: a convex problem, and its solution in octaves.

Rescaling weights by :math:`2^{u_i}` with :math:`u` in the span of the symmetries turns the total
norm into :math:`f(u) = \sum_i 4^{u_i} w_i`, convex in :math:`u` (Kempf and Ness, 1979). At its
minimum every trade is balanced. Two things complicate it. Directions along which :math:`f` falls
for ever (spheres, or a trade against a weight that is 0) have no minimum: there the geometric mean
of the norms is kept. And some combinations of the :math:`u_i` may have to be whole numbers,
because a factor of two passes through any rounding unnoticed.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from onsphere.symmetry.exact.units.linear_forms import (
    Constraints,
    Form,
    add_scaled,
    in_span,
    row_space,
)

Vector = Mapping[str, Fraction]
"""Exponents by the name of a weight."""

_NEGLIGIBLE = 1e-9
"""A relative gain of the total norm by whole octaves smaller than this is none: a tie."""


@dataclass(frozen=True)
class Directions:
    """Where weights may move: freely along some vectors, in whole steps along others.

    Args:
        free: vectors that may be taken any real number of times.
        stepped: vectors that may be taken a whole number of times.
    """

    free: tuple[Form, ...]
    stepped: tuple[Form, ...]


def least_norm(
    symmetries: Sequence[Vector],
    squares: Mapping[str, float],
    *,
    fixed: Collection[str] = (),
    octaves: Sequence[Vector] = (),
    still: float = 1e-9,
) -> dict[str, float]:
    r"""Minimize :math:`\sum_i w_i 4^{u_i}` over :math:`u` in the span of the symmetries.

    Where the sum falls for ever, the geometric mean of each connected set of falling weights is
    kept. The result of a second call, at the weights that the first one gives, is nothing at all:
    whole steps are taken only if they gain something, and others only if they are larger than
    ``still``.

    Args:
        symmetries: exponents by name.
        squares: squared norms :math:`w_i`; what is 0 or not named does not count.
        fixed: names that stay where they are.
        octaves: combinations of the :math:`u_i` that must be whole numbers.
        still: a log2 scale that counts as rounding.

    Returns:
        The log2 scale of each name that moves.

    Example:
        >>> trade = {"in": Fraction(1), "out": Fraction(-1)}
        >>> {n: round(u, 6) for n, u in least_norm([trade], {"in": 16.0, "out": 2.0}).items()}
        {'in': -0.75, 'out': 0.75}
        >>> least_norm([trade], {"in": 16.0, "out": 2.0}, octaves=[{"in": Fraction(1)}])
        {'in': -1.0, 'out': 1.0}
    """
    counted = {n for n, w in squares.items() if w > 0}
    return LeastNorm(symmetries, counted, fixed=fixed, octaves=octaves).scales(squares, still)


class LeastNorm:
    """Where whole weights may move so that there is a least norm, for any sizes that they have.

    Args:
        symmetries: exponents by name.
        counted: names that count: of weights that are not 0.
        fixed: names that stay where they are.
        octaves: combinations of log2 scales that must be whole numbers.
    """

    def __init__(
        self,
        symmetries: Sequence[Vector],
        counted: Collection[str],
        *,
        fixed: Collection[str] = (),
        octaves: Sequence[Vector] = (),
    ) -> None:
        self.names = sorted({n for v in symmetries for n in v})
        index = {n: i for i, n in enumerate(self.names)}
        forms = [{index[n]: c for n, c in form.items() if n in index} for form in octaves]
        self._counts = torch.tensor([n in counted for n in self.names], dtype=torch.bool)
        basis = [{index[n]: c for n, c in v.items()} for v in symmetries]
        basis = row_space(basis, set(index.values()))
        basis = annihilated(basis, [{index[n]: Fraction(1)} for n in self.names if n in fixed])
        self._basis = _without_falling(basis, self._counts)
        self._parts = components(stepping(self._basis, forms), self._counts)

    def scales(self, squares: Mapping[str, float], still: float) -> dict[str, float]:
        """Return the log2 scale of each name that moves.

        Args:
            squares: squared norms by name.
            still: a log2 scale that counts as rounding.
        """
        sizes = [squares.get(n, 0.0) for n in self.names]
        weight = torch.tensor(sizes, dtype=torch.float64)
        total = torch.zeros(len(self.names), dtype=torch.float64)
        for directions in self._parts:
            total += _settled(directions, weight, still)
        return {n: u for n, u in zip(self.names, total.tolist(), strict=True) if u}

    def bounded_with(self, more: Sequence[Vector]) -> list[bool]:
        """Return of each vector whether moving along it as well leaves the sum a minimum.

        One after the other: what is taken counts for those behind it.

        Args:
            more: exponents by name, of names that count.

        Example:
            >>> joint = LeastNorm([{"a": Fraction(1), "b": Fraction(1)}], {"a", "b", "c"})
            >>> joint.bounded_with([{"a": Fraction(1), "c": Fraction(-1)}, {"c": Fraction(1)}])
            [True, False]
        """
        names = list(dict.fromkeys([*self.names, *(n for v in more for n in v)]))
        index = {n: i for i, n in enumerate(names)}
        own = len(self.names)
        counts = torch.cat([self._counts, torch.ones(len(names) - own, dtype=torch.bool)])
        space = [{k: c for k, c in v.items() if bool(counts[k])} for v in self._basis]
        vectors = [{index[n]: c for n, c in v.items() if c} for v in more]
        new = [v for v, known in zip(vectors, in_span(vectors, space), strict=True) if not known]
        if not new or not self._falls([*space, *new], counts):
            return [True] * len(vectors)
        found = []
        for v in vectors:
            known = in_span([v], space)[0]
            found.append(known or not self._falls([*space, v], counts))
            space += [v] if found[-1] and not known else []
        return found

    @staticmethod
    def _falls(vectors: list[Form], counts: Tensor) -> bool:
        return bool(_falling(_dense(vectors, len(counts)), counts).any())


def annihilated(basis: Sequence[Form], forms: Sequence[Form]) -> list[Form]:
    """Return a basis of the part of a space on which all forms vanish.

    Example:
        >>> basis = [{0: Fraction(1), 1: Fraction(-1)}, {2: Fraction(1)}]
        >>> found = annihilated(basis, [{1: Fraction(1), 2: Fraction(-1)}])
        >>> [{k: int(c) for k, c in v.items()} for v in found]
        [{0: 1, 1: -1, 2: -1}]
    """
    system = Constraints(len(basis))
    for form in forms:
        system.require_zero({j: x for j, v in enumerate(basis) if (x := _value(form, v))})
    return [_combination(basis, c) for c in system.fundamental_basis()]


def stepping(basis: Sequence[Form], forms: Sequence[Form]) -> Directions:
    """Tell directions that no form notices from those to be taken in whole steps.

    Each step is the smallest multiple of its vector that gives every form a whole number.

    Example:
        >>> one, half = Fraction(1), Fraction(1, 2)
        >>> found = stepping([{0: one, 1: -one}, {2: one}], [{0: half}])
        >>> [{k: int(c) for k, c in v.items()} for v in found.free + found.stepped]
        [{2: 1}, {0: 2, 1: -2}]
    """
    stepped: list[Form] = []
    rows: list[tuple[int, Form]] = []  # images in echelon form, each with its pivot
    for v in basis:
        image = {k: x for k, form in enumerate(forms) if (x := _value(form, v))}
        rest = dict(image)
        for pivot, row in rows:
            if pivot in rest:
                rest = add_scaled(rest, row, -rest[pivot] / row[pivot])
        if rest:
            rows.append((min(rest), rest))
            step = 1 / _common_divisor(list(image.values()))
            stepped.append({k: c * step for k, c in v.items()})
    return Directions(tuple(annihilated(basis, forms)), tuple(stepped))


def components(directions: Directions, counted: Tensor) -> list[Directions]:
    """Split directions into sets that share no weight that counts."""
    columns = [*directions.free, *directions.stepped]
    label = list(range(len(columns)))
    owner: dict[int, int] = {}
    for j, v in enumerate(columns):
        for k in v:
            if bool(counted[k]):
                old, new = label[owner.setdefault(k, j)], label[j]
                label = [new if x == old else x for x in label]
    free = len(directions.free)
    return [
        Directions(
            tuple(v for v, x in zip(columns[:free], label[:free], strict=True) if x == kind),
            tuple(v for v, x in zip(columns[free:], label[free:], strict=True) if x == kind),
        )
        for kind in dict.fromkeys(label)
    ]


def _without_falling(basis: list[Form], counted: Tensor) -> list[Form]:
    """Leave out directions along which the sum falls for ever.

    Which weights fall depends on the exponents alone, so it is decided with all norms equal.
    """
    while basis:
        dense = _dense(basis, len(counted))
        falling = _falling(dense, counted)
        if not bool(falling.any()):
            return basis
        basis = annihilated(basis, _geometric_means(dense, falling))
    return basis


def _falling(dense: Tensor, counted: Tensor) -> Tensor:
    return counted & (_newton(dense, counted.to(dense), steps=60) < -10)


def _geometric_means(dense: Tensor, falling: Tensor) -> list[Form]:
    """Return one form per connected set of falling weights: the log of their geometric mean."""
    u, s, _ = torch.linalg.svd(dense, full_matrices=False)
    projector = u[:, s > 1e-10 * s.max()]
    linked = (projector @ projector.T).abs() > 1e-9
    label = torch.arange(len(falling))
    for _ in range(len(falling)):
        spread = torch.where(linked, label[None, :], len(falling)).amin(1).minimum(label)
        if torch.equal(spread, label):
            break
        label = spread
    found = [((label == k) & falling).nonzero()[:, 0].tolist() for k in sorted({*label.tolist()})]
    return [{i: Fraction(1) for i in members} for members in found if members]


def _settled(directions: Directions, weight: Tensor, still: float) -> Tensor:
    """Move until another attempt would stay: that is what makes a canonical form final."""
    total = torch.zeros_like(weight)
    steps = _dense(directions.stepped, len(weight))
    free = _dense(directions.free, len(weight))
    for _ in range(50):
        now = weight * torch.exp2(2 * total)
        whole = _rounded(free, steps, now)
        move = steps @ whole + _newton(free, now * torch.exp2(2 * (steps @ whole)))
        if not bool(whole.any()) and float(move.abs().max()) <= still:
            break
        total += move
    return total


def _rounded(free: Tensor, steps: Tensor, weight: Tensor) -> Tensor:
    """Return how often to take each step: round the continuous minimum, then descend.

    Staying where it is wins a tie.
    """
    whole = weight.new_zeros(steps.shape[1])
    if not len(whole):
        return whole
    minimum = _newton(torch.cat([free, steps], 1), weight)
    nearest = torch.linalg.lstsq(torch.cat([free, steps], 1), minimum[:, None], driver="gelsd")
    nearest = nearest.solution[free.shape[1] :, 0].round()
    candidates = [_descended(free, steps, weight, k) for k in (nearest, whole)]
    here = _value_at(free, steps, weight, whole)
    for candidate in candidates:
        if _value_at(free, steps, weight, candidate) < here * (1 - _NEGLIGIBLE):
            return candidate
    return whole


def _descended(free: Tensor, steps: Tensor, weight: Tensor, whole: Tensor) -> Tensor:
    """Take single steps, and pairs of them, for as long as they gain something."""
    moves = _moves(steps)
    change = torch.exp2(2 * (steps @ moves.T))
    for _ in range(1000):
        at = weight * torch.exp2(2 * (steps @ whole))
        at = at * torch.exp2(2 * _newton(free, at))
        sums = at @ change
        best = int(sums.argmin())
        if not float(sums[best]) < float(at.sum()) * (1 - _NEGLIGIBLE):
            break
        whole = whole + moves[best]
    return whole


def _moves(steps: Tensor) -> Tensor:
    """Return single steps either way, and pairs of steps that share a weight."""
    one = torch.eye(steps.shape[1], dtype=steps.dtype)
    shared = (steps.abs().T @ steps.abs()).triu(1).nonzero()
    first, second = one[shared[:, 0]], one[shared[:, 1]]
    singles_and_pairs = torch.cat([one, first + second, first - second])
    return torch.cat([singles_and_pairs, -singles_and_pairs])


def _value_at(free: Tensor, steps: Tensor, weight: Tensor, whole: Tensor) -> float:
    at = weight * torch.exp2(2 * (steps @ whole))
    return float((at * torch.exp2(2 * _newton(free, at))).sum())


def _newton(columns: Tensor, weight: Tensor, steps: int = 200) -> Tensor:
    """Minimize by damped Newton; no log2 scale moves by more than 1 at a time."""
    u = torch.zeros_like(weight)
    if not columns.shape[1]:
        return u
    for _ in range(steps):
        terms = weight * torch.exp2(2 * u)
        # Each row of weights is scaled by its own share: tiny terms are resolved like large ones.
        root = terms.clamp_min(1e-280).sqrt()[:, None] * columns
        pull = torch.where(weight > 0, terms.sqrt(), 0.0)[:, None]
        step = -columns @ torch.linalg.lstsq(root, pull, driver="gelsd").solution[:, 0]
        step = step / (2 * math.log(2))
        reach = float(step.abs().max())
        step = step / max(reach, 1.0)
        while float((weight * torch.exp2(2 * (u + step))).sum()) > float(terms.sum()) * (1 + 1e-15):
            step = step / 2
            if float(step.abs().max()) < 1e-13:
                return u
        u = u + step
        if reach < 1e-12:
            break
    return u


def _dense(vectors: Sequence[Form], rows: int) -> Tensor:
    dense = torch.zeros(rows, len(vectors), dtype=torch.float64)
    for j, v in enumerate(vectors):
        for k, c in v.items():
            dense[k, j] = float(c)
    return dense


def _value(form: Form, vector: Form) -> Fraction:
    return sum((c * vector[k] for k, c in form.items() if k in vector), Fraction(0))


def _combination(basis: Sequence[Form], coefficients: Form) -> Form:
    total: Form = {}
    for j, c in coefficients.items():
        total = add_scaled(total, basis[j], c)
    return total


def _common_divisor(values: Sequence[Fraction]) -> Fraction:
    common = math.lcm(*(v.denominator for v in values))
    return Fraction(math.gcd(*(int(v * common) for v in values)), common)
