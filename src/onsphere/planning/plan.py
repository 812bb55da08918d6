"""What a run will do to the weights on spheres, from its hyperparameters alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onsphere.dynamics import Equilibrium, half_life
from onsphere.dynamics.optimizers import (
    ADAM_L2,
    OPTIMIZERS,
    Dependence,
    OptimizerLaw,
    Vector,
    settings_of,
)
from onsphere.dynamics.schedule import MOST, PlanError, Schedule
from onsphere.dynamics.trajectory import Motion, Path, follow
from onsphere.planning.recipe import SphereRecipe
from onsphere.planning.tuned import sphere_recipe

_STARTS = (0.5, 2.0)
"""Norms, in units of the equilibrium's, between which a run may start when nobody says where."""

_NORM_UNITS = {
    "weight": ("norm", "norm"),
    "entry": ("norm", "root mean square of the entries"),
    "matrix": ("Frobenius norm", "Frobenius norm / sqrt(smaller side)"),
}
"""What norms are of: with the weight's shape, and without."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A planned run, and what the laws say of a weight on a sphere in it; made by :func:`plan`.

    Args:
        method: the optimizer's name.
        lr: the full learning rate.
        weight_decay: the decay.
        settings: all other options, with defaults.
        schedule: of the rate.
        shape: of the weight; empty where it is not known.
        unit_gradient_square: L, or ``None``: then norms are for L = 1, see ``depends``.
        initial_norm: of the weight, or ``None``.
        batch_size: examples per step, or ``None``.
        settled: the equilibrium at the full rate; ``None`` without decay.
        motion: how the norm moves there.
        path: norm and rotation over the run. Without an initial norm it starts in the equilibrium,
            or without decay from 0. ``None`` where it depends on the unknown L.
        around: without an initial norm, the paths from half and twice the equilibrium's.
        depends: powers of the unknown L.
        recipe: the same turning on the sphere, where one rotation is it.
    """

    method: str
    lr: float
    weight_decay: float
    settings: Mapping[str, Any]
    schedule: Schedule
    shape: tuple[int, ...]
    unit_gradient_square: float | None
    initial_norm: float | None
    batch_size: int | None
    settled: Equilibrium | None
    motion: Motion
    path: Path | None
    around: tuple[Path, ...]
    depends: Dependence
    recipe: SphereRecipe | None

    @property
    def half_life(self) -> float | None:
        """Steps in which half of the way to equilibrium is gone; for L = 1 where it depends."""
        return None if self.settled is None else half_life(self.settled)

    @property
    def norm_unit(self) -> str:
        """What norms here are: of the whole weight, or of its entries."""
        whole, unknown = _NORM_UNITS[OPTIMIZERS[self.method].norm_of]
        return whole if self.shape else unknown

    def __repr__(self) -> str:
        found = "no equilibrium"
        if self.settled is not None:
            known = not self.depends.rotation
            found = f"{self.settled.rotation:.3g} radians per step" if known else "unknown rotation"
        return (
            f"<Plan of {self.method}, lr {self.lr:g}, weight decay {self.weight_decay:g}, "
            f"{self.schedule.steps:,} steps: {found}>"
        )

    def to_dict(self, points: int = 200) -> dict[str, Any]:
        """Return the plan as plain values, for JSON.

        Args:
            points: at most about so many of the path.

        Returns:
            Nested dictionaries; ``null`` for what does not exist or depends on an unknown L.
        """
        return {
            "optimizer": self.method,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            **{name: value for name, value in self.settings.items() if name != "shape"},
            "schedule": {
                "kind": self.schedule.kind,
                "steps": self.schedule.steps,
                "warmup": self.schedule.warmup,
            },
            "shape": list(self.shape) or None,
            "gradient_square": self.unit_gradient_square,
            "initial_norm": self.initial_norm,
            "batch_size": self.batch_size,
            "norm_is": self.norm_unit,
            "equilibrium": self._equilibrium_dict(),
            "left_at_the_end": None if self.path is None else float(self.path.left[-1]),
            "path": None if self.path is None else _thinned(self.path, points),
            "sphere_rotation": None if self.recipe is None else self.recipe.rotation,
        }

    def _equilibrium_dict(self) -> dict[str, Any] | None:
        if self.settled is None:
            return None
        values = {
            "rotation": (self.settled.rotation, self.depends.rotation),
            "norm": (self.settled.norm, self.depends.norm),
            "half_life": (half_life(self.settled), self.depends.half_life),
        }
        return {
            **{name: None if power else value for name, (value, power) in values.items()},
            "times_powers_of_gradient_square": {
                name: {"factor": value, "power": power}
                for name, (value, power) in values.items()
                if power
            },
        }


