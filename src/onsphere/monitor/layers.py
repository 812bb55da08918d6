"""Which weights a monitor watches: what the user gave, made into layers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from onsphere._torch.execution import bare_name
from onsphere._torch.materialize import unwrapped
from onsphere.errors import OnsphereError, choice, nearest
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim.distributed import placement
from onsphere.optim.families import families
from onsphere.optim.wrapper import OnSphere


class MonitorError(OnsphereError, ValueError):
    """What was given cannot be watched."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One watched weight, or the weights of one joint sphere.

    Args:
        name: as in the model.
        params: the weight; of a joint sphere all its parts.
        sphere: which entries form one vector.
        group: number of its param group in the optimizer.
        invariant: whether it is said to be scale-invariant; otherwise it is watched as it is.
    """

    name: str
    params: tuple[Tensor, ...]
    sphere: Sphere
    group: int
    invariant: bool = True

    @property
    def vectors(self) -> int:
        """How many vectors there are."""
        return self.sphere.axes.count(self.params[0].shape)

    @property
    def coordinates(self) -> int:
        """How many entries one vector has."""
        return sum(p.numel() for p in self.params) // max(1, self.vectors)


def stepping(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside what a trainer wrapped around it (Accelerate, Lightning)."""
    while not isinstance(optimizer, OnSphere) and isinstance(
        inner := getattr(optimizer, "optimizer", None), Optimizer
    ):
        optimizer = inner
    return optimizer


def layers_of(model: nn.Module, optimizer: Optimizer, spheres: Any = None) -> list[Layer]:
    """Return the layers to watch, in the order of the model.

    Args:
        model: for the names; it may be wrapped.
        optimizer: only weights that it moves are watched.
        spheres: an audit, a mapping, param groups, ``"matrices"`` or ``None``, as :class:`Monitor`
            takes them. All matrices are watched where an audit found no sphere, too.

    Returns:
        At least one layer.

    Raises:
        MonitorError: nothing is left to watch, or a weight does not fit its sphere.
    """
    names = {id(p): bare_name(n) for n, p in unwrapped(model).named_parameters()}
    groups = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    order = {key: place for place, key in enumerate(names)}
    matrices = isinstance(spheres, str)
    if matrices:
        choice("spheres, where it is a word,", spheres, ("matrices",), MonitorError)
    given = [] if matrices else list(_given(model, optimizer, spheres))
    invariant = bool(given) or not (matrices or hasattr(spheres, "spheres_of"))
    if not invariant:
        given = _matrices(model)
    found = []
    for params, axes in given:
        if not all(id(p) in groups and p.numel() for p in params):
            continue
        name = "+".join(names.get(id(p), f"parameter of shape {tuple(p.shape)}") for p in params)
        sphere = Sphere(axes) if isinstance(axes, VectorAxes) else axes
        _check(name, params, sphere)
        alone = invariant and sphere.invariant
        found.append(Layer(name, params, sphere, groups[id(params[0])], alone))
    if not found:
        raise MonitorError(
            f"of the {len(given)} weights to watch, the optimizer moves none: it trains another "
            "model, or another copy of this one"
            if given
            else "no weight to watch was given; name some, or say 'matrices' for all matrices"
        )
    return _distinct(sorted(found, key=lambda layer: order.get(id(layer.params[0]), len(order))))


def _given(
    model: nn.Module, optimizer: Optimizer, spheres: Any
) -> Iterable[tuple[tuple[Tensor, ...], Sphere | VectorAxes]]:
    """Read every way to say which weights are on which spheres."""
    if spheres is None:
        held = getattr(optimizer, "constrained", None)
        if held is not None:
            return [(tuple(one.params), one.sphere) for one in held]
        if not any(group.get("sphere") is not None for group in optimizer.param_groups):
            raise MonitorError(
                f"{type(optimizer).__name__} does not say which weights are on spheres; give an "
                "audit: Monitor(model, optimizer, onsphere.audit(model, inputs))"
            )
        return list(families(optimizer.param_groups))
    if hasattr(spheres, "spheres_of"):
        return list(families(spheres.spheres_of(model)))
    if not isinstance(spheres, Mapping):
        groups = list(spheres) if isinstance(spheres, Iterable) else [spheres]
        other = next((g for g in groups if not isinstance(g, Mapping)), None)
        if other is not None:
            raise MonitorError(
                f"spheres are an audit, a mapping from weights (or their names) to spheres, param "
                f"groups, or 'matrices'; got a {type(other).__name__}"
            )
        return list(families(groups))
    known = _parameters(model)
    pairs: dict[Any, Any] = {}
    for key, value in spheres.items():
        if isinstance(key, str):
            if key not in known:
                raise MonitorError(f"the model has no parameter {key!r}{nearest(key, list(known))}")
            key = known[key]
        pairs[key] = value
    return list(families(pairs))


def _matrices(model: nn.Module) -> list[tuple[tuple[Tensor, ...], Sphere | VectorAxes]]:
    """Return every weight that is no vector, as one vector each."""
    return [((p,), VectorAxes()) for p in unwrapped(model).parameters() if p.ndim > 1]


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters; one that is tied, by each of its names."""
    named = unwrapped(model).named_parameters(remove_duplicate=False)
    return {bare_name(name): p for name, p in named}


def _check(name: str, params: tuple[Tensor, ...], sphere: object) -> None:
    if not isinstance(sphere, Sphere):
        raise MonitorError(f"{name} is given {sphere!r}; write a Sphere or VectorAxes")
    try:
        counts = {sphere.axes.count(p.shape) for p in params}
        if placement.any_in(params):
            placement.check(params, sphere)
    except ValueError as error:
        raise MonitorError(f"{name}: {error}") from error
    if len(counts) > 1:
        raise MonitorError(f"{name}: the parts of a joint sphere have {sorted(counts)} vectors")
    if any(not p.is_floating_point() for p in params):
        raise MonitorError(f"{name} is not real floating point")


def _distinct(layers: list[Layer]) -> list[Layer]:
    """Refuse two layers of one name, which a file could not keep apart."""
    names = [layer.name for layer in layers]
    for name in names:
        if names.count(name) > 1:
            raise MonitorError(f"{name!r} is given twice; give each weight once")
    return layers
