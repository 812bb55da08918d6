import math

import pytest
from scipy import stats

from onsphere.studies.setup.statistics import estimate, log_slope, rank_correlation


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
