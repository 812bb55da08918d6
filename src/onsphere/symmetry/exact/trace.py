"""Run a model once and write down what its operations demand of the units of its weights."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from onsphere._torch.execution import (
    ModelError,
    OutputPicker,
    bare_name,
    call,
    drawn_by_python,
    float_outputs,
    gradients_as_used,
    inputs_of,
    leaf_as,
    plain_execution,
    weights,
)
from onsphere._torch.materialize import on_gathered
from onsphere._torch.memory import key_of
from onsphere._torch.substitution import kept
from onsphere.symmetry.exact.coverage import unread
from onsphere.symmetry.exact.dispatch_mode import Reads, Tracer
from onsphere.symmetry.exact.eps_sites import EpsSite
from onsphere.symmetry.exact.input_sampling import InputUse, marked
from onsphere.symmetry.exact.operation import Origin, UnitTracker
from onsphere.symmetry.exact.shifts.tracker import ShiftTracker
from onsphere.symmetry.exact.shifts.unknowns import Unknowns
from onsphere.symmetry.exact.units.channel_demands import ChannelDemands
from onsphere.symmetry.exact.units.fields import NONE, Fields
from onsphere.symmetry.exact.units.linear_forms import (
    ANY,
    Constraints,
    Form,
    Unit,
    row_space,
    sparse_basis,
)


@dataclass(frozen=True)
class UnknownOp:
    """An operation without a rule; its inputs were pinned to unit 0.

    Args:
        name: qualified name, as ``"aten::fft_foo"``.
        where: path of the module that ran it.
    """

    name: str
    where: str


@dataclass(frozen=True)
class Trace:
    """What one run of a model says about the units of its weights.

    Args:
        parameters: names of the parameters, tied ones once, in the order of the model.
        buffers: names of the persistent float buffers.
        symmetries: what the demands leave free.
        rounded: units of the tensors that the model rounds to a shorter type while it runs. A
            rescale by 2 to the power of a whole number passes through such a rounding unnoticed.
        eps: constants that break symmetries through their smallness only.
        unknown: operations without a rule.
        taught: operations with a rule of the user's, and the weights that go into each.
        unread: parameters that no operation touched.
        data_dependent: whether the values of tensors decided what ran.
        decided: whether masks among the inputs decided what was demanded.
        whole: weights that the model turns into whole numbers.
        reads: path of a module -> weights whose scale Python reads there, which hides what happens
            to it.
        taken: whether Python reads numbers that depend on weights.
        rows: number of an input -> how many rows the table has that it looks up.
        draws: where random numbers are drawn, by which operation -> their type.
        precisions: where ``torch.finfo(x.dtype).eps`` goes into which operation -> what it is.
        coarsest: largest relative rounding error of the types that the model computes in.
        largest: entries of the largest result of an operation.
        differentiates: whether the model takes gradients itself while it runs.
        outside: tensors outside the model that it writes into.
        operations: for each run, a number that tells which operations ran.
        jumping: parameters that a comparison, a choice or a rounding looks at, on the way to the
            output or to what Python reads.
        met: for each run, the parameters that operations touched.
        written: buffers that the model writes while it runs.
        overwritten: parameters that it writes while it runs.
        moving: buffers that it writes and that act on the output, too.
        kept: matrices and filters that only stand in products, and which of their axes these keep.
        unread_entries: of weights of which some entries were read, which others were in no run,
            such as the last rows of a table of positions.
        roles: what the model does with a weight: ``"convolution"``, ``"experts"`` (a matrix per
            entry of its first axis), ``"stacked"`` (products take these matrices one by one),
            ``"embedding"``, ``"heads=4"`` (its module holds an attention with so many heads).
    """

    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    symmetries: "Symmetries"
    rounded: tuple[Mapping[str, Fraction], ...]
    eps: tuple[EpsSite, ...]
    unknown: tuple[UnknownOp, ...]
    unread: tuple[str, ...]
    data_dependent: bool
    written: frozenset[str]
    taught: Mapping[str, frozenset[str]] = field(default_factory=dict)
    overwritten: frozenset[str] = frozenset()
    moving: frozenset[str] = frozenset()
    decided: bool = False
    whole: frozenset[str] = frozenset()
    reads: Mapping[str, frozenset[str]] = field(default_factory=dict)
    taken: bool = False
    rows: Mapping[int, int] = field(default_factory=dict)
    draws: Mapping[tuple[str, str], torch.dtype] = field(default_factory=dict)
    precisions: Mapping[tuple[str, str], float] = field(default_factory=dict)
    coarsest: float = 0.0
    largest: int = 0
    differentiates: bool = False
    outside: tuple[Tensor, ...] = ()
    operations: tuple[int, ...] = ()
    jumping: frozenset[str] = frozenset()
    met: tuple[frozenset[str], ...] = ()
    roles: Mapping[str, frozenset[str]] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    unread_entries: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def basis(self) -> tuple[Mapping[str, Fraction], ...]:
        """A basis of all scale symmetries of the parameters: exponents by name.

        Buffers appear beside them where they have to move along.
        """
        return self.symmetries.basis

    @property
    def exact(self) -> tuple[Mapping[str, Fraction], ...]:
        """A basis of the part that the real eps does not break either.

        No eps stands beside anything that these scale.
        """
        return self.symmetries.exact

    @property
    def followers(self) -> tuple[Mapping[str, Fraction], ...]:
        """For each vector of the basis, the buffers that only *estimate* what it moves.

        Running statistics in training mode should move along although the output does not need it.
        """
        return self.symmetries.followers

    @property
    def still(self) -> set[str]:
        """Weights and buffers of which no shift can be told: written, or read in part."""
        return {*self.written, *self.overwritten, *self.whole, *self.unread_entries}


@on_gathered
def trace(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: OutputPicker | None = None,
    inert: Collection[str] = (),
    others: Sequence["Call"] = (),
) -> Trace:
    """Find all scale symmetries of a model at the level of whole tensors, exactly.

    Args:
        model: any module, in the mode it is to be analysed in; on the meta device it needs no
            memory.
        args: positional inputs of ``forward``; a dictionary counts as in :func:`onsphere.audit`.
        kwargs: keyword inputs.
        output: picks from the result the tensors that must not change; all float tensors without.
        inert: parameters known not to affect the output: they could as well be 0, which fits any
            unit, so they constrain nothing.
        others: further inputs, maybe with other weights; what holds for all of them is found.

    Returns:
        The symmetries and what the analysis could not follow.

    Raises:
        ModelError: the model has no parameters, raises, or returns no float tensor.

    Example:
        >>> norm = nn.LayerNorm(4, elementwise_affine=False)
        >>> net = nn.Sequential(nn.Linear(3, 4, bias=False), norm, nn.Linear(4, 2))
        >>> [dict(v) for v in trace(net, (torch.ones(5, 3),)).basis]
        [{'0.weight': Fraction(1, 1)}]
    """
    return Tracing(model, args, kwargs, output=output, inert=inert).trace(others)


class Tracing:
    """A model that is followed on inputs, and then on these and further ones.

    What was followed before is not run again: the further runs go on from what it demanded.

    Args:
        model: any module.
        args: positional inputs of the first run.
        kwargs: keyword inputs of it.
        output: picks from the result the tensors that must not change.
        inert: parameters that fit any unit.

    Raises:
        ModelError: the model has no parameters.

    Example:
        >>> tracing = Tracing(nn.Linear(3, 2), torch.ones(5, 3))
        >>> len(tracing.trace().met), len(tracing.trace([Call((torch.ones(4, 3),), {})]).met)
        (1, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        kwargs: Mapping[str, Any] | None = None,
        *,
        output: OutputPicker | None = None,
        inert: Collection[str] = (),
    ) -> None:
        self._model, self._output, self._inert = model, output, inert
        self._weights = weights(model)
        if not self._weights[0]:
            raise ModelError(f"{type(model).__name__} has no parameters")
        self._given = Call(*inputs_of(model, args, kwargs))
        self._done: list[tuple[Call, Run, Constraints]] = []  # each with the demands until then

    def trace(self, others: Sequence["Call"] = ()) -> Trace:
        """Return what the first inputs and others say together.

        Args:
            others: further inputs, maybe with other weights.

        Raises:
            ModelError: the model raises, or returns no float tensor.
        """
        calls = [self._given, *others]
        known = zip(calls, self._done, strict=False)
        done = [x for _, x in takewhile(lambda pair: pair[0] is pair[1][0], known)]
        goes_on = len(done) == len(self._done)
        system = done[-1][-1] if done else Constraints(sum(map(len, self._weights)))
        for x in calls[len(done) :]:
            system = system.copy()
            run = _run_as_used(
                self._model, *self._weights, system, x, self._output, self._inert, None, None
            )
            done.append((x, run, system))
        if goes_on:
            self._done = done
        return _concluded(system, *self._weights, [run for _, run, _ in done])

    def forget(self) -> None:
        """Drop all runs, with the memory of the tensors that they made."""
        self._done = []


