"""Claim `stability`: does optimizing on the sphere widen the range of usable learning rates?"""

from dataclasses import dataclass
from itertools import pairwise
from math import log10

from onsphere.report.document import Figure, Panel, Series, Table, Verdict
from onsphere.studies.claims.base import Claim, Judgement, Plan, Results, average, label
from onsphere.studies.engine.job import Cell
from onsphere.studies.setup.statistics import Estimate, estimate
from onsphere.studies.setup.training import Space, Training
from onsphere.studies.setup.training_group import group_cell

_WITHIN = 0.02  # a rate is usable when its accuracy is this close to the best of its row
_MATTERS = 0.25  # decades: a smaller difference in width is called none


@dataclass(frozen=True)
class _Row:
    """All rates of one method, space and seed."""

    rates: tuple[float, ...]
    losses: tuple[float | None, ...]
    accuracies: tuple[float, ...]

    @property
    def best(self) -> float:
        return max(self.accuracies)

    def width(self, best: float) -> float:
        """Decades of rates within reach of ``best``, accuracy interpolated between rates."""
        enough = best - _WITHIN
        total = 0.0
        for (rate, a), (next_rate, b) in pairwise(zip(self.rates, self.accuracies, strict=True)):
            high, low = max(a, b), min(a, b)
            share = 0.0 if high < enough else min(1.0, (high - enough) / max(high - low, 1e-12))
            total += log10(next_rate / rate) * share
        return total


def rates(plan: Plan) -> tuple[float, ...]:
    """Return the learning rates of a plan, evenly spaced in the logarithm."""
    low, high, per_decade = plan.scale.rates
    return tuple(10.0 ** (k / per_decade) for k in range(low * per_decade, high * per_decade + 1))


def _decades(values: tuple[float, ...]) -> float:
    return log10(values[-1] / values[0])


def _spaces(method: str) -> tuple[Space, ...]:
    """Return the spaces that make sense for a method: no sphere without normalization."""
    return ("plain",) if method == "none" else ("plain", "sphere")


def _training(plan: Plan, method: str, seed: int, space: Space, lr: float) -> Training:
    return plan.training(
        method, seed, space=space, lr=lr, schedule="cosine", steps=plan.scale.stability_steps
    )


def _cell(plan: Plan, method: str, seed: int, space: Space) -> Cell:
    """Return the cell of all rates of a row."""
    return group_cell([_training(plan, method, seed, space, lr) for lr in rates(plan)])


def _cells(plan: Plan) -> list[Cell]:
    return [
        _cell(plan, method, seed, space)
        for method in plan.methods
        for space in _spaces(method)
        for seed in plan.seeds
    ]


def _rows(plan: Plan, results: Results) -> dict[tuple[str, Space, int], _Row]:
    rows = {}
    for method in plan.methods:
        for space in _spaces(method):
            for seed in plan.seeds:
                found = results[_cell(plan, method, seed, space).key]["trained"]
                rows[method, space, seed] = _Row(
                    rates(plan),
                    tuple(one["train_loss"] for one in found),
                    tuple(one["test_accuracy"] for one in found),
                )
    return rows


