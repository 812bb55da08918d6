"""Small weights, optimizers and runs that the tests of the monitor share."""

import torch

from onsphere.geometry import VectorAxes
from onsphere.monitor import Monitor

ROWS = VectorAxes((0,))


class Weights(torch.nn.Module):
    """Parameters under names, and nothing that uses them."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, torch.nn.Parameter(tensor))


def steps(optimizer, count, gradient):
    """Take steps with ``gradient(number, parameter)`` as the gradient of every parameter."""
    for number in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = gradient(number, p)
        optimizer.step()


def tangent_noise(generator, size=1.0):
    """Noise orthogonal to each row and, as scale invariance has it, as large as 1 / |row|."""

    def gradient(_, p):
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        unit = p.detach() / p.detach().norm(dim=1, keepdim=True)
        noise -= (noise * unit).sum(1, keepdim=True) * unit
        return size * noise / p.detach().norm(dim=1, keepdim=True) / p.shape[1] ** 0.5

    return gradient


def watched(make, gradient, count, *, rows=16, columns=64, weight=None, **options):
    """Watch one matrix of unit rows through some steps; returns its monitor, closed."""
    given = torch.Generator().manual_seed(7)
    if weight is None:
        weight = torch.nn.functional.normalize(torch.randn(rows, columns, generator=given))
    net = Weights(w=weight)
    optimizer = make(list(net.parameters()))
    with Monitor(net, optimizer, {"w": ROWS}, **{"every": 1, **options}) as monitor:
        steps(optimizer, count, gradient)
    return monitor