def runs_on(
    model: nn.Module,
    calls: Sequence["Call"],
    system: Constraints,
    *,
    output: OutputPicker | None = None,
    inert: Collection[str] = (),
    starts: "Starts | None" = None,
    shifts: Unknowns | None = None,
) -> list["Run"]:
    """Run a model on inputs, and write down what its operations demand.

    Args:
        model: any module.
        calls: inputs, maybe with other weights.
        system: takes the demands on whole weights.
        output: picks from the result the tensors that must not change.
        inert: parameters that fit any unit.
        starts: what varies along the axes of weights, and takes the demands on that.
        shifts: takes the demands on what may be added to weights.
    """
    held = weights(model)
    return [_run_as_used(model, *held, system, x, output, inert, starts, shifts) for x in calls]


@dataclass(frozen=True)
class Starts:
    """What varies along the axes of weights before anything is run.

    Args:
        channels: takes the demands.
        fields: by the model's own names.
    """

    channels: ChannelDemands
    fields: Mapping[str, Fields]


@dataclass(frozen=True)
class Call:
    """What a model is run on.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        state: weights and buffers by the model's own names; those of the model without.
        seed: of the random numbers that the model draws.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    state: Mapping[str, Tensor] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One run of a model, followed to its end.

    Args:
        ledger: what it demanded.
        tracer: what it did.
        held: the weights that it used, by the model's own names.
        touched: ids and storages of the tensors that it read or returned.
        acting: numbers of the weights that the outputs were made from, or what Python has read.
    """

    ledger: UnitTracker
    tracer: Tracer
    held: Mapping[str, Tensor]
    touched: set[int]
    acting: frozenset[int]

    def used(self, name: str) -> bool:
        """Return whether an operation touched a weight."""
        weight = self.held[name]
        return id(weight) in self.touched or key_of(weight) in self.touched

    def names(self, keys: Collection[int]) -> set[str]:
        """Return the weights whose memory is among some."""
        return {n for n, t in self.held.items() if key_of(t) in keys}


