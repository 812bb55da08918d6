"""Tables on a phone: where the columns do not fit side by side, each row becomes a list.

A table whose longest words need more room than a phone has gets the class ``rows-as-lists``, and
each of its cells the name of its column, which the style sheet writes before it. So no column
leaves the screen and no word is cut into letters. On a wider screen nothing changes.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.writers.html5 import HTML5Translator

LETTERS = 44  # that fit side by side at 390 pixels
BESIDE = 2  # what stands between two columns, in letters


def fits(rows: Sequence[Sequence[str]]) -> bool:
    """Tell whether the words of a table fit side by side on a phone.

    Args:
        rows: the texts of its cells, the heading among them.

    Example:
        >>> fits([["kind", "what it means"], ["gradients", "an operation has no derivative"]])
        True
        >>> fits([["norm", "clean", "reference", "ours", "ratio", "difference", "seconds"]])
        False
    """
    width = max((len(row) for row in rows), default=0)
    columns = [[row[i] for row in rows if i < len(row)] for i in range(width)]
    longest = (max(len(w) for text in cells for w in (*text.split(), "")) for cells in columns)
    return sum(longest) + BESIDE * width <= LETTERS


class Tables(SphinxPostTransform):
    """Marks the tables that do not fit, and says in each cell which column it is of."""

    default_priority = 900

    def run(self, **_: Any) -> None:
        """Look at every table of a page."""
        for table in self.document.findall(nodes.table):
            rows = [list(_entries(row)) for row in table.findall(nodes.row)]
            if fits([[entry.astext() for entry in row] for row in rows]):
                continue
            table["classes"].append("rows-as-lists")
            head = table.next_node(nodes.thead)
            first = head.next_node(nodes.row) if head is not None else None
            names = [entry.astext() for entry in _entries(first)] if first is not None else []
            for row in rows:
                for name, entry in zip(names, row, strict=False):
                    entry["column"] = " ".join(name.split())


def _entries(row: nodes.row) -> Iterator[nodes.entry]:
    return (child for child in row.children if isinstance(child, nodes.entry))


def _open(translator: HTML5Translator, node: nodes.entry) -> None:
    HTML5Translator.visit_entry(translator, node)
    if node.get("column") and translator.body[-1].startswith("<td"):
        named = f'<td data-column="{escape(node["column"])}"'
        translator.body[-1] = translator.body[-1].replace("<td", named, 1)


def _close(translator: HTML5Translator, node: nodes.entry) -> None:
    HTML5Translator.depart_entry(translator, node)


def setup(app: Sphinx) -> dict[str, Any]:
    """Look at the tables of every page."""
    app.add_post_transform(Tables)
    app.add_node(nodes.entry, override=True, html=(_open, _close))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
