"""What a monitor measures, against the exact recorder and closed forms."""

import numpy as np
import pytest
import torch

from monitor.networks import ROWS, Weights, steps
from onsphere.dynamics import NormRecorder
from onsphere.geometry import Sphere, VectorAxes
from onsphere.monitor import Monitor
from onsphere.monitor.layer_statistics import Bucket, Limits, leaking, statistics
from onsphere.monitor.run import QUANTITIES
from onsphere.monitor.step_sums import gradient_sums, update_sums

LAYOUTS = [VectorAxes(), ROWS, VectorAxes((1,)), VectorAxes(pieces=((0, 2),))]


def step_sums(before, after, grad):
    slope = gradient_sums(before, grad, ROWS)
    return torch.cat([update_sums(before, after, ROWS), slope])


def noise(generator):
    return lambda _, p: torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_recorder_agrees(axes, dtype, generator):
    net = Weights(w=torch.randn(4, 6, generator=generator, dtype=dtype))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    recorder = NormRecorder(optimizer, {"w": (net.w, axes)}, per_vector=True)
    with Monitor(net, optimizer, {"w": axes}, every=1) as monitor:
        steps(optimizer, 4, noise(generator))
    exact = recorder.series("w")
    exact["gradient"] = exact["gradient_square"].sqrt()
    exact["unit_gradient_square"] = exact["gradient_square"] * exact["norm"] ** 2
    close = (
        {"rtol": 1e-12, "atol": 1e-14} if dtype is torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    )
    for quantity in QUANTITIES:
        values = exact[quantity].numpy()
        got = monitor.run.series("w", quantity)
        np.testing.assert_allclose(got, values.mean(1), **close)
        for q in (10, 50, 90):
            got = monitor.run.series("w", quantity, f"q{q}")
            np.testing.assert_allclose(got, np.quantile(values, q / 100, axis=1), **close)


def test_the_parts_of_a_joint_sphere_are_one_vector(generator):
    net = Weights(
        weight=torch.randn(4, 3, generator=generator), bias=torch.randn(4, generator=generator)
    )
    whole = Weights(w=torch.cat([net.weight.data, net.bias.data[:, None]], 1))
    draws = noise(generator)
    sphere = Sphere(ROWS, joint=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    other = torch.optim.SGD(whole.parameters(), lr=0.1)
    joint = {(net.weight, net.bias): sphere}
    with Monitor(net, optimizer, joint) as ours, Monitor(whole, other, {"w": ROWS}) as theirs:
        whole.w.grad = draws(0, whole.w)
        net.weight.grad, net.bias.grad = whole.w.grad[:, :3].clone(), whole.w.grad[:, 3].clone()
        optimizer.step()
        other.step()
    assert list(ours.run.layers) == ["weight+bias"]
    for quantity in QUANTITIES:
        got = ours.run.series("weight+bias", quantity, "q90")
        np.testing.assert_allclose(
            got, theirs.run.series("w", quantity, "q90"), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("angle", [1e-7, 1e-4, 0.3, 3.0])
def test_small_angles_keep_their_digits_in_float32(angle):
    turn = torch.tensor([[np.cos(angle), np.sin(angle)]])
    before = torch.tensor([[1.0, 0.0]])
    exact = torch.atan2(turn[0, 1].float().double(), turn[0, 0].float().double())
    sums = step_sums(before.clone(), turn.float(), None)
    bucket = Bucket([0], torch.ones(1, 1), torch.zeros(1, 1))
    got = bucket.reduce([sums], Limits())[0, QUANTITIES.index("rotation") * 4]
    assert got.item() == pytest.approx(exact.item(), rel=1e-6)


def test_bfloat16_is_measured_in_float32(generator):
    net = Weights(w=torch.randn(8, 512, generator=generator, dtype=torch.bfloat16))
    exact = net.w.detach().double().norm(dim=1).mean().item()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Monitor(net, optimizer, {"w": ROWS}) as monitor:
        steps(optimizer, 1, noise(generator))
    assert monitor.latest()["onsphere/norm/w"] == pytest.approx(exact, rel=1e-6)


def test_dead_vectors_are_left_out_of_means_and_counted():
    net = Weights(w=torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    with Monitor(net, optimizer, {"w": ROWS}) as monitor:
        net.w.grad = torch.tensor([[-8.0, 6.0], [0.0, 0.0]])
        optimizer.step()
    latest = monitor.latest()
    assert latest["onsphere/norm/w"] == 2.5
    assert latest["onsphere/rotation/w"] == pytest.approx(np.pi / 4)
    assert latest["onsphere/effective_lr/w"] == pytest.approx(0.02)


def test_quantiles_are_those_of_numpy_without_nan(generator):
    x = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    x[1, 2:5] = x[2] = torch.nan
    got = statistics(x).numpy()
    for row in range(2):
        wanted = np.nanquantile(x[row].numpy(), [0.1, 0.5, 0.9])
        np.testing.assert_allclose(got[row], [np.nanmean(x[row].numpy()), *wanted])
    assert np.isnan(got[2]).all()


def test_a_gradient_along_the_weight_leaks():
    w, g = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.2, 1.0]])
    assert leaking(step_sums(w.clone(), w, g), 0.1).all()
    assert not leaking(step_sums(w.clone(), w, g * torch.tensor([0.1, 1.0])), 0.1).any()


@pytest.mark.parametrize("foreach", [True, False])
def test_the_gradient_is_that_before_a_step_that_overwrites_it(foreach, generator):
    net = Weights(w=torch.randn(4, 6, generator=generator))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=foreach
    )
    given, draw = [], noise(generator)

    def gradient(number, p):
        given.append(draw(number, p))
        return given[-1].clone()

    with Monitor(net, optimizer, {"w": ROWS}, every=1) as monitor:
        steps(optimizer, 4, gradient)
    wanted = [float(g.norm(dim=1).mean()) for g in given]
    assert monitor.run.series("w", "gradient") == pytest.approx(wanted, rel=1e-5)


def test_a_closure_brings_its_own_gradient(generator):
    net = Weights(w=torch.randn(4, 6, generator=generator))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.w.grad = torch.full_like(net.w, 7.0)  # left by the step before

    def closure():
        net.w.grad = torch.ones_like(net.w)

    with Monitor(net, optimizer, {"w": ROWS}, every=1) as monitor:
        optimizer.step(closure)
        optimizer.step(closure=closure)
    assert monitor.run.series("w", "gradient") == pytest.approx([6**0.5] * 2)
