"""Checks that run in several processes: SyncBatchNorm is BatchNorm of the joined batch."""

import torch
import torch.distributed as dist

from onsphere.norms import ActivationNorm

SIZES = (3, 5)  # processes may hold batches of different sizes


def joined_batch(folder):
    """Outputs, gradients and running statistics of each part, those of the whole."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(sum(SIZES), 4, 2, 2, generator=generator, dtype=torch.float64) + 100
    seeds = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    rank = dist.get_rank()
    own = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    whole, part = ActivationNorm("bn", 4).double(), ActivationNorm("sbn", 4).double()
    all_x, own_x = x.clone().requires_grad_(), x[own].clone().requires_grad_()
    for _ in range(2):
        expected, found = whole(all_x), part(own_x)
    (expected * seeds).sum().backward()
    (found * seeds[own]).sum().backward()
    for a, b in ((found, expected[own]), (own_x.grad, all_x.grad[own])):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(part.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    dist.all_reduce(part.weight.grad)
    torch.testing.assert_close(part.weight.grad, whole.weight.grad, rtol=1e-9, atol=1e-9)
    evaluated = part.eval()(x[own])  # no communication: other processes may not be in here
    torch.testing.assert_close(evaluated, whole.eval()(x)[own])


CHECKS = {"joined batch": joined_batch}
