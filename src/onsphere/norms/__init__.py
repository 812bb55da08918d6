"""Every normalization method as one row of one table, and the modules made from it."""

from onsphere.norms.activation import ActivationNorm
from onsphere.norms.composites import COMPOSITES
from onsphere.norms.invariance import InvarianceRow, invariance_table
from onsphere.norms.methods import METHODS, TABLE, method
from onsphere.norms.modules.batch_renorm import BatchRenorm
from onsphere.norms.modules.cosine import CosineLinear
from onsphere.norms.modules.dora import LowRankDirection, dora
from onsphere.norms.modules.dynamic_tanh import DynamicTanh
from onsphere.norms.modules.evonorm import EvoNormS0
from onsphere.norms.modules.modulated_conv import ModulatedConv2d
from onsphere.norms.modules.qk_norm import QKNorm
from onsphere.norms.modules.response_norm import GlobalResponseNorm, ThresholdedLinearUnit
from onsphere.norms.modules.robust_norm import RobustNorm
from onsphere.norms.modules.switchable_norm import SwitchableNorm
from onsphere.norms.row import Composite, Method
from onsphere.norms.weight import SpectralSphere, WeightSphere, parametrize

__all__ = [
    "COMPOSITES",
    "METHODS",
    "TABLE",
    "ActivationNorm",
    "BatchRenorm",
    "Composite",
    "CosineLinear",
    "DynamicTanh",
    "EvoNormS0",
    "GlobalResponseNorm",
    "InvarianceRow",
    "LowRankDirection",
    "Method",
    "ModulatedConv2d",
    "QKNorm",
    "RobustNorm",
    "SpectralSphere",
    "SwitchableNorm",
    "ThresholdedLinearUnit",
    "WeightSphere",
    "dora",
    "invariance_table",
    "method",
    "parametrize",
]
