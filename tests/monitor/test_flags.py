"""Every flag has a run that raises it, and one like it that does not."""

import pytest
import torch

from monitor.networks import ROWS, Weights, tangent_noise, watched
from onsphere.geometry import Sphere
from onsphere.monitor import Monitor, Thresholds
from onsphere.optim import SphereSGD, on_sphere

SGD = torch.optim.SGD


def sgd(lr=0.01, **settings):
    return lambda p: SGD(p, lr=lr, **settings)


def kinds(monitor):
    return [flag.kind for flag in monitor.flags]


def calm(generator, **options):
    return watched(sgd(), tangent_noise(generator), 6, **options)


def test_a_calm_run_has_no_flags(generator):
    assert calm(generator).flags == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_flagged_at_once(value, generator):
    noise = tangent_noise(generator)

    def spoiled(number, p):
        gradient = noise(number, p)
        if number == 2:
            gradient[5, 3] = value
        return gradient

    monitor = watched(sgd(), spoiled, 3)
    assert kinds(monitor) == ["nonfinite"]
    assert monitor.flags[0].step == 2
    assert "1 of 16 vectors" in monitor.flags[0].message


def test_dead_vectors_are_those_without_gradient_for_a_while(generator):
    noise = tangent_noise(generator)

    def masked(rows, until=99):
        def gradient(number, p):
            g = noise(number, p)
            g[rows] = 0 if number < until else g[rows]
            return g

        return gradient

    monitor = watched(sgd(), masked([2, 7]), 5)
    assert kinds(monitor) == ["dead"]
    assert monitor.flags[0].step == 2
    assert "2 of 16 vectors" in monitor.flags[0].message
    assert watched(sgd(), masked([2, 7], until=2), 5).flags == []
    # Another row at each step is alive again before it counts as dead.
    assert watched(sgd(), lambda n, p: masked([n])(n, p), 5).flags == []
    assert kinds(watched(sgd(), lambda *_: None, 5)) == ["dead"]


def conv(eps):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False), torch.nn.BatchNorm1d(4, eps=eps))


@pytest.mark.parametrize(("eps", "raised"), [(1e-5, []), (1.0, ["eps"])])
def test_eps_of_a_normalization_is_seen_in_the_gradient(eps, raised, generator):
    net = conv(eps)
    x, y = torch.randn(32, 6, generator=generator), torch.randn(32, 4, generator=generator)
    optimizer = SGD(net.parameters(), lr=1e-3)
    with Monitor(net, optimizer, {"0.weight": ROWS}, every=1) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
    assert kinds(monitor) == raised
    assert all("they are on no sphere" in flag.message for flag in monitor.flags)


@pytest.mark.parametrize(("size", "raised"), [(1e-9, ["eps"]), (1e-3, [])])
def test_the_optimizers_eps_is_compared_with_the_gradient(size, raised, generator):
    adam = lambda p: torch.optim.Adam(p, lr=1e-3)  # noqa: E731
    monitor = watched(adam, tangent_noise(generator, size), 4, thresholds=Thresholds(rotation=1e9))
    assert kinds(monitor) == raised
    assert all("the optimizer's eps" in flag.message for flag in monitor.flags)


def test_runaway_norms_and_a_rate_that_collapses_with_them(generator):
    monitor = watched(sgd(lr=60.0), tangent_noise(generator), 20)
    assert {"collapse", "runaway"} <= set(kinds(monitor))
    assert monitor.run.series("w", "norm")[-1] > 10
    runaway = next(flag for flag in monitor.flags if flag.kind == "runaway")
    assert "no weight decay holds it back" in runaway.message


def test_growth_to_a_norm_that_decay_will_hold_is_no_runaway(generator):
    monitor = watched(sgd(lr=2.0, weight_decay=1e-5), tangent_noise(generator, 60.0), 40)
    grown = monitor.run.series("w", "norm")
    assert grown[-1] > 10 * grown[0]
    assert monitor.run.predicted("w", "equilibrium_norm")[-1] > grown[-1]
    assert not {"runaway", "collapse"} & set(kinds(monitor))


