r"""The control experiment: a copy of a model with other scales and the same function.

A model's scale symmetries multiply its weights by :math:`a^e` without changing what it computes. A
measure that differs between the model and such a copy is about how scales are booked between its
weights, and says nothing of the function. Factors are powers of two, so that every product and
every rounding inside the model is the same as before.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import inf, lcm, log2

import numpy as np
import torch
from torch import Tensor, nn

from onsphere._torch.execution import bare_name
from onsphere._torch.materialize import gathered
from onsphere.errors import OnsphereError
from onsphere.symmetry.audit_result import Audit
from onsphere.symmetry.numeric.certificate import combined
from onsphere.symmetry.rewrite.modes import other_mode
from onsphere.symmetry.rewrite.verification import copied
from onsphere.symmetry.subspaces.held_vectors import HeldWeight

_TRIES = 50


class RescaleError(OnsphereError, ValueError):
    """A model cannot be rescaled by this audit; the message says why."""


def rescaled(
    model: nn.Module,
    audit: Audit,
    *,
    rescalings: bool = True,
    octaves: int = 4,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Return a copy of a model with other scales that computes the same function.

    Each scale symmetry of the audit is followed by a random number of octaves, upwards where it
    makes weights larger, so that an eps beside them matters less than before. Where a running
    variance moves, the eps that is added to it moves along; other eps stay, and are all that can
    change the output. A symmetry with fractional exponents takes steps of as many octaves as make
    all of them whole.

    Args:
        model: the audited model, in the mode it was audited in; the copy is the same function in
            that mode only, for measuring and not for training.
        audit: its audit.
        rescalings: follow the symmetries that make one weight larger and another smaller as well.
            Without, weights only move together with the statistics that normalize them.
        octaves: the most octaves along one symmetry.
        generator: source of the random numbers; seeded with 0 if not given.

    Returns:
        The copy.

    Raises:
        RescaleError: the audit is of another model or mode or found no scale symmetry of
            whole weights, or the model cannot be copied or is on the meta device.

    Example:
        >>> from onsphere.symmetry import audit
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).eval()
        >>> x = torch.ones(1, 2)
        >>> twin = rescaled(net, audit(net, x))
        >>> bool(twin[0].weight.norm() > net[0].weight.norm()), torch.equal(twin(x), net(x))
        (True, True)
    """
    _check_mode(model, audit)
    symmetries = [
        v
        for v in audit.scale_symmetries
        if not set(v) <= set(audit.inert) and (rescalings or len({e > 0 for e in v.values()}) == 1)
    ]
    if not symmetries:
        kind = "scale symmetry" if rescalings else "weight that can be scaled alone"
        families = audit.families and rescalings
        raise RescaleError(
            f"the model has no {kind}"
            + (" of whole weights, and those by channel are not followed here" if families else "")
            + ": there is no other copy of it"
        )
    if not isinstance(octaves, int | np.integer) or octaves < 1:
        raise RescaleError(f"octaves is a whole number, at least 1, got {octaves!r}")
    if any(p.is_meta for p in model.parameters()):
        raise RescaleError("the model is on the meta device, where there is nothing to rescale")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return _moved_copy(model, _drawn(symmetries, audit, octaves, generator))


def with_norms(model: nn.Module, audit: Audit, norms: Mapping[str, float]) -> nn.Module:
    r"""Return a copy of a model with given norms of some weights that computes the same function.

    Moves along the scale symmetries by :math:`e^{t_k}` with
    :math:`\sum_k t_k e_{ki} = \log(r_i/|p_i|)` for every named weight :math:`i`, at the least
    :math:`|t|` where several do it.

    Args:
        model: the audited model, in the mode it was audited in.
        audit: its audit.
        norms: parameter -> the norm it shall have; those of
            :meth:`onsphere.Audit.fixed_scales` can be chosen freely.

    Returns:
        The copy: the same up to rounding, and up to eps, which stay (but for those of running
        variances).

    Raises:
        RescaleError: the audit is of another model or mode; a norm that is not positive, or that no
            symmetry reaches; a weight that is 0, or on the meta device; a model that cannot be
            copied.

    Example:
        >>> from onsphere.symmetry import audit
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
        >>> x = torch.ones(1, 2)
        >>> twin = with_norms(net, audit(net, x), {"0.weight": 5.0})
        >>> round(twin[0].weight.norm().item(), 4), torch.allclose(twin(x), net(x))
        (5.0, True)
    """
    _check_mode(model, audit)
    own = audit.parameters_of(model)
    for name, norm in norms.items():
        if name not in own:
            raise RescaleError(
                f"the audit has no parameter {name!r}; a tied weight is named by its first place"
            )
        if not 0 < norm < inf:
            raise RescaleError(f"a norm is positive and finite; {name!r} shall get {norm}")
        if own[name].is_meta:
            raise RescaleError(f"the model is on the meta device, where {name!r} has no norm")
        if not bool(own[name].detach().any()):
            raise RescaleError(f"{name!r} is 0, and no factor gives it norm {norm}")
    factors = {n: r / norm_of(own[n]) for n, r in norms.items()}
    return _moved_copy(model, octaves_of(audit, factors))


