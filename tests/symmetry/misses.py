"""Look for scale symmetries that were not claimed: numeric derivatives suggest, rescales decide.

The derivative of every output along the log scale of every weight is taken by finite differences
of the function itself: autograd's gradient knows nothing of what a model detaches, rounds or
overwrites. Null vectors of these derivatives become fractions, and each is tried with large powers
of two. Where one fails, the place at which it fails says more: derivatives beyond it, or, where the
function jumps (a sign, a choice), how the jump moves with every weight.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from symmetry.judge import Judge, Place, State, change, redrawn

Symmetry = dict[str, Fraction]

DENOMINATORS = 12
"""Exponents are fractions with denominators up to this."""
LARGEST = 30
"""Larger exponents, and common denominators, are made of noise."""


@dataclass(frozen=True)
class _Steps:
    """How derivatives are taken, and which count as 0.

    Args:
        width: of the step along a log scale.
        agree: largest difference between the derivatives with two widths.
        null: largest singular value of a null vector.
        weak: largest derivative of a weight that is taken to have none.
    """

    width: float
    agree: float
    null: float
    weak: float


SMOOTH = _Steps(2e-4, 1e-5, 1e-5, 1e-7)
ROUGH = _Steps(0.05, 1e-2, 1e-2, 1e-3)
"""For a network that rounds to a shorter type inside."""


def scaled_names(net: nn.Module) -> tuple[list[str], list[str]]:
    """Parameters with entries, and the persistent floating-point buffers that may move along."""
    kept = {
        f"{path}.{name}" if path else name
        for path, module in net.named_modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }
    parameters = [n for n, p in net.named_parameters() if p.numel()]
    buffers = [n for n, b in net.named_buffers() if b.is_floating_point() and b.numel()]
    return parameters, [n for n in buffers if n in kept]


class Search:
    """Looks for the symmetries of one case that claims leave out.

    Args:
        judge: of the case.
        claims: symmetries that hold; what is sought lies outside their span.
        without: weights whose scale is left alone.
    """

    def __init__(
        self, judge: Judge, claims: Iterable[Mapping[str, Any]], without: Iterable[str] = ()
    ) -> None:
        self.judge, self.net = judge, judge.net
        self.steps = ROUGH if judge.case.rough else SMOOTH
        parameters, buffers = scaled_names(self.net)
        left = set(without)
        self.parameters = [n for n in parameters if n not in left]
        left |= {n for n in buffers if n.split(".")[-1] == "index"}  # whole numbers
        self.order = [*self.parameters, *(n for n in buffers if n not in left)]
        self.claims = [dict(v) for v in claims]
        # Claims can be taken away from any symmetry until it leaves their leading weights alone.
        leading = set(_leading(self.claims, self.order))
        self.free = [n for n in self.order if n not in leading]
        self.rows: list[Tensor] = []
        self.undecided, self.patience = False, 20

    def found(self) -> list[Symmetry]:
        """Symmetries outside the span of the claims, each shown by rescales; independent."""
        shown: list[Symmetry] = []
        failed: set[str] = set()
        self._look()
        for _ in range(4 * len(self.free) + 4):
            candidate = self._candidate(shown, failed)
            if candidate is None:
                break
            if self.judge.holds(candidate):
                shown.append(candidate)
            elif self.patience == 0 or not self._learn(candidate):
                failed.add(str(candidate))
                self.undecided = True
        return shown

    # --- derivatives

    def _fresh(self) -> Iterator[Place]:
        """Places with other weights than the judge's."""
        for seed in range(500, 600):
            inputs = self.judge.case.inputs
            place = self.judge.place(redrawn(self.net, seed), inputs[seed % len(inputs)], seed)
            if place is not None:
                yield place

    def _look(self) -> None:
        """Take derivatives at places with different weights, until there are enough rows."""
        if not self.free:
            return
        for place in islice(chain(_spread(self.judge.places), self._fresh()), 60):
            self.rows.append(self._derivatives(place))
            enough = sum(len(r) for r in self.rows) >= 2 * len(self.free) + 4
            if enough and len(self.rows) >= (3 if not self._null() else 8):
                break

    def _derivatives(self, place: Place) -> Tensor:
        """One row per entry of the outputs, one column per weight; rows across kinks are left out.

        Central differences of two widths: their errors have the ratio 4, and cancel.
        """
        sizes = [max(float(t.abs().nan_to_num(0, 0, 0).max()), 1e-300) for t in place.outputs]
        h = self.steps.width
        wide, narrow = (
            torch.stack([self._slope(place, n, width, sizes) for n in self.free], 1)
            for width in (h, h / 2)
        )
        rows = (4 * narrow - wide) / 3
        smooth = ((wide - narrow).abs() <= self.steps.agree * (1 + rows.abs())).all(1)
        return rows[smooth & (rows != 0).any(1)]

    def _slope(self, place: Place, name: str, h: float, sizes: Sequence[float]) -> Tensor:
        up, down = (place.after(self.net, _stretched(place.state, {name: s}, 1.0)) for s in (h, -h))
        if any(a.shape != b.shape for a, b in zip(up, down, strict=True)):
            return torch.full((sum(t.numel() for t in place.outputs),), float("nan")).double()
        parts = zip(up, down, sizes, strict=True)
        return torch.cat([((a.double() - b) / (2 * h * s)).flatten() for a, b, s in parts])

    def _null(self, shown: Sequence[Symmetry] = ()) -> list[Symmetry]:
        """Null vectors of what was seen, beside those shown; not those of buffers alone."""
        leading = set(_leading(shown, self.free))
        columns = [i for i, n in enumerate(self.free) if n not in leading]
        names = [self.free[i] for i in columns]
        if not names:
            return []
        seen = [r for r in self.rows if len(r)]
        matrix = torch.cat(seen)[:, columns] if seen else torch.zeros(1, len(columns)).double()
        null = _null_space(matrix, self.steps)
        basis = [_fractions(v, names) for v in _echelon(null)]
        return [v for v in basis if v and any(n in self.parameters for n in v)]

    def _candidate(self, shown: Sequence[Symmetry], failed: set[str]) -> Symmetry | None:
        return next((v for v in self._null(shown) if str(v) not in failed), None)

    # --- what a failure teaches

    def _learn(self, candidate: Symmetry) -> bool:
        """Add rows from where a candidate first fails; whether it is no null vector any more."""
        self.patience -= 1
        for place, power in islice(self._failures(candidate), 3):
            for rows in self._beyond(place, candidate, power):
                told = torch.tensor([float(candidate.get(n, 0)) for n in self.free]).double()
                against = (rows @ told).abs() if len(rows) else torch.zeros(0)
                if bool((against > 10 * self.steps.null * (1 + rows.abs().amax(1))).any()):
                    self.rows.append(rows)
                    return True
        return False

    def _failures(self, candidate: Symmetry) -> Iterator[tuple[Place, float]]:
        whole = lcm(*(e.denominator for e in candidate.values()))
        for power in (2.0, -2.0, 6.0, -6.0):
            for place in self.judge.places:
                state = _stretched(place.state, candidate, power * whole * _LOG2)
                after = place.after(self.net, state)
                if change(place.outputs, after) > self.judge.tolerance:
                    yield place, power * whole * _LOG2

    def _beyond(self, place: Place, v: Symmetry, length: float) -> Iterator[Tensor]:
        """Derivatives where the outputs have left their values, and how a jump moves, if any."""
        low, high = self._first(place, v, length)
        before, after = (place.after(self.net, _stretched(place.state, v, s)) for s in (low, high))
        if change(before, after) > self.judge.tolerance:
            yield self._jump(place, v, low)
        for share in (0.01, 0.1, 0.5, 1.0):
            state = _stretched(place.state, v, high + share * (length - high))
            there = self.judge.place(state, place.x, place.noise)
            if there is not None:
                yield self._derivatives(there)

    def _first(self, place: Place, v: Symmetry, length: float) -> tuple[float, float]:
        """Where the outputs leave their values: bisected to the last digits."""
        low, high = 0.0, length
        for _ in range(48):
            middle = (low + high) / 2
            moved = place.after(self.net, _stretched(place.state, v, middle))
            near = change(place.outputs, moved) <= self.judge.tolerance
            low, high = (middle, high) if near else (low, middle)
        return low, high

    def _jump(self, place: Place, v: Symmetry, where: float) -> Tensor:
        """The row that vanishes for what leaves a jump in its place.

        A log scale that moves by d moves the jump by s along v: the row has -s/d, and v gives 1.
        """
        d, row = 1e-4, []
        for name in self.free:
            up, down = (self._moved_jump(place, v, where, {name: s}) for s in (d, -d))
            if up is None or down is None or abs(up + down) > 1e-2 * abs(up - down) + 1e-7:
                return torch.zeros(0, len(self.free)).double()
            row.append(-(up - down) / (2 * d))
        return torch.tensor([row]).double()

    def _moved_jump(
        self, place: Place, v: Symmetry, where: float, push: Mapping[str, float]
    ) -> float | None:
        """How far a jump moves along v when the state is pushed; None where it is lost."""
        state = _stretched(place.state, push, 1.0)

        def at(s: float) -> list[Tensor]:
            return place.after(self.net, _stretched(state, v, where + s))

        for reach in (3e-4, 3e-3):
            low, high = -reach, reach
            first = at(low)
            if change(first, at(high)) <= self.judge.tolerance:
                continue
            for _ in range(30):
                middle = (low + high) / 2
                near = change(first, at(middle)) <= self.judge.tolerance
                low, high = (middle, high) if near else (low, middle)
            return low
        return None


