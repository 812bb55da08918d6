"""Optimizers whose weights stay on spheres."""

from onsphere.optim.adamw import SphereAdamW
from onsphere.optim.motion import project_
from onsphere.optim.optimizer import SphereOptimizer
from onsphere.optim.sgd import SphereSGD

__all__ = ["SphereAdamW", "SphereOptimizer", "SphereSGD", "project_"]
