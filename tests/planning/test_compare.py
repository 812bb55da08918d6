"""A watched random walk is what its hyperparameters let expect; a wrong setting is seen."""

from dataclasses import replace

import numpy as np
import pytest
from torch.optim import SGD, AdamW

from onsphere.monitor.run import Flag, RunError
from onsphere.planning import PlanError, Schedule, text
from onsphere.planning.compare import compare
from onsphere.planning.html import comparison_document, comparison_table
from planning.watched import watched

SETTINGS = {
    "sgd": (SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "adamw": (AdamW, {"lr": 0.05, "weight_decay": 0.1, "betas": [0.9, 0.95]}),
}


@pytest.fixture(scope="module", params=SETTINGS)
def run(request):
    kind, settings = SETTINGS[request.param]
    return watched(request.param, kind, settings, Schedule(200, "cosine"), initial_norm=4.0)


def test_a_walk_is_as_expected(run):
    walk, other, dead = compare(run)
    assert walk.law in SETTINGS
    assert max(map(abs, walk.off)) < 0.04
    settled = slice(12, None)
    assert np.abs(walk.norm / walk.expected_norm - 1)[settled].max() < 0.05
    assert np.abs(walk.rotation / walk.expected_rotation - 1)[settled].max() < 0.12
    assert (other.law, dead.law) == ("", "")
    assert "no law is known" in other.why
    assert "fewer than two samples" in dead.why
    assert np.isnan(other.expected_norm).all()
    assert other.late[0] == walk.late[0]


def test_another_decay_would_not_be_as_expected(run):
    changed = replace(run, optimizer={**run.optimizer, "groups": [
        {**run.optimizer["groups"][0], "weight_decay": 1e-4}]})  # fmt: skip
    walk, *_ = compare(changed)
    assert abs(walk.off[0]) > 0.15


def test_gradients_that_grow_are_followed():
    """Twice the gradient at half of the run: with the mean alone the norm would be off."""
    kind, settings = SETTINGS["sgd"]
    run = watched("sgd", kind, settings, Schedule(200), initial_norm=2.0)
    walk, *_ = compare(run)
    grown = replace(run, samples=[
        replace(s, values=s.values * np.where(np.arange(6) == 5, 1 + (s.step > 100), 1)[:, None])
        for s in run.samples
    ])  # fmt: skip
    bent, *_ = compare(grown)
    half = len(run.samples) // 2
    assert bent.expected_norm[half - 1] == pytest.approx(walk.expected_norm[half - 1], rel=1e-2)
    assert bent.expected_norm[-1] > 1.1 * walk.expected_norm[-1]


def test_it_is_said(run):
    layers = compare(run)
    said = text.comparison_findings(layers)
    assert said[0].startswith("1 of 1 layers turn within 15%")
    assert any("no law is known" in line and line.endswith("other.") for line in said)
    table = comparison_table(layers)
    assert [row[0] for row in table.rows] == ["walk", "other", "dead"]
    shown = comparison_document(layers, "run.jsonl")
    assert [len(figure.panels) for figure in shown.sections[0].figures] == [1, 1]
    assert all(panel.series[1].dashed for f in shown.sections[0].figures for panel in f.panels)
    far = [replace(layers[0], rotation=2 * layers[0].rotation), *layers[1:]]
    assert "more than what is expected." in text.comparison_findings(far)[1]
    flagged = [replace(far[0], flags=("eps",))]
    assert "expected (flagged by the monitor: eps)." in text.comparison_findings(flagged)[1]


def test_flags_go_along(run):
    flag = Flag("eps", "walk", 5, "eps rules")
    walk, other, _ = compare(replace(run, flags=[flag, flag]))
    assert (walk.flags, other.flags) == (("eps",), ())


def test_too_few_samples(run):
    with pytest.raises(PlanError, match="1 samples; a comparison needs two"):
        compare(replace(run, samples=run.samples[:1]))


def as_law(run, law: str, **changes):
    """Return the same samples under another law."""
    layers = {"walk": {**run.layers["walk"], **changes, "law": law}}
    one = [replace(s, lrs=s.lrs[:1], values=s.values[:1]) for s in run.samples]
    return replace(run, layers=layers, samples=one)


def test_laws_by_the_monitors_names():
    kind, settings = SETTINGS["sgd"]
    run = watched("sgd", kind, settings, Schedule(100), initial_norm=2.0)
    (coupled,), (decoupled,) = (compare(as_law(run, law)) for law in ("sgd", "sgdw"))
    assert coupled.settled.rotation == pytest.approx(decoupled.settled.rotation, rel=1e-2)
    (held,) = compare(as_law(run, "sphere"))
    assert set(held.expected_norm.tolist()) == {float(held.norm[0])}
    assert np.isnan(held.expected_rotation).all()
    assert np.isfinite(held.late[2])
    assert text.comparison_findings([held]) == []
    (turned,) = compare(as_law(run, "rotation"))
    assert set(turned.expected_rotation.tolist()) == {settings["lr"]}
    (none,) = compare(as_law(run, "rmsprop"))
    assert "no law is known for SGD" in none.why


def test_muon_is_measured_in_vectors():
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
    run = watched("sgd", *SETTINGS["sgd"], Schedule(30), initial_norm=2.0)
    run = replace(run, optimizer={"name": "Muon", "groups": [settings]})
    whole, parts = (
        compare(as_law(run, "muon", shape=[64, 16], vectors=n))[0].settled for n in (1, 4)
    )
    assert parts.norm == pytest.approx(whole.norm / 2)
    matched = replace(run, optimizer={"name": "Muon", "groups": [
        {**settings, "adjust_lr_fn": "match_rms_adamw"}]})  # fmt: skip
    (found,) = compare(as_law(matched, "muon", shape=[64, 16], vectors=1))
    assert found.settled.norm == pytest.approx(whole.norm * 0.2 * 8 / 2)
    assert found.settled.rotation == whole.rotation


@pytest.mark.parametrize("key", ["shape", "vectors", "coordinates"])
def test_a_header_without_fields_is_told(key):
    settings = {"lr": 0.1, "weight_decay": 0.1}
    run = watched("sgd", SGD, settings, Schedule(20), 1.0)
    layers = {name: {k: v for k, v in one.items() if k != key} for name, one in run.layers.items()}
    with pytest.raises(RunError, match=f"no {key} of layer 'walk'"):
        compare(replace(run, layers=layers))


def test_the_command_on_a_page_is_quoted():
    settings = {"lr": 0.1, "weight_decay": 0.1}
    layers = compare(watched("sgd", SGD, settings, Schedule(20), 1.0))
    section = comparison_document(layers, "my run.jsonl").sections[0]
    assert section.command == "onsphere plan --from 'my run.jsonl'"
