"""Claim `robustness`: do grown norms make networks vulnerable to attacks, and which of them?

Training moves several things at once that may matter to an attack. They are told apart by networks
that differ in one of them and share seed, initial weights and order of the data. Norms are kept
(the sphere), or kept while the effective rate falls as if they had grown (the path), or forced to
grow while the weights turn as before (the norm); weights decay everywhere, in the hidden layers or
in the head alone; the head is held at its length. On a trained network the hidden weights are
rescaled with the running statistics (the norm as such), eps is made small, running statistics are
measured anew, and logits are scaled (masking).

Robust accuracy is the share of images that withstand Auto-PGD on the tempered cross-entropy and on
the targeted DLR loss, which no scale of the logits changes. Networks are compared on the images
that both classify rightly without an attack, so that clean accuracy is matched.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from onsphere.norms import ActivationNorm
from onsphere.report.document import Figure, Outcome, Panel, Series, Table
from onsphere.robustness import apgd, apgd_targeted, correct_mask, pgd, robust_mask
from onsphere.studies.claims.amplification import STATEMENTS as AMPLIFICATION
from onsphere.studies.claims.amplification import attack_loss
from onsphere.studies.claims.base import Claim, Details, Outcomes
from onsphere.studies.claims.plan import Plan, Results, average, label
from onsphere.studies.claims.statement import Statement, Values
from onsphere.studies.engine.job import Cell, Config, Inputs, Task
from onsphere.studies.engine.job import Outcome as Found
from onsphere.studies.setup.network import Network
from onsphere.studies.setup.statistics import estimate
from onsphere.studies.setup.training import (
    DECAY,
    Training,
    measure_statistics,
    network_for,
    restore,
)
from onsphere.studies.setup.training_group import member

EPS = {
    "digits": (0.05, 0.1, 0.15, 0.2),
    "mnist": (0.05, 0.1, 0.15, 0.2),
    "fashion-mnist": (0.01, 0.02, 0.04, 0.08),
}
_FINE = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
"""Radii of the l-infinity attacks, in units of a pixel's full range; fine ones for the rest."""

MIDDLE = 1  # the radius at which networks are compared
GAUGE = 16.0  # a power of two: rounding stays as it was, so what moves is due to norm or eps
LOGITS = 100.0
MATTERS = 0.02  # a smaller difference in robust accuracy is called none
_PER_DOUBLING = 0.01  # a smaller change per doubling of the norm is called none
_DOSES = (1.0, 2.0, 4.0, 8.0)  # by how much norms are forced to have grown
_FORCED = 4.0
_TINY = 1e-12  # what replaces eps
_TARGETS = 3

_DECAY_GROUP: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "plain": {},
        "decay": {"weight_decay": DECAY},
        "decay, hidden": {"weight_decay": DECAY, "decayed": "hidden"},
        "decay, head": {"weight_decay": DECAY, "decayed": "head"},
    }
)
_SPHERE_GROUP: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        **{
            ("sphere" if dose == 1 else f"path ×{dose:g}"): {"space": "sphere", "rate_growth": dose}
            for dose in _DOSES
        },
        "norm ×4": {"space": "sphere", "norm_growth": _FORCED},
        "head held": {"space": "sphere", "head": "sphere"},
    }
)
"""Trainings by name, as changes of the common one."""


def radii(data: str) -> tuple[float, ...]:
    """Return the radii of the attacks on a data set, in units of the full range of a pixel."""
    return EPS.get(data, _FINE)


class Scaled(nn.Module):
    """A classifier with its logits multiplied by a constant: same decisions, other losses."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled logits."""
        return self.factor * self.model(x)


def _attacked(config: Config, inputs: Inputs) -> tuple[Tensor, Tensor, float]:
    images, most = inputs.images, config["images"]
    return images.test_x[:most], images.test_y[:most], radii(images.name)[MIDDLE]


