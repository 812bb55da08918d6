"""What the claims measure on a trained network, and that each measurement sees a fault."""

import json
from dataclasses import asdict

import pytest
import torch

from onsphere.studies.claims import causes, gain, growth, invariance, robustness, sphere
from onsphere.studies.engine.job import Inputs
from onsphere.studies.setup.training import Training, train


@pytest.fixture(scope="module")
def trained(digits):
    """Train once per method and settings, a few steps; return what a task is given."""
    made = {}

    def make(method, **changes):
        settings = Training("digits", method, **{"steps": 8, "width": 4, "seed": 1, **changes})
        if settings not in made:
            outcome = train(asdict(settings), Inputs(digits))
            made[settings] = Inputs(digits, (outcome.result,), (outcome.tensors,))
        return {"training": asdict(settings)}, made[settings]

    return make


def result(task, config, inputs):
    found = task(config, inputs).result
    json.dumps(found, allow_nan=False)
    return found


@pytest.mark.parametrize("method", ["bn", "ln", "rms", "wn", "cwn", "sn"])
def test_trained_networks_meet_the_lemma(trained, method):
    layers = result(sphere.measure, *trained(method))["layers"]
    assert len(layers) == 3
    assert max(layer["radius_error"] for layer in layers) < 1e-10
    assert max(layer.get("spectrum_error", 0.0) for layer in layers) < 1e-8
    assert any(layer.get("curve") for layer in layers)


def test_a_wrong_spectrum_is_seen(trained, monkeypatch):
    exact = sphere.spectrum

    def wrong(vector, sphere_map):
        return exact(1.01 * vector, sphere_map)

    monkeypatch.setattr(sphere, "spectrum", wrong)
    layers = result(sphere.measure, *trained("rms"))["layers"]
    assert max(layer.get("spectrum_error", 0.0) for layer in layers) > 5e-3


def test_a_wrong_sphere_is_seen(trained, monkeypatch):
    monkeypatch.setattr(sphere.ActivationNorm, "forward", lambda self, z: 1.01 * z)
    layers = result(sphere.measure, *trained("rms"))["layers"]
    assert max(layer["radius_error"] for layer in layers) > 5e-3


@pytest.mark.parametrize("method", ["bn", "gn", "cwn", "sn"])
def test_the_laws_of_invariance_are_measured(trained, method):
    found = result(invariance.measure, *trained(method))
    assert max(max(values) for values in found["exact"].values()) < 1e-9
    assert found.get("eps_identity", 0.0) < 1e-8
    assert ("eps_identity" in found) == (method == "bn")


def test_the_control_breaks_every_law(trained):
    found = result(invariance.measure, *trained("none"))["exact"]
    assert {law for law, values in found.items() if max(values) > 1e-2} == set(found)


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.0, 5e-3), (0.9, 0.0), (0.9, 5e-3)])
def test_the_recursions_are_exact_and_without_normalization_are_not(digits, momentum, decay):
    def measured(method):
        settings = Training(
            "digits", method, momentum=momentum, weight_decay=decay, steps=8, width=4
        )
        return result(growth.check_recursion, {"training": asdict(settings)}, Inputs(digits))

    assert all(measured(method)["error"] < 1e-10 for method in ("bn", "ln", "wn", "sn"))
    assert measured("none")["error"] > 1e-5


def test_a_wrong_recursion_is_seen(digits, monkeypatch):
    exact = growth.sgd_growth
    monkeypatch.setattr(
        growth, "sgd_growth", lambda s, d, lr, weight_decay: exact(s, d, 1.1 * lr, weight_decay)
    )
    settings = Training("digits", "bn", momentum=0.0, steps=8, width=4)
    found = result(growth.check_recursion, {"training": asdict(settings)}, Inputs(digits))
    assert found["error"] > 1e-4
    assert found["shrinking"] == 0


