"""The audit: every scale symmetry of a model, each with its certificate, in one object."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from onsphere._torch.execution import (
    ModelError,
    OutputPicker,
    bare_name,
    inputs_of,
    plain_execution,
    weights,
)
from onsphere._torch.materialize import on_gathered
from onsphere._torch.substitution import unchanged
from onsphere._torch.threads import threads_for
from onsphere._utils.garbage import seldom_collected
from onsphere.geometry import VectorAxes
from onsphere.symmetry.audit_result import Audit
from onsphere.symmetry.channels.certified import certified
from onsphere.symmetry.channels.families import families_of
from onsphere.symmetry.channels.followed import FollowedChannels, followed_channels
from onsphere.symmetry.channels.granularity import divisions
from onsphere.symmetry.claims import (
    Family,
    Leak,
    Limit,
    Rescaling,
    ScaleInvariance,
    ShiftFamily,
    Slices,
)
from onsphere.symmetry.embeddings import embeddings_and_heads
from onsphere.symmetry.exact.input_sampling import of_one
from onsphere.symmetry.exact.shifts.unknowns import Unknowns
from onsphere.symmetry.exact.trace import Call, Trace, Tracing, trace
from onsphere.symmetry.exact.units.linear_forms import further, in_span, sparse_basis
from onsphere.symmetry.limits import (
    on_another_model,
    on_constant,
    on_doubtful,
    on_gradients,
    on_hidden,
    on_large,
    on_moving,
    on_reads,
    on_refuted,
    on_rules_of_nothing,
    on_unreached,
    on_unread_entries,
    read_weights,
)
from onsphere.symmetry.numeric.certificate import (
    Certificate,
    Exponents,
    certify,
    is_alive,
)
from onsphere.symmetry.numeric.probe import NoGradients, Point, Points, Probe
from onsphere.symmetry.numeric.radial_derivatives import RadialDerivatives, gather
from onsphere.symmetry.numeric.reproduction import difference
from onsphere.symmetry.numeric.samples import Samples, random_points, samples
from onsphere.symmetry.result import Inputs, ModelReference
from onsphere.symmetry.search.granularity import described, entry_by_entry, finest_divisions
from onsphere.symmetry.search.null_space import SEARCH_SECONDS, Completed, completed, extended
from onsphere.symmetry.search.partial import Part, find_parts
from onsphere.symmetry.search.reach import followed, silent_weights, telling, unreached
from onsphere.symmetry.search.reach import without_effect as weights_without_effect
from onsphere.symmetry.search.shift import Shift, ShiftSearch
from onsphere.symmetry.shifts.certificate import certified as certified_shifts
from onsphere.symmetry.shifts.families import (
    families_in,
    follow_shifts,
    parts_without_effect,
    without_effect,
)
from onsphere.symmetry.shifts.single_weights import with_single_weights

__all__ = ["Audit", "Inputs", "audit"]

STAGES = {
    "following the operations": 4,
    "comparing the run in float64 with the model": 3,
    "drawing random weights and inputs": 7,
    "measuring gradients": 11,
    "looking for weights without effect": 9,
    "certifying on numbers": 5,
    "searching the numbers for further symmetries": 10,
    "looking at rows, columns and channels": 6,
    "certifying rows, columns and channels": 18,
    "looking for finer spheres and shifts": 12,
}
"""What is told of the progress of an audit, in its order, and about how long each takes."""
_STAGES_WITHOUT_MEMORY = {
    "following the operations": 1,
    "looking at rows, columns and channels": 5,
}
_TOLD, _FURTHER = 6, {False: 12, True: 3}
"""How many further points are mostly drawn, where operations tell of what is tested and where only
numbers do; by whether the model is large. Tells progress only."""
COTANGENTS = {False: (3, 3, 3), True: (2, 1)}
"""Random combinations of the outputs, at random weights first; by whether the model is large."""
_SHIFTS = 3
"""How many times more shifts are drawn at each further point: one amount may miss a threshold."""
_SHIFT_POINTS = 2
"""At how many points families of shifts are put to the test: operations have shown them already."""
_MUCH_LESS = 0.5
"""Share of the numbers given with which other inputs cost so much less that they are preferred."""


@on_gathered
def audit(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: OutputPicker | None = None,
    seed: int = 0,
    search_seconds: float = SEARCH_SECONDS,
    progress: bool | Callable[[str], None] | None = None,
) -> Audit:
    r"""Find every scale symmetry of a model, exactly, and certify each on numbers.

    A symmetry :math:`\{p_i: e_i\}` means :math:`f(a^{e_1}p_1, a^{e_2}p_2, \dots) = f(p)` for all
    :math:`a > 0`. Units of the executed operations give them over the rationals; float64
    evaluations certify them, find what cannot affect the output, and how finely spheres divide.

    Args:
        model: any module; audited in the mode it is in, and left as it was.
        args: positional inputs as ``torch.export`` takes them: a tuple, or one tensor. A dictionary
            (a batch) goes in by keyword where ``forward`` takes its keys, and else as it is.
        kwargs: keyword inputs.
        output: picks from the result the tensors that must not change; all float tensors without.
        seed: seed of the random cotangents, weights and inputs of the certificates.
        search_seconds: processor time for a search by numbers for symmetries that operations
            alone do not show; a backward pass per weight. Where it would take longer it is left
            out, which the audit says.
        progress: ``True`` for a bar with the time left (lines where the error stream is piped), or
            a function to be told what is being done, stage by stage.

    Returns:
        The audit. A model on the meta device is analysed without certificates.

    Raises:
        ModelError: no parameters, NaN in a parameter, an error in ``forward``, no float output.
        ValueError: ``search_seconds`` is no number, or less than 0.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = audit(net, (torch.randn(8, 3, generator=torch.Generator().manual_seed(0)),))
        >>> [(s.names, s.granularity) for s in found.spheres]
        [(('0.weight',), 'per row')]
        >>> found.inert
        ['0.bias']
    """
    if not isinstance(search_seconds, int | float | np.number) or not search_seconds >= 0:
        raise ValueError(f"search_seconds is a number, 0 or more, got {search_seconds!r}")
    args, kwargs = inputs_of(model, args, kwargs)
    from onsphere.report.progress import staged

    _check_device(model)
    _check_numbers(model)
    others: list[Call] = []
    without_memory = any(p.is_meta for p in model.parameters())
    costs = _STAGES_WITHOUT_MEMORY if without_memory else STAGES
    rarely = seldom_collected() if without_memory else nullcontext()
    with staged(progress, costs) as say, plain_execution(), rarely:
        say("following the operations")
        tracing = Tracing(model, args, kwargs, output=output)
        traced = tracing.trace()
        if without_memory:
            tracing.forget()
            say("looking at rows, columns and channels")
            traced, findings = _without_memory(model, args, kwargs, traced, output)
        else:
            probe = Probe(model, args, kwargs, traced, output=output, seed=seed)
            sizes = [traced.largest, *(p.numel() for p in model.parameters())]
            with threads_for(max(sizes)):
                traced, findings, others = _investigated(
                    probe, tracing, args, kwargs, search_seconds, say
                )
        found = _concluded(model, traced, findings)
    further = [x for x in others if x.state is None or found.shift_families]
    further = [replace(x, state=None) for x in further]  # copies of all weights are large
    inputs = Inputs(args, kwargs, output, ModelReference(model), tuple(further))
    with unchanged(traced.outside):
        kept = sorted(embeddings_and_heads(model, inputs))
    return replace(found, inputs=inputs, embeddings_and_heads=kept)


@dataclass(frozen=True)
class _Findings:
    """What the numbers add to the claims of the units."""

    claims: list[dict[str, Fraction]]
    certificates: list[Certificate] | None = None
    inert: list[str] = field(default_factory=list)
    divisions: Mapping[int, VectorAxes] = field(default_factory=dict)
    shifts: list[Shift] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    unreached: set[str] = field(default_factory=set)
    limits: list[Limit] = field(default_factory=list)
    conditions: list[str] = field(default_factory=list)
    complete: bool = False
    families: list[Family] = field(default_factory=list)
    shift_families: list[ShiftFamily] = field(default_factory=list)
    refuted: list[set[str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Runs:
    """Inputs on which the operations were followed: those given, and others, which tell more."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    others: Sequence[Call]
    telling: Sequence[Call]


