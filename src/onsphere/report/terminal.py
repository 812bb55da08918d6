"""Documents in a terminal: the outcomes at a glance, and tables."""

import io

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table as Lines
from rich.text import Text

from onsphere.report.document import SIGNS, Document, Table
from onsphere.report.number import column, is_numeric


def summary(document: Document) -> RenderableType:
    """Show what came out for every statement of a document's claims.

    Args:
        document: what to say.

    Returns:
        Something for ``rich.print``: title, warnings, one line per statement, then what each claim
        means for the reader.

    Example:
        >>> from rich.console import Console
        >>> Console(width=60).print(summary(Document("Norms", "", [])))
        Norms
        No claim was tested.
    """
    title = Text(document.title, style="bold")
    warnings = [Text(f"! {warning}", style="yellow") for warning in document.warnings]
    tested = [section for section in document.sections if section.statements]
    if not tested:
        return Group(title, *warnings, Text("No claim was tested."))
    lines = Lines("statement", "outcome", "measured", box=box.SIMPLE_HEAD, pad_edge=False)
    for section in tested:
        lines.add_section()
        lines.add_row(Text(section.name, style="bold"), Text(""), Text(""))
        for one in section.statements:
            sign = SIGNS[one.outcome]
            lines.add_row(
                Text(f"  {one.name}"),
                Text(f"{sign.symbol} {one.outcome.value}", style=sign.color),
                Text(one.effect),
            )
    advice = [
        Text.assemble((f"{section.name}: ", "bold"), section.advice)
        for section in tested
        if section.advice
    ]
    return Group(title, *warnings, lines, *advice)


def table(table: Table) -> Lines:
    """Show a table: numbers to the right, rounded as in the page.

    Args:
        table: title, columns and rows.

    Returns:
        A table of rich.

    Example:
        >>> rows = [["BN", 0.98], ["LN", 0.9]]
        >>> shown = table(Table("", ["norm", "accuracy"], rows))
        >>> [str(cell) for cell in shown.columns[1].cells]
        ['0.98', '0.90']
    """
    lines = Lines(
        title=Text(table.title, style="bold") if table.title else None,
        caption=Text(table.note) if table.note else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    for name, cells in zip(table.columns, columns, strict=True):
        lines.add_column(Text(name), justify="right" if is_numeric(cells) else "left")
    for texts in zip(*(column(cells) for cells in columns), strict=True):
        lines.add_row(*(Text(text) for text in texts))
    return lines


def plain_text(*shown: RenderableType, width: int) -> str:
    """Write what a terminal would show as plain text, without colours and trailing blanks.

    Args:
        shown: one below the other.
        width: of the terminal, in characters.

    Example:
        >>> plain_text(Text("clean", style="bold"), Text("robust  "), width=20).splitlines()
        ['clean', 'robust']
    """
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(Group(*shown))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
