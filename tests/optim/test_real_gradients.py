"""Gradients as training makes them: inputs that are always zero, tokens that do not occur."""

import warnings

import pytest
import torch
from torch import nn

from onsphere import geometry
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD, on_sphere

ROWS = Sphere(VectorAxes((0,)))
pytestmark = pytest.mark.usefixtures("path")


def turned(before, after):
    """Radians by which each row turned."""
    norms = before.double().norm(dim=1)
    unit = after.double() * (norms / after.double().norm(dim=1))[:, None]
    return geometry.distance(before.double(), unit) / norms


def classifier(generator, dtype=torch.float32):
    """Data of which 40 of 200 inputs are zero in every example, and a network with BatchNorm."""
    x = torch.rand(256, 200, generator=generator)
    x[:, ::5] = 0
    y = (x @ torch.randn(200, 5, generator=generator)).argmax(1)
    net = nn.Sequential(
        nn.Linear(200, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)
    )
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
        net[3].bias.zero_()
    return net.to(dtype), x.to(dtype), y


def groups_of(net):
    return [{"params": [net[0].weight], "sphere": ROWS}, {"params": list(net[1:].parameters())}]


def plain_adamw(net, **settings):
    base = torch.optim.AdamW(net.parameters(), weight_decay=0.0, **settings)
    return on_sphere(base, {net[0].weight: ROWS})


def sphere_adamw(net, **settings):
    return SphereAdamW(groups_of(net), weight_decay=0.0, lr_mode="rate", **settings)


def fit(build, steps, lr, generator, dtype=torch.float32):
    """Train; return weights on the sphere after every step, and the losses."""
    net, x, y = classifier(generator, dtype)
    optimizer, weights, losses = build(net, lr=lr), [net[0].weight.detach().clone()], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        weights.append(net[0].weight.detach().clone())
    return weights, losses


def both(steps, lr, dtype=torch.float32):
    """The same training by SphereAdamW and by AdamW that is scaled back."""
    return [
        fit(build, steps, lr, torch.Generator().manual_seed(0), dtype)
        for build in (sphere_adamw, plain_adamw)
    ]


def test_an_input_that_is_always_zero_does_not_throw_the_vector():
    ours, theirs = (weights for weights, _ in both(5, 1e-3))
    for k in range(5):
        mine, base = turned(ours[k], ours[k + 1]), turned(theirs[k], theirs[k + 1])
        assert mine.max() < 0.1
        torch.testing.assert_close(mine, base, rtol=0.05, atol=0)  # of second order


def test_one_adam():
    """AdamW scaled back has another rate, by the radial part of its update: of second order."""
    gaps = []
    for lr in (1e-3, 1e-4):
        ours, theirs = (weights[-1] for weights, _ in both(3, lr, torch.float64))
        gaps.append((ours - theirs).abs().max().item())
    assert gaps[0] < 1e-4
    assert 50 < gaps[0] / gaps[1] < 200


