"""What the legend of a figure says: one entry per look, shared by all its panels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from onsphere.report.document import Figure, Panel, Series
from onsphere.report.drawing.palette import Palette, key_of

REFERENCE_DASHES: tuple[tuple[float, ...], ...] = ((1, 2), (6, 2, 1, 2), (9, 3), (3, 1, 1, 1, 1, 1))
PREDICTION_DASHES: tuple[float, ...] = (4.5, 2)
REFERENCE_COLOR = "#707070"

# Values that an axis cannot show stand at its edge: what the legend calls them, and their arrow.
EDGES = {"top": ("infinite", "^"), "bottom": ("zero or less", "v"), "left": ("at zero", "<")}


@dataclass(frozen=True)
class Entry:
    """One line of a legend.

    Args:
        label: its text.
        color: of line, marker and band.
        line: whether a line is shown.
        dashes: lengths of ink and gap in units of the line's width; empty for a full line.
        marker: a marker in matplotlib's letters; empty for none.
        band: whether an interval is shown as a band.
    """

    label: str
    color: str
    line: bool = True
    dashes: tuple[float, ...] = ()
    marker: str = ""
    band: bool = False

    @property
    def hollow(self) -> bool:
        """Whether the marker is an outline: an arrow at the edge."""
        return bool(self.marker) and not self.line and self.color == REFERENCE_COLOR


def entries(figure: Figure, palette: Palette) -> list[Entry]:
    """List the legend of a figure in order of appearance, each name once.

    Series without a label or without a finite value stay out; values that no axis can show (see
    :func:`off_scale`) explain their arrow here.

    Example:
        >>> from onsphere.report.drawing.palette import palette_of
        >>> panel = Panel("", "x", "y", [Series("BN", [0, 1], [1, 2]), Series("", [0], [1])])
        >>> figure = Figure("f", "", "", [panel, panel])
        >>> [entry.label for entry in entries(figure, palette_of([figure]))]
        ['BN']
    """
    found: dict[tuple[object, ...], Entry] = {}
    for series in (s for panel in figure.panels for s in panel.series):
        if series.label and _has_values(series):
            entry = entry_of(series, palette)
            name = (entry.label, entry.color, entry.dashes)
            found[name] = _joined(found[name], entry) if name in found else entry
    for label, dashes in reference_dashes(figure).items():
        if label:
            found[label, "reference"] = Entry(label, REFERENCE_COLOR, dashes=dashes)
    edges = {edge for panel in figure.panels for edge in _edges(panel)}
    arrows = [edge for edge in EDGES if edge in edges]
    return [
        *found.values(),
        *(Entry(EDGES[e][0], REFERENCE_COLOR, False, (), EDGES[e][1]) for e in arrows),
    ]


def _joined(one: Entry, other: Entry) -> Entry:
    """Join the looks of a series that is a line in one panel and points in another."""
    return replace(
        one,
        line=one.line or other.line,
        marker=one.marker or other.marker,
        band=one.band or other.band,
    )


def entry_of(series: Series, palette: Palette) -> Entry:
    """Return the legend entry of one series."""
    look = palette[key_of(series)]
    return Entry(
        series.label,
        look.color,
        line=series.style != "points",
        dashes=PREDICTION_DASHES if series.dashed and series.style != "points" else (),
        marker="" if series.style == "line" else look.marker,
        band=series.style == "line" and series.low is not None,
    )


def reference_dashes(figure: Figure) -> dict[str, tuple[float, ...]]:
    """Give each label among a figure's reference lines its own dashes."""
    labels = dict.fromkeys(r.label for p in figure.panels for r in p.references)
    return {
        label: REFERENCE_DASHES[i % len(REFERENCE_DASHES)]
        for i, label in enumerate(sorted(labels, key=lambda label: not label))
    }


def off_scale(panel: Panel, x: float, y: float) -> str:
    """Say at which edge of a panel a point stands that its axes cannot show.

    Returns:
        ``"top"`` for y = +inf, ``"bottom"`` for -inf and, on a log axis, for zero and less,
        ``"left"`` for an x that a log axis cannot show; otherwise (and for ``nan``, which is a
        gap) an empty text.

    Example:
        >>> off_scale(Panel("", "x", "y", [], y_scale="log"), 1.0, 0.0)
        'bottom'
    """
    if math.isnan(y) or not math.isfinite(x):
        return ""
    if y == math.inf:
        return "top"
    if y == -math.inf or (panel.y_scale == "log" and y <= 0):
        return "bottom"
    return "left" if panel.x_scale == "log" and x <= 0 else ""


def _edges(panel: Panel) -> Iterator[str]:
    points = ((x, y) for s in panel.series for x, y in zip(s.x, s.y, strict=True))
    return (edge for x, y in points if (edge := off_scale(panel, x, y)))


def _has_values(series: Series) -> bool:
    return any(not math.isnan(y) for y in series.y)
