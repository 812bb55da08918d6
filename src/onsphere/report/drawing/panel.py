"""One panel on one pair of axes: series, intervals, references, ticks, and what cannot be shown."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere._utils.optional import missing_extra
from onsphere.report.document import Panel, Reference, Scale, Series
from onsphere.report.drawing.legend import EDGES, PREDICTION_DASHES, REFERENCE_COLOR, off_scale
from onsphere.report.drawing.palette import Palette, key_of
from onsphere.report.number import clean, number, power

try:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.ticker import (
        FixedLocator,
        Formatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )
    from matplotlib.transforms import Transform
except ModuleNotFoundError as error:
    raise missing_extra("drawing figures", error) from error


Values = NDArray[np.float64]

LINE_WIDTH = 1.7
MARKER_SIZE = 5.0
# Above the first count points are drawn small; above the second they are kept as an image.
_DENSE, _MANY = 40, 4000
_GRID: dict[str, Any] = {"color": "#e4e4e0", "linewidth": 0.7}
_INK = "#3c3c3c"


def draw_panel(
    ax: Axes, panel: Panel, palette: Palette, dashes: dict[str, tuple[float, ...]]
) -> None:
    """Draw a panel on empty axes.

    Args:
        ax: matplotlib axes.
        panel: what to draw.
        palette: the looks of its keys.
        dashes: the dashes of its reference lines by label.
    """
    ax.set_xscale(panel.x_scale)
    ax.set_yscale(panel.y_scale)
    ax.grid(True, which="major", **_GRID)
    ax.set_axisbelow(True)
    places = _dodge(panel)
    seen, stacked = False, Counter[tuple[str, float]]()
    for series, shift in zip(panel.series, places, strict=True):
        seen |= _draw_series(ax, panel, series, palette, shift, stacked)
    for reference in panel.references:
        _draw_straight(ax, panel, reference, dashes[reference.label])
    if not seen:
        ax.text(0.5, 0.5, "no data", transform=ax.transAxes, ha="center", color=REFERENCE_COLOR)
    _set_limits(ax, panel)
    _set_all_ticks(ax, panel)
    for reference in panel.references:
        if reference.kind == "diagonal":
            _draw_diagonal(ax, dashes[reference.label])
    ax.set_title(_fitted(panel.title, 36), loc="left", fontweight="bold", color=_INK)
    ax.set_xlabel(_fitted(panel.x_label, 40))
    ax.set_ylabel(_fitted(panel.y_label, 30))


def _fitted(text: str, width: int, lines: int = 3) -> str:
    """Break a text into lines of so many letters, and leave out what a panel has no room for."""
    return fill(clean(text), width, max_lines=lines, placeholder=" …")


def _draw_series(
    ax: Axes,
    panel: Panel,
    series: Series,
    palette: Palette,
    shift: float,
    stacked: Counter[tuple[str, float]],
) -> bool:
    """Draw one series; tell whether anything of it could be shown."""
    look = palette[key_of(series)]
    x, y = _shown(series.x, panel.x_scale) + shift, _shown(series.y, panel.y_scale)
    dense, many = len(x) > _DENSE, len(x) > _MANY
    _draw_interval(ax, panel, series, x, look.color, many)
    line = "none" if series.style == "points" else "-"
    marker = look.marker if series.style != "line" else ""
    (drawn,) = ax.plot(
        x, y, color=look.color, linestyle=line, marker=marker, linewidth=LINE_WIDTH,
        markersize=2.6 if dense else MARKER_SIZE, markeredgewidth=0.0 if dense else 0.6,
        markeredgecolor="white", alpha=0.7 if dense and series.style == "points" else 1.0,
        rasterized=many, zorder=2.5 if series.dashed else 2.2,
    )  # fmt: skip
    if series.dashed and series.style != "points":
        drawn.set_dashes(PREDICTION_DASHES)
    if series.style == "line":
        lone = _isolated(np.isfinite(x) & np.isfinite(y))
        ax.plot(x[lone], y[lone], linestyle="none", marker=".", color=look.color, markersize=6)
    arrows = _draw_arrows(ax, panel, series, look.color, stacked)
    return bool((np.isfinite(x) & np.isfinite(y)).any()) or arrows


def _draw_interval(
    ax: Axes, panel: Panel, series: Series, x: Values, color: str, many: bool
) -> None:
    if series.low is None or series.high is None:
        return
    low, high = np.asarray(series.low, float), np.asarray(series.high, float)
    y = _shown(series.y, panel.y_scale)
    if panel.y_scale == "log":
        # An interval that reaches zero goes down to the smallest value the axis must show.
        shown = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in (low, high, y)])
        low = np.where(low <= 0, shown.min() if len(shown) else np.nan, low)
    low, high = _shown(low, panel.y_scale), _shown(high, panel.y_scale)
    if series.style == "line":
        ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0, rasterized=many)
        return
    ax.vlines(x, low, high, color=color, linewidth=1.3, rasterized=many, zorder=2.1)


def _draw_arrows(
    ax: Axes, panel: Panel, series: Series, color: str, stacked: Counter[tuple[str, float]]
) -> bool:
    """Mark points that the axes cannot show at the edge where they would be.

    Args:
        ax: matplotlib axes.
        panel: the panel.
        series: whose points.
        color: its colour.
        stacked: how many arrows stand at each place already; the next one stands beside them.

    Returns:
        Whether there were any.
    """
    found = False
    for edge, (_, marker) in EDGES.items():
        pairs = zip(series.x, series.y, strict=True)
        here = [(x, y) for x, y in pairs if off_scale(panel, x, y) == edge]
        if not here:
            continue
        xs, ys, transform = _at_edge(ax, panel, edge, here, stacked)
        ax.plot(
            xs, ys, transform=transform, linestyle="none", marker=marker, markersize=MARKER_SIZE,
            markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.1, clip_on=False,
            rasterized=len(xs) > _MANY, zorder=3,
        )  # fmt: skip
        found = True
    return found


def _at_edge(
    ax: Axes,
    panel: Panel,
    edge: str,
    points: list[tuple[float, float]],
    stacked: Counter[tuple[str, float]],
) -> tuple[Values, Values, Transform]:
    """Place points at an edge: their position along it in data, across it in parts of the axes."""
    x, y = np.asarray(points, dtype=np.float64).T
    along = y if edge == "left" else x
    depth = np.empty_like(along)
    for i, place in enumerate(along.tolist()):
        depth[i] = 0.03 + 0.035 * stacked[edge, place]
        stacked[edge, place] += 1
    if edge == "left":
        return depth, y, ax.get_yaxis_transform()
    across = 1 - depth if edge == "top" else depth
    return _shown(x, panel.x_scale), across, ax.get_xaxis_transform()


def _draw_straight(ax: Axes, panel: Panel, reference: Reference, dashes: tuple[float, ...]) -> None:
    horizontal = reference.kind == "horizontal"
    scale = panel.y_scale if horizontal else panel.x_scale
    if reference.kind == "diagonal" or not np.isfinite(_shown([reference.value], scale)).all():
        return
    line = (ax.axhline if horizontal else ax.axvline)(reference.value, **_reference_style())
    line.set_dashes(dashes)


def _draw_diagonal(ax: Axes, dashes: tuple[float, ...]) -> None:
    """Draw y = x between the limits that the data have set."""
    (left, right), (bottom, top) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    low, high = max(left, bottom), min(right, top)
    if low >= high:
        return
    logarithmic = ax.get_xscale() == "log" or ax.get_yscale() == "log"
    along = np.geomspace(low, high, 200) if logarithmic and low > 0 else np.linspace(low, high, 200)
    limits = ax.get_xlim(), ax.get_ylim()
    (line,) = ax.plot(along, along, **_reference_style())
    line.set_dashes(dashes)
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])


def _reference_style() -> dict[str, Any]:
    return {"color": REFERENCE_COLOR, "linewidth": 1.1, "zorder": 2.0}


def _set_all_ticks(ax: Axes, panel: Panel) -> None:
    if panel.categories:
        names = [_fitted(name, 20, lines=1) for name in panel.categories]
        width = sum(len(name) + 2 for name in names)
        ax.set_xticks(range(len(names)), names)
        if width > 38:
            ax.tick_params(axis="x", labelrotation=40)
            for label in ax.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        ax.xaxis.grid(False)
        ax.set_xlim(-0.6, len(names) - 0.4)
    else:
        set_ticks(ax.xaxis, panel.x_scale)
    set_ticks(ax.yaxis, panel.y_scale)


def _set_limits(ax: Axes, panel: Panel) -> None:
    if panel.y_limits is None:
        return
    low, high = panel.y_limits
    if low == high or not np.isfinite(_shown([low, high], panel.y_scale)).all():
        above = " above 0" if panel.y_scale == "log" else ""
        raise ValueError(
            f"panel {panel.title!r} has y_limits {panel.y_limits}; a {panel.y_scale} axis "
            f"needs two different finite numbers{above}"
        )
    ax.set_ylim(low, high)


def _dodge(panel: Panel) -> list[float]:
    """Shift the points of each series aside, so that those of one category stand side by side."""
    beside = [i for i, s in enumerate(panel.series) if panel.categories and s.style == "points"]
    width = min(0.2, 0.7 / max(len(beside), 1))
    shifts = [0.0] * len(panel.series)
    for place, i in enumerate(beside):
        shifts[i] = (place - (len(beside) - 1) / 2) * width
    return shifts


def _shown(values: Sequence[float] | Values, scale: Scale) -> Values:
    """Return values as floats, ``nan`` where an axis cannot show them."""
    v = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(v) & ((v > 0) | (scale == "linear")), v, np.nan)


def _isolated(shown: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark points without a neighbour: a line through one point draws nothing."""
    padded = np.pad(shown, 1)
    return shown & ~padded[:-2] & ~padded[2:]