def plan(
    method: str,
    schedule: Schedule,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    decoupled: bool | None = None,
    shape: tuple[int, ...] = (),
    unit_gradient_square: float | None = None,
    initial_norm: float | None = None,
    batch_size: int | None = None,
) -> Plan:
    r"""Say what a run will do to a weight on a sphere, before it is made.

    The equilibrium at the full rate is that of :mod:`onsphere.dynamics.equilibrium`; under a
    schedule the expected norm follows the recursion of :mod:`onsphere.dynamics.trajectory`, and the
    rotation follows the norm. Without decay there is no equilibrium, and the norm grows as
    :math:`t^{1/4}` (SGD) or :math:`t^{1/2}` (the others) at a constant rate.

    Args:
        method: ``"sgd"``, ``"adam"`` (decay in the gradient), ``"adamw"``, ``"lion"`` or
            ``"muon"``.
        schedule: length of the run, and its rate over it.
        lr: the full learning rate :math:`\eta`.
        weight_decay: :math:`\lambda`, 0 for none.
        betas: of Adam and AdamW (0.9, 0.999) and Lion (0.9, 0.99).
        momentum: of SGD (0) and Muon (0.95).
        nesterov: of SGD (no) and Muon (yes).
        decoupled: of SGD (no): decay that does not pass through the momentum.
        shape: of the weight that is on one sphere, as ``(576,)`` for a filter. Without it norms
            are root mean squares of the entries where the law counts entries.
        unit_gradient_square: :math:`L = |w|^2 |\nabla f(w)|^2`, the mean of the squared gradient
            norm at the unit-norm point, for that weight. The norm under SGD depends on it, and
            everything under Adam with L2.
        initial_norm: of the weight, in the unit of the norm.
        batch_size: examples per step.

    Returns:
        The plan.

    Raises:
        PlanError: a value that cannot be, or that says nothing without another one.
        RecipeError: an unknown method, or an option that it does not have or out of its range.

    Example:
        >>> planned = plan("adamw", Schedule(10_000, "cosine"), lr=1e-3, weight_decay=0.1)
        >>> round(planned.settled.rotation, 5), round(planned.half_life)
        (0.00324, 3466)
        >>> round(float(planned.path.left[-1]), 2)  # of the initial norm, squared
        0.37
    """
    method = str(method).lower()
    given = {"betas": betas, "momentum": momentum, "nesterov": nesterov, "decoupled": decoupled}
    if method == "muon" and shape:
        given["shape"] = shape  # type: ignore[assignment]
    settings = settings_of(method, lr, weight_decay, given)
    _check(method, lr, weight_decay, shape, unit_gradient_square, initial_norm, batch_size)
    options = {name: value for name, value in settings.items() if value is not None}
    level = 1.0 if unit_gradient_square is None else unit_gradient_square
    law, vector = OPTIMIZERS[method], Vector(math.prod(shape), 1, shape, level)
    depends = _dependence(law, weight_decay, unit_gradient_square)
    try:
        settled = law.equilibrium(lr, weight_decay, vector, settings) if weight_decay else None
        if settled is not None and not _representable(settled):
            raise OverflowError
        motion = (
            law.growth(lr, vector, settings) if settled is None else Motion.of(settled, law.bend)
        )
        path, around = _paths(motion, schedule, settled, initial_norm, depends)
    except (OverflowError, ZeroDivisionError):
        raise PlanError(
            f"lr={lr:g}, weight_decay={weight_decay:g} and the norms they lead to are too large or "
            "too small to compute with"
        ) from None
    recipe = None
    if settled is not None and law.has_recipe:
        recipe = sphere_recipe(method, lr=lr, weight_decay=weight_decay, **options)
    return Plan(
        method, lr, weight_decay, settings, schedule, shape, unit_gradient_square, initial_norm,
        batch_size, settled, motion, path, around, depends, recipe,
    )  # fmt: skip


