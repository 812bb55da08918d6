r"""The way of the norm under a scheduled rate, with weight decay or without.

A law of equilibrium says where norm and rotation settle and how fast. The same three numbers say
how they move at any other norm and rate. With :math:`x = |w|^p` the power that relaxes
exponentially, and the rate times :math:`f`,

.. math:: \dot x = |w|^b\,(G f^2 - \rho f x), \qquad \theta = T f / |w|^s,

where :math:`G = \rho\,|w_\infty|^{p}`, :math:`T = \theta_\infty |w_\infty|^s`: gradients lengthen
by the square of the rate, decay shortens by the rate itself. :math:`b` is 0, but 1 for Adam + L2,
whose decay is measured in units of the gradient, as :math:`1/|w|`. Without decay :math:`\rho = 0`
and the rest stays. A step is taken with the rate and :math:`|w|^b` held:

.. math:: x' = x e^{-r} + G f^2 |w|^b\,\frac{1-e^{-r}}{r}, \qquad r = \rho f |w|^b.

The laws assume that rate and norm change little over the memory of the momentum (and of Adam's
second moment).

Everything that follows a norm over a run takes this step (:meth:`Motion.step`): a plan under its
schedule, a monitor from sample to sample, and a recipe's schedule of the rotation. The exact
recursions of single steps, from measured gradients, are in :mod:`onsphere.dynamics.growth`.

Source: the laws of :mod:`onsphere.dynamics.equilibrium`; without decay those of
:mod:`onsphere.dynamics.growth`; the recursion is derived here from both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from onsphere.dynamics.equilibrium import Equilibrium

POINTS = 2000
"""Runs of at most so many steps are followed step by step, longer ones in about so many pieces."""

_DENSER = 1.1


@dataclass(frozen=True)
class Motion:
    r"""How the norm moves and the weight turns at the full rate.

    Args:
        growth: :math:`G`, what a step adds to :math:`|w|^p`.
        rate: :math:`\rho`, the part of it that decay takes.
        turn: :math:`T`, the rotation per step at norm 1.
        power: :math:`p`.
        slope: :math:`s`.
        bend: :math:`b`.

    Example:
        >>> from onsphere.dynamics import adamw_equilibrium
        >>> motion = Motion.of(adamw_equilibrium(lr=1e-3, weight_decay=0.1))
        >>> round(motion.growth, 8), round(motion.rate, 6)  # lr^2, 2 lr decay
        (1e-06, 0.0002)
    """

    growth: float
    rate: float
    turn: float
    power: int
    slope: int
    bend: int = 0

    @classmethod
    def of(cls, settled: Equilibrium, bend: int = 0) -> "Motion":
        """Return the motion that settles there.

        Args:
            settled: an equilibrium in full units.
            bend: 1 for Adam + L2.
        """
        rate = settled.rate / settled.norm**bend
        growth = rate * settled.norm**settled.power
        turn = settled.rotation * settled.norm**settled.slope
        return cls(growth, rate, turn, settled.power, settled.slope, bend)

    def without_decay(self) -> "Motion":
        """Return the same gradients without the decay."""
        return replace(self, rate=0.0)

    def scaled(self, factor: float) -> "Motion":
        """Return the same motion with norms in another unit.

        Args:
            factor: what a norm is multiplied by; for a motion without a bend.
        """
        growth, turn = self.growth * factor**self.power, self.turn * factor**self.slope
        return replace(self, growth=growth, turn=turn)

    def step(
        self, power: float, steps: float = 1.0, factor: float = 1.0, level: float = 1.0
    ) -> tuple[float, float]:
        r"""Take the step of this module: the power of the norm after it, rate and norm held.

        Args:
            power: :math:`|w|^p` before.
            steps: how many are taken at once.
            factor: of the rate.
            level: the squared gradient at the unit-norm point, in units of that which the motion
                is for.

        Returns:
            :math:`|w|^p` after, and the part of the old one that is left in it.

        Example:
            >>> settles_at_16 = Motion(growth=1.6, rate=0.1, turn=0.01, power=4, slope=2)
            >>> round(settles_at_16.step(1.0, 1000.0)[0], 9)
            16.0
            >>> settles_at_16.without_decay().step(1.0, 10.0)
            (17.0, 1.0)
        """
        speed = steps * power ** (self.bend / self.power)
        lost = self.rate * factor * speed
        kept = -math.expm1(-lost) / lost if lost else 1.0
        left = math.exp(-lost)
        return power * left + self.growth * level * factor**2 * speed * kept, left

    def balance(self, factors: Float[Tensor, "times"]) -> Float[Tensor, "times"]:
        """Return the rotation that a rate would settle at, if it stayed.

        Args:
            factors: of the rate.

        Returns:
            Radians per step; NaN without decay.
        """
        if self.rate == 0:
            return torch.full_like(factors, math.nan)
        norm = (self.growth * factors / self.rate) ** (1 / self.power)
        return torch.where(factors > 0, self.turn * factors / norm**self.slope, 0.0)


@dataclass(frozen=True, eq=False)
class Path:
    r"""Norm and rotation over a run, at some of its steps.

    Args:
        steps: their numbers, rising from 0.
        factors: of the rate at each.
        norm: before each.
        rotation: of each, in radians; infinite for a weight of length 0.
        balance: the rotation at which the present rate would settle, if it stayed.
        left: the part of the start's :math:`|w|^p` that is left: not yet forgotten.
    """

    steps: Int[Tensor, "points"]
    factors: Float[Tensor, "points"]
    norm: Float[Tensor, "points"]
    rotation: Float[Tensor, "points"]
    balance: Float[Tensor, "points"]
    left: Float[Tensor, "points"]

    def first(self, true: Tensor) -> int | None:
        """Return the first step for which something holds, ``None`` if for none.

        Args:
            true: one truth value per point.
        """
        places = true.nonzero()
        return int(self.steps[places[0, 0]]) if len(places) else None


@runtime_checkable
class Rates(Protocol):
    """What can be followed: a :class:`~onsphere.dynamics.schedule.Schedule`, or sampled rates."""

    @property
    def steps(self) -> int:
        """How many."""

    @property
    def corners(self) -> tuple[int, ...]:
        """Steps behind which to look closely."""

    def factors(self, times: Tensor) -> Tensor:
        """Return what multiplies the full rate."""


Levels = Callable[[Tensor], Tensor]
"""Time -> the squared gradient at the unit-norm point, in units of that which the motion is for."""


def follow(
    motion: Motion, schedule: Rates, initial_norm: float, levels: Levels | None = None
) -> Path:
    r"""Follow the norm and the rotation through a run.

    Up to ``POINTS`` steps it is the recursion of this module, one step at a time. Longer runs go in
    pieces, short ones behind every corner of the schedule; the rate is taken from the middle of
    each.

    Args:
        motion: at the full rate.
        schedule: of the rate.
        initial_norm: norm before the first step, in the motion's unit; 0 for the limit of a weight
            that has outgrown its start.
        levels: of the gradients over the run, for SGD: they lengthen the weight and turn it.
            Without it they are those of the motion.

    Returns:
        The path.

    Example:
        >>> from onsphere.dynamics import adamw_equilibrium
        >>> from onsphere.dynamics.schedule import Schedule
        >>> settled = adamw_equilibrium(lr=0.1, weight_decay=0.1)
        >>> path = follow(Motion.of(settled), Schedule(1000), 2 * settled.norm)
        >>> halved, found = path.rotation[0] / settled.rotation, path.rotation[-1]
        >>> round(float(halved), 3), round(float(found / settled.rotation), 3)
        (0.5, 1.0)
    """
    steps, levels = _points(schedule), levels or torch.ones_like
    starts, lengths = steps[:-1].double(), steps.diff().double()
    middles = starts + (lengths - 1) / 2
    pieces = zip(
        lengths.tolist(), schedule.factors(middles).tolist(), levels(middles).tolist(), strict=True
    )
    power, left = initial_norm**motion.power, 1.0
    powers, lefts = [power], [left]
    for length, factor, level in pieces:
        power, kept = motion.step(power, length, factor, level)
        left *= kept
        powers.append(power)
        lefts.append(left)
    norm = torch.tensor(powers, dtype=torch.float64) ** (1 / motion.power)
    times = steps.double()
    factors, pushes = schedule.factors(times), levels(times).sqrt()
    turned = motion.turn * pushes * factors / norm**motion.slope
    rotation = torch.where(factors > 0, turned, 0.0)
    forgotten = torch.tensor(lefts, dtype=torch.float64)
    return Path(steps, factors, norm, rotation, motion.balance(factors), forgotten)


def _points(schedule: Rates) -> Int[Tensor, "points"]:
    """Choose the steps to look at: even ones, and ever denser ones towards corners from behind."""
    last = schedule.steps - 1
    if last < POINTS:
        return torch.arange(last + 1)
    even = torch.linspace(0, last, POINTS, dtype=torch.float64).round()
    reach = math.ceil(math.log(schedule.steps / POINTS * 8) / math.log(_DENSER))
    near = (_DENSER ** torch.arange(max(reach, 0), dtype=torch.float64)).round()
    behind = [corner + torch.cat([near.new_zeros(1), near]) for corner in schedule.corners]
    return torch.cat([even, *behind]).clamp(max=last).long().unique()  # type: ignore[no-untyped-call]
