r"""Five sums per vector that say what a step did, from one pass over weight, update and gradient.

For a vector :math:`w` that a step with gradient :math:`g` moves by :math:`d` these are

.. math:: |w|^2,\quad \langle w, d\rangle,\quad |d|^2,\quad |g|^2,\quad \langle w, g\rangle.

Sums over parts of a vector add up, so the parts of a joint sphere and the shards of processes need
nothing but an addition. The update is small beside the weight, and its own sums keep its digits:
an angle of :math:`10^{-6}` comes out right in float32, where the weights' cosine would be 1.
Of an update along the weight, rounding leaves an angle of :math:`10^{-3}|d|/|w|` at most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes
from onsphere.monitor.layers import Layer
from onsphere.optim.distributed import placement


@dataclass(frozen=True, eq=False)
class Before:
    """What is kept of a layer before a step.

    Args:
        weights: copies of what this process holds of its parts.
        slope: this process's part of the sums of the gradient, shape ``(2, vectors)``; ``None``
            where there is no gradient yet, as before a closure is called.
    """

    weights: list[Tensor]
    slope: Tensor | None


def copies_of(layers: Sequence[Layer], *, early: bool = True) -> list[Before]:
    """Return copies of what this process holds of every watched weight, and read its gradient.

    Some steps overwrite the gradient (SGD's with Nesterov momentum and ``foreach``), so it is read
    before them.

    Args:
        layers: what is watched.
        early: whether the gradients that are there now are those of the step.
    """
    return [
        Before(
            [placement.local(p).clone() for p in layer.params],
            _slope(layer, [placement.local(p) for p in layer.params])
            if early and all(p.grad is not None for p in layer.params)
            else None,
        )
        for layer in layers
    ]


def sums_of(layers: Sequence[Layer], before: Sequence[Before]) -> list[Tensor]:
    """Return the sums of every vector, the same in all processes; no device is waited for.

    Args:
        layers: what is watched; their weights as the step left them.
        before: what :func:`copies_of` gave before the step; used as working space.

    Returns:
        Per layer shape ``(5, vectors)``, in at least float32.
    """
    found, jobs = [], []
    for number, (layer, held) in enumerate(zip(layers, before, strict=True)):
        slope = _slope(layer, held.weights) if held.slope is None else held.slope
        found.append(torch.cat([_moved(layer, held.weights), slope]))
        if placement.any_in(layer.params):
            where = placement.placement_of(layer.params, layer.sphere)
            jobs.append((number, (where, where.cut, found[-1])))
    if jobs:
        for (number, _), whole in zip(
            jobs, placement.add_up([job for _, job in jobs]), strict=True
        ):
            found[number] = whole
    return found


def update_sums(before: Tensor, after: Tensor, axes: VectorAxes) -> Tensor:
    """Return the first three sums, of one step of one tensor.

    Args:
        before: the weight before the step; overwritten where it need not be converted.
        after: the weight after it.
        axes: which entries form one vector.

    Returns:
        Shape ``(3, vectors)``, in at least float32.

    Example:
        >>> before, after = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])
        >>> update_sums(before, after, VectorAxes()).flatten()
        tensor([25.,  4.,  1.])
    """
    dtype = torch.promote_types(before.dtype, torch.float32)
    old = before.to(dtype)
    update = after.detach().to(dtype, copy=True).sub_(old)
    squares = _square(old, axes), _square(update, axes)
    return torch.stack([squares[0], _total(update.mul_(old), axes), squares[1]])


def gradient_sums(weight: Tensor, grad: Tensor | None, axes: VectorAxes) -> Tensor:
    """Return the last two sums, of the gradient at one tensor.

    Args:
        weight: before the step.
        grad: the gradient of the step; none counts as zero.
        axes: which entries form one vector.

    Returns:
        Shape ``(2, vectors)``, in at least float32.

    Example:
        >>> weight, grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, -2.0])
        >>> gradient_sums(weight, grad, VectorAxes()).flatten()
        tensor([ 4., -8.])
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if grad is None:
        return torch.zeros(2, axes.count(weight.shape), dtype=dtype, device=weight.device)
    slope = (grad.to_dense() if grad.is_sparse else grad).detach().to(dtype)
    return torch.stack([_square(slope, axes), _total(weight.detach().to(dtype) * slope, axes)])


def _moved(layer: Layer, held: Sequence[Tensor]) -> Tensor:
    """Return what this process adds to the sums of the update; uses up the copies."""
    now = [placement.local(p) for p in layer.params]
    return _added(layer, 3, lambda part, axes: update_sums(held[part], now[part], axes))


def _slope(layer: Layer, held: Sequence[Tensor]) -> Tensor:
    """Return what this process adds to the sums of the gradient."""
    grads = [placement.local_gradient(p) for p in layer.params]
    return _added(layer, 2, lambda part, axes: gradient_sums(held[part], grads[part], axes))


def _added(layer: Layer, rows: int, measure: Callable[[int, VectorAxes], Tensor]) -> Tensor:
    """Add what is measured of the parts of a layer, as far as this process holds them."""
    if not placement.any_in(layer.params):
        parts = [measure(part, layer.sphere.axes) for part in range(len(layer.params))]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    first = placement.local(layer.params[0])
    dtype = torch.promote_types(first.dtype, torch.float32)
    whole = torch.zeros(rows, layer.vectors, dtype=dtype, device=first.device)
    shards = placement.placement_of(layer.params, layer.sphere).shards(layer.sphere, first.device)
    for part, shard in enumerate(shards):
        if shard is not None and shard.is_primary:
            whole.index_add_(1, shard.owner, measure(part, shard.sphere.axes))
    return whole


def _square(x: Tensor, axes: VectorAxes) -> Tensor:
    view, inside = axes.split(x)
    if not inside:
        return view.square().flatten()
    return torch.linalg.vector_norm(view, dim=inside).square().flatten()


def _total(x: Tensor, axes: VectorAxes) -> Tensor:
    view, inside = axes.split(x)
    return (view.sum(inside) if inside else view).flatten()
