"""Training does not depend on the lengths that weights on spheres start with."""

import pytest
import torch
from torch import nn

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD
from optim.contract import MEMBERS, target, train
from optim.table import OPTIMIZERS, ROWS, make

SCALES = [2.0**k for k in (-6, -3, -1, 2, 6)]
pytestmark = pytest.mark.usefixtures("path")
# What moves in space by the base's own rate, and is brought back.
IN_SPACE = {name for name, member in MEMBERS.items() if member.mode in ("hard", "brake")}
SPHERES = {
    "rows": ROWS,
    "whole": Sphere(),
    "columns": Sphere(VectorAxes((1,))),
    "heads": Sphere(VectorAxes(pieces=((0, 2),))),
    "given radius": Sphere(VectorAxes((0,)), radius=3.0),
}


def directions(build, scale, steps=20):
    """Train from weights of some scale; return where they point after every step, and lengths.

    The lengths are those of rows, at the start and at the end.
    """
    generator = torch.Generator().manual_seed(0)
    start, goal = torch.randn(4, 6, generator=generator), target(generator, 4, 6)
    weight = nn.Parameter(scale * start)
    optimizer, seen = build(weight), []
    for group in optimizer.param_groups:
        group["eps"] = 1e-12  # of Adam: what is added to a gradient knows its size

    def see():
        seen.append(weight.detach().clone())

    train(MEMBERS["SphereSGD"], weight, optimizer, goal, steps, see)
    seen = [w.double() for w in seen]
    lengths = (scale * start).norm(dim=1), weight.detach().norm(dim=1)
    return torch.stack([w / w.norm(dim=1, keepdim=True) for w in seen]), lengths


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in IN_SPACE])
def test_the_same_directions_at_every_scale(name):
    def build(weight):
        return MEMBERS[name].build([weight], ROWS)

    expected, _ = directions(build, 1.0)
    for scale in SCALES:
        found, (before, after) = directions(build, scale)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # Adam's eps
        torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sphere", SPHERES)
@pytest.mark.parametrize("retraction", ["projection", "exponential"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_directions_on_every_sphere(name, retraction, sphere):
    def build(weight):
        group = {"params": [weight], "sphere": SPHERES[sphere]}
        return make(name, [group], "relative", lr=0.02, retraction=retraction)

    ends = [directions(build, scale, steps=8)[0] for scale in (1.0, 2.0**-6, 2.0**6)]
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*sorted(IN_SPACE - {"hard LBFGS", "hard Adafactor"}), "rate"])
def test_a_rate_in_space_depends_on_the_scale(name):
    """The comparison of this file is one that fails."""

    def build(weight):
        if name == "rate":
            return SphereSGD([{"params": [weight], "sphere": ROWS}], lr=0.1, lr_mode="rate")
        return MEMBERS[name].build([weight], ROWS)

    expected, found = (directions(build, scale)[0] for scale in (1.0, 2.0**6))
    assert (found - expected).abs().max() > 1e-2


@pytest.mark.parametrize("retraction", ["projection", "exponential"])
@pytest.mark.parametrize("kinds", [(SphereSGD, torch.optim.SGD), (SphereAdamW, torch.optim.AdamW)])
def test_at_the_length_of_torch_it_is_the_rate_of_the_base(kinds, retraction, generator):
    layer = nn.Linear(2000, 10, bias=False)
    start, grad = layer.weight.detach().clone(), torch.randn(10, 2000, generator=generator)
    moved = []
    for lr_mode in ("relative", "rate"):
        weight = nn.Parameter(start.clone())
        optimizer = kinds[0](
            [{"params": [weight], "sphere": ROWS}], lr=1e-4, lr_mode=lr_mode, retraction=retraction
        )
        weight.grad = grad.clone()
        optimizer.step()
        moved.append(weight.detach() - start)
    assert (moved[0] - moved[1]).norm() < 0.03 * moved[1].norm()


@pytest.mark.parametrize("build", [SphereSGD, SphereAdamW])
def test_a_network_with_batchnorm_trains_alike_from_every_scale(build):
    losses = []
    for scale in (1.0, 2.0**-4, 2.0**6):  # smaller ones come near BatchNorm's eps
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(256, 20, generator=generator)
        y = (x @ torch.randn(20, 4, generator=generator)).argmax(1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(
                *(nn.Linear(20, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()),
                *(nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)),
            )
        with torch.no_grad():
            for k in (0, 3):
                net[k].weight.mul_(scale)
        groups = [
            {"params": [net[0].weight, net[3].weight], "sphere": ROWS},
            {"params": [p for k in (1, 4, 6) for p in net[k].parameters()]},
        ]
        optimizer = build(groups, lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.1)
