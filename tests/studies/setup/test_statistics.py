import math

import pytest
from scipy import stats

from onsphere.studies.setup.statistics import (
    detectable,
    difference_p,
    equivalence_p,
    estimate,
    fisher_z,
    holm_levels,
    log_slope,
    look_levels,
    rank_correlation,
    seeds_needed,
    spent,
)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.1, 0.4], [5.0, -3.0, 8.0, 1.5, 2.5]])
def test_the_interval_is_student_s(values):
    found = estimate(values)
    oracle = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), rel=1e-12)
    assert (found.mean, found.count) == (pytest.approx(sum(values) / len(values)), len(values))


def test_one_value_says_nothing_about_the_spread():
    found = estimate([0.5])
    assert (found.mean, found.low, found.high, found.count) == (0.5, -math.inf, math.inf, 1)
    assert str(found) == "0.5 (one value, no interval)"


def test_equal_values_have_an_interval_of_no_width():
    found = estimate([2.0, 2.0, 2.0])
    assert found.low == found.mean == found.high == 2.0


def test_no_value_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


@pytest.mark.parametrize("exponent", [-2.0, 0.25, 0.0])
def test_the_slope_is_the_exponent(exponent):
    x = [0.5, 1.0, 3.0, 10.0]
    assert log_slope(x, [7 * v**exponent for v in x]) == pytest.approx(exponent, abs=1e-12)


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 3.0, 2.0, 5.0], [2.0, 1.0, 4.0, 3.0]), ([1.0, 1.0, 2.0], [3.0, 4.0, 4.0])]
)
def test_rank_correlation_is_spearman_s(x, y):
    oracle = stats.pearsonr(stats.rankdata(x), stats.rankdata(y)).statistic
    assert rank_correlation(x, y) == pytest.approx(oracle, abs=1e-11)


def test_nothing_tracks_a_constant():
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0.0


SAMPLES = [[0.3, 0.1, 0.4], [5.0, -3.0, 8.0, 1.5, 2.5], [0.01, -0.02, 0.0, 0.03, 0.01, -0.01]]


@pytest.mark.parametrize("values", SAMPLES)
def test_the_difference_is_student_s_test(values):
    assert difference_p(values) == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue, rel=1e-9)


@pytest.mark.parametrize("values", SAMPLES)
@pytest.mark.parametrize("margin", [0.05, 0.5, 5.0])
def test_equivalence_is_two_one_sided_tests(values, margin):
    lower = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    upper = stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert equivalence_p(values, margin) == pytest.approx(min(1.0, 2 * max(lower, upper)), rel=1e-9)


@pytest.mark.parametrize("values", SAMPLES)
@pytest.mark.parametrize("margin", [0.02, 0.2, 2.0])
@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.001])
def test_decisions_can_be_read_off_the_interval(values, margin, alpha):
    found = estimate(values, alpha)
    inside = -margin < found.low and found.high < margin
    assert (equivalence_p(values, margin) <= alpha) == inside
    assert (difference_p(values) <= alpha) == (found.low > 0 or found.high < 0)
    outside = found.low > margin or found.high < -margin
    assert (difference_p(values, margin) <= alpha) == outside


def test_one_value_or_none_decides_nothing():
    for values in ([], [3.0]):
        assert difference_p(values) == equivalence_p(values, 1.0) == 1.0


def test_holm_goes_from_the_smallest_on_and_stops():
    levels = holm_levels({"d": 0.9, "b": 0.02, "a": 0.001, "c": 0.013})
    assert levels == pytest.approx({"d": 0.05, "b": 0.025, "a": 0.0125, "c": 0.05 / 3})
    decided = {
        name
        for name, p in {"d": 0.9, "b": 0.02, "a": 0.001, "c": 0.013}.items()
        if p <= levels[name]
    }
    assert decided == {"a", "b", "c"}
    assert set(holm_levels({"a": 0.03, "b": 0.03}).values()) == {0.025}


def test_bounds_are_those_that_are_published():
    """Five even looks at 5 %, two-sided: the table of Lan and DeMets's O'Brien-Fleming bounds."""
    found = [-stats.norm.ppf(a / 2) for a in look_levels(0.05, (0.2, 0.4, 0.6, 0.8, 1.0))]
    assert found == pytest.approx([4.8769, 3.3569, 2.6803, 2.2898, 2.0310], abs=2e-4)


def test_one_look_has_all_of_the_error_rate():
    assert look_levels(0.05, (1.0,)) == pytest.approx((0.05,))
    assert spent(0.01, 1.0) == pytest.approx(0.01)


def test_all_looks_together_err_as_often_as_allowed(generator):
    import torch

    fractions = (0.25, 0.5, 1.0)
    levels = look_levels(0.2, fractions)
    steps = torch.randn(200_000, 4, generator=generator, dtype=torch.float64)
    sums = steps.cumsum(1)
    crossed = torch.zeros(len(steps), dtype=torch.bool)
    for count, level in zip((1, 2, 4), levels, strict=True):
        crossed |= (sums[:, count - 1] / count**0.5).abs() > -stats.norm.ppf(level / 2)
    assert float(crossed.double().mean()) == pytest.approx(0.2, abs=0.004)


@pytest.mark.parametrize("ended", [1, 2])
def test_a_look_that_closes_the_study_takes_what_is_left_and_no_more(generator, ended):
    import torch

    levels = look_levels(0.2, (0.25, 0.5, 1.0)[:ended], closing=True)
    assert levels[:-1] == look_levels(0.2, (0.25, 0.5, 1.0))[: ended - 1]
    sums = torch.randn(200_000, 2, generator=generator, dtype=torch.float64).cumsum(1)
    crossed = torch.zeros(len(sums), dtype=torch.bool)
    for count, level in zip((1, 2), levels, strict=False):
        crossed |= (sums[:, count - 1] / count**0.5).abs() > -stats.norm.ppf(level / 2)
    assert float(crossed.double().mean()) == pytest.approx(0.2, abs=0.004)


def test_the_seeds_needed_give_the_power_that_was_asked_for(generator):
    import torch

    needed = int(seeds_needed(0.6, 1.0, 0.05))
    draws = torch.randn(2000, needed, generator=generator, dtype=torch.float64) + 0.6
    t = draws.mean(1) / draws.std(1) * needed**0.5
    power = float((t > -stats.t.ppf(0.025, needed - 1)).double().mean())
    assert power == pytest.approx(0.8, abs=0.05)
    assert detectable(1.0, needed, 0.05) == pytest.approx(0.6, rel=0.05)
    assert seeds_needed(0.0, 1.0, 0.05) == math.inf


def test_fisher_s_transform_stays_finite():
    assert fisher_z(0.3) == pytest.approx(math.atanh(0.3))
    assert math.isfinite(fisher_z(1.0))
    assert fisher_z(-1.0) == -fisher_z(1.0)
