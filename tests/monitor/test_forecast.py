"""What a monitor expects, against random walks under real optimizers."""

import math

import numpy as np
import pytest
import torch

from monitor.networks import ROWS, Weights, tangent_noise, watched
from onsphere.dynamics import SGDW, Lion, half_life, sgd_equilibrium
from onsphere.dynamics.optimizers import Vector
from onsphere.geometry import Sphere
from onsphere.monitor import Monitor
from onsphere.monitor.forecast import equilibrium, law_of
from onsphere.monitor.layers import Layer
from onsphere.optim import SphereAdamW, SphereSGD, on_sphere

SGD, ADAMW, ADAM = torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam
OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.3),
    "sgd, decay": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "sgd, momentum": lambda p: SGD(p, lr=0.02, momentum=0.9),
    "sgd, momentum, decay": lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=0.05),
    "sgd, nesterov": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.05),
    "sgdw": lambda p: SGDW(p, lr=0.02, momentum=0.9, weight_decay=0.5),
    "adamw": lambda p: ADAMW(p, lr=0.01, weight_decay=0.5, betas=(0.9, 0.95)),
    "adam": lambda p: ADAM(p, lr=0.01, betas=(0.9, 0.95)),
    "lion": lambda p: Lion(p, lr=0.005, weight_decay=1.0),
    "muon": lambda p: torch.optim.Muon(p, lr=0.05, weight_decay=0.2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norm_and_rotation_follow_the_law(name, generator):
    run = watched(OPTIMIZERS[name], tangent_noise(generator), 250, every=10).run
    assert run.layers["w"]["law"] == name.partition(",")[0].replace("adam", "adamw").replace(
        "ww", "w"
    )
    wanted, got = run.predicted("w", "norm"), run.series("w", "norm")
    # torch's Muon orthogonalizes in five rounds, which leaves singular values off 1.
    tolerance = 0.15 if name == "muon" else 0.1
    assert abs(wanted[-1] / got[-1] - 1) < tolerance, (wanted[-1], got[-1])
    assert np.ptp(got) > 0.1, "the norm has hardly moved, so this tells nothing"
    wanted, got = (
        x[-10:].mean() for x in (run.predicted("w", "rotation"), run.series("w", "rotation"))
    )
    assert abs(wanted / got - 1) < 0.15, (wanted, got)
    assert run.flags == []


def test_the_equilibrium_is_that_of_the_settings(generator):
    make = lambda p: SGD(p, lr=0.1, momentum=0.5, weight_decay=0.1)  # noqa: E731
    run = watched(make, tangent_noise(generator), 2).run
    unit = run.series("w", "unit_gradient_square")[0]
    rest = sgd_equilibrium(lr=0.1, weight_decay=0.1, momentum=0.5, unit_gradient_square=float(unit))
    expected = [run.predicted("w", f"equilibrium_{q}")[0] for q in ("norm", "rotation")]
    assert expected == pytest.approx([rest.norm, rest.rotation])
    assert run.predicted("w", "half_life")[0] == pytest.approx(half_life(rest))


def test_without_decay_there_is_no_equilibrium_and_at_rate_zero_no_rotation(generator):
    free = watched(lambda p: SGD(p, lr=0.1), tangent_noise(generator), 2).run
    assert np.isnan(free.predicted("w", "equilibrium_norm")).all()
    assert np.isnan(free.predicted("w", "half_life")).all()
    still = watched(lambda p: SGD(p, lr=0.0, weight_decay=0.1), tangent_noise(generator), 2).run
    assert still.predicted("w", "rotation").tolist() == [0, 0]
    assert still.predicted("w", "norm").tolist() == [still.series("w", "norm")[0]] * 2


def groups(params, **settings):
    return [{"params": list(params), "sphere": Sphere(ROWS), **settings}]


SPHERES = {
    "rotation": lambda p: SphereSGD(groups(p, lr_mode="angle"), lr=0.03),
    "relative": lambda p: SphereAdamW(groups(p), lr=0.01),
    "sphere": lambda p: SphereAdamW(groups(p), lr=0.01, lr_mode="rate"),
    "rotation, wrapped": lambda p: on_sphere(SGD(p, lr=0.03), groups(p), mode="rotate"),
    "sphere, wrapped": lambda p: on_sphere(ADAM(p, lr=0.01), groups(p)),
}


@pytest.mark.parametrize("name", SPHERES)
def test_spheres_have_a_fixed_norm(name, generator):
    run = watched(SPHERES[name], tangent_noise(generator), 8).run
    law = name.partition(",")[0]
    assert run.layers["w"]["law"] == law
    assert run.predicted("w", "norm") == pytest.approx(run.series("w", "norm"), rel=1e-6)
    wanted = run.predicted("w", "rotation")
    if law == "rotation":
        assert run.series("w", "rotation") == pytest.approx(wanted, rel=1e-4)
        assert wanted[0] == 0.03
    else:
        assert np.isnan(wanted).all()
    assert run.flags == []
    if name == "relative":  # to the length, so that this is the rate on the unit sphere
        assert run.series("w", "effective_lr") == pytest.approx(0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: ADAM(p, lr=0.01, amsgrad=True),
        lambda p: on_sphere(SGD(p, lr=0.01), groups(p), mode="brake"),
    ],
)
def test_where_no_law_holds_nothing_is_predicted_and_it_is_said(make, generator):
    monitor = watched(make, tangent_noise(generator), 3)
    assert monitor.run.layers["w"]["law"] is None
    assert all(np.isnan(sample.predicted).all() for sample in monitor.run.samples)
    assert "No law covers" in str(monitor)


