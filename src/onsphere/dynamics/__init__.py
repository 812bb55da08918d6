"""How weight norms grow, where they settle, and a recorder of what they do in a real run."""

from onsphere.dynamics.equilibrium import (
    Equilibrium,
    adam_l2_equilibrium,
    adamw_equilibrium,
    lion_equilibrium,
    lion_published_equilibrium,
    muon_equilibrium,
    sgd_equilibrium,
)
from onsphere.dynamics.growth import (
    MomentumState,
    free_growth,
    momentum_growth,
    momentum_step,
    sgd_growth,
    sgd_step,
)
from onsphere.dynamics.memory import Memory
from onsphere.dynamics.recorder import NormRecorder
from onsphere.dynamics.transient import half_life, relaxation, rotation_at

__all__ = [
    "Equilibrium",
    "Memory",
    "MomentumState",
    "NormRecorder",
    "adam_l2_equilibrium",
    "adamw_equilibrium",
    "free_growth",
    "half_life",
    "lion_equilibrium",
    "lion_published_equilibrium",
    "momentum_growth",
    "momentum_step",
    "muon_equilibrium",
    "relaxation",
    "rotation_at",
    "sgd_equilibrium",
    "sgd_growth",
    "sgd_step",
]
