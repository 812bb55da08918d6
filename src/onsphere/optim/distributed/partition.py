r"""Which part of a tensor a process holds, and which vectors that part cuts.

A tensor that is sharded over a mesh of processes is a *block* in each: along every axis, a run of
entries. Along every axis, too, a vector holds runs of entries of one length, its *unit*: one entry
of an axis that enumerates vectors, a piece of an axis that is cut into pieces, all of any other.
A block cuts a vector unless it begins and ends at multiples of the unit.

Everything here is arithmetic on sizes, so that every process comes to the same answer without
asking the others.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes


class TensorPlacement(NamedTuple):
    """How a tensor lies on a mesh of processes.

    Attributes:
        shape: of the whole tensor.
        mesh: how many processes there are along each dimension of the mesh.
        cuts: the axis that each dimension of the mesh cuts; ``None`` where it holds copies.
        order: the dimensions of the mesh, in the order in which they cut.
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...] = ()
    cuts: tuple[int | None, ...] = ()
    order: tuple[int, ...] = ()


class Block(NamedTuple):
    """Where a run of entries starts along every axis, and how many there are."""

    start: tuple[int, ...]
    size: tuple[int, ...]


class Slices(NamedTuple):
    """The parts of vectors in a block.

    Attributes:
        axes: which entries of the block form one part; not more parts than needed.
        owner: the number of the vector, in the whole tensor, that each part belongs to.
    """

    axes: VectorAxes
    owner: Tensor


