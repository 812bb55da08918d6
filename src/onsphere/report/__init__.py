"""Reports: what is said (frozen data), and how it looks (pictures, one page, a terminal).

The words are here; the pictures need the extra ``onsphere[study]`` and so are imported by name::

    from onsphere.report import draw, page

    page.write(document, "report.html")
    draw.save_all(document, "figures")
"""

from onsphere.report.document import (
    Document,
    Figure,
    Panel,
    Reference,
    Section,
    Series,
    Table,
    Verdict,
)
from onsphere.report.terminal import summary, table

__all__ = [
    "Document",
    "Figure",
    "Panel",
    "Reference",
    "Section",
    "Series",
    "Table",
    "Verdict",
    "summary",
    "table",
]
