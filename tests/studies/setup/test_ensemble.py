"""Ensembles: every member is the network trained alone, whoever stands beside it."""

from dataclasses import asdict, replace

import pytest
import torch

from onsphere.studies.engine.job import Inputs, Outcome
from onsphere.studies.setup.data import Images
from onsphere.studies.setup.ensemble import train_ensemble
from onsphere.studies.setup.network import STUDIED, SmallConvNet
from onsphere.studies.setup.stacked import StackedNetworks
from onsphere.studies.setup.training import (
    Training,
    batches,
    measure_statistics,
    network_for,
    train,
)
from onsphere.studies.setup.training_group import TRAIN_TOGETHER, group_cell, member

SHORT = Training("digits", "bn", steps=5, width=4, batch=32, schedule="cosine")
OWN = (
    {"seed": 0, "lr": 0.1},
    {"seed": 1, "lr": 0.02, "weight_decay": 0.05, "start_scale": 3.0, "decayed": "head"},
    {"seed": 1, "lr": 0.3, "weight_decay": 0.2, "start_scale": 0.5},
)
SPHERE = {"space": "sphere"}
WAYS = {
    "plain": {},
    "no momentum": {"momentum": 0.0, "schedule": "constant"},
    "sphere": SPHERE,
    "head held": {**SPHERE, "head": "sphere", "momentum": 0.0},
    "rotation": {**SPHERE, "lr_mode": "angle"},
    "fixed radius": {**SPHERE, "lr_mode": "relative", "radius": 1.0},
    "radius at a rate": {**SPHERE, "radius": 0.7},
    "noise": {**SPHERE, "objective": "noise"},
    "forced growth": {**SPHERE, "norm_growth": 2.0, "rate_growth": 1.5},
}


@pytest.fixture(scope="module")
def images(digits):
    """Some digits in float64, in which networks are then trained."""
    train_x, test_x = digits.train_x[:400].double(), digits.test_x[:50].double()
    return Images("digits", train_x, digits.train_y[:400], test_x, digits.test_y[:50])


def members(method, **changes):
    return [replace(SHORT, method=method, **changes, **own) for own in OWN]


def distance(one, other):
    """Largest difference of two outcomes' tensors, relative to each tensor's largest entry."""
    assert one.tensors.keys() == other.tensors.keys()
    return max(
        float((value.double() - other.tensors[name].double()).abs().max())
        / max(1e-12, float(value.double().abs().max()))
        for name, value in one.tensors.items()
    )


def alone(settings, images):
    return train(asdict(settings), Inputs(images))


# Every method in plain space and on the sphere; one kind of sphere each (filters, groups, the whole
# weight, the directions of a weight method) in every way.
PAIRS = [(method, "plain") for method in STUDIED]
PAIRS += [(method, "sphere") for method in STUDIED if method != "none"]
PAIRS += [
    (m, way) for m in ("bn", "gn", "rms", "wn") for way in WAYS if way not in ("plain", "sphere")
]


@pytest.mark.parametrize(("method", "way"), PAIRS)
def test_every_member_is_the_network_trained_alone(images, method, way):
    ensemble = members(method, **WAYS[way])
    for settings, found in zip(ensemble, train_ensemble(ensemble, images), strict=True):
        expected = alone(settings, images)
        assert distance(found, expected) < 1e-10
        for name in ("train_loss", "train_accuracy", "test_accuracy", "loss_curve"):
            assert torch.tensor(found.result[name]).allclose(torch.tensor(expected.result[name]))


RECORDED = [(method, "plain") for method in STUDIED if method != "none"]
RECORDED += [("gn", "sphere"), ("bn", "noise"), ("bn", "forced growth"), ("wn", "no momentum")]


@pytest.mark.parametrize(("method", "way"), RECORDED)
def test_a_recorded_member_has_the_series_and_snapshots_of_the_network_alone(images, method, way):
    ensemble = members(method, record=True, **WAYS[way] | {"steps": 9})
    outcomes = train_ensemble(ensemble, images)
    for settings, found in zip(ensemble, outcomes, strict=True):
        assert distance(found, alone(settings, images)) < 1e-6  # series are kept in float32
    kinds = [sum(name.startswith(k) for name in found.tensors) for k in ("series.", "tenth.")]
    assert kinds == [9, len(network_for(settings, images).state_dict())]
    assert distance(outcomes[0], outcomes[1]) > 1e-3


def test_a_snapshot_is_the_end_of_a_shorter_run(images):
    long = replace(SHORT, method="ln", record=True, schedule="constant", steps=30)
    (found,) = train_ensemble([long], images)
    for name, steps in {"tenth": 3, "third": 10, "model": 30}.items():
        ended = alone(replace(long, record=False, steps=steps), images)
        own = {
            f"model.{k.removeprefix(name)[1:]}": v
            for k, v in found.tensors.items()
            if k.startswith(name)
        }
        assert distance(Outcome({}, own), ended) < 1e-9


def test_the_series_of_a_member_that_diverges_end_with_it(images):
    rates = (0.05, 1e200, 0.1)
    ensemble = [replace(SHORT, method="none", lr=lr, steps=12, record=True) for lr in rates]
    first = "series.convs.0.weight.norm"
    for settings, found in zip(ensemble, train_ensemble(ensemble, images), strict=True):
        expected = alone(settings, images)
        assert found.tensors.keys() == expected.tensors.keys()
        assert found.tensors[first].shape == expected.tensors[first].shape
        if not found.result["diverged"]:
            assert distance(found, expected) < 1e-6
    assert [one.result["diverged"] for one in train_ensemble(ensemble, images)] == [
        False,
        True,
        False,
    ]


