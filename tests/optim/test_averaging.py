"""Averages on spheres against closed forms, and in the place of torch's own."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    update_bn,
)

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAveragedModel, SphereSGD
from onsphere.optim.averaging import project_mean

ROWS = VectorAxes(index=(0,))
STEPS = 7


class Weights(nn.Module):
    """Three tensors: on a sphere each, or the first two together."""

    def __init__(self, dtype=torch.float32, rows=4):
        super().__init__()
        self.one = nn.Parameter(torch.ones(rows, 6, dtype=dtype))
        self.two = nn.Parameter(torch.ones(rows, 3, dtype=dtype))
        self.free = nn.Parameter(torch.ones(5, dtype=dtype))
        self.register_buffer("seen", torch.zeros(2, dtype=dtype))


LAYOUTS = {
    "rows": lambda m: {m.one: Sphere(ROWS), m.two: Sphere(ROWS)},
    "a given radius": lambda m: {m.one: Sphere(ROWS, radius=3.0), m.two: Sphere(ROWS, radius=0.5)},
    "whole tensors": lambda m: {m.one: Sphere(), m.two: Sphere()},
    "columns": lambda m: {m.one: Sphere(VectorAxes((1,)))},
    "heads": lambda m: {m.one: Sphere(VectorAxes(pieces=((0, 2),)))},
    "centred": lambda m: {m.one: Sphere(ROWS, centered=True), m.two: Sphere(ROWS, centered=True)},
    "joint": lambda m: {(m.one, m.two): Sphere(ROWS, joint=True)},
    "groups": lambda m: [
        {"params": [m.one, m.two], "sphere": Sphere(ROWS)},
        {"params": [m.free]},
    ],
}
RULES = {
    "SWA": ({}, [1 / STEPS] * STEPS),
    "SWA, one by one": ({"avg_fn": get_swa_avg_fn()}, [1 / STEPS] * STEPS),
    "EMA": (
        {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
        [0.8 ** (STEPS - 1)] + [0.2 * 0.8 ** (STEPS - 1 - t) for t in range(1, STEPS)],
    ),
    "EMA, one by one": (
        {"avg_fn": get_ema_avg_fn(0.8)},
        [0.8 ** (STEPS - 1)] + [0.2 * 0.8 ** (STEPS - 1 - t) for t in range(1, STEPS)],
    ),
}


def vectors(tensors, sphere):
    """Vectors along the last axis in float64; those of a joint sphere as one."""
    return torch.cat([sphere.axes.gather(x.detach().double()) for x in tensors], -1)


def walk(model, spheres, generator, steps=STEPS):
    """Move all weights at random, those on spheres along them; yield after each step."""
    pairs = spheres.items() if isinstance(spheres, dict) else []
    tensors = {key if isinstance(key, tuple) else (key,): sphere for key, sphere in pairs}
    if not pairs:
        tensors = {(p,): g["sphere"] for g in spheres if "sphere" in g for p in g["params"]}
    radii = {}
    with torch.no_grad():
        for step in range(steps):
            for p in model.parameters():
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(p + noise.to(p.dtype))
            for params, sphere in tensors.items():
                points = vectors(params, sphere)
                if sphere.centered:
                    points = points - points.mean(-1, keepdim=True)
                norms = points.norm(dim=-1, keepdim=True)
                if step == 0:
                    radii[params] = norms if sphere.radius is None else sphere.radius
                points = points / norms * radii[params]
                sizes = [sphere.axes.gather(p).shape[-1] for p in params]
                for p, part in zip(params, points.split(sizes, -1), strict=True):
                    p.copy_(sphere.axes.scatter(part, p.shape))
            model.seen.fill_(step)
            yield [(params, sphere, radii[params]) for params, sphere in tensors.items()]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_average_is_the_projection_of_the_mean(layout, rule, generator):
    model = Weights(torch.float64)
    spheres = LAYOUTS[layout](model)
    settings, weights = RULES[rule]
    ours, plain = SphereAveragedModel(model, spheres, **settings), AveragedModel(model, **settings)
    sums, names = {}, {p: n for n, p in model.named_parameters()}
    for weight, moved in zip(weights, walk(model, spheres, generator), strict=True):
        ours.update_parameters(model)
        plain.update_parameters(model)
        for params, sphere, _ in moved:
            sums[params] = sums.get(params, 0) + weight * vectors(params, sphere)
    averaged = dict(ours.module.named_parameters())
    for params, sphere, radius in moved:
        got = vectors([averaged[names[p]] for p in params], sphere)
        wanted = sums[params] / sums[params].norm(dim=-1, keepdim=True) * radius
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        length = (sums[params].norm(dim=-1, keepdim=True) / radius).flatten()
        torch.testing.assert_close(ours.concentration[names[params[0]]], length)
        shrunk = vectors([dict(plain.module.named_parameters())[names[p]] for p in params], sphere)
        assert (shrunk.norm(dim=-1) < 0.99 * got.norm(dim=-1)).all()
    assert torch.equal(ours.module.free, plain.module.free)
    assert torch.equal(ours.module.seen, model.seen)


def test_projecting_at_every_step_would_be_another_average(generator):
    """The oracle above tells the mean's projection from a projection of projections."""
    points = nn.functional.normalize(torch.randn(STEPS, 6, generator=generator).double(), dim=1)
    running = points[0]
    for step, point in enumerate(points[1:], 1):
        running = nn.functional.normalize(running + (point - running) / (step + 1), dim=0)
    assert (running - nn.functional.normalize(points.sum(0), dim=0)).norm() > 0.01


