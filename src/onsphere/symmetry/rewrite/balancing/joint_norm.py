r"""The least total norm over whole weights and over channels, both at once.

With log2 scales :math:`u` of whole weights, along symmetries of these, and :math:`t_c` of channels,
along families, the total norm is :math:`\sum_i 4^{u_{w(i)} + \sum_s e_s t_{c(i)}} p_i^2`, convex in
all of them. It is lowered in turn: whole weights by Newton's method, one family after the other by
an equation per channel, until nothing moves.

Where a sum falls for ever there is no minimum. For whole weights the geometric mean is kept
(:mod:`onsphere.symmetry.rewrite.balancing.least_norm`). A family whose channels, all by the same
factor, would undo that keeps the geometric mean of these factors at 1, so that its channels move
against each other only; on average over the entries of a weight it then moves nothing. A channel
stays that has nothing but zeros on one side, and a family that does not come to rest (weights with
many zeros may fall along several families together).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from onsphere.symmetry.claims import Family, Slices
from onsphere.symmetry.rewrite.balancing.channel_scales import (
    LEAST_NORM,
    State,
    moved,
    two_sided,
)
from onsphere.symmetry.rewrite.balancing.least_norm import LeastNorm, Vector

_SWEEPS = 300
"""How often whole weights and families are lowered at most."""
_FINER = 100.0
"""How many times finer the result is than what counts as rounding when it is found again."""
_GAINS = 1e-9
"""A relative gain of a channel's norm by whole octaves smaller than this is none: a tie."""


@dataclass(frozen=True)
class Channels:
    """A family that may move.

    Args:
        family: what scales.
        octaves: whether it moves by powers of two only.
    """

    family: Family
    octaves: bool = False


@dataclass(frozen=True)
class Scales:
    """How far everything moves, in octaves.

    Args:
        whole: the log2 scale of each whole weight that moves.
        channels: families that move, and how far each channel of them is followed.
    """

    whole: Mapping[str, float]
    channels: Sequence[tuple[Family, Tensor]] = ()


def joint_least_norm(
    whole: LeastNorm, channels: Sequence[Channels], weights: Mapping[str, Tensor], still: float
) -> Scales:
    """Minimize the total norm over whole weights and channels.

    At the weights that the result gives, another call moves nothing at all.

    Args:
        whole: where whole weights may move.
        channels: families that may move, each with weights on both sides.
        weights: what counts, by name.
        still: a log2 scale that counts as rounding.

    Example:
        >>> rows = Slices("in", Fraction(1), (0,), torch.tensor([[0], [1]]))
        >>> columns = Slices("out", Fraction(-1), (1,), torch.tensor([[0], [1]]))
        >>> trade = Channels(Family((rows, columns), 2), octaves=True)
        >>> weights = {"in": torch.tensor([[16.0], [1.0]]), "out": torch.tensor([[1.0, 4.0]])}
        >>> joint_least_norm(LeastNorm([], weights), [trade], weights, 1e-9).channels[0][1]
        tensor([-2.,  1.], dtype=torch.float64)
    """
    families = [_counting(c.family, weights) for c in channels]
    start = LEAST_NORM.condensed(weights, families, set(weights))
    bounded = whole.bounded_with([_mean(f, start) for f in families])
    blocks = [
        _Block(c.family, f, c.octaves, free)
        for c, f, free in zip(channels, families, bounded, strict=True)
        if free or not c.octaves
    ]
    first = whole.scales(_squares(start), still)
    if not first and all(_farthest(b.step(start)) <= still for b in blocks):
        return Scales({})
    if not blocks:
        return Scales(first)
    while True:
        scales, restless = _lowered(whole, blocks, start, first, still / _FINER)
        if not restless:
            return scales
        blocks = [b for i, b in enumerate(blocks) if i not in restless]


def _lowered(
    whole: LeastNorm, blocks: Sequence["_Block"], start: State, first: Mapping[str, float],
    still: float,
) -> tuple[Scales, set[int]]:  # fmt: skip
    """Return where nothing moves any more, and the families that did not come to rest."""
    now = _moved_whole(start, first)
    total = [torch.zeros(b.family.count, dtype=torch.float64) for b in blocks]
    scales = dict(first)
    moving: set[int] = set()
    for _ in range(_SWEEPS):
        moving = set()
        for i, block in enumerate(blocks):
            step = block.step(now)
            if _farthest(step) > still:
                moving.add(i)
                total[i] = total[i] + step
                now |= moved(now, [(block.counting, step * math.log(2))])
        more = whole.scales(_squares(now), still)
        now = _moved_whole(now, more)
        scales = {n: scales.get(n, 0.0) + more.get(n, 0.0) for n in {**scales, **more}}
        if not moving and not more:
            break
    going = [(b.family, t) for b, t in zip(blocks, total, strict=True) if bool(t.any())]
    return Scales({n: u for n, u in scales.items() if u}, going), moving