def test_the_comparison_sees_another_seed_rate_decay_or_start(images):
    (found,) = train_ensemble([SHORT], images)
    for own in ({"seed": 1}, {"lr": 0.11}, {"weight_decay": 1e-3}, {"start_scale": 1.01}):
        assert distance(found, alone(replace(SHORT, **own), images)) > 1e-6


@pytest.mark.parametrize("method", STUDIED)
def test_what_is_not_finite_stays_where_it_is(images, method):
    networks = [SmallConvNet(method, images, width=4, seed=seed).double() for seed in range(3)]
    x = images.train_x[:96].view(3, 32, 1, 8, 8)

    def logits_and_slopes(stack):
        logits = stack(x)
        values = list(stack.parameters.values())
        return logits, torch.autograd.grad(logits[[0, 2]].square().sum(), values)

    sound, sound_slopes = logits_and_slopes(StackedNetworks(networks))
    with torch.no_grad():
        for parameter, _ in networks[1].hidden_weights().values():
            parameter.view(-1)[0] = float("inf")
    spoilt, slopes = logits_and_slopes(StackedNetworks(networks))
    assert not spoilt[1].isfinite().all()
    assert torch.equal(spoilt[[0, 2]], sound[[0, 2]])
    for slope, expected in zip(slopes, sound_slopes, strict=True):
        assert torch.equal(slope[[0, 2]], expected[[0, 2]])


def test_members_that_diverge_leave_and_take_no_other_along(images):
    rates = (0.05, 1e200, 0.1, 1e120)
    ensemble = [replace(SHORT, method="none", lr=lr, steps=12) for lr in rates]
    outcomes = train_ensemble(ensemble, images)
    assert [one.result["diverged"] for one in outcomes] == [False, True, False, True]
    for settings, found in zip(ensemble, outcomes, strict=True):
        expected = alone(settings, images)
        assert found.result["steps_done"] == expected.result["steps_done"]
        if not found.result["diverged"]:
            assert distance(found, expected) < 1e-10


def test_all_may_diverge(images):
    ensemble = [replace(SHORT, method="none", lr=lr, steps=12) for lr in (1e200, 1e300)]
    assert all(one.result["diverged"] for one in train_ensemble(ensemble, images))


def test_in_single_precision_a_step_differs_by_rounding_and_a_run_is_another_draw(digits):
    first = [replace(SHORT, steps=1, seed=seed) for seed in range(3)]
    for settings, found in zip(first, train_ensemble(first, digits), strict=True):
        assert distance(found, alone(settings, digits)) < 1e-5
    runs = [replace(SHORT, steps=60, seed=seed) for seed in range(6)]
    together = [one.result["train_loss"] for one in train_ensemble(runs, digits)]
    each = [alone(settings, digits).result["train_loss"] for settings in runs]
    differences = torch.tensor(together) - torch.tensor(each)
    spread = torch.tensor(each).std()
    assert differences.abs().max() < spread
    assert differences.mean().abs() < spread / 4


def test_a_mixture_comes_back_in_order(images):
    mixed = [
        replace(SHORT, lr=0.1),
        replace(SHORT, method="wn"),
        replace(SHORT, network="resnet20"),
        replace(SHORT, seed=2, steps=3),
        replace(SHORT, lr=0.2),
    ]
    outcomes = train_ensemble(mixed, images, at_once=1)
    for settings, found in zip(mixed, outcomes, strict=True):
        assert distance(found, alone(settings, images)) < 1e-10
    assert train_ensemble([], images) == []


def test_stacks_hold_at_most_what_they_may(images, monkeypatch):
    seen = []
    init = StackedNetworks.__init__

    def counted(self, networks):
        seen.append(len(networks))
        init(self, networks)

    monkeypatch.setattr(StackedNetworks, "__init__", counted)
    runs = [replace(SHORT, lr=0.1 + n / 100, steps=1) for n in range(7)]
    train_ensemble(runs, images, at_once=3)
    assert sorted(seen) == [2, 2, 3]
    with pytest.raises(ValueError, match="at_once must be at least 1, got 0"):
        train_ensemble([SHORT], images, at_once=0)


def test_the_cell_of_an_ensemble_lists_what_was_measured(images):
    ensemble = members("gn")
    outcomes = train_ensemble(ensemble, images)
    cell, kept = group_cell(ensemble), group_cell(ensemble, keep=True)
    found = TRAIN_TOGETHER.run(cell.config, Inputs(images))
    assert found.result["trained"] == [one.result for one in outcomes]
    assert found.tensors == {}
    made = TRAIN_TOGETHER.run(kept.config, Inputs(images))
    second = member(Inputs(images, (made.result,), (made.tensors,)), 1)
    assert second.records == (outcomes[1].result,)
    assert distance(Outcome({}, second.tensors[0]), outcomes[1]) == 0
    assert len({cell.key, kept.key, group_cell(ensemble[:2]).key}) == 3


def test_statistics_are_measured_anew(images):
    model = SmallConvNet("bn", images, width=4).double()
    measure_statistics(model, images, replace(SHORT, steps=3))
    assert not model.training
    assert [norm.momentum for norm in model.norms] == [0.1] * 3
    drawn = [images.train_x[i] for i in batches(len(images.train_y), replace(SHORT, steps=3))]
    means = [model.convs[0](model.standardized(x)).mean((0, 2, 3)) for x in drawn]
    torch.testing.assert_close(model.norms[0].running_mean, torch.stack(means).mean(0).detach())
