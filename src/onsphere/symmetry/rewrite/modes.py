"""What holds in training mode and in evaluation mode alike, so that a network trains on as before.

In evaluation mode BatchNorm's running statistics are numbers like weights, and a gain trades with
the variance that divides before it. In training mode the batch divides, and the same change of
the gain is another network. So a symmetry of one mode is asked of the other, by a trace there.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

from torch import nn

from onsphere.symmetry.exact.trace import Trace
from onsphere.symmetry.exact.units.linear_forms import null_space
from onsphere.symmetry.result import AuditResult
from onsphere.symmetry.rewrite.balancing.least_norm import Vector, annihilated


def mode_of(training: bool) -> str:
    """Return the name of a mode as an audit writes it."""
    return "train" if training else "eval"


def other_mode(model: object, audit: object) -> str:
    """Return what refuses a model in another mode than it was audited in; nothing where it fits.

    What is no model, and no audit of one, is refused as well.
    """
    if not (isinstance(model, nn.Module) and isinstance(audit, AuditResult)):
        given = type(model).__name__, type(audit).__name__
        return f"give the model and then its audit, audit(model, inputs); got {' and '.join(given)}"
    mode = mode_of(model.training)
    if mode == audit.mode:
        return ""
    return (
        f"the model is in {mode} mode, but was audited in {audit.mode} mode, where other "
        f"scales are free; call model.{audit.mode}() or audit it again"
    )


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model in a mode by its own ``train``, and every module back into the one it was in."""
    if model.training == training:
        yield
        return
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


def demands(
    traced: Trace, basis: Sequence[Vector], inert: Collection[str], names: Collection[str]
) -> list[Vector]:
    """Return what a rescale must satisfy to keep the function of a mode: forms that vanish on it.

    Args:
        traced: the trace in that mode.
        basis: those of its symmetries that count, ``traced.basis`` or ``traced.exact``.
        inert: weights without effect, which may stay where a symmetry would move them.
        names: the weights and buffers that may move.
    """
    idle = traced.written - traced.moving  # estimates that the output of this mode does not use
    alone = [{n: Fraction(1)} for n in sorted({*inert} | idle)]
    order = list(dict.fromkeys([*names, *(n for v in [*basis, *alone] for n in v)]))
    index = {n: i for i, n in enumerate(order)}
    vectors = [{index[n]: c for n, c in v.items()} for v in [*basis, *alone]]
    return [{order[i]: c for i, c in form.items()} for form in null_space(vectors, len(order))]


def value(demand: Vector, rescale: Vector) -> Fraction:
    """Return what a rescale does to a demand; 0 where it satisfies it."""
    return sum((c * rescale[n] for n, c in demand.items() if n in rescale), Fraction(0))


def shared(symmetries: Sequence[Vector], demanded: Sequence[Vector]) -> list[Vector]:
    """Return a basis of the combinations of symmetries that satisfy all demands of another mode."""
    if not any(value(d, v) for d in demanded for v in symmetries):
        return list(symmetries)
    names = list(dict.fromkeys(n for v in symmetries for n in v))
    index = {n: i for i, n in enumerate(names)}
    basis = [{index[n]: c for n, c in v.items()} for v in symmetries]
    forms = [{index[n]: c for n, c in d.items() if n in index} for d in demanded]
    return [{names[i]: c for i, c in v.items()} for v in annihilated(basis, forms)]
