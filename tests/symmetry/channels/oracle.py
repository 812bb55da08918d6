"""Judge what an audit says of rows, columns and channels, by evaluations and ranks alone.

Every family is put into practice: each of its channels multiplied by a power of two of its own, at
random weights and at every input of a case. And what was not claimed is looked for: the radial
derivative of every slice along every axis of every weight, for random combinations of the outputs
at many weights, is one matrix, and what all of its rows are orthogonal to is a symmetry to first
order. It counts as missed when a finite rescale by it leaves the outputs alone, too.

Some of these weights are drawn anew, with signs and sizes of their own. Near those given a large
bias keeps a channel above a clamp, and of channels raised to the power 16 the same one drowns all
others: both look like symmetries, and are none.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor, nn

from symmetry.judge import (
    FIXED,
    IllConditioned,
    Judge,
    Move,
    Place,
    State,
    copied,
    nudged,
    redrawn,
    vectors,
)
from symmetry.misses import scaled_names
from symmetry.networks import Case
from symmetry.oracle import Verdict, given_to_audit

_NULL = 1e-9
"""Largest singular value, relative to the largest one, that is 0."""
_CLEAR = 1e-7
"""Singular values between these two say nothing."""
_ROUNDING = 1e-13
"""Smaller ones are 0 for sure: where there is one above, derivatives at more weights tell."""
_STEADY = 1e-12
"""By how much derivatives change at most, relative to their size, where rounding stays rounding."""
_ROWS_AT_ONCE = 8
_MOST_PLACES = 60
_ANEW = 4
"""At how many weights that are drawn anew derivatives are taken at least, and rescales tried."""


def count_wrong(
    seeds: Iterable[int], report: Callable[[int, str], None], make: Callable[[int], Case]
) -> tuple[int, int, int]:
    """Audit random networks; count networks, those with a false family, and those with a miss."""
    networks = false = missed = 0
    for seed in seeds:
        try:
            verdicts = verdicts_on(make(seed))
        except IllConditioned:
            report(seed, "nothing to compare: ill conditioned everywhere")
            continue
        networks += 1
        kinds = {kind for kind, _ in verdicts}
        false += "false" in kinds
        missed += "missed" in kinds
        for kind, words in verdicts:
            report(seed, f"{kind}: {words}")
    return networks, false, missed


def verdicts_on(case: Case) -> list[Verdict]:
    """Audit a case, and judge what the audit says by channel."""
    from onsphere.symmetry import audit

    return verdicts_of(Judge(case), audit(*given_to_audit(case)))


def verdicts_of(judge: Judge, found: Any) -> list[Verdict]:
    """Judge an audit, or anything with the fields of one."""
    return [*_false(judge, found), *_missed(judge, found)]


def _false(judge: Judge, found: Any) -> Iterator[Verdict]:
    for family in found.families:
        changed = judge.changed_by(_following(family))
        if changed > judge.tolerance:
            kind = "note" if found.unreached else "false"
            yield kind, f"family {family.names}, output changes by {changed:.1e}"


def _following(family: Any) -> Move:
    """Multiply every channel of a family by a power of two of its own."""
    whole = max(abs(float(s.exponent)) for s in family.slices)

    def move(state: State, r: random.Random) -> State:
        powers = torch.tensor([float(r.randint(-3, 3)) for _ in range(family.count)]).double()
        shapes = {n: t.shape for n, t in state.items()}
        moved = family.log_factors(powers / whole if whole > 4 else powers, shapes)
        return {**state, **{n: state[n] * 2.0**v for n, v in moved.items()}}

    return move


class _Coordinates:
    """The logarithm of every entry of every weight, one after the other.

    Args:
        net: the network.
        without: weights that are left out.
    """

    def __init__(self, net: nn.Module, without: Iterable[str]) -> None:
        own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        parameters, buffers = scaled_names(net)
        left = {*without, *(n for n in buffers if n.split(".")[-1] == "index")}
        names = [n for n in (*parameters, *buffers) if n not in left]
        self.parameters = [n for n in parameters if n not in left]
        self.all_shapes = {n: tuple(t.shape) for n, t in own.items()}
        self.shapes = {n: self.all_shapes[n] for n in names}

    def of(self, logs: Mapping[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
        """Write by how much each entry moves, 0 where nothing is said."""
        zero = torch.zeros((), dtype=torch.float64)
        return torch.cat([
            logs.get(n, zero).double().broadcast_to(self.shapes[n]).reshape(-1)
            for n in names or self.shapes
        ])  # fmt: skip

    def apart(self, v: Tensor) -> dict[str, Tensor]:
        """Read a vector as what moves by how much."""
        sizes = [torch.Size(s).numel() for s in self.shapes.values()]
        parts = torch.split(v, sizes)
        return {n: p.reshape(s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    def slices(self) -> Tensor:
        """One row for each slice along each axis; a weight of one entry is one slice."""
        rows = []
        for name, shape in self.shapes.items():
            axes = [a for a, n in enumerate(shape) if n > 1]
            for axis in axes:
                for i in range(shape[axis]):
                    log = torch.zeros(shape, dtype=torch.float64)
                    log.select(axis, i).fill_(1.0)
                    rows.append(self.of({name: log}))
            if not axes:
                rows.append(self.of({name: torch.ones(shape, dtype=torch.float64)}))
        return torch.stack(rows)


def _claimed(found: Any, at: _Coordinates) -> Tensor:
    """Everything that the audit lets move, one row each, in the coordinates of parameters."""
    rows = []
    for v in [*found.scale_symmetries, *({n: 1} for n in found.inert)]:
        logs = {n: torch.tensor(float(e)) for n, e in v.items()}
        rows.append(at.of(logs, at.parameters))
    for sphere in found.spheres:
        rows += [at.of(log, at.parameters) for log in _vectors(sphere, at)]
    for family in found.families:
        channels = torch.eye(family.count, dtype=torch.float64)
        logs = (family.log_factors(channel, at.all_shapes) for channel in channels)
        rows += [at.of(log, at.parameters) for log in logs]
    for name in found.inert:
        for i in range(int(torch.Size(at.shapes.get(name, (0,))).numel())):
            log = torch.zeros(at.shapes[name], dtype=torch.float64)
            log.view(-1)[i] = 1.0
            rows.append(at.of({name: log}, at.parameters))
    for part in found.parts:
        for start, stop in part.intervals:
            if part.name in at.shapes:
                log = torch.zeros(at.shapes[part.name], dtype=torch.float64)
                inside = log.narrow(part.axis, start, stop - start)
                some = range(stop - start) if part.kind == "inert" else [slice(None)]
                for i in some:
                    inside.zero_()
                    inside.movedim(part.axis, 0)[i] = 1.0
                    rows.append(at.of({part.name: log}, at.parameters))
    size = sum(torch.Size(at.shapes[n]).numel() for n in at.parameters)
    return torch.stack(rows) if rows else torch.zeros(0, size, dtype=torch.float64)


def _vectors(sphere: Any, at: _Coordinates) -> Iterator[dict[str, Tensor]]:
    """Each vector of a sphere, as what scales by how much."""
    places = {n: vectors(at.all_shapes[n], sphere.axes) for n in sphere.exponents}
    for k in range(max(int(p.max()) + 1 for p in places.values() if p.numel())):
        yield {n: float(sphere.exponents[n]) * (p == k).double() for n, p in places.items()}


def _missed(judge: Judge, found: Any) -> Iterator[Verdict]:
    at = _Coordinates(judge.net, found.unreached)
    if not at.parameters:
        return
    slices = at.slices()
    anew = list(islice(_places_anew(judge), _ANEW))
    derivatives, touched = _derivatives(judge, at, slices, anew)
    null = _null_space(derivatives)
    if null is None:
        yield "note", "no clear gap between derivatives and rounding"
        return
    size = sum(torch.Size(at.shapes[n]).numel() for n in at.parameters)
    moves = null @ slices
    # Entries that no input meets, such as rows of a table, move freely as far as inputs show.
    unmet = torch.eye(size, dtype=torch.float64)[~touched[:size]]
    told = _basis(torch.cat([_claimed(found, at), unmet]))
    free = moves[:, :size] - moves[:, :size] @ told.T @ told
    # Combinations of what moves that nothing claimed explains.
    u, s, _ = torch.linalg.svd(free, full_matrices=False)
    more = u[:, s > 1e-6 * max(1.0, float(s[0]) if len(s) else 0.0)].T @ moves
    if not len(more):
        return
    candidates = [*_echelon(more), torch.randn(len(more), dtype=torch.float64) @ more]
    everywhere = copy(judge)
    everywhere.places = [*judge.places, *anew]
    # Both ways: a channel that a ReLU cuts off at all places may be moved further down, not up.
    shown = [
        v for v in candidates
        if all(everywhere.changed_by(_moving(at, w)) <= judge.tolerance for w in (v, -v))
    ]  # fmt: skip
    words = f"{len(more)} directions beyond {len(told)} that were claimed"
    if shown:
        listed = [x.kind for x in found.limits]
        kind, said = ("note", f"limit {listed}: ") if listed else ("missed", "")
        names = {n for v in shown for n, t in at.apart(v).items() if float(t.abs().max()) > 1e-6}
        yield kind, f"{said}{words}, in {sorted(names)}"
    else:
        yield "note", f"{words}, to first order only"


def _moving(at: _Coordinates, v: Tensor) -> Move:
    def move(state: State, r: random.Random) -> State:
        size = r.choice((0.7, 2.0)) / float(v.abs().max())
        logs = at.apart(size * v)
        return {**state, **{n: state[n] * t.exp() for n, t in logs.items() if bool(t.any())}}

    return move


def _derivatives(
    judge: Judge, at: _Coordinates, slices: Tensor, anew: Sequence[Place]
) -> tuple[Tensor, Tensor]:
    """Radial derivatives of slices, and which entries have any.

    There are rows for random combinations of the outputs and for single entries, at the weights
    drawn ``anew`` and at others, until it is clear which directions have none.
    """
    touched = torch.zeros(slices.shape[1], dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    rows: list[Tensor] = []
    wanted = len(slices) + len(slices) // 4 + 10
    places = islice(chain(anew, _places(judge)), _MOST_PLACES)
    for number, place in enumerate(places):
        enough = len(rows) >= wanted and number >= len(anew) + 4
        if enough and _is_clear(torch.stack(rows)):
            break
        near = replace(place, state=nudged(place.state, 4e-16))
        seed = int(torch.randint(2**31, (), generator=generator))
        pairs = zip(
            _gradients(judge.net, place, at, seed),
            _gradients(judge.net, near, at, seed),
            strict=True,
        )
        for gradient, nearly in pairs:
            radial = at.of({n: place.state[n] * g for n, g in gradient.items()})
            touched |= radial != 0
            row = slices @ radial
            other = slices @ at.of({n: near.state[n] * g for n, g in nearly.items()})
            if 0 < float(row.norm()) < torch.inf and bool(
                (row - other).norm() < _STEADY * row.norm()
            ):
                rows.append(row / row.norm())
    none = torch.zeros(0, len(slices), dtype=torch.float64)
    return (torch.stack(rows) if rows else none), touched


def _places(judge: Judge) -> Iterator[Place]:
    """The judge's places with different weights first, then others, near them and anew in turn."""
    seen: set[int] = set()
    for place in judge.places:
        if id(place.state) not in seen:
            seen.add(id(place.state))
            yield place
    for seed in count(500):
        for draw in (redrawn, _drawn_anew):
            place = _drawn(judge, draw, seed)
            if place is not None:
                yield place


