r"""The same function, a unique representative of its weights.

Rescaling weights along the symmetries by :math:`\exp(u)`, :math:`u = A t`, leaves the function
alone. Among all these weights there is one of least total norm: the minimum over :math:`t` of the
convex :math:`\sum_i e^{2 u_i}|p_i|^2` (Kempf and Ness, 1979), at which every traded pair is
balanced. Directions along which the sum falls to 0 are spheres: there the geometric mean of the
norms is kept instead, and weights on spheres of their own get the length asked for.
"""

import copy
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onsphere.errors import OnsphereError
from onsphere.symmetry.audit import Audit, Inputs
from onsphere.symmetry.certificate import relative_change
from onsphere.symmetry.trace import (
    ModelError,
    OutputPicker,
    bare_name,
    call,
    float_outputs,
    plain_execution,
    unwrapped,
)

Radius = Literal["initial", "unit", "fan_in"]

_ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_GONE = -15.0
"""A log scale below this, still falling, has no minimum: the weight lies on a sphere."""


class CannotCanonicalize(OnsphereError, ValueError):
    """A model has no canonical form that could be verified; the message says why."""


def canonicalize(
    model: nn.Module,
    audit: Audit,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    radius: Radius = "initial",
    exact: bool = True,
    output: OutputPicker | None = None,
    inplace: bool = False,
) -> nn.Module:
    r"""Return the same function with balanced weights; verified on inputs before it returns.

    Args:
        model: the audited model, in the mode it was audited in.
        audit: its audit.
        args: inputs to verify on; those of the audit without.
        kwargs: keyword inputs to verify on.
        radius: length of weights on spheres of their own: the one they have, 1 per vector, or the
            square root of the number of entries of a vector.
        exact: move only in ways that the real eps does not notice. ``False`` also moves scales
            that stand beside an eps; the function then changes by the audit's leaks.
        output: picks the tensors to keep fixed.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The model with canonical weights. With ``radius="initial"`` the total norm never grows.

    Raises:
        CannotCanonicalize: the audit does not fit, there are no inputs, or the output moved.

    Example:
        >>> from onsphere.symmetry import audit
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.mul_(8)
        >>> balanced = canonicalize(net, audit(net, torch.ones(1, 2)))
        >>> bool(torch.isclose(balanced[0].weight.norm(), balanced[2].weight.norm()))
        True
    """
    inputs = _inputs(audit, args, kwargs, output)
    source = unwrapped(model)
    _check_fits(source, audit)
    own = {bare_name(n): t for n, t in [*source.named_parameters(), *source.named_buffers()]}
    moves = _log_scales(own, audit, exact)
    wide = {
        n: t.detach().to(torch.float64) * moves.get(n, 1.0) for n, t in own.items() if n in moves
    }
    if radius != "initial" and not exact:
        wide |= _on_radius(own, audit, radius)
    changed = {n: t.to(own[n].dtype) for n, t in wide.items()}
    _verify(source, own, changed, inputs, None if exact else audit)
    target = model if inplace else copy.deepcopy(model)
    names = {
        bare_name(n): t
        for n, t in [*unwrapped(target).named_parameters(), *unwrapped(target).named_buffers()]
    }
    with torch.no_grad():
        for name, t in changed.items():
            names[name].copy_(t)
    return target


def _inputs(
    audit: Audit,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    output: OutputPicker | None,
) -> Inputs:
    if args is not None or kwargs is not None:
        given = (args,) if isinstance(args, Tensor) else tuple(args or ())
        return Inputs(given, dict(kwargs or {}), output)
    if audit.inputs is None:
        raise CannotCanonicalize(
            "there is nothing to verify the result on: this audit was read from a file; "
            "give `args` (and `kwargs`), the inputs of the model"
        )
    return audit.inputs


def _check_fits(model: nn.Module, audit: Audit) -> None:
    mode = "train" if model.training else "eval"
    if mode != audit.mode:
        raise CannotCanonicalize(
            f"the model is in {mode} mode, but was audited in {audit.mode} mode, where other "
            f"scales are free; call model.{audit.mode}() or audit it again"
        )
    shapes = {bare_name(n): tuple(p.shape) for n, p in model.named_parameters()}
    for name, shape in audit.parameters.items():
        if shapes.get(name) != tuple(shape):
            raise CannotCanonicalize(
                f"the audit knows {name!r} with shape {tuple(shape)}, the model has "
                f"{shapes.get(name, 'no such parameter')}; audit this model again"
            )
    if any(p.is_meta for p in model.parameters()):
        raise CannotCanonicalize("the model has no values: it was built without memory")


def _log_scales(own: Mapping[str, Tensor], audit: Audit, exact: bool) -> dict[str, float]:
    """Return the factor of every weight and buffer at the point of least norm."""
    alone = set(audit.own_spheres()) | set(audit.inert)
    basis = audit.exact_symmetries if exact else audit.scale_symmetries
    vectors = [v for v in basis if not (len(v) == 1 and next(iter(v)) in alone)]
    if not vectors:
        return {}
    followers = {
        tuple(sorted(v.items())): f
        for v, f in zip(audit.scale_symmetries, audit.followers, strict=True)
    }
    whole = [{**v, **followers.get(tuple(sorted(v.items())), {})} for v in vectors]
    names = sorted({n for v in whole for n in v})
    a = torch.tensor(
        [[float(v.get(n, Fraction(0))) for v in whole] for n in names], dtype=torch.float64
    )
    weight = torch.tensor(
        [
            float(own[n].detach().double().norm()) ** 2 if n in audit.parameters else 0.0
            for n in names
        ],
        dtype=torch.float64,
    )
    u = least_norm(a, weight)
    return {n: x for n, x in zip(names, u.exp().tolist(), strict=True) if x != 1.0}