@dataclass(frozen=True)
class _Block:
    """One family to be lowered while all else stays.

    Args:
        family: all of it.
        counting: the part of it that counts.
        octaves: whether it moves by powers of two only.
        free: whether its channels may all move alike; against each other only, if not.
    """

    family: Family
    counting: Family
    octaves: bool
    free: bool

    def step(self, now: State) -> Tensor:
        """Return how far each channel moves, in octaves."""
        if not self.free:
            sizes = LEAST_NORM.sizes(self.counting, now, now)
            return against_each_other(sizes) / math.log(2)
        found = LEAST_NORM.amounts(self.counting, now, now) / math.log(2)
        return self._whole(found, now) if self.octaves else found

    def _whole(self, amounts: Tensor, now: State) -> Tensor:
        """Round to whole octaves of everything that moves, where that gains something."""
        unit = _whole_step([*self.family.slices, *self.family.followers])
        sizes = LEAST_NORM.sizes(self.counting, now, now)
        best = torch.zeros_like(amounts)
        least = _sums(sizes, best) * (1 - _GAINS)
        for steps in ((amounts / unit).floor() * unit, (amounts / unit).ceil() * unit):
            sums = _sums(sizes, steps * math.log(2))
            best = torch.where(sums < least, steps, best)
            least = torch.minimum(least, sums)
        return best


def against_each_other(sizes: Sequence[tuple[float, Tensor]]) -> Tensor:
    r"""Minimize the sum of squares of all channels over amounts that add up to 0.

    Newton's method with a Lagrange multiplier. Channels with zeros on one side stay.

    Args:
        sizes: exponent and logarithm of the squares of each slice, by channel.

    Returns:
        The amounts, as logarithms.
    """
    there = two_sided(sizes)
    slices = [(e, torch.where(there, x, -math.inf)) for e, x in sizes]
    t = torch.zeros(len(there), dtype=torch.float64)
    if int(there.sum()) < 2:
        return t
    for _ in range(100):
        terms = [(e, (x + 2 * e * t).exp()) for e, x in slices]
        slope = sum((2 * e * w for e, w in terms), torch.zeros_like(t))
        bend = sum((4 * e * e * w for e, w in terms), torch.zeros_like(t)).clamp_min(1e-280)
        inverse = torch.where(there, 1 / bend, 0.0)
        common = (slope * inverse).sum() / inverse.sum()
        step = (common - slope) * inverse
        step = step / step.abs().max().clamp_min(1.0)
        here = float(_sums(slices, t).sum())
        while float(_sums(slices, t + step).sum()) > here * (1 + 1e-15):
            step = step / 2
        if float(step.abs().max()) < 1e-13:
            break
        t = t + step
    return t


def _sums(sizes: Iterable[tuple[float, Tensor]], t: Tensor) -> Tensor:
    return sum(((x + 2 * e * t).exp() for e, x in sizes), torch.zeros_like(t))


def _whole_step(slices: Sequence[Slices]) -> float:
    """Return the smallest amount by which all exponents give whole numbers."""
    common = math.lcm(*(s.exponent.denominator for s in slices))
    return common / math.gcd(*(int(s.exponent * common) for s in slices))


def _counting(family: Family, weights: Mapping[str, Tensor]) -> Family:
    slices = tuple(s for s in family.slices if s.name in weights)
    return replace(family, slices=slices, followers=())


def _mean(family: Family, condensed: State) -> Vector:
    """Return how far each weight moves in the mean of its entries where all channels move by 1."""
    found: dict[str, Fraction] = {}
    for s in family.slices:
        places = math.prod(condensed[s.name].shape[a] for a in s.axes)
        share = s.exponent * s.index.numel() / places
        found[s.name] = found.get(s.name, Fraction(0)) + share
    return found


def _squares(state: State) -> dict[str, float]:
    return {n: float(t.square().sum()) for n, t in state.items()}


def _moved_whole(state: State, scales: Mapping[str, float]) -> State:
    return {n: t * 2.0 ** scales[n] if n in scales else t for n, t in state.items()}


def _farthest(step: Tensor) -> float:
    return float(step.abs().max()) if len(step) else 0.0
