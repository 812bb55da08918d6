r"""Schedules of the learning rate: the factor :math:`f_t` that each step multiplies it by."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onsphere.errors import OnsphereError, nearest

MOST = 2**53
"""Steps up to which times are exact."""


class PlanError(OnsphereError, ValueError):
    """Settings of a run that cannot be."""


@dataclass(frozen=True)
class Schedule:
    r"""How the learning rate goes over a run; shaped as ``LambdaLR`` takes it.

    It rises over ``warmup`` steps as :math:`(t+1)/W`. Then, with :math:`s` from 0 to 1 over the
    rest of the run, it is 1 (``constant``), :math:`1-(1-e)s` (``linear``),
    :math:`e+(1-e)\frac{1+\cos\pi s}{2}` (``cosine``), 1 until it falls linearly to :math:`e` over
    the last part (``wsd``), or divided at given steps (``step``).

    Args:
        steps: how many, at least 1.
        kind: one of ``SHAPES``.
        warmup: steps until the full rate is reached.
        final: :math:`e`, the factor at the end of ``linear``, ``cosine`` and ``wsd``.
        cooldown: of ``wsd``, the part of the run in which the rate falls.
        drops: of ``step``, the steps at which the rate is divided.
        drop_by: of ``step``, by what.

    Raises:
        PlanError: a value out of its range, or that the kind does not take.

    Example:
        >>> schedule = Schedule(6, "linear", warmup=2)
        >>> schedule.factors(torch.arange(6.0)).tolist()
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    steps: int
    kind: str = "constant"
    warmup: int = 0
    final: float = 0.0
    cooldown: float = 0.2
    drops: tuple[int, ...] = ()
    drop_by: float = 10.0

    def __post_init__(self) -> None:
        kind = self.kind.lower() if isinstance(self.kind, str) else str(self.kind)
        if kind not in SHAPES:
            raise PlanError(f"unknown schedule {self.kind!r}{nearest(kind, list(SHAPES))}")
        object.__setattr__(self, "kind", kind)
        if self.steps < 1:
            raise PlanError(f"a run has at least 1 step, got {self.steps}")
        if self.steps > MOST:
            raise PlanError(f"a run has at most {MOST} steps, got {self.steps}")
        if not 0 <= self.warmup < self.steps:
            raise PlanError(
                f"a warmup lasts at least 0 steps and less than the {self.steps} of the run, got "
                f"{self.warmup}"
            )
        if not 0 <= self.final <= 1:
            raise PlanError(f"the final factor of the rate is from 0 to 1, got {self.final}")
        if self.final and self.kind in ("constant", "step"):
            raise PlanError(
                f"a {self.kind} schedule has no final factor; linear, cosine and wsd have"
            )
        if not 0 < self.cooldown <= 1:
            raise PlanError(
                f"the cooldown is a part of the run, above 0 and at most 1, got {self.cooldown}"
            )
        if self.cooldown != Schedule.cooldown and self.kind != "wsd":
            raise PlanError(f"a {self.kind} schedule has no cooldown; wsd has")
        self._check_drops()

    def _check_drops(self) -> None:
        if (self.kind == "step") != bool(self.drops):
            raise PlanError(
                "a step schedule needs the steps at which the rate is divided (drops)"
                if self.kind == "step"
                else f"a {self.kind} schedule has no drops; step has"
            )
        if not all(0 < drop < self.steps for drop in self.drops):
            raise PlanError(
                f"drops are steps of the run, from 1 to {self.steps - 1}, got {list(self.drops)}"
            )
        if self.drop_by != Schedule.drop_by and self.kind != "step":
            raise PlanError(f"a {self.kind} schedule has nothing to divide by (drop_by); step has")
        if not 1 < self.drop_by < math.inf:
            raise PlanError(f"the rate is divided by a number above 1, got {self.drop_by}")

    def factors(self, times: Float[Tensor, "times"]) -> Float[Tensor, "times"]:
        """Return the factor at some times; between two steps too.

        Args:
            times: steps from 0.

        Returns:
            One factor per time.
        """
        left = (times - self.warmup) / (self.steps - self.warmup)
        shaped = SHAPES[self.kind](self, times, left)
        rising = (times + 1) / max(self.warmup, 1)
        return torch.where(times < self.warmup, rising.clamp(max=1.0), shaped)

    def __call__(self, step: int) -> float:
        """Return the factor at one step, as ``LambdaLR`` asks for it; the last one after the end.

        Args:
            step: from 0.
        """
        time = torch.tensor([min(step, self.steps)], dtype=torch.float64)
        return float(self.factors(time))

    @property
    def corners(self) -> tuple[int, ...]:
        """Steps at which the schedule turns, the first step among them."""
        turns = {0, self.warmup, *self.drops}
        if self.kind == "wsd":
            turns.add(math.ceil(self._falls_from))
        return tuple(sorted(turn for turn in turns if turn < self.steps))

    @property
    def _falls_from(self) -> float:
        return max(self.steps * (1 - self.cooldown), float(self.warmup))

    def __str__(self) -> str:
        said = _SAID[self.kind](self)
        if self.warmup:
            said = f"{self.warmup:,} steps of warmup, then {said}"
        return f"{self.steps:,} steps, {said}"


Shape = Callable[[Schedule, Tensor, Tensor], Tensor]


def _linear(schedule: Schedule, _: Tensor, part: Tensor) -> Tensor:
    return 1 - (1 - schedule.final) * part


def _cosine(schedule: Schedule, _: Tensor, part: Tensor) -> Tensor:
    return schedule.final + (1 - schedule.final) * (1 + torch.cos(math.pi * part)) / 2


def _wsd(schedule: Schedule, times: Tensor, _: Tensor) -> Tensor:
    start = schedule._falls_from
    return _linear(schedule, times, ((times - start) / (schedule.steps - start)).clamp(min=0))


def _step(schedule: Schedule, times: Tensor, _: Tensor) -> Tensor:
    passed = (times[:, None] >= times.new_tensor(sorted(schedule.drops))).sum(1)
    return schedule.drop_by ** -passed.to(times)


SHAPES: dict[str, Shape] = {
    "constant": lambda _, times, __: torch.ones_like(times),
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "step": _step,
}
"""What follows the warmup: from the schedule, times, and the part of the rest that is gone."""

_SAID: dict[str, Callable[[Schedule], str]] = {
    "constant": lambda _: "constant rate",
    "linear": lambda s: f"linear to {s.final:g}",
    "cosine": lambda s: f"cosine to {s.final:g}",
    "wsd": lambda s: f"constant, over the last {s.cooldown:.0%} linear to {s.final:g}",
    "step": lambda s: f"divided by {s.drop_by:g} at {', '.join(f'{d:,}' for d in s.drops)}",
}
