"""Claim `stability`: does optimizing on the sphere make training more stable, and in what?

Five things that one may mean by stable, each measured in pairs of networks that share seed, initial
weights and order of the data: the scale of the start, the largest usable rate, rate and decay
together, a large rate without warm-up, and the spread over seeds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from math import log10
from typing import Any

from onsphere.report.document import Figure, Outcome, Panel, Series, Table
from onsphere.studies.claims.base import Claim, Details, Outcomes
from onsphere.studies.claims.growth import law_cell
from onsphere.studies.claims.plan import Plan, Results, average, label
from onsphere.studies.claims.statement import Statement, Values
from onsphere.studies.engine.job import Cell, Config, Inputs, Task
from onsphere.studies.engine.job import Outcome as Found
from onsphere.studies.setup.data import Images
from onsphere.studies.setup.ensemble import train_ensemble
from onsphere.studies.setup.statistics import estimate
from onsphere.studies.setup.training import Space, Training, measure, measure_statistics, restore
from onsphere.studies.setup.training_group import cost_of, member

_SPACES: tuple[Space, Space] = ("plain", "sphere")
_WITHIN = 0.02  # a setting is usable when its accuracy is this close to the best
_SCALES = (2.0**-6, 2.0**-3, 1.0, 2.0**3, 2.0**6)  # powers of two: rounding stays as it is
_RATES = tuple(10.0 ** (k / 2) for k in range(-3, 2))  # 0.03 to 3, the coarse grid
_PARTS = 4  # into which half a decade is divided where the usable range ends
_GRID_RATES = (0.1, 0.3, 1.0)
_GRID_DECAYS = (0.0, 3e-3, 3e-2)
_ROUGH_RATE, _ROUGH_BATCH, _ROUGH_STEPS = 1.0, 256, 60
_SPIKE = 2.0  # a spike: the loss exceeds this multiple of its median over the last ten steps


def _short(plan: Plan, method: str, seed: int, **changes: Any) -> Training:
    """Return the training of this study: short, with a cosine schedule."""
    given = {"schedule": "cosine", "steps": plan.scale.stability_steps} | changes
    return plan.training(method, seed, **given)


def part(config: Config, inputs: Inputs) -> Found:
    """Return what was found for one seed of those that are trained together."""
    first, count = config["first"], len(config["trainings"])
    return Found({"trained": inputs.records[0]["trained"][first : first + count]})


PART = Task("stability.part", 1, part)


def _part_cell(plan: Plan, seed: int, of: Callable[[int], list[Training]]) -> Cell:
    """Return the cell of one seed's networks, which are trained together with those beside it."""
    group, first = plan.together(seed, of)
    config: Config = {"trainings": [asdict(one) for one in of(seed)], "first": first}
    return Cell(PART, config, (group,), cost=0.01)


# The scale of the start


def start(config: Config, inputs: Inputs) -> Found:
    """Test networks from every scale of the initial weights, with statistics measured anew.

    What is left of BatchNorm's initial statistics after a short run, 0.9 to the number of steps,
    would drown the variances of tiny weights.
    """
    trained = []
    for number, training in enumerate(config["trainings"], config["first"]):
        settings, own = Training(**training), member(inputs, number)
        result = dict(own.records[0])
        if not result["diverged"]:
            model = measure_statistics(restore(settings, own), inputs.images, settings)
            result |= measure(model, inputs.images)
        trained.append(result)
    return Found({"trained": trained})


START = Task("stability.start", 2, start)


def _start_cell(plan: Plan, method: str, seed: int) -> Cell:
    ways: tuple[dict[str, Any], ...] = ({}, {"space": "sphere", "radius": 1.0})

    def trainings(one: int) -> list[Training]:
        return [_short(plan, method, one, start_scale=a, **way) for way in ways for a in _SCALES]

    group, first = plan.together(seed, trainings, keep=True)
    config: Config = {"trainings": [asdict(own) for own in trainings(seed)], "first": first}
    return Cell(START, config, (group,), cost=0.1 * len(config["trainings"]))