def _stands(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> list[int]:
    """Return which images withstand Auto-PGD on both losses."""
    generator = torch.Generator().manual_seed(0)
    climb = partial(apgd, eps=eps, steps=steps, generator=generator)
    aim = partial(apgd_targeted, eps=eps, steps=steps, targets=_TARGETS, generator=generator)
    return robust_mask(net, x, y, [climb, aim]).int().tolist()


def attack(config: Config, inputs: Inputs) -> Found:
    """Attack a seed's networks; one that diverged leaves a record that says so."""
    x, y, eps = _attacked(config, inputs)
    networks: list[dict[str, Any]] = []
    for number, training in enumerate(config["trainings"], config["first"]):
        own = member(inputs, number)
        if own.records[0]["diverged"]:
            networks.append({"diverged": True})
            continue
        settings = Training(**training)
        model = _frozen(restore(settings, own))
        networks.append(
            {
                "clean_all": own.records[0]["test_accuracy"],
                "right": correct_mask(model, x, y).int().tolist(),
                "stands": _stands(model, x, y, eps, config["steps"]),
                "norm_growth": growth_of(model, settings, inputs),
                "head_growth": _head_growth(model, settings, inputs),
            }
        )
    return Found({"networks": networks})


def control(config: Config, inputs: Inputs) -> Found:
    """Attack changed copies of a seed's plain network."""
    own = member(inputs, config["first"])
    if own.records[0]["diverged"]:
        return Found({"diverged": True})
    settings, steps = Training(**config["training"]), config["steps"]
    x, y, eps = _attacked(config, inputs)
    model = _frozen(restore(settings, own))

    def under_cross_entropy(net: nn.Module) -> list[int]:
        return correct_mask(net, pgd(net, x, y, eps=eps, steps=10), y).int().tolist()

    return Found(
        {
            "right": correct_mask(model, x, y).int().tolist(),
            "controls": {
                name: _stands(change(model, settings, own), x, y, eps, steps)
                for name, (change, applies) in CONTROLS.items()
                if applies(model)
            },
            "cross_entropy": under_cross_entropy(model),
            "cross_entropy_loud": under_cross_entropy(_loud(model)),
            "curve": _curve(model, x, y, inputs),
        }
    )


def _curve(model: nn.Module, x: Tensor, y: Tensor, inputs: Inputs) -> list[float]:
    """Return accuracy at every radius, from above: under ten steps of PGD on the DLR loss."""
    loss = attack_loss(inputs.images)
    moved = (pgd(model, x, y, eps=eps, loss=loss, steps=10) for eps in radii(inputs.images.name))
    return [float(correct_mask(model, other, y).float().mean()) for other in moved]


Change = Callable[[Network, Training, Inputs], nn.Module]


def _frozen(model: Network) -> Network:
    """Attacks need gradients of the image alone."""
    return model.requires_grad_(False)


def _rescaled(model: Network, *_: Any) -> nn.Module:
    return copy.deepcopy(model).rescale_hidden_(GAUGE)


def _without_eps(_: Network, settings: Training, inputs: Inputs) -> nn.Module:
    return _frozen(restore(settings, inputs, eps=_TINY))


def _refreshed(model: Network, settings: Training, inputs: Inputs) -> nn.Module:
    return measure_statistics(copy.deepcopy(model), inputs.images, settings)


def _loud(model: Network, *_: Any) -> nn.Module:
    return Scaled(model, LOGITS)


def _has_running_statistics(model: Network) -> bool:
    return any(isinstance(n, ActivationNorm) and n.track_running_stats for n in model.norms)


CONTROLS: Mapping[str, tuple[Change, Callable[[Network], bool]]] = MappingProxyType(
    {
        "rescaled": (_rescaled, lambda model: model.method is not None),
        "without eps": (_without_eps, lambda model: model.has_eps),
        "fresh statistics": (_refreshed, _has_running_statistics),
        "loud": (_loud, lambda _: True),
    }
)
"""Changes of a trained network, and the networks that they apply to."""


def growth_of(model: Network, settings: Training, inputs: Inputs) -> float:
    """Final over initial length of the hidden weights, geometric mean over layers."""
    start = network_for(settings, inputs.images)
    before = start.hidden_weights()
    ratios = [
        parameter.detach().norm() / before[name][0].detach().norm()
        for name, (parameter, _) in model.hidden_weights().items()
    ]
    return float(torch.stack(ratios).log().mean().exp())


def _head_growth(model: Network, settings: Training, inputs: Inputs) -> float:
    start = network_for(settings, inputs.images)
    ends = [net.head.weight.detach().norm() for net in (model, start)]
    return float(ends[0] / ends[1])


ATTACK = Task("robustness.attack", 1, attack)
CONTROL = Task("robustness.control", 1, control)


def _group(
    plan: Plan, method: str, seed: int, names: Mapping[str, Mapping[str, Any]]
) -> tuple[Cell, Config]:
    """Return the cell that trains a seed's networks among others, and which of them these are."""

    def trainings(one: int) -> list[Training]:
        return [plan.trained(method, one, **own) for own in names.values()]

    group, first = plan.together(seed, trainings, keep=True)
    return group, {"trainings": [asdict(own) for own in trainings(seed)], "first": first}


def _attack_cell(
    plan: Plan, method: str, seed: int, names: Mapping[str, Mapping[str, Any]]
) -> Cell:
    (group, own), scale = _group(plan, method, seed, names), plan.scale
    config = {**own, "images": scale.images, "steps": scale.attack_steps}
    return Cell(ATTACK, config, (group,), cost=len(names) * scale.attack_steps * 0.02)


def _control_cell(plan: Plan, method: str, seed: int) -> Cell:
    (group, own), scale = _group(plan, method, seed, _DECAY_GROUP), plan.scale
    config: Config = {
        "training": own["trainings"][0],
        "first": own["first"],
        "images": scale.images,
        "steps": scale.attack_steps,
    }
    return Cell(CONTROL, config, (group,), cost=4 * scale.attack_steps * 0.02)


_GROUPS = (_DECAY_GROUP, _SPHERE_GROUP)


def _group_cells(
    *groups: Mapping[str, Mapping[str, Any]],
) -> Callable[[Plan, str, int], list[Cell]]:
    return lambda plan, method, seed: [_attack_cell(plan, method, seed, g) for g in groups]


_Networks = Mapping[str, dict[str, Any]]
"""Records of the networks of one method and seed that did not diverge, by name."""


def _named(own: Sequence[dict[str, Any]]) -> _Networks:
    """Give the networks of some groups their names; which groups, their sizes tell."""
    by_size = {len(group): group for group in _GROUPS}
    pairs = (
        (name, found)
        for record in own
        for name, found in zip(by_size[len(record["networks"])], record["networks"], strict=True)
    )
    return {name: found for name, found in pairs if not found.get("diverged")}


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Robust accuracy of one minus the other's, on the images that both get right."""
    rows = [a and b for a, b in zip(one["right"], other["right"], strict=True)]
    both = max(1, sum(rows))
    gained = sum(a - b for a, b, r in zip(one["stands"], other["stands"], rows, strict=True) if r)
    return gained / both


def _between(one: str, other: str) -> Callable[[Sequence[Sequence[dict[str, Any]]]], Values]:
    """Return the difference of two networks for every seed."""

    def values(records: Sequence[Sequence[dict[str, Any]]]) -> Values:
        found = map(_named, records)
        return [
            difference(own[one], own[other]) if one in own and other in own else None
            for own in found
        ]

    return values


def _lost_per_doubling(records: Sequence[Sequence[dict[str, Any]]]) -> Values:
    """Return minus the slope of robust accuracy in the logarithm (base 2) of the forced growth."""
    values: list[float | None] = []
    for own in map(_named, records):
        doses = [1.0, *_DOSES[1:]]
        names = ["sphere", *(f"path ×{dose:g}" for dose in _DOSES[1:])]
        if not all(name in own for name in names):
            values.append(None)
            continue
        x = [math.log2(dose) for dose in doses]
        y = [difference(own[name], own["sphere"]) for name in names]
        middle = average(x)
        slope = sum((a - middle) * b for a, b in zip(x, y, strict=True))
        values.append(-slope / sum((a - middle) ** 2 for a in x))
    return values


def _control_values(
    value: Callable[[dict[str, Any], dict[str, Any]], float],
) -> Callable[[Sequence[Sequence[dict[str, Any]]]], Values]:
    """Return a value for every seed from the record of the controls and of the plain network."""

    def values(records: Sequence[Sequence[dict[str, Any]]]) -> Values:
        return [
            None if found.get("diverged") else value(found, attacked["networks"][0])
            for found, attacked in records
        ]

    return values


def _changed_by(name: str, sign: int = -1) -> Callable[[dict[str, Any], dict[str, Any]], float]:
    def value(found: dict[str, Any], plain: dict[str, Any]) -> float:
        return sign * difference({**plain, "stands": found["controls"][name]}, plain) + 0.0

    return value


def _deceived(found: dict[str, Any], _: dict[str, Any]) -> float:
    return average(found["cross_entropy_loud"]) - average(found["cross_entropy"])


def _missed(found: dict[str, Any], plain: dict[str, Any]) -> float:
    return average(found["cross_entropy"]) - average(plain["stands"])


def _controlled(plan: Plan, method: str, seed: int) -> list[Cell]:
    return [_control_cell(plan, method, seed), _attack_cell(plan, method, seed, _DECAY_GROUP)]


_ON_BOTH = "on the images that both get right"


def _compared(
    name: str,
    hypothesis: str,
    one: str,
    other: str,
    *groups: Mapping[str, Mapping[str, Any]],
    unit: str = "of robust accuracy",
) -> Statement:
    return Statement(
        name=name,
        hypothesis=hypothesis,
        quantity=f"robust accuracy {_ON_BOTH}, {one} minus {other}",
        margin=MATTERS,
        methods=lambda plan: plan.attacked,
        cells=_group_cells(*groups),
        values=_between(one, other),
        unit=unit,
    )


def _by_control(
    name: str,
    hypothesis: str,
    quantity: str,
    value: Callable[[dict[str, Any], dict[str, Any]], float],
    *,
    proved: bool = False,
    methods: Callable[[Plan], tuple[str, ...]] = lambda plan: plan.attacked,
) -> Statement:
    return Statement(
        name=name,
        hypothesis=hypothesis,
        quantity=quantity,
        margin=MATTERS,
        methods=methods,
        cells=_controlled,
        values=_control_values(value),
        basis="proved" if proved else "measured",
        unit="of accuracy",
        few=True,
    )


def _with_running_statistics(plan: Plan) -> tuple[str, ...]:
    return tuple(method for method in plan.attacked if method == "bn")


_STATEMENTS = (
    *AMPLIFICATION,
    _by_control(
        "norm-as-such",
        "Larger norms of normalized weights, and nothing else, lower robust accuracy.",
        f"robust accuracy of plain networks minus that with all hidden weights times {GAUGE:.0f} "
        "and running statistics to match, the same function",
        _changed_by("rescaled"),
        proved=True,
    ),
    _compared(
        "norm-forced",
        "Norms forced to grow 4 times, while the weights turn as before, lower robust accuracy.",
        "sphere",
        "norm ×4",
        _SPHERE_GROUP,
    ),
    Statement(
        name="effective-rate",
        hypothesis="The effective rate that falls as norms grow lowers robust accuracy.",
        quantity=f"robust accuracy lost {_ON_BOTH}, per doubling of the growth that the rate falls "
        "for; least squares over growth 1, 2, 4, 8",
        margin=_PER_DOUBLING,
        methods=lambda plan: plan.attacked,
        cells=_group_cells(_SPHERE_GROUP),
        values=_lost_per_doubling,
        unit="per doubling",
    ),
    _compared(
        "all-of-it",
        "Networks whose norms grew in plain training are less robust than those on the sphere.",
        "sphere",
        "plain",
        *_GROUPS,
    ),
    _compared("decay", "Weight decay makes networks more robust.", "decay", "plain", _DECAY_GROUP),
    _compared(
        "decay-hidden",
        "Weight decay of the normalized weights alone makes them more robust.",
        "decay, hidden",
        "plain",
        _DECAY_GROUP,
    ),
    _compared(
        "decay-head",
        "Weight decay of the head alone, which nothing normalizes, makes them more robust.",
        "decay, head",
        "plain",
        _DECAY_GROUP,
    ),
    _compared(
        "head-held",
        "A head that is kept from growing makes networks on the sphere more robust.",
        "head held",
        "sphere",
        _SPHERE_GROUP,
    ),
    _by_control(
        "deceived",
        "Large logits deceive an attack on the cross-entropy.",
        f"accuracy under ten steps of PGD on the cross-entropy with logits times {LOGITS:.0f}, "
        "minus that without; the decisions are the same",
        _deceived,
    ),
    _by_control(
        "missed",
        "Ten steps of PGD on the cross-entropy miss what Auto-PGD finds.",
        "accuracy under PGD minus robust accuracy",
        _missed,
    ),
    _by_control(
        "statistics",
        "BatchNorm's stale statistics lower robust accuracy.",
        "robust accuracy with statistics measured anew, minus that with running ones",
        _changed_by("fresh statistics", 1),
        methods=_with_running_statistics,
    ),
)


def _details(plan: Plan, results: Results) -> Details:
    found = {
        (method, seed): _named(
            [results[_attack_cell(plan, method, seed, group).key] for group in _GROUPS]
        )
        for method in plan.attacked
        for seed in plan.first_seeds
    }
    plain = [own["plain"] for own in found.values() if "plain" in own]
    lost = [
        f"{label(method)} {name}, seed {seed}"
        for (method, seed), own in found.items()
        for group in _GROUPS
        for name in group
        if name not in own
    ]
    return Details(
        findings=[
            "In plain training the norms of the hidden weights grow by a "
            f"factor of {average([one['norm_growth'] for one in plain]):.1f}, that of the head by "
            f"{average([one['head_growth'] for one in plain]):.1f}."
        ],
        conditions=[
            f"l-infinity Auto-PGD at eps {radii(plan.data)[MIDDLE]:.3g}, {plan.scale.attack_steps} "
            f"steps: tempered cross-entropy, then the targeted DLR loss for {_TARGETS} classes; "
            f"all test images, {plan.scale.images} at most; eval mode",
            f"cosine schedule, rate 0.1, momentum 0.9, {plan.scale.steps} steps; decay {DECAY:g} "
            "on weights, never on gains, shifts and biases",
            "forced growth: its fourth power is linear in time, as under SGD without decay",
            *([f"diverged in training and left out: {', '.join(lost)}"] if lost else []),
        ],
        figures=[
            _dose_figure(found, plan),
            _training_figure(found, plan),
            _eps_figure(plan, results),
            _control_figure(plan, results),
        ],
        tables=[_method_table(plan, found)],
    )


_Nets = Mapping[tuple[str, int], _Networks]


def _robust(found: _Nets, method: str, name: str) -> list[float]:
    return [
        average(own[name]["stands"]) for (m, _), own in found.items() if m == method and name in own
    ]


def _dose_figure(found: _Nets, plan: Plan) -> Figure:
    panels = []
    for method in plan.attacked:
        columns = [
            _robust(found, method, "sphere" if dose == 1 else f"path ×{dose:g}") for dose in _DOSES
        ]
        series = Series(
            "sphere, rate falling",
            _DOSES,
            [average(values) for values in columns],
            [min(values, default=math.nan) for values in columns],
            [max(values, default=math.nan) for values in columns],
            style="both",
            color="sphere",
        )
        panels.append(
            Panel(
                label(method),
                "growth that the rate falls for",
                "robust accuracy",
                [series],
                x_scale="log",
            )
        )
    return Figure(
        "robustness-dose",
        "Robust accuracy when the effective rate falls as if the norms had grown",
        "Norms are kept; the rate of the hidden weights falls with the square of the growth on the "
        "axis. Mean over the first seeds, bars from the lowest to the highest.",
        panels,
    )


def _training_figure(found: _Nets, plan: Plan) -> Figure:
    names = [name for group in _GROUPS for name in group]
    panels = []
    for method in plan.attacked:
        columns = [_robust(found, method, name) for name in names]
        series = Series(
            "robust accuracy",
            [float(i) for i in range(len(names))],
            [average(values) for values in columns],
            [min(values, default=math.nan) for values in columns],
            [max(values, default=math.nan) for values in columns],
            style="points",
            color="measured",
        )
        panels.append(Panel(label(method), "", "robust accuracy", [series], categories=names))
    return Figure(
        "robustness-trainings",
        "Robust accuracy of every training",
        "Path: on the sphere, the rate falling as if norms had grown so much; norm: on the sphere, "
        "norms forced to grow, the weights turning as before. Mean over the first seeds, bars from "
        "the lowest to the highest.",
        panels,
        columns=2,
    )


def _eps_figure(plan: Plan, results: Results) -> Figure:
    panels = []
    for method in plan.attacked:
        own = [results[_control_cell(plan, method, seed).key] for seed in plan.first_seeds]
        curves = [[average(o["right"]), *o["curve"]] for o in own if not o.get("diverged")]
        columns = list(zip(*curves, strict=True))
        panels.append(
            Panel(
                label(method),
                "eps (l-infinity)",
                "robust accuracy",
                [
                    Series(
                        "plain",
                        [0.0, *radii(plan.data)][: len(columns)],
                        [average(c) for c in columns],
                        [min(c) for c in columns],
                        [max(c) for c in columns],
                        style="both",
                    )
                ],
                y_limits=(0.0, 1.02),
            )
        )
    return Figure(
        "robustness-eps",
        "Accuracy of plain networks against the radius of the attack",
        "Ten steps of projected gradient descent (PGD) on the difference of logits ratio (DLR), an "
        "upper bound; eps 0 is clean accuracy. Mean over the first seeds, bars from lowest to "
        "highest.",
        panels,
    )


def _control_figure(plan: Plan, results: Results) -> Figure:
    rows = {
        method: [
            (found, plain["networks"][0])
            for seed in plan.first_seeds
            for found, plain in [[results[cell.key] for cell in _controlled(plan, method, seed)]]
            if not found.get("diverged")
        ]
        for method in plan.attacked
    }

    def of(value: Callable[[dict[str, Any], dict[str, Any]], float]) -> list[float]:
        return [average([value(*pair) for pair in pairs]) for pairs in rows.values()]

    def stands(name: str) -> Callable[[dict[str, Any], dict[str, Any]], float]:
        return lambda found, _: average(found["controls"][name])

    def panel(title: str, series: Mapping[str, list[float]]) -> Panel:
        places = [float(i) for i in range(len(rows))]
        return Panel(
            title,
            "",
            "accuracy under attack",
            [Series(name, places, values, style="points") for name, values in series.items()],
            categories=[label(method) for method in rows],
            y_limits=(0.0, 1.02),
        )

    before = of(lambda _, plain: average(plain["stands"]))
    return Figure(
        "robustness-controls",
        "Two controls that change no decision of the network",
        f"Left: all hidden weights times {GAUGE:.0f}, with running statistics. If norms caused "
        f"vulnerability, points would move. Right: logits times {LOGITS:.0f}. True robustness "
        "cannot change: an attack whose points move here is fooled by the scale of the logits. CE: "
        "ten steps of PGD on the cross-entropy.",
        [
            panel(
                f"weights ×{GAUGE:.0f}",
                {"Auto-PGD, before": before, "Auto-PGD, after": of(stands("rescaled"))},
            ),
            panel(
                f"logits ×{LOGITS:.0f}",
                {
                    "Auto-PGD, before": before,
                    "Auto-PGD, after": of(stands("loud")),
                    "CE, before": of(lambda found, _: average(found["cross_entropy"])),
                    "CE, after": of(lambda found, _: average(found["cross_entropy_loud"])),
                },
            ),
        ],
        columns=2,
    )


def _method_table(plan: Plan, found: _Nets) -> Table:
    rows = []
    for method in plan.attacked:
        for name in (name for group in _GROUPS for name in group):
            pairs = [
                (own[name], own.get("sphere"))
                for (m, _), own in found.items()
                if m == method and name in own
            ]
            if not pairs:
                continue
            compared = [difference(one, sphere) for one, sphere in pairs if sphere]
            rows.append(
                (
                    label(method),
                    name,
                    average([one["norm_growth"] for one, _ in pairs]),
                    average([one["head_growth"] for one, _ in pairs]),
                    average([one["clean_all"] for one, _ in pairs]),
                    average([average(one["stands"]) for one, _ in pairs]),
                    str(estimate(compared)) if compared and name != "sphere" else None,
                )
            )
    return Table(
        "Every training, means over the first seeds",
        (
            "method",
            "training",
            "norm growth",
            "head growth",
            "clean",
            "robust",
            "robust − sphere, matched [95 %]",
        ),
        rows,
        "Growth: final over initial length, of the hidden weights (geometric mean) and the head. "
        "Clean, robust: accuracy without and under attack. Matched: on the images that both get "
        "right.",
    )


def _advice(outcomes: Outcomes) -> str:
    said = []
    if outcomes["norm-as-such"] == Outcome.ABSENT:
        said.append("a grown norm by itself does not make your network vulnerable")
    if outcomes["effective-rate"] == Outcome.HOLDS:
        said.append("the effective rate that falls with it costs robustness")
    if outcomes["decay-head"] == Outcome.HOLDS:
        said.append("weight decay on the head gives some robustness")
    if outcomes["deceived"] == Outcome.HOLDS:
        said.append("never measure robustness with an attack on the cross-entropy alone")
    if not said:
        return (
            "Nothing here is decided yet: do not choose norms or decay for the sake of robustness."
        )
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}."


CLAIM = Claim(
    name="robustness",
    title="Norm growth makes networks vulnerable",
    statement="Training with normalization makes weight norms grow, which could cause adversarial "
    "vulnerability since it amplifies the attack (Sun et al. 2020).",
    prediction="Behind a normalization the effective weight does not depend on the norm, so "
    "neither rescaling nor forced growth along the same path can matter. What growth can do: slow "
    "the effective rate, so that training ends elsewhere. Beside it: the head and the gains, which "
    "no "
    "normalization follows, eps, stale statistics, and logits that mask.",
    statements=_STATEMENTS,
    advice=_advice,
    details=_details,
)
