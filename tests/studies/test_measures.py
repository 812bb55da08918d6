"""What the claims measure on a trained network, and that each measurement sees a fault."""

import json
from dataclasses import asdict

import pytest
import torch

from onsphere.studies.claims import (
    amplification,
    gain,
    growth,
    invariance,
    robustness,
    sphere,
    stability,
)
from onsphere.studies.claims.plan import Plan
from onsphere.studies.engine.job import Inputs
from onsphere.studies.setup.data import Images
from onsphere.studies.setup.training import Training, train
from onsphere.studies.setup.training_group import TRAIN_TOGETHER


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
    config, inputs = in_group(*trained("bn", record=True, weight_decay=decay, steps=12))
    layers = result(growth.check_laws, config, inputs)["layers"]
    assert len(layers) == 3
    ratio = "rotation_ratio" if decay else "exponent"
    assert all(ratio in layer and layer["grew"] > 1 for layer in layers)


def test_a_diverged_run_has_no_laws(trained):
    config, inputs = trained("none", record=True, lr=1e4, steps=12)
    assert inputs.records[0]["diverged"]
    config, inputs = in_group(config, inputs)
    assert result(growth.check_laws, config, inputs) == {"layers": []}


def in_group(config, inputs):
    """Return what a task is given for whom the network is the second of a group."""
    tensors = {f"1.{name}": value for name, value in inputs.tensors[0].items()}
    record = {"trained": [{"diverged": True}, inputs.records[0]]}
    return {**config, "member": 1}, Inputs(inputs.images, (record,), (tensors,))


@pytest.mark.parametrize("method", ["bn", "wn"])
def test_a_raw_layer_amplifies_by_its_norm_and_no_normalization_feels_it(trained, method):
    config, inputs = trained(method, record=True)
    found = result(amplification.measure, *in_group(config, inputs))["snapshots"]
    assert len(found) == 3
    assert all(len(snapshot[what]) == 3 for snapshot in found for what in ("norm", "raw", "behind"))
    model = robustness.restore(Training(**config["training"]), inputs)
    x = inputs.images.test_x[:20]
    moved = (x + 0.05 * torch.sign(x - 0.5)).clamp(0, 1)
    before = amplification._layers(model, x, moved)
    after = amplification._layers(model.rescale_hidden_(4.0), x, moved)
    assert after["raw"] == pytest.approx([4 * value for value in before["raw"]], rel=1e-4)
    assert after["behind"] == pytest.approx(before["behind"], rel=1e-2)


def test_a_layer_whose_units_are_dead_has_no_amplification(trained):
    config, inputs = in_group(*trained("none", record=True))
    tensors = {
        name: torch.full_like(value, -1e3) if name.endswith("convs.0.bias") else value
        for name, value in inputs.tensors[0].items()
    }
    dead = Inputs(inputs.images, inputs.records, (tensors,))
    assert result(amplification.measure, config, dead) == {"diverged": True}


def test_two_classes_are_attacked_as_more_are(digits):
    """Own images may have two classes, where one of the losses needs three."""
    train_, test = digits.train_y < 2, digits.test_y < 2
    two = Images(
        "two", digits.train_x[train_], digits.train_y[train_],
        digits.test_x[test], digits.test_y[test],
    )  # fmt: skip
    settings = Training("two", "bn", steps=8, width=4, record=True)
    outcome = train(asdict(settings), Inputs(two))
    config = {"training": asdict(settings), "images": 30, "steps": 2}
    config, inputs = in_group(config, Inputs(two, (outcome.result,), (outcome.tensors,)))
    assert not result(amplification.measure, config, inputs)["diverged"]
    config |= {"trainings": [config["training"]], "first": 1}
    assert len(result(robustness.attack, config, inputs)["networks"][0]["stands"]) == 30
    assert len(result(robustness.control, config, inputs)["curve"]) > 1


def test_a_norm_that_is_no_number_counts_as_shrinking(digits):
    settings = Training("digits", "bn", momentum=0.0, steps=8, width=4, lr=1e160)
    config = {"training": asdict(settings)}
    assert result(growth.check_recursion, config, Inputs(digits))["shrinking"] > 0


