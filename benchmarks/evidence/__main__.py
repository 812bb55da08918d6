"""The command line of the evidence: run what is missing, write the report, print the tables."""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.evidence.problem import KINDS
from benchmarks.evidence.summary import document
from benchmarks.evidence.tuning import bench, tune
from onsphere.errors import OnsphereError
from onsphere.report import summary, table
from onsphere.studies.engine.runner import Progress
from onsphere.studies.publish import publish


def main(words: list[str] | None = None) -> int:
    """Run everything; return the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="published data files")
    parser.add_argument("--out", type=Path, default=Path("results/evidence"))
    parser.add_argument("--jobs", type=int, default=2, help="worker processes, a thread each")
    parser.add_argument("--only", choices=list(KINDS), help="one of the tasks")
    parser.add_argument("--steps", type=int, help="of every run (a try-out)")
    parser.add_argument("--width", type=int, help="of every network (a try-out)")
    options = parser.parse_args(words)
    kinds = [options.only] if options.only else list(KINDS)
    try:
        made = bench(
            options.data_dir,
            options.out,
            options.jobs,
            Log(),
            steps=options.steps,
            width=options.width,
        )
        found = [tune(made, kind) for kind in kinds]
        page = document(found, "python -m benchmarks.evidence" + _changed(options))
        written = publish(page, options.out, jobs=options.jobs)
    except OnsphereError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=160)
    console.print(summary(page))
    for section in page.sections:
        for one in section.tables:
            console.print(table(one))
    console.print(f"Report: {written}", soft_wrap=True)
    return 0


def _changed(options: argparse.Namespace) -> str:
    pairs = {"only": options.only, "steps": options.steps, "width": options.width}
    return "".join(f" --{key} {value}" for key, value in pairs.items() if value)


class Log:
    """One line per finished run."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        minutes = (time.monotonic() - self._start) / 60
        print(f"{minutes:.1f} min: {progress.cells_done}/{progress.cells} runs", flush=True)


if __name__ == "__main__":
    sys.exit(main())