def test_one_adam_exactly():
    """With that rate the two take the same steps, and keep the same moments."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 40, generator=generator, dtype=torch.float64)
    a, b = (nn.Parameter(start.clone()) for _ in range(2))
    ours = SphereAdamW([{"params": [a], "sphere": ROWS}], weight_decay=0.0, lr_mode="rate")
    theirs = on_sphere(torch.optim.AdamW([b], lr=0.01, weight_decay=0.0), {b: ROWS})
    for grad in torch.randn(5, 1, 40, generator=generator, dtype=torch.float64):
        grad[:, ::3] = 0
        before = b.detach().clone()
        a.grad, b.grad = grad, grad.clone()
        theirs.step()
        moments = theirs.state[b]
        k = int(moments["step"])
        root = (moments["exp_avg_sq"] / (1 - 0.999**k)).sqrt() + 1e-8
        update = moments["exp_avg"] / (1 - 0.9**k) / root
        radial = (update * before).sum() / before.square().sum()
        ours.param_groups[0]["lr"] = 0.01 / (1 - 0.01 * float(radial))
        ours.step()
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-13)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours.state[a][key], theirs.state[b][key], rtol=0, atol=1e-15)


def test_trains_as_well_as_its_base():
    """Best of three rates: within what the seeds make of it."""
    best = [
        min(
            fit(build, 60, lr, torch.Generator().manual_seed(0))[1][-1] for lr in (1e-3, 3e-3, 1e-2)
        )
        for build in (sphere_adamw, plain_adamw)
    ]
    assert best[0] < 1.05 * best[1] + 1e-3


# name -> settings, with and without rotation
RESTING = {
    "SGD": (SphereSGD, {"momentum": 0.9}),
    "SGD Nesterov": (SphereSGD, {"momentum": 0.9, "nesterov": True}),
    "AdamW": (SphereAdamW, {"betas": (0.9, 0.95), "weight_decay": 0.0}),
    "AdamW, no eps": (SphereAdamW, {"betas": (0.9, 0.95), "eps": 0.0, "weight_decay": 0.0}),
    "AdamW, moment per vector": (
        SphereAdamW,
        {"betas": (0.9, 0.95), "second_moment": "vector", "eps": 0.0, "weight_decay": 0.0},
    ),
}
MODES = {
    "rate": {"lr_mode": "rate"},
    "relative": {},
    "rotation": {"lr_mode": "angle"},
    "rotation, exponential": {"lr_mode": "angle", "step": "exponential"},
}


@pytest.mark.filterwarnings("ignore:weights in torch.bfloat16 that turn:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RESTING)
def test_rows_at_rest(name, mode, dtype, generator):
    """Rows with one gradient and then none: they turn less and less, and stay finite for ever."""
    kind, settings = RESTING[name]
    size = 0.1 if mode == "relative" else 1.0  # about as long as torch.nn makes them
    start = (size * torch.randn(4, 32, generator=generator)).to(dtype)
    w = nn.Parameter(start.clone())
    lr = 1e-3
    optimizer = kind([{"params": [w], "sphere": ROWS}], lr=lr, **settings, **MODES[mode])
    grads = (size * torch.randn(1200, 32, generator=generator)).to(dtype)
    w.grad = (size * torch.randn(4, 32, generator=generator)).to(dtype)
    optimizer.step()
    seen = []
    for grad in grads:
        w.grad = torch.zeros_like(w)
        w.grad[0] = grad
        before = w.detach().clone()
        optimizer.step()
        seen.append(turned(before, w.detach()))
    angles = torch.stack(seen)
    assert w.isfinite().all()
    assert optimizer.skipped == 0
    rounding = max(1e-6, 4 * torch.finfo(dtype).eps)
    assert (w.double().norm(dim=1) / start.double().norm(dim=1) - 1).abs().max() < rounding
    if dtype is not torch.bfloat16:
        assert angles[-1, 1:].max() < 1e-7
        assert angles[-1, 0] > 1e-4
        # No further than steady momentum could have carried it.
        assert angles[:, 1:].sum(0).max() < (10 if "rotation" in mode else 100) * lr


@pytest.mark.parametrize("size", [1e-17, 1e-20, 1e-24, 1e-30, 1e-42])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_too_small_for_a_direction(size, mode, generator):
    w = nn.Parameter(torch.randn(5, 37, generator=generator))
    length = w.detach().norm(dim=1)
    optimizer = SphereSGD([{"params": [w], "sphere": ROWS}], lr=1e-3, momentum=0.9, **MODES[mode])
    for _ in range(6):
        w.grad = torch.randn(5, 37, generator=generator) * size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert (w.detach().norm(dim=1) / length - 1).abs().max() < 1e-6
    # A gradient whose square underflows is none.
    assert optimizer.skipped == (30 if "rotation" in mode and size > 1e-22 else 0)


def test_a_gradient_that_is_almost_radial_turns_no_vector_off_its_sphere(generator):
    start = torch.randn(40, 64, generator=generator)
    for share, refused in ((0.3, 0), (1e-2, 40), (3e-3, 40), (1e-5, 0)):
        w = nn.Parameter(start.clone())
        optimizer = SphereSGD([{"params": [w], "sphere": ROWS}], lr=0.3, lr_mode="angle")
        w.grad = start + share * torch.randn(40, 64, generator=generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert (w.detach().norm(dim=1) / start.norm(dim=1) - 1).abs().max() < 1e-6
        assert optimizer.skipped == refused  # the last is radial to rounding, and asks for nothing


EXTREMES = 20_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RESTING)
def test_extremes_of_scale(name, mode, dtype, generator):
    """Weights from 1e-15 to 1e15, gradients from 0 to 1e30, of other sizes in every step."""
    kind, settings = RESTING[name]

    def scales(low, high):
        draw = torch.rand(EXTREMES, 1, generator=generator, dtype=torch.float64)
        return 10 ** (low + (high - low) * draw)

    start = torch.randn(EXTREMES, 8, generator=generator) * scales(-15, 15)
    start = start.to(dtype)
    w = nn.Parameter(start.clone())
    optimizer = kind([{"params": [w], "sphere": ROWS}], lr=0.02, **settings, **MODES[mode])
    for _ in range(4):
        grad = torch.randn(EXTREMES, 8, generator=generator) * scales(-45, 30)
        grad[torch.rand(EXTREMES, generator=generator) < 0.1] = 0
        grad[:, 0] *= (torch.rand(EXTREMES, generator=generator) < 0.5).float()
        w.grad = grad.to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert w.isfinite().all()
    assert all(x.isfinite().all() for x in optimizer.state[w].values())
    drift = w.detach().double().norm(dim=1) / start.double().norm(dim=1) - 1
    assert drift.abs().max() < (1e-6 if dtype != torch.bfloat16 else 2**-7)
