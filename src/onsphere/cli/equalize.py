"""``onsphere equalize``: channels rescaled against each other, checkpoint to checkpoint."""

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
    from onsphere.symmetry import EqualizeReport

_EXAMPLES = r"""examples:
  onsphere fold net.safetensors folded.safetensors --model net.py:Net --input 1x3x32x32
  onsphere equalize folded.safetensors equal.safetensors --model net.py:Net --input 1x3x32x32 \
      --modes current
  onsphere equalize in.safetensors out.safetensors --model gpt2/config.json --html ranges.html
  onsphere equalize in.safetensors out.safetensors --model net.py:build --objective quantization

The function stays: each channel is scaled up where it is written and down where it is read, so that
both have the same range (range), the total norm is least (norm), or rounding the weights to whole
numbers loses least (quantization). Fold norms first; a BatchNorm that was folded is the identity in
evaluation mode only, hence --modes current. The output of the model on the given inputs is
compared before anything is written, in training and in evaluation mode, and the file is there whole
or not at all.
"""


def add(commands: "Commands") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "equalize",
        help="rewrite a checkpoint: channels of equal range, for whole-number weights",
        epilog=_EXAMPLES,
        description="Rewrite a checkpoint so that its channels suit a coarse grid.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoints(parser, train=False)
    parser.add_argument(
        "--objective", type=keyword, choices=["range", "norm", "quantization"], default="range",
        help="equal ranges (default), the least norm, or the least loss by rounding",
    )  # fmt: skip
    parser.add_argument(
        "--bits", type=int, default=8, help="of the whole numbers that losses are of (default: 8)"
    )
    parser.add_argument(
        "--grid", type=_grid, default="tensor", metavar="GRID",
        help="what shares a step: tensor (default), channel, or a number of entries",
    )  # fmt: skip
    parser.add_argument(
        "--modes", type=keyword, choices=["both", "current"], default="both",
        help="where the output must stay: in training and in evaluation mode (default), or in the "
        "mode of the model alone",
    )  # fmt: skip
    add_page(parser)
    add_verification(parser)
    parser.set_defaults(run=_run)


def _grid(word: str) -> str | int:
    return int(word) if word.isdigit() else keyword(word)


def _run(options: argparse.Namespace) -> None:
    from onsphere.symmetry import equalize

    with rewriting(options) as work:
        work.stage("equalizing, and comparing the outputs")
        target = work.target
        done = equalize(
            target.model, target.args, target.kwargs, objective=options.objective,
            bits=options.bits, grid=options.grid, modes=options.modes, output=target.output,
            tolerance=options.tolerance, inplace=True,
        )  # fmt: skip
    report_on(options, work, done.report, _as_json(done.report))


def _as_json(report: "EqualizeReport") -> dict[str, object]:
    return {
        "objective": report.objective,
        "bits": report.bits,
        "grid": report.grid,
        "modes": list(report.modes),
        "families": [
            {"names": list(f.names), "count": f.count, "largest_factor": f.largest_factor}
            for f in report.families
        ],
        "weights": [
            {
                "name": w.name,
                "spread_before": w.spread[0],
                "spread_after": w.spread[1],
                "loss_before": w.loss_before,
                "loss_after": w.loss_after,
            }
            for w in report.weights
        ],
        "norm_before": report.norm_before,
        "norm_after": report.norm_after,
        "change_in_float64": report.change_in_float64,
        "change": report.change,
        "dtype": str(report.dtype).removeprefix("torch."),
    }
