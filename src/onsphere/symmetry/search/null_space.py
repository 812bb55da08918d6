r"""Search the numbers for symmetries that units cannot see.

A bias of a module that is used twice, and centred away in one of its two places, has an effect and
yet constrains nothing there. Such symmetries are null vectors of the matrix of radial derivatives
:math:`\langle p_i, \nabla_{p_i}\langle v_k, f\rangle\rangle` (a row per combination of outputs
:math:`v_k`) beyond those that the units gave. Each one found is only a candidate: it must hold far
from where it was seen.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from onsphere.symmetry.exact.units.linear_forms import Constraints, in_span, sparse_basis
from onsphere.symmetry.numeric.certificate import RADIAL_TOLERANCE, Exponents, withstands
from onsphere.symmetry.numeric.probe import Point, Probe
from onsphere.symmetry.numeric.radial_derivatives import RadialRows, join, radial_rows
from onsphere.symmetry.numeric.slopes import slope_differs

SEARCH_SECONDS = 2.0
"""How long the search may take by default; a larger model's symmetries are those of its units."""
SMALLEST_GAP = 1e3
"""Ratio of neighbouring singular values that separates a null space from small numbers."""
_SPARE_ROWS = 4
_LEAST_POINTS = 3
_ROUNDS = 3
"""How often as many rows are measured again where they leave directions that are no symmetry."""
_LARGE = 2**14
"""From how many entries on a weight that is known to live on a sphere is not measured again."""
_IDLE_POINTS = 12
"""After how many points in a row that tell nothing the search is given up, or gradients are taken
as they are where differences deny them."""


@dataclass(frozen=True)
class Completed:
    """What the search for further symmetries gave.

    Args:
        found: a basis of known and new symmetries of the parameters.
        complete: whether the search was made.
        hidden: whether the numbers do not tell if there are more, since rounding hides it.
    """

    found: list[dict[str, Fraction]]
    complete: bool
    hidden: bool = False


def completed(
    probe: Probe,
    claims: Sequence[dict[str, Fraction]],
    seconds: float,
    draw: Callable[[int], Point],
    unreached: Collection[str] = (),
    search_seconds: float = SEARCH_SECONDS,
) -> Completed:
    """Add the symmetries that only the numbers show, while looking for them is cheap.

    Args:
        probe: the model.
        claims: the symmetries that the units gave.
        seconds: how long one row takes.
        draw: makes the n-th random point.
        unreached: weights that no input reaches, which is said of the audit as a whole.
        search_seconds: how long the search may take.
    """
    # Gradients say nothing of a symmetry along which a buffer moves that the model writes.
    tangent = [v for v in claims if probe.traced.moving.isdisjoint(v)]
    names = _measured_names(probe, tangent)
    seen = [v for v in tangent if not v.keys().isdisjoint(names)]
    count = len(names) - len(seen) + _SPARE_ROWS
    if seconds * count > search_seconds:
        return Completed(list(claims), complete=False)
    end, found = time.thread_time() + 2 * search_seconds, None
    rows: list[RadialRows] = []
    for _ in range(_ROUNDS):
        more, enough = _measured(probe, names, seen, count, draw, len(rows), end)
        if not more or not enough:
            hidden = more is None
            return Completed(list(claims), enough and not hidden, hidden)
        rows += more
        measured = join(rows)
        found = missed_symmetries(measured, seen)
        if found is not None:
            break  # else too few directions were seen: what is left over is no symmetry
    known = {next(iter(v)) for v in claims if len(v) == 1}
    # A gradient of exactly 0 may mean that no input reached a weight.
    bounds = zip(measured.names, measured.bounds.amax(0).tolist(), strict=True)
    silent = {n for n, bound in bounds if bound == 0} - known - set(unreached)
    unclear = found is None
    basis = extended(probe, claims, found or [], silent)
    return Completed(basis, complete=not unclear, hidden=unclear)


def _measured_names(probe: Probe, claims: Sequence[Exponents]) -> list[str]:
    """Return the weights to measure: the large ones that are spheres alone tell nothing new."""
    alone = {next(iter(v)) for v in claims if len(v) == 1}
    state = probe.given().state
    large = {n for n in alone if n in probe.own_name and state[probe.own_name[n]].numel() >= _LARGE}
    return [n for n in probe.names if n not in large]


def _measured(
    probe: Probe,
    names: Sequence[str],
    claims: Sequence[dict[str, Fraction]],
    count: int,
    draw: Callable[[int], Point],
    first: int,
    end: float,
) -> tuple[list[RadialRows] | None, bool]:
    """Measure so many rows that tell something, from the first point on, while there is time.

    Returns:
        The rows, and whether there was time; ``None`` where rounding hides what they tell, no rows
        where there is nothing to tell.
    """
    rows: list[RadialRows] = []
    denied: list[RadialRows] = []  # where differences do not bear out the gradients
    total, idle, hidden, asked = 0, 0, False, True
    while total < count:
        point = draw(first + len(rows) + len(denied))
        size = sum(t.numel() for t in probe.baseline(point))
        share = math.ceil(count / _LEAST_POINTS)
        part = radial_rows(probe, point, min(max(size, 1), count - total, share), names=names)
        if not len(part.values):
            return [], True
        part = _telling(part, claims)
        hidden |= bool(part.bounds.any())
        wrong = asked and len(part.values) > 0 and slope_differs(probe, point, names)
        (denied if wrong else rows).append(part)
        seen = 0 if wrong else len(part.values)
        idle = 0 if seen else idle + 1
        if idle == _IDLE_POINTS:
            if not denied:
                return (None if hidden else []), True
            # Gradients are as they are, mostly of a model that detaches something.
            seen, idle, asked = sum(len(r.values) for r in denied), 0, False
            rows, denied = [*rows, *denied], []
        total += seen
        if time.thread_time() > end:
            return [], False
    return rows, True


