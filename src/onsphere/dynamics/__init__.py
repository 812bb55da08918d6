"""How weight norms grow, where they settle, and a recorder of what they do in a real run."""

from onsphere.dynamics.equilibrium import Equilibrium, relaxation, sgd_equilibrium
from onsphere.dynamics.growth import (
    MomentumState,
    free_growth,
    momentum_growth,
    momentum_step,
    sgd_growth,
    sgd_step,
)
from onsphere.dynamics.recorder import NormRecorder

__all__ = [
    "Equilibrium",
    "MomentumState",
    "NormRecorder",
    "free_growth",
    "momentum_growth",
    "momentum_step",
    "relaxation",
    "sgd_equilibrium",
    "sgd_growth",
    "sgd_step",
]
