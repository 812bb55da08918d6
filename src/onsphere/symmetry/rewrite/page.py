"""What pages about rewritten weights share: ranges of channels, sizes of entries, as pictures."""

from collections.abc import Sequence

from torch import Tensor

from onsphere.report import Figure, Panel, Series, Table
from onsphere.symmetry.rewrite.ranges import WeightRanges

_PANELS = 12


def figures(weights: Sequence[WeightRanges]) -> list[Figure]:
    """Return the pictures of the weights whose channels differ most; none without weights."""
    if not weights:
        return []
    shown = sorted(weights, key=lambda w: -w.spread[0])[:_PANELS]
    left = len(weights) - len(shown)
    more = f" {left} more weights are in the table." if left else ""
    return [
        Figure(
            "ranges", "Ranges of output channels before and after",
            "Largest absolute entry of each output channel, from the smallest to the largest; a "
            "flat line means that all channels use the whole grid." + more,
            [_ranges(w) for w in shown],
        ),
        Figure(
            "sizes", "Sizes of entries before and after",
            "Share of the entries by their size, counted in halvings below the largest entry of "
            "the weight. With one step for the whole weight, 8 bits lose what is 8 or more "
            "halvings below." + more,
            [_sizes(w) for w in shown],
        ),
    ]  # fmt: skip


def table(weights: Sequence[WeightRanges], bits: int = 8, step: str = "weight") -> Table:
    """Return ranges and rounding losses of all weights.

    Args:
        weights: the weights.
        bits: of the whole numbers that losses are of.
        step: what shares a step, in words.
    """
    lost = f"lost by int{bits}"
    columns = (
        "weight", "largest / smallest, before", "after", f"{lost}, before", f"{lost}, after"
    )  # fmt: skip
    rows = [(w.name, *w.spread, w.loss_before, w.loss_after) for w in weights]
    note = (
        "Lost: the share of the squared norm of an output channel that rounding loses, in the mean "
        f"over channels; signed whole numbers of {bits} bits, one step per {step}."
    )
    return Table("Weights", columns, rows, note)


def _ranges(w: WeightRanges) -> Panel:
    series = [_sorted("before", w.before), _sorted("after", w.after)]
    return Panel(w.name, "channel, by range", "largest entry", series, y_scale="log")


def _sorted(label: str, ranges: Tensor) -> Series:
    found: Sequence[float] = ranges[ranges > 0].sort().values.tolist()
    return Series(label, range(len(found)), found)


def _sizes(w: WeightRanges) -> Panel:
    series = [
        Series(label, range(len(shares)), shares.tolist(), style="both")
        for label, shares in (("before", w.sizes_before), ("after", w.sizes_after))
    ]
    return Panel(w.name, "halvings below the largest", "share of entries", series)
