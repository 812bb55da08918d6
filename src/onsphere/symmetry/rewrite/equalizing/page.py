"""A page about an equalized model: ranges of channels before and after, as pictures and numbers."""

from collections.abc import Sequence

from torch import Tensor

from onsphere.report import Document, Figure, Panel, Section, Series, Table
from onsphere.symmetry.rewrite.equalizing.report import EqualizeReport, WeightRanges

_PANELS = 12


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
        figures=[_figure(report)] if report.weights else [],
        tables=[_weights(report), _families(report)],
    )
    return Document(title, summary, [section], {"objective": report.objective})


def _figure(report: EqualizeReport) -> Figure:
    shown = sorted(report.weights, key=lambda w: -w.spread[0])[:_PANELS]
    left = len(report.weights) - len(shown)
    more = f" {left} more weights are in the table." if left else ""
    caption = (
        "Largest absolute entry of each output channel, from the smallest to the largest; a flat "
        "line means that all channels use the whole grid." + more
    )
    panels = [_panel(w) for w in shown]
    return Figure("ranges", "Ranges of output channels before and after", caption, panels)


def _panel(w: WeightRanges) -> Panel:
    series = [_sorted("before", w.before), _sorted("after", w.after)]
    return Panel(w.name, "channel, by range", "largest entry", series, y_scale="log")


def _sorted(label: str, ranges: Tensor) -> Series:
    found: Sequence[float] = ranges[ranges > 0].sort().values.tolist()
    return Series(label, range(len(found)), found)


def _weights(report: EqualizeReport) -> Table:
    lost = f"lost by int{report.bits}"
    columns = (
        "weight", "largest / smallest, before", "after", f"{lost}, before", f"{lost}, after"
    )  # fmt: skip
    rows = [(w.name, *w.spread, w.loss_before, w.loss_after) for w in report.weights]
    note = (
        "Lost: the share of the squared norm of an output channel that rounding loses, in the mean "
        f"over channels; signed whole numbers of {report.bits} bits, one step per {_step(report)}."
    )
    return Table("Weights", columns, rows, note)


def _step(report: EqualizeReport) -> str:
    words = {"tensor": "weight", "channel": "output channel"}
    return words.get(str(report.grid), f"{report.grid} entries")


def _families(report: EqualizeReport) -> Table:
    rows = [(", ".join(f.names), f.count, f.largest_factor) for f in report.families]
    note = "Each channel has a factor of its own; one side is multiplied by it, the other divided."
    return Table("Families of channels", ("weights", "channels", "largest factor"), rows, note)
