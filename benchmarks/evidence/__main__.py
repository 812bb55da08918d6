"""The command line of the evidence: run what is missing, write the report, print the tables."""

import argparse
import sys
from pathlib import Path

from benchmarks.evidence.console import Log, show
from benchmarks.evidence.problem import KINDS
from benchmarks.evidence.summary import document
from benchmarks.evidence.tuning import bench, tune
from onsphere.errors import OnsphereError
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
    show(page, written, 160)
    return 0


def _changed(options: argparse.Namespace) -> str:
    pairs = {"only": options.only, "steps": options.steps, "width": options.width}
    return "".join(f" --{key} {value}" for key, value in pairs.items() if value)


if __name__ == "__main__":
    sys.exit(main())
