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


def per_channel(s: Slices, entries: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Return one number for the slices of each channel.

    Args:
        s: the slices.
        entries: of the whole weight.
        reduce: what makes one number of the last axis of a tensor.
    """
    rest = [a for a in range(entries.ndim) if a not in s.axes]
    flat = entries.permute(*s.axes, *rest).reshape(math.prod(entries.shape[a] for a in s.axes), -1)
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
        power: how the measure grows with the scale of a slice: 1 for a range, 2 for a square.
        summed: whether several slices on one side add up; the largest counts otherwise.
        least_axes: axes that a weight must have to count.
    """

    measure: Callable[[Slices, Tensor], Tensor]
    power: float
    summed: bool
    least_axes: int

    def applies(
        self, family: Family, counted: Collection[str], state: Mapping[str, Tensor]
    ) -> bool:
        """Return whether something that counts scales up, and something down."""
        signs = {s.exponent > 0 for s in self._counting(family, counted, state)}
        return family.exact and signs == {True, False}

    def amounts(
        self, family: Family, counted: Collection[str], state: Mapping[str, Tensor]
    ) -> Tensor:
        """Return how far to follow each channel; 0 where one side has nothing."""
        up: list[tuple[float, Tensor]] = []
        down: list[tuple[float, Tensor]] = []
        for s in self._counting(family, counted, state):
            size = self.measure(s, state[s.name]).double().cpu()
            (up if s.exponent > 0 else down).append((abs(float(s.exponent)), size.log()))
        there = [torch.stack([x for _, x in side]).isfinite().any(0) for side in (up, down)]
        low = torch.full((family.count,), -_FARTHEST, dtype=torch.float64)
        high = -low
        for _ in range(64):
            middle = (low + high) / 2
            more = self._side(up, middle) < self._side(down, -middle)
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        return torch.where(there[0] & there[1], (low + high) / 2, 0.0)

    def _side(self, slices: Sequence[tuple[float, Tensor]], t: Tensor) -> Tensor:
        if self.summed:
            terms = [x + self.power * e * t + math.log(e) for e, x in slices]
            return torch.stack(terms).logsumexp(0)
        return torch.stack([x + self.power * e * t for e, x in slices]).amax(0)

    def _counting(
        self, family: Family, counted: Collection[str], state: Mapping[str, Tensor]
    ) -> list[Slices]:
        return [
            s for s in family.slices if s.name in counted and state[s.name].ndim >= self.least_axes
        ]


EQUAL_RANGES = Balance(ranges, 1.0, False, 2)
LEAST_NORM = Balance(squares, 2.0, True, 0)


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
        >>> 8.0 * t.exp(), 0.5 * (-t).exp()
        (tensor([2.0000], dtype=torch.float64), tensor([2.0000], dtype=torch.float64))
    """
    now = dict(state)
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
