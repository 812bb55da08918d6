r"""What the laws of dynamics expect of a watched weight, from the optimizer's own settings.

Between two samples the norm takes a step of :mod:`onsphere.dynamics.trajectory` towards the
equilibrium of the settings of the first, and a weight turns as its present norm says
(:func:`~onsphere.dynamics.relaxation.rotation_at`). Without weight decay both have a limit for
decay :math:`\to 0`, which is the law of free growth: so it is taken at a decay of
:math:`10^{-9}/\eta`. Which law an optimizer has is in :mod:`onsphere.dynamics.optimizers`.
The size of the gradients is averaged over the last few samples, since one batch is noise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.optim.optimizer import Optimizer

from onsphere.dynamics import Equilibrium, half_life
from onsphere.dynamics.optimizers import (
    CLASSES,
    ON_SPHERES,
    RELATIVE,
    ROTATION,
    SPHERE,
    VANISHING,
    OptimizerLaw,
    Vector,
    law_of_class,
)
from onsphere.dynamics.relaxation import rotation_at
from onsphere.dynamics.trajectory import Motion
from onsphere.monitor.layers import Layer
from onsphere.monitor.run import PREDICTIONS, QUANTITIES, Sample, Values
from onsphere.optim.sphere_optimizer import SphereOptimizer
from onsphere.optim.wrapper import OnSphere

_PIECES = 16  # of the way between two samples, where the rate depends on the norm
_NEWS = 0.3  # share of a new sample in the average size of the gradients

Settings = Mapping[str, Any]


def law_of(optimizer: Optimizer, group: Settings, layer: Layer) -> OptimizerLaw | None:
    """Return the law of one layer, by the optimizer's name and the settings of its group.

    Args:
        optimizer: that which is stepped.
        group: its param group.
        layer: what is watched.

    Returns:
        The law, or ``None`` for an optimizer or a setting that no law covers.

    Example:
        >>> import torch
        >>> from onsphere.geometry import Sphere
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> layer = Layer("w", (weight,), Sphere(), 0)
        >>> for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.Rprop):
        ...     optimizer = kind([weight], lr=0.1)
        ...     law = law_of(optimizer, optimizer.param_groups[0], layer)
        ...     print(law and law.name)
        sgd
        adamw
        None
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, OnSphere):
        if any(layer.params[0] is p for held in optimizer.constrained for p in held.params):
            if optimizer.mode == "brake":
                return None
            return ROTATION if optimizer.mode == "rotate" else SPHERE
        kind = type(optimizer.base).__name__
    elif isinstance(optimizer, SphereOptimizer):
        if group["sphere"] is not None:
            return ON_SPHERES[group["lr_mode"]]
        kind = kind.removeprefix("Sphere")
    return law_of_class(kind, group)


def eps_of(optimizer: Optimizer, group: Settings) -> float:
    """Return the size of a gradient's entries below which eps sets the steps: that of Adam's kind.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> for kind in (torch.optim.AdamW, torch.optim.Muon):
        ...     optimizer = kind([weight])
        ...     print(eps_of(optimizer, optimizer.param_groups[0]))
        1e-08
        0.0
    """
    return float(group.get("eps", 0.0)) if _kind(optimizer) in ("Adam", "AdamW") else 0.0


def degree_of(optimizer: Optimizer, law: OptimizerLaw | None) -> int:
    """Return the power of the norm in the effective rate; 2, as for SGD, where nothing is known."""
    known = law if law is RELATIVE else CLASSES.get(_kind(optimizer), law)
    return 2 if known is None else known.degree


def _kind(optimizer: Optimizer) -> str:
    base = optimizer.base if isinstance(optimizer, OnSphere) else optimizer
    return type(base).__name__.removeprefix("Sphere")


