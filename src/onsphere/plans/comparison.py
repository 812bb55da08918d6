"""A run that was watched, beside what its hyperparameters let expect."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onsphere.dynamics import Equilibrium
from onsphere.dynamics.run import Run
from onsphere.errors import OnsphereError
from onsphere.plans.motion import follow
from onsphere.plans.plan import Plan, plan
from onsphere.plans.schedule import PlanError, Schedule

Values = NDArray[np.float64]

_OPTIONS = {
    "sgd": ("momentum", "nesterov"),
    "adam": ("betas",),
    "adamw": ("betas",),
    "lion": ("betas",),
    "muon": ("momentum", "nesterov"),
}
"""Settings of a param group that a plan takes, by law."""


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """Norm and rotation of one layer, as measured and as expected from its start.

    Args:
        name: of the weight.
        law: what it was compared with; empty for none.
        why: why with none; empty where there is a law.
        steps: the samples'.
        norm: measured, mean over the vectors.
        rotation: measured, in radians per step.
        expected_norm: by the law, from the first measured norm, under the measured rates (and for
            SGD the measured gradients); NaN for none.
        expected_rotation: likewise.
        settled: the equilibrium at the highest rate; ``None`` without decay or law.
    """

    name: str
    law: str
    why: str
    steps: NDArray[np.int64]
    norm: Values
    rotation: Values
    expected_norm: Values
    expected_rotation: Values
    settled: Equilibrium | None

    @property
    def late(self) -> tuple[float, float, float, float]:
        """Measured and expected norm, measured and expected rotation, over the last half.

        Means over samples in which both are finite and the rate is not zero.
        """
        half = slice(len(self.steps) // 2, None)
        pairs = (
            (self.norm[half], self.expected_norm[half]),
            (self.rotation[half], self.expected_rotation[half]),
        )
        means: list[float] = []
        for measured, expected in pairs:
            known = np.isfinite(measured) & (np.isfinite(expected) | (self.law == ""))
            means += [_mean(measured[known]), _mean(expected[known])]
        return means[0], means[1], means[2], means[3]

    @property
    def off(self) -> tuple[float, float]:
        """Measured over expected, minus one, of norm and rotation over the last half; or NaN."""
        norm, expected_norm, rotation, expected_rotation = self.late
        return _off(norm, expected_norm), _off(rotation, expected_rotation)


def compare(run: Run) -> list[LayerComparison]:
    """Compare every layer of a watched run with what its hyperparameters let expect.

    Args:
        run: as a monitor wrote it.

    Returns:
        One comparison per layer, in the order of the run.

    Raises:
        PlanError: there is nothing to compare: fewer than two samples.

    Example:
        >>> import numpy as np
        >>> from onsphere.dynamics.run import Run
        >>> compare(Run({"name": "SGD"}, {"a": {}}))
        Traceback (most recent call last):
        onsphere.plans.schedule.PlanError: the run has 0 samples; a comparison needs two or more
    """
    if len(run.samples) < 2:
        raise PlanError(f"the run has {len(run.samples)} samples; a comparison needs two or more")
    return [_compared(run, name) for name in run.layers]


def _compared(run: Run, name: str) -> LayerComparison:
    """Compare one layer; what no law fits stays without an expectation, and says why."""
    steps, norm, rotation = run.steps, run.series(name, "norm"), run.series(name, "rotation")
    try:
        law, settled, expected_norm, expected_rotation = _expected(run, name)
    except OnsphereError as error:
        none = np.full(len(steps), math.nan)
        return LayerComparison(name, "", str(error), steps, norm, rotation, none, none, None)
    return LayerComparison(
        name, law, "", steps, norm, rotation, expected_norm, expected_rotation, settled
    )


def _expected(run: Run, name: str) -> tuple[str, Equilibrium | None, Values, Values]:
    """Follow the law from the first sample that has a norm."""
    layer, lrs = run.layers[name], run.lr(name)
    law = layer.get("law")
    if law not in _OPTIONS:
        raise PlanError(f"no law is known for {run.optimizer.get('name', 'its optimizer')}")
    norm, level = run.series(name, "norm"), run.series(name, "unit_gradient_square")
    known = np.isfinite(norm) & (norm > 0) & np.isfinite(lrs)
    if known.sum() < 2 or not lrs[known].max() > 0:
        raise PlanError("fewer than two samples have a norm and a rate above 0")
    steps, lr = run.steps[known], float(lrs[known].max())
    times = steps - steps[0]
    mean, levels = _levels(times, level[known]) if law in ("sgd", "adam") else (None, None)
    planned = _plan(law, layer, _group(run, layer), lr, mean)
    rates, start = _Sampled(times, lrs[known] / lr), float(norm[known][0])
    if law == "sgd" and levels is not None:
        path = follow(planned.motion, rates, start, levels.factors)
    else:
        path = follow(planned.motion, rates, start)
    places = run.steps - steps[0]
    inside = (places >= 0) & (places < rates.steps)
    norms, rotations = (
        np.where(inside, np.interp(places, path.steps.numpy(), values.numpy()), math.nan)
        for values in (path.norm, path.rotation)
    )
    return law, planned.settled, norms, rotations


def _plan(
    law: str, layer: Mapping[str, Any], group: Mapping[str, Any], lr: float, level: float | None
) -> Plan:
    """Plan the layer's own hyperparameters."""
    options = {name: group[name] for name in _OPTIONS[law] if group.get(name) is not None}
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    decay = float(group.get("weight_decay") or 0.0)
    if law == "adam" and not decay:
        level = None
    shape = tuple(layer["shape"]) if law == "muon" else (int(layer["coordinates"]),)
    return plan(
        law, Schedule(1), lr=lr, weight_decay=decay, shape=shape, unit_gradient_square=level,
        **options,
    )  # fmt: skip


def _group(run: Run, layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the layer's param group, and the optimizer's where there is none."""
    groups = run.optimizer.get("groups") or [{}]
    return {**run.optimizer, **groups[layer.get("group", 0)]}


@dataclass(frozen=True, eq=False)
class _Sampled:
    """What was sampled, with straight lines between, and time from the first sample on."""

    times: NDArray[np.int64]
    values: Values

    @property
    def steps(self) -> int:
        return int(self.times[-1]) + 1

    @property
    def corners(self) -> tuple[int, ...]:
        return (0,)

    def factors(self, times: Tensor) -> Tensor:
        return torch.from_numpy(np.interp(times.numpy(), self.times, self.values))


def _levels(times: NDArray[np.int64], seen: Values) -> tuple[float, _Sampled]:
    """Return the mean squared gradient at the unit-norm point, and it over the run in that unit."""
    known = np.isfinite(seen) & (seen > 0)
    if not known.any():
        raise PlanError("no sample has a gradient")
    mean = _mean(seen[known])
    return mean, _Sampled(times[known], seen[known] / mean)


def _mean(values: Values) -> float:
    return float(values.mean()) if len(values) else math.nan


def _off(measured: float, expected: float) -> float:
    return measured / expected - 1 if expected and math.isfinite(expected) else math.nan