_LOG2 = float(torch.tensor(2.0).double().log())


def _stretched(state: State, direction: Mapping[str, Any], length: float) -> State:
    """Move along a direction of log scales."""
    factors = {n: torch.tensor(float(e) * length).double().exp() for n, e in direction.items()}
    return {**state, **{n: state[n] * f for n, f in factors.items()}}


def _spread(places: Sequence[Place]) -> list[Place]:
    """Places in an order that begins with different weights, at one of their inputs in turn."""
    by_state: dict[int, list[Place]] = {}
    for place in places:
        by_state.setdefault(id(place.state), []).append(place)
    groups = list(by_state.values())
    turns = max(map(len, groups))
    return [g[(i + t) % len(g)] for t in range(turns) for i, g in enumerate(groups) if t < len(g)]


# --- linear algebra -----------------------------------------------------------------------------


def _leading(symmetries: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[str]:
    """Weights that lead the echelon form of some symmetries, exactly."""
    rows = [{n: Fraction(e) for n, e in v.items() if e} for v in symmetries]
    leading = []
    for name in order:
        row = next((r for r in rows if r.get(name)), None)
        if row is None:
            continue
        leading.append(name)
        rows.remove(row)
        for other in rows:
            ratio = other.get(name, Fraction(0)) / row[name]
            for n, e in row.items() if ratio else ():
                other[n] = other.get(n, Fraction(0)) - ratio * e
    return leading


def _null_space(matrix: Tensor, steps: _Steps) -> Tensor:
    """Null vectors, one per row; every column in units of its largest entry."""
    scale = matrix.abs().amax(0)
    weak = scale <= steps.weak
    scale = torch.where(weak, 1.0, scale)
    matrix = torch.where(weak, 0.0, matrix / scale)
    _, s, vh = torch.linalg.svd(matrix, full_matrices=True)
    rank = int((s > steps.null * max(1.0, float(s.max()))).sum())
    return vh[rank:] / scale


def _echelon(null: Tensor) -> Tensor:
    """Reduced echelon form, with the largest entries leading."""
    rows = null / null.abs().amax(1, keepdim=True).clamp_min(1e-300)
    for i in range(len(rows)):
        flat = int(rows[i:].abs().argmax())
        r, c = i + flat // rows.shape[1], flat % rows.shape[1]
        rows[[i, r]] = rows[[r, i]]
        rows[i] = rows[i] / rows[i, c]
        others = torch.arange(len(rows)) != i
        rows[others] = rows[others] - rows[others, c : c + 1] * rows[i]
    return rows


def _fractions(v: Tensor, names: Sequence[str]) -> Symmetry:
    """A null vector in fractions; empty where it is none."""
    entries = [Fraction(float(x)).limit_denominator(DENOMINATORS) for x in v]
    far = any(abs(float(q) - float(x)) > 1e-2 for q, x in zip(entries, v, strict=True))
    if far or max(map(abs, entries)) > LARGEST or lcm(*(q.denominator for q in entries)) > LARGEST:
        return {}
    return {n: q for n, q in zip(names, entries, strict=True) if q}
