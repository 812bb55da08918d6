"""A page about a folded model: what went where, what stays, and the weights before and after."""

from onsphere.report import Document, Section, Table
from onsphere.symmetry.rewrite import page
from onsphere.symmetry.rewrite.folding.report import FoldReport


def document(report: FoldReport, title: str = "Folded norms") -> Document:
    """Return the page, to be written by :func:`onsphere.report.html.write`.

    Args:
        report: what was done.
        title: heading of the page.
    """
    lines = [line for line in str(report).splitlines() if not line.startswith("  ")]
    summary = "; ".join(lines) + "."
    folded = Table(
        "Folded",
        ("what", "kind", "into", "note"),
        [(p.name, p.kind, ", ".join(p.into), p.note) for p in report.folded],
    )
    kept = Table(
        "Not folded", ("what", "kind", "why"), [(p.name, p.kind, p.reason) for p in report.kept]
    )
    parts = Section(
        "parts",
        "What was folded, and what was not",
        "Each fold was tried in float64 at the model's own weights and at random ones, and is "
        "there only where the output stayed.",
        tables=[folded, kept],
    )
    weights = Section(
        "weights",
        "The weights before and after",
        "Folding a norm gives channels the ranges that the norm gave them. If they differ much and "
        "the weights shall be rounded to whole numbers, equalize the folded model.",
        figures=page.figures(report.weights),
        tables=[page.table(report.weights)],
    )
    return Document(title, summary, [parts, weights])