def _run_as_used(model: nn.Module, *rest: Any) -> Run:
    """Run a model; one in evaluation mode that needs autograd for what it computes has it."""
    try:
        return _run(model, *rest, differentiates=False)
    except ModelError as error:
        if model.training or "does not require grad" not in str(error):
            raise
    return _run(model, *rest, differentiates=True)


def _placed(value: Any, copied: Callable[[Any], Any]) -> Any:
    """Copy a tensor among the inputs; of packed sequences the kernels read sizes on the CPU."""
    if isinstance(value, PackedSequence):
        return value._replace(data=copied(value.data))
    return copied(value) if isinstance(value, Tensor) else value


def _run(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    system: Constraints,
    of: Call,
    output: OutputPicker | None,
    inert: Collection[str],
    starts: Starts | None,
    shifts: Unknowns | None,
    *,
    differentiates: bool,
) -> Run:
    ledger = UnitTracker(system, None if starts is None else starts.channels)
    given = of.state or {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {n: given[n].clone() for n, _ in model.named_buffers()}
    leaves = {n: leaf_as(p, given[n].detach()) for n, p in parameters.items()}
    held = {**leaves, **{n: state[n] for n in buffers}}
    _introduce(ledger, held, inert, {} if starts is None else starts.fields)
    without_memory = any(p.is_meta for p in parameters.values())
    copied = ledger.shadows.to_meta if without_memory else kept
    inputs = (of.args, dict(of.kwargs))
    args, kwargs = tree_map(
        lambda t: _placed(t, copied), inputs, is_leaf=lambda t: isinstance(t, PackedSequence)
    )
    marked((args, kwargs), ledger.mark)
    for buffer in state.values():
        ledger.mark(buffer, Origin.KEPT)
    copies = [t for t in tree_leaves((args, kwargs, state)) if isinstance(t, Tensor)]
    use = InputUse((args, kwargs))
    tracer = Tracer(ledger, use, leaves.values(), copies, held.values(), without_memory)
    if shifts is not None:
        tracer.shifts = ShiftTracker(shifts, ledger.shadows.value)
        tracer.shifts.introduce_all(leaves, state, buffers)

    def enter(path: str) -> None:
        ledger.where = bare_name(path)

    try:
        autograd = gradients_as_used(model, differentiates)
        with plain_execution(of.seed), autograd, tracer, Reads(tracer):
            before = drawn_by_python()
            result = call(model, {**leaves, **state}, args, kwargs, enter, copied)
            outputs = float_outputs(result, output)
            tracer.data_dependent |= drawn_by_python() != before  # what runs may depend on it
    finally:
        tracer.restore()
    for tensor in outputs:
        unit = ledger.settle(ledger.read(tensor))
        ledger.require_zero(unit)
    if tracer.shifts is not None:
        tracer.shifts.finish(outputs)
    touched = tracer.touched | {id(t) for t in outputs} | set(map(key_of, outputs))
    acting = frozenset(ledger.decisive).union(*map(ledger.sources, outputs))
    return Run(ledger, tracer, held, touched, acting)


def _introduce(
    ledger: UnitTracker,
    held: Mapping[str, Tensor],
    inert: Collection[str],
    fields: Mapping[str, Fields],
) -> None:
    """Give every weight its own unknown; weights that share memory share one unit."""
    for unknown, (name, tensor) in enumerate(held.items()):
        ledger.mark(tensor, Origin.WEIGHTS)
        ledger.derive(tensor, frozenset({unknown}))
        seen = ledger.read(tensor)
        unit = Unit.of(unknown).with_fields(fields.get(name, NONE))
        if bare_name(name) in inert:
            ledger.write(tensor, ANY)
        elif not seen.vanishes:
            ledger.require_zero(seen - unit)
        else:
            ledger.write(tensor, unit)


def _concluded(
    system: Constraints,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    runs: Sequence[Run],
) -> Trace:
    own = [*parameters, *buffers]
    names = [bare_name(n) for n in own]
    count = len(parameters)
    first = runs[0]
    reads: dict[str, set[str]] = {}
    for run in runs:
        for where, unknowns in run.ledger.reads.items():
            reads.setdefault(where, set()).update(names[k] for k in unknowns)
    estimates = {n for run in runs for n in run.names(run.ledger.estimates)}
    moving = {n for run in runs for n in run.names(run.tracer.written)} - estimates
    written = {n for run in runs for n in run.names(run.tracer.written | run.ledger.estimates)}
    whole = {n for run in runs for n in run.names(run.tracer.whole)}
    return Trace(
        parameters=tuple(names[:count]),
        buffers=tuple(names[count:]),
        symmetries=Symmetries(system, names, count, runs),
        rounded=_named([form for run in runs for form in run.ledger.rounded], names),
        eps=_eps_sites(runs),
        unknown=tuple(UnknownOp(*key) for key in {k: 0 for r in runs for k in r.ledger.unknown}),
        taught=_taught(runs, names),
        unread=tuple(bare_name(n) for n in parameters if not any(run.used(n) for run in runs)),
        data_dependent=any(run.tracer.data_dependent for run in runs),
        decided=any(run.ledger.decided for run in runs),
        written=frozenset(bare_name(n) for n in written if n in buffers),
        overwritten=frozenset(bare_name(n) for n in written if n in parameters),
        moving=frozenset(bare_name(n) for n in moving if n in buffers),
        whole=frozenset(bare_name(n) for n in whole),
        reads={where: frozenset(some) for where, some in reads.items()},
        taken=any(run.ledger.taken for run in runs),
        rows=dict(first.tracer.use.rows),
        draws={k: v for run in runs for k, v in run.tracer.draws.items()},
        precisions={k: v for run in runs for k, v in run.tracer.precisions.items()},
        outside=tuple(t for run in runs[:1] for t in run.tracer.outside),
        differentiates=any(run.tracer.differentiates for run in runs),
        coarsest=max(run.tracer.coarsest for run in runs),
        largest=max(run.tracer.largest for run in runs),
        jumping=frozenset(names[k] for run in runs for k in run.ledger.jumping & run.acting),
        met=tuple(frozenset(bare_name(n) for n in parameters if run.used(n)) for run in runs),
        operations=tuple(run.tracer.operations for run in runs),
        roles={bare_name(n): _roles(n, runs) for n in parameters},
        kept={bare_name(n): a for n in parameters if (a := _kept(n, runs)) is not None},
        unread_entries=_unread_entries([*parameters, *buffers], runs),
    )


def _taught(runs: Sequence[Run], names: Sequence[str]) -> dict[str, frozenset[str]]:
    """Return the operations with a rule of the user's, and the weights that go into each."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for operation, numbers in run.ledger.taught.items():
            found.setdefault(operation, set()).update(names[k] for k in numbers)
    return {operation: frozenset(some) for operation, some in sorted(found.items())}


def _unread_entries(own: Sequence[str], runs: Sequence[Run]) -> dict[str, NDArray[np.bool_]]:
    """Return which entries no run read, of weights of which others were read."""
    coverage = [run.tracer.coverage for run in runs]
    found = {bare_name(n): unread([run.held[n] for run in runs], coverage) for n in own}
    return {n: entries for n, entries in found.items() if entries is not None}


def _kept(name: str, runs: Sequence[Run]) -> int | None:
    """Return the axis of a matrix that all products keep, if nothing else is done with it."""
    strides = {s for run in runs for s in run.tracer.kept.get(key_of(run.held[name]), set())}
    matrix = runs[0].held[name]
    if matrix.ndim < 2 or len(strides) != 1 or not matrix.is_contiguous():
        return None
    (stride,) = strides
    axes = [a for a, n in enumerate(matrix.shape) if n > 1 and matrix.stride(a) == stride]
    return axes[0] if axes else None


def _eps_sites(runs: Sequence[Run]) -> tuple[EpsSite, ...]:
    """Return what is an eps in every run."""
    numbers = {key for run in runs for key in run.ledger.numbers}
    sites: dict[Any, EpsSite] = {}
    for run in runs:
        for number, site in run.ledger.sites.items():
            if site.key not in numbers:
                sites[site.key or (id(run), number)] = replace(site, form={})
    return tuple(sites.values())


def _roles(name: str, runs: Sequence[Run]) -> frozenset[str]:
    found: set[str] = set()
    for run in runs:
        heads = run.tracer.heads
        inside = [p for p in heads if not p or bare_name(name).startswith(f"{p}.")]
        found |= {f"heads={heads[max(inside, key=len)]}"} if inside else set()
        found |= run.tracer.roles.get(key_of(run.held[name]), set())
    return frozenset(found)


def _named(forms: Sequence[Form], names: Sequence[str]) -> tuple[Mapping[str, Fraction], ...]:
    different = {frozenset(form.items()) for form in forms}
    return tuple({names[k]: c for k, c in sorted(form)} for form in sorted(different, key=sorted))


class Symmetries:
    """What demands leave free, solved for when it is asked for.

    Args:
        system: the demands.
        names: of the unknowns: parameters, then buffers.
        count: how many of these are parameters.
        runs: in which they were demanded.
    """

    def __init__(
        self, system: Constraints, names: Sequence[str], count: int, runs: Sequence[Run]
    ) -> None:
        self._system, self._names, self._count = system, names, count
        self._beside_eps = [site.form for run in runs for site in run.ledger.sites.values()]
        self._estimates = [pair for run in runs for pair in run.ledger.followers]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Symmetries):
            return NotImplemented
        mine, theirs = ((s.basis, s.exact, s.followers) for s in (self, other))
        return mine == theirs

    @cached_property
    def basis(self) -> tuple[Mapping[str, Fraction], ...]:
        """A basis of the symmetries of the parameters."""
        return self._named(self._kept)

    @cached_property
    def followers(self) -> tuple[Mapping[str, Fraction], ...]:
        """For each of these, the buffers that estimate what it moves."""
        estimating = _Estimating(self._estimates, range(self._count, len(self._names)))
        return self._named(map(estimating.following, self._kept))

    @cached_property
    def exact(self) -> tuple[Mapping[str, Fraction], ...]:
        """A basis of what would be left if no small constant were an eps."""
        system = self._system.copy()
        news = [form for form in self._beside_eps if system.require_zero(form)]
        vectors = system.null_space() if news else self._vectors
        return self._named(self._without_idle(row_space(vectors, set(range(self._count)))))

    @cached_property
    def _vectors(self) -> list[Form]:
        return self._system.null_space()

    @cached_property
    def _kept(self) -> list[Form]:
        vectors = row_space(self._vectors, set(range(self._count)))
        return self._without_idle(sparse_basis(vectors, self._count))

    def _without_idle(self, vectors: Sequence[Form]) -> list[Form]:
        """Drop from symmetries the buffers that are free to do what they like."""
        alone = {next(iter(v)) for v in self._vectors if len(v) == 1}
        idle = {k for k in alone if k >= self._count}
        return [{k: c for k, c in v.items() if k not in idle} for v in vectors]

    def _named(self, vectors: Iterable[Form]) -> tuple[Mapping[str, Fraction], ...]:
        return tuple({self._names[k]: c for k, c in v.items()} for v in vectors)


class _Estimating:
    """How buffers move that only estimate.

    Args:
        pairs: their units, and those of what they estimate.
        buffers: unknowns of the buffers.
    """

    def __init__(self, pairs: Sequence[tuple[Unit, Unit]], buffers: Collection[int]) -> None:
        self._units: list[Mapping[int, Fraction]] = []
        self._of_buffer: dict[int, list[int]] = {}
        self._having: defaultdict[int, list[int]] = defaultdict(list)
        for buffer, unit in pairs:
            (number,) = buffer.terms if len(buffer.terms) == 1 else (None,)
            if number is not None and number in buffers:
                self._of_buffer.setdefault(number, []).append(len(self._units))
                for k in unit.terms:
                    self._having[k].append(len(self._units))
                self._units.append(unit.terms)
        self._buffer_of = {i: n for n, some in self._of_buffer.items() for i in some}

    def following(self, v: Form) -> Form:
        """Return how far the buffers move when a symmetry acts, where that is well defined."""
        powers: defaultdict[int, Fraction] = defaultdict(Fraction)
        for k, c in v.items():
            for i in self._having.get(k, ()):
                powers[i] += self._units[i][k] * c
        met = {self._buffer_of[i] for i in powers} - v.keys()
        moved = {}
        for number in sorted(met, key=lambda n: self._of_buffer[n][0]):  # as runs met them
            found = {powers.get(i, Fraction(0)) for i in self._of_buffer[number]}
            if len(found) == 1 and any(found):
                moved[number] = found.pop()
        return moved
