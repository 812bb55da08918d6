"""Ticks: few, at round values, written as people write numbers."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from onsphere._utils.optional import missing_extra
from onsphere.report.document import Scale
from onsphere.report.number import number, power

try:
    from matplotlib.axis import Axis
    from matplotlib.ticker import (
        FixedLocator,
        Formatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )
except ModuleNotFoundError as error:
    raise missing_extra("drawing figures", error) from error


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
