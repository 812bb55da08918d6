"""Time two things side by side, so that a machine whose speed drifts still gives a fair ratio."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pairing:
    """Ours against a peer's, alternating.

    Attributes:
        name: what was measured.
        peer: against what.
        ours_ms: median time of ours, in milliseconds.
        ratio: median over pairs of ours / theirs.
        low: lower quartile of the ratio.
        high: upper quartile.
    """

    name: str
    peer: str
    ours_ms: float
    ratio: float
    low: float
    high: float


def pair(
    name: str,
    peer: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    pairs: int = 41,
    seconds: float = 0.02,
) -> Pairing:
    """Alternate the two, each repeated for about ``seconds``, and compare pair by pair."""
    repeats = [_repeats(run, seconds) for run in (ours, theirs)]
    times = [
        (_time(ours, repeats[0]) / repeats[0], _time(theirs, repeats[1]) / repeats[1])
        for _ in range(pairs)
    ]
    ratios = [a / b for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Pairing(name, peer, 1e3 * statistics.median(a for a, _ in times), middle, low, high)


def _repeats(run: Callable[[], object], seconds: float) -> int:
    run()
    return max(1, round(seconds / max(1e-7, _time(run, 3) / 3)))


def _time(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start
