"""``onsphere audit``: which weights of a model live on spheres."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onsphere.cli.common.files import check_writable, writing
from onsphere.cli.common.progress import stages

if TYPE_CHECKING:
    from onsphere.cli.common.parser import Commands

_EXAMPLES = """examples:
  onsphere audit mypackage.models:resnet --input 8x3x32x32
  onsphere audit train.py:build                      build() returns (model, inputs)
  onsphere audit llama/config.json                   7 billion weights, no memory, seconds
  onsphere audit llama/config.json --shrink          two narrow layers of it, with certificates
  onsphere audit timm:resnet18                       by name, random weights, its own input size
  onsphere audit hf:qwen3 --shrink                   of transformers by name, its default config
  onsphere audit gpt2/ --html audit.html             its own weights, and a page
  onsphere audit net.py:Net --weights net.safetensors --input 8x784 --json > audit.json

The model is audited as it trains, unless --eval says otherwise.

TARGET is package.module:factory or path.py:factory, where calling the factory gives a module, or a
module and its inputs (a tensor, a tuple, or a dict: a batch); timm:NAME or torchvision:NAME;
hf:TYPE, an architecture of transformers by its model_type with default values; or a config file or
model directory of transformers, hf: before it or not. Nothing is downloaded, and no pickled code is
run.

A config is built at its full size on the meta device: exact, in seconds, but not certified on
numbers, and without what only numbers show (finer spheres, some inert weights and shifts). --shrink
builds two of its layers with memory, up to 16 times narrower where the structure allows, which
shows all of them. A model
directory with safetensors of at most 200 million weights is audited with these weights.
"""


def add(commands: "Commands") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "audit",
        help="which weights of a model live on spheres",
        epilog=_EXAMPLES,
        description="Find every scale symmetry of a model, and say what weight decay does.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target(
        parser, "target", metavar="TARGET", help="a factory, a name, a config file or a directory",
    )  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--shrink", action="store_const", dest="size", const="shrink",
        help="of a config: two narrow layers with memory, so that claims are certified",
    )  # fmt: skip
    size.add_argument(
        "--full", action="store_const", dest="size", const="full",
        help="the full size on the meta device, also where weights lie beside a config",
    )  # fmt: skip
    add_checkpoint(parser)
    parser.add_argument(
        "--search-seconds", type=_seconds, metavar="SECONDS",
        help="processor time for a search by numbers for symmetries that operations "
        "alone do not show (default: 2)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the audit as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")
    parser.set_defaults(run=_run, size="auto")


def add_target(
    parser: argparse.ArgumentParser, *names: str, metavar: str, help: str, train: bool = True
) -> None:
    """Add what says which model to look at, and how: in training mode or not by default."""
    first, second = (" (default)", "") if train else ("", " (default)")
    required = {"required": True} if names[0].startswith("-") else {}
    parser.add_argument(*names, metavar=metavar, help=help, **required)  # type: ignore[arg-type]
    parser.add_argument(
        "--input", metavar="SHAPE",
        help="shape of a random input, as 8x3x32x32, in the place of what TARGET gives; of floats "
        "for a factory: for token ids let it return (model, ids)",
    )  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--train", action="store_true", default=train, help=f"in training mode{first}"
    )
    mode.add_argument(
        "--eval", action="store_false", dest="train",
        help=f"in evaluation mode{second}, where running statistics are numbers like weights",
    )  # fmt: skip


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add what says which tensors to load: the same for every command."""
    parser.add_argument(
        "--checkpoint", "--weights", dest="weights", metavar="FILE",
        help="tensors to load: safetensors, or a .pt or .pth that holds nothing else",
    )  # fmt: skip


def _seconds(text: str) -> float:
    from math import isfinite

    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not (isfinite(seconds) and seconds >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds: give 0 or more, as 30")
    return seconds


def _run(options: argparse.Namespace) -> None:
    from onsphere.models.load import load
    from onsphere.models.target import parse_shape
    from onsphere.symmetry import audit
    from onsphere.symmetry.search.null_space import SEARCH_SECONDS

    shape = None if options.input is None else parse_shape(options.input)
    seconds = SEARCH_SECONDS if options.search_seconds is None else options.search_seconds
    if options.html is not None:
        check_writable(options.html)
    with stages(options.json) as stage:
        stage(f"loading {options.target}")
        target = load(
            options.target, shape=shape, train=options.train, size=options.size,
            weights=options.weights,
        )  # fmt: skip
        stage(f"auditing {type(target.model).__name__}")
        found = audit(
            target.model, target.args, target.kwargs, output=target.output, progress=stage,
            search_seconds=seconds,
        )  # fmt: skip
        found = replace(found, note=target.note)
        if options.html is not None:
            stage(f"drawing {options.html}")
            with writing(options.html):
                found.to_html(options.html)
    if options.json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    print(found)
    if options.html is not None:
        print(f"\nPage: {options.html}")
