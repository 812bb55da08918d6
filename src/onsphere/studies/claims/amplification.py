"""Statements of the claim `robustness`: does a layer amplify an attack more as its norm grows?

A raw layer is linear, so twice the norm in the same direction means twice the output: bookkeeping,
were it not that weights also turn. Behind the normalization the norm is gone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onsphere.robustness import pgd
from onsphere.studies.claims.plan import Plan, average, on_recorded
from onsphere.studies.claims.statement import Statement, Values
from onsphere.studies.engine.job import Cell, Config, Inputs, Outcome, Task
from onsphere.studies.setup.data import Images
from onsphere.studies.setup.network import Network
from onsphere.studies.setup.training import Training, restore_snapshots
from onsphere.studies.setup.training_group import member

_IMAGES = 200
_EPS = 0.05


def measure(config: Config, inputs: Inputs) -> Outcome:
    """Measure norms and amplifications of every layer at every snapshot of a run."""
    own = member(inputs, config["member"])
    if own.records[0]["diverged"]:
        return Outcome({"diverged": True})
    x, y = inputs.images.test_x[:_IMAGES], inputs.images.test_y[:_IMAGES]
    found = []
    for model in restore_snapshots(Training(**config["training"]), own):
        adversarial = pgd(
            model.requires_grad_(False), x, y, eps=_EPS, loss=attack_loss(inputs.images), steps=5
        )
        found.append(_layers(model, x, adversarial))
    numbers = [value for layers in found for values in layers.values() for value in values]
    if not all(map(math.isfinite, numbers)):
        return Outcome({"diverged": True})  # nothing comes to a layer whose units are all dead
    return Outcome({"diverged": False, "snapshots": found})


def attack_loss(images: Images) -> str:
    """Return a loss that is blind to the scale of the logits, where there is one: not for two."""
    return "dlr" if images.classes > 2 else "cross_entropy"


@torch.no_grad()
def _layers(model: Network, x: Tensor, adversarial: Tensor) -> dict[str, list[float]]:
    """Norm, raw amplification, and amplification relative to size behind the normalization."""
    clean, moved = _met(model, x), _met(model, adversarial)
    weights = [parameter for parameter, _ in model.hidden_weights().values()]
    result: dict[str, list[float]] = {"norm": [], "raw": [], "behind": []}
    for weight, conv, one, other in zip(weights, model.convs, clean, moved, strict=True):
        assert isinstance(conv, nn.Conv2d)
        change = other.before - one.before
        raw = F.conv2d(change, weight, None, conv.stride, conv.padding)
        result["norm"].append(float(weight.norm()))
        result["raw"].append(float(raw.norm() / change.norm()))
        relative = (other.behind - one.behind).norm() / one.behind.norm()
        result["behind"].append(float(relative / (change.norm() / one.before.norm())))
    return result


@dataclass
class _Met:
    """What came to a convolution, and what left the normalization behind it."""

    before: Tensor
    behind: Tensor


def _met(model: Network, x: Tensor) -> list[_Met]:
    before: list[Tensor] = []
    behind: list[Tensor] = []
    hooks = [
        *(
            conv.register_forward_pre_hook(lambda _, args: before.append(args[0]))
            for conv in model.convs
        ),
        *(
            norm.register_forward_hook(lambda _m, _a, out: behind.append(out))
            for norm in model.norms
        ),
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return [_Met(*pair) for pair in zip(before, behind, strict=True)]


AMPLIFICATION = Task("robustness.amplification", 1, measure)


def _cells(plan: Plan, method: str, seed: int) -> list[Cell]:
    return [on_recorded(plan, AMPLIFICATION, method, seed, cost=0.3)]


def _logs(found: dict[str, Any], what: str) -> list[float]:
    """Return the mean logarithm over layers at every snapshot."""
    return [
        average([math.log(max(value, 1e-30)) for value in snapshot[what]])
        for snapshot in found["snapshots"]
    ]


def _over_seeds(
    value: Callable[[dict[str, Any]], float],
) -> Callable[[Sequence[Sequence[dict[str, Any]]]], Values]:
    return lambda records: [None if own["diverged"] else value(own) for (own,) in records]


def _excess_exponent(found: dict[str, Any]) -> float:
    """Return the exponent of the raw amplification in the norm, minus 1, from first to last."""
    norm, raw = _logs(found, "norm"), _logs(found, "raw")
    return (raw[-1] - raw[0]) / (norm[-1] - norm[0]) - 1 if norm[-1] != norm[0] else -1.0


def _growth_behind(found: dict[str, Any]) -> float:
    behind = _logs(found, "behind")
    return behind[-1] - behind[0]


STATEMENTS = (
    Statement(
        name="raw-layers",
        hypothesis="Taken without its normalization, a layer amplifies an attack in proportion to "
        "its norm.",
        quantity="exponent of a layer's amplification of the attack in its norm as both grow in "
        "training, minus 1, mean over layers",
        margin=0.3,
        methods=lambda plan: plan.own_spheres,
        cells=_cells,
        values=_over_seeds(_excess_exponent),
        kind="agreement",
        unit="from exponent 1",
        few=True,
    ),
    Statement(
        name="behind-normalization",
        hypothesis="Behind the normalization the amplification grows as well.",
        quantity="amplification of the attack relative to the activations' size, at the end over "
        "that at a tenth of the run, mean over layers",
        margin=math.log(1.1),
        methods=lambda plan: plan.own_spheres,
        cells=_cells,
        values=_over_seeds(_growth_behind),
        axis="ratio",
        few=True,
    ),
)
"""What the layers do; they stand first in the claim."""
