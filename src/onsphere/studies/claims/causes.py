"""Claim `causes`: if networks whose norms grew fall to attacks, is it because of the norms?

The claim of the paper has many possible causes, which are told apart by networks that differ in one
of them. Norms are kept (the sphere), or forced to grow while the weights turn as before (only the
norm), or kept while the effective rate falls as if they grew (only the path), or both; the head is
kept at its length too (what is not invariant). On a trained network the hidden weights are
rescaled with the running statistics (the norm as such), eps is made small, running statistics are
measured anew, and logits are scaled (masking).

Robust accuracy is the share of images that withstand Auto-PGD on the tempered cross-entropy and on
the targeted DLR loss, which no scale of the logits changes. Networks are compared on the images
that both classify rightly without an attack, so that clean accuracy is matched.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from onsphere.norms import ActivationNorm
from onsphere.report.document import Figure, Panel, Reference, Series, Table, Verdict
from onsphere.robustness import apgd, apgd_targeted, correct_mask, pgd, robust_mask
from onsphere.studies.claims.base import Claim, Judgement, Plan, Results, average, label
from onsphere.studies.claims.robustness import (
    EPS,
    GAUGE,
    LOGITS,
    MATTERS,
    MIDDLE,
    SAME,
    Scaled,
    growth_of,
)
from onsphere.studies.engine.job import Cell, Config, Inputs, Outcome, Task
from onsphere.studies.setup.network import Network
from onsphere.studies.setup.statistics import Estimate, estimate
from onsphere.studies.setup.training import DECAY, Training, batches, network_for, restore

_FORCED = 4.0  # how far norms are forced to grow
_TINY = 1e-12  # what replaces eps
_TARGETS = 3

PLAIN = "plain − sphere"
RESCALED = f"weights of plain ×{GAUGE:.0f}, function kept"
FORCED = f"only the norm forced {_FORCED:.0f}× − sphere"
"""Names of the effects that the verdict rests on."""

_TRAINED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "plain": {},
        "decay": {"weight_decay": DECAY},
        "sphere": {"space": "sphere"},
        "only the norm": {"space": "sphere", "norm_growth": _FORCED},
        "only the path": {"space": "sphere", "rate_growth": _FORCED},
        "norm and path": {"space": "sphere", "norm_growth": _FORCED, "rate_growth": _FORCED},
        "head held": {"space": "sphere", "head": "sphere"},
    }
)
"""Trainings by name, as changes of the study's common one."""

_UNNORMALIZED = ("plain", "decay")


def measure(config: Config, inputs: Inputs) -> Outcome:
    """Attack a trained network, and, with ``controls``, changed copies of it.

    A network that diverged in training leaves a record that says so.
    """
    settings = Training(**config["training"])
    if inputs.records[0]["diverged"]:
        return Outcome({"diverged": True})
    model = restore(settings, inputs)
    images = inputs.images
    x, y = images.test_x[: config["images"]], images.test_y[: config["images"]]
    eps, steps = EPS[images.name][MIDDLE], config["steps"]

    def stands(net: nn.Module) -> list[int]:
        generator = torch.Generator().manual_seed(0)
        climb = partial(apgd, eps=eps, steps=steps, generator=generator)
        aim = partial(apgd_targeted, eps=eps, steps=steps, targets=_TARGETS, generator=generator)
        return robust_mask(net, x, y, [climb, aim]).int().tolist()

    def under_cross_entropy(net: nn.Module) -> float:
        adversarial = pgd(net, x, y, eps=eps, steps=steps)
        return float(correct_mask(net, adversarial, y).float().mean())

    found = {
        "clean_all": inputs.records[0]["test_accuracy"],
        "right": correct_mask(model, x, y).int().tolist(),
        "stands": stands(model),
        "cross_entropy": under_cross_entropy(model),
        "norm_growth": growth_of(model, settings, inputs),
        "head_growth": _head_growth(model, settings, inputs),
    }
    if config["controls"]:
        found["controls"] = {
            name: stands(change(model, settings, inputs))
            for name, (change, applies) in CONTROLS.items()
            if applies(model)
        }
        found["cross_entropy_loud"] = under_cross_entropy(_loud(model))
    return Outcome(found)


Change = Callable[[Network, Training, Inputs], nn.Module]


