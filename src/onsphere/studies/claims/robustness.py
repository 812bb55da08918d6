"""Claim `robustness`: do grown weight norms make networks vulnerable to attacks?

Two separate questions. Do networks whose norms grew fall to attacks more often than networks kept
on the sphere (an association)? And does changing the norms, and nothing else, change robustness
(the cause)? The second is answered by the gauge control: rescaling the hidden weights together
with BatchNorm's running statistics keeps the function.
"""

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from onsphere.report.document import Figure, Panel, Series, Table, Verdict
from onsphere.robustness import correct_mask, pgd
from onsphere.studies.claims.base import (
    VARIANTS,
    Claim,
    Judgement,
    Plan,
    Results,
    average,
    label,
    worst,
)
from onsphere.studies.engine.job import Cell, Config, Inputs, Outcome, Task
from onsphere.studies.setup.network import Network
from onsphere.studies.setup.statistics import Estimate, estimate
from onsphere.studies.setup.training import DECAY, Training, network_for, restore

EPS = defaultdict(
    lambda: (1 / 255, 2 / 255, 4 / 255, 8 / 255),
    {
        "digits": (0.05, 0.1, 0.15, 0.2),
        "mnist": (0.05, 0.1, 0.15, 0.2),
        "fashion-mnist": (0.01, 0.02, 0.04, 0.08),
    },
)
"""Radii of the l-infinity attacks, in units of the full range of a pixel; those of CIFAR-10 for a
user's own images."""

_LOSSES = ("cross_entropy", "dlr")
MIDDLE = 1  # the radius at which networks are compared and controls are run
GAUGE = 16.0  # a power of two: rounding stays as it was, so what moves is due to norm or eps
LOGITS = 100.0
SAME = 0.0075  # robust accuracies closer than this are the same (one image in 200)
MATTERS = 0.02  # a smaller difference in robust accuracy is called none


class Scaled(nn.Module):
    """A classifier with its logits multiplied by a constant: same decisions, other losses."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled logits."""
        return self.factor * self.model(x)


def measure(config: Config, inputs: Inputs) -> Outcome:
    """Attack a trained network over a grid of radii, and again under both controls."""
    settings = Training(**config["training"])
    model = restore(settings, inputs)
    images = inputs.images
    x, y = images.test_x[: config["images"]], images.test_y[: config["images"]]
    grid = EPS[images.name]

    def robust(model: nn.Module, eps: float) -> dict[str, float]:
        broken = torch.zeros(len(y), dtype=torch.bool)
        found = {}
        for loss in _LOSSES:
            generator = torch.Generator().manual_seed(0)
            adversarial = pgd(
                model,
                x,
                y,
                eps=eps,
                loss=loss,
                steps=config["steps"],
                restarts=config["restarts"],
                generator=generator,
            )
            wrong = ~correct_mask(model, adversarial, y)
            broken |= wrong
            found[loss] = float((~wrong).float().mean())
        return {**found, "worst": float((~broken).float().mean())}

    rescaled = copy.deepcopy(model).rescale_hidden_(GAUGE)
    clean, moved = model(x).detach(), rescaled(x).detach()
    is_normalized = model.method is not None
    return Outcome(
        {
            "clean": float((clean.argmax(1) == y).float().mean()),
            "clean_all": inputs.records[0]["test_accuracy"],
            "eps": list(grid),
            "robust": [robust(model, eps) for eps in grid],
            "gauge": robust(rescaled, grid[MIDDLE]) if is_normalized else None,
            "gauge_change": float((moved - clean).norm() / clean.norm()) if is_normalized else None,
            "logits": robust(Scaled(model, LOGITS), grid[MIDDLE]),
            "norm_growth": growth_of(model, settings, inputs),
            "head_norm": float(model.head.weight.detach().norm()),
        }
    )


def growth_of(model: Network, settings: Training, inputs: Inputs) -> float:
    """Final over initial length of the hidden weights, geometric mean over layers."""
    start = network_for(settings, inputs.images)
    before = start.hidden_weights()
    ratios = [
        parameter.detach().norm() / before[name][0].detach().norm()
        for name, (parameter, _) in model.hidden_weights().items()
    ]
    return float(torch.stack(ratios).log().mean().exp())


MEASURE = Task("robustness.measure", 1, measure)


def _cells(plan: Plan) -> dict[tuple[str, str, int], Cell]:
    scale = plan.scale
    cells = {}
    for method in plan.methods:
        for variant in plan.variants(method):
            for seed in plan.seeds:
                training = plan.trained(method, seed, **VARIANTS[variant]).cell()
                config: Config = {
                    "training": training.config,
                    "images": scale.attacked,
                    "steps": scale.attack_steps,
                    "restarts": scale.restarts,
                }
                work = scale.attacked * scale.attack_steps * scale.restarts
                cells[method, variant, seed] = Cell(
                    MEASURE, config, (training,), cost=0.05 + work * 1.7e-4
                )
    return cells


