"""``onsphere norms``: what each method is invariant to, measured."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from onsphere.errors import OnsphereError

if TYPE_CHECKING:
    from onsphere.cli.common.parser import Commands

_NORMS_EXAMPLES = """examples:
  onsphere norms                          what each method is invariant to, measured
  onsphere norms --json                   the same with every residual, for machines
"""


_NORMS_NOTE = (
    "scale: the finest part whose scale does not matter. degree: growth of the output when W "
    "doubles, as a power. shifts: bias = each entry of b; layer rows = W + 1vᵀ, b + c; group rows "
    "= the same per group; row entries = w + c within a row; layer bias = b + c. leak: change of "
    "the output when W doubles at the method's real eps."
)


def add(commands: "Commands") -> None:
    """Add the command to the parser."""
    norms = commands.add_parser(
        "norms",
        help="what each normalization is invariant to, measured",
        epilog=_NORMS_EXAMPLES,
        description="Measure the invariances of every method on a random layer in float64.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    norms.add_argument("--seed", type=int, default=0, help="of the random layer (default: 0)")
    norms.add_argument("--json", action="store_true", help="print every residual as JSON")
    norms.set_defaults(run=_norms)


def _norms(options: argparse.Namespace) -> None:
    from onsphere.norms import invariance_table

    if not 0 <= options.seed < 2**63:
        raise OnsphereError(f"--seed must be from 0 to 2**63 - 1, got {options.seed}")
    rows = invariance_table(options.seed)
    if options.json:
        print(json.dumps([_finite(asdict(row)) for row in rows], indent=2))
        return
    from onsphere.report import Table, table

    console = Console()
    console.print(
        table(
            Table(
                "What changes nothing, measured at eps → 0",
                ("method", "scale of W", "scale of W and b", "data", "degree", "shifts", "leak"),
                [
                    (
                        row.name.replace("normalization", "norm"),
                        row.weight,
                        row.weight_and_bias,
                        "yes" if row.data else "no",
                        row.degree,
                        ", ".join(row.shifts) or "none",
                        row.leak,
                    )
                    for row in rows
                ],
                _NORMS_NOTE,
            )
        )
    )


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a leak that does not exist is null."""
    return {k: None if isinstance(v, float) and v != v else v for k, v in values.items()}
