r"""Updates with a second moment per coordinate: AdamW.

Momentum and second moment are AdamW's own: of the gradient as it comes, in the space around the
sphere. With :math:`h = \beta_1 m + \kappa g` and the weights
:math:`w = 1/(c_1(\sqrt{v'/c_2} + \epsilon))`, AdamW's update is :math:`u = h w`, and the sphere
takes its tangent part :math:`t = u - \rho p`, :math:`\rho = \langle p, u\rangle/|p|^2`. Neither
moment is projected or moved along: a momentum that were projected would have entries where the
second moment, of the gradient as it comes, has none, and their quotient could be of any size.
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
    total,
    working_dtype,
)


@dataclass(frozen=True)
class PerCoordinateUpdate:
    r"""AdamW's update, :math:`P(h w)`.

    Attributes:
        beta1: :math:`\beta_1`.
        kappa: share of the gradient in the momentum, :math:`1 - \beta_1`.
        beta2: :math:`\beta_2`, of the second moment :math:`v' = \beta_2 v + (1-\beta_2) g^2`.
        first: the bias correction :math:`c_1`; a tensor in a capturable step.
        second: the bias correction :math:`c_2`; likewise.
        eps: :math:`\epsilon`.
        width: how many numbers :meth:`reduce` sums.
    """

    width: ClassVar[int] = 6
    beta1: float
    kappa: float
    beta2: float
    first: float | Tensor
    second: float | Tensor
    eps: float

    @property
    def arguments(self) -> tuple[float, ...]:
        """The numbers that the native kernel takes."""
        first, second = float(self.first), float(self.second)
        moments = (self.beta1, self.kappa, self.beta2, 1 - self.beta2)
        return (*moments, first / second**0.5, first * self.eps, 0.0)

    def _weighted(
        self, p: Tensor, g: Tensor, m: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return point, new momentum, new second moment and the weights."""
        assert m is not None
        assert v is not None
        wide = working_dtype(p)
        g = g.to(wide)
        h = self.beta1 * m.to(wide) + self.kappa * g
        moment = self.beta2 * v.to(wide) + (1 - self.beta2) * g * g
        # A moment of zero would divide by eps alone, and by nothing where eps is 0.
        root = moment.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        w = 1 / (self.first / self.second**0.5 * root + self.first * self.eps)
        return p.to(wide), h, moment, w

    def reduce(
        self, p: Tensor, g: Tensor, m: Tensor | None, v: Tensor | None, inside: Axes
    ) -> Tensor:
        """Return <p,p> <p,u> <u,u> <g,g> |kappa g w|^2 <1,u> of each vector, one per row."""
        p, h, _, w = self._weighted(p, g, m, v)
        g, u = g.to(w.dtype), h * w
        news = self.kappa * g * w
        sums = [inner(a, b, inside) for a, b in ((p, p), (p, u), (u, u), (g, g), (news, news))]
        return torch.stack([*sums, total(u, inside)], -1).double()

    def plan(
        self,
        numbers: Tensor,
        radius: Tensor,
        _: Tensor | None,
        count: int,
        options: StepOptions,
        limits: Limits,
    ) -> Plan:
        """Return three coefficients of each vector; ``radius`` is recorded.

        With them the point goes to :math:`c_0 p + c_1 (u - c_2)`.
        """
        least = count * limits.least
        sound = numbers.isfinite().all(-1) & (numbers[:, 0] > least)
        pp, pu, uu, gg, news, ones = numbers.unbind(-1)
        at = record(radius, pp, options.radius, sound)
        rho = pu / pp
        mean = ones / count if options.centered else torch.zeros_like(pp)
        tangent = (uu - pu * rho - count * mean * mean).clamp_min(0)
        share, zero = share_of_news(news, uu, self.beta1), torch.zeros_like(pp)
        update = Update(tangent, zero, uu, gg, share, zero + least, normed=True)
        moved = step_coefficients(options, pp, at, update, limits)
        a, b, _, _ = leave_resting(moved, count, pp, at, limits.close)
        refused = refusals(moved, update, options, limits) & sound & (count > 1)
        return Plan(torch.stack([a - b * rho, b, mean], -1), sound, refused)

    def apply(
        self, p: Tensor, g: Tensor, m: Tensor | None, v: Tensor | None, inside: Axes, plan: Plan
    ) -> None:
        """Write the new point and both moments where the vectors are sound."""
        assert m is not None
        assert v is not None
        point, h, moment, w = self._weighted(p, g, m, v)
        c, u = [spread(k, p, inside) for k in plan.coefficients.to(w.dtype).unbind(-1)], h * w
        sound = spread(plan.sound, p, inside)
        for tensor, new in ((v, moment), (m, h), (p, c[0] * point + c[1] * (u - c[2]))):
            tensor.copy_(torch.where(sound, new.to(tensor.dtype), tensor))