def _without_memory(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    traced: Trace,
    output: OutputPicker | None,
) -> tuple[Trace, _Findings]:
    """Find what the operations alone tell."""

    def followed(inert: Collection[str], shifts: Unknowns | None = None) -> FollowedChannels:
        return followed_channels(
            model, args, kwargs, output=output, inert=inert, roles=traced.roles, shifts=shifts
        )

    unused = [] if traced.data_dependent else [*traced.unread]  # and so without effect
    unknowns = Unknowns(frozenset({*traced.still, *unused}), traced.kept)
    channels, shapes = followed(unused, unknowns), _shapes(model, traced.parameters)
    shifts = with_single_weights([f.family for f in families_in(unknowns)[1]])
    free = without_effect(shifts, shapes)
    inert = [*free, *unused]
    del unknowns  # of a large decoder: hundreds of megabytes
    if free:
        traced = trace(model, args, kwargs, output=output, inert=inert)
        channels = followed(inert)
    found = _reached(families_of(channels), traced)
    claims = [dict(v) for v in traced.basis]
    if more := further(claims, _whole_exponents(found, shapes)):
        claims = _sparse([*claims, *more], traced)
    return traced, _Findings(
        claims, inert=inert, divisions=divisions(claims, found, shapes),
        families=found, shift_families=shifts,
        parts=list(_known(shifts, inert).values()),
        limits=[*on_reads(traced, True), *on_large(channels.left_out)],
        conditions=[
            *on_unread_entries(traced),
            *of_one((args, kwargs), (), ", and no other is tried without memory"),
        ],
    )  # fmt: skip