def with_vector_norms(
    model: nn.Module, audit: Audit, norms: Mapping[str, Tensor | float]
) -> nn.Module:
    r"""Return a copy of a model with given norms of rows, columns and heads and the same function.

    The weights are those of ``audit.fixed_scales(model, granularity="vector")``, taken in its
    order: each has symmetries of its own that scale its vectors and leave all weights before it
    alone, so every norm is met once, in closed form.

    Args:
        model: the audited model, in the mode it was audited in.
        audit: its audit.
        norms: parameter -> the norms of its vectors in their order, or one for all of them. Held
            weights that are not named keep theirs.

    Returns:
        The copy: the same up to rounding, and up to eps, which stay.

    Raises:
        RescaleError: the audit is of another model or mode; a weight that is not held, or another
            number of norms than it has vectors; a norm that is not positive; a model on the meta
            device, or one that cannot be copied.

    Example:
        >>> from onsphere.symmetry import audit
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
        >>> x = torch.ones(1, 2)
        >>> twin = with_vector_norms(net, audit(net, x), {"0.weight": torch.tensor([1.0, 2, 3])})
        >>> twin[0].weight.norm(dim=1).round(decimals=4).tolist(), torch.allclose(twin(x), net(x))
        ([1.0, 2.0, 3.0], True)
    """
    _check_mode(model, audit)
    own = audit.parameters_of(model)
    if any(p.is_meta for p in own.values()):
        raise RescaleError("the model is on the meta device, where weights have no norms")
    chosen = audit.fixed_scales(model, granularity="vector")
    for name, norm in norms.items():
        if name not in chosen.held:
            raise RescaleError(
                f"{name!r} is not held by its vectors; "
                'audit.fixed_scales(model, granularity="vector").held says which are'
            )
        asked, count = torch.as_tensor(norm), chosen.held[name].count(own[name].shape)
        if asked.numel() not in (1, count):
            raise RescaleError(f"{name!r} has {count} vectors, not {asked.numel()}")
        if not bool(((asked > 0) & asked.isfinite()).all()):
            raise RescaleError(f"norms are positive and finite; those for {name!r} are not")
    twin = copied(model, RescaleError)
    with torch.no_grad(), gathered(twin, write=True) as inner:
        there = {bare_name(n): p for n, p in inner.named_parameters()}
        moved = moved_to_norms({n: p.detach() for n, p in there.items()}, chosen.order, norms)
        for name, p in there.items():
            p.copy_(moved[name])
    return twin


def moved_to_norms(
    state: Mapping[str, Tensor],
    order: Sequence[HeldWeight],
    norms: Mapping[str, Tensor | float],
) -> dict[str, Tensor]:
    """Move weights along symmetries, in float64, until the vectors of some have given norms.

    Args:
        state: weights by name.
        order: what is held, each with its symmetries, in the order in which norms are met.
        norms: those of the vectors of some of these; the others keep theirs.
    """
    now = {n: t.double() if t.is_floating_point() else t for n, t in state.items()}
    shapes = {n: tuple(t.shape) for n, t in state.items()}
    before = {h.name: h.axes.norms(now[h.name]).flatten() for h in order}
    for h in order:
        have = h.axes.norms(now[h.name]).flatten()
        wanted = torch.as_tensor(norms.get(h.name, before[h.name])).to(have)
        amounts = (wanted / have).log().expand_as(have)
        for move in h.moves:
            own = amounts.cpu()[move.owner]
            for name, logs in move.family.log_factors(own, shapes).items():
                now[name] = now[name] * logs.exp().to(now[name].device)
    return {n: t.to(state[n].dtype) for n, t in now.items()}