def _places_anew(judge: Judge) -> Iterator[Place]:
    """Places where all weights are drawn anew, as many as there are among a hundred."""
    places = (_drawn(judge, _drawn_anew, seed) for seed in range(900, 1000))
    return (place for place in places if place is not None)


def _drawn(judge: Judge, draw: Callable[[nn.Module, int], State], seed: int) -> Place | None:
    """A place at some weights, with one of the inputs."""
    inputs = judge.case.inputs
    return judge.place(draw(judge.net, seed), inputs[seed % len(inputs)], seed)


def _drawn_anew(net: nn.Module, seed: int) -> State:
    """Random weights and buffers with signs of their own, and sizes as well: not near the given."""
    generator = torch.Generator().manual_seed(seed)
    state = redrawn(net, seed)
    for name, t in state.items():
        last = name.split(".")[-1]
        fixed = last in FIXED or last.endswith("var") or not bool(t.isfinite().all())
        if t.is_floating_point() and t.numel() and not fixed:
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            size = 4.0 ** (2 * float(torch.rand((), generator=generator)) - 1)
            state[name] = size * float(t.square().mean().sqrt()) * noise
    return state


def _gradients(
    net: nn.Module, place: Place, at: _Coordinates, seed: int
) -> list[dict[str, Tensor]]:
    """Gradients of some rows of the outputs at a place; of buffers where there are any.

    Without them a buffer seems to move freely, and what moves with it seems to be no symmetry.
    """
    try:
        return list(_gradients_of(net, place, list(at.shapes), seed))
    except RuntimeError:
        return list(_gradients_of(net, place, at.parameters, seed))