def _investigated(
    probe: Probe,
    tracing: Tracing,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    search_seconds: float,
    say: Callable[..., None],
) -> tuple[Trace, _Findings, list[Call]]:
    """Certify what the units claim, and find what only numbers can tell."""
    say("comparing the run in float64 with the model")
    differs = difference(probe, args, kwargs)
    if differs is not None:
        return (
            probe.traced,
            _Findings([], [], limits=[*on_reads(probe.traced), on_another_model(differs)]),
            [],
        )
    say("drawing random weights and inputs")
    probe.traced, others = followed(probe, tracing, args, kwargs)
    tracing.forget()
    conditions = probe.others.words()
    drawn, runs = samples(probe), _Runs(args, kwargs, others, telling(probe.traced, others))
    try:
        found = _with_gradients(probe, runs, drawn, search_seconds, say)
    except NoGradients as error:
        found = _without_gradients(probe, str(error), runs, drawn, say)
    conditions += on_unreached(unreached(probe.traced) | found.unreached)
    conditions += on_unread_entries(probe.traced)
    return probe.traced, replace(found, conditions=conditions), others


def _whole_exponents(
    families: Sequence[Family], shapes: Mapping[str, Sequence[int]]
) -> list[dict[str, Fraction]]:
    """Return how whole weights scale along families, all channels alike.

    What is written into a part of a tensor and read from there is followed by channel only.
    Families that move estimates along are left out: those have a unit of their own.
    """
    told = (f for f in families if not f.followers and set(f.names) <= shapes.keys())
    found = [f.whole_exponents(shapes) for f in told]
    return [v for v in found if v]


def _further_wholes(
    probe: Probe, claims: Sequence[Exponents], families: Sequence[Family]
) -> list[dict[str, Fraction]]:
    """Return what families say of whole weights beyond what is claimed of them."""
    state = probe.given().state
    shapes = {n: tuple(state[own].shape) for n, own in probe.own_name.items()}
    return further(claims, _whole_exponents(families, shapes))


def _counted(
    points: Iterable[Point], count: int, say: Callable[..., None], stage: str
) -> Iterator[Point]:
    """Yield points, and say how far a stage is that looks at about so many."""
    for i, point in enumerate(points):
        say(stage, min(i / count, 1.0))
        yield point


def _families(
    probe: Probe,
    drawn: Samples,
    channels: FollowedChannels,
    unsaid: set[str],
    say: Callable[..., None],
) -> tuple[list[Family], list[Family]]:
    """Return the symmetries by row, column and channel that pass their certificate, and others."""
    found = _reached(families_of(channels), probe.traced)
    said = [f for f in found if unsaid.isdisjoint(f.names) and set(f.names) <= set(probe.names)]
    stage = "certifying rows, columns and channels"
    say(stage)
    count = len(drawn.near) + (0 if drawn.large else _TOLD)
    held = certified(probe, said, Points(_counted(drawn.told, count, say, stage)))
    return held, [f for f in said if not any(f is other for other in held)]


def _reached(families: Sequence[Family], traced: Trace) -> list[Family]:
    """Leave out the families of which other entries than those that were read would know more."""
    unread = traced.unread_entries
    return [
        f for f in families
        if all(_holds_beyond(f, n, unread[n]) for n in unread.keys() & set(f.names))
    ]  # fmt: skip


