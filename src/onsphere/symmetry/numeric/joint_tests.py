"""Put many claims to the test at once: all of them at every point, and by halves where that fails.

A random combination of symmetries is one itself, so one run of the model tells whether all hold at
a point. Only at the point that refutes them is it looked for which of them do not.
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import TypeVar

from onsphere._torch.execution import ModelError
from onsphere.symmetry.numeric.certificate import (
    FINITE_TOLERANCE,
    NOISES,
    relative_change,
    rounding,
)
from onsphere.symmetry.numeric.probe import Point, Probe

_LEAST_CLEAR = 2
"""Points at which a claim must hold without help of rounding."""

T = TypeVar("T")


def largest_changes(
    probe: Probe,
    items: Sequence[T],
    edited: Callable[[Probe, Sequence[T], Point], Point],
    points: Iterable[Point],
) -> list[float]:
    """Return for each of many items by how much the output changes when it is put to the test.

    At every point all items that are left are tested together, and by halves only where that
    refutes them; what is refuted at one point goes to no other. A point whose change rounding
    explains says nothing, while others do.

    Args:
        probe: the model.
        items: what is claimed.
        edited: gives the point at which the output should be the same if some items hold.
        points: where; one at least.

    Returns:
        The largest relative change over all points, of the item or of a set that it was in; more
        than :data:`FINITE_TOLERANCE` where it does not hold.
    """
    clear: list[list[float]] = [[] for _ in items]
    unclear: list[list[float]] = [[] for _ in items]
    refuted: dict[int, float] = {}

    def test(some: Sequence[int], point: Point) -> None:
        change, says = _change(probe, edited(probe, [items[i] for i in some], point), point)
        if says is None:
            if len(some) == 1:
                refuted[some[0]] = change
                return
            half = len(some) // 2
            test(some[:half], point)
            test(some[half:], point)
            return
        for i in some:
            (clear if says else unclear)[i].append(change)

    for point in points:
        if len(refuted) == len(items):
            break
        test([i for i in range(len(items)) if i not in refuted], point)
    found = [
        refuted[i] if i in refuted else max(c if len(c) >= _LEAST_CLEAR else [*c, *u])
        for i, (c, u) in enumerate(zip(clear, unclear, strict=True))
    ]
    hidden = [i for i, f in enumerate(found) if f > FINITE_TOLERANCE and i not in refuted]
    if len(hidden) > 1:  # rounding hid what was tested together: by halves it may not
        half = len(hidden) // 2
        for part in (hidden[:half], hidden[half:]):
            again = largest_changes(probe, [items[i] for i in part], edited, points)
            for i, change in zip(part, again, strict=True):
                found[i] = change
    return found


def _change(probe: Probe, moved: Point, point: Point) -> tuple[float, bool | None]:
    """Return the change of the output from a point to another, and what it says.

    Returns:
        The change, and whether it is none: ``None`` where it is one, and ``False`` where rounding
        explains it.
    """
    try:
        after = probe.outputs(moved)
    except ModelError:
        return inf, None
    change = relative_change(probe.baseline(point), after)
    if change <= FINITE_TOLERANCE:
        return change, True
    if change < inf and change <= NOISES * rounding(probe, moved, after):
        return change, False
    return change, None
