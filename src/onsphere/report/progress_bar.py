"""The bar that a terminal shows while work is done."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from onsphere.report import progress


class _TimeLeft(ProgressColumn):
    """Counts the time left down; says nothing where the work takes longer than was thought."""

    def render(self, task: Task) -> Text:
        left: float = task.fields["end"] - time.monotonic()
        return Text(f"{progress.duration(left)} left" if left > 0 else "")


@contextmanager
def bar(console: Console) -> Iterator[progress.Show]:
    """Show a bar while the block runs; it is gone afterwards.

    Args:
        console: where.

    Yields:
        A function of what is done, see :data:`onsphere.report.progress.Show`.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[counted]}", markup=False),
        TimeElapsedColumn(),
        _TimeLeft(),
    )
    with Progress(*columns, console=console, transient=True) as drawn:
        task = drawn.add_task("starting", total=None, counted="", end=0.0)
        pace = progress.Pace(time.monotonic())

        def show(
            part: str,
            done: int = 0,
            total: int | None = None,
            *,
            share: float | None = None,
            left: float | None = None,
        ) -> None:
            now = time.monotonic()
            left = pace.left(now, part, done, total, share, left)
            drawn.update(
                task, description=part, total=total if share is None else 1.0,
                completed=done if share is None else share,
                counted=progress.counted(done, total, share).strip(),
                end=0.0 if left is None else now + left,
            )  # fmt: skip

        yield show
