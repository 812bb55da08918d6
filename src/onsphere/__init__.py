"""onsphere: normalization, seen on the sphere.

>>> import onsphere as osp, torch
>>> osp.norms.method("bn").name
'BatchNorm'
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
>>> osp.audit(net, torch.eye(3)).inert
['0.bias']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onsphere import dynamics, geometry, norms, optim, planning, robustness
from onsphere.optim import on_sphere
from onsphere.planning import Plan, plan
from onsphere.planning.recipe import SphereRecipe
from onsphere.planning.tuned import sphere_recipe
from onsphere.version import __version__

if TYPE_CHECKING:
    from onsphere import monitor, symmetry
    from onsphere.monitor import Monitor
    from onsphere.symmetry.audit import audit
    from onsphere.symmetry.audit_result import Audit
    from onsphere.symmetry.rewrite.canonicalize import canonicalize
    from onsphere.symmetry.rewrite.equalize import equalize
    from onsphere.symmetry.rewrite.fold import fold

__all__ = [
    "Audit",
    "Monitor",
    "Plan",
    "SphereRecipe",
    "__version__",
    "audit",
    "canonicalize",
    "dynamics",
    "equalize",
    "fold",
    "geometry",
    "monitor",
    "norms",
    "on_sphere",
    "optim",
    "plan",
    "planning",
    "robustness",
    "sphere_recipe",
    "symmetry",
]

_HEAVY = ("monitor", "symmetry")
_OF_SYMMETRY = ("Audit", "audit", "canonicalize", "equalize", "fold")


def __getattr__(name: str) -> Any:
    """Import the audit when it is first asked for: it takes four times as long as all the rest."""
    if name in _HEAVY:
        return import_module(f"onsphere.{name}")
    if name == "Monitor":
        return import_module("onsphere.monitor").Monitor
    if name in _OF_SYMMETRY:
        return getattr(import_module("onsphere.symmetry"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
