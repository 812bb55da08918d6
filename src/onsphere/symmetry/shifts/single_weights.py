"""Write families of shifts in a basis that shows which weights move alone."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from onsphere.symmetry.claims import ShiftFamily, ShiftMove

_Alone = Mapping[tuple[str, tuple[int, ...]], Sequence[Tensor]]
"""Weight and the axes along which amounts are vectors -> places of the families that move it."""


def with_single_weights(families: Sequence[ShiftFamily]) -> list[ShiftFamily]:
    """Leave out of every family what another one does that moves a single weight.

    In a residual stream that every reader centres, ``a + v, b - v`` and ``b + v`` say of two biases
    that each of them moves alone. All families together allow the same as before.

    Args:
        families: all that hold.
    """
    found = list(families)
    while True:
        alone: defaultdict[tuple[str, tuple[int, ...]], list[Tensor]] = defaultdict(list)
        for family in found:
            if len(family.moves) == 1 and not family.moves[0].map:
                move = family.moves[0]
                alone[move.name, move.free].append(move.places)
        shorter = [_shortened(family, alone) for family in found]
        if shorter == found:
            return found
        found = shorter


def _shortened(family: ShiftFamily, alone: _Alone) -> ShiftFamily:
    """Leave out moves that are combinations of those of single weights."""
    if len(family.moves) == 1:
        return family
    kept = [m for m in family.moves if not _is_told(m, alone.get((m.name, m.free), ()))]
    if len(kept) == len(family.moves) or not kept or kept[0].map:
        return family
    if not set(torch.unique(kept[0].places).tolist()) >= set(range(family.count)):
        return family
    first = kept[0].factor
    return replace(family, moves=tuple(replace(m, factor=m.factor / first) for m in kept))


def _is_told(move: ShiftMove, alone: Sequence[Tensor]) -> bool:
    """Return whether families of the weight alone add all that a move adds.

    Entries that move together there have to take the same amount here, or none of them any.
    """
    left = move.places >= 0
    for places in alone:
        shape = np.broadcast_shapes(left.shape, places.shape)
        left, here, groups = (t.expand(shape) for t in (left, move.places, places))
        inside = groups >= 0
        if not decides(groups[inside], here[inside]):
            continue
        single = len(torch.unique(groups[inside])) == int(inside.sum())
        if move.map and (move.free or not single):
            continue  # what a map adds differs from entry to entry
        left = left & ~inside
    return not bool(left.any())


def decides(one: Tensor, other: Tensor) -> bool:
    """Return whether numbers that are equal in one tensor are equal in another of its shape.

    Example:
        >>> decides(torch.tensor([0, 0, 1]), torch.tensor([5, 5, 5]))
        True
        >>> decides(torch.tensor([0, 0, 1]), torch.tensor([5, 6, 5]))
        False
    """
    pairs = torch.stack([one, other]).flatten(1)
    return torch.unique(pairs, dim=1).shape[1] == len(torch.unique(one))