def test_gain_is_compared_at_every_snapshot(trained):
    for method in ("bn", "ln", "rms"):
        found = result(gain.measure, *in_group(*trained(method, record=True)))
        assert len(found["snapshots"]) == 3
        assert len(found["layers"]) == 3
        assert all(-1 <= layer["gain_spread"] <= 1 for layer in found["layers"])
        assert (found["snapshots"][0][0]["shift_distance"] is None) == (method == "rms")


def test_the_gain_of_a_weight_norm_is_its_length_and_anything_else_is_seen(trained, monkeypatch):
    config, inputs = trained("wn")
    assert result(gain.check_length, config, inputs)["error"] < 1e-5
    exact = gain.restore

    def doubled(*given):
        model = exact(*given)
        with torch.no_grad():
            model.convs[1].parametrizations.weight.original0.mul_(-2)
            model.convs[1].parametrizations.weight[0].forward = lambda length, way: way
        return model

    monkeypatch.setattr(gain, "restore", doubled)
    assert result(gain.check_length, config, inputs)["error"] > 1e-2


def test_a_gain_equal_to_the_spread_is_seen_and_does_not_survive_rescaling(generator):
    spread = torch.linspace(0.5, 2.0, 16)
    z = torch.randn(64, 16, 4, 4, generator=generator) * spread[:, None, None]
    rescales = torch.randn(50, 16, generator=generator).exp()
    layer = gain._layer(z.std((0, 2, 3)), z.mean((0, 2, 3)), z, rescales)
    assert layer["gain_spread"] == layer["shift_mean"] == 1.0
    assert layer["ratio"] == pytest.approx(1.0)
    assert layer["gain_spread_gauge"] < 0.7


GROUP = {"plain": {}, "sphere": {"space": "sphere"}}


@pytest.fixture(scope="module")
def group(trained):
    """Two networks of one group, as cells that build on it are given them."""

    def make(method, **changes):
        runs = [trained(method, steps=40, **own, **changes) for own in GROUP.values()]
        records = {"trained": [own.records[0] for _, own in runs]}
        tensors = {
            f"{i}.{name}": value
            for i, (_, own) in enumerate(runs)
            for name, value in own.tensors[0].items()
        }
        trainings = [config["training"] for config, _ in runs]
        config = {"trainings": trainings, "training": trainings[0], "first": 0}
        return {**config, "images": 30, "steps": 4}, Inputs(
            runs[0][1].images, (records,), (tensors,)
        )

    return make


def test_every_network_of_a_group_is_attacked(group):
    found = result(robustness.attack, *group("bn"))["networks"]
    assert len(found) == 2
    for one in found:
        assert 0 < sum(one["stands"]) <= sum(one["right"]) <= 30
        assert all(s <= r for s, r in zip(one["stands"], one["right"], strict=True))
    assert found[0]["norm_growth"] > 1
    assert found[1]["norm_growth"] == pytest.approx(1, abs=1e-3)


def test_of_networks_of_several_seeds_only_one_seed_is_attacked(group):
    config, inputs = group("bn")
    every = result(robustness.attack, config, inputs)["networks"]
    second = {**config, "trainings": config["trainings"][1:], "first": 1}
    assert result(robustness.attack, second, inputs)["networks"] == every[1:]
    second["training"] = config["trainings"][1]
    assert result(robustness.control, second, inputs)["right"] == every[1]["right"]


def test_controls_that_keep_the_function_keep_robustness(group):
    config, inputs = group("bn")
    found = result(robustness.control, config, inputs)
    plain = result(robustness.attack, config, inputs)["networks"][0]
    assert found["controls"].keys() == {"rescaled", "without eps", "fresh statistics", "loud"}
    for name in ("rescaled", "loud"):
        assert found["controls"][name] == plain["stands"]
    assert sum(found["cross_entropy_loud"]) >= sum(plain["stands"])
    curve = [sum(found["right"]) / 30, *found["curve"]]
    assert curve == sorted(curve, reverse=True)