def _rescaled(model: Network, *_: Any) -> nn.Module:
    return copy.deepcopy(model).rescale_hidden_(GAUGE)


def _without_eps(_: Network, settings: Training, inputs: Inputs) -> nn.Module:
    return restore(settings, inputs, eps=_TINY)


def _refreshed(model: Network, settings: Training, inputs: Inputs) -> nn.Module:
    """Return a copy with running statistics of its final weights, over at most 50 batches."""
    fresh = copy.deepcopy(model)
    norms = [norm for norm in fresh.norms if isinstance(norm, ActivationNorm)]
    for norm in norms:
        for buffer in (norm.running_mean, norm.running_var, norm.num_batches_tracked):
            assert buffer is not None
            buffer.zero_()
        norm.momentum = None
    train_x = inputs.images.train_x
    fresh.train()
    with torch.no_grad():
        for index in batches(min(len(train_x), 50 * settings.batch), settings):
            fresh(train_x[index])
            if int(norms[0].num_batches_tracked) == 50:  # type: ignore[arg-type]
                break
    return fresh.eval()


def _loud(model: Network, *_: Any) -> nn.Module:
    return Scaled(model, LOGITS)


def _is_normalized(model: Network) -> bool:
    return model.method is not None


def _has_running_statistics(model: Network) -> bool:
    return any(isinstance(n, ActivationNorm) and n.track_running_stats for n in model.norms)


CONTROLS: Mapping[str, tuple[Change, Callable[[Network], bool]]] = MappingProxyType(
    {
        "rescaled": (_rescaled, _is_normalized),
        "without eps": (_without_eps, lambda model: model.has_eps),
        "fresh statistics": (_refreshed, _has_running_statistics),
        "loud": (_loud, lambda _: True),
    }
)
"""Changes of a trained network, and the networks that they apply to."""


def _head_growth(model: Network, settings: Training, inputs: Inputs) -> float:
    start = network_for(settings, inputs.images)
    ends = [net.head.weight.detach().norm() for net in (model, start)]
    return float(ends[0] / ends[1])


MEASURE = Task("causes.measure", 2, measure)


def variants(method: str) -> tuple[str, ...]:
    """Return the trainings that make sense for a method."""
    return tuple(_TRAINED) if method != "none" else _UNNORMALIZED


def _cells(plan: Plan) -> dict[tuple[str, str, int], Cell]:
    (images, steps), cells = plan.scale.auto, {}
    for method in plan.methods:
        for variant in variants(method):
            for seed in plan.seeds:
                training = plan.trained(method, seed, **_TRAINED[variant]).cell()
                config: Config = {
                    "training": training.config,
                    "images": images,
                    "steps": steps,
                    "controls": variant == "plain",
                }
                work = images * steps * (5 if config["controls"] else 1)
                cells[method, variant, seed] = Cell(
                    MEASURE, config, (training,), cost=0.05 + work * 4e-4
                )
    return cells


_Found = Mapping[tuple[str, str, int], dict[str, Any]]
"""Records of networks that did not diverge, by method, training and seed."""


def _over_seeds(
    plan: Plan, methods: Sequence[str], effect: Callable[[str, int], float | None]
) -> Estimate:
    """Estimate an effect over seeds, after a mean over the methods that have it."""
    by_seed = [[e for m in methods if (e := effect(m, s)) is not None] for s in plan.seeds]
    return estimate([average(effects) for effects in by_seed if effects])


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Robust accuracy of one minus the other's, on the images that both get right."""
    rows = [a and b for a, b in zip(one["right"], other["right"], strict=True)]
    both = max(1, sum(rows))
    gained = sum(a - b for a, b, r in zip(one["stands"], other["stands"], rows, strict=True) if r)
    return gained / both


def _between(found: _Found, plan: Plan, one: str, other: str) -> Estimate:
    """Estimate the effect of a training against another on normalized networks."""

    def effect(method: str, seed: int) -> float | None:
        pair = [found.get((method, name, seed)) for name in (one, other)]
        return None if None in pair else _difference(*pair)  # type: ignore[arg-type]

    return _over_seeds(plan, plan.normalized, effect)


