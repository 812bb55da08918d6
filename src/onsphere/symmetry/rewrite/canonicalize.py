r"""The same function, a canonical representative of its weights.

Weights that the symmetries of a model carry into each other compute the same function. Among them
is one of least total norm, at which every traded pair is balanced
(:mod:`onsphere.symmetry.rewrite.least_norm` finds it). Weights on spheres have no least norm; they
keep their length, or get the one asked for. A network is used in two modes, so it moves along those
symmetries only that hold in training and in evaluation (:mod:`onsphere.symmetry.rewrite.modes`).

Mathematically the output does not change at all. In floating point it does, by rounding, unless
every factor is a power of two. And a model computes with eps, which notices the length of weights
on spheres. So the result is measured before it is returned, and refused if it moved too far.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
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
from onsphere.geometry import VectorAxes
from onsphere.symmetry.audit import Audit, Inputs
from onsphere.symmetry.exact.linear_forms import Constraints
from onsphere.symmetry.exact.trace import Trace, trace
from onsphere.symmetry.numeric.certificate import relative_change
from onsphere.symmetry.rewrite.least_norm import Vector, least_norm
from onsphere.symmetry.rewrite.modes import demands, in_mode, mode_of, other_mode, shared, value
from onsphere.symmetry.rewrite.rescale import norm_of
from onsphere.symmetry.rewrite.verification import TOLERANCES

Radius = Literal["initial", "unit", "fan_in"]
Factors = Literal["auto", "real", "binary"]
Modes = Literal["both", "audited"]


class CanonicalizeError(OnsphereError, ValueError):
    """A model has no canonical form that could be verified; the message says why."""


_WHOLE = VectorAxes()


@dataclass(frozen=True)
class _Move:
    """What happens to one weight or buffer.

    Args:
        factors: what to multiply with, one number per vector.
        axes: how the tensor divides into these vectors.
    """

    factors: Tensor
    axes: VectorAxes = _WHOLE

    def after(self, first: "_Move | None") -> "_Move":
        """Combine with an earlier move; one of them is a single number, or both divide alike."""
        if first is None:
            return self
        axes = self.axes if first.factors.numel() == 1 else first.axes
        return _Move(first.factors * self.factors, axes)

    def applied(self, t: Tensor) -> Tensor:
        """Multiply in float64, and round once."""
        wide = _wide(t)
        if self.factors.numel() == 1:
            return (wide * self.factors.item()).to(t.dtype)
        vectors = self.axes.gather(wide)
        scaled = vectors * self.factors.to(wide.device).reshape(*vectors.shape[:-1], 1)
        return self.axes.scatter(scaled, t.shape).to(t.dtype)


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
    tolerance: float | None = None,
    output: OutputPicker | None = None,
    inplace: bool = False,
) -> nn.Module:
    r"""Return the same function with balanced weights; verified on inputs before it returns.

    Traded scales move to the least total norm :math:`\sum_i |p_i|^2` that the symmetries reach.
    Where that sum falls for ever (joint spheres, trades against a weight that is 0), the geometric
    mean of the norms is kept, so such a trade stays as it is. Running statistics move along: in
    evaluation mode the output needs it, in training mode they remain estimates of what they
    estimate (with an inert bias before them; other inert weights stay). Frozen weights move like
    any others. Applied twice the result is that of applying once, bit by bit, and without
    ``radius`` the total norm never grows.

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
            inside), and real elsewhere.
        exact: trade only in ways that the real eps does not notice. ``False`` also trades scales
            that stand beside an eps; the function then changes by the audit's leaks.
        modes: ``"audited"`` keeps the function in the mode of the audit alone, which leaves more
            scales free. Only for a network that is never used in the other one.
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
        >>> bool(torch.isclose(balanced[0].weight.norm(), balanced[2].weight.norm()))
        True
    """
    radius = cast(Radius, choice("radius", radius, get_args(Radius), CanonicalizeError))
    factors = cast(Factors, choice("factors", factors, get_args(Factors), CanonicalizeError))
    modes = cast(Modes, choice("modes", modes, get_args(Modes), CanonicalizeError))
    inputs = _inputs(model, audit, args, kwargs, output)
    with gathered(model) as source:
        changed = _changed(source, audit, inputs, radius, factors, exact, modes, tolerance)
    target = model if inplace else _copied(model)
    with gathered(target, write=True) as inner:
        _write(_tensors(inner), changed)
    return target


def _changed(
    model: nn.Module,
    audit: Audit,
    inputs: Inputs,
    radius: Radius,
    factors: Factors,
    exact: bool,
    modes: Modes,
    tolerance: float | None,
) -> dict[str, Tensor]:
    """Return the weights and buffers that change, verified in every mode that shall stay."""
    own = _tensors(model)
    _check_fits(model, own, audit)
    traced = _traced(model, inputs)
    other = None if modes == "audited" else _traced_in_other_mode(model, inputs)
    asked = _Asked(audit, traced, other, factors)
    moves = {} if radius == "initial" else _on_radius(own, asked, radius)
    held = set(moves) & set(audit.parameters)
    for name, move in _balanced(own, asked, exact, held).items():
        moves[name] = move.after(moves.get(name))
    changed = {n: m.applied(own[n]) for n, m in moves.items()}
    for training in [model.training] if other is None else [model.training, not model.training]:
        with in_mode(model, training):
            change = _change(model, own, changed, inputs)
        allowed = change.rounding if tolerance is None else tolerance
        if not change.amount <= allowed:
            raise CanonicalizeError(
                f"in {mode_of(training)} mode the output would change by {change.amount:.1e} of "
                f"its size, more than {allowed:.0e}, so the model is left as it was: "
                f"{_reason(audit, moves, change.amount, factors)}"
            )
    return changed


@dataclass(frozen=True)
class _Asked:
    """What is known of a model, and how it may move.

    Args:
        audit: its audit.
        traced: its trace in the mode of the audit.
        other: its trace in the other mode, whose function stays as well; ``None`` if it need not.
        factors: what to multiply with.
    """

    audit: Audit
    traced: Trace
    other: Trace | None
    factors: Factors

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


def _check_fits(model: nn.Module, own: Mapping[str, Tensor], audit: Audit) -> None:
    if words := other_mode(model, audit):
        raise CanonicalizeError(words)
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


def _balanced(
    own: Mapping[str, Tensor], asked: _Asked, exact: bool, held: set[str]
) -> dict[str, _Move]:
    """Return the moves to the least total norm, with ``held`` weights where they are."""
    audit = asked.audit
    claims = audit.exact_symmetries if exact else audit.scale_symmetries
    claims = [{n: e for n, e in v.items() if n not in audit.inert} for v in claims]
    passengers = _passengers(audit, asked.traced, claims)
    moving = [{**f, **v} for v, f in zip(claims, passengers, strict=True) if v]
    symmetries = shared(moving, asked.demands(own, exact))
    names = sorted({n for v in symmetries for n in v})
    scales = least_norm(
        symmetries,
        {n: _square(own[n]) for n in names if n in audit.parameters},
        fixed=held,
        octaves=_octaves(own, asked, names),
        still=max([1e-9, *(16 * torch.finfo(own[n].dtype).eps for n in names)]),
    )
    return {n: _Move(torch.tensor([2.0**u], dtype=torch.float64)) for n, u in scales.items()}


def _octaves(own: Mapping[str, Tensor], asked: _Asked, names: Sequence[str]) -> list[Vector]:
    """Return what may only move by powers of two: combinations of log scales, by name."""
    single: list[Vector] = [{n: Fraction(1)} for n in names]
    if asked.factors == "auto":
        short = [v for n, v in zip(names, single, strict=True) if own[n].element_size() < 4]
        return [*short, *asked.rounded]
    return single if asked.factors == "binary" else []


def _on_radius(own: Mapping[str, Tensor], asked: _Asked, radius: Radius) -> dict[str, _Move]:
    """Return the moves that give weights on spheres of their own the length asked for."""
    moves: dict[str, _Move] = {}
    demanded = asked.demands(own, exact=False)
    for sphere in asked.audit.spheres:
        names = [n for n in sphere.names if n in asked.audit.parameters]
        passengers = _passengers(asked.audit, asked.traced, [sphere.exponents])[0]
        exponents = {**passengers, **sphere.exponents}
        elsewhere = any(value(demand, exponents) for demand in demanded)
        if len(names) != 1 or names[0] in moves or elsewhere:
            continue
        (name,) = names
        vectors = sphere.axes.gather(_wide(own[name]))
        norms = vectors.norm(dim=-1).flatten()
        length = 1.0 if radius == "unit" else vectors.shape[-1] ** 0.5
        scale = torch.where(norms > 0, length / norms.clamp_min(1e-300), 1.0)
        if asked.factors == "binary":
            scale = torch.exp2(scale.log2().round())
        scale = torch.where((scale - 1).abs() <= 4 * torch.finfo(own[name].dtype).eps, 1.0, scale)
        for moved, e in exponents.items():
            power = float(e / sphere.exponents[name])
            if moved == name:
                moves[name] = _Move(scale**power, sphere.axes)
            else:
                follow = _following(own[moved], scale**power, name)
                moves[moved] = follow.after(moves.get(moved))
    if not moves:
        _warn_of_no_sphere(asked)
    return moves


def _warn_of_no_sphere(asked: _Asked) -> None:
    where = f"in {asked.audit.mode} mode" if asked.other is None else "in both modes"
    mended = "" if asked.audit.mode == "train" else "; audit the model in training mode"
    warn(f"no weight is on a sphere of its own {where}, so `radius` changes nothing{mended}")


def _following(buffer: Tensor, factors: Tensor, name: str) -> _Move:
    """Divide a buffer as the weight divides whose scale it follows, vector by vector."""
    count = factors.numel()
    if count == 1:
        return _Move(factors)
    if buffer.ndim != 1 or len(buffer) % count:
        raise CanonicalizeError(
            f"a buffer of shape {tuple(buffer.shape)} should follow the {count} vectors of "
            f"{name!r}, but does not divide like them; keep radius='initial'"
        )
    return _Move(factors.repeat_interleave(len(buffer) // count), VectorAxes(index=(0,)))


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


def _square(t: Tensor) -> float:
    return norm_of(t) ** 2


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
    fresh = {n: t.clone() if n in buffers else t for n, t in state.items()}
    try:
        with plain_execution(), torch.no_grad():
            result = call(model, fresh, inputs.args, inputs.kwargs)
            return [t.clone() for t in float_outputs(result, inputs.output)]
    except ModelError as error:
        raise CanonicalizeError(str(error)) from error


def _reason(audit: Audit, moves: Mapping[str, _Move], change: float, factors: Factors) -> str:
    """Say which move an eps notices most, or that it is rounding, and how to go on."""
    logs = {n: float(m.factors.log().abs().max()) for n, m in moves.items()}
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


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        first = (str(error) or repr(error)).splitlines()[0]
        raise CanonicalizeError(
            f"the model cannot be copied ({first}); give inplace=True"
        ) from error


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