def test_a_network_that_diverged_is_left_out(group):
    config, inputs = group("bn")
    records = [{**record, "diverged": True} for record in inputs.records[0]["trained"]]
    lost = Inputs(inputs.images, ({"trained": records},), inputs.tensors)
    assert result(robustness.attack, config, lost)["networks"] == [{"diverged": True}] * 2
    assert result(robustness.control, config, lost) == {"diverged": True}


def test_the_start_on_a_sphere_of_fixed_radius_does_not_depend_on_its_scale(digits):
    common = {"data": "digits", "method": "bn", "steps": 12, "width": 4, "schedule": "cosine"}
    ways = ({}, {"space": "sphere", "radius": 1.0})
    trainings = [
        asdict(Training(**common, start_scale=scale, **way))
        for way in ways
        for scale in (0.125, 1, 8)
    ]
    made = TRAIN_TOGETHER.run({"trainings": trainings, "keep": True}, Inputs(digits))
    inputs = Inputs(digits, (made.result,), (made.tensors,))
    found = result(stability.start, {"trainings": trainings, "first": 0}, inputs)["trained"]
    rest = {"trainings": trainings[4:], "first": 4}
    assert result(stability.start, rest, inputs)["trained"] == found[4:]
    plain, sphere = ([one["train_loss"] for one in side] for side in (found[:3], found[3:]))
    assert sphere == pytest.approx([sphere[1]] * 3, rel=1e-3)
    assert max(plain) - min(plain) > 0.05


def test_the_edge_of_the_usable_rates_is_found(digits):
    plan = Plan("digits", (0, 1), "quick", (2, 3))
    cell = stability._edge_cell(plan, "bn", 1)
    config = {**cell.needs[0].config, "rates": [0.03, 0.3, 3.0]}
    inputs = Inputs(digits, (result(stability.find_edges, config, Inputs(digits)),))
    both = [result(stability.edge_of, {"number": number}, inputs) for number in (0, 1)]
    assert both[0] != both[1] == result(stability.edge_of, cell.config, inputs)
    for found in both:
        assert all(0.03 <= found["edge"][space] <= 3.0 for space in ("plain", "sphere"))
        assert all(len(found["accuracy"][space]) == 3 for space in ("plain", "sphere"))


def test_every_seed_has_its_part_of_what_is_trained_together(digits):
    plan = Plan("digits", (0, 1, 2), "quick", (3,))
    cells = [stability._grid_cell(plan, "bn", seed) for seed in plan.seeds]
    (group,) = {cell.needs[0].key: cell.needs[0] for cell in cells[1:]}.values()
    trained = Inputs(digits, ({"trained": list(group.config["trainings"])},))
    for cell in cells[1:]:
        assert stability.part(cell.config, trained).result["trained"] == cell.config["trainings"]
    assert cells[0].needs[0].key != group.key  # a quick study asks one seed where few show it


@pytest.mark.parametrize(
    ("accuracies", "inside", "edge"),
    [
        ([0.9, 0.9, 0.5], [10.0], 10 * 10**0.25),  # linear in the logarithm: a quarter of the way
        ([0.5, 0.9, 0.9], [], 100.0),  # usable to the end
        ([0.1, 0.1, 0.1], [], 1.0),  # nowhere
        ([0.9, 0.1, 0.9], [], 100.0),  # the last usable one counts
    ],
)
def test_brackets_and_edges(accuracies, inside, edge):
    rates = [1.0, 10.0, 100.0]
    between = stability.bracket(rates, accuracies, 0.8, 2)
    assert len(between) == len(inside)
    assert all(10 < rate < 100 for rate in between)
    assert stability.upper_edge(rates, accuracies, 0.8) == pytest.approx(edge)


def test_spikes_are_counted_and_a_steady_rise_is_none():
    steady = [1.02**i for i in range(100)]
    assert stability.spikes(steady) == 0
    assert stability.spikes([*steady[:50], 9.0, *steady[50:]]) == 1
    assert stability.spikes([1.0] * 5) == 0
