"""Rules of operations that normalize: the unit of the input is forgotten.

This is the claim "normalization projects onto a sphere" written as a typing rule: whatever the
input's unit was, the output has the gain's unit.
"""

from fractions import Fraction
from typing import Any

from torch import Tensor

from onsphere.symmetry.exact.operation import Operation
from onsphere.symmetry.exact.units.linear_forms import ZERO, Unit


def layer_norm(op: Operation) -> tuple[Unit, ...]:
    """Forget the unit; results: output, mean, inverse standard deviation."""
    unit = op.unit(op["input"])
    op.note_eps(op["eps"], unit)
    return (_affine(op, op["weight"], op["bias"]), unit, unit * -1)


def rms_norm(op: Operation) -> tuple[Unit, ...]:
    """Forget the unit; results: output, inverse root mean square."""
    unit = op.unit(op["input"])
    op.note_eps(op["eps"], unit)
    return (_affine(op, op["weight"], None), unit * -1)


def group_norm(op: Operation) -> tuple[Unit, ...]:
    """Forget the unit; results: output, mean, inverse standard deviation."""
    unit = op.unit(op["input"])
    op.note_eps(op["eps"], unit)
    return (_affine(op, op["weight"], op["bias"]), unit, unit * -1)


def measures_batch(op: Operation) -> bool:
    """Return whether a batch norm measures its batch, and does not read running statistics."""
    if op.get("running_mean") is None or "with_update" in op.name:
        return True
    if "no_update" in op.name or "no_training" in op.name:
        return False
    return bool(op["training"] if op.has("training") else op.get("train"))


def batch_norm(op: Operation) -> tuple[Unit, ...]:
    """With batch statistics forget the unit; with running ones, they must move along."""
    unit = op.unit(op["input"])
    eps = op["eps"] if op.has("eps") else op["epsilon"]
    weight, bias = op["weight"], op["bias"]
    mean, var = op.get("running_mean"), op.get("running_var")
    if measures_batch(op):
        op.note_eps(eps, unit)
        op.follow(mean, unit)
        op.follow(var, unit * 2)
        return (_affine(op, weight, bias), unit, unit * -1, ZERO)
    op.note_eps(eps, op.unit(var))
    centred = op.equal(unit, mean)
    scaled = centred - op.unit(var) * Fraction(1, 2)
    gained = scaled if weight is None else scaled + op.unit(weight)
    out = gained if bias is None else op.equal(gained, bias)
    return (out, unit, unit * -1, ZERO)


def weight_norm(op: Operation) -> tuple[Unit, ...]:
    """Take the direction of ``v`` and the length ``g``; results: weight, norm."""
    return (op.unit(op["g"]), op.unit(op["v"]))


def var_mean(op: Operation) -> tuple[Unit, ...]:
    """Return variance (twice the unit) and mean."""
    unit = op.unit(op["self"])
    return (unit * 2, unit)


def std_mean(op: Operation) -> tuple[Unit, ...]:
    """Return standard deviation and mean."""
    unit = op.unit(op["self"])
    return (unit, unit)


def grid_sample(op: Operation) -> Unit:
    """Interpolate the input at positions of unit 0."""
    op.dimensionless(op["grid"])
    return op.unit(op["input"])


def _affine(op: Operation, weight: Any, bias: Any) -> Unit:
    gained = op.unit(weight) if isinstance(weight, Tensor) else ZERO
    return gained if bias is None else op.equal(gained, bias)