def _telling(rows: RadialRows, known: Sequence[Exponents]) -> RadialRows:
    """Leave out rows of zeros, and rows lost in rounding: they deny symmetries that hold."""
    good = (rows.bounds > 0).any(1)
    for claim in known:
        e = torch.tensor([float(claim.get(n, 0)) for n in rows.names], dtype=torch.float64)
        allowed = 10 * RADIAL_TOLERANCE * (rows.bounds @ e.abs()) + 1e-9 * rows.bounds.sum(1)
        good &= (rows.values @ e).abs() <= allowed
    return RadialRows(rows.names, rows.values[good], rows.bounds[good], rows.outputs[good])


def extended(
    probe: Probe,
    claims: Sequence[dict[str, Fraction]],
    candidates: Sequence[dict[str, Fraction]],
    silent: Collection[str] = (),
) -> list[dict[str, Fraction]]:
    """Add candidates that are news about the parameters and withstand refutation.

    Args:
        probe: the model.
        claims: symmetries that are known.
        candidates: what may be further ones.
        silent: weights of which no gradient was seen.
    """
    index = {n: i for i, n in enumerate(probe.traced.parameters)}
    kept, seen = list(claims), Constraints(len(index))
    for claim in claims:
        seen.require_zero({index[n]: e for n, e in claim.items() if n in index})
    for candidate in candidates:
        form = {index[n]: e for n, e in candidate.items() if n in index}
        if seen.reduced(form) and withstands(probe, candidate, _doubted(candidate, claims, silent)):
            seen.require_zero(form)
            kept.append(candidate)
    return kept


def _doubted(
    candidate: Exponents, claims: Sequence[Exponents], silent: Collection[str]
) -> set[str]:
    """Return the silent weights that a candidate scales, or that a claim scales along with it.

    That an expert which no input reached needs not be scaled with the others shows nothing.
    """
    along = {n for claim in claims if not candidate.keys().isdisjoint(claim) for n in claim}
    return (along | candidate.keys()) & set(silent)


def missed_symmetries(
    rows: RadialRows, known: Sequence[Exponents]
) -> list[dict[str, Fraction]] | None:
    """Return rational null vectors of the radial derivatives beyond the known symmetries.

    Args:
        rows: radial derivatives at random weights, more of them than columns less known symmetries.
        known: symmetries that the units gave.

    Returns:
        A sparse basis of known and new ones together when the numbers show a clear gap and the
        null space is rational with small entries; ``None`` where it is not, and nothing where
        there are no new ones. The new ones are candidates: they still need certificates.
    """
    null = _numeric_null_space(rows)
    if null is None or null.shape[1] <= len(known):
        return []
    position = {n: i for i, n in enumerate(rows.names)}
    vectors = []
    for row in _reduced_echelon(null.T):
        entries = {
            i: Fraction(x).limit_denominator(24)
            for i, x in enumerate(row.tolist())
            if abs(x) > 1e-6
        }
        if any(abs(float(f) - row[i].item()) > 1e-6 or abs(f) > 24 for i, f in entries.items()):
            return None
        vectors.append(entries)
    mapped = [{position[n]: e for n, e in k.items() if n in position} for k in known]
    if not all(in_span(mapped, vectors)):
        return None
    return [{rows.names[i]: e for i, e in v.items()} for v in sparse_basis(vectors)]


def _numeric_null_space(rows: RadialRows) -> Tensor | None:
    scale = rows.bounds.square().mean(0).sqrt()
    largest = float(scale.max()) if len(scale) else 0.0
    if not largest:
        return None
    scale = torch.where(scale <= 1e-9 * largest, torch.full_like(scale, largest), scale)
    matrix = rows.values / scale
    matrix = matrix / rows.bounds.div(scale).norm(dim=1, keepdim=True).clamp_min(1e-300)
    if not bool(matrix.isfinite().all()):
        return None
    _, s, vh = torch.linalg.svd(matrix)
    padded = torch.cat([s, s.new_zeros(1)]).clamp_min(1e-17 * float(s[0]))
    ratios = torch.where(s > 1e-12 * s[0], s / padded[1:], torch.zeros_like(s))
    rank = int(ratios.argmax()) + 1  # the widest gap between signal and rounding
    if float(ratios.max()) < SMALLEST_GAP:
        return None
    return vh[rank:].T / scale[:, None] * largest


def _reduced_echelon(rows: Tensor) -> Tensor:
    """Gauss-Jordan elimination with complete pivoting by column scale."""
    rows = rows.clone()
    rows = rows / rows.norm(dim=1, keepdim=True)
    for i in range(rows.shape[0]):
        rest = rows[i:].abs()
        flat = int(rest.argmax())
        r, c = i + flat // rows.shape[1], flat % rows.shape[1]
        rows[[i, r]] = rows[[r, i]]
        rows[i] = rows[i] / rows[i, c].clone()
        others = [j for j in range(rows.shape[0]) if j != i]
        rows[others] -= rows[others, c : c + 1] * rows[i]
    return rows
