r"""AdamW on a product of spheres.

One step for a vector at the point :math:`p`, with :math:`P` the projection to the tangent space
there and bias corrections :math:`c_i = 1 - \beta_i^k`:

.. math:: m \leftarrow \beta_1 m + (1-\beta_1) g,\qquad
          v \leftarrow \beta_2 v + (1-\beta_2) g^2,\qquad
          u = P\,\frac{m / c_1}{\sqrt{v / c_2} + \epsilon},

and the point moves along :math:`-u` as :mod:`~onsphere.optim.updates.geodesic` says. Both moments
are AdamW's own, of the gradient as it comes and per coordinate: only the update is projected. A
momentum that is projected, or carried along, gets entries where the gradient has none; divided by
the root of a second moment that has none either, they would move the vector by any amount.

With one second moment per vector, :math:`v \leftarrow \beta_2 v + (1-\beta_2)|Pg|^2/n`, nothing is
divided coordinate by coordinate. There the momentum is tangent,
:math:`m \leftarrow P(\beta_1 m + (1-\beta_1) g)`, and goes along to the new point.

Source: Kingma & Ba, *Adam*, 2015 (arXiv 1412.6980); Loshchilov & Hutter, *Decoupled weight decay
regularization*, 2019 (arXiv 1711.05101); Cho & Lee, 2017 (arXiv 1709.09603), for the sphere.
"""

from collections.abc import Sequence
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.optim.adamw import adamw as plain_adamw
from torch.optim.optimizer import ParamsT

from onsphere.optim.checkpoint.state_dict import mend
from onsphere.optim.checks.gradients import Nonfinite
from onsphere.optim.checks.validation import check_options
from onsphere.optim.distributed.placement import local
from onsphere.optim.master_weights import state_dtype
from onsphere.optim.sphere_optimizer import SphereOptimizer
from onsphere.optim.steps.fused import capturable, fusable, fused_as
from onsphere.optim.steps.ordinary import adamw_again
from onsphere.optim.steps.repeated import Ready, ReadyInSpace
from onsphere.optim.updates.geodesic import LrMode, Retraction
from onsphere.optim.updates.per_coordinate import PerCoordinateUpdate
from onsphere.optim.updates.per_vector import PerVectorUpdate
from onsphere.optim.updates.torch_optim import SecondMoment, adamw_update
from onsphere.optim.updates.types import Group


