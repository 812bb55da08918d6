"""The report, from sweeps alone."""

from collections.abc import Callable, Sequence

import torch

from benchmarks.evidence.run import WARMUP
from benchmarks.transfer.comparison import Comparison, comparisons, cost_of_rule, moved, price
from benchmarks.transfer.outcome import (
    COST_RULE,
    MARGIN,
    OCTAVES,
    SHIFT_RULE,
    averaged,
    decided,
    exponent,
    missing,
    together,
)
from benchmarks.transfer.scale import KINDS, RATES, Axis, Method
from benchmarks.transfer.search import RULES, Found, Sweep
from onsphere.report import (
    Document,
    Figure,
    Outcome,
    Panel,
    Reference,
    Section,
    Series,
    Statement,
    Table,
)
from onsphere.report.number import number
from onsphere.studies.setup.statistics import Estimate, estimate
from onsphere.version import __version__

_AXES: dict[Axis, str] = {
    "width": "width",
    "depth": "depth",
    "batch": "batch size",
    "steps": "run length",
}


def document(found: Sequence[Found], command: str, seeds: Sequence[int]) -> Document:
    """Return the page."""
    return Document(
        title="Does one number transfer?",
        summary="Networks were tuned small, then made wider, deeper, their batches larger and "
        "their runs longer, and tuned anew: how far the best rate and the best rotation moved, and "
        "what it costs to keep the small model's.",
        sections=[section(one, command) for one in found],
        provenance={
            "command": command,
            "seeds": ", ".join(map(str, seeds)),
            "onsphere": __version__,
            "torch": torch.__version__,
        },
    )


def name(kind: str, method: Method) -> str:
    """Return how tables and figures call a number that is tuned."""
    base = KINDS[kind].base_name
    return {
        "plain": f"{base}'s rate of all weights",
        "hidden": f"{base}'s rate of hidden matrices",
        "own": "rotation",
        "maximal": "rotation, maximal set",
        "every": "rotation, every hidden matrix",
    }[method]


def section(found: Found, command: str) -> Section:
    """Return the section of one network."""
    row, size = KINDS[found.kind], found.small["plain"].start.size
    statements = [one for m in row.rotations for one in statements_of(found, m)]
    return Section(
        name=found.kind,
        title=row.name,
        says="Asked",
        statement="The best rotation of a small model is closer to that of a larger one than the "
        "best rate is, and keeping it costs less.",
        statements=statements,
        findings=_findings(found),
        conditions=[
            f"small model: width {size.width}, depth {size.depth}, batch {size.batch}, "
            f"{size.steps} steps; one of them is larger at a time, and the others are as they were",
            f"{row.base_name} with decay {number(found.small['plain'].start.weight_decay, 3)}, "
            "tuned at the small size and kept; linear warm-up over "
            f"{WARMUP:.0%} of the steps, then a cosine to 0",
            "weights that are not tuned keep the small model's rate at every size; "
            "rates a factor of two apart, widened until the best lies inside",
        ],
        figures=[_moves(found), _prices(found), _differences(found), _sweeps(found)],
        tables=[_small(found), _sizes(found), _comparisons(found), _rules(found)],
        command=command,
    )


def statements_of(found: Found, rotation: Method) -> list[Statement]:
    """Return what is decided about one kind of rotation."""
    called = name(found.kind, rotation)
    return [
        _statement(
            found,
            rotation,
            f"{rotation}-cost",
            f"Keeping the small model's setting costs less for the {called} than for the rate.",
            "cost of the kept rate minus that of the kept rotation, %",
            COST_RULE,
            MARGIN,
            "%",
            lambda one: one.cost,
        ),
        _statement(
            found,
            rotation,
            f"{rotation}-shift",
            f"The best setting moves less for the {called} than for the rate.",
            "shift of the best rate minus that of the best rotation, octaves",
            SHIFT_RULE,
            OCTAVES,
            "octaves",
            lambda one: one.shift,
        ),
    ]


def _statement(
    found: Found,
    rotation: Method,
    slug: str,
    hypothesis: str,
    quantity: str,
    rule: str,
    margin: float,
    unit: str,
    values: Callable[[Comparison], Sequence[float]],
) -> Statement:
    against = {
        rate: estimate(averaged(values(one) for one in comparisons(found, rotation, rate).values()))
        for rate in RATES
    }
    return Statement(
        name=slug,
        hypothesis=hypothesis,
        quantity=f"{quantity}, averaged over the axes at their largest factors",
        margin=f"{margin:g} {unit}",
        rule=rule,
        outcome=together(decided(interval, margin) for interval in against.values()),
        effect="; ".join(
            f"{interval} {unit} against {name(found.kind, rate)}"
            for rate, interval in against.items()
        ),
    )


