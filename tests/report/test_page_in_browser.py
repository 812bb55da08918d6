import pytest

from report.browser import CHROMIUM, console_of, look
from report.examples import DOCUMENTS, page_of

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
]
PANELS = {
    name: sum(len(f.panels) for s in document.sections for f in s.figures)
    for name, document in DOCUMENTS.items()
}
CALLS_OUT = '<img alt="" src="http://127.0.0.1:9/a.png">'


@pytest.fixture(params=DOCUMENTS, scope="module")
def named_page(request) -> tuple[str, str]:
    return request.param, page_of(request.param)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_every_figure_is_drawn_and_nothing_overflows(named_page, width, tmp_path):
    name, page = named_page
    found = look(page, width, tmp_path)
    assert len(found["pictures"]) == PANELS[name]
    assert all(w > 200 and h > 100 for w, h in found["pictures"])
    assert all(count > 10 for count in found["drawn"])
    assert all(size > 11 for size in found["letters"])  # CSS pixels
    assert found["width"] <= found["view"] == width
    assert found["requests"] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_console_is_silent(name, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page_of(name), encoding="utf-8")
    assert console_of(path) == []


def test_a_request_would_be_blocked_and_heard(tmp_path):
    page = page_of("empty").replace("</main>", f"{CALLS_OUT}</main>")
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    assert any("Content Security Policy" in line for line in console_of(path))


def test_a_request_without_the_policy_would_be_counted(tmp_path):
    page = f"<!DOCTYPE html><title>t</title>{CALLS_OUT}"
    assert look(page, 360, tmp_path)["requests"] == ["http://127.0.0.1:9/a.png"]


def test_an_overflow_would_be_seen(tmp_path):
    page = '<!DOCTYPE html><title>t</title><div style="width: 500px">wide</div>'
    found = look(page, 360, tmp_path)
    assert found["width"] > found["view"]
