"""Which families of channels may move: such as hold, and meet nothing that was not seen."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from onsphere.symmetry.claims import Family
from onsphere.symmetry.numeric.certificate import relative_change
from onsphere.symmetry.numeric.group_testing import group_test
from onsphere.symmetry.rewrite.balancing.channel_scales import State, moved
from onsphere.symmetry.rewrite.reach import may_meet

_HOLDS = 1e-8
"""Relative change of the output in float64 up to which a family of random factors holds."""


def holding(
    families: Sequence[Family],
    state: State,
    before: Sequence[Tensor],
    outputs: Callable[[State], list[Tensor]],
) -> list[Family]:
    """Return the families along which the output stays, each channel with a factor of its own.

    Args:
        families: what is to be tried.
        state: weights and buffers in float64.
        before: the outputs there.
        outputs: computes them where some weights and buffers are others.
    """
    generator = torch.Generator().manual_seed(0)
    wrong = group_test(families, partial(_wrong, state, before, outputs, generator), _HOLDS)
    return [f for f, w in zip(families, wrong, strict=True) if w <= _HOLDS]


def meets_unseen(
    family: Family, state: Mapping[str, Tensor], unreached: Mapping[str, Sequence[int]]
) -> bool:
    """Return whether something that the inputs do not reach may belong to these channels."""
    counts = {math.prod(state[s.name].shape[a] for a in s.axes) for s in family.slices}
    return any(may_meet(unreached, n) for n in counts) or any(n in unreached for n in family.names)


def _wrong(
    state: State,
    before: Sequence[Tensor],
    outputs: Callable[[State], list[Tensor]],
    generator: torch.Generator,
    families: Sequence[Family],
) -> float:
    drawn = [torch.rand(f.count, generator=generator, dtype=torch.float64) - 0.5 for f in families]
    return relative_change(before, outputs(moved(state, zip(families, drawn, strict=True))))
