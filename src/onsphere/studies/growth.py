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
from onsphere.studies.cell import Cell, Config, Inputs, Outcome, Task
from onsphere.studies.claim import Claim, Judgement, Plan, Results, label, worst
from onsphere.studies.network import SmallConvNet
from onsphere.studies.statistics import log_slope
from onsphere.studies.training import DECAY, Training, batches, optimizer_for

_EXACT = 1e-10  # threshold for the per-step recursions, relative, float64
_GREW = 1.05  # final over initial norm
_LAW = 0.15  # how far the laws of the mean may be off: exponent 1/4, equilibrium rotation

_EXACT_RUNS = {
    "SGD": (0.0, 0.0),
    "SGD + decay": (0.0, DECAY),
    "momentum": (0.9, 0.0),
    "momentum + decay": (0.9, DECAY),
}
"""Optimizers whose recursion is checked: (momentum, weight decay)."""

_LAW_RUNS = {
    "no decay": ("true", 0.0, 0.1),
    "decay": ("true", DECAY, 0.1),
    "noise, no decay": ("random", 0.0, 1.0),
    "noise, decay": ("random", DECAY, 1.0),
}
"""Runs on which the laws of the mean are checked: (labels, weight decay, rate).

Noise alone gives small gradients; the larger rate lets its laws show within the same steps.
"""


def check_recursion(config: Config, inputs: Inputs) -> Outcome:
    """Train in float64 at eps -> 0 and compare every squared norm with the exact recursion."""
    settings = Training(**config["training"])
    images = inputs.images
    has_eps = settings.method in ("bn", "ln", "in", "gn", "rms")
    eps = 1e-30 if has_eps else None
    model = SmallConvNet(
        settings.method, images, width=settings.width, seed=settings.seed, eps=eps
    ).double()
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
    return Outcome({"error": min(max(errors), 1e9), "shrinking": sum(shrinking) / len(shrinking)})


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
        fourth = (norm**4).mean(1)
        gained = fourth - fourth[0]
        half = steps // 2
        # |w|^4 grows as t, so a quarter of this exponent is that of |w| once w_0 is forgotten.
        since = torch.arange(1, steps - half, dtype=torch.float64)
        later = (fourth[half + 1 :] - fourth[half]).clamp_min(1e-12 * float(fourth[half]))
        result["exponent"] = log_slope(since.tolist(), later.tolist()) / 4
        result["free_ratio"] = float(gained[-1] / (free**4 - free[0] ** 4).mean(1)[-1])
    else:
        level = float(unit_gradient[late].mean())
        balance = sgd_equilibrium(
            lr=settings.lr,
            decay=settings.weight_decay,
            momentum=settings.momentum,
            unit_gradient_square=max(level, 1e-30),
        )
        result["predicted_rotation"] = balance.rotation
        result["rotation_ratio"] = float(turned / balance.rotation)
    return result