def _holds_beyond(family: Family, name: str, unread: NDArray[np.bool_]) -> bool:
    """Return whether a family holds whatever further entries of a weight are read.

    It does where these scale as those do that were read, and where each of its channels stands at
    one of the places at which reading may end, as a matrix of one of several experts does.
    """
    ends = [a for a in range(unread.ndim) if (unread.any(a) != unread.all(a)).any()]
    own = replace(family, slices=tuple(s for s in family.slices if s.name == name))
    amounts = 1.0 + torch.arange(family.count, dtype=torch.float64).sqrt()
    factors = own.log_factors(amounts, {name: unread.shape})[name]
    if not any(bool(factors.diff(dim=a).any()) for a in ends):
        return True
    return all(_is_read_alone(s, unread, ends) for s in own.slices)


def _is_read_alone(slices: Slices, unread: NDArray[np.bool_], ends: Sequence[int]) -> bool:
    """Return whether each channel has one place along some axes, and all of it was read."""
    rest = tuple(a for a in range(unread.ndim) if a not in slices.axes)
    if not set(ends) <= set(slices.axes):
        return False
    if unread.any(rest).reshape(-1)[slices.index.numpy()].any():
        return False
    shape = [unread.shape[a] for a in slices.axes]
    places = np.unravel_index(slices.index.numpy(), shape)
    return not any(np.ptp(places[slices.axes.index(a)], 1).any() for a in ends)


def _channels(
    probe: Probe, runs: _Runs, inert: Sequence[str], shifts: Unknowns | None = None
) -> FollowedChannels:
    """Follow rows, columns and channels, and what moving weights adds where it is asked for."""
    return followed_channels(
        probe.model, runs.args, runs.kwargs, output=probe.output, inert=inert,
        others=runs.telling, roles=probe.traced.roles, shifts=shifts,
    )  # fmt: skip


def _unknown_shifts(probe: Probe) -> Unknowns:
    """Return by what weights may move, before any run demands anything."""
    traced = probe.traced
    return Unknowns(frozenset(traced.still | unreached(traced)), traced.kept)


def _shift_families(probe: Probe, unknowns: Unknowns, drawn: Samples) -> list[ShiftFamily]:
    """Return the weights that can move together, where random amounts confirm it."""
    few = drawn.random[:_SHIFT_POINTS]
    return with_single_weights(certified_shifts(probe, *families_in(unknowns), few))


