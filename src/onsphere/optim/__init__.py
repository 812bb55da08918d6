"""Optimizers whose weights stay on spheres."""

from onsphere.optim.motion import project_
from onsphere.optim.optimizer import SphereOptimizer
from onsphere.optim.sgd import SphereSGD, sgd_update

__all__ = ["SphereOptimizer", "SphereSGD", "project_", "sgd_update"]