RECURSION = Task("growth.recursion", 2, check_recursion)
LAWS = Task("growth.laws", 1, check_laws)


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
        for run, (labels, decay, lr) in _LAW_RUNS.items():
            for seed in plan.seeds:
                training = plan.training(
                    method, seed, weight_decay=decay, labels=labels, lr=lr, record=True
                ).cell()
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
    growth = [
        layer["grew"]
        for m in plan.normalized
        for s in plan.seeds
        for layer in laws[m, "no decay", s]
    ]
    decayed = [
        layer["grew"] for m in plan.normalized for s in plan.seeds for layer in laws[m, "decay", s]
    ]
    exponent = {
        run: _over_seeds(plan, laws, run, "exponent") for run in ("no decay", "noise, no decay")
    }
    rotation = {
        run: _over_seeds(plan, laws, run, "rotation_ratio") for run in ("decay", "noise, decay")
    }
    good_growth = [m for m, e in exponent["noise, no decay"].items() if abs(4 * e - 1) <= _LAW]
    good_turn = [m for m, r in rotation["noise, decay"].items() if abs(r - 1) <= _LAW]
    growth, decayed = growth or [math.nan], decayed or [math.nan]  # every run may have diverged
    core = error <= _EXACT and shrinking == 0 and min(growth) >= _GREW
    on_task = all(abs(4 * e - 1) <= _LAW for e in exponent["no decay"].values()) and all(
        abs(r - 1) <= _LAW for r in rotation["decay"].values()
    )
    many = len(plan.normalized)
    diverged = sum(not found for found in laws.values())
    on_noise = len(good_growth) == many and len(good_turn) == many
    verdict = Verdict.FAILS
    if core and len(plan.seeds) == 1:
        verdict = Verdict.OPEN
    elif core:
        verdict = Verdict.HOLDS if on_task and on_noise else Verdict.CONDITIONAL
    return Judgement(
        verdict,
        f"without decay norms grow {min(growth):.2f}× to {max(growth):.2f}×; exact recursions to "
        f"{number(error, 3)} per step",
        findings=[
            *([f"{diverged} of {len(laws)} runs diverged and are left out."] if diverged else []),
            f"Without weight decay every normalized weight grew, by {min(growth):.2f} to "
            f"{max(growth):.2f}; under SGD without momentum no norm ever shrank "
            f"({shrinking:.0%} of steps). With decay {DECAY:g} the norms end at {min(decayed):.2f} "
            f"to {max(decayed):.2f} of their start.",
            "The recursions (SGD and momentum, with and without decay) hold to "
            f"{number(error, 3)}; without normalization they are off by up to "
            f"{number(control, 2)}.",
            "Law |w| ~ t^(1/4): with stationary noise (random labels) the exponent is within "
            f"{_LAW:.0%} of 1/4 for {len(good_growth)} of {many} methods "
            f"({_range(exponent['noise, no decay'])}); on the real task it is "
            f"{_range(exponent['no decay'])}, because gradients shrink as the network learns.",
            "Equilibrium rotation √(2ηλ/(1+α)): with stationary noise within "
            f"{_LAW:.0%} for {len(good_turn)} of {many} methods (measured over predicted "
            f"{_range(rotation['noise, decay'])}); on the real task {_range(rotation['decay'])}.",
        ],
        conditions=[
            f"{plan.scale.steps} steps, batch 64, momentum 0.9, constant rate (0.1; 1 for "
            "the runs on noise, in which only the hidden weights are trained); norms of each "
            "sphere recorded at every step",
            f"recursions over {plan.scale.exact_steps} steps in float64 at eps → 0",
            "the laws of the mean assume uncorrelated gradients of stationary size: random labels "
            "give that, a network that learns does not",
        ],
        figures=[_norm_figure(plan, laws), _rotation_figure(plan, laws)],
        tables=[_table(plan, exact, laws)],
    )


def _over_seeds(
    plan: Plan, laws: dict[tuple[str, str, int], Any], run: str, what: str
) -> dict[str, float]:
    """Mean over layers and seeds, per normalized method."""
    return {method: _mean(plan, laws, method, run, what) for method in plan.normalized}


def _mean(
    plan: Plan, laws: dict[tuple[str, str, int], Any], method: str, run: str, what: str
) -> float:
    """Mean over layers and seeds; nan where every run diverged."""
    values = [layer[what] for seed in plan.seeds for layer in laws[method, run, seed]]
    return sum(values) / len(values) if values else math.nan


def _range(values: dict[str, float]) -> str:
    return f"{min(values.values()):.2f} to {max(values.values()):.2f}"


def _table(
    plan: Plan, exact: dict[tuple[str, str, int], Any], laws: dict[tuple[str, str, int], Any]
) -> Table:
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


def _norm_figure(plan: Plan, laws: dict[tuple[str, str, int], Any]) -> Figure:
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


def _rotation_figure(plan: Plan, laws: dict[tuple[str, str, int], Any]) -> Figure:
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
    plan: Plan, laws: dict[tuple[str, str, int], Any], method: str, runs: tuple[str, ...]
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
    f"shrinks under SGD, every norm grows by {_GREW - 1:.0%} or more without decay, and both laws "
    f"of the mean are met to {_LAW:.0%} on the task and on noise; under conditions if all but the "
    "laws of the mean hold; does not hold otherwise. One seed decides nothing but a failure.",
    cells=_cells,
    judge=_judge,
)
