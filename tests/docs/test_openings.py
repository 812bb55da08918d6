"""Every page begins with what it is good for, in prose: not with a command, a table or a list."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    page
    for folder in ("how-to", "tutorials", "explanation", "results")
    for page in (DOCS / folder).glob("*.md")
    if page.name != "index.md"
)


def opening(text: str) -> str:
    """Return what follows the title, up to an empty line."""
    title, _, rest = text.partition("\n")
    assert title.startswith("# ")
    return rest.strip("\n").partition("\n\n")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_a_page_begins_with_what_it_means_for_a_training(page):
    begins = opening(page.read_text(encoding="utf-8"))
    assert re.match(r"[A-Z]", begins)
    assert re.search(r"\b(train|run\b|runs\b|network|weight|model|layers)", begins), begins


def test_an_opening_of_commands_is_seen():
    assert not re.match(r"[A-Z]", opening("# Title\n\n    onsphere study\n\nText.\n"))
