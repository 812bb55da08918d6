"""How finely spheres divide, read off families of symmetries: per filter, row, group or head."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes
from onsphere.symmetry.claims import Family

Exponents = Mapping[str, Fraction]


def divisions(
    claims: Sequence[Exponents], families: Sequence[Family], shapes: Mapping[str, Sequence[int]]
) -> dict[int, VectorAxes]:
    """Return for weights on spheres, their own or joint ones, how these divide.

    Args:
        claims: symmetries of whole weights.
        families: those by channel.
        shapes: of the weights.

    Returns:
        By number of a claim; whole tensors are left out.
    """
    found: dict[int, VectorAxes] = {}
    for i, claim in enumerate(claims):
        first = next(iter(claim))
        some = [_division(f, claim, shapes) for f in families if claim.keys() <= shapes.keys()]
        finest = max((d for d in some if d), key=lambda d: d.count(shapes[first]), default=None)
        if finest is not None:
            found[i] = finest
    return found


def _division(
    family: Family, claim: Exponents, shapes: Mapping[str, Sequence[int]]
) -> VectorAxes | None:
    """Return into which vectors a family divides weights, if it scales all of them as claimed."""
    if {s.name: s.exponent for s in family.slices} != claim or len(family.slices) != len(claim):
        return None
    axes = {s.axes for s in family.slices}
    if len(axes) != 1 or len(first := axes.pop()) != 1 or (len(claim) > 1 and first != (0,)):
        return None
    (axis,) = first
    widths = set()
    for s in family.slices:
        shape, index = shapes[s.name], s.index
        others = torch.Size(shape).numel() // shape[axis]
        if index.numel() != shape[axis] or (len(claim) == 1 and index.shape[1] * others == 1):
            return None  # single numbers are no directions
        if not torch.equal(index.flatten(), _in_order(index)):
            return None
        widths.add(index.shape[1])
    if widths == {1}:
        return VectorAxes(index=(axis,))
    return VectorAxes(pieces=((axis, family.count),)) if len(widths) == 1 else None


def _in_order(index: Tensor) -> Tensor:
    return torch.arange(index.numel(), dtype=index.dtype)
