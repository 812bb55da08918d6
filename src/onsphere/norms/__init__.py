"""Every normalization method as one row of one table, and the modules made from it."""

from onsphere.norms.activation import ActivationNorm
from onsphere.norms.invariance import InvarianceRow, invariance_table
from onsphere.norms.methods import METHODS, Method, method
from onsphere.norms.weight import SpectralSphere, WeightSphere, parametrize

__all__ = [
    "METHODS",
    "ActivationNorm",
    "InvarianceRow",
    "Method",
    "SpectralSphere",
    "WeightSphere",
    "invariance_table",
    "method",
    "parametrize",
]