def _gradients_of(
    net: nn.Module, place: Place, names: Sequence[str], seed: int
) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    copy, slots = copied(net)
    leaves = {n: t.detach().clone() for n, t in place.state.items()}
    for n in names:
        leaves[n].requires_grad_()
    for held, name, key in slots:
        held[name] = leaves[key]
    args = [t.clone() if isinstance(t, Tensor) else t for t in place.x]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(place.noise)
        result = copy(*args)
    outputs = result if isinstance(result, tuple | list) else (result,)
    outputs = [t for t in outputs if t.is_floating_point() and t.requires_grad]
    rows = min(_ROWS_AT_ONCE, sum(t.numel() for t in outputs))
    sizes = [t.numel() for t in outputs]
    for number in range(rows):
        flat = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
        if number % 2:  # a large entry hides what changes small ones
            flat = torch.where(flat == flat.max(), 1.0, 0.0)
        parts = zip(torch.split(flat, sizes), outputs, strict=True)
        cotangents = [part.reshape(t.shape).to(t.dtype) for part, t in parts]
        found = torch.autograd.grad(
            outputs, [leaves[n] for n in names], cotangents, retain_graph=True, allow_unused=True
        )
        yield {n: g.to_dense() for n, g in zip(names, found, strict=True) if g is not None}