def _at(found: Found, axis: Axis) -> str:
    return f"{_AXES[axis]} ×{found.largest(axis)}"


def _findings(found: Found) -> list[str]:
    """Return what the statements say, those that do not hold first."""
    lines: dict[bool, list[str]] = {False: [], True: []}
    for rotation in KINDS[found.kind].rotations:
        for one in statements_of(found, rotation):
            holds = one.outcome is Outcome.HOLDS
            lines[holds].append(f"{one.hypothesis} {str(one.outcome).capitalize()}: {one.effect}.")
    return lines[False] + lines[True]


def _small(found: Found) -> Table:
    rows = []
    for method, sweep in found.small.items():
        rows.append((name(found.kind, method), _setting(sweep), _loss(sweep), len(sweep.rates)))
    rows += [
        (f"{KINDS[found.kind].base_name}, decay {number(decay, 3)}", _setting(one), _loss(one),
         len(one.rates))
        for decay, one in sorted(found.decays.items())
    ]  # fmt: skip
    columns = ("tuned", "best", "validation loss [95 %]", "rates tried")
    return Table("The small model", columns, rows)


def _setting(sweep: Sweep) -> str:
    unit = "" if sweep.start.method in RATES else " rad"
    return number(sweep.best, 3) + unit + (" (the last tried)" if missing(sweep.losses) else "")


def _loss(sweep: Sweep) -> str:
    return str(estimate(sweep.losses[sweep.best]))


def _sizes(found: Found) -> Table:
    rows = [
        (
            f"{_AXES[axis]} ×{factor}",
            name(found.kind, method),
            _setting(sweep),
            str(estimate(moved(found, axis, factor, method))),
            str(exponent(moved(found, axis, factor, method), factor)),
            _loss(sweep),
            str(estimate(price(found, axis, factor, method))),
        )
        for axis, larger in found.larger.items()
        for factor, row in larger.items()
        for method, sweep in row.items()
    ]
    columns = (
        "size",
        "tuned",
        "best",
        "shift, octaves [95 %]",
        "power of the factor",
        "loss at its own best",
        "cost of the kept setting, %",
    )
    return Table(
        "Larger models, tuned anew",
        columns,
        rows,
        "Shift: of the optimum, from the small model's, by a parabola. The power is the shift over "
        "the octaves of the factor: 0 transfers, −1 is in inverse proportion.",
    )


def _comparisons(found: Found) -> Table:
    rows = [
        (
            _at(found, axis),
            name(found.kind, rotation),
            name(found.kind, rate),
            *(str(estimate(values)) for values in (one.cost, one.shift, one.own, one.kept)),
        )
        for rotation in KINDS[found.kind].rotations
        for rate in RATES
        for axis, one in comparisons(found, rotation, rate).items()
    ]
    columns = (
        "size",
        "rotation",
        "against",
        "cost, rate − rotation, %",
        "shift, rate − rotation, octaves",
        "loss at own best, rotation − rate, %",
        "loss as kept, rotation − rate, %",
    )
    return Table(
        "Rotations against rates, at the largest size",
        columns,
        rows,
        "Paired by seed, 95 % intervals, each for itself: of some of so many the 95 % are wrong by "
        "chance. The first two are positive where the rotation transfers better, the last two are "
        "negative where it has the lower loss.",
    )


def _rules(found: Found) -> Table:
    rows = []
    for rule in RULES:
        for method in KINDS[found.kind].methods:
            if not rule.asked_of(found.kind, method):
                continue
            scaled = cost_of_rule(found, rule, method)
            kept = price(found, rule.axis, found.largest(rule.axis), method)
            rows.append(
                (
                    _at(found, rule.axis),
                    name(found.kind, method),
                    f"as {rule.name}",
                    None if scaled is None else str(estimate(scaled)),
                    str(estimate(kept)),
                )
            )
    columns = ("size", "tuned", "scaled", "cost, %", "cost if kept, %")
    return Table(
        "Scaling the kept number by a known rule",
        columns,
        rows,
        "Between rates that were tried, losses are interpolated in the logarithm of the rate. No "
        "number: the rule leads beyond all rates that were tried.",
    )


