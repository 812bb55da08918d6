"""Claim `growth`: training with normalization makes the norms of the weights grow, by laws."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onsphere.dynamics import free_growth, momentum_growth, sgd_equilibrium, sgd_growth
from onsphere.geometry import VectorAxes
from onsphere.report.document import Figure, Panel, Series, Table, Verdict
from onsphere.report.number import number
from onsphere.studies.claims.base import Claim, Judgement, Plan, Results, average, label, worst
from onsphere.studies.engine.job import Cell, Config, Inputs, Outcome, Task
from onsphere.studies.setup.statistics import log_slope
from onsphere.studies.setup.training import (
    DECAY,
    Training,
    batches,
    network_for,
    optimizer_for,
)

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


def check_recursion(config: Config, inputs: Inputs) -> Outcome:
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
        shrinking.append(float((measured.diff(dim=0) < 0).double().mean()))
    error = max(errors)
    error = error if error < _ABSURD else _ABSURD  # nan, too, when the run diverged
    return Outcome({"error": error, "shrinking": average(shrinking)})


def _predict(start: Tensor, drives: Tensor, settings: Training) -> Tensor:
    if settings.momentum == 0:
        return sgd_growth(start, drives, settings.lr, settings.weight_decay)
    return momentum_growth(start, drives, settings.lr, settings.momentum, settings.weight_decay)


def _squares(weight: Tensor | None, axes: VectorAxes) -> Tensor:
    assert weight is not None
    return axes.norms(weight.detach()).flatten().square()


def check_laws(config: Config, inputs: Inputs) -> Outcome:
    """Hold the recorded norms and rotations of a run against the laws of the mean."""
    settings = Training(**config["training"])
    if inputs.records[0]["diverged"]:
        return Outcome({"layers": []})
    names = sorted(
        {k.split(".", 1)[1].rsplit(".", 1)[0] for k in inputs.tensors[0] if k.startswith("series.")}
    )
    return Outcome({"layers": [_layer_laws(name, settings, inputs) for name in names]})


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
LAWS = Task("growth.laws", 2, check_laws)


def _recursion_cells(plan: Plan) -> dict[tuple[str, str, int], Cell]:
    cells = {}
    for method in plan.methods:
        for run, (momentum, decay) in _EXACT_RUNS.items():
            for seed in plan.seeds:
                training = plan.training(
                    method,
                    seed,
                    steps=plan.scale.exact_steps,
                    momentum=momentum,
                    weight_decay=decay,
                )
                config = {"training": training.cell().config}
                cost = plan.scale.exact_steps * 0.0027
                cells[method, run, seed] = Cell(RECURSION, config, cost=cost)
    return cells


def _law_cells(plan: Plan) -> dict[tuple[str, str, int], Cell]:
    cells = {}
    for method in plan.methods:
        for run, changes in _LAW_RUNS.items():
            for seed in plan.seeds:
                training = plan.training(method, seed, record=True, **changes).cell()
                config = {"training": training.config}
                cells[method, run, seed] = Cell(LAWS, config, (training,), cost=0.01)
    return cells


def _cells(plan: Plan) -> list[Cell]:
    return [*_recursion_cells(plan).values(), *_law_cells(plan).values()]


def _judge(plan: Plan, results: Results) -> Judgement:
    exact = {key: results[cell.key] for key, cell in _recursion_cells(plan).items()}
    laws = {key: results[cell.key]["layers"] for key, cell in _law_cells(plan).items()}
    error = worst(
        [exact[m, r, s]["error"] for m in plan.normalized for r in _EXACT_RUNS for s in plan.seeds]
    )
    control = worst([exact["none", r, s]["error"] for r in _EXACT_RUNS for s in plan.seeds])
    shrinking = worst(
        [exact[m, "SGD", s]["shrinking"] for m in plan.normalized for s in plan.seeds]
    )
    growth, decayed = (
        [layer["grew"] for m in plan.normalized for s in plan.seeds for layer in laws[m, run, s]]
        or [math.nan]  # every run may have diverged
        for run in ("no decay", "decay")
    )
    spheres = _mean_over(plan, laws, "no decay", "spheres_grew")
    law = {name: _deviations(plan, laws, *which) for name, which in _LAWS_OF_THE_MEAN.items()}
    met = {name: [m for m, off in found.items() if off <= _LAW] for name, found in law.items()}
    many = len(plan.normalized)
    diverged = sum(not found for found in laws.values())
    core = error <= _EXACT and shrinking == 0 and min(growth) >= _GREW
    verdict = Verdict.FAILS
    if core and len(plan.seeds) == 1:
        verdict = Verdict.OPEN
    elif core:
        all_met = all(len(found) == many for found in met.values())
        verdict = Verdict.HOLDS if all_met else Verdict.CONDITIONAL
    return Judgement(
        verdict,
        f"without decay norms grow {min(growth):.2f}× to {max(growth):.2f}×; exact recursions to "
        f"{number(error, 3)} per step",
        findings=[
            *([f"{diverged} of {len(laws)} runs diverged and are left out."] if diverged else []),
            *(
                f"{name}: met to {_LAW:.0%} by {len(met[name])} of {many} methods; measured over "
                f"predicted {_range(_over_methods(plan, laws, *which))}."
                for name, which in _LAWS_OF_THE_MEAN.items()
            ),
            "The exponent 1/4 needs gradients of stationary size, which a network that learns does "
            "not have. The growth from the measured gradients needs no such thing.",
            f"Without weight decay the layers' mean norms end at {min(growth):.2f} to "
            f"{max(growth):.2f} of their start ({spheres:.1%} of single spheres grew by "
            f"{_GREW - 1:.0%} or more); under SGD without momentum norms shrank in {shrinking:.0%} "
            f"of steps. With decay {DECAY:g} the norms end at {min(decayed):.2f} to "
            f"{max(decayed):.2f} of their start.",
            "The recursions (SGD and momentum, with and without decay) hold to "
            f"{number(error, 3)}; without normalization they are off by up to "
            f"{number(control, 2)}.",
        ],
        conditions=[
            f"{plan.scale.steps} steps, batch 64, momentum 0.9, constant rate 0.1; norms of each "
            "sphere recorded at every step",
            "noise: the loss is the inner product of the logits with random numbers, only hidden "
            "weights are trained, rate 0.02 without decay, rate 1 with decay 0.002",
            f"recursions over {plan.scale.exact_steps} steps in float64 at eps → 0",
            "a method meets a law when the deviation, without its sign and averaged over layers "
            f"and seeds, is at most {_LAW:.0%}",
        ],
        figures=[_norm_figure(plan, laws), _rotation_figure(plan, laws)],
        tables=[_table(plan, exact, laws)],
    )


_LAWS_OF_THE_MEAN = {
    "Exponent 1/4 of |w| in time, on the task": ("no decay", "exponent", 0.25),
    "Exponent 1/4 of |w| in time, on noise": ("noise, no decay", "exponent", 0.25),
    "Growth of |w|⁴ from the measured gradients, on noise": ("noise, no decay", "free_ratio", 1.0),
    "Equilibrium rotation √(2ηλ/(1+α)), on the task": ("decay", "rotation_ratio", 1.0),
    "Equilibrium rotation √(2ηλ/(1+α)), on noise": ("noise, decay", "rotation_ratio", 1.0),
}
"""Each law of the mean: the run, what is measured in it, and its predicted value."""

_Laws = dict[tuple[str, str, int], Any]


def _deviations(plan: Plan, laws: _Laws, run: str, what: str, predicted: float) -> dict[str, float]:
    """Mean relative deviation of each method, without sign; nan where every run diverged."""
    return {
        method: average(
            [abs(value / predicted - 1) for value in _values(plan, laws, method, run, what)]
        )
        for method in plan.normalized
    }


def _over_methods(
    plan: Plan, laws: _Laws, run: str, what: str, predicted: float
) -> dict[str, float]:
    """Mean of measured over predicted, per normalized method."""
    return {m: _mean(plan, laws, m, run, what) / predicted for m in plan.normalized}


def _mean_over(plan: Plan, laws: _Laws, run: str, what: str) -> float:
    return average([_mean(plan, laws, m, run, what) for m in plan.normalized])


def _values(plan: Plan, laws: _Laws, method: str, run: str, what: str) -> list[float]:
    """One value per layer and seed that has one."""
    found = [layer[what] for seed in plan.seeds for layer in laws[method, run, seed]]
    return [value for value in found if value is not None]


def _mean(plan: Plan, laws: _Laws, method: str, run: str, what: str) -> float:
    return average(_values(plan, laws, method, run, what))


def _range(values: dict[str, float]) -> str:
    return f"{min(values.values()):.2f} to {max(values.values()):.2f}"


def _table(plan: Plan, exact: dict[tuple[str, str, int], Any], laws: _Laws) -> Table:
    rows = [
        (
            label(m),
            worst([exact[m, r, s]["error"] for r in _EXACT_RUNS for s in plan.seeds]),
            _mean(plan, laws, m, "no decay", "grew"),
            _mean(plan, laws, m, "decay", "grew"),
            _mean(plan, laws, m, "no decay", "exponent"),
            _mean(plan, laws, m, "noise, no decay", "exponent"),
            _mean(plan, laws, m, "noise, no decay", "free_ratio"),
            _mean(plan, laws, m, "decay", "rotation_ratio"),
            _mean(plan, laws, m, "noise, decay", "rotation_ratio"),
        )
        for m in plan.methods
    ]
    return Table(
        "Growth and equilibrium, means over layers and seeds",
        (
            "method",
            "error of the recursions",
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
        "measured over predicted increase of |w|⁴, from the measured gradients. The row none is "
        "the control: its weights live on no sphere.",
    )


def _norm_figure(plan: Plan, laws: _Laws) -> Figure:
    panels = []
    for method in plan.methods:
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
        "they settle. Dashed: |w|⁴ = |w₀|⁴ + 2η²/(1−α)² Σ L, from the measured gradients of the "
        "run on noise.",
        panels,
    )


def _rotation_figure(plan: Plan, laws: _Laws) -> Figure:
    panels = []
    for method in plan.methods:
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
        "Second layer, first seed, root mean square over its spheres. Dashed: √(2ηλ/(1+α)), "
        "independent of the gradient's size.",
        panels,
    )


def _drawn(
    plan: Plan, laws: _Laws, method: str, runs: tuple[str, ...]
) -> list[tuple[str, dict[str, Any]]]:
    """Return the second layer of the first seed of each run that did not diverge."""
    found = [(run, laws[method, run, plan.seeds[0]]) for run in runs]
    return [(run, layers[1]) for run, layers in found if layers]


CLAIM = Claim(
    name="growth",
    title="Training with normalization makes weight norms grow",
    statement="Training with normalization methods makes the norm of the weights grow (Sun et al. "
    "2020).",
    prediction="The gradient is orthogonal to the weight, so under SGD every step grows the norm: "
    "|w'|² = |w|² + η²|g|²; with momentum and decay an exact recursion replaces Pythagoras. For "
    "uncorrelated gradients of stationary size |w| ~ t^(1/4) without decay, and with decay the "
    "rotation per step settles at √(2ηλ/(1+α)).",
    threshold=f"Holds if the recursions are exact to {_EXACT:.0e} (relative, float64), no norm "
    f"shrinks under SGD, every layer's mean norm grows by {_GREW - 1:.0%} or more without decay, "
    f"and the laws of the mean are met to {_LAW:.0%} on the task and on noise; under "
    "conditions if all but the laws of the mean hold; does not hold otherwise. "
    "One seed decides nothing but a failure.",
    cells=_cells,
    judge=_judge,
    own_spheres=True,
)
