"""Rules for shifts that many operations share."""

from fractions import Fraction
from typing import Any

from onsphere.symmetry.exact.operation import Operation
from onsphere.symmetry.exact.overloads import is_float
from onsphere.symmetry.exact.rules.rearrangements import result_of
from onsphere.symmetry.exact.shifts.tensor_shift import (
    NO_SHIFT,
    TensorShift,
)
from onsphere.symmetry.exact.shifts.tracker import ShiftTracker


def forbids(op: Operation, run: ShiftTracker) -> TensorShift:
    """Demand that nothing is added to any input."""
    run.vanish(*op.tensors())
    return NO_SHIFT


def ignores(op: Operation, run: ShiftTracker) -> TensorShift:
    """Read no values."""
    return NO_SHIFT


def passes(op: Operation, run: ShiftTracker) -> TensorShift:
    """Add to the result what is added to the first input."""
    return run.read(op.first) if is_float(result_of(op)) else forbids(op, run)


def negates(op: Operation, run: ShiftTracker) -> TensorShift:
    """Turn the sign."""
    return run.read(op["self"]).times(-1)


def adds(op: Operation, run: ShiftTracker) -> TensorShift:
    """Add, or subtract, maybe a multiple."""
    sign = -1 if op.name.startswith(("aten::sub", "aten::rsub")) else 1
    first, second = (run.read(op.get(n)) for n in ("self", "other"))
    if op.name.startswith("aten::rsub"):
        first, second = second, first
    return first.plus(second, sign * fraction(op["alpha"] if op.has("alpha") else 1))


def copies(op: Operation, run: ShiftTracker) -> TensorShift:
    """Take the values of another tensor, if they stay what they are."""
    return run.read(op.get("src")) if is_float(result_of(op)) else forbids(op, run)


def fills(op: Operation, run: ShiftTracker) -> TensorShift:
    """Write one number everywhere: nothing may be added to it."""
    run.vanish(op["value"])
    return NO_SHIFT


def fraction(value: Any) -> Fraction:
    """Return a factor; 1 where none is given."""
    return Fraction(1) if value is None else Fraction(value)
