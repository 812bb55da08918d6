"""Every law of the mean against random walks under real optimizers."""

import pytest
import torch
from benchmarks import laws

from onsphere import dynamics as dyn
from onsphere.dynamics.autocorrelation import Memory, arcsine, polar


def check(measured):
    failed = [f"{m.law}, {m.quantity}: {m.off:+.1%}" for m in measured if not m.holds]
    assert not failed, failed


@pytest.mark.parametrize("walk", laws.WALKS, ids=lambda w: w.name)
def test_settles_where_the_law_says(walk):
    check(laws.settles(walk, lengths=6))


@pytest.mark.parametrize("walk", laws.MATRICES[:3], ids=lambda w: w.name)
def test_muon_settles_by_the_polar_law(walk):
    check(laws.settles(walk, lengths=2))


def test_without_the_shape_muon_turns_faster_than_the_law():
    turned, _ = laws.settles(laws.MATRICES[3], lengths=2)
    assert 0.1 < turned.off < 0.25


def test_the_published_law_of_lion_is_off():
    """By a third where the memory of the average is as long as the weight's."""
    turned, norm = laws.settles(laws.PUBLISHED[0], lengths=6)
    assert 0.25 < turned.off < 0.4
    assert -0.35 < norm.off < -0.2


def test_a_wrong_law_is_seen():
    walk = laws.WALKS[0]
    wrong = walk.settled._replace(rotation=1.02 * walk.settled.rotation)
    turned, norm = laws.settles(laws.Walk("wrong", wrong, walk.make), lengths=6)
    assert not turned.holds
    assert norm.holds


@pytest.mark.parametrize("walk", laws.RELAXING, ids=lambda w: w.name)
@pytest.mark.parametrize("away", [0.5, 2.0])
def test_relaxes_at_the_rate(walk, away):
    check(laws.relaxes(walk, away=away))


@pytest.mark.parametrize("pair", laws.DROPPING, ids=lambda p: p[0].name)
def test_rate_drops(pair):
    check(laws.drops(*pair, ways=6))


def test_growth_without_decay():
    check(laws.grows())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("walk", laws.WALKS, ids=lambda w: w.name)
def test_settles_for_long(walk, seed):
    check(laws.settles(walk, seed, lengths=40))


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.9), (0.25, 0.5), (0.5, 0.0)])
def test_memory_is_the_filters_autocorrelation(betas):
    blend, keep = betas
    memory = Memory(blend, keep)
    weights = torch.cat(
        [torch.tensor([1 - blend]), blend * (1 - keep) * keep ** torch.arange(4000.0)]
    ).double()
    assert memory.power == pytest.approx(float(weights @ weights), rel=1e-6)
    for lag, got in enumerate(memory.correlations()[:20], 1):
        expected = float(weights[lag:] @ weights[:-lag]) / memory.power
        assert float(got) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("shape", [(48, 48), (32, 64), (24, 96)])
@pytest.mark.parametrize("correlation", [0.2, 0.6, 0.9, 0.97])
def test_polar_response_of_matrices(shape, correlation, generator):
    a, b = torch.randn(2, 20, *shape, generator=generator, dtype=torch.float64)
    b = correlation * a + (1 - correlation**2) ** 0.5 * b
    factors = [u @ v for u, _, v in (torch.linalg.svd(x, full_matrices=False) for x in (a, b))]
    measured = float((factors[0] * factors[1]).sum((1, 2)).mean()) / min(shape)
    given = torch.tensor(correlation, dtype=torch.float64)
    assert abs(measured - float(polar(*shape)(given))) < 0.02
    assert abs(measured - float(arcsine(given))) > 0.01


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("shrink", [1e-8, 1e-3, 0.3])
def test_adamw_has_its_closed_form(beta1, shrink):
    law = dyn.adamw_equilibrium(lr=0.1, weight_decay=10 * shrink, betas=(beta1, 0.999))
    a = 1 - shrink
    sine = ((1 - a**2) * (1 - beta1**2)) ** 0.5 / (1 + a * beta1)
    assert torch.tensor(law.rotation).sin().item() == pytest.approx(sine, rel=1e-6)
    square = 0.01 * (1 - beta1) / (1 + beta1) * (1 + a * beta1) / ((1 - a**2) * (1 - a * beta1))
    assert law.norm == pytest.approx(square**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: dyn.adamw_equilibrium(lr=1.0, weight_decay=1.0), "leaves nothing"),
        (lambda: dyn.adamw_equilibrium(lr=1.0, weight_decay=0.0), "no equilibrium"),
        (lambda: dyn.lion_equilibrium(lr=0.1, weight_decay=0.1, betas=(0.9, 1.0)), "are in"),
        (lambda: dyn.muon_equilibrium(lr=0.1, weight_decay=0.1, shape=(0, 4)), "at least one row"),
        (lambda: dyn.rising_rates(lr=1.0, weight_decay=0.1, momentum=0.9, steps=1), "oscillate"),
        (lambda: dyn.effective_lr(0.1, 1.0, degree=3), "degree is 2"),
    ],
)
def test_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
