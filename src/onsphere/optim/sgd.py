r"""Stochastic gradient descent, with momentum, on a product of spheres.

One step for a vector of radius :math:`r` and direction :math:`p`, with :math:`P` the projection to
the tangent space at :math:`p`:

.. math:: m \leftarrow P(\alpha m + (1-\tau) g),\qquad
          u = m \;\text{ or }\; P(g + \alpha m)\ \text{(Nesterov)},\qquad
          p \leftarrow \operatorname{move}_p(-\eta u / r),

and :math:`m` goes along to the new point, so that it is tangent from the first step on and at the
end of every step. ``lr`` keeps the meaning it has in SGD: the step in space is :math:`-\eta u`,
from the sphere of radius :math:`r`, and the rotation is :math:`\arctan(\eta |u| / r)`.

Source: Cho & Lee, *Riemannian approach to batch normalization*, 2017 (arXiv 1709.09603), for the
exponential map; Absil, Mahony & Sepulchre, *Optimization Algorithms on Matrix Manifolds*, 2008,
section 4.1, for retractions.
"""

from typing import get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd as plain_sgd

from onsphere.optim.motion import Axes, Step, lengths, move, tangent
from onsphere.optim.optimizer import Group, SphereOptimizer


def sgd_update(
    unit: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    inside: Axes,
    *,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> tuple[Tensor, Tensor | None]:
    r"""Return the tangent update :math:`u` of SGD and its new momentum buffer.

    Args:
        unit: unit vectors, running along the axes ``inside``.
        grad: the gradient, in the same layout.
        momentum_buffer: the buffer of the last step; ``None`` at the first, where the gradient
            enters without dampening, as in ``torch.optim.SGD``.
        inside: the axes along which one vector runs.
        momentum: :math:`\alpha`; 0 keeps no buffer.
        dampening: :math:`\tau`.
        nesterov: look ahead by one step of momentum.

    Returns:
        The update and the buffer (``None`` without momentum), both tangent at ``unit``.

    Example:
        >>> import torch
        >>> p, g = torch.tensor([1.0, 0.0]), torch.tensor([7.0, 2.0])
        >>> update, buffer = sgd_update(
        ...     p, g, torch.tensor([0.0, 1.0]), (0,), momentum=0.5, dampening=0.0, nesterov=False)
        >>> update
        tensor([0.0000, 2.5000])
    """
    if momentum == 0:
        return tangent(unit, grad, inside), None
    if momentum_buffer is None:
        buffer = tangent(unit, grad, inside)
    else:
        buffer = tangent(unit, momentum * momentum_buffer + (1 - dampening) * grad, inside)
    return (tangent(unit, grad + momentum * buffer, inside) if nesterov else buffer), buffer


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
        step: ``"retraction"`` (step, then project back; no trigonometry) or ``"exponential"``
            (along the geodesic, momentum transported in parallel).
        maximize: ascend instead of descending.

    Raises:
        ValueError: a value out of its range, or a parameter that does not fit its sphere.
        TypeError: ``sphere`` is not a :class:`~onsphere.geometry.Sphere`.

    Example:
        >>> import torch
        >>> from onsphere.geometry import Sphere, VectorAxes
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> rows = Sphere(VectorAxes(index=(0,)))
        >>> optimizer = SphereSGD([{"params": [weight], "sphere": rows}], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.detach().norm(dim=1)                 # the lengths they started with
        tensor([5.0000, 1.0000])
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
        step: Step = "retraction",
        maximize: bool = False,
    ) -> None:
        defaults: Group = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "step": step,
            "maximize": maximize,
        }
        _check_settings(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group, checking its settings as the constructor does."""
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _step_on_sphere(self, param: Tensor, grad: Tensor, group: Group) -> Tensor:
        sphere, state = group["sphere"], self.state[param]
        view, inside = sphere.axes.split(param)
        slope, _ = sphere.axes.split(-grad if group["maximize"] else grad)
        buffer = state.get("momentum_buffer")
        remembered = None if buffer is None else sphere.axes.split(buffer)[0]

        norms = sphere.axes.norms(param)  # in at least float32, and with it all that follows
        radius = self._radius(param, norms, sphere)
        unit = view / norms
        update, carried = sgd_update(
            unit,
            slope.to(norms.dtype),
            None if remembered is None else remembered.to(norms.dtype),
            inside,
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
        )
        velocity = update * (-group["lr"] / radius)
        there, carried = move(unit, velocity, carried, inside, group["step"])
        # A vector without a direction, and NaN or inf in a gradient, all end in the velocity.
        sound = lengths(velocity, inside).isfinite() & norms.isfinite()
        view.copy_(torch.where(sound, radius * there, view))
        if carried is not None:
            if buffer is None:
                buffer = state["momentum_buffer"] = torch.zeros_like(param)
                remembered, _ = sphere.axes.split(buffer)
            assert remembered is not None
            remembered.copy_(torch.where(sound, carried, remembered))
        return sound

    def _step_in_space(self, params: list[Tensor], grads: list[Tensor], group: Group) -> None:
        momentum = group["momentum"]
        buffers = [self.state[p].get("momentum_buffer") if momentum else None for p in params]
        plain_sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if momentum:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer


def _check_settings(settings: Group) -> None:
    lr = settings["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is one number, got a tensor of shape {tuple(lr.shape)}")
    for name in ("lr", "momentum", "weight_decay"):
        if not settings[name] >= 0:
            raise ValueError(f"{name} must be at least 0, got {settings[name]}")
    if settings["nesterov"] and (settings["momentum"] <= 0 or settings["dampening"] != 0):
        raise ValueError(
            "nesterov needs momentum > 0 and dampening = 0, got "
            f"momentum={settings['momentum']}, dampening={settings['dampening']}"
        )
    if settings["step"] not in get_args(Step):
        raise ValueError(f'step must be "retraction" or "exponential", got {settings["step"]!r}')
