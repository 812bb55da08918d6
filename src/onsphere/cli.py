"""The command line: one command, one library call.

A user's mistake ends with one clear line and exit code 2; nothing here prints a traceback for it.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from onsphere.errors import OnsphereError
from onsphere.version import __version__

if TYPE_CHECKING:
    from onsphere.report import Document
    from onsphere.studies.runner import Progress as Done

    _Commands = argparse._SubParsersAction["_Parser"]

_STUDY_EXAMPLES = """examples:
  onsphere study                          all claims on the built-in digits, report in ./results
  onsphere study growth stability         two claims
  onsphere study --quick                  see that it runs, in less than a minute
  onsphere study --data mnist --data-dir ~/data --out mnist-results
  onsphere study --full --jobs 8          as large as it must be to settle the claims

claims: sphere, invariance, growth, stability, robustness, gain
A stopped study goes on where it was: run the same command again.
"""

_NORMS_EXAMPLES = """examples:
  onsphere norms                          what each method is invariant to, measured
  onsphere norms --json                   the same with every residual, for machines
"""


_NORMS_NOTE = (
    "scale: the finest part whose scale matters not. degree: growth of the output when W doubles, "
    "as a power. shifts: bias = each entry of b; layer rows = W + 1vᵀ, b + c; group rows = the "
    "same per group; row entries = w + c within a row. leak: change of the output when W doubles "
    "at the method's real eps."
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``onsphere``; those of the process when ``None``.

    Returns:
        0, or 2 after a user's mistake, or 130 when interrupted.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.run
    try:
        with _plain_warnings():
            command(options)
    except OnsphereError as error:
        print(f"onsphere: {error}", file=sys.stderr)
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
        print(
            "onsphere: stopped; what had finished is kept, run the same command again to go on",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="onsphere",
        description="Normalization, seen on the sphere.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"onsphere {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_study(commands)
    _add_norms(commands)
    return parser


def _add_study(commands: "_Commands") -> None:
    study = commands.add_parser(
        "study",
        help="run the paper's claims and write a report",
        epilog=_STUDY_EXAMPLES,
        description="Run the claims of the paper on this machine, and write records and a report.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study.add_argument("claims", nargs="*", metavar="CLAIM", help="which claims (default: all)")
    study.add_argument(
        "--data",
        default="digits",
        metavar="NAME",
        help="digits, mnist, fashion-mnist or cifar10 (default: digits)",
    )
    study.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where published data files lie (default: ./data)",
    )
    study.add_argument(
        "--download",
        action="store_true",
        help="download missing data files into --data-dir, checked by checksum",
    )
    study.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where records and report go (default: ./results)",
    )
    study.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="how many seeds (default: 3; 1 with --quick, 10 with --full)",
    )
    study.add_argument(
        "--jobs",
        type=int,
        default=_cores(),
        metavar="N",
        help="worker processes (default: one per core)",
    )
    size = study.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        action="store_const",
        dest="size",
        const="quick",
        help="small: shows that everything works",
    )
    size.add_argument(
        "--full",
        action="store_const",
        dest="size",
        const="full",
        help="large: meant to settle the claims (hours)",
    )
    study.add_argument("--json", action="store_true", help="print verdicts as JSON")
    study.set_defaults(run=_study, size="default")


def _add_norms(commands: "_Commands") -> None:
    norms = commands.add_parser(
        "norms",
        help="what each normalization is invariant to, measured",
        epilog=_NORMS_EXAMPLES,
        description="Measure the invariances of every method on a random layer in float64.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    norms.add_argument("--seed", type=int, default=0, help="of the random layer (default: 0)")
    norms.add_argument("--json", action="store_true", help="print every residual as JSON")
    norms.set_defaults(run=_norms)


def _study(options: argparse.Namespace) -> None:
    from onsphere.studies.claim import SCALES, Plan
    from onsphere.studies.data import Source
    from onsphere.studies.publish import publish
    from onsphere.studies.study import study

    count = SCALES[options.size].seeds if options.seeds is None else options.seeds
    if count < 1:
        raise OnsphereError(f"a study needs at least one seed, got --seeds {count}")
    plan = Plan(options.data, tuple(range(count)), options.size)
    source = Source(options.data, options.data_dir, options.download)
    with _progress(options.json) as progress:
        document = study(
            options.claims, plan, source, options.out, jobs=options.jobs, progress=progress
        )
    page = publish(document, options.out, jobs=options.jobs)
    if options.json:
        print(json.dumps(_verdicts(document), indent=2))
        return
    from onsphere.report import summary

    console = Console()
    console.print(summary(document))
    console.print(f"Report: {page}", soft_wrap=True)


def _verdicts(document: "Document") -> dict[str, Any]:
    return {
        "claims": {
            section.name: {
                "verdict": str(section.verdict),
                "figure_of_merit": section.figure_of_merit,
                "findings": list(section.findings),
                "command": section.command,
            }
            for section in document.sections
        },
        "provenance": document.provenance,
        "warnings": list(document.warnings),
    }


def _norms(options: argparse.Namespace) -> None:
    from onsphere.norms import invariance_table

    if not 0 <= options.seed < 2**63:
        raise OnsphereError(f"--seed must be from 0 to 2**63 - 1, got {options.seed}")
    rows = invariance_table(options.seed)
    if options.json:
        print(json.dumps([_finite(asdict(row)) for row in rows], indent=2))
        return
    from onsphere.report import Table, table

    console = Console()
    console.print(
        table(
            Table(
                "What changes nothing, measured at eps → 0",
                ("method", "scale of W", "scale of W and b", "data", "degree", "shifts", "leak"),
                [
                    (
                        row.name.replace("normalization", "norm"),
                        row.weight,
                        row.weight_and_bias,
                        "yes" if row.data else "no",
                        row.degree,
                        ", ".join(row.shifts) or "none",
                        row.leak,
                    )
                    for row in rows
                ],
                _NORMS_NOTE,
            )
        )
    )


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a leak that does not exist is null."""
    return {k: None if isinstance(v, float) and v != v else v for k, v in values.items()}


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[["Done"], None]]:
    """Show a bar with the time left, on the terminal's error stream."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[cells]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    bar = Progress(*columns, console=console, disable=hidden, speed_estimate_period=600)
    task = bar.add_task("measuring", total=None, cells="")

    def show(done: "Done") -> None:
        bar.start()  # not before there is something to show: a user's mistake gets one line
        bar.update(
            task,
            completed=done.done,
            total=done.total,
            cells=f"{done.cells_done}/{done.cells} cells",
        )

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print a warning of ours as one line, without the place in the code."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"onsphere: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