def _controlled(found: _Found, plan: Plan, control: str) -> Estimate:
    """Estimate the effect of a control on plain networks that it applies to."""

    def effect(method: str, seed: int) -> float | None:
        record = found.get((method, "plain", seed))
        if record is None or control not in record["controls"]:
            return None
        return _difference({**record, "stands": record["controls"][control]}, record)

    return _over_seeds(plan, plan.methods, effect)


def _masking(found: _Found, plan: Plan, key: str) -> Estimate:
    """Estimate how much accuracy under PGD on the cross-entropy exceeds robust accuracy."""

    def effect(method: str, seed: int) -> float | None:
        record = found.get((method, "plain", seed))
        return None if record is None else record[key] - average(record["stands"])

    return _over_seeds(plan, plan.methods, effect)


def _effects(found: _Found, plan: Plan) -> dict[str, tuple[str, Estimate]]:
    """Return every effect by name: the cause that it speaks of, and its size."""
    whole, norm, path = "all of it", "the norm as such", "the effective rate"
    eps, masking = "eps and statistics", "masking"
    between, control = partial(_between, found, plan), partial(_controlled, found, plan)
    masked, times = partial(_masking, found, plan), f"{_FORCED:.0f}×"
    return {
        PLAIN: (whole, between("plain", "sphere")),
        "decay − plain": (whole, between("decay", "plain")),
        f"norm and path forced {times} − sphere": (whole, between("norm and path", "sphere")),
        RESCALED: (norm, control("rescaled")),
        FORCED: (norm, between("only the norm", "sphere")),
        f"only the path, as forced {times} − sphere": (path, between("only the path", "sphere")),
        "head held − sphere": ("what is not invariant", between("head held", "sphere")),
        "plain without eps": (eps, control("without eps")),
        "BN, statistics measured anew": (eps, control("fresh statistics")),
        f"logits of plain ×{LOGITS:.0f}": (masking, control("loud")),
        "PGD on cross-entropy − robust": (masking, masked("cross_entropy")),
        f"the same, logits ×{LOGITS:.0f}": (masking, masked("cross_entropy_loud")),
    }


def _judge(plan: Plan, results: Results) -> Judgement:
    cells = _cells(plan)
    found = {k: r for k, cell in cells.items() if not (r := results[cell.key]).get("diverged")}
    effects = _effects(found, plan)
    names = list(effects)
    whole, norms = effects[names[0]][1], [effects[names[3]][1], effects[names[4]][1]]
    plain = [r for (m, variant, _), r in found.items() if variant == "plain" and m != "none"]
    grew = average([record["norm_growth"] for record in plain])
    lost = [
        f"{label(m)} {variant}, seed {s}" for m, variant, s in cells if (m, variant, s) not in found
    ]
    return Judgement(
        _verdict(whole, norms),
        f"robust accuracy on matched images at eps {EPS[plan.data][MIDDLE]:.3g}, plain minus "
        f"sphere: {whole}; the norm as such: {norms[0]} (rescaled), {norms[1]} (forced)",
        findings=[
            f"{cause[0].upper()}{cause[1:]}: {name} {value}{_size(value)}."
            for name, (cause, value) in effects.items()
        ],
        conditions=[
            f"l-infinity Auto-PGD, {plan.scale.auto[1]} steps: tempered cross-entropy, then "
            f"the targeted DLR loss for {_TARGETS} classes; {plan.scale.auto[0]} test images; "
            "eval mode. Between two networks only images that both get right are compared",
            f"plain networks grew the norms of their hidden weights {grew:.1f}×; forced growth is "
            f"{_FORCED:.0f}×, its fourth power linear in time; weight decay {DECAY:g}",
            "cosine schedule, rate 0.1, momentum 0.9; intervals are over seeds, after a mean over "
            "the normalized methods",
            *([f"diverged in training and left out: {', '.join(lost)}"] if lost else []),
        ],
        figures=[_figure(effects)],
        tables=[_effect_table(effects), _method_table(plan, found)],
    )


def _verdict(whole: Estimate, norms: list[Estimate]) -> Verdict:
    if whole.count == 1:
        return Verdict.OPEN
    if whole.high < 0 and whole.mean < -MATTERS:
        by_norm = any(one.high < 0 and one.mean < -SAME for one in norms)
        return Verdict.HOLDS if by_norm else Verdict.CONDITIONAL
    return Verdict.FAILS if whole.low > -MATTERS else Verdict.OPEN


