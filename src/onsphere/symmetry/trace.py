"""Run a model once and write down what its operations demand of the units of its weights."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from onsphere.symmetry.execution import (
    ModelError,
    OutputPicker,
    bare_name,
    call,
    float_outputs,
    plain_execution,
    weights,
)
from onsphere.symmetry.gathered import on_gathered
from onsphere.symmetry.operation import EpsSite, Ledger
from onsphere.symmetry.tracer import Tracer
from onsphere.symmetry.units import ANY, Form, Unit, row_space, sparse_basis


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
        basis: exponents by name: a basis of all scale symmetries of the parameters. Buffers
            appear beside them where they have to move along.
        exact: a basis of the part that the real eps does not break either: no eps stands beside
            anything that these scale.
        followers: for each vector of the basis, buffers that only *estimate* (running statistics
            in training mode) and should move along although the output does not need it.
        rounded: units of the tensors that the model rounds to a shorter type while it runs. A
            rescale by 2 to the power of a whole number passes through such a rounding unnoticed.
        eps: constants that break symmetries through their smallness only.
        unknown: operations without a rule.
        unread: parameters that no operation touched.
        data_dependent: whether the values of tensors decided what ran.
        written: buffers that the model writes while it runs.
        roles: what the model does with a weight: ``"convolution"``, ``"experts"`` (a matrix per
            entry of its first axis), ``"embedding"``, ``"heads=4"`` (its module holds an attention
            with so many heads).
    """

    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    basis: tuple[Mapping[str, Fraction], ...]
    exact: tuple[Mapping[str, Fraction], ...]
    followers: tuple[Mapping[str, Fraction], ...]
    rounded: tuple[Mapping[str, Fraction], ...]
    eps: tuple[EpsSite, ...]
    unknown: tuple[UnknownOp, ...]
    unread: tuple[str, ...]
    data_dependent: bool
    written: frozenset[str]
    roles: Mapping[str, frozenset[str]] = field(default_factory=dict)


@on_gathered
def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: OutputPicker | None = None,
    inert: Collection[str] = (),
) -> Trace:
    """Find all scale symmetries of a model at the level of whole tensors, exactly.

    Args:
        model: any module, in the mode it is to be analysed in; on the meta device it needs no
            memory.
        args: positional inputs of ``forward``.
        kwargs: keyword inputs.
        output: picks from the result the tensors that must not change; all float tensors without.
        inert: parameters known not to affect the output: they could as well be 0, which fits any
            unit, so they constrain nothing.

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
    parameters, buffers = weights(model)
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no parameters")
    names = [*parameters, *buffers]
    ledger = Ledger(len(names))
    state = {n: b.clone() for n, b in model.named_buffers()}
    held = {**parameters, **{n: state[n] for n in buffers}}
    _introduce(ledger, names, held, inert)
    tracer = Tracer(ledger)

    inputs = (tuple(args), dict(kwargs or {}))
    if any(p.is_meta for p in parameters.values()):
        inputs = tree_map(ledger.shadows.to_meta, inputs)

    def enter(path: str) -> None:
        ledger.where = bare_name(path)

    with plain_execution(), torch.no_grad(), tracer:
        result = call(model, {**parameters, **state}, *inputs, enter)
        outputs = float_outputs(result, output)
    for tensor in outputs:
        unit = ledger.settle(ledger.read(tensor))
        ledger.require_zero(unit.terms)
    touched = tracer.touched | {t.untyped_storage()._cdata for t in outputs}
    return _concluded(ledger, parameters, buffers, held, touched, tracer)


def _introduce(
    ledger: Ledger, names: Sequence[str], held: Mapping[str, Tensor], inert: Collection[str]
) -> None:
    """Give every weight its own unknown; weights that share memory share one unit."""
    for unknown, name in enumerate(names):
        seen = ledger.read(held[name])
        if bare_name(name) in inert:
            ledger.write(held[name], ANY)
        elif seen.terms:
            ledger.require_zero(seen.terms, Unit.of(unknown).terms)
        else:
            ledger.write(held[name], Unit.of(unknown))


def _concluded(
    ledger: Ledger,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    touched: set[int],
    tracer: Tracer,
) -> Trace:
    names = [*map(bare_name, parameters), *map(bare_name, buffers)]
    vectors = ledger.constraints.null_space()
    count = len(parameters)
    kept = sparse_basis(row_space(vectors, set(range(count))), count)
    kept = [_without_idle_buffers(v, vectors, count) for v in kept]
    follow = [_following(v, ledger, set(range(count, len(names)))) for v in kept]
    for site in list(ledger.sites.values()):
        ledger.require_zero(site.form)
    exact = row_space(ledger.constraints.null_space(), set(range(count)))
    exact = [_without_idle_buffers(v, vectors, count) for v in exact]
    unread = [
        n
        for n, p in zip(names, parameters.values(), strict=False)
        if id(p) not in touched and p.untyped_storage()._cdata not in touched
    ]
    written = tracer.written | ledger.estimates
    return Trace(
        parameters=tuple(names[:count]),
        buffers=tuple(names[count:]),
        basis=tuple({names[k]: c for k, c in v.items()} for v in kept),
        exact=tuple({names[k]: c for k, c in v.items()} for v in exact),
        followers=tuple({names[k]: c for k, c in v.items()} for v in follow),
        rounded=_named(ledger.rounded, names),
        eps=tuple(replace(s, form={}) for s in ledger.sites.values()),
        unknown=tuple(UnknownOp(*key) for key in ledger.unknown),
        unread=tuple(unread),
        data_dependent=tracer.data_dependent,
        written=frozenset(
            bare_name(n) for n in buffers if held[n].untyped_storage()._cdata in written
        ),
        roles={n: _roles(n, held[own], tracer) for n, own in zip(names, parameters, strict=False)},
    )


def _roles(name: str, weight: Tensor, tracer: Tracer) -> frozenset[str]:
    inside = [path for path in tracer.heads if path and name.startswith(f"{path}.")]
    heads = {f"heads={tracer.heads[max(inside, key=len)]}"} if inside else set()
    return frozenset(tracer.roles.get(weight.untyped_storage()._cdata, set()) | heads)


def _named(forms: Sequence[Form], names: Sequence[str]) -> tuple[Mapping[str, Fraction], ...]:
    different = {frozenset(form.items()) for form in forms}
    return tuple({names[k]: c for k, c in sorted(form)} for form in sorted(different, key=sorted))


def _without_idle_buffers(v: Form, vectors: Sequence[Form], count: int) -> Form:
    """Drop from a symmetry the buffers that are free to do what they like."""
    idle = {next(iter(u)) for u in vectors if len(u) == 1 and next(iter(u)) >= count}
    return {k: c for k, c in v.items() if k not in idle}


def _following(v: Form, ledger: Ledger, buffers: set[int]) -> Form:
    """Return how far estimating buffers move when a symmetry acts, where that is well defined."""
    found: dict[int, set[Fraction]] = {}
    for buffer, unit in ledger.followers:
        (name,) = buffer.terms if len(buffer.terms) == 1 else (None,)
        if name in buffers and name not in v:
            power = sum((c * v.get(k, Fraction(0)) for k, c in unit.terms.items()), Fraction(0))
            found.setdefault(name, set()).add(power)
    return {k: p.pop() for k, p in found.items() if len(p) == 1 and p != {Fraction(0)}}
