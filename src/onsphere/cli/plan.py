"""``onsphere plan``: what a run will do to weights on spheres, from its hyperparameters."""

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onsphere.cli.common.files import check_writable, writing
from onsphere.cli.common.parser import keyword, whole
from onsphere.errors import OnsphereError

if TYPE_CHECKING:
    from onsphere.cli.common.parser import Commands
    from onsphere.planning import Plan
    from onsphere.planning.compare import LayerComparison
    from onsphere.report import Document

_EXAMPLES = """examples:
  onsphere plan adamw --lr 1e-3 --weight-decay 0.1 --steps 100000 --schedule cosine --warmup 2000
  onsphere plan sgd --lr 0.1 --weight-decay 5e-4 --momentum 0.9 --steps 90000 \\
      --schedule step --drops 30000 60000 --batch 256
  onsphere plan muon --lr 0.02 --weight-decay 0.1 --shape 768x768 --steps 5000 --schedule wsd
  onsphere plan adam --lr 1e-3 --weight-decay 0 --steps 50000 --shape 576 --initial-norm 8
  onsphere plan adamw --lr 1e-3 --weight-decay 0.1 --steps 20000 --html plan.html
  onsphere plan --from run.jsonl                     a run that a monitor watched

OPTIMIZER is sgd, adam (with its decay in the gradient), adamw, lion or muon. What holds here holds
for weights of which only the direction matters; onsphere audit finds them. The rotation is the
angle between the weight before and after a step.
"""

_OPTIONS = ("betas", "momentum", "nesterov", "decoupled")
_HYPERPARAMETERS = (
    *_OPTIONS, "lr", "weight_decay", "steps", "schedule", "warmup", "final", "cooldown", "drops",
    "drop_by", "shape", "gradient_square", "initial_norm", "batch",
)  # fmt: skip