def _ranges(record: dict[str, Any]) -> tuple[float, float]:
    """Return how far accuracies lie apart over the scales of the start, plain and on the sphere."""
    found = [one["test_accuracy"] for one in record["trained"]]
    plain, sphere = found[: len(_SCALES)], found[len(_SCALES) :]
    return max(plain) - min(plain), max(sphere) - min(sphere)


# The largest usable rate


def find_edges(config: Config, inputs: Inputs) -> Found:
    """Train at a coarse grid of rates in both spaces, then refine where the usable ones end.

    All of it for several seeds, whose networks are trained together. Usable is a rate whose
    accuracy is within 2 % points of the best of both spaces on the grid. The last usable rate of
    the grid and the one above it are the bracket; in it rates are tried that divide it evenly, all
    at once, which costs less than one after the other. Between the last two the edge is where
    accuracy, linear in the logarithm of the rate, falls below.
    """
    base = [Training(**own[space]) for own in config["pairs"] for space in _SPACES]
    rates: list[float] = config["rates"]
    grid = _at_rates(base, [rates] * len(base), inputs.images)
    accuracies = [[one["test_accuracy"] for one in own] for own in grid]
    pairs = zip(accuracies[::2], accuracies[1::2], strict=True)
    enough = [max(plain + sphere) - _WITHIN for plain, sphere in pairs for _ in _SPACES]
    inside = [
        bracket(rates, own, least, config["parts"])
        for own, least in zip(accuracies, enough, strict=True)
    ]
    edges = []
    for own, least, more, fine in zip(
        accuracies, enough, inside, _at_rates(base, inside, inputs.images), strict=True
    ):
        refined = [one["test_accuracy"] for one in fine]
        tried = sorted([*zip(rates, own, strict=True), *zip(more, refined, strict=True)])
        edges.append(upper_edge([rate for rate, _ in tried], [a for _, a in tried], least))
    losses = [[one["train_loss"] for one in own] for own in grid]

    def by_space(values: list[Any], number: int) -> dict[Space, Any]:
        return dict(zip(_SPACES, values[2 * number : 2 * number + 2], strict=True))

    return Found(
        {
            "edges": [
                {
                    "rates": rates,
                    "accuracy": by_space(accuracies, number),
                    "loss": by_space(losses, number),
                    "edge": by_space(edges, number),
                }
                for number in range(len(config["pairs"]))
            ]
        }
    )


def _at_rates(
    base: Sequence[Training], rates: Sequence[Sequence[float]], images: Images
) -> list[list[dict[str, Any]]]:
    """Train every network at rates of its own, all of them together."""
    group = [replace(one, lr=lr) for one, own in zip(base, rates, strict=True) for lr in own]
    found = iter(train_ensemble(group, images))
    return [[next(found).result for _ in own] for own in rates]


def edge_of(config: Config, inputs: Inputs) -> Found:
    """Return what was found for one seed."""
    return Found(inputs.records[0]["edges"][config["number"]])


def bracket(
    rates: Sequence[float], accuracies: Sequence[float], enough: float, parts: int
) -> list[float]:
    """Return the rates that divide the step in which the usable range of a grid ends.

    Args:
        rates: the grid, increasing.
        accuracies: at its rates.
        enough: a rate with this accuracy is usable.
        parts: into how many parts, evenly in the logarithm.

    Returns:
        One fewer than parts; none where no rate is usable, or the last one is.

    Example:
        >>> bracket([0.1, 1.0, 10.0], [0.9, 0.9, 0.1], 0.8, 2)
        [3.1622776601683795]
    """
    usable = [i for i, accuracy in enumerate(accuracies) if accuracy >= enough]
    if not usable or usable[-1] == len(rates) - 1:
        return []
    low, high = rates[usable[-1]], rates[usable[-1] + 1]
    return [low * (high / low) ** (k / parts) for k in range(1, parts)]