def _judge(plan: Plan, results: Results) -> Judgement:
    rows = _rows(plan, results)
    table, gains, best_gains = [], [], []
    per_method: dict[str, Estimate] = {}
    for method in plan.normalized:
        plain = [rows[method, "plain", seed] for seed in plan.seeds]
        sphere = [rows[method, "sphere", seed] for seed in plan.seeds]
        # Both spaces are held against the better of the two, so that a space cannot look wide by
        # being bad everywhere.
        best = [max(p.best, s.best) for p, s in zip(plain, sphere, strict=True)]
        widths = [
            [row.width(b) for row, b in zip(side, best, strict=True)] for side in (plain, sphere)
        ]
        gain = [s - p for p, s in zip(*widths, strict=True)]
        best_gain = [s.best - p.best for p, s in zip(plain, sphere, strict=True)]
        per_method[method] = estimate(gain)
        gains.append(gain)
        best_gains.append(best_gain)
        table.append(
            (
                label(method),
                estimate([p.best for p in plain]).mean,
                estimate([s.best for s in sphere]).mean,
                estimate(widths[0]).mean,
                estimate(widths[1]).mean,
                str(per_method[method]),
            )
        )
    # Methods share seeds (initial weights, order of the data): average over them, then seeds.
    pooled = estimate([average(one) for one in zip(*gains, strict=True)])
    best_pooled = estimate([average(one) for one in zip(*best_gains, strict=True)])
    wider = [label(m) for m, e in per_method.items() if e.low > 0 and e.mean > _MATTERS]
    narrower = [label(m) for m, e in per_method.items() if e.high < 0 and e.mean < -_MATTERS]
    none = [rows["none", "plain", seed] for seed in plan.seeds]
    none_width = estimate([row.width(row.best) for row in none])
    return Judgement(
        _verdict(pooled, wider, narrower),
        f"usable range on the sphere minus plain: {pooled} decades, mean of "
        f"{len(plan.normalized)} methods",
        findings=[
            f"Narrower on the sphere: {', '.join(narrower) or 'no method'}; wider on the sphere: "
            f"{', '.join(wider) or 'no method'} (intervals over seeds exclude 0 and the "
            f"difference exceeds {_MATTERS} decades).",
            f"Best accuracy over all rates, sphere minus plain: {best_pooled}.",
            f"Without normalization the usable range is {none_width} decades.",
        ],
        conditions=[
            f"{len(rates(plan))} rates over {_decades(rates(plan)):.0f} decades, "
            f"{plan.scale.stability_steps} steps, momentum 0.9, cosine schedule, no weight decay",
            "on the sphere every hidden weight keeps its initial length, and the rate has the same "
            "meaning as in plain SGD; plain SGD may grow its norms and so lower its own "
            "effective rate",
            f"usable: test accuracy within {_WITHIN:.0%} points of the best of both spaces, linear "
            "in the logarithm of the rate between measured ones",
        ],
        figures=[_figure(plan, rows, "accuracy"), _figure(plan, rows, "loss")],
        tables=[
            Table(
                "Best accuracy and width of the usable range (decades), means over seeds",
                (
                    "method",
                    "best, plain",
                    "best, sphere",
                    "width, plain",
                    "width, sphere",
                    "difference [95 %]",
                ),
                table,
            )
        ],
    )


def _verdict(pooled: Estimate, wider: list[str], narrower: list[str]) -> Verdict:
    if pooled.low > 0 and pooled.mean > _MATTERS and not narrower:
        return Verdict.HOLDS
    if wider and len(wider) > len(narrower):
        return Verdict.CONDITIONAL
    return Verdict.FAILS if pooled.high < _MATTERS else Verdict.OPEN


def _figure(plan: Plan, rows: dict[tuple[str, Space, int], _Row], what: str) -> Figure:
    panels = []
    for method in plan.methods:
        series = [
            _curve([rows[method, space, seed] for seed in plan.seeds], space, what)
            for space in _spaces(method)
        ]
        panels.append(
            Panel(
                label(method),
                "learning rate",
                "test accuracy" if what == "accuracy" else "training loss",
                series,
                x_scale="log",
                y_scale="linear" if what == "accuracy" else "log",
                y_limits=(0.0, 1.02) if what == "accuracy" else (1e-3, 10.0),
            )
        )
    noun = "Accuracy" if what == "accuracy" else "Final training loss"
    return Figure(
        f"stability-{what}",
        f"{noun} against learning rate, plain and on the sphere",
        "Mean over seeds, band from the lowest to the highest. Diverged runs count with the "
        "accuracy of chance and have no loss.",
        panels,
    )


def _curve(own: list[_Row], name: str, what: str) -> Series:
    columns = zip(*[r.accuracies if what == "accuracy" else r.losses for r in own], strict=True)
    middle, low, high = [], [], []
    for column in columns:
        # A loss of exactly 0 (float32 saturates) still has a place on the logarithmic axis.
        values = [max(v, 1e-8) if what == "loss" else v for v in column if v is not None]
        middle.append(average(values))
        low.append(min(values, default=float("nan")))
        high.append(max(values, default=float("nan")))
    return Series(name, own[0].rates, middle, low, high, style="both")


CLAIM = Claim(
    name="stability",
    title="Optimizing on the sphere stabilizes training",
    statement="With the scaling symmetry removed by optimizing on a sphere, training becomes more "
    "stable (Sun et al. 2020).",
    prediction="If so, the range of learning rates that train well is wider on the sphere than in "
    "plain SGD. Against it stands that plain SGD on normalized weights grows its norms at large "
    "rates and so lowers its own effective rate, which a fixed sphere forbids (Arora et al. 2018, "
    "arXiv 1812.03981).",
    threshold="Holds if the usable range is wider on the sphere by more than "
    f"{_MATTERS} decades on average over methods with a 95 % interval over seeds above 0, and is "
    "narrower for no method; under conditions if it is wider for more methods than it is narrower "
    f"for; does not hold if the interval lies below {_MATTERS} decades; undecided otherwise. "
    "One seed decides nothing.",
    cells=_cells,
    judge=_judge,
)
