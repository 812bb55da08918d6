"""Amplification in a terminal: a row per layer, and what the table does not hold in words."""

from textwrap import fill
from typing import TYPE_CHECKING

from onsphere.report import Table, plain_text, table
from onsphere.report.document import Cell
from onsphere.report.number import number

if TYPE_CHECKING:  # the result prints itself by these functions
    from onsphere.robustness.amplification.result import Amplification, LayerGain, Quantiles

_WIDTH = 100
_TITLES = {
    "absolute": "absolute",
    "incremental": "increm.",
    "relative": "relative",
    "effective": "with norm",
    "singular": "σ max",
    "alignment": "aligned",
    "weight_norm": "|W|",
}


def plain(found: "Amplification") -> str:
    """Return the table and the lines below it."""
    shown = plain_text(table(gain_table(found)), width=1000)  # names in full
    return "\n".join([shown, *(fill(line, _WIDTH) for line in lines(found))])


def lines(found: "Amplification") -> list[str]:
    """Say in plain words what the table does not hold."""
    return [*_logit_lines(found), *_control_lines(found), *found.notes]


def gain_table(found: "Amplification") -> Table:
    """Return the median gains, a row per layer; ``~`` marks what the rescale moves."""
    titles = ["layer", "absolute", "÷ random", *list(_TITLES.values())[1:]]
    return Table(
        f"What {found.model} does to perturbations: medians of {found.examples} examples",
        titles,
        [_row(layer) for layer in found.layers],
        "~ moves under a rescaling that keeps the function: scale-dependent"
        if found.control
        else "",
    )


def _row(layer: "LayerGain") -> list[Cell]:
    values = {m: q.middle for m, q in layer.adversarial.items()}
    if layer.singular is not None:
        values["singular"] = layer.singular.middle
    else:
        values.pop("effective", None)
    if layer.weight_norm is not None:
        values["weight_norm"] = layer.weight_norm

    def cell(measure: str) -> Cell:
        if measure not in values:
            return None
        mark = " ~" if measure in layer.bookkeeping else ""
        return number(values[measure], 3) + mark

    excess = None if layer.excess is None else number(layer.excess, 3)
    first, *rest = (cell(m) for m in _TITLES)
    return [layer.name, first, excess, *rest]


def _logit_lines(found: "Amplification") -> list[str]:
    if found.slope is None or found.margin is None or found.distance is None:
        return []
    dual = {"linf": "l1", "l2": "l2"}[found.norm]
    flat = f"; the gradient is 0 at {found.flat:.1%} of them" if found.flat else ""
    return [
        f"At the logits: margin {_spread(found.margin)}, slope ({dual} norm of its gradient) "
        f"{_spread(found.slope)}, margin over slope {_spread(found.distance)} in {found.norm} "
        f"(median [10%, 90%] of examples{flat})."
    ]


def _control_lines(found: "Amplification") -> list[str]:
    if found.control is None:
        return []
    change = found.control.change
    near = f"to {number(change, 2)}" if change else "to the last bit"
    kept = f"A rescaled copy computes the same function {near}"
    if not found.control.is_same_function:
        return [
            f"The rescaled copy does not compute the same function: outputs differ by "
            f"{number(change, 2)}, so what moves between the two says nothing."
        ]
    if not found.bookkeeping:
        return [f"{kept}; no measure moved."]
    still = [m for m in _TITLES if m not in found.bookkeeping]
    return [
        f"{kept}. Moved by it, so scale-dependent: {', '.join(found.bookkeeping)}. "
        f"Not moved at any layer: {', '.join(still)}."
    ]


def _spread(q: "Quantiles") -> str:
    return f"{number(q.middle, 3)} [{number(q.low, 3)}, {number(q.high, 3)}]"