def _with_gradients(
    probe: Probe,
    runs: _Runs,
    drawn: Samples,
    search_seconds: float,
    say: Callable[..., None],
) -> _Findings:
    """Certify by gradients and finite rescales, and look for what only numbers can tell."""
    say("measuring gradients")
    names = probe.traced.parameters
    evidence, shifts = _measured(probe, drawn)
    say("looking for weights without effect")
    shifting = _unknown_shifts(probe)
    channels = None
    candidates = silent_weights(probe, evidence, drawn)
    if candidates:  # some may be inert: it is not known which
        follow_shifts(
            probe.model, runs.args, runs.kwargs, shifting, output=probe.output, others=runs.telling
        )
    else:
        channels = _channels(probe, runs, [], shifting)
    moving = _shift_families(probe, shifting, drawn)
    free = without_effect(moving, _shapes(probe.model, names))
    candidates = [n for n in candidates if n not in free]  # structure tells of these
    effects = weights_without_effect(probe, candidates, evidence, drawn, runs.others)
    inert = [*effects.inert, *free]  # buffers, too
    silent = effects.unshown
    if inert:
        probe.traced = trace(
            probe.model, runs.args, runs.kwargs, output=probe.output, inert=inert,
            others=runs.telling,
        )  # fmt: skip
    traced = probe.traced
    unsaid = unreached(traced) | silent | effects.through_eps
    claims = [dict(v) for v in traced.basis if not _touches(v, unsaid - silent)]
    claims = told_by_units = [v for v in claims if not v.keys() <= silent]
    say("certifying on numbers")
    claims, certificates = _held(claims, certify(probe, claims, drawn.near, evidence))
    say("searching the numbers for further symmetries")
    more, search = _further(probe, claims, certificates, evidence, unsaid, search_seconds)

    def joined(
        more: Sequence[dict[str, Fraction]],
    ) -> tuple[list[dict[str, Fraction]], list[Certificate]]:
        more = [v for v in more if not _touches(v, unsaid)]
        if not more:
            return claims, certificates
        everything = [v for v in _sparse([*claims, *more], traced) if not v.keys() <= silent]
        return _held(everything, certify(probe, everything, drawn.near, evidence))

    claims, certificates = joined(more)
    say("looking at rows, columns and channels")
    if channels is None or inert:
        channels = _channels(probe, runs, inert)
    families, broken = _families(probe, drawn, channels, unreached(traced) | silent, say)
    claims, certificates = joined(_further_wholes(probe, claims, families))
    stage = "looking for finer spheres and shifts"
    say(stage)
    told = _told(certificates, evidence)
    alone = {next(iter(v)) for v in claims if len(v) == 1}
    alive = [n for n in names if n not in inert]
    shown = [n for n in alive if n not in effects.doubtful]
    repeats = 1 if drawn.large else 1 + _SHIFTS
    several = chain(drawn.random, *(drawn.further for _ in range(repeats)))
    count = len(drawn.random) + repeats * _FURTHER[drawn.large]
    moved = Points(_counted(several, count, say, stage))
    far = Points(chain(drawn.random, drawn.further))
    spheres = {n: t for v, t in zip(claims, told, strict=True) if len(v) == 1 for n in v}
    spheres = {n: t for n, t in spheres.items() if n in alive}
    families += entry_by_entry(probe, spheres, far, families)
    return _Findings(
        claims,
        certificates,
        inert,
        _divisions(probe, claims, families, inert, far, told),
        shifts.certified(probe, shown, moved, moving, drawn.random[:_SHIFT_POINTS]),
        find_parts(
            probe, [n for n in shown if n not in alone], drawn, evidence, _known(moving, inert)
        ),
        silent,
        [
            *on_reads(traced),
            *on_moving(traced),
            *on_large(channels.left_out),
            *on_doubtful({*effects.doubtful, *effects.through_eps}),
            *([on_hidden()] if search.hidden else []),
            *([] if any(is_alive(probe, point) for point in drawn.random) else [on_constant()]),
        ],
        complete=search.complete,
        families=families,
        shift_families=[f for f in moving if unsaid.isdisjoint(f.names)],
        refuted=_refuted([v for v in told_by_units if not _touches(v, unsaid)], claims, broken),
    )


def _is_transposed(roles: Collection[str]) -> bool:
    """Return whether a weight is that of transposed convolutions, and of no other ones."""
    return "transposed" in roles and "convolution" not in roles


def _known(moving: Sequence[ShiftFamily], inert: Collection[str]) -> dict[str, Part]:
    """Return the parts of vectors of which structure tells that they are inert."""
    told = parts_without_effect(moving, inert)
    return {n: Part(n, 0, i, "inert", change) for n, (i, change) in told.items()}


def _measured(probe: Probe, drawn: Samples) -> tuple[RadialDerivatives, ShiftSearch]:
    """Measure gradients, without those of buffers where an operation has none."""

    def measured() -> tuple[RadialDerivatives, ShiftSearch]:
        state, own = probe.given().state, probe.own_name
        shifts = ShiftSearch({n: state[own[n]].shape for n in probe.traced.parameters})
        return gather(probe, drawn.near, COTANGENTS[drawn.large], shifts.see), shifts

    try:
        return measured()
    except NoGradients:
        probe.drop_opaque()
        return measured()


def _without_gradients(
    probe: Probe, why: str, runs: _Runs, drawn: Samples, say: Callable[..., None]
) -> _Findings:
    """Certify by finite rescales alone."""
    traced = probe.traced
    say("certifying on numbers")
    inert = [n for n in traced.unread if not traced.data_dependent and n in probe.names]
    claims = [dict(v) for v in traced.basis if not _touches(v, unreached(traced))]
    told_by_units = [v for v in claims if not v.keys() <= {*inert}]
    claims, certificates = _held(claims, certify(probe, claims, drawn.near, None))
    more = extended(probe, claims, [{n: Fraction(1)} for n in read_weights(traced)])[len(claims) :]
    more, held = _held(more, certify(probe, more, drawn.near, None))
    claims, certificates = [*claims, *more], [*certificates, *held]
    say("looking at rows, columns and channels")
    shifting = _unknown_shifts(probe)
    channels = _channels(probe, runs, inert, shifting)
    families, broken = _families(probe, drawn, channels, unreached(traced), say)
    wholes = _further_wholes(probe, claims, families)
    more, held = _held(wholes, certify(probe, wholes, drawn.near, None))
    claims, certificates = [*claims, *more], [*certificates, *held]
    say("looking for finer spheres and shifts")
    far = Points(chain(drawn.near, drawn.further))
    told = _told(certificates, None)
    return _Findings(
        claims, certificates, inert, _divisions(probe, claims, families, inert, far, told),
        unreached=unreached(traced), families=families,
        shift_families=_shift_families(probe, shifting, drawn),
        refuted=_refuted(told_by_units, claims, broken),
        limits=[
            *on_reads(traced), *on_moving(traced), *on_large(channels.left_out), on_gradients(why)
        ],
    )  # fmt: skip