def upper_edge(rates: Sequence[float], accuracies: Sequence[float], enough: float) -> float:
    """Return the largest rate with enough accuracy, linear in its logarithm between those tried.

    The ends of what was tried stand for what lies beyond them.

    Example:
        >>> round(upper_edge([1.0, 10.0], [0.9, 0.7], 0.8), 3)
        3.162
    """
    usable = [i for i, accuracy in enumerate(accuracies) if accuracy >= enough]
    if not usable:
        return rates[0]
    last = usable[-1]
    if last == len(rates) - 1:
        return rates[-1]
    fall = accuracies[last] - accuracies[last + 1]
    share = (accuracies[last] - enough) / fall
    return rates[last] * (rates[last + 1] / rates[last]) ** share


EDGES = Task("stability.edges", 4, find_edges)
EDGE = Task("stability.edge", 1, edge_of)


def _edge_cell(plan: Plan, method: str, seed: int) -> Cell:
    group = _edges_cell(plan, method, plan.beside(seed))
    number = plan.beside(seed).index(seed)
    config = {**group.config["pairs"][number], "rates": list(_RATES), "number": number}
    return Cell(EDGE, config, (group,), cost=0.01)


@lru_cache(maxsize=256)
def _edges_cell(plan: Plan, method: str, seeds: tuple[int, ...]) -> Cell:
    pairs = [{space: _short(plan, method, s, space=space) for space in _SPACES} for s in seeds]
    trainings = [one for pair in pairs for one in pair.values()]
    config: Config = {
        "pairs": [{space: asdict(one) for space, one in pair.items()} for pair in pairs],
        "rates": list(_RATES),
        "parts": _PARTS,
    }
    return Cell(EDGES, config, cost=(len(_RATES) + _PARTS - 1) * cost_of(trainings))


def _gained_decades(records: Sequence[Sequence[dict[str, Any]]]) -> Values:
    return [log10(own["edge"]["sphere"] / own["edge"]["plain"]) for (own,) in records]


def _gained_accuracy(records: Sequence[Sequence[dict[str, Any]]]) -> Values:
    return [max(o["accuracy"]["sphere"]) - max(o["accuracy"]["plain"]) for (o,) in records]


