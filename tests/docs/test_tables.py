"""Tables on a phone: too wide a one becomes a list whose cells name their column."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")
EXTENSIONS = Path(__file__).parents[2] / "docs" / "extensions"
WIDE = "| network | mean | deviation | reference | ours & theirs |\n|---|---|---|---|---|\n"
WIDE += "| certified | 0.1234 | 0.1234 | unreached | 0.1234 |\n"
NARROW = "| kind | what it means |\n|---|---|\n| gradients | an operation has no derivative |\n"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", EXTENSIONS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_longest_words_of_all_columns_count(tables):
    word = "x" * (tables.LETTERS - 2 * tables.BESIDE - 5)
    assert tables.fits([["short", word], [f"{'many words ' * 40}", "word"]])
    assert not tables.fits([["short", word + "x"], ["", ""]])
    assert tables.fits([])


@pytest.mark.filterwarnings("ignore")  # Sphinx's own
def test_a_page_has_both_kinds(tmp_path, monkeypatch):
    from sphinx.testing.util import SphinxTestApp

    monkeypatch.syspath_prepend(str(EXTENSIONS))
    (tmp_path / "conf.py").write_text("extensions = ['myst_parser', 'tables']\n")
    (tmp_path / "index.md").write_text(f"# Page\n\n{WIDE}\n\n{NARROW}")
    app = SphinxTestApp("html", srcdir=tmp_path)
    try:
        app.build()
        page = (app.outdir / "index.html").read_text(encoding="utf-8")
    finally:
        app.cleanup()
    wide, narrow = re.findall(r"<table.*?</table>", page, re.DOTALL)
    assert "rows-as-lists" in wide
    assert re.findall(r'data-column="(.*?)"', wide) == [
        "network", "mean", "deviation", "reference", "ours &amp; theirs",
    ]  # fmt: skip
    assert "rows-as-lists" not in narrow
    assert "data-column" not in narrow
