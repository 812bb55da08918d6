"""``onsphere study``: the paper's claims, into records and a report."""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from onsphere.cli.common.parser import keyword
from onsphere.cli.common.progress import bar
from onsphere.errors import OnsphereError

if TYPE_CHECKING:
    from onsphere.cli.common.parser import Commands
    from onsphere.report import Document
    from onsphere.studies.engine.runner import Progress as Done
    from onsphere.studies.engine.work import Engine

_STUDY_EXAMPLES = """examples:
  onsphere study                          all claims on the built-in digits, report in ./results
  onsphere study growth stability         two claims
  onsphere study --data photos.npz --network resnet20    your own images, a larger network
  onsphere study --quick                  see that it runs, within a minute on two free cores
  onsphere study --data mnist --data-dir ~/data --out mnist-results
  onsphere study robustness --seeds 20    what of norm growth makes networks vulnerable
  onsphere study --until-decided --budget 2h      add seeds to what is undecided
  onsphere study --full --jobs 8          every method, long training
  onsphere study --full --engine ray --address auto      on all machines of a Ray cluster

what the paper claims:
  sphere        normalization is a projection onto a sphere
  invariance    rescaling normalized weights changes nothing but the step
  growth        training makes the norms of normalized weights grow
  stability     training on the sphere is more stable than plain SGD
  robustness    grown norms make networks vulnerable to attacks
  gain          learned gain and shift restore spread and mean

A stopped study goes on where it was: run the same command again.
"""

_READING = (
    "Measured: from the smallest to the largest mean of the methods. An outcome is that of the "
    "methods that are decided. The report says each statement in words, and gives every method "
    "its interval."
)


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
        type=_data,
        default="digits",
        metavar="NAME|FILE.npz",
        help="digits, mnist, fashion-mnist or cifar10 (default: digits), or a file with the arrays "
        "x_train, y_train, x_test, y_test",
    )
    study.add_argument(
        "--network",
        type=keyword,
        default="small",
        metavar="NAME",
        help="small, resnet20 or vit-tiny (default: small)",
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
        help="how many seeds (default: 8; 1 with --quick, 20 with --full); with --until-decided "
        "the most there may be",
    )
    study.add_argument(
        "--until-decided",
        action="store_true",
        help="add seeds in rounds to what is undecided, and to nothing else",
    )
    study.add_argument(
        "--budget",
        metavar="TIME",
        help="with --until-decided: begin no round that would end later, e.g. 90m, 2h, 1h30m",
    )
    study.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="how many measurements at a time, each on one core (default: as many as there are "
        "cores)",
    )
    study.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where to measure: on this machine, or as tasks of a Ray cluster, which "
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
        help="small: only shows that everything works, and writes no files of figures",
    )
    size.add_argument(
        "--full",
        action="store_const",
        dest="size",
        const="full",
        help="large: every method, long training (many hours)",
    )
    study.add_argument(
        "--json", action="store_true", help="print outcomes, effects and intervals as JSON"
    )
    study.set_defaults(run=_study, size="default")


def _study(options: argparse.Namespace) -> None:
    from onsphere.studies.claims.plan import Plan
    from onsphere.studies.publish import publish
    from onsphere.studies.setup.data import Source
    from onsphere.studies.study import study

    looks, budget = _looks(options), _seconds(options.budget)
    if budget is not None and not options.until_decided:
        raise OnsphereError(f"--budget {options.budget} is for --until-decided: add that")
    cores = _cores() if options.jobs is None else options.jobs
    engine = _engine(options, cores)
    source = Source(options.data, options.data_dir, options.download)
    plan = Plan(source.identity, tuple(range(looks[-1])), options.size, looks, options.network)
    with bar(options.json) as show:

        def measured(done: "Done") -> None:
            show("measuring", done.cells_done, done.cells, share=done.done / done.total)

        def drawn(done: int, total: int) -> None:
            show("drawing figures", done, total)

        document = study(
            options.claims,
            plan,
            source,
            options.out,
            engine=engine,
            budget=budget,
            progress=measured,
            announce=lambda said: None if options.json else print(said, file=sys.stderr),
        )
        page = publish(
            document, options.out, jobs=cores, files=plan.size != "quick", progress=drawn
        )
    if options.json:
        print(json.dumps(_outcomes(document), indent=2))
        return
    from onsphere.report import summary

    console = Console()
    console.print(summary(document))
    console.print(_READING, highlight=False)
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


def _data(text: str) -> str:
    """Return the name of a data set in lower case, and the path of a file as it is."""
    return text if text.lower().endswith(".npz") else keyword(text)


def _looks(options: argparse.Namespace) -> tuple[int, ...]:
    """Return how many seeds there are at each look."""
    from onsphere.studies.claims.plan import SCALES

    scale = SCALES[options.size]
    usual = scale.looks if options.until_decided else (scale.seeds,)
    if options.seeds is None:
        return usual
    if options.seeds < 1:
        raise OnsphereError(f"a study needs at least one seed, got --seeds {options.seeds}")
    return (*(look for look in usual[:-1] if look < options.seeds), options.seeds)


_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def _seconds(text: str | None) -> float | None:
    """Read a time such as 90m, 2h or 1h30m."""
    if text is None:
        return None
    found = _TIME.fullmatch(text.strip().lower())
    parts = [float(part or 0) for part in found.groups()] if found else [0.0]
    seconds = sum(part * size for part, size in zip(parts, (3600, 60, 1), strict=False))
    if seconds <= 0:
        raise OnsphereError(
            f"--budget {text!r} is no time: give hours, minutes or seconds with their letters, as "
            "90m or 1h30m"
        )
    return seconds


def _outcomes(document: "Document") -> dict[str, Any]:
    return {
        "claims": {
            section.name: {
                "advice": section.advice,
                "statements": {
                    one.name: {
                        "hypothesis": one.hypothesis,
                        "basis": one.basis,
                        "outcome": str(one.outcome),
                        "effect": one.effect,
                        "margin": one.margin,
                        "methods": {
                            interval.label or "all": {
                                "outcome": str(interval.outcome),
                                "effect": interval.text,
                            }
                            for interval in one.intervals
                        },
                        "note": one.note,
                    }
                    for one in section.statements
                },
                "findings": list(section.findings),
                "command": section.command,
            }
            for section in document.sections
            if section.statements
        },
        "provenance": document.provenance,
        "warnings": list(document.warnings),
    }


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
