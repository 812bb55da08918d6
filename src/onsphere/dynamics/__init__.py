"""How weight norms grow, where they settle, and a recorder of what they do in a real run."""

from onsphere.dynamics.equilibrium import (
    Equilibrium,
    adam_l2_equilibrium,
    adamw_equilibrium,
    lion_equilibrium,
    muon_equilibrium,
    sgd_equilibrium,
)
from onsphere.dynamics.growth import adaptive_growth, free_growth, momentum_growth, sgd_growth
from onsphere.dynamics.learning_rates import RisingRates, effective_lr, rising_rates
from onsphere.dynamics.recorder import NormRecorder
from onsphere.dynamics.relaxation import half_life, relaxation
from onsphere.dynamics.simulate import SGDW, Lion, random_walk

__all__ = [
    "SGDW",
    "Equilibrium",
    "Lion",
    "NormRecorder",
    "RisingRates",
    "adam_l2_equilibrium",
    "adamw_equilibrium",
    "adaptive_growth",
    "effective_lr",
    "free_growth",
    "half_life",
    "lion_equilibrium",
    "momentum_growth",
    "muon_equilibrium",
    "random_walk",
    "relaxation",
    "rising_rates",
    "sgd_equilibrium",
    "sgd_growth",
]
