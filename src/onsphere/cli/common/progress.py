"""What is shown while a command works: on the error stream; the output is the command's alone."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout

from onsphere.report.progress import Show, Stages, shown


@contextmanager
def stages(quiet: bool, costs: Mapping[str, float] | None = None) -> Iterator[Stages]:
    """Show the stage of the work, the time it has taken and what is left.

    What a user's own code prints goes to the error stream too: the output is the command's alone.

    Args:
        quiet: show nothing.
        costs: what the stages to come cost, where that is known.

    Yields:
        A function of the present stage.
    """
    with bar(quiet) as show:
        yield Stages(show, costs or {})


@contextmanager
def bar(quiet: bool) -> Iterator[Show]:
    """Show for each part of the work how much of it is done, and the time left.

    Args:
        quiet: show nothing.

    Yields:
        A function of the present part's name and, where they are known, how much is done and of
        how much.
    """
    with redirect_stdout(sys.stderr), shown(not quiet) as show:
        yield show
