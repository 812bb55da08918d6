"""A panel as a chart of letters, for a terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onsphere.report.document import Panel, Scale, Series
from onsphere.report.number import number

Values = NDArray[np.float64]

# Dots of a braille letter, by row and column: bits above U+2800.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_EMPTY = 0x2800
# A dashed line shows one dot in so many.
_SPARSE = 4


@dataclass(frozen=True)
class _Axis:
    """From values to dots."""

    low: float
    high: float
    scale: Scale
    dots: int

    def place(self, values: Values) -> Values:
        """Return places from 0 to dots - 1; NaN for what the axis cannot show."""
        low, high = self._scaled(np.array([self.low, self.high]))
        part = (self._scaled(values) - low) / (high - low if high > low else 1.0)
        return np.where((part >= -1e-9) & (part <= 1 + 1e-9), part * (self.dots - 1), np.nan)

    def _scaled(self, values: Values) -> Values:
        if self.scale == "linear":
            return values
        return np.log10(np.where(values > 0, values, np.nan))


def chart(panel: Panel, width: int = 76, height: int = 10) -> list[str]:
    r"""Draw the lines of a panel with braille dots; dashed ones are dotted.

    Args:
        panel: what to draw: series with rising x. Bands, points and references are left out.
        width: letters of the widest line.
        height: lines of the drawing; below it stand the ends of the x axis.

    Returns:
        The lines of text. Where nothing can be shown, one that says so.

    Example:
        >>> line = Series("", [0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0])
        >>> print("\n".join(chart(Panel("", "step", "y", [line]), width=16, height=2)))
        3 ┤      ⢀⣀⡠⠤⠒⠒⠉
        0 ┤⣀⠤⠤⠒⠊⠉⠁
           0   step    3
    """
    xs = _shown([s.x for s in panel.series], panel.x_scale)
    ys = _shown([s.y for s in panel.series], panel.y_scale)
    if not len(xs) or not len(ys):
        return ["(nothing to draw)"]
    low, high = panel.y_limits or (float(ys.min()), float(ys.max()))
    labels = _labels(low, high, panel.y_scale, height)
    margin = max(map(len, labels)) + 2
    columns = max(width - margin, 8)
    across = _Axis(float(xs.min()), float(xs.max()), panel.x_scale, 2 * columns)
    upwards = _Axis(low, high, panel.y_scale, 4 * height)
    letters = np.full((height, columns), _EMPTY)
    for series in panel.series:
        _draw(series, across, upwards, letters)
    drawn = ["".join(map(chr, row)).replace(chr(_EMPTY), " ").rstrip() for row in letters]
    lines = [f"{label:>{margin - 2}} ┤{row}" for label, row in zip(labels, drawn, strict=True)]
    return [*lines, " " * (margin) + _below(across, panel.x_label, columns)]


def _shown(given: Sequence[Sequence[float]], scale: Scale) -> Values:
    """Return all values that an axis can show."""
    values = np.concatenate([np.asarray(v, dtype=np.float64) for v in given] or [np.empty(0)])
    return values[np.isfinite(values) & ((values > 0) | (scale == "linear"))]


def _labels(low: float, high: float, scale: Scale, height: int) -> list[str]:
    """Write the value at the first, the middle and the last line."""
    middle = math.sqrt(low) * math.sqrt(high) if scale == "log" else (low + high) / 2
    labels = [""] * height
    labels[-1], labels[0] = number(low, 3), number(high, 3)
    if height % 2:
        labels[height // 2] = number(middle, 3)
    return labels


def _below(axis: _Axis, label: str, columns: int) -> str:
    first, last = number(axis.low, 6), number(axis.high, 6)
    room = columns - len(first) - len(last)
    return f"{first}{label:^{room}}{last}" if room > len(label) else f"{first} … {last}"


def _draw(series: Series, across: _Axis, upwards: _Axis, letters: NDArray[np.int64]) -> None:
    """Set the dots of one line."""
    x = across.place(np.asarray(series.x, dtype=np.float64))
    y = upwards.place(np.asarray(series.y, dtype=np.float64))
    seen = np.isfinite(x) & np.isfinite(y)
    if not seen.any():
        return
    x, y = x[seen], y[seen]
    places = np.arange(math.ceil(x[0] - 1e-9), math.floor(x[-1] + 1e-9) + 1)
    heights = np.rint(np.interp(places, x, y)).astype(int)
    before = heights[0] if len(heights) else 0
    for place, top in zip(places.tolist(), heights.tolist(), strict=True):
        if series.dashed:
            dots = [top] if place % _SPARSE == 0 else []
        else:  # a steep line has no gaps
            dots = list(range(min(before + 1, top), max(before - 1, top) + 1))
        for dot in dots:
            row = upwards.dots - 1 - dot
            letters[row // 4, place // 2] |= _DOTS[row % 4][place % 2]
        before = top
