r"""The optimizers whose laws are known: what each is called, told, and does to a norm.

This is the only place that tells them apart. A row of the table (:class:`OptimizerLaw`) has an
optimizer's names, its settings with their defaults, and its equilibrium for a weight of any shape;
plans, recipes and the monitor look up rows by :data:`OPTIMIZERS` (names that users write),
:data:`LAWS` (names in the file of a watched run) or :func:`law_of_class` (class and param group).
The laws themselves are in :mod:`onsphere.dynamics.equilibrium`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from onsphere.dynamics.equilibrium import (
    Equilibrium,
    adam_l2_equilibrium,
    adamw_equilibrium,
    lion_equilibrium,
    muon_equilibrium,
    sgd_equilibrium,
)
from onsphere.dynamics.trajectory import Motion
from onsphere.errors import OnsphereError, nearest

VANISHING = 1e-9
"""lr * decay of the limit in which a law of equilibrium gives the growth without decay."""


class RecipeError(OnsphereError, ValueError):
    """A recipe that has no equilibrium, or an option that its optimizer does not have."""


@dataclass(frozen=True)
class Vector:
    """One vector of a weight, as the laws see it. Without arguments norms are in a law's own unit.

    Args:
        coordinates: its entries.
        count: how many there are in the weight.
        shape: of the whole weight; empty where it is not known.
        unit_gradient_square: mean square of its gradient at unit norm.
    """

    coordinates: int = 1
    count: int = 1
    shape: tuple[int, ...] = ()
    unit_gradient_square: float = 1.0


@dataclass(frozen=True)
class Dependence:
    """Powers of L (squared gradient norm at the unit-norm point) in what a law gives.

    Args:
        norm: power in the norm.
        rotation: in the rotation per step.
        half_life: in the half-life.
    """

    norm: float = 0.0
    rotation: float = 0.0
    half_life: float = 0.0


Settle = Callable[..., Equilibrium]
"""Rate, decay, vector, and settings by name -> equilibrium of that vector."""


@dataclass(frozen=True)
class OptimizerLaw:
    """How an optimizer moves weights on spheres.

    Args:
        name: in the file of a watched run.
        method: as users name it in plans and recipes; empty for an optimizer that holds norms.
        degree: the effective rate is the learning rate over this power of the norm.
        settle: its equilibrium; ``None`` for an optimizer that holds norms.
        defaults: its settings beside rate and decay.
        fixed: settings that are another thing under this name.
        reads: what a param group of ``torch.optim`` says that the law needs to know.
        bend: the power of the norm in the rate at which it relaxes; see :class:`Motion`.
        depends: powers of the size of the gradients.
        norm_of: what the norm is of where nothing is known of the weight: the ``"weight"``, or its
            root mean square ``"entry"``, or the ``"matrix"`` with a smaller side of 1.
        refuses: settings under which the law does not hold.
    """

    name: str
    method: str
    degree: int
    settle: Settle | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    bend: int = 0
    depends: Dependence = Dependence()
    norm_of: Literal["weight", "entry", "matrix"] = "weight"
    refuses: tuple[str, ...] = ("amsgrad",)

    @property
    def has_recipe(self) -> bool:
        """Whether all weights turn by one angle, whatever the size of their gradients."""
        return self.settle is not None and not self.depends.rotation

    def covers(self, group: Mapping[str, Any]) -> bool:
        """Whether the law holds under the settings of a param group.

        Args:
            group: as ``torch.optim`` has it.
        """
        needed = {"lr", "weight_decay", *({"momentum", "betas"} & set(self.reads))}
        return needed <= set(group) and not any(group.get(name) for name in self.refuses)

    def settings_in(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a param group, and the name of the law, say of its settings.

        Args:
            group: as ``torch.optim`` has it, or as a file of a watched run repeats it.

        Example:
            >>> LAWS["sgdw"].settings_in({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1})
            {'decoupled': True, 'momentum': 0.9}
        """
        found = {name: group[name] for name in self.reads if group.get(name) is not None}
        return {**self.fixed, **found}

    def equilibrium(
        self, lr: float, weight_decay: float, vector: Vector, settings: Mapping[str, Any]
    ) -> Equilibrium:
        """Return where a vector settles.

        Args:
            lr: the learning rate, above 0.
            weight_decay: its decay, above 0.
            vector: what moves.
            settings: by name; those that are missing have their defaults.

        Raises:
            ValueError: values without an equilibrium, or an optimizer that holds norms.

        Example:
            >>> vector = Vector(coordinates=100, count=1, shape=(100,))
            >>> rest = LAWS["sgd"].equilibrium(0.1, 5e-4, vector, {"momentum": 0.9})
            >>> round(rest.rotation, 5), round(rest.norm, 3)
            (0.00725, 5.623)
        """
        if self.settle is None:
            raise ValueError(f"under {self.name!r} the norm stays what it is")
        return self.settle(lr, weight_decay, vector, **{**self.defaults, **self.fixed, **settings})

    def growth(self, lr: float, vector: Vector, settings: Mapping[str, Any]) -> Motion:
        """Return the motion without decay: the limit of ever less decay, which takes nothing.

        Args:
            lr: the learning rate, above 0.
            vector: what moves.
            settings: as for :meth:`equilibrium`.

        Raises:
            ValueError: as :meth:`equilibrium`.

        Example:
            >>> grown = LAWS["adamw"].growth(1e-3, Vector(), {})
            >>> round(grown.growth * 1e6, 6), grown.rate  # lr^2 per step
            (1.0, 0.0)
        """
        law = ADAMW if self is ADAM_L2 else self  # without decay they are the same
        return Motion.of(law.equilibrium(lr, VANISHING / lr, vector, settings)).without_decay()


