import io

import pytest
from rich.console import Console

from onsphere.report import Table, summary, table
from report.examples import EMPTY, HOSTILE, NAN, NASTY, ORDINARY, WIDE


def printed(thing: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


def test_summary_has_a_line_per_statement_and_what_it_means():
    text = printed(summary(ORDINARY))
    lines = [line.split() for line in text.splitlines() if "error 3.1×10⁻¹⁵" in line]
    assert [" ".join(words) for words in lines] == [
        "statement growth ✓ holds error 3.1×10⁻¹⁵",
        "statement stability ⇄ reversed error 3.1×10⁻¹⁵",
        "statement gain ? undecided error 3.1×10⁻¹⁵",
    ]
    assert "stability: The advice of stability" in text
    assert "! A quick run." in text


def test_an_empty_document_says_so():
    assert "No claim was tested." in printed(summary(EMPTY))


@pytest.mark.parametrize("width", [20, 40, 200])
def test_hostile_text_is_shown_as_it_is(width):
    assert "alert(1)" in printed(summary(HOSTILE), max(width, 40))
    rows = table(Table("[red]t[/red]", ["[bold]a"], [["[link=x]b[/nothing]"]], "[c]"))
    shown = printed(rows, 200)
    assert all(text in shown for text in ("[red]t[/red]", "[bold]a", "[link=x]b[/nothing]", "[c]"))


def test_numbers_line_up_on_the_right():
    rows = table(Table("", ["m", "accuracy"], [["BN", 0.98], ["LN", 0.9], ["GN", NAN]]))
    lines = [line.rstrip() for line in printed(rows).splitlines() if line.strip()]
    assert [line[-4:].strip() for line in lines[2:]] == ["0.98", "0.90", "–"]
    assert len({len(line) for line in lines[2:]}) == 1


def test_wide_and_nasty_tables_are_printed():
    assert "column" in printed(table(WIDE), 400)
    assert "alert(1)" in printed(table(Table(NASTY, [NASTY], [[NASTY]])), 200)