def _judge(plan: Plan, results: Results) -> Judgement:
    found = {key: results[cell.key] for key, cell in _cells(plan).items()}
    middle = EPS[plan.data][MIDDLE]

    def gain(method: str, variant: str, seed: int) -> float:
        own, plain = (found[method, v, seed]["robust"][MIDDLE] for v in (variant, "plain"))
        return own["worst"] - plain["worst"]

    gains = {
        (method, variant): estimate([gain(method, variant, s) for s in plan.seeds])
        for method in plan.normalized
        for variant in ("sphere", "decay")
    }
    pooled = {
        variant: estimate(
            [average([gain(m, variant, s) for m in plan.normalized]) for s in plan.seeds]
        )
        for variant in ("sphere", "decay")
    }
    clean = estimate(
        [
            average(
                [
                    found[m, "sphere", s]["clean_all"] - found[m, "plain", s]["clean_all"]
                    for m in plan.normalized
                ]
            )
            for s in plan.seeds
        ]
    )
    gauge = worst(
        [
            abs(one["gauge"]["worst"] - one["robust"][MIDDLE]["worst"])
            for one in found.values()
            if one["gauge"]
        ]
    )
    inflation = estimate(
        [
            average(
                [
                    one["logits"]["cross_entropy"] - one["robust"][MIDDLE]["cross_entropy"]
                    for (_, _, s), one in found.items()
                    if s == seed
                ]
            )
            for seed in plan.seeds
        ]
    )
    dlr_shift = worst(
        [abs(one["logits"]["dlr"] - one["robust"][MIDDLE]["dlr"]) for one in found.values()]
    )
    growth = _mean(found, plan, "plain", "norm_growth")
    sphere = pooled["sphere"]
    verdict = _verdict(sphere, gauge)
    return Judgement(
        verdict,
        f"robust accuracy at eps {middle:.3g}, sphere minus plain: {sphere}; changed by a "
        f"{GAUGE:.0f}× rescale of all hidden weights: {gauge:.3f}",
        findings=[
            f"Association: plain training grows the hidden norms {growth:.1f}×. Robust accuracy, "
            f"mean over methods: on the sphere minus plain {sphere}; with weight decay minus plain "
            f"{pooled['decay']}. Clean accuracy, sphere minus plain: {clean}.",
            f"Cause: multiplying every hidden weight by {GAUGE:.0f} changes robust accuracy by at "
            f"most {gauge:.3f}: {_cause(gauge)}",
            f"Masking: multiplying the logits by {LOGITS:.0f} raises accuracy under the "
            f"cross-entropy attack by {inflation}; under the DLR attack it moves by at most "
            f"{dlr_shift:.3f}. The decisions are the same: whatever is gained here is masking.",
        ],
        conditions=[
            f"l-infinity PGD, {plan.scale.attack_steps} steps, {plan.scale.restarts} restart(s), "
            f"{plan.scale.attacked} test images, eval mode; the worst of both losses per image",
            f"weight decay {DECAY:g} on all weights; the sphere keeps hidden weights at their "
            "initial length; cosine schedule, rate 0.1, momentum 0.9",
            "an attack with few steps bounds robust accuracy from above only",
        ],
        figures=[_grid_figure(plan, found), _control_figure(plan, found)],
        tables=[_table(plan, found, gains)],
    )


def _verdict(sphere: Estimate, gauge: float) -> Verdict:
    if sphere.count == 1:
        return Verdict.OPEN
    if sphere.low > 0 and sphere.mean > MATTERS:
        return Verdict.HOLDS if gauge > SAME else Verdict.CONDITIONAL
    return Verdict.FAILS if sphere.high < MATTERS else Verdict.OPEN


def _cause(gauge: float) -> str:
    if gauge > SAME:
        return "here the norm itself matters."
    return (
        "the norm of a normalized weight does not amplify an attack. This says nothing of the "
        "head and the gains, which training moves too."
    )


def _mean(found: dict[tuple[str, str, int], Any], plan: Plan, variant: str, what: str) -> float:
    values = [found[m, variant, s][what] for m in plan.normalized for s in plan.seeds]
    return average(values)