def muon_scale(shape: Sequence[int], adjust_lr_fn: str | None = None) -> float:
    """Return the factor by which ``torch.optim.Muon`` multiplies its updates.

    Args:
        shape: of the matrix; what follows the rows is taken together. 1 for an empty one.
        adjust_lr_fn: ``"match_rms_adamw"``, or anything else for the original factor.

    Example:
        >>> muon_scale((64, 16)), round(muon_scale((64, 16), "match_rms_adamw"), 6)
        (2.0, 1.6)
    """
    if not shape:
        return 1.0
    rows, columns = shape[0], math.prod(shape[1:])
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def law_of_class(kind: str, group: Mapping[str, Any]) -> OptimizerLaw | None:
    """Return the law of an optimizer, by the name of its class and the settings of a group.

    Args:
        kind: as ``type(optimizer).__name__``.
        group: its param group.

    Returns:
        The law, or ``None`` for an optimizer or a setting that no law covers.

    Example:
        >>> group = {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.1}
        >>> law_of_class("Adam", group).name, law_of_class("RMSprop", group)
        ('adam-l2', None)
    """
    law = CLASSES.get(kind)
    if law is None or not law.covers(group):
        return None
    coupled = kind == "Adam" and not group.get("decoupled_weight_decay", False)
    return ADAM_L2 if coupled and group["weight_decay"] else law


def _sgd(
    lr: float, weight_decay: float, vector: Vector, *, momentum: Any, dampening: Any, nesterov: Any,
    decoupled: bool,
) -> Equilibrium:  # fmt: skip
    kept = float(momentum)
    # Dampening scales what enters the buffer: the gradient, and decay that is coupled with it.
    # Without momentum torch.optim.SGD has no buffer, and ignores it.
    rate = lr if decoupled or kept == 0 else lr * (1 - float(dampening))
    rest = _remembered(
        sgd_equilibrium, lr=rate, weight_decay=weight_decay, momentum=kept, decoupled=decoupled
    )
    if nesterov:
        # The sum of the weights of past gradients, which sets the norm, stays; their squares do
        # not.
        rest = rest._replace(rotation=rest.rotation * math.sqrt(1 + 2 * kept - 2 * kept**3))
    return _longer(rest, vector.unit_gradient_square**0.25)


def _adamw(lr: float, weight_decay: float, vector: Vector, *, betas: Sequence[Any]) -> Equilibrium:
    rest = _remembered(
        adamw_equilibrium, lr=lr, weight_decay=weight_decay, betas=tuple(map(float, betas))
    )
    return _longer(rest, math.sqrt(vector.coordinates))


def _adam_l2(
    lr: float, weight_decay: float, vector: Vector, *, betas: Sequence[Any]
) -> Equilibrium:
    return adam_l2_equilibrium(
        lr=lr,
        weight_decay=weight_decay,
        unit_gradient_square=vector.unit_gradient_square,
        betas=(float(betas[0]), float(betas[1])),
        coordinates=vector.coordinates,
    )


def _lion(lr: float, weight_decay: float, vector: Vector, *, betas: Sequence[Any]) -> Equilibrium:
    rest = _remembered(
        lion_equilibrium, lr=lr, weight_decay=weight_decay, betas=tuple(map(float, betas))
    )
    return _longer(rest, math.sqrt(vector.coordinates))


def _muon(
    lr: float, weight_decay: float, vector: Vector, *, momentum: Any, nesterov: Any,
    shape: tuple[int, int] | None, adjust_lr_fn: str | None = None,
) -> Equilibrium:  # fmt: skip
    # A recipe knows the shape but no vector: then norms are in the law's own unit.
    sides = (vector.shape[0], math.prod(vector.shape[1:])) if vector.shape else shape
    rest = _remembered(
        muon_equilibrium,
        lr=lr,
        weight_decay=weight_decay,
        momentum=float(momentum),
        nesterov=bool(nesterov),
        shape=sides,
    )
    return _longer(rest, muon_scale(vector.shape, adjust_lr_fn) / math.sqrt(vector.count))


