"""The evidence: what trials say is read off right, and a small run goes through and is kept."""

import math
from dataclasses import replace

import pytest
import torch
from benchmarks.evidence import outcome, summary, text, tuning
from benchmarks.evidence.gpt import GPT
from benchmarks.evidence.problem import KINDS
from benchmarks.evidence.run import Run, factor, optimizer_for, train
from benchmarks.evidence.tuning import SPACES, Bench, Found, Trial

import onsphere as osp
from onsphere.studies.engine.job import Cell, Inputs, Outcome, Task
from onsphere.studies.engine.store import Store
from onsphere.studies.setup.data import Source

_LINES = "".join(f"Enter {n} messengers. " for n in range(400))


def _characters(_config, _inputs):
    alphabet = sorted(set(_LINES))
    numbers = torch.tensor([alphabet.index(c) for c in _LINES], dtype=torch.uint8)
    return Outcome({"characters": len(_LINES), "alphabet": len(alphabet)}, {"text": numbers})


@pytest.fixture(scope="module")
def inputs():
    made = _characters({}, None)
    return Inputs(Source("digits").load(), (made.result,), (made.tensors,))


def _run(kind, space, seed=0, **changes):
    row = KINDS[kind]
    angle = 0.05 if space == "rotation" else None
    width = 32 if kind == "gpt" else 4
    run = Run(kind, space, row.rates[2], row.decays[1], angle, seed, 4, width, 4)
    return replace(run, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_spaces_start_alike_see_the_same_data_and_end_apart(kind, inputs):
    results = {space: train(vars(_run(kind, space)), inputs).result for space in SPACES}
    assert len({tuple(r["curve"][0]) for r in results.values()}) == 1
    assert len({r["loss"] for r in results.values()}) == len(SPACES)
    assert results["plain"]["on_spheres"] == 0
    for space in tuning.OURS:
        assert results[space]["on_spheres"] > results[space]["parameters"] / 3


@pytest.mark.parametrize("space", tuning.OURS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_spheres_keep_their_lengths_and_turn_as_told(kind, space, inputs):
    run = _run(kind, space)
    problem = KINDS[kind].make(run.width, run.batch, run.seed, inputs)
    optimizer, count = optimizer_for(run, problem)
    if space == "wrapped":
        held = [p for one in optimizer.constrained for p in one.params]
    else:
        groups = [g for g in optimizer.param_groups if g["sphere"] is not None]
        held = [p for g in groups for p in g["params"]]
    assert count == sum(p.numel() for p in held) > 0
    before = [p.detach().clone() for p in held]
    x, y = next(problem.batches)
    torch.nn.functional.cross_entropy(problem.model(x).flatten(0, -2), y.flatten()).backward()
    optimizer.step()
    after = [p.detach() for p in held]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new.norm(), old.norm())
        if space == "rotation":
            cosine = torch.nn.functional.cosine_similarity(old.flatten(), new.flatten(), dim=0)
            assert float(cosine) == pytest.approx(math.cos(0.05), abs=1e-5)


def test_the_audit_puts_every_hidden_matrix_of_the_gpt_on_spheres_and_nothing_else():
    model = GPT(11, context=8, width=32, heads=2, depth=1)
    audit = osp.audit(model, (torch.arange(16).reshape(2, 8) % 11,))
    groups = audit.param_groups(model)
    names = {n.split(".")[-2] for g in groups if g["sphere"] is not None for n in g["names"]}
    assert names == {"query", "key", "value", "out", "up", "down"}


def test_the_gpt_does_not_see_the_future():
    model = GPT(11, context=8, width=32, heads=2, depth=2)
    x = torch.arange(8)[None] % 11
    changed = torch.where(torch.arange(8) < 5, x, 10)
    torch.testing.assert_close(model(x)[:, :5], model(changed)[:, :5])
    assert not torch.allclose(model(x)[:, 5:], model(changed)[:, 5:])


def test_rates_rise_and_fall_to_nothing():
    factors = [factor(step, 100) for step in range(101)]
    assert max(factors) == factors[5] == 1.0
    assert factors[:5] == sorted(factors[:5])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[100] == pytest.approx(0.0)


def test_the_three_parts_of_the_text_do_not_overlap():
    parts = text.split(torch.arange(1000))
    assert [len(part) for part in parts] == [900, 50, 50]
    assert torch.equal(torch.cat(parts), torch.arange(1000))
    found = text.windows(parts[1], 7, 5)
    assert found.shape == (5, 8)
    assert found.min() >= 900
    assert found.max() < 950


def test_another_text_is_refused(tmp_path):
    with pytest.raises(osp.errors.OnsphereError, match="put the published"):
        text.read(tmp_path)
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("To be")
    with pytest.raises(osp.errors.OnsphereError, match="has SHA-256"):
        text.read(tmp_path)


def test_a_diverged_run_is_a_record_without_a_loss(inputs):
    record = train(vars(_run("conv", "plain", lr=1e30)), inputs).result
    assert record["loss"] is None
    assert Trial(_run("conv", "plain"), record).loss == math.inf


def _trial(space, seed, loss, lr=1.0, decay=0.0):
    run = _run("gpt", space, seed, lr=lr, weight_decay=decay)
    if space == "rotation":
        run = replace(run, rotation=lr)
    curve = [[0, 4.0], [2, (4.0 + loss) / 2], [4, loss]]
    record = {"curve": curve, "loss": loss, "test_loss": loss, "test_accuracy": 0.5}
    return Trial(run, record | {"on_spheres": 3, "parameters": 4})


def _found(losses=(2.0, 1.401, 1.402, 1.4), outside=2.0, slower=1.1):
    """Three rates per space, best in the middle; fresh seeds differ a little."""
    grid, fresh = {}, {}
    for space, loss in zip(SPACES, losses, strict=True):
        rates = ((0.1, outside), (1.0, loss), (10.0, outside))
        grid[space] = [_trial(space, 0, value, lr) for lr, value in rates]
        fresh[space] = [_trial(space, seed, loss + 0.01 * seed) for seed in (1, 2, 3)]
    chosen = {space: tuning.best(trials) for space, trials in grid.items()}
    ratio = {"ours_ms": 5.0, "ratio": slower, "low": 1.0, "high": 1.2}
    names = [f"{s}, {w} step" for s in SPACES[1:] for w in ("training", "optimizer")]
    return Found("gpt", grid, chosen, fresh, dict.fromkeys(names, ratio))


class _Measured:
    """A bench whose losses are known: lowest at a rate of 0.3 and a decay of 0.1."""

    def __init__(self):
        self.made = 0

    def each(self, lists):
        self.made += 1
        return [[Trial(r, {"loss": self._loss(r)}) for r in runs] for runs in lists]

    def _loss(self, run):
        return abs(math.log(run.swept / 0.3)) + abs(run.weight_decay - 0.1)


@pytest.mark.parametrize("rates", [(0.01, 0.02), (1.0, 2.0), (0.02, 1.0)])
def test_a_grid_is_widened_until_its_best_lies_inside(rates):
    starts = [_run("conv", "plain", lr=r, weight_decay=d) for r in rates for d in (0.0, 0.03)]
    (trials,) = tuning.search(_Measured(), starts)
    best, swept = tuning.best(trials).run, sorted({trial.swept for trial in trials})
    assert swept[0] < best.lr < swept[-1] or rates == (0.02, 1.0)
    assert 0.0 < best.weight_decay < max(trial.run.weight_decay for trial in trials)
    assert len(trials) == len(swept) * len({trial.run.weight_decay for trial in trials})


def test_steps_to_a_loss_are_interpolated():
    trial = _trial("rate", 1, 2.0)
    assert outcome.steps_to(trial, 2.5) == pytest.approx(3.0)
    assert outcome.steps_to(trial, 4.5) == 0.0
    assert outcome.steps_to(trial, 1.9) is None


def test_diverged_rates_are_not_usable():
    assert outcome.usable([0.1, 1.0, 10.0], [math.inf, 1.0, math.inf], 1.0).decades == 0.0
    assert outcome.usable([0.1, 1.0, 10.0], [1.0, 1.0, 2.0], 1.0).open


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (_found(), "holds"),
        (_found(losses=(2.0, 1.4, 1.4, 2.5)), "differs"),
        (_found(losses=(1.5, 2.0, 2.0, 2.5), outside=3.0), "absent"),
    ],
)
def test_the_outcome_follows_the_records(found, outcome):
    section = summary.section(found, "python -m benchmarks.evidence")
    assert section.statements[0].outcome == outcome
    assert repr(section) == repr(summary.section(found, "python -m benchmarks.evidence"))