def _held(
    claims: Sequence[dict[str, Fraction]], certificates: Sequence[Certificate]
) -> tuple[list[dict[str, Fraction]], list[Certificate]]:
    """Keep the claims that passed."""
    pairs = [(v, c) for v, c in zip(claims, certificates, strict=True) if c.holds]
    return [v for v, _ in pairs], [c for _, c in pairs]


def _refuted(
    told: Sequence[Exponents], claims: Sequence[Exponents], broken: Sequence[Family]
) -> list[set[str]]:
    """Return the weights of each symmetry that units give and that the numbers refute."""
    index = {n: i for i, n in enumerate({n for v in [*told, *claims] for n in v})}
    rows, basis = ([{index[n]: e for n, e in v.items()} for v in some] for some in (told, claims))
    wholes = [set(v) for v, held in zip(told, in_span(rows, basis), strict=True) if not held]
    return [*wholes, *(set(f.names) for f in broken)]


def _further(
    probe: Probe,
    claims: Sequence[dict[str, Fraction]],
    certificates: Sequence[Certificate],
    evidence: RadialDerivatives,
    unsaid: set[str],
    search_seconds: float,
) -> tuple[list[dict[str, Fraction]], Completed]:
    """Return symmetries that units cannot see, and how the search for them went."""
    tangent = [v for v, c in zip(claims, certificates, strict=True) if c.tangent]
    step = probe.others.turns if probe.others.share < _MUCH_LESS else 1  # small inputs only

    def draw(n: int) -> Point:
        return random_points(probe, 1, turn=step * n)[0]

    seconds = evidence.seconds * (probe.others.share if step > 1 else 1.0)
    search = completed(probe, tangent, seconds, draw, unsaid, search_seconds)
    # A scale that is detached hides from gradients which weights act alone.
    detached = len(tangent) < len(claims) and seconds * len(probe.names) < search_seconds
    alone = probe.names if detached else read_weights(probe.traced)
    alone = [n for n in alone if n in probe.traced.parameters]
    candidates = [*search.found[len(tangent) :], *({n: Fraction(1)} for n in alone)]
    return extended(probe, claims, candidates)[len(claims) :], search


def _sparse(claims: Sequence[Exponents], traced: Trace) -> list[dict[str, Fraction]]:
    """Write symmetries of two sources in one basis, spheres first."""
    names = [*traced.parameters, *traced.buffers]
    index = {n: i for i, n in enumerate(names)}
    vectors = [{index[n]: e for n, e in v.items()} for v in claims]
    return [
        {names[i]: e for i, e in v.items()} for v in sparse_basis(vectors, len(traced.parameters))
    ]


def _told(
    certificates: Sequence[Certificate], evidence: RadialDerivatives | None
) -> list[RadialDerivatives | None]:
    """Return what gradients tell of each claim: nothing where they are not tangent to it."""
    return [evidence if c.tangent else None for c in certificates]


def _shapes(model: nn.Module, names: Collection[str]) -> dict[str, torch.Size]:
    """Return the shapes of parameters by name."""
    found = {bare_name(n): p.shape for n, p in model.named_parameters()}
    return {n: found[n] for n in names}


def _check_device(model: nn.Module) -> None:
    held = dict(model.named_parameters())
    absent = [bare_name(n) for n, p in held.items() if p.is_meta]
    if 0 < len(absent) < len(held):
        raise ModelError(
            f"{len(absent)} of {len(held)} parameters, as {absent[0]!r}, are on the meta device, "
            "and the others have values; give all of them values, or move the whole model with "
            '.to("meta")'
        )