@functools.lru_cache(maxsize=1024)
def _remembered(law: Settle, **given: Any) -> Equilibrium:
    """Evaluate a law once: a monitor asks at every sample, mostly with the same settings."""
    return law(**given)


def _longer(rest: Equilibrium, factor: float) -> Equilibrium:
    return rest._replace(norm=rest.norm * factor)


SGD = OptimizerLaw(
    name="sgd",
    method="sgd",
    degree=2,
    settle=_sgd,
    defaults={"momentum": 0.0, "dampening": 0.0, "nesterov": False, "decoupled": False},
    reads=("momentum", "dampening", "nesterov"),
    depends=Dependence(norm=1 / 4),
)
SGDW = replace(
    SGD,
    name="sgdw",
    fixed={"decoupled": True},
    reads=("momentum", "nesterov"),
    refuses=(*SGD.refuses, "dampening"),
)
ADAMW = OptimizerLaw(
    name="adamw",
    method="adamw",
    degree=1,
    settle=_adamw,
    defaults={"betas": (0.9, 0.999)},
    reads=("betas",),
    norm_of="entry",
)
ADAM_L2 = replace(
    ADAMW,
    name="adam-l2",
    method="adam",
    settle=_adam_l2,
    bend=1,
    depends=Dependence(norm=1 / 6, rotation=-1 / 6, half_life=1 / 3),
)
LION = replace(ADAMW, name="lion", method="lion", settle=_lion, defaults={"betas": (0.9, 0.99)})
MUON = OptimizerLaw(
    name="muon",
    method="muon",
    degree=1,
    settle=_muon,
    defaults={"momentum": 0.95, "nesterov": True, "shape": None},
    reads=("momentum", "nesterov", "adjust_lr_fn"),
    norm_of="matrix",
)
SPHERE = OptimizerLaw(name="sphere", method="", degree=2)
ROTATION = OptimizerLaw(name="rotation", method="", degree=2)
RELATIVE = OptimizerLaw(name="relative", method="", degree=0)

OPTIMIZERS = {law.method: law for law in (ADAMW, SGD, LION, MUON, ADAM_L2)}
"""By the names that users write: in plans, recipes and on the command line."""

LAWS = {law.name: law for law in (SGD, SGDW, ADAM_L2, ADAMW, LION, MUON)}
"""Of optimizers that move norms, by the names in the file of a watched run."""

CLASSES = {"SGD": SGD, "SGDW": SGDW, "Adam": ADAMW, "AdamW": ADAMW, "Lion": LION, "Muon": MUON}
"""By the names of classes; an Adam whose decay is in its gradient is :data:`ADAM_L2`."""

ON_SPHERES = {"rate": SPHERE, "angle": ROTATION, "relative": RELATIVE}
"""Of sphere optimizers, which hold norms, by their ``lr_mode``: a fixed norm, a fixed norm under a
rate that is the rotation, and a fixed norm to which the rate is relative."""


def settings_of(
    method: str, lr: float, weight_decay: float, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Check the hyperparameters of a method, and fill in the defaults of what is not given.

    Args:
        method: the optimizer's name; ``"adam"`` as well, which has settings but no recipe.
        lr: its learning rate.
        weight_decay: its decay, which may be 0.
        given: options by name; ``None`` for one that is not given.

    Returns:
        Every option that the method has.

    Raises:
        RecipeError: an unknown method, an option that it does not have, or one out of its range.

    Example:
        >>> settings_of("adam", 1e-3, 0.0, {"betas": None, "momentum": None})
        {'betas': (0.9, 0.999)}
    """
    if method not in OPTIMIZERS:
        raise RecipeError(f"unknown method {method!r}{nearest(method, list(OPTIMIZERS))}")
    defaults = OPTIMIZERS[method].defaults
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in defaults:
            raise RecipeError(f"{method} has no {name}; it takes {', '.join(defaults)}")
    settings = {**defaults, **chosen}
    _check(float(lr), float(weight_decay), settings)
    return settings


def _check(lr: float, weight_decay: float, settings: Mapping[str, Any]) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise RecipeError(f"{name} is a positive number, got {value}")
    for name in ("momentum", "dampening"):
        if not 0 <= settings.get(name, 0) < 1:
            raise RecipeError(f"{name} is at least 0 and below 1, got {settings[name]}")
    betas = settings.get("betas", (0, 0))
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise RecipeError(f"betas are two numbers, at least 0 and below 1, got {betas!r}")
    if settings.get("nesterov") and (
        settings["momentum"] == 0 or settings.get("dampening", 0) != 0
    ):
        raise RecipeError("nesterov needs momentum > 0 and dampening = 0, as in torch.optim.SGD")