def least_norm(a: Tensor, weight: Tensor) -> Tensor:
    r"""Minimize :math:`\sum_i w_i e^{2 (A t)_i}`, with the geometric mean kept where it falls to 0.

    Args:
        a: exponents, shape ``(weights, symmetries)``.
        weight: squared norms; a weight that is 0 (or a buffer) does not count.

    Returns:
        Log scales :math:`u = A t`, exactly 0 where nothing moves.

    Example:
        >>> pair = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        >>> least_norm(pair, torch.tensor([16.0, 1.0]).double()).exp().round(decimals=6).tolist()
        [0.5, 2.0]
    """
    basis = _orthonormal(a)
    counted = weight > 0
    free = _newton(basis, weight, steps=150)
    falling = counted & (free < _GONE)
    if bool(falling.any()):
        keep = _components(basis, falling).to(basis)
        # Directions that keep the geometric mean of each connected set of falling weights.
        mixed = keep @ basis
        _, s, vh = torch.linalg.svd(mixed)
        rank = int((s > 1e-9 * s.max().clamp_min(1e-300)).sum())
        basis = basis @ vh[rank:].T
        free = _newton(basis, weight, steps=150) if basis.shape[1] else torch.zeros_like(weight)
    return torch.where(free.abs() < 1e-9, torch.zeros_like(free), free)


def _orthonormal(a: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(a, full_matrices=False)
    return u[:, s > 1e-10 * s.max()]


def _components(basis: Tensor, falling: Tensor) -> Tensor:
    """Return one row per connected set of weights, 1 where a falling weight belongs to it."""
    linked = (basis @ basis.T).abs() > 1e-9
    label = torch.arange(len(falling))
    for _ in range(len(falling)):
        spread = torch.where(linked, label[None, :], len(falling)).amin(1)
        spread = torch.minimum(spread, label)
        if bool((spread == label).all()):
            break
        label = spread
    rows = [(label == k) & falling for k in sorted(set(label.tolist()))]
    return torch.stack([r for r in rows if bool(r.any())])


def _newton(basis: Tensor, weight: Tensor, steps: int) -> Tensor:
    """Damped Newton; steps are at most 1 in any log scale, so a fall to 0 shows as a drift."""
    t = basis.new_zeros(basis.shape[1])
    for _ in range(steps):
        terms = weight * (2 * (basis @ t)).exp()
        gradient = basis.T @ terms
        size = terms.sum()
        if float(gradient.abs().max()) <= 1e-15 * float(size):
            break
        # Each row of weights is scaled by its own share: tiny terms are resolved like large ones.
        root = (terms.clamp_min(1e-280)).sqrt()[:, None] * basis
        step = -torch.linalg.lstsq(
            root, 0.5 * torch.where(weight > 0, terms.sqrt(), 0.0)[:, None], driver="gelsd"
        ).solution[:, 0]
        reach = float((basis @ step).abs().max())
        step = step if reach <= 1 else step / reach
        while float((weight * (2 * (basis @ (t + step))).exp()).sum()) > float(size) * (1 + 1e-15):
            step = step / 2
            if float(step.abs().max()) < 1e-14:
                return basis @ t
        t = t + step
    return basis @ t


def _on_radius(own: Mapping[str, Tensor], audit: Audit, radius: Radius) -> dict[str, Tensor]:
    found = {}
    for name, sphere in audit.own_spheres().items():
        p = own[name].detach().to(torch.float64)
        vectors = sphere.axes.gather(p)
        norms = vectors.norm(dim=-1, keepdim=True)
        length = 1.0 if radius == "unit" else vectors.shape[-1] ** 0.5
        scaled = torch.where(norms > 0, vectors * (length / norms.clamp_min(1e-300)), vectors)
        found[name] = sphere.axes.scatter(scaled, p.shape)
    return found


def _verify(
    model: nn.Module,
    own: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    inputs: Inputs,
    leaky: Audit | None,
) -> None:
    real = {bare_name(n): n for n, _ in [*model.named_parameters(), *model.named_buffers()]}
    before = _outputs(model, {real[n]: t for n, t in own.items()}, inputs)
    after = _outputs(model, {real[n]: changed.get(n, t) for n, t in own.items()}, inputs)
    dtype = max((t.dtype for t in before), key=lambda d: torch.finfo(d).eps)
    change = relative_change(before, after)
    allowed = _ALLOWED.get(dtype, 1e-5)
    if leaky is not None:
        allowed = max(allowed, 0.1)
    if not change <= allowed:
        raise CannotCanonicalize(
            f"the output would change by {change:.1e} of its size, more than {allowed:.0e}; "
            "the model is left as it was"
        )


def _outputs(model: nn.Module, state: Mapping[str, Tensor], inputs: Inputs) -> list[Tensor]:
    buffers = {n for n, _ in model.named_buffers()}
    fresh = {n: t.clone() if n in buffers else t for n, t in state.items()}
    try:
        with plain_execution(), torch.no_grad():
            result = call(model, fresh, inputs.args, inputs.kwargs)
            return [t.clone() for t in float_outputs(result, inputs.output)]
    except ModelError as error:
        raise CannotCanonicalize(str(error)) from error