def norm_of(t: Tensor) -> float:
    """Return the norm of a tensor, complex ones too, summed in float64.

    Example:
        >>> norm_of(torch.tensor([3 + 4j, 12.0]))
        13.0
    """
    dtype = torch.complex128 if t.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(t.detach(), dtype=dtype))


def octaves_of(audit: Audit, factors: Mapping[str, float]) -> dict[str, float]:
    """Return how many octaves every weight and buffer moves where some change by given factors.

    Args:
        audit: whose scale symmetries are followed.
        factors: parameter -> by what it is multiplied.

    Raises:
        RescaleError: no combination of the symmetries does it.
    """
    rows = [[float(v.get(n, 0)) for v in audit.scale_symmetries] for n in factors]
    a = torch.tensor(rows, dtype=torch.float64).reshape(len(factors), len(audit.scale_symmetries))
    b = torch.tensor([log2(x) for x in factors.values()], dtype=torch.float64)
    steps = torch.linalg.pinv(a) @ b
    left = (a @ steps - b).abs()
    if factors and float(left.max()) > 1e-9 * max(1.0, float(b.abs().max())):
        name = list(factors)[int(left.argmax())]
        raise RescaleError(
            f"no rescale of this model reaches these norms together (see {name!r}); those of "
            "audit.fixed_scales(model).held can be chosen freely"
        )
    return combined(audit.scale_symmetries, steps.tolist())


def _check_mode(model: nn.Module, audit: Audit) -> None:
    if words := other_mode(model, audit):
        raise RescaleError(words)


def _moved_copy(model: nn.Module, octaves: Mapping[str, float]) -> nn.Module:
    twin = copied(model, RescaleError)
    with gathered(twin, write=True) as inner:
        _rescale(inner, octaves)
    return twin


def _drawn(
    symmetries: list[dict[str, Fraction]],
    audit: Audit,
    octaves: int,
    generator: torch.Generator,
) -> dict[str, int]:
    """Draw a combination of the symmetries that leaves no weight where it was, if one is met."""
    best: dict[str, int] = {}
    for _ in range(_TRIES):
        moves: dict[str, int] = {}
        for symmetry in symmetries:
            steps = int(torch.randint(1, octaves + 1, (), generator=generator))
            steps *= _direction(symmetry, audit, generator)
            steps *= lcm(*(e.denominator for e in symmetry.values()))
            for name, e in symmetry.items():
                moves[name] = moves.get(name, 0) + int(steps * e)
        if _moved(moves, audit) > _moved(best, audit):
            best = moves
        if all(moves[name] for name in moves if name in audit.parameters):
            return moves
    return best


def _moved(moves: Mapping[str, int], audit: Audit) -> int:
    return sum(bool(n) for name, n in moves.items() if name in audit.parameters)


def _direction(symmetry: Mapping[str, Fraction], audit: Audit, generator: torch.Generator) -> int:
    total = sum((e for name, e in symmetry.items() if name in audit.parameters), Fraction(0))
    if total:
        return 1 if total > 0 else -1
    return 1 if float(torch.rand((), generator=generator)) < 0.5 else -1


@torch.no_grad()
def _rescale(model: nn.Module, moves: Mapping[str, float]) -> None:
    own: dict[str, Tensor] = {
        bare_name(n): t for n, t in [*model.named_parameters(), *model.named_buffers()]
    }
    missing = [name for name in moves if name not in own]
    if missing:
        raise RescaleError(f"the model has no {missing[0]!r}: audit this model again")
    for name, octaves in moves.items():
        own[name].mul_(2.0**octaves)
    for path, module in model.named_modules():
        variance = bare_name(f"{path}.running_var" if path else "running_var")
        eps = getattr(module, "eps", None)
        if variance in moves and isinstance(eps, float):
            module.eps = eps * 2.0 ** moves[variance]
