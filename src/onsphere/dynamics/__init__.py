"""How weight norms grow, where they settle, and a recorder of what they do in a real run."""

from onsphere.dynamics.autocorrelation import Memory
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
    adaptive_growth,
    free_growth,
    momentum_growth,
    momentum_step,
    sgd_growth,
    sgd_step,
)
from onsphere.dynamics.learning_rates import RisingRates, effective_lr, rising_rates
from onsphere.dynamics.recorder import NormRecorder
from onsphere.dynamics.relaxation import half_life, relaxation, rotation_at
from onsphere.dynamics.residual import eps_residual
from onsphere.dynamics.simulate import SGDW, Lion, random_walk

__all__ = [
    "SGDW",
    "Equilibrium",
    "Lion",
    "Memory",
    "MomentumState",
    "NormRecorder",
    "RisingRates",
    "adam_l2_equilibrium",
    "adamw_equilibrium",
    "adaptive_growth",
    "effective_lr",
    "eps_residual",
    "free_growth",
    "half_life",
    "lion_equilibrium",
    "lion_published_equilibrium",
    "momentum_growth",
    "momentum_step",
    "muon_equilibrium",
    "random_walk",
    "relaxation",
    "rising_rates",
    "rotation_at",
    "sgd_equilibrium",
    "sgd_growth",
    "sgd_step",
]
