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
from onsphere.dynamics.optimizers import (
    LAWS,
    MUON,
    ROTATION,
    SGDW,
    SPHERE,
    OptimizerLaw,
    muon_scale,
)
from onsphere.dynamics.schedule import PlanError, Schedule
from onsphere.dynamics.trajectory import Motion, follow
from onsphere.errors import OnsphereError
from onsphere.monitor.run import Run, RunError
from onsphere.planning.plan import plan

Values = NDArray[np.float64]


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
        flags: kinds of what the monitor flagged in it.
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
    flags: tuple[str, ...] = ()

    @property
    def late(self) -> tuple[float, float, float, float]:
        """Measured and expected norm, measured and expected rotation, over the last half.

        Means over samples in which both are finite; of the measured alone, if nothing is expected.
        """
        half = slice(len(self.steps) // 2, None)
        pairs = (
            (self.norm[half], self.expected_norm[half]),
            (self.rotation[half], self.expected_rotation[half]),
        )
        means: list[float] = []
        for measured, expected in pairs:
            known, beside = np.isfinite(measured), np.isfinite(expected)
            known &= beside | ~beside.any()
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
        RunError: the header lacks what a law needs to know of a layer.

    Example:
        >>> import numpy as np
        >>> from onsphere.monitor.run import Run
        >>> compare(Run({"name": "SGD"}, {"a": {}}))
        Traceback (most recent call last):
        onsphere.dynamics.schedule.PlanError: the run has 0 samples; a comparison needs two or more
    """
    if len(run.samples) < 2:
        raise PlanError(f"the run has {len(run.samples)} samples; a comparison needs two or more")
    for name, layer in run.layers.items():
        _check(name, layer, len(run.optimizer.get("groups") or [{}]))
    return [_compared(run, name) for name in run.layers]


def _check(name: str, layer: Mapping[str, Any], groups: int) -> None:
    if layer.get("law") not in LAWS:
        return
    for key in ("shape", "vectors", "coordinates"):
        if not layer.get(key):
            raise RunError(f"the run's header says no {key} of layer {name!r}")
    if not 0 <= layer.get("group", 0) < groups:
        raise RunError(f"the run's header has no settings of the group of layer {name!r}")


def _compared(run: Run, name: str) -> LayerComparison:
    """Compare one layer; what no law fits stays without an expectation, and says why."""
    steps, norm, rotation = run.steps, run.series(name, "norm"), run.series(name, "rotation")
    none = np.full(len(steps), math.nan)
    law, why, settled, expected_norm, expected_rotation = "", "", None, none, none
    try:
        law, settled, expected_norm, expected_rotation = _expected(run, name)
    except OnsphereError as error:
        why = str(error)
    flags = tuple(dict.fromkeys(flag.kind for flag in run.flags if flag.layer == name))
    return LayerComparison(
        name, law, why, steps, norm, rotation, expected_norm, expected_rotation, settled, flags
    )


def _expected(run: Run, name: str) -> tuple[str, Equilibrium | None, Values, Values]:
    """Follow the law from the first sample that has a norm."""
    layer, lrs = run.layers[name], run.lr(name)
    law = layer.get("law")
    norm, level = run.series(name, "norm"), run.series(name, "unit_gradient_square")
    known = np.isfinite(norm) & (norm > 0) & np.isfinite(lrs)
    if known.sum() < 2 or not lrs[known].max() > 0:
        raise PlanError("fewer than two samples have a norm and a rate above 0")
    if law in (SPHERE.name, ROTATION.name):
        held = np.where(known, norm[known][0], math.nan)
        return law, None, held, np.where(known & (law == ROTATION.name), lrs, math.nan)
    if law not in LAWS:
        raise PlanError(f"no law is known for {run.optimizer.get('name', 'its optimizer')}")
    steps, lr = run.steps[known], float(lrs[known].max())
    times, needs_level = steps - steps[0], LAWS[law].depends.norm != 0
    mean, levels = _levels(times, level[known]) if needs_level else (None, None)
    motion, settled = _motion(LAWS[law], layer, _group(run, layer), lr, mean)
    rates, start = _Sampled(times, lrs[known] / lr), float(norm[known][0])
    moving = levels is not None and motion.bend == 0
    path = follow(motion, rates, start, levels.factors if levels and moving else None)
    places = run.steps - steps[0]
    inside = (places >= 0) & (places < rates.steps)
    norms, rotations = (
        np.where(inside, np.interp(places, path.steps.numpy(), values.numpy()), math.nan)
        for values in (path.norm, path.rotation)
    )
    return law, settled, norms, rotations


def _motion(
    law: OptimizerLaw,
    layer: Mapping[str, Any],
    group: Mapping[str, Any],
    lr: float,
    level: float | None,
) -> tuple[Motion, Equilibrium | None]:
    """Return the motion of one vector of a layer by its own hyperparameters, and where it rests."""
    if group.get("dampening") and (law is SGDW or group.get("momentum")):
        raise PlanError("a plan knows no dampening")
    options = law.settings_in(group)
    options.pop("dampening", None)
    adjusted = options.pop("adjust_lr_fn", None)
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    shape: tuple[int, ...] = (int(layer["coordinates"]),)
    if law is MUON:
        rows, *columns = layer["shape"]
        shape = (rows, math.prod(columns))
    planned = plan(
        law.method, Schedule(1), lr=lr, weight_decay=float(group.get("weight_decay") or 0.0),
        shape=shape, unit_gradient_square=level, **options,
    )  # fmt: skip
    motion, settled = planned.motion, planned.settled
    if law is MUON:  # a plan is of the whole matrix, under the factor that is Muon's default
        unit = muon_scale(shape, adjusted) / muon_scale(shape) / math.sqrt(int(layer["vectors"]))
        motion = motion.scaled(unit)
        settled = settled and settled._replace(norm=settled.norm * unit)
    return motion, settled


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