def test_a_rate_that_the_schedule_lowers_does_not_collapse(generator):
    net = Weights(w=torch.nn.functional.normalize(torch.randn(16, 64, generator=generator)))
    optimizer = SGD(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    noise = tangent_noise(generator)
    with Monitor(net, optimizer, {"w": ROWS}, every=1) as monitor:
        for number in range(5):
            net.w.grad = noise(number, net.w)
            optimizer.step()
            schedule.step()
    rates = monitor.run.series("w", "effective_lr")
    assert rates[0] > 1000 * rates[-1]
    assert monitor.flags == []


def tampered(make, generator, factor):
    """Scale the weight after every step, behind the optimizer's back."""
    net = Weights(w=torch.nn.functional.normalize(torch.randn(16, 64, generator=generator)))
    optimizer = make(list(net.parameters()))
    noise = tangent_noise(generator)
    with Monitor(net, optimizer, {"w": ROWS}, every=1) as monitor:
        for number in range(8):
            net.w.grad = noise(number, net.w)
            optimizer.step()
            with torch.no_grad():
                net.w.mul_(factor)
    return monitor


@pytest.mark.parametrize(("factor", "raised"), [(1.0, []), (1.15, ["drift"]), (0.8, ["drift"])])
def test_drift_from_a_law(factor, raised, generator):
    monitor = tampered(sgd(weight_decay=1e-3), generator, factor)
    assert kinds(monitor) == raised
    assert all("the law of this optimizer expects" in flag.message for flag in monitor.flags)


@pytest.mark.parametrize(("factor", "raised"), [(1.0, []), (1.01, ["drift"])])
@pytest.mark.parametrize("wrap", [True, False])
def test_drift_from_a_fixed_norm(factor, raised, wrap, generator):
    def make(params):
        group = [{"params": params, "sphere": Sphere(ROWS, radius=1.0)}]
        if wrap:
            return on_sphere(SGD(params, lr=0.01), {params[0]: Sphere(ROWS)})
        return SphereSGD(group, lr=0.01)

    # The optimizer puts the weight back at every step; so it is seen with the tampering in between.
    monitor = tampered(make, generator, factor**2)
    assert kinds(monitor) == raised
    assert all("the optimizer should keep it" in flag.message for flag in monitor.flags)


def test_a_rotation_far_from_the_law_is_drift(generator):
    class Sign(SGD):
        """Not what its name will say."""

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.sub_(0.05 * p.grad.sign())

    Sign.__name__ = "SGD"
    monitor = watched(lambda p: Sign(p, lr=0.01), tangent_noise(generator), 6)
    assert "drift" in kinds(monitor)
    assert "radians per step" in monitor.flags[0].message


def test_each_flag_is_raised_once_and_thresholds_can_be_moved(generator):
    monitor = watched(sgd(), lambda *_: None, 9)
    assert kinds(monitor) == ["dead"]
    patient = watched(sgd(), lambda *_: None, 9, thresholds=Thresholds(patience=10))
    assert patient.flags == []


@pytest.mark.parametrize(
    ("options", "says"),
    [({"patience": 0}, "patience"), ({"runaway": 1.0}, "factor above 1"), ({"leak": 0}, "share")],
)
def test_thresholds_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        Thresholds(**options)


def test_vectors_with_zeros_for_gradients_are_dead_and_do_not_drift_too():
    zeros = lambda _, p: torch.zeros_like(p)  # noqa: E731
    monitor = watched(sgd(weight_decay=1e-3), zeros, 6)
    assert kinds(monitor) == ["dead"]
    assert "shrinks them" in monitor.flags[0].message


def test_the_eps_of_muon_is_not_compared_with_gradients(generator):
    muon = lambda p: torch.optim.Muon(p, lr=1e-3)  # noqa: E731
    assert "eps" not in kinds(watched(muon, tangent_noise(generator, 1e-9), 4))
