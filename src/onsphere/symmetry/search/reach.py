"""Which weights do the inputs reach, and which of those reached have no effect?

An expert that nobody asked has a gradient of exactly 0, or none at all, as a weight without any
effect has. So the operations are followed on several inputs, more of them where values decide what
runs, and what seems to have no effect is looked at on a large batch of different inputs. What no
input reached is called neither inert nor anything else.
"""

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import combinations
from typing import Any

from onsphere._torch.execution import ModelError
from onsphere.symmetry.exact.trace import Call, Trace, Tracing
from onsphere.symmetry.exact.units.linear_forms import in_span
from onsphere.symmetry.numeric.probe import Point, Probe
from onsphere.symmetry.numeric.radial_derivatives import RadialDerivatives
from onsphere.symmetry.numeric.samples import Samples
from onsphere.symmetry.search.inert import (
    act_through_eps,
    are_doubtful,
    are_inert,
    inert_candidates,
)

_IDLE_DRAWS = 4
"""After how many draws that reach nothing new no more are made."""
_PAIR_DRAWS = 16
"""How many draws are made at most so that what is reached apart is reached together."""
_PAIR_SECONDS = 3.0
"""And how long they may take."""
_MOST_APART = 64
"""Of how many weights pairs are looked at."""
_WIDE_SIZES = (1.0, 2.5, 0.4, 1.0, 5.0, 1.0)
"""Sizes of the weights at which a large batch shows what reaches which weight."""


def followed(
    probe: Probe, tracing: Tracing, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Trace, list[Call]]:
    """Follow the operations on other inputs too, and return these.

    Where values decide what runs, more inputs and other weights are drawn until every weight was
    met, or nothing new comes.

    Args:
        probe: the model.
        tracing: the run on the inputs given, from which the others go on.
        args: positional inputs as they were given.
        kwargs: keyword inputs as they were given.
    """
    given = Call(args, kwargs)
    others = [probe.others_like(given, turn) for turn in range(probe.others.turns)]
    traced = _traced(tracing, others)
    if traced is None:
        others = [call for call in others if _traced(tracing, [call]) is not None]
        traced = _traced(tracing, others) or probe.traced
    if not traced.data_dependent:
        return traced, others
    # What is reached alone demands nothing of what is reached with it: large batches show both.
    drawn = [_wide(probe, given, size, size < 2) for size in (1.0, 2.5, 1.0)]
    wide = [call for call in drawn if _traced(tracing, [call]) is not None]
    traced = _traced(tracing, [*others, *wide]) or traced
    unmet, idle = set(traced.unread), 0
    while unmet and idle < _IDLE_DRAWS:
        call = _wide(probe, given, (1.0, 2.5, 0.4)[idle % 3], idle % 2 == 0)
        found = _traced(tracing, [call])
        if found is None or unmet <= set(found.unread):
            idle += 1
            continue
        unmet &= set(found.unread)
        wide.append(call)
        idle = 0
    others += wide
    traced = _traced(tracing, others) or traced
    together = _together(probe, tracing, given, traced)
    if together:
        others += together
        traced = _traced(tracing, others) or traced
    return traced, others


def telling(traced: Trace, others: Sequence[Call]) -> Sequence[Call]:
    """Return those of the followed inputs that tell more than the first ones.

    Where no value decides anything, inputs of the shapes given, and further ones of another shape,
    say the same again if the same operations ran on them.

    Args:
        traced: the operations on the given inputs and on all others.
        others: the others, those of another shape first.
    """
    if traced.data_dependent or traced.decided:
        return others
    given, *ran = traced.operations
    return [x for k, x in enumerate(others) if not k or ran[k] not in {given, *ran[:k]}]


def _together(probe: Probe, tracing: Tracing, given: Call, traced: Trace) -> list[Call]:
    """Draw inputs that reach together what others have reached apart, such as two experts.

    What is reached apart demands nothing of each other, though it may be added up elsewhere.
    """
    apart, start = _apart(traced.met), time.thread_time()
    found: list[Call] = []
    for turn in range(_PAIR_DRAWS):
        if not apart or time.thread_time() - start > _PAIR_SECONDS:
            break
        call = _wide(probe, given, (1.0, 2.5, 0.4)[turn % 3], turn % 2 == 0)
        seen = _traced(tracing, [call])
        left = apart if seen is None else {p for p in apart if not p <= seen.met[-1]}
        if left < apart:
            apart = left
            found.append(call)
    return found


def _apart(met: Sequence[Set[str]]) -> set[frozenset[str]]:
    """Return the pairs of weights that some runs reached, and none together."""
    everywhere = frozenset.intersection(*map(frozenset, met))
    some = sorted(frozenset().union(*met) - everywhere)[:_MOST_APART]
    pairs = map(frozenset, combinations(some, 2))
    return {p for p in pairs if not any(p <= m for m in met)}