def set_ticks(axis: Axis, scale: Scale) -> None:
    """Choose and write the ticks of an axis whose limits are known.

    Args:
        axis: matplotlib axis.
        scale: its scale.
    """
    if scale == "linear":
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(TickText())
        return
    low, high = sorted(float(v) for v in axis.get_view_interval())
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_major_formatter(DecadeText())
    axis.set_minor_locator(LogLocator(subs=range(2, 10)) if high < 1e4 * low else NullLocator())
    axis.set_minor_formatter(NullFormatter())


def log_ticks(low: float, high: float) -> list[float]:
    """Choose three to six ticks of a log axis, however narrow it is.

    Example:
        >>> log_ticks(0.2, 30.0), log_ticks(1.1, 4.4)
        ([0.3, 1.0, 3.0, 10.0, 30.0], [1.5, 2.0, 3.0])
    """
    first = math.ceil(math.log10(low) - 1e-9)
    last = math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        stride = math.ceil((last - first + 1) / 6)
        return [float(f"1e{e}") for e in range(first + -first % stride, last + 1, stride)]
    for steps in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        every = (float(f"{m}e{e}") for e in range(first - 1, last + 2) for m in steps)
        ticks = [t for t in every if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if len(ticks) >= 3:
            return ticks
    # In units of the decade: MaxNLocator takes limits below 1e-287 for equal.
    unit = float(f"1e{first - 1}")
    low, high = low / unit, high / unit
    return [float(t) * unit for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]


class TickText(Formatter):
    """Ticks of a linear axis: all with the same decimals, never with an offset in a corner."""

    def __call__(self, x: float, _: int | None = None) -> str:
        """Write one value on its own (matplotlib asks for it beside a mouse pointer)."""
        return number(float(x))

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Write the ticks of one axis."""
        step = min((abs(b - a) for a, b in pairwise(values)), default=0.0)
        top = max((abs(v) for v in values), default=0.0)
        if step == 0 or top >= 1e5 or top < 1e-3:
            # A tick that should be zero may be rounding noise of the step.
            return [number(float(v) if abs(v) > 1e-9 * step else 0.0, 6) for v in values]
        places = max(-math.floor(math.log10(step) + 1e-9), 0)
        places += 0 if abs(round(step, places) - step) < 1e-6 * step else 1
        return [f"{v + 0.0:.{places}f}".replace("-", "\u2212") for v in np.round(values, places)]


class DecadeText(Formatter):
    """Ticks of a log axis: plain numbers if all are ordinary, powers of ten otherwise."""

    def __call__(self, x: float, _: int | None = None) -> str:
        """Write one value on its own."""
        return number(float(x), 3)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Write the ticks of one axis."""
        if all(0.999e-2 < v < 1.001e3 for v in values):
            return [f"{v:.6g}" for v in values]
        exponents = [math.log10(v) for v in values]
        if all(abs(e - round(e)) < 1e-6 for e in exponents):
            return [power(round(e)) for e in exponents]
        return [number(float(v), 3) for v in values]
