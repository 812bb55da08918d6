"""Trust checks: silent on honest networks, and each one speaks where it must."""

import pytest
import torch

from onsphere.norms import ActivationNorm
from onsphere.robustness import EvaluationError, Stage, Threat, mean_over_draws
from onsphere.robustness.evaluation.masking_checks import (
    CHECKS,
    _Sample,
    refuse_batch_statistics,
    trust_checks,
)
from robustness.problems import DUAL, Quantized, conv_net


def found(model, x, y, *, eps=0.05, norm="linf", stages=()):
    checks = trust_checks(model, x, y, torch.arange(len(x)), Threat(eps, norm), stages)
    assert [check.name for check in checks] == list(CHECKS)
    return {check.name: check for check in checks}


def suspicious(checks):
    return {name for name, check in checks.items() if check.finding == "suspicious"}


@pytest.mark.parametrize("norm", DUAL)
def test_an_honest_network_passes(norm, generator):
    net, x, y = conv_net(generator, examples=20)
    assert not suspicious(found(net, x, y, eps={"linf": 0.03, "l2": 0.1}[norm], norm=norm))


@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_large_logits_are_noted_and_nothing_is_suspicious(scale, generator):
    """They blind plain cross-entropy, which says nothing against attacks that are not blinded."""
    net, x, y = conv_net(generator, examples=20)
    checks = found(lambda z: scale * net(z), x, y)
    assert not suspicious(checks)
    check = checks["cross-entropy sees"]
    assert check.finding == "noted"
    assert check.measured > 0.02
    assert "the number stands" in check.meaning


def test_cross_entropy_blind_at_every_scale_stays_suspicious(generator, monkeypatch):
    net, x, y = conv_net(generator, examples=20)
    climb = _Sample.climb

    def blind(sample, **options):
        return sample.x if options.get("loss") == "cross_entropy" else climb(sample, **options)

    monkeypatch.setattr(_Sample, "climb", blind)
    assert "cross-entropy sees" in suspicious(found(net, x, y, eps=0.1))


def test_gradients_that_are_no_numbers_are_lost(generator):
    net, x, y = conv_net(generator, examples=3)
    broken = lambda z: net(z) + 0 * (z - z).sqrt().sum((1, 2, 3)).unsqueeze(1)  # noqa: E731
    check = found(broken, x, y)["gradients are there"]
    assert (check.finding, check.measured) == ("suspicious", 1)


def test_a_check_that_raises_is_suspicious_and_says_why(generator):
    net, x, y = conv_net(generator, examples=6)

    def alone(z):
        if len(z) == 1:
            raise RuntimeError("one is too few\nand more")
        return net(z)

    checks = found(alone, x, y)
    check = checks["one by one as in a batch"]
    assert (check.finding, check.measured) == ("suspicious", None)
    assert check.meaning == "not measured, RuntimeError: one is too few"
    assert checks["deterministic"].finding == "passed"


def test_no_more_examples_than_a_batch_go_through_the_model(generator):
    net, x, y = conv_net(generator, examples=3)
    most = 0

    def watched(z):
        nonlocal most
        most = max(most, len(z))
        return net(z)

    checks = trust_checks(watched, x, y, torch.arange(3), Threat(0.03), (), batch_size=2)
    assert most == 2
    assert {check.finding for check in checks} == {"passed"}


def test_hidden_gradients_are_seen(generator):
    net, x, _ = conv_net(generator, examples=20)
    masked = lambda z: net(Quantized.apply(z))  # noqa: E731
    checks = found(masked, x, masked(x).argmax(1), eps=0.1)
    assert {"gradients are there", "gradient-free is not stronger"} <= suspicious(checks)
    assert checks["gradients are there"].measured == 1


