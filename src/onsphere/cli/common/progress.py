"""What is shown while a command works: on the error stream; the output is the command's alone."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from onsphere.report.progress import Show, in_stages, shown


@contextmanager
def stages(quiet: bool, names: Sequence[str] = ()) -> Iterator[Callable[[str], None]]:
    """Show the stage of the work, the time it has taken and what is left.

    What a user's own code prints goes to the error stream too: the output is the command's alone.

    Args:
        quiet: show nothing.
        names: the stages to come, where they are known.

    Yields:
        A function that names the present stage.
    """
    with bar(quiet) as show:
        yield in_stages(show, names)


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
