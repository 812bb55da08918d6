import pytest
from hypothesis import given
from hypothesis import strategies as st

from onsphere.report.drawing.panel import DecadeText, TickText, log_ticks


@given(st.floats(-300, 299), st.floats(0.01, 600))
def test_log_axes_have_a_few_ticks_inside_their_limits(exponent, decades):
    low, high = 10.0**exponent, 10.0 ** min(exponent + decades, 305)
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))
    assert low * 0.999999 <= ticks[0] <= ticks[-1] <= high * 1.000001


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ([-1.0, 0.0, 1.0], ["−1", "0", "1"]),
        ([0.1, 0.2, 0.30000000000000004], ["0.1", "0.2", "0.3"]),
        ([-1e-17, 0.5], ["0.0", "0.5"]),
        ([0.0, 2e-5, 4e-5], ["0", "2×10⁻⁵", "4×10⁻⁵"]),
        ([0.0, 2e5], ["0", "200\u2009000"]),
        ([97.5, 100.0], ["97.5", "100.0"]),
        ([], []),
    ],
)
def test_linear_ticks(values, texts):
    assert TickText().format_ticks(values) == texts


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.01, 0.1, 1.0, 1000.0], ["0.01", "0.1", "1", "1000"]),
        ([1e-4, 1e-3, 1e-2], ["10⁻⁴", "10⁻³", "10⁻²"]),
        ([1e-5, 3e-5, 1e-4], ["10⁻⁵", "3×10⁻⁵", "10⁻⁴"]),
    ],
)
def test_log_ticks_are_written_alike(values, texts):
    assert DecadeText().format_ticks(values) == texts
