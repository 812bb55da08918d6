import math

import pytest

from onsphere.report.number import column, is_numeric, number, power

THIN = "\u2009"


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        ("BN", "BN"),
        ("", ""),
        (True, "yes"),
        (0, "0"),
        (0.0, "0"),
        (-0.0, "0"),
        (-3, "−3"),
        (9999, "9999"),
        (12345, f"12{THIN}345"),
        (1234567890, f"1{THIN}234{THIN}567{THIN}890"),
        (10**15, "10¹⁵"),
        (0.98765, "0.9877"),
        (0.5, "0.5"),
        (200.0, "200"),
        (1234.56, "1235"),
        (54321.9, f"54{THIN}322"),
        (999999.7, "10⁶"),
        (0.001, "0.001"),
        (0.0009994, "9.99×10⁻⁴"),
        (0.0009999999, "0.001"),
        (1.2e-14, "1.2×10⁻¹⁴"),
        (-1.234e-14, "−1.23×10⁻¹⁴"),
        (1e-13, "10⁻¹³"),
        (6.02214e23, "6.02×10²³"),
        (5e-324, "4.94×10⁻³²⁴"),
    ],
)
def test_number(cell, text):
    assert number(cell) == text


@pytest.mark.parametrize(
    ("cells", "texts"),
    [
        ([0.98, 0.9, 0.1234, 0.0], ["0.9800", "0.9000", "0.1234", "0"]),
        ([0.1, 0.2, None], ["0.1", "0.2", "–"]),
        ([10.0, 2.5, math.nan], ["10.0", "2.5", "–"]),
        ([12.3456, -1.0], ["12.35", "−1.00"]),
        ([1.0, 1e-5], ["1", "10⁻⁵"]),
        ([1000.0, 0.5], ["1000", "0.5"]),
        ([1, 2.5, "x"], ["1", "2.5", "x"]),
        ([1 / 3, 2 / 3], ["0.3333", "0.6667"]),
        ([], []),
    ],
)
def test_column_shares_decimals(cells, texts):
    assert column(cells) == texts


def test_power():
    assert [power(e) for e in (0, 12, -305)] == ["10⁰", "10¹²", "10⁻³⁰⁵"]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [([1, None, 2.5], True), ([math.nan], True), ([1, "a"], False), ([None], False), ([], False)],
)
def test_is_numeric(cells, expected):
    assert is_numeric(cells) is expected
