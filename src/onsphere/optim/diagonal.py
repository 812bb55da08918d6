r"""Updates with a second moment per coordinate: AdamW.

With :math:`h = \beta_1 m + \kappa g` and the weights
:math:`w = 1/(c_1(\sqrt{v'/c_2} + \epsilon))`, the momentum is the tangent part
:math:`h - \delta p`, :math:`\delta = \langle p, h\rangle/|p|^2`, and the update is the tangent
part of :math:`u = (h - \delta p)\,w`. Since :math:`u` is linear in :math:`\delta`, ten inner
products with :math:`h w` and :math:`p w` in place of :math:`u` can be summed *before*
:math:`\delta` is known: one reduction is enough, also where a vector is spread over processes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onsphere.optim.motion import (
    Axes,
    Plan,
    Travel,
    inner,
    move,
    record,
    settle,
    spread,
    total,
    working_dtype,
)


@dataclass(frozen=True)
class Diagonal:
    r"""AdamW's update, :math:`P(h w)` with :math:`h` tangent.

    Attributes:
        beta1: :math:`\beta_1`.
        kappa: share of the gradient in the momentum, :math:`1 - \beta_1`.
        beta2: :math:`\beta_2`, of the second moment :math:`v' = \beta_2 v + (1-\beta_2) g^2`.
        first: the bias correction :math:`c_1`.
        second: the bias correction :math:`c_2`.
        eps: :math:`\epsilon`.
        width: how many numbers :meth:`reduce` sums.
    """

    width: ClassVar[int] = 12
    beta1: float
    kappa: float
    beta2: float
    first: float
    second: float
    eps: float

    @property
    def arguments(self) -> tuple[float, ...]:
        """The numbers that the native kernel takes."""
        root = self.first / self.second**0.5
        moments = (self.beta1, self.kappa, self.beta2, 1 - self.beta2)
        return (*moments, root, self.first * self.eps, 0.0, 0.0)

    def _weighted(
        self, p: Tensor, g: Tensor, m: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        """Return eleven numbers of each vector, one vector per row.

        <p,p> <p,h> <p,hw> <p,pw> <hw,hw> <hw,pw> <pw,pw> <h,hw> <g,g> <1,hw> <1,pw>.
        """
        p, h, _, w = self._weighted(p, g, m, v)
        wide = g.to(w.dtype)
        u, q = h * w, p * w
        pairs = [(p, p), (p, h), (p, u), (p, q), (u, u), (u, q), (q, q), (h, u)]
        sums = [inner(a, b, inside) for a, b in [*pairs, (wide, wide)]]
        return torch.stack([*sums, total(u, inside), total(q, inside)], -1).double()

    def plan(
        self,
        numbers: Tensor,
        radius: Tensor,
        _: Tensor | None,
        count: int,
        travel: Travel,
        floor: float,
        rounding: float,
    ) -> Plan:
        """Return the six coefficients of each vector; ``radius`` is recorded."""
        sound = numbers.isfinite().all(-1) & (numbers[:, 0] > 0)
        pp, ph, p_hw, p_pw, hw_hw, hw_pw, pw_pw, h_hw = numbers[:, :8].unbind(-1)
        at = record(radius, pp, travel.radius, sound)
        drop = ph / pp
        pu, uu = p_hw - drop * p_pw, hw_hw - 2 * drop * hw_pw + drop * drop * pw_pw
        rho, mean = pu / pp, torch.zeros_like(pp)
        if travel.centered:
            mean = (numbers[:, 9] - drop * numbers[:, 10]) / count
        tangent = (uu - pu * rho - count * mean * mean).clamp_min(0)
        along = h_hw - drop * (p_hw + pu)
        moved = move(travel, pp, tangent, along, floor * uu, at)
        a, b, d, e = settle(moved, count, pp, at, rounding)
        coefficients = [drop, a - b * rho, b, d - drop - e * rho, e, mean]
        return Plan(torch.stack(coefficients, -1), sound)

    def apply(
        self, p: Tensor, g: Tensor, m: Tensor | None, v: Tensor | None, inside: Axes, plan: Plan
    ) -> None:
        """Write the new point and both moments where the vectors are sound."""
        assert m is not None
        assert v is not None
        point, h, moment, w = self._weighted(p, g, m, v)
        c = [spread(k, p, inside) for k in plan.coefficients.to(w.dtype).unbind(-1)]
        sound = spread(plan.sound, p, inside)
        u = (h - c[0] * point) * w - c[5]
        for tensor, new in (
            (v, moment),
            (m, h + c[3] * point + c[4] * u),
            (p, c[1] * point + c[2] * u),
        ):
            tensor.copy_(torch.where(sound, new.to(tensor.dtype), tensor))
