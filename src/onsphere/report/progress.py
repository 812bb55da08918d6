"""Progress of work that takes a while: a bar with the time left, or lines where nobody watches.

On a terminal a bar shows what is being done, how much of it is done and the time left; it is gone
when the work is. Where the error stream goes into a file or a pipe, a line says the same now and
then, and nothing is said of work that is done in a few seconds.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

Show = Callable[..., None]
"""Told a part of the work and, where they are known, how much is done and of how much.

By name it may be told the ``share`` that this is of the work, where its pieces are not alike, and
of work in stages the seconds ``left``.
"""

SECONDS_BETWEEN_LINES = 10.0
LEAST_SHARE = 0.1
"""Share of the work from which on the time left is told: less says little about the rest."""


@contextmanager
def shown(progress: bool | Show | None) -> Iterator[Show]:
    """Show progress while the block runs.

    Args:
        progress: ``True`` for a bar or lines on the error stream, a function to be told instead,
            or ``False`` or ``None`` for nothing.

    Yields:
        A function of a part's name, and of how much is done and of how much.

    Raises:
        ValueError: it is none of these.

    Example:
        >>> with shown(None) as show:
        ...     show("measuring", 3, 10)
    """
    if not (callable(progress) or isinstance(progress, bool) or progress is None):
        raise ValueError(f"progress is True, False or a function, got {progress!r}")
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda *_, **__: None
    elif Console(stderr=True).is_terminal:
        from onsphere.report.progress_bar import bar  # longer than work that shows none

        with bar(Console(stderr=True)) as show:
            yield show
    else:
        yield Lines()


@contextmanager
def staged(
    progress: "bool | Callable[[str], None] | Stages | None", costs: Mapping[str, float]
) -> Iterator[Callable[..., None]]:
    """Show in which stage the work is while the block runs; a function is told its name alone.

    Args:
        progress: as for :func:`shown`; or :class:`Stages`, which others have begun.
        costs: what each stage costs, in its order.

    Yields:
        A function of the present stage and of the share of it that is done.
    """
    if isinstance(progress, Stages):
        progress.expect(costs)
        yield progress
    elif callable(progress):
        yield _names_alone(progress)
    else:
        with shown(progress) as show:
            yield Stages(show, costs)


def _names_alone(tell: Callable[[str], None]) -> Callable[..., None]:
    present = ""

    def at(stage: str, _part: float = 0.0) -> None:
        nonlocal present
        if stage != present:
            present = stage
            tell(stage)

    return at


class Stages:
    """Shows how much of work in stages is done, by what they cost, and the time left.

    Stages that are slower than their costs say are counted by the clock.

    Args:
        show: told a stage; and the share of all work that is done, and the seconds left, once a
            stage is known.
        costs: what each stage costs, in its order and any unit. Others count as the one before.
        clock: gives the time in seconds.

    Example:
        >>> now = iter([0.0, 4.0, 7.0])
        >>> said = lambda stage, share, left: print(f"{stage}: {share:.0%}, {left} s left")
        >>> at = Stages(said, {"read": 20, "sort": 60, "write": 20}, lambda: next(now))
        >>> at("read")
        read: 0%, None s left
        >>> at("sort")
        sort: 20%, 16.0 s left
        >>> at("sort", 0.25)
        sort: 35%, 13.0 s left
    """

    def __init__(
        self, show: Show, costs: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._show, self._clock = show, clock
        self._names: list[str] = []
        self._costs: list[float] = []
        self.expect(costs)
        self._stage, self._part, self._share = -1, 0.0, 0.0
        self._begun = self._entered = 0.0

    def expect(self, costs: Mapping[str, float]) -> None:
        """Take the costs of the stages to come, where none are known yet."""
        if not self._names:
            self._names, self._costs = list(costs), list(costs.values())

    def __call__(self, stage: str, part: float = 0.0) -> None:
        """Say which stage the work is in, and which part of that is done."""
        now = self._clock()
        number = self._names.index(stage) if stage in self._names else -1
        if number > self._stage:
            self._begun = now if self._stage < 0 else self._begun
            self._stage, self._part, self._entered = number, 0.0, now
        if number == self._stage:
            self._part = max(self._part, part)
        if self._stage < 0:
            self._show(stage)
            return
        left = self._left(now)
        if left is not None:
            spent = now - self._begun
            self._share = max(self._share, spent / (spent + left) if left else 1.0)
        known = self._share >= LEAST_SHARE
        self._show(stage, share=self._share, left=left if known else None)

    def _left(self, now: float) -> float | None:
        """Return the seconds left; ``None`` in the first stage, by which nothing is known."""
        before, after = sum(self._costs[: self._stage]), sum(self._costs[self._stage + 1 :])
        spent = self._entered - self._begun
        if not (before and spent):
            return None
        rate = spent / before
        here = rate * self._costs[self._stage]
        if self._part:
            here = max(here, (now - self._entered) / self._part)
        return (1 - self._part) * here + rate * after


class Lines:
    """Says now and then how far the work is, one line each on the error stream.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = self._said = clock()
        self._pace = Pace(self._start)

    def __call__(
        self,
        part: str,
        done: int = 0,
        total: int | None = None,
        *,
        share: float | None = None,
        left: float | None = None,
    ) -> None:
        """Take note of how far the work is; say it if the last line was a while ago."""
        now = self._clock()
        left = self._pace.left(now, part, done, total, share, left)
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        said = f"{part}{counted(done, total, share)}, {duration(now - self._start)}"
        print(
            said + ("" if left is None else f", {duration(left)} left"), file=sys.stderr, flush=True
        )


class Pace:
    """Estimates the time left for a part of the work from what of it is done.

    Args:
        start: the time at which the work begins, in seconds.
    """

    def __init__(self, start: float) -> None:
        self._part, self._begun, self._last = "", start, start

    def left(
        self,
        now: float,
        part: str,
        done: int,
        total: int | None,
        share: float | None,
        told: float | None,
    ) -> float | None:
        """Return the seconds left, where something can be said of them: what was told, or else."""
        if part != self._part:
            self._begun = self._last if done else now
        self._part, self._last = part, now
        if told is not None:
            return told
        if share is None:
            share = done / total if total else 0.0
        elif share < LEAST_SHARE:
            return None
        return (now - self._begun) * (1 - share) / share if share else None


def counted(done: int, total: int | None, share: float | None) -> str:
    """Return how much is done in words, after the name of what is done."""
    if share is not None:
        return f" {share:.0%}"
    return f" {done} of {total}" if total else ""


def duration(seconds: float) -> str:
    """Return a time as people say it.

    Example:
        >>> duration(8), duration(200), duration(9000)
        ('8 s', '3 min 20 s', '2 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