class SphereAdamW(SphereOptimizer):
    r"""AdamW for weights on spheres, beside ordinary AdamW for all other weights.

    A param group with ``sphere`` keeps each vector of its parameters on its sphere; a group
    without one is updated exactly as ``torch.optim.AdamW(fused=True)`` does it.

    A vector that is zero, or whose gradient is not finite, stays where it is, and so do its
    moments; :attr:`skipped` counts them and the first one warns. Gradients are never changed,
    half precision is computed in float32, and a given radius takes effect at the first step
    (:func:`~onsphere.optim.project_` does it at once).

    Args:
        params: parameters or param groups; a group may hold ``sphere``.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decay of ordinary parameters. It is radial, so on a sphere it is ignored,
            with one warning where it was asked for.
        second_moment: of spheres, one per ``"coordinate"`` or one per ``"vector"``.
        lr_mode: ``"relative"``: a vector of any length r turns as ``torch.optim.AdamW`` turns one
            of the length ρ at which ``torch.nn`` starts it
            (:func:`~onsphere.optim.updates.geodesic.reference_length`), so that training does not
            depend on the lengths at the start (but for ``eps``): the step in space begins as
            ``-lr * (r / ρ) * update``. ``"rate"``: it begins as ``-lr * update``, as in
            ``torch.optim.AdamW``. ``"angle"``: every vector turns by ``lr`` radians.
        retraction: ``"projection"`` or ``"exponential"``, as in :class:`SphereSGD`.
        maximize: ascend instead of descending.
        master_weights: move a copy in float32 of weights on spheres in half precision (moments in
            float32, too), and round it to the weights after each step. Without it turns below the
            rounding get lost, which is said once under ``lr_mode="angle"``. Load weights and
            state together.
        nonfinite: what a gradient on a sphere that is not finite does: ``"skip"`` its vectors, or
            ``"raise"`` before anything moves.
        foreach: how ordinary parameters move, as in ``torch.optim``; spheres have kernels of their
            own.
        fused: likewise; ``None`` is fused where PyTorch's kernel takes them as they are, and where
            it does not, ``True`` is not followed.
        capturable: count steps on the device of the weights and wait for nothing there, so that a
            CUDA graph can record a step, after one that was not recorded (as in ``torch.optim``).
            Replays follow ``lr`` where it is a tensor on that device. It is computed in pure
            PyTorch, slower than the kernels where no graph replays it; :attr:`skipped` counts and
            warns of nothing.
        differentiable: not taken: a step has no derivative.

    Raises:
        ValueError: a value out of its range, or a parameter that does not fit its sphere.
        TypeError: ``sphere`` is not a :class:`~onsphere.geometry.Sphere`.

    Example:
        >>> import torch
        >>> from onsphere.geometry import Sphere, VectorAxes
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> rows = Sphere(VectorAxes(index=(0,)))
        >>> optimizer = SphereAdamW([{"params": [weight], "sphere": rows}], lr=0.1)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.detach().norm(dim=1).round(decimals=5)    # the lengths they started with
        tensor([5., 1.])
    """

    _usual_decay = 1e-2
    _words: ClassVar = {**SphereOptimizer._words, "second_moment": get_args(SecondMoment)}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        second_moment: SecondMoment = "coordinate",
        lr_mode: LrMode = "relative",
        retraction: Retraction = "projection",
        maximize: bool = False,
        master_weights: bool = False,
        nonfinite: Nonfinite = "skip",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_options(
            type(self).__name__, foreach=foreach, fused=fused, differentiable=differentiable
        )
        defaults: Group = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "second_moment": second_moment,
            "lr_mode": lr_mode,
            "retraction": retraction,
            "maximize": maximize,
            "master_weights": master_weights,
            "nonfinite": nonfinite,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _check_settings(self, settings: Group) -> None:
        super()._check_settings(settings)
        for number, beta in enumerate(settings["betas"]):
            if not 0 <= beta < 1:
                raise ValueError(f"betas are at least 0 and below 1, got {beta} as number {number}")
        if not settings["eps"] >= 0:
            raise ValueError(f"eps must be at least 0, got {settings['eps']}")

    def _moments(self, params: list[Tensor], group: Group, *, coordinate: bool) -> list[Tensor]:
        """Make missing state, and return the counters of steps."""
        for param in params:
            state, dtype = self.state[param], state_dtype(param, group)
            if "step" not in state:
                device = param.device if capturable(group) else None
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            if coordinate and "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
            if state["exp_avg"].dtype != dtype:  # after model.to(dtype)
                mend(state, param, dtype)
        return [self.state[param]["step"] for param in params]

    def _updates(
        self, params: list[Tensor], group: Group
    ) -> Sequence[tuple[Tensor | None, Tensor | None, PerVectorUpdate | PerCoordinateUpdate]]:
        kind: SecondMoment = group["second_moment"]
        counters = self._moments(params, group, coordinate=kind == "coordinate")
        if counters:
            torch._foreach_add_(counters, 1.0)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        recorded = capturable(group)
        made: dict[float | Tensor, PerVectorUpdate | PerCoordinateUpdate] = {}
        found = []
        for param, counter in zip(params, counters, strict=True):
            steps, state = counter if recorded else counter.item(), self.state[param]
            if steps not in made:
                made[steps] = adamw_update(
                    betas=(beta1, beta2), eps=group["eps"], steps=steps, second_moment=kind
                )
            moment = state["exp_avg_sq"] if kind == "coordinate" else None
            found.append((state["exp_avg"], moment, made[steps]))
        return found

    def _update_again(
        self, ready: Ready, group: Group
    ) -> PerVectorUpdate | PerCoordinateUpdate | None:
        steps = ready.count()
        if steps is None:
            return None
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return adamw_update(
            betas=(beta1, beta2),
            eps=group["eps"],
            steps=steps,
            second_moment=group["second_moment"],
        )

    def _fused_columns(self, group: Group) -> Sequence[str] | None:
        return ("exp_avg", "exp_avg_sq") if fused_as(group, True) else None

    def _step_in_space_again(self, ready: ReadyInSpace, group: Group) -> bool:
        return adamw_again(ready, group)

    def _step_in_space(self, params: list[Tensor], grads: list[Tensor], group: Group) -> None:
        if not params:
            return
        if any(grad.layout is not torch.strided for grad in grads):
            raise RuntimeError(
                "AdamW does not take sparse gradients; make the layer dense (sparse=False)"
            )
        counters = self._moments(params, group, coordinate=True)
        beta1, beta2 = group["betas"]
        first, second = ([self.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq"))
        if self._sharded:
            params, first, second = ([local(x) for x in xs] for xs in (params, first, second))
        plain_adamw(
            params,
            grads,
            first,
            second,
            [],
            counters,
            foreach=group["foreach"],
            fused=fused_as(group, fusable(params, grads, first, second)),
            capturable=capturable(group) and not params[0].is_cpu,
            has_complex=any(p.is_complex() for p in params),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