def test_adam_with_l2_is_told_from_adamw():
    net = Weights(w=torch.ones(2, 2))
    layer = Layer("w", (net.w,), Sphere(ROWS), 0)
    for decay, decoupled, name in (
        (0.1, False, "adam-l2"),
        (0.1, True, "adamw"),
        (0.0, False, "adamw"),
    ):
        optimizer = ADAM([net.w], weight_decay=decay, decoupled_weight_decay=decoupled)
        law = law_of(optimizer, optimizer.param_groups[0], layer)
        assert law is not None
        assert law.name == name


def test_effective_rates_have_the_degree_of_their_optimizer(generator):
    for make, degree in ((lambda p: SGD(p, lr=0.1), 2), (lambda p: ADAM(p, lr=0.1), 1)):
        run = watched(make, tangent_noise(generator), 1, weight=torch.full((2, 4), 2.0)).run
        assert run.series("w", "effective_lr")[0] == pytest.approx(0.1 / 4.0**degree)


def test_a_schedule_is_followed(generator):
    net = Weights(w=torch.nn.functional.normalize(torch.randn(16, 64, generator=generator)))
    optimizer = SGD(net.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t >= 4 else 1.0)
    draw = tangent_noise(generator)
    with Monitor(net, optimizer, {net.w: ROWS}, every=1) as monitor:
        for number in range(8):
            net.w.grad = draw(number, net.w)
            optimizer.step()
            schedule.step()
    assert monitor.run.lr("w").tolist() == [0.5] * 4 + [0.0] * 4
    wanted, got = monitor.run.predicted("w", "norm"), monitor.run.series("w", "norm")
    assert wanted == pytest.approx(got, rel=0.05)
    assert wanted[4] == wanted[7] != wanted[3]
    assert not math.isnan(wanted[0])


def test_adam_with_l2_relaxes_faster_the_longer_the_weight(generator):
    weight = 10 * torch.nn.functional.normalize(torch.randn(4, 100, generator=generator))
    make = lambda p: ADAM(p, lr=0.003, weight_decay=0.1, betas=(0.9, 0.99))  # noqa: E731
    noise = tangent_noise(generator, 10.0)
    run = watched(make, noise, 801, weight=weight, every=100).run
    wanted, got = run.predicted("w", "norm"), run.series("w", "norm")
    assert got[5] == pytest.approx(4.5, rel=0.05), "far from the start, and from the 1.9 at rest"
    assert wanted == pytest.approx(got, rel=0.17)


def test_decoupled_sgd_knows_nesterov_but_no_dampening(generator):
    net = Weights(w=torch.ones(2, 2))
    layer = Layer("w", (net.w,), Sphere(ROWS), 0)
    optimizer = SGDW([net.w], lr=0.1, momentum=0.9, weight_decay=0.1)
    group = optimizer.param_groups[0]
    law, vector = law_of(optimizer, group, layer), Vector(2, 2, (2, 2), 1.0)
    plain = equilibrium(law, 0.1, 0.1, group, vector)
    ahead = equilibrium(law, 0.1, 0.1, {**group, "nesterov": True}, vector)
    assert ahead.rotation > 1.1 * plain.rotation
    assert law_of(optimizer, {**group, "dampening": 0.5}, layer) is None


def test_dampening_without_momentum_does_nothing(generator):
    make = lambda p: SGD(p, lr=0.1, dampening=0.9, weight_decay=0.1)  # noqa: E731
    run = watched(make, tangent_noise(generator), 3).run
    wanted = run.predicted("w", "rotation")
    assert wanted == pytest.approx(run.series("w", "rotation"), rel=0.15)


def test_what_has_no_gradient_stays_where_it_is():
    monitor = watched(lambda p: SGD(p, lr=0.5, weight_decay=0.5), lambda *_: None, 6)
    assert monitor.run.predicted("w", "norm") == pytest.approx(np.ones(6))
    assert monitor.run.predicted("w", "rotation").tolist() == [0] * 6
    assert [flag.kind for flag in monitor.flags] == ["dead"]
    assert "leaves them as they are" in monitor.flags[0].message
