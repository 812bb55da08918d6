"""Time two things side by side, so that a machine whose speed drifts still gives a fair ratio."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


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
    cuda: bool = False,
) -> Pairing:
    """Alternate the two, each repeated for about ``seconds``, and compare pair by pair.

    With ``cuda`` the current device's clock is read, between events on its stream.
    """
    clock = _time_on_device if cuda else _time
    repeats = [_repeats(run, seconds, clock) for run in (ours, theirs)]
    times = [
        (clock(ours, repeats[0]) / repeats[0], clock(theirs, repeats[1]) / repeats[1])
        for _ in range(pairs)
    ]
    ratios = [a / b for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Pairing(name, peer, 1e3 * statistics.median(a for a, _ in times), middle, low, high)


_Clock = Callable[[Callable[[], object], int], float]


def _repeats(run: Callable[[], object], seconds: float, clock: _Clock) -> int:
    run()
    return max(1, round(seconds / max(1e-7, clock(run, 3) / 3)))


def _time(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


def _time_on_device(run: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