def _is_clear(rows: Tensor) -> bool:
    """Whether what is not 0 stands far above what is."""
    s = torch.linalg.svdvals(rows)
    return not bool(((s > _ROUNDING * s[0]) & (s < _CLEAR * s[0])).any())


def _null_space(rows: Tensor) -> Tensor | None:
    """A basis of what all rows are orthogonal to; ``None`` where rounding blurs it."""
    if not len(rows):
        return torch.eye(rows.shape[1], dtype=torch.float64)
    _, s, vectors = torch.linalg.svd(rows, full_matrices=True)
    relative = s / s[0]
    if bool(((relative > _NULL) & (relative < _CLEAR)).any()):
        return None
    return vectors[int((relative > _NULL).sum()) :]


def _basis(rows: Tensor) -> Tensor:
    """Orthonormal rows that span the same."""
    if not len(rows):
        return rows
    _, s, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors[s > 1e-9 * float(s[0])]


def _echelon(rows: Tensor) -> list[Tensor]:
    """Another basis of the same space, each vector with a leading entry of its own."""
    rows = rows.clone()
    for i in range(len(rows)):
        column = int(rows[i].abs().argmax())
        if float(rows[i, column].abs()) < 1e-9:
            continue
        rows[i] = rows[i] / rows[i, column].clone()
        for j in range(len(rows)):
            if j != i:
                rows[j] = rows[j] - rows[j, column] * rows[i]
    return [v for v in rows if float(v.abs().max()) > 1e-9]
