"""Effects with their intervals on one axis, as small SVGs that stand in the rows of a list.

The axis counts in margins: 1 is the smallest effect that matters. It is linear around 0 and
logarithmic further out, so that twenty margins and a tenth of one can be seen side by side.
"""

import math
from html import escape

from onsphere.report.document import SIGNS, Interval, Statement
from onsphere.report.number import clean

WIDTH, _ROW, _LEFT, _PAD = 300, 15, 70, 8
_END = 40.0  # margins at the ends of the axis; what lies beyond gets an arrow
_TICKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30)
_TEXT = 'font-size="10.5" fill="#55585f"'


def place(value: float) -> float:
    """Return where a value in margins stands, in units of the drawing.

    Example:
        >>> [round(place(v)) for v in (-40.0, -1.0, 0.0, 1.0, 40.0)]
        [70, 159, 181, 203, 292]
    """
    inside = max(-_END, min(_END, value))
    share = math.asinh(inside) / math.asinh(_END)
    return _LEFT + (WIDTH - _LEFT - _PAD) * (1 + share) / 2


def forest_svg(statement: Statement) -> str:
    """Draw the intervals of a statement, one row each, over the band of what does not matter.

    Args:
        statement: its intervals are drawn, its hypothesis and effect are told to screen readers.

    Returns:
        An ``<svg>`` element that asks for nothing outside itself; an empty text where there is
        nothing to draw.
    """
    rows = list(statement.intervals)
    if not rows:
        return ""
    height = _ROW * len(rows) + 4
    said = escape(clean(f"{statement.hypothesis} {statement.outcome.value}: {statement.effect}"))
    low, zero, high = place(-1), place(0), place(1)
    drawn = [
        f'<rect x="{low:.1f}" y="0" width="{high - low:.1f}" height="{height}" fill="#e9e9e4"/>',
        f'<path d="M{zero:.1f} 0V{height}" stroke="#8a8a86" stroke-width="1"/>',
        *(_row(interval, 2 + _ROW * i + _ROW / 2) for i, interval in enumerate(rows)),
    ]
    return (
        f'<svg class="effects" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="group" aria-label="{said}">{"".join(drawn)}</svg>'
    )


def axis_svg() -> str:
    """Draw the axis that all rows share: ticks in margins."""
    marks = "".join(
        f'<text x="{place(tick):.1f}" y="11" text-anchor="middle" {_TEXT}>'
        f"{str(tick).replace('-', chr(0x2212))}</text>"
        f'<path d="M{place(tick):.1f} 15v4" stroke="#8a8a86"/>'
        for tick in _TICKS
    )
    line = f'<path d="M{place(-_END):.1f} 19H{place(_END):.1f}" stroke="#8a8a86"/>'
    return (
        f'<svg class="effects" viewBox="0 0 {WIDTH} 20" width="{WIDTH}" height="20">'
        f"{marks}{line}</svg>"
    )


def _row(interval: Interval, y: float) -> str:
    """Draw one interval: its label, its line with arrows where it goes on, and its mean."""
    style = SIGNS[interval.outcome].style
    name = (
        f'<text x="{_LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end" {_TEXT}>'
        f"{escape(clean(interval.label))}</text>"
    )
    low, high = place(interval.low), place(interval.high)
    line = f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="currentColor" stroke-width="2"/>'
    for end, value, sign in ((low, interval.low, -1), (high, interval.high, 1)):
        if sign * value > _END:
            line += (
                f'<path d="M{end - sign * 4:.1f} {y - 3.5:.1f}L{end:.1f} {y:.1f}'
                f'L{end - sign * 4:.1f} {y + 3.5:.1f}" fill="none" stroke="currentColor" '
                'stroke-width="1.5"/>'
            )
    dot = f'<circle cx="{place(interval.mean):.1f}" cy="{y:.1f}" r="3.6" fill="currentColor"/>'
    return f'<g class="effect-{style}">{name}{line}{dot}</g>'
