import re
from xml.etree import ElementTree

import pytest

from onsphere.report.drawing.svg import inline_svg
from onsphere.report.figures import panels_to_svg, to_svg
from report.examples import ACCURACY, NASTY, ODD, SHORT_GROWTH

FIGURES = {"growth": SHORT_GROWTH, "accuracy": ACCURACY, "odd": ODD}


@pytest.fixture(params=FIGURES, scope="module")
def drawn(request) -> list[str]:
    figure = FIGURES[request.param]
    return [to_svg(figure), *panels_to_svg(figure, key="panels")]


def test_is_one_clean_element(drawn):
    for svg in drawn:
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert svg.startswith("<svg ")
        names = {re.sub(r"\{.*\}", "", e.tag) for e in ElementTree.fromstring(svg).iter()}
        assert not names & {"script", "style", "metadata", "foreignObject", "a"}


def test_refers_to_nothing_outside(drawn):
    for svg in drawn:
        found = [v for e in ElementTree.fromstring(svg).iter() for v in e.attrib.items()]
        assert all(v.startswith("#") for k, v in found if "href" in k)
        assert not any(k.startswith("on") for k, _ in found)
        assert set(re.findall(r"https?://[^\"]*", svg)) == {"http://www.w3.org/2000/svg"}


def test_ids_are_unique_and_every_reference_has_its_target(drawn):
    ids = re.findall(r'\bid="([^"]*)"', "".join(drawn))
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', "".join(drawn))
    assert len(ids) == len(set(ids))
    assert {a or b for a, b in used} <= set(ids)
    assert len(used) > 0


def test_says_what_it_shows(drawn):
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        named = root.attrib["aria-labelledby"].split()
        assert root.attrib["role"] == "img"
        assert [e.attrib["id"] for e in list(root)[:2]] == named


def test_text_stays_text(drawn):
    assert any("</text>" in svg for svg in drawn)
    assert not any("<script" in svg for svg in drawn)


def test_a_picture_that_calls_out_is_refused():
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'viewBox="0 0 1 1" width="1" height="1"><use xlink:href="http://example.org/a"/></svg>'
    )
    with pytest.raises(ValueError, match=r"example\.org"):
        inline_svg(drawing.encode(), "key", "", "")


def test_titles_are_escaped():
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1" width="1" height="1"/>'
    assert "<script" not in inline_svg(drawing, "key", NASTY, NASTY)
