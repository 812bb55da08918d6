"""The equilibrium of SGD against random walks, and the way there."""

import pytest
import torch

from onsphere.dynamics import relaxation, sgd_equilibrium

SIZE = 128


def walk(steps, generator, *, lr, weight_decay, momentum, start):
    """Random tangent gradients of unit size at the unit-norm point; norm and rotation per step."""
    w = torch.randn(64, SIZE, generator=generator)
    w *= start / w.norm(dim=1, keepdim=True)
    v, norms, angles = torch.zeros_like(w), [], []
    for _ in range(steps):
        g = torch.randn(64, SIZE, generator=generator) / (SIZE - 1) ** 0.5
        square = w.square().sum(1, keepdim=True)
        g = (g - (g * w).sum(1, keepdim=True) / square * w) / square.sqrt()
        v = momentum * v + g + weight_decay * w
        new = w - lr * v
        here, there = (x / x.norm(dim=1, keepdim=True) for x in (w, new))
        angles.append((here - there).square().sum(1).mean())
        w = new
        norms.append(w.norm(dim=1).pow(4).mean() ** 0.25)
    return torch.stack(norms), torch.stack(angles).sqrt()


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_a_random_walk_settles_there(momentum, generator):
    setting = {"lr": 0.1 * (1 - momentum), "weight_decay": 0.05, "momentum": momentum}
    law = sgd_equilibrium(**setting, unit_gradient_square=1.0)
    norms, angles = walk(2000, generator, **setting, start=law.norm)
    assert norms[500:].mean().item() == pytest.approx(law.norm, rel=0.01)
    assert angles[500:].square().mean().sqrt().item() == pytest.approx(law.rotation, rel=0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("away", [0.5, 2.0])
def test_the_norm_relaxes_at_the_rate(momentum, away, generator):
    setting = {"lr": 0.1 * (1 - momentum), "weight_decay": 0.01, "momentum": momentum}
    law = sgd_equilibrium(**setting, unit_gradient_square=1.0)
    norms, _ = walk(1000, generator, **setting, start=away * law.norm)
    times = torch.arange(1.0, 1001.0)
    predicted = relaxation(away * law.norm, law, times)
    slower = relaxation(away * law.norm, law._replace(rate=law.rate / 2), times)
    # The buffer starts empty, so the first steps with momentum fall behind the law.
    off, off_if_slower = ((norms / law - 1)[200:].abs().max() for law in (predicted, slower))
    assert off < 0.02
    assert off_if_slower > 0.1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"momentum": 1.0}, "momentum must be in"),
        ({"lr": 0.0}, "there is no equilibrium"),
        ({"weight_decay": 0.0}, "there is no equilibrium"),
        ({"unit_gradient_square": 0.0}, "there is no equilibrium"),
        ({"lr": 10.0, "weight_decay": 1.0}, "must be below"),
    ],
)
def test_where_there_is_none(change, says):
    with pytest.raises(ValueError, match=says):
        sgd_equilibrium(**{"lr": 0.1, "weight_decay": 0.1, "unit_gradient_square": 1.0, **change})
