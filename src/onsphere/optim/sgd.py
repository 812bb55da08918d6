r"""Stochastic gradient descent, with momentum, on a product of spheres.

One step for a vector at the point :math:`p`, with :math:`P` the projection to the tangent space
there:

.. math:: m \leftarrow P(\alpha m + (1-\tau) g),\qquad
          u = m \;\text{ or }\; P(g + \alpha m)\ \text{(Nesterov)},

and the point moves along :math:`-u` as :mod:`~onsphere.optim.updates.geodesic` says; :math:`m` goes
along to the new point, so that it is tangent from the first step on and at the end of every step.

Source: Cho & Lee, *Riemannian approach to batch normalization*, 2017 (arXiv 1709.09603); Absil,
Mahony & Sepulchre, *Optimization Algorithms on Matrix Manifolds*, 2008, section 4.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd as plain_sgd

from onsphere.optim.checkpoint.state_dict import mend
from onsphere.optim.checks.gradients import Nonfinite
from onsphere.optim.checks.validation import check_options
from onsphere.optim.distributed.placement import beside, local
from onsphere.optim.master_weights import state_dtype
from onsphere.optim.sphere_optimizer import SphereOptimizer
from onsphere.optim.steps.fused import capturable, fusable, fused_as
from onsphere.optim.steps.ordinary import moved_fused, sgd_again
from onsphere.optim.steps.repeated import Ready, ReadyInSpace
from onsphere.optim.updates.geodesic import LrMode, Retraction
from onsphere.optim.updates.per_vector import PerVectorUpdate
from onsphere.optim.updates.torch_optim import sgd_update
from onsphere.optim.updates.types import Group


class SphereSGD(SphereOptimizer):
    r"""SGD for weights on spheres, beside ordinary SGD for all other weights.

    A param group with ``sphere`` keeps each vector of its parameters on its sphere; a group
    without one is updated exactly as ``torch.optim.SGD`` does it.

    A vector that is zero, or whose gradient is not finite, stays where it is, and so does its
    momentum; :attr:`skipped` counts them and the first one warns. Gradients are never changed,
    half precision is computed in float32, and a given radius takes effect at the first step
    (:func:`~onsphere.optim.project_` does it at once).

    Args:
        params: parameters or param groups; a group may hold ``sphere``.
        lr: learning rate, a number or a tensor of one element.
        momentum: momentum factor.
        dampening: dampening of momentum.
        nesterov: Nesterov momentum; needs momentum and no dampening.
        weight_decay: decay of ordinary parameters. It is radial, so on a sphere it is ignored,
            with one warning.
        lr_mode: ``"relative"``: a vector of any length r turns as ``torch.optim.SGD`` turns one of
            the length ρ at which ``torch.nn`` starts it
            (:func:`~onsphere.optim.updates.geodesic.reference_length`), so that training does not
            depend on the lengths at the start: the step in space begins as
            ``-lr * (r / ρ)**2 * update``.
            ``"rate"``: it begins as ``-lr * update``, as in ``torch.optim.SGD``. ``"angle"``:
            every vector turns by ``lr`` radians.
        retraction: ``"projection"`` (step, then project back; no trigonometry) or
            ``"exponential"`` (along the geodesic, momentum transported in parallel).
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
        capturable: wait for nothing on the device of the weights, so that a CUDA graph can record
            a step, after one that was not recorded. Replays follow ``lr`` where it is a tensor on
            that device. It is computed in pure PyTorch, slower than the kernels where no graph
            replays it; :attr:`skipped` counts and warns of nothing.
        differentiable: not taken: a step has no derivative.

    Raises:
        ValueError: a value out of its range, or a parameter that does not fit its sphere.
        TypeError: ``sphere`` is not a :class:`~onsphere.geometry.Sphere`.

    Example:
        >>> import torch
        >>> from onsphere.geometry import Sphere, VectorAxes
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> rows = Sphere(VectorAxes(index=(0,)))
        >>> optimizer = SphereSGD([{"params": [weight], "sphere": rows}], lr=0.01, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.detach().norm(dim=1).round(decimals=5)    # the lengths they started with
        tensor([5., 1.])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
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
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
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
        if not settings["momentum"] >= 0:
            raise ValueError(f"momentum must be at least 0, got {settings['momentum']}")
        if settings["nesterov"] and (settings["momentum"] <= 0 or settings["dampening"] != 0):
            raise ValueError(
                "nesterov needs momentum > 0 and dampening = 0, got "
                f"momentum={settings['momentum']}, dampening={settings['dampening']}"
            )

    def _updates(
        self, params: list[Tensor], group: Group
    ) -> Sequence[tuple[Tensor | None, Tensor | None, PerVectorUpdate]]:
        return [self._update(param, group) for param in params]

    def _update(self, param: Tensor, group: Group) -> tuple[Tensor | None, None, PerVectorUpdate]:
        state, first, dtype = self.state[param], False, state_dtype(param, group)
        if group["momentum"] and state.get("momentum_buffer") is None:
            first = True
            state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)
        elif group["momentum"] and state["momentum_buffer"].dtype != dtype:
            mend(state, param, dtype)  # after model.to(dtype)
        update = sgd_update(
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            first=first,
        )
        return (state["momentum_buffer"] if group["momentum"] else None), None, update

    def _update_again(self, ready: Ready, group: Group) -> PerVectorUpdate | None:
        if (group["momentum"] != 0) != ("momentum_buffer" in self.state[ready.params[0]]):
            return None
        return sgd_update(
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            first=False,
        )

    def _fused_columns(self, group: Group) -> Sequence[str] | None:
        if not fused_as(group, all(moved_fused(p) for p in group["params"])):
            return None
        return ("momentum_buffer",) if group["momentum"] else ()

    def _step_in_space_again(self, ready: ReadyInSpace, group: Group) -> bool:
        return sgd_again(ready, group)

    def _step_in_space(self, params: list[Tensor], grads: list[Tensor], group: Group) -> None:
        if not params:
            return
        momentum = group["momentum"]
        buffers = [self.state[p].get("momentum_buffer") if momentum else None for p in params]
        moved = params
        if self._sharded:
            moved = [local(p) for p in params]
            buffers = [b if b is None else local(b) for b in buffers]
        made = [buffer for buffer in buffers if buffer is not None]
        # Nor does it take parameters some of which have no momentum yet.
        fused = (
            all(moved_fused(p) for p in moved)
            and len(made) in (0, len(params))
            and fusable(moved, grads, *([made] if made else []))
        )
        plain_sgd(
            moved,
            grads,
            buffers,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            # A rate in a tensor is waited for by all steps but this one.
            fused=(capturable(group) and not moved[0].is_cpu) or fused_as(group, fused),
        )
        if momentum:
            for param, buffer in zip(params, buffers, strict=True):
                assert buffer is not None
                held = beside(param, buffer) if self._sharded else buffer
                self.state[param]["momentum_buffer"] = held