def _spread_over_seeds(records: Sequence[Sequence[dict[str, Any]]]) -> Values:
    """Return by how much more plain SGD's final loss strays from its median over seeds, in logs.

    Each space at the rate whose mean accuracy over the seeds is best: the test of Brown and
    Forsythe for equal spreads, on pairs.
    """
    strays = []
    for space in _SPACES:
        columns = list(zip(*(own["accuracy"][space] for (own,) in records), strict=True))
        best = max(range(len(columns)), key=lambda i, c=columns: average(c[i]))  # type: ignore[misc]
        losses = [own["loss"][space][best] for (own,) in records]
        logs = sorted(math.log(max(loss, 1e-9)) for loss in losses if loss is not None)
        middle = (logs[(len(logs) - 1) // 2] + logs[len(logs) // 2]) / 2 if logs else 0.0
        strays.append([None if x is None else abs(math.log(max(x, 1e-9)) - middle) for x in losses])
    return [
        None if plain is None or sphere is None else plain - sphere
        for plain, sphere in zip(*strays, strict=True)
    ]


# Rate and decay together


def _grid_cell(plan: Plan, method: str, seed: int) -> Cell:
    settings: list[dict[str, Any]] = [
        *({"lr": rate, "weight_decay": decay} for rate in _GRID_RATES for decay in _GRID_DECAYS),
        *({"lr": rate, "space": "sphere"} for rate in _GRID_RATES),
    ]
    return _part_cell(plan, seed, lambda one: [_short(plan, method, one, **s) for s in settings])


def _shares(record: dict[str, Any]) -> tuple[float, float]:
    """Return which share of the settings is usable: of rate and decay plain, of rate on the sphere.

    On the sphere the head's decay is 0 and hidden weights have none: one number is tuned.
    """
    found = [one["test_accuracy"] for one in record["trained"]]
    enough = max(found) - _WITHIN
    sides = found[: -len(_GRID_RATES)], found[-len(_GRID_RATES) :]
    plain, sphere = (average([float(a >= enough) for a in side]) for side in sides)
    return plain, sphere


# A large rate and a large batch without warm-up


def _rough_cell(plan: Plan, method: str, seed: int) -> Cell:
    common = {
        "lr": _ROUGH_RATE,
        "batch": _ROUGH_BATCH,
        "schedule": "constant",
        "steps": min(_ROUGH_STEPS, plan.scale.steps),
    }

    def pair(one: int) -> list[Training]:
        return [_short(plan, method, one, space=space, **common) for space in _SPACES]

    return _part_cell(plan, seed, pair)


def spikes(losses: Sequence[float], window: int = 10) -> int:
    """Count the steps whose loss exceeds twice its median over the last ten steps.

    Args:
        losses: one per step.
        window: how many steps before each are looked at.

    Example:
        >>> spikes([1.0] * 12 + [2.5] + [1.0] * 5)
        1
    """
    count = 0
    for i in range(window, len(losses)):
        before = sorted(losses[i - window : i])
        count += losses[i] > _SPIKE * (before[(window - 1) // 2] + before[window // 2]) / 2
    return count


def _fewer_spikes(records: Sequence[Sequence[dict[str, Any]]]) -> Values:
    found = []
    for (own,) in records:
        plain, sphere = (
            spikes([loss for _, loss in one["loss_curve"]]) / max(1, one["steps_done"])
            for one in own["trained"]
        )
        found.append(None if any(o["diverged"] for o in own["trained"]) else plain - sphere)
    return found


def _rate_lost(records: Sequence[Sequence[dict[str, Any]]]) -> Values:
    """Return the logarithm by which the effective rate fell: twice that of the norms."""
    return [
        2 * average([math.log(layer["grew"]) for layer in own["layers"]]) if own["layers"] else None
        for (own,) in records
    ]


_STATEMENTS = (
    Statement(
        name="start",
        hypothesis="On a sphere of fixed radius it does not matter how large the initial weights "
        "are.",
        quantity="largest minus smallest test accuracy over initial weights times 1/64 to 64",
        margin=0.01,
        methods=lambda plan: plan.own_spheres,
        cells=lambda *which: [_start_cell(*which)],
        values=lambda records: [_ranges(own)[1] for (own,) in records],
        kind="agreement",
        basis="proved",
        few=True,
        unit="of accuracy",
    ),
    Statement(
        name="start-plain",
        hypothesis="To plain SGD it does matter.",
        quantity="largest minus smallest test accuracy over initial weights times 1/64 to 64, "
        "plain minus sphere",
        margin=_WITHIN,
        methods=lambda plan: plan.own_spheres,
        cells=lambda *which: [_start_cell(*which)],
        values=lambda records: [plain - sphere for plain, sphere in map(_ranges, _only(records))],
        few=True,
        unit="of accuracy",
    ),
    Statement(
        name="rates",
        hypothesis="The sphere trains well at larger learning rates than plain SGD.",
        quantity="largest usable rate, sphere over plain; usable: test accuracy within 2 % points "
        "of the best of both",
        margin=0.25,
        methods=lambda plan: plan.panel,
        cells=lambda *which: [_edge_cell(*which)],
        values=_gained_decades,
        unit="decades",
    ),
    Statement(
        name="best",
        hypothesis="At its best rate the sphere reaches a higher accuracy than plain SGD.",
        quantity="best test accuracy over the rates, sphere minus plain",
        margin=0.01,
        methods=lambda plan: plan.panel,
        cells=lambda *which: [_edge_cell(*which)],
        values=_gained_accuracy,
        unit="of accuracy",
    ),
    Statement(
        name="rate-and-decay",
        hypothesis="Of the settings of rate and decay a smaller share works in plain SGD than of "
        "the rates on the sphere, where there is no decay to tune.",
        quantity="share of settings within 2 % points of the best, sphere minus plain; rates 0.1 "
        "to 1, decays 0 to 0.03",
        margin=0.1,
        methods=lambda plan: plan.panel,
        cells=lambda *which: [_grid_cell(*which)],
        values=lambda records: [sphere - plain for plain, sphere in map(_shares, _only(records))],
        few=True,
        unit="of the settings",
    ),
    Statement(
        name="no-warm-up",
        hypothesis="At a large rate with large batches and no warm-up, plain SGD has more loss "
        "spikes than the sphere.",
        quantity="share of steps whose loss is twice its recent median, plain minus sphere; rate "
        f"{_ROUGH_RATE:g}, batch {_ROUGH_BATCH}",
        margin=0.02,
        methods=lambda plan: plan.panel,
        cells=lambda *which: [_rough_cell(*which)],
        values=_fewer_spikes,
        few=True,
        unit="of the steps",
    ),
    Statement(
        name="rate-left",
        hypothesis="At a constant nominal rate the effective rate of plain SGD falls during the "
        "run; on the sphere it cannot.",
        quantity="initial over final effective rate of plain SGD, 1/norm², mean over layers",
        margin=math.log(1.25),
        methods=lambda plan: plan.own_spheres,
        cells=lambda plan, method, seed: [law_cell(plan, method, seed, "no decay")],
        values=_rate_lost,
        axis="ratio",
        few=True,
    ),
    Statement(
        name="seeds",
        hypothesis="Plain SGD's final loss differs more from seed to seed than the sphere's.",
        quantity="distance of the logarithm of the final training loss from its median over seeds, "
        "each at its best rate, plain minus sphere",
        margin=0.2,
        methods=lambda plan: plan.panel,
        cells=lambda *which: [_edge_cell(*which)],
        values=_spread_over_seeds,
    ),
)


def _only(records: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [own for (own,) in records]


def _details(plan: Plan, results: Results) -> Details:
    edges = {
        method: [results[_edge_cell(plan, method, seed).key] for seed in plan.first_seeds]
        for method in plan.panel
    }
    starts = {
        method: [results[_start_cell(plan, method, seed).key] for seed in plan.first_seeds]
        for method in plan.own_spheres
    }
    rows = [
        (
            label(method),
            *(estimate([max(o["accuracy"][space]) for o in own]).mean for space in _SPACES),
            *(10.0 ** average([log10(o["edge"][space]) for o in own]) for space in _SPACES),
        )
        for method, own in edges.items()
    ]
    return Details(
        findings=[
            "Plain SGD answers a rate that is too large with larger norms, and so lowers its "
            "effective rate by itself (Arora et al. 2018). A sphere of fixed radius cannot.",
            "On a sphere of fixed radius the first step forgets the length of the initial weights. "
            "A sphere that keeps whatever length it is given does not: there the rate has to be "
            "set for that length, as in plain SGD.",
        ],
        conditions=[
            f"{plan.scale.stability_steps} steps, momentum 0.9, cosine schedule, no weight decay "
            "unless said; the same seed gives both spaces the same initial weights and data order",
            "largest usable rate: on a grid of half decades from 0.03 to 3, refined to an eighth "
            "of a decade; the sphere keeps the initial length, so a rate means the same in both",
            "scale of the start: BatchNorm's statistics are measured anew before testing",
            f"no warm-up: {min(_ROUGH_STEPS, plan.scale.steps)} steps at a constant rate",
        ],
        figures=[
            _rate_figure(edges, "accuracy"),
            _rate_figure(edges, "loss"),
            *([_start_figure(starts)] if starts else []),
        ],
        tables=[
            Table(
                "Best accuracy and largest usable rate, means over the first seeds",
                (
                    "method",
                    "best, plain",
                    "best, sphere",
                    "largest rate, plain",
                    "largest rate, sphere",
                ),
                rows,
            )
        ],
    )


_Records = dict[str, list[dict[str, Any]]]


def _rate_figure(edges: _Records, what: str) -> Figure:
    panels = [
        Panel(
            label(method),
            "learning rate",
            "test accuracy" if what == "accuracy" else "training loss",
            [
                _curve(space, own[0]["rates"], [o[what][space] for o in own], what == "loss")
                for space in _SPACES
            ],
            x_scale="log",
            y_scale="linear" if what == "accuracy" else "log",
            y_limits=(0.0, 1.02) if what == "accuracy" else (1e-3, 10.0),
        )
        for method, own in edges.items()
    ]
    noun = "Accuracy" if what == "accuracy" else "Final training loss"
    return Figure(
        f"stability-{what}",
        f"{noun} against learning rate, plain and on the sphere",
        "Mean over the first seeds, bars from the lowest to the highest. Diverged runs count with "
        "the accuracy of chance and have no loss.",
        panels,
    )


def _start_figure(starts: _Records) -> Figure:
    def side(own: list[dict[str, Any]], space: Space) -> list[list[float]]:
        first = 0 if space == "plain" else len(_SCALES)
        return [
            [one["test_accuracy"] for one in record["trained"][first : first + len(_SCALES)]]
            for record in own
        ]

    return Figure(
        "stability-start",
        "Accuracy against the scale of the initial weights",
        "Plain SGD, and the sphere at a fixed radius; rate 0.1. Mean over the first seeds, bars "
        "from the lowest to the highest.",
        [
            Panel(
                label(method),
                "initial weights times",
                "test accuracy",
                [_curve(space, _SCALES, side(own, space), False) for space in _SPACES],
                x_scale="log",
                y_limits=(0.0, 1.02),
            )
            for method, own in starts.items()
        ],
    )


def _curve(
    name: str, x: Sequence[float], rows: Sequence[Sequence[float | None]], is_loss: bool
) -> Series:
    middle, low, high = [], [], []
    for column in zip(*rows, strict=True):
        # A loss of exactly 0 (float32 saturates) still has a place on the logarithmic axis.
        values = [max(v, 1e-8) if is_loss else v for v in column if v is not None]
        middle.append(average(values))
        low.append(min(values, default=float("nan")))
        high.append(max(values, default=float("nan")))
    return Series(name, x, middle, low, high, style="both")


def _advice(outcomes: Outcomes) -> str:
    said = []
    if outcomes.get("start") == Outcome.HOLDS:
        said.append("a sphere of fixed radius makes the size of your initial weights irrelevant")
    if outcomes["rates"] == Outcome.REVERSED:
        said.append("it forgives a learning rate that is too large less than plain SGD does")
    elif outcomes["rates"] == Outcome.HOLDS:
        said.append("it bears larger learning rates than plain SGD")
    elif outcomes["rates"] == Outcome.ABSENT:
        said.append("its usable learning rates end where those of plain SGD end")
    if not said:
        return (
            "Nothing here is decided yet: choose between plain SGD and the sphere on other grounds."
        )
    text = ", but ".join(said) if len(said) > 1 else said[0]
    return f"{text[0].upper()}{text[1:]}."


CLAIM = Claim(
    name="stability",
    title="Optimizing on the sphere stabilizes training",
    statement="With the scaling symmetry removed by optimizing on a sphere, training becomes more "
    "stable (Sun et al. 2020).",
    prediction="The function depends on the direction of the weights only, so at a fixed radius "
    "the scale of the start cannot matter. That larger rates should work on the sphere does not "
    "follow: at large rates plain SGD grows its norms and so lowers its own effective rate, which "
    "a fixed sphere forbids (Arora et al. 2018, arXiv 1812.03981).",
    statements=_STATEMENTS,
    advice=_advice,
    details=_details,
)
