r"""Random walks of scale-invariant weights under real optimizers: where the laws are tested.

The laws of equilibrium speak of gradients that are orthogonal to the weight, of size
:math:`\sqrt L/|w|`, and independent from step to step. Here they are exactly that, and everything
else is what a training runs: an optimizer of PyTorch, in float64, on many weights at once.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from onsphere.dynamics.recorder import NormRecorder
from onsphere.geometry import VectorAxes

MakeOptimizer = Callable[[list[Tensor]], Optimizer]


class SGDW(Optimizer):
    r"""SGD with momentum and decoupled decay: :math:`w' = (1-\eta\lambda) w - \eta v`.

    Args:
        params: what to move.
        lr: :math:`\eta`.
        momentum: :math:`\alpha` of :math:`v' = \alpha v + g`.
        weight_decay: :math:`\lambda`.

    Example:
        >>> weight = torch.ones(1)
        >>> weight.grad = torch.ones(1)
        >>> SGDW([weight], lr=0.5, weight_decay=0.5).step()
        >>> weight
        tensor([0.2500])

    Source: Loshchilov & Hutter, 2017 (arXiv 1711.05101), algorithm 1.
    """

    def __init__(
        self, params: ParamsT, lr: float, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # noqa: ARG002
        """Move every weight that has a gradient; no closure is called."""
        for group in self.param_groups:
            for w in _with_gradient(group["params"]):
                buffer = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                buffer.mul_(group["momentum"]).add_(w.grad)
                w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * buffer)


class Lion(Optimizer):
    r"""Lion: :math:`w' = (1-\eta\lambda) w - \eta\,\mathrm{sign}(\beta_1 m + (1-\beta_1) g)`.

    Then :math:`m' = \beta_2 m + (1-\beta_2) g`.

    Args:
        params: what to move.
        lr: :math:`\eta`.
        betas: :math:`\beta_1, \beta_2`.
        weight_decay: :math:`\lambda`.

    Example:
        >>> weight = torch.ones(1)
        >>> weight.grad = torch.ones(1)
        >>> Lion([weight], lr=0.5, weight_decay=1.0).step()
        >>> weight
        tensor([0.])

    Source: Chen et al., 2023 (arXiv 2302.06675), algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # noqa: ARG002
        """Move every weight that has a gradient; no closure is called."""
        for group in self.param_groups:
            blend, keep = group["betas"]
            for w in _with_gradient(group["params"]):
                average = self.state[w].setdefault("exp_avg", torch.zeros_like(w))
                update = average.lerp(w.grad, 1 - blend).sign_()
                w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                average.lerp_(w.grad, 1 - keep)


def _with_gradient(weights: Iterable[Tensor]) -> Iterator[Tensor]:
    return (w for w in weights if w.grad is not None)


def random_walk(
    make_optimizer: MakeOptimizer,
    *,
    steps: int,
    shape: tuple[int, ...] = (256,),
    vectors: int = 64,
    initial_norm: float = 1.0,
    unit_gradient_square: float = 1.0,
    lrs: Float[Tensor, "steps"] | None = None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    r"""Let an optimizer follow random gradients that know nothing but the weight's direction.

    Every gradient is Gaussian noise, projected to be orthogonal to the weight, with
    :math:`\mathrm{E}|g|^2 = L/|w|^2`.

    Args:
        make_optimizer: makes the optimizer for a list of weights.
        steps: how many.
        shape: of one weight. Weights with one axis are rows of a single tensor, which is the same
            for optimizers that treat entries alike; matrices are tensors of their own.
        vectors: how many independent weights.
        initial_norm: their length at the start.
        unit_gradient_square: :math:`L`.
        lrs: learning rates, one per step, in place of the optimizer's own.
        generator: source of the noise.

    Returns:
        The series of :class:`NormRecorder` with shape ``(steps, vectors)``, and ``step``.

    Example:
        >>> walk = random_walk(
        ...     lambda weights: torch.optim.SGD(weights, lr=0.1),
        ...     steps=3, vectors=2, generator=torch.Generator().manual_seed(0))
        >>> walk["rotation"].shape, round(float(walk["norm"][0, 0]), 9)
        (torch.Size([3, 2]), 1.0)
        >>> bool((walk["norm"].diff(dim=0) > 0).all())
        True
    """
    weights, axes = _start(shape, vectors, initial_norm, generator)
    optimizer = make_optimizer(weights)
    named = {str(i): (weight, axes) for i, weight in enumerate(weights)}
    with NormRecorder(optimizer, named, per_vector=True) as recorder:
        for step in range(steps):
            if lrs is not None:
                for group in optimizer.param_groups:
                    group["lr"] = float(lrs[step])
            for weight in weights:
                noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weight.grad = _tangent(weight, noise, axes).mul_(math.sqrt(unit_gradient_square))
            optimizer.step()
    series = [recorder.series(name) for name in recorder.names]
    walk = {key: torch.cat([s[key] for s in series], 1) for key in series[0] if key != "step"}
    return {"step": series[0]["step"], **walk}


def _start(
    shape: tuple[int, ...], vectors: int, norm: float, generator: torch.Generator
) -> tuple[list[Tensor], VectorAxes]:
    full = torch.randn(vectors, *shape, generator=generator, dtype=torch.float64)
    rows = full.flatten(1)
    full = (rows * (norm / rows.norm(dim=1, keepdim=True))).reshape(full.shape)
    if len(shape) == 1:
        return [full], VectorAxes((0,))
    return [matrix.clone() for matrix in full], VectorAxes()


def _tangent(weight: Tensor, noise: Tensor, axes: VectorAxes) -> Tensor:
    """Project noise to the tangent space, with mean square 1 / |w|^2."""
    view, inside = axes.split(weight)
    loose, _ = axes.split(noise)
    square = view.square().sum(inside, keepdim=True)
    along = (view * loose).sum(inside, keepdim=True) / square
    coordinates = math.prod(view.shape[i] for i in inside)
    tangent = (loose - along * view) / (square.sqrt() * math.sqrt(coordinates - 1))
    return tangent.reshape(weight.shape)
