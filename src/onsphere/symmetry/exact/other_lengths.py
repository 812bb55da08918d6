"""Other lengths of inputs: which axes change together, and to what.

Equal lengths along the same axis mostly belong together: tokens and their mask, both sides of an
image. Where the model does not take that, other sets of axes are tried: a mask of pixels has its
sides one axis earlier, edges stand along the second axis of their ends and along the first of their
features, and a noise level of one number has a length of 1 as a single token has.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

Way = tuple[tuple[int, int], ...]
"""Axes that change together: the number of an input, and the axis."""

MANY = 64
"""How large a large batch is."""
_LONG = 16
"""From which length on less than half as many entries are tried first; of few, one may be left."""
_MOST_WAYS = 8
"""How many sets of axes are tried at most for one length."""


def axes(tensors: Mapping[int, Tensor]) -> list[tuple[int, int]]:
    """Return axes and their lengths: the batch, the length, and what else there is."""
    pairs = chain.from_iterable(enumerate(t.shape) for t in tensors.values())
    return [(a, n) for a, n in dict.fromkeys(pairs) if n]


def ways(
    tensors: Mapping[int, Tensor], axis: int, size: int, square: Sequence[int]
) -> Iterator[Way]:
    """Yield the sets of axes that may be meant by a length of one axis, the likeliest first.

    Args:
        tensors: the inputs by their numbers.
        axis: where the length was met.
        size: the length.
        square: inputs that may have the length along both of their axes, as a mask over pairs.

    Example:
        >>> image, mask = torch.ones(2, 3, 8, 8), torch.ones(2, 8, 8)
        >>> list(ways({0: image, 1: mask}, 2, 8, []))[:2]
        [((0, 2), (0, 3), (1, 2)), ((0, 2), (0, 3), (1, 1), (1, 2))]
    """
    everywhere = [(i, a) for i, t in tensors.items() for a, n in enumerate(t.shape) if n == size]

    def together(i: int) -> Iterator[int]:
        shape = tensors[i].shape
        if axis < len(shape) and shape[axis] == size:
            first = axis - 1 if axis and i in square else axis
            yield from (
                [0] if not axis else [a for a in range(first, len(shape)) if shape[a] == size]
            )

    found = [
        [(i, a) for i in tensors for a in together(i)],
        everywhere,
        [(i, a) for i, a in everywhere if a],
        *([(i, a) for i, a in everywhere if i == j and (a or not axis)] for j in tensors),
        *([place] for place in everywhere if place[1] or not axis),
    ]
    met = (tuple(way) for way in found if any(a == axis for _, a in way))
    yield from list(dict.fromkeys(met))[:_MOST_WAYS]


def sizes(size: int, axis: int) -> list[int]:
    """Return other lengths to try; three for a single one.

    Along the batch one more comes first, and of a large batch about half. A length changes by so
    much that every stride moves on: to twice as many, or, of many, to less than half, which costs
    less; where that is too few, one patch was given, and twice as many make two. It is odd where
    the model takes that, so that what patches or windows do not divide is padded.
    """
    if size == 1:
        return [3]
    half, twice = size // 2, 2 * size
    above = half + half % 2 + 1
    if axis == 0:
        first = [above] if size >= MANY // 2 else []
    elif size >= _LONG:
        first = [half - 1 + half % 2, half, twice + 1, twice, above]
    else:
        first = [twice + 1, twice, half]
    found = [*first, size + 1, size - 1, half]
    return list(dict.fromkeys(n for n in found if 1 < n != size))


def resized(
    t: Tensor, along: Sequence[int], size: int, other: int, generator: torch.Generator
) -> Tensor:
    """Return a tensor with another length of some axes, made of what was there."""
    ordered = are_places(t)
    for a in along:
        more = torch.randint(0, size, (max(other - size, 0),), generator=generator)
        index = torch.cat([torch.arange(min(size, other)), more])
        t = t.index_select(a, index.to(t.device))
    return t.sort().values if ordered else t


def are_places(t: Tensor) -> bool:
    """Return whether whole numbers say where pieces begin: in one row, rising from 0."""
    if t.ndim != 1 or t.numel() < 2 or t.dtype == torch.bool or t.is_meta:
        return False
    if t.is_floating_point() or t.is_complex():
        return False
    return bool((t[0] == 0) & (t.diff() >= 0).all() & (t[-1] > 0))
