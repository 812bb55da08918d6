import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from onsphere.report import Document, Outcome, Table
from onsphere.report.html import raised, render, write
from report.examples import (
    ACCURACY,
    DOCUMENTS,
    EMPTY,
    ORDINARY,
    SHORT_GROWTH,
    page_of,
    section,
    statement,
)

VOID = {"meta", "link", "path", "rect", "circle", "use", "image", "br"}


class Reader(HTMLParser):
    """Collects elements and text; complains about elements that are not closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(params=DOCUMENTS, scope="module")
def page(request) -> str:
    return page_of(request.param)


def test_is_well_formed(page):
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    assert [len(reader.named(tag)) for tag in ("html", "head", "body", "h1", "main")] == [1] * 5


def test_the_reader_catches_what_is_not_closed():
    with pytest.raises(AssertionError):
        Reader("<p><b>text</p>")


def test_asks_nobody_for_anything(page):
    reader = Reader(page)
    asking = {"href", "src", "srcset", "action", "data", "poster"}
    pairs = [pair for _, attrs in reader.elements for pair in attrs.items()]
    links = [value or "" for name, value in pairs if name.split(":")[-1] in asking]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"@import|@font-face|url\((?!#)", page)
    assert not {tag for tag, _ in reader.elements} & {"script", "iframe", "object", "form"}
    assert not any(name.startswith("on") for name, _ in pairs)


def test_forbids_scripts_and_requests(page):
    (policy,) = [m["content"] for m in Reader(page).named("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")


def test_ids_are_unique_and_links_have_targets(page):
    elements = Reader(page).elements
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for tag, a in elements if tag == "a"}
    labels = {i for _, a in elements for i in (a.get("aria-labelledby") or "").split()}
    assert links | labels <= set(ids)


def test_hostile_text_is_only_text():
    page = page_of("hostile")
    assert "<script" not in page
    assert "".join(Reader(page).text).count("<script>alert(1)</script>") > 20
    assert "{{ 7*7 }}" in page


@pytest.mark.parametrize("name", DOCUMENTS)
def test_equal_documents_give_equal_pages(name):
    assert render(replace(DOCUMENTS[name])) == page_of(name)


def test_everything_said_is_on_the_page():
    text = " ".join("".join(Reader(page_of("ordinary")).text).split())
    said = ["Claims, tested.", "A quick run.", "2.13.0", "projected gradient descent"]
    said += ["1 holds · 1 reversed", "1 undecided"]  # the decided ones, and what is open
    said += [value for s in ORDINARY.sections for value in (s.title, s.statement, s.prediction)]
    said += [s.advice for s in ORDINARY.sections] + ["digits, 3 seeds", "Layers disagree."]
    for one in (one for s in ORDINARY.sections for one in s.statements):
        said += [one.hypothesis, one.quantity, one.margin, one.rule, "error 3.1×10−15"]
    said += ["onsphere study stability", "How to read it.", "Bars span seeds.", "12\u2009345"]
    assert [s for s in said if " ".join(s.split()) not in text] == []


def test_every_panel_is_a_picture():
    images = [a for a in Reader(page_of("ordinary")).named("svg") if a.get("role") == "img"]
    assert len(images) == len(SHORT_GROWTH.panels) + len(ACCURACY.panels)


@pytest.mark.parametrize("symbol", ["✓", "⇄", "?"])
def test_outcomes_have_a_symbol_beside_their_color(symbol):
    assert f'<span class="symbol" aria-hidden="true">{symbol}</span>' in page_of("ordinary")


def test_numbers_stand_to_the_right_and_words_to_the_left():
    table = Table("T", ["name", "n"], [["a", 1.2e-14], ["b", None]])
    page = render(Document("", "", [section("s", tables=[table])]))
    assert '<td>a</td><td class="number">1.2×10<sup>−14</sup></td>' in page
    assert '<td>b</td><td class="number">–</td>' in page
    assert '<th scope="col" class="number">n</th>' in page


def test_long_tables_are_folded():
    assert page_of("ordinary").count("40 rows</span>") == 1
    assert page_of("ordinary").count("10 rows</span>") == 0


def test_what_is_proved_measured_and_open_is_told_apart():
    proved = statement("a", Outcome.HOLDS, basis="proved")
    document = Document(
        "", "", [section("s", statements=[proved, *ORDINARY.sections[0].statements])]
    )
    text = "".join("".join(Reader(render(document)).text).split())
    assert "Proved,andcheckedhere1holdsMeasured1holds" in text


def test_every_statement_has_its_picture_of_the_effect():
    drawn = [a for a in Reader(page_of("ordinary")).named("svg") if a.get("role") == "group"]
    assert len(drawn) == 3
    assert all("The hypothesis of" in a["aria-label"] for a in drawn)


def test_a_claim_of_others_than_the_paper_says_whose_it_is():
    asked = section("transfer", says="Asked", statements=[statement("cost", Outcome.HOLDS)])
    page = render(Document("Title", "Summary", [asked]))
    assert "<dt>Asked</dt>" in page
    assert "The paper says" not in page
    assert "The paper says" in render(ORDINARY)


def test_statements_without_intervals_have_no_axis_of_effects():
    bare = section("a", statements=[statement("b", Outcome.HOLDS, intervals=[])])
    page = render(Document("Title", "Summary", [bare]))
    assert "effect in units of the margin" not in page
    assert "effect in units of the margin" in render(ORDINARY)


def test_a_page_without_claims_says_so():
    assert "No claim was tested." in page_of("empty")


def test_rows_of_another_width_are_refused():
    table = Table("T", ["a", "b"], [[1]])
    with pytest.raises(ValueError, match="2 columns and a row of 1 cells"):
        render(Document("", "", [section("s", tables=[table])]))


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("10⁻¹²", "10<sup>−12</sup>"),
        ("|w|² < ∞", "|w|<sup>2</sup> &lt; ∞"),
        ("<b>", "&lt;b&gt;"),
        ("x₁", "x₁"),
    ],
)
def test_raised(text, markup):
    assert raised(text) == markup


def test_write(tmp_path):
    path = write(ORDINARY, tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == page_of("ordinary")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_write_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write(EMPTY, tmp_path / "file" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_table_with_explanations_names_its_cells_for_a_phone():
    """On a narrow screen its rows become lists, so the column that explains stays on it."""
    long = "a sentence that is longer than a cell of a table on a phone"
    explained = Table("T", ["name", "what it means"], [["a", long]])
    page = render(Document("", "", [section("s", tables=[explained])]))
    assert 'class=" explained"' in page
    assert f'<td data-column="what it means" class="wide">{long}</td>' in page
    assert "content: attr(data-column)" in page
    plain = render(Document("", "", [section("s", tables=[Table("T", ["name"], [["a"]])])]))
    assert "data-column=" not in plain
