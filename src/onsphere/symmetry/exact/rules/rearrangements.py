"""Where operations that only move entries put them: views, permutations, slices, repetitions.

A move takes an array with the axes of the first input, of size 1 along those on which it does not
depend, to the same of a result. What stands at the entries does not matter: exponents
(:mod:`onsphere.symmetry.exact.rules.axes`) move as shifts do
(:mod:`onsphere.symmetry.exact.shifts`).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from onsphere.symmetry.exact.operation import Operation
from onsphere.symmetry.exact.overloads import flat_tensors
from onsphere.symmetry.exact.units.fields import TooLargeError, compressed, reshaped

Array = NDArray[Any]
Move = Callable[[Operation, Array, int], Array]
"""From an array with the axes of the first input to one with those of a result (its number)."""


def source_of(op: Operation) -> Tensor:
    """Return the tensor whose entries are moved."""
    return flat_tensors(op.first)[0]


def result_of(op: Operation, i: int = 0) -> Tensor:
    """Return a result by its number."""
    return flat_tensors(op.result)[i]


def axis_of(op: Operation, name: str = "dim") -> int:
    """Return the axis that an argument names, counted from the first."""
    dim = op[name] if op.has(name) and op[name] is not None else 0
    return int(dim) % max(1, source_of(op).ndim)


def view(op: Operation, a: Array, i: int) -> Array:
    """Show the same entries in another shape."""
    return reshaped(a, tuple(source_of(op).shape), tuple(result_of(op, i).shape))


def _transpose(op: Operation, a: Array, i: int) -> Array:
    return a.swapaxes(axis_of(op, "dim0"), axis_of(op, "dim1"))


def _reverse(op: Operation, a: Array, i: int) -> Array:
    return a.T


def _permute(op: Operation, a: Array, i: int) -> Array:
    return a.transpose([int(d) % a.ndim for d in op["dims"]])


def _unsqueeze(op: Operation, a: Array, i: int) -> Array:
    return np.expand_dims(a, int(op["dim"]) % (a.ndim + 1))


def _squeeze(op: Operation, a: Array, i: int) -> Array:
    dims = op["dim"] if op.has("dim") else None
    every = range(a.ndim)
    asked = list(every) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    shape = source_of(op).shape
    gone = [d % a.ndim for d in asked if a.ndim and shape[d] == 1]
    return a.reshape([n for d, n in enumerate(a.shape) if d not in gone])


def picked(a: Array, axis: int, pick: Any) -> Array:
    """Pick entries along an axis, where the array has them."""
    if a.shape[axis] == 1:
        return a
    return compressed(a[(slice(None),) * axis + (pick,)])


def _slice(op: Operation, a: Array, i: int) -> Array:
    axis = axis_of(op)
    return picked(a, axis, slice(op["start"], op["end"], op["step"] or 1))


def _select(op: Operation, a: Array, i: int) -> Array:
    axis = axis_of(op)
    at = int(op["index"])
    return picked(a, axis, [at if a.shape[axis] > 1 else 0]).squeeze(axis)


def _parts(op: Operation, a: Array, i: int) -> Array:
    axis = axis_of(op)
    sizes = [t.shape[axis] for t in flat_tensors(op.result)]
    start = sum(sizes[:i])
    return picked(a, axis, slice(start, start + sizes[i]))


def _unbind(op: Operation, a: Array, i: int) -> Array:
    axis = axis_of(op)
    return picked(a, axis, [i if a.shape[axis] > 1 else 0]).squeeze(axis)


def _flip(op: Operation, a: Array, i: int) -> Array:
    return np.flip(a, tuple(int(d) % a.ndim for d in op["dims"]))


def _roll(op: Operation, a: Array, i: int) -> Array:
    dims = [op["dims"]] if isinstance(op["dims"], int) else list(op["dims"] or [])
    shifts = [op["shifts"]] if isinstance(op["shifts"], int) else list(op["shifts"])
    if not dims:
        raise TooLargeError
    for shift, dim in zip(shifts, dims, strict=True):
        a = np.roll(a, shift, dim) if a.shape[dim] > 1 else a
    return a


def _repeat(op: Operation, a: Array, i: int) -> Array:
    times = list(op["repeats"])
    a = a.reshape((1,) * (len(times) - a.ndim) + a.shape)
    return np.tile(a, [n if size > 1 else 1 for n, size in zip(times, a.shape, strict=True)])


def _unfold(op: Operation, a: Array, i: int) -> Array:
    axis, size, step = axis_of(op, "dimension"), int(op["size"]), int(op["step"])
    if a.shape[axis] == 1:
        return a[..., None]
    windows = np.lib.stride_tricks.sliding_window_view(a, size, axis)
    return windows[(slice(None),) * axis + (slice(None, None, step),)]


def _as_real(op: Operation, a: Array, i: int) -> Array:
    return a[..., None]


def _pixel_shuffle(op: Operation, a: Array, i: int) -> Array:
    """Lay groups of channels side by side: channel ``(c, i, j)`` goes to ``(c, h i, w j)``."""
    r = int(op["upscale_factor"])
    *batch, channels, height, width = source_of(op).shape
    apart = (*batch, channels // r**2, r, r, height, width)
    a = np.moveaxis(reshaped(a, source_of(op).shape, apart), -2, -4)
    a = a.swapaxes(-1, -2)
    return reshaped(a, (*batch, channels // r**2, height, r, width, r), result_of(op).shape)


def _pixel_unshuffle(op: Operation, a: Array, i: int) -> Array:
    """Undo what :func:`_pixel_shuffle` does."""
    r = int(op["downscale_factor"])
    *batch, channels, height, width = result_of(op).shape
    apart = (*batch, channels // r**2, height, r, width, r)
    a = reshaped(a, source_of(op).shape, apart).swapaxes(-1, -2)
    a = np.moveaxis(a, -4, -2)
    return reshaped(a, (*batch, channels // r**2, r, r, height, width), result_of(op).shape)


def _channel_shuffle(op: Operation, a: Array, i: int) -> Array:
    """Take one channel of each group in turn."""
    groups = int(op["groups"])
    batch, channels, *space = source_of(op).shape
    apart = (batch, groups, channels // groups, *space)
    a = reshaped(a, source_of(op).shape, apart).swapaxes(1, 2)
    return reshaped(a, (batch, channels // groups, groups, *space), source_of(op).shape)


# --- the table ---------------------------------------------------------------------------------

MOVES: dict[str, Move] = {}

_TABLE: list[tuple[Move, str]] = [
    (view, "view _unsafe_view reshape _reshape_alias view_copy flatten unflatten"),
    (_transpose, "transpose transpose_copy"),
    (_reverse, "t numpy_T mT"),
    (_permute, "permute permute_copy"),
    (_unsqueeze, "unsqueeze"),
    (_squeeze, "squeeze squeeze_copy"),
    (_slice, "slice slice_copy"),
    (_select, "select select_copy"),
    (_parts, "split split_with_sizes unsafe_split unsafe_split_with_sizes split_copy"),
    (_unbind, "unbind unbind_copy"),
    (_flip, "flip"),
    (_roll, "roll"),
    (_repeat, "repeat"),
    (_as_real, "view_as_real"),
    (_unfold, "unfold"),
    (_pixel_shuffle, "pixel_shuffle"),
    (_pixel_unshuffle, "pixel_unshuffle"),
    (_channel_shuffle, "channel_shuffle native_channel_shuffle"),
]
for _move, _names in _TABLE:
    for _name in _names.split():
        MOVES[f"aten::{_name}"] = _move
