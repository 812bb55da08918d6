r"""Updates that combine gradient and momentum with one factor per vector: SGD, and AdamW's kin.

With :math:`P` the projection to the tangent space at :math:`p`, the momentum becomes
:math:`h = P(\alpha m + \kappa g)` and the update is :math:`t = P(x g + y m)`, both in the plane of
:math:`p, g, m`. Six inner products per vector say everything about a step, and six coefficients
write it: :math:`p' = c_0 p + c_1 g + c_2 m` and :math:`m' = c_3 p + c_4 g + c_5 m`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onsphere.optim.updates.geodesic import (
    Axes,
    Limits,
    Plan,
    StepOptions,
    Update,
    inner,
    leave_resting,
    record,
    refusals,
    share_of_news,
    spread,
    step_coefficients,
    working_dtype,
)


@dataclass(frozen=True)
class VectorMoment:
    r"""A second moment per vector: :math:`v \leftarrow \beta v + (1-\beta)|Pg|^2/n`.

    The update is divided by :math:`c_1(\sqrt{v/c_2} + \epsilon)`.

    Attributes:
        beta: :math:`\beta`.
        first: the bias correction :math:`c_1` of the momentum; a tensor in a capturable step.
        second: the bias correction :math:`c_2` of the moment; likewise.
        eps: :math:`\epsilon`.
    """

    beta: float
    first: float | Tensor
    second: float | Tensor
    eps: float


@dataclass(frozen=True)
class PerVectorUpdate:
    r"""An update :math:`P(x g + y m)` with momentum :math:`P(\alpha m + \kappa g)`.

    Attributes:
        alpha: share of the old momentum in the new one.
        kappa: share of the gradient in it.
        along_gradient: :math:`x`.
        along_momentum: :math:`y`.
        moment: divide by the root of a second moment per vector.
        width: how many numbers :meth:`reduce` sums.
    """

    width: ClassVar[int] = 6
    alpha: float
    kappa: float
    along_gradient: float
    along_momentum: float
    moment: VectorMoment | None = None

    @property
    def arguments(self) -> tuple[float, ...]:
        """The numbers that the native kernel takes."""
        rest = (0.0, 1.0, 0.0)
        if self.moment is not None:
            first, second = float(self.moment.first), float(self.moment.second)
            rest = (self.moment.beta, first / second**0.5, first * self.moment.eps)
        return (self.alpha, self.kappa, self.along_gradient, self.along_momentum, *rest)

    def reduce(
        self, p: Tensor, g: Tensor, m: Tensor | None, _: Tensor | None, inside: Axes
    ) -> Tensor:
        """Return <p,p>, <p,g>, <p,m>, <g,g>, <g,m>, <m,m> of each vector, one per row."""
        wide = working_dtype(p)
        p, g = p.to(wide), g.to(wide)
        pp, pg, gg = inner(p, p, inside), inner(p, g, inside), inner(g, g, inside)
        if m is None:
            none = torch.zeros_like(pp)
            return torch.stack([pp, pg, none, gg, none, none], -1).double()
        m = m.to(wide)
        pm, gm, mm = inner(p, m, inside), inner(g, m, inside), inner(m, m, inside)
        return torch.stack([pp, pg, pm, gg, gm, mm], -1).double()

    def plan(
        self,
        numbers: Tensor,
        radius: Tensor,
        second: Tensor | None,
        count: int,
        options: StepOptions,
        limits: Limits,
    ) -> Plan:
        """Return the six coefficients of each vector; ``radius`` and ``second`` are updated."""
        least = count * limits.least
        sound = numbers.isfinite().all(-1) & (numbers[:, 0] > least)
        pp, pg, pm, raw_gg, raw_gm, raw_mm = numbers.unbind(-1)
        at = record(radius, pp, options.radius, sound)
        gamma, mu = pg / pp, pm / pp
        gg, gm = (raw_gg - pg * gamma).clamp_min(0), raw_gm - pg * mu
        mm = (raw_mm - pm * mu).clamp_min(0)
        x, y = torch.full_like(pp, self.along_gradient), torch.full_like(pp, self.along_momentum)
        if self.moment is not None and second is not None:
            scale = _root_of(self.moment, second, gg / count, sound)
            x, y = x / scale, y / scale
        tangent = (x * x * gg + 2 * x * y * gm + y * y * mm).clamp_min(0)
        whole = x * x * raw_gg + 2 * x * y * raw_gm + y * y * raw_mm
        along = x * self.kappa * gg + (x * self.alpha + y * self.kappa) * gm + y * self.alpha * mm
        momentum = self.kappa**2 * gg + 2 * self.kappa * self.alpha * gm + self.alpha**2 * mm
        share = share_of_news(self.kappa**2 * gg, momentum, self.alpha)
        normed = self.moment is not None
        update = Update(tangent, along, whole, raw_gg, share, least * (x * x + y * y), normed)
        moved = step_coefficients(options, pp, at, update, limits)
        a, b, d, e = leave_resting(moved, count, pp, at, limits.close)
        of_g, of_m = self.kappa + e * x, self.alpha + e * y
        coefficients = [
            *(a - b * (x * gamma + y * mu), b * x, b * y),
            *(d - of_g * gamma - of_m * mu, of_g, of_m),
        ]
        refused = refusals(moved, update, options, limits) & sound & (count > 1)
        return Plan(torch.stack(coefficients, -1), sound, refused)

    def apply(
        self, p: Tensor, g: Tensor, m: Tensor | None, _: Tensor | None, inside: Axes, plan: Plan
    ) -> None:
        """Write the new point and momentum where the vectors are sound."""
        wide = working_dtype(p)
        c = [spread(k, p, inside) for k in plan.coefficients.to(wide).unbind(-1)]
        sound = spread(plan.sound, p, inside)
        point, slope = p.to(wide), g.to(wide)
        there = c[0] * point + c[1] * slope
        if m is not None:
            momentum = m.to(wide)
            there = there + c[2] * momentum
            carried = c[3] * point + c[4] * slope + c[5] * momentum
            m.copy_(torch.where(sound, carried, momentum))
        p.copy_(torch.where(sound, there, point))


def _root_of(moment: VectorMoment, second: Tensor, fresh: Tensor, sound: Tensor) -> Tensor:
    """Update the second moment of sound vectors and return what divides the update."""
    ahead = moment.beta * second.double() + (1 - moment.beta) * fresh
    second.copy_(torch.where(sound, ahead.to(second.dtype), second))
    # A moment of zero would divide by eps alone, and by nothing where eps is 0.
    held = second.double().clamp_min(torch.finfo(torch.float32).tiny)
    return moment.first * ((held / moment.second).sqrt() + moment.eps)
