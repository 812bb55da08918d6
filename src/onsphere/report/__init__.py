"""Reports: what is said (frozen data), and how it looks (pictures, one page, a terminal).

The words are here; the pictures need the extra ``onsphere[study]`` and so are imported by name::

    from onsphere.report import figures, html

    html.write(document, "report.html")
    figures.save_all(document, "figures")
"""

from typing import TYPE_CHECKING, Any

from onsphere.report.document import (
    Document,
    Figure,
    Interval,
    Outcome,
    Panel,
    Reference,
    Section,
    Series,
    Statement,
    Table,
)

if TYPE_CHECKING:
    from onsphere.report.terminal import plain_text, summary, table

__all__ = [
    "Document",
    "Figure",
    "Interval",
    "Outcome",
    "Panel",
    "Reference",
    "Section",
    "Series",
    "Statement",
    "Table",
    "plain_text",
    "summary",
    "table",
]


def __getattr__(name: str) -> Any:
    """Import what shows things in a terminal when it is first asked for: rich takes a while."""
    if name in ("plain_text", "summary", "table"):
        from onsphere.report import terminal

        return getattr(terminal, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
