"""A page about an equalized model: ranges of channels before and after, as pictures and numbers."""

from onsphere.report import Document, Section, Table
from onsphere.symmetry.rewrite import page
from onsphere.symmetry.rewrite.equalizing.report import EqualizeReport


def document(report: EqualizeReport, title: str = "Equalized channels") -> Document:
    """Return the page, to be written by :func:`onsphere.report.html.write`.

    Args:
        report: what was done.
        title: heading of the page.
    """
    summary = str(report).splitlines()[0] + ". "
    if report.weights:
        worst = max(w.spread[0] for w in report.weights)
        now = max(w.spread[1] for w in report.weights)
        summary += (
            f"The largest range of a weight's output channels was up to {worst:.3g} times the "
            f"smallest, and is up to {now:.3g} times now. The function is the same "
            f"({' and '.join(report.modes)} mode): the output moved by {report.change:.1e}."
        )
    section = Section(
        "ranges",
        "Ranges by channel",
        "A common step for all entries of a weight is as coarse as its largest channel is large: "
        "what lies below half a step is lost.",
        figures=page.figures(report.weights),
        tables=[page.table(report.weights, report.bits, _step(report)), _families(report)],
    )
    return Document(title, summary, [section], {"objective": report.objective})


def _step(report: EqualizeReport) -> str:
    words = {"tensor": "weight", "channel": "output channel"}
    return words.get(str(report.grid), f"{report.grid} entries")


def _families(report: EqualizeReport) -> Table:
    rows = [(", ".join(f.names), f.count, f.largest_factor) for f in report.families]
    note = "Each channel has a factor of its own; one side is multiplied by it, the other divided."
    return Table("Families of channels", ("weights", "channels", "largest factor"), rows, note)
