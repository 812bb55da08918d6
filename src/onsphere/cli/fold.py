"""``onsphere fold``: norms folded into the linear maps around them, checkpoint to checkpoint."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from onsphere.cli._files import check_checkpoints
from onsphere.cli._parser import keyword
from onsphere.cli._progress import stages
from onsphere.cli.audit import add_target

if TYPE_CHECKING:
    from onsphere.cli._parser import Commands
    from onsphere.symmetry import FoldReport

_EXAMPLES = """examples:
  onsphere fold net.safetensors folded.safetensors --model net.py:Net --input 1x3x32x32
  onsphere fold in.safetensors out.safetensors --model gpt2/config.json
  onsphere fold in.safetensors out.safetensors --model net.py:build --what batchnorm

BatchNorm goes into the map that writes its input, gains and shifts of LayerNorm, RMSNorm and
GroupNorm into the maps that read them, layer scale into the map behind it. OUT holds the same names
as IN and loads into the same class: a folded norm is there as the identity. (In Python,
onsphere.fold also takes such norms out, and gives maps the bias that they lack.)
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
    parser.add_argument("source", type=Path, metavar="IN", help="safetensors, .pt or .pth")
    parser.add_argument(
        "result", type=Path, metavar="OUT", help="the file to write, of any of these"
    )
    add_target(parser, "--model", metavar="TARGET", help="the model, as for onsphere audit")
    parser.add_argument(
        "--what", type=keyword, choices=["all", "batchnorm", "gain", "scale"], default="all",
        help="norms with running statistics, gains of norms, scales of layers, or all (default)",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, metavar="X",
        help="largest relative change of the output to accept (default: rounding)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    parser.set_defaults(run=_run, train=False)


def _run(options: argparse.Namespace) -> None:
    from onsphere.models import checkpoint
    from onsphere.models.load import load
    from onsphere.models.target import parse_shape
    from onsphere.symmetry import fold

    shape = None if options.input is None else parse_shape(options.input)
    check_checkpoints(options.source, options.result, options.force)
    with stages(options.json, ("loading", "folding", "writing")) as stage:
        stage(f"loading {options.source}")
        source = checkpoint.read(options.source)
        target = load(
            options.model, shape=shape, train=options.train, size="real", weights=options.source
        )
        stage("folding, and comparing the outputs")
        folded = fold(
            target.model, target.args, target.kwargs, what=options.what, output=target.output,
            tolerance=options.tolerance, inplace=True, keep_modules=True,
        )  # fmt: skip
        stage(f"writing {options.result}")
        names = checkpoint.matched(folded.model, source)
        checkpoint.write(source, folded.model, names, options.result)
    if options.json:
        print(json.dumps({"output": str(options.result), **_as_json(folded.report)}, indent=1))
    else:
        print(f"{options.result}: {len(source.tensors)} tensors\n{folded.report}")


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
