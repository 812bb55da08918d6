"""Which weights live on which spheres: units (exact), certificates (numeric), audit."""

from onsphere.symmetry.audit import Audit, audit
from onsphere.symmetry.canonical import CannotCanonicalize, canonicalize
from onsphere.symmetry.claims import Leak, Rescaling, Sphere, WeightReport
from onsphere.symmetry.operation import Operation
from onsphere.symmetry.rules import register_rule
from onsphere.symmetry.shift import Shift
from onsphere.symmetry.trace import ModelError, Trace, UnknownOp, trace
from onsphere.symmetry.units import Unit

__all__ = [
    "Audit",
    "CannotCanonicalize",
    "Leak",
    "ModelError",
    "Operation",
    "Rescaling",
    "Shift",
    "Sphere",
    "Trace",
    "Unit",
    "UnknownOp",
    "WeightReport",
    "audit",
    "canonicalize",
    "register_rule",
    "trace",
]
