"""What is shown while a command works: on the terminal's error stream, and gone when it is done."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def stages(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show a spinner with the stage of the work and the time it has taken.

    What a user's own code prints goes to the error stream too: the output is the command's alone.

    Args:
        quiet: show nothing; nothing is shown either where there is no terminal.

    Yields:
        A function that names the present stage.
    """
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    hidden = quiet or not console.is_terminal
    bar = Progress(*columns, console=console, disable=hidden, transient=True)
    task = bar.add_task("starting", total=None)
    with redirect_stdout(sys.stderr), bar:
        yield lambda stage: bar.update(task, description=stage)


@contextmanager
def bar(quiet: bool) -> Iterator[Callable[..., None]]:
    """Show a bar for each part of the work: how much of it is done, and the time left.

    Args:
        quiet: show nothing; nothing is shown either where there is no terminal.

    Yields:
        A function of the present part's name and, where they are known, how much is done and of
        how much.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    hidden = quiet or not console.is_terminal
    shown = Progress(*columns, console=console, disable=hidden, transient=True)
    task = shown.add_task("starting", total=None)
    part = ""

    def show(name: str, done: int = 0, total: int | None = None) -> None:
        nonlocal part
        if name != part:
            part = name
            shown.reset(task, total=total, description=name)  # its own speed, its own time left
        shown.update(task, completed=done, total=total)

    with redirect_stdout(sys.stderr), shown:
        yield show