class Forecast:
    """The norms that the laws expect, carried on from sample to sample.

    Args:
        laws: of the layers.
        vectors: of the layers.
    """

    def __init__(self, laws: Sequence[OptimizerLaw | None], vectors: Sequence[Vector]) -> None:
        self._laws, self._vectors = list(laws), list(vectors)
        self._norms = [math.nan] * len(self._laws)
        self._units = [math.nan] * len(self._laws)
        self._ahead: list[Equilibrium | None] = [None] * len(self._laws)
        self._step = 0

    def at(self, sample: Sample, settings: Sequence[Settings], skipped: Sequence[bool]) -> Values:
        """Return the predictions for a sample, given those before it.

        Args:
            sample: what was measured; its predictions are not read.
            settings: of every layer's param group, at that step.
            skipped: per layer, whether it has no gradient, so that nothing moves it.

        Returns:
            Shape ``(layers, predictions)``, as in ``PREDICTIONS``.
        """
        rows = []
        for row, law in enumerate(self._laws):
            norm, unit = (
                float(sample.values[row, QUANTITIES.index(q), 0])
                for q in ("norm", "unit_gradient_square")
            )
            unit = self._averaged(row, unit)
            expected = self._carried(row, sample.step)
            self._norms[row] = norm if math.isnan(expected) else expected
            if law is not None and skipped[row]:
                self._ahead[row] = None
                rows.append([self._norms[row], 0.0, *[math.nan] * 3])
            elif law is None or not norm > 0:
                rows.append([math.nan] * len(PREDICTIONS))
            elif law.settle is None:
                turned = float(sample.lrs[row]) if law is ROTATION else math.nan
                held = self._norms[row]
                rows.append([held, turned, held, turned, math.nan])
            else:
                rows.append(self._expected(row, law, settings[row], norm, unit, sample))
        self._step = sample.step
        return np.array(rows).reshape(len(rows), len(PREDICTIONS))

    def _expected(
        self,
        row: int,
        law: OptimizerLaw,
        settings: Settings,
        norm: float,
        unit: float,
        sample: Sample,
    ) -> list[float]:
        lr, decay = float(sample.lrs[row]), float(settings.get("weight_decay", 0.0))
        vector = replace(self._vectors[row], unit_gradient_square=unit)
        self._ahead[row] = rest = equilibrium(law, lr, decay, settings, vector)
        if rest is None:
            return [self._norms[row], 0.0 if lr == 0 else math.nan, *[math.nan] * 3]
        turned = rotation_at(norm, rest)
        settled = (rest.norm, rest.rotation, half_life(rest)) if decay else [math.nan] * 3
        return [self._norms[row], turned, *settled]

    def _averaged(self, row: int, unit: float) -> float:
        """Return the average size of the gradients; one that is not finite is no news."""
        held = self._units[row]
        if math.isfinite(unit):
            self._units[row] = unit if math.isnan(held) else held + _NEWS * (unit - held)
        return self._units[row]

    def _carried(self, row: int, step: int) -> float:
        """Return the expected norm, from the last sample to this one."""
        norm, rest = self._norms[row], self._ahead[row]
        if rest is None:
            return norm
        law, steps = self._laws[row], step - self._step
        motion = Motion.of(rest, law.bend if law is not None and rest.norm > 0 else 0)
        pieces = min(steps, _PIECES) if motion.bend else 1
        power = norm**motion.power
        for _ in range(pieces):
            power, _ = motion.step(power, steps / pieces)
        return power ** (1 / motion.power)


def equilibrium(
    law: OptimizerLaw, lr: float, decay: float, settings: Settings, vector: Vector
) -> Equilibrium | None:
    """Return where a vector goes under a law; without decay, a rest that is very far away.

    Returns:
        The equilibrium, or ``None`` where nothing moves or the law does not hold.

    Example:
        >>> from onsphere.dynamics.optimizers import LAWS
        >>> vector = Vector(coordinates=100, count=1, shape=(100,), unit_gradient_square=1.0)
        >>> rest = equilibrium(LAWS["sgd"], 0.1, 5e-4, {"momentum": 0.9}, vector)
        >>> round(rest.rotation, 5), round(rest.norm, 3)
        (0.00725, 5.623)
    """
    if law.settle is None or not lr > 0:
        return None
    try:
        known = law.settings_in(settings)
        return law.equilibrium(lr, decay if decay > 0 else VANISHING / lr, vector, known)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
