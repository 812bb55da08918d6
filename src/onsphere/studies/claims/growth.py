"""Claim `growth`: training with normalization makes the norms of the weights grow, by laws."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onsphere.dynamics import free_growth, momentum_growth, sgd_equilibrium, sgd_growth
from onsphere.geometry import VectorAxes
from onsphere.report.document import Figure, Outcome, Panel, Series, Table
from onsphere.studies.claims.base import Claim, Details, Outcomes
from onsphere.studies.claims.plan import Plan, Results, average, label, on_recorded, worst
from onsphere.studies.claims.statement import Kind, Statement, Values
from onsphere.studies.engine.job import Cell, Config, Inputs, Task
from onsphere.studies.engine.job import Outcome as Found
from onsphere.studies.setup.statistics import log_slope
from onsphere.studies.setup.training import (
    DECAY,
    Training,
    batches,
    network_for,
    optimizer_for,
)
from onsphere.studies.setup.training_group import member

_EXACT = 1e-10  # threshold for the per-step recursions, relative, float64
_ABSURD = 1e9  # stands for any error beyond it
_GREW = 1.05  # final over initial norm
_LAW = 0.15  # how far the laws of the mean may be off: exponent 1/4, equilibrium rotation

_EXACT_RUNS = {
    "SGD": (0.0, 0.0),
    "SGD + decay": (0.0, DECAY),
    "momentum": (0.9, 0.0),
    "momentum + decay": (0.9, DECAY),
}
"""Optimizers whose recursion is checked: (momentum, weight decay)."""

_LAW_RUNS: dict[str, dict[str, Any]] = {
    "no decay": {"weight_decay": 0.0},
    "decay": {"weight_decay": DECAY},
    "noise, no decay": {"objective": "noise", "weight_decay": 0.0, "lr": 0.02},
    "noise, decay": {"objective": "noise", "weight_decay": 2e-3, "lr": 1.0},
}
"""Runs on which the laws of the mean are checked: what each changes in the common training.

