import math
from xml.etree import ElementTree

import pytest

from onsphere.report import Interval, Outcome, Statement
from onsphere.report.drawing.forest import WIDTH, axis_svg, forest_svg, place
from report.examples import NASTY, statement


def drawn(*intervals: Interval) -> ElementTree.Element:
    texts = dict.fromkeys(("name", "hypothesis", "quantity", "margin", "rule"), "t")
    return ElementTree.fromstring(
        forest_svg(Statement(outcome=Outcome.OPEN, intervals=intervals, **texts))
    )


def test_places_keep_the_order_and_stay_inside():
    places = [place(v) for v in (-math.inf, -30.0, -1.0, 0.0, 0.1, 1.0, 30.0, math.inf)]
    assert places == sorted(places)
    assert 0 < places[0] < places[-1] < WIDTH


def test_a_row_per_method_with_its_mean_inside_its_line():
    rows = [Interval(m, 0.5, -2.0, 3.0, Outcome.HOLDS) for m in ("BN", "LN", "WN")]
    svg = drawn(*rows)
    dots = [float(dot.attrib["cx"]) for dot in svg.iter("circle")]
    assert dots == [pytest.approx(place(0.5), abs=0.06)] * 3
    assert [text.text for text in svg.iter("text")] == ["BN", "LN", "WN"]


def test_the_outcome_can_be_read_off_the_drawing():
    """The band ends at the margin, and an interval beyond it is drawn beyond it."""
    svg = drawn(Interval("BN", 2.0, 1.5, 2.5, Outcome.HOLDS))
    (band,) = svg.iter("rect")
    end = float(band.attrib["x"]) + float(band.attrib["width"])
    line = next(
        p.attrib["d"]
        for p in svg.iter("path")
        if "stroke-width" in p.attrib and "H" in p.attrib["d"]
    )
    assert float(line.split()[0][1:]) > end


def test_what_goes_on_beyond_the_axis_has_an_arrow():
    short = drawn(Interval("BN", 0.0, -1.0, 1.0, Outcome.OPEN))
    long = drawn(Interval("BN", 0.0, -math.inf, math.inf, Outcome.OPEN))
    assert len(list(long.iter("path"))) == len(list(short.iter("path"))) + 2


def test_nothing_measured_draws_nothing():
    assert forest_svg(statement("a", Outcome.OPEN, intervals=[])) == ""


def test_hostile_text_stays_text():
    svg = forest_svg(statement(NASTY, Outcome.MIXED, hypothesis=NASTY))
    assert "<script" not in svg
    ElementTree.fromstring(svg)
    ElementTree.fromstring(axis_svg())
