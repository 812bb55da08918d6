"""Which parameters share spheres, from what a user says of them."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from onsphere.geometry import Sphere
from onsphere.optim.updates.types import Group


@runtime_checkable
class HasSpheres(Protocol):
    """What knows the spheres of the model that it describes: an audit."""

    def spheres_of_audited(self) -> Mapping[Any, Sphere]:
        """Return parameter -> sphere."""
        ...


Spheres = (
    Mapping[Tensor, Sphere] | Mapping[tuple[Tensor, ...], Sphere] | Iterable[Group] | HasSpheres
)
"""Parameter -> sphere, parameters -> their joint sphere, param groups that name a sphere, or an
audit."""


def resolved(spheres: Spheres) -> Mapping[Any, Sphere] | list[Group]:
    """Return what an audit stands for, and param groups as a list."""
    if isinstance(spheres, Mapping):
        return spheres
    return spheres.spheres_of_audited() if isinstance(spheres, HasSpheres) else list(spheres)


def families(spheres: Spheres) -> Iterable[tuple[tuple[Tensor, ...], Sphere]]:
    """Cut what the user gave into sets of parameters that share spheres."""
    given = resolved(spheres)
    if isinstance(given, Mapping):
        pairs = [(key if isinstance(key, tuple) else (key,), s) for key, s in given.items()]
    else:
        pairs = [
            (tuple([g["params"]] if isinstance(g["params"], Tensor) else g["params"]), g["sphere"])
            for g in given
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
