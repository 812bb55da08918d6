"""Amplification as sections of a page: gain against depth, and what is bookkeeping."""

from collections.abc import Iterator

from onsphere.report.document import Cell, Figure, Panel, Reference, Section, Series, Table
from onsphere.report.number import number
from onsphere.robustness.amplification.result import (
    MEASURES,
    Amplification,
    LayerGain,
    Quantiles,
)
from onsphere.robustness.amplification.text import gain_table, lines

_STATEMENT = (
    "How large a perturbation of the input is at each layer, beside random perturbations of the "
    "same length. Absolute and incremental gains, singular values and weight norms can depend on "
    "how scales are booked between weights; relative gains and alignments cannot."
)
_CAPTION = (
    "Layers in the order in which they run. Lines: medians over examples; bands: from a tenth to "
    "nine tenths of them. Dashed: random perturbations of the same length. Points: the same "
    "perturbation in a rescaled copy of the model that computes the same function; where they "
    "leave the line, the measure is scale-dependent."
)
_LAYER_CAPTION = (
    "Linear layers with the normalization after them. What a layer does to the perturbation that "
    "arrives lies below its largest singular value, the more so the less the two are aligned. The "
    "norm of the weight as it is stored need not follow either."
)
_NAMES_THAT_FIT = 12


def sections(found: Amplification, command: str = "") -> Iterator[Section]:
    """Give what a page says of a model's amplification.

    Args:
        found: the measurement.
        command: how to make it again.
    """
    yield Section(
        name="amplification",
        title="What each layer does to a perturbation",
        statement=_STATEMENT,
        figure_of_merit=_merit(found),
        findings=lines(found),
        conditions=_conditions(found),
        figures=[_depth(found), *_linear(found)],
        tables=[gain_table(found), _quantiles(found)],
        command=command,
    )


def _merit(found: Amplification) -> str:
    last = found.layers[-1]
    gain = last.adversarial["absolute"].middle
    beside = "" if last.excess is None else f", {number(last.excess, 3)} times a random one's"
    return f"gain at the output {number(gain, 3)}{beside}"


def _conditions(found: Amplification) -> list[str]:
    share = (
        "" if found.share is None else f", {number(found.share.middle, 2)} of the input's length"
    )
    left_out = f"; {found.unchanged} more had none and are left out" if found.unchanged else ""
    return [
        f"{found.examples} examples with perturbations of length {number(found.size.middle, 3)} "
        f"(median){share}{left_out}",
        f"{found.draws} random perturbations per example; all lengths are Euclidean; evaluation "
        "mode",
    ]


# --- figures --------------------------------------------------------------------------------------


def _depth(found: Amplification) -> Figure:
    panels = [
        _panel(found, "absolute", "Absolute gain", "|δh| / |δ|"),
        _panel(found, "relative", "Relative gain", "(|δh| / |h|) / (|δ| / |x|)"),
    ]
    return Figure("gain-depth", "Gain against depth", _CAPTION, panels, columns=2)


def _panel(found: Amplification, measure: str, title: str, label: str) -> Panel:
    layers = list(found.layers)
    series = [
        _line("adversarial", [layer.adversarial.get(measure) for layer in layers]),
        _line("random, same length", [layer.random.get(measure) for layer in layers], dashed=True),
    ]
    if found.control is not None:
        series.append(_points("rescaled copy", layers, measure))
    named = len(layers) <= _NAMES_THAT_FIT
    return Panel(
        title,
        "layer" if named else "layer, in the order of execution",
        label,
        [s for s in series if any(y == y for y in s.y)],
        y_scale="log",
        references=[Reference("horizontal", 1.0)],
        categories=[layer.name for layer in layers] if named else (),
    )


def _line(label: str, quantiles: list[Quantiles | None], *, dashed: bool = False) -> Series:
    nan = float("nan")
    low, middle, high = (
        [nan if q is None else getattr(q, end) for q in quantiles]
        for end in ("low", "middle", "high")
    )
    return Series(label, range(len(quantiles)), middle, low, high, dashed=dashed)


def _points(label: str, layers: list[LayerGain], measure: str) -> Series:
    """Return where the rescale brought the median."""
    nan = float("nan")
    moved = [
        layer.adversarial[measure].middle * layer.control.get(measure, nan)
        if measure in layer.adversarial
        else nan
        for layer in layers
    ]
    return Series(label, range(len(layers)), moved, style="points", color="control")


def _linear(found: Amplification) -> Iterator[Figure]:
    layers = [layer for layer in found.layers if layer.singular is not None]
    if not layers:
        return
    nan = float("nan")
    named = len(layers) <= _NAMES_THAT_FIT
    names = [layer.name for layer in layers] if named else ()
    x_label = "linear layer" if named else "linear layer, in the order of execution"
    gains = [
        _line("largest singular value", [layer.singular for layer in layers]),
        _line("gain of the perturbation", [layer.adversarial.get("effective") for layer in layers]),
        Series(
            "norm of the weight",
            range(len(layers)),
            [nan if layer.weight_norm is None else layer.weight_norm for layer in layers],
            style="both",
            dashed=True,
        ),
    ]
    alignments = [
        _line("adversarial", [layer.adversarial.get("alignment") for layer in layers]),
        _line(
            "random, same length",
            [layer.random.get("alignment") for layer in layers],
            dashed=True,
        ),
    ]
    yield Figure(
        "linear-layers",
        "Linear layers: what they could do, and what they do",
        _LAYER_CAPTION,
        [
            Panel("Gain", x_label, "factor", gains, y_scale="log", categories=names),
            Panel("Alignment", x_label, "|cosine| with the top direction",
                  [s for s in alignments if any(y == y for y in s.y)],
                  categories=names, y_limits=(0.0, 1.0)),
        ],
        columns=2,
    )  # fmt: skip


# --- the whole table ----------------------------------------------------------------------------


def _quantiles(found: Amplification) -> Table:
    rows: list[list[Cell]] = []
    for layer in found.layers:
        for measure in MEASURES:
            own, drawn = layer.adversarial.get(measure), layer.random.get(measure)
            own = layer.singular if measure == "singular" else own
            if own is None or (measure == "effective" and layer.singular is None):
                continue
            ends = [own.low, own.middle, own.high]
            rows.append(
                [
                    layer.name,
                    layer.kind,
                    measure,
                    *ends,
                    None if drawn is None else drawn.middle,
                    layer.control.get(measure),
                ]
            )
    columns = ("layer", "kind", "measure", "10%", "median", "90%", "random", "× by the rescale")
    meanings = "; ".join(f"{name}: {words}" for name, words in MEASURES.items())
    return Table("Every measure", columns, rows, f"{meanings}.")
