"""The laws of growth against torch.optim.SGD, in float64, on losses that ignore the scale."""

import pytest
import torch

from onsphere.dynamics import free_growth, momentum_growth, sgd_growth


def run(lr, steps, generator, *, scales=(1.0, 1.0, 1.0), **settings):
    """Train rows on a loss of their directions: squares of weights, gradients and buffers."""
    w = torch.randn(3, 10, generator=generator, dtype=torch.float64).requires_grad_()
    w.data *= torch.tensor(scales).unsqueeze(1)
    optimizer = torch.optim.SGD([w], lr=1.0, **settings)
    norms, grads, buffers = [w.detach().square().sum(1)], [], []
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = float(torch.as_tensor(lr).expand(steps)[t])
        target = torch.randn(3, 10, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (w / w.norm(dim=1, keepdim=True) * target).sum(1).exp().sum().backward()
        grads.append(w.grad.square().sum(1))
        optimizer.step()
        buffers.append(optimizer.state[w].get("momentum_buffer"))
        norms.append(w.detach().square().sum(1))
    buffers = [b.square().sum(1) for b in buffers if b is not None] or grads
    return torch.stack(norms), torch.stack(grads), buffers


SCHEDULE = torch.linspace(0.3, 0.01, 200, dtype=torch.float64)


def same(a, b):
    return bool(((a / b) - 1).abs().max() < 1e-12)


@pytest.mark.parametrize("lr", [0.1, SCHEDULE], ids=["constant", "schedule"])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_sgd_growth_is_exact(lr, decay, generator):
    norms, grads, _ = run(lr, 200, generator, weight_decay=decay)
    assert same(sgd_growth(norms[0], grads, lr, decay), norms)
    assert not same(sgd_growth(norms[0], grads * 1.001, lr, decay), norms)
    assert not same(sgd_growth(norms[0], grads, lr, decay + 1e-3), norms)


def buffer_norms(lr, decay, momentum, generator):
    """As :func:`run`, with the buffers' squares taken before the next step overwrites them."""
    w = torch.randn(3, 10, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=momentum, weight_decay=decay)
    rates, norms, squares = torch.as_tensor(lr).expand(200), [w.detach().square().sum(1)], []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = float(rate)
        target = torch.randn(3, 10, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (w / w.norm(dim=1, keepdim=True) * target).sum(1).exp().sum().backward()
        optimizer.step()
        squares.append(optimizer.state[w]["momentum_buffer"].square().sum(1))
        norms.append(w.detach().square().sum(1))
    return torch.stack(norms), torch.stack(squares)
