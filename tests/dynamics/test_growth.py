"""The laws of growth against torch.optim.SGD, in float64, on losses that ignore the scale."""

import pytest
import torch

from onsphere.dynamics import free_growth, momentum_growth, sgd_growth
from onsphere.dynamics.growth import MomentumState, momentum_step

SCHEDULE = torch.linspace(0.3, 0.01, 200, dtype=torch.float64)
RATES = {"constant": torch.full((200,), 0.1, dtype=torch.float64), "schedule": SCHEDULE}


def run(rates, generator, **settings):
    """Train 3 vectors on losses of their directions; squared norms of weight, gradient, buffer."""
    w = torch.randn(3, 10, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=1.0, **settings)
    norms, grads, buffers = [w.detach().square().sum(1)], [], []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = float(rate)
        target = torch.randn(3, 10, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (w / w.norm(dim=1, keepdim=True) * target).sum(1).exp().sum().backward()
        optimizer.step()
        grads.append(w.grad.square().sum(1))
        buffers.append(optimizer.state[w].get("momentum_buffer", w.grad).square().sum(1))
        norms.append(w.detach().square().sum(1))
    return torch.stack(norms), torch.stack(grads), torch.stack(buffers)


def same(a, b):
    return bool(((a / b) - 1).abs().max() < 1e-12)


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_sgd_growth_is_exact(rates, decay, generator):
    norms, grads, _ = run(rates, generator, weight_decay=decay)
    assert same(sgd_growth(norms[0], grads, rates, decay), norms)
    assert not same(sgd_growth(norms[0], grads * 1.001, rates, decay), norms)
    assert not same(sgd_growth(norms[0], grads, rates, decay + 1e-3), norms)


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_growth_is_exact(rates, decay, momentum, generator):
    norms, _, buffers = run(rates, generator, weight_decay=decay, momentum=momentum)
    assert same(momentum_growth(norms[0], buffers, rates, momentum, decay), norms)
    assert not same(momentum_growth(norms[0], buffers, rates, momentum - 0.01, decay), norms)
    assert not same(momentum_growth(norms[0], buffers, rates, momentum, decay + 1e-3), norms)


def test_momentum_step_without_momentum_is_sgd(generator):
    norms, grads, buffers = run(SCHEDULE, generator, weight_decay=0.05)
    # Without momentum the buffer is the gradient with the decay in it.
    buffers = grads + 0.05**2 * norms[:-1]
    state = MomentumState(norms[0])
    for square, rate in zip(buffers, SCHEDULE, strict=True):
        state = momentum_step(state, square, rate, 0.0, 0.05)
    assert same(state.square, norms[-1])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("changing", [False, True], ids=["constant", "changing"])
def test_free_growth_is_the_mean_of_a_random_walk(momentum, changing, generator):
    steps, size, vectors = 4000, 64, 200
    noise = torch.linspace(0.5, 2.0, steps) if changing else torch.ones(steps)
    w = torch.randn(vectors, size, generator=generator)
    w /= w.norm(dim=1, keepdim=True)
    v, lr = torch.zeros_like(w), 0.02 * (1 - momentum)
    for scale in noise:
        g = torch.randn(vectors, size, generator=generator) * scale / size**0.5
        square = w.square().sum(1, keepdim=True)
        v = momentum * v + (g - (g * w).sum(1, keepdim=True) / square * w) / square.sqrt()
        w = w - lr * v
    tangent_share = 1 - 1 / size
    law = free_growth(1.0, noise**2 * tangent_share, lr, momentum)[-1]
    assert law.item() == pytest.approx(w.norm(dim=1).mean().item(), rel=0.01)
    assert law > 1.3  # the walk went far enough to tell


def test_free_growth_is_a_fourth_root():
    law = free_growth(0.0, torch.full((1600, 2), 3.0, dtype=torch.float64), 0.1, 0.9)
    assert law.shape == (1601, 2)
    assert same(law[1600] / law[100], torch.full((2,), 2.0, dtype=torch.float64))


def test_a_schedule_of_another_length_is_refused():
    with pytest.raises(ValueError, match="one per step"):
        sgd_growth(1.0, torch.ones(3), torch.ones(4))
