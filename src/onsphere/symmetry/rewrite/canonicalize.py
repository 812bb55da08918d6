r"""The same function, a canonical representative of its weights.

Weights that the symmetries of a model carry into each other compute the same function. Among them
is one of least total norm, at which every traded pair is balanced, whole weights and channels of
them (:mod:`onsphere.symmetry.rewrite.balancing.joint_norm` finds it). Weights on spheres have no
least norm; they keep their length, or get the one asked for. A network is used in two modes, so it
moves along those symmetries only that hold in training and in evaluation
(:mod:`onsphere.symmetry.rewrite.modes`).

Mathematically the output does not change at all. In floating point it does, by rounding, unless
every factor is a power of two. And a model computes with eps, which notices the length of weights
on spheres. So the result is measured before it is returned, and refused if it moved too far.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from onsphere._torch.execution import (
    ModelError,
    OutputPicker,
    bare_name,
    call,
    float_outputs,
    inputs_of,
    plain_execution,
)
from onsphere._torch.materialize import gathered
from onsphere._utils.warning import warn
from onsphere.errors import OnsphereError, choice
from onsphere.symmetry.audit import Audit, Inputs
from onsphere.symmetry.channels.families import channel_symmetries
from onsphere.symmetry.claims import Family
from onsphere.symmetry.exact.trace import Trace, trace
from onsphere.symmetry.exact.units.linear_forms import Constraints
from onsphere.symmetry.exact.writes import writes_taken_back
from onsphere.symmetry.numeric.certificate import relative_change
from onsphere.symmetry.rewrite.balancing.admitted import holding, meets_unseen
from onsphere.symmetry.rewrite.balancing.channel_scales import LEAST_NORM, State
from onsphere.symmetry.rewrite.balancing.joint_norm import Channels, joint_least_norm
from onsphere.symmetry.rewrite.balancing.least_norm import LeastNorm, Vector
from onsphere.symmetry.rewrite.modes import demands, in_mode, mode_of, other_mode, shared, value
from onsphere.symmetry.rewrite.rescale import norm_of
from onsphere.symmetry.rewrite.verification import (
    TOLERANCES,
    copied,
    outputs_in_float64,
    wide_state,
)

Radius = Literal["initial", "unit", "fan_in"]
Factors = Literal["auto", "real", "binary"]
Modes = Literal["both", "audited"]


class CanonicalizeError(OnsphereError, ValueError):
    """A model has no canonical form that could be verified; the message says why."""


def canonicalize(
    model: nn.Module,
    audit: Audit,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    radius: Radius = "initial",
    factors: Factors = "auto",
    exact: bool = True,
    modes: Modes = "both",
    channels: bool = True,
    frozen: bool = False,
    tolerance: float | None = None,
    output: OutputPicker | None = None,
    inplace: bool = False,
) -> nn.Module:
    r"""Return the same function with balanced weights; verified on inputs before it returns.

    Traded scales move to the least total norm :math:`\sum_i |p_i|^2` that the symmetries reach: the
    families of ``audit.families`` channel by channel, together with the symmetries of whole
    weights. Where that sum falls for ever (joint spheres, trades against a weight that is 0), the
    geometric mean of the norms is kept, so such a trade stays as it is; a channel stays that is 0
    on one side of its trade. Each vector on a sphere of its own keeps its length, or gets that of
    ``radius``; weights with a radius stay out of all trades. Running statistics move along: in
    evaluation mode the output needs it, in training mode they remain estimates of what they
    estimate (with an inert bias before them; other inert weights stay). Where some weights train,
    those that do not (``requires_grad`` is off: the base of an adapter, say) stay, and with them
    what could move only together with them; where none trains, all move. Applied twice the result
    is that of applying once, bit by bit, and without ``radius`` the total norm never grows.

    The function stays in training mode *and* in evaluation mode, and is compared in both: what
    evaluation alone leaves free (a BatchNorm's gain against its running variance) is another
    network as soon as it trains.

    Args:
        model: the audited model, in the mode it was audited in; compiled and data-parallel ones
            come back as such.
        audit: its audit.
        args: inputs to verify on, as :func:`audit` takes them; those of the audit without. An
            audit that was read from a file has none: give them.
        kwargs: keyword inputs to verify on.
        radius: length of weights on spheres of their own: the one they have, 1 per vector, or the
            square root of the number of entries of a vector. A vector that is 0 stays 0. An eps
            notices a length: with a normalization's variance :math:`v` the output moves by about
            :math:`(\epsilon/2v)\,|1-1/f^2|` for a factor :math:`f`, 1e-5 at the usual eps and
            :math:`v=1/2`. In float32 that is at the limit of rounding, so say with ``tolerance``
            (1e-3, say) that it may.
        factors: ``"real"`` reaches the minimum, which is the same for all weights on the orbit,
            and rounds each weight once. ``"binary"`` moves by powers of two, to the least norm
            that these reach: every product and every rounding inside the model is the same as
            before, so the output keeps its bits. ``"auto"`` is binary for all that the model
            itself rounds (half precision, autocast, a float64 model that computes in float32
            inside: all channels of the weights it is made of), and real elsewhere.
        exact: trade only in ways that the real eps does not notice. ``False`` also trades scales
            that stand beside an eps; the function then changes by the audit's leaks, which are
            measured for whole weights: channels can come to more.
        modes: ``"audited"`` keeps the function in the mode of the audit alone, which leaves more
            scales free. Only for a network that is never used in the other one.
        channels: ``False`` moves whole weights only, each by one factor.
        frozen: ``True`` moves frozen weights like any others. An adapter that is saved afterwards
            no longer fits the base it was trained on.
        tolerance: largest relative change of the output to accept; rounding of the output's type
            without: 1e-12 in float64, 1e-5 in float32.
        output: picks the tensors to keep fixed, if ``args`` or ``kwargs`` are given.
        inplace: change ``model`` itself instead of a copy; it is left as it was on any error.

    Returns:
        The model with canonical weights.

    Raises:
        CanonicalizeError: the audit does not fit, there are no inputs, a weight holds NaN, the
            model does not run in the other mode, or the output would move further than the
            tolerance.

    Example:
        >>> from onsphere.symmetry import audit
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.mul_(8)
        >>> balanced = canonicalize(net, audit(net, torch.ones(1, 2)))
        >>> torch.allclose(balanced[0].weight.norm(dim=1), balanced[2].weight.norm(dim=0))
        True
    """
    radius = cast(Radius, choice("radius", radius, get_args(Radius), CanonicalizeError))
    factors = cast(Factors, choice("factors", factors, get_args(Factors), CanonicalizeError))
    modes = cast(Modes, choice("modes", modes, get_args(Modes), CanonicalizeError))
    if words := other_mode(model, audit):
        raise CanonicalizeError(words)
    inputs = _inputs(model, audit, args, kwargs, output)
    with gathered(model) as source:
        options = _Options(radius, factors, exact, modes, channels, frozen, tolerance)
        changed = _changed(source, audit, inputs, options)
    target = model if inplace else copied(model, CanonicalizeError, "; give inplace=True")
    with gathered(target, write=True) as inner:
        _write(_tensors(inner), changed)
    return target


@dataclass(frozen=True)
class _Options:
    """What was asked for, as :func:`canonicalize` takes it."""

    radius: Radius
    factors: Factors
    exact: bool
    modes: Modes
    channels: bool
    frozen: bool
    tolerance: float | None


def _changed(
    model: nn.Module, audit: Audit, inputs: Inputs, options: _Options
) -> dict[str, Tensor]:
    """Return the weights and buffers that change, verified in every mode that shall stay."""
    own = _tensors(model)
    _check_fits(own, audit)
    traced = _traced(model, inputs)
    other = None if options.modes == "audited" else _traced_in_other_mode(model, inputs)
    asked = _Asked(model, audit, inputs, traced, other, options)
    moves = {} if options.radius == "initial" else _on_radius(own, asked)
    held = (set(moves) & set(audit.parameters)) | asked.still
    for name, move in _balanced(own, asked, held).items():
        moves[name] = moves[name] * move if name in moves else move
    changed = {n: (_wide(own[n]) * m.to(own[n].device)).to(own[n].dtype) for n, m in moves.items()}
    for training in asked.modes:
        with in_mode(model, training):
            change = _change(model, own, changed, inputs)
        allowed = change.rounding if options.tolerance is None else options.tolerance
        if not change.amount <= allowed:
            raise CanonicalizeError(
                f"in {mode_of(training)} mode the output would change by {change.amount:.1e} of "
                f"its size, more than {allowed:.0e}, so the model is left as it was: "
                f"{_reason(audit, moves, change.amount, options.factors)}"
            )
    return changed


@dataclass(frozen=True)
class _Asked:
    """What is known of a model, and how it may move.

    Args:
        model: the model, in the mode of the audit.
        audit: its audit.
        inputs: what it runs on.
        traced: its trace in the mode of the audit.
        other: its trace in the other mode, whose function stays as well; ``None`` if it need not.
        options: what was asked for.
    """

    model: nn.Module
    audit: Audit
    inputs: Inputs
    traced: Trace
    other: Trace | None
    options: _Options

    @cached_property
    def still(self) -> set[str]:
        """Frozen weights, if they shall stay; none where no weight trains."""
        trains = {bare_name(n): p.requires_grad for n, p in self.model.named_parameters()}
        if self.options.frozen or not any(trains.values()):
            return set()
        return {n for n, does in trains.items() if not does}

    @property
    def modes(self) -> list[bool]:
        """The modes whose function stays, that of the audit first."""
        here = self.model.training
        return [here] if self.other is None else [here, not here]

    def demands(self, own: Mapping[str, Tensor], exact: bool) -> list[Vector]:
        """Return what the other mode demands of a rescale."""
        if self.other is None:
            return []
        followed = _passengers(self.audit, self.traced, self.audit.scale_symmetries)
        inert = {*self.audit.inert} - {n for f in followed for n in f}
        return demands(self.other, self.other.exact if exact else self.other.basis, inert, own)

    @property
    def rounded(self) -> list[Vector]:
        """What the model rounds while it runs, in the modes whose function stays."""
        return [*self.traced.rounded, *(self.other.rounded if self.other else ())]


# --- what is there ------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {bare_name(n): t for n, t in [*model.named_parameters(), *model.named_buffers()]}


def _inputs(
    model: nn.Module,
    audit: Audit,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    output: OutputPicker | None,
) -> Inputs:
    if args is not None or kwargs is not None:
        return Inputs(*inputs_of(model, () if args is None else args, kwargs), output)
    if audit.inputs is None:
        raise CanonicalizeError(
            "there is nothing to verify the result on: this audit was read from a file; "
            "give `args` (and `kwargs`), the inputs of the model: canonicalize(model, audit, args)"
        )
    return audit.inputs


def _check_fits(own: Mapping[str, Tensor], audit: Audit) -> None:
    for name, shape in audit.parameters.items():
        found = tuple(own[name].shape) if name in own else "no such parameter"
        if found != tuple(shape):
            raise CanonicalizeError(
                f"the audit knows {name!r} with shape {tuple(shape)}, the model has {found}; "
                "audit this model again"
            )
        if own[name].is_meta:
            raise CanonicalizeError("the model has no values: it is on the meta device")
        if not bool(own[name].detach().isfinite().all()):
            raise CanonicalizeError(f"parameter {name!r} holds NaN or infinity")


# --- where it goes ------------------------------------------------------------------------------


def _balanced(own: Mapping[str, Tensor], asked: _Asked, held: set[str]) -> dict[str, Tensor]:
    """Return the factors that lead to the least total norm, with ``held`` weights where they are.

    They broadcast against what they multiply.
    """
    audit, exact = asked.audit, asked.options.exact
    claims = audit.exact_symmetries if exact else audit.scale_symmetries
    claims = [{n: e for n, e in v.items() if n not in audit.inert} for v in claims]
    passengers = _passengers(audit, asked.traced, claims)
    moving = [{**f, **v} for v, f in zip(claims, passengers, strict=True) if v]
    symmetries = shared(moving, asked.demands(own, exact))
    families = _families(own, asked, held) if asked.options.channels else []
    names = sorted({n for v in symmetries for n in v})
    every = sorted({*names, *(n for f in families for n in f.names)})
    counted = {n: own[n] for n in every if n in audit.parameters and norm_of(own[n])}
    octaves = _octaves(own, asked, names)
    scales = joint_least_norm(
        LeastNorm(symmetries, counted, fixed=held, octaves=octaves),
        [Channels(f, _in_octaves(f, own, asked)) for f in families],
        counted,
        still=max([1e-9, *(16 * torch.finfo(own[n].dtype).eps for n in every)]),
    )
    logs = {n: torch.tensor(u, dtype=torch.float64) for n, u in scales.whole.items()}
    shapes = {n: tuple(t.shape) for n, t in own.items()}
    for family, amounts in scales.channels:
        for name, more in family.log_factors(amounts, shapes, followers=True).items():
            logs[name] = logs[name] + more if name in logs else more
    return {n: torch.exp2(u) for n, u in logs.items()}


def _families(own: Mapping[str, Tensor], asked: _Asked, held: set[str]) -> list[Family]:
    """Return the families along which channels may move, in every mode that shall stay.

    Those of the audit hold in its mode. Where a network has running statistics, they are found in
    training mode first: what a batch divides by is no weight there, and what estimates it moves
    along, which evaluation needs.
    """
    model, audit, inputs, exact = asked.model, asked.audit, asked.inputs, asked.options.exact
    found, tried = audit.families, asked.modes[1:]
    if found and asked.other is not None and asked.other.written and not model.training:
        with in_mode(model, training=True):
            found = channel_symmetries(
                model, inputs.args, inputs.kwargs, output=inputs.output, inert=audit.inert,
                roles=asked.other.roles,
            )  # fmt: skip
        tried = asked.modes
    counted = {n for n in audit.parameters if norm_of(own[n])}
    unreached = {n: tuple(audit.parameters[n]) for n in audit.unreached}
    found = [
        f for f in found
        if (f.exact or not exact) and all(n in own for n in f.names) and held.isdisjoint(f.names)
        and LEAST_NORM.applies(f, counted, own) and not meets_unseen(f, own, unreached)
    ]  # fmt: skip
    state = wide_state(model) if found and tried else {}
    for training in tried if found else ():
        after = partial(_in_float64, asked, training, state)
        try:
            found = holding(found, {bare_name(n): t for n, t in state.items()}, after({}), after)
        except ModelError:  # nothing can be shown of them
            return []
    return found


def _in_float64(asked: _Asked, training: bool, state: State, changed: State) -> list[Tensor]:
    """Return the outputs in a mode where some weights and buffers are others."""
    inputs, traced = asked.inputs, asked.traced
    if asked.other is not None and training != asked.model.training:
        traced = asked.other
    now = {n: changed.get(bare_name(n), t) for n, t in state.items()}
    eps = () if asked.options.exact else traced.eps
    with in_mode(asked.model, training):
        return outputs_in_float64(asked.model, now, inputs.args, inputs.kwargs, inputs.output, eps)


def _octaves(own: Mapping[str, Tensor], asked: _Asked, names: Sequence[str]) -> list[Vector]:
    """Return what may only move by powers of two: combinations of log scales, by name."""
    single: list[Vector] = [{n: Fraction(1)} for n in names]
    if asked.options.factors == "auto":
        short = [v for n, v in zip(names, single, strict=True) if own[n].element_size() < 4]
        return [*short, *asked.rounded]
    return single if asked.options.factors == "binary" else []


def _in_octaves(family: Family, own: Mapping[str, Tensor], asked: _Asked) -> bool:
    """Return whether channels may only move by powers of two.

    What the model rounds while it runs is known of whole weights: those that it is made of.
    """
    if asked.options.factors == "auto":
        rounded = {n for form in asked.rounded for n in form}
        return any(n in rounded or own[n].element_size() < 4 for n in family.names)
    return asked.options.factors == "binary"


def _on_radius(own: Mapping[str, Tensor], asked: _Asked) -> dict[str, Tensor]:
    """Return the factors that give weights on spheres of their own the length asked for."""
    moves: dict[str, Tensor] = {}
    demanded = asked.demands(own, exact=False)
    for sphere in asked.audit.spheres:
        names = [n for n in sphere.names if n in asked.audit.parameters]
        passengers = _passengers(asked.audit, asked.traced, [sphere.exponents])[0]
        exponents = {**passengers, **sphere.exponents}
        elsewhere = any(value(demand, exponents) for demand in demanded)
        held = not asked.still.isdisjoint(exponents)
        if len(names) != 1 or names[0] in moves or elsewhere or held:
            continue
        (name,) = names
        vectors = sphere.axes.gather(_wide(own[name]))
        norms = vectors.norm(dim=-1, keepdim=True)
        length = 1.0 if asked.options.radius == "unit" else vectors.shape[-1] ** 0.5
        scale = torch.where(norms > 0, length / norms.clamp_min(1e-300), 1.0)
        if asked.options.factors == "binary":
            scale = torch.exp2(scale.log2().round())
        scale = torch.where((scale - 1).abs() <= 4 * torch.finfo(own[name].dtype).eps, 1.0, scale)
        for moved, e in exponents.items():
            factors = scale ** float(e / sphere.exponents[name])
            if moved == name:
                moves[name] = sphere.axes.scatter(factors.expand(vectors.shape), own[name].shape)
            else:
                factors = _following(own[moved], factors.flatten(), name)
                moves[moved] = moves[moved] * factors if moved in moves else factors
    if not moves:
        _warn_of_no_sphere(asked)
    return moves


def _warn_of_no_sphere(asked: _Asked) -> None:
    where = f"in {asked.audit.mode} mode" if asked.other is None else "in both modes"
    mended = "" if asked.audit.mode == "train" else "; audit the model in training mode"
    which = "weight that trains" if asked.still else "weight"
    warn(f"no {which} is on a sphere of its own {where}, so `radius` changes nothing{mended}")


def _following(buffer: Tensor, factors: Tensor, name: str) -> Tensor:
    """Divide a buffer as the weight divides whose scale it follows, vector by vector."""
    count = factors.numel()
    if count == 1:
        return factors.reshape(())
    if buffer.ndim != 1 or len(buffer) % count:
        raise CanonicalizeError(
            f"a buffer of shape {tuple(buffer.shape)} should follow the {count} vectors of "
            f"{name!r}, but does not divide like them; keep radius='initial'"
        )
    return factors.repeat_interleave(len(buffer) // count)


def _passengers(audit: Audit, traced: Trace, symmetries: Sequence[Vector]) -> list[Vector]:
    """Return what moves along with each symmetry although the output does not need it.

    Running statistics in training mode estimate something that moves; so does an inert bias that
    they estimate as well. How far is linear: what combines the symmetries of the trace combines
    their passengers.
    """
    estimates = {n for f in traced.followers for n in f}
    order = sorted({*estimates, *audit.inert})  # the lowest numbers are never solved for
    index = {n: i for i, n in enumerate(order)}
    for v in [*traced.basis, *symmetries]:
        index |= {n: len(index) + i for i, n in enumerate(n for n in v if n not in index)}
    known = Constraints(len(index))
    for v, f in zip(traced.basis, traced.followers, strict=True):
        known.require_zero({index[n]: c for n, c in {**f, **v}.items()})
    found: list[Vector] = []
    for v in symmetries:
        left = known.reduced({index[n]: c for n, c in v.items()})
        moved = {n: -left[index[n]] for n in order if index[n] in left}
        found.append(moved if estimates & set(moved) else {})
    return found


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.complex128 if t.is_complex() else torch.float64)


# --- whether it may go there ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    amount: float
    rounding: float


def _change(
    model: nn.Module, own: Mapping[str, Tensor], changed: Mapping[str, Tensor], inputs: Inputs
) -> _Change:
    """Measure how far the output moves, and how much rounding may explain."""
    real = {bare_name(n): n for n, _ in [*model.named_parameters(), *model.named_buffers()]}
    before = _outputs(model, {real[n]: t for n, t in own.items()}, inputs)
    after = _outputs(model, {real[n]: changed.get(n, t) for n, t in own.items()}, inputs)
    rounding = max(TOLERANCES.get(t.dtype, 1e-5) for t in before)
    return _Change(relative_change(before, after), rounding)


def _traced(model: nn.Module, inputs: Inputs) -> Trace:
    try:
        return trace(model, inputs.args, inputs.kwargs, output=inputs.output)
    except ModelError as error:
        raise CanonicalizeError(str(error)) from error


def _traced_in_other_mode(model: nn.Module, inputs: Inputs) -> Trace:
    here, there = mode_of(model.training), mode_of(not model.training)
    try:
        with in_mode(model, not model.training):
            return trace(model, inputs.args, inputs.kwargs, output=inputs.output)
    except ModelError as error:
        raise CanonicalizeError(
            f"nothing says that the function stays in {there} mode, where the model does not run "
            f"on these inputs ({error}); give inputs that it runs on in both modes, or "
            f"modes='audited' to keep that of {here} mode alone"
        ) from error


def _outputs(model: nn.Module, state: Mapping[str, Tensor], inputs: Inputs) -> list[Tensor]:
    buffers = {n for n, _ in model.named_buffers()}
    fresh = {n: t.clone() if n in buffers else t.detach() for n, t in state.items()}
    try:
        with plain_execution(), torch.no_grad(), writes_taken_back(fresh.values()):
            result = call(model, fresh, inputs.args, inputs.kwargs)
            return [t.clone() for t in float_outputs(result, inputs.output)]
    except ModelError as error:
        raise CanonicalizeError(str(error)) from error


def _reason(audit: Audit, moves: Mapping[str, Tensor], change: float, factors: Factors) -> str:
    """Say which move an eps notices most, or that it is rounding, and how to go on."""
    logs = {n: float(m.log().abs().max()) for n, m in moves.items()}
    noticed = [
        (leak.amount * logs[n] / abs(float(e)), n, leak.amount)
        for leak in audit.leaks
        for n, e in leak.exponents.items()
        if n in logs and n in audit.parameters
    ]
    expected, name, amount = max(noticed, default=(0.0, "", 0.0))
    if expected > 0.01 * change:
        return (
            f"an eps notices the length of {name!r} (leak {amount:.0e}, moved by a factor of up "
            f"to {math.exp(logs[name]):.3g}); accept it with a larger `tolerance`, or keep "
            "radius='initial' and exact=True"
        )
    if factors != "binary" and change < 1e-3:
        return "the model amplifies rounding; factors='binary' does not round"
    return "this is more than rounding and eps explain; audit the model again"


# --- going there --------------------------------------------------------------------------------


def _write(tensors: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> None:
    """Write new values, all of them or none."""
    saved = {n: tensors[n].detach().clone() for n in changed}
    try:
        with torch.no_grad():
            for name, t in changed.items():
                tensors[name].copy_(t)
    except BaseException:
        with torch.no_grad():
            for name, t in saved.items():
                if not torch.equal(tensors[name], t):
                    tensors[name].copy_(t)
        raise