def block_at(place: TensorPlacement, coordinate: Sequence[int]) -> Block:
    """Return what the process at a coordinate of the mesh holds.

    An axis is cut as ``torch.chunk`` does it: equal parts, the last ones smaller or empty.

    Example:
        >>> block_at(TensorPlacement((5, 3), mesh=(2,), cuts=(0,), order=(0,)), (1,))
        Block(start=(3, 0), size=(2, 3))
    """
    start, size = [0] * len(place.shape), list(place.shape)
    for dim in place.order:
        axis = place.cuts[dim]
        if axis is None:
            continue
        part = -(-size[axis] // place.mesh[dim])
        begin = min(size[axis], part * coordinate[dim])
        start[axis] += begin
        size[axis] = min(size[axis] - begin, part)
    return Block(tuple(start), tuple(size))


def slices_of(block: Block, shape: tuple[int, ...], axes: VectorAxes) -> Slices:
    """Return the parts of vectors in a block that is not empty.

    Example:
        >>> rows_2_to_4 = Block((2, 0), (3, 7))        # of (6, 7), where 3 rows make a vector
        >>> slices_of(rows_2_to_4, (6, 7), VectorAxes(pieces=((0, 2),)))
        Slices(axes=VectorAxes(index=(0,), pieces=()), owner=tensor([0, 1, 1]))
    """
    index, pieces, strided = [], [], []
    owner = torch.zeros(1, dtype=torch.int64)
    steps = {axis % len(shape): step for axis, _, step in axes.strided}
    for axis, (unit, start, size) in enumerate(zip(units(shape, axes), *block, strict=True)):
        if axis in steps:
            step = steps[axis]
            count = _strided_pieces(start, size, unit, step)
            place = torch.arange(start, start + size)
            along = place // unit * step + place % step
            if count:
                strided.append((axis, count, step))
                along = along.reshape(count, -1, step)[:, 0].flatten()
            else:
                index.append(axis)
            owner = (owner[:, None] * (shape[axis] // unit * step) + along).flatten()
            continue
        within_one = start // unit == (start + size - 1) // unit
        length = size if within_one else math.gcd(unit, start, size)
        along = torch.arange(start, start + size, length) // unit
        owner = (owner[:, None] * (shape[axis] // unit) + along).flatten()
        if length == 1:
            index.append(axis)
        elif length < size:
            pieces.append((axis, size // length))
    return Slices(VectorAxes(tuple(index), tuple(pieces), tuple(strided)), owner)


def _strided_pieces(start: int, size: int, unit: int, step: int) -> int:
    """Return into how many pieces of strided vectors a run of entries divides; 0: into none."""
    if not (start % unit or size % unit):
        return size // unit
    within_one = start // unit == (start + size - 1) // unit
    return int(within_one and not (start % step or size % step))


def axes_in(block: Block, shape: tuple[int, ...], axes: VectorAxes) -> VectorAxes:
    """Return the axes of whole vectors as they are in a block, where some pieces may be missing."""
    unit = units(shape, axes)
    pieces = tuple((axis, block.size[axis] // unit[axis]) for axis, _ in axes.pieces)
    strided = tuple((a, block.size[a] // unit[a], step) for a, _, step in axes.strided)
    return VectorAxes(axes.index, pieces, strided)


def units(shape: tuple[int, ...], axes: VectorAxes) -> tuple[int, ...]:
    """Return how many neighbours along each axis belong to one vector; at least 1.

    Of a strided axis it is how many belong to the vectors of one piece.
    """
    found = list(shape)
    for axis in axes.index:
        found[axis] = 1
    for axis, count in axes.pieces:
        found[axis] = shape[axis] // count
    for axis, count, _ in axes.strided:
        found[axis] = shape[axis] // count
    return tuple(max(1, unit) for unit in found)


def numbers_place(place: TensorPlacement, axes: VectorAxes) -> TensorPlacement:
    """Return the place of a tensor with one number per vector, beside the vectors themselves.

    Its shape is that of the split view, with size 1 along the axes inside a vector.
    """
    inside = {axis % len(place.shape): [1] for axis, _ in axes.pieces}
    inside |= {axis % len(place.shape): [1, step] for axis, _, step in axes.strided}
    shape: list[int] = []
    moved = {}
    for axis, unit in enumerate(units(place.shape, axes)):
        moved[axis] = len(shape)
        shape += [place.shape[axis] // unit, *inside.get(axis, [])]
    cuts = tuple(None if cut is None else moved[cut] for cut in place.cuts)
    return TensorPlacement(tuple(shape), place.mesh, cuts, place.order)


def cut_dims(place: TensorPlacement) -> tuple[int, ...]:
    """Return the dimensions of the mesh that cut the tensor."""
    return tuple(d for d, axis in enumerate(place.cuts) if axis is not None and place.mesh[d] > 1)


@functools.lru_cache(maxsize=4096)
def spread_over(places: tuple[TensorPlacement, ...], axes: VectorAxes) -> tuple[int, ...]:
    """Return the dimensions of the mesh over which the vectors of a family are spread.

    Args:
        places: of the tensors that share their vectors, on one mesh.
        axes: which entries of each form one vector.

    Returns:
        ``()`` when each vector lies whole in a process, which then also holds its number where
        :func:`numbers_place` says.

    Example:
        >>> rows = TensorPlacement((6, 4), mesh=(2,), cuts=(0,), order=(0,))
        >>> spread_over((rows,), VectorAxes((0,))), spread_over((rows,), VectorAxes())
        ((), (0,))
    """
    mesh = places[0].mesh
    for coordinate in itertools.product(*map(range, mesh)):
        held = {_vectors_at(place, axes, coordinate) for place in places}
        if len(held) > 1 or None in held:
            dims = {dim for place in places for dim in cut_dims(place)}
            return tuple(sorted(dims))
    return ()


def _vectors_at(
    place: TensorPlacement, axes: VectorAxes, coordinate: Sequence[int]
) -> tuple[tuple[int, int], ...] | None:
    """Return which vectors a process holds, axis by axis, or ``None`` when it cuts one."""
    block, numbers = block_at(place, coordinate), numbers_place(place, axes)
    beside = block_at(numbers, coordinate)
    if 0 in block.size or 0 in beside.size:
        return () if 0 in block.size and 0 in beside.size else None
    held = []
    steps = {axis % len(place.shape): step for axis, _, step in axes.strided}
    along = zip(place.shape, units(place.shape, axes), *block, strict=True)
    for axis, (total, unit, start, size) in enumerate(along):
        if start % unit or size % unit:
            return None
        if total > unit:  # an axis along which there is one vector says nothing
            held.append((start // unit, size // unit))
        if steps.get(axis, 1) > 1:
            held.append((0, steps[axis]))
    counted = zip(numbers.shape, *beside, strict=True)
    agrees = held == [(start, size) for total, start, size in counted if total > 1]
    return tuple(held) if agrees else None