def test_gradients_that_point_astray_are_seen(generator):
    """A steep ramp hides the slope of the network: the loss falls along its gradient's sign."""
    net, x, y = conv_net(generator, examples=20)

    class Astray(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

    checks = found(lambda z: net(Astray.apply(z)), x, y, eps=0.1)
    assert {"reaches zero", "gradient-free is not stronger"} <= suspicious(checks)


def test_square_in_the_evaluation_is_what_counts(generator):
    net, x, y = conv_net(generator, examples=10)
    stages = [Stage("apgd-ce", 100, 50, 1.0), Stage("square", 50, broken := 7, 1.0)]
    check = found(net, x, y, stages=stages)["gradient-free is not stronger"]
    assert check.measured == broken / 100
    assert check.finding == "suspicious"


def test_a_random_model_is_flagged(generator):
    net, x, y = conv_net(generator, examples=10)
    noisy = lambda z: net(z) + torch.randn(len(z), 5, generator=generator)  # noqa: E731
    assert "deterministic" in suspicious(found(noisy, x, y))


def test_the_mean_over_draws_of_a_random_model_passes(generator):
    """And too few draws of a very random one are flagged."""
    net, x, y = conv_net(generator, examples=20)
    spread = net(x).std()
    findings = {}
    for noise, draws in ((0.05, 20), (5.0, 2)):
        noisy = lambda z, n=noise: (  # noqa: E731
            net(z) + n * spread * torch.randn(len(z), 5, generator=generator)
        )
        mean = mean_over_draws(noisy, draws, "logits")
        checks = trust_checks(mean, x, y, torch.arange(20), Threat(0.03), (), draws=draws)
        findings[draws] = suspicious({check.name: check for check in checks})
    assert findings[20] == set()
    assert "deterministic" in findings[2]


def test_a_mean_that_looks_at_its_batch_is_flagged_all_the_same(generator):
    net, x, y = conv_net(generator, examples=10)

    def mixed(z):
        noise = 1e-3 * torch.randn(len(z), 5, generator=generator)
        return net(z) - 0.5 * net(z).mean(0) + noise

    checks = trust_checks(
        mean_over_draws(mixed, 4, "logits"), x, y, torch.arange(10), Threat(0.03), (), draws=4
    )
    assert "one by one as in a batch" in suspicious({check.name: check for check in checks})


def test_a_model_that_looks_at_its_batch_is_flagged(generator):
    net, x, _ = conv_net(generator, examples=10)
    mixed = lambda z: net(z) - 0.5 * net(z).mean(0)  # noqa: E731
    assert "one by one as in a batch" in suspicious(found(mixed, x, mixed(x).argmax(1)))


def test_where_nothing_is_right_nothing_is_checked(generator):
    net, x, y = conv_net(generator, examples=5)
    checks = trust_checks(net, x, y, torch.arange(0), Threat(0.1), ())
    assert {check.finding for check in checks} == {"not run"}


def norm_net(norm):
    return torch.nn.Sequential(norm, torch.nn.Flatten(), torch.nn.Linear(16, 3))


@pytest.mark.parametrize("make", [lambda: torch.nn.BatchNorm2d(1), lambda: ActivationNorm("bn", 1)])
def test_batch_statistics_are_refused_and_not_touched(make, generator):
    net = norm_net(make()).train()
    x = torch.rand(6, 1, 4, 4, generator=generator)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(EvaluationError, match=r"call model.eval\(\) first"):
        refuse_batch_statistics(net, x)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    refuse_batch_statistics(net.eval(), x)


@pytest.mark.parametrize(
    "norm",
    [
        torch.nn.BatchNorm2d(1, track_running_stats=False),
        ActivationNorm("bn", 1, track_running_stats=False),
    ],
    ids=["torch", "ours"],
)
@pytest.mark.parametrize("training", [True, False])
def test_batch_statistics_in_every_mode_are_refused(norm, training, generator):
    net, x = norm_net(norm).train(training), torch.rand(6, 1, 4, 4, generator=generator)
    with pytest.raises(EvaluationError, match="'0' keeps no running statistics"):
        refuse_batch_statistics(net, x)


@pytest.mark.parametrize("norm", [torch.nn.GroupNorm(1, 1), torch.nn.Dropout(0.5)], ids=str)
def test_other_modules_may_be_in_training_mode(norm, generator):
    refuse_batch_statistics(norm_net(norm).train(), torch.rand(6, 1, 4, 4, generator=generator))