def test_opposite_points_leave_the_average_where_it_was():
    model = Weights(rows=1)
    average = SphereAveragedModel(model, {model.one: Sphere(ROWS)})
    average.update_parameters(model)
    start = average.module.one.detach().clone()
    for sign in (-1, 1):  # the mean is zero, then a third of the start
        model.one.data.copy_(sign * start)
        average.update_parameters(model)
        torch.testing.assert_close(average.module.one.detach(), start)
        assert average.concentration["one"].item() == pytest.approx(0 if sign < 0 else 1 / 3)


def test_rounding_is_no_direction(generator):
    point = torch.nn.functional.normalize(torch.randn(1, 1000, generator=generator), dim=1)
    mean = (point + torch.nextafter(-point, torch.zeros(()))) / 2
    assert mean.norm() > 0
    _, _, sound = project_mean([mean], Sphere(ROWS), torch.ones(1, 1))
    assert not sound.any()


def test_zero_and_infinite_vectors(generator):
    model = Weights(rows=2)
    model.one.data[0] = 0
    average = SphereAveragedModel(model, {model.one: Sphere(ROWS)})
    average.update_parameters(model)
    assert torch.equal(average.module.one, model.one)
    with torch.no_grad():  # it leaves zero, and has a sphere from there on
        model.one[0] = torch.randn(6, generator=generator)
        model.one[1] = torch.inf
    average.update_parameters(model)
    assert torch.isfinite(average.module.one).all()
    torch.testing.assert_close(average.module.one[0], model.one[0])
    torch.testing.assert_close(average.module.one[1], torch.ones(6))