def _table(
    plan: Plan,
    found: dict[tuple[str, str, int], Any],
    gains: dict[tuple[str, str], Estimate],
) -> Table:
    rows = []
    for method in plan.methods:
        for variant in plan.variants(method):
            own = [found[method, variant, seed] for seed in plan.seeds]
            middle = [one["robust"][MIDDLE] for one in own]
            gauge = [one["gauge"]["worst"] for one in own if one["gauge"]]
            rows.append(
                (
                    label(method),
                    variant,
                    average([one["norm_growth"] for one in own]),
                    average([one["head_norm"] for one in own]),
                    average([one["clean_all"] for one in own]),
                    average([m["cross_entropy"] for m in middle]),
                    average([m["dlr"] for m in middle]),
                    average([m["worst"] for m in middle]),
                    str(gains[method, variant]) if (method, variant) in gains else None,
                    average(gauge) if gauge else None,
                    average([one["logits"]["cross_entropy"] for one in own]),
                    average([one["logits"]["dlr"] for one in own]),
                )
            )
    eps = EPS[plan.data][MIDDLE]
    return Table(
        f"Robust accuracy at eps {eps:.3g}, means over seeds",
        (
            "method",
            "variant",
            "norm growth",
            "head norm",
            "clean",
            "PGD-CE",
            "PGD-DLR",
            "worst",
            "worst − plain [95 %]",
            f"worst, weights ×{GAUGE:.0f}",
            f"CE, logits ×{LOGITS:.0f}",
            f"DLR, logits ×{LOGITS:.0f}",
        ),
        rows,
        "Norm growth: final over initial length of the hidden weights. The rescale of the weights "
        "moves BatchNorm's running statistics along, so that the function stays.",
    )


def _grid_figure(plan: Plan, found: dict[tuple[str, str, int], Any]) -> Figure:
    panels = []
    for method in plan.methods:
        series = []
        for variant in plan.variants(method):
            own = [found[method, variant, seed] for seed in plan.seeds]
            curves = [[one["clean"], *[r["worst"] for r in one["robust"]]] for one in own]
            columns = list(zip(*curves, strict=True))
            series.append(
                Series(
                    variant,
                    [0.0, *own[0]["eps"]],
                    [average(c) for c in columns],
                    [min(c) for c in columns],
                    [max(c) for c in columns],
                    style="both",
                )
            )
        panels.append(
            Panel(
                label(method), "eps (l-infinity)", "robust accuracy", series, y_limits=(0.0, 1.02)
            )
        )
    return Figure(
        "robustness-eps",
        "Robust accuracy against the radius of the attack",
        "Worst of PGD on cross-entropy and on DLR for each image; eps 0 is clean accuracy. Mean "
        "over seeds, band from lowest to highest.",
        panels,
    )


def _control_figure(plan: Plan, found: dict[tuple[str, str, int], Any]) -> Figure:
    def panel(title: str, control: str, losses: tuple[str, ...]) -> Panel:
        series = []
        methods = plan.normalized if control == "gauge" else plan.methods
        for loss in losses:
            for which in ("before", "after"):
                values = [
                    estimate(
                        [
                            (
                                found[m, "plain", s]["robust"][MIDDLE]
                                if which == "before"
                                else found[m, "plain", s][control]
                            )[loss]
                            for s in plan.seeds
                        ]
                    ).mean
                    for m in methods
                ]
                offset = -0.12 if which == "before" else 0.12
                text = loss.replace("cross_entropy", "CE").replace("dlr", "DLR")
                series.append(
                    Series(
                        f"{text}, {which}",
                        [i + offset for i in range(len(methods))],
                        values,
                        style="points",
                    )
                )
        return Panel(
            title,
            "",
            "robust accuracy",
            series,
            categories=[label(m) for m in methods],
            y_limits=(0.0, 1.02),
        )

    return Figure(
        "robustness-controls",
        "Two controls that change no decision of the network",
        f"Left: all hidden weights times {GAUGE:.0f}, with running statistics. If norms caused "
        f"vulnerability, points would move. Right: logits times {LOGITS:.0f}. True robustness "
        "cannot change: an attack whose points move here is fooled by the scale of the logits.",
        [
            panel(f"weights ×{GAUGE:.0f}", "gauge", ("cross_entropy", "dlr")),
            panel(f"logits ×{LOGITS:.0f}", "logits", ("cross_entropy", "dlr")),
        ],
        columns=2,
    )


CLAIM = Claim(
    name="robustness",
    title="Norm growth makes networks vulnerable",
    statement="Training with normalization makes weight norms grow, which could cause adversarial "
    "vulnerability since it amplifies the attack (Sun et al. 2020).",
    prediction="If norms cause it, robust accuracy falls when the hidden weights are scaled up and "
    "nothing else changes. Theory says it cannot: behind a normalization the effective weight is "
    "independent of the norm. What norm growth can do is lower the effective rate and so lead to "
    "another solution; and large logits mask cross-entropy attacks.",
    threshold=f"Holds if networks on the sphere are more robust than plain ones by more than "
    f"{MATTERS:.0%} points (95 % interval over seeds above 0) and the rescale of hidden weights "
    f"changes robust accuracy by more than {SAME}; under conditions if only the first is so; "
    f"does not hold if the interval lies below {MATTERS:.0%} points; undecided otherwise. "
    "One seed decides nothing.",
    cells=lambda plan: list(_cells(plan).values()),
    judge=_judge,
)
