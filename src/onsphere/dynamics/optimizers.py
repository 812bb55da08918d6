"""Hyperparameters of the optimizers whose laws are known: names, defaults, and what is allowed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onsphere.dynamics import (
    Equilibrium,
    adamw_equilibrium,
    lion_equilibrium,
    muon_equilibrium,
    sgd_equilibrium,
)
from onsphere.errors import OnsphereError, nearest


class RecipeError(OnsphereError, ValueError):
    """A recipe that has no equilibrium, or an option that its optimizer does not have."""


def _sgd(
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    decoupled: bool,
) -> Equilibrium:
    # Dampening scales what enters the buffer: the gradient, and decay that is coupled with it.
    # Without momentum torch.optim.SGD has no buffer, and ignores it.
    rate = lr if decoupled or momentum == 0 else lr * (1 - dampening)
    law = sgd_equilibrium(
        lr=rate, weight_decay=weight_decay, momentum=momentum, decoupled=decoupled
    )
    if not nesterov:
        return law
    # The sum of the weights of past gradients, which sets the norm, stays; their squares do not.
    return law._replace(rotation=law.rotation * math.sqrt(1 + 2 * momentum - 2 * momentum**3))


def _adamw(lr: float, weight_decay: float, betas: tuple[float, float]) -> Equilibrium:
    return adamw_equilibrium(lr=lr, weight_decay=weight_decay, betas=betas)


def _lion(lr: float, weight_decay: float, betas: tuple[float, float]) -> Equilibrium:
    return lion_equilibrium(lr=lr, weight_decay=weight_decay, betas=betas)


def _muon(
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    shape: tuple[int, int] | None,
) -> Equilibrium:
    return muon_equilibrium(
        lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, shape=shape
    )


_ADAM: dict[str, Any] = {"betas": (0.9, 0.999)}

METHODS: dict[str, tuple[Callable[..., Equilibrium], dict[str, Any]]] = {
    "adamw": (_adamw, _ADAM),
    "sgd": (_sgd, {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "decoupled": False}),
    "lion": (_lion, {"betas": (0.9, 0.99)}),
    "muon": (_muon, {"momentum": 0.95, "nesterov": True, "shape": None}),
}
"""The law of each method, and the options that it has with their defaults."""


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
    options = {name: defaults for name, (_, defaults) in METHODS.items()} | {"adam": _ADAM}
    if method not in options:
        raise RecipeError(f"unknown method {method!r}{nearest(method, list(options))}")
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in options[method]:
            raise RecipeError(f"{method} has no {name}; it takes {', '.join(options[method])}")
    settings = {**options[method], **chosen}
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
