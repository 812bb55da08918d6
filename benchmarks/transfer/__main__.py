"""Does one number transfer? Tune the best rotation and the best rate at every size, and compare.

Hours of a core. What was run is kept in --out, and a stopped run goes on where it was; the report
is written at the end.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.evidence.console import Log, show
from benchmarks.evidence.tuning import bench
from benchmarks.transfer.scale import KINDS
from benchmarks.transfer.search import FACTORS, SEEDS, tune
from benchmarks.transfer.summary import document
from onsphere.errors import OnsphereError
from onsphere.studies.publish import publish


def main(words: list[str] | None = None) -> int:
    """Run everything; return the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="published data files")
    parser.add_argument("--out", type=Path, default=Path("results/transfer"))
    parser.add_argument("--jobs", type=int, default=2, help="worker processes, a thread each")
    parser.add_argument("--only", choices=list(KINDS), help="one of the networks")
    parser.add_argument(
        "--factors",
        type=_counts,
        default=FACTORS,
        help="how many times as large, as 4,8: the largest decides",
    )
    parser.add_argument("--seeds", type=_seeds, default=SEEDS, help="how many, at least 2")
    parser.add_argument("--steps", type=int, help="of the small model's runs, fewer to try it out")
    parser.add_argument("--width", type=int, help="of the small model, smaller to try it out")
    options = parser.parse_args(words)
    kinds = [options.only] if options.only else list(KINDS)
    try:
        made = bench(
            options.data_dir,
            options.out,
            options.jobs,
            Log(),
            images={KINDS[kind].images for kind in kinds},
            reads_text=any(KINDS[kind].reads_text for kind in kinds),
            steps=options.steps,
            width=options.width,
        )
        found = tune(made, kinds, options.factors, options.seeds)
        page = document(found, _command(words), options.seeds)
        written = publish(page, options.out, jobs=options.jobs)
    except OnsphereError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(page, written, 200)
    return 0


def _counts(text: str) -> tuple[int, ...]:
    found = tuple(int(word) for word in text.split(","))
    if min(found) < 2:
        raise argparse.ArgumentTypeError(f"factors are at least 2, got {text}")
    return found


def _seeds(text: str) -> tuple[int, ...]:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"at least 2 seeds make an interval, got {text}")
    return tuple(range(int(text)))


def _command(words: list[str] | None) -> str:
    """Return the command without the folders, which differ from machine to machine."""
    kept, given = [], list(sys.argv[1:] if words is None else words)
    while given:
        word = given.pop(0)
        if word.partition("=")[0] in ("--data-dir", "--out", "--jobs"):
            if "=" not in word:
                given.pop(0)
            continue
        kept.append(word)
    return " ".join(["python -m benchmarks.transfer", *kept])


if __name__ == "__main__":
    sys.exit(main())