def test_bfloat16_follows_and_stays_on_the_sphere(generator):
    """At decay .999 an average kept in bfloat16 would not move at all."""
    model = Weights(torch.bfloat16, rows=64)
    spheres = {model.one: Sphere(ROWS, radius=1.0)}
    rule = get_ema_multi_avg_fn(0.999)
    for _ in walk(model, spheres, generator, 1):
        ours = SphereAveragedModel(model, spheres, multi_avg_fn=rule)
        plain = AveragedModel(model, multi_avg_fn=rule)
        for average in (ours, plain):
            average.update_parameters(model)
    start, far = model.one.double(), -model.one.detach().double().roll(1, 1)
    model.one.data.copy_(far)
    for _ in range(1000):
        ours.update_parameters(model)
        plain.update_parameters(model)
    mean = 0.999**1000 * start + (1 - 0.999**1000) * model.one.double()
    wanted = mean / mean.norm(dim=1, keepdim=True)
    off = (ours.module.one.double() - wanted).abs().max()
    assert off < 4e-3  # bfloat16 near 1
    assert (ours.module.one.double().norm(dim=1) - 1).abs().max() < 4e-3
    assert (plain.module.one.double() - mean).abs().max() > 0.1  # the check sees a stalled average


def test_a_saved_average_goes_on_bit_for_bit(generator):
    model = Weights()
    spheres = LAYOUTS["rows"](model)
    average = SphereAveragedModel(model, spheres, use_buffers=True)
    for step, _ in enumerate(walk(model, spheres, generator)):
        average.update_parameters(model)
        if step == 3:
            file = io.BytesIO()
            torch.save(average.state_dict(), file)
            file.seek(0)
            resumed = SphereAveragedModel(model, spheres, use_buffers=True)
            resumed.load_state_dict(torch.load(file, weights_only=True))
            copied = copy.deepcopy(average)
        elif step > 3:
            resumed.update_parameters(model)
            copied.update_parameters(model)
    for other in (resumed, copied):
        for name, value in average.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert average.module.seen[0] == pytest.approx(sum(range(STEPS)) / STEPS)


def test_update_bn_and_training(generator):
    """Filters before BatchNorm: the average has their length, and statistics of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(8 * 36, 4))
    images = torch.randn(64, 3, 8, 8, generator=generator)
    labels = torch.randint(4, (64,), generator=generator)
    groups = [
        {"params": [net[0].weight], "sphere": Sphere(ROWS)},
        {"params": [p for n, p in net.named_parameters() if n != "0.weight"]},
    ]
    optimizer = SphereSGD(groups, lr=0.5, momentum=0.9)
    average = SphereAveragedModel(net, groups)
    lengths = net[0].weight.detach().flatten(1).norm(dim=1)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        average.update_parameters(net)
    kept = average.module[0].weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(kept, lengths, rtol=1e-6, atol=0)
    update_bn([images], average)
    before = average.module[0](images).mean((0, 2, 3))
    torch.testing.assert_close(average.module[1].running_mean, before.detach())
    with torch.no_grad():
        loss = nn.functional.cross_entropy(average.eval()(images), labels)
    assert loss < 1.2 < nn.functional.cross_entropy(torch.zeros(64, 4), labels)


def test_tied_weights_are_averaged_once(generator):
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    average = SphereAveragedModel(model, {model[0].weight: Sphere(ROWS)})
    average.update_parameters(model)
    assert average.module[0].weight is average.module[1].weight
    assert [name for name in average.state_dict() if name.startswith("mean")] == ["mean_0"]


@pytest.mark.parametrize(
    ("spheres", "error", "says"),
    [
        (lambda m: {nn.Parameter(torch.ones(2)): Sphere()}, ValueError, "is not the model's"),
        (lambda m: [{"params": [m.one, m.one], "sphere": Sphere()}], ValueError, "two spheres"),
        (lambda m: {m.free: Sphere(VectorAxes((1,)))}, ValueError, "axis"),
        (lambda m: {m.free: "sphere"}, TypeError, "Sphere"),
    ],
)
def test_what_cannot_be_averaged(spheres, error, says):
    model = Weights()
    with pytest.raises(error, match=says):
        SphereAveragedModel(model, spheres(model))


def test_two_rules_are_refused():
    rules = {"avg_fn": get_swa_avg_fn(), "multi_avg_fn": get_ema_multi_avg_fn(0.9)}
    with pytest.raises(ValueError, match="give one"):
        SphereAveragedModel(Weights(), {}, **rules)