def test_what_does_not_help_is_said_first():
    findings = summary.section(_found(losses=(1.5, 2.0, 2.0, 1.4)), "").findings
    assert "higher than" in findings[0]
    assert "1.10 of the base's time" in " ".join(findings[:4])


@pytest.mark.slow
def test_a_small_run_goes_through_and_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FRESH_SEEDS", (1, 2))
    row = replace(
        KINDS["conv"], images="digits", rates=(0.05, 0.1), decays=(0.0,), rotations=(0.05,)
    )
    monkeypatch.setitem(KINDS, "conv", row)
    monkeypatch.setattr(tuning, "_FINEST", 1.0)  # nothing is widened
    reports = []
    text_cell = Cell(Task("text", 1, _characters), {})
    bench = Bench(Store(tmp_path), {"digits": Source("digits")}, text_cell, 1, reports.append, 3, 4)
    found = tuning.tune(bench, "conv")
    assert {space: len(trials) for space, trials in found.grid.items()} == {
        "plain": 2,
        "rate": 2,
        "wrapped": 2,
        "rotation": 1,
    }
    assert [trial.run.seed for trial in found.fresh["rate"]] == [1, 2]
    assert found.grid["rotation"][0].run.lr == found.chosen["plain"].run.lr
    assert found.timing["rate, training step"]["ratio"] > 0
    page = summary.document([found], "python -m benchmarks.evidence")
    assert len(page.sections[0].figures) == 2
    made = len(reports)
    assert tuning.tune(bench, "conv") == found
    assert len(reports) == made
