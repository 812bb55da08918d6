"""Test many claims at once, then by halves until the culprits stand out."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def group_test(
    items: Sequence[T], measure: Callable[[Sequence[T]], float], allowed: float
) -> list[float]:
    """Measure how wrong each of many items is, with one measurement if none is.

    Args:
        items: what to test.
        measure: how wrong some of them are together; a wrong one makes every set it is in wrong.
        allowed: up to this a set passes.

    Returns:
        For every item the measure of the largest tested set that passed with it in, or its own.

    Example:
        >>> group_test([0, 0, 5, 0], lambda some: float(sum(some)), 1.0)
        [0.0, 0.0, 5.0, 0.0]
    """
    if not items:
        return []
    found = measure(items)
    if found <= allowed or len(items) == 1:
        return [found] * len(items)
    half = len(items) // 2
    return group_test(items[:half], measure, allowed) + group_test(items[half:], measure, allowed)