With decay on noise the rate is larger, so that the equilibrium is reached within the run.
"""


def check_recursion(config: Config, inputs: Inputs) -> Found:
    """Train in float64 at eps -> 0 and compare every squared norm with the exact recursion."""
    settings = Training(**config["training"])
    images = inputs.images
    model = network_for(settings, images, eps=1e-30).double()
    optimizer = optimizer_for(model, settings)
    hidden = model.hidden_weights()
    squares: dict[str, list[Tensor]] = {name: [_squares(*w)] for name, w in hidden.items()}
    drives: dict[str, list[Tensor]] = {name: [] for name in hidden}
    for index in batches(len(images.train_y), settings):
        optimizer.zero_grad()
        x, y = images.train_x[index].double(), images.train_y[index]
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for name, (weight, axes) in hidden.items():
            buffer = optimizer.state[weight].get("momentum_buffer")
            drive = weight.grad if buffer is None else buffer
            drives[name].append(_squares(drive, axes))
            squares[name].append(_squares(weight, axes))
    errors, shrinking = [], []
    for name in hidden:
        measured, driven = torch.stack(squares[name]), torch.stack(drives[name])
        predicted = _predict(measured[0], driven, settings)
        errors.append(float(((predicted - measured).abs() / measured).max()))
        shrinking.append(float((~(measured.diff(dim=0) >= 0)).double().mean()))
    error = max(errors)
    error = error if error < _ABSURD else _ABSURD  # nan, too, when the run diverged
    return Found({"error": error, "shrinking": average(shrinking)})


def _predict(start: Tensor, drives: Tensor, settings: Training) -> Tensor:
    if settings.momentum == 0:
        return sgd_growth(start, drives, settings.lr, settings.weight_decay)
    return momentum_growth(start, drives, settings.lr, settings.momentum, settings.weight_decay)


def _squares(weight: Tensor | None, axes: VectorAxes) -> Tensor:
    assert weight is not None
    return axes.norms(weight.detach()).flatten().square()


def check_laws(config: Config, inputs: Inputs) -> Found:
    """Hold the recorded norms and rotations of a run against the laws of the mean."""
    settings, own = Training(**config["training"]), member(inputs, config["member"])
    if own.records[0]["diverged"]:
        return Found({"layers": []})
    names = sorted(
        {k.split(".", 1)[1].rsplit(".", 1)[0] for k in own.tensors[0] if k.startswith("series.")}
    )
    return Found({"layers": [_layer_laws(name, settings, own) for name in names]})


def growth_exponent(time: Tensor, gained: Tensor) -> float | None:
    """Exponent of the norm in time, from the increase of its fourth power.

    Args:
        time: steps since the start.
        gained: increase of ``|w|**4`` since the start.

    Returns:
        The exponent, or ``None`` where the norm fell below its start and follows no power law.

    Example:
        >>> t = torch.arange(30.0, 300.0)
        >>> [round(growth_exponent(t, t ** (4 * p)), 3) for p in (0.1, 0.25, 0.5)]
        [0.1, 0.25, 0.5]
    """
    if not (gained > 0).all():
        return None
    return log_slope(time.tolist(), gained.tolist()) / 4


def _layer_laws(name: str, settings: Training, inputs: Inputs) -> dict[str, Any]:
    norm, gradient_square, rotation = (
        inputs.tensors[0][f"series.{name}.{what}"].double()
        for what in ("norm", "gradient_square", "rotation")
    )
    unit_gradient = gradient_square * norm.square()  # L_t of the theory
    steps = len(norm)
    late = slice(2 * steps // 3, None)
    # Evenly spaced for linear axes, and denser at the start for logarithmic ones.
    even, early = torch.linspace(0, steps - 1, 50), torch.logspace(0, math.log10(steps), 30) - 1
    keep = torch.unique(torch.cat([even, early]).round().long().clamp(0, steps - 1))
    turned = rotation[late].square().mean().sqrt()
    result: dict[str, Any] = {
        "step": [int(i) + 1 for i in keep],
        "norm": [float(v) for v in norm.mean(1)[keep]],
        "rotation": [float(v) for v in rotation.square().mean(1).sqrt()[keep]],
        "grew": float(norm[-1].mean() / norm[0].mean()),
        "late_growth": float(norm[-1].mean() / norm[late][0].mean()),
        "late_rotation": float(turned),
    }
    free = free_growth(norm[0], unit_gradient, settings.lr, settings.momentum)[:-1]
    result["free_norm"] = [float(v) for v in free.mean(1)[keep]]
    if settings.weight_decay == 0:
        gained = (norm**4 - norm[0] ** 4).mean(1)
        # The increase of |w|^4 goes as t, so a quarter of its exponent over the last decade of
        # time is the exponent of |w| once w_0 is forgotten.
        decade = torch.arange(max(1, steps // 10), steps)
        result["exponent"] = growth_exponent(decade.double(), gained[decade])
        result["spheres_grew"] = float((norm[-1] >= _GREW * norm[0]).double().mean())
        result["free_ratio"] = float(gained[-1] / (free**4 - free[0] ** 4).mean(1)[-1])
    else:
        level = float(unit_gradient[late].mean())
        balance = sgd_equilibrium(
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            unit_gradient_square=max(level, 1e-30),
        )
        result["predicted_rotation"] = balance.rotation
        result["rotation_ratio"] = float(turned / balance.rotation)
    return result


RECURSION = Task("growth.recursion", 3, check_recursion)
LAWS = Task("growth.laws", 3, check_laws)


def _recursion_cells(plan: Plan, method: str, seed: int) -> list[Cell]:
    cells = []
    for momentum, decay in _EXACT_RUNS.values():
        training = plan.training(
            method, seed, steps=plan.scale.exact_steps, momentum=momentum, weight_decay=decay
        )
        config = {"training": training.cell().config}
        cells.append(Cell(RECURSION, config, cost=plan.scale.exact_steps * 0.0027))
    return cells


def law_cell(plan: Plan, method: str, seed: int, run: str) -> Cell:
    """Return the cell that holds a recorded run against the laws.

    Args:
        plan: how large.
        method: of the network.
        seed: of the run.
        run: ``"no decay"``, ``"decay"``, or one of both on noise.
    """
    return on_recorded(plan, LAWS, method, seed, cost=0.01, **_LAW_RUNS[run])


def _run_cells(run: str) -> Callable[[Plan, str, int], list[Cell]]:
    return lambda plan, method, seed: [law_cell(plan, method, seed, run)]


_Records = Sequence[Sequence[dict[str, Any]]]
_Layer = Mapping[str, Any]


def _over_layers(
    value: Callable[[_Layer], float], pick: Callable[[list[float]], float]
) -> Callable[[_Records], Values]:
    """Return one value per seed: of all layers the one that is picked; none where it diverged."""

    def values(records: _Records) -> Values:
        found = ([value(layer) for layer in own["layers"]] for (own,) in records)
        return [pick(layers) if layers else None for layers in found]

    return values


def _farthest(values: list[float]) -> float:
    """Return the size of the largest miss, so that misses of layers or seeds cannot cancel."""
    return max(abs(value) for value in values)


def _log(what: str) -> Callable[[_Layer], float]:
    return lambda layer: math.log(max(layer[what], 1e-9))


def _off_exponent(layer: _Layer) -> float:
    """Exponent minus 1/4; a norm that fell below its start follows no power of time."""
    return (layer["exponent"] or 0.0) - 0.25


def _law(
    name: str,
    hypothesis: str,
    quantity: str,
    run: str,
    value: Callable[[_Layer], float],
    *,
    margin: float = math.log(1 + _LAW),
    kind: Kind = "agreement",
    pick: Callable[[list[float]], float] = _farthest,
    methods: Callable[[Plan], tuple[str, ...]] = lambda plan: plan.panel,
) -> Statement:
    linear = value is _off_exponent
    return Statement(
        name=name,
        hypothesis=hypothesis,
        quantity=quantity,
        margin=margin,
        methods=methods,
        cells=_run_cells(run),
        values=_over_layers(value, pick),
        kind=kind,
        axis="linear" if linear else "ratio",
        unit="from exponent 1/4" if linear else "",
        few=True,
    )


def _identity(
    name: str,
    hypothesis: str,
    quantity: str,
    margin: float,
    cells: Callable[[Plan, str, int], list[Cell]],
    values: Callable[[_Records], Values],
) -> Statement:
    return Statement(
        name=name,
        hypothesis=hypothesis,
        quantity=quantity,
        margin=margin,
        methods=lambda plan: plan.normalized,
        cells=cells,
        values=values,
        kind="identity",
        basis="proved",
    )


_STATEMENTS = (
    _identity(
        "recursion",
        "From gradients, rate, momentum and decay, the norm after every step follows exactly.",
        "largest deviation of a squared norm from the recursion, relative, over all steps of SGD "
        "and momentum with and without decay, in float64 at eps → 0",
        _EXACT,
        _recursion_cells,
        lambda records: [worst([run["error"] for run in own]) for own in records],
    ),
    _identity(
        "no-shrinking",
        "Under plain SGD without weight decay no step makes a norm smaller.",
        "share of steps that do",
        0.0,
        lambda plan, method, seed: _recursion_cells(plan, method, seed)[:1],
        lambda records: [own[0]["shrinking"] for own in records],
    ),
    _law(
        "grows",
        "Trained without weight decay, the norms of normalized weights grow.",
        "final over initial norm of the layer that grows least, momentum 0.9",
        "no decay",
        _log("grew"),
        margin=math.log(_GREW),
        kind="difference",
        pick=min,
        methods=lambda plan: plan.normalized,
    ),
    _law(
        "settles",
        "With weight decay the norms have settled at the end of the run.",
        "factor between the norm at two thirds of the run and at its end, of the layer that moved "
        "most",
        "decay",
        _log("late_growth"),
        margin=math.log(_GREW),
    ),
    _law(
        "quarter-power-on-task",
        "Our law, not the paper's: a norm grows as the fourth root of time.",
        "distance of the exponent of the norm in time from 1/4, of the layer farthest from it",
        "no decay",
        _off_exponent,
        margin=0.25 * _LAW,
    ),
    _law(
        "growth-from-gradients",
        "Our law: under pure noise, the fourth power of the norm grows by what the measured "
        "gradients say.",
        "factor between measured and predicted increase of the norm's fourth power, of the layer "
        "farthest off",
        "noise, no decay",
        _log("free_ratio"),
    ),
    _law(
        "rotation-on-task",
        "Our law: with weight decay the rotation per step becomes √(2ηλ/(1+α)), on the task.",
        "factor between measured and predicted rotation in the last third of the run, of the layer "
        "farthest off",
        "decay",
        _log("rotation_ratio"),
    ),
    _law(
        "rotation-on-noise",
        "Our law: so it does under pure noise.",
        "factor between measured and predicted rotation in the last third of the run, of the layer "
        "farthest off",
        "noise, decay",
        _log("rotation_ratio"),
    ),
)


_Laws = dict[tuple[str, str, int], Any]


def _details(plan: Plan, results: Results) -> Details:
    laws = {
        (method, run, seed): results[law_cell(plan, method, seed, run).key]["layers"]
        for method in plan.normalized
        for run in _LAW_RUNS
        for seed in plan.first_seeds
        if law_cell(plan, method, seed, run).key in results
    }
    ends = {
        run: [layer["grew"] for (_, r, _), own in laws.items() if r == run for layer in own]
        for run in ("no decay", "decay")
    }
    lost = sum(not found for found in laws.values())
    return Details(
        findings=[
            *([f"{lost} of {len(laws)} runs diverged and are left out."] if lost else []),
            *(
                f"With {run} of weights, norms end at {min(found):.2f} to {max(found):.2f} times "
                "their start, over all layers, methods and seeds."
                for run, found in ends.items()
                if found
            ),
            "The fourth root of time needs gradients of stationary size, which a network that "
            "learns does not have. The growth from the measured gradients needs no such thing.",
        ],
        conditions=[
            f"{plan.scale.steps} steps, batch 64, momentum 0.9, constant rate 0.1; decay "
            f"{DECAY:g}; norms of each sphere recorded at every step",
            "noise: the loss is the inner product of the logits with random numbers, only hidden "
            "weights are trained, rate 0.02 without decay, rate 1 with decay 0.002",
            f"recursions over {plan.scale.exact_steps} steps",
            "short runs: where decay is weak, the equilibrium may lie beyond their end",
        ],
        figures=[_norm_figure(plan, laws), _rotation_figure(plan, laws)],
        tables=[_table(plan, laws)],
    )


def _mean(laws: _Laws, method: str, run: str, what: str) -> float:
    found = [
        layer[what] for (m, r, _), own in laws.items() if (m, r) == (method, run) for layer in own
    ]
    return average([value for value in found if value is not None])


def _table(plan: Plan, laws: _Laws) -> Table:
    rows = [
        (
            label(m),
            _mean(laws, m, "no decay", "grew"),
            _mean(laws, m, "decay", "grew"),
            _mean(laws, m, "no decay", "exponent"),
            _mean(laws, m, "noise, no decay", "exponent"),
            _mean(laws, m, "noise, no decay", "free_ratio"),
            _mean(laws, m, "decay", "rotation_ratio"),
            _mean(laws, m, "noise, decay", "rotation_ratio"),
        )
        for m in plan.normalized
    ]
    return Table(
        "Growth and equilibrium, means over layers and the first seeds",
        (
            "method",
            "growth, no decay",
            "growth, decay",
            "exponent, task",
            "exponent, noise",
            "gain over law, noise",
            "rotation / law, task",
            "rotation / law, noise",
        ),
        rows,
        "Growth: final over initial norm. Exponent: of |w| in time, predicted 0.25. Gain over law: "
        "measured over predicted increase of |w|⁴, from the measured gradients. A dash: not asked.",
    )


def _norm_figure(plan: Plan, laws: _Laws) -> Figure:
    panels = []
    for method in plan.normalized:
        series = []
        for run, layer in _drawn(plan, laws, method, ("no decay", "decay", "noise, no decay")):
            start = layer["norm"][0]
            series.append(Series(run, layer["step"], [v / start for v in layer["norm"]]))
            if run == "noise, no decay":
                predicted = [v / start for v in layer["free_norm"]]
                series.append(
                    Series(f"law for {run}", layer["step"], predicted, dashed=True, color=run)
                )
        panels.append(
            Panel(
                label(method),
                "step",
                "norm / initial norm",
                series,
                x_scale="log",
                y_scale="log",
            )
        )
    return Figure(
        "growth-norms",
        "Norms of the hidden weights during training",
        "Second layer, first seed, mean over its spheres. Without decay norms grow; with decay "
        "they grow less. Dashed: |w|⁴ = |w₀|⁴ + 2η²/(1−α)² Σ |g|²|w|², from the gradients g that "
        "were measured in the run on noise (η: rate, α: momentum).",
        panels,
    )


def _rotation_figure(plan: Plan, laws: _Laws) -> Figure:
    panels = []
    for method in plan.panel:
        series = []
        for run, layer in _drawn(plan, laws, method, ("decay", "noise, decay")):
            ends, predicted = [layer["step"][0], layer["step"][-1]], layer["predicted_rotation"]
            series.append(Series(run, layer["step"], layer["rotation"]))
            series.append(
                Series(f"law for {run}", ends, [predicted, predicted], dashed=True, color=run)
            )
        panels.append(Panel(label(method), "step", "rotation (rad)", series, y_scale="log"))
    return Figure(
        "growth-rotation",
        "Rotation per step under weight decay, and its predicted equilibrium",
        "Second layer, first seed, root mean square over its spheres. Dashed: √(2ηλ/(1+α)) (η: "
        "rate, λ: decay, α: momentum), whatever the size of the gradient.",
        panels,
    )


def _drawn(
    plan: Plan, laws: _Laws, method: str, runs: tuple[str, ...]
) -> list[tuple[str, dict[str, Any]]]:
    """Return the second layer of the first seed of each run that did not diverge."""
    found = [(run, laws.get((method, run, plan.seeds[0]), [])) for run in runs]
    return [(run, layers[1]) for run, layers in found if layers]


def _advice(outcomes: Outcomes) -> str:
    if outcomes["grows"] == Outcome.OPEN:
        return (
            "Under plain SGD without weight decay no step makes a normalized weight smaller; how "
            "much yours will grow is open here."
        )
    if outcomes["grows"] == Outcome.HOLDS:
        return (
            "Without weight decay your normalized weights grow as they train, and the same rate "
            "turns them less and less; decay works against that, so tune it with the rate."
        )
    return "Here norms did not grow as they should: look at the runs before you rely on it."


CLAIM = Claim(
    name="growth",
    title="Training with normalization makes weight norms grow",
    statement="Training with normalization methods makes the norm of the weights grow (Sun et al. "
    "2020).",
    prediction="The gradient is orthogonal to the weight, so under SGD every step grows the norm: "
    "|w'|² = |w|² + η²|g|²; with momentum and decay another recursion is exact. If "
    "gradients are uncorrelated and of stationary size, |w| grows as the fourth root of time "
    "without decay, and with decay the rotation per step settles at √(2ηλ/(1+α)) (η: rate, λ: "
    "decay, α: momentum).",
    statements=_STATEMENTS,
    advice=_advice,
    details=_details,
    own_spheres=True,
)