@pytest.mark.parametrize("decay", [0.0, 5e-3])
def test_the_laws_of_the_mean_are_measured_in_every_layer(trained, decay):
    config, inputs = trained("bn", record=True, weight_decay=decay, steps=12)
    layers = result(growth.check_laws, config, inputs)["layers"]
    assert len(layers) == 3
    ratio = "rotation_ratio" if decay else "exponent"
    assert all(ratio in layer and layer["grew"] > 1 for layer in layers)


def test_a_diverged_run_has_no_laws(trained):
    config, inputs = trained("none", record=True, lr=1e4, steps=12)
    assert inputs.records[0]["diverged"]
    assert result(growth.check_laws, config, inputs) == {"layers": []}


@pytest.mark.parametrize("method", ["none", "bn", "wn"])
def test_attacks_weaken_and_the_rescale_by_a_power_of_two_changes_nothing(trained, method):
    config, inputs = trained(method, steps=40)
    found = result(robustness.measure, {**config, "images": 40, "steps": 3, "restarts": 1}, inputs)
    curve = [found["clean"], *[one["worst"] for one in found["robust"]]]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] > curve[-1]
    assert all(one["worst"] <= min(one["cross_entropy"], one["dlr"]) for one in found["robust"])
    if method == "none":
        assert found["gauge"] is None
    else:
        assert found["gauge_change"] < 1e-3
        assert found["gauge"]["worst"] == pytest.approx(found["robust"][1]["worst"], abs=0.05)


def test_gain_is_measured_where_it_is_learned(trained):
    for method in ("bn", "ln", "rms", "wn"):
        config, inputs = trained(method)
        layers = result(gain.measure, config, inputs)["layers"]
        assert len(layers) == 3
        assert all(-1 <= layer["gain_spread"] <= 1 for layer in layers)
        assert (layers[0]["shift_mean"] is None) == (method == "rms")


def test_a_gain_equal_to_the_spread_is_seen_and_does_not_survive_rescaling(generator):
    spread = torch.linspace(0.5, 2.0, 16)
    z = torch.randn(64, 16, 4, 4, generator=generator) * spread[:, None, None]
    rescales = torch.randn(50, 16, generator=generator).exp()
    layer = gain._layer(z.std((0, 2, 3)), z.mean((0, 2, 3)), z, rescales)
    assert layer["gain_spread"] == layer["shift_mean"] == 1.0
    assert layer["ratio"] == pytest.approx(1.0)
    assert layer["gain_spread_gauge"] < 0.7


def causes_of(trained, method, **changes):
    config, inputs = trained(method, **changes)
    return result(causes.measure, {**config, "images": 30, "steps": 4, "controls": True}, inputs)


def test_controls_that_keep_the_function_keep_robustness(trained):
    found = causes_of(trained, "bn")
    assert found["controls"].keys() == {"rescaled", "without eps", "fresh statistics", "loud"}
    assert sum(found["right"]) > 0
    assert all(s <= r for s, r in zip(found["stands"], found["right"], strict=True))
    for name in ("rescaled", "loud"):
        assert found["controls"][name] == found["stands"]
    assert found["cross_entropy_loud"] >= sum(found["stands"]) / 30
    assert causes_of(trained, "none")["controls"].keys() == {"loud"}


def test_stale_statistics_are_measured_anew(trained, digits):
    from onsphere.studies.setup.training import restore

    config, inputs = trained("bn")
    settings = Training(**config["training"])
    model = restore(settings, inputs)
    for norm in model.norms:
        norm.running_var.mul_(100)
    fresh = causes._refreshed(model, settings, inputs)
    ratio = fresh.norms[0].running_var / model.norms[0].running_var
    assert float(ratio.max()) < 0.1
    assert not fresh.training
    assert model.norms[0].momentum is not None


def test_a_network_that_diverged_is_left_out(trained):
    config, inputs = trained("bn")
    lost = Inputs(inputs.images, ({**inputs.records[0], "diverged": True},), inputs.tensors)
    config = {**config, "images": 30, "steps": 4, "controls": True}
    assert result(causes.measure, config, lost) == {"diverged": True}
