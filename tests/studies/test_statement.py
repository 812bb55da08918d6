"""How often a claim's outcomes are wrong, by simulation, and what the levels of a decision are."""

from types import SimpleNamespace

import numpy as np
import pytest

from onsphere.report.document import Outcome
from onsphere.studies.claims.plan import Plan
from onsphere.studies.claims.statement import Statement, decide

RUNS = 300
MOST = 0.05 + 3 * (0.05 * 0.95 / RUNS) ** 0.5
"""Share of wrong runs that chance explains where it is 5 %."""


def statements(count, kind="difference"):
    return [
        Statement(
            f"s{i}", "", "", 1.0, lambda _: ("bn",),
            lambda _plan, _method, seed, i=i: [SimpleNamespace(key=(i, seed))],
            lambda records: [r["v"] for (r,) in records], kind,
        )
        for i in range(count)
    ]  # fmt: skip


def outcomes(means, spread, looks, generator, kind="difference"):
    """Decide one claim of comparisons with these true means."""
    results = {
        (i, seed): {"v": value}
        for i, mean in enumerate(means)
        for seed, value in enumerate(generator.normal(mean, spread, looks[-1]))
    }
    plan = Plan("digits", tuple(range(looks[-1])), looks=looks)
    decided = decide(statements(len(means), kind), plan, results)
    return [d.outcome for d in decided.values()]


def wrong(outcome, mean, kind):
    if kind == "agreement":
        return outcome == (Outcome.HOLDS if abs(mean) >= 1 else Outcome.REVERSED)
    if outcome == Outcome.ABSENT:
        return abs(mean) >= 1
    return outcome == (Outcome.HOLDS if mean <= 0 else Outcome.REVERSED)


@pytest.mark.parametrize(
    ("means", "spread", "looks", "kind"),
    [
        pytest.param([1.0] * 24, 1.0, (20,), "difference", id="at the margin"),
        pytest.param([1.0] * 12, 0.5, (8,), "difference", id="at the margin, fewer seeds"),
        pytest.param([0.0] * 12, 0.5, (8,), "difference", id="no effect"),
        pytest.param([0.0, 1.0] * 6, 0.6, (8,), "difference", id="half of them"),
        pytest.param([0.0, 1.0] * 4, 1.0, (4, 8, 16), "difference", id="several looks"),
        pytest.param([1.0] * 12, 0.6, (8,), "agreement", id="agreement at the margin"),
        pytest.param([1.5] * 12, 0.6, (8,), "agreement", id="beyond the margin"),
    ],
)
def test_a_claim_is_wrong_in_one_of_twenty_runs_at_most(means, spread, looks, kind):
    generator, bad = np.random.default_rng(0), 0
    for _ in range(RUNS):
        found = outcomes(means, spread, looks, generator, kind)
        bad += any(wrong(o, mean, kind) for o, mean in zip(found, means, strict=True))
    assert bad / RUNS <= MOST


def test_what_one_test_has_decided_still_counts_for_the_other():
    """Twenty-three effects that hold leave the level at which the last is called absent alone."""
    plan = Plan("digits", tuple(range(20)))
    clear = {(i, s): {"v": 3.0 + 0.01 * (s % 2)} for i in range(1, 24) for s in range(20)}
    last = {(0, s): {"v": 0.62 * (-1) ** s} for s in range(20)}
    found = decide(statements(24), plan, clear | last)
    level = found["s0", "bn"].level
    assert found["s1", "bn"].outcome == Outcome.HOLDS
    assert level == pytest.approx(0.05 / 24)  # of 24 that may lie inside; that of 1 is 0.025
    alone = decide(statements(1), plan, last)
    assert alone["s0", "bn"].level == pytest.approx(0.05)
    assert alone["s0", "bn"].outcome == Outcome.ABSENT


def test_the_interval_tells_the_outcome():
    generator = np.random.default_rng(1)
    plan = Plan("digits", tuple(range(8)))
    seen = set()
    for mean in np.linspace(-2, 2, 60):
        values = {(0, s): {"v": v} for s, v in enumerate(generator.normal(mean, 0.5, 8))}
        for kind in ("difference", "agreement"):
            (found,) = decide(statements(1, kind), plan, values).values()
            low, high = found.estimate.low, found.estimate.high
            inside, beyond = max(-low, high) < 1, low > 0 or high < 0
            if kind == "agreement":
                beyond = low > 1 or high < -1
            expected = {"inside": inside, "beyond": beyond and not inside, "": not beyond}
            assert expected[found.met], (found, kind)
            seen.add((kind, found.met))
    assert len(seen) == 6


def test_seeds_that_are_said_to_decide_do():
    """At a mean of 0 both ends of the margin are passed with the chance that is asked for."""
    generator, plan = np.random.default_rng(2), Plan("digits", tuple(range(4)))
    few = {(0, s): {"v": v} for s, v in enumerate((1.2, -1.2, 0.9, -0.9))}
    (open_,) = decide(statements(1), plan, few).values()
    spread = np.std([1.2, -1.2, 0.9, -0.9], ddof=1)
    decided = [
        outcomes([0.0], spread, (int(open_.needed),), generator)[0] == Outcome.ABSENT
        for _ in range(RUNS)
    ]
    assert np.mean(decided) > 0.75