def _representable(settled: Equilibrium) -> bool:
    """Whether all that an equilibrium says has a value."""
    values = (settled.rotation, settled.norm, settled.rate)
    return all(0 < v < math.inf for v in values) and half_life(settled) < math.inf


def _dependence(law: OptimizerLaw, weight_decay: float, level: float | None) -> Dependence:
    if level is not None or (law is ADAM_L2 and weight_decay == 0):
        return Dependence()
    return law.depends


def _paths(
    motion: Motion,
    schedule: Schedule,
    settled: Equilibrium | None,
    initial_norm: float | None,
    depends: Dependence,
) -> tuple[Path | None, tuple[Path, ...]]:
    """Follow the run, and without an initial norm its neighbours."""
    if depends.rotation:
        return None, ()
    if initial_norm is not None:
        return follow(motion, schedule, initial_norm), ()
    if settled is None:
        return follow(motion, schedule, 0.0), ()
    around = tuple(follow(motion, schedule, part * settled.norm) for part in _STARTS)
    return follow(motion, schedule, settled.norm), around


def _check(
    method: str,
    lr: float,
    weight_decay: float,
    shape: tuple[int, ...],
    level: float | None,
    initial_norm: float | None,
    batch_size: int | None,
) -> None:
    if lr == 0:
        raise PlanError("at learning rate 0 nothing moves; lr is above 0")
    if lr * weight_decay >= 1:
        raise PlanError(
            f"lr * weight_decay = {lr * weight_decay:g} takes the whole weight at every step; it "
            "must be below 1"
        )
    if any(side < 1 for side in shape):
        raise PlanError(f"a shape has sides of at least 1, got {'x'.join(map(str, shape))}")
    if method == "muon" and len(shape) not in (0, 2):
        raise PlanError(f"muon moves matrices: a shape of two sides, got {len(shape)}")
    for name, value in (("gradient square", level), ("initial norm", initial_norm)):
        if value is not None and not 0 < value < math.inf:
            raise PlanError(f"the {name} is above 0 and finite, got {value}")
    if batch_size is not None and not 1 <= batch_size <= MOST:
        raise PlanError(f"a batch has at least 1 example and at most {MOST}, got {batch_size}")
    law = OPTIMIZERS[method]
    if level is None and initial_norm is not None and _dependence(law, weight_decay, level).norm:
        raise PlanError(
            f"the initial norm says nothing under {method} as long as the gradients' size is not "
            "known: give the gradient square as well"
        )
    if method == "adam" and level is not None and weight_decay and not shape:
        raise PlanError(
            "adam with its decay in the gradient counts entries: give the shape with the gradient "
            "square"
        )
    if level is not None and not law.depends.norm:
        raise PlanError(
            f"nothing under {method} depends on the gradient square: its steps have the same size "
            "for all gradients"
        )


def _thinned(path: Path, points: int) -> dict[str, list[Any]]:
    """Return about so many points of a path, first and last included."""
    every = max(1, math.ceil(len(path.steps) / points))
    chosen = torch.unique(
        torch.cat([torch.arange(0, len(path.steps), every), torch.tensor([len(path.steps) - 1])])
    )
    series = {
        "step": path.steps,
        "rate_factor": path.factors,
        "norm": path.norm,
        "rotation": path.rotation,
        "balance": path.balance,
    }
    return {
        name: [value if math.isfinite(value) else None for value in values[chosen].tolist()]
        for name, values in series.items()
    }
