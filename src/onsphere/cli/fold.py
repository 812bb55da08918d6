"""``onsphere fold``: norms folded into the linear maps around them, checkpoint to checkpoint."""

import argparse
from typing import TYPE_CHECKING

from onsphere.cli.common.parser import keyword
from onsphere.cli.common.rewriting import (
    add_checkpoints,
    add_page,
    add_verification,
    report_on,
    rewriting,
)

if TYPE_CHECKING:
    from onsphere.cli.common.parser import Commands
    from onsphere.symmetry import FoldReport

_EXAMPLES = """examples:
  onsphere fold net.safetensors folded.safetensors --model net.py:Net --input 1x3x32x32
  onsphere fold in.safetensors out.safetensors --model gpt2/config.json
  onsphere fold in.safetensors out.safetensors --model net.py:build --what batchnorm
  onsphere fold net.pt folded.pt --model timm:resnet18 --html folded.html

BatchNorm goes into the map that writes its input, gains and shifts of LayerNorm, RMSNorm and
GroupNorm into the maps that read them, layer scale into the map behind it, LayerNorm's centring
into the maps that write its input. OUT holds the same names as IN and loads into the same class: a
folded norm is there as the identity. (In Python, onsphere.fold also takes such norms out, and gives
maps the bias that they lack.)
The output of the model on the given inputs is compared before anything is written, and the file is
there whole or not at all.
"""


def add(commands: "Commands") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "fold",
        help="rewrite a checkpoint: norms folded into the linear maps around them",
        epilog=_EXAMPLES,
        description="Rewrite a checkpoint so that its norms are folded into linear maps.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoints(parser, train=False)
    parser.add_argument(
        "--what", type=keyword, default="all",
        choices=["all", "batchnorm", "gain", "scale", "centering"],
        help="norms with running statistics, gains of norms, scales of layers, centring of "
        "LayerNorm, or all (default)",
    )  # fmt: skip
    add_page(parser)
    add_verification(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from onsphere.symmetry import fold

    with rewriting(options) as work:
        work.stage("folding, and comparing the outputs")
        target = work.target
        folded = fold(
            target.model, target.args, target.kwargs, what=options.what, output=target.output,
            tolerance=options.tolerance, inplace=True, keep_modules=True,
        )  # fmt: skip
    report_on(options, work, folded.report, _as_json(folded.report))


def _as_json(report: "FoldReport") -> dict[str, object]:
    return {
        "folded": [
            {"name": p.name, "kind": p.kind, "into": list(p.into), "note": p.note}
            for p in report.folded
        ],
        "kept": [{"name": p.name, "kind": p.kind, "reason": p.reason} for p in report.kept],
        "change_in_float64": report.change_in_float64,
        "change": report.change,
        "dtype": str(report.dtype).removeprefix("torch."),
    }
