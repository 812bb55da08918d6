r"""Five sums per vector that say what a step did, from one pass over weight, update and gradient.

For a vector :math:`w` that a step with gradient :math:`g` moves by :math:`d` these are

.. math:: |w|^2,\quad \langle w, d\rangle,\quad |d|^2,\quad |g|^2,\quad \langle w, g\rangle.

Sums over parts of a vector add up, so the parts of a joint sphere and the shards of processes need
nothing but an addition. The update is small beside the weight, and its own sums keep its digits:
an angle of :math:`10^{-6}` comes out right in float32, where the weights' cosine would be 1.
Of an update along the weight, rounding leaves an angle of :math:`10^{-3}|d|/|w|` at most.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes
from onsphere.monitor.watched import Layer
from onsphere.optim import home


def copies_of(layers: Sequence[Layer]) -> list[list[Tensor]]:
    """Return copies of what this process holds of every watched weight."""
    return [[home.local(p).clone() for p in layer.params] for layer in layers]


def sums_of(layers: Sequence[Layer], before: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the sums of every vector, the same in all processes; no device is waited for.

    Args:
        layers: what is watched; their weights as the step left them.
        before: what :func:`copies_of` gave before the step; used as working space.

    Returns:
        Per layer shape ``(5, vectors)``, in at least float32.
    """
    found, jobs = [], []
    for number, (layer, held) in enumerate(zip(layers, before, strict=True)):
        if not home.any_in(layer.params):
            parts = zip(held, layer.params, strict=True)
            axes = layer.sphere.axes
            found.append(_added([step_sums(old, new, new.grad, axes) for old, new in parts]))
            continue
        where = home.home_of(layer.params, layer.sphere)
        found.append(_spread(layer, held, where))
        jobs.append((number, (where, where.cut, found[-1])))
    if jobs:
        for (number, _), whole in zip(jobs, home.add_up([job for _, job in jobs]), strict=True):
            found[number] = whole
    return found


def step_sums(before: Tensor, after: Tensor, grad: Tensor | None, axes: VectorAxes) -> Tensor:
    """Return the sums of one step of one tensor.

    Args:
        before: the weight before the step; overwritten where it need not be converted.
        after: the weight after it.
        grad: the gradient of the step; none counts as zero.
        axes: which entries form one vector.

    Returns:
        Shape ``(5, vectors)``, in at least float32.

    Example:
        >>> before, after = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])
        >>> step_sums(before, after, torch.tensor([0.0, -2.0]), VectorAxes()).flatten()
        tensor([25.,  4.,  1.,  4., -8.])
    """
    dtype = torch.promote_types(before.dtype, torch.float32)
    old = before.to(dtype)
    update = after.detach().to(dtype, copy=True).sub_(old)
    squares = _square(old, axes), _square(update, axes)
    grown = _total(update.mul_(old), axes)
    if grad is None:
        steep = along = torch.zeros_like(grown)
    else:
        slope = (grad.to_dense() if grad.is_sparse else grad).detach().to(dtype)
        steep, along = _square(slope, axes), _total(old.mul_(slope), axes)
    return torch.stack([squares[0], grown, squares[1], steep, along])


def _spread(layer: Layer, held: Sequence[Tensor], where: home.Home) -> Tensor:
    """Return what this process adds to the sums of all vectors."""
    dtype = torch.promote_types(held[0].dtype, torch.float32)
    whole = torch.zeros(5, layer.vectors, dtype=dtype, device=held[0].device)
    pieces = where.pieces(layer.sphere, held[0].device)
    for old, param, piece in zip(held, layer.params, pieces, strict=True):
        grad = home.local_gradient(param)
        if piece is not None and piece.speaks:
            sums = step_sums(old, home.local(param), grad, piece.sphere.axes)
            whole.index_add_(1, piece.owner, sums)
    return whole


def _added(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _square(x: Tensor, axes: VectorAxes) -> Tensor:
    view, inside = axes.split(x)
    if not inside:
        return view.square().flatten()
    return torch.linalg.vector_norm(view, dim=inside).square().flatten()


def _total(x: Tensor, axes: VectorAxes) -> Tensor:
    view, inside = axes.split(x)
    return (view.sum(inside) if inside else view).flatten()
