"""What the commands share that read a checkpoint and write another: arguments, loading, writing."""

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onsphere.cli.audit import add_target
from onsphere.cli.common.files import check_checkpoints, check_writable, writing
from onsphere.cli.common.progress import stages
from onsphere.report.progress import Stages

if TYPE_CHECKING:
    from onsphere.models.target import Target
    from onsphere.symmetry import EqualizeReport, FoldReport


def add_checkpoints(parser: argparse.ArgumentParser, train: bool) -> None:
    """Add the two files and the model, which is in training mode by default or not."""
    parser.add_argument("source", type=Path, metavar="IN", help="safetensors, .pt or .pth")
    parser.add_argument(
        "result", type=Path, metavar="OUT", help="the file to write, of any of these"
    )
    add_target(
        parser, "--model", metavar="TARGET", help="the model, as for onsphere audit", train=train
    )


def add_page(parser: argparse.ArgumentParser) -> None:
    """Add what asks for a page."""
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")


def check_page(page: Path) -> None:
    """Refuse to write a page over something that is none.

    Raises:
        TargetError: the name does not end as a page's does.
    """
    from onsphere.models.target import TargetError

    if page.suffix.lower() not in (".html", ".htm"):
        raise TargetError(f"--html {page} is no name of a page: let it end in .html")


def add_verification(parser: argparse.ArgumentParser) -> None:
    """Add what is asked of the result."""
    parser.add_argument(
        "--tolerance", type=float, metavar="X",
        help="largest relative change of the output to accept (default: rounding)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


@dataclass
class Rewriting:
    """A rewrite under way.

    Args:
        target: the model with the weights of the checkpoint.
        stage: says what is done now.
        tensors: how many there are in the checkpoint.
    """

    target: "Target"
    stage: Stages
    tensors: int


@contextmanager
def rewriting(
    options: argparse.Namespace, costs: Mapping[str, float] | None = None
) -> Iterator[Rewriting]:
    """Load the model; after what is done to it inside, write the checkpoint, whole or not at all.

    Args:
        options: of the command line, with the arguments above.
        costs: what the stages between loading and writing cost, where that is known.
    """
    from onsphere.models import checkpoint
    from onsphere.models.load import load
    from onsphere.models.target import parse_shape

    page = getattr(options, "html", None)
    if page is not None:
        check_writable(page)
        check_page(page)
    shape = None if options.input is None else parse_shape(options.input)
    check_checkpoints(options.source, options.result, options.force)
    with stages(options.json, costs) as stage:
        stage(f"loading {options.source}")
        source = checkpoint.read(options.source)
        target = load(
            options.model, shape=shape, train=options.train, size="real", weights=options.source
        )
        yield Rewriting(target, stage, len(source.tensors))
        stage(f"writing {options.result}")
        matched = checkpoint.matched(target.model, source)
        checkpoint.write(source, target.model, matched, options.result)


def report_on(
    options: argparse.Namespace, work: Rewriting, report: "FoldReport | EqualizeReport", data: Any
) -> None:
    """Write the page that was asked for, and print what was done: as text, or as JSON.

    Args:
        options: of the command line.
        work: the checkpoint and the model.
        report: what was done.
        data: the same as JSON has it.
    """
    if options.html is not None:
        with writing(options.html):
            report.to_html(options.html)
    if options.json:
        print(json.dumps({"output": str(options.result), **data}, indent=1))
        return
    print(f"{options.result}: {work.tensors} tensors\n{report}")
    if options.html is not None:
        print(f"\nPage: {options.html}")
