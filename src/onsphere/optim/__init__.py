"""Optimizers whose weights stay on spheres."""

from onsphere.optim.adamw import SphereAdamW
from onsphere.optim.averaging import SphereAveragedModel
from onsphere.optim.sgd import SphereSGD
from onsphere.optim.sphere_optimizer import SphereOptimizer
from onsphere.optim.updates.geodesic import project_
from onsphere.optim.wrapper import OnSphere, on_sphere

__all__ = [
    "OnSphere",
    "SphereAdamW",
    "SphereAveragedModel",
    "SphereOptimizer",
    "SphereSGD",
    "on_sphere",
    "project_",
]
