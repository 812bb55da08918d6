"""The fifteen predictions on small real networks (13 is among the random walks of test_laws)."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from benchmarks import predictions, training

from onsphere import dynamics as dyn


def check(measured):
    failed = [f"{m.law}, {m.quantity}: {m.off:+.1%}" for m in measured if not m.holds]
    assert not failed, failed


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("prediction", predictions.IDENTITIES, ids=lambda p: str(p.number))
def test_identities(prediction, seed):
    assert prediction.measure(seed) <= prediction.tolerance


def test_no_shift_of_filters_before_group_norm_with_positions():
    """The shift of whole filters is one of linear layers only."""
    assert predictions.filters_before_group_norm(0) > 0.1


def test_eps_breaks_the_radial_identity():
    net, _ = predictions.mixed(0, eps=0.1)
    assert max(predictions._cosine(group) for group in predictions.groups(net)) > 1e-3


@pytest.mark.parametrize("wrong", ["lrs", "buffer"])
def test_other_rising_rates_are_seen(wrong, monkeypatch):
    right = dyn.rising_rates(lr=0.02, weight_decay=0.05, steps=100, momentum=0.9)
    changed = right._replace(**{wrong: 1.01 * getattr(right, wrong)})
    monkeypatch.setattr(dyn, "rising_rates", lambda **_: changed)
    assert predictions.rising(0) > 1e-7


def test_growth_on_a_network():
    check(training.free())


@pytest.mark.slow
def test_the_fourth_root_on_a_network():
    check(training.fourth_root())


@pytest.mark.slow
def test_rotation_on_a_network():
    """Lion turns an eighth less than on a walk, within 15%: its gradients are not Gaussian."""
    measured = list(training.rotates())
    check(measured)
    assert -0.15 < measured[2].off < -0.05


@pytest.mark.slow
def test_rate_drop_on_a_network():
    """Off by up to 7% where the gradients still shrink; the drift of the norm accounts for it.

    Right after the drop there are 20 steps only, and how a run goes depends on how PyTorch rounds:
    twelve runs each on torch 2.9 and 2.13 turned by 0.64 to 1.23 of the law, 0.90 on average, and
    deviated by 0.15. So the mean of three runs is held to 0.35, of which a rotation that does not
    fall, or falls by the root alone, is far. At last one run may be off by an eighth.
    """
    runs = zip(*(training.drops(seed) for seed in range(3)), strict=True)
    means = [
        replace(
            some[0],
            predicted=fmean(m.predicted for m in some),
            measured=fmean(m.measured for m in some),
        )
        for some in runs
    ]
    assert "at once" in means[1].quantity
    means[1] = replace(means[1], tolerance=0.35)
    check(means)


def test_attacks_under_gauge_and_scale():
    found = training.attacked()
    for loss in ("cross_entropy", "dlr"):
        assert found[f"{loss}, weights × 8"] == found[f"{loss}, logits × 1"]
    assert found["dlr, logits × 10000"] == found["dlr, logits × 1"]
    assert found["cross_entropy, logits × 10000"] > found["cross_entropy, logits × 1"] + 0.3
    assert 0.1 < found["dlr, logits × 1"] < 0.9


def test_effective_rates_are_rates_of_directions(generator):
    w, g = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    g -= (g @ w) / (w @ w) * w
    moved = w - 0.1 * g
    unit, at_unit = w / w.norm(), g * w.norm()
    on_sphere = unit - float(dyn.effective_lr(0.1, float(w.norm()))) * at_unit
    cosine = torch.cosine_similarity(moved, on_sphere, dim=0)
    assert float(1 - cosine) < 1e-14
