import pytest

from onsphere.report import Figure, Panel, Reference, Series
from onsphere.report.drawing.legend import entries, off_scale, reference_dashes
from onsphere.report.drawing.palette import METHODS, palette_of
from report.examples import ACCURACY, GROWTH, INF, NAN, ODD_PANELS


def labels(figure: Figure) -> list[str]:
    return [entry.label for entry in entries(figure, palette_of([figure]))]


def figure_of(*panels: Panel) -> Figure:
    return Figure("f", "", "", panels)


def test_small_multiples_share_one_legend():
    assert labels(GROWTH) == ["plain", "sphere", "predicted"]


def test_references_come_after_series():
    assert labels(ACCURACY) == ["plain", "sphere", "usable"]


def test_values_off_the_scale_are_explained():
    assert labels(figure_of(ODD_PANELS[4], ODD_PANELS[5]))[-3:] == [
        "infinite",
        "zero or less",
        "at zero",
    ]


def test_series_without_label_or_values_stay_out():
    series = [Series("", [1], [1]), Series("gone", [1], [NAN]), Series("empty", [], [])]
    assert labels(figure_of(Panel("", "x", "y", series))) == []


def test_line_and_points_of_one_name_become_one_entry():
    line = Panel("", "x", "y", [Series("BN", [1, 2], [1, 2])])
    points = Panel("", "x", "y", [Series("BN", [1, 2], [1, 2], style="points")])
    (entry,) = entries(figure_of(line, points), palette_of([]))
    assert entry.line
    assert entry.marker == METHODS["BN"].marker


def test_each_reference_has_its_own_dashes():
    lines = [Reference("horizontal", i, f"line {i}") for i in range(3)]
    dashes = reference_dashes(figure_of(Panel("", "x", "y", [], references=lines)))
    assert len(set(dashes.values())) == 3


@pytest.mark.parametrize(
    ("x", "y", "edge"),
    [
        (1.0, 1.0, ""),
        (1.0, NAN, ""),
        (NAN, 0.0, ""),
        (1.0, INF, "top"),
        (1.0, -INF, "bottom"),
        (1.0, 0.0, "bottom"),
        (0.0, 1.0, "left"),
        (0.0, NAN, ""),
    ],
)
def test_off_scale(x, y, edge):
    assert off_scale(Panel("", "x", "y", [], "log", "log"), x, y) == edge
