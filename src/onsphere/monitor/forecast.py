r"""What the laws of dynamics expect of a watched weight, from the optimizer's own settings.

Between two samples the power :math:`p` of the norm relaxes to its equilibrium as

.. math:: |w_{t+n}|^p = |w_t|^p e^{-\rho n} + |w_\infty|^p\,(1 - e^{-\rho n}),

(for Adam + L2, whose decay is measured in units of the gradient, :math:`\rho` is that of the
equilibrium times :math:`|w|/|w_\infty|`),
and a weight of length :math:`|w|` turns by :math:`\theta_\infty(|w_\infty|/|w|)^s` per step
(:class:`~onsphere.dynamics.Equilibrium`). Without weight decay both have a limit for decay
:math:`\to 0`, which is the law of free growth: so it is taken at a decay of :math:`10^{-9}/\eta`.
The size of the gradients is averaged over the last few samples, since one batch is noise.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.optim.optimizer import Optimizer

from onsphere.dynamics import Equilibrium, adam_l2_equilibrium, half_life, muon_equilibrium
from onsphere.dynamics.optimizers import METHODS
from onsphere.monitor.layers import Layer
from onsphere.monitor.run import PREDICTIONS, QUANTITIES, Sample, Values
from onsphere.optim.sphere_optimizer import SphereOptimizer
from onsphere.optim.wrapper import OnSphere

_VANISHING = 1e-9
_PIECES = 16  # of the way between two samples, where the rate depends on the norm
_NEWS = 0.3  # share of a new sample in the average size of the gradients

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Vector:
    """One vector of a layer, as the laws see it.

    Args:
        coordinates: its entries.
        count: how many there are in the layer.
        shape: of the whole weight.
        unit_gradient_square: mean square of its gradient at unit norm.
    """

    coordinates: int
    count: int
    shape: tuple[int, ...]
    unit_gradient_square: float = math.nan


Settle = Callable[[float, float, Settings, Vector], Equilibrium]


@dataclass(frozen=True)
class Law:
    """How an optimizer moves weights on spheres.

    Args:
        name: ``"sphere"`` (fixed norm), ``"relative"`` (and a rate that does not depend on it),
            ``"rotation"`` (fixed norm and angle), or a method's.
        degree: the effective rate is the learning rate over this power of the norm.
        settle: rate, decay, settings and vector -> equilibrium; ``None`` on spheres.
        bend: the power of the norm in the rate at which it relaxes.
    """

    name: str
    degree: int
    settle: Settle | None = None
    bend: int = 0


def law_of(optimizer: Optimizer, group: Settings, layer: Layer) -> Law | None:
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
            return _ROTATION if optimizer.mode == "rotate" else _SPHERE
        kind = type(optimizer.base).__name__
    elif isinstance(optimizer, SphereOptimizer):
        if group["sphere"] is not None:
            return _BY_LR_MODE[group["lr_mode"]]
        kind = kind.removeprefix("Sphere")
    if group.get("amsgrad") or (kind == "SGDW" and group.get("dampening")):
        return None
    if not set(_NEEDED.get(kind, ("?",))) <= set(group):
        return None
    if kind in ("Adam", "AdamW"):
        coupled = kind == "Adam" and not group.get("decoupled_weight_decay", False)
        return _ADAM_L2 if coupled and group["weight_decay"] else _ADAMW
    return _LAWS[kind]


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


def degree_of(optimizer: Optimizer, law: Law | None) -> int:
    """Return the power of the norm in the effective rate; 2, as for SGD, where nothing is known."""
    known = law if law is _RELATIVE else _LAWS.get(_kind(optimizer), law)
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

    def __init__(self, laws: Sequence[Law | None], vectors: Sequence[Vector]) -> None:
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
                turned = float(sample.lrs[row]) if law is _ROTATION else math.nan
                held = self._norms[row]
                rows.append([held, turned, held, turned, math.nan])
            else:
                rows.append(self._expected(row, law, settings[row], norm, unit, sample))
        self._step = sample.step
        return np.array(rows).reshape(len(rows), len(PREDICTIONS))

    def _expected(
        self, row: int, law: Law, settings: Settings, norm: float, unit: float, sample: Sample
    ) -> list[float]:
        lr, decay = float(sample.lrs[row]), float(settings.get("weight_decay", 0.0))
        one = self._vectors[row]
        vector = Vector(one.coordinates, one.count, one.shape, unit)
        self._ahead[row] = rest = equilibrium(law, lr, decay, settings, vector)
        if rest is None:
            return [self._norms[row], 0.0 if lr == 0 else math.nan, *[math.nan] * 3]
        turned = rest.rotation * (rest.norm / norm) ** rest.slope
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
        bend = law.bend if law is not None and rest.norm > 0 else 0
        pieces = min(steps, _PIECES) if bend else 1
        for _ in range(pieces):
            speed = rest.rate * (norm / rest.norm) ** bend if bend else rest.rate
            gone = -speed * steps / pieces
            power = norm**rest.power * math.exp(gone) - rest.norm**rest.power * math.expm1(gone)
            norm = power ** (1 / rest.power)
        return norm


def equilibrium(
    law: Law, lr: float, decay: float, settings: Settings, vector: Vector
) -> Equilibrium | None:
    """Return where a vector goes under a law; without decay, a rest that is very far away.

    Returns:
        The equilibrium, or ``None`` where nothing moves or the law does not hold.

    Example:
        >>> vector = Vector(coordinates=100, count=1, shape=(100,), unit_gradient_square=1.0)
        >>> rest = equilibrium(_LAWS["SGD"], 0.1, 5e-4, {"momentum": 0.9}, vector)
        >>> round(rest.rotation, 5), round(rest.norm, 3)
        (0.00725, 5.623)
    """
    if law.settle is None or not lr > 0:
        return None
    try:
        return law.settle(lr, decay if decay > 0 else _VANISHING / lr, settings, vector)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def _sgd(lr: float, decay: float, settings: Settings, vector: Vector) -> Equilibrium:
    given = {k: float(settings.get(k, 0.0)) for k in ("momentum", "dampening")}
    nesterov = bool(settings.get("nesterov", False))
    rest = _method("sgd", lr, decay, **given, nesterov=nesterov)
    return _longer(rest, vector.unit_gradient_square**0.25)


def _sgdw(lr: float, decay: float, settings: Settings, vector: Vector) -> Equilibrium:
    given = {"momentum": float(settings["momentum"]), "decoupled": True}
    nesterov = bool(settings.get("nesterov", False))
    rest = _method("sgd", lr, decay, **given, nesterov=nesterov)
    return _longer(rest, vector.unit_gradient_square**0.25)


def _decoupled(
    name: str, lr: float, decay: float, settings: Settings, vector: Vector
) -> Equilibrium:
    """Settle AdamW or Lion: the norm is that of one coordinate, times the root of their number."""
    rest = _method(name, lr, decay, betas=tuple(map(float, settings["betas"])))
    return _longer(rest, math.sqrt(vector.coordinates))


def _adam_l2(lr: float, decay: float, settings: Settings, vector: Vector) -> Equilibrium:
    beta1, beta2 = settings["betas"]
    return adam_l2_equilibrium(
        lr=lr,
        weight_decay=decay,
        unit_gradient_square=vector.unit_gradient_square,
        betas=(float(beta1), float(beta2)),
        coordinates=vector.coordinates,
    )


def _muon(lr: float, decay: float, settings: Settings, vector: Vector) -> Equilibrium:
    rows, columns = vector.shape[0], math.prod(vector.shape[1:])
    if settings.get("adjust_lr_fn") == "match_rms_adamw":
        scale = 0.2 * math.sqrt(max(rows, columns))
    else:
        scale = math.sqrt(max(1, rows / columns))
    nesterov = bool(settings.get("nesterov", True))
    rest = _of_muon(lr, decay, float(settings["momentum"]), nesterov, rows, columns)
    return _longer(rest, scale / math.sqrt(vector.count))


@functools.lru_cache(maxsize=1024)
def _method(name: str, lr: float, decay: float, **options: Any) -> Equilibrium:
    law, defaults = METHODS[name]
    return law(lr, decay, **{**defaults, **options})


@functools.lru_cache(maxsize=1024)
def _of_muon(
    lr: float, decay: float, momentum: float, nesterov: bool, rows: int, columns: int
) -> Equilibrium:
    shape = (rows, columns)
    return muon_equilibrium(
        lr=lr, weight_decay=decay, momentum=momentum, nesterov=nesterov, shape=shape
    )


def _longer(rest: Equilibrium, factor: float) -> Equilibrium:
    return rest._replace(norm=rest.norm * factor)


_NEEDED = {
    "SGD": ("lr", "momentum", "weight_decay"),
    "SGDW": ("lr", "momentum", "weight_decay"),
    "Adam": ("lr", "betas", "weight_decay"),
    "AdamW": ("lr", "betas", "weight_decay"),
    "Lion": ("lr", "betas", "weight_decay"),
    "Muon": ("lr", "momentum", "weight_decay"),
}
_ADAMW = Law("adamw", 1, functools.partial(_decoupled, "adamw"))
_ADAM_L2 = Law("adam-l2", 1, _adam_l2, bend=1)
_SPHERE, _ROTATION = Law("sphere", 2), Law("rotation", 2)
_RELATIVE = Law("relative", 0)
_BY_LR_MODE = {"rate": _SPHERE, "angle": _ROTATION, "relative": _RELATIVE}
_LAWS = {
    "SGD": Law("sgd", 2, _sgd),
    "SGDW": Law("sgdw", 2, _sgdw),
    "Adam": _ADAMW,
    "AdamW": _ADAMW,
    "Lion": Law("lion", 1, functools.partial(_decoupled, "lion")),
    "Muon": Law("muon", 1, _muon),
}
