"""Find what cannot affect the output: a key bias under softmax, a bias that a norm centres away.

A candidate has a gradient far below that of other weights for every combination of the outputs. It
counts as inert when that gradient is made of rounding (a change of the weights by 1e-12 makes
another one of it), and when it can be replaced by something large and random without changing
anything.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, cycle, islice, repeat

import torch
from torch import Tensor

from onsphere._torch.execution import ModelError
from onsphere.symmetry.numeric.certificate import (
    EPSILON,
    FINITE_TOLERANCE,
    NOISES,
    is_well_conditioned,
    relative_change,
    rounding,
    rounding_floor,
)
from onsphere.symmetry.numeric.group_testing import group_test
from onsphere.symmetry.numeric.probe import Point, Probe
from onsphere.symmetry.numeric.radial_derivatives import RadialRows, radial_rows
from onsphere.symmetry.numeric.samples import Samples

SILENT = 1e-8
"""Largest product of a weight's norm and its gradient's, relative to the largest of any weight,
that may be rounding of 0."""

_ACTS = 1e-6
"""The same product from which a gradient at a well-conditioned point is an effect."""
_SLOPES = {False: 2, True: 1}
"""Combinations of the outputs per point for which gradients are compared; by whether the model is
large."""
_VANISHING = 1e-24
"""Product of norms of weight and gradient, relative to the outputs, below which nothing is said:
a saturated softmax leaves such gradients where they should cancel."""
_CLEAR = 1e-12
"""The same product from which a gradient that withstands a nudge at one point is an effect."""
_EFFECT = 1e3
"""How many times the change that rounding explains is an effect, where many points are tried."""
_MOVES = ((0.1, 500.0), (1.0, 3e3), (30.0, 1e5))
"""How far weights are moved, and how many times rounding the output may change: adding a large
number and taking it away again rounds."""
_ONE_MOVE = _MOVES[1:2]
"""The one move of a large model, but at the first point."""
_TURNS = tuple((move,) for move in _MOVES)
"""Where many points are tried, these take turns."""


def inert_candidates(rows: RadialRows) -> list[str]:
    """Return weights whose gradient is lost in rounding in every row: candidates to be tested."""
    largest = rows.bounds.amax(1, keepdim=True).clamp_min(1e-300)
    share = (rows.bounds / largest).amax(0) if len(rows.bounds) else rows.bounds.sum(0)
    return [n for n, s in zip(rows.names, share.tolist(), strict=True) if s <= SILENT]


Slab = tuple[str, int, Sequence[tuple[int, int]]]
"""A weight, one of its axes, and intervals along it; axis -1 stands for the whole weight."""


def are_inert(
    probe: Probe, names: Sequence[str], points: Sequence[Point], drawn: Samples
) -> list[str]:
    """Return the weights that can be replaced by something else without changing any output.

    Args:
        probe: the model.
        names: candidates.
        points: where gradients are compared and weights are replaced.
        drawn: where they are replaced too, far away: what saturates has no gradient.
    """
    changes = are_inert_parts(probe, [(n, -1, ()) for n in names], points, drawn)
    return [n for n, change in zip(names, changes, strict=True) if change is not None]


def are_inert_parts(
    probe: Probe, parts: Sequence[Slab], points: Sequence[Point], drawn: Samples
) -> list[float | None]:
    """Replace parts of weights by something else; return how much the output changed.

    Args:
        probe: the model.
        parts: candidates.
        points: where gradients are compared and weights are replaced.
        drawn: where they are replaced too, far away: what saturates has no gradient.

    Returns:
        Per candidate a bound of the relative change of the output, which rounding explains, or
        ``None`` where the part has an effect.
    """
    real = _have_slopes(probe, parts, points, drawn)
    return _unmoved(probe, parts, [i for i, r in enumerate(real) if not r], points, drawn)


def are_doubtful(probe: Probe, names: Sequence[str], drawn: Samples) -> list[str]:
    """Return the weights that have a small gradient, though no replacement changes any output.

    Rounding of a few tokens may look like a gradient, and an effect may be smaller than rounding.

    Args:
        probe: the model.
        names: candidates that are not inert by :func:`are_inert`.
        drawn: where they are replaced.
    """
    acting = _acting_far_away(probe, drawn) if names else set()
    names = [n for n in names if n not in acting]
    parts: list[Slab] = [(n, -1, ()) for n in names]
    changes = _unmoved(probe, parts, range(len(parts)), drawn.near, drawn)
    return [n for n, change in zip(names, changes, strict=True) if change is not None]


def _acting_far_away(probe: Probe, drawn: Samples) -> set[str]:
    """Return the weights whose gradient is no rounding where tiny weights have ordinary sizes.

    Behind a layer scale of 1e-6 all gradients are small, and none is in doubt.
    """
    for point in islice(drawn.far, 1):
        rows = radial_rows(probe, point, 1)
        share = rows.bounds / rows.bounds.amax(1, keepdim=True).clamp_min(1e-300)
        largest = share.amax(0).tolist() if len(share) else [0.0] * len(rows.names)
        return {n for n, s in zip(rows.names, largest, strict=True) if s > _ACTS}
    return set()


def _unmoved(
    probe: Probe,
    parts: Sequence[Slab],
    tried: Iterable[int],
    points: Sequence[Point],
    drawn: Samples,
) -> list[float | None]:
    """Replace the parts with these numbers; return how much the output changed, as above."""
    alive = list(tried)
    largest = [0.0 if i in alive else math.inf for i in range(len(parts))]
    first = chain([_MOVES], repeat(_ONE_MOVE if drawn.large else _MOVES))
    near = zip(chain(points, drawn.far), repeat(1.0), first, strict=False)
    wide = zip(chain(drawn.wide, drawn.many), repeat(_EFFECT), cycle(_TURNS), strict=False)
    for point, most, moves in chain(near, wide):
        if not alive:
            break
        if not is_well_conditioned(probe, point):
            continue
        some = [parts[i] for i in alive]
        found = group_test(some, partial(_excess, probe, point, moves=moves), most)
        for i, excess in zip(alive, found, strict=True):
            largest[i] = max(largest[i], excess)
        alive = [i for i in alive if largest[i] <= most]
    allowed = 10 * FINITE_TOLERANCE
    return [allowed * e if i in alive else None for i, e in enumerate(largest)]


def act_through_eps(probe: Probe, parts: Sequence[Slab], points: Sequence[Point]) -> list[bool]:
    """Return which parts without effect at almost 0 eps have one at the real eps.

    In ``w**2 / (w**2 + 1e-2)`` that number is no eps: it is all that ``w`` acts by.

    Args:
        probe: the model.
        parts: what has no effect at almost 0 eps.
        points: where to test, beside the model's own weights on other inputs: among equal ones a
            norm divides rounding by its eps.
    """
    largest = [0.0] * len(parts)
    if not (probe.traced.eps and parts):
        return [False] * len(parts)
    own = [] if probe.large else [probe.given_elsewhere(turn=1)]
    moves = _ONE_MOVE if probe.large else _MOVES
    for point in (*points[:1], *own):
        if not probe.runs(point, real_eps=True):
            continue
        excess = partial(_excess, probe, point, real_eps=True, moves=moves)
        found = group_test(parts, excess, 1.0)
        # Conditions are looked at where they matter: where nothing moves, rounding does not.
        if max(found) > 1 and is_well_conditioned(probe, point, real_eps=True):
            largest = [max(pair) for pair in zip(largest, found, strict=True)]
    return [excess > 1 for excess in largest]


def _have_slopes(
    probe: Probe, parts: Sequence[Slab], points: Sequence[Point], drawn: Samples
) -> list[bool]:
    """Return which parts have gradients that are small, but not made of rounding.

    Behind a softmax of nearly equal scores, or a saturated one, a gradient may be as small as
    rounding elsewhere; yet it stays what it is when the weights change by 1e-12. At one point
    rounding, too, may stay what it is, where a softmax is saturated.
    """
    if not parts:
        return []
    own = [name for name, *_ in parts]
    gradients = partial(probe.gradients, count=_SLOPES[drawn.large], names=list(dict.fromkeys(own)))
    clear, agreeing = [False] * len(parts), [0] * len(parts)
    for point in chain(points, islice(drawn.far, 0 if drawn.large else 2)):
        near = probe.nudged(point, 1e-12)
        state = probe.generator.get_state()
        here = list(gradients(point))
        probe.generator.set_state(state)  # the same combinations of the outputs
        there = list(gradients(near))
        sizes = [float(point.state[probe.own_name[name]].norm()) for name in own]
        rows: list[list[tuple[bool, float]]] = [[] for _ in parts]
        for row, other in zip(here, there, strict=True):
            pairs = zip(_cut_out(parts, row.by_name), _cut_out(parts, other.by_name), strict=True)
            for i, (g, h) in enumerate(pairs):
                share = 0.0 if g is None else float(g.norm()) * sizes[i] / (row.output or 1.0)
                if g is not None and h is not None and share > _VANISHING:
                    rows[i].append((bool((g - h).norm() <= 0.1 * g.norm()), share))
        for i, seen in enumerate(rows):  # 0 for one combination only is rounding
            if seen and len(seen) == len(here) and all(agrees for agrees, _ in seen):
                agreeing[i] += 1
                clear[i] |= min(share for _, share in seen) > _CLEAR
    return [a or n > 1 for a, n in zip(clear, agreeing, strict=True)]


def _cut_out(parts: Sequence[Slab], gradients: Mapping[str, Tensor]) -> list[Tensor | None]:
    """Return the gradient of every part."""
    found: list[Tensor | None] = []
    for name, axis, intervals in parts:
        g = gradients.get(name)
        if g is not None and axis >= 0:
            g = torch.cat([g.narrow(axis, a, b - a).flatten() for a, b in intervals])
        found.append(g)
    return found


def _excess(
    probe: Probe,
    point: Point,
    parts: Sequence[Slab],
    *,
    real_eps: bool = False,
    moves: Sequence[tuple[float, float]] = _MOVES,
) -> float:
    """Return how much the output changes when parts are replaced, over what rounding explains."""
    worst, most = 0.0, 10 * FINITE_TOLERANCE
    for size, slack in moves:
        moved = _replaced(probe, point, parts, size)
        try:
            after = probe.outputs(moved, real_eps=real_eps)
        except ModelError:
            if size > _MOVES[0][0]:
                break  # the model does not run so far away
            return math.inf
        change = relative_change(probe.baseline(point, real_eps=real_eps), after)
        floor = EPSILON if real_eps else rounding_floor(probe, point)
        if change > slack * floor:
            floor = rounding_floor(probe, point, real_eps=real_eps)
        allowed = slack * floor
        if change > allowed:
            allowed = max(allowed, NOISES * rounding(probe, moved, after, real_eps))
        if size > _MOVES[0][0] and most < change <= allowed:
            break  # too far to tell: rounding alone does more than may be accepted
        worst = max(worst, change / min(most, allowed))
        if not worst <= 1:
            break
    return worst


def _replaced(probe: Probe, point: Point, parts: Sequence[Slab], size: float) -> Point:
    state = dict(point.state)
    for name, axis, intervals in parts:
        p = state[probe.own_name[name]]
        noise = torch.randn(p.shape, generator=probe.generator, dtype=torch.float64).to(p.device)
        moved = p + size * (p.abs().sum() / max(p.numel(), 1) + 1) * noise
        if axis >= 0:
            inside = torch.zeros(p.shape[axis], dtype=torch.bool, device=p.device)
            for start, stop in intervals:
                inside[start:stop] = True
            moved = torch.where(along(axis, inside, p.ndim), moved, p)
        state[probe.own_name[name]] = moved
    return replace(point, state=state)


def along(axis: int, values: Tensor, ndim: int) -> Tensor:
    """Shape a vector so that it broadcasts along one axis of a tensor with ``ndim`` axes."""
    return values.reshape([-1 if a == axis else 1 for a in range(ndim)])
