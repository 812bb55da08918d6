"""``onsphere canonicalize``: the same function from balanced weights, checkpoint to checkpoint."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onsphere.cli._files import check_checkpoints
from onsphere.cli._parser import keyword
from onsphere.cli._progress import stages
from onsphere.cli.audit import add_target

if TYPE_CHECKING:
    from torch import nn

    from onsphere.cli._parser import Commands

_EXAMPLES = """examples:
  onsphere canonicalize net.safetensors balanced.safetensors --model net.py:Net --input 8x3x32x32
  onsphere canonicalize in.safetensors out.safetensors --model gpt2/config.json
  onsphere canonicalize in.safetensors out.safetensors --model net.py:build --radius unit

Traded scales are balanced at the least total norm; weights on spheres get the length asked for.
The output of the model on the given inputs is compared before anything is written, in training and
in evaluation mode, and the file is there whole or not at all. Names, dtypes and metadata of the
input file are kept.
"""


def add(commands: "Commands") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "canonicalize",
        help="rewrite a checkpoint: the same function from balanced weights",
        epilog=_EXAMPLES,
        description="Rewrite a checkpoint so that the same function has balanced weights.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="IN", help="safetensors, .pt or .pth")
    parser.add_argument(
        "result", type=Path, metavar="OUT", help="the file to write, of any of these"
    )
    add_target(parser, "--model", metavar="TARGET", help="the model, as for onsphere audit")
    parser.add_argument(
        "--radius", type=keyword, choices=["initial", "unit", "fan_in"], default="initial",
        help="length of weights on spheres: the one they have (default), 1, or the square root of "
        "the entries of a vector",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, metavar="X",
        help="largest relative change of the output to accept (default: rounding)",
    )  # fmt: skip
    parser.add_argument(
        "--modes", type=keyword, choices=["both", "audited"], default="both",
        help="where the output must stay: in training and in evaluation mode (default), or in the "
        "audited mode alone, for a network that is never used in the other",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from onsphere.models import checkpoint
    from onsphere.models.load import load
    from onsphere.models.target import parse_shape
    from onsphere.symmetry import audit, canonicalize
    from onsphere.symmetry.audit import STAGES

    shape = None if options.input is None else parse_shape(options.input)
    check_checkpoints(options.source, options.result, options.force)
    with stages(options.json, STAGES) as stage:
        stage(f"loading {options.source}")
        source = checkpoint.read(options.source)
        target = load(
            options.model, shape=shape, train=options.train, size="real", weights=options.source
        )
        before = _norm(target.model)
        stage(f"auditing {type(target.model).__name__}")
        found = audit(
            target.model, target.args, target.kwargs, output=target.output, progress=stage
        )
        stage("balancing, and comparing the outputs")
        canonicalize(
            target.model, found, radius=options.radius, modes=options.modes,
            tolerance=options.tolerance, inplace=True,
        )  # fmt: skip
        stage(f"writing {options.result}")
        names = checkpoint.matched(target.model, source)
        checkpoint.write(source, target.model, names, options.result)
    modes = ["train", "eval"] if options.modes == "both" else [found.mode]
    _say(options, len(source.tensors), modes, before, _norm(target.model), target.note)


def _say(
    options: argparse.Namespace,
    tensors: int,
    modes: list[str],
    before: float,
    after: float,
    note: str,
) -> None:
    done: dict[str, Any] = {
        "output": str(options.result),
        "tensors": tensors,
        "modes": modes,
        "norm_before": before,
        "norm_after": after,
        **({"note": note} if note else {}),
    }
    if options.json:
        print(json.dumps(done, indent=1))
        return
    print(
        f"{options.result}: {tensors} tensors; the norm of all weights went from {before:.6g} to "
        f"{after:.6g}, and the output stayed in {' and in '.join(modes)} mode"
        + (f"\n({note})" if note else "")
    )


def _norm(model: "nn.Module") -> float:
    from onsphere.symmetry.rewrite.rescale import norm_of

    return math.hypot(*(norm_of(p) for p in model.parameters()))