def _check_numbers(model: nn.Module) -> None:
    broken = [
        bare_name(n) for n, p in model.named_parameters()
        if not p.is_meta and not bool(torch.isfinite(p.detach()).all())
    ]  # fmt: skip
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ModelError(f"parameter {broken[0]!r}{more} holds NaN or infinity")


def _touches(v: Exponents, names: set[str]) -> bool:
    return any(n in names for n in v)


def _divisions(
    probe: Probe,
    claims: Sequence[Exponents],
    families: Sequence[Family],
    inert: Sequence[str],
    points: Iterable[Point],
    evidence: Sequence[RadialDerivatives | None],
) -> dict[int, VectorAxes]:
    """Return how spheres divide: as families say, or finer where numbers show it."""
    state = probe.given().state
    said = divisions(claims, families, {n: state[own].shape for n, own in probe.own_name.items()})
    wanted = [
        i
        for i, v in enumerate(claims)
        if all(e > 0 for e in v.values())
        and not _touches(v, set(inert))
        and set(v) <= set(probe.names)
    ]
    spheres = [{n: float(e) for n, e in claims[i].items()} for i in wanted]
    found = finest_divisions(
        probe,
        spheres,
        points,
        [evidence[i] for i in wanted],
        [said.get(i, VectorAxes()) for i in wanted],
    )
    return dict(zip(wanted, found, strict=True))


def _concluded(model: nn.Module, traced: Trace, findings: _Findings) -> Audit:
    claims, certificates = findings.claims, findings.certificates
    inert, divisions = findings.inert, findings.divisions
    parameters, buffers = weights(model)
    shapes = {bare_name(n): tuple(t.shape) for n, t in {**parameters, **buffers}.items()}
    frozen = {bare_name(n) for n, p in parameters.items() if not p.requires_grad}
    spheres, rescalings, leaks = [], [], []
    for i, v in enumerate(claims):
        numbers: dict[str, Any] = {}
        if certificates is not None:
            numbers = {
                "residual": certificates[i].residual,
                "change": certificates[i].change,
                "tangent": certificates[i].tangent,
            }
            leaks.append(Leak(dict(v), certificates[i].leak))
        if len(v) == 1 and next(iter(v)) in inert:
            continue
        if all(e > 0 for e in v.values()):
            axes = divisions.get(i, VectorAxes())
            first = next(iter(v))
            words = described(axes, shapes[first], traced.roles.get(first, frozenset()))
            spheres.append(ScaleInvariance(dict(v), axes, words, **numbers))
        else:
            rescalings.append(Rescaling(dict(v), **numbers))
    follow = {_key(v): dict(f) for v, f in zip(traced.basis, traced.followers, strict=True)}
    return Audit(
        model=type(model).__name__,
        mode="train" if model.training else "eval",
        parameters={n: shapes[n] for n in traced.parameters},
        spheres=spheres,
        rescalings=rescalings,
        shifts=findings.shifts,
        inert=[n for n in traced.parameters if n in inert],
        families=findings.families,
        shift_families=findings.shift_families,
        parts=findings.parts,
        leaks=leaks,
        scale_symmetries=[dict(v) for v in claims],
        exact_symmetries=_spanned(traced.exact, claims),
        followers=[follow.get(_key(v), {}) for v in claims],
        unknown_ops=list(traced.unknown),
        taught_ops=list(traced.taught),
        unreached=sorted(unreached(traced) | findings.unreached),
        limits=[
            *findings.limits,
            *on_refuted(findings.refuted, traced),
            *on_rules_of_nothing(traced),
        ],
        conditions=findings.conditions,
        certified=certificates is not None,
        complete=findings.complete,
        frozen=[n for n in traced.parameters if n in frozen],
        transposed=[n for n in traced.parameters if _is_transposed(traced.roles.get(n, ()))],
    )


def _spanned(exact: Sequence[Exponents], claims: Sequence[Exponents]) -> list[dict[str, Fraction]]:
    """Keep the exact symmetries that follow from claims which passed their certificates."""
    index = {n: i for i, n in enumerate({n for v in [*exact, *claims] for n in v})}
    rows, basis = ([{index[n]: e for n, e in v.items()} for v in some] for some in (exact, claims))
    return [dict(v) for v, held in zip(exact, in_span(rows, basis), strict=True) if held]


def _key(v: Exponents) -> tuple[tuple[str, Fraction], ...]:
    return tuple(sorted(v.items()))