def _wide(probe: Probe, given: Call, size: float, anew: bool) -> Call:
    """Draw a large batch and other weights: the model's own may send all inputs the same way."""
    state = probe.redrawn(1.0, size, least=0.1, anew=anew).state
    return replace(probe.others_like(given, many=True), state=probe.in_types(state))


def _traced(tracing: Tracing, others: Sequence[Call]) -> Trace | None:
    """Follow the operations on several inputs, or return ``None`` if the model does not run."""
    try:
        return tracing.trace(others)
    except ModelError:
        return None


def unreached(traced: Trace) -> set[str]:
    """Return the weights that no input touched, where values decide what runs."""
    return set(traced.unread) if traced.data_dependent else set()


@dataclass(frozen=True)
class WithoutEffect:
    """What the numbers say of weights without gradients.

    Args:
        inert: they have no effect.
        unshown: no input shows whether they have one.
        through_eps: they have one through an eps only, which is no eps then.
        doubtful: they have a small gradient, and no effect that rounding does not explain.
    """

    inert: list[str]
    unshown: set[str] = field(default_factory=set)
    through_eps: set[str] = field(default_factory=set)
    doubtful: list[str] = field(default_factory=list)


def silent_weights(probe: Probe, evidence: RadialDerivatives, drawn: Samples) -> list[str]:
    """Return the weights and buffers that may be without effect: gradients show none."""
    # At an ill-conditioned point rounding can hide a zero, so one point is enough to be tested.
    rows = [evidence.radial(i) for i in range(len(drawn.random))]
    silent = {n for r in rows for n in inert_candidates(r)} - unreached(probe.traced)
    return [n for n in probe.names if n in silent]


def without_effect(
    probe: Probe,
    candidates: Sequence[str],
    evidence: RadialDerivatives,
    drawn: Samples,
    others: Sequence[Call],
) -> WithoutEffect:
    """Find weights without effect, and weights of which no input shows whether they have one.

    Args:
        probe: the model.
        candidates: weights that gradients do not show to have one, as :func:`silent_weights` does.
        evidence: what was gathered near the model's own weights.
        drawn: where gradients are compared and weights are replaced.
        others: inputs on which the operations were followed.
    """
    found = are_inert(probe, candidates, drawn.near, drawn)
    rest = [n for n in candidates if n not in found]
    doubtful = are_doubtful(probe, rest, drawn) if rest else []
    acting = act_through_eps(probe, [(n, -1, ()) for n in found], drawn.near)
    through_eps = {n for n, acts in zip(found, acting, strict=True) if acts}
    found = [n for n in found if n not in through_eps]
    state = probe.given().state
    doubted = [
        n for n in found
        if _never(n, evidence) and n not in probe.traced.unread
        and state[probe.own_name[n]].numel()
    ]  # fmt: skip
    if not doubted:
        return WithoutEffect(found, set(), through_eps, doubtful)
    # What few inputs reach shows on many of them; what is disconnected has no gradient at all.
    wide = [point for x in others if probe.runs(point := probe.on(x))]
    reached = {n for point in wide for n in probe.reached(point, doubted)}
    touched = {n for point in wide for n in _with_gradients(probe, doubted, point)}
    for turn, size in enumerate(_WIDE_SIZES):
        if touched <= reached:
            break
        point = probe.redrawn(1.0, size, least=0.1, many=True, anew=turn % 2 == 1)
        if not probe.runs(point):
            continue
        wide.append(point)
        reached |= probe.reached(point, doubted)
        touched |= _with_gradients(probe, doubted, point)
    effective = reached - set(are_inert(probe, sorted(reached), wide, drawn))
    stepwise = (set(doubted) & probe.traced.jumping) - touched - _free(probe.traced)
    unshown = (touched - reached) | stepwise
    inert = [n for n in found if n not in unshown | effective]
    return WithoutEffect(inert, unshown, through_eps, doubtful)


def _free(traced: Trace) -> set[str]:
    """Return the weights that units leave free.

    Others without any gradient, which meet numbers in comparisons, may act where these turn over:
    that it was not seen shows nothing.
    """
    index = {n: i for i, n in enumerate({n for v in traced.basis for n in v})}
    basis = [{index[n]: e for n, e in v.items()} for v in traced.basis]
    alone = in_span([{i: Fraction(1)} for i in index.values()], basis)
    return {n for n, free in zip(index, alone, strict=True) if free}


def _with_gradients(probe: Probe, names: Sequence[str], point: Point) -> set[str]:
    """Return the weights that have a gradient at a point, be it 0."""
    return {n for row in probe.gradients(point, 1, names=names) for n in row.by_name}


def _never(name: str, evidence: RadialDerivatives) -> bool:
    """Return whether the gradient of a weight was exactly 0 everywhere; what cancels is rounded."""
    slices = [row.weights[name][()] for row in evidence.rows if name in row.weights]
    return all(float(s.slope) == 0 for s in slices)