def _size(value: Estimate) -> str:
    """Say in words what an interval leaves possible."""
    if value.count == 1:
        return ""
    if value.low > -MATTERS and value.high < MATTERS:
        return f", nothing that matters (within {MATTERS:.0%} points)"
    return "" if value.low > 0 or value.high < 0 else ", of either sign"


def _figure(effects: Mapping[str, tuple[str, Estimate]]) -> Figure:
    names = list(effects)
    causes = list(dict.fromkeys(cause for cause, _ in effects.values()))
    series = []
    for cause in causes:
        rows = [i for i, name in enumerate(names) if effects[name][0] == cause]
        values = [effects[names[i]][1] for i in rows]
        bounded = [v if v.count > 1 else Estimate(v.mean, v.mean, v.mean, 1) for v in values]
        series.append(
            Series(
                cause,
                [float(i) for i in rows],
                [v.mean for v in bounded],
                [v.low for v in bounded],
                [v.high for v in bounded],
                style="points",
            )
        )
    panel = Panel(
        "",
        "effect",
        "change of robust accuracy",
        series,
        references=[Reference("horizontal", 0.0)],
        categories=[str(i + 1) for i in range(len(names))],
    )
    key = "; ".join(f"{i + 1}: {name}" for i, name in enumerate(names))
    return Figure(
        "causes-effects",
        "What changes robust accuracy, and by how much",
        f"Points with 95 % intervals over seeds. {key}. The last two are what an attack on the "
        "cross-entropy misses: no robustness.",
        [panel],
        columns=1,
    )


def _effect_table(effects: Mapping[str, tuple[str, Estimate]]) -> Table:
    return Table(
        "Effects on robust accuracy",
        ("", "cause", "effect", "mean", "95 % low", "95 % high"),
        [
            (i + 1, cause, name, v.mean, *((v.low, v.high) if v.count > 1 else (None, None)))
            for i, (name, (cause, v)) in enumerate(effects.items())
        ],
        "In shares of the images that both networks get right; means over methods, then seeds.",
    )


def _method_table(plan: Plan, found: _Found) -> Table:
    rows = []
    for method in plan.methods:
        for variant in variants(method):
            own = [r for s in plan.seeds if (r := found.get((method, variant, s)))]
            if not own:
                continue
            compared = [
                _difference(found[method, variant, s], found[method, "sphere", s])
                for s in plan.seeds
                if (method, variant, s) in found and (method, "sphere", s) in found
            ]
            rows.append(
                (
                    label(method),
                    variant,
                    average([one["norm_growth"] for one in own]),
                    average([one["head_growth"] for one in own]),
                    average([one["clean_all"] for one in own]),
                    average([average(one["stands"]) for one in own]),
                    average([one["cross_entropy"] for one in own]),
                    str(estimate(compared)) if compared and variant != "sphere" else None,
                )
            )
    columns = ("method", "training", "norm growth", "head growth", "clean", "robust", "PGD-CE")
    return Table(
        "Every training, means over seeds",
        (*columns, "robust − sphere, matched [95 %]"),
        rows,
        "Growth: final over initial length, of the hidden weights (geometric mean) and the head. "
        "Robust: the worst case over the attacks; PGD-CE is fooled by large logits.",
    )


CLAIM = Claim(
    name="causes",
    title="It is the norms that make networks vulnerable",
    statement="Training with normalization makes weight norms grow, which could cause adversarial "
    "vulnerability since it amplifies the attack (Sun et al. 2020): which part of that, if any?",
    prediction="Behind a normalization the effective weight does not depend on the norm, so "
    "neither rescaling nor forced growth along the same path can matter. What growth can do: slow "
    "the effective rate, so that training ends elsewhere. Beside it: the head and the gains, eps, "
    "stale statistics, and logits that mask.",
    threshold=f"Holds if plain networks are less robust than those on the sphere, on matched "
    f"images, by more than {MATTERS:.0%} points (95 % interval below 0) and so is the norm as such "
    f"by more than {SAME} (rescaled or forced); under conditions if only the first is so; does not "
    f"hold if the interval lies above −{MATTERS:.0%} points; undecided otherwise. One seed decides "
    "nothing.",
    cells=lambda plan: list(_cells(plan).values()),
    judge=_judge,
    on_request=True,
)
