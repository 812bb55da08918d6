"""``onsphere canonicalize``: the same function from balanced weights, checkpoint to checkpoint."""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from onsphere.cli.common.parser import keyword
from onsphere.cli.common.rewriting import add_checkpoints, add_verification, rewriting

if TYPE_CHECKING:
    from torch import nn

    from onsphere.cli.common.parser import Commands

_EXAMPLES = """examples:
  onsphere canonicalize net.safetensors balanced.safetensors --model net.py:Net --input 8x3x32x32
  onsphere canonicalize in.safetensors out.safetensors --model gpt2/config.json
  onsphere canonicalize in.safetensors out.safetensors --model net.py:build --radius unit

Traded scales are balanced at the least total norm, channel by channel; weights on spheres get the
length asked for.
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
    add_checkpoints(parser, train=True)
    parser.add_argument(
        "--radius", type=keyword, choices=["initial", "unit", "fan_in"], default="initial",
        help="length of weights on spheres: the one they have (default), 1, or the square root of "
        "the entries of a vector",
    )  # fmt: skip
    parser.add_argument(
        "--modes", type=keyword, choices=["both", "audited"], default="both",
        help="where the output must stay: in training and in evaluation mode (default), or in the "
        "audited mode alone, for a network that is never used in the other",
    )  # fmt: skip
    parser.add_argument(
        "--channels", action=argparse.BooleanOptionalAction, default=True,
        help="balance rows, columns and filters one by one (default), or whole weights only",
    )  # fmt: skip
    add_verification(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from onsphere.symmetry import audit, canonicalize
    from onsphere.symmetry.audit import STAGES

    balancing = "balancing, and comparing the outputs"
    with rewriting(options, {**STAGES, balancing: 7}) as work:
        target = work.target
        before = _norm(target.model)
        work.stage(f"auditing {type(target.model).__name__}")
        found = audit(
            target.model, target.args, target.kwargs, output=target.output, progress=work.stage
        )
        work.stage(balancing)
        canonicalize(
            target.model, found, radius=options.radius, modes=options.modes,
            channels=options.channels, tolerance=options.tolerance, inplace=True,
        )  # fmt: skip
    modes = ["train", "eval"] if options.modes == "both" else [found.mode]
    _say(options, work.tensors, modes, before, _norm(target.model), target.note)


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
        "channels": options.channels,
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