def _moves(found: Found) -> Figure:
    return _by_axis(
        found,
        "moves",
        "how far the best setting moves",
        "Octaves from the small model's best; 0 is perfect transfer. Bars: 95 % over seeds.",
        "shift (octaves)",
        moved,
    )


def _prices(found: Found) -> Figure:
    return _by_axis(
        found,
        "costs",
        "what it costs to keep the small model's setting",
        "Loss above the larger model's own best. Bars: 95 % over seeds.",
        "loss above own best (%)",
        price,
    )


def _by_axis(
    found: Found,
    slug: str,
    title: str,
    caption: str,
    label: str,
    values: Callable[[Found, Axis, int, Method], Sequence[float]],
) -> Figure:
    panels = []
    for axis, row in found.larger.items():
        factors = sorted(row)
        series = []
        for method in KINDS[found.kind].methods:
            ones = [estimate(values(found, axis, factor, method)) for factor in factors]
            series.append(_points(name(found.kind, method), ones))
        names = [f"×{factor}" for factor in factors]
        zero = [Reference("horizontal", 0.0)]
        panels.append(Panel(_AXES[axis], "", label, series, references=zero, categories=names))
    title = f"{KINDS[found.kind].name}: {title}"
    return Figure(f"{found.kind}-{slug}", title, caption, panels, columns=2)


def _points(label: str, ones: Sequence[Estimate]) -> Series:
    return Series(
        label,
        list(range(len(ones))),
        [one.mean for one in ones],
        [one.low for one in ones],
        [one.high for one in ones],
        style="points",
    )


def _differences(found: Found) -> Figure:
    panels = []
    for rotation in KINDS[found.kind].rotations:
        called = name(found.kind, rotation).removeprefix("rotation, ")
        cost, kept = [], []
        for rate in RATES:
            ones = comparisons(found, rotation, rate)
            against = f"against {name(found.kind, rate)}"
            cost.append(_points(against, _and_mean([one.cost for one in ones.values()])))
            kept.append(_points(against, _and_mean([one.kept for one in ones.values()])))
        names = [*(_at(found, axis) for axis in ones), "mean"]
        zero = [Reference("horizontal", 0.0)]
        panels += [
            Panel(f"{called}: {what}", "", label, series, references=zero, categories=names)
            for what, label, series in (
                ("cost", "cost, rate − rotation (%)", cost),
                ("loss", "loss, rotation − rate (%)", kept),
            )
        ]
    return Figure(
        f"{found.kind}-differences",
        f"{KINDS[found.kind].name}: rotations against rates",
        "Left: what keeping the small model's rate costs more than keeping its rotation; above 0 "
        "the rotation transfers better. Right: loss of the larger model, each at what the small "
        "model had; below 0 the rotation is ahead. Bars: 95 % over paired seeds.",
        panels,
        columns=2,
    )


def _and_mean(rows: Sequence[Sequence[float]]) -> list[Estimate]:
    return [estimate(row) for row in (*rows, averaged(rows))]


def _sweeps(found: Found) -> Figure:
    panels = []
    for method in KINDS[found.kind].methods:
        sizes = {"small": found.small[method]}
        for axis, row in found.larger.items():
            sizes[_at(found, axis)] = row[found.largest(axis)][method]
        series = []
        for label, sweep in sizes.items():
            rates = sorted(sweep.losses)
            means = [sum(sweep.losses[r]) / len(sweep.losses[r]) for r in rates]
            kept = [i for i, mean in enumerate(means) if mean < 1.08 * min(means)]
            shown = [100 * (means[i] / min(means) - 1) for i in kept]
            series.append(Series(label, [rates[i] for i in kept], shown, style="both"))
        unit = "rate" if method in RATES else "rotation (rad / step)"
        called = name(found.kind, method)
        label = "loss above own best (%)"
        panels.append(Panel(called, unit, label, series, "log", y_limits=(-0.4, 8.0)))
    return Figure(
        f"{found.kind}-sweeps",
        f"{KINDS[found.kind].name}: loss against the number that is tuned",
        "Mean over seeds, above the lowest of each size; more than 8 % is left out. With perfect "
        "transfer all minima stand above each other.",
        panels,
        columns=2,
    )
