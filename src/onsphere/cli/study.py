"""``onsphere study``: the paper's claims, into records and a report."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from onsphere.cli._parser import keyword
from onsphere.errors import OnsphereError
from onsphere.report.progress import Lines, Show

if TYPE_CHECKING:
    from onsphere.cli._parser import Commands
    from onsphere.report import Document
    from onsphere.studies.engine.runner import Progress as Done
    from onsphere.studies.engine.work import Engine

_STUDY_EXAMPLES = """examples:
  onsphere study                          all claims on the built-in digits, report in ./results
  onsphere study growth stability         two claims
  onsphere study --quick                  see that it runs, within a minute on two free cores
  onsphere study --data mnist --data-dir ~/data --out mnist-results
  onsphere study causes --seeds 5         what of norm growth makes networks vulnerable
  onsphere study --full --jobs 8          as large as it must be to settle the claims
  onsphere study --full --engine ray --address auto      on all machines of a Ray cluster

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
        description="Run the claims of the paper, and write records and a report.",
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
        metavar="N",
        help="how many cells at a time, each on one core (default: as many as there are cores)",
    )
    study.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where cells are computed: on this machine, or as tasks of a Ray cluster, which "
        'needs pip install "onsphere[ray]" (default: local)',
    )
    study.add_argument(
        "--address",
        metavar="ADDRESS",
        help="with --engine ray: HOST:PORT of a running cluster, or auto to find it on this "
        "machine (default: $RAY_ADDRESS; without it Ray is started on this machine alone)",
    )
    size = study.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        action="store_const",
        dest="size",
        const="quick",
        help="small: shows that everything works, and writes no files of figures",
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
    cores = _cores() if options.jobs is None else options.jobs
    engine = _engine(options, cores)
    source = Source(options.data, options.data_dir, options.download)
    with _progress(options.json) as show:

        def measured(done: "Done") -> None:
            show("measuring", done.cells_done, done.cells, done.done / done.total)

        def drawn(done: int, total: int) -> None:
            show("drawing figures", done, total, done / total)

        document = study(
            options.claims, plan, source, options.out, engine=engine, progress=measured
        )
        page = publish(
            document, options.out, jobs=cores, files=plan.size != "quick", progress=drawn
        )
    if options.json:
        print(json.dumps(_verdicts(document), indent=2))
        return
    from onsphere.report import summary

    console = Console()
    console.print(summary(document))
    console.print(f"Report: {page}", soft_wrap=True)


def _engine(options: argparse.Namespace, cores: int) -> "Engine":
    """Return where cells are computed."""
    if options.engine == "ray":
        from onsphere.studies.engine.ray_engine import RayEngine

        return RayEngine(options.address, options.jobs)
    if options.address is not None:
        raise OnsphereError(f"--address {options.address} is for --engine ray: add that")
    from onsphere.studies.engine.local import LocalEngine

    return LocalEngine(cores)


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
def _progress(quiet: bool) -> Iterator[Show]:
    """Show a bar with the time left on a terminal's error stream, and lines elsewhere.

    Yields:
        A function of a part's name, of how many of its pieces are done, of how many, and of the
        share of its work that they are.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        lines = Lines()
        yield lambda part, done, total, _: None if quiet else lines(part, done, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[counted]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    bar = Progress(*columns, console=console, speed_estimate_period=600)
    tasks: dict[str, TaskID] = {}

    def show(part: str, done: int, total: int, share: float) -> None:
        bar.start()  # not before there is something to show: a user's mistake gets one line
        if part not in tasks:
            tasks[part] = bar.add_task(part, total=1.0, counted="")
        bar.update(tasks[part], completed=share, counted=f"{done}/{total}")

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
