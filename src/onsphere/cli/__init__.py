"""The command line: one command, one library call.

A user's mistake ends with one clear line and exit code 2; nothing here prints a traceback for it.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from onsphere.cli import attack, audit, canonicalize, equalize, fold, norms, plan, study
from onsphere.cli.common.parser import Parser, in_flags
from onsphere.errors import OnsphereError
from onsphere.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``onsphere``; those of the process when ``None``.

    Returns:
        0, or 2 after a user's mistake, or 130 when interrupted.
    """
    known = parser()
    options = known.parse_args(arguments)
    if options.command is None:
        known.print_help()
        return 0
    command: Callable[[argparse.Namespace], None] = options.run
    try:
        with _plain_warnings():
            command(options)
    except OnsphereError as error:
        print(f"onsphere: {in_flags(str(error), options)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("onsphere"):
            raise
        print(
            f'onsphere: this command needs {error.name}: pip install "onsphere[study]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        kept = "; what had finished is kept, run the same command again to go on"
        print(f"onsphere: stopped{kept if options.command == 'study' else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, which tools read options from."""
    made = Parser(
        prog="onsphere",
        description="Normalization, seen on the sphere.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"onsphere {__version__}")
    commands = made.add_subparsers(dest="command", metavar="COMMAND")
    for command in (study, audit, canonicalize, fold, equalize, attack, plan, norms):
        command.add(commands)
    return made


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print a warning of ours as one line, without the place in the code."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"onsphere: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
