import math

import pytest

from onsphere.report import Panel, Series
from onsphere.report.terminal_chart import chart


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """Return the dots of a chart as (column, row), row 0 below."""
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    rows = [line.partition("┤")[2] for line in lines if "┤" in line]
    return {
        (2 * c + i, 4 * (len(rows) - r) - 1 - j)
        for r, row in enumerate(rows)
        for c, letter in enumerate(row)
        for j, pair in enumerate(bits)
        for i, bit in enumerate(pair)
        if letter != " " and ord(letter) - 0x2800 & bit
    }


def panel(*series: Series, **settings) -> Panel:
    return Panel("", "step", "y", series, **settings)


def test_a_line_goes_from_corner_to_corner():
    lines = chart(panel(Series("", [0, 39], [0.0, 39.0])), width=24, height=10)
    assert dots(lines) == {(i, i) for i in range(40)}
    assert len(lines) == 11
    assert max(map(len, lines)) <= 24


def test_a_jump_has_no_gaps():
    lines = chart(panel(Series("", [0, 10, 10.01, 20], [5.0, 5.0, 0.0, 0.0])), 30, 4)
    assert {row for _, row in dots(lines)} == set(range(16))


def test_dashed_lines_are_dotted():
    full = dots(chart(panel(Series("", [0, 9], [1.0, 1.0])), 30, 3))
    dashed = dots(chart(panel(Series("", [0, 9], [1.0, 1.0], dashed=True)), 30, 3))
    assert dashed < full
    assert len(dashed) <= len(full) / 3


def test_powers_are_straight_on_log_axes():
    x = [float(10**k) for k in range(5)]
    lines = chart(panel(Series("", x, [1 / v for v in x]), x_scale="log", y_scale="log"), 28, 5)
    places = dots(lines)
    columns = {c for c, _ in places}
    for column, row in places:
        assert abs(row - 19 * (1 - column / max(columns))) <= 1.5


def test_the_ends_of_the_axes_are_written():
    lines = chart(panel(Series("", [3, 7], [0.5, 2.5]), y_limits=(0.0, 5.0)), 40, 5)
    assert lines[0].startswith("  5 ┤")
    assert lines[2].startswith("2.5 ┤")
    assert lines[4].startswith("  0 ┤")
    assert lines[5].split() == ["3", "step", "7"]
    assert {row for _, row in dots(lines)} <= set(range(11))


@pytest.mark.parametrize(
    "series",
    [[], [Series("", [], [])], [Series("", [1], [math.nan])], [Series("", [1, 2], [math.inf] * 2)]],
)
def test_nothing_to_draw_is_said(series):
    assert chart(panel(*series)) == ["(nothing to draw)"]


def test_what_no_axis_shows_is_left_out():
    lines = chart(panel(Series("", [0, 1, 2, 3], [math.inf, 1.0, math.nan, 2.0])), 30, 4)
    assert min(c for c, _ in dots(lines)) > 5
    flat = chart(panel(Series("", [1.0], [0.0])), 30, 4)
    assert dots(flat)
