"""Which parameters share spheres, from what a user says of them."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from onsphere.geometry import Sphere
from onsphere.optim.updates.types import Group

Spheres = Mapping[Tensor, Sphere] | Mapping[tuple[Tensor, ...], Sphere] | Iterable[Group]
"""Parameter -> sphere, parameters -> their joint sphere, or param groups that name a sphere."""


def families(spheres: Spheres) -> Iterable[tuple[tuple[Tensor, ...], Sphere]]:
    """Cut what the user gave into sets of parameters that share spheres."""
    if isinstance(spheres, Mapping):
        pairs = [(key if isinstance(key, tuple) else (key,), s) for key, s in spheres.items()]
    else:
        pairs = [
            (tuple([g["params"]] if isinstance(g["params"], Tensor) else g["params"]), g["sphere"])
            for g in spheres
            if g.get("sphere") is not None
        ]
    for params, sphere in pairs:
        if getattr(sphere, "joint", False):
            yield params, sphere
        else:
            yield from (((param,), sphere) for param in params)


def sets_of(group: Group) -> list[list[Tensor]]:
    """Cut the parameters of a group on a sphere into sets that share their vectors."""
    params = [p for p in group["params"] if p.numel()]
    if not group["sphere"].joint:
        return [[p] for p in params]
    return [params] if params else []
