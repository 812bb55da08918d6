"""Progress of work that takes a while: a bar with the time left, or lines where nobody watches.

On a terminal a bar shows what is being done, how much of it is done and the time left; it is gone
when the work is. Where the error stream goes into a file or a pipe, a line says the same now and
then, and nothing is said of work that is done in a few seconds.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

Show = Callable[..., None]
"""Told a part of the work and, where they are known, how much is done and of how much."""

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown(progress: bool | Show | None) -> Iterator[Show]:
    """Show progress while the block runs.

    Args:
        progress: ``True`` for a bar or lines on the error stream, a function to be told instead,
            or ``False`` or ``None`` for nothing.

    Yields:
        A function of a part's name, and of how much is done and of how much.

    Example:
        >>> with shown(None) as show:
        ...     show("measuring", 3, 10)
    """
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda *_: None
    elif Console(stderr=True).is_terminal:
        with _bar() as show:
            yield show
    else:
        yield Lines()


@contextmanager
def staged(
    progress: bool | Callable[[str], None] | None, stages: Sequence[str] = ()
) -> Iterator[Callable[[str], None]]:
    """Show in which stage the work is while the block runs; a function is told its name alone.

    Args:
        progress: as for :func:`shown`.
        stages: those to come, where they are known.

    Yields:
        A function of the present stage.
    """
    if callable(progress):
        yield progress
        return
    with shown(progress) as show:
        yield in_stages(show, stages)


def in_stages(show: Show, stages: Sequence[str]) -> Callable[[str], None]:
    """Return what is told the names of stages, and shows how many of all are done.

    Args:
        show: told name, done and total.
        stages: in their order; others count as the one before them.
    """
    done = 0

    def at(stage: str) -> None:
        nonlocal done
        done = max(done, stages.index(stage)) if stage in stages else done
        show(stage, done, len(stages) or None)

    return at


class Lines:
    """Says now and then how far the work is, one line each on the error stream.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = self._said = clock()
        self._part, self._begun, self._before = "", self._start, 0

    def __call__(self, part: str, done: int = 0, total: int | None = None) -> None:
        """Take note of how far the work is; say it if the last line was a while ago."""
        now = self._clock()
        if part != self._part and done == 0:
            self._begun, self._before = now, 0
        self._part = part
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        counted = f" {done} of {total}" if total else ""
        left = ""
        if total and done > self._before:
            seconds = (now - self._begun) / (done - self._before) * (total - done)
            left = f", {duration(seconds)} left"
        print(f"{part}{counted}, {duration(now - self._start)}{left}", file=sys.stderr, flush=True)


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


@contextmanager
def _bar() -> Iterator[Show]:
    from rich.progress import (  # which takes longer than the work that shows no bar
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task("starting", total=None)

        def show(part: str, done: int = 0, total: int | None = None) -> None:
            drawn.update(task, description=part, completed=done, total=total)

        yield show
