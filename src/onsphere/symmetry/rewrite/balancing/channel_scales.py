r"""How far to follow each channel of each family: balance, by one monotone equation per channel.

A family scales slices :math:`s` of channel :math:`c` by :math:`e^{e_s t_c}`, some up and some down.
Both balances that are asked for are roots of an increasing function of :math:`t_c`:

- equal ranges, with :math:`r_s` the largest absolute entry of a slice,
  :math:`\max_{e_s>0}(\log r_s + e_s t) = \max_{e_s<0}(\log r_s + e_s t)`;
- least norm, :math:`\sum_s e_s |w_s|^2 e^{2 e_s t} = 0`.

One family is balanced after the other, and again, until none moves: for the norm that is coordinate
descent on a convex function, so it ends at the one minimum.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onsphere.symmetry.claims import Family, Slices

State = dict[str, Tensor]

SWEEPS = 200
"""How often each family is balanced at most."""
STILL = 1e-6
"""A logarithm of a factor that counts as none: where balancing ends."""
_FARTHEST = 60.0
"""The largest logarithm of a factor that is looked for."""
_ROOT = 1e-14
"""A step of Newton's that counts as none."""


def per_channel(s: Slices, entries: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Return one number for the slices of each channel.

    Args:
        s: the slices.
        entries: of the whole weight.
        reduce: what makes one number of the last axis of a tensor.
    """
    rest = [a for a in range(entries.ndim) if a not in s.axes]
    count = math.prod(entries.shape[a] for a in s.axes)
    flat = entries.permute((*s.axes, *rest)).reshape(count, -1)
    by_place = reduce(flat)
    return reduce(by_place[s.index.to(by_place.device)])


def ranges(s: Slices, weight: Tensor) -> Tensor:
    """Return the largest absolute entry of each channel."""
    return per_channel(s, weight.abs(), lambda t: t.amax(-1))


def squares(s: Slices, weight: Tensor) -> Tensor:
    """Return the sum of squares of each channel."""
    return per_channel(s, weight.abs() ** 2, lambda t: t.sum(-1))


def moved(state: Mapping[str, Tensor], families: Iterable[tuple[Family, Tensor]]) -> State:
    """Return the weights and buffers that change when channels are followed so far."""
    found: State = {}
    for family, amounts in families:
        now = {
            n: found.get(n, state[n]) for n in {*family.names, *(f.name for f in family.followers)}
        }
        shapes = {n: tuple(t.shape) for n, t in now.items()}
        for name, logs in family.log_factors(amounts, shapes, followers=True).items():
            found[name] = now[name] * logs.exp().to(now[name])
    return found


@dataclass(frozen=True)
class Balance:
    """What is balanced.

    Args:
        measure: of the slices of each channel, given the weight.
        condense: makes one entry of all along some axes, which measures the same as they do.
        power: how the measure grows with the scale of a slice: 1 for a range, 2 for a square.
        summed: whether several slices on one side add up; the largest counts otherwise.
        least_axes: axes that a weight must have to count.
    """

    measure: Callable[[Slices, Tensor], Tensor]
    condense: Callable[[Tensor, tuple[int, ...]], Tensor]
    power: float
    summed: bool
    least_axes: int

    def condensed(
        self, state: Mapping[str, Tensor], families: Iterable[Family], counted: Collection[str]
    ) -> State:
        """Return what counts with size 1 along the axes that no family cuts, in float64.

        Measures and moves of these small tensors are those of the weights.
        """
        cut: dict[str, set[int]] = {n: set() for n in counted}
        for s in (s for f in families for s in f.slices if s.name in counted):
            cut[s.name].update(s.axes)
        rest = {n: tuple(a for a in range(state[n].ndim) if a not in axes)
                for n, axes in cut.items()}  # fmt: skip
        return {n: self.condense(state[n].detach().abs().double(), a) for n, a in rest.items()}

    def applies(
        self, family: Family, counted: Collection[str], state: Mapping[str, Tensor]
    ) -> bool:
        """Return whether something that counts scales up, and something down."""
        signs = {s.exponent > 0 for s in self._counting(family, counted, state)}
        return signs == {True, False}

    def sizes(
        self, family: Family, counted: Collection[str], state: Mapping[str, Tensor]
    ) -> list[tuple[float, Tensor]]:
        """Return exponent and logarithm of the measure of all that counts."""
        return [
            (float(s.exponent), self.measure(s, state[s.name]).double().cpu().log())
            for s in self._counting(family, counted, state)
        ]

    def amounts(
        self, family: Family, counted: Collection[str], state: Mapping[str, Tensor]
    ) -> Tensor:
        """Return how far to follow each channel; 0 where one side has nothing."""
        sizes = self.sizes(family, counted, state)
        there = two_sided(sizes)
        t = torch.zeros(family.count, dtype=torch.float64)
        low, high = t - _FARTHEST, t + _FARTHEST
        # Newton's steps, which are exact where all exponents are alike, kept between two bounds.
        for _ in range(64):
            up, down = (self._side(sizes, t, sign) for sign in (1.0, -1.0))
            excess = torch.where(there, up[0] - down[0], 0.0)
            low = torch.where(excess <= 0, t, low)
            high = torch.where(excess >= 0, t, high)
            step = -excess / (up[1] + down[1])
            after = torch.where((low <= t + step) & (t + step <= high), t + step, (low + high) / 2)
            done = torch.equal(torch.where(step.abs() < _ROOT, t, after), t)
            t = torch.where(there, after, 0.0)
            if done:
                break
        return t

    def _side(
        self, sizes: Sequence[tuple[float, Tensor]], t: Tensor, sign: float
    ) -> tuple[Tensor, Tensor]:
        """Return the logarithm of one side of the balance, and its slope, without sign."""
        some = [(abs(e), x + self.power * e * t) for e, x in sizes if e * sign > 0]
        terms = torch.stack([x + math.log(e) if self.summed else x for e, x in some])
        steep = self.power * torch.tensor([e for e, _ in some], dtype=torch.float64)
        if self.summed:
            return terms.logsumexp(0), (terms.softmax(0).nan_to_num(1.0) * steep[:, None]).sum(0)
        return terms.amax(0), steep[terms.argmax(0)]

    def _counting(
        self, family: Family, counted: Collection[str], state: Mapping[str, Tensor]
    ) -> list[Slices]:
        return [
            s for s in family.slices if s.name in counted and state[s.name].ndim >= self.least_axes
        ]


def two_sided(sizes: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return of which channels something scales up, and something down, that is not 0."""
    sides = [[x for e, x in sizes if e * sign > 0] for sign in (1.0, -1.0)]
    return torch.stack([torch.stack(s).isfinite().any(0) for s in sides]).all(0)


def _largest(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    return t.amax(axes, keepdim=True) if axes else t


def _length(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(t, dim=axes, keepdim=True) if axes else t


EQUAL_RANGES = Balance(ranges, _largest, 1.0, False, 2)
LEAST_NORM = Balance(squares, _length, 2.0, True, 0)


def balanced(
    state: Mapping[str, Tensor],
    families: Sequence[Family],
    balance: Balance,
    counted: Collection[str],
) -> list[Tensor]:
    """Return how far each channel of each family is followed until all are balanced.

    Args:
        state: weights and buffers by name; they are not changed.
        families: what may move.
        balance: what is balanced.
        counted: names of the weights that count.

    Example:
        >>> from fractions import Fraction
        >>> rows = Slices("in", Fraction(1), (0,), torch.tensor([[0]]))
        >>> columns = Slices("out", Fraction(-1), (1,), torch.tensor([[0]]))
        >>> state = {"in": torch.full((1, 3), 8.0), "out": torch.full((2, 1), 0.5)}
        >>> (t,) = balanced(state, [Family((rows, columns), 1)], EQUAL_RANGES, state)
        >>> torch.allclose(8.0 * t.exp(), 0.5 * (-t).exp())
        True
    """
    moving = {s.name for f in families for s in f.slices if s.name in counted}
    now = {**state, **balance.condensed(state, families, moving)}
    total = [torch.zeros(f.count, dtype=torch.float64) for f in families]
    for _ in range(SWEEPS):
        farthest = 0.0
        for i, family in enumerate(families):
            step = balance.amounts(family, counted, now)
            farthest = max(farthest, float(step.abs().max()))
            if float(step.abs().max()) > STILL:
                now |= moved(now, [(family, step)])
                total[i] = total[i] + step
        if farthest <= STILL:
            break
    return total
