"""``onsphere study``: the paper's claims, into records and a report."""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from onsphere.cli._parser import keyword
from onsphere.errors import OnsphereError

if TYPE_CHECKING:
    from onsphere.cli._parser import Commands
    from onsphere.report import Document
    from onsphere.studies.engine.runner import Progress as Done

_STUDY_EXAMPLES = """examples:
  onsphere study                          all claims on the built-in digits, report in ./results
  onsphere study growth stability         two claims
  onsphere study --quick                  see that it runs, within a minute
  onsphere study --data mnist --data-dir ~/data --out mnist-results
  onsphere study causes --seeds 5         what of norm growth makes networks vulnerable
  onsphere study --full --jobs 8          as large as it must be to settle the claims

claims: sphere, invariance, growth, stability, robustness, causes, gain

The claim causes takes longer than all the others together, and is run only when it is named.
A stopped study goes on where it was: run the same command again.
"""


def add(commands: "Commands") -> None:
    """Add the command to the parser."""
    study = commands.add_parser(
        "study",
        help="run the paper's claims and write a report",
        epilog=_STUDY_EXAMPLES,
        description="Run the claims of the paper on this machine, and write records and a report.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study.add_argument(
        "claims", nargs="*", type=keyword, metavar="CLAIM", help="which claims (default: all)"
    )
    study.add_argument(
        "--data",
        type=keyword,
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


def _study(options: argparse.Namespace) -> None:
    from onsphere.studies.claims.base import SCALES, Plan
    from onsphere.studies.publish import publish
    from onsphere.studies.setup.data import Source
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


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
