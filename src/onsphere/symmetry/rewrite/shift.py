r"""Other offsets, the same function: a copy of a model moved along its families of shifts.

What is measured of a model and differs in such a copy depends on how offsets are written down, and
not on the function: norms of biases, means of rows, distances between checkpoints.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from onsphere._torch.execution import (
    ModelError,
    bare_name,
    call,
    gradients_as_used,
    leaf_as,
    plain_execution,
    weights,
)
from onsphere._torch.materialize import gathered
from onsphere._torch.substitution import kept, unchanged
from onsphere.errors import OnsphereError
from onsphere.symmetry.audit_result import Audit
from onsphere.symmetry.claims import ShiftFamily
from onsphere.symmetry.exact.trace import Call, trace
from onsphere.symmetry.exact.writes import writes_taken_back
from onsphere.symmetry.rewrite.modes import other_mode
from onsphere.symmetry.rewrite.verification import copied
from onsphere.symmetry.shifts.amounts import Amounts, learn
from onsphere.symmetry.shifts.families import Found, followed_shifts
from onsphere.symmetry.shifts.solution import Summand


class ShiftError(OnsphereError, ValueError):
    """A model cannot be shifted by this audit; the message says why."""


def shifted(
    model: nn.Module,
    audit: Audit,
    families: ShiftFamily | Iterable[ShiftFamily] | None = None,
    *,
    size: float = 1.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Return a copy of a model with other offsets that computes the same function.

    Along each family :math:`p_i \leftarrow p_i + D_i v` with random amounts :math:`v`, all at once.

    Args:
        model: the audited model, in the mode it was audited in.
        audit: its audit, which still holds its inputs: the maps :math:`D_i` are read off a run.
        families: some of ``audit.shift_families``; all without.
        size: standard deviation of the amounts, in the units of the weights.
        generator: source of the random numbers; seeded with 0 if not given.

    Returns:
        The copy: the same up to rounding, which is that of the model's own type.

    Raises:
        ShiftError: the audit is of another model or mode, was read from a file, or found no family;
            a family that is not among them; a model on the meta device, or one that cannot be
            copied; a size that is no finite number; weights that move along, and that no input
            of the audit reaches with the weights of the model.

    Example:
        >>> from onsphere.symmetry import audit
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).eval()
        >>> x = torch.ones(1, 2)
        >>> twin = shifted(net, audit(net, x))
        >>> torch.equal(twin[0].bias, net[0].bias), torch.allclose(twin(x), net(x), atol=1e-5)
        (False, True)
    """
    if words := other_mode(model, audit):
        raise ShiftError(words)
    if not isinstance(size, int | float | np.number) or not math.isfinite(size):
        raise ShiftError(f"size is a finite number, got {size!r}")
    wanted = audit.shift_families if families is None else families
    wanted = [wanted] if isinstance(wanted, ShiftFamily) else list(wanted)
    if not wanted and families is not None:
        raise ShiftError("no family is given; leave families out for all of audit.shift_families")
    if not wanted:
        raise ShiftError("the model has no family of shifts: there is no other copy of it")
    if any(f not in audit.shift_families for f in wanted):
        raise ShiftError("a family is not of this audit; take some of audit.shift_families")
    if audit.inputs is None:
        raise ShiftError(
            "this audit holds no inputs (it was read from a file), and the model has to be run; "
            "audit it again"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ShiftError("the model is on the meta device, where there is nothing to add to")
    if any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(_given(audit))):
        raise ShiftError("this audit was made without memory; audit the model that is to be moved")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    twin = copied(model, ShiftError)
    with torch.no_grad(), gathered(twin, write=True) as inner:
        own = {bare_name(n): t for n, t in [*inner.named_parameters(), *inner.named_buffers()]}
        try:
            amounts = _added(inner, audit, wanted, size, generator)
        except ModelError as error:
            raise ShiftError(f"on the inputs of this audit {error}; audit it again") from error
        for name, added in amounts.items():
            own[name].add_(added.to(own[name]))
    return twin


def _given(audit: Audit) -> list[object]:
    """Return all inputs of an audit."""
    return [] if audit.inputs is None else [audit.inputs.args, audit.inputs.kwargs]


def _added(
    model: nn.Module,
    audit: Audit,
    wanted: Sequence[ShiftFamily],
    size: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return what is added to each weight and buffer."""
    assert audit.inputs is not None
    args, kwargs, output = audit.inputs.args, audit.inputs.kwargs, audit.inputs.output
    others = audit.inputs.others
    traced = trace(model, args, kwargs, output=output, others=others)
    solution, found = followed_shifts(
        model, args, kwargs, output=output, others=others, held=traced.still, kept=traced.kept
    )
    summands, labels = _told(wanted, found, traced.data_dependent)
    amounts = Amounts(solution, labels, generator, size)
    parameters, persistent = weights(model)
    leaves = {n: leaf_as(p, p.detach().clone()) for n, p in parameters.items()}
    buffers = {n: t.clone() for n, t in model.named_buffers()}

    def run(given: Call) -> None:
        fresh = {n: t.clone() for n, t in buffers.items()}
        autograd = gradients_as_used(model, traced.differentiates)
        own = writes_taken_back(leaves.values())
        with plain_execution(given.seed), autograd, unchanged(traced.outside), own:
            call(model, {**leaves, **fresh}, given.args, dict(given.kwargs), lambda _: None, kept)

    for given in (Call(args, kwargs), *others):
        learn(amounts, partial(run, given), leaves, buffers, persistent)
        added = amounts.added(summands)
        unknown = [n for n, t in added.items() if not bool(t.isfinite().all())]
        if not unknown:
            return added
    raise ShiftError(
        f"what is added to {unknown[0]!r} is not finite at these weights, or no input that the "
        "audit holds reaches all that it is made of"
    )


def _told(
    wanted: Sequence[ShiftFamily], found: Sequence[Found], data_dependent: bool
) -> tuple[list[Summand], NDArray[np.int64]]:
    """Return what families add and the labels of their amounts.

    An audit leaves out of a family what others do that move a weight alone, and gives the rest
    another unit. Where several are left alike, any of them says the same.

    Args:
        wanted: as the audit writes them.
        found: all that hold, with all their moves.
        data_dependent: whether values decide what runs.
    """
    used: dict[int, Found] = {}
    summands: list[Summand] = []
    for family in wanted:
        fitting = [(k, told) for k, f in enumerate(found) if (told := _left_of(f, family))]
        if not fitting and data_dependent:
            raise ShiftError(
                "values decide what this model runs, and with these weights no input of its audit "
                "reaches all that moves; audit it on inputs that do, if there are any"
            )
        if not fitting:
            raise ShiftError("the model is not the audited one: audit it again")
        k, told = min(fitting, key=lambda x: (x[0] in used, len(found[x[0]].summands)))
        used[k] = found[k]
        summands += told
    return summands, np.concatenate([f.labels for f in used.values()])


def _left_of(found: Found, family: ShiftFamily) -> list[Summand]:
    """Return what is added by the moves that an audit left of a family; none if it is another."""
    if found.family.count != family.count or not {*family.names} <= {*found.family.names}:
        return []
    moves, first = {*family.moves}, family.moves[0]
    for unit in {m.factor for m in found.family.moves if m.name == first.name}:
        own = [replace(m, factor=m.factor / unit) for m in found.family.moves]
        if moves <= {*own}:
            return [s for m, s in zip(own, found.summands, strict=True) if m in moves]
    return []
