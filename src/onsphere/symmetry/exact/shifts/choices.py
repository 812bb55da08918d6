"""Shifts of what is looked up, laid side by side, padded or chosen."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onsphere.symmetry.exact.operation import HUGE, Operation
from onsphere.symmetry.exact.overloads import flat_tensors
from onsphere.symmetry.exact.rules.rearrangements import axis_of, picked, result_of
from onsphere.symmetry.exact.shifts.patterns import forbids
from onsphere.symmetry.exact.shifts.tensor_shift import (
    NO_SHIFT,
    PLAIN,
    Part,
    TensorShift,
    varies,
)
from onsphere.symmetry.exact.shifts.tracker import ShiftTracker, places
from onsphere.symmetry.exact.units.fields import NONE, NOTHING, Fields, compressed, joined, padded

_EXTREMES = {torch.finfo(torch.float16).min}
"""Numbers that stand for minus infinity in shorter types."""


def embedding(op: Operation, run: ShiftTracker) -> TensorShift:
    """Look up rows: whichever they are, they bring along what all of them have."""
    found = _looked_up(op, run, op["weight"], 0, tuple(op["indices"].shape))
    run.vanish(op["indices"])
    return found


def index_select(op: Operation, run: ShiftTracker) -> TensorShift:
    """Pick along an axis."""
    axis = axis_of(op)
    known = run.constant_values(op["index"])
    if known is not None:
        return run.read(op["self"]).moved(op["self"].ndim, lambda a: picked(a, axis, known))
    return _looked_up(op, run, op["self"], axis, tuple(op["index"].reshape(-1).shape))


def index(op: Operation, run: ShiftTracker) -> TensorShift:
    """Pick by tensors of positions: one of them, along one axis."""
    named = [(d, k) for d, k in enumerate(op.get("indices")) if k is not None]
    if len(named) != 1 or named[0][1].dtype in (torch.bool, torch.uint8):
        return forbids(op, run)
    (axis, at), source = named[0], op["self"]
    known = run.constant_values(at)
    if known is None:
        return _looked_up(op, run, source, axis, tuple(at.shape))

    def move(a: NDArray[Any]) -> NDArray[Any]:
        if a.shape[axis] > 1:
            return compressed(a.take(known, axis))
        return a.reshape((*a.shape[:axis], *([1] * at.ndim), *a.shape[axis + 1 :]))

    return run.read(source).moved(source.ndim, move)


def gather(op: Operation, run: ShiftTracker) -> TensorShift:
    """Pick along an axis, differently for the others."""
    source, at = op["self"], op.get("index")
    axis = axis_of(op)
    if any(
        a != b for d, (a, b) in enumerate(zip(source.shape, at.shape, strict=True)) if d != axis
    ):
        return forbids(op, run)
    return run.unknowns.constant(run.read(source), [axis - source.ndim])


def _looked_up(
    op: Operation, run: ShiftTracker, table: Tensor, axis: int, shape: tuple[int, ...]
) -> TensorShift:
    """Pick along an axis where data, or positions, say: what varies along it must not move.

    A map of the data that varies along it varies along the axes of the positions.
    """
    recipe = run.recipe(table)
    if recipe is not None:
        run.unknowns.looked_up.update(recipe.names)
    result = result_of(op).shape
    own = axis - table.ndim
    markers = [places(result, axis + a) for a in range(len(shape))]

    def move(a: NDArray[Any]) -> NDArray[Any]:
        return a.reshape((*a.shape[:axis], *([1] * len(shape)), *a.shape[axis + 1 :]))

    found = NO_SHIFT
    for number, part in run.read(table):
        kept = [(c, i) for c, i in part.fields.terms if not varies(i, own)]
        gone = [(c, i) for c, i in part.fields.terms if varies(i, own)]
        run.unknowns.vanish(TensorShift({number: Part(Fields(tuple(gone)), part.wild)}))
        moved = Part(Fields(tuple(kept))).moved(table.ndim, move).fields
        if not kept:
            continue
        if number == PLAIN:
            found = found.plus(TensorShift.plain(moved))
            continue
        wild = [w for w in part.wild if not varies(w, own)]
        there = [move(padded(w, table.ndim)) for w in wild]
        marked = markers if part.is_wild(own) else []
        found = found.plus(run.through_a_map(moved, [*there, *marked], result))
    return found


def concatenates(op: Operation, run: ShiftTracker) -> TensorShift:
    """Lay tensors one after the other, each with what is added to it."""
    tensors = [t for t in flat_tensors(op["tensors"]) if t.numel()]
    if len({t.ndim for t in tensors}) != 1:
        return forbids(op, run)
    axis = int(op["dim"] or 0) % tensors[0].ndim
    return _joined([(run.read(t), tuple(t.shape)) for t in tensors], axis)


def stacks(op: Operation, run: ShiftTracker) -> TensorShift:
    """Lay tensors one after the other along a new axis."""
    tensors = flat_tensors(op["tensors"])
    axis = int(op["dim"] or 0) % (tensors[0].ndim + 1)
    parts = []
    for t in tensors:
        shift = run.read(t).moved(t.ndim, lambda a: np.expand_dims(a, axis))
        parts.append((shift, (*t.shape[:axis], 1, *t.shape[axis:])))
    return _joined(parts, axis)


def _joined(parts: Sequence[tuple[TensorShift, tuple[int, ...]]], axis: int) -> TensorShift:
    found = {}
    for number in dict.fromkeys(n for shift, _ in parts for n, _ in shift):
        own = [(shift.parts.get(number, Part()), shape) for shift, shape in parts]
        fields = joined([(p.fields, shape) for p, shape in own], axis)
        most = max(len(p.wild) for p, _ in own)
        wild = []
        for k in range(most):
            marks = [
                (Fields(((Fraction(1), p.wild[k]),)) if k < len(p.wild) else NONE, shape)
                for p, shape in own
            ]
            wild.append(joined(marks, axis).terms[0][1])
        found[number] = Part(fields, tuple(wild))
    return TensorShift(found)


def pads(op: Operation, run: ShiftTracker) -> TensorShift:
    """Add constants at the ends of axes, to which nothing is added.

    What is the same along such an axis would be so no more, which nothing makes up for.
    """
    given: Tensor = op["self"]
    amounts = [int(n) for n in op["pad"]]
    ends = {given.ndim - 1 - k: tuple(amounts[2 * k : 2 * k + 2]) for k in range(len(amounts) // 2)}

    def move(a: NDArray[Any]) -> NDArray[Any]:
        for axis, (before, after) in ends.items():
            if (before or after) and a.shape[axis] > 1:
                cut = slice(max(-before, 0), a.shape[axis] - max(-after, 0))
                a = a[(slice(None),) * axis + (cut,)]
                widths = [(0, 0)] * a.ndim
                widths[axis] = (max(before, 0), max(after, 0))
                a = np.pad(a, widths, constant_values=NOTHING)
        return a

    for axis, around in ends.items():
        along = [axis - given.ndim]
        if max(around) > 0 and not all(varies(i, *along) for i in run.read(given).arrays()):
            return forbids(op, run)
    return run.read(given).moved(given.ndim, move)


def where(op: Operation, run: ShiftTracker) -> TensorShift:
    """Choose: what is added to both must be the same; to an infinity anything may be."""
    if op.get("self") is None:
        return NO_SHIFT
    one, other = op.get("self"), op.get("other")
    if _is_infinite(run, other):
        return run.read(one)
    if _is_infinite(run, one):
        return run.read(other)
    shift = run.read(one)
    run.unknowns.vanish(shift.plus(run.read(other), -1))
    return shift


def masks(op: Operation, run: ShiftTracker) -> TensorShift:
    """Write a constant where a mask says; anything may be added to an infinity."""
    if _is_infinite(run, op["value"]):
        return run.read(op["self"])
    return forbids(op, run)


def _is_infinite(run: ShiftTracker, value: Any) -> bool:
    if isinstance(value, Tensor):
        known = run.constant_values(value)
        if known is None or not known.size or known.dtype.kind != "f":
            return False
        low = torch.finfo(value.dtype).min
        return bool(((np.abs(known) >= HUGE) | (known <= low)).all())
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and (abs(value) >= HUGE or value in _EXTREMES)