def add(commands: "Commands") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="what hyperparameters do to weights on spheres: rotation, norm, half-life",
        epilog=_EXAMPLES,
        description="Predict how fast weights on spheres turn, where their norms settle, how long "
        "that takes, and what a schedule does to it; and move the run to the sphere.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "optimizer",
        nargs="?",
        type=keyword,
        metavar="OPTIMIZER",
        help="sgd, adam, adamw, lion or muon",
    )
    _add_optimizer(parser)
    _add_schedule(parser)
    _add_weight(parser)
    parser.add_argument(
        "--from",
        type=Path,
        dest="watched",
        metavar="RUN",
        help="compare a run that a monitor watched with what was to be expected",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")
    parser.set_defaults(run=_run)


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--lr", type=float, metavar="X", help="the full learning rate")
    group.add_argument("--weight-decay", type=float, metavar="X", help="0 for none")
    group.add_argument(
        "--betas", nargs="+", metavar="X", help="of adam, adamw (0.9 0.999), lion (0.9 0.99)"
    )
    group.add_argument("--momentum", type=float, metavar="X", help="of sgd (0) and muon (0.95)")
    group.add_argument(
        "--nesterov", action=argparse.BooleanOptionalAction, help="of sgd (no) and muon (yes)"
    )
    group.add_argument(
        "--decoupled",
        action=argparse.BooleanOptionalAction,
        help="of sgd (no): decay that does not pass through the momentum",
    )
    group.add_argument("--batch", type=whole, metavar="N", help="examples per step")


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("schedule")
    group.add_argument("--steps", type=whole, metavar="N", help="length of the run")
    group.add_argument(
        "--schedule",
        type=keyword,
        metavar="KIND",
        help="constant (default), linear, cosine, wsd (constant, then linear), step",
    )
    group.add_argument("--warmup", type=whole, metavar="N", help="steps until the full rate")
    group.add_argument(
        "--final",
        type=float,
        metavar="X",
        help="part of the rate at the end of linear, cosine and wsd (default: 0)",
    )
    group.add_argument(
        "--cooldown",
        type=float,
        metavar="X",
        help="of wsd: part of the run in which the rate falls (default: 0.2)",
    )
    group.add_argument("--drops", nargs="+", metavar="N", help="of step: where the rate is divided")
    group.add_argument("--drop-by", type=float, metavar="X", help="by what (default: 10)")


def _add_weight(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("weight")
    group.add_argument(
        "--shape",
        metavar="SHAPE",
        help="of the weight that is on one sphere: 768x768, or 576 for a filter",
    )
    group.add_argument(
        "--gradient-square",
        type=float,
        metavar="L",
        help="mean of |w|² |gradient|² of that weight; sgd's norm depends on it, "
        "and all of adam with decay",
    )
    group.add_argument(
        "--initial-norm",
        type=float,
        metavar="X",
        help="of the weight (without --shape: root mean square of its entries)",
    )


def _run(options: argparse.Namespace) -> None:
    if options.html is not None:
        check_writable(options.html)
    if options.watched is not None:
        _compare(options)
        return
    planned = _planned(options)
    from onsphere.planning.codegen import recipe_code
    from onsphere.planning.html import document

    if options.html is not None:
        _write(document(planned), options.html)
    if options.json:
        from onsphere.planning import text

        more = {"findings": text.findings(planned), "notes": text.notes(planned),
                "code": recipe_code(planned)}  # fmt: skip
        print(json.dumps({**planned.to_dict(), **more}, indent=1, allow_nan=False))
        return
    print("\n".join(_lines(planned)))
    if options.html is not None:
        print(f"\nPage: {options.html}")


def _planned(options: argparse.Namespace) -> "Plan":
    from onsphere.planning import Schedule, plan

    for name in ("optimizer", "lr", "weight_decay", "steps"):
        if getattr(options, name) is None:
            said = name.upper() if name == "optimizer" else "--" + name.replace("_", "-")
            raise OnsphereError(
                f"a plan needs OPTIMIZER, --lr, --weight-decay (0 for none) and --steps; {said} is "
                "missing (or --from RUN for a run that a monitor watched)"
            )
    given = {"kind": options.schedule, "drops": options.drops and _numbers("drops", options.drops)}
    given |= {name: getattr(options, name) for name in ("warmup", "final", "cooldown", "drop_by")}
    schedule = Schedule(
        options.steps, **{name: value for name, value in given.items() if value is not None}
    )
    settings = {name: getattr(options, name) for name in _OPTIONS}
    if options.betas is not None:
        settings["betas"] = _betas(options.betas)
    return plan(
        options.optimizer, schedule, lr=options.lr, weight_decay=options.weight_decay,
        shape=_shape(options.shape), unit_gradient_square=options.gradient_square,
        initial_norm=options.initial_norm, batch_size=options.batch, **settings,
    )  # fmt: skip


def _numbers(option: str, words: Sequence[str]) -> tuple[int, ...]:
    try:
        return tuple(whole(word) for word in _split(words))
    except argparse.ArgumentTypeError:
        raise OnsphereError(
            f"--{option} takes whole numbers, as 1000 2000; got {' '.join(words)!r}"
        ) from None


def _betas(words: Sequence[str]) -> tuple[float, float]:
    try:
        first, second = (float(word) for word in _split(words))
        return first, second
    except ValueError:
        raise OnsphereError(
            f"--betas takes two numbers, as 0.9 0.95; got {' '.join(words)!r}"
        ) from None


def _split(words: Sequence[str]) -> list[str]:
    """Cut at commas and spaces: both are in use."""
    return [part for word in words for part in word.replace(",", " ").split()]


def _shape(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(int(word) for word in text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise OnsphereError(f"{text!r} is no shape; write it as 768x768 or 576") from None


def _lines(planned: "Plan") -> Iterator[str]:
    """Say a plan to a terminal."""
    from onsphere.planning import text
    from onsphere.planning.codegen import recipe_code
    from onsphere.planning.html import rotation_panel
    from onsphere.report.terminal_chart import chart

    width = min(shutil.get_terminal_size().columns, 100)
    yield from textwrap.wrap(text.heading(planned), width)
    if planned.settled is not None:
        yield from ("", "EQUILIBRIUM at the full rate")
        yield from _columns(text.quantities(planned))
    if planned.path is not None:
        yield from ("", "THE RUN")
        yield from _items(text.findings(planned), width)
        dotted = "; dotted: what each rate would settle at" if planned.settled else ""
        yield from ("", f"ROTATION per step, in radians{dotted}")
        yield from (
            "  " + line for line in chart(rotation_panel(planned, band=False), width - 2, 9)
        )
    code = recipe_code(planned)
    if code:
        yield from ("", "ON THE SPHERE: the same turning without decay, for an audit of the model")
        yield from ("  " + line for line in code)
    notes = text.notes(planned)
    if notes:
        yield from ("", "NOTES")
        yield from _items(notes, width)


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for name, value, unit in rows:
        yield f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {unit}".rstrip()


def _items(sentences: Iterable[str], width: int) -> Iterator[str]:
    for sentence in sentences:
        yield from textwrap.wrap(
            sentence, width, initial_indent="  - ", subsequent_indent="    ",
            break_on_hyphens=False,
        )  # fmt: skip


def _compare(options: argparse.Namespace) -> None:
    """Say how a watched run compares with its plan."""
    given = [
        name for name in ("optimizer", *_HYPERPARAMETERS) if getattr(options, name) is not None
    ]
    if given:
        said = "an OPTIMIZER" if given[0] == "optimizer" else "--" + given[0].replace("_", "-")
        raise OnsphereError(f"--from takes all settings from the run, so {said} cannot be given")
    from onsphere.monitor.run import Run
    from onsphere.planning import text
    from onsphere.planning.compare import compare
    from onsphere.planning.html import comparison_document, comparison_table

    layers = compare(Run.read(options.watched))
    if options.html is not None:
        _write(comparison_document(layers, options.watched.name), options.html)
    if options.json:
        print(json.dumps(_comparison_dict(layers), indent=1, allow_nan=False))
        return
    from rich.console import Console

    from onsphere.report import table

    console = Console()
    console.print(table(comparison_table(layers)))
    width = min(console.width, 100)
    print("\n".join(_items(text.comparison_findings(layers), width)))
    if options.html is not None:
        print(f"\nPage: {options.html}")


def _comparison_dict(layers: Sequence["LayerComparison"]) -> dict[str, Any]:
    from onsphere.planning import text

    names = ("norm", "expected_norm", "rotation", "expected_rotation")
    return {
        "layers": {
            layer.name: {
                "law": layer.law or None,
                "why": layer.why or None,
                **{name: _finite(value) for name, value in zip(names, layer.late, strict=True)},
                "norm_off": _finite(layer.off[0]),
                "rotation_off": _finite(layer.off[1]),
                "equilibrium_rotation": layer.settled.rotation if layer.settled else None,
                "equilibrium_norm": layer.settled.norm if layer.settled else None,
            }
            for layer in layers
        },
        "findings": text.comparison_findings(layers),
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if value == value and abs(value) != float("inf") else None


def _write(document: "Document", path: Path) -> None:
    from onsphere.report import html

    with writing(path):
        html.write(document, path)
